"""The data tools: the shard format, tokenizing, the offline corpus, and the downloader against a hub on this machine.

What is built is judged by the reader of the training script. No test leaves 127.0.0.1.
"""

import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest
from conftest import ROOT, write_shard

sys.path.insert(0, str(ROOT / "data"))
# The stand-in for the hub is on this machine: no proxy, no token of the user, no offline switch.
os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1", HF_HUB_DISABLE_IMPLICIT_TOKEN="1", HF_HUB_OFFLINE="0")

import fineweb  # noqa: E402
import layout  # noqa: E402
import mini  # noqa: E402
import offline  # noqa: E402
import tokenize_docs  # noqa: E402
from tool import InputError  # noqa: E402

VOCAB = 512


def make_texts(count, seed=0, words=120):
    """Return `count` texts of invented words, the same for the same seed."""
    rng = random.Random(seed)
    syllables = [c + v + e for c in "bdfgklmnprst" for v in "aeiou" for e in ("", "n", "r", "st")]
    lexicon = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(800)]
    texts = []
    for _ in range(count):
        text = " ".join(rng.choices(lexicon, k=words))
        texts.append(text[:200] + "\n\n" + text[200:] + f" {rng.random()} na\u00efve \u65e5\u672c.")
    return texts


def write_jsonl(path, texts, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts))
    return str(path)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small_512_bpe.model"
    path.write_bytes(tokenize_docs.train_tokenizer(make_texts(200), VOCAB))
    return str(path)


