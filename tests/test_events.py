"""Everyday events lose no run, and what is said of them is true: signals at every moment, full disks, consoles that go
away, left-over variables, text that is not UTF-8, scores that are no numbers. The rest of stopping is in
test_resume."""

import errno
import io
import json
import math
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    ROOT,
    assert_refused,
    clean_environment,
    quicker_script,
    random_weights,
    run_in_process,
    write_dataset,
)

RUN = {"RUN_ID": "a", "CHECKPOINT_EVERY": "3", "VAL_LOSS_EVERY": "4", "VAL_MAX_TOKENS": "640"}


@pytest.fixture
def env(tiny):
    """The tiny run named a, with a checkpoint at step 3 and validation at step 4; of 8 steps."""
    return tiny | RUN


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "logs" / "a"


@pytest.fixture(autouse=True)
def unhandled():
    """A signal that nobody handles fails the test, not all of them; SIGHUP too, though they may run under nohup."""

    def fail(number, frame):
        pytest.fail(f"killed by signal {number}")

    before = {number: signal.signal(number, fail) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def unbroken():
    """model.safetensors of the run that nothing happened to, by script; filled by the first test that needs it."""
    return {}


def model_of_the_unbroken_run(script, env, unbroken, tmp_path):
    if script not in unbroken:
        assert run_in_process(script, **env | {"LOG_DIR": tmp_path / "unbroken"}).code == 0
        unbroken[script] = (tmp_path / "unbroken" / "a" / "model.safetensors").read_bytes()
    return unbroken[script]


def before_call(patch, owner, name, number, action):
    """Does `action()` right before call `number` (from 1) of a function or method; returns a list of its calls."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            action()
        return real(*args, **kwargs)

    patch.setattr(owner, name, wrapped)
    return calls


def send(*numbers):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def read_strictly(path):
    """JSON without NaN and Infinity, which json.loads lets pass."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {path}"))


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------
TERM, HANGUP, CTRL_C = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
# When: before which call of what. Validation of 640 tokens takes 3 calls, the two evaluations at the end as many.
MOMENTS = {
    "reading the data": ("Score", 1, 0),
    "first warm-up": ("Engine.warm_up", 1, 0),
    "second warm-up": ("Engine.warm_up", 2, 0),
    "training": ("Engine.step", 5, 3),
    "validation": ("Engine.token_losses", 2, 4),
    "scoring": ("Engine.token_losses", 8, 8),
    "export": ("export_model", 1, 8),
    "scoring from disk": ("read_artifact", 1, 8),
}
EVENTS = [
    (
        moment,
        (HANGUP, CTRL_C, TERM)[i % 3],
    )
    for i, moment in enumerate(MOMENTS)
]
EVENTS += [("training", TERM, TERM), ("training", HANGUP, HANGUP), ("training", TERM, HANGUP)]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: "-".join(map(str, event)))
def test_a_signal_loses_nothing(script, env, folder, tmp_path, unbroken, monkeypatch, event):
    """Whatever the signal and whenever it comes, once or twice: a checkpoint, an exit code that names it, advice that
    is true, and the run that follows the advice ends like one that nothing happened to."""
    moment, *numbers = event
    place, call, step = MOMENTS[moment]
    owner = script.Engine if place.startswith("Engine.") else script
    with monkeypatch.context() as patch:
        calls = before_call(patch, owner, place.removeprefix("Engine."), call, send(*numbers))
        outcome = run_in_process(script, **env)
    assert outcome.code == 128 + numbers[0] and outcome.err == "", outcome
    assert len(calls) == call, "went on with it"
    assert outcome.out.splitlines()[-1] == f"stopped by a signal after step {step}; go on with RUN_ID=a RESUME=1"
    assert read_strictly(folder / "result.json")["complete"] is False
    assert script.load_tensors(folder / "checkpoint.safetensors")[1]["state"]["step"] == step
    assert run_in_process(script, "--resume", **env).code == 0
    assert (folder / "model.safetensors").read_bytes() == model_of_the_unbroken_run(script, env, unbroken, tmp_path)


def test_a_resumed_run_is_stopped_before_its_first_step(script, env, folder, tmp_path, unbroken, monkeypatch):
    for resume in ((), ("--resume",), ("--resume",)):
        with monkeypatch.context() as patch:
            before_call(patch, script.Engine, "warm_up", 1, send(TERM))
            outcome = run_in_process(script, *resume, **env)
        assert outcome.code == 143 and "after step 0; go on with" in outcome.out, outcome
    assert run_in_process(script, "--resume", **env).code == 0
    assert (folder / "model.safetensors").read_bytes() == model_of_the_unbroken_run(script, env, unbroken, tmp_path)


