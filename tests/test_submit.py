"""records/submit.py and records/table.py: runs into a checked record folder, and the page about all folders."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
import common
import draw
import logs
import submit
import table
from check import check_folder
from conftest import ROOT, TINY, from_file, run_in_process, script_or_skip, tree

SEEDS = (1, 2, 3)
WORDS = ["--track=local", "--name=tiny", "--author=A. Nonymous", "--blurb=Four blocks, two of them twice."]


def run(*args) -> int:
    return common.run_tool(submit.main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """A repository's root with data/ and finished runs in logs/."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(data.path, root / "data" / "datasets" / "tiny_sp320")
    (root / "data" / "tokenizers").mkdir()
    shutil.copyfile(data.tokenizer, root / "data" / "tokenizers" / "tiny.model")
    paths = {"DATA_PATH": "data/datasets/tiny_sp320", "TOKENIZER_PATH": "data/tokenizers/tiny.model", "LOG_DIR": "logs"}
    env = TINY | {"VAL_LOSS_EVERY": "4"} | {name: str(root / path) for name, path in paths.items()}
    module = script_or_skip("train_gpt")
    runs = {f"seed{seed}": {"SEED": str(seed)} for seed in SEEDS}
    runs |= {"other_lr": {"SEED": "4", "MATRIX_LR": "0.01"}, "partial": {"SEED": "5", "VAL_MAX_TOKENS": "320"},
             "twin": {"SEED": "1"}, "packed": {"SEED": "6", "COUNT_CODE": "packed"},
             "weights": {"SEED": "7", "COUNT_CODE": "0"}, "shown_often": {"SEED": "8", "TRAIN_LOG_EVERY": "2"},
             "other_stride": {"SEED": "9", "EVAL_STRIDE": "16"},
             "other_export": {"SEED": "10", "BYTES_CAP": "15000000"}}  # fmt: skip
    for name, settings in runs.items():
        assert run_in_process(module, **env | settings, RUN_ID=name).code == 0
    return root


@pytest.fixture
def root(made, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "root")
    return tmp_path / "root"


def change_result(folder: Path, **values) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_three_seeds_become_a_proven_folder(root, capsys):
    """The whole way, with the proof: the baked script starts inside the folder and repeats the logged steps."""
    runs = [root / "logs" / f"seed{seed}" for seed in SEEDS]
    before = tree(root / "logs")
    assert run(*runs, *WORDS, "--date=2026-11-21", f"--out={root / 'records'}", "--beat=9.5") == 0, capsys.readouterr()
    home = root / "records" / "track_local" / "2026-11-21_tiny"
    assert "proof" in capsys.readouterr().out and tree(root / "logs") == before
    assert [path.name for path in (root / "records").iterdir()] == ["track_local"]  # nothing left of the making
    names = {f"{stem}_seed{seed}.{suffix}" for seed in SEEDS
             for stem, suffix in (("train", "log"), ("result", "json"), ("metrics", "jsonl"))}  # fmt: skip
    assert {path.name for path in home.iterdir()} == names | {"README.md", "submission.json", "requirements.txt",
                                                              "train_gpt.py"}  # fmt: skip
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    scores = [result["val_bpb"] for result in results]
    facts = json.loads((home / "submission.json").read_text())
    assert facts["val_bpb"] == pytest.approx(sum(scores) / 3) and facts["seeds"] == list(SEEDS)
    mean = sum(scores) / 3
    assert facts["val_bpb_std"] == pytest.approx((sum((score - mean) ** 2 for score in scores) / 2) ** 0.5)
    code = len((home / "train_gpt.py").read_bytes())
    assert facts["bytes_code"] == code and facts["bytes_total"] == code + max(r["bytes_artifact"] for r in results)
    text = (home / "README.md").read_text()
    assert "Started inside this folder" in text and "TO FILL IN" not in text and "Four blocks" in text
    for score in scores:
        assert f"{score:.7g}" in text
    source, shipped = (ROOT / "train_gpt.py").read_text().splitlines(), (home / "train_gpt.py").read_text().splitlines()
    removed = [line for line in source if line not in shipped]
    assert removed == ['DEFAULT_PRESET = "record"']
    assert run(*runs, *WORDS, "--date=2026-11-21", f"--out={root / 'records'}") == 1
    assert "expected a new folder" in capsys.readouterr().err


