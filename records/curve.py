"""Draw the loss curves of one or more runs: training loss (light) and validation bits per byte, as a PNG.

    python records/curve.py logs/RUN                       logs/RUN/curve.png
    python records/curve.py logs/A logs/B --x flops --out both.png

A run is a folder with the metrics.jsonl of either script. Training loss is shown in bits per byte, too: nats a token,
turned with the bits per byte and the loss of the run's own validation. Dotted lines: the number of passes changes.
What is not finite is left out, and a line says so; without a finite validation the picture is in nats a token.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import is_number, read_result
from draw import COLORS, canvas, draw_line, finite, save_picture, tidy, zoom
from logs import read_log, read_metrics
from tool import Parser, need, run_tool

X_AXES = {  # name: (key of metrics.jsonl, unit divided out, label)
    "steps": ("step", 1, "training steps"),
    "tokens": ("tokens", 1e6, "training tokens (millions)"),
    "flops": ("flops", 1, "training FLOPs"),
    "time": ("train_time_ms", 60e3, "training time (minutes)"),
}
LARGEST_RUNS = 2 * len(COLORS)


@dataclass
class Curve:
    """What is drawn of one run; x is in the unit of its axis."""

    label: str
    train: list[tuple[float, float]]  # nats a token
    val: list[tuple[float, float]]  # bits per byte
    switches: list[tuple[float, str]]  # where the number of passes changes, "1→2 passes"
    final: float | None  # bits per byte of the artifact read from disk, if the run has a finite score
    nats_per_bpb: float | None  # nats a token for one bit per byte; None without a finite validation
    partial: bool  # whether validation is on a part of the set
    remarks: list[str]  # what is not drawn


def read_curve(folder: Path, axis: str, label: str) -> Curve:
    """The curve of one run folder. Raises InputError."""
    path, (key, unit, _) = folder / "metrics.jsonl", X_AXES[axis]
    rows = read_metrics(path)
    missing = next((row["step"] for row in rows if not is_number(row.get(key))), None)
    need(missing is None, f"{path}: step {missing}", key, "none", "choose another --x")
    trained, scored = ([row for row in rows if name in row] for name in ("train_loss", "val_bpb"))
    train = finite([(row[key] / unit, row["train_loss"]) for row in trained])
    good = [row for row in scored if is_number(row["val_bpb"]) and is_number(row.get("val_loss"))]
    good = [row for row in good if min(row["val_bpb"], row["val_loss"]) > 0]
    need(train or good, path, "a finite loss", f"none among {len(rows)} lines", "let the run go on")
    kinds = (("validations", scored, good), ("losses", trained, train))
    remarks = [f"{len(a) - len(b)} of {len(a)} {what} are not finite" for what, a, b in kinds if len(a) > len(b)]
    remarks += [] if scored else ["no validation yet"]
    result = folder / "result.json"
    final = read_result(result).get("val_bpb") if result.is_file() else None
    if result.is_file() and not is_number(final):
        remarks.append(f"the artifact's score is {final}")
    places = [row["step"] for row in rows], [row[key] for row in rows]
    return Curve(
        label,
        train,
        [(row[key] / unit, row["val_bpb"]) for row in good],
        [(np.interp(step, *places) / unit, f"{a}→{b} passes") for step, a, b in read_switches(folder, rows)],
        final if is_number(final) else None,
        good[-1]["val_loss"] / good[-1]["val_bpb"] if good else None,
        any(row.get("partial") for row in scored),
        remarks,
    )


def read_switches(folder: Path, rows: list[dict]) -> list[tuple[int, int, int]]:
    """(step, passes before, passes after) of every change, from train.log, else from the metrics (less exact)."""
    log = folder / "train.log"
    said = read_log(log).switches if log.is_file() else {}
    if not said:  # a resumed run may say a change twice, hence the dictionary
        with_loops = [row for row in rows if is_number(row.get("loops"))]
        pairs = [(a, b) for a, b in zip(with_loops, with_loops[1:]) if a["loops"] != b["loops"]]
        said = {b["step"]: (a["loops"], b["loops"]) for a, b in pairs}
    return [(step, *passes) for step, passes in sorted(said.items())]


def labels_of(folders: list[Path]) -> list[str]:
    """Short names of the runs: the folders' own, or their whole paths where two would be equal."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]


