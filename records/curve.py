"""Draw the loss curves of one or more runs: training loss (light) and validation bits per byte, as a PNG.

    python records/curve.py logs/RUN                       logs/RUN/curve.png
    python records/curve.py logs/A logs/B --x flops --out both.png

A run is a folder with the metrics.jsonl of either script. Training loss is shown in bits per byte, too: nats a token,
turned with the bits per byte and the loss of the run's own validation. Dotted lines: the number of passes changes.
"""

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from common import COLORS, InputError, Parser, plotting, run_tool, save_picture

X_AXES = {  # name: (key of metrics.jsonl, unit divided out, label)
    "steps": ("step", 1, "training steps"),
    "tokens": ("tokens", 1e6, "training tokens (millions)"),
    "flops": ("flops", 1, "training FLOPs"),
    "time": ("train_time_ms", 60e3, "training time (minutes)"),
}
LARGEST_RUNS = 2 * len(COLORS)


class Curve(NamedTuple):
    """What is drawn of one run; x is in the unit of its axis, y in bits per byte."""

    label: str
    train: list[tuple[float, float]]
    val: list[tuple[float, float]]
    switches: list[tuple[float, str]]  # where the number of passes changes, "1→2 passes"
    final: float | None  # score of the artifact read from disk, if the run has one
    nats_per_bpb: float  # nats a token for one bit per byte
    partial: bool  # whether validation is on a part of the set


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl. A last line without an end (the run is writing it, or died) is left out."""
    if not path.is_file():
        raise InputError(f"{path}: expected the metrics of a run, found no file; give a folder such as logs/RUN")
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({"step": row["step"], **row})
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{path}: line {number}: expected a JSON object with a step, found {line[:40]!r}"
            ) from None
    return rows


def read_curve(folder: Path, axis: str, label: str) -> Curve:
    """The curve of one run folder. Raises InputError."""
    path, (key, unit, _) = folder / "metrics.jsonl", X_AXES[axis]
    rows = read_metrics(path)
    val_rows = [row for row in rows if row.get("val_bpb")]
    if not val_rows:
        raise InputError(
            f"{path}: expected at least one validation, found none among {len(rows)} lines; "
            "let the run reach one, or set VAL_LOSS_EVERY lower"
        )
    if missing := next((row for row in rows if key not in row), None):
        raise InputError(f"{path}: step {missing['step']}: expected {key}, found none; choose another --x")
    nats_per_bpb = val_rows[-1]["val_loss"] / val_rows[-1]["val_bpb"]
    train = [(row[key] / unit, row["train_loss"] / nats_per_bpb) for row in rows if "train_loss" in row]
    val = [(row[key] / unit, row["val_bpb"]) for row in val_rows]
    switches = [(x_of_step(rows, step, key) / unit, f"{a}→{b} passes") for step, a, b in read_switches(folder, rows)]
    final = None
    if (result := folder / "result.json").is_file():
        try:
            final = json.loads(result.read_text(encoding="utf-8"))["val_bpb"]
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{result}: expected the JSON that a run writes at its end, found something else"
            ) from None
    return Curve(label, train, val, switches, final, nats_per_bpb, any(row.get("partial") for row in val_rows))


def read_switches(folder: Path, rows: list[dict]) -> list[tuple[int, int, int]]:
    """(step, passes before, passes after) of every change, from train.log, else from the metrics (less exact)."""
    log = folder / "train.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    said = {int(step): (int(a), int(b)) for step, a, b in re.findall(r"^step:(\d+)/\d+ loops:(\d+)->(\d+)", text, re.M)}
    if not said:  # a resumed run may say a change twice, hence the dictionary
        with_loops = [row for row in rows if "loops" in row]
        pairs = [(a, b) for a, b in zip(with_loops, with_loops[1:]) if a["loops"] != b["loops"]]
        said = {b["step"]: (a["loops"], b["loops"]) for a, b in pairs}
    return [(step, *passes) for step, passes in sorted(said.items())]


def x_of_step(rows: list[dict], step: int, key: str) -> float:
    """Value of `key` at a step, on the line between the rows around it."""
    before = max((row for row in rows if row["step"] <= step), key=lambda row: row["step"], default=rows[0])
    after = min((row for row in rows if row["step"] >= step), key=lambda row: row["step"], default=rows[-1])
    part = (step - before["step"]) / (after["step"] - before["step"]) if after["step"] > before["step"] else 0.0
    return before[key] + part * (after[key] - before[key])


def labels_of(folders: list[Path]) -> list[str]:
    """Short names of the runs: the folders' own, or their whole paths where two would be equal."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]


