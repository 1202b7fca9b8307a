"""Print what an artifact holds and where its bytes are: every tensor, then sums by kind and by block.

    python records/contents.py logs/RUN/model.int6.rgpt

The trainer's own reader reads the file (train_gpt.py, or train_gpt_mlx.py where torch is missing), so what is listed is
what is scored. The header is what belongs to no tensor: names, checksums, the frame.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

from common import Parser, run_tool

# isort: split
import layout  # of data/, which common.py makes known


class Entry(NamedTuple):
    """A tensor of the file, or the header."""

    name: str
    kind: str  # attention, MLP, LoRA, embedding, vectors or header
    place: str  # "block 3", or where else it is
    shape: tuple[int, ...]
    weights: int
    size: float  # bytes


def kind_of(name: str) -> str:
    if "lora" in name:
        return "LoRA"
    if name == "tok_emb.weight":
        return "embedding"
    matrix = re.search(r"\.(attn|mlp)\.\w+\.weight$", name)
    return {"attn": "attention", "mlp": "MLP"}[matrix[1]] if matrix else "vectors"


def read_contents(path: Path) -> tuple[str, list[Entry]]:
    """A line on the model, and what is in the file to the last byte. Raises InputError."""
    with layout.judged_by_trainer() as script:
        found = script.read_artifact(path)
    entries = []
    for name, value in found.weights.items():
        kind, block = kind_of(name), re.match(r"blocks\.(\d+)\.", name)
        place = f"block {block[1]}" if block else "embedding" if kind == "embedding" else "other"
        entries.append(Entry(name, kind, place, tuple(value.shape), value.size, found.bits[name] / 8))
    rest = path.stat().st_size - sum(entry.size for entry in entries)
    entries.append(Entry("header", "header", "other", (), 0, rest))
    model = found.model
    about = f"layout {model['layout']}  {model['model_dim']} wide  passes {found.loops}  quantizer {found.quantizer}"
    return about, entries


def sums(entries: list[Entry], key: str) -> list[str]:
    """A line for each kind, or each place: its bytes, its share, and bits a weight."""
    total, lines = sum(entry.size for entry in entries), [""]
    for value in dict.fromkeys(getattr(entry, key) for entry in entries):
        those = [entry for entry in entries if getattr(entry, key) == value]
        size, count = sum(entry.size for entry in those), sum(entry.weights for entry in those)
        bits = f", {count:,} weights, {8 * size / count:.3f} bits each" if count else ""
        lines.append(f"{value:10} {size:>10,.0f} bytes  {100 * size / total:5.1f} %{bits}")
    return lines


def table(about: str, entries: list[Entry]) -> str:
    """One line a tensor, then the sums."""
    width = max(len(entry.name) for entry in entries)
    lines = [about, f"{'tensor':{width}}  {'shape':>14}  {'bytes':>12}  bits a weight"]
    for entry in entries:
        bits = f"{8 * entry.size / entry.weights:6.3f}" if entry.weights else ""
        lines.append(f"{entry.name:{width}}  {'x'.join(map(str, entry.shape)):>14}  {entry.size:>12,.1f}  {bits}")
    whole = f"\n{'all':10} {sum(entry.size for entry in entries):>10,.0f} bytes"
    return "\n".join([*lines, *sums(entries, "kind"), *sums(entries, "place"), whole])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("artifact", type=Path, help="a model.int6.rgpt")
    args = parser.parse_args(argv)
    print(table(*read_contents(args.artifact)))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
