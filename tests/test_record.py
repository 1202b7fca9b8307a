"""records/record.py: a run a seed, then the checked folder; what is refused before the first run."""

import fcntl
import functools
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
import common
import record
from conftest import TINY, run_in_process, script_or_skip

WORDS = ["--name=tiny", "--author=A. Nonymous", "--track=local", "--no-proof", "--gpus=1"]


LOADED = functools.cache(record.submit.load_script)


@pytest.fixture
def runs(data, tmp_path, monkeypatch):
    """`runs(*flags)` is the exit code of the tool, whose runs take place in this process; `runs.started` are theirs."""
    module = script_or_skip("train_gpt")
    settings = TINY | data.env
    started = []

    def run_script(arguments, processes):
        started.append([argument for argument in arguments if argument.startswith(("--run_id", "--resume=1"))])
        return runs.code or run_in_process(module, *arguments).code

    def flat(**changed):
        return " ".join(f"--{name.lower()}={value}" for name, value in (settings | changed).items())

    def runs(*flags, **changed):
        places = [f"--log-dir={tmp_path / 'logs'}", f"--out={tmp_path / 'records'}"]
        return common.run_tool(
            record.main, ["--seeds", "1", "2", *places, f"--settings={flat(**changed)}", *WORDS, *flags]
        )

    runs.code, runs.started, runs.home, runs.settings = 0, started, tmp_path, flat()
    monkeypatch.setattr(record, "run_script", run_script)
    monkeypatch.setattr(record, "gpus_here", lambda: (0, "cpu"))
    monkeypatch.setattr(record.submit, "load_script", LOADED)
    monkeypatch.setattr(record.table, "main", lambda argv: started.append("table") or 0)
    for name in settings:
        monkeypatch.delenv(name, raising=False)
    return runs


def test_seeds_become_a_folder_and_what_is_done_is_not_run_again(runs, capsys):
    assert runs() == 0, capsys.readouterr().err
    assert runs.started == [["--run_id=tiny_1"], ["--run_id=tiny_2"], "table"]
    (folder,) = (runs.home / "records" / "track_local").iterdir()
    assert {"train_seed1.log", "train_seed2.log", "train_gpt.py"} <= {path.name for path in folder.iterdir()}

    assert runs("--seeds", "7") == 1 and len(runs.started) == 3  # the entry is there
    assert "--replace" in capsys.readouterr().err
    assert runs("--replace", "--blurb=again", PROMPT="x", MICROBATCH_TOKENS="512") == 0
    assert runs.started[2:] == ["table", "table"]
    assert runs("--replace", "--blurb=again", MATRIX_LR="0.01") == 1
    assert "tiny_1: expected a run with these settings, found matrix_lr=0.04, not 0.01" in capsys.readouterr().err
    assert runs("--replace", "--blurb=again", "--gpus=2") == 1
    assert "tiny_1: expected a run of 2 processes, found 1" in capsys.readouterr().err
    plan = record.make_plan(SimpleNamespace(settings=runs.settings, track="local", gpus=1, seeds=[1]))
    plan.device = "NVIDIA H100"
    with pytest.raises(common.InputError, match="tiny_1: expected a run on NVIDIA H100, found cpu"):
        record.check_in_hand(plan, runs.home / "logs" / "tiny_1", 1)
    plan.device = "mps"
    with pytest.raises(common.InputError, match="tiny_1: expected a run on mps, found cpu"):
        record.check_in_hand(plan, runs.home / "logs" / "tiny_1", 1)
    logs = runs.home / "logs"
    os.rename(logs / "tiny_2", logs / "tiny_3")
    assert runs("--seeds", "3", "--replace", "--blurb=again") == 1
    assert "tiny_3: expected a run with these settings, found seed=2, not 3" in capsys.readouterr().err
    os.rename(logs / "tiny_3", logs / "tiny_2")
    result, log = logs / "tiny_2" / "result.json", logs / "tiny_2" / "train.log"
    whole = json.loads(result.read_text())
    for key, message in (("dataset_sha256", "one on other data"), ("config_sha256", "such as of MODE=export"),
                         ("bytes_artifact", "and the folder's script within 16000000")):  # fmt: skip
        result.write_text(json.dumps(whole | {key: 16_000_000}))
        assert runs("--replace", "--blurb=again") == 1
        assert message in capsys.readouterr().err
    result.write_text(json.dumps(whole))
    text = log.read_text()
    log.write_text("#\n" + text)
    assert runs("--replace", "--blurb=again") == 1
    assert "tiny_2: expected a run of this train_gpt.py" in capsys.readouterr().err
    log.write_text(text[: text.rindex("---\nscore:")])  # killed between result.json and the closing block
    assert record.is_done(logs / "tiny_1") and not record.is_done(logs / "tiny_2")


