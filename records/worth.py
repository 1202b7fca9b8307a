"""What is a pass over tied blocks worth? Fits the losses of finished matrices by a law in which R passes count as many
blocks of their own.

    python records/worth.py records/ablations/mini_{depth*,double,late}.toml --out records/does_recurrence_pay/worth

The law (after arXiv 2604.21106): bits per byte before export = E + A * N ** -alpha + B * D ** -beta, with D training
tokens and N = once + R ** phi * core, stored parameters outside and inside the looped blocks, without the embedding.
With phi = 1 a pass is worth as much as blocks of its own, with 0 nothing; one block has another phi than two. Of the
matrices' runs those count whose arms set a layout and nothing else, of one text and one width. Intervals: the middle
95 % of fits to the fitted losses with resampled residuals, if the law holds; beyond the largest budget it is
extrapolated.
"""

import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ablate import read_matrix
from common import Parser, markdown_table, need, run_tool, short, write_text
from draw import canvas, draw_line, save_picture, tidy
from logs import read_log

NAMES = ("E", "log A", "alpha", "log B", "beta")  # and a phi for each number of looped blocks
# Bounds, scales and starts of these and, last, of any phi.
LOW, HIGH, SCALE = (0.0, -5, 0.05, -5, 0.05, -1.5), (2.0, 50, 4.0, 50, 4.0, 1.5), (1, 5, 0.3, 5, 0.3, 1)
STARTS = ((1.0, 3, 0.3, 5, 0.4, 0.5), (1.5, 4, 0.5, 3, 0.3, 0.0), (0.5, 2, 0.2, 4, 0.35, 0.8))
DRAWS = 300


class Point(NamedTuple):
    """One run."""

    layout: str
    blocks: int  # that are looped; 0 without a loop
    loops: int
    once: float  # parameters of the other blocks
    core: float  # and of these
    tokens: float
    flops: float
    bpb: float  # before export


def points_of(paths: list[Path]) -> list[Point]:
    """The runs of matrices that count. Raises InputError where they are too few."""
    found, kinds = [], set()
    for matrix in map(read_matrix, paths):
        plain = {arm for arm, settings in matrix.arms.items() if set(settings) == {"layout"}}
        for run, result in matrix.finished():
            if run.arm in plain and "diverged" not in result:
                c = read_log(run.home / "train.log").config
                extra = [name for name in ("pass_vectors", "lora_rank", "loop_schedule") if c.get(name)]
                need(not extra, short(run.home), "passes that are tied and on from the first step", " ".join(extra))
                kinds.add((c["model_dim"], c["vocab_size"], result["dataset_sha256"]))
                found.append(point_of(result, c["vocab_size"] * c["model_dim"]))
    need(len(kinds) < 2, "runs", "one width and one text", f"{len(kinds)} kinds")
    least = len(NAMES) + len(sizes(found))
    need(least > len(NAMES) and len(found) > least, "runs", f"more than {least} with and without a loop", len(found))
    return found


def point_of(result: dict, embedding: int) -> Point:
    """Of a run's result.json and the parameters of its embedding."""
    stored, blocks, loops, core = result["params_stored"] - embedding, 0, 1, 0.0
    match = re.search(r"(\d+)x(\d+)", result["layout"])
    if match and int(match[2]) > 1:
        blocks, loops = int(match[1]), int(match[2])
        core = (result["params_effective"] - result["params_stored"]) / (loops - 1)
        need(core > 0, result["layout"], f"parameters of {blocks} looped blocks", core)
    return Point(result["layout"], blocks, loops, max(stored - core, 0), core, result["tokens"], result["train_flops"],
                 result["val_bpb_raw"])  # fmt: skip


def sizes(points: list[Point]) -> list[int]:
    """The numbers of looped blocks, each of which has a phi."""
    return sorted({point.blocks for point in points} - {0})


def law(parameters: np.ndarray, points: list[Point], looped: list[int]) -> np.ndarray:
    """Bits per byte of each point by the law; `looped`: the numbers of looped blocks in the order of their phi."""
    e, log_a, alpha, log_b, beta, *phis = parameters
    phi = np.array([phis[looped.index(p.blocks)] if p.blocks else 0.0 for p in points])
    columns = ([getattr(p, name) for p in points] for name in ("once", "core", "loops", "tokens"))
    once, core, loops, tokens = (np.array(column, float) for column in columns)
    n = once + loops**phi * core
    return e + np.exp(log_a - alpha * np.log(n)) + np.exp(log_b - beta * np.log(tokens))


def fit(points: list[Point], losses: np.ndarray, more_starts: tuple = ()) -> np.ndarray:
    """The parameters of least squares, of several starts the best."""
    from scipy.optimize import least_squares

    looped = sizes(points)
    low, high, scale, *starts = ((*row[:-1], *[row[-1]] * len(looped)) for row in (LOW, HIGH, SCALE, *STARTS))
    tries = [
        least_squares(lambda x: law(x, points, looped) - losses, start, bounds=(low, high), x_scale=scale)
        for start in (more_starts and (*more_starts, starts[0])) or starts
    ]
    return min(tries, key=lambda one: one.cost).x


