"""records/ablate.py: a queue that survives interruption, and a report that says what the runs said.

Most tests run a stand-in script that has the interface of the trainers and takes a blink; one runs the real script.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
import ablate
import common
import draw
import logs
import runs
from conftest import ROOT, TINY, quicker_script

# Trains for `seconds` in steps of 0.05 s, checkpoints on SIGTERM and at its end, resumes a run of its own settings; its
# score depends on its settings and seed.
STAND_IN = """
import dataclasses, hashlib, json, os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
DEFAULT_PRESET, REPLACED = "record", {}
OUTSIDE = ("seed", "run_id", "log_dir", "resume", "quant_loss")  # what is not trained
@dataclass(frozen=True)
class Config:
    preset: str = "record"
    seed: int = 0
    run_id: str = ""
    log_dir: str = "logs"
    resume: bool = False
    matrix_lr: float = 0.5
    layout: str = "9"
    seconds: float = 0.0
    device: str = ""
    quant_loss: float = 0.0
    shuffle: bool = True
    iterations: int = 0
    max_wallclock_seconds: float = 0.0
    max_train_flops: float = 0.0
    train_batch_tokens: int = 100
    val_max_tokens: int = 0
    data_path: str = ""
    tokenizer_path: str = ""
def load_config(argv, environ, preset):
    values = {}
    for flag in argv:
        name, _, text = flag.removeprefix("--").partition("=")
        kinds = {field.name: field.type for field in dataclasses.fields(Config)}
        if name not in kinds:
            raise ValueError(f"--{name}: expected a setting, found an unknown flag")
        values[name] = bool(int(text)) if kinds[name] is bool else kinds[name](text)
    return Config(**values), []
def config_sha256(c):
    kept = {k: v for k, v in dataclasses.asdict(c).items() if k not in OUTSIDE}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()
def dataset_sha256(c):
    changed = Path(__file__).with_name("data.txt")
    return changed.read_text() if changed.exists() else "a"
def main():
    c = load_config(sys.argv[1:], {}, "")[0]
    if "MATRIX_LR" in os.environ:
        sys.exit("error: MATRIX_LR leaked into the run")
    folder = Path(c.log_dir) / c.run_id
    folder.mkdir(parents=True, exist_ok=c.resume)
    with open("starts.txt", "a") as file:  # in the repository of the test
        file.write(f"{c.run_id} {int(c.resume)} {os.environ.get('OMP_NUM_THREADS')} {time.time()}\\n")
    log = open(folder / "train.log", "a")
    log.write(Path(__file__).read_text() + "\\n" + "=" * 120 + "\\n")
    log.write("config: " + json.dumps(dataclasses.asdict(c)) + "\\n")
    log.write("run: x  sha256: " + hashlib.sha256(Path(__file__).read_bytes()).hexdigest() + "\\n")
    log.flush()
    if c.matrix_lr == 13:
        sys.exit("error: MATRIX_LR: expected luck, found 13")
    if c.matrix_lr > 100:
        sys.exit("error: step 3: expected a finite loss and gradient norm, found loss nan and norm nan")
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    checkpoint = folder / "checkpoint.safetensors"
    spent, of = checkpoint.read_text().split() if c.resume else ("0", config_sha256(c))
    if of != config_sha256(c):
        sys.exit("error: expected the config_sha256 that it was trained with")
    began = time.time() - float(spent)
    base = {"run_id": c.run_id, "framework": "torch", "layout": c.layout, "seed": c.seed, "steps": 3, "tokens": 300,
            "config_sha256": config_sha256(c), "dataset": "d", "dataset_sha256": dataset_sha256(c),
            "versions": {"torch": "9"}}
    while time.time() - began < c.seconds:
        time.sleep(0.05)
        if stopped:
            checkpoint.write_text(f"{time.time() - began} {of}")
            (folder / "result.json").write_text(json.dumps(base | {"val_bpb": None}))
            sys.exit(143)
    checkpoint.write_text(f"{time.time() - began} {of}")
    bpb = 2 + c.matrix_lr / 10 + (c.seed % 7) / 1000
    with open(folder / "metrics.jsonl", "w") as file:
        for i in (1, 2, 3):
            file.write(json.dumps({"step": i, "val_loss": 3.0, "val_bpb": bpb + 1 / i, "flops": 1e9 * i}) + "\\n")
    result = base | {
        "val_bpb": bpb, "val_bpb_raw": bpb - 0.001, "params_stored": 10, "bytes_artifact": 20, "train_flops": 3e9,
        "train_time_ms": 60000, "complete": True, "fits": True, "device": "cpu", "world_size": 1, "val_tokens": 9,
        "commit": "abc"}
    if c.matrix_lr in (98, 99):  # its last update made it worthless: seen before export (98) or after
        result |= {"val_bpb": None, "complete": False}
        result |= {"val_bpb_raw": None, "bytes_artifact": None} if c.matrix_lr == 98 else {}
    (folder / "result.json").write_text(json.dumps(result))
    if c.matrix_lr == 97:  # neither result nor score: no artifact can be made of its weights
        (folder / "result.json").unlink()
        sys.exit("error: blocks.0.attn.q.weight: expected weights and gradients below 1e+30, found 6e+37")
    if c.matrix_lr in (98, 99):
        sys.exit("error: the score after step 3: expected a finite loss, found nan; lower MATRIX_LR")