def one_error(call, *parts):
    """Call something that must be refused; check that the message is one line that has all `parts`; return it."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    return message


def tokens_of(folder, split):
    return np.concatenate(
        [np.fromfile(path, "<u2", offset=1024) for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))]
    )


def leftovers(root):
    return [str(path) for path in Path(root).rglob("*") if ".part" in path.name or ".old" in path.name]


# ---- the format ------------------------------------------------------------------------------------------------------


def test_shard_bytes_are_the_published_format(tmp_path):
    (entry,) = layout.write_shards(tmp_path, "val", [np.array([1, 2, 65535])], 100)
    raw = (tmp_path / "fineweb_val_000000.bin").read_bytes()
    assert len(raw) == 1024 + 6
    assert raw[:12] == (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + (3).to_bytes(4, "little")
    assert raw[12:1024] == bytes(1012)
    assert raw[1024:] == b"\x01\x00\x02\x00\xff\xff"
    digest = hashlib.sha256(raw).hexdigest()
    assert entry == {"name": "fineweb_val_000000.bin", "tokens": 3, "bytes": 1030, "sha256": digest}
    assert layout.shard_tokens(tmp_path / "fineweb_val_000000.bin") == 3


@pytest.mark.parametrize(
    "raw", [b"", b"short", bytes(1024), layout.shard_header(5), layout.shard_header(5) + bytes(12)]
)
def test_what_is_no_whole_shard_is_refused(tmp_path, raw):
    (tmp_path / "a.bin").write_bytes(raw)
    one_error(lambda: layout.shard_tokens(tmp_path / "a.bin"), "a.bin", "expected", "found")


def test_ids_that_do_not_fit_are_refused(tmp_path):
    for bad in ([65536], [-1, 5]):
        stream = [np.array(bad)]
        one_error(lambda stream=stream: layout.write_shards(tmp_path, "val", stream, 9), "0..65535", str(bad[0]))
    assert list(tmp_path.iterdir()) == []


def test_writer_cuts_the_stream_into_equal_shards(tmp_path):
    stream = np.arange(250, dtype=np.uint16)
    files = layout.write_shards(tmp_path, "train", np.split(stream, [3, 90, 215]), 100)
    assert [file["tokens"] for file in files] == [100, 100, 50]
    assert np.array_equal(tokens_of(tmp_path, "train"), stream)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_told(tmp_path):
    (tmp_path / "fineweb_val_000000.bin").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        layout.write_shards(tmp_path, "val", [np.arange(20_000)], 10_000)


def test_check_dataset_uses_the_trainers_reader(tmp_path, tokenizer):
    one_error(lambda: layout.check_dataset(tmp_path, tokenizer), "fineweb_train")
    write_shard(tmp_path / "fineweb_train_000000.bin", np.full(5000, 7))
    one_error(lambda: layout.check_dataset(tmp_path, tokenizer), "fineweb_val")
    write_shard(tmp_path / "fineweb_val_000000.bin", np.full(3000, 7))
    assert layout.check_dataset(tmp_path, tokenizer) == (VOCAB, 5000, 3000)
    write_shard(tmp_path / "fineweb_val_000000.bin", np.full(3000, VOCAB))
    one_error(lambda: layout.check_dataset(tmp_path, tokenizer), "fineweb_val_000000.bin", str(VOCAB))
    with open(tmp_path / "fineweb_train_000000.bin", "r+b") as file:
        file.truncate(4000)
    one_error(lambda: layout.check_dataset(tmp_path, tokenizer), "fineweb_train_000000.bin")


# ---- tokenize_docs ---------------------------------------------------------------------------------------------------


def tokenize(*arguments):
    return tokenize_docs.tokenize(tokenize_docs.parse([str(argument) for argument in arguments]))


@pytest.fixture
def docs(tmp_path):
    return write_jsonl(tmp_path / "docs.jsonl", make_texts(60))


def test_documents_become_bos_and_the_ids_of_sentencepiece(tmp_path, docs, tokenizer):
    folder, model = tokenize(docs, "--val-docs", 7, "--tokenizer", tokenizer, "--out", tmp_path, "--workers", 1)
    sp = layout.load_sentencepiece(tokenizer)
    expected = [[sp.bos_id(), *sp.encode(text)] for text in make_texts(60)]
    assert sp.bos_id() == 1
    assert tokens_of(folder, "val").tolist() == list(itertools.chain(*expected[:7]))
    assert tokens_of(folder, "train").tolist() == list(itertools.chain(*expected[7:]))
    assert model == tmp_path / "tokenizers" / "docs_sp512_given.model"
    assert model.read_bytes() == Path(tokenizer).read_bytes()
    assert layout.check_dataset(folder, model)[0] == VOCAB
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["splits"]["val"]["documents"] == 7
    assert manifest["splits"]["train"]["text_bytes"] == sum(len(text.encode()) for text in make_texts(60)[7:])
    shard = manifest["splits"]["train"]["files"][0]
    assert shard["sha256"] == hashlib.sha256((folder / shard["name"]).read_bytes()).hexdigest()
    assert str(tmp_path) not in json.dumps(manifest)


def test_shards_do_not_depend_on_workers_or_compression(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize_docs, "BATCH_BYTES", 5000)
    monkeypatch.setattr(tokenize_docs, "SHARD_TOKENS", 3000)
    one, two = make_texts(40, seed=1), make_texts(30, seed=2)
    plain = [write_jsonl(tmp_path / "a.jsonl", one), write_jsonl(tmp_path / "b.jsonl", two)]
    packed = [
        write_jsonl(tmp_path / "a.jsonl.xz", one, lzma.open),
        write_jsonl(tmp_path / "b.jsonl.gz", two, gzip.open),
    ]
    results = []
    for name, inputs, workers in (("plain", plain, 1), ("packed", packed, 2)):
        folder, _ = tokenize(*inputs, "--val-docs", 45, "--tokenizer", tokenizer, "--name", name, "--out", tmp_path,
                             "--workers", workers)  # fmt: skip
        results.append({path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))})
    assert len(results[0]) > 4
    assert results[0] == results[1]


def test_documents_are_read_as_they_are_needed(monkeypatch):
    monkeypatch.setattr(tokenize_docs, "BATCH_BYTES", 1000)
    taken = []
    texts = (taken.append(number) or "\u00e9" * 150 for number in range(10**6))
    work = tokenize_docs.batches(texts)
    assert [length for _, length in itertools.islice(work, 3)] == [1200] * 3
    assert len(taken) == 12


def pieces_of(model):
    return {model.id_to_piece(i) for i in range(model.vocab_size())}


def chinese(count, spaces=0):
    """Documents of invented Chinese; every `spaces`-th has one space."""
    rng = random.Random(1)
    letters, weights = [chr(0x4E00 + i) for i in range(500)], [1 / (i + 1) for i in range(500)]
    texts = ["".join(rng.choices(letters, weights, k=700)) for _ in range(count)]
    return [text + " a" if spaces and number % spaces == 0 else text for number, text in enumerate(texts)]


@pytest.mark.parametrize("spaces", [0, 20, 1])
def test_space_is_a_piece_of_its_own_however_rare(spaces):
    import sentencepiece

    model = tokenize_docs.train_tokenizer(chinese(300, spaces), 800)
    model = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = model.encode("the value of \u4e00 x")
    assert "\u2581" in pieces_of(model) and model.vocab_size() == 800
    assert model.decode(ids) == "the value of \u4e00 x"
    assert [model.id_to_piece(i) for i in ids].count("\u2581") == 4


def test_space_piece_does_not_change_how_ordinary_text_is_cut(monkeypatch):
    import sentencepiece

    texts = make_texts(200)
    ours = sentencepiece.SentencePieceProcessor(model_proto=tokenize_docs.train_tokenizer(texts, VOCAB))
    train = sentencepiece.SentencePieceTrainer.train

    def plainly(required_chars="", user_defined_symbols="", **options):
        train(**options)

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", plainly)
    plain = sentencepiece.SentencePieceProcessor(model_proto=tokenize_docs.train_tokenizer(texts, VOCAB))
    assert any(piece.startswith("\u2581") and len(piece) > 1 for piece in pieces_of(ours))
    assert pieces_of(ours) == pieces_of(plain)
    assert all(ours.encode(text, out_type=str) == plain.encode(text, out_type=str) for text in make_texts(20, seed=9))


def sentencepiece_model(path, texts=None, **options):
    """A SentencePiece model that is not trained by our tool."""
    import sentencepiece

    model = io.BytesIO()
    options = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 3} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts or make_texts(100)), model_writer=model, hard_vocab_limit=False, **options
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


def test_unigram_models_with_a_prefix_are_welcome(tmp_path, docs):
    given = sentencepiece_model(tmp_path / "unigram.model", model_type="unigram")
    folder, model = tokenize(docs, "--val-docs", 5, "--tokenizer", given, "--out", tmp_path, "--name", "uni")
    sp = layout.load_sentencepiece(given)
    assert tokens_of(folder, "val").tolist()[:50] == [1, *sp.encode(make_texts(60)[0])][:50]
    layout.check_dataset(folder, model)


@pytest.mark.parametrize("flaw", ["spaces", "rewriting"])
def test_a_tokenizer_that_cannot_be_counted_is_refused_by_name(tmp_path, docs, flaw):
    if flaw == "spaces":  # every space would be three bytes
        options = {"vocab_size": 800, "character_coverage": 0.999, "add_dummy_prefix": False}
        given = sentencepiece_model(tmp_path / "strange.model", chinese(300), **options)
    else:  # decoding writes other text than the pieces: every a as bb
        (tmp_path / "rules.tsv").write_text("61\t62 62\n")
        rules = {"denormalization_rule_tsv": str(tmp_path / "rules.tsv")}
        given = sentencepiece_model(tmp_path / "strange.model", **rules)
    out = tmp_path / "out"
    call = ["--val-docs", 5, "--tokenizer", given, "--out", out]
    one_error(lambda: tokenize(docs, *call), "strange.model", "tokenize_docs.py")
    assert [path for path in out.rglob("*") if path.is_file()] == [] and leftovers(out) == []


@pytest.mark.parametrize("kind", ["empty", "blank", "unknown"])
def test_a_validation_set_that_stands_for_no_bytes_is_refused(tmp_path, docs, tokenizer, kind):
    text = {"empty": "", "blank": " \n\t ", "unknown": "\u65e5\u672c"}[kind]
    if kind == "unknown":
        tokenizer = sentencepiece_model(
            tmp_path / "no_bytes.model", ["only plain words " * 9] * 50, byte_fallback=False
        )
    val = write_jsonl(tmp_path / "val.jsonl", [text] * 300)
    out = tmp_path / "out"
    call = ["--val", val, "--tokenizer", tokenizer, "--out", out, "--name", "z"]
    one_error(lambda: tokenize(docs, *call), "validation set", "no bytes")
    assert [path for path in out.rglob("*") if path.is_file()] == [] and leftovers(out) == []
    write_jsonl(tmp_path / "val.jsonl", [text] * 300 + ["only plain words"])
    tokenize(docs, *call)


def test_trained_tokenizer_is_like_the_challenges_and_never_sees_validation(tmp_path, capsys):
    texts = make_texts(40, seed=3)
    inputs = write_jsonl(tmp_path / "docs.jsonl", ["\u0416" * 3000 + " q"] * 2 + texts)
    args = ["--val-docs", "2", "--vocab-size", "400", "--name", "mine", "--out", str(tmp_path), "--workers", "1"]
    tokenize_docs.main([inputs, *args])
    path = tmp_path / "tokenizers" / "mine_bpe.model"
    sp = layout.load_sentencepiece(path)
    assert (sp.vocab_size(), sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (400, 0, 1, 2, 3)
    assert sp.is_byte(4) and sp.decode(sp.encode("\u65e5 xyz \U0001f600")) == "\u65e5 xyz \U0001f600"
    assert not any("\u0416" in piece for piece in pieces_of(sp))
    shown = capsys.readouterr()
    assert "VOCAB_SIZE=400 " in shown.out.splitlines()[-1] and "DATA_PATH=" in shown.out.splitlines()[-1]
    assert "\r" not in shown.out + shown.err and "\x1b" not in shown.out + shown.err
    first = path.read_bytes()
    tokenize_docs.main([inputs, *args, "--force"])
    assert path.read_bytes() == first
    assert list((tmp_path / "datasets" / "mine").glob("*.model")) == []
    tokenize_docs.main([write_jsonl(tmp_path / "others.jsonl", make_texts(40, seed=8)), *args, "--force"])
    assert path.read_bytes() != first  # its own tokenizer may a dataset replace


def test_plain_text_is_cut_into_documents(tmp_path, tokenizer):
    lines = "".join(f"line {number} of the text\n" + ("\n" if number % 10 == 9 else "") for number in range(100))
    (tmp_path / "a.txt").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "b.txt").write_text("first\n\nstill first\n<|end|>\nsecond\n<|end|>\n\n", encoding="utf-8")
    pieces = list(tokenize_docs.Source(tmp_path / "a.txt", doc_bytes=600))
    assert "".join(pieces) == lines and len(pieces) == 3
    assert all(piece.endswith("\n\n") for piece in pieces)
    marked = tokenize_docs.Source(tmp_path / "b.txt", separator="<|end|>")
    assert list(marked) == ["first\n\nstill first\n", "second\n"]
    options = ("--doc-bytes", 600, "--tokenizer", tokenizer, "--out", tmp_path, "--workers", 1)
    folder, model = tokenize(tmp_path / "a.txt", "--val", tmp_path / "b.txt", *options)
    assert (tokens_of(folder, "train") == 1).sum() == 3
    layout.check_dataset(folder, model)


def bad_inputs():
    """(name, content, parts of the message) of files that must be refused."""
    packed = lzma.compress(b'{"text": "%s"}\n' % (os.urandom(3000).hex().encode()))
    yield "not_json.jsonl", b'{"text": "a"}\nhello\n', ["line 2", "not JSON"]
    yield "no_text.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', ["line 3", "'body'", '"text"']
    yield "list.jsonl", b"[1]\n", ["line 1", "list"]
    yield "number.jsonl", b'{"text": 5}\n', ["line 1", '"text"']
    yield "latin.jsonl", '{"text": "caf\u00e9"}\n'.encode("latin-1"), ["line 1", "UTF-8"]
    yield "latin.txt", "caf\u00e9\n".encode("latin-1"), ["line 1", "UTF-8"]
    yield "empty.jsonl", b"", ["empty"]
    yield "blank.jsonl", b"\n\n", ["expected training text"]
    yield "cut.jsonl.xz", packed[:-40], ["damaged or truncated"]
    yield "foreign.jsonl.gz", b"not gzip at all", ["damaged or truncated"]
    yield "page.pdf", b"%PDF", ["'.pdf'", ".jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "parts"), list(bad_inputs()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_documents_are_refused_and_leave_nothing(tmp_path, docs, tokenizer, name, content, parts):
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    one_error(
        lambda: tokenize(tmp_path / name, "--val", docs, "--tokenizer", tokenizer, "--out", out, "--workers", 1), *parts
    )
    assert [path for path in out.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["long.jsonl", "line.txt", "unmarked.txt"])
def test_a_document_that_would_take_all_memory_is_refused(tmp_path, docs, tokenizer, monkeypatch, name):
    monkeypatch.setattr(tokenize_docs, "MAX_DOCUMENT", 20_000)
    text = {
        "long.jsonl": json.dumps({"text": "x " * 20_000}),
        "line.txt": "x " * 20_000,
        "unmarked.txt": "x\n" * 20_000,
    }
    (tmp_path / name).write_text(text[name])
    more = ["--separator", "<|end|>"] if name == "unmarked.txt" else []
    call = ["--val", docs, "--tokenizer", tokenizer, "--out", tmp_path, *more]
    one_error(lambda: tokenize(tmp_path / name, *call), f"{name} line 1", "at most 20.0 kB", "cut it")


def test_bad_options_are_refused(tmp_path, docs, tokenizer):
    out = ("--out", tmp_path, "--workers", 1)
    one_error(lambda: tokenize(docs, "--val-docs", 5, *out), "--tokenizer", "--vocab-size")
    one_error(lambda: tokenize(docs, "--tokenizer", tokenizer, *out), "--val", "--val-docs")
    one_error(lambda: tokenize(docs, "--val-docs", 60, "--tokenizer", tokenizer, *out), "training text", "--val-docs")
    one_error(lambda: tokenize(docs, "--val", docs, "--tokenizer", tokenizer, *out), "held out")
    one_error(lambda: tokenize(docs, "--val-docs", 5, "--vocab-size", 65537, *out), "65537", "65536")
    one_error(lambda: tokenize(docs, "--val-docs", 5, "--vocab-size", 100, *out), "100", "300")
    one_error(lambda: tokenize(docs, "--val-docs", 5, "--vocab-size", 60000, *out), "60000", "more text")
    one_error(lambda: tokenize(docs, "--val-docs", 0, "--tokenizer", tokenizer, *out), "--val-docs", "'0'")
    one_error(lambda: tokenize(docs, "--val-docs", 5, "--tokenizer", docs, *out), "docs.jsonl", "SentencePiece")
    one_error(
        lambda: tokenize(docs, "--val-docs", 5, "--tokenizer", tmp_path / "no.model", *out), "no.model", "no such"
    )
    one_error(lambda: tokenize(docs, "--val-docs", 5, "--tokenizer", tokenizer, "--name", "../x", *out), "'../x'")
    one_error(lambda: tokenize(tmp_path / "gone.jsonl", "--val-docs", 5, "--tokenizer", tokenizer, *out), "gone.jsonl")
    assert not (tmp_path / "datasets").exists() or list((tmp_path / "datasets").iterdir()) == []
    assert not (tmp_path / "tokenizers").exists()


def test_an_existing_dataset_is_replaced_only_by_force_and_as_a_whole(tmp_path, docs, tokenizer, monkeypatch):
    args = (docs, "--val-docs", 5, "--tokenizer", tokenizer, "--out", tmp_path, "--workers", 1)
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_docs, "SHARD_TOKENS", 2000)
        folder, _ = tokenize(*args)
    assert len(list(folder.glob("fineweb_train_*.bin"))) > 1
    one_error(lambda: tokenize(*args), "already exists", "--force")
    before = tokens_of(folder, "train")
    tokenize(*args, "--force")
    assert [path.name for path in sorted(folder.glob("*.bin"))] == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
    ]
    assert np.array_equal(tokens_of(folder, "train"), before)
    assert leftovers(tmp_path) == []


def test_the_scale_models_dataset_is_cut_out_of_another(tmp_path, docs, tokenizer, monkeypatch, capsys):
    source, model = tokenize(docs, "--val-docs", 20, "--tokenizer", tokenizer, "--out", tmp_path, "--name", "whole")
    texts = make_texts(60)
    enough = len("".join(texts[:3]).encode()) + 1  # one byte more than three documents have
    monkeypatch.setattr(mini, "HELD_OUT", enough)
    assert mini.main(["--source", str(source), "--name", "small"]) == 0
    folder, sp = tmp_path / "datasets" / "small", layout.load_sentencepiece(model)
    expected = itertools.chain(*([sp.bos_id(), *sp.encode(text)] for text in texts[:4]))
    assert tokens_of(folder, "val").tolist() == list(expected)
    assert tokens_of(folder, "train").tolist() == tokens_of(source, "train").tolist()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["splits"]["val"]["files"][0]["sha256"] == layout.sha256_of(folder / "fineweb_val_000000.bin")
    assert manifest["tokenizer"] == layout.manifest_of(source)["tokenizer"]
    assert layout.check_dataset(folder, model)[0] == VOCAB
    one_error(lambda: mini.main(["--source", str(source), "--name", "small"]), "already exists", "--force")
    assert mini.main(["--source", str(source), "--name", "small", "--force"]) == 0
    monkeypatch.setattr(mini, "HELD_OUT", 10**9)
    one_error(lambda: mini.main(["--source", str(source), "--name", "more"]), "1,000,000,000", "give more text")
    one_error(lambda: mini.main(["--source", str(tmp_path / "none")]), "expected a dataset", "data/fineweb.py")
    for name in ("whole", "a/b", ".", ".."):  # the source itself, which it would cut down, and what is no name
        one_error(lambda name=name: mini.main(["--source", str(source), "--name", name, "--force"]), "--name")
    assert sorted(path.name for path in (tmp_path / "datasets").iterdir()) == ["small", "whole"]


def test_a_stop_between_two_renames_keeps_the_old_dataset(tmp_path, monkeypatch):
    folder, real = tmp_path / "d", layout.os.replace
    folder.mkdir()
    (folder / "old").touch()

    def replace(source, target):
        if target == folder and str(source).endswith(".part"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(layout.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt), layout.building(folder, replace=True):
        pass
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["d", "d/old"]


def test_a_failed_run_keeps_the_old_dataset_and_clears_what_a_killed_one_left(tmp_path, docs, tokenizer):
    args = ("--val", docs, "--tokenizer", tokenizer, "--out", tmp_path, "--workers", 1, "--force")
    (tmp_path / "other.txt").write_text("some text\n")
    (tmp_path / "bad.jsonl").write_text("bad\n")
    folder, _ = tokenize(tmp_path / "other.txt", *args)
    killed, running = (tmp_path / "datasets" / f"docs_sp512.{number}.part" for number in (99999998, 99999999))
    killed.mkdir()
    running.mkdir()
    os.utime(killed, (1e9, 1e9))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    one_error(lambda: tokenize(tmp_path / "bad.jsonl", *args), "bad.jsonl line 1")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert leftovers(tmp_path) == [str(running)]


@pytest.fixture
def two_of_one_name(tmp_path):
    """Two tokenizers called tokenizer.model, as everybody's is, which differ."""
    return [
        sentencepiece_model(tmp_path / folder / "tokenizer.model", make_texts(100, seed=seed))
        for folder, seed in (("a", 1), ("b", 2))
    ]


