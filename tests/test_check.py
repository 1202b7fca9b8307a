"""records/check.py: a sound folder passes, and every rule finds the fault planted for it."""

import base64
import hashlib
import json
import lzma
import math
import os
import re
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
import check
import common
from logs import SOURCE_END, quantity, read_log

TOKENS, LENGTH = 62_021_632, 2.4359  # of the validation set with 1,024 pieces; bytes a token
LOSSES = {1: 1.9012, 2: 1.9021, 3: 1.9015}
MODEL = 15_000_000

SCRIPT = """import torch


def eval_val(model, val_tokens):
    loss_sum = 0.0
    with torch.inference_mode():
        for x in val_tokens:
            loss_sum += model(x)
    return loss_sum


def train(model, train_loader, optimizer):
    for x in train_loader:
        model(x).backward()
        optimizer.step()
"""

TRAINS_ON_VAL = """

def adapt(model, val_tokens, optimizer):
    for x in val_tokens:
        model(x).backward()
        optimizer.step()
"""

OURS = '''"""A trainer.

It prints lines such as
step:5/20 train_loss:9.0000
"""

DEFAULT_PRESET = "record"
PRESETS: dict[str, str] = {
    "record": "layout=3+3x3+5",
}
'''


def bits(loss: float) -> float:
    return loss / (math.log(2) * LENGTH)


def official_log(seed: int, loss: float, code: int) -> str:
    """A log in the words of the challenge's script: settings, warm-up, steps, export, score."""
    steps = "".join(
        f"step:{step}/200 train_loss:{7 - step / 40:.4f} train_time:{step * 2950}ms step_avg:2950.00ms\n"
        + (f"step:{step}/200 val_loss:{loss + 0.1:.4f} val_bpb:{bits(loss + 0.1):.4f} train_time:{step * 2950 + 9}ms "
           "step_avg:2950.05ms\n" if step % 100 == 0 else "")
        for step in range(10, 201, 10)
    )  # fmt: skip
    return (
        f"logs/run_{seed}.txt\n"
        "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/tokenizers/fineweb_1024_bpe.model\n"
        f"val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:{TOKENS}\n"
        "tie_embeddings:True embed_lr:0.05 matrix_lr:0.04\n"
        f"seed:{seed}\nwarmup_step:1/2\nwarmup_step:2/2\n{steps}"
        "stopping_early: wallclock_cap train_time:590009ms step:200/200\n"
        f"Serialized model: 67224983 bytes\nCode size: {code} bytes\n"
        f"Serialized model int8+zlib: {MODEL + seed} bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)\n"
        f"Total submission size int8+zlib: {MODEL + seed + code} bytes\n"
        f"final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bits(loss):.4f} eval_time:1401ms\n"
        f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bits(loss):.8f}\n"
    )


def write_folder(home: Path, track: str = "10min_16mb") -> Path:
    """A sound record in the challenge's form, three seeds."""
    folder = home / f"track_{track}" / "2026-04-01_Sound"
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_text(SCRIPT)
    code = len(SCRIPT)
    for seed, loss in LOSSES.items():
        (folder / f"train_seed{seed}.log").write_text(official_log(seed, loss, code))
    scores = {seed: round(bits(loss), 8) for seed, loss in LOSSES.items()}
    facts = {
        "author": "Ada", "github_id": "ada", "name": "Sound", "date": "2026-04-01", "track": track,
        "val_loss": statistics.fmean(LOSSES.values()), "val_bpb": statistics.fmean(scores.values()),
        "val_bpb_std": statistics.stdev(scores.values()), "seeds": list(LOSSES),
        "seed_results": {str(seed): {"val_loss": LOSSES[seed], "val_bpb": scores[seed], "steps": 200,
                                     "artifact_bytes": MODEL + seed + code} for seed in LOSSES},
        "bytes_total": MODEL + 3 + code, "bytes_code": code,
    }  # fmt: skip
    (folder / "submission.json").write_text(json.dumps(facts, indent=1))
    (folder / "README.md").write_text(f"# Sound\n\n**val_bpb: {facts['val_bpb']:.5f}** (mean of 3 seeds)\n")
    return folder


def write_ours(home: Path, track: str = "local", count_code: str = "1") -> Path:
    """A folder as submit.py writes it, one seed."""
    folder = home / f"track_{track}" / "2026-04-01_Ours"
    folder.mkdir(parents=True)
    baked = OURS.replace('"record"\n', '"submission"\n').replace(
        "str] = {\n", 'str] = {\n    "submission": """seed=7 layout=5x3\n        model_dim=64""",\n'
    )
    (folder / "train_gpt.py").write_text(baked)
    loss, rows, lines = 3.5, [], []
    code, counted = (0, ", not counted") if count_code == "0" else (len(OURS), "")
    for step in (1, 10, 20):
        rows.append({"step": step, "train_loss": 7 - step / 10, "train_time_ms": 100.25 * step})
        lines.append(f"step:{step}/20 train_loss:{7 - step / 10:.4f} loops:3 train_time:{100.25 * step:.0f}ms")
    rows.append({"step": 20, "val_loss": 3.4, "val_bpb": 2.0, "train_time_ms": 2005.0})
    lines.append("step:20/20 val_loss:3.4000 val_bpb:2.0000 loops:3 train_time:2005ms")
    bpb = loss * 2.0 / 3.4
    sha256 = hashlib.sha256(OURS.encode()).hexdigest()
    config = {"seed": 7, "layout": "5x3", "run_id": "a", "count_code": count_code, "data_path": "./data/x"}
    log = [
        OURS + SOURCE_END,
        f"config: {json.dumps(config)}",
        f"run: logs/a  script: torch  sha256: {sha256}  preset: record",
        "device: cpu  processes: 1  dtype: float32  compiled: False",
        "data: ./data/x  train tokens: 9000 in 1 shards  val tokens: 4096  val bytes: 10000",
        *lines,
        f"final_int6_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:35ms",
        f"final_int6_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}",
        f"score:    {bpb:.4f} bits per byte from disk (2.0000 before export, 3 passes)",
        f"size:     {code + 5000} bytes of 16000000: PASS (code {code}{counted} + artifact 5000, 5.391 bits a weight)",
        "training: 20 steps, 5120 tokens, 9e+14 FLOPs, 2.0 s, 1554 tok/s, peak memory 1547 MiB",
    ]
    (folder / "train_seed7.log").write_text("\n".join(log) + "\n")
    result = {
        "seed": 7, "steps": 20, "val_tokens": 4096, "val_loss": loss, "val_bpb": bpb, "bytes_code": code,
        "bytes_artifact": 5000, "bytes_total": code + 5000, "complete": True, "dataset": "x",
        "layout": "5x3", "eval_time_ms": 35, "train_time_ms": 2005, "train_flops": 9.04e14, "tokens": 5120,
        "script_sha256": sha256, "count_code": count_code, "val_bpb_raw": 2.0, "device": "cpu", "world_size": 1,
        "framework": "torch", "params_stored": 900, "loops": 3, "eval_loops": 3,
    }  # fmt: skip
    (folder / "result_seed7.json").write_text(json.dumps(result))
    (folder / "metrics_seed7.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = common.facts_of([result]) | {
        "author": "Ada", "github_id": "ada", "name": "Ours", "date": "2026-04-01", "track": track,
        "bytes_code": len(baked), "bytes_total": (len(baked) if code else 0) + 5000,
    }  # fmt: skip
    (folder / "submission.json").write_text(json.dumps(facts))
    (folder / "README.md").write_text(f"# Ours\n\n**val_bpb {bpb:.4f}** (1 seed)\n")
    return folder