if __name__ == "__main__":
    main()
"""

CUT = "\n" + "=" * 120 + "\n"  # between the script and what it logs
MATRIX = """
about = "Which rate?"
seeds = [1, 2, 3]
against = "low"
[budget]
tokens = 300
[base]
layout = "5x3"
[arms.low]
matrix_lr = 0.1
[arms.high]
matrix_lr = 0.9
"""


def sketch(figure, path):
    """Lays a picture out, which finds what cannot be drawn, but paints nothing, which takes most of the time."""
    figure.set_layout_engine("none")
    figure.draw_without_rendering()
    path.write_bytes(b"not painted")
    draw.plotting().close(figure)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A repository with the stand-in as its script."""
    monkeypatch.setattr(ablate, "save_picture", sketch)
    (tmp_path / "train_gpt.py").write_text(STAND_IN)
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    return tmp_path


def write(home: Path, text: str, name: str = "m.toml") -> Path:
    path = home / "records" / "ablations" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def run(*args) -> int:
    return common.run_tool(ablate.main, [str(arg) for arg in args])


def starts(home: Path) -> list[str]:
    return (home / "starts.txt").read_text().splitlines()


def test_runs_all_reports_and_does_nothing_twice(home, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "save_picture", draw.save_picture)
    path = write(home, MATRIX)
    assert run(path) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in starts(home)] == [f"{a}_seed{s}" for s in (1, 2, 3) for a in ("low", "high")]
    text = (path.with_suffix("") / "README.md").read_text()
    # By hand: scores 2.011, 2.012, 2.013 and 2.091, 2.092, 2.093; t = -97.98 at 4 degrees of freedom.
    assert "| **low** | 3/3 | 2.0120 | 0.0010 |" in text and "| high | 3/3 | 2.0920 | 0.0010 | <0.0001 |" in text
    assert "300 tokens" in text and "Which rate?" in text and "`matrix_lr=0.9`" in text and "Fewer than" not in text
    assert "[6/6] high_seed3: started" in out and "| **low** |" in out
    assert (path.with_suffix("") / "matrix.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {file.name for file in (path.with_suffix("") / "low_seed1").iterdir()} == KEPT
    assert run(path) == 0 and len(starts(home)) == 6
    before = text
    assert run(path, "--report") == 0 and (path.with_suffix("") / "README.md").read_text() == before


def test_goes_on_from_the_committed_files_alone(home):
    path = write(home, MATRIX)
    assert run(path) == 0
    shutil.rmtree(path.with_suffix("") / "high_seed2")
    shutil.rmtree(home / "logs")  # another machine
    assert run(path) == 0
    assert [line.split()[0] for line in starts(home)[6:]] == ["high_seed2"]


def test_stops_in_time_and_resumes_the_run_in_hand(home, capsys):
    path = write(home, MATRIX + "seconds = 2.5\n")  # of `high`
    assert run(path, "--max-minutes=0.035") == 0  # 2.1 s: one run and a half
    out = capsys.readouterr().out
    assert "stopping" in out and "runs left" in out
    done = [run for run in path.with_suffix("").glob("*_seed*")]
    assert 0 < len(done) < 6 and (path.with_suffix("") / "README.md").is_file()
    assert run(path) == 0
    lines = [line.split()[:2] for line in starts(home)]
    resumed = [name for name, resume in lines if resume == "1"]
    assert len(resumed) == 1 and len(lines) == 7  # six runs, one of them in two parts
    assert len(list(path.with_suffix("").glob("*_seed*"))) == 6


def command(home: Path, path: Path) -> list[str]:
    """The tool in an interpreter of its own, for the repository of the test."""
    code = f"""import sys; sys.path.insert(0, {str(ROOT / "records")!r})
import ablate, common, runs
from pathlib import Path
ablate.ROOT = common.ROOT = runs.ROOT = Path({str(home)!r})
sys.exit(common.run_tool(ablate.main, [{str(path)!r}]))"""
    return [sys.executable, "-c", code]


def start_tool(home: Path, path: Path) -> subprocess.Popen:
    tool = subprocess.Popen(command(home, path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(600):
        if (home / "starts.txt").is_file():
            return tool
        time.sleep(0.05)
    tool.kill()
    raise AssertionError("the queue did not start: " + tool.communicate()[0])


def test_sigterm_writes_a_checkpoint_and_ends(home):
    path = write(home, MATRIX.replace('layout = "5x3"', 'layout = "5x3"\nseconds = 30'))
    tool = start_tool(home, path)
    time.sleep(0.3)
    tool.send_signal(signal.SIGTERM)
    out, _ = tool.communicate(timeout=30)
    assert tool.returncode == 130 and "stopped after" in out
    assert (home / "logs" / "m" / "low_seed1" / "checkpoint.safetensors").is_file()


def test_two_queues_do_not_run_one_matrix(home, capsys):
    path = write(home, MATRIX.replace('layout = "5x3"', 'layout = "5x3"\nseconds = 3'))
    tool = start_tool(home, path)
    try:
        assert run(path) == 1 and "expected no other process at these runs" in capsys.readouterr().err
        tool.kill()  # its run goes on as an orphan and still holds the lock
        tool.wait()
        assert run(path) == 1 and "expected no other process at these runs" in capsys.readouterr().err
    finally:
        tool.kill()


def test_two_matrices_of_one_name_do_not_share_their_runs(home, capsys):
    """Nor does one delete what the other has trained."""
    path = write(home, MATRIX)
    assert run(path) == 0
    (home / "elsewhere").mkdir()
    other = home / "elsewhere" / path.name
    other.write_text(path.read_text())
    assert run(other) == 1 and "found those of" in capsys.readouterr().err
    assert run(path) == 0


def test_without_git_a_script_is_of_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert ablate.of_commit("HEAD", "train_gpt.py") is None


def test_a_run_that_diverges_is_a_result_and_a_failure_is_not(home, capsys):
    path = write(home, MATRIX + "[arms.wild]\nmatrix_lr = 1e6\n[arms.unlucky]\nmatrix_lr = 13.0\n")
    assert run(path) == 1
    err = capsys.readouterr().err
    assert "3 runs failed (unlucky_seed1" in err
    text = (path.with_suffix("") / "README.md").read_text()
    assert "diverged 3 times" in text and "not run yet" in text
    diverged = json.loads((path.with_suffix("") / "wild_seed1" / "diverged.json").read_text())
    assert diverged["diverged"].startswith("step 3")
    count = len(starts(home))
    assert run(path) == 1 and len(starts(home)) == count + 3  # the failures again, the diverged not


def test_environment_does_not_leak_into_runs(home, monkeypatch):
    monkeypatch.setenv("MATRIX_LR", "0.7")
    assert run(write(home, MATRIX)) == 0


def test_two_jobs_share_the_cores(home):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores < 2:
        pytest.skip("one core")
    path = write(home, MATRIX.replace('layout = "5x3"', 'layout = "5x3"\nseconds = 0.5'))
    assert run(path, "--jobs=2") == 0
    times = [float(line.split()[3]) for line in starts(home)]
    assert {line.split()[2] for line in starts(home)} == {str(cores // 2)}
    assert times[1] - times[0] < 0.45  # the second does not wait for the first
    assert run(path, "--jobs=9999") == 1


def test_refuses_to_mix_settings_scripts_and_data(home, capsys):
    path = write(home, MATRIX)
    assert run(path) == 0
    write(home, MATRIX.replace("0.9", "0.8"))
    assert run(path) == 1 and "high_seed1: expected matrix_lr=0.8, found 0.9; delete" in capsys.readouterr().err
    write(home, MATRIX)
    (home / "train_gpt.py").write_text(STAND_IN + "\n# changed\n")
    assert run(path) == 1 and "one of another version" in capsys.readouterr().err
    (home / "train_gpt.py").write_text(STAND_IN)
    result = path.with_suffix("") / "low_seed1" / "result.json"
    result.write_text(result.read_text().replace('"dataset_sha256": "a"', '"dataset_sha256": "b"'))
    assert run(path, "--report") == 1 and "expected runs on one dataset" in capsys.readouterr().err
    for ratio, code in ((1.0005, 0), (1.002, 1)):  # the held-out text of another tokenizer's dataset, and of another
        for file in path.with_suffix("").glob("*/result.json"):
            found = json.loads(file.read_text())
            found["val_loss"] = found["val_bpb"] * (ratio if found["dataset_sha256"] == "b" else 1)
            file.write_text(json.dumps(found))
        assert run(path, "--report") == code, capsys.readouterr().err


def scores(path: Path) -> dict[str, float]:
    return {file.parent.name: json.loads(file.read_text())["val_bpb"]
            for file in path.with_suffix("").glob("*/result.json")}  # fmt: skip


KEPT = {"run.json", "train.log", "metrics.jsonl", "result.json"}
ONE = "seeds = [1]\n[budget]\ntokens = 300\n[base]\nseconds = 0.0\n[arms.low]\nmatrix_lr = 0.1\n"


def test_a_run_deleted_to_be_repeated_is_not_taken_from_logs(home, capsys):
    """The way out that the refusal names: the files in logs/, of the old settings, must not come back as new ones."""
    path = write(home, ONE)
    assert run(path) == 0
    write(home, ONE.replace("0.1", "0.2"))
    assert run(path) == 1 and "delete" in capsys.readouterr().err
    shutil.rmtree(path.with_suffix("") / "low_seed1")
    assert run(path) == 0
    assert scores(path) == {"low_seed1": pytest.approx(2.021)}


@pytest.mark.parametrize("change", ["settings", "script"])
def test_a_run_in_hand_goes_on_under_its_own_settings_and_script_only(home, capsys, change):
    path = write(home, ONE.replace("seconds = 0.0", "seconds = 2.5"))
    assert run(path, "--max-minutes=0.03") == 0 and scores(path) == {}
    if change == "settings":
        write(home, ONE.replace("seconds = 0.0", "seconds = 2.5").replace("0.1", "0.2"))
    else:
        (home / "train_gpt.py").write_text(STAND_IN + "# another\n")
    assert run(path) == 0
    assert [line.split()[1] for line in starts(home)] == ["0", "0"] and "started anew" in capsys.readouterr().out
    assert run(path) == 0  # what it kept is of this script and these settings


def test_a_run_that_ended_without_the_tool_is_kept_as_it_is(home):
    """The tool was killed, its run went on alone and finished."""
    path = write(home, ONE)
    assert run(path) == 0
    log = (home / "logs" / "m" / "low_seed1" / "train.log").read_text()
    shutil.rmtree(path.with_suffix("") / "low_seed1")
    (home / "logs" / "m" / "low_seed1" / "checkpoint.safetensors").write_text("0 x")  # as before it was kept
    assert run(path) == 0 and len(starts(home)) == 1
    assert (path.with_suffix("") / "low_seed1" / "train.log").read_text() == log.removeprefix(STAND_IN + CUT)


def test_finished_runs_are_of_their_seed_and_settings(home, capsys):
    path = write(home, MATRIX + "[arms.wild]\nmatrix_lr = 1e6\n")
    assert run(path) == 0
    folder = path.with_suffix("")
    write(home, MATRIX + "[arms.wild]\nmatrix_lr = 0.7\n")  # it did not diverge at that rate
    assert run(path) == 1 and "wild_seed1: expected matrix_lr=0.7, found 1000000.0" in capsys.readouterr().err
    write(home, MATRIX.replace("0.9", "0.8"))  # the report alone must not label old runs with new settings
    assert run(path, "--report") == 1 and "high_seed1: expected matrix_lr=0.8" in capsys.readouterr().err
    write(home, MATRIX)
    shutil.rmtree(folder / "low_seed2")
    shutil.copytree(folder / "low_seed1", folder / "low_seed2")
    for words in ([], ["--report"]):
        assert run(path, *words) == 1 and "low_seed2: expected seed=2, found 1" in capsys.readouterr().err


def test_other_data_is_refused_before_anything_runs(home, capsys):
    path = write(home, MATRIX)
    assert run(path) == 0
    folder = path.with_suffix("")
    result = folder / "low_seed1" / "result.json"
    result.write_text(result.read_text().replace('"dataset_sha256": "a"', '"dataset_sha256": "b"'))
    shutil.rmtree(folder / "high_seed3")
    assert run(path) == 1 and "low_seed1: expected runs on the data that is here" in capsys.readouterr().err
    result.write_text(result.read_text().replace('"dataset_sha256": "b"', '"dataset_sha256": "a"'))
    (home / "data.txt").write_text("c")
    assert run(path) == 1 and "expected runs on the data that is here" in capsys.readouterr().err
    assert len(starts(home)) == 6


def test_an_incomplete_folder_of_a_finished_run_is_replaced(home):
    path = write(home, ONE)
    (path.with_suffix("") / "low_seed1").mkdir(parents=True)
    (path.with_suffix("") / "low_seed1" / "train.log").write_text("half")
    assert run(path) == 0 and scores(path) == {"low_seed1": pytest.approx(2.011)}


def test_an_error_of_the_tool_stops_the_runs_in_hand(home, capsys, monkeypatch):
    """A full disk, say: what runs beside it must not go on alone."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    path = write(home, ONE + "[arms.long]\nseconds = 30.0\nmatrix_lr = 0.3\n")

    def keep(*_):
        raise OSError(28, "No space left on device", "a file")

    monkeypatch.setattr(ablate.Queue, "keep", keep)
    began = time.monotonic()
    assert run(path, "--jobs=2") == 1 and "No space left" in capsys.readouterr().err
    assert time.monotonic() - began < 20
    assert (home / "logs" / "m" / "long_seed1" / "checkpoint.safetensors").is_file()
    monkeypatch.undo()


def test_an_earlier_attempt_does_not_explain_a_failure(home, capsys):
    """Divergence is a result, so it must be of this attempt and not of one before."""
    path = write(home, ONE.replace("0.1", "1e6"))
    assert run(path) == 0 and (path.with_suffix("") / "low_seed1" / "diverged.json").is_file()
    shutil.rmtree(path.with_suffix("") / "low_seed1")
    (home / "train_gpt.py").write_text(STAND_IN.replace("    if c.matrix_lr > 100:", "    os._exit(3)\n    if 0:"))
    assert run(path) == 1 and "failed (3)" in capsys.readouterr().out
    assert not (path.with_suffix("") / "low_seed1").exists()


def test_a_model_that_no_artifact_can_hold_has_diverged(home):
    path = write(home, ONE.replace("0.1", "97.0"))
    assert run(path) == 0 and run(path) == 0 and len(starts(home)) == 1
    assert "below 1e+30, found 6e+37" in (path.with_suffix("") / "low_seed1" / "diverged.json").read_text()


@pytest.mark.parametrize("rate", ["98.0", "99.0"])
def test_a_score_that_is_not_finite_is_kept_as_a_diverged_result(home, capsys, rate):
    """The last update made the model worthless: the queue goes on, the report says so, nothing is run twice."""
    path = write(home, MATRIX.replace("0.9", rate))
    assert run(path) == 0
    assert (
        "high_seed1: diverged, kept as a result: the score after step 3: expected a finite" in capsys.readouterr().out
    )
    folder = path.with_suffix("")
    reason = json.loads((folder / "high_seed2" / "diverged.json").read_text())["diverged"]
    assert reason.startswith("the score after step 3: expected a finite loss, found nan")
    assert not (folder / "high_seed2" / "result.json").exists()
    text = (folder / "README.md").read_text()
    assert "| high | 0/3 | diverged 3 times |" in text and "| **low** | 3/3 | 2.0120 |" in text
    assert "**3 runs diverged and are in no mean.** `high_seed1`: the score" in text and "still to be done" not in text
    assert run(path) == 0 and len(starts(home)) == 6
    assert run(path, "--list") == 0 and capsys.readouterr().out.count("diverged") > 3


def test_passes_at_test_time_have_a_table():
    """Means over seeds, a dash where a number of passes was not scored; arms with one number are left out."""
    scored = {
        "a": [{"val_bpb_by_loops": {"3": 2.0, "1": 3.0}}, {"val_bpb_by_loops": {"3": 2.5, "1": 3.5}}],
        "b": [{"val_bpb_by_loops": {"3": 2.0, "8": 4.0}}],
        "c": [{"val_bpb_by_loops": {"5": 2.0}}],
        "d": [{}],
    }
    lines = ablate.by_passes(scored).strip().splitlines()[2:]
    assert lines[0].split() == "| arm | 1 | 3 | 5 | 8 |".split() and len(lines) == 4
    assert lines[2].split() == "| a | 3.2500 | 2.2500 | – | – |".split()
    assert lines[3].split() == "| b | – | 2.0000 | – | 4.0000 |".split()
    assert ablate.by_passes({"c": scored["c"], "d": scored["d"]}) == ""


def test_a_matrix_of_diverged_runs_alone_has_a_report(home):
    path = write(home, ONE.replace("0.1", "99.0"))
    assert run(path) == 0
    text = (path.with_suffix("") / "README.md").read_text()
    assert "| low | 0/1 | diverged 1 times |" in text.replace("**", "") and "matrix.png" not in text


@pytest.mark.parametrize("value", ["null", "NaN"])
@pytest.mark.parametrize("key", ["val_bpb", "val_bpb_raw"])
def test_a_kept_result_without_a_score_counts_as_diverged(home, key, value):
    """As other versions of the tools may have kept it."""
    path = write(home, MATRIX)
    assert run(path) == 0
    result = path.with_suffix("") / "high_seed2" / "result.json"
    score = json.loads(result.read_text())[key]
    result.write_text(result.read_text().replace(f'"{key}": {score}', f'"{key}": {value}'))
    assert run(path) == 0 and len(starts(home)) == 6
    text = (path.with_suffix("") / "README.md").read_text()
    assert "| high | 2/3, 1 diverged |" in text and f"`high_seed2`: expected a finite {key}" in text


def test_a_curve_with_holes_is_drawn(home, monkeypatch):
    monkeypatch.setattr(ablate, "save_picture", draw.save_picture)
    path = write(home, ONE)
    assert run(path) == 0
    metrics = path.with_suffix("") / "low_seed1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 4, "val_loss": null, "val_bpb": null, "flops": 4e9}\n')
    assert run(path, "--report") == 0 and (path.with_suffix("") / "matrix.png").is_file()


def test_a_script_that_a_commit_has_is_not_kept(home):
    me = "-c user.name=me -c user.email=me@here".split()
    for command in (["init", "-q"], ["add", "train_gpt.py"], [*me, "commit", "-qm", "one"], ["branch", "abc"]):
        subprocess.run(["git", *command], cwd=home, check=True)  # the stand-in says that its commit is abc
    path = write(home, ONE)
    assert run(path) == 0 and not list(path.with_suffix("").glob("*.py"))
    (home / "train_gpt.py").write_text(STAND_IN + "\n# changed\n")  # and committed while it ran, perhaps
    shutil.rmtree(path.with_suffix(""))
    assert run(path) == 0 and len(list(path.with_suffix("").glob("*.py"))) == 1


def test_logs_are_kept_without_the_script_and_the_script_once(home):
    arms = "[arms.low]\nmatrix_lr = 0.1\nseconds = 2.5\n[arms.high]\nmatrix_lr = 0.2\n"
    path = write(home, "seeds = [1]\n[budget]\ntokens = 300\n" + arms)
    assert run(path, "--max-minutes=0.03") == 0 and run(path) == 0
    assert [line.split()[:2] for line in starts(home)] == [["low_seed1", "0"], ["low_seed1", "1"], ["high_seed1", "0"]]
    folder, script = path.with_suffix(""), hashlib.sha256(STAND_IN.encode()).hexdigest()
    assert [file.name for file in folder.glob("*.py")] == [f"train_gpt.{script[:12]}.py"]
    assert (folder / f"train_gpt.{script[:12]}.py").read_text() == STAND_IN
    for arm, parts in (("low", 2), ("high", 1)):
        log = (folder / f"{arm}_seed1" / "train.log").read_text()
        assert log.startswith("config: {") and "DEFAULT_PRESET" not in log and "====" not in log
        assert log.count("config: {") == log.count(f"sha256: {script}") == parts
        assert json.loads((folder / f"{arm}_seed1" / "run.json").read_text())["script_sha256"] == script
        assert logs.read_log(folder / f"{arm}_seed1" / "train.log").config["seed"] == 1
    assert f"sha256 {script[:12]}" in (folder / "README.md").read_text()
    assert (home / "logs" / "m" / "low_seed1" / "train.log").read_text().startswith(STAND_IN)


def test_arms_may_differ_in_what_is_not_trained(home, capsys):
    """Equal hashes of what is trained are no equal configurations."""
    head, arms = MATRIX.split("[arms.low]")[0], "[arms.{}]\nmatrix_lr = 0.1\nquant_loss = {}\n"
    text = head + arms.format("low", 0.01) + arms.format("high", 0.02)
    path = write(home, text)
    assert run(path) == 0 and len(starts(home)) == 6
    write(home, text.replace("0.02", "0.03"))  # what is kept was exported otherwise
    assert run(path) == 1 and "high_seed1: expected quant_loss=0.03, found 0.02" in capsys.readouterr().err
    write(home, text.replace("0.02", "0.01"))
    assert run(path, "--list") == 1 and "arms that differ, found low and high to be one" in capsys.readouterr().err


def test_a_script_changed_while_the_queue_runs_is_noticed(home, capsys):
    path = write(home, ONE)
    changing = STAND_IN.replace("def main():\n", 'def main():\n    open(__file__, "a").write("# changed\\n")\n')
    (home / "train_gpt.py").write_text(changing)
    assert run(path) == 1 and "train_gpt.py was changed meanwhile" in capsys.readouterr().out
    assert scores(path) == {}


def test_committed_matrices_are_in_order():
    """Runs are what their TOML calls them; logs have no script, which is their commit's or lies beside them (a clone
    without history, or none, cannot tell)."""
    ask = ["git", "rev-parse", "--is-shallow-repository"]
    whole = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True).stdout.strip() == "false"
    for path in sorted((ROOT / "records" / "ablations").glob("*.toml")):
        matrix = ablate.read_matrix(path)
        ablate.check_finished(matrix)
        for run, _ in matrix.finished():
            script = json.loads((run.home / "run.json").read_text())["script_sha256"]
            copy = matrix.home / f"train_gpt.{script[:12]}.py"
            if copy.is_file():
                assert hashlib.sha256(copy.read_bytes()).hexdigest() == script
            elif whole:
                commit = json.loads((run.home / "result.json").read_text())["commit"]
                assert hashlib.sha256(ablate.of_commit(commit, matrix.script)).hexdigest() == script
            assert (run.home / "train.log").read_text().startswith("config: {")


@pytest.mark.parametrize("text", ["{}", "[]", '{"val_bpb": null}', '{"val_bpb": "2"}', "{"])
def test_a_broken_result_is_one_line(home, capsys, text):
    path = write(home, ONE)
    assert run(path) == 0
    (path.with_suffix("") / "low_seed1" / "result.json").write_text(text)
    for words in ([], ["--report"], ["--list"]):
        assert run(path, *words) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and "result.json" in err


@pytest.mark.parametrize("words", ["--jobs=-1", "--max-minutes=-1", "--max-minutes=nan"])
def test_bad_numbers_are_refused(home, capsys, words):
    assert run(write(home, ONE), words) == 1
    assert capsys.readouterr().err.startswith(f"error: {words.partition('=')[0]}: expected")


def test_torchrun_that_was_stopped_has_not_failed(home, capsys, monkeypatch):
    """torchrun answers SIGTERM with exit code 1."""
    path = write(home, ONE.replace("seconds = 0.0", "seconds = 30.0"))
    (home / "train_gpt.py").write_text(STAND_IN.replace("sys.exit(143)", "sys.exit(1)"))
    assert run(path, "--max-minutes=0.01") == 0
    assert "the same command goes on" in capsys.readouterr().out


@pytest.mark.parametrize("text, expected", [
    ("seeds = [1", "expected TOML"),
    ("sedes = [1]\n" + MATRIX, "sedes: expected one of"),
    (MATRIX.replace("[1, 2, 3]", "[1, 1]"), "seeds: expected different whole numbers"),
    (MATRIX.replace("[1, 2, 3]", '["1"]'), "seeds: expected different whole numbers"),
    (MATRIX.replace("[1, 2, 3]", "3"), "seeds: expected a list"),
    (MATRIX.replace("tokens = 300", "tokens = 300\nflops = 1e9"), "[budget]: expected exactly one"),
    (MATRIX.replace("tokens = 300", "hours = 3"), "[budget]: expected exactly one"),
    (MATRIX.replace("tokens = 300", "tokens = 0"), "expected a number above 0"),
    (MATRIX.replace("tokens = 300", "tokens = 110"), "expected a multiple of 100"),
    (MATRIX.replace('"low"', '"lowest"'), "against: expected one of the arms"),
    (MATRIX.replace("matrix_lr = 0.9", "matrix_rl = 0.9"), "arm high: --matrix_rl"),
    (MATRIX.replace("matrix_lr = 0.9", "iterations = 9"), "expected the budget in [budget] alone"),
    (MATRIX.replace("matrix_lr = 0.9", "matrix_lr = 0.1"), "expected arms that differ"),
    (MATRIX.replace("matrix_lr = 0.9", "seed = 4"), "expected no setting that this tool makes"),
    (MATRIX.replace("matrix_lr = 0.9", "SEED = 4"), "expected a setting in lower case"),
    (MATRIX.replace("matrix_lr = 0.9", "matrix_lr = [1]"), "expected a text or a number"),
    (MATRIX.replace("seeds", 'script = "other.py"\nseeds'), "script: expected train_gpt.py or"),
    ("seeds = [1]\n[budget]\ntokens = 100\n", "expected at least one arm"),
    (MATRIX.replace("arms.high", "arms.'a b'"), "expected letters, digits"),
    (MATRIX.replace("seeds", "processes = 2\nscript = 'train_gpt_mlx.py'\nseeds"), "processes: expected 1, or more"),
])  # fmt: skip
def test_bad_matrices_are_one_line(home, capsys, text, expected):
    path = write(home, text)
    assert run(path, "--list") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err
    assert not (home / "logs").exists()


def test_missing_and_misnamed_files(home, capsys):
    assert run(home / "none.toml") == 1 and "found nothing to read" in capsys.readouterr().err
    assert run(write(home, MATRIX, "a b.toml")) == 1 and "the file's name" in capsys.readouterr().err


def test_several_processes_use_torchrun(home, monkeypatch):
    seen = []
    path = write(home, MATRIX.replace("seeds", "processes = 2\nseeds"))
    monkeypatch.setattr(ablate.subprocess, "Popen", lambda command, **rest: seen.append((command, rest)) or Ended())
    monkeypatch.setattr(ablate, "find_devices", lambda *_: [{"CUDA_VISIBLE_DEVICES": "2,3"}])
    assert run(path) == 1  # the stand-in for a process leaves no result
    command, rest = seen[0]
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert rest["env"]["CUDA_VISIBLE_DEVICES"] == "2,3"


class Ended:
    returncode = 1

    def poll(self):
        return 1


def test_the_real_script(data, home, capsys):
    """Three short runs of the script that starts faster; the copy of the repository keeps logs/ out of ours."""
    script = f"{quicker_script()}.py"
    (home / script).write_bytes((ROOT / script).read_bytes())
    settings = {key.lower(): value for key, value in (TINY | data.env).items()}
    settings = {key: value for key, value in settings.items() if key not in ("iterations", "max_wallclock_seconds")}
    base = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    text = f"script = '{script}'\nseeds = [1]\n[budget]\ntokens = 1024\n[base]\n{base}"
    text += "[arms.one]\n[arms.two]\nmatrix_lr = 0.02\n"
    text += "[arms.late]\nmatrix_lr = 1e38\nwarmdown_frac = 0\n"  # one step too far
    path = write(home, text)
    assert run(path) == 0, capsys.readouterr()
    for arm in ("one", "two"):
        result = json.loads((path.with_suffix("") / f"{arm}_seed1" / "result.json").read_text())
        assert result["steps"] == 4 and result["tokens"] == 1024 and result["complete"]
    text = (path.with_suffix("") / "README.md").read_text()
    assert "1+2x2+1" in text and "| two | 1/1 |" in text and "| late | 0/1 | diverged 1 times |" in text
    source = (path.with_suffix("") / "one_seed1" / "train.log").read_text()
    assert source.startswith("config: {") and hashlib.sha256((home / script).read_bytes()).hexdigest() in source