def test_two_tokenizers_of_one_file_name_live_side_by_side(tmp_path, docs, two_of_one_name):
    a, b = two_of_one_name
    call = (docs, "--val-docs", 5, "--out", tmp_path)
    for name, given, more in (("first", a, ()), ("second", b, ()), ("second", b, ("--force",)), ("third", b, ())):
        folder, kept = tokenize(*call, "--tokenizer", given, "--name", name, *more)
        assert kept.read_bytes() == given.read_bytes()
        entry = json.loads((folder / "manifest.json").read_text())["tokenizer"]
        assert entry["path"] == f"tokenizers/{kept.name}"
        assert entry["sha256"] == hashlib.sha256(given.read_bytes()).hexdigest()
    first = tmp_path / "datasets" / "first", tmp_path / "tokenizers" / "first_given.model"
    layout.check_dataset(*first)
    one_error(lambda: layout.check_dataset(first[0], kept), "third_given.model", "sha256")
    tokenize(*call, "--tokenizer", b, "--name", "first", "--force")  # its own it may replace
    assert first[1].read_bytes() == b.read_bytes()
    layout.check_dataset(*first)


@pytest.mark.parametrize("owner", ["another dataset", "nobody known"])
def test_force_never_replaces_a_tokenizer_that_is_not_the_datasets_own(tmp_path, docs, two_of_one_name, owner):
    a, b = two_of_one_name
    call = (docs, "--val-docs", 5, "--out", tmp_path)
    tokenize(*call, "--tokenizer", a, "--name", "mine")
    kept = tmp_path / "tokenizers" / "mine_given.model"
    if owner == "another dataset":  # one that shares the file
        tokenize(*call, "--tokenizer", a, "--name", "other")
        manifest = tmp_path / "datasets" / "other" / "manifest.json"
        manifest.write_text(manifest.read_text().replace("other_given", "mine_given"))
    else:
        (tmp_path / "datasets" / "mine" / "manifest.json").unlink()
    message = one_error(lambda: tokenize(*call, "--tokenizer", b, "--name", "mine", "--force"), "mine_given", "--name")
    assert kept.read_bytes() == a.read_bytes() and leftovers(tmp_path) == []
    assert ("the one of other" in message) == (owner == "another dataset")
    layout.check_dataset(*tokenize(*call, "--tokenizer", b, "--name", "mine2"))  # the advice works
    assert kept.read_bytes() == a.read_bytes()