def found(folder: Path, **options) -> dict[str, str]:
    """The worst severity of each rule that complains, without the notes."""
    complaints = {}
    for finding in reversed(check.check_folder(folder, **options)):
        if finding.severity != "info":
            complaints[finding.rule] = finding.severity
    return complaints


def edit(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text, old
    (folder / name).write_text(text.replace(old, new))


def set_facts(folder: Path, **changes) -> None:
    facts = json.loads((folder / "submission.json").read_text()) | changes
    (folder / "submission.json").write_text(json.dumps(facts))


def drop_fact(folder: Path, *keys: str) -> None:
    facts = json.loads((folder / "submission.json").read_text())
    for row in (facts, *facts["seed_results"].values()):
        for key in keys:
            row.pop(key, None)
    (folder / "submission.json").write_text(json.dumps(facts))


def all_logs(folder: Path, change) -> None:
    for path in folder.glob("train_seed*.log"):
        path.write_text(change(path.read_text()))


def test_sound_folders_pass(tmp_path):
    assert found(write_folder(tmp_path)) == {}
    assert found(write_folder(tmp_path / "b"), beat=1.2) == {}
    assert found(write_ours(tmp_path)) == {}
    assert found(write_folder(tmp_path / "c", "non_record_16mb")) == {}


def test_a_folder_is_judged_from_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(write_folder(tmp_path))
    assert found(Path()) == {}
    Path("README.md").unlink()
    for log in Path().glob("*.log"):
        log.unlink()
    where = {finding.where for finding in check.check_folder(Path(".")) if finding.rule in ("files", "train_logs")}
    assert where == {"README.md", "2026-04-01_Sound"}


def rename(folder: Path) -> None:
    folder.rename(folder.parent / "2026-04-01 With spaces")


def wrap(folder: Path, script: str) -> None:
    """The script as a compressed one round a small loader."""
    text = script + "\n".join(f"x{i} = {i * i * 7919}" for i in range(3000))
    blob = base64.b85encode(lzma.compress(text.encode())).decode()
    (folder / "train_gpt.py").write_text(f"import lzma, base64\nexec(lzma.decompress(base64.b85decode({blob!r})))\n")


def uncounted(folder: Path) -> None:
    """PR #1412: a small script that runs a large file nobody counted."""
    code = 'exec(open(__file__.replace("train_gpt.py", "decode.py")).read())\n'
    (folder / "train_gpt.py").write_text(code)
    (folder / "decode.py").write_text(SCRIPT + "# x\n" * 260_000)
    all_logs(folder, lambda text: text.replace(f"Code size: {len(SCRIPT)}", f"Code size: {len(code)}"))


def other_bytes(factor: float):
    """Scores as a wrong byte count gives them (PRs #1545, #1576: a space counted twice)."""

    def change(folder: Path) -> None:
        for seed, loss in LOSSES.items():
            log = official_log(seed, loss, len(SCRIPT))
            for value in (loss, loss + 0.1):
                for decimals in (8, 4):
                    log = log.replace(
                        f"val_bpb:{bits(value):.{decimals}f}", f"val_bpb:{bits(value) / factor:.{decimals}f}"
                    )
            (folder / f"train_seed{seed}.log").write_text(log)

    return change  # fmt: skip


def put(name: str, old: str, new: str):
    return lambda folder: edit(folder, name, old, new)


def in_logs(old: str, new: str):
    return lambda folder: all_logs(folder, lambda text: text.replace(old, new))


def facts(**changes):
    return lambda folder: set_facts(folder, **changes)


TOTAL = MODEL + 2 + len(SCRIPT)  # bytes of the submission with seed 2


def uncounted_import(folder: Path) -> None:
    (folder / "helper.py").write_text("x = 1\n" * 90)
    edit(folder, "train_gpt.py", "import torch", "import torch, helper")


def two_seeds(folder: Path) -> None:
    edit(folder, "submission.json", '"seed_results"', '"unused"')
    (folder / "train_seed3.log").unlink()


FAULTS = {
    "no readme": (lambda f: (f / "README.md").unlink(), "files", "error"),
    "no json": (lambda f: (f / "submission.json").unlink(), "files", "error"),
    "no script": (lambda f: (f / "train_gpt.py").unlink(), "files", "error"),
    "empty script": (lambda f: (f / "train_gpt.py").write_text(""), "files", "error"),
    "no logs": (lambda f: [path.unlink() for path in f.glob("*.log")], "train_logs", "error"),
    "weights": (lambda f: (f / "model.pt").write_bytes(b"123"), "files", "warning"),
    "cache": (lambda f: ((f / "__pycache__").mkdir(), (f / "__pycache__/x.pyc").write_bytes(b"1")), "files", "warning"),
    "script's name": (lambda f: (f / "train_gpt.py").rename(f / "train_v5.py"), "files", "warning"),
    "no author": (lambda f: drop_fact(f, "author"), "json_fields", "warning"),
    "a list as name": (facts(name=["x"]), "json_fields", "warning"),
    "bad date": (facts(date="the first of April"), "json_fields", "warning"),
    "null score": (facts(val_bpb=None), "json_fields", "error"),
    "NaN score": (facts(val_bpb=math.nan), "readable", "error"),
    "score of a cheat": (facts(val_bpb=0.0989), "json_fields", "error"),
    "null size": (lambda f: (set_facts(f, compressed_model_bytes=None),
                             all_logs(f, lambda t: t.replace("Total submission", "").replace("Serialized", ""))),
        "artifact_size", "error"),
    "no size": (lambda f: drop_fact(f, "bytes_total", "artifact_bytes"), "artifact_size", "warning"),
    "over the cap in JSON": (facts(bytes_total=16_024_793), "cap", "error"),
    "over the cap in a log": (put("train_seed2.log", f"zlib: {TOTAL} b", "zlib: 16000001 b"), "cap", "error"),
    "uncounted file": (uncounted, "cap", "error"),
    "uncounted import": (uncounted_import, "code_bytes", "warning"),
    "other script": (put("train_gpt.py", "import torch", "import torch\n" + "# more\n" * 20), "code_bytes", "warning"),
    "sizes do not add up": (put("train_seed2.log", f"zlib: {TOTAL} b", "zlib: 14000001 b"), "total_bytes", "warning"),
    "size of another run": (facts(bytes_total=15_123_456), "total_bytes", "warning"),
    "fewer validation tokens": (in_logs(str(TOKENS), "36600000"), "val_tokens", "error"),
    "wrong bytes": (other_bytes(1.167), "implied_bytes", "error"),
    "bytes a little wrong": (other_bytes(1.004), "implied_bytes", "warning"),
    "training too long": (in_logs("train_time:590009ms step:", "train_time:606000ms step:"), "time_caps", "error"),
    "evaluation too long": (in_logs("eval_time:1401ms", "eval_time:605460ms"), "time_caps", "error"),
    "stitched log": (put("train_seed1.log", "train_time:236000ms", "train_time:436000ms"), "monotonic", "error"),
    "a step goes back": (put("train_seed1.log", "step:110/200", "step:90/200"), "monotonic", "error"),
    "time by hand": (put("train_seed1.log", "train_time:236000ms", "train_time:229000ms"), "step_averages", "warning"),
    "numbers by hand": (put("train_seed1.log", "train_time:590009ms", "train_time:~590009ms"), "monotonic", "warning"),
    "a NaN": (put("train_seed1.log", "train_loss:2.7500", "train_loss:nan"), "finite", "error"),
    "score without a run": (facts(val_bpb=1.1), "scores", "error"),
    "loss without a run": (facts(val_loss=1.85), "scores", "error"),
    "seed's score": (put("submission.json", f'"val_bpb": {round(bits(LOSSES[2]), 8)}', '"val_bpb": 1.12'),
        "seed_scores", "error"),
    "seed's steps": (put("submission.json", '"steps": 200', '"steps": 215'), "seed_scores", "warning"),
    "std": (facts(val_bpb_std=0.01), "scores", "warning"),
    "readme's score": (lambda f: (f / "README.md").write_text("# Sound\n\nval_bpb: **1.0912**\n"),
        "readme_score", "warning"),
    "pending": (put("README.md", "# Sound", "# Sound\n\nResults: PENDING"), "placeholders", "warning"),
    "a log of another seed": (put("train_seed2.log", "seed:2", "seed:1"), "seeds", "error"),
    "a seed twice": (facts(seeds=[1, 2, 2]), "seeds", "error"),
    "a seed without a log": (facts(seeds=[1, 2, 3, 4]), "seeds", "warning"),
    "other settings": (put("train_seed2.log", "matrix_lr:0.04", "matrix_lr:0.02"), "one_config", "warning"),
    "two seeds": (two_seeds,
        "significance", "warning"),
    "syntax": (lambda f: (f / "train_gpt.py").write_text("def f(:\n"), "compiles", "error"),
    "packed syntax": (lambda f: wrap(f, "import torch\ndef f(:\n"), "compiles", "error"),
    "trains on validation": (lambda f: (f / "train_gpt.py").write_text(SCRIPT + TRAINS_ON_VAL),
        "trains_on_val", "warning"),
    "packed and trains": (lambda f: wrap(f, SCRIPT + TRAINS_ON_VAL), "trains_on_val", "warning"),
    "broken json": (lambda f: (f / "submission.json").write_text('{"author": '), "readable", "error"),
    "json is a list": (lambda f: (f / "submission.json").write_text("[1]"), "readable", "error"),
    "binary log": (lambda f: (f / "train_seed2.log").write_bytes(b"\0\xff" * 1000), "readable", "error"),
    "link out": (lambda f: os.symlink("/etc/hostname", f / "notes.md"), "readable", "error"),
    "links in a ring": (lambda f: [os.symlink(b, f / a) for a, b in ("ab", "ba")], "readable", "error"),
    "a huge file": (lambda f: os.truncate(f / "train_seed1.log", 1 << 30), "readable", "error"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_finds_a_planted_fault(tmp_path, name):
    plant, rule, severity = FAULTS[name]
    folder = write_folder(tmp_path)
    plant(folder)
    assert found(folder).get(rule) == severity


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def on_every_log_line(prefix: str, then=None):
    """A launcher or logger put something before every line of every log; `then` plants a fault behind it."""

    def change(folder: Path) -> None:
        if then:
            then(folder)
        all_logs(folder, lambda text: "".join(f"{prefix}{line}\n" for line in text.splitlines()))

    return change


def rows(**changes):
    """Every seed's result in submission.json with these values."""

    def change(folder: Path) -> None:
        results = json.loads((folder / "submission.json").read_text())["seed_results"]
        set_facts(folder, seed_results={seed: row | changes for seed, row in results.items()})

    return change


def row_forms(form):
    """seed_results in another form, made by `form` from {seed: row}."""

    def change(folder: Path) -> None:
        set_facts(folder, seed_results=form(json.loads((folder / "submission.json").read_text())["seed_results"]))

    return change


def no_steps(folder: Path) -> None:
    all_logs(folder, lambda text: "".join(x for x in text.splitlines(True) if not x.startswith(("step:", "stopping"))))


def steps_without_values(folder: Path) -> None:
    no_steps(folder)
    all_logs(folder, lambda text: text + "".join(f"step:{step}/200\n" for step in range(0, 201, 10)))


# Fault 6: what check.py once called sound. Nothing that it cannot read, and no decoration, hides a fault.
HIDDEN = {
    "empty json": (write("submission.json", ""), "readable", "error"),
    "blank json": (write("submission.json", " \n"), "readable", "error"),
    "json {}": (write("submission.json", "{}"), "json_fields", "error"),
    "json null": (write("submission.json", "null"), "readable", "error"),
    "json a text": (write("submission.json", '"{}"'), "readable", "error"),
    "json a number": (write("submission.json", "1.21"), "readable", "error"),
    "two objects": (write("submission.json", "{}\n{}"), "readable", "error"),
    "a key twice": (put("submission.json", '"author"', '"bytes_total": 1, "author"'), "readable", "error"),
    "empty readme": (write("README.md", "\n"), "files", "warning"),
    "blank author": (facts(author="  "), "json_fields", "warning"),
    "score a text that is no number": (facts(val_bpb="about one"), "readable", "error"),
    "score true": (facts(val_bpb=True), "readable", "error"),
    "score in a list": (facts(val_bpb=[1.1]), "readable", "error"),
    "score in an object": (facts(val_bpb={"mean": 1.1}), "readable", "error"),
    "score NaN as text": (facts(val_bpb="NaN"), "readable", "error"),
    "score with a decimal comma": (facts(val_bpb="1,13"), "readable", "error"),
    "score as text, of a cheat": (facts(val_bpb="0.0989"), "json_fields", "error"),
    "score as text, of no log": (facts(val_bpb="1.1"), "scores", "error"),
    "loss as text": (facts(val_loss="0.1"), "scores", "error"),
    "std as text": (facts(val_bpb_std="0.0000001"), "scores", "warning"),
    "std a word": (facts(val_bpb_std="small"), "readable", "error"),
    "size as text": (facts(bytes_total="17500000"), "cap", "error"),
    "size with commas": (facts(bytes_total="17,500,000"), "cap", "error"),
    "size with dots": (facts(bytes_total="17.500.000"), "cap", "error"),
    "size with blanks": (facts(bytes_total="17 500 000 bytes"), "cap", "error"),
    "size in MB": (facts(bytes_total="16.9 MB"), "cap", "error"),
    "size in MiB": (facts(bytes_total="~15.9MiB"), "cap", "error"),
    "size of another name": (facts(total_submission_size_bytes="17.5 MB (int8+zlib)"), "cap", "error"),
    "size in words": (facts(bytes_total="many"), "readable", "error"),
    "size 0": (facts(bytes_total=0), "cap", "error"),
    "size below 0": (facts(bytes_total="-15000000"), "cap", "error"),
    "size 1e999": (put("submission.json", '"bytes_total": ', '"bytes_total": 1e999, "x": '), "readable", "error"),
    "code as text": (facts(bytes_code="1 kB"), "code_bytes", "warning"),
    "code 0": (facts(bytes_code=0), "code_bytes", "warning"),
    "artifact of a seed over the cap": (rows(artifact_bytes="17,000,000"), "cap", "error"),
    "artifact of a seed 0": (rows(artifact_bytes=0), "cap", "error"),
    "artifact of a seed in words": (rows(artifact_bytes="ok"), "readable", "error"),
    "seed's score as text": (rows(val_bpb="0.5"), "seed_scores", "error"),
    "seed's loss": (rows(val_loss=1.5), "seed_scores", "error"),
    "seed's steps as text": (rows(steps="215 steps"), "seed_scores", "warning"),
    "seed's steps 0": (rows(steps=0), "seed_scores", "warning"),
    "results in a list": (row_forms(lambda r: [row | {"seed": s, "val_bpb": 0.5} for s, row in r.items()]),
        "seed_scores", "error"),
    "results in a list without seeds": (row_forms(lambda r: [row | {"val_bpb": 0.5} for row in r.values()]),
        "seed_scores", "error"),
    "results that are bare numbers": (row_forms(lambda r: dict.fromkeys(r, 0.5)), "seed_scores", "error"),
    "results that are bare text": (row_forms(lambda r: dict.fromkeys(r, "0.5 bpb")), "seed_scores", "error"),
    "results in a list of numbers": (row_forms(lambda r: [0.5] * len(r)), "seed_scores", "error"),
    "results of seed_1": (row_forms(lambda r: {f"seed_{s}": row | {"val_bpb": 0.5} for s, row in r.items()}),
        "seed_scores", "error"),
    "results a text": (facts(seed_results="1.13, 1.14"), "readable", "error"),
    "results true": (facts(seed_results=True), "readable", "error"),
    "a seed's results twice": (row_forms(lambda r: {"seed_1": {"val_bpb": 0.5}, **r}), "readable", "error"),
    "a seed's results twice in a list": (row_forms(lambda r: [row | {"seed": "1"} for row in r.values()]),
        "readable", "error"),
    "a seed that is no whole number": (facts(seeds=[1, 2, 3.5]), "readable", "error"),
    "empty results": (row_forms(lambda r: {seed: {} for seed in r}), "readable", "error"),
    "null results": (row_forms(lambda r: dict.fromkeys(r)), "readable", "error"),
    "seeds as text": (facts(seeds="1, 2, 2"), "seeds", "error"),
    "seeds in words": (facts(seeds=["one"]), "readable", "error"),
    "seeds as text without a log": (facts(seeds=["1", "2", "3", "4"]), "seeds", "warning"),
    "no log has a step": (no_steps, "train_logs", "error"),
    "steps that state nothing": (steps_without_values, "train_logs", "error"),
    "an empty log": (write("train_seed2.log", ""), "train_logs", "warning"),
    "a log of one line": (write("train_seed2.log", "it went well\n"), "train_logs", "warning"),
    "a seed's log a copy": (lambda f: (f / "train_seed2.log").write_bytes((f / "train_seed1.log").read_bytes()),
        "train_logs", "warning"),
    "over the cap with commas in a log": (put("train_seed2.log", f"zlib: {TOTAL} b", "zlib: 16,000,001 b"),
        "cap", "error"),
    "over the cap in MB in a log": (put("train_seed2.log", f"zlib: {TOTAL} b", "zlib: 16.9 MB b"), "cap", "error"),
}  # fmt: skip
PREFIXES = {
    "a rank": "[rank0] ",
    "torchrun's rank": "[rank0]: ",
    "srun's task": "0: ",
    "logging": "2026-04-01 12:00:00,123 - INFO - ",
    "a date": "[2026-04-01T12:00:00Z] ",
    "a time of day": "12:00:00.5 ",
    "unix time": "1776142361.633 ",
    "logger": "INFO:train:",
    "a colour": "\x1b[32m",
    "syslog": "Apr 01 12:00:00 node7 train[812]: ",
    "an unknown one": "(worker 3 of node7, pid=812) ",
    "windows line ends": "\r",
}
for what, before in PREFIXES.items():
    HIDDEN |= {
        f"a step goes back behind {what}": (
            on_every_log_line(before, put("train_seed1.log", "step:110/200", "step:90/200")), "monotonic", "error"),
        f"training too long behind {what}": (
            on_every_log_line(before, in_logs("590009ms", "606500ms")), "time_caps", "error"),
        f"a NaN behind {what}": (
            on_every_log_line(before, put("train_seed1.log", "loss:2.7500", "loss:nan")), "finite", "error"),
    }  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_nothing_hides_a_fault(tmp_path, name):
    plant, rule, severity = HIDDEN[name]
    folder = write_folder(tmp_path)
    plant(folder)
    assert found(folder).get(rule) == severity


TRUE = {
    "sizes as text": facts(bytes_total=f"{MODEL + 3 + len(SCRIPT):,} bytes", bytes_code=f"{len(SCRIPT)} B"),
    "rounded sizes": facts(bytes_total="15.0 MB"),
    "scores as text": facts(val_bpb=f"{statistics.fmean(map(bits, LOSSES.values())):.6f} (mean of 3)"),
    "rows as text": row_forms(lambda r: {s: {key: str(value) for key, value in row.items()} for s, row in r.items()}),
    "rows of seed_1": row_forms(lambda r: {f"seed_{seed}": row for seed, row in r.items()}),
    "rows in a list": row_forms(lambda r: [row | {"seed": int(seed)} for seed, row in r.items()]),
    "seeds as text": facts(seeds=["1", "2", "3"]),
    "a byte order mark": lambda f: (f / "submission.json").write_text(
        "\ufeff" + (f / "submission.json").read_text(), encoding="utf-8"
    ),
    **{f"logs behind {what}": on_every_log_line(prefix) for what, prefix in PREFIXES.items() if "unknown" not in what},
    "logs and json with windows line ends": lambda f: [
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")) for path in (*f.glob("*.log"), *f.glob("*.json"))
    ],
}


@pytest.mark.parametrize("name", TRUE)
def test_decoration_is_no_fault(tmp_path, name):
    folder = write_folder(tmp_path)
    TRUE[name](folder)
    assert found(folder) == {}


@pytest.mark.parametrize("make", (write_folder, write_ours))
def test_a_checkout_with_windows_line_ends(tmp_path, make):
    """core.autocrlf: texts are compared without their line ends, bytes are counted as they lie on the disk."""
    folder = make(tmp_path)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert found(folder) == {"code_bytes": "warning"} | ({"total_bytes": "warning"} if make is write_ours else {})
    size, lines = (folder / "train_gpt.py").stat().st_size, (folder / "train_gpt.py").read_bytes().count(b"\n")
    told = [finding for finding in check.check_folder(folder) if finding.rule == "code_bytes"]
    assert (told[0].expected, told[0].found) == (
        f"{size - lines:,} bytes as counted", f"{size:,}, since its lines end in CRLF here"
    )  # fmt: skip


def test_numbers_as_people_write_them():
    for text, value in {
        "17,500,000": 17.5e6, "17_500_000": 17.5e6, "17 500 000": 17.5e6, "16.9 MB": 16.9e6, "~15 MiB": 15 * 2**20,
        "1 kB": 1000, "`1.2`": 1.2, ".5": 0.5, "-3": -3, "1e7": 1e7, "1.21 ± 0.01": 1.21, '"1.2" bpb': 1.2,
    }.items():  # fmt: skip
        assert quantity(text) == pytest.approx(value), text
    for text in ("", "one", "1,21", "1.2.3", "NaN", "inf", "5/10", "1e9999", "0x10", "16 parsecs", "9" * 5000):
        assert quantity(text) is None, text


OUR_FAULTS = {
    "score in the result": (
        put("result_seed7.json", '"val_bpb": 2.05', '"val_bpb": 2.04'),
        "our_numbers",
    ),
    "artifact in the result": (
        put("result_seed7.json", "artifact\": 5000", "artifact\": 4000"),
        "our_numbers",
    ),
    "steps in the result": (put("result_seed7.json", '"steps": 20', '"steps": 21'), "our_numbers"),
    "partial": (put("result_seed7.json", "true", "false"), "our_numbers"),
    "a loss in the metrics": (put("metrics_seed7.jsonl", "6.0", "6.1"), "our_numbers"),
    "a step left out of the metrics": (
        put("metrics_seed7.jsonl", '"step": 10', '"step": 11'),
        "our_numbers",
    ),
    "a torn line of metrics": (put("metrics_seed7.jsonl", '{"step": 10', '{"step'), "our_numbers"),
    "a score edited in the log": (
        put("train_seed7.log", "exact val_loss:3.5", "exact val_loss:3.4"),
        "our_numbers",
    ),
    "no log": (lambda f: (f / "train_seed7.log").unlink(), "our_numbers"),
    "another script": (put("train_gpt.py", "A trainer", "A Trainer"), "our_source"),
    "another preset": (put("train_gpt.py", '3+3x3+5', '3+3x4+5'), "our_source"),
    "source cut off": (put("train_seed7.log", SOURCE_END, "=" * 60), "our_source"),
    "code bytes": (lambda f: set_facts(f, bytes_code=len(OURS)), "code_bytes"),
    "another script in the log": (put("train_seed7.log", "A trainer", "A Trainer"), "our_source"),
    "another SHA-256": (put("train_seed7.log", "sha256: ", "sha256: " + "0" * 64 + "  was: "), "our_source"),
    "empty result": (write("result_seed7.json", ""), "our_numbers"),
    "result {}": (write("result_seed7.json", "{}"), "our_numbers"),
    "result a list": (write("result_seed7.json", "[]"), "our_numbers"),
    "score as text in the result": (put("result_seed7.json", '"val_loss": 3.5', '"val_loss": "3.5"'), "our_numbers"),
    "steps as text in the result": (put("result_seed7.json", '"steps": 20', '"steps": "20"'), "our_numbers"),
    "null score in the result": (put("result_seed7.json", '"val_loss": 3.5', '"val_loss": null'), "our_numbers"),
    "NaN in the result": (put("result_seed7.json", '"val_loss": 3.5', '"val_loss": NaN'), "our_numbers"),
    "complete as text": (put("result_seed7.json", "true", '"true"'), "our_numbers"),
    "complete left out": (put("result_seed7.json", '"complete"', '"whole"'), "our_numbers"),
    "another device": (put("result_seed7.json", '"device": "cpu"', '"device": "H100"'), "our_numbers"),
    "more passes in scoring": (put("result_seed7.json", '"eval_loops": 3', '"eval_loops": 6'), "our_numbers"),
    "a result without its raw score": (put("result_seed7.json", '"val_bpb_raw"', '"raw"'), "our_facts"),
    "hardware": (put("submission.json", "1 x cpu", "8 x H100"), "our_facts"),
    "the score before export": (lambda f: set_facts(f, val_bpb=2.0), "our_facts"),
    "a seed left out": (lambda f: set_facts(f, seeds=[], seed_results={}), "our_facts"),
    "a seed's tokens": (put("submission.json", '"tokens": 5120', '"tokens": 6120'), "our_facts"),
    "another score on the page": (put("README.md", "val_bpb 2.", "val_bpb 1."), "our_facts"),
    "tokens in the result": (put("result_seed7.json", "5120", "5121"), "our_numbers"),
    "FLOPs in the result": (put("result_seed7.json", "904", "914"), "our_numbers"),
    "empty metrics": (write("metrics_seed7.jsonl", ""), "our_numbers"),
    "a text as metrics": (write("metrics_seed7.jsonl", '"step"\n'), "our_numbers"),
    "a step as text": (put("metrics_seed7.jsonl", '"step": 10', '"step": "10"'), "our_numbers"),
    "a NaN in the metrics": (put("metrics_seed7.jsonl", "6.0", "NaN"), "our_numbers"),
    "a loss as text": (put("metrics_seed7.jsonl", "6.0", '"6.0"'), "our_numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUR_FAULTS)
def test_finds_a_fault_in_a_folder_of_ours(tmp_path, name):
    plant, rule = OUR_FAULTS[name]
    folder = write_ours(tmp_path)
    plant(folder)
    assert found(folder).get(rule) == "error"


def test_our_seeds_have_one_configuration(tmp_path):
    folder = write_ours(tmp_path)
    text = (folder / "train_seed7.log").read_text()
    (folder / "train_seed8.log").write_text(text.replace('"seed": 7', '"seed": 8').replace('"5x3"', '"9"'))
    assert found(folder)["one_config"] == "error"


def test_a_log_without_val_loss_is_judged_by_its_training_loss(tmp_path):
    folder = write_folder(tmp_path)
    log = f"Validation tokens: {TOKENS:,}\nstep  100/200 | loss 2.1000 | 9s\nQuantized BPB: "
    for bpb, complains in ((1.0283, True), (2.1 / math.log(2) / LENGTH, False)):  # PR #1545: a space counted twice
        (folder / "train_seed1.log").write_text(f"{log}{bpb:.6f}\n")
        assert ("implied_bytes" in found(folder)) == complains


def test_weights_alone_count_where_the_track_says_so(tmp_path, monkeypatch):
    """COUNT_CODE=0: the total is the artifact's, the cap applies to it, and whoever counts otherwise is told."""
    monkeypatch.setitem(common.TRACKS, "tiny", common.Track("", 5000, False, None, 1e15, False))
    folder = write_ours(tmp_path, "tiny", count_code="0")
    assert found(folder) == {}
    set_facts(folder, bytes_total=5000 + len(OURS))
    assert found(folder) == {"cap": "error", "total_bytes": "warning"}
    set_facts(folder, bytes_total=5000, train_flops=2e15)
    assert found(folder) == {"flops": "error", "our_facts": "error"}
    edit(folder, "submission.json", "2000000000000000.0", '"2e15 FLOPs"')
    assert found(folder) == {"flops": "error", "our_facts": "error"}
    drop_fact(folder, "train_flops")
    assert found(folder) == {"our_facts": "error"}  # result_seed7.json states them, too
    edit(folder, "result_seed7.json", "904", "1904")
    assert found(folder) == {"flops": "error", "our_numbers": "error", "our_facts": "error"}
    edit(folder, "result_seed7.json", "train_flops", "flops")
    assert found(folder)["our_numbers"] == "error"
    edit(folder, "result_seed7.json", '"flops": 1904', '"train_flops": 904')
    set_facts(folder, **common.facts_of([json.loads((folder / "result_seed7.json").read_text())]))
    monkeypatch.setitem(common.TRACKS, "tiny", common.Track("", 4999, False, fineweb=False))
    assert found(folder) == {"cap": "error"}
    assert found(folder, track="local") == {}  # which goes by the runs
    assert found(folder, track="non_record_16mb")["total_bytes"] == "error"
    monkeypatch.setitem(common.TRACKS, "tiny", common.Track("", 5000, False, fineweb=False))
    for count_code in ("1", "packed"):
        counted = write_ours(tmp_path / count_code, "tiny", count_code=count_code)
        assert found(counted) == {"cap": "error", "total_bytes": "warning"}, count_code
        set_facts(counted, bytes_total=5000)
        assert found(counted) == {}, count_code


def test_the_scale_model_is_scored_by_its_rules(tmp_path, monkeypatch):
    """Enough held-out text, windows that do not overlap, at most three times the FLOPs of the trained passes."""
    folder = write_ours(tmp_path, "mini", count_code="0")
    edit(folder, "train_seed7.log", "val bytes: 10000", "val bytes: 500000")
    edit(folder, "train_seed7.log", '"layout"', '"train_seq_len": 256, "eval_stride": 0, "layout"')
    edit(folder, "train_seed7.log", "9e+14", "5e+13")
    for name in ("submission.json", "result_seed7.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(re.sub(r'"train_flops": [\de.+]+', '"train_flops": 5e13', text))
    edit(folder, "result_seed7.json", '"eval_loops": 3', '"eval_loops": 9')
    edit(folder, "train_seed7.log", ", 3 passes)", ", 9 passes)")
    assert found(folder) == {}
    for name, old, new, more in (
        ("train_seed7.log", "val bytes: 500000", "val bytes: 499999", {}),
        ("train_seed7.log", '"eval_stride": 0', '"eval_stride": 64', {}),
        ("result_seed7.json", '"eval_loops": 9', '"eval_loops": 10', {"our_numbers": "error"}),
        ("result_seed7.json", '"loops": 3', '"loops": null', {"our_numbers": "error"}),
    ):
        edit(folder, name, old, new)
        assert found(folder) == {"evaluation": "error"} | more, new
        edit(folder, name, new, old)
    monkeypatch.setitem(common.TRACKS, "mini", common.mini("", 4999, 4e13))
    assert found(folder) == {"cap": "error", "flops": "error"}


def test_what_scoring_costs():
    from check_files import scoring_cost

    assert scoring_cost("9", 1, 1) == 1
    assert scoring_cost("5x3", 3, 6) == 2
    assert scoring_cost("3+3x3+5", 3, 6) == 26 / 17
    assert scoring_cost("3x2+1", 2, 1) == 4 / 7
    assert scoring_cost("deep", 1, 1) is None and scoring_cost("5x3", None, 3) is None


def test_what_cannot_be_judged_is_said(tmp_path):
    folder = write_folder(tmp_path)
    all_logs(folder, lambda text: re.sub("(?m)^.* bytes.*\n", "", text))
    assert [(f.severity, f.found) for f in check.check_folder(folder) if f.rule == "total_bytes"] == [("info", "none")]
    all_logs(folder, lambda text: re.sub("val_bpb:[0-9.]+", "", text))
    assert found(folder)["scores"] == "warning"


def test_every_rule_has_a_planted_fault():
    planted = {fault[1] for fault in (*FAULTS.values(), *OUR_FAULTS.values())}
    assert {rule.__name__ for rule in check.RULES} - planted == {"folder_name", "flops", "evaluation"}  # alone


def test_folder_name(tmp_path):
    folder = write_folder(tmp_path)
    rename(folder)
    assert found(folder.parent / "2026-04-01 With spaces") == {"folder_name": "warning"}


def test_a_margin_too_small_is_an_error(tmp_path):
    folder = write_folder(tmp_path)
    assert found(folder, beat=1.13) == {"significance": "error"}
    assert any(f.rule == "significance" and f.severity == "info" for f in check.check_folder(folder))


def test_compressed_code_counts_as_shipped(tmp_path):
    folder = write_folder(tmp_path)
    wrap(folder, SCRIPT)
    assert "code_bytes" in found(folder)  # the logs counted the plain script
    size = (folder / "train_gpt.py").stat().st_size
    all_logs(folder, lambda text: text.replace(f"Code size: {len(SCRIPT)}", f"Code size: {size}"))
    set_facts(folder, bytes_code=size)
    assert "code_bytes" not in found(folder)


def test_a_copy_counted_compressed_is_a_warning(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "train_gpt.py").write_text(SCRIPT + "#" * 1_100_000)
    all_logs(
        folder, lambda text: text.replace("Serialized model:", "Code size (compressed): 400 bytes\nSerialized model:")
    )
    assert found(folder)["cap"] == "warning"


def test_legal_logs_of_several_phases_pass(tmp_path):
    folder = write_folder(tmp_path, "non_record_16mb")
    first = official_log(1, LOSSES[1], len(SCRIPT))
    again = "step:1/200 train_loss:6.0 train_time:5ms\n" + first  # two runs in one file
    (folder / "train_seed1.log").write_text(first + again)
    assert "monotonic" not in found(folder)
    remarks = first.replace("step:110/", "step:100 checkpoint saved\nlate_qat:enabled step:100\nstep:110/")
    (folder / "train_seed1.log").write_text(remarks)
    assert "monotonic" not in found(folder)


def test_a_resumed_run_of_ours_is_honest(tmp_path):
    folder = write_ours(tmp_path)
    line = "step:20/20 train_loss:5.0000"
    resumed = (
        "step:19/20 train_loss:5.1000 loops:3 train_time:1904ms\n"
        "resume: from step:10; later steps above are of the interrupted run and are done again\n"
        "step:12/20 train_loss:5.8000 loops:3 train_time:1203ms\n"
    )
    again = f"{OURS.rstrip()}\n{SOURCE_END}\n" + '{"seed": 7}\n'  # a resumed run writes its source once more
    edit(folder, "train_seed7.log", line, again + resumed + line)
    row = '{"step": 12, "train_loss": 5.8, "train_time_ms": 1203.0}\n'
    edit(folder, "metrics_seed7.jsonl", '{"step": 20, "train', row + '{"step": 20, "train')
    assert found(folder) == {}
    edit(folder, "train_seed7.log", "resume: from", "went on from")
    assert found(folder)["monotonic"] == "error"


def test_scoring_before_training_is_legal(tmp_path):
    legal = TRAINS_ON_VAL.replace(
        "        model(x).b", "        with torch.no_grad():\n            score(x)\n        model(x).b"
    )
    folder = write_folder(tmp_path)
    (folder / "train_gpt.py").write_text(SCRIPT + legal)
    assert "trains_on_val" not in found(folder)
    caller = "\n\ndef eval_ttt(model, val_tokens, o):\n    accumulate_bpb(model)\n    adapt(model, val_tokens, o)\n"
    (folder / "train_gpt.py").write_text(SCRIPT + TRAINS_ON_VAL + caller)
    assert "trains_on_val" not in found(folder)


def test_imports_that_go_round_in_a_circle(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "a.py").write_text("import b\n")
    (folder / "b.py").write_text("import a, train_gpt\n")
    edit(folder, "train_gpt.py", "import torch", "import torch, a")
    assert found(folder).keys() <= {"code_bytes"}


def test_logs_of_other_scripts_are_read(tmp_path):
    text = (
        "1776142361.633 val_tokens: 40540160\n1776142361.7   seed: 5\n"
        "1776142723.2 1/20000 train_loss: 9.0044 train_time: 0.5m tok/s: 14894024\n"
        "1776142724.1 stopping_early: wallclock_cap train_time: 587175ms step: 4860/20000\n"
        "1776142724.2 Code size (compressed): 28599 bytes\n"
        "1776142724.3 quantized_ttt_phased val_loss:2.7723 val_bpb:1.0732 eval_time:504949ms\n"
    )
    (tmp_path / "train.log").write_text(text)
    log = read_log(tmp_path / "train.log")
    assert (log.val_tokens, log.seed, log.steps[0].values["train_time"]) == (40540160, 5, 30_000.0)
    assert log.train_end == (4, 587175.0) and log.sizes["code_compressed"] == (5, 28599)
    assert log.score() == {"val_loss": 2.7723, "val_bpb": 1.0732, "eval_time": 504949.0}


def test_exit_codes_and_json(tmp_path, capsys):
    sound, bad = write_folder(tmp_path), write_folder(tmp_path / "bad")
    assert check.run_tool(check.main, [str(sound)]) == 0
    assert "sound: 0 errors" in (shown := capsys.readouterr().out) and "  info  " in shown
    assert check.run_tool(check.main, [str(sound), "--quiet"]) == 0
    assert "sound: 0 errors, 0 warnings, 1 notes" in (shown := capsys.readouterr().out) and "  info  " not in shown
    set_facts(bad, github_id="")
    assert check.run_tool(check.main, [str(sound), str(bad)]) == 2
    (bad / "README.md").unlink()
    assert check.run_tool(check.main, [str(bad)]) == 3
    text = capsys.readouterr().out
    assert "error" in text and "does not hold: 1 errors" in text
    assert check.run_tool(check.main, [str(sound), str(bad), "--json"]) == 3
    judged = json.loads(capsys.readouterr().out)
    assert [entry["verdict"] for entry in judged] == ["info", "error"]
    assert {"severity", "rule", "where", "expected", "found"} == judged[1]["findings"][0].keys()
    for argv in ([], [str(tmp_path / "none")], [str(sound / "README.md")], [str(sound), "--beat=99"], ["--what"]):
        assert check.run_tool(check.main, argv) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1, printed


def test_anything_gives_findings_and_no_traceback(tmp_path):
    empty = tmp_path / "2026-04-01_Empty"
    empty.mkdir()
    assert found(empty)["files"] == "error"
    odd = write_folder(tmp_path)
    deep = "[" * 100_000
    odd_json = (
        deep,
        "null",
        '{"a": 1e999}',
        '{"seeds": {"a": 1}, "seed_results": [1], "val_bpb": "1.1", "date": 5, "name": {}}',
        '{"val_bpb": 1.1, "seed_results": {"x": {"val_bpb": "y", "artifact_bytes": null}}, "bytes_total": "many"}',
    )
    log = f"step:{'9' * 5000}/1 train_loss:1\nstep:1/2 val_bpb:nan\nfinal val_bpb:1..2\n{deep}"
    for text in odd_json:
        (odd / "submission.json").write_text(text)
        (odd / "train_seed1.log").write_text(log)
        (odd / "train_gpt.py").write_text("(" * 5000)
        for finding in check.check_folder(odd):
            assert "can read" not in finding.expected, finding