def test_a_failed_seed_ends_it_and_the_same_command_goes_on(runs, capsys):
    runs.code = 1
    assert runs() == 1
    assert runs.started == [["--run_id=tiny_1"]]
    assert "the same command goes on" in capsys.readouterr().err

    (runs.home / "logs" / "tiny_1").mkdir(parents=True)  # it came to no checkpoint
    (runs.home / "logs" / "tiny_1" / "train.log").write_text("half a line")
    assert runs() == 1
    assert runs.started[1:] == [["--run_id=tiny_1"]]
    (kept,) = (runs.home / "logs").glob("tiny_1.stopped_*")
    assert (kept / "train.log").read_text() == "half a line"

    runs.code = 0
    assert runs(CHECKPOINT_EVERY="4") == 0, capsys.readouterr().err
    (runs.home / "logs" / "tiny_2" / "result.json").unlink()  # as after a stop
    assert runs("--replace", "--blurb=again", CHECKPOINT_EVERY="4") == 0, capsys.readouterr().err
    assert runs.started[-2:] == [["--run_id=tiny_2", "--resume=1"], "table"]


def test_two_at_a_time_are_one_too_many(runs, capsys):
    folder = runs.home / "logs" / "tiny_1"
    folder.mkdir(parents=True)
    with record.hold(folder.with_name(".tiny.lock")):
        assert runs() == 1
    assert "expected no other process at these runs" in capsys.readouterr().err
    assert not runs.started and folder.exists()


def test_an_artifact_that_is_too_large_ends_it(runs, capsys, monkeypatch):
    trained = record.run_script

    def too_large(arguments, processes):
        assert trained(arguments, processes) == 0
        path = runs.home / "logs" / "tiny_1" / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fits": False}))
        return 1

    monkeypatch.setattr(record, "run_script", too_large)
    for _ in range(2):  # nor does the same command go on to the next seed
        assert runs() == 1 and len(runs.started) == 1
        assert "tiny_1/result.json: expected code + artifact within" in capsys.readouterr().err


def test_an_artifact_that_misses_its_target_within_the_cap_is_one(runs, monkeypatch):
    trained = record.run_script
    monkeypatch.setattr(record, "run_script", lambda arguments, processes: trained(arguments, processes) or 1)
    assert runs() == 0
    assert [entry[0] for entry in runs.started[:2]] == ["--run_id=tiny_1", "--run_id=tiny_2"]


def test_a_stop_while_a_seed_ends_is_a_stop(runs, capsys, monkeypatch):
    trained = record.run_script
    monkeypatch.setattr(record, "run_script", lambda arguments, processes: trained(arguments, processes) or 143)
    assert runs() == 1 and len(runs.started) == 1
    assert "the same command goes on" in capsys.readouterr().err


def test_a_script_that_changes_between_seeds_ends_it(runs, capsys, monkeypatch):
    copy, trained = runs.home / "train_gpt.py", record.run_script
    copy.write_bytes(record.SCRIPT.read_bytes())

    def edit(arguments, processes):
        copy.write_text(copy.read_text() + "# edited\n")
        return trained(arguments, processes)

    monkeypatch.setattr(record, "SCRIPT", copy)
    monkeypatch.setattr(record, "run_script", edit)
    assert runs() == 1 and len(runs.started) == 1
    assert "train_gpt.py: expected the script of the seeds before" in capsys.readouterr().err


