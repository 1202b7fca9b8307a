"""The one way to draw: every picture of records/ has its colours, its axes and its way to the disk from here."""

import io
from pathlib import Path

from common import is_number
from logs import read_metrics
from tool import InputError, atomic

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by the colour-blind
DASHES = ("-", "--", ":", "-.")
GREY = "#e4e4e4"


def plotting():
    """matplotlib's pyplot, for files only and in the style of all pictures here. Raises InputError."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("matplotlib: expected it installed, found none; run: make setup") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 10, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.edgecolor": "#888888"}
    pyplot.rcParams.update(style | {"axes.labelcolor": "#333333", "xtick.color": "#555555", "ytick.color": "#555555"})
    return pyplot


def canvas(width: float, height: float, dpi: int = 130, **more):
    """(figure, axes) of this size in inches; `more` goes to pyplot.subplots."""
    return plotting().subplots(figsize=(width, height), dpi=dpi, layout="constrained", **more)


def save_picture(figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    drawn = io.BytesIO()  # no date or version inside, so that the same numbers give the same bytes
    figure.savefig(drawn, format="png", metadata={"Software": None})
    plotting().close(figure)
    with atomic(path, "wb") as file:
        file.write(with_few_colors(drawn.getvalue()))


def with_few_colors(png: bytes) -> bytes:
    """A PNG of 64 colours, which looks alike and has a quarter of the bytes."""
    from PIL import Image

    drawn, small = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    drawn.quantize(64, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def finite(points: list[tuple]) -> list[tuple[float, float]]:
    """Those (x, y) that can be drawn."""
    return [(x, y) for x, y in points if is_number(x) and is_number(y)]


def draw_line(axes, points: list[tuple], i: int, label: str | None = None, **more) -> None:
    """The i-th line of a picture, through those of `points` that are finite. Colours change first, then dashes."""
    points = finite(points)
    if points:
        style = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
        axes.plot(*zip(*points), label=label, **(style | {"linewidth": 1.3} | more))


def draw_validation(axes, runs: list[Path], i: int, label: str) -> list[float]:
    """Validation bpb against training FLOPs, one line for each metrics.jsonl in `runs`, all as the picture's i-th.

    Returns the scores after the first 15 % of each run, for `zoom`: before, they fall from twice the height."""
    shown = []
    for j, path in enumerate(runs):
        points = finite([(row.get("flops"), row["val_bpb"]) for row in read_metrics(path) if "val_bpb" in row])
        draw_line(axes, points, i, None if j else label, alpha=0.8)
        shown += [y for x, y in points if x >= 0.15 * points[-1][0]]
    return shown


def zoom(axes, shown: list[float], below: float = 0.05, above: float = 0.05) -> None:
    """Sets the height of a picture to that of `shown`, with margins as parts of it."""
    if shown:
        low, high = min(shown), max(shown)
        axes.set_ylim(low - below * (high - low) - 1e-3, high + above * (high - low) + 1e-3)


def tidy(axes, grid: str = "both", right: bool = False) -> None:
    """The common look: a light grid behind the lines (`grid`: x, y or both), no frame at the right."""
    axes.spines["right"].set_visible(right)
    axes.grid(axis=grid, color=GREY, linewidth=0.8)
    axes.set_axisbelow(True)