def test_a_packed_run_becomes_a_packed_folder(root, capsys):
    """COUNT_CODE=packed: what is counted is what is shipped, a third of the script; it runs and repeats itself."""
    folder, home = root / "logs" / "packed", root / "records" / "track_local" / "2026-11-21_tiny"
    counted = json.loads((folder / "result.json").read_text())["bytes_code"]
    source = (ROOT / "train_gpt.py").read_text()
    assert counted < 0.4 * len(source.encode())
    text = (folder / "train.log").read_text()
    assert f"(code {counted} packed + artifact " in text and text.startswith(source)
    assert run(folder, *WORDS, "--date=2026-11-21", f"--out={root / 'records'}") == 0, capsys.readouterr()
    shipped = home / "train_gpt.py"
    facts, size = json.loads((home / "submission.json").read_text()), len(shipped.read_bytes())
    assert facts["bytes_code"] == size and abs(size - counted) < 1000
    assert facts["bytes_total"] == size + facts["bytes_model"]
    assert "Started inside this folder" in (home / "README.md").read_text()
    module = script_or_skip("train_gpt")
    assert run_in_process(from_file(shipped), "--help").out == module.help_text() + "\n"
    # Another script inside, or another count in the log, is found.
    assert {finding.rule for finding in check_folder(home) if finding.severity == "error"} == set()
    shipped.write_bytes(module.packed(source.replace("0.0001", "0.0002") + "x = 1\n"))
    log = home / "train_seed6.log"
    log.write_text(log.read_text().replace(f"{counted} packed", "90000 packed"))
    errors = [f"{finding}" for finding in check_folder(home) if finding.severity == "error"]
    assert any("the script of train_seed6.log" in error for error in errors), errors
    assert any("as shipped or at its head, found 90000" in error for error in errors), errors


def test_weights_alone(root, capsys, monkeypatch):
    """COUNT_CODE=0: the total is the artifact's; tracks refuse runs that count in another way than they do."""
    folder, records = root / "logs" / "weights", root / "records"
    words = ["--name=tiny", "--author=A", "--github-id=a", "--blurb=Small.", "--no-proof", "--date=2026-11-21",
             f"--out={records}"]  # fmt: skip
    monkeypatch.setitem(common.TRACKS, "weights", common.Track("", 100_000, counts_code=False, fineweb=False))
    monkeypatch.setitem(common.TRACKS, "code", common.Track("", fineweb=False))
    monkeypatch.setitem(common.TRACKS, "small", common.Track("", 1000, counts_code=False, fineweb=False))
    monkeypatch.setitem(common.TRACKS, "flops", common.Track("", counts_code=False, flops_cap=1000, fineweb=False))
    for track in ("local", "weights"):
        assert run(folder, f"--track={track}", *words) == 0, capsys.readouterr()
        home = records / f"track_{track}" / "2026-11-21_tiny"
        facts, result = (
            json.loads((home / "submission.json").read_text()),
            json.loads((folder / "result.json").read_text()),
        )
        assert facts["bytes_total"] == facts["bytes_model"] == result["bytes_total"] == result["bytes_artifact"]
        assert facts["bytes_code"] == len((home / "train_gpt.py").read_bytes()) and result["bytes_code"] == 0
        assert "which this track does not count" in (home / "README.md").read_text()
        assert check_folder(home) == []
    capsys.readouterr()
    for name, track, message in (
        ("weights", "code", "runs that count bytes with those of the code, found COUNT_CODE=0"),
        ("seed1", "weights", "runs that count bytes without those of the code, found COUNT_CODE=1"),
        ("packed", "weights", "runs that count bytes without those of the code, found COUNT_CODE=packed"),
        ("weights", "small", "what counts within 1000 bytes"),
        ("weights", "flops", "at most 1000 FLOPs of training"),
    ):
        assert run(root / "logs" / name, f"--track={track}", *words) == 1
        assert message in capsys.readouterr().err
        assert not (records / f"track_{track}" / "2026-11-21_tiny").is_dir() or track == "weights"


