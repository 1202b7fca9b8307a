"""Text for hf.py: documents, rows of tokens to train on, windows that score every byte of a text once."""

import json
import lzma
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hf_backend  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from tool import InputError

END_OF_TEXT = "<|endoftext|>"
CHUNK = 512  # tokens whose logits are held at one time


def documents(path: Path) -> Iterator[str]:
    """The documents of a .jsonl or .jsonl.xz of {"text": ...}, or a .txt file as one. Raises InputError."""
    name = path.name.removesuffix(".xz")
    if not name.endswith((".jsonl", ".txt")):
        raise InputError(f"{path}: expected .jsonl, .jsonl.xz, .txt or .txt.xz, found another ending")
    opener = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if name.endswith(".txt"):
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                yield document_of(path, number, line)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8, found other bytes ({error}); convert it with iconv") from None
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path}: expected a whole .xz file, found damage ({error}); copy it again") from None


def document_of(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}: line {number}: expected a JSON object, found none ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise InputError(f'{path}: line {number}: expected {{"text": "..."}}, found {line[:60].strip()}')
    return value["text"]


def first_bytes(texts: Iterator[str], most: int) -> list[str]:
    """Documents up to `most` bytes of UTF-8; the last is cut at a character. 0: all."""
    out, left = [], most or math.inf
    for text in texts:
        size = len(text.encode())
        if size > left:
            text = text.encode()[: int(left)].decode(errors="ignore")
        if text:
            out.append(text)
        left -= size
        if left <= 0:
            break
    return out


class Encoder:
    """Documents into tokens, each after the token that opens a document for this parent."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.start, self.why = self._find_start()

    def _find_start(self) -> tuple[int, str]:
        own = self.tokenizer.encode("")
        if own:
            return own[0], "the tokenizer puts it there itself"
        vocab = self.tokenizer.get_vocab()
        if END_OF_TEXT in vocab:
            return vocab[END_OF_TEXT], f"{END_OF_TEXT} parts the documents of its training"
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if value is not None:
                return value, name
        raise InputError("tokenizer: expected a token that opens a document (BOS or EOS), found none; name one in "
                         "tokenizer_config.json")  # fmt: skip

    def __call__(self, text: str) -> list[int]:
        return [self.start, *self.tokenizer.encode(text, add_special_tokens=False, verbose=False)]


def training_rows(texts: Iterator[str], encode: Encoder, length: int, most: int) -> np.ndarray:
    """(n, length + 1) tokens: documents one after another, cut where a row is full; n is at most `most`."""
    stream, need = [], most * length + 1
    for text in texts:
        stream += encode(text)
        if len(stream) >= need:
            break
    count = min(most, (len(stream) - 1) // length)
    if count < 1:
        raise InputError(f"text: expected at least {length + 1} tokens for a row, found {len(stream)}; give more text "
                         "or a smaller --length")  # fmt: skip
    return np.stack([np.array(stream[i * length : (i + 1) * length + 1], np.int32) for i in range(count)])


@dataclass
class Windows:
    """A text to score. Every token after a document's first is a target exactly once, so the bytes are the text's."""

    rows: list[np.ndarray]  # each up to length + 1 tokens
    tokens: int  # targets
    bytes: int

    def bits_per_byte(self, loss: float) -> float:
        return loss * self.tokens / self.bytes / math.log(2)


def scoring_windows(texts: list[str], encode: Encoder, length: int) -> Windows:
    """Cuts every document into windows of `length` targets, each window with the last token of the one before it."""
    rows = []
    for text in texts:
        ids = encode(text)
        rows += [np.array(ids[i : i + length + 1], np.int32) for i in range(0, len(ids) - 1, length)]
    size = sum(len(text.encode()) for text in texts)
    if not rows or not size:
        raise InputError("text: expected a text to score, found an empty one")
    return Windows(rows, sum(len(row) - 1 for row in rows), size)


def cross_entropy_sum(logits: mx.array, targets: mx.array) -> mx.array:
    """Sum of -log p, nats, computed in float32. Logits (n, vocabulary), targets (n)."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (mx.logsumexp(logits, axis=-1) - chosen).sum()


def score(model, windows: Windows, passes: int, batch: int = 4) -> float:
    """Mean loss, nats a token, of a recurrent model at `passes` passes. Leaves the model in the mode it was in."""
    training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(windows.rows), batch):
        rows = windows.rows[start : start + batch]
        longest = max(len(row) for row in rows)
        padded = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
        real = np.concatenate([np.arange(longest - 1) < len(row) - 1 for row in rows])
        kept = mx.array(np.flatnonzero(real))  # causal: what stands behind a row's end does not reach it
        h = model.hidden(mx.array(padded[:, :-1]), passes)
        h = h.reshape(-1, h.shape[-1])[kept]
        targets = mx.array(padded[:, 1:].reshape(-1))[kept]
        for i in range(0, h.shape[0], CHUNK):
            total += cross_entropy_sum(model.head(h[i : i + CHUNK]), targets[i : i + CHUNK]).item()
    model.train(training)
    return total / windows.tokens
