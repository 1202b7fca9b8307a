"""Finds the constants of the coder's models and of the trellis in train_gpt.py, by simulation.

    python tests/fit_spread.py      about a minute

Normal and Laplace numbers of some standard deviations go along trellises. The cuts that code their integers shortest,
over all deviations together, are CUTS; the columns say how many percent above the entropy of the integers, kind of
states by kind of states, the code then is: with the cuts found, and with those of the script. TRELLIS_GAIN is the mean
squared error over that of plain rounding (a twelfth of a step squared) where steps are not wide.
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as script

SIZES = [2.0 ** (spread / 4) for spread in range(-6, 13, 3)]  # standard deviations, in steps


def simulated(kind: str, size: float) -> tuple[list[np.ndarray], float]:
    """How often each size of an integer came, in even states and in odd ones; and the mean squared error."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((128, 2048)) if kind == "normal" else rng.laplace(0, math.sqrt(0.5), (128, 2048))
    x = (size * x).astype(np.float32)
    symbols, levels = script.trellis_path(x)
    symbols = symbols.T.astype(np.int16)
    half = script.half_levels(symbols)
    counts = [np.bincount(np.abs(symbols[half == odd]).astype(int)) for odd in (0, 1)]
    return counts, float(np.square(levels - x).mean())


def code_bits(counts: np.ndarray, kind: str, size: float, cuts: tuple[float, float]) -> float:
    """Bits of the integers with the distribution that the cuts make of normal or Laplace numbers."""
    edges = np.append(cuts[0], np.arange(1, len(counts) + 1) + cuts[1]) / size
    if kind == "normal":
        above = np.array([math.erfc(edge / math.sqrt(2)) for edge in edges]) / 2
    else:
        above = np.exp(-math.sqrt(2) * edges) / 2
    parts = np.concatenate([[1 - 2 * above[0]], above[:-1] - above[1:]])[: len(counts)]
    return float(counts @ -np.log2(np.maximum(parts, 2.0**-22)))


def entropy_bits(counts: np.ndarray) -> float:
    """Of integers whose sizes came so often, either sign as often as the other."""
    halves = np.concatenate([counts[:1], np.repeat(counts[1:] / 2, 2)])
    halves = halves[halves > 0]
    return float((halves * np.log2(halves.sum() / halves)).sum())


def cuts_at(cuts: list[float], size: float) -> tuple[float, float]:
    """The cut above 0, and those above k less k."""
    a, b, c, d = cuts
    return a + b / max(size, 0.35), c + d / max(size, 0.35)


def best_cuts(seen: dict, odd: int) -> list[float]:
    """To a hundredth: along one axis after the other, with steps that become smaller."""

    def over(cuts: list[float]) -> float:
        costs = (code_bits(counts[odd], *key, cuts_at(cuts, key[1])) for key, (counts, _) in seen.items())
        return sum(cost / counts[odd].sum() for cost, (counts, _) in zip(costs, seen.values()))

    cuts = [number for pair in script.CUTS[odd] for number in pair]
    for step in (0.04, 0.02, 0.01, 0.01):
        for axis in (0, 1, 2, 3) * 4:
            near = [[number + way * step * (i == axis) for i, number in enumerate(cuts)] for way in (0, 1, -1)]
            cuts = min(near, key=over)
    return cuts


def main() -> None:
    seen = {(kind, size): simulated(kind, size) for kind in ("normal", "Laplace") for size in SIZES}
    found = [best_cuts(seen, odd) for odd in (0, 1)]
    ours = [[number for pair in pairs for number in pair] for pairs in script.CUTS]
    for name, cuts in (("found", found), ("script", ours)):
        print(f"CUTS, {name}:", *(f"(({a:.2f}, {b:.2f}), ({c:.2f}, {d:.2f}))" for a, b, c, d in cuts))
    print(f"{'numbers':8} {'deviation':>9} {'bits':>6} {'% above':>8} {'script':>7} {'error * 12':>11}")
    for (kind, size), (counts, error) in seen.items():
        ideal = sum(map(entropy_bits, counts))
        over = []
        for cuts in (found, ours):
            bits = sum(code_bits(counts[odd], kind, size, cuts_at(cuts[odd], size)) for odd in (0, 1))
            over.append(100 * (bits / ideal - 1))
        total = sum(part.sum() for part in counts)
        print(f"{kind:8} {size:9.3f} {ideal / total:6.3f} {over[0]:8.2f} {over[1]:7.2f} {12 * error:11.4f}", flush=True)
    fine = [12 * error for (_, size), (_, error) in seen.items() if size >= 2]
    print(f"TRELLIS_GAIN = {sum(fine) / len(fine):.2f}  the script's: {script.TRELLIS_GAIN}")


if __name__ == "__main__":
    main()
