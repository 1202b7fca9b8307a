"""Simulate batching of a looped model in which tokens leave early, and draw what it gives.

    python retrofit/depth_batching.py                                        the paper's Gemma with two passes
    python retrofit/depth_batching.py --slots 8 --block-ms 3.1 --full-ms 9 --exits 0.5,0.3,0.2 --out mine.png

Continuous depth-wise batching (arXiv 2410.20672): tokens at different passes share a batch, since all passes use the
same weights; a token that leaves frees its slot at once. Compared with it: static batching, where a batch runs until
its longest sequence ends, and continuous sequence-wise batching, where a slot is refilled when its sequence ends.

Times are milliseconds of one step with up to `slots` tokens, taken as independent of how many there are. As in the
paper, left out are the keys and values that a token that left owes to the later passes, and the cost of deciding who
leaves; --once-ms is what runs once a token (embedding, prelude, coda, output layer).
"""

import heapq
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "records"))

from common import InputError, Parser, markdown_table, run_tool, short  # noqa: E402
from draw import canvas, draw_line, save_picture, tidy  # noqa: E402

MOST_TOKENS = 20_000_000  # simulated; a few hundred megabytes
SHARES_DRAWN = 21  # points of each curve


class Machine(NamedTuple):
    """What a step costs."""

    slots: int  # tokens in a batch
    passes: int  # of the looped model
    block_ms: float  # one pass of the core
    once_ms: float  # what runs once a token


def makespan(durations: np.ndarray, slots: int) -> tuple[int, np.ndarray]:
    """Each of `durations` [n], in ticks, goes to the slot that is free first, in order. Returns the tick at which all
    are done and the tick at which each starts [n]."""
    free = [0] * min(slots, len(durations))
    starts = np.empty(len(durations), np.int64)
    for i, duration in enumerate(durations.tolist()):
        starts[i] = free[0]
        heapq.heapreplace(free, free[0] + duration)
    return max(free), starts


def static_rate(machine: Machine, lengths: np.ndarray) -> float:
    """Tokens per second where a batch of sequences of `lengths` [n] tokens runs until the longest ends."""
    steps = sum(int(lengths[i : i + machine.slots].max()) for i in range(0, len(lengths), machine.slots))
    return 1000 * lengths.sum() / (steps * (machine.passes * machine.block_ms + machine.once_ms))


def sequence_rate(machine: Machine, lengths: np.ndarray) -> float:
    """Tokens per second where a slot is refilled when its sequence ends; every token runs all passes."""
    steps, _ = makespan(lengths, machine.slots)
    return 1000 * lengths.sum() / (steps * (machine.passes * machine.block_ms + machine.once_ms))


def depth_rate(machine: Machine, lengths: np.ndarray, exits: np.ndarray) -> float:
    """Tokens per second where a slot goes on when its token leaves. `exits` [sum of lengths]: after how many passes
    each token leaves, sequence by sequence. A step is one pass of all slots, and what runs once a token where one
    ends."""
    ends = np.cumsum(exits)
    bounds = np.concatenate([[0], ends[np.cumsum(lengths) - 1]])
    steps, starts = makespan(np.diff(bounds), machine.slots)
    within = ends - np.repeat(bounds[:-1], lengths)  # passes from the start of its sequence
    busy = np.zeros(steps + 1, bool)
    busy[np.repeat(starts, lengths) + within] = True
    return 1000 * lengths.sum() / (steps * machine.block_ms + int(busy.sum()) * machine.once_ms)


