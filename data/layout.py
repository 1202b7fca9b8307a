"""What the data tools share: the shard format, datasets that are whole or absent, tokenizers, the trainers' reader.

data/README.md says what lies where below a root (this folder unless `--out` says otherwise). A shard is 256
little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then the tokens as little-endian uint16: the
format of the parameter-golf challenge, so that its shards and ours can be exchanged.
"""

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tool import ROOT, InputError, need, read_json, sha256_of, write_json

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_BYTES = 1024
MAX_VOCAB = 65_536  # a token is a uint16
DATA_ROOT = Path(__file__).resolve().parent


# ---- shards ----------------------------------------------------------------------------------------------------------


def shard_header(tokens: int) -> bytes:
    """The 1,024 header bytes of a shard of `tokens` tokens."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return header.tobytes()


def shard_tokens(path: Path) -> int:
    """The token count in a shard's header. Raises InputError if it is no shard or has not the bytes of that count."""
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    magic, version, tokens = np.frombuffer(header.ljust(12, b"\0")[:12], dtype="<i4").tolist()
    is_shard = (magic, version) == (SHARD_MAGIC, SHARD_VERSION)
    need(is_shard, show(path), f"a shard of magic {SHARD_MAGIC}", "another kind of file")
    expected, found = HEADER_BYTES + 2 * tokens, Path(path).stat().st_size
    need(found == expected, show(path), f"{expected} bytes for {tokens} tokens", found, "make it again")
    return tokens


def write_shards(folder: Path, split: str, stream: Iterable[np.ndarray], shard_tokens: int) -> list[dict]:
    """Cuts a stream of tokens into `fineweb_<split>_000000.bin`, `..._000001.bin`, ... of `shard_tokens` tokens each.

    stream: arrays of integers of shape [n] that fit in uint16. Returns the manifest entries {name, tokens, bytes,
    sha256} of the shards. Memory stays at one shard.
    """
    shard = np.empty(shard_tokens, dtype="<u2")
    filled, entries = 0, []

    def close() -> None:
        path = folder / f"fineweb_{split}_{len(entries):06d}.bin"
        with open(path, "wb") as file:
            file.write(shard_header(filled))
            file.write(shard[:filled])  # tofile would not say that the disk is full
        entries.append(file_entry(path, tokens=filled))

    for tokens in stream:
        low, high = (tokens.min(), tokens.max()) if tokens.size else (0, 0)
        need(0 <= low and high < MAX_VOCAB, "tokens", f"ids of 0..{MAX_VOCAB - 1}", f"{low}..{high}")
        while tokens.size:
            piece = tokens[: shard_tokens - filled]
            shard[filled : filled + piece.size] = piece
            filled += piece.size
            tokens = tokens[piece.size :]
            if filled == shard_tokens:
                close()
                filled = 0
    if filled:
        close()
    return entries


