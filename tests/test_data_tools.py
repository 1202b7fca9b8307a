"""The data tools: the shard format, tokenizing, the offline corpus, and the downloader against a hub on this machine.

Everything ends in `layout.check_dataset`, that is in the reader of the training script. No test leaves 127.0.0.1.
"""

import gzip
import hashlib
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

import numpy as np
import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "data"))
# The stand-in for the hub is on this machine: no proxy, no token of the user, no offline switch.
os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1", HF_HUB_DISABLE_IMPLICIT_TOKEN="1", HF_HUB_OFFLINE="0")

import fineweb  # noqa: E402
import layout  # noqa: E402
import offline  # noqa: E402
import tokenize_docs  # noqa: E402
from layout import InputError  # noqa: E402

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
    tokenize_docs.train_tokenizer(make_texts(200), VOCAB, path)
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
    layout.write_shard(tmp_path / "a.bin", [1, 2, 65535])
    raw = (tmp_path / "a.bin").read_bytes()
    assert len(raw) == 1024 + 6
    assert raw[:12] == (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + (3).to_bytes(4, "little")
    assert raw[12:1024] == bytes(1012)
    assert raw[1024:] == b"\x01\x00\x02\x00\xff\xff"
    assert layout.shard_tokens(tmp_path / "a.bin") == 3
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("bad", [[65536], [-1, 5]])
def test_ids_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, bad):
    one_error(lambda: layout.write_shard(tmp_path / "a.bin", bad), "0..65535", str(bad[0]))
    assert list(tmp_path.iterdir()) == []


def test_writer_cuts_the_stream_into_equal_shards(tmp_path):
    writer = layout.ShardWriter(tmp_path, "train", 100)
    stream = np.arange(250, dtype=np.uint16)
    for part in np.split(stream, [3, 90, 215]):
        writer.add(part)
    assert [file["tokens"] for file in writer.close()] == [100, 100, 50]
    assert np.array_equal(tokens_of(tmp_path, "train"), stream)
    assert leftovers(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(RuntimeError), layout.atomic(tmp_path / "a.json") as file:
        file.write(b"new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_too_little_disk_is_refused(tmp_path):
    one_error(lambda: layout.need_space(tmp_path / "new" / "folder", 1 << 60, "this"), "this needs", "--out")


def test_check_dataset_uses_the_trainers_reader(tmp_path, tokenizer):
    one_error(lambda: layout.check_dataset(tmp_path, tokenizer), "fineweb_train")
    layout.write_shard(tmp_path / "fineweb_train_000000.bin", np.full(5000, 7))
    one_error(lambda: layout.check_dataset(tmp_path, tokenizer), "fineweb_val")
    layout.write_shard(tmp_path / "fineweb_val_000000.bin", np.full(3000, 7))
    assert layout.check_dataset(tmp_path, tokenizer) == (VOCAB, 5000, 3000)
    layout.write_shard(tmp_path / "fineweb_val_000000.bin", np.full(3000, VOCAB))
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
    assert model == tmp_path / "tokenizers" / "small_512_bpe.model"
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
    one, two = make_texts(40, seed=1), make_texts(30, seed=2)
    plain = [write_jsonl(tmp_path / "a.jsonl", one), write_jsonl(tmp_path / "b.jsonl", two)]
    packed = [
        write_jsonl(tmp_path / "a.jsonl.xz", one, lzma.open),
        write_jsonl(tmp_path / "b.jsonl.gz", two, gzip.open),
    ]
    results = []
    for name, inputs, workers in (("plain", plain, 1), ("packed", packed, 2)):
        folder, _ = tokenize(*inputs, "--val-docs", 45, "--tokenizer", tokenizer, "--name", name, "--out", tmp_path,
                             "--workers", workers, "--shard-tokens", 3000)  # fmt: skip
        results.append({path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))})
    assert len(results[0]) > 4
    assert results[0] == results[1]


