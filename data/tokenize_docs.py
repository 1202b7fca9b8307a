"""Turn documents into token shards, with a given SentencePiece model or one trained on them.

    python data/tokenize_docs.py docs.jsonl.xz --val-docs 1000 --tokenizer data/tokenizers/fineweb_1024_bpe.model
    python data/tokenize_docs.py a.jsonl b.jsonl.gz --val held_out.jsonl --vocab-size 4096 --name mine_sp4096

Inputs: `.jsonl` (one {"text": ...} a line) and plain text (`.txt`, `.md`), each also `.xz` or `.gz`. Every document is
preceded by the tokenizer's BOS id, as in the challenge's shards. See data/README.md.
"""

import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import lzma
import os
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import layout
import numpy as np
from tool import InputError, Parser, atomic, need, run_tool

SHARD_TOKENS = 100_000_000
BATCH_BYTES = 4 << 20  # text encoded at once; memory grows with it
MAX_DOCUMENT = 16_000_000  # bytes; SentencePiece takes 45 times as much memory for a document
TEXT_ENDS = (".txt", ".md")
OPENERS = {".xz": lzma.open, ".gz": gzip.open}
SPACE = "\u2581"  # what a space is within a piece


# ---- documents -------------------------------------------------------------------------------------------------------


class Source:
    """The documents of one input file. Iterating gives their texts and shows how far the reading has come."""

    def __init__(self, path: str, doc_bytes: int = 20_000, separator: str | None = None):
        self.path = Path(path)
        self.doc_bytes = doc_bytes
        self.separator = separator.encode() if separator else None
        kind = (self.path.with_suffix("") if self.path.suffix in OPENERS else self.path).suffix
        self.json = kind == ".jsonl"
        what, known = f"input {layout.show(path)}", ".jsonl, .txt or .md, each also .xz or .gz"
        need(self.json or kind in TEXT_ENDS, what, known, f"the ending {kind!r}")
        need(self.path.is_file(), what, "a file", "no such file")
        self.bytes = self.path.stat().st_size
        need(self.bytes, what, "documents", "an empty file")

    def where(self, line: int) -> str:
        return f"input {layout.show(self.path)} line {line}"

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields (number, bytes) of the lines, without a byte order mark."""
        opener = OPENERS.get(self.path.suffix)
        number = 0
        with open(self.path, "rb") as raw, layout.progress(self.bytes, self.path.name) as bar:
            file = io.BufferedReader(opener(raw), 1 << 20) if opener else raw
            try:
                while line := file.readline(MAX_DOCUMENT + 1):
                    number += 1
                    bar.update(raw.tell() - bar.n)
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
                mend = "copy or download the file again"
                raise InputError(f"{self.where(number)}: damaged or truncated after it ({error}); {mend}") from None

    def stretches(self) -> Iterator[tuple[int, bytes]]:
        """Yields (number of the first line, bytes) of the documents that plain text is cut into."""
        first, held, length = 1, [], 0
        for number, line in self.lines():
            marker = self.separator is not None and line.strip() == self.separator
            if not marker:
                held.append(line)
                length += len(line)
            # Without markers: at the first blank line after doc_bytes; a text without blank lines, at a line's end.
            full = length >= (self.doc_bytes if line.isspace() else 4 * self.doc_bytes)
            if marker or length > MAX_DOCUMENT or (self.separator is None and full):
                yield first, b"".join(held)
                first, held, length = number + 1, [], 0
        yield first, b"".join(held)

    def __iter__(self) -> Iterator[str]:
        limit = f"documents of at most {layout.size(MAX_DOCUMENT)}"
        for number, raw in self.lines() if self.json else self.stretches():
            need(len(raw) <= MAX_DOCUMENT, self.where(number), limit, "more", "cut it into several")
            if raw.strip():
                yield self.text(number, raw)

    def text(self, number: int, raw: bytes) -> str:
        """The text of one document. Raises InputError, which names its line, if it is not what it should be."""
        expected = 'one {"text": ...} a line' if self.json else "plain text"
        try:
            value = json.loads(raw) if self.json else {"text": raw.decode("utf-8")}
        except (ValueError, RecursionError) as error:
            kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
            raise InputError(f"{self.where(number)}: not {kind} ({error}); expected {expected} in UTF-8") from None
        found = f"the keys {list(value)[:5]}" if isinstance(value, dict) else f"a {type(value).__name__}"
        text = value.get("text") if isinstance(value, dict) else None
        need(isinstance(text, str), self.where(number), f"{expected}, a string", found)
        # JSON can spell half of a surrogate pair, which UTF-8 cannot carry.
        return text.encode("utf-8", "replace").decode("utf-8")


def batches(texts: Iterable[str]) -> Iterator[tuple[list[str], int]]:
    """Yields (texts, their UTF-8 bytes), about BATCH_BYTES at a time."""
    held, length = [], 0
    for text in texts:
        held.append(text)
        length += len(text.encode("utf-8"))
        if length >= BATCH_BYTES:
            yield held, length
            held, length = [], 0
    if held:
        yield held, length


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def sample_texts(sources: list[Source], budget: int, skip: int = 0) -> Iterator[str]:
    """Yields the first texts of every source, an equal share of `budget` characters each, but not the first `skip`."""
    for source in sources:
        left = budget // len(sources)
        for text in source:
            if skip:
                skip -= 1
                continue
            yield text
            left -= len(text)
            if left <= 0:
                break


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a SentencePiece model (BPE, byte fallback) of `vocab_size` pieces; returns the bytes of its file.

    Same settings as the challenge's tokenizers: nmt_nfkc, digits apart, pad 0, BOS 1, EOS 2, unknown 3, no prefix. The
    space is always a piece of its own, however rare it is: otherwise it would be three bytes that decode to U+2581.
    Raises InputError if the texts are too few for the vocabulary.
    """
    import sentencepiece

    def lines():
        for text in texts:
            for line in text.split("\n"):
                # SentencePiece skips sentences above its limit without a word; cut instead.
                for start in range(0, len(line), 10_000):
                    yield line[start : start + 10_000]

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            required_chars=SPACE,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            max_sentence_length=65_536,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
        found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    except RuntimeError as error:
        found = str(error).splitlines()[0][:120]
    mend = "give more text or a smaller --vocab-size"
    need(found == vocab_size, "tokenizer", f"{vocab_size} pieces", found, mend)
    return model.getvalue()