def file_entry(path: Path, **more) -> dict:
    """{name, bytes, sha256, ...} of a file, for a manifest."""
    return {"name": path.name, **more, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


# ---- datasets and their tokenizers -----------------------------------------------------------------------------------


@contextmanager
def building(folder: Path, replace: bool):
    """Yields an empty neighbour of `folder`; on success it takes the place of `folder`, on failure it is removed.

    A dataset is many files: only as a whole does it get its name. An existing folder is refused unless `replace`.
    """
    refuse_existing(folder, replace)
    new, old = (folder.with_name(f"{folder.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    for stale in folder.parent.glob(f"{folder.name}.*.part"):
        if time.time() - stale.stat().st_mtime > 86_400:  # untouched for a day: its run was killed
            shutil.rmtree(stale, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():  # stopped between the two
            os.replace(old, folder)
        for rest in (new, old):
            shutil.rmtree(rest, ignore_errors=True)


def refuse_existing(folder: Path, replace: bool) -> None:
    if folder.exists() and not replace:
        raise InputError(f"{show(folder)} already exists; choose another --name, or give --force to replace it")


def manifest_of(folder: Path) -> dict:
    """The manifest of a dataset, {} if it has none that can be read."""
    try:
        return read_json(folder / "manifest.json")
    except InputError:
        return {}


def claim_tokenizer(root: Path, path: Path, dataset: str, sha256: str, mend: str) -> None:
    """Raises InputError if a tokenizer of this hash at `path` would replace one that is not the dataset's own.

    The manifests below `root` say whose a tokenizer is. Equal content is nobody's loss.
    """
    if not path.exists() or sha256_of(path) == sha256:
        return
    users = set()
    for folder in (root / "datasets").glob("*"):
        entry = manifest_of(folder).get("tokenizer")
        if isinstance(entry, dict) and Path(str(entry.get("path"))).name == path.name:
            users.add(folder.name)
    others = ", ".join(sorted(users - {dataset}))
    need(not others, show(path), "no other dataset's tokenizer", f"the one of {others}", mend)
    mend += ", or move that file away"
    need(users, show(path), "no file", "a tokenizer that no dataset's manifest names", mend)


def load_sentencepiece(path: Path):
    """The SentencePieceProcessor of a `.model` file. Raises InputError if it is missing, foreign or too large."""
    import sentencepiece

    wanted = "a SentencePiece .model file"
    need(Path(path).is_file(), show(path), wanted, "no such file")
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        pieces = model.vocab_size()
    except Exception as error:  # the library raises RuntimeError or OSError with text over several lines
        found = str(error).splitlines()[0][:80]
        raise InputError(f"{show(path)}: expected {wanted}, found something else ({found})") from None
    need(pieces <= MAX_VOCAB, show(path), f"at most {MAX_VOCAB} pieces (tokens are uint16)", pieces)
    return model


def tokenizer_entry(path: Path, model, sha256: str) -> dict:
    """What a dataset's manifest says of its tokenizer. The trainers compare the hash before they train."""
    sizes = {"vocab_size": model.vocab_size(), "bos_id": model.bos_id()}
    return {"path": f"tokenizers/{path.name}", **sizes, "sha256": sha256}


def write_manifest(folder: Path, name: str, tokenizer: dict, splits: dict, **facts) -> None:
    """Writes the manifest of the dataset `name`. splits: {"train": {"tokens", "files", ...}, "val": ...}."""
    write_json(folder / "manifest.json", {"name": name, "tokenizer": tokenizer, "splits": splits, **facts})


# ---- the trainers' reader --------------------------------------------------------------------------------------------


def trainer_name() -> str:
    """The training script to use on this machine."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64" and importlib.util.find_spec("mlx")
    return "train_gpt_mlx" if apple else "train_gpt"


def load_trainer():
    """The module of that script, whose reader judges data and tokenizers."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(trainer_name())
    except ImportError as error:
        mend = "run: pip install -r requirements.txt"
        raise InputError(f"the trainers' reader cannot load ({trainer_name()}.py: {error}); {mend}") from None


@contextmanager
def judged_by_trainer():
    """Yields the trainer's module; what it refuses is refused here in its words."""
    trainer = load_trainer()
    try:
        yield trainer
    except trainer.InputError as error:
        raise InputError(str(error)) from None


def check_tokenizer(path: Path, data_path: Path | str = "") -> int:
    """The pieces of a tokenizer. Raises InputError for one that the trainers would refuse, alone or with the data."""
    pieces = load_sentencepiece(path).vocab_size()
    with judged_by_trainer() as trainer:
        trainer.load_tokenizer(str(path), pieces, str(data_path))
    return pieces


def check_text(folder: Path, model) -> None:
    """Raises InputError if the validation set in `folder`, made by the SentencePieceProcessor `model`, has no bytes."""
    with judged_by_trainer() as trainer:
        shards = trainer.find_shards(str(folder), "val", model.vocab_size())
        any_bytes = any(trainer.count_bytes(np.array(shard), model) for shard in shards)
        need(any_bytes, "validation set", "text", "documents that stand for no bytes", "give others")


def check_dataset(data_path: Path, tokenizer_path: Path) -> tuple[int, int, int]:
    """(vocabulary size, train tokens, val tokens) of what the trainers will read.

    Raises InputError, in their words, if anything is missing or damaged or does not belong together.
    """
    pieces = check_tokenizer(tokenizer_path, data_path)
    with judged_by_trainer() as trainer:
        train, val = (trainer.find_shards(str(data_path), split, pieces) for split in ("train", "val"))
    return pieces, sum(map(len, train)), sum(map(len, val))


def finish(folder: Path) -> None:
    """Prints what the manifest of a checked dataset states, and the command that trains on it."""
    manifest = manifest_of(folder)
    tokenizer = manifest["tokenizer"]
    paths = []
    for path in (folder, folder.parent.parent / tokenizer["path"]):
        path = Path(os.path.abspath(path))
        paths.append(shlex.quote(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)))
    pieces = tokenizer["vocab_size"]
    train, val = (manifest["splits"][split]["tokens"] for split in ("train", "val"))
    vocabulary = "" if pieces == 1024 else f"VOCAB_SIZE={pieces} "
    print(f"checked: {train:,} training and {val:,} validation tokens, vocabulary {pieces}")
    print(f"train on it: DATA_PATH={paths[0]} TOKENIZER_PATH={paths[1]} {vocabulary}python {trainer_name()}.py")


# ---- for people ------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """The type of a command line's counts."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def vocabulary(text: str) -> int:
    """The type of --vocab-size."""
    pieces = positive(text)
    if not 300 <= pieces <= MAX_VOCAB:
        bounds = f"300 (4 control and 256 byte pieces come first) to {MAX_VOCAB} (tokens are uint16)"
        raise argparse.ArgumentTypeError(f"expected {bounds}, found {pieces}")
    return pieces


def folder_name(text: str) -> str:
    """The type of --name."""
    if not text or text != Path(text).name or text.startswith("."):
        raise argparse.ArgumentTypeError(f"expected a plain folder name, found {text!r}")
    return text


def size(count: float) -> str:
    """A byte count for people: '193.0 MB' (1 MB = 1,000,000 bytes)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def show(path: Path) -> str:
    """A path as the user would type it: relative when it lies below the current folder."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def progress(total: int, what: str, unit: str = "B", items: Iterable | None = None):
    """A tqdm bar that shows itself on a terminal only, so that files never see control characters."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=what, unit=unit, unit_scale=True, dynamic_ncols=True, disable=None)