def draw(curves: list[Curve], axis: str, out: Path) -> None:
    """Writes the picture. Raises InputError."""
    plt = plotting()
    figure, axes = plt.subplots(figsize=(8.4, 4.9), dpi=150, layout="constrained")
    alone = len(curves) == 1
    for i, curve in enumerate(curves):
        color, style = COLORS[i % len(COLORS)], "-" if i < len(COLORS) else "--"
        if curve.train:
            axes.plot(*zip(*curve.train), color=color, alpha=0.3, linewidth=1.0, label="training" if alone else None)
        x, y = zip(*curve.val)
        best = f"{curve.label}  {y[-1]:.4f}" + (f", int6 {curve.final:.4f}" if curve.final else "")
        axes.plot(
            x,
            y,
            style,
            color=color,
            linewidth=2.0,
            marker="o",
            markersize=4 if len(x) < 60 else 0,
            label="validation" if alone else best,
        )
        if alone and curve.final:
            axes.plot(
                x[-1], curve.final, "D", color="#d55e00", markersize=6, label="int6 artifact, read from disk", zorder=5
            )
            axes.annotate(
                f"{curve.final:.4f}",
                (x[-1], curve.final),
                xytext=(-8, -13),
                textcoords="offset points",
                ha="right",
                color="#d55e00",
                fontweight="bold",
            )
        for at, text in curve.switches:
            axes.axvline(at, color="#666666" if alone else color, linewidth=1.0, linestyle=":", alpha=0.9)
            axes.annotate(
                text,
                (at, 1 - 0.05 * (i % 8)),
                xycoords=("data", "axes fraction"),
                xytext=(-4, -2),
                ha="right",
                textcoords="offset points",
                va="top",
                fontsize=8.5,
                color="#555555" if alone else color,
            )
    # The first steps fall from twice the end's height; the picture begins where a run has done 8 % of its way.
    shown = [
        y for curve in curves for points in (curve.train, curve.val) for x, y in points if x >= 0.08 * curve.val[-1][0]
    ]
    shown += [curve.final for curve in curves if curve.final]
    low, high = min(shown), max(shown)
    axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.08 * (high - low) + 1e-3)
    axes.set_xlim(left=0)
    axes.ticklabel_format(axis="x", scilimits=(-3, 6), useMathText=True)
    partial = any(curve.partial for curve in curves)
    axes.set(xlabel=X_AXES[axis][2], ylabel="bits per byte" + (" (part of the validation set)" if partial else ""))
    axes.set_title(
        curves[0].label if alone else "validation (bold) and training (light)", loc="left", fontsize=11, color="#222222"
    )
    ratio = curves[0].nats_per_bpb
    if all(abs(curve.nats_per_bpb / ratio - 1) < 0.01 for curve in curves):  # one tokenizer: nats fit on the same scale
        axes.secondary_yaxis("right", functions=(lambda y: y * ratio, lambda y: y / ratio)).set_ylabel("nats per token")
    else:
        axes.spines["right"].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(
        frameon=True,
        facecolor="white",
        edgecolor="none",
        framealpha=0.85,
        loc="upper right" if alone else "best",
        bbox_to_anchor=(1, 0.93) if alone else None,
    )
    try:
        save_picture(figure, out)
    except OSError as error:
        raise InputError(f"{out}: cannot write ({error.strerror}); set --out") from None


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, such as logs/RUN")
    parser.add_argument("--x", choices=X_AXES, default="steps", help="what runs to the right (default: steps)")
    parser.add_argument("--out", type=Path, help="the PNG (default: curve.png in the first run's folder)")
    parser.add_argument("--label", action="append", default=[], help="name of a run in the legend, one for each run")
    args = parser.parse_args(argv)
    if args.label and len(args.label) != len(args.runs):
        raise InputError(f"--label: expected one for each of {len(args.runs)} runs, found {len(args.label)}")
    if len(args.runs) > LARGEST_RUNS:
        raise InputError(f"RUN: expected at most {LARGEST_RUNS} runs in one picture, found {len(args.runs)}")
    out = args.out or args.runs[0] / "curve.png"
    labels = args.label or labels_of(args.runs)
    draw([read_curve(run, args.x, label) for run, label in zip(args.runs, labels)], args.x, out)
    print(f"curve: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