def test_vocabularies_above_uint16_are_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(layout, "MAX_VOCAB", 500)
    one_error(lambda: layout.load_sentencepiece(tokenizer), "512", "500", "uint16")


def test_command_line_ends_in_one_line_and_exit_code_1(tmp_path):
    tool = [sys.executable, str(ROOT / "data" / "tokenize_docs.py")]
    done = subprocess.run([*tool, "gone.jsonl", "--val-docs", "1", "--vocab-size", "400", "--out", str(tmp_path)],
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: input gone.jsonl: expected a file, found no such file\n"
    assert list(tmp_path.iterdir()) == []


# ---- offline ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def python_tree(tmp_path):
    """A small standard library and site-packages to read."""
    stdlib, site = tmp_path / "lib", tmp_path / "site"
    (stdlib / "pydoc_data").mkdir(parents=True)
    (stdlib / "test").mkdir()
    texts = make_texts(120, seed=7, words=400)
    topics = {f"topic{number}": text for number, text in enumerate(texts[:20])}
    (stdlib / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    (stdlib / "broken.py").write_text("def (:\n")
    (stdlib / "test" / "test_x.py").write_text(f'"""{texts[20]} UNWANTED TEST"""\n')
    (site / "numpy" / "core").mkdir(parents=True)
    for number, text in enumerate(texts[21:]):
        source = f'"""{text}"""\nraise SystemExit("imported!")\ndef run(self, a, b=1):\n    """Runs {text[::-1]}"""\n'
        (site / "numpy" / "core" / f"module_{number:02d}.py").write_text(source)
    info = site / "numpy-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: numpy\nVersion: 9.9\n\nDESCRIBED HERE {texts[20]}\n")
    licence = "Permission is hereby granted to everyone who reads this long and boring text. " * 5
    (site / "numpy" / "LICENSE.txt").write_text(licence)
    (site / "numpy" / "core" / "COPYING.txt").write_text(licence)
    (site / "unrelated").mkdir()
    (site / "unrelated" / "a.py").write_text(f'"""{texts[20]} UNRELATED PACKAGE"""\n')
    return {"stdlib": str(stdlib), "sites": [str(site)]}


def test_offline_corpus_is_deterministic_and_held_out_by_document(tmp_path, python_tree, capsys):
    # One build in this process, one in another, which has other hash seeds and reads with two workers.
    options = {"min_bytes": 100_000, "vocab_size": VOCAB, **python_tree}
    code = f"import offline; offline.build({str(tmp_path / '0')!r}, workers=2, **{options!r})"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT / "data", env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    offline.build(tmp_path / "1", workers=1, **options)
    built = []
    for number in (0, 1):
        folder = tmp_path / str(number) / "datasets" / "offline_sp512"
        model = tmp_path / str(number) / "tokenizers" / "offline_512_bpe.model"
        assert layout.check_dataset(folder, model)[0] == VOCAB
        built.append({path.name: path.read_bytes() for path in [*folder.iterdir(), model]})
    assert built[0] == built[1]
    manifest = json.loads(built[0]["manifest.json"])
    val, train = manifest["splits"]["val"], manifest["splits"]["train"]
    assert val["text_bytes"] >= 200_000 and val["documents"] + train["documents"] > 100
    assert manifest["tokenizer"]["bos_id"] == 1 and str(tmp_path) not in json.dumps(manifest)
    sp = layout.load_sentencepiece(model)
    texts = {split: sp.decode(tokens_of(folder, split).tolist()) for split in ("train", "val")}
    both = texts["train"] + texts["val"]
    assert "UNWANTED" not in both and "UNRELATED" not in both and "topic" not in val
    assert both.count("Permission is hereby granted") == 5  # once, of the two copies
    assert "DESCRIBED HERE" in both and manifest["built_from"]["versions"]["numpy"] == "9.9"
    assert "run(a, b) Runs" in both and "numpy.core.module_00" in both
    assert sp.unk_id() not in tokens_of(folder, "train")

    capsys.readouterr()
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    offline.build(tmp_path / "1", **options)
    assert "already built" in capsys.readouterr().out
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    (folder / "fineweb_train_000000.bin").write_bytes(b"damaged")
    offline.build(tmp_path / "1", **options)
    assert (folder / "fineweb_train_000000.bin").read_bytes() == built[1]["fineweb_train_000000.bin"]
    manifest["splits"]["train"]["tokens"] += 1  # as where a shard is gone
    (folder / "manifest.json").write_text(json.dumps(manifest))
    offline.build(tmp_path / "1", **options)
    assert (folder / "manifest.json").read_bytes() == built[1]["manifest.json"]
    assert leftovers(tmp_path / "1") == []


def test_offline_says_what_to_install_when_there_is_too_little(tmp_path, python_tree):
    one_error(
        lambda: offline.build(tmp_path / "out", workers=1, **python_tree), "8.0 MB", "pip install -r requirements.txt"
    )
    assert not (tmp_path / "out" / "datasets").exists()


@pytest.mark.parametrize("pieces", [299, 65_537])
def test_offline_refuses_a_vocabulary_that_cannot_be(tmp_path, pieces):
    flags = ["--out", str(tmp_path), f"--vocab-size={pieces}"]
    one_error(lambda: offline.main(flags), "--vocab-size", "300", "65536", str(pieces))
    assert leftovers(tmp_path) == []


def test_offline_finds_docstrings_without_importing():
    source = b'''"""Module text that is long enough to be kept here."""
import nothing_like_this
class A:
    """Class text that is long enough to be kept here."""
    async def f(self, x, *, y=1):
        """Method text that is long enough to be kept here."""
    if True:
        def g(): "Nested text that is long enough to be kept here."
add_docstr(torch.abs, r"""
    Compiled text that is long enough to be kept here, because it stands in a call and has
    more than one hundred characters.
    """)
print("Not documentation, although it is a string of more than one hundred characters " * 2, "x" * 200)
'''
    text = offline.docstrings(source, "pack.module")
    for part in ("pack.module\n\nModule", "A\n\nClass", "A.f(x)\n\nMethod", "A.g()\n\nNested", "torch.abs\n\nCompiled"):
        assert part in text
    assert "Not documentation" not in text
    assert offline.docstrings(b"\xff\xfe not python", "x") == ""


def test_offline_reads_this_python():
    paths = offline.sysconfig.get_path
    sites = [paths("purelib"), paths("platlib")]
    jobs = offline.find_files(paths("stdlib"), sites, ["numpy"])
    described, versions = offline.descriptions(sites, ["numpy"])
    assert versions == {"numpy": np.__version__} and "array" in dict(described)["numpy/METADATA"]
    assert not any("/tests/" in name or "__pycache__" in name for name, _ in jobs)
    few = ("stdlib/json/", "stdlib/pydoc_data/topics", "numpy/linalg/_linalg")
    found = dict(offline.deduplicate(offline.collect([job for job in jobs if job[0].startswith(few)], 1)))
    assert "JSONDecodeError" in found["stdlib/json/decoder.py"] and "solve(a, b)" in found["numpy/linalg/_linalg.py"]
    assert "lambda" in found["stdlib/pydoc_data/topics.py#lambda"].lower()


def test_offline_shuffles_documents_and_holds_out_whole_ones():
    documents = [(f"d{number:04d}", f"document {number} " + "word " * 400) for number in range(600)]
    train, val = offline.split(documents)
    assert sorted(train + val) == sorted(text for _, text in documents)
    assert sum(map(len, val)) >= offline.MIN_VAL_BYTES > sum(map(len, val[:-1]))
    assert offline.split(documents[::-1]) == (train, val)
    numbers = [int(text.split()[1]) for text in train]
    steps = [abs(after - before) for before, after in zip(numbers, numbers[1:])]
    assert np.mean(steps) > 100  # of a sorted list: about 1
    long = ("long", "long document " * 10_000)
    assert long[1] in offline.split([*documents, long])[0]


def test_offline_never_replaces_a_tokenizer_of_yours(tmp_path, python_tree, docs, two_of_one_name):
    tokenize(docs, "--val-docs", 5, "--tokenizer", two_of_one_name[0], "--out", tmp_path, "--name", "mine")
    kept, taken = (tmp_path / "tokenizers" / f"{name}.model" for name in ("mine_given", "offline_512_bpe"))
    kept.rename(taken)
    manifest = tmp_path / "datasets" / "mine" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(kept.name, taken.name))
    options = {"min_bytes": 100_000, "vocab_size": VOCAB, "force": True, **python_tree}
    one_error(lambda: offline.build(tmp_path, **options), taken.name, "the one of mine", "--out")
    assert taken.read_bytes() == two_of_one_name[0].read_bytes()
    assert not (tmp_path / "datasets" / "offline_sp512").exists()
    offline.build(tmp_path / "elsewhere", **options)


