"""Several processes on this machine follow one process: the same tokens, losses and score; and they end together."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    assert_refused,
    clean_environment,
    random_weights,
    run_in_process,
    script_or_skip,
    start_process,
    write_dataset,
)

# Makes a process that of its own rank: a second later than the rank before, with a clock that is a second ahead, and,
# in ranks above 0, with other settings or a fault.
BEFORE = """
import os, time
rank = int(os.environ.get("RANK") or os.environ.get("MLX_RANK") or 0)
time.sleep(rank)
strftime = time.strftime
time.strftime = lambda form: strftime(form, time.localtime(time.time() + rank))
if rank:
    os.environ.update(pair.split("=", 1) for pair in os.environ.get("OF_LATER_RANKS", "").split())
if rank and "FAULT_OF_LATER_RANKS" in os.environ:
    import numpy
    def fail(*args):
        raise RuntimeError("this rank has a fault")
    numpy.stack = fail
"""
WRAPPER = f"""
import runpy, sys
{BEFORE}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def rows_of(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def launch(command, env, timeout=150):
    """(exit code, standard output, standard error) of a launcher."""
    env = clean_environment(**env, OMP_NUM_THREADS=1)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def wrapped(module, folder):
    """The command of one rank: Python, the wrapper, the script."""
    (folder / "wrapper.py").write_text(WRAPPER)
    return [str(folder / "wrapper.py"), str(ROOT / f"{module.__name__}.py")]


def torchrun(module, folder, processes, *flags, **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return launch([*command, *wrapped(module, folder), *flags], env)


def start_ranks(module, processes, *flags, timeout=100, **env):
    """The ranks without a launcher, which would be one more process to wait for, and which ends all when one ends.
    Returns [(exit code, standard output, standard error)] of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": probe.getsockname()[1], "WORLD_SIZE": processes}
    env |= {"OMP_NUM_THREADS": 1}
    ranks = [start_process(module, *flags, before=BEFORE, **env, RANK=i, LOCAL_RANK=i) for i in range(processes)]
    ends = time.monotonic() + timeout
    try:
        said = [process.communicate(timeout=max(1, ends - time.monotonic())) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(ranks, said)]


@pytest.fixture(scope="module")
def mlx_launch():
    """`mlx_launch(module, folder, processes, *flags, **env)`, or a skip with the reason."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("mlx.launch", path=places)
    if not found:
        pytest.skip("mlx.launch is not installed")
    probe = "import mlx.core as mx; mx.distributed.init(backend='ring', strict=True); "
    probe += "print(mx.distributed.all_sum(mx.array(1.0)).item())"
    command = [found, "-n", "2", "--backend", "ring", "--", sys.executable]
    try:
        code, out, err = launch([*command, "-c", probe], {}, timeout=30)
    except subprocess.TimeoutExpired:
        pytest.skip("mlx.launch does not come back on this machine")
    if code or "2.0" not in out:
        pytest.skip(f"mlx.launch does not work on this machine: {(err or out).strip()[-200:]}")

    def start(module, folder, processes, *flags, **env):
        command[2] = str(processes)
        return launch([*command, *wrapped(module, folder), *flags], env)

    return start


def compare(module, tiny, tmp_path, several, processes, steps, *flags):
    """`several(module, folder, processes, *flags, **env)` runs the processes, which are not told a RUN_ID; they make
    one run, whose losses are those of this process, across a switch."""
    flags = (f"--iterations={steps}", f"--val_loss_every={steps // 2}", "--checkpoint_every=4", *flags)
    assert run_in_process(module, "--run_id=one", *flags, **tiny).code == 0
    code, out, err = several(module, tmp_path, processes, *flags, **tiny | {"LOG_DIR": tmp_path / "several"})
    assert code == 0, out[-3000:] + err[:6000]
    one = tmp_path / "logs" / "one"
    (many,) = (tmp_path / "several").iterdir()
    left, right = rows_of(one), rows_of(many)
    assert [(row["step"], row["loops"]) for row in left] == [(row["step"], row["loops"]) for row in right]
    c = module.load_config(list(flags), tiny, "")[0]
    passes = [module.draw_loops(c, 1 if step < steps / 2 else 2, step) for step in range(steps)]
    assert [row["loops"] for row in left if "train_loss" in row] == passes and {1, 2} <= set(passes)
    assert max(passes) > 2 or not c.loop_sample
    for a, b in zip(left, right):
        for key in ("train_loss", "val_loss"):
            if key in a:
                assert b[key] == pytest.approx(a[key], abs=1e-4), (key, a["step"])
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, many)]
    assert [r["world_size"] for r in results] == [1, processes] and results[1]["run_id"] == many.name
    for key in ("steps", "tokens", "train_flops", "loops", "config_sha256", "dataset_sha256", "val_tokens", "complete"):
        assert results[0][key] == results[1][key], key
    for key in ("val_loss_raw", "val_bpb_raw"):
        assert results[1][key] == pytest.approx(results[0][key], abs=2e-4)
    assert results[1]["val_bpb"] == pytest.approx(results[0]["val_bpb"], abs=2e-3)  # a rounding may fall otherwise
    log = (many / "train.log").read_text()
    mentions = module.script_source().count("roundtrip_exact val_loss")
    assert log.count("roundtrip_exact val_loss") == mentions + 1
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in many.iterdir())  # rank 0 alone writes