def test_nohup_goes_on(any_script, env, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before_call(monkeypatch, any_script.Engine, "step", 5, send(HANGUP))
    assert run_in_process(any_script, **env).code == 0


def test_a_second_ctrl_c_ends_at_once(any_script):
    stop = any_script.StopSignal()
    send(CTRL_C, TERM, HANGUP)()
    assert stop.number == CTRL_C and signal.getsignal(CTRL_C) is signal.SIG_DFL
    assert signal.getsignal(TERM) == signal.getsignal(HANGUP) == stop.note


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("mode", "place"), [("eval", "evaluate"), ("sample", "sample"), ("export", "export_model")])
def test_ctrl_c_outside_training(script, config, env, tmp_path, monkeypatch, mode, place):
    c, path = config(script), tmp_path / "model.safetensors"
    weights = {f"weights.{name}": value for name, value in random_weights(script, c).items()}
    script.save_tensors(path, weights, script.about(c, 2))
    monkeypatch.setattr(script, place, interrupt)
    try:
        outcome = run_in_process(script, f"--mode={mode}", f"--checkpoint={path}", **env)
    except KeyboardInterrupt:
        pytest.fail("a traceback")  # which else ended the tests
    assert (outcome.code, outcome.err.splitlines()[-1]) == (130, "stopped by Ctrl-C")
    assert "Traceback" not in outcome.out + outcome.err


# ---------------------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------------------


def full_disk(patch, script, name, after=0):
    """Files of this name cannot be written, but for the first `after` times."""
    real, count = script.write_atomically, []

    def write(path, content):
        if path.name == name:
            count.append(1)
            if len(count) > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, content)

    patch.setattr(script, "write_atomically", write)


def test_disk_full_at_a_checkpoint(any_script, env, folder, monkeypatch):
    full_disk(monkeypatch, any_script, "checkpoint.safetensors")
    outcome = run_in_process(any_script, **env)
    assert outcome.code == 0 and outcome.out.count("No space left on device; going on") == 3, outcome  # 3, 6 and 8
    assert "notice: no checkpoint at step 6" in (folder / "train.log").read_text()
    assert read_strictly(folder / "result.json")["complete"] is False and (folder / "model.int6.rgpt").exists()


@pytest.mark.parametrize("written", [0, 1])
def test_advice_of_a_stop_whose_checkpoint_is_lost(any_script, env, folder, monkeypatch, written):
    with monkeypatch.context() as patch:
        full_disk(patch, any_script, "checkpoint.safetensors", after=written)
        before_call(patch, any_script.Engine, "step", 7, send(TERM))  # two steps warm up
        outcome = run_in_process(any_script, **env)
    last = outcome.out.splitlines()[-1]
    assert outcome.code == 143 and last.startswith("stopped by a signal after step 5; "), outcome
    if written:
        assert last.endswith("go on with RUN_ID=a RESUME=1, from step 3")
        outcome = run_in_process(any_script, "--resume", **env)
        assert outcome.code == 0 and "resume: from step:3" in outcome.out
    else:
        assert last.endswith("there is no checkpoint to go on from")
        assert_refused(run_in_process(any_script, "--resume", **env), "expected a checkpoint to go on from")
        assert_refused(run_in_process(any_script, **env), "RUN_ID: expected a new name", "or delete the folder$")


@pytest.mark.parametrize("name", ["model.int6.rgpt", "result.json"])
def test_disk_full_at_what_is_needed(any_script, env, folder, monkeypatch, name):
    """One line, and the advice in it works."""
    with monkeypatch.context() as patch:
        full_disk(patch, any_script, name)
        outcome = run_in_process(any_script, **env)
    assert outcome.code == 1 and outcome.err.count("\n") == 1, outcome
    assert name in outcome.err and "free some space, then go on with RUN_ID=a RESUME=1" in outcome.err
    assert "stopped: " in (folder / "train.log").read_text()
    if name == "model.int6.rgpt":
        result = read_strictly(folder / "result.json")
        assert result["complete"] is False and result["val_bpb"] is None and result["val_bpb_raw"] > 0
    outcome = run_in_process(any_script, "--resume", **env)
    assert outcome.code == 0 and (folder / name).exists(), outcome


def test_a_log_that_cannot_be_written(any_script, env, folder, monkeypatch):
    """train.log is full from the start, metrics.jsonl is a folder: said once, and the run ends well."""
    real = any_script.RunLog.claim

    def claim(self, c):
        real(self, c)
        (self.folder / "train.log").unlink()
        (self.folder / "train.log").symlink_to("/dev/full")
        (self.folder / "metrics.jsonl").mkdir(exist_ok=True)

    monkeypatch.setattr(any_script.RunLog, "claim", claim)
    outcome = run_in_process(any_script, "--checkpoint_every=0", **env)
    assert outcome.code == 0 and outcome.err == "" and outcome.out.count("lines are lost") == 1, outcome
    assert "score: " in outcome.out and read_strictly(folder / "result.json")["steps"] == 8
    assert run_in_process(any_script, "--resume", **env).code == 0


