"""records/record.py: a run a seed, then the checked folder; what is refused before the first run."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
import common
import record
from conftest import TINY, run_in_process, script_or_skip

WORDS = ["--name=tiny", "--author=A. Nonymous", "--track=local", "--no-proof", "--gpus=1"]


@pytest.fixture
def runs(data, tmp_path, monkeypatch):
    """`runs(*flags)` is the exit code of the tool, whose runs take place in this process; `runs.started` are theirs."""
    module = script_or_skip("train_gpt")
    settings = TINY | data.env
    started = []

    def run_script(arguments, processes):
        started.append([argument for argument in arguments if argument.startswith(("--run_id", "--resume"))])
        return runs.code or run_in_process(module, *arguments).code

    def runs(*flags, **changed):
        flat = " ".join(f"--{name.lower()}={value}" for name, value in (settings | changed).items())
        places = [f"--log-dir={tmp_path / 'logs'}", f"--out={tmp_path / 'records'}"]
        return common.run_tool(record.main, ["--seeds", "1", "2", *places, f"--settings={flat}", *WORDS, *flags])

    runs.code, runs.started, runs.home = 0, started, tmp_path
    monkeypatch.setattr(record, "run_script", run_script)
    monkeypatch.setattr(record.table, "main", lambda argv: 0)
    for name in settings:
        monkeypatch.delenv(name, raising=False)
    return runs


def test_seeds_become_a_folder_and_what_is_done_is_not_run_again(runs, capsys):
    assert runs() == 0, capsys.readouterr().err
    assert runs.started == [["--run_id=tiny_1"], ["--run_id=tiny_2"]]
    (folder,) = (runs.home / "records" / "track_local").iterdir()
    assert {"train_seed1.log", "train_seed2.log", "train_gpt.py"} <= {path.name for path in folder.iterdir()}

    assert runs() == 1  # nothing to do, and the entry is there
    assert "--replace" in capsys.readouterr().err
    assert runs("--replace", "--blurb=again") == 0
    assert len(runs.started) == 2
    assert runs("--replace", "--blurb=again", MATRIX_LR="0.01") == 1
    assert "tiny_1: expected a run with these settings, found matrix_lr=0.04, not 0.01" in capsys.readouterr().err
    assert runs("--replace", "--blurb=again", "--gpus=2") == 1
    assert "tiny_1: expected a run of 2 processes, found 1" in capsys.readouterr().err
    log = runs.home / "logs" / "tiny_2" / "train.log"
    log.write_text("#\n" + log.read_text())
    assert runs("--replace", "--blurb=again") == 1
    assert "tiny_2: expected a run of this train_gpt.py" in capsys.readouterr().err


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
    assert runs.started[-1] == ["--run_id=tiny_2", "--resume=1"]


def test_two_at_a_time_are_one_too_many(runs, capsys):
    folder = runs.home / "logs" / "tiny_1"
    folder.mkdir(parents=True)
    with record.hold(folder.with_name(".tiny.lock")):
        assert runs() == 1
    assert "expected no other record.py at these runs" in capsys.readouterr().err
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--track=10min_16mb", "--github-id=me"], "fineweb|FineWeb"),
        (["--track=mini", "--github-id=me"], "bytes"),
        (["--author="], "--author"),
        (["--name=a b"], "--name"),
        (["--seeds", "1", "1"], "--seeds: expected different seeds, found 1 1"),
        (["--settings=--matrix_lr=fast"], "MATRIX_LR"),
        (["--speed=2"], "--speed"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_would_be_refused_in_the_end_is_refused_at_once(runs, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(record.submit, "git_setting", lambda name: "")
    before = dict(os.environ)
    assert runs(*flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not runs.started and not (runs.home / "logs").exists() and dict(os.environ) == before