def test_word_table_gives_the_ids_of_sentencepiece_for_all_of_unicode(tokenizer):
    encoder = tokenize_docs.Encoder(tokenizer)
    assert encoder.words is not None
    letters = [chr(code) for code in range(1, 0x11000) if not 0xD800 <= code < 0xE000]
    texts = [
        between.join(letters[start : start + 400])
        for start in range(0, len(letters), 400)
        for between in ("", " ", "x")
    ]
    for text in [*texts, *make_texts(20, seed=5), "  two  spaces \u2581 \u2581\u2581x", "<s> </s> <0x41>", ""]:
        assert encoder(text).tolist() == [1, *encoder.model.encode(text)]


def test_word_table_is_not_used_where_it_would_be_wrong(tmp_path):
    import sentencepiece

    model = tmp_path / "unigram.model"
    with open(model, "wb") as file:
        options = {"model_type": "unigram", "vocab_size": 400, "byte_fallback": True, "minloglevel": 2}
        texts = iter(make_texts(100))
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=file, **options)
    encoder = tokenize_docs.Encoder(model)
    assert encoder.words is None
    assert encoder("one text").tolist() == [1, *encoder.model.encode("one text")]


def test_trained_tokenizer_is_like_the_challenges_and_never_sees_validation(tmp_path, capsys):
    texts = make_texts(40, seed=3)
    inputs = write_jsonl(tmp_path / "docs.jsonl", ["\u0416" * 3000 + " q"] * 2 + texts)
    args = ["--val-docs", "2", "--vocab-size", "400", "--name", "mine", "--out", str(tmp_path), "--workers", "1"]
    tokenize_docs.main([inputs, *args])
    sp = layout.load_sentencepiece(tmp_path / "tokenizers" / "mine_bpe.model")
    assert (sp.vocab_size(), sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (400, 0, 1, 2, 3)
    assert sp.is_byte(4) and sp.decode(sp.encode("\u65e5 xyz \U0001f600")) == "\u65e5 xyz \U0001f600"
    assert not any("\u0416" in sp.id_to_piece(i) for i in range(400))
    shown = capsys.readouterr()
    assert "VOCAB_SIZE=400 " in shown.out.splitlines()[-1] and "DATA_PATH=" in shown.out.splitlines()[-1]
    assert "\r" not in shown.out + shown.err and "\x1b" not in shown.out + shown.err
    first = (tmp_path / "tokenizers" / "mine_bpe.model").read_bytes()
    tokenize_docs.main([inputs, *args, "--force"])
    assert (tmp_path / "tokenizers" / "mine_bpe.model").read_bytes() == first
    assert not (tmp_path / "datasets" / "mine" / "new.model").exists()


def test_plain_text_is_cut_into_documents(tmp_path, tokenizer):
    lines = "".join(f"line {number} of the text\n" + ("\n" if number % 10 == 9 else "") for number in range(100))
    (tmp_path / "a.txt").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "b.txt").write_text("first\n\nstill first\n<|end|>\nsecond\n<|end|>\n\n", encoding="utf-8")
    whole = tokenize_docs.Source(tmp_path / "a.txt", doc_bytes=600)
    pieces = [whole.text(*item) for item in whole]
    assert "".join(pieces) == lines and len(pieces) == 3
    assert all(piece.endswith("\n\n") for piece in pieces)
    split = tokenize_docs.Source(tmp_path / "b.txt", separator="<|end|>")
    assert [split.text(*item) for item in split] == ["first\n\nstill first\n", "second\n"]
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
    yield "blank.jsonl", b"\n\n", ["no training text"]
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


def test_bad_documents_are_named_from_a_worker_too(tmp_path, docs, tokenizer):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nhello\n')
    one_error(lambda: tokenize(tmp_path / "bad.jsonl", "--val", docs, "--tokenizer", tokenizer, "--out", tmp_path,
                               "--workers", 2), "bad.jsonl", "line 2")  # fmt: skip