def draw_curve(axes, curve: Curve, i: int, alone: bool, scale: float) -> None:
    """One run's lines; `scale` is the number of nats a token that the picture's unit is worth."""
    draw_line(axes, [(x, y / scale) for x, y in curve.train], i, "training" if alone else None, alpha=0.3, linewidth=1)
    last = f"  {curve.val[-1][1]:.4f}" if curve.val else ""
    name = curve.label + last + (f", artifact {curve.final:.4f}" if curve.final else "")
    marker = {"marker": "o", "markersize": 4} if len(curve.val) < 60 else {}
    draw_line(axes, curve.val, i, "validation" if alone else name, linewidth=2, **marker)
    if alone and curve.final and curve.val:
        end, red = (curve.val[-1][0], curve.final), COLORS[1]
        axes.plot(*end, "D", color=red, markersize=6, label="artifact, read from disk", zorder=5)
        style = {"xytext": (-8, -13), "textcoords": "offset points", "ha": "right", "fontweight": "bold"}
        axes.annotate(f"{curve.final:.4f}", end, color=red, **style)
    for at, text in curve.switches:
        shade = {"color": "#555555" if alone else COLORS[i % len(COLORS)]}
        axes.axvline(at, linewidth=1, linestyle=":", alpha=0.9, **shade)
        place = {"xycoords": ("data", "axes fraction"), "xytext": (-4, -2), "textcoords": "offset points"}
        axes.annotate(text, (at, 1 - 0.05 * (i % 8)), ha="right", va="top", fontsize=8.5, **place, **shade)


def draw(curves: list[Curve], axis: str, out: Path) -> None:
    """Writes the picture."""
    figure, axes = canvas(8.4, 4.9, dpi=150)
    alone, ratios = len(curves) == 1, [curve.nats_per_bpb for curve in curves if curve.nats_per_bpb]
    unit = "bits per byte" if ratios else "nats per token"
    for i, curve in enumerate(curves):
        draw_curve(axes, curve, i, alone, curve.nats_per_bpb or (ratios or [1.0])[0])
    # The first steps fall from twice the end's height; the picture begins where a run has done 8 % of its way.
    drawn = [list(line.get_xydata()) for line in axes.lines if line.get_linestyle() != ":"]
    zoom(axes, [y for points in drawn for x, y in points if x >= 0.08 * points[-1][0]], 0.1, 0.08)
    axes.set_xlim(left=0)
    axes.ticklabel_format(axis="x", scilimits=(-3, 6), useMathText=True)
    partial = " (part of the validation set)" if any(curve.partial for curve in curves) and ratios else ""
    axes.set(xlabel=X_AXES[axis][2], ylabel=unit + partial)
    title = curves[0].label if alone else "validation (bold) and training (light)"
    axes.set_title(title, loc="left", fontsize=11, color="#222222")
    one_scale = ratios and max(ratios) / min(ratios) < 1.01  # one tokenizer: nats fit on the same scale
    tidy(axes, "y", right=bool(one_scale))
    if one_scale:
        scales = (lambda y: y * ratios[0], lambda y: y / ratios[0])
        axes.secondary_yaxis("right", functions=scales).set_ylabel("nats per token")
    legend = {"loc": "upper right", "bbox_to_anchor": (1, 0.93)} if alone else {"loc": "best"}
    axes.legend(frameon=True, facecolor="white", edgecolor="none", framealpha=0.85, **legend)
    save_picture(figure, out)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, such as logs/RUN")
    parser.add_argument("--x", choices=X_AXES, default="steps", help="what runs to the right (default: steps)")
    parser.add_argument("--out", type=Path, help="the PNG (default: curve.png in the first run's folder)")
    args = parser.parse_args(argv)
    count = len(args.runs)
    need(count <= LARGEST_RUNS, "RUN", f"at most {LARGEST_RUNS} runs in one picture", count)
    out = args.out or args.runs[0] / "curve.png"
    curves = [read_curve(run, args.x, label) for run, label in zip(args.runs, labels_of(args.runs))]
    for curve in curves:
        if curve.remarks:
            print(f"notice: {curve.label}: {', '.join(curve.remarks)}")
    draw(curves, args.x, out)
    print(f"curve: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