def test_offline_removes_repeated_paragraphs_but_not_headings():
    shared = "This paragraph is long enough and stands in both documents."
    own = ["Word " * 50 + str(number) for number in range(2)]
    kept = offline.deduplicate(
        [(f"d{number}", f"{shared}\n\nExamples\n\n{own[number]}\n\nNotes") for number in range(2)]
    )
    assert shared in kept[0][1] and shared not in kept[1][1]
    assert all("Examples" in text and "Notes" not in text for _, text in kept)
    assert len(offline.deduplicate([("a", own[0]), ("b", own[0])])) == 1


# ---- fineweb ---------------------------------------------------------------------------------------------------------

COMMIT = "5" * 40
NAME = "fineweb10B_sp512"
API, FILES = "/api/datasets/willdepueoai/parameter-golf", "/datasets/willdepueoai/parameter-golf/resolve/"


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks a hub for: the state of a dataset, its list of files, and HEAD and GET of the files.

    Large files are redirected to another path, as the real hub does, with their SHA-256 in X-Linked-Etag.
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.log = files, []
        self.cut = {}  # file name -> how many bytes to send before hanging up, once
        self.fail = {}  # file name -> HTTP status to give instead, always
        self.flip = set()  # names of files whose content is wrong on the wire
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def gets(self):
        return [(name, start) for method, name, start in self.log if method == "GET" and name != "manifest.json"]

    def listed(self, path):
        data = self.files[path]
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
        if not path.endswith(".json"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def handle_error(self, request, address):
        pass  # clients hang up when a test makes them


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        assert self.path == f"{API}/paths-info/{COMMIT}"
        wanted = parse_qs(body)["paths"]
        self.reply_json([self.server.listed(path) for path in wanted if path in self.server.files])

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        if self.path in (API, f"{API}/revision/{COMMIT}"):
            return self.reply_json({"id": "willdepueoai/parameter-golf", "sha": COMMIT})
        if self.path.startswith(f"{API}/tree/{COMMIT}"):
            return self.reply_json([self.server.listed(path) for path in self.server.files])
        self.answer()

    def answer(self):
        hub, path = self.server, self.path
        direct = path.startswith("/cdn/")
        if not direct and not path.startswith(FILES):
            return self.reply(404, {"X-Error-Code": "RepoNotFound"})
        revision, _, path = (f"{COMMIT}/" + path[5:] if direct else path[len(FILES) :]).partition("/")
        data, name = hub.files.get(path), path.rpartition("/")[2]
        if data is None or revision != COMMIT:
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        if name in hub.fail:
            return self.reply(hub.fail[name])
        headers = {"X-Repo-Commit": COMMIT}
        if "lfs" not in hub.listed(path):
            headers["ETag"] = f'"{git_hash(data)}"'
        else:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            if not direct:
                return self.reply(302, headers | {"Location": f"{hub.address}/cdn/{path}"})
        asked = self.headers.get("Range")
        start = int(asked[6:].partition("-")[0]) if asked else 0
        if self.command == "GET":
            hub.log.append(("GET", name, start))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if name in hub.flip:
            data = data[:-1] + bytes([data[-1] ^ 1])
        cut = hub.cut.pop(name, None) if self.command == "GET" else None
        self.reply(206 if start else 200, headers, data[start:], cut)

    def reply_json(self, value):
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def reply(self, status, headers=None, body=b"", cut=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True


@pytest.fixture
def hub(tokenizer, tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    files = {}
    sizes = {"train_000000": 40_000, "train_000001": 40_001, "train_000002": 40_002, "val_000000": 9_000}
    for name, count in sizes.items():
        path = write_shard(tmp_path / "shard", rng.integers(4, VOCAB, count))
        files[f"datasets/datasets/{NAME}/fineweb_{name}.bin"] = path.read_bytes()
    path.unlink()
    files["datasets/tokenizers/small_512_bpe.model"] = Path(tokenizer).read_bytes()
    files["datasets/docs_selected.jsonl"] = b'{"text": "x"}\n'
    files["datasets/docs_selected.source_manifest.json"] = b"{}"
    stats = {"files_train": 3, "files_val": 1}
    manifest = {
        "datasets": [
            {"name": NAME, "tokenizer_name": "bpe512", "stats": stats},
            {"name": "fineweb10B_byte260", "tokenizer_name": "bytes", "stats": stats},
        ],
        "tokenizers": [
            {"name": "bpe512", "model_path": "tokenizers/small_512_bpe.model"},
            {"name": "bytes", "path": "tokenizers/bytes.json"},
        ],
    }
    files["datasets/manifest.json"] = json.dumps(manifest).encode()
    server = Hub(files)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # before a new try
    server.root = tmp_path / "root"
    server.folder = server.root / "datasets" / NAME
    yield server
    server.shutdown()
    server.server_close()


def get(hub, *arguments):
    fineweb.main(["--variant", "sp512", "--endpoint", hub.address, "--out", str(hub.root), *map(str, arguments)])


def served(hub, name):
    return next(data for path, data in hub.files.items() if path.endswith("/" + name))


def assert_whole(hub, shards=2):
    names = [f"fineweb_train_{number:06d}.bin" for number in range(shards)] + ["fineweb_val_000000.bin"]
    assert sorted(path.name for path in hub.folder.glob("*.bin")) == names
    assert all((hub.folder / name).read_bytes() == served(hub, name) for name in names)
    layout.check_dataset(hub.folder, hub.root / "tokenizers" / "small_512_bpe.model")
    assert leftovers(hub.root) == []


def test_download_then_nothing_then_more(hub, capsys):
    get(hub, "--train-shards", 2)
    assert_whole(hub)
    assert len(hub.gets()) == 4
    shown = capsys.readouterr()
    assert "checked: 80,001 training and 9,000 validation tokens" in shown.out
    assert shown.out.splitlines()[-1].startswith("train on it: DATA_PATH=")
    assert "\r" not in shown.out + shown.err
    manifest = json.loads((hub.folder / "manifest.json").read_text())
    assert manifest["splits"]["train"]["tokens"] == 80_001 and manifest["hub"]["revision"] == COMMIT
    model = hub.root / "tokenizers" / "small_512_bpe.model"
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert manifest["splits"]["val"]["files"] == [
        layout.file_entry(hub.folder / "fineweb_val_000000.bin", tokens=9_000)
    ]
    hub.log.clear()
    get(hub, "--train-shards", 2)
    assert hub.gets() == []
    assert "0 files downloaded, 4 were here" in capsys.readouterr().out
    get(hub, "--revision", COMMIT)  # the default asks for 80, the variant has 3
    assert hub.gets() == [("fineweb_train_000002.bin", 0)]
    assert_whole(hub, 3)
    get(hub, "--train-shards", 1, "--with-docs")
    assert (hub.root / "docs_selected.jsonl").read_bytes() == b'{"text": "x"}\n'
    assert json.loads((hub.root / "manifest.json").read_bytes())["datasets"][0]["name"] == NAME
    manifest = json.loads((hub.folder / "manifest.json").read_text())
    assert manifest["splits"]["train"]["tokens"] == 120_003  # what lies there, which the trainers will read
    # No second copy of the data in a cache below the root.
    wanted = sum(len(data) for data in hub.files.values())
    assert sum(path.stat().st_size for path in hub.root.rglob("*") if path.is_file()) < wanted + 5000


def test_downloading_needs_neither_torch_nor_mlx(hub):
    code = f"""import sys
sys.modules.update(torch=None, mlx=None)  # importing either now fails
sys.path.insert(0, {str(ROOT / "data")!r})
import fineweb
sys.exit(fineweb.run_tool(fineweb.main, ["--variant", "sp512", "--train-shards", "1", "--out", {str(hub.root)!r}]))"""
    environment = os.environ | {"HF_ENDPOINT": hub.address}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "checked: 40,000 training" in done.stdout and "\r" not in done.stderr
    assert_whole(hub, 1)


def test_short_files_are_mended_and_changed_ones_with_verify(hub):
    get(hub, "--train-shards", 2)
    with open(hub.folder / "fineweb_train_000001.bin", "r+b") as file:
        file.truncate(30_000)
    (hub.folder / "fineweb_val_000000.bin").write_bytes(b"much too long " * 5000)
    model = hub.root / "tokenizers" / "small_512_bpe.model"
    model.write_bytes(model.read_bytes()[:-1] + b"\xff")
    hub.log.clear()
    get(hub, "--train-shards", 2)
    names = ["fineweb_train_000001.bin", "fineweb_val_000000.bin", "small_512_bpe.model"]
    assert sorted(hub.gets()) == [(name, 0) for name in names]
    assert_whole(hub)
    changed = hub.folder / "fineweb_train_000000.bin"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\xff")
    hub.log.clear()
    get(hub, "--train-shards", 2, "--verify")
    assert hub.gets() == [("fineweb_train_000000.bin", 0)]
    assert_whole(hub)


def test_an_interrupted_transfer_resumes(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cut = {"fineweb_train_000000.bin": 50_000}
    get(hub, "--train-shards", 2)
    starts = [start for name, start in hub.gets() if name == "fineweb_train_000000.bin"]
    assert len(starts) == 2 and 0 < starts[1] <= 50_000
    assert_whole(hub)


def test_an_interrupted_run_goes_on_in_the_next_one(hub):
    hub.fail = {"fineweb_train_000001.bin": 500}
    message = one_error(lambda: get(hub, "--train-shards", 2), hub.address, "run the same command")
    assert "data/offline.py" in message and "data/tokenize_docs.py" in message
    fetched = {name for name, _ in hub.gets()}
    hub.fail = {}
    hub.log.clear()
    get(hub, "--train-shards", 2)
    assert "fineweb_train_000001.bin" in {name for name, _ in hub.gets()}
    assert fetched and fetched.isdisjoint(name for name, _ in hub.gets())
    assert_whole(hub)


def test_wrong_content_is_never_put_in_place(hub):
    hub.flip = {"fineweb_train_000001.bin"}
    one_error(lambda: get(hub, "--train-shards", 2), "fineweb_train_000001.bin", "wrong content")
    assert not (hub.folder / "fineweb_train_000001.bin").exists()
    hub.flip = set()
    get(hub, "--train-shards", 2)  # the advice works
    assert_whole(hub)


def test_wrong_wishes_name_what_there_is(hub):
    one_error(lambda: get(hub, "--variant", "sp9999"), "sp9999", "there are: sp512")
    one_error(lambda: get(hub, "--variant", "byte260"), "byte260", "no SentencePiece model")
    one_error(lambda: get(hub, "--train-shards", 4), "at most 3", "found 4")
    one_error(lambda: get(hub, "--train-shards", 0), "--train-shards", "'0'")
    one_error(lambda: get(hub, "--repo", "some/other"), "some/other", "not found")
    one_error(lambda: get(hub, "--repo", "nonsense"), "owner/name")
    one_error(lambda: get(hub, "--revision", "6" * 40), "not found", "--revision")
    one_error(lambda: get(hub, "--endpoint", "127.0.0.1"), "http://")
    assert hub.gets() == [] and not hub.folder.exists()


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'{"datasets": 5}', b'{"datasets": [], "tokenizers": []}'])
def test_a_foreign_manifest_is_refused(hub, content):
    hub.files["datasets/manifest.json"] = content
    one_error(lambda: get(hub), "manifest")
    assert not (hub.root / "manifest.json").exists()


def test_paths_that_lead_out_of_the_folder_are_refused(hub):
    manifest = hub.files["datasets/manifest.json"]
    for good, bad in ((b"tokenizers/small", b"../../small"), (NAME.encode(), b"../a_sp512")):
        hub.files["datasets/manifest.json"] = manifest.replace(good, bad)
        one_error(lambda: get(hub), "lead out of the data folder")


def test_a_missing_shard_and_a_refused_one_are_named(hub):
    hub.fail = {"fineweb_train_000001.bin": 403}
    one_error(lambda: get(hub, "--train-shards", 2), hub.address, "403")
    hub.fail = {}
    del hub.files[f"datasets/datasets/{NAME}/fineweb_train_000002.bin"]
    one_error(lambda: get(hub, "--train-shards", 3), "fineweb_train_000002.bin", "fewer --train-shards")


def test_without_network_one_line_says_what_to_do(hub, monkeypatch):
    import huggingface_hub.constants

    get(hub, "--train-shards", 1)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    one_error(lambda: get(hub), hub.address, "data/offline.py", "data/tokenize_docs.py")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.address = "http://127.0.0.1:9"  # nobody listens there
    one_error(lambda: get(hub), "http://127.0.0.1:9", "data/offline.py", "data/tokenize_docs.py")
    assert (hub.folder / "fineweb_train_000000.bin").read_bytes() == served(hub, "fineweb_train_000000.bin")


def test_download_never_replaces_a_tokenizer_or_a_dataset_of_yours(hub, docs, two_of_one_name):
    mine = hub.root / "tokenizers" / "small_512_bpe.model"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(two_of_one_name[0].read_bytes())
    one_error(lambda: get(hub, "--train-shards", 1), "small_512_bpe.model", "no dataset's manifest names", "--out")
    assert mine.read_bytes() == two_of_one_name[0].read_bytes() and hub.gets() == []
    mine.unlink()
    call = ["--val-docs", 5, "--tokenizer", two_of_one_name[0], "--out", hub.root, "--name", NAME]
    folder, _ = tokenize(docs, *call)
    before = tokens_of(folder, "train")
    one_error(lambda: get(hub, "--train-shards", 1), NAME, "--out")
    assert np.array_equal(tokens_of(folder, "train"), before)
    hub.root = hub.root / "other"
    get(hub, "--train-shards", 2)  # the advice works
    hub.folder = hub.root / "datasets" / NAME
    assert_whole(hub)