def test_seeds_may_differ_in_how_they_were_logged(root, capsys):
    runs = [root / "logs" / name for name in ("seed1", "shown_often")]
    assert run(*runs, *WORDS, "--no-proof", f"--out={root / 'records'}") == 0, capsys.readouterr()


def test_the_proof_finds_a_run_that_the_folder_does_not_repeat(root, capsys):
    """An edit that is consistent over log and metrics, so that only the repetition can tell."""
    folder = root / "logs" / "seed1"
    log, metrics = folder / "train.log", folder / "metrics.jsonl"
    text = log.read_text()
    loss = re.search(r"^step:2/\d+ train_loss:(\S+) ", text, re.M)[1]
    log.write_text(text.replace(f"train_loss:{loss} ", "train_loss:4.0000 ", 1))
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row | {"train_loss": 4.0} if row["step"] == 2 and "train_loss" in row else row for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(folder, *WORDS, f"--out={root / 'records'}") == 1
    err = capsys.readouterr().err
    assert "proof, step 2: expected a training loss near 4.0" in err
    assert not list((root / "records").rglob("*.py"))


def break_nothing(root):
    pass


def drop(name):
    return lambda root: (root / "logs" / "seed1" / name).unlink()


def edit(old, new, name="train.log"):
    def change(root):
        path = root / "logs" / "seed1" / name
        text = path.read_text()
        head = text.rindex("=" * 120) if name == "train.log" else 0
        assert re.search(old, text[head:], re.M), old
        path.write_text(text[:head] + re.sub(old, new, text[head:], count=1, flags=re.M))

    return change


def edit_source(old, new):
    def change(root):
        path = root / "logs" / "seed1" / "train.log"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def lose(key):
    def change(root):
        path = root / "logs" / "seed1" / "result.json"
        values = json.loads(path.read_text())
        del values[key]
        path.write_text(json.dumps(values))

    return change


def result(**values):
    return lambda root: change_result(root / "logs" / "seed1", **values)