def test_bad_options_are_refused(tmp_path, docs, tokenizer):
    out = ("--out", tmp_path, "--workers", 1)
    one_error(lambda: tokenize(docs, "--val-docs", 5, *out), "--tokenizer", "--vocab-size")
    one_error(lambda: tokenize(docs, "--tokenizer", tokenizer, *out), "--val", "--val-docs")
    one_error(lambda: tokenize(docs, "--val-docs", 60, "--tokenizer", tokenizer, *out), "takes all 60 documents")
    one_error(lambda: tokenize(docs, "--val", docs, "--tokenizer", tokenizer, *out), "held out")
    one_error(lambda: tokenize(docs, "--val-docs", 5, "--vocab-size", 65537, *out), "65537", "65536")
    one_error(lambda: tokenize(docs, "--val-docs", 5, "--vocab-size", 100, *out), "100", "300")
    one_error(lambda: tokenize(docs, "--val-docs", 5, "--vocab-size", 60000, *out), "60000", "more text")
    one_error(lambda: tokenize(docs, "--val-docs", 0, "--tokenizer", tokenizer, *out), "--val-docs 0")
    one_error(lambda: tokenize(docs, "--val-docs", 5, "--tokenizer", docs, *out), "docs.jsonl", "not a SentencePiece")
    one_error(
        lambda: tokenize(docs, "--val-docs", 5, "--tokenizer", tmp_path / "no.model", *out), "no.model", "no such file"
    )
    one_error(lambda: tokenize(docs, "--val-docs", 5, "--tokenizer", tokenizer, "--name", "../x", *out), "'../x'")
    one_error(lambda: tokenize(tmp_path / "gone.jsonl", "--val-docs", 5, "--tokenizer", tokenizer, *out), "gone.jsonl")
    assert not (tmp_path / "datasets").exists() or list((tmp_path / "datasets").iterdir()) == []
    assert not (tmp_path / "tokenizers").exists()


def test_an_existing_dataset_is_replaced_only_by_force_and_as_a_whole(tmp_path, docs, tokenizer):
    args = (docs, "--val-docs", 5, "--tokenizer", tokenizer, "--out", tmp_path, "--workers", 1)
    folder, _ = tokenize(*args, "--shard-tokens", 2000)
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


def test_a_failed_run_keeps_the_old_dataset_and_clears_what_a_killed_one_left(tmp_path, docs, tokenizer):
    args = ("--val", docs, "--tokenizer", tokenizer, "--out", tmp_path, "--workers", 1, "--force")
    (tmp_path / "other.txt").write_text("some text\n")
    (tmp_path / "bad.jsonl").write_text("bad\n")
    folder, _ = tokenize(tmp_path / "other.txt", *args)
    (tmp_path / "datasets" / "docs_sp512.99999999.part").mkdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    one_error(lambda: tokenize(tmp_path / "bad.jsonl", *args), "bad.jsonl line 1")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert leftovers(tmp_path) == []


def test_vocabularies_above_uint16_are_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(layout, "MAX_VOCAB", 500)
    one_error(lambda: layout.load_sentencepiece(tokenizer), "512", "500", "uint16")


