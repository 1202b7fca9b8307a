"""Turn documents into token shards, with a given SentencePiece model or one trained on them.

    python data/tokenize_docs.py docs.jsonl.xz --val-docs 1000 --tokenizer data/tokenizers/fineweb_1024_bpe.model
    python data/tokenize_docs.py a.jsonl b.jsonl.gz --val held_out.jsonl --vocab-size 4096 --name mine_sp4096

Inputs: `.jsonl` (one {"text": ...} a line) and plain text (`.txt`, `.md`), each also `.xz` or `.gz`. Every document is
preceded by the tokenizer's BOS id, as in the challenge's shards. The result depends on the inputs and options only,
never on the number of workers. See data/README.md.
"""

import argparse
import collections
import gzip
import io
import itertools
import json
import lzma
import multiprocessing
import os
import shutil
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from layout import (
    DATA_ROOT,
    HEADER_BYTES,
    MAX_VOCAB,
    InputError,
    ShardWriter,
    atomic,
    building,
    file_entry,
    finish,
    load_sentencepiece,
    need_space,
    need_trainer,
    progress,
    run,
    sha256_of,
    show,
    size,
    write_json,
)

BATCH_BYTES = 1 << 20  # text handed to a worker at once
MAX_LINE = 64 << 20  # bytes; a longer line is not a document but a file of another kind
JSON_ENDS = (".jsonl", ".ndjson")
TEXT_ENDS = (".txt", ".md")
PROBES = (
    "",
    " Two  words, 12 and\tthree.\nFour ",
    "na\u00efve caf\u00e9 \u2581x \u2581 \u65e5\u672c\u8a9e \U0001f600",
    "<s> </s> <unk> <0x41>",
    "A\u0307x \ufb01 \u00a0 end",
)


class Encoder:
    """text -> token ids, shape [n], uint16, with the BOS id first when the model has one.

    BPE pieces never reach across a word boundary (`_` of a word stands only at a piece's start), so the text is
    normalised as a whole and each word's ids come from a table that SentencePiece fills: the same ids, several times
    as fast. Models for which this does not hold, and `exact=True`, go through SentencePiece for every text.
    """

    MAX_WORDS = 400_000  # entries of the table; about 80 MB

    def __init__(self, model_path, exact=False):
        self.model = load_sentencepiece(model_path)
        bos = self.model.bos_id()
        self.bos = np.array([bos], dtype="<u2").tobytes() if bos >= 0 else b""
        self.words = None
        if not exact and self._words_are_separate():
            self.plain = self._without_normaliser()
            self.words = WordTable(self)
            if any(self._quick(text) != self._slow(text) for text in PROBES):
                self.words = None

    def _words_are_separate(self):
        model, ids = self.model, range(self.model.vocab_size())
        scores = [model.get_score(i) for i in ids]
        # BPE scores are whole merge ranks; a unigram model could break ties differently word by word.
        inside = any(model.id_to_piece(i).rfind("\u2581") > 0 for i in ids)
        return not inside and all(score == int(score) for score in scores)

    def _without_normaliser(self):
        # A protocol-buffer message may repeat a field, and the later one wins: append a normaliser (field 3) that does
        # nothing: name "identity", no character map, no added prefix, no space removal, no escaping.
        import sentencepiece

        spec = b"\x0a\x08identity" + bytes([0x12, 0, 0x18, 0, 0x20, 0, 0x28, 0])
        raw = self.model.serialized_model_proto() + bytes([0x1A, len(spec)]) + spec
        return sentencepiece.SentencePieceProcessor(model_proto=raw)

    def _slow(self, text):
        return np.array(self.model.encode(text), dtype="<u2").tobytes()

    def _quick(self, text):
        words = self.model.normalize(text).replace("\u2581", " \u2581").split(" ")
        return b"".join(map(self.words.__getitem__, words))

    def __call__(self, text):
        """Return BOS and the ids of one document."""
        body = self._slow(text) if self.words is None else self._quick(text)
        return np.frombuffer(self.bos + body, dtype="<u2")

    def check(self, text):
        """Raise InputError if the table and SentencePiece disagree on a text; a guard, not expected to fire."""
        if self.words is not None and self._quick(text) != self._slow(text):
            raise InputError(f"the word table and SentencePiece disagree on {text[:40]!r}...; run again with --exact")