CHILD = """import os, signal, sys, time
got = []
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: got.append(number))
print("ready", os.getsid(0) == os.getpid(), flush=True)
open(__file__ + ".ready", "w").close()
for _ in range(int(sys.argv[1])):
    time.sleep(0.05 * (not got))
print(*map(int, got), flush=True)
sys.exit(3 - 3 * bool(got))
"""


def test_how_a_run_ended_is_what_counts(tmp_path, monkeypatch, capfd):
    """A stop reaches the run, in its session, from here, and counts whatever the run makes of it."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(record, "SCRIPT", script)
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
    ready = tmp_path / "child.py.ready"

    def send(number):
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = [signal.getsignal(number) for number in numbers]
    assert record.run_script(["0"], 1) == 3
    assert capfd.readouterr().out == "ready True\n\n"

    for number in numbers:
        ready.unlink()
        threading.Thread(target=send, args=(number,)).start()
        assert record.run_script(["100"], 1) == 128 + number
        seen = signal.SIGTERM if number == signal.SIGQUIT else number
        assert capfd.readouterr().out == f"ready True\n{int(seen)}\n"

    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        ready.unlink()
        threading.Thread(target=send, args=(signal.SIGHUP,)).start()
        assert record.run_script(["10"], 1) == 3
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert before == [signal.getsignal(number) for number in numbers]


def test_a_run_that_outlives_the_tool_holds_its_lock(tmp_path, monkeypatch, capfd):
    script = tmp_path / "child.py"
    script.write_text("import subprocess, sys; subprocess.Popen(['sleep', '5'], close_fds=False)")
    monkeypatch.setattr(record, "SCRIPT", script)
    record.hold(tmp_path / ".lock").close()
    lock = record.hold(tmp_path / ".lock")
    assert record.run_script([], 1) == 0
    lock.close()
    with pytest.raises(common.InputError, match="no other process"):
        record.hold(tmp_path / ".lock")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(37, "no locks")))
    record.hold(tmp_path / ".lock").close()  # a disk without locks


@pytest.mark.parametrize("count_code", ["1", "packed", "0"])
def test_the_room_that_the_folder_needs(runs, count_code):
    """The baked script states its settings: what is exported leaves their bytes free, whichever seed comes first."""
    asked = []
    for seed in (3, 4_000_000_000):
        plan = record.make_plan(SimpleNamespace(settings=runs.settings, track="local", gpus=1, seeds=[seed]))
        plan.settings += ["--quantizer=trellis", "--target_bytes=16000000", f"--count_code={count_code}"]
        record.check_plan(plan, seed, runs.home, proof=False)
        asked.append(plan.config(seed).target_bytes)
        run = record.expected_run(plan, plan.config(seed))
        baked, module, _ = record.submit.baked_script(run, plan.script)
        size = {"1": len(baked.encode()), "packed": len(module.packed(baked)), "0": 0}[count_code]
        counted = {"1": len(plan.source.encode()), "packed": len(module.packed(plan.source)), "0": 0}[count_code]
        assert abs(size - plan.code_bytes) < 100 and asked[-1] - counted + size <= 16_000_000
    assert asked[0] == asked[1] == 16_000_000 if count_code == "0" else 15_990_000 < asked[0] == asked[1] < 16_000_000


def test_gpus_are_counted_elsewhere(monkeypatch):
    import torch

    here = torch.cuda.device_count()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 / 0)
    assert record.gpus_here()[0] == here
    monkeypatch.setattr(record, "ASK_GPUS", "print(8, 'NVIDIA H100 80GB HBM3')")
    assert record.gpus_here() == (8, "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--track=10min_16mb", "--github-id=me"], "fineweb|FineWeb"),
        (dict(track="mini", gpus="1", BYTES_CAP="80000", MAX_TRAIN_FLOPS="5e13"), "COUNT_CODE=1"),
        (["--author="], "--author"),
        (["--name=a b"], "--name"),
        (["--seeds", "1", "1"], "--seeds: expected different seeds, found 1 1"),
        (["--seeds", "1", "-2"], "SEED"),
        (["--gpus=0"], "--gpus"),
        (["--speed=2"], "--speed"),
        (dict(MATRIX_LR="fast"), "MATRIX_LR"),
        (dict(PROMPT="'a"), "--settings: expected flags as for a shell"),
        (dict(MODE="preflight"), "MODE: expected train"),
        (dict(VAL_MAX_TOKENS="64"), "VAL_MAX_TOKENS"),
        (dict(INIT_FROM=__file__), "INIT_FROM"),
        (dict(BYTES_CAP="16000001"), "at most the track's 16000000, found 16000001"),
        (dict(TOKENIZER_PATH="'{blank}'"), "TOKENIZER_PATH: expected a value without blanks"),
        (dict(DATA_PATH="/nowhere"), "/nowhere"),
        (dict(DEVICE="cuda", gpus="9"), "--gpus: expected at most the 8 GPUs"),
        (dict(gpus="9"), "TRAIN_BATCH_TOKENS: expected a sequence for each of 9 GPUs, found 8"),
        (dict(gpus="1", proof="5"), "proof: .*data/datasets/tiny: expected the data"),
        (dict(DATA_PATH="{other}", track="non_record_16mb", gpus="1"), "151.1 million bytes of validation text"),
        (
            dict(DATA_PATH="{fineweb}", track="10min_16mb", gpus="8", DEVICE="cuda"),
            "MAX_WALLCLOCK_SECONDS: expected at most 600, found none",
        ),
        (dict(DATA_PATH="{fineweb}", track="10min_16mb", gpus="4", DEVICE="cuda"), "8 x H100, found 4 x"),
        (dict(DATA_PATH="{fineweb}", track="10min_16mb", gpus="8", DEVICE="cpu"), "8 x H100, found 8 x cpu"),
        (
            dict(DATA_PATH="{fineweb}", track="10min_16mb", gpus="8", DEVICE="cuda", MAX_WALLCLOCK_SECONDS="600"),
            "62,021,632",
        ),
        (
            dict(track="mini", gpus="1", COUNT_CODE="0", BYTES_CAP="80000"),
            "MAX_TRAIN_FLOPS: expected at most 5e.13, found none",
        ),
        (dict(track="mini", gpus="1", COUNT_CODE="0", BYTES_CAP="80000", MAX_TRAIN_FLOPS="5e13"), "500,000 bytes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_would_be_refused_in_the_end_is_refused_at_once(runs, data, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(record.submit, "git_setting", lambda name: "")
    monkeypatch.setattr(record, "gpus_here", lambda: (8, "NVIDIA H100 80GB HBM3"))
    places = {"fineweb": runs.home / "fineweb10B_sp1024", "blank": runs.home / "my tokenizer.model"}
    places["other"] = runs.home / "fineweb10B_sp320"
    places["fineweb"].symlink_to(data.path)
    places["other"].symlink_to(data.path)
    places["blank"].symlink_to(data.tokenizer)
    changed = {} if isinstance(flags, list) else {key: value.format(**places) for key, value in flags.items()}
    words = [f"--{key}={changed.pop(key)}" for key in ("track", "gpus") if key in changed]
    monkeypatch.setattr(sys.modules[__name__], "WORDS", WORDS[: -2 if changed.pop("proof", None) else None])
    before, there = dict(os.environ), set(os.listdir(runs.home))
    assert runs(*(flags if isinstance(flags, list) else [*words, "--github-id=me"]), **changed) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not runs.started and set(os.listdir(runs.home)) == there and dict(os.environ) == before