def test_command_line_ends_in_one_line_and_exit_code_1(tmp_path):
    tool = [sys.executable, str(REPO / "data" / "tokenize_docs.py")]
    done = subprocess.run([*tool, "gone.jsonl", "--val-docs", "1", "--vocab-size", "400", "--out", str(tmp_path)],
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: input gone.jsonl: no such file\n"
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
        [sys.executable, "-c", code], check=True, cwd=REPO / "data", env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    offline.build(tmp_path / "1", workers=1, **options)
    built = []
    for number in (0, 1):
        folder = tmp_path / str(number) / "datasets" / offline.NAME
        model = tmp_path / str(number) / "tokenizers" / "offline_1024_bpe.model"
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
    assert leftovers(tmp_path / "1") == []


def test_offline_says_what_to_install_when_there_is_too_little(tmp_path, python_tree):
    one_error(
        lambda: offline.build(tmp_path / "out", workers=1, **python_tree), "8.0 MB", "pip install -r requirements.txt"
    )
    assert not (tmp_path / "out" / "datasets").exists()


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
    jobs, versions = offline.find_files(paths("stdlib"), [paths("purelib"), paths("platlib")], ("numpy",))
    assert versions["numpy"] == np.__version__ and "python" in versions
    assert not any("/tests/" in name or "__pycache__" in name for name, _ in jobs)
    few = [
        job for job in jobs if job[0].startswith(("stdlib/json/", "stdlib/pydoc_data/topics", "numpy/linalg/_linalg"))
    ]
    found = dict(offline.deduplicate(offline.collect(few, 1)))
    assert "JSONDecodeError" in found["stdlib/json/decoder.py"] and "solve(a, b)" in found["numpy/linalg/_linalg.py"]
    if any(name.endswith("topics.py") for name, _ in few):
        assert "lambda" in found["stdlib/pydoc_data/topics.py#lambda"].lower()


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


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks a hub for: HEAD and GET of /datasets/<repo>/resolve/<revision>/<path>.

    Large files are redirected to another path, as the real hub does, with their SHA-256 in X-Linked-Etag.
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.log = files, []
        self.cut = {}  # file name -> how many bytes to send before hanging up, once
        self.fail = {}  # file name -> HTTP status to give instead, always
        self.ranges = True
        self.gone = False
        self.flip = set()  # names of files whose content is wrong on the wire
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def gets(self):
        return [(name, start) for method, name, start in self.log if method == "GET" and name != "manifest.json"]

    def handle_error(self, request, address):
        pass  # clients hang up when a test makes them


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub, path = self.server, self.path
        if hub.gone:
            self.close_connection = True  # without an answer
            return None
        prefix = "/datasets/willdepueoai/parameter-golf/resolve/"
        direct = path.startswith("/cdn/")
        if not direct and not path.startswith(prefix):
            return self.reply(404)
        revision, _, path = (f"{COMMIT}/" + path[5:] if direct else path[len(prefix) :]).partition("/")
        data, name = hub.files.get(path), path.rpartition("/")[2]
        if data is None or revision not in ("main", COMMIT):
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        if name in hub.fail:
            return self.reply(hub.fail[name])
        headers = {"X-Repo-Commit": COMMIT}
        if name == "manifest.json":
            headers["ETag"] = f'"{hashlib.sha1(b"blob %d" % len(data) + bytes(1) + data).hexdigest()}"'
        else:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            if not direct:
                return self.reply(302, headers | {"Location": f"{hub.address}/cdn/{path}"})
        asked = self.headers.get("Range")
        start = int(asked[6:].partition("-")[0]) if asked and hub.ranges else 0
        if self.command == "GET":
            hub.log.append(("GET", name, start))
        if start:
            if start >= len(data):
                return self.reply(416)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if name in hub.flip:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.reply(
            206 if start else 200, headers, data[start:], hub.cut.pop(name, None) if self.command == "GET" else None
        )

    def reply(self, status, headers=None, body=b"", cut=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True


@pytest.fixture
def hub(tokenizer, tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    files = {}
    for number in range(3):
        layout.write_shard(tmp_path / "shard", rng.integers(4, VOCAB, 40_000 + number))
        files[f"datasets/datasets/{NAME}/fineweb_train_{number:06d}.bin"] = (tmp_path / "shard").read_bytes()
    layout.write_shard(tmp_path / "shard", rng.integers(4, VOCAB, 9_000))
    files[f"datasets/datasets/{NAME}/fineweb_val_000000.bin"] = (tmp_path / "shard").read_bytes()
    (tmp_path / "shard").unlink()
    files["datasets/tokenizers/small_512_bpe.model"] = Path(tokenizer).read_bytes()
    files["datasets/docs_selected.jsonl"] = b'{"text": "x"}\n'
    files["datasets/docs_selected.source_manifest.json"] = b"{}"
    stats = {"files_train": 3, "files_val": 1}
    manifest = {
        "datasets": [{"name": NAME, "tokenizer_name": "bpe512", "stats": stats},
                     {"name": "fineweb10B_byte260", "tokenizer_name": "bytes", "stats": stats}],
        "tokenizers": [{"name": "bpe512", "model_path": "tokenizers/small_512_bpe.model"},
                       {"name": "bytes", "path": "tokenizers/bytes.json"}],
    }  # fmt: skip
    files["datasets/manifest.json"] = json.dumps(manifest).encode()
    monkeypatch.setattr(fineweb, "PAUSE", 0.0)
    monkeypatch.setattr(fineweb.time, "sleep", lambda seconds: None)
    server = Hub(files)
    server.root = tmp_path / "root"
    server.folder = server.root / "datasets" / NAME
    yield server
    if not server.gone:
        server.shutdown()
        server.server_close()


def get(hub, *arguments):
    args = ["--variant", "sp512", "--endpoint", hub.address, "--out", str(hub.root), *map(str, arguments)]
    fineweb.main(args)


def served(hub, name):
    return next(data for path, data in hub.files.items() if path.endswith("/" + name))


def assert_whole(hub, shards=2):
    names = [f"fineweb_train_{number:06d}.bin" for number in range(shards)] + ["fineweb_val_000000.bin"]
    assert sorted(path.name for path in hub.folder.glob("*.bin")) == names
    assert all((hub.folder / name).read_bytes() == served(hub, name) for name in names)
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
    hub.log.clear()
    get(hub, "--train-shards", 2)
    assert hub.gets() == []
    assert "0 downloaded, 4 were here" in capsys.readouterr().out
    get(hub)  # the default asks for 80, the variant has 3
    assert hub.gets() == [("fineweb_train_000002.bin", 0)]
    assert_whole(hub, 3)
    get(hub, "--train-shards", 1, "--with-docs")
    assert (hub.root / "docs_selected.jsonl").read_bytes() == b'{"text": "x"}\n'
    # No second copy of the data in a cache below the root.
    wanted = sum(len(data) for data in hub.files.values())
    assert sum(path.stat().st_size for path in hub.root.rglob("*") if path.is_file()) < wanted + 5000


def test_a_truncated_file_is_completed_and_a_changed_one_fetched_again(hub, capsys):
    get(hub, "--train-shards", 2)
    with open(hub.folder / "fineweb_train_000001.bin", "r+b") as file:
        file.truncate(30_000)
    changed = hub.folder / "fineweb_train_000000.bin"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\xff")
    (hub.folder / "fineweb_val_000000.bin").write_bytes(b"much too long " * 5000)
    hub.log.clear()
    get(hub, "--train-shards", 2)
    assert sorted(hub.gets()) == [("fineweb_train_000000.bin", 0), ("fineweb_train_000001.bin", 30_000),
                                  ("fineweb_val_000000.bin", 0)]  # fmt: skip
    assert_whole(hub)
    assert capsys.readouterr().out.count("repairing") == 3


def test_an_interrupted_transfer_resumes(hub, monkeypatch):
    monkeypatch.setattr(fineweb, "CHUNK", 10_000)
    hub.cut = {"fineweb_train_000000.bin": 50_000}
    get(hub, "--train-shards", 2, "--jobs", 1)
    starts = [start for name, start in hub.gets() if name == "fineweb_train_000000.bin"]
    assert len(starts) == 2 and 0 < starts[1] <= 50_000
    assert_whole(hub)


def test_an_interrupted_run_resumes_in_the_next_one(hub, monkeypatch):
    monkeypatch.setattr(fineweb, "TRIES", 1)
    monkeypatch.setattr(fineweb, "CHUNK", 10_000)
    hub.cut = {"fineweb_train_000001.bin": 50_000}
    message = one_error(
        lambda: get(hub, "--train-shards", 2, "--jobs", 1), "fineweb_train_000001.bin", "run the same command"
    )
    assert "offline.py" in message
    assert not (hub.folder / "fineweb_train_000001.bin").exists()
    assert 0 < (hub.folder / "fineweb_train_000001.bin.part").stat().st_size <= 50_000
    hub.log.clear()
    get(hub, "--train-shards", 2)
    assert [name for name, start in hub.gets()] == ["fineweb_train_000001.bin"] and hub.gets()[0][1] > 0
    assert_whole(hub)


def test_a_wrong_part_file_costs_one_more_download(hub):
    hub.folder.mkdir(parents=True)
    (hub.folder / "fineweb_train_000000.bin.part").write_bytes(b"of another version" * 100)
    (hub.folder / "fineweb_train_000001.bin.part").write_bytes(bytes(200_000))  # longer than the file
    get(hub, "--train-shards", 2)
    assert [start for name, start in hub.gets() if name == "fineweb_train_000000.bin"] == [1800, 0]
    assert_whole(hub)


def test_a_server_without_ranges_is_read_from_the_start(hub):
    hub.ranges = False
    hub.cut = {"fineweb_train_000000.bin": 50_000}
    get(hub, "--train-shards", 2)
    assert_whole(hub)


def test_a_server_that_always_hangs_up_and_cannot_resume_ends_in_an_error(hub, monkeypatch):
    monkeypatch.setattr(fineweb, "CHUNK", 10_000)
    hub.ranges = False

    class Always(dict):
        def pop(self, name, default=None):
            return self.get(name, default)

    hub.cut = Always({"fineweb_train_000000.bin": 50_000})
    one_error(lambda: get(hub, "--train-shards", 2), "fineweb_train_000000.bin", "run the same command")
    assert len(hub.gets()) < 20


def test_wrong_content_is_never_put_in_place(hub):
    hub.flip = {"fineweb_train_000001.bin"}
    one_error(lambda: get(hub, "--train-shards", 2), "fineweb_train_000001.bin", "wrong content")
    assert not (hub.folder / "fineweb_train_000001.bin").exists()


def test_wrong_wishes_name_what_there_is(hub):
    one_error(lambda: get(hub, "--variant", "sp9999"), "sp9999", "byte260", "sp512")
    one_error(lambda: get(hub, "--variant", "byte260"), "byte260", "no SentencePiece model")
    one_error(lambda: get(hub, "--train-shards", 4), "3 training shards", "asks for 4")
    one_error(lambda: get(hub, "--train-shards", 0), "--train-shards 0")
    one_error(lambda: get(hub, "--repo", "some/other"), "some/other", "not found")
    one_error(lambda: get(hub, "--repo", "nonsense"), "owner/name")
    one_error(lambda: get(hub, "--endpoint", "127.0.0.1"), "http://")
    assert hub.gets() == [] and not hub.root.exists()


def test_the_manifest_is_always_refreshed(hub):
    get(hub, "--train-shards", 1)
    manifest = json.loads(hub.files["datasets/manifest.json"])
    manifest["datasets"].append(
        {"name": "fineweb10B_sp777", "tokenizer_name": "bpe512", "stats": {"files_train": 1, "files_val": 1}}
    )
    hub.files["datasets/manifest.json"] = json.dumps(manifest).encode()
    one_error(lambda: get(hub, "--variant", "sp9999"), "sp777")


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'{"datasets": 5}', b'{"datasets": [], "tokenizers": []}'])
def test_a_foreign_manifest_is_refused(hub, content):
    hub.files["datasets/manifest.json"] = content
    one_error(lambda: get(hub), "manifest")
    assert not hub.root.exists()


def test_paths_that_lead_out_of_the_folder_are_refused(hub):
    hub.files["datasets/manifest.json"] = hub.files["datasets/manifest.json"].replace(
        b"tokenizers/small", b"../../small"
    )
    one_error(lambda: get(hub), "leads out of the data folder")


def test_a_missing_shard_and_a_refused_one_are_named(hub):
    hub.fail = {"fineweb_train_000001.bin": 403}
    one_error(lambda: get(hub, "--train-shards", 2), "fineweb_train_000001.bin", "HTTP 403")
    hub.fail = {"fineweb_train_000001.bin": 503}
    one_error(lambda: get(hub, "--train-shards", 2), "fineweb_train_000001.bin", "503")
    hub.fail = {}
    del hub.files[f"datasets/datasets/{NAME}/fineweb_train_000002.bin"]
    one_error(lambda: get(hub, "--train-shards", 3), "fineweb_train_000002.bin", "404")


def test_too_little_disk_stops_before_the_first_byte(hub, monkeypatch):
    usage = layout.shutil.disk_usage(".")
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda place: usage._replace(free=100_000))
    one_error(lambda: get(hub, "--train-shards", 3), "100.0 kB free", "--out")
    assert hub.gets() == []


def test_server_gone(hub, capsys):
    get(hub, "--train-shards", 1)
    capsys.readouterr()
    hub.gone = True  # for connections that are still open
    hub.shutdown()
    hub.server_close()
    get(hub, "--train-shards", 1)  # everything asked for is here and verified
    assert "hub is out of reach" in capsys.readouterr().out
    one_error(lambda: get(hub, "--train-shards", 2), hub.address, "data/offline.py", "data/tokenize_docs.py")
    with open(hub.folder / "fineweb_train_000000.bin", "r+b") as file:
        file.truncate(500)
    one_error(lambda: get(hub, "--train-shards", 1), hub.address, "data/offline.py")