# Every parameter that a number of passes may leave without a gradient, passes that are drawn by step, and a calibration
# over the ranks.
EVERYTHING = (
    *("--lora_rank=2", "--loop_gate=gain", "--loop_gate_init=0", "--loop_sample=4"),
    *("--quantizer=trellis", "--quant_loss=0.00001", "--calib_tokens=160", "--round_from=0.6"),
)


def test_two_torch_ranks(tiny, tmp_path):
    compare(script_or_skip("train_gpt"), tiny, tmp_path, torchrun, 2, 8, *EVERYTHING)


def test_three_torch_ranks_with_unequal_shares(tiny, tmp_path):
    """8 sequences on 3 ranks, in microbatches of one or two."""

    def several(module, folder, *args, **env):
        ranks = start_ranks(module, *args, **env)
        assert all(out == "" for _, out, _ in ranks[1:])
        return max(code for code, _, _ in ranks), ranks[0][1], "".join(err for _, _, err in ranks)

    flags = ("--microbatch_tokens=64", "--eval_stride=16")
    compare(script_or_skip("train_gpt"), tiny, tmp_path, several, 3, 6, *flags)


def test_two_mlx_ranks(tiny, tmp_path, mlx_launch):
    compare(script_or_skip("train_gpt_mlx"), tiny, tmp_path, mlx_launch, 2, 8, *EVERYTHING)


# ---------------------------------------------------------------------------------------------------------------------
# What ends one rank ends all, with one line
# ---------------------------------------------------------------------------------------------------------------------


def assert_one_line_each(ranks, pattern):
    """All ranks ended with exit code 1, each with an `error:` line at most, and one of these says why."""
    for code, _, err in ranks:
        assert code == 1, ranks
        lines = [line for line in err.splitlines() if not line.startswith("[W")]  # warnings of torch
        assert len(lines) <= 1 and all(line.startswith("error: ") for line in lines), ranks
    assert any(re.search(pattern, err) for _, _, err in ranks), ranks


def test_ranks_that_do_not_share_a_disk(tiny, tmp_path):
    """The first has the files, and hands the artifact's bytes to the others."""
    env = tiny | {"LOG_DIR": tmp_path / "first", "OF_LATER_RANKS": f"LOG_DIR={tmp_path / 'second'}"}
    ranks = start_ranks(script_or_skip("train_gpt"), 2, "--iterations=2", "--run_id=a", **env)
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    assert json.loads((tmp_path / "first" / "a" / "result.json").read_text())["complete"]
    assert not (tmp_path / "second").exists()


def test_a_refusal_on_one_rank_ends_both(tiny, tmp_path):
    module = script_or_skip("train_gpt")
    ranks = start_ranks(module, 2, **tiny, OF_LATER_RANKS=f"DATA_PATH={tmp_path}/missing")
    assert_one_line_each(ranks, f"error: {tmp_path}/missing: expected fineweb_")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("setting", ("SEED=5", "QUANTIZER=trellis"))
def test_a_setting_of_one_rank_alone_ends_both(tiny, tmp_path, setting):
    """It would train another model, or wait for ever."""
    name, value = setting.split("=")
    ranks = start_ranks(script_or_skip("train_gpt"), 2, **tiny, OF_LATER_RANKS=setting)
    first = tiny | {"SEED": "1337", "QUANTIZER": "absmax"}
    assert_one_line_each(ranks, f"error: {name}: expected {first[name]}, as process 0 has, found {value} on 1")
    assert not (tmp_path / "logs").exists()


def test_other_data_on_one_rank_ends_both(tiny, data, tmp_path):
    other = write_dataset(tmp_path / "other", [data.train[::-1]], [data.val])
    ranks = start_ranks(script_or_skip("train_gpt"), 2, **tiny, OF_LATER_RANKS=f"DATA_PATH={other}")
    assert_one_line_each(ranks, "error: DATA: expected ")


