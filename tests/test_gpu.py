"""`make gpu` on a CPU, very small: every stage, so that no slip costs the first call on a GPU; and what a later call
does."""

import argparse
import json

import gpu
import pytest
from conftest import script_or_skip

TINY = "--layout=1+1x2+1 --model_dim=32 --train_seq_len=32 --train_batch_tokens=512"
EXPECTED = {
    "data": ["smoke"],
    "machine": ["versions", "copies", "product 256x256x256"],
    "exact": ["goldens", "gradients, 1 pass", "gradients, 2 passes"],
    "step": ["1 pass", "1 pass, parts", "2 passes", "2 passes, parts"],
    "kernels": ["one step"],
    "attention": ["torch's choice", *gpu.ATTENTION],
    "baseline": ["1 pass"],
    "run": ["trained", "scores", "scores agree"],
    "choices": ["CUDNN_ATTENTION, 2 passes", "EFFICIENT_ATTENTION, 2 passes", "mix-order reductions, 1 pass",
                "mix-order reductions, 2 passes"],
}  # fmt: skip


@pytest.fixture
def args(tmp_path, monkeypatch):
    script_or_skip("train_gpt")
    monkeypatch.chdir(gpu.ROOT)
    monkeypatch.delenv("OUT", raising=False)
    options = dict(device="cpu", preset="smoke", settings=TINY, seconds=4.0, steps=1, budget=590.0)
    given = ["--device=cpu", "--preset=smoke", f"--settings={TINY}", f"--out={tmp_path}"]
    return argparse.Namespace(**options, out=tmp_path, given=given)


def findings(args) -> dict:
    return json.loads((args.out / "gpu.json").read_text())


@pytest.mark.parametrize("stage", gpu.STAGES)
def test_a_stage_finds_what_it_should(stage, args):
    if stage == "choices":  # the kernel that torch takes is not timed again
        gpu.Findings(args.out / "gpu.json", "attention").part("torch's choice", lambda: {"kernel": "FLASH_ATTENTION"})
    assert gpu.do_stage(stage, args) == 0
    found = findings(args)[stage]
    assert [*found] == [*EXPECTED[stage], "done"]
    for name in EXPECTED[stage]:
        runs = stage != "attention" or name in ("torch's choice", "FLASH_ATTENTION", "MATH")  # the CPU's kernels
        assert ("error" not in found[name]) == runs, found
        errors = found[name].get("gradient_errors", found[name])
        assert errors.get("median", 0) < 0.05, found  # bfloat16 beside float32
        assert found[name].get("step_ms_apart", 1) > 0 and found[name].get("forward_ms", 1) > 0


def test_the_plan_fits_one_call_and_its_processes_start(args, monkeypatch):
    assert sum(gpu.STAGES.values()) < args.budget and set(EXPECTED) == set(gpu.STAGES)
    assert gpu.run_stage("machine", args, gpu.unpack_wheels(args.out), 100) == "done", (
        args.out / "gpu.log"
    ).read_text()
    assert "done" in findings(args)["machine"]
    assert gpu.run_stage("exact", args, gpu.unpack_wheels(args.out), 0.1) == "ended after 0 s"


def test_a_later_call_does_what_is_missing_or_failed(args, monkeypatch):
    done, faults = [], ["b"]

    def work(name):
        done.append(name)
        if name in faults:
            raise RuntimeError("no\nsuch kernel")
        return {"number": 1}

    def stage(args, found):
        for name in "abc":
            found.part(name, work, name, may_fail=name == "c")

    monkeypatch.setattr(gpu, "step", stage)
    assert gpu.do_stage("step", args) == 1 and [*findings(args)["step"]] == ["a", "c"]
    faults.clear()
    assert gpu.do_stage("step", args) == 0 and done == ["a", "b", "c", "b"]
    assert gpu.do_stage("step", args) == 0 and len(done) == 4
    faults.append("d")
    gpu.Findings(args.out / "gpu.json", "step").part("d", work, "d", may_fail=True)
    assert findings(args)["step"]["d"]["error"] == "no"


def test_stages_get_what_the_others_leave_and_findings_are_handed_out(args, monkeypatch, tmp_path, capsys):
    limits, given = {}, tmp_path / "given"
    monkeypatch.setenv("OUT", str(given))
    gpu.Findings(args.out / "gpu.json", "exact").part("done", dict)

    def run_stage(name, args, env, limit):
        limits[name] = limit
        if name != "run":
            gpu.Findings(args.out / "gpu.json", name).part("done", dict)
        return "done"

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    parser = argparse.ArgumentParser()
    assert gpu.do_all(args, parser) == 1 and "exact" not in limits  # `run` is missing
    later = sum(seconds for name, seconds in gpu.STAGES.items() if name not in ("data", "exact", "machine"))
    assert limits["machine"] == pytest.approx(590 - later, abs=5) and limits["choices"] > 550
    assert (given / "gpu.json").is_file() and "done before" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "run_stage", lambda name, *_: name)
    assert gpu.do_all(args, parser) == 1 and gpu.do_all(argparse.Namespace(**vars(args) | {"budget": 1.0}), parser) == 1
    assert "left for the next call" in capsys.readouterr().out