# ---- shards ----------------------------------------------------------------------------------------------------------


def write_split(folder: Path, split: str, texts: Iterable[str], model, threads: int) -> dict:
    """Writes the shards of one split, BOS and the ids of each text in turn; returns its part of the manifest."""
    counts = {"documents": 0, "text_bytes": 0, "tokens": 0}

    def encoded() -> Iterator[np.ndarray]:
        for batch, length in batches(texts):
            bos = model.bos_id() >= 0
            tokens = np.concatenate(model.encode(batch, add_bos=bos, num_threads=threads, return_type="numpy"))
            for key, more in zip(counts, (len(batch), length, tokens.size)):
                counts[key] += more
            yield tokens

    files = layout.write_shards(folder, split, encoded(), SHARD_TOKENS)
    text = {"train": "training text", "val": "validation text"}[split]
    if not files:
        raise InputError(f"expected {text}, found no document; give more, or a smaller --val-docs")
    return counts | {"files": files}


def write_dataset(folder: Path, kept: Path, model: bytes, texts: dict, threads: int, facts: dict, mend: str) -> None:
    """Writes a whole dataset and then its tokenizer, replacing what is there; the trainers' reader judges both.

    folder: the dataset's; kept: the tokenizer's file; model: its bytes; texts: {split: texts}; facts: for the manifest;
    mend: what to do where another tokenizer lies at `kept`, which raises InputError before anything is written.
    """
    import sentencepiece

    sha256 = hashlib.sha256(model).hexdigest()
    layout.claim_tokenizer(kept.parent.parent, kept, folder.name, sha256, mend)
    processor, started = sentencepiece.SentencePieceProcessor(model_proto=model), time.time()
    with layout.building(folder, replace=True) as new:
        val = write_split(new, "val", texts["val"], processor, threads)
        layout.check_text(new, processor)
        splits = {"val": val, "train": write_split(new, "train", texts["train"], processor, threads)}
        layout.write_manifest(new, folder.name, layout.tokenizer_entry(kept, processor, sha256), splits, **facts)
    with atomic(kept, "wb") as file:
        file.write(model)
    seconds = time.time() - started
    text_bytes, tokens = (sum(part[key] for part in splits.values()) for key in ("text_bytes", "tokens"))
    print(
        f"{layout.show(folder)}: {layout.size(text_bytes)} of text, {val['text_bytes'] / text_bytes:.1%} of it held "
        f"out, {tokens:,} tokens ({text_bytes / tokens:.2f} bytes a token), {seconds:.1f} s"
    )
    layout.check_dataset(folder, kept)