def test_halves_of_rows_in_the_metrics(any_script, env, folder, monkeypatch):
    with monkeypatch.context() as patch:
        before_call(patch, any_script.Engine, "step", 7, send(TERM))
        assert run_in_process(any_script, **env).code == 143
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "tra{"step": 5, "train_loss": 1}\n[3]\n\xff}\n{"step": 5, "tr')
    assert run_in_process(any_script, "--resume", **env).code == 0
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "train_loss" in row] == list(range(1, 9))


def test_files_have_the_modes_of_the_umask(any_script, env, folder):
    before = os.umask(0o027)
    try:
        assert run_in_process(any_script, **env).code == 0
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == dict.fromkeys(
        [path.name for path in folder.iterdir()], "0o640"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Consoles and text
# ---------------------------------------------------------------------------------------------------------------------


def start(name, env, *flags, **streams):
    """A script in a process of its own."""
    return subprocess.Popen([sys.executable, str(ROOT / f"{name}.py"), *flags], env=clean_environment(**env), **streams)


def test_a_terminal_that_is_closed(env, folder):
    """A progress bar and lines on a terminal that goes away, under nohup; and both streams full."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the child inherits it
    flags = ("--iterations=40", "--checkpoint_every=0")
    process = start("train_gpt", env, *flags, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL)
    with open("/dev/full", "w") as full:
        flags = ("--iterations=8", "--checkpoint_every=0", "--run_id=b")
        other = start(quicker_script(), env, *flags, stdout=full, stderr=full, stdin=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    while b"step:3/" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(60) == 0 and other.wait(60) == 0
    assert b"% |" in seen, "no progress bar: the test sees nothing of it"
    for name, steps in (("a", 40), ("b", 8)):
        assert read_strictly(folder.parent / name / "result.json")["steps"] == steps
        assert (folder.parent / name / "train.log").read_text().splitlines()[-1].startswith("files: ")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_that_the_terminal_lacks(any_script, monkeypatch, encoding):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    any_script.open_streams()
    any_script.say("日本 caf\udce9")
    any_script.complain("日本\ncaf\udce9")
    for stream in streams.values():
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)
        assert text.endswith("caf\\udce9\n") and ("日本" in text or "\\u65e5\\u672c" in text)


def test_environment_that_is_not_utf8(any_script, env, folder):
    assert_refused(run_in_process(any_script, **env, PROMPT="caf\udce9"), "PROMPT", "UTF-8 text")
    assert_refused(run_in_process(any_script, "--data_path=caf\udce9", **env), "DATA_PATH", "UTF-8 text")
    outcome = run_in_process(any_script, "--iterations=1", **env, NUM_LAYERS="caf\udce9")
    assert outcome.code == 0 and "NUM_LAYERS=caf\\udce9" in (folder / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_only_the_answer_stands_on_standard_output(script, config, env, tmp_path, monkeypatch, mode):
    """Notices go to standard error, of what a missing library costs, too."""
    c, path = config(script), tmp_path / "model.safetensors"
    weights = {f"weights.{name}": value for name, value in random_weights(script, c).items()}
    script.save_tensors(path, weights, script.about(c, 2))
    if script.FRAMEWORK == "mlx":
        monkeypatch.setattr(script, "OPENBLAS", False)
    flags = (f"--mode={mode}", f"--checkpoint={path}", "--sample_tokens=3", "--temperature=0")
    outcome = run_in_process(script, *flags, **env, NUM_LAYERS="3")
    assert outcome.code == 0 and "NUM_LAYERS=3" in outcome.err, outcome
    assert "notice" not in outcome.out and all(line.startswith("notice: ") for line in outcome.err.splitlines())
    assert script.FRAMEWORK == "torch" or sys.platform != "linux" or "libopenblas" in outcome.err
    if mode == "eval":
        assert outcome.out.startswith("eval val_loss:") and outcome.out.count("\n") == 1
    else:
        engine = script.Engine(script.model_config(c, script.about(c, 2)["model"]))
        engine.build(random_weights(script, c), training=False)
        wanted = script.sample(script.dataclasses.replace(c, sample_tokens=3, temperature=0), engine, 2)
        assert outcome.out == wanted + "\n"


def test_an_answer_that_is_lost_is_no_success(script, config, env, tmp_path, monkeypatch):
    c, path = config(script), tmp_path / "model.safetensors"
    weights = {f"weights.{name}": value for name, value in random_weights(script, c).items()}
    script.save_tensors(path, weights, script.about(c, 2))
    monkeypatch.setattr(os, "dup2", lambda *files: None)  # this process keeps its own console

    def full(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script.tqdm, "write", full)
    outcome = run_in_process(script, "--mode=sample", f"--checkpoint={path}", "--sample_tokens=1", **env)
    assert outcome.code == 1 and outcome.out == ""


def test_a_budget_below_one_step(any_script, env, folder):
    """Nothing was trained: no artifact of start values that says PASS."""
    outcome = run_in_process(any_script, "--max_train_flops=1", **env)
    assert outcome.code == 1 and "MAX_TRAIN_FLOPS, MAX_WALLCLOCK_SECONDS: expected enough for a step" in outcome.err
    assert not (folder / "model.int6.rgpt").exists()


def test_a_log_folder_that_is_a_link_to_nothing(any_script, env, tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    assert_refused(run_in_process(any_script, **env | {"LOG_DIR": tmp_path / "gone"}), "LOG_DIR", "a link to nothing")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ("RANK=1", "RANK"),
        ("RANK=0 WORLD_SIZE=2", "WORLD_SIZE=2: expected MASTER_ADDR"),
        ("RANK=none", "RANK"),
        ("RANK=-1", "RANK"),
        ("WORLD_SIZE=0", "RANK"),
        ("WORLD_SIZE=1e3", "WORLD_SIZE"),
        ("LOCAL_RANK=x", "LOCAL_RANK"),
        ("RANK= WORLD_SIZE= LOCAL_RANK=", ""),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0", ""),
    ],
)
def test_left_over_rank_variables(any_script, env, tmp_path, variables, named):
    rank = dict(pair.split("=") for pair in variables.split())
    if named:
        assert_refused(run_in_process(any_script, **env | rank), f"^error: {named}", "expected", "unset|torchrun")
        assert not (tmp_path / "logs").exists()
    else:
        assert any_script.launched_as(rank) == (0, 1, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Scores that are no numbers
# ---------------------------------------------------------------------------------------------------------------------


def test_validation_without_bytes(any_script, env, data, tmp_path):
    """Refused before training, and nothing is left behind."""
    tokenizer = any_script.load_tokenizer(str(data.tokenizer), 320)
    path = write_dataset(tmp_path / "empty", [data.train], [np.full(500, tokenizer.bos_id())])
    outcome = run_in_process(any_script, **env | {"DATA_PATH": path})
    assert_refused(outcome, str(path), "expected validation tokens that stand for text")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [1, 2])
def test_a_last_score_that_is_no_number(any_script, env, folder, monkeypatch, which, value):
    """The weights' score, or that of the artifact from disk: exit code 1, one line, and a result in valid JSON."""
    real, calls = any_script.evaluate, []

    def evaluate(*args):
        calls.append(1)
        return value if len(calls) == which else real(*args)

    monkeypatch.setattr(any_script, "evaluate", evaluate)
    outcome = run_in_process(any_script, "--val_loss_every=0", **env)
    assert outcome.code == 1 and outcome.err.count("\n") == 1, outcome
    assert outcome.err.startswith(f"error: the score after step 8: expected a finite loss, found {value}; lower")
    result = read_strictly(folder / "result.json")
    assert set(any_script.SCORES) < result.keys() and result["complete"] is False and result["val_bpb"] is None
    assert (result["val_bpb_raw"] is None) == (which == 1) and result["steps"] == 8
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(row, parse_constant=pytest.fail) for row in rows)
    assert "stopped: the score after step 8" in (folder / "train.log").read_text()
    assert "PASS" not in outcome.out