@pytest.mark.parametrize("runs, change, words, expected", [
    (["none"], break_nothing, [], "expected a run folder"),
    (["seed1"], drop("result.json"), [], "expected the result.json of a finished run"),
    (["seed1"], drop("metrics.jsonl"), [], "expected metrics.jsonl"),
    (["seed1"], drop("train.log"), [], "expected train.log"),
    (["seed1"], lambda root: (root / "logs/seed1/result.json").write_text("{"), [], "found no JSON"),
    (["seed1"], lambda root: (root / "logs/seed1/result.json").write_text("[]"), [], "found a list"),
    (["seed1"], lambda root: (root / "logs/seed1/result.json").write_text("{}"), [], "the keys of result.json"),
    (["seed1"], result(val_bpb=None, complete=False), [], "expected a finished run"),
    (["seed1"], result(val_bpb=float("nan")), [], "expected finite numbers"),
    (["seed1"], result(fits=False), [], "expected code \\+ artifact within"),
    (["partial"], break_nothing, [], "expected a score on the whole validation set"),
    (["seed1", "other_lr"], break_nothing, [], "matrix_lr=0.01 instead of 0.04"),
    (["seed1", "other_stride"], break_nothing, [], "eval_stride=16 instead of 0"),
    (["seed1", "other_export"], break_nothing, [], "bytes_cap=15000000 instead of 16000000"),
    (["seed1", "weights"], break_nothing, [], "count_code=0 instead of 1"),
    (["seed1", "twin"], break_nothing, [], "expected one run a seed"),
    (["seed1", "seed2"], result(dataset_sha256="0"), [], "expected dataset_sha256"),
    (["seed1"], break_nothing, ["--name=a b"], "no spaces"),
    (["seed1"], break_nothing, ["--date=21.11.2026"], "expected YYYY-MM-DD"),
    (["seed1"], break_nothing, ["--date=20261121"], "expected YYYY-MM-DD"),
    (["seed1"], break_nothing, ["--beat=-1"], "a score in bits per byte"),
    (["seed1"], break_nothing, ["--prose=/none"], "expected a text file"),
    (["seed1"], break_nothing, ["--track=10min_16mb", "--github-id=x"], "local for text that is not FineWeb"),
    (["seed1"], break_nothing, ["--track=fast"], "invalid choice"),
    # An edited log: against metrics.jsonl, result.json or its own configuration hash.
    (["seed1"], edit(r"^(step:4/\d+ train_loss:)\S+", r"\g<1>1.2345"), [], "without errors"),
    (["seed1"], edit(r"^(step:4/\d+ val_loss:\S+ val_bpb:)\S+", r"\g<1>1.2345"), [], "without errors"),
    (["seed1"], edit(r"(roundtrip_exact val_loss:\S+ val_bpb:)\S+", r"\g<1>1.23456789"), [], "without errors"),
    (["seed1"], result(val_bpb=1.5), [], "without errors"),
    (["seed1"], edit(r'"matrix_lr": 0.04', '"matrix_lr": 0.05'), [], "the run's configuration"),
    (["seed1"], edit(r"^config: .*$", "config: nothing"), [], "source and a config at its head"),
    (["seed1"], edit(r'"init_from": ""', '"init_from": "x"'), [], "expected a run from scratch"),
    (["seed1"], edit(r"^config: .*$", 'config: {"seed": 1}'), [], "settings of the config line"),
    (["seed1"], edit_source("class Config:", "class Confog:"), [], "a script that loads, found NameError"),
    (["seed1"], edit_source("def main(", "def main (:"), [], "a script that loads, found SyntaxError"),
    (["seed1"], edit_source("def main(", "nonsense()\ndef main("), [], "a script that loads, found NameError"),
    (["seed1"], edit_source("def main(", "sys.exit(3)\ndef main("), [], "a script that loads, found SystemExit"),
    (["seed1"], lambda root: (root / "logs/seed1/train.log").open("ab").write(b"\xff"), [], "expected UTF-8 text"),
    (["seed1"], lose("eval_time_ms"), [], "the keys of result.json, found no eval_time_ms"),
    # Numbers that only result.json would state: time caps and the track are judged by them.
    (["seed1"], result(dataset="fineweb10B_sp1024"), [], "without errors"),
    (["seed1"], result(device="NVIDIA H100 80GB HBM3"), [], "without errors"),
    (["seed1"], result(world_size=8), [], "without errors"),
    (["seed1"], result(eval_time_ms=1), [], "without errors"),
    (["seed1"], result(train_time_ms=1), [], "without errors"),
    (["seed1"], result(tokens=1), [], "without errors"),
])  # fmt: skip
def test_refusals_write_nothing(root, capsys, runs, change, words, expected):
    change(root)
    folders = [root / "logs" / name for name in runs]
    assert run(*folders, *WORDS, *words, "--no-proof", f"--out={root / 'records'}") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(expected, err), err
    assert not (root / "records").exists() or not list((root / "records").rglob("*.*"))


def test_a_folder_made_meanwhile_is_not_lost(root, capsys, monkeypatch):
    """Two submits of one name: the second asks again after its proof."""
    home = root / "records" / "track_local" / "2026-11-21_tiny"

    def proof(*_):
        home.mkdir(parents=True)
        (home / "kept").write_text("by the other one")
        return "proven"

    monkeypatch.setattr(submit, "prove_run", proof)
    assert run(root / "logs" / "seed1", *WORDS, "--date=2026-11-21", f"--out={root / 'records'}") == 1
    assert "expected a new folder" in capsys.readouterr().err and (home / "kept").is_file()


