"""A curriculum of arXiv 2511.07384 as LOOP_SCHEDULE takes it, and the training FLOPs that it saves.

    python records/retrofit/curriculum.py 1-sqrt 0.75 3      0:1,0.416667:2,0.666667:3
    python records/retrofit/curriculum.py --table            shares of the FLOPs for the paper's layout (4, 8, 4)

Of R passes in the end, n are run from the fraction of training on at which R * f(x / width) exceeds n - 1; f(x) is x
(linear) or 1 - sqrt(1 - x).
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from common import Parser, markdown_table, need, run_tool  # noqa: E402

WIDTHS, PASSES, PAPER = (0.25, 0.5, 0.75, 1.0), (4, 8, 32), (4, 8, 4)
WITH_GRADIENT = 8  # passes, the last ones; the others cost the forward pass alone, a third


def starts(kind: str, width: float, passes: int) -> list[float]:
    """The fraction of training at which 1, 2, ... passes begin."""
    left = [1 - n / passes for n in range(passes)]
    return [width * (1 - (part**2 if kind == "1-sqrt" else part)) for part in left]


def flops(passes: int) -> int:
    """Of a step with this many passes, in blocks forward: three for a block with a gradient, one for one without."""
    prelude, core, coda = PAPER
    learned = min(passes, WITH_GRADIENT)
    return 3 * (prelude + core * learned + coda) + core * (passes - learned)


def share(kind: str, width: float, passes: int) -> float:
    """Training FLOPs over those of all passes throughout, at equal tokens."""
    bounds = [*starts(kind, width, passes), 1.0]
    spent = sum((b - a) * flops(n) for n, (a, b) in enumerate(zip(bounds, bounds[1:]), 1))
    return spent / flops(passes)


def table() -> str:
    columns = [(kind, width) for kind in ("linear", "1-sqrt") for width in WIDTHS]
    rows = [[f"R={n}", *(f"{share(*column, n):.3f}" for column in columns)] for n in PASSES]
    return markdown_table(["passes", *(f"{kind}:{width:g}" for kind, width in columns)], rows)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("kind", nargs="?", choices=("linear", "1-sqrt"))
    parser.add_argument("width", nargs="?", type=float, help="fraction of training over which passes rise")
    parser.add_argument("passes", nargs="?", type=int, help="in the end")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    need(args.table or args.passes is not None, "KIND WIDTH PASSES", "all three, or --table", "fewer", "see --help")
    if args.table:
        print(table(), end="")
        return 0
    need(0 < args.width <= 1, "WIDTH", "a fraction above 0 and at most 1", args.width)
    need(1 <= args.passes <= 64, "PASSES", "1 to 64", args.passes)
    print(",".join(f"{at:.6g}:{n}" for n, at in enumerate(starts(args.kind, args.width, args.passes), 1)))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
