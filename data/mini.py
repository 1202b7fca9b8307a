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
from tool import InputError, Parser, need, run_tool

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


def build(source: Path, name: str, force: bool) -> Path:
    """Makes datasets/<name> beside `source`; returns its folder."""
    need(name != source.name, "--name", f"another name than {source.name}", repr(name), "choose another")
    manifest = layout.manifest_of(source)
    mend = "run python data/fineweb.py --train-shards 1, or name a dataset with --source"
    need("tokenizer" in manifest, layout.show(source), "a dataset with a manifest.json", "none", mend)
    tokenizer = source.parent.parent / manifest["tokenizer"]["path"]
    layout.check_dataset(source, tokenizer)
    folder = source.with_name(name)
    with layout.building(folder, replace=force) as part:
        shards = sorted(source.glob("fineweb_val_*.bin"))
        tokens = first_documents(shards, layout.load_sentencepiece(tokenizer), HELD_OUT)
        val = {"tokens": tokens.size, "files": layout.write_shards(part, "val", [tokens], tokens.size)}
        for path in sorted(source.glob("fineweb_train_*.bin")):
            try:
                os.link(path, part / path.name)
            except OSError:  # a disk that has no second names for a file
                shutil.copyfile(path, part / path.name)
        splits = {"train": manifest["splits"]["train"], "val": val}
        made_from = {"name": source.name, "splits": manifest["splits"]}
        facts = {"made_by": "data/mini.py", "made_from": made_from}
        layout.write_manifest(part, name, manifest["tokenizer"], splits, **facts)
    layout.check_dataset(folder, tokenizer)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--source", type=Path, default=layout.DATA_ROOT / "datasets" / SOURCE, help="a dataset folder")
    add("--name", type=layout.folder_name, default=NAME, help=f"of the dataset made, beside it (default {NAME})")
    add("--force", action="store_true", help="replace an existing dataset of this name")
    args = parser.parse_args(argv)
    layout.finish(build(args.source.resolve(), args.name, args.force))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
