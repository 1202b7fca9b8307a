"""Shards, the token stream, byte counting, and scoring: the same tokens whatever the machine, each counted once."""

import io
import math
import pydoc_data.topics
import re
import types

import numpy as np
import pytest
import sentencepiece as spm
from conftest import assert_refused, random_weights, run_in_process, tree, write_dataset, write_shard

# ---------------------------------------------------------------------------------------------------------------------
# The token stream
# ---------------------------------------------------------------------------------------------------------------------


def stream_of(module, data):
    return module.TokenStream(module.find_shards(str(data.path), "train", 320), 320)


def test_read_crosses_shards_and_wraps(script, data):
    stream = stream_of(script, data)
    assert stream.total == len(data.train) == 3001 and len(stream.shards) == 3
    endless = np.concatenate([data.train] * 4).astype(np.int64)
    for start, count in [
        (0, 1),
        (1100, 40),
        (1110, 300),
        (0, 3001),
        (2990, 20),
        (3000, 2),
        (3001, 5),
        (2999, 6010),
        (5000, 7),
    ]:
        got = stream.read(start, count)
        assert got.dtype == np.int64 and np.array_equal(got, endless[start : start + count]), (start, count)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("largest", [32, 64, 96, 100, 8192])
def test_same_tokens_for_every_world_and_microbatch(script, data, config, world, largest):
    c = config(script)  # 8 sequences of 32: unequal shares for three ranks
    stream = stream_of(script, data)
    endless = np.concatenate([data.train] * 3).astype(np.int64)
    for step in (0, 1, 4, 11, 12):  # 4 crosses the first shard, 11 wraps, 12 comes after
        start = step * 256
        inputs, targets = [], []
        for rank in range(world):
            sizes = []
            for x, y in stream.microbatches(start, c, rank, world, largest):
                assert x.shape == y.shape and x.shape[1] == 32 and x.size <= max(largest, 32)
                sizes.append(len(x))
                inputs.append(np.array(x))
                targets.append(np.array(y))
            assert sum(sizes) in (8 // world, -(-8 // world)) and max(sizes) - min(sizes) <= 1
        assert np.array_equal(np.concatenate(inputs).ravel(), endless[start : start + 256])
        assert np.array_equal(np.concatenate(targets).ravel(), endless[start + 1 : start + 257])


def test_consecutive_steps_overlap_by_one_token(script, data, config):
    """The target of a step's last position is the input of the next step's first: every token is a target once."""
    c, stream = config(script), stream_of(script, data)
    seen = [y for step in range(11) for _, y in stream.microbatches(256 * step, c, 0, 1, 64)]
    assert np.array_equal(np.concatenate(seen).ravel(), data.train[1 : 11 * 256 + 1].astype(np.int64))


def test_steps_see_the_same_tokens_in_training(script, data, tiny, tmp_path, monkeypatch):
    """What the engine is fed in a real run, over a wrap, with a microbatch of three sequences."""
    read, seen = script.TokenStream.read, []

    def note(self, start, count):
        seen.append((start, count))
        return read(self, start, count)

    monkeypatch.setattr(script.TokenStream, "read", note)
    outcome = run_in_process(
        script, "--run_id=a", "--iterations=14", "--microbatch_tokens=96", "--loop_schedule=", **tiny
    )
    assert outcome.code == 0, outcome
    expected = [(256 * step + 32 * a, 32 * (b - a) + 1) for step in range(14) for a, b in ((0, 2), (2, 5), (5, 8))]
    assert seen[-len(expected) :] == expected  # before them come those of the warm-up
    assert "epoch:2" in outcome.out  # 3001 tokens are read again


# ---------------------------------------------------------------------------------------------------------------------
# Shards that are refused
# ---------------------------------------------------------------------------------------------------------------------

GOOD = np.arange(2000) % 300
BAD_SHARDS = {
    "empty file": (lambda p: p.write_bytes(b""), "expected .*header", "found 0"),
    "shorter than a header": (lambda p: p.write_bytes(b"\0" * 700), "expected .*header", "found 700"),
    "no tokens": (lambda p: write_shard(p, []), "expected tokens", "found"),
    "negative count": (lambda p: write_shard(p, GOOD, count=-5), "expected", "found"),
    "foreign": (lambda p: p.write_bytes(b"PK\x03\x04" * 1000), "expected magic 20240520", "found"),
    "other magic": (lambda p: write_shard(p, GOOD, magic=20240519), "expected magic 20240520", "found 20240519"),
    "other version": (lambda p: write_shard(p, GOOD, version=2), "expected .*version 1", "found .*2"),
    "cut short": (
        lambda p: (write_shard(p, GOOD), p.write_bytes(p.read_bytes()[:-100])),
        "expected 5024 bytes",
        "found 4924",
    ),
    "half copied": (lambda p: write_shard(p, GOOD[:1000], count=2000), "expected 5024 bytes", "found 3024"),
    "oversized": (lambda p: write_shard(p, GOOD, count=1990), "expected 5004 bytes", "found 5024"),
    "odd size": (
        lambda p: (write_shard(p, GOOD), p.write_bytes(p.read_bytes() + b"x")),
        "expected 5024 bytes",
        "found 5025",
    ),
    "out of vocabulary": (lambda p: write_shard(p, [*GOOD[:500], 320]), "VOCAB_SIZE=320", "found 320"),
    "link to nothing": (lambda p: p.symlink_to("gone.bin"), "expected", "found"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shard(script, case, split, tiny, tmp_path):
    make, *patterns = BAD_SHARDS[case]
    folder = write_dataset(tmp_path / "d", [GOOD, GOOD], [GOOD])
    path = folder / f"fineweb_{split}_000001.bin"
    path.unlink(missing_ok=True)
    make(path)
    before = tree(tmp_path)
    outcome = run_in_process(script, **tiny | {"DATA_PATH": folder})
    # Each names the file, what was expected and found, and how to mend it.
    assert_refused(outcome, re.escape(str(path)), *patterns, "data tool|delete|download|python data/|tokenizer|copy")
    assert tree(tmp_path) == before


def test_missing_shards(script, tiny, tmp_path):
    for split in ("train", "val"):
        folder = write_dataset(tmp_path / split, *([[], [GOOD]] if split == "train" else [[GOOD], []]))
        outcome = run_in_process(script, **tiny | {"DATA_PATH": folder})
        assert_refused(
            outcome, re.escape(str(folder)), f"expected fineweb_{split}_", "found none", "DATA_PATH", "python data/"
        )
    assert not (tmp_path / "logs").exists()


def test_wrong_token_in_the_middle_of_a_shard(script, tiny, tmp_path):
    """A start-up check of every token would take minutes at 8 billion tokens: they are checked as they are read."""
    ids = np.tile(GOOD, 100)
    ids[100_000] = 65535
    folder = write_dataset(tmp_path / "d", [GOOD, ids], [GOOD])
    path = str(folder / "fineweb_train_000001.bin")
    stream = script.TokenStream(script.find_shards(str(folder), "train", 320), 320)
    stream.read(2000, 90_000)
    with pytest.raises(script.InputError, match=re.escape(path) + ".*VOCAB_SIZE=320, found 65535"):
        stream.read(2000 + 99_990, 20)
    folder = write_dataset(tmp_path / "e", [GOOD], [GOOD, ids])  # validation tokens are all read: nothing starts
    before = tree(tmp_path)
    outcome = run_in_process(script, **tiny | {"DATA_PATH": folder})
    assert_refused(outcome, "VOCAB_SIZE=320", "found 65535", "fineweb_val_000001.bin")
    assert tree(tmp_path) == before


def test_wrong_token_found_while_training(script, tiny, tmp_path):
    ids = np.tile(GOOD, 100)
    ids[100_000] = 65535  # beyond the first and the last 65,536, which are checked at the start
    folder = write_dataset(tmp_path / "d", [ids], [GOOD])
    # The first step ends before it, the second reads it.
    flags = ("--run_id=a", "--train_batch_tokens=65536", "--iterations=3", "--layout=1", "--loop_schedule=")
    outcome = run_in_process(script, *flags, **tiny | {"DATA_PATH": folder})
    assert outcome.code == 1 and outcome.err.count("\n") <= 1, outcome
    line = outcome.err or outcome.out.splitlines()[-1]
    assert re.search("fineweb_train_000000.bin.*VOCAB_SIZE=320.*found 65535", line)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.rgpt"))


def test_validation_shorter_than_one_sequence(script, tiny, tmp_path):
    folder = write_dataset(tmp_path / "short", [GOOD], [GOOD[:32]])
    before = tree(tmp_path)
    outcome = run_in_process(script, **tiny | {"DATA_PATH": folder})
    assert_refused(outcome, re.escape(str(folder)), "TRAIN_SEQ_LEN=32", "found 32 tokens", "lower TRAIN_SEQ_LEN")
    assert tree(tmp_path) == before
    folder = write_dataset(tmp_path / "enough", [GOOD], [GOOD[:20], GOOD[20:33]])  # 33 tokens make one sequence
    c = script.load_config([], tiny | {"DATA_PATH": str(folder)}, "smoke")[0]
    assert np.array_equal(script.Score(c).tokens, GOOD[:33])


def test_validation_prefix_is_labelled_partial(any_script, config, tiny, tmp_path):
    whole = 1499 // 32 * 32
    for limit, length, partial in ((0, whole, False), (100, 96, True), (whole, whole, False), (10**6, whole, False)):
        score = any_script.Score(config(any_script, val_max_tokens=limit))
        assert (len(score.tokens) - 1, score.partial) == (length, partial)
    outcome = run_in_process(any_script, "--run_id=a", "--iterations=2", "--val_max_tokens=100", **tiny)
    lines = [line for line in outcome.out.splitlines() if "val_bpb" in line and "exact" not in line]
    assert outcome.code == 0 and len(lines) >= 2 and all("partial" in line for line in lines), lines


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------


def real_documents():
    """Text that every machine with Python has, and characters that no tokenizer of 512 pieces knows."""
    topics = list(pydoc_data.topics.topics.values())
    docstrings = [
        x.__doc__
        for m in (io, math, types, re, np.linalg, spm)
        for x in vars(m).values()
        if getattr(x, "__doc__", None)
    ]
    written = [
        "Crème brûlée, naïve façade, Łódź, Ærøskøbing; ½ of 10 € is 5 €.",
        "日本語の文章です。漢字とかな。",
        "Привет, мир! Ещё раз.",
        "😀 at the start, 👩‍👩‍👧‍👦 in the middle, at the end 🏴‍☠️",
        "🦜",
        "é",
        "a",
        " ",
        "x" * 1000,
        "שלום עולם, مرحبا",
        "tab\tline\nend\n\n",
        "  two spaces before,  two between, two after  ",
        "zero width​joined",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 and ﬁ ligature, Ⅷ, ①",
        "▁ the marker itself ▁▁",
    ]
    return [text for text in topics + docstrings + written if isinstance(text, str) and text]


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def trained(request):
    """A tokenizer with byte fallback, trained on a third of the English text only."""
    texts = [line for text in real_documents()[:60:3] for line in text.splitlines() if line.isascii()]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=512,
        model_type=request.param,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def test_bytes_of_a_document_are_those_of_its_text(script, trained):
    tables = script.byte_tables(trained, 512)
    documents, total, stream = real_documents(), 0, []
    assert len(documents) > 150
    multibyte = fallback = 0
    for text in documents:
        ids = [trained.bos_id(), *trained.encode(text)]
        decoded = trained.decode(ids)
        assert script.count_bytes(np.array(ids, dtype=np.uint16), tables) == len(decoded.encode("utf-8")), repr(
            text[:80]
        )
        multibyte += not decoded.isascii()
        fallback += any(trained.is_byte(i) for i in ids)
        total += len(decoded.encode("utf-8"))
        stream += ids
    assert multibyte >= 10 and fallback >= 10  # the test sees what it is about
    assert script.count_bytes(np.array(stream, dtype=np.uint16), tables) == total  # end to end, as in a shard


def test_bytes_without_start_of_document_count_the_space(script, trained):
    """A piece with a space marker after ordinary text stands for its space, too; in the middle of a document."""
    tables = script.byte_tables(trained, 512)
    ids = np.array([trained.bos_id(), *trained.encode("the first word and the next words")], dtype=np.uint16)
    for cut in range(1, len(ids) - 1):
        rest = script.count_bytes(ids[cut:], tables)
        assert rest == script.count_bytes(ids, tables) - script.count_bytes(ids[: cut + 1], tables)
    control = [i for i in range(512) if trained.is_control(i) or trained.is_unknown(i)]
    assert control and all(tables[2][control]) and not tables[0][control].any() and tables[2].sum() == len(control)
    assert all(tables[0][i] == 1 and not tables[1][i] for i in range(512) if trained.is_byte(i))


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


class CountingEngine:
    """Stands in for a model: the loss of a token is 2 to the power of nothing but itself, so that a sum shows which
    tokens were scored, and how many tokens of context each had is written down."""

    def __init__(self, rank, world, largest):
        self.rank, self.world, self.largest, self.seen = rank, world, largest, {}

    def token_losses(self, ids, targets, loops):
        assert ids.shape == targets.shape and (targets == ids + 1).all()
        return targets.astype(np.float32)

    def sum(self, value):
        return value

    agree_sum = sum


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("stride", [0, 1, 8, 16, 32])
def test_every_token_is_scored_once(script, config, world, stride):
    c = config(script, eval_stride=stride)
    for sequences in (1, 2, 7, 20):
        tokens = np.arange(sequences * 32 + 1)
        for largest in (32, 100, 8192):
            parts = [script.evaluate(c, CountingEngine(rank, world, largest), tokens, 1) for rank in range(world)]
            assert sum(parts) * (len(tokens) - 1) == pytest.approx(tokens[1:].sum(), rel=1e-12), (sequences, largest)


@pytest.fixture(scope="session")
def engine_of():
    """`engine_of(module, c, weights)`: an engine for scoring."""

    def make(module, c, weights):
        engine = module.Engine(c)
        engine.build(weights, training=False)
        return engine

    return make


@pytest.mark.parametrize("stride", [0, 8, 16])
def test_evaluate_equals_naive_scoring(script, config, data, engine_of, stride):
    """Token t is scored in the last window that starts early enough: recomputed here, one window at a time."""
    c = config(script, eval_stride=stride, microbatch_tokens=96)
    engine = engine_of(script, c, random_weights(script, c))
    tokens, length, step = data.val[: 9 * 32 + 1].astype(np.int64), 32, stride or 32
    losses = np.zeros(len(tokens))
    for t in range(1, len(tokens)):
        start = 0 if t <= length else -(-(t - length) // step) * step
        if t <= length or start + length == t:  # the last token of a window: score its new ones
            row = engine.token_losses(
                tokens[None, start : start + length], tokens[None, start + 1 : start + length + 1], 2
            )[0]
            first = 1 if start == 0 else start + length - step + 1
            losses[first : start + length + 1] = row[first - start - 1 :]
    assert (losses[1:] > 0).all()
    assert script.evaluate(c, engine, tokens, 2) == pytest.approx(losses[1:].mean(), rel=1e-5)
    if stride:  # more context: not the same number
        plain = script.evaluate(config(script), engine, tokens, 2)
        assert abs(plain - losses[1:].mean()) > 1e-6


def test_bits_per_byte(script, config, data):
    """val_bpb = nats / ln 2 x tokens / bytes, bytes from the decoded text."""
    c = config(script)
    score = script.Score(c)
    tokenizer = spm.SentencePieceProcessor(model_file=str(data.tokenizer))
    tokens = data.val[: len(score.tokens)]
    bounds = [*np.flatnonzero(tokens == tokenizer.bos_id()), len(tokens)]
    assert bounds[0] == 0
    size = sum(len(tokenizer.decode(tokens[a:b].tolist()).encode()) for a, b in zip(bounds, bounds[1:]))
    assert score.bytes == size
    assert score.bpb(2.0) == pytest.approx(2.0 / math.log(2) * (len(tokens) - 1) / size)