def intervals(points: list[Point], best: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """Fits [draws, parameters] to losses with residuals drawn anew, which are widened for the parameters they cost."""
    rng, fitted = np.random.default_rng(seed), law(best, points, sizes(points))
    residuals = np.array([p.bpb for p in points]) - fitted
    residuals = (residuals - residuals.mean()) * math.sqrt(len(points) / max(len(points) - len(best), 1))
    return np.array([fit(points, fitted + rng.choice(residuals, len(points)), (best,)) for _ in range(draws)])


def crossing(parameters: np.ndarray, flat: Point, looped: Point, sizes: list[int]) -> float:
    """FLOPs from which the looped model is better than the flat one of the same blocks; infinite where never, 0 where
    always, within a factor of 10,000 either way."""
    budgets = flat.flops * np.geomspace(1e-4, 1e4, 400)
    ones = [flat._replace(tokens=flat.tokens / flat.flops * budget) for budget in budgets]
    others = [looped._replace(tokens=looped.tokens / looped.flops * budget) for budget in budgets]
    ahead = law(parameters, others, sizes) < law(parameters, ones, sizes)
    return float(budgets[ahead.argmax()]) if ahead.any() and not ahead[0] else 0.0 if ahead[0] else math.inf


def between(values: np.ndarray, form: str = ".2f") -> str:
    low, high = np.quantile(values, (0.025, 0.975), method="nearest")
    return f"{low:{form}} to {high:{form}}"


def crossings(points: list[Point], best: np.ndarray, fits: np.ndarray) -> list[list[str]]:
    """A row for every looped layout of which there is the flat one: FLOPs from which on it is ahead."""
    last, looped_sizes = {p.layout: p for p in sorted(points, key=lambda p: p.flops)}, sizes(points)
    rows = []
    for layout, looped in last.items():
        flat = last.get(layout.split("x")[0])
        if looped.loops > 1 and flat:
            at, *found = (crossing(one, flat, looped, looped_sizes) for one in (best, *fits))
            rows.append([f"`{flat.layout}` and `{layout}`", f"{at:.3g}", between(np.array(found), ".3g")])
    return rows


def draw(points: list[Point], best: np.ndarray, path: Path) -> None:
    """Loss against training FLOPs, a colour a layout, with the law."""
    figure, axes = canvas(7.5, 4.5)
    layouts = sorted({p.layout for p in points}, key=lambda text: ("x" in text, text))
    for i, layout in enumerate(layouts):
        own = sorted((p for p in points if p.layout == layout), key=lambda p: p.flops)
        budgets = np.geomspace(own[0].flops / 1.5, own[-1].flops * 4, 60)
        curve = [own[0]._replace(tokens=own[0].tokens / own[0].flops * budget) for budget in budgets]
        draw_line(axes, list(zip(budgets, law(best, curve, sizes(points)))), i)
        draw_line(axes, [(p.flops, p.bpb) for p in own], i, layout, linestyle="", marker="o")
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="bits per byte, before export")
    axes.legend(title="layout", frameon=False, ncols=2)
    tidy(axes)
    save_picture(figure, path)


def report(paths: list[Path], out: Path) -> str:
    """Writes README.md and worth.png into `out`; returns the page."""
    points = sorted(points_of(paths), key=lambda p: (p.flops, p.layout))
    losses = np.array([p.bpb for p in points])
    best = fit(points, losses)
    fits, fitted = intervals(points, best, DRAWS), law(best, points, sizes(points))
    off = math.sqrt(np.mean((fitted - losses) ** 2))
    rows = [[f"`{p.layout}`", f"{p.flops:.3g}", f"{p.tokens / 1e6:.1f}", f"{p.bpb:.4f}", f"{x:.4f}"]
            for p, x in zip(points, fitted)]  # fmt: skip
    names = [*NAMES, *(f"phi, {size} block{'s' * (size > 1)} looped" for size in sizes(points))]
    found = [[name, f"{value:.3f}", between(part, ".3f")] for name, value, part in zip(names, best, fits.T)]
    begins = crossings(points, best, fits)
    text = f"""<!-- written by records/worth.py from {", ".join(path.name for path in paths)} -->
# What a pass is worth

{__doc__.split(chr(10) * 2)[2]}

Parameters, fitted to {len(points)} runs (the residuals' root mean square is {off:.4f}):

{markdown_table(["", "value", "95 %"], found)}
Training FLOPs from which on the looped model would be ahead of the same blocks once, by the law (`inf`: never):

{markdown_table(["blocks once, and looped", "FLOPs", "95 %"], begins)}
![loss against training FLOPs](worth.png)

{markdown_table(["layout", "training FLOPs", "M tokens", "bits per byte", "by the law"], rows)}"""
    out.mkdir(parents=True, exist_ok=True)
    draw(points, best, out / "worth.png")
    write_text(out / "README.md", text)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("matrices", nargs="+", type=Path, help="TOML files of records/ablations")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and its picture")
    args = parser.parse_args(argv)
    print(report(args.matrices, args.out))
    print(f"written: {short(args.out)}/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