def test_replace_keeps_the_old_folder_until_the_new_one_is_there(root, monkeypatch):
    words = [root / "logs" / "seed1", *WORDS, "--date=2026-11-21", f"--out={root / 'records'}", "--no-proof"]
    home = root / "records" / "track_local" / "2026-11-21_tiny"
    assert run(*words) == 0
    (home / "README.md").write_text("old")
    replace = submit.os.replace

    def fail(source, target):
        if Path(target) == home and not str(source).endswith(".old"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(submit.os, "replace", fail)
        assert run(*words, "--replace") == 130
    assert (home / "README.md").read_text() == "old"
    assert run(*words, "--replace") == 0 and (home / "README.md").read_text() != "old"
    assert [path.name for path in (root / "records").iterdir()] == ["track_local"]


def test_a_run_of_a_records_own_script_can_be_submitted(root):
    """Another seed, started inside a record folder, as its README says."""
    words = [*WORDS, "--no-proof", f"--out={root / 'records'}"]
    assert run(root / "logs" / "seed1", *words, "--date=2026-11-21") == 0
    home = root / "records" / "track_local" / "2026-11-21_tiny"
    environment = {name: value for name, value in os.environ.items() if name.lower() not in ("seed", "log_dir")}
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=home, capture_output=True, text=True, timeout=120,
                          env=environment | {"SEED": "9", "RUN_ID": "nine", "LOG_DIR": str(root / "logs")})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert run(root / "logs" / "nine", *words, "--date=2026-11-22") == 0
    text = (root / "records" / "track_local" / "2026-11-22_tiny" / "train_gpt.py").read_text()
    assert text.count('"submission": """') == 1 and "seed=9" in text


SCRIPT = 'PRESETS = {\n    # A remark.\n    "a": """layout=9""",\n}\nDEFAULT_PRESET = "a"\n'


def test_baked_settings_survive_long_lines_and_other_alphabets():
    settings = {
        "data_path": "../../../data/datasets/\U0001f600ü{'",
        "seed": 3,
        "gate": 1 / 3,
        "shuffle": False,
        "x": "",
    }
    settings |= {f"setting_{i}": i for i in range(40)}
    baked, names = submit.bake(SCRIPT, settings), {}
    exec(baked, names)
    pairs = dict(pair.split("=", 1) for pair in names["PRESETS"]["submission"].split())
    assert (pairs["shuffle"], float(pairs["gate"]), pairs["x"]) == ("0", 1 / 3, "")
    assert pairs["data_path"] == settings["data_path"] and pairs["setting_39"] == "39"
    assert names["DEFAULT_PRESET"] == "submission" and max(map(len, baked.splitlines())) <= 120
    assert submit.BAKED.sub("", baked) == SCRIPT.replace('= "a"', '= "submission"')
    assert submit.bake(baked, {"seed": 1}).count("submission") == 2  # the preset and the default
    for name in ("two words", 'quo"te', "back\\slash"):
        with pytest.raises(common.InputError, match="a value without blanks and quotes"):
            submit.bake(SCRIPT, {"data_path": name})


def test_sigterm_ends_the_proof_too(root, tmp_path):
    """The proof has a session of its own: it must not train on alone."""
    code = f"""import sys, pathlib; sys.path.insert(0, {str(ROOT / "records")!r})
import submit, common
run = submit.read_run(pathlib.Path({str(root / "logs" / "seed1")!r}))
sys.exit(common.run_tool(lambda _: submit.prove_run(pathlib.Path({str(tmp_path)!r}), run), []))"""
    pid = tmp_path / "pid"
    (tmp_path / "train_gpt.py").write_text(f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n"
                                           "time.sleep(60)\n")  # fmt: skip
    tool = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if pid.is_file() and pid.read_text():
            break
        time.sleep(0.05)
    tool.terminate()
    assert tool.communicate(timeout=30)[1].startswith("stopped") and tool.returncode == 130
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.05)