def draw_exits(shares: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """After how many passes each of `count` tokens leaves; shares [passes] are of those that leave after 1, 2, ..."""
    return 1 + np.searchsorted(np.cumsum(shares)[:-1], rng.random(count), side="right")


def draw_lengths(args, rng: np.random.Generator) -> np.ndarray:
    """Tokens of every sequence: normal, at least one each."""
    drawn = np.rint(rng.normal(args.length, args.spread, args.sequences))
    return np.maximum(drawn, 1).astype(np.int64)


def between(shares: np.ndarray, part: float) -> np.ndarray:
    """From everybody leaves after the first pass (part 0) over `shares` (1/2) to nobody leaves early (1)."""
    first, last = np.eye(len(shares))[[0, -1]]
    low, high, at = (first, shares, 2 * part) if part < 0.5 else (shares, last, 2 * part - 1)
    return (1 - at) * low + at * high


def simulate(args, machine: Machine, shares: np.ndarray) -> tuple[list[list], list[tuple[float, float]]]:
    """Rows of the table, [what, mean passes, tokens per second], and the curve [(mean passes, tokens per second)]."""
    rng = np.random.default_rng(args.seed)
    lengths = draw_lengths(args, rng)
    passes, exits = machine.passes, draw_exits(shares, int(lengths.sum()), rng)
    full = Machine(machine.slots, 1, args.full_ms, machine.once_ms)
    rows = []
    if args.full_ms:
        rows.append(["full model, static", 1.0, static_rate(full, lengths)])
        rows.append(["full model, sequence-wise", 1.0, sequence_rate(full, lengths)])
    everybody = np.full(len(exits), passes)
    rows.append(["looped, sequence-wise", float(passes), sequence_rate(machine, lengths)])
    rows.append(["looped, depth-wise, nobody leaves", float(passes), depth_rate(machine, lengths, everybody)])
    rows.append(["looped, depth-wise, with exits", exits.mean(), depth_rate(machine, lengths, exits)])
    curve = []
    for part in np.linspace(0, 1, SHARES_DRAWN) if args.out else ():
        drawn = draw_exits(between(shares, part), len(exits), rng)
        curve.append((drawn.mean(), depth_rate(machine, lengths, drawn)))
    return rows, curve


def break_even(curve: list[tuple[float, float]], rate: float) -> float | None:
    """Mean passes at which the falling curve crosses `rate`; None where it does not."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if y0 >= rate > y1:
            return x0 + (x1 - x0) * (y0 - rate) / (y0 - y1)
    return None


def draw_picture(rows: list[list], curve: list[tuple[float, float]], path: Path) -> None:
    """Tokens per second against mean passes: the depth-wise curve, the others as levels."""
    figure, axes = canvas(7, 4)
    draw_line(axes, curve, 0, "looped, depth-wise")
    ends = (curve[0][0], curve[-1][0])
    levels = [row for row in rows if not row[0].startswith("looped, depth-wise")]
    for i, (name, _, rate) in enumerate(levels, 1):
        draw_line(axes, [(x, rate) for x in ends], i, name)
    axes.plot(*rows[-1][1:], "o", color="#0072b2", label="with the exits given")
    axes.set_xlabel("mean passes a token")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    tidy(axes)
    save_picture(figure, path)


def parse_shares(text: str) -> np.ndarray:
    """Shares of tokens that leave after pass 1, 2, ...: "0.972,0.028" as an array whose sum is 1."""
    try:
        shares = np.array([float(part) for part in text.split(",")])
    except ValueError:
        shares = np.zeros(0)
    good = len(shares) and np.isfinite(shares).all() and (shares >= 0).all() and abs(shares.sum() - 1) < 1e-3
    if not good:
        expected = 'shares of tokens that leave after pass 1, 2, ... such as "0.972,0.028", 0 or more, with a sum of 1'
        raise InputError(f'--exits: expected {expected}, found "{text}"')
    return shares / shares.sum()


def parse(argv: list[str] | None):
    parser = Parser(__doc__)
    parser.add_argument("--exits", default="0.972,0.028", help="shares of tokens that leave after pass 1, 2, ...")
    parser.add_argument("--block-ms", type=float, default=10.819, help="one pass of the core (paper: Gemma, 1/2)")
    parser.add_argument("--full-ms", type=float, default=20.937, help="the whole unlooped model; 0 = leave it out")
    parser.add_argument("--once-ms", type=float, default=0.0, help="what runs once a token")
    parser.add_argument("--slots", type=int, default=32, help="tokens in a batch")
    parser.add_argument("--sequences", type=int, default=2000, help="in the queue")
    parser.add_argument("--length", type=float, default=256, help="mean tokens of a sequence")
    parser.add_argument("--spread", type=float, default=48, help="standard deviation of that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a PNG; without it only the table")
    args = parser.parse_args(argv)
    least = {
        "block_ms": 1e-9,
        "full_ms": 0,
        "once_ms": 0,
        "slots": 1,
        "sequences": 1,
        "length": 1,
        "spread": 0,
        "seed": 0,
    }
    for name, low in least.items():
        value = getattr(args, name)
        if not low <= value <= 1e9:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: expected {'a number above 0' if name == 'block_ms' else f'{low} or more'}, "
                             f"and at most 1e9, found {value}")  # fmt: skip
    most = args.sequences * (args.length + args.spread)  # about, and never much less
    if most > MOST_TOKENS:
        raise InputError(f"--sequences: expected at most {MOST_TOKENS} tokens in all, found {most:.0f}; lower it")
    if args.out and args.out.suffix != ".png":
        raise InputError(f"--out: expected a file NAME.png, found {args.out}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    shares = parse_shares(args.exits)
    machine = Machine(args.slots, len(shares), args.block_ms, args.once_ms)
    rows, curve = simulate(args, machine, shares)
    best = max(rate for name, _, rate in rows if name.endswith("sequence-wise"))
    cells = [[name, f"{passes:.3f}", f"{rate:.0f}", f"{rate / best:.2f}"] for name, passes, rate in rows]
    print(markdown_table(["batching", "mean passes", "tok/s", "over the best sequence-wise"], cells), end="")
    if args.out:
        draw_picture(rows, curve, args.out)
        even = break_even(curve, best)
        print(f"even with the best sequence-wise: {'never' if even is None else f'{even:.2f} mean passes'}")
        print(f"wrote {short(args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
