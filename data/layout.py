"""What the data tools share: the shard format, manifests, one-line errors, the check with the trainers' reader.

On disk, below a root (this folder unless `--out` says otherwise):

    datasets/<name>/fineweb_train_000000.bin ...   token shards
    datasets/<name>/fineweb_val_000000.bin ...
    datasets/<name>/manifest.json                  what they were made from
    tokenizers/<tokenizer>.model                   the SentencePiece model that made them

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then the tokens as
little-endian uint16. It is the format of the parameter-golf challenge, so its shards and ours can be exchanged.
"""

import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_VOCAB = 65_536  # a token is a uint16
DATA_ROOT = Path(__file__).resolve().parent
REPO_ROOT = DATA_ROOT.parent


class InputError(ValueError):
    """A mistake that the user can mend. The message is one line: what, where, expected, found, how to mend."""


def run(main):
    """Call `main()`; print an InputError as one `error:` line on stderr and leave with exit code 1 (130 on Ctrl-C)."""
    try:
        main()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); point stdout elsewhere so that Python's own flush stays quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        what = error.strerror or error
        print(f"error:{where}: {what}; check the path, its permissions and the space on its disk", file=sys.stderr)
        sys.exit(1)


def sha256_of(path, block=1 << 20):
    """Return the SHA-256 of a file as 64 hex digits, reading `block` bytes at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(block):
            digest.update(data)
    return digest.hexdigest()


def shard_header(tokens):
    """Return the 1,024 header bytes of a shard of `tokens` tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return header.tobytes()


def shard_tokens(path):
    """Return the token count that a shard's header states, or None if the file has no valid header."""
    try:
        with open(path, "rb") as file:
            raw = file.read(12)
    except OSError:
        return None
    if len(raw) < 12:
        return None
    magic, version, tokens = (int(value) for value in np.frombuffer(raw, dtype="<i4"))
    return tokens if (magic, version) == (SHARD_MAGIC, SHARD_VERSION) and tokens >= 0 else None