def test_the_script_of_the_log_is_shipped_not_todays(root):
    """A log of an older script gives a folder with that script."""
    path, remark = root / "logs" / "seed1" / "train.log", "  # as it was"
    text = path.read_text().replace("import numpy as np\n", f"import numpy as np{remark}\n", 1)
    values = json.loads((path.parent / "result.json").read_text())
    longer = {key: values[key] + len(remark) for key in ("bytes_code", "bytes_total")}
    sha256 = hashlib.sha256(text[: text.index("\n" + "=" * 120)].encode()).hexdigest()
    change_result(path.parent, script_sha256=sha256, **longer)
    text = text.replace(values["script_sha256"], sha256)
    for key, value in longer.items():
        text = re.sub(rf"(size:.*?)\b{values[key]}\b", rf"\g<1>{value}", text)
    path.write_text(text)
    assert run(root / "logs" / "seed1", *WORDS, "--no-proof", f"--out={root / 'records'}") == 0
    home = next((root / "records" / "track_local").iterdir())
    assert "import numpy as np  # as it was\n" in (home / "train_gpt.py").read_text()
    assert "Not proven" in (home / "README.md").read_text()


def test_author_comes_from_git_or_is_asked_for(root, monkeypatch, capsys):
    words = [word for word in WORDS if "author" not in word]
    monkeypatch.setattr(submit, "git_setting", lambda name: "")
    assert run(root / "logs" / "seed1", *words, "--no-proof", f"--out={root / 'records'}") == 1
    assert "--author: expected a name" in capsys.readouterr().err
    monkeypatch.setattr(submit, "git_setting", {"user.name": "G. Hub", "github.user": "ghub"}.get)
    assert run(root / "logs" / "seed1", *words, "--no-proof", f"--out={root / 'records'}") == 0
    facts = json.loads(next((root / "records" / "track_local").glob("*/submission.json")).read_text())
    assert (facts["author"], facts["github_id"]) == ("G. Hub", "ghub")


def test_table_says_what_the_folders_say(root, capsys):
    records = root / "records"
    for name, runs in (("three", ["seed1", "seed2", "seed3"]), ("one", ["other_lr"])):
        words = [word.replace("tiny", name) for word in WORDS]
        folders = [root / "logs" / name for name in runs]
        assert run(*folders, *words, "--no-proof", "--date=2026-01-02", f"--out={records}") == 0
    (records / "ablations").mkdir()
    matrix = records / "ablations" / "rates.toml"
    matrix.write_text('about = "Which rate? More."\nseeds = [1, 2]\n[budget]\ntokens = 300\n[arms.one]\n')
    (records / "track_local" / "2026-01-03_four.7.part").mkdir()  # submit.py is at it
    for name in ("gone_seed1", "one_seed1.tmp"):  # an arm that was taken out; half a copy
        shutil.copytree(root / "logs" / "seed1", matrix.with_suffix("") / name)
    assert common.run_tool(table.main, [f"--home={records}"]) == 0
    text = (records / "README.md").read_text()
    scores = [json.loads((root / "logs" / f"seed{seed}" / "result.json").read_text())["val_bpb"] for seed in SEEDS]
    assert re.search(rf"\| \[three\]\(track_local/2026-01-02_three/README.md\) \| {sum(scores) / 3:.4f} \|", text)
    assert "| rates | Which rate? | 300 tokens | 0/2 | – |" in text and "## track_10min_16mb" in text
    assert (records / "track_local" / "tiny_sp320.png").read_bytes()[:4] == b"\x89PNG"
    (records / "README.md").write_text("# Ours\n\n" + text + "Words.\n")  # what stands around the tables stays
    assert common.run_tool(table.main, [f"--home={records}"]) == 0
    assert (records / "README.md").read_text() == "# Ours\n\n" + text + "Words.\n"
    assert common.run_tool(table.main, [f"--home={records}", "--check"]) == 0
    shutil.rmtree(records / "track_local" / "2026-01-02_one")
    assert common.run_tool(table.main, [f"--home={records}", "--check"]) == 1
    assert "found another text" in capsys.readouterr().err
    (records / "track_local" / "2026-01-02_three" / "submission.json").write_text("[]")
    assert common.run_tool(table.main, [f"--home={records}"]) == 1
    assert "submission.json of a record folder, found a list" in capsys.readouterr().err


