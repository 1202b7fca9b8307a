"""records/curve.py: draws what a run wrote, and refuses what it cannot draw in one line."""

import contextlib
import json
import math
import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
import common
import curve


def write_run(folder: Path, steps: int = 60, tail: str = "", every: int = 20) -> Path:
    """A made-up run with a loop switch in the middle and a validation every `every` steps."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loops": 1 + (step > steps // 2), "train_time_ms": 50.0 * step, "tokens": 4096 * step,
               "flops": 1e11 * step}  # fmt: skip
        rows.append(row | {"train_loss": 7 - 0.05 * step})
        if step % every == 0:
            rows.append(row | {"val_loss": 7 - 0.05 * step, "val_bpb": (7 - 0.05 * step) / 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def test_takes_the_switch_from_the_log(tmp_path):
    run = write_run(tmp_path / "a")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["step"] % 20 == 0]  # the metrics know it to 20 steps only
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert curve.read_curve(run, "steps", "a").switches == [(40, "1→2 passes")]
    (run / "train.log").write_text("source\nstep:30/60 loops:1->2 train_time:1500ms\n")
    assert curve.read_curve(run, "steps", "a").switches == [(30, "1→2 passes")]
    assert curve.read_curve(run, "time", "a").switches == [(pytest.approx(30 * 50 / 60e3), "1→2 passes")]


def is_png(path: Path) -> bool:
    """A PNG of at least 800 x 400 pixels."""
    head = path.read_bytes()[:24]
    width, height = struct.unpack(">II", head[16:])
    return head[:8] == b"\x89PNG\r\n\x1a\n" and width >= 800 and height >= 400


def test_reads_the_numbers_of_a_run(tmp_path):
    run = write_run(tmp_path / "a", tail='{"step": 61, "train_lo')  # the run is writing its next line
    (run / "result.json").write_text('{"val_bpb": 2.75}')
    read = curve.read_curve(run, "tokens", "a")
    assert read.val == [pytest.approx((4096e-6 * step, (7 - 0.05 * step) / 1.5)) for step in (20, 40, 60)]
    assert read.train[9] == pytest.approx((0.04096, 6.5)) and read.nats_per_bpb == pytest.approx(1.5)
    assert read.switches == [(pytest.approx(4096e-6 * 31), "1→2 passes")]
    assert read.final == 2.75 and not read.partial and len(read.train) == 60 and read.remarks == []


@pytest.mark.parametrize("axis", curve.X_AXES)
def test_draws_every_axis_beside_the_run(tmp_path, axis, capsys):
    run = write_run(tmp_path / "a")
    assert curve.run_tool(curve.main, [str(run), f"--x={axis}"]) == 0
    assert is_png(run / "curve.png")
    assert capsys.readouterr().out == f"curve: {run / 'curve.png'}\n"


def test_draws_many_runs(tmp_path):
    runs = [write_run(tmp_path / name / "run", steps) for name, steps in (("a", 20), ("b", 60), ("c", 100))]
    assert curve.labels_of(runs) == [str(run) for run in runs]  # equal names: whole paths
    assert curve.run_tool(curve.main, [*map(str, runs), f"--out={tmp_path / 'all.png'}"]) == 0
    assert is_png(tmp_path / "all.png")


def spoil(run: Path, first: int, last: int, value: str) -> None:
    """Writes `value` for every loss of these steps, as a model that blew up does."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if first <= row["step"] <= last:
            row |= {key: "X" for key in ("train_loss", "val_loss", "val_bpb") if key in row}
    text = "".join(json.dumps(row) + "\n" for row in rows).replace('"X"', value)
    (run / "metrics.jsonl").write_text(text)