def test_other_weights_on_one_rank_end_both(tiny, config, tmp_path):
    m = script_or_skip("train_gpt")
    for seed in (0, 1):
        weights = {f"weights.{name}": value for name, value in random_weights(m, config(m), seed).items()}
        m.save_tensors(tmp_path / f"{seed}.safetensors", weights, m.about(config(m), 2))
    flags = ("--mode=eval", f"--checkpoint={tmp_path / '0.safetensors'}")
    ranks = start_ranks(m, 2, *flags, **tiny, OF_LATER_RANKS=f"CHECKPOINT={tmp_path / '1.safetensors'}")
    assert [code for code, _, _ in ranks] == [0, 0], ranks  # a flag wins on both
    env = tiny | {"MODE": "eval", "CHECKPOINT": tmp_path / "0.safetensors", "MICROBATCH_TOKENS": "0"}
    ranks = start_ranks(m, 2, **env, OF_LATER_RANKS=f"CHECKPOINT={tmp_path / '1.safetensors'} MICROBATCH_TOKENS=64")
    assert_one_line_each(ranks, "error: WEIGHTS: expected ")


def test_what_every_process_must_share(any_script):
    def engine(*said):
        return types.SimpleNamespace(exchange=lambda text: [text, *said])

    any_script.must_agree(engine('{"a": 1}', '{"a": 1}'), {"a": 1})
    with pytest.raises(any_script.Agreed, match="A: expected 1, as process 0 has, found 2 on 2"):
        any_script.must_agree(engine('{"a": 1}', '{"a": 2}'), {"a": 1})


def test_a_fault_on_one_rank_ends_both(tiny, tmp_path):
    module = script_or_skip("train_gpt")
    ranks = start_ranks(module, 2, **tiny, FAULT_OF_LATER_RANKS=1)
    assert_one_line_each(ranks, "error: process 1: this rank has a fault")


def test_a_setting_that_one_rank_refuses_ends_both(tiny, tmp_path):
    """Before the ranks know of each other: the launcher ends the one that waits."""
    module = script_or_skip("train_gpt")
    code, out, err = torchrun(module, tmp_path, 2, **tiny, OF_LATER_RANKS="NUM_HEADS=3")
    assert code == 1 and out == ""
    assert len(re.findall(r"^error: NUM_HEADS: expected .*, found 3", err, re.M)) == 1
    assert 'train_gpt.py", line' not in err  # the traceback is the launcher's own
    assert not (tmp_path / "logs").exists()


def test_a_refusal_on_one_mlx_rank_ends_both(tiny, tmp_path, mlx_launch):
    module = script_or_skip("train_gpt_mlx")
    code, out, err = mlx_launch(module, tmp_path, 2, **tiny, OF_LATER_RANKS=f"DATA_PATH={tmp_path}/missing")
    assert "Traceback" not in out + err
    assert len(re.findall(f"error: {tmp_path}/missing: expected fineweb_", out + err)) == 1
    assert not (tmp_path / "logs").exists()


LEFT_OVER = {
    "a rank alone": ({"RANK": "1"}, "RANK: .*below WORLD_SIZE=1, found 1"),
    "without an address": ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2: expected MASTER_ADDR"),
    "a word": ({"RANK": "none"}, 'RANK: expected a whole number.*found "none"'),
    "no process": ({"WORLD_SIZE": "0"}, "RANK: .*below WORLD_SIZE=0"),
    "a word on this host": ({"LOCAL_RANK": "x"}, 'LOCAL_RANK: expected a whole number.*found "x"'),
    "a rank on this host alone": ({"LOCAL_RANK": "3"}, "LOCAL_RANK: .*below WORLD_SIZE=1, found 3"),
    "below 0": ({"RANK": "-1"}, "RANK: expected a whole number"),
}


@pytest.mark.parametrize("case", LEFT_OVER)
def test_variables_left_over_from_another_launcher(tiny, tmp_path, case):
    variables, pattern = LEFT_OVER[case]
    assert_refused(run_in_process(script_or_skip("train_gpt"), **tiny, **variables), pattern, "unset")
    assert not (tmp_path / "logs").exists()


def test_empty_variables_are_none(tiny):
    module = script_or_skip("train_gpt")
    assert module.launched_as({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}) == (0, 1, 0)
    assert module.launched_as({}) == (0, 1, 0)
    address = {"MASTER_ADDR": "x", "MASTER_PORT": "1"}
    assert module.launched_as({"RANK": "3", "WORLD_SIZE": "4"} | address) == (3, 4, 3)
    assert module.launched_as({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"} | address) == (9, 16, 1)
