"""Shards, the token stream, byte counting, and scoring: the same tokens whatever the machine, each counted once."""

import dataclasses
import hashlib
import io
import json
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


SEQUENCES = [1110 // 32, 288 // 32, 1600 // 32]  # of the three shards; each target needs a token after it
TOTAL = sum(SEQUENCES)
ORDER = ([0, 25, 24, 20, 28, 19, 6, 17], [5, 24, 27, 13, 15, 11, 18, 25])  # the first shard's, of seed 1337


def stream_of(module, data, c):
    return module.TokenStream(module.find_shards(str(data.path), "train", 320), c)


def numbers_of(data, rows):
    """Which sequence of the data each row [32] of inputs is, from 0, shard by shard."""
    starts = np.concatenate([np.arange(n) * 32 + at for n, at in zip(SEQUENCES, (0, 1111, 1400))])
    known = {data.train[at : at + 32].tobytes(): i for i, at in enumerate(starts)}
    assert len(known) == TOTAL  # no two are alike, so that a sequence is known by its tokens
    return [known[row.astype(np.uint16).tobytes()] for row in rows]


def read(stream, start, batch=256, rank=0, world=1, largest=8192):
    """(inputs, targets) [sequences, 32] of one share of a batch."""
    parts = list(stream.microbatches(start, batch, rank, world, largest))
    return tuple(np.concatenate([part[side] for part in parts]) for side in (0, 1))


def order_of(module, data, c, epochs=1):
    """The numbers of the sequences that are drawn, in order."""
    return numbers_of(data, read(stream_of(module, data, c), 0, 32 * TOTAL * epochs)[0])


def test_every_sequence_is_drawn_once_an_epoch_in_an_order_of_its_own(script, data, config):
    c = config(script)
    stream = stream_of(script, data, c)
    assert stream.total == 32 * TOTAL and len(stream.shards) == 3
    first, second = np.split(np.array(order_of(script, data, c, epochs=2)), 2)
    assert sorted(first) == sorted(second) == list(range(TOTAL))
    bounds = np.cumsum([0, *SEQUENCES])
    for low, high in zip(bounds, bounds[1:]):  # shard after shard: a disk reads one file at a time
        assert set(first[low:high]) == set(second[low:high]) == set(range(low, high))
        assert list(first[low:high]) != list(range(low, high)) != list(second[low:high])
        assert list(first[low:high]) != list(second[low:high])
    neighbours = sum(b - a == 1 for a, b in zip(first, first[1:]))
    assert neighbours < 10  # by chance, one a shard


def test_the_order_is_made_by_the_seed_the_epoch_and_the_shard(script, data, config, tmp_path):
    c = config(script)
    first = order_of(script, data, c)
    assert order_of(script, data, c) == first
    assert order_of(script, data, dataclasses.replace(c, seed=c.seed + 1)) != first
    same = config(script, train_batch_tokens=64, iterations=3, microbatch_tokens=32, preset="demo", run_id="b")
    assert order_of(script, data, same) == first  # nothing else does
    folder = write_dataset(tmp_path / "d", [GOOD] * 3, [GOOD])  # shards of one length
    stream = script.TokenStream(script.find_shards(str(folder), "train", 320), c)
    assert len({tuple(stream.permutation(epoch, shard)) for epoch in range(5) for shard in range(3)}) == 15


def test_the_order_is_the_same_in_both_scripts_and_in_later_versions(both, data, config):
    orders = [order_of(module, data, config(module, seed=1337), epochs=2) for module in both]
    assert orders[0] == orders[1]
    # Written down: a resumed run, and a repeated one, must read what the first one read.
    assert orders[0][:8] == ORDER[0] and orders[0][TOTAL : TOTAL + 8] == ORDER[1]


def test_contiguous_order_without_shuffling(script, data, config):
    c = config(script, shuffle=False)
    assert order_of(script, data, c, epochs=2) == 2 * list(range(TOTAL))


@pytest.mark.parametrize("shuffle", [True, False])
def test_targets_are_the_tokens_after_the_inputs(script, data, config, shuffle):
    c = config(script, shuffle=shuffle)
    inputs, targets = read(stream_of(script, data, c), 0, 32 * TOTAL)
    assert inputs.dtype == targets.dtype == np.int64 and inputs.shape == targets.shape == (TOTAL, 32)
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    text = data.train.astype(np.int64)
    starts = np.concatenate([np.arange(n) * 32 + at for n, at in zip(SEQUENCES, (0, 1111, 1400))])
    assert np.array_equal(targets[:, -1], text[starts[numbers_of(data, inputs)] + 32])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("largest", [32, 64, 96, 100, 8192])
def test_same_tokens_for_every_world_and_microbatch(script, data, config, world, largest):
    c = config(script)  # 8 sequences of 32: unequal shares for three ranks
    stream = stream_of(script, data, c)
    endless = read(stream, 0, 14 * 256)
    for step in (0, 1, 4, 11, 12):  # 4 crosses the first shard, 11 begins anew, 12 comes after
        inputs, targets = [], []
        for rank in range(world):
            sizes = []
            for x, y in stream.microbatches(step * 256, 256, rank, world, largest):
                assert x.shape == y.shape and x.shape[1] == 32 and x.size <= max(largest, 32)
                sizes.append(len(x))
                inputs.append(x)
                targets.append(y)
            assert sum(sizes) in (8 // world, -(-8 // world)) and max(sizes) - min(sizes) <= 1
        for found, expected in zip((inputs, targets), endless):
            assert np.array_equal(np.concatenate(found), expected[8 * step : 8 * step + 8])


def test_a_stream_that_begins_in_the_middle_reads_the_same(script, data, config):
    """As after a resume: a place in the stream is a number of tokens, and nothing else is remembered."""
    c = config(script)
    whole = [read(stream_of(script, data, c), 256 * step) for step in range(14)]
    late = stream_of(script, data, c)
    for step in (13, 5, 11, 5):
        for found, expected in zip(read(late, 256 * step), whole[step]):
            assert np.array_equal(found, expected)


def noting_batches(monkeypatch, module):
    """The list to which every microbatch that is read from now on is added."""
    seen, microbatches = [], module.TokenStream.microbatches

    def note(self, *args):
        for inputs, targets in microbatches(self, *args):
            seen.append(inputs)
            yield inputs, targets

    monkeypatch.setattr(module.TokenStream, "microbatches", note)
    return seen


def test_training_reads_the_stream_across_epochs_and_a_resume(script, data, config, tiny, tmp_path, monkeypatch):
    """What the engine is fed in a real run, with a microbatch of three sequences; again from step 5 on after a stop."""
    seen = noting_batches(monkeypatch, script)
    flags = ("--run_id=a", "--iterations=14", "--microbatch_tokens=96", "--loop_schedule=", "--layout=1", "--shuffle=1")
    outcome = run_in_process(script, *flags, "--checkpoint_every=5", **tiny)
    assert outcome.code == 0 and "epoch:2" in outcome.out, outcome  # 94 sequences are 11.75 steps
    batches = seen[3:]  # after those of the warm-up
    assert [len(batch) for batch in batches] == 14 * [2, 3, 3]
    expected = order_of(script, data, config(script), epochs=2)[: 14 * 8]
    assert numbers_of(data, np.concatenate(batches)) == expected

    def stop_at_5(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise RuntimeError("killed")

    save = script.save_checkpoint
    monkeypatch.setattr(script, "save_checkpoint", stop_at_5)
    with pytest.raises(RuntimeError, match="killed"):
        run_in_process(script, *flags, "--run_id=b", "--checkpoint_every=5", **tiny)
    monkeypatch.setattr(script, "save_checkpoint", save)
    seen.clear()
    assert run_in_process(script, *flags, "--run_id=b", "--resume", **tiny).code == 0
    assert numbers_of(data, np.concatenate(seen[3:])) == expected[5 * 8 :]


def test_shards_shorter_than_a_sequence_are_passed_over(script, config, tmp_path):
    c = config(script)
    folder = write_dataset(tmp_path / "d", [GOOD[:20], GOOD[:33], GOOD[:32], GOOD[:97]], [GOOD])
    paths = script.find_shards(str(folder), "train", 320)
    stream = script.TokenStream(paths, c)
    assert stream.total == 4 * 32
    inputs, _ = read(stream, 0, 8 * 32)
    assert [sorted(set(row)) for row in inputs[[0, 4]].tolist()] == 2 * [list(range(32))]
    assert {int(row[0]) for row in inputs[1:4]} == {0, 32, 64} == {int(row[0]) for row in inputs[5:]}
    with pytest.raises(script.InputError, match="expected a shard longer than TRAIN_SEQ_LEN=32, found none"):
        script.TokenStream([paths[0], paths[2]], c)


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


def test_wrong_token_in_the_middle_of_a_shard(script, config, tiny, tmp_path):
    """A start-up check of every token would take minutes at 8 billion tokens: they are checked as they are read."""
    ids = np.tile(GOOD, 100)
    ids[100_000] = 65535
    folder = write_dataset(tmp_path / "d", [GOOD, ids], [GOOD])
    path = str(folder / "fineweb_train_000001.bin")
    stream = script.TokenStream(script.find_shards(str(folder), "train", 320), config(script, shuffle=False))
    read(stream, 1984, 32 * 2000)
    with pytest.raises(script.InputError, match=re.escape(path) + ".*VOCAB_SIZE=320, found 65535"):
        read(stream, 1984 + 32 * (100_000 // 32), 32)
    folder = write_dataset(tmp_path / "e", [GOOD], [GOOD, ids])  # validation tokens are all read: nothing starts
    before = tree(tmp_path)
    outcome = run_in_process(script, **tiny | {"DATA_PATH": folder})
    assert_refused(outcome, "VOCAB_SIZE=320", "found 65535", "fineweb_val_000001.bin")
    assert tree(tmp_path) == before


def test_wrong_token_found_while_training(script, config, tiny, tmp_path):
    """In a sequence of the second step, far from the edges of the shard, which are checked at the start."""
    ids = np.tile(GOOD, 100)
    folder = write_dataset(tmp_path / "d", [ids], [GOOD])
    order = script.TokenStream(script.find_shards(str(folder), "train", 320), config(script)).permutation(0, 0)
    place = next(32 * number for number in order[8:16].tolist() if 70_000 < 32 * number < len(ids) - 70_000)
    ids[place + 9] = 65535
    write_dataset(folder, [ids], [GOOD])
    flags = ("--run_id=a", "--iterations=3", "--layout=1", "--loop_schedule=")
    outcome = run_in_process(script, *flags, **tiny | {"DATA_PATH": folder})
    assert outcome.code == 1 and outcome.err.count("\n") == 1, outcome
    assert re.search("^error: .*fineweb_train_000000.bin.*VOCAB_SIZE=320.*found 65535", outcome.err)
    assert "warm_up: " in outcome.out  # it had begun
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


def train_tokenizer(texts, escape_whitespaces=True, **settings):
    """The serialized SentencePiece model of these trainer settings."""
    model = io.BytesIO()
    settings = {"vocab_size": 512, "byte_fallback": True, "model_type": "bpe", "hard_vocab_limit": False} | settings
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, num_threads=1, minloglevel=2, **settings
    )
    # The trainer refuses this setting of the normalizer; in protobuf what is appended replaces what was said before.
    return model.getvalue() + (b"" if escape_whitespaces else b"\x1a\x02\x28\x00")


def processor_of(model):
    return spm.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def trained(request):
    """A tokenizer with byte fallback, trained on a third of the English text only."""
    texts = [line for text in real_documents()[:60:3] for line in text.splitlines() if line.isascii()]
    return processor_of(train_tokenizer(texts, model_type=request.param))


def test_bytes_of_a_document_are_those_of_its_text(any_script, trained):
    documents, total, stream = real_documents(), 0, []
    assert len(documents) > 150
    multibyte = fallback = 0
    for text in documents:
        ids = [trained.bos_id(), *trained.encode(text)]
        decoded = trained.decode(ids)
        size = len(decoded.encode("utf-8"))
        assert any_script.count_bytes(np.array(ids, dtype=np.uint16), trained) == size, repr(text[:80])
        multibyte += not decoded.isascii()
        fallback += any(trained.is_byte(i) for i in ids)
        total += size
        stream += ids
    assert multibyte >= 10 and fallback >= 10  # the test sees what it is about
    assert any_script.count_bytes(np.array(stream, dtype=np.uint16), trained) == total  # end to end, as in a shard


def test_bytes_without_start_of_document_count_the_space(any_script, trained):
    """A piece with a space marker after ordinary text stands for its space, too; in the middle of a document."""
    ids = np.array([trained.bos_id(), *trained.encode("the first word and the next words")], dtype=np.uint16)
    for cut in range(1, len(ids) - 1):
        rest = any_script.count_bytes(ids[cut:], trained)
        assert rest == any_script.count_bytes(ids, trained) - any_script.count_bytes(ids[: cut + 1], trained)


def test_bytes_of_a_letter_that_was_cut_at_the_end(any_script, trained):
    """A validation set may end within a letter that is written in bytes."""
    ids = np.array([trained.bos_id(), *trained.encode("plain \U0001f600")], dtype=np.uint16)
    assert sum(trained.is_byte(int(i)) for i in ids) == 4
    whole = any_script.count_bytes(ids, trained)
    assert [any_script.count_bytes(ids[:-cut], trained) for cut in (1, 2, 3, 4)] == [
        whole - cut for cut in (1, 2, 3, 4)
    ]


LINES = """hello world this is a test of spaces
def f(x):
    return x
        if y  > 3:   pass
日本語の文章です
a  b   c    d
The cat sat on the mat, and the dog lay down.
  two before
tab\there""".split("\n")
HARD_DOCUMENTS = [
    *("hello world", "  two spaces before,  two between, two after  ", " ", "   ", "a", "é", "x" * 50, "\n", "\t x"),
    *("tab\tline\nend\n\n", "    return x\n        if y:\n\t\tpass", "日本語の文章です。 漢字  とかな。"),
    *("😀 at the start, 👩\u200d👩\u200d👧\u200d👦 in the middle 🏴\u200d☠️", "ﬁ ① Ⅷ", "\u3000wide\u00a0space"),
    *("▁ marker ▁▁ itself", "▁▁▁x", "  ▁ b", "▁ ▁▁▁x", "a <tab> xb <sep> ▁ctl y"),
]
SPACES = {"remove_extra_whitespaces": False}
NO_PREFIX = {"add_dummy_prefix": False}
SUFFIX = {"treat_whitespace_as_suffix": True}
PIECES_OF_SPACES = SPACES | {"allow_whitespace_only_pieces": True}
SYMBOLS = {
    "user_defined_symbols": ["▁▁▁▁", "▁▁", "  ", "<tab> x", "</s>x"],
    "control_symbols": ["<sep>", "▁ctl"],
}
TOKENIZERS = {
    "plain": {},
    "without byte fallback": {"byte_fallback": False},
    "without prefix": NO_PREFIX,
    "spaces kept": SPACES,
    "spaces kept, without prefix": SPACES | NO_PREFIX,
    "pieces of spaces": PIECES_OF_SPACES,
    "pieces across words": PIECES_OF_SPACES | NO_PREFIX | {"split_by_whitespace": False},
    "pieces across words, spaces removed": {"split_by_whitespace": False},
    "space last": SUFFIX,
    "space last, pieces of spaces": SUFFIX | PIECES_OF_SPACES,
    "space last, without prefix": SUFFIX | NO_PREFIX,
    "spaces not escaped": {"escape_whitespaces": False},
    "identity": {"normalization_rule_name": "identity"},
    "identity, spaces kept": SPACES | {"normalization_rule_name": "identity"},
    "small letters": {"normalization_rule_name": "nmt_nfkc_cf"},
    "nfkc, spaces kept": SPACES | {"normalization_rule_name": "nfkc"},
    "symbols": SYMBOLS,
    "symbols, spaces kept": SYMBOLS | SPACES,
    "symbols, without prefix": SYMBOLS | NO_PREFIX,
    "symbols, spaces kept, without prefix": SYMBOLS | SPACES | NO_PREFIX,
}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("case", TOKENIZERS)
def test_bytes_of_every_legal_tokenizer(any_script, case, kind, tmp_path):
    """All of these are accepted, and count each document as the length of its decoded text. The texts of unknown pieces
    are lost, the sign for them that the decoder writes does not count."""
    path = tmp_path / "t.model"
    path.write_bytes(train_tokenizer(LINES * 40, **{"vocab_size": 340, "model_type": kind} | TOKENIZERS[case]))
    size = spm.SentencePieceProcessor(model_file=str(path)).vocab_size()
    tokenizer = any_script.load_tokenizer(str(path), size)
    total, streams = 0, {"bos": [], "eos": [tokenizer.eos_id()]}
    for text in HARD_DOCUMENTS:
        ids = tokenizer.encode(text)
        unknown = " \u2047 ".encode()  # what is decoded for an unknown piece
        decoded = tokenizer.decode([tokenizer.bos_id(), *ids]).encode()
        expected = len(decoded) - len(unknown) * ids.count(tokenizer.unk_id())
        marked = [tokenizer.bos_id(), *ids], [tokenizer.eos_id(), *ids, tokenizer.eos_id()]
        for row in marked:
            found = any_script.count_bytes(np.array(row, dtype=np.uint16), tokenizer)
            assert found == expected, (text, [tokenizer.id_to_piece(i) for i in row])
        streams["bos"] += marked[0]
        streams["eos"] += marked[1][1:]
        total += expected
    for stream in streams.values():
        assert any_script.count_bytes(np.array(stream, dtype=np.uint16), tokenizer) == total


def test_a_decoder_that_writes_something_else_is_refused(script, config, tmp_path):
    """Pieces that do not stand for their own text cannot be counted: here every e is written as three letters."""
    rules = tmp_path / "rules.tsv"
    rules.write_text("65\t65 65 65\n")
    model = train_tokenizer(LINES * 40, vocab_size=340, denormalization_rule_tsv=str(rules))
    assert processor_of(model).decode(processor_of(model).encode("hello")) == "heeello"
    refusal = re.escape(f"{tmp_path}/t.model: ") + 'expected a tokenizer that decodes the piece ".*" as itself'
    with pytest.raises(script.InputError, match=refusal):
        scored(script, config, tmp_path, model, HARD_DOCUMENTS)
    assert scored(script, config, tmp_path, train_tokenizer(LINES * 40, vocab_size=340), HARD_DOCUMENTS).bytes > 300


def letters_without_spaces():
    """Text of 400 letters, which leave no room in the vocabulary for a piece of a space."""
    rng = np.random.RandomState(1)
    return ["".join(chr(0x4E00 + i) for i in rng.randint(0, 400, 500)) for _ in range(60)]


def test_a_tokenizer_without_a_piece_for_the_space_is_refused(script, config, tmp_path):
    """Every space of text would become three byte pieces, that decode to the marker, and count as three bytes."""
    model = train_tokenizer(letters_without_spaces(), vocab_size=680, add_dummy_prefix=False)
    path = tmp_path / "t.model"
    path.write_bytes(model)
    tokenizer = processor_of(model)
    assert tokenizer.piece_to_id("▁") == tokenizer.unk_id() and "▁" in tokenizer.decode(tokenizer.encode("a b"))
    refusal = re.escape(f"{path}: ") + "expected a tokenizer with a piece for the space"
    with pytest.raises(script.InputError, match=refusal):
        script.load_tokenizer(str(path), tokenizer.vocab_size())


def scored(module, config, folder, model, documents, **fields):
    """A Score of these documents under a tokenizer that is written to `folder`."""
    tokenizer = processor_of(model)
    (folder / "t.model").write_bytes(model)
    ids = [i for text in documents for i in [tokenizer.bos_id(), *tokenizer.encode(text)]]
    write_dataset(folder / "d", [ids], [ids])
    paths = {"data_path": str(folder / "d"), "tokenizer_path": str(folder / "t.model")}
    return module.Score(config(module, vocab_size=tokenizer.vocab_size(), train_seq_len=1, **paths, **fields))


def test_unknown_pieces_are_said_in_a_notice(any_script, config, tmp_path):
    known = ["the cat sat on the mat " * 3] * 20
    model = train_tokenizer(known, vocab_size=30, byte_fallback=False)
    score = scored(any_script, config, tmp_path, model, [*known, "the cät sat"])
    assert score.notices() == ["notice: 1 validation tokens are <unk>: their text is lost, and they count as no bytes"]
    assert score.bytes == 20 * len(known[0].strip()) + len("the ct sat")
    assert scored(any_script, config, tmp_path, model, known).notices() == []


def test_unknown_pieces_reach_the_log(script, tiny, data, tmp_path):
    ids = np.where(data.val == data.val[40], 0, data.val)
    folder = write_dataset(tmp_path / "d", [data.train], [ids])
    outcome = run_in_process(script, "--run_id=a", "--iterations=1", **tiny | {"DATA_PATH": folder})
    assert outcome.code == 0, outcome
    for text in (outcome.out, (tmp_path / "logs/a/train.log").read_text()):
        assert re.search(r"^notice: \d+ validation tokens are <unk>", text, re.M)


def test_validation_that_stands_for_no_text_is_refused(script, tiny, tmp_path):
    for ids in ([1] * 100, [1, 0] * 50):  # empty documents, unknown pieces
        folder = write_dataset(tmp_path / f"d{len(set(ids))}", [GOOD], [ids])
        before = tree(tmp_path)
        outcome = run_in_process(script, **tiny | {"DATA_PATH": folder})
        assert_refused(outcome, re.escape(str(folder)), "expected validation tokens that stand for text, found none")
        assert tree(tmp_path) == before


def test_the_tokenizer_of_another_dataset_is_refused(script, tiny, data, tmp_path):
    """The manifest of a dataset states the SHA-256 of its tokenizer. Without one, nothing is known."""
    folder = write_dataset(tmp_path / "d", [data.train], [data.val])
    right = hashlib.sha256(data.tokenizer.read_bytes()).hexdigest()
    wrong = "0123456789abcdef" * 4
    flags = ("--iterations=1", "--layout=1", "--loop_schedule=", "--run_id=a")
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": wrong}}))
    before = tree(tmp_path)
    outcome = run_in_process(script, *flags, **tiny | {"DATA_PATH": folder})
    found = (f"sha256 {wrong[:12]}, found {right[:12]}", "TOKENIZER_PATH")
    assert_refused(outcome, re.escape(f"{data.tokenizer}: "), re.escape(str(folder)), *found)
    assert tree(tmp_path) == before
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": right}}))
    assert run_in_process(script, *flags, **tiny | {"DATA_PATH": folder}).code == 0
    artifact = f"--artifact={tmp_path}/logs/a/model.int6.rgpt"
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": wrong}}))
    for mode in ("eval", "sample"):
        outcome = run_in_process(script, f"--mode={mode}", artifact, **tiny | {"DATA_PATH": folder})
        assert_refused(outcome._replace(err=outcome.err.splitlines()[-1] + "\n"), *found)  # after notices


def test_a_manifest_that_states_nothing_is_passed_over(any_script, data, tmp_path):
    odd = ("", "[]", "{}", "null", "1", '{"tokenizer": []}', '{"tokenizer": {"path": "x"}}', "\xff\xfe{", "[" * 99999)
    for text in (*odd, '{"tokenizer": {"sha256": null}}', '{"tokenizer": {"sha256": 7}}'):
        (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
        any_script.load_tokenizer(str(data.tokenizer), 320, str(tmp_path))
    right = hashlib.sha256(data.tokenizer.read_bytes()).hexdigest().upper()
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": right}}))
    any_script.load_tokenizer(str(data.tokenizer), 320, str(tmp_path))


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

    def gather(self, values):
        return np.array([values])


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