def test_no_score_stops_the_table(root):
    """A model that blew up, or a folder of somebody else: listed last, without a number."""
    records = root / "records"
    for name in ("seed1", "seed2"):
        words = [word.replace("tiny", name) for word in WORDS]
        assert run(root / "logs" / name, *words, "--no-proof", "--date=2026-01-02", f"--out={records}") == 0
    home, other = (records / "track_local" / f"2026-01-02_seed{seed}" for seed in (1, 2))
    names = ("submission.json", "result_seed1.json", "metrics_seed1.jsonl")
    before = {home / name: (home / name).read_text() for name in names}
    for score in ("null", "NaN", "Infinity", '"1.2"', "true", "[]"):
        for path, text in before.items():
            path.write_text(re.sub(r'"(val_bpb|train_flops|flops)": [^,}\n]+', rf'"\1": {score}', text))
        assert common.run_tool(table.main, [f"--home={records}"]) == 0, score
        rows = [line for line in (records / "README.md").read_text().splitlines() if "2026-01-02_seed" in line]
        assert ["seed2" in row for row in rows] == [True, False], score
        assert re.search(r"README.md\) \| – \| – \| 0 \| – \|", rows[1]), score
    (other / "submission.json").write_text('{"val_bpb": null}')
    (other / "result_seed2.json").unlink()
    assert common.run_tool(table.main, [f"--home={records}"]) == 0


def test_table_and_report_name_what_they_cannot_read(root, capsys):
    records, path = root / "records", root / "metrics.jsonl"
    (records / "ablations").mkdir(parents=True)
    (records / "ablations" / "rates.toml").write_text("seeds = [1")
    assert common.run_tool(table.main, [f"--home={records}"]) == 1
    assert "rates.toml: expected TOML" in capsys.readouterr().err
    good = '{"step": 1, "val_bpb": 2, "flops": 1}\n'
    for text in ("{", "[]", "3", "null", '{"val_bpb": 2}', "[" * 100_000):
        path.write_text(good + text + "\n" + good)
        with pytest.raises(common.InputError, match="line 2: expected a JSON object with a step"):
            logs.read_metrics(path)
        path.write_text(good + text)  # cut: the run is writing it
        assert len(logs.read_metrics(path)) == 1
    path.write_text(good + '{"step": 2, "val_bpb": NaN, "flops": 2}\n{"step": 3, "val_bpb": null}\n')
    assert [row["step"] for row in logs.read_metrics(path)] == [1, 2, 3]
    figure, axes = draw.canvas(2, 2)
    assert draw.draw_validation(axes, [path], 0, "x") == [2]


def test_replacing_a_folder_keeps_written_words(root, capsys):
    records, words = root / "records", [word for word in WORDS if "blurb" not in word] + ["--date=2026-01-02"]
    make = [root / "logs" / "seed1", *words, "--no-proof", f"--out={records}"]
    assert run(*make) == 0 and run(*make, "--replace") == 0  # nobody has written anything yet
    readme = records / "track_local" / "2026-01-02_tiny" / "README.md"
    readme.write_text(readme.read_text().replace(submit.FILL_IN, "Loops are fun."))
    assert run(*make, "--replace") == 1 and "expected a README without words of yours" in capsys.readouterr().err
    assert "Loops are fun." in readme.read_text()
    assert run(*make, "--replace", "--blurb=Loops are fun.") == 0


def test_records_page_is_current():
    """records/README.md is what records/table.py makes of the folders in this repository."""
    assert (ROOT / "records" / "README.md").read_text(encoding="utf-8") == table.build(ROOT / "records")
