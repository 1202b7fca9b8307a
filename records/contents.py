"""Print what an artifact holds and draw where its bytes are.

    python records/contents.py logs/RUN/model.int6.rgpt          the table, and logs/RUN/model.int6.png

The trainer's own reader reads the file (train_gpt.py, or train_gpt_mlx.py where torch is missing), so what is listed is
what is scored. The header is what belongs to no tensor: names, checksums, the frame.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

from ablate import SCRIPTS, load_script
from common import InputError, Parser, run_tool, short
from draw import COLORS, canvas, save_picture, tidy

KINDS = ("attention", "MLP", "LoRA", "embedding", "vectors", "header")


class Entry(NamedTuple):
    """A tensor of the file, or the header."""

    name: str
    kind: str  # one of KINDS
    place: str  # "block 3", or where else it is
    shape: tuple[int, ...]
    weights: int
    size: float  # bytes


def any_script():
    """The first trainer whose packages are here. Raises InputError if there is none."""
    try:
        return load_script(SCRIPTS[0])
    except InputError:
        return load_script(SCRIPTS[1])


def kind_of(name: str) -> str:
    if "lora" in name:
        return "LoRA"
    if name == "tok_emb.weight":
        return "embedding"
    matrix = re.search(r"\.(attn|mlp)\.\w+\.weight$", name)
    return {"attn": "attention", "mlp": "MLP"}[matrix[1]] if matrix else "vectors"


def read_contents(path: Path) -> tuple[str, list[Entry]]:
    """A line on the model, and what is in the file to the last byte. Raises InputError."""
    script = any_script()
    try:
        found = script.read_artifact(path)
    except ValueError as error:  # the script's InputError is one
        shown = "".join(letter if letter.isprintable() else "?" for letter in str(error))  # it may quote the file
        raise InputError(shown) from None
    entries = []
    for name, value in found.weights.items():
        kind, block = kind_of(name), re.match(r"blocks\.(\d+)\.", name)
        place = f"block {block[1]}" if block else "embedding" if kind == "embedding" else "other"
        entries.append(Entry(name, kind, place, tuple(value.shape), value.size, found.bits[name] / 8))
    rest = path.stat().st_size - sum(entry.size for entry in entries)
    entries.append(Entry("header", "header", "header", (), 0, rest))
    model = found.model
    about = f"layout {model['layout']}  {model['model_dim']} wide  passes {found.loops}  quantizer {found.quantizer}"
    return about, entries


def table(about: str, entries: list[Entry]) -> str:
    """One line a tensor, then the sums."""
    width, total = max(len(entry.name) for entry in entries), sum(entry.size for entry in entries)
    lines = [about, f"{'tensor':{width}}  {'shape':>14}  {'bytes':>12}  bits a weight"]
    for entry in entries:
        bits = f"{8 * entry.size / entry.weights:6.3f}" if entry.weights else ""
        lines.append(f"{entry.name:{width}}  {'x'.join(map(str, entry.shape)):>14}  {entry.size:>12,.1f}  {bits}")
    lines.append("")
    for kind in KINDS:
        size = sum(entry.size for entry in entries if entry.kind == kind)
        count = sum(entry.weights for entry in entries if entry.kind == kind)
        bits = f", {count:,} weights, {8 * size / count:.3f} bits each" if count else ""
        if size:
            lines.append(f"{kind:10} {size:>10,.0f} bytes  {100 * size / total:5.1f} %{bits}")
    return "\n".join([*lines, f"{'all':10} {total:>10,.0f} bytes"])


def draw(entries: list[Entry], title: str, out: Path) -> None:
    """A bar a block, its bytes by kind."""
    places = list(dict.fromkeys(entry.place for entry in entries))
    figure, axes = canvas(8.4, 1.4 + 0.32 * len(places))
    left = dict.fromkeys(places, 0.0)
    for kind, color in zip(KINDS, COLORS):
        sizes = {place: sum(e.size for e in entries if (e.place, e.kind) == (place, kind)) / 1000 for place in places}
        shown = [place for place in places if sizes[place]]
        if shown:
            starts, widths = [left[place] for place in shown], [sizes[place] for place in shown]
            axes.barh(shown, widths, left=starts, color=color, label=kind, height=0.7)
        left = {place: left[place] + sizes[place] for place in places}
    axes.set_yticks(places, places)
    axes.invert_yaxis()
    axes.set(xlabel="kilobytes")
    axes.set_title(title, loc="left", fontsize=11)
    tidy(axes, "x")
    axes.legend(frameon=False)
    save_picture(figure, out)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("artifact", type=Path, help="a model.int6.rgpt")
    parser.add_argument("--out", type=Path, help="the PNG (default: beside the artifact)")
    args = parser.parse_args(argv)
    about, entries = read_contents(args.artifact)
    print(table(about, entries))
    out = args.out or args.artifact.with_suffix(".png")
    name = f"{args.artifact.resolve().parent.name}/{args.artifact.name}"
    draw(entries, f"{name}: {args.artifact.stat().st_size:,} bytes", out)
    print(f"picture: {short(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