class WordTable(dict):
    """word -> bytes of its ids, filled on demand."""

    def __init__(self, encoder):
        super().__init__({"": b""})
        self.encoder = encoder

    def __missing__(self, word):
        ids = np.array(self.encoder.plain.encode(word), dtype="<u2").tobytes()
        # Frequent words come early, so a full table is left as it is: what follows is rare and would only take memory.
        if len(word) <= 64 and len(self) < Encoder.MAX_WORDS:
            self[word] = ids
        return ids


def train_tokenizer(texts, vocab_size, path, threads=None):
    """Train a BPE model of `vocab_size` pieces with byte fallback on an iterable of texts and write it to `path`.

    Same settings as the challenge's tokenizers: nmt_nfkc, digits apart, pad 0, BOS 1, EOS 2, unknown 3, no prefix.
    Raises InputError if the texts are too few for the vocabulary.
    """
    import sentencepiece

    if not 300 <= vocab_size <= MAX_VOCAB:
        raise InputError(
            f"vocabulary size {vocab_size:,}: expected 300 (4 control and 256 byte pieces come first) to "
            f"{MAX_VOCAB:,} (tokens are uint16)"
        )

    def lines():
        for text in texts:
            for line in text.split("\n"):
                # SentencePiece skips sentences above its limit without a word; cut instead.
                for start in range(0, len(line), 10_000):
                    yield line[start : start + 10_000]

    model = io.BytesIO()
    too_small = f"too little text for {vocab_size} pieces; give more text or a smaller --vocab-size"
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
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
            num_threads=threads or os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"training the tokenizer failed: {too_small} (SentencePiece: {str(error)[:120]})") from None
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if found != vocab_size:
        raise InputError(f"training the tokenizer gave {found} pieces: {too_small}")
    with atomic(path) as file:
        file.write(model.getvalue())


