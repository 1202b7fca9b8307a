"""MODE=preflight: everything before a run's first step, what a run would take, and nothing left behind."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from conftest import assert_refused, run_in_process, script_or_skip, tree
from test_distributed import start_ranks

BLOCK = r"""---
steps:    (?P<steps>\d+), (?P<tokens>\S+) tokens, (?P<flops>\S+) FLOPs expected; a step \(measured\): (?P<ms>.*)
paid:     (?P<paid>\S+) minutes a seed: start (?P<start>\S+) \(\S+ s compiling, measured\), \
training (?P<training>\S+), evaluation (?P<scoring>\S+) \((?P<times>\S+) times, from (?P<few>\d+) of (?P<all>\d+) \
windows\), export (?P<export>\S+) \(estimated\)
room:     \S+ GiB of memory \(measured\); \S+ GB of \S+ free on disk
data:     [0-9a-f]{64} .*
artifact: (?P<fits>.*): code \d+ \+ about (?P<size>\d+) of (?P<cap>\d+) bytes, .* bits a weight
""".replace("\\\n", "")


def preflight(module, *flags, **env):
    return run_in_process(module, "--mode=preflight", *flags, **env)


def block(outcome):
    """The closing block of a run that would start."""
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return re.search(BLOCK, outcome.out + "\n")


def test_a_run_that_would_start_is_said_to_and_nothing_is_left(script, tiny, tmp_path, monkeypatch):
    seen, real = [], script.Engine.warm_up

    def warm_up(self, stream, loops, times=1):
        before = [{name: np.array(v) for name, v in part.items()} for part in (self.weights(), self.optimizer.state())]
        real(self, stream, loops, times)
        after = self.weights(), self.optimizer.state()
        assert all(np.array_equal(a[name], b[name]) for a, b in zip(before, after) for name in a)
        assert self.optimizer.steps == 0
        seen.append((loops, times))

    monkeypatch.setattr(script.Engine, "warm_up", warm_up)
    outcome = preflight(script, "--val_loss_every=3", "--eval_loops=2,1", "--run_id=a", **tiny)
    said = block(outcome)
    assert said["steps"] == "8" and float(said["tokens"]) == 8 * 256, outcome.out
    assert re.fullmatch(r"[\d.]+ ms with 1 pass, [\d.]+ ms with 2 passes", said["ms"])
    assert seen == [(1, 1), (2, 1), (1, 3), (2, 3)]
    assert 4.5 < float(said["times"]) < 5  # at steps 3 and 6, at the end, from disk, and once with one pass
    parts = sum(float(said[name]) for name in ("start", "training", "scoring", "export"))
    assert float(said["paid"]) == pytest.approx(parts, abs=0.03) and said["export"] == "0.00"
    assert said["fits"] == "likely fits" and int(said["cap"]) == 16_000_000
    assert list((tmp_path / "logs").iterdir()) == []
    monkeypatch.undo()
    run = run_in_process(script, "--run_id=a", **tiny)
    result = json.loads((tmp_path / "logs" / "a" / "result.json").read_text())
    assert run.code == 0 and float(said["flops"]) == pytest.approx(result["train_flops"], rel=1e-2)
    size = result["bytes_artifact"]
    assert size <= int(said["size"]) * 1.3, "what is likely is not far below what it was"


def test_what_stops_a_run_stops_its_preflight(script, tiny, tmp_path, monkeypatch):
    (tmp_path / "logs" / "old").mkdir(parents=True)
    (tmp_path / "file").write_text("no folder")
    before = tree(tmp_path)
    for flags, pattern in (
        (["--data_path=nowhere"], "nowhere: expected fineweb_val"),
        (["--tokenizer_path=nowhere.model"], "nowhere.model: expected"),
        (["--run_id=old"], "RUN_ID: expected a new name"),
        ([f"--log_dir={tmp_path}/file/logs"], "LOG_DIR: expected a folder to write to"),
        (["--bytes_cap=1000"], "BYTES_CAP: expected code"),
        (["--artifact=a.rgpt"], "ARTIFACT, CHECKPOINT: expected MODE=eval or MODE=sample, found MODE=preflight"),
        (["--iterations=0"], "one budget"),
        (["--run_id=new", "--resume=1"], "a checkpoint to go on from"),
        (["--quantizer=trellis", "--calib_tokens=8"], "CALIB_TOKENS: expected at least"),
    ):
        assert_refused(preflight(script, *flags, **tiny), pattern)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(script.shutil, "disk_usage", lambda _: full)
        assert_refused(preflight(script, **tiny), "LOG_DIR: expected .* bytes free for checkpoints, found 1000")
    assert tree(tmp_path) == before


def test_a_signal_to_another_process_ends_it_on_all(script, tiny, monkeypatch):
    """Or those that got none would wait in the next exchange for those that did."""
    monkeypatch.setattr(script.Run, "clock", lambda run: (0.0, True))
    outcome = preflight(script, **tiny)
    assert outcome.code == 128 + signal.SIGTERM and "---" not in outcome.out, outcome


def test_a_step_that_does_not_run_is_one_line(script, tiny, tmp_path, monkeypatch):
    """Memory that does not do is found here, without a traceback."""

    def step(*_):
        raise RuntimeError("out of memory:\n tried to allocate 99 GiB")

    monkeypatch.setattr(script.Engine, "step", step)
    outcome = preflight(script, **tiny)
    assert (outcome.code, outcome.err) == (1, "error: process 0: out of memory: tried to allocate 99 GiB\n")
    assert "---" not in outcome.out and list((tmp_path / "logs").iterdir()) == []
    with pytest.raises(RuntimeError):
        run_in_process(script, **tiny)


def test_of_a_resumed_run_what_is_left_is_told_and_its_folder_stays(script, tiny, tmp_path, monkeypatch):
    flags = ("--run_id=a", "--checkpoint_every=4")
    real, count = script.Engine.step, []

    def step(self, *args):
        count.append(1)
        if len(count) == 9:  # two warm up; step 5, which will be done again, is in metrics.jsonl
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(script.Engine, "step", step)
        run_in_process(script, *flags, **tiny)
    before = tree(tmp_path)
    assert "logs/a/checkpoint.safetensors" in before
    outcome = preflight(script, *flags, "--resume=1", **tiny)
    said = block(outcome)
    assert said["steps"] == "8" and "resume: from step:4" in outcome.out and tree(tmp_path) == before


@pytest.mark.parametrize(
    "budgets", [(0, 90.0, 0.0), (500, 0.0, 0.0), (0, 0.0, 3e12), (300, 60.0, 3e12), (70, 60.0, 2e12), (0, 60.0, 9e11)]
)
@pytest.mark.parametrize("done", (0, 60))
def test_expected_steps_are_those_of_the_training_loop(any_script, config, budgets, done):
    """Counted one by one, with the functions that the loop asks."""
    m = any_script
    steps, seconds, flops = budgets
    c = config(m, layout="1+2x3+1", loop_schedule="0:1,0.3:2,0.5:3", iterations=steps, max_wallclock_seconds=seconds,
               max_train_flops=flops)  # fmt: skip
    took = {1: 0.1, 2: 0.17, 3: 0.26}
    state, used = m.TrainState(done, done * 256, done * 1e9, done * 0.1, 1), np.array([done, done * 0.1, done * 1e9])
    found = m.expected_use(c, state, took)
    while (at := m.progress_of(c, *used[:2], used[2])) < 1:
        loops = m.loops_at(c, at)
        used += [1, took[loops], m.train_flops_per_token(c, loops) * c.train_batch_tokens]
    assert np.allclose(found, used, rtol=0.02, atol=2), (found, used)


def test_drawn_passes_are_expected_at_their_mean(any_script, config):
    c = config(any_script, layout="1+2x4+1", loop_schedule="", loop_sample=8, iterations=1000)
    took = {passes: passes / 10 for passes in range(1, 9)}
    steps, seconds, _ = any_script.expected_use(c, any_script.TrainState(), took)
    drawn = np.mean([any_script.draw_loops(c, 4, step) for step in range(1000)])
    assert steps == 1000 and seconds == pytest.approx(100 * drawn, rel=0.1)


def test_the_export_is_paid_for_and_named(any_script, tiny):
    flags = ("--quantizer=trellis", "--target_bytes=400000", "--max_wallclock_seconds=90", "--iterations=0")
    said = block(preflight(any_script, *flags, "--calib_seconds=30", **tiny))
    assert 0.5 < float(said["export"]) < 0.6 and float(said["training"]) == pytest.approx(1, abs=0.02)
    assert int(said["steps"]) > 100 and said["fits"] == "likely fits"


def test_two_ranks_check_time_and_end_together(tiny, tmp_path):
    module = script_or_skip("train_gpt")
    (code, out, err), (code_1, out_1, _) = start_ranks(module, 2, "--mode=preflight", **tiny)
    assert (code, code_1, out_1) == (0, 0, ""), out + err
    assert re.search(BLOCK, out)["steps"] == "8" and "processes: 2" in out
    assert list((tmp_path / "logs").iterdir()) == []
