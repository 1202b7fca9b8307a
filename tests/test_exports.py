"""records/exports.py: many exports of trained models, a line each, resumed where they stopped, and a report."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
import exports
from conftest import ROOT, TINY, run_in_process, script_or_skip

PLAN = """
about = "Tiny models."
models = "tiny"
runs = ["loop"]
seeds = [1, 2]
[base]
calib_tokens = 512
[exports.absmax]
quantizer = "absmax"
[exports.trellis]
quantizer = "trellis"
quant_loss = [0.01, 0.1]
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A plan in a folder of its own, with the logs and the matrices that it looks for beside it."""
    monkeypatch.setattr(exports, "load_script", lambda name: script_or_skip(Path(name).stem))  # loads it once
    monkeypatch.setattr(exports, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(exports, "MATRICES", tmp_path / "ablations")
    path = tmp_path / "plans" / "few.toml"
    path.parent.mkdir()
    path.write_text(PLAN)
    return path


def train(data, seed: int, **settings):
    env = (
        TINY
        | data.env
        | {
            "LOG_DIR": str(exports.LOGS / "tiny"),
            "RUN_ID": f"loop_seed{seed}",
            "SEED": str(seed),
            "LR_WARMUP_STEPS": "0",
        }
    )
    return run_in_process(exports.load_script("train_gpt.py"), **(env | settings))


def export(path: Path) -> list[dict]:
    assert exports.main([str(path)]) == 0
    return exports.read_lines(exports.read_plan(path))


def interrupt_after(monkeypatch, count: int):
    """Stops the tool as by Ctrl-C in the export after `count`."""
    whole, stop = exports.Model.export, iter(range(99))

    def interrupted(*args):
        if next(stop) == count:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(exports.Model, "export", interrupted)


def test_exports_resume_and_report(data, plan, capsys, monkeypatch):
    for seed in (1, 2):
        assert train(data, seed).code == 0
    with monkeypatch.context() as patched:
        interrupt_after(patched, 4)
        with pytest.raises(KeyboardInterrupt):
            exports.main([str(plan)])
    lines = plan.with_suffix("") / "exports.jsonl"
    assert len(lines.read_text().splitlines()) == 4 and not list(lines.parent.glob("*.tmp"))
    with open(lines, "a") as file:
        file.write('{"run": "loop", "seed"')  # a line that was cut off
    capsys.readouterr()
    found = export(plan)
    assert "6 exports, 2 to do" in capsys.readouterr().out and len(found) == 6
    for line in found:
        result = json.loads((exports.LOGS / f"tiny/loop_seed{line['seed']}/result.json").read_text())
        assert line["val_bpb_raw"] == pytest.approx(result["val_bpb_raw"], abs=1e-4) and not line["partial"]
        assert line["gap"] == line["val_bpb"] - line["val_bpb_raw"] and 0.3 < line["bits_per_weight"] < 9
        assert line["shuffle"] and line["bytes_code"] == len((ROOT / "train_gpt.py").read_bytes())
    by = {(line["kind"], line["settings"].get("quant_loss"), line["seed"]): line for line in found}
    for seed in (1, 2):  # as at the end of the runs, which export with absmax
        result = json.loads((exports.LOGS / f"tiny/loop_seed{seed}/result.json").read_text())
        assert by["absmax", None, seed]["bytes_artifact"] == result["bytes_artifact"]
        assert by["absmax", None, seed]["val_bpb"] == pytest.approx(result["val_bpb"], abs=1e-4)
        assert by["trellis", 0.1, seed]["bytes_artifact"] < by["trellis", 0.01, seed]["bytes_artifact"]
    assert by["trellis", 0.01, 2]["loss_aimed"] == pytest.approx(0.01) and by["trellis", 0.01, 2]["calib_seconds"] > 0
    table = (plan.with_suffix("") / "README.md").read_text()
    mean = sum(by["trellis", 0.01, seed]["gap"] for seed in (1, 2)) / 2
    row = next(line for line in table.splitlines() if "| loss=0.01 | 2 |" in line)
    assert f"| {mean:.4f} |" in row and "| trellis |" in row and row.endswith("| 0.0100 |")
    assert (plan.with_suffix("") / "exports.png").stat().st_size > 5000
    assert "still to be done" not in table


def test_a_model_that_diverged_is_skipped_with_a_line(data, plan, capsys, monkeypatch):
    """Two blew up at their last step and left weights, one in training and left none, one is sound."""
    plan.write_text(PLAN.replace("[1, 2]", "[1, 2, 3, 4]"))
    assert train(data, 1).code == 0
    for seed, rate in ((2, {"SCALAR_LR": "1e36"}), (4, {"MATRIX_LR": "1e38"})):
        assert train(data, seed, ITERATIONS="1", WARMDOWN_FRAC="0", **rate).code == 1
        folder = exports.LOGS / f"tiny/loop_seed{seed}"
        (folder / "model.safetensors").write_bytes((folder / "checkpoint.safetensors").read_bytes())
    kept = exports.MATRICES / "tiny/loop_seed3"
    kept.mkdir(parents=True)
    (kept / "diverged.json").write_text('{"diverged": "step 3: expected a finite loss"}')
    whole = exports.Model.raw_bpb  # a larger model of such weights may have a score, by luck
    monkeypatch.setattr(exports.Model, "raw_bpb", lambda m, loops: 5.0 if m.config.seed == 4 else whole(m, loops))
    found = export(plan)
    assert len(found) == 12 and [line["seed"] for line in found if "gap" in line] == [1, 1, 1]
    out = capsys.readouterr().out
    assert "loop 2 absmax {'quantizer': 'absmax'}: skipped: its weights score nan" in out
    assert "skipped: its training diverged (step 3: expected a finite loss)" in out
    text = (plan.with_suffix("") / "README.md").read_text()
    assert "**Left out:** `loop` seed 2: its weights score nan before export; `loop` seed 3: its training" in text
    assert "`loop` seed 4: blocks." in text
    assert "still to be done" not in text and "NaN" not in (plan.with_suffix("") / "exports.jsonl").read_text()
    export(plan)
    assert "12 exports, 0 to do" in capsys.readouterr().out


@pytest.mark.parametrize("count", ["packed", "0"])
def test_code_is_counted_as_the_run_would(data, plan, count):
    plan.write_text(PLAN.replace("[1, 2]", "[1]").replace("calib", f'count_code = "{count}"\ncalib'))
    assert train(data, 1, COUNT_CODE=count).code == 0
    result = json.loads((exports.LOGS / "tiny/loop_seed1/result.json").read_text())
    assert {line["bytes_code"] for line in export(plan)} == {result["bytes_code"]}
    assert result["bytes_code"] < len((ROOT / "train_gpt.py").read_bytes()) / 2


def test_other_script_and_missing_weights(data, plan):
    with pytest.raises(exports.InputError, match=r"model\.safetensors: expected the weights of finished.*/tiny.toml$"):
        exports.main([str(plan)])
    plan.write_text(PLAN.replace('["loop"]', '["loop", "other/wide"]'))
    with pytest.raises(exports.InputError, match=r"other/wide_seed2/model\..*/(tiny|other).toml and python .*toml$"):
        exports.main([str(plan)])
    plan.write_text(PLAN)
    lines = plan.with_suffix("") / "exports.jsonl"
    old = dict(run="loop", seed=1, kind="absmax", settings={"quantizer": "absmax"}, script_sha256="0")
    lines.write_text(json.dumps(old) + "\n")
    with pytest.raises(exports.InputError, match="expected exports of this train_gpt.py, found some of another"):
        exports.main([str(plan)])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("quant_loss = [0.01, 0.1]", "matrix_lr = 1", r"\[exports.trellis\] matrix_lr: expected one of bytes_cap"),
        ("quant_loss = [0.01, 0.1]", "quant_sigma = 1", r"\[exports.trellis\] quant_sigma: expected one of"),
        ("quant_loss = [0.01, 0.1]", 'quant_loss = "low"', r'QUANT_LOSS \(flag\): expected a number, found "low"'),
        ('quantizer = "trellis"', 'quantizer = "gptq"', "QUANTIZER: expected one of absmax, trellis"),
        ("calib_tokens = 512", "seed = 1", r"\[base\] seed: expected one of"),
        ('models = "tiny"', "", "models: expected a value, found none"),
        ("seeds = [1, 2]", "seeds = []", "seeds: expected different whole numbers"),
        ("about", "abuot", "abuot: expected one of about"),
        ("[base]", "[base", "expected TOML, found an error"),
    ],
)
def test_refusals(plan, old, new, expected):
    plan.write_text(PLAN.replace(old, new))
    with pytest.raises(exports.InputError, match=expected):
        exports.main([str(plan)])


def test_the_trial_plan_fits_the_script():
    plan = exports.read_plan(ROOT / "records" / "exports" / "smoke.toml")
    exports.check_settings(plan, exports.load_script("train_gpt.py"))
    assert len(plan.exports) == 3
    plan.exports.append(("t", {"quantizer": "trellis", "eval_loops": 2, "quant_loss": "0.01"}))
    exports.check_settings(plan, exports.load_script("train_gpt.py"))
    parsed = {"quantizer": "trellis", "eval_loops": "2", "quant_loss": 0.01}
    assert plan.exports[-1][1] == parsed  # as the script has them