# ---- command line ----------------------------------------------------------------------------------------------------


def tokenize(args) -> tuple[Path, Path]:
    """Does the whole job of the command line; returns (dataset folder, tokenizer path)."""
    inputs = [Source(path, args.doc_bytes, args.separator) for path in args.inputs]
    held_out = [Source(path, args.doc_bytes, args.separator) for path in args.val]
    for source in held_out:
        both = any(source.path.samefile(other.path) for other in inputs)
        need(not both, layout.show(source.path), "--val to be held out", "it among the inputs too")
    root = Path(args.out)
    pieces = layout.check_tokenizer(args.tokenizer) if args.tokenizer else args.vocab_size
    name = args.name or f"docs_sp{pieces}"
    folder = root / "datasets" / name
    kept = root / "tokenizers" / f"{name}_{'given' if args.tokenizer else 'bpe'}.model"
    layout.refuse_existing(folder, args.force)
    if args.tokenizer:
        model = Path(args.tokenizer).read_bytes()
    else:
        layout.load_trainer()  # which judges the result: better missed now than after the work
        print(f"training a tokenizer of {pieces} pieces on up to {args.tokenizer_mb} MB of text ...", flush=True)
        model = train_tokenizer(sample_texts(inputs, args.tokenizer_mb * 1_000_000, args.val_docs or 0), pieces)
    train = itertools.chain.from_iterable(inputs)
    val = itertools.chain.from_iterable(held_out) if held_out else itertools.islice(train, args.val_docs)
    facts = {
        "made_by": "data/tokenize_docs.py",
        "given_tokenizer": Path(args.tokenizer).name if args.tokenizer else None,
        "sources": [layout.file_entry(source.path) for source in inputs + held_out],
        "val_docs": args.val_docs,
        "versions": {"sentencepiece": importlib.metadata.version("sentencepiece")},
    }
    write_dataset(folder, kept, model, {"val": val, "train": train}, args.workers, facts, "choose another --name")
    return folder, kept


def parse(argv: list[str] | None = None):
    parser = Parser(__doc__)
    add, number = parser.add_argument, {"type": layout.positive, "metavar": "N"}
    add("inputs", nargs="+", help="training documents: .jsonl, .txt or .md, each also .xz or .gz")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", metavar="FILE", help="SentencePiece .model to use")
    trained = "or: train a BPE tokenizer of this many pieces"
    tokenizer.add_argument("--vocab-size", type=layout.vocabulary, metavar="N", help=trained)
    validation = parser.add_mutually_exclusive_group(required=True)
    validation.add_argument("--val", nargs="+", default=[], metavar="FILE", help="files of validation documents")
    validation.add_argument("--val-docs", help="or: hold out the first N documents of the inputs", **number)
    add("--name", type=layout.folder_name, help="of the dataset folder (default docs_sp<vocabulary size>)")
    add("--out", default=str(layout.DATA_ROOT), help="root of datasets/ and tokenizers/ (default: data/)")
    add("--workers", default=os.cpu_count() or 1, help="threads (default: all cores)", **number)
    add("--tokenizer-mb", default=20, help="MB of text to train a tokenizer on (default 20)", **number)
    add("--doc-bytes", default=20_000, help="cut plain text at a blank line after N bytes (default 20,000)", **number)
    add("--separator", metavar="LINE", help="plain text: a line that ends a document, instead of --doc-bytes")
    add("--force", action="store_true", help="replace an existing dataset of this name")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    folder, _ = tokenize(parse(argv))
    layout.finish(folder)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