@contextmanager
def atomic(path, mode="wb", **options):
    """Open a temporary neighbour of `path` for writing; on success it takes the name `path`, on failure it goes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def as_tokens(ids):
    """Return `ids` as a flat little-endian uint16 array; raise InputError if an id does not fit."""
    ids = np.asarray(ids).reshape(-1)
    if ids.dtype == np.dtype("<u2"):
        return ids
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= MAX_VOCAB):
        raise InputError(
            f"token ids must lie in 0..{MAX_VOCAB - 1}, found {int(ids.min())}..{int(ids.max())}; "
            "use a smaller vocabulary"
        )
    return ids.astype("<u2")


def write_shard(path, tokens):
    """Write one shard atomically. tokens: any integer sequence, shape [n], ids 0..65535."""
    tokens = as_tokens(tokens)
    with atomic(path) as file:
        file.write(shard_header(tokens.size))
        file.write(tokens.tobytes())


class ShardWriter:
    """Cut a stream of tokens into `fineweb_<split>_000000.bin`, `..._000001.bin`, ... of `shard_tokens` tokens each.

    Memory stays at what `add` is given: tokens go straight to a `.part` file, whose header is filled in when it closes.
    `close()` returns one manifest entry per shard: {name, tokens, bytes, sha256}. Without `close()` nothing carries a
    final name for the shard in hand.
    """

    def __init__(self, folder, split, shard_tokens):
        self.folder, self.split, self.shard_tokens = Path(folder), split, int(shard_tokens)
        self.tokens = 0
        self.files = []
        self._file = None
        self._filled = 0

    def add(self, tokens):
        """Append tokens, shape [n], to the stream."""
        tokens = as_tokens(tokens)
        while tokens.size:
            if self._file is None:
                name = f"fineweb_{self.split}_{len(self.files):06d}.bin"
                self._path = self.folder / name
                self._file = open(self._path.with_name(name + ".part"), "wb")  # noqa: SIM115 (open across calls)
                self._file.write(shard_header(0))
                self._filled = 0
            piece = tokens[: self.shard_tokens - self._filled]
            self._file.write(piece.tobytes())
            self._filled += piece.size
            self.tokens += piece.size
            tokens = tokens[piece.size :]
            if self._filled == self.shard_tokens:
                self._finish()

    def _finish(self):
        self._file.seek(0)
        self._file.write(shard_header(self._filled))
        self._file.close()
        self._file = None
        os.replace(self._path.with_name(self._path.name + ".part"), self._path)
        self.files.append(file_entry(self._path, tokens=self._filled))

    def close(self):
        """Finish the last shard; return the manifest entries of all of them."""
        if self._file is not None:
            self._finish()
        return self.files


def file_entry(path, **more):
    """Return {name, bytes, sha256, ...} of a file, for a manifest."""
    path = Path(path)
    return {"name": path.name, **more, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_json(path, value):
    """Write a value as indented UTF-8 JSON, atomically."""
    with atomic(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def read_json(path):
    """Return the parsed file, or None if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def building(folder, replace):
    """Yield an empty neighbour of `folder`; on success it takes the place of `folder`, on failure it is removed.

    A dataset is many files: only as a whole does it get its name. An existing folder is refused unless `replace`.
    """
    folder = Path(folder)
    if folder.exists() and not replace:
        raise InputError(f"{show(folder)} already exists; choose another --name or give --force to replace it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f"{folder.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    for stale in folder.parent.glob(f"{folder.name}.*.part"):  # of a run that was killed
        if not is_running(stale.name.split(".")[-2]):
            shutil.rmtree(stale, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def is_running(process):
    """Say whether the process of a number, given as text, exists."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def need_space(folder, wanted, what):
    """Raise InputError unless the disk of `folder` (existing or not) has `wanted` bytes and 2 % more."""
    place = Path(folder).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < wanted * 1.02:
        raise InputError(
            f"{what} needs {size(wanted)} on the disk of {show(place)}, which has {size(free)} free; "
            "free some space, ask for less, or choose another disk with --out"
        )


def size(count):
    """Return a byte count for people: '193.0 MB' (1 MB = 1,000,000 bytes)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def show(path):
    """Return a path as the user would type it: relative when it lies below the current folder."""
    path = Path(os.path.abspath(path))
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def progress(total, what, unit="B", done=0):
    """Return a tqdm bar that shows itself on a terminal only, so that files never see control characters."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
        file=sys.stderr,
    )


def load_sentencepiece(path):
    """Return the SentencePieceProcessor of a `.model` file; raise InputError if it is missing, foreign or too large."""
    import sentencepiece

    if not Path(path).is_file():
        raise InputError(f"tokenizer {show(path)}: no such file; expected a SentencePiece .model")
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # the library raises RuntimeError or OSError with text over several lines
        raise InputError(
            f"tokenizer {show(path)}: not a SentencePiece model ({str(error).splitlines()[0][:80]}); "
            "expected a .model file as spm_train writes it"
        ) from None
    if model.vocab_size() > MAX_VOCAB:
        raise InputError(
            f"tokenizer {show(path)}: {model.vocab_size():,} pieces, but shards hold uint16 tokens, "
            f"at most {MAX_VOCAB:,}; use a smaller vocabulary"
        )
    return model


def trainer_name():
    """Return the script to train with here: train_gpt_mlx on Apple silicon with mlx installed, else train_gpt."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return "train_gpt_mlx" if apple and importlib.util.find_spec("mlx") else "train_gpt"


def need_trainer():
    """Raise InputError early if `load_trainer` is going to fail: a long job should not end in a missing package."""
    for script, framework in (("train_gpt", "torch"), ("train_gpt_mlx", "mlx")):
        if (REPO_ROOT / f"{script}.py").is_file() and importlib.util.find_spec(framework):
            return
    raise InputError(
        "finished data is checked with the reader of train_gpt.py or train_gpt_mlx.py, and neither torch "
        "nor mlx is installed here; run: pip install -r requirements.txt"
    )


def load_trainer():
    """Import the training script whose reader we check with; falls back to the other framework's if one is missing."""
    first = trainer_name()
    problems = []
    for name in (first, "train_gpt" if first == "train_gpt_mlx" else "train_gpt_mlx"):
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, REPO_ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up while it is being executed
        try:
            spec.loader.exec_module(module)
            return module
        except (ImportError, FileNotFoundError) as error:
            del sys.modules[name]
            problems.append(f"{name}.py: {error}")
    raise InputError(f"cannot load the trainers' reader ({'; '.join(problems)}); run: pip install -r requirements.txt")


def check_dataset(data_path, tokenizer_path):
    """Read shards and tokenizer exactly as the trainers will; return (vocabulary size, train tokens, val tokens).

    Raises InputError with the reader's own line if anything is missing, damaged or does not belong together.
    """
    trainer = load_trainer()
    vocab_size = load_sentencepiece(tokenizer_path).vocab_size()
    counts = []
    try:
        trainer.load_tokenizer(str(tokenizer_path), vocab_size)
        for split in ("train", "val"):
            shards = trainer.find_shards(str(data_path), split, vocab_size)
            counts.append(sum(shard_tokens(shard) for shard in shards))
    except trainer.InputError as error:
        raise InputError(str(error)) from None
    return vocab_size, *counts


def train_command(data_path, tokenizer_path, vocab_size):
    """Return the shell line that trains on a dataset, to be typed in the repository's root."""

    def below_root(path):
        path = Path(os.path.abspath(path))
        return shlex.quote(str(path.relative_to(REPO_ROOT) if path.is_relative_to(REPO_ROOT) else path))

    size_part = "" if vocab_size == 1024 else f"VOCAB_SIZE={vocab_size} "
    return (
        f"DATA_PATH={below_root(data_path)} TOKENIZER_PATH={below_root(tokenizer_path)} {size_part}"
        f"python {trainer_name()}.py"
    )


def finish(data_path, tokenizer_path):
    """Check a dataset with the trainers' reader and print its size and the command that trains on it."""
    vocab_size, train, val = check_dataset(data_path, tokenizer_path)
    print(f"checked: {train:,} training and {val:,} validation tokens, vocabulary {vocab_size}")
    print(f"train on it: {train_command(data_path, tokenizer_path, vocab_size)}")