def test_weights_that_cannot_be_rounded(any_script, env, folder, monkeypatch):
    """The last update blew the weights up, but the score is a number: the same end."""
    real = any_script.export_model

    def export_model(c, weights, *rest):
        return real(c, weights | {"blocks.0.mlp.proj.weight": 1e35 * weights["blocks.0.mlp.fc.weight"].T}, *rest)

    monkeypatch.setattr(any_script, "export_model", export_model)
    outcome = run_in_process(any_script, **env)
    assert outcome.code == 1 and outcome.err.startswith("error: blocks.0.mlp.proj.weight: expected weights"), outcome
    result = read_strictly(folder / "result.json")
    assert result["complete"] is False and result["val_bpb"] is None and "PASS" not in outcome.out


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_weights_that_are_no_numbers(script, config, env, tmp_path, mode):
    c, path = config(script), Path(tmp_path / "model.safetensors")
    weights = {f"weights.{name}": value * np.float32(math.nan) for name, value in script.initial_weights(c).items()}
    script.save_tensors(path, weights, script.about(c, 2))
    outcome = run_in_process(script, f"--mode={mode}", f"--checkpoint={path}", **env)
    assert outcome.code == 1 and outcome.out == "", outcome
    assert outcome.err.splitlines()[-1].startswith(f"error: {path}: expected a model with")