@pytest.mark.parametrize("value", ["null", "NaN", "Infinity"])
def test_draws_what_is_finite_and_says_the_rest(tmp_path, capsys, value):
    """The last update made the model worthless: the picture ends before, a line says so."""
    run = write_run(tmp_path / "a")
    spoil(run, 51, 60, value)
    (run / "result.json").write_text(f'{{"val_bpb": {value}}}')
    assert curve.run_tool(curve.main, [str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and "1 of 3 validations are not finite, 10 of 60 losses are not finite, the art" in out[0]
    read = curve.read_curve(run, "steps", "a")
    assert read.val[-1][0] == 40 and read.train[-1][0] == 50 and read.final is None and is_png(run / "curve.png")
    good = write_run(tmp_path / "b")
    assert curve.run_tool(curve.main, [str(run), str(good)]) == 0  # a bad run does not stop the others' picture


def test_without_a_finite_validation_the_picture_is_in_nats(tmp_path, capsys, monkeypatch):
    labels, save = [], curve.save_picture

    def note(figure, out):
        labels.append(figure.axes[0].get_ylabel())
        save(figure, out)

    monkeypatch.setattr(curve, "save_picture", note)
    early, lost = write_run(tmp_path / "early", steps=10), write_run(tmp_path / "lost", steps=40)
    spoil(lost, 20, 20, "NaN")
    spoil(lost, 40, 40, "null")
    assert curve.run_tool(curve.main, [str(early)]) == 0 and curve.run_tool(curve.main, [str(lost)]) == 0
    out = capsys.readouterr().out
    assert "early: no validation yet" in out and "lost: 2 of 2 validations are not finite, 2 of 40 losses" in out
    good = write_run(tmp_path / "good")
    assert curve.run_tool(curve.main, [str(lost), str(good)]) == 0  # the other's bits per byte serve both
    assert labels == ["nats per token", "nats per token", "bits per byte"]


def test_one_line_errors(tmp_path, capsys):
    good = str(write_run(tmp_path / "good"))
    nothing = write_run(tmp_path / "nothing", steps=10)
    spoil(nothing, 1, 10, "NaN")
    torn = str(write_run(tmp_path / "torn", tail="not json\n"))
    lost = write_run(tmp_path / "lost")
    (lost / "result.json").write_text("[]")
    (tmp_path / "file").write_text("")
    cases = [
        ([str(tmp_path / "none")], "found nothing to read"), ([torn], "line 64"),
        ([str(nothing)], "expected a finite loss"),
        ([str(lost)], "result.json"), ([good, "--x=miles"], "invalid choice"), ([], "RUN"),
        ([good] * 15, "at most 14"),
        ([good, f"--out={tmp_path / 'file' / 'x.png'}"], "file"),
    ]  # fmt: skip
    for argv, expected in cases:
        assert curve.run_tool(curve.main, argv) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and expected in printed and printed.count("\n") == 1, printed
    assert not (tmp_path / "good" / "curve.png").exists()


@pytest.mark.parametrize("key", ["step", "train_loss", "val_loss", "val_bpb", "loops", "flops"])
def test_odd_values_are_drawn_or_refused(tmp_path, key):
    """In one row, or in all of them: an InputError, or a curve that can be drawn."""
    run = write_run(tmp_path / "run", steps=40)
    (run / "train.log").write_text(f"step:{'9' * 5000}/40 loops:1->2\n")
    good, drawn = (run / "metrics.jsonl").read_text().splitlines(), []
    for value in (None, True, [], {}, "5", 10**400, -1, 0, math.inf, math.nan, 1e308):
        having = [line for line in good if key in json.loads(line)]
        for odd in (having, having[-1:], having[:1]):
            rows = [json.loads(line) | ({key: value} if line in odd else {}) for line in good]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            with contextlib.suppress(common.InputError):
                drawn.append(curve.read_curve(run, "flops", "a"))
    assert drawn
    for first in range(0, len(drawn), curve.LARGEST_RUNS):
        curve.draw(drawn[first : first + curve.LARGEST_RUNS], "flops", tmp_path / "a.png")
        assert is_png(tmp_path / "a.png")