class Source:
    """One input file: yields (line number, raw bytes of one document), and says how far its reading has come."""

    def __init__(self, path, doc_bytes=20_000, separator=None):
        self.path = Path(path)
        self.doc_bytes = doc_bytes
        self.separator = separator.encode() if separator else None
        inner = self.path.with_suffix("") if self.path.suffix in (".xz", ".gz") else self.path
        if inner.suffix not in JSON_ENDS + TEXT_ENDS:
            raise InputError(
                f"input {show(path)}: unknown kind {inner.suffix or 'without ending'!r}; expected "
                f"{', '.join(JSON_ENDS + TEXT_ENDS)}, each also with .xz or .gz"
            )
        self.json = inner.suffix in JSON_ENDS
        if not self.path.is_file():
            raise InputError(f"input {show(path)}: no such file")
        if self.path.stat().st_size == 0:
            raise InputError(f"input {show(path)}: empty file; expected documents")
        self.read_bytes = 0  # of the file as it lies on disk

    def _lines(self):
        opener = {".xz": lzma.open, ".gz": gzip.open}.get(self.path.suffix)
        number = 0
        with open(self.path, "rb") as raw:
            file = io.BufferedReader(opener(raw), BATCH_BYTES) if opener else raw
            try:
                while line := file.readline(MAX_LINE + 1):
                    number += 1
                    if len(line) > MAX_LINE:
                        raise InputError(
                            f"input {show(self.path)} line {number}: longer than {size(MAX_LINE)}; "
                            "expected one document a line"
                        )
                    self.read_bytes = raw.tell()
                    yield number, line[3:] if number == 1 and line.startswith(b"\xef\xbb\xbf") else line
            except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
                raise InputError(
                    f"input {show(self.path)}: damaged or truncated after line {number} ({error}); "
                    "copy or download it again"
                ) from None

    def __iter__(self):
        """Yield (number of the first line, bytes): a JSON line each, or a stretch of plain text."""
        if self.json:
            yield from ((number, line) for number, line in self._lines() if not line.isspace())
            return
        first, held, length = 1, [], 0
        for number, line in self._lines():
            if self.separator is not None:
                end, keep = line.strip() == self.separator, line.strip() != self.separator
            else:
                # Cut at the first blank line after doc_bytes; a text without blank lines is cut at a line's end.
                end = length >= (self.doc_bytes if line.isspace() else 4 * self.doc_bytes)
                keep = True
            if keep:
                held.append(line)
                length += len(line)
            if end:
                if any(not part.isspace() for part in held):
                    yield first, b"".join(held)
                first, held, length = number + 1, [], 0
        if any(not part.isspace() for part in held):
            yield first, b"".join(held)

    def text(self, number, raw):
        """Return the text of one yielded item; raise InputError naming the line if it is not what it should be."""
        where = f"input {show(self.path)} line {number}"
        try:
            if not self.json:
                return raw.decode("utf-8")
            value = json.loads(raw)
        except UnicodeDecodeError as error:
            why = f"{error.reason} at byte {error.start}"
            raise InputError(f"{where}: not UTF-8 ({why}); convert the file to UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f'{where}: not JSON ({error}); expected one {{"text": ...}} a line') from None
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            found = f"keys {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, dict) else type(value).__name__
            raise InputError(f'{where}: no "text" string (found {found}); expected one {{"text": ...}} a line')
        # JSON can spell half of a surrogate pair, which UTF-8 cannot carry.
        return text.encode("utf-8", "replace").decode("utf-8")


def batches(sources, split, skip=0, stop=None):
    """Yield (split, source, [(line number, bytes), ...]) of about BATCH_BYTES, of the documents skip..stop-1."""
    position = 0
    for source in sources:
        held, length = [], 0
        for item in source:
            position += 1
            if position > skip:
                held.append(item)
                length += len(item[1])
            if length >= BATCH_BYTES or (stop is not None and position == stop):
                if held:
                    yield split, source, held
                held, length = [], 0
            if stop is not None and position == stop:
                return
        if held:
            yield split, source, held


_encoder = None  # of a worker process


def start_worker(model_path, exact):
    global _encoder
    _encoder = Encoder(model_path, exact)


def encode_batch(source, items):
    """Return (ids of all documents as bytes, documents, text bytes)."""
    texts = [source.text(*item) for item in items]
    _encoder.check(texts[0][:4000])
    ids = b"".join(_encoder(text).tobytes() for text in texts)
    return ids, len(texts), sum(len(text.encode("utf-8")) for text in texts)


def encode_all(work, model_path, exact, workers):
    """Yield (split, source, result of encode_batch) for the batches of `work`, in order, with few in memory."""
    if workers == 1:
        start_worker(model_path, exact)
        for split, source, items in work:
            yield split, source, encode_batch(source, items)
        return
    # "spawn" on every platform: forking a process that has threads can hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (str(model_path), exact))
    waiting = collections.deque()
    try:
        for split, source, items in work:
            waiting.append((split, source, pool.submit(encode_batch, source, items)))
            if len(waiting) > 2 * workers:
                split, source, result = waiting.popleft()
                yield split, source, result.result()
        while waiting:
            split, source, result = waiting.popleft()
            yield split, source, result.result()
    except BrokenProcessPool:
        raise InputError("a worker process died (out of memory?); run again with --workers 1") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def sample_texts(sources, budget, skip=0):
    """Yield the first texts of every source, an equal share of `budget` bytes each, without the first `skip` of all."""
    for source in sources:
        left = budget // len(sources)
        for item in source:
            if skip:
                skip -= 1
                continue
            if left <= 0:
                break
            text = source.text(*item)
            left -= len(item[1])
            yield text


def tokenize(args):
    """Do the whole job of the command line; return (dataset folder, tokenizer path)."""
    need_trainer()
    inputs = [Source(path, args.doc_bytes, args.separator) for path in args.inputs]
    held_out = [Source(path, args.doc_bytes, args.separator) for path in args.val or ()]
    for source in held_out:
        if any(source.path.samefile(other.path) for other in inputs):
            raise InputError(f"{show(source.path)} is both training input and --val; validation must be held out")
    model_path = Path(args.tokenizer) if args.tokenizer else None
    vocab_size = load_sentencepiece(model_path).vocab_size() if model_path else args.vocab_size
    name = args.name or f"docs_sp{vocab_size}"
    folder = Path(args.out) / "datasets" / name
    if folder.exists() and not args.force:
        raise InputError(f"{show(folder)} already exists; choose another --name or give --force to replace it")
    kept_model = Path(args.out) / "tokenizers" / (model_path.name if model_path else f"{name}_bpe.model")
    if kept_model.exists() and not args.force and not (model_path and sha256_of(model_path) == sha256_of(kept_model)):
        raise InputError(
            f"{show(kept_model)} already exists and is another tokenizer; choose another --name, or --force"
        )
    # Text takes at least about 2 bytes a token and a token takes 2, so shards are at most about as large as the text,
    # and compressed text about four times its file.
    total = sum(source.path.stat().st_size for source in inputs + held_out)
    text_bytes = sum(
        source.path.stat().st_size * (4 if source.path.suffix in (".xz", ".gz") else 1) for source in inputs + held_out
    )
    need_space(args.out, text_bytes, "tokenizing these inputs")

    with building(folder, args.force) as new:
        if not model_path:
            started = time.time()
            print(
                f"training a tokenizer of {vocab_size} pieces on up to {args.tokenizer_mb} MB of text ...", flush=True
            )
            model_path = new / "new.model"
            train_tokenizer(
                sample_texts(inputs, args.tokenizer_mb * 1_000_000, args.val_docs or 0), vocab_size, model_path
            )
            print(f"trained in {time.time() - started:.0f} s", flush=True)
        if held_out:
            work = itertools.chain(batches(held_out, "val"), batches(inputs, "train"))
        else:
            work = itertools.chain(
                batches(inputs, "val", stop=args.val_docs), batches(inputs, "train", skip=args.val_docs)
            )
        writers = {split: ShardWriter(new, split, args.shard_tokens) for split in ("val", "train")}
        stats = {split: {"documents": 0, "text_bytes": 0} for split in writers}
        started = time.time()
        seen = 0
        with progress(total, "tokenizing") as bar:
            for split, _, (ids, documents, text_bytes) in encode_all(work, model_path, args.exact, args.workers):
                writers[split].add(np.frombuffer(ids, dtype="<u2"))
                stats[split]["documents"] += documents
                stats[split]["text_bytes"] += text_bytes
                read = sum(source.read_bytes for source in inputs + held_out)
                bar.update(max(0, read - seen))
                seen = max(seen, read)
        seconds = time.time() - started + 1e-9
        files = {split: writer.close() for split, writer in writers.items()}
        for split, writer in writers.items():
            if not writer.tokens:
                hint = (
                    f"--val-docs {args.val_docs} takes all {stats['val']['documents']} documents"
                    if split == "train" and not held_out
                    else f"the {'--val file' if split == 'val' else 'input'} has no document"
                )
                raise InputError(
                    f"no {'training' if split == 'train' else 'validation'} text: {hint}; give more text"
                    + (" or a smaller --val-docs" if split == "train" and not held_out else "")
                )
            stats[split]["tokens"] = writer.tokens
        if args.tokenizer is None or not kept_model.exists() or not kept_model.samefile(model_path):
            with atomic(kept_model) as file, open(model_path, "rb") as source:
                shutil.copyfileobj(source, file)
        (new / "new.model").unlink(missing_ok=True)
        import sentencepiece

        write_json(
            new / "manifest.json",
            {
                "name": name,
                "made_by": "data/tokenize_docs.py",
                "tokenizer": {
                    "path": f"tokenizers/{kept_model.name}",
                    "vocab_size": vocab_size,
                    "bos_id": load_sentencepiece(kept_model).bos_id(),
                    "sha256": sha256_of(kept_model),
                },
                "splits": {split: {**stats[split], "files": files[split]} for split in ("train", "val")},
                "sources": {
                    split: [file_entry(source.path) for source in sources]
                    for split, sources in (("train", inputs), ("val", held_out))
                },
                "val_docs": args.val_docs,
                "versions": {"sentencepiece": sentencepiece.__version__},
            },
        )
    text_bytes = sum(part["text_bytes"] for part in stats.values())
    tokens = sum(writer.tokens for writer in writers.values())
    print(
        f"{size(text_bytes)} of text -> {tokens:,} tokens ({text_bytes / tokens:.2f} bytes a token) in "
        f"{seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s; {size(2 * tokens + HEADER_BYTES)} in {show(folder)}"
    )
    return folder, kept_model


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("inputs", nargs="+", help="training documents: .jsonl, .txt or .md, each also .xz or .gz")
    parser.add_argument("--tokenizer", help="SentencePiece .model to use")
    parser.add_argument("--vocab-size", type=int, help="train a BPE tokenizer of this many pieces instead")
    parser.add_argument("--val", nargs="+", metavar="FILE", help="validation documents in files of their own")
    parser.add_argument("--val-docs", type=int, metavar="N", help="or: hold out the first N documents of the inputs")
    parser.add_argument("--name", help="of the dataset folder (default docs_sp<vocabulary size>)")
    parser.add_argument("--out", default=str(DATA_ROOT), help="root of datasets/ and tokenizers/ (default: data/)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens in a shard (default 100,000,000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument(
        "--tokenizer-mb", type=int, default=20, help="text to train the tokenizer on, in MB (default 20)"
    )
    parser.add_argument(
        "--doc-bytes",
        type=int,
        default=20_000,
        help="plain text is cut at the first blank line after this many bytes (default 20,000)",
    )
    parser.add_argument("--separator", help="plain text: a line that ends a document, instead of --doc-bytes")
    parser.add_argument("--exact", action="store_true", help="ask SentencePiece for every text, without the word table")
    parser.add_argument("--force", action="store_true", help="replace an existing dataset of this name")
    args = parser.parse_args(argv)
    if bool(args.tokenizer) == (args.vocab_size is not None):
        raise InputError("give either --tokenizer FILE.model (use it) or --vocab-size N (train a new one)")
    if bool(args.val) == (args.val_docs is not None):
        raise InputError("give either --val FILE (held-out documents) or --val-docs N (the first N documents)")
    if args.vocab_size is not None and not 300 <= args.vocab_size <= MAX_VOCAB:
        raise InputError(
            f"--vocab-size {args.vocab_size}: expected 300 (4 control and 256 byte pieces come first) to "
            f"{MAX_VOCAB} (tokens are uint16)"
        )
    for flag in ("val_docs", "shard_tokens", "workers", "tokenizer_mb", "doc_bytes"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise InputError(f"--{flag.replace('_', '-')} {value}: expected a whole number of at least 1")
    if args.name and (Path(args.name).name != args.name or args.name.startswith(".")):
        raise InputError(f"--name {args.name!r}: expected a plain folder name")
    return args


def main(argv=None):
    finish(*tokenize(parse(argv)))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
