"""Cut the scale model's dataset out of a larger one: all its training shards, and the first held-out documents only.

    python data/fineweb.py --train-shards 1      first: 100 million training tokens of the challenge's text
    python data/mini.py                          then: data/datasets/mini_sp1024, which the preset `mini` reads
    python data/mini.py --source data/datasets/mine_sp1024 --name mini_mine

Held out are whole documents from the start of the validation set until they make a million bytes: scoring millions of
tokens would cost a small model more than its training. Training shards are linked, not copied.
"""

import os
import shutil
import sys
from pathlib import Path

import layout
import numpy as np
from tool import InputError, Parser, need, run_tool, write_json

SOURCE, NAME = "fineweb10B_sp1024", "mini_sp1024"
HELD_OUT = 1_000_000  # bytes of text, at least


def first_documents(shards: list[Path], model, least: int) -> np.ndarray:
    """Tokens of the first documents that make `least` bytes. Raises InputError if there are not so many."""
    tokens = np.concatenate([np.fromfile(path, "<u2", offset=layout.HEADER_BYTES) for path in shards])
    starts = np.flatnonzero(tokens == model.bos_id()).tolist()
    need(starts, "validation set", "documents that begin with the tokenizer's BOS id", "none")
    size = 0
    for start, end in zip(starts, [*starts[1:], len(tokens)]):
        size += len(model.decode(tokens[start:end].tolist()).encode())
        if size >= least:
            return tokens[:end]
    raise InputError(f"validation set: expected documents of {least:,} bytes together, found {size:,}; give more text")


def link(path: Path, place: Path) -> None:
    """A second name for a file; a copy where the disk has no such thing."""
    try:
        os.link(path, place)
    except OSError:
        shutil.copyfile(path, place)


def build(source: Path, name: str, force: bool) -> tuple[Path, Path]:
    """Makes datasets/<name> beside `source`; returns its folder and the path of its tokenizer."""
    plain = name and name == Path(name).name and not name.startswith(".") and name != source.name
    need(plain, "--name", f"a plain folder name other than {source.name}", repr(name), "choose another")
    manifest = layout.manifest_of(source)
    mend = "run python data/fineweb.py --train-shards 1, or name a dataset with --source"
    need("tokenizer" in manifest, layout.show(source), "a dataset with a manifest.json", "none", mend)
    tokenizer = source.parent.parent / manifest["tokenizer"]["path"]
    layout.check_dataset(source, tokenizer)
    model, folder = layout.load_sentencepiece(tokenizer), source.with_name(name)
    with layout.building(folder, replace=force) as part:
        writer = layout.ShardWriter(part, "val", 1 << 30)
        writer.add(first_documents(sorted(source.glob("fineweb_val_*.bin")), model, HELD_OUT))
        splits = {"train": manifest["splits"]["train"], "val": {"tokens": writer.tokens, "files": writer.close()}}
        for path in sorted(source.glob("fineweb_train_*.bin")):
            link(path, part / path.name)
        facts = {"name": name, "tokenizer": manifest["tokenizer"], "splits": splits, "made_by": "data/mini.py"}
        write_json(part / "manifest.json", facts | {"made_from": {"name": source.name, "splits": manifest["splits"]}})
    return folder, tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--source", type=Path, default=layout.DATA_ROOT / "datasets" / SOURCE, help="a dataset folder")
    parser.add_argument("--name", default=NAME, help=f"of the dataset that is made, beside it (default {NAME})")
    parser.add_argument("--force", action="store_true", help="replace an existing dataset of this name")
    args = parser.parse_args(argv)
    folder, tokenizer = build(args.source.resolve(), args.name, args.force)
    layout.finish(folder, tokenizer, layout.check_dataset(folder, tokenizer))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
