"""Print an artifact's table of contents and draw where its bytes are.

    python records/contents.py logs/RUN/model.int6.rgpt          the table, and logs/RUN/model.int6.png

Nothing is decoded but the header: what a tensor is called, its shape, its scheme, its bytes. `python train_gpt.py
--mode=eval --artifact=...` reads the weights themselves.
"""

import hashlib
import json
import math
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

from common import COLORS, InputError, Parser, plotting, run_tool, save_picture, short

HEAD, VERSION, LARGEST_HEADER = struct.Struct("<4sII"), 5, 1 << 22  # as in the scripts
SCHEMES = ("int3", "int4", "int5", "int6", "int7", "int8", "grid", "f16", "f32")
KINDS = ("attention", "MLP", "LoRA", "embedding", "vectors", "header")


class Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]
    scheme: str
    size: int  # bytes

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        if "lora" in self.name:
            return "LoRA"
        if self.name == "tok_emb.weight":
            return "embedding"
        matrix = re.search(r"\.(attn|mlp)\.\w+\.weight$", self.name)
        return {"attn": "attention", "mlp": "MLP"}[matrix[1]] if matrix else "vectors"

    @property
    def place(self) -> str:
        """The block, or where else it is."""
        block = re.match(r"blocks\.(\d+)\.", self.name)
        return block[1] if block else "embedding" if self.kind == "embedding" else "other"


def read_contents(path: Path) -> tuple[dict, list[Entry], int]:
    """(header, entries, bytes of header, checksum and frame). Raises InputError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected an artifact, found nothing to read ({error.strerror})") from None
    frame = HEAD.size + 32
    if len(data) < frame or data[:4] != b"RGPT":
        raise InputError(f"{path}: expected an artifact of this project, found another file")
    _, version, size = HEAD.unpack_from(data)
    if version != VERSION:
        raise InputError(f"{path}: expected version {VERSION}, found {version}; use the tools of that version's commit")
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise InputError(f"{path}: expected its SHA-256 at the end, found another (cut short or changed)")
    try:
        header = json.loads(zlib.decompressobj().decompress(data[HEAD.size : HEAD.size + size], LARGEST_HEADER))
        entries = [Entry(name, tuple(shape), scheme, count) for name, shape, scheme, count, _ in header["tensors"]]
        total = sum(entry.size for entry in entries)
        if total + size + frame != len(data) or any(entry.size < 0 for entry in entries):
            raise ValueError("sizes that do not add up")
        for name, shape, scheme, count in entries:
            numbers = all(type(n) is int and 0 < n < 2**32 for n in shape) and type(count) is int
            if not re.fullmatch(r"[a-z0-9_.]{1,99}", name) or not numbers or scheme not in SCHEMES or len(shape) > 3:
                raise ValueError("a tensor that no model has")
        model, coder = header["model"], header["codec"]
        facts = f"{model['layout']} {model['model_dim']:d} {header['loops']:d} {coder}"
        if not re.fullmatch(r"[0-9x+]{1,99} \d{1,9} \d{1,9} (ans|lzma)", facts):
            raise ValueError("a model that does not exist")
    except (ValueError, LookupError, TypeError, zlib.error, RecursionError) as error:
        raise InputError(f"{path}: expected a whole header, found {str(error)[:100]}") from None
    return header, entries, size + frame


def table(header: dict, entries: list[Entry], frame: int) -> str:
    """One line a tensor, then the sums."""
    width = max(len(entry.name) for entry in entries)
    model = header["model"]
    lines = [f"layout {model['layout']}  {model['model_dim']} wide  passes {header['loops']}  coder {header['codec']}",
             f"{'tensor':{width}}  {'shape':>14}  {'scheme':>6}  {'bytes':>10}  bits a weight"]  # fmt: skip
    for entry in entries:
        shape = "x".join(map(str, entry.shape))
        bits = 8 * entry.size / entry.weights
        lines.append(f"{entry.name:{width}}  {shape:>14}  {entry.scheme:>6}  {entry.size:>10,}  {bits:6.3f}")
    total = frame + sum(entry.size for entry in entries)
    lines.append("")
    for kind in KINDS:
        size = frame if kind == "header" else sum(entry.size for entry in entries if entry.kind == kind)
        count = sum(entry.weights for entry in entries if entry.kind == kind)
        if size:
            bits = f", {count:,} weights, {8 * size / count:.3f} bits each" if count else ""
            lines.append(f"{kind:10} {size:>10,} bytes  {100 * size / total:5.1f} %{bits}")
    lines.append(f"{'all':10} {total:>10,} bytes")
    return "\n".join(lines)


def draw(entries: list[Entry], frame: int, title: str, out: Path) -> None:
    """A bar a block, its bytes by kind."""
    plt = plotting()
    places = list(dict.fromkeys(entry.place for entry in entries)) + ["header"]
    figure, axes = plt.subplots(figsize=(8.4, 1.4 + 0.32 * len(places)), dpi=130, layout="constrained")
    left = dict.fromkeys(places, 0)
    for kind, color in zip(KINDS, COLORS):
        sizes = {place: sum(e.size for e in entries if e.place == place and e.kind == kind) for place in places}
        if kind == "header":
            sizes["header"] = frame
        shown = [place for place in places if sizes[place]]
        if shown:
            axes.barh([f"block {place}" if place.isdigit() else place for place in shown],
                      [sizes[place] / 1000 for place in shown], left=[left[place] / 1000 for place in shown],
                      color=color, label=kind, height=0.7)  # fmt: skip
        for place in shown:
            left[place] += sizes[place]
    order = [f"block {place}" if place.isdigit() else place for place in places]
    axes.set_yticks(order, order)
    axes.invert_yaxis()
    axes.set(xlabel="kilobytes")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines["right"].set_visible(False)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    save_picture(figure, out)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("artifact", type=Path, help="a model.int6.rgpt")
    parser.add_argument("--out", type=Path, help="the PNG (default: beside the artifact)")
    args = parser.parse_args(argv)
    header, entries, frame = read_contents(args.artifact)
    print(table(header, entries, frame))
    out = args.out or args.artifact.with_suffix(".png")
    total = frame + sum(entry.size for entry in entries)
    draw(entries, frame, f"{args.artifact.parent.name}/{args.artifact.name}: {total:,} bytes", out)
    print(f"picture: {short(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
