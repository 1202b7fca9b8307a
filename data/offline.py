"""Build a small training corpus without any network, from the documentation that Python packages bring along.

    python data/offline.py

Sources: Python's reference topics (what `help("LAMBDA")` shows), the docstrings of the standard library and of
installed packages, and the packages' descriptions and other text files. Docstrings are read from the source files;
nothing is imported. Repeated paragraphs are kept once, documents are shuffled by a hash, and some are held out for
validation. The result is data/datasets/offline_sp1024 with a tokenizer of its own, the same for the same versions.
See data/README.md.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib.metadata
import inspect
import multiprocessing
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from layout import (
    DATA_ROOT,
    InputError,
    ShardWriter,
    atomic,
    building,
    finish,
    need_space,
    need_trainer,
    progress,
    read_json,
    run,
    sha256_of,
    show,
    size,
    write_json,
)
from tokenize_docs import Encoder, train_tokenizer

NAME = "offline_sp1024"
VOCAB_SIZE = 1024
MIN_BYTES = 8_000_000
VAL_SHARE = 0.04
MIN_VAL_BYTES = 200_000
TOKENIZER_BYTES = 4_000_000
SHARD_TOKENS = 100_000_000
# What our requirements bring, directly or not. A fixed list, so that an unrelated package changes nothing.
PACKAGES = (
    *(
        "numpy",
        "torch",
        "mlx",
        "mlx_lm",
        "transformers",
        "sympy",
        "networkx",
        "mpmath",
        "matplotlib",
        "huggingface_hub",
    ),
    *("tokenizers", "safetensors", "sentencepiece", "fsspec", "filelock", "jinja2", "tqdm", "httpx2", "httpx", "yaml"),
    *("regex", "packaging", "pytest", "_pytest", "PIL", "rich", "click", "typer", "pygments", "setuptools", "pip"),
)
# Tests are not documentation; vendored copies repeat what other machines have as packages.
SKIP_FOLDERS = {
    "__pycache__",
    "test",
    "tests",
    "testing",
    "_vendor",
    "_distutils",
    "site-packages",
    "dist-packages",
    "idle_test",
    "lib2to3",
    "ensurepip",
}
# 40 MB of source whose docstrings say the same about every model; reading it would double the time.
SKIP_PATHS = {"transformers/models"}
TEXT_ENDS = {".md", ".rst", ".txt"}
MAX_TEXT_FILE = 400_000  # bytes; larger text files are word lists and tables
SHORT = 40  # a paragraph of fewer characters is a heading ("Parameters", "Examples") and may repeat


def docstrings(source, title):
    """Return the documentation in one Python source file as text: each documented object's line, then its docstring.

    source: bytes of the file. Files that this Python cannot parse give "".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's files
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    parts = []

    def add(heading, text):
        if text and len(text := inspect.cleandoc(text).strip()) >= SHORT:
            parts.append(f"{heading}\n\n{text}")

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                heading = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    heading += (
                        "("
                        + ", ".join(
                            arg.arg
                            for arg in child.args.posonlyargs + child.args.args
                            if arg.arg not in ("self", "cls")
                        )
                        + ")"
                    )
                add(heading, ast.get_docstring(child, clean=False))
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
                # Compiled functions get their text from calls such as add_docstr(torch.abs, "...").
                call = child.value
                called = getattr(call.func, "attr", getattr(call.func, "id", ""))
                if "doc" in called.lower():
                    texts = [
                        value.value
                        for value in ast.walk(call)
                        if isinstance(value, ast.Constant) and isinstance(value.value, str)
                    ]
                    if texts and len(text := max(texts, key=len)) > 100:
                        what = call.args[0] if call.args else None
                        add(ast.unparse(what) if isinstance(what, (ast.Name, ast.Attribute)) else texts[0][:80], text)
            elif isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
                visit(child, prefix)  # definitions are statements; looking into expressions would triple the time

    add(title, ast.get_docstring(tree, clean=False))
    with contextlib.suppress(RecursionError):  # an endless elif chain; what was found so far stands
        visit(tree, "")
    return "\n\n\n".join(parts)


def topics(source):
    """Return {topic: text} of pydoc_data/topics.py, a module whose only content is that dictionary."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def read_file(job):
    """Return [(document name, text)] of one file. job: (name, path)."""
    name, path = job
    try:
        raw = Path(path).read_bytes()
    except OSError:
        return []
    if name == "stdlib/pydoc_data/topics.py":
        return [(f"{name}#{topic}", text) for topic, text in sorted(topics(raw).items())]
    if path.endswith((".py", ".pyi")):
        title = name.rpartition(".")[0].partition("/")[2] if name.startswith("stdlib/") else name.rpartition(".")[0]
        return [(name, docstrings(raw, title.replace("/", ".").removesuffix(".__init__")))]
    text = raw.decode("utf-8", "replace").replace("\r\n", "\n")
    if name.endswith("METADATA"):
        text = text.partition("\n\n")[2]  # the description after the header fields
    return [(name, text)] if "\ufffd" not in text else []


def find_files(stdlib, sites, packages=PACKAGES):
    """Return ([(document name, path)] sorted by name, {what: version}) of the readable files of this Python.

    stdlib: its folder; sites: folders with installed packages, the first that has a package wins.
    """
    jobs, versions = {}, {"python": platform.python_version()}

    def walk(root, prefix, texts):
        for folder, below, names in os.walk(root):
            here = f"{prefix}/{os.path.relpath(folder, root)}/".replace(os.sep, "/").replace("/./", "/")
            below[:] = [entry for entry in below if entry not in SKIP_FOLDERS and here + entry not in SKIP_PATHS]
            for name in names:
                path = os.path.join(folder, name)
                end = os.path.splitext(name)[1]
                if end in (".py", ".pyi") or (texts and end in TEXT_ENDS and os.path.getsize(path) <= MAX_TEXT_FILE):
                    jobs.setdefault(here + name, path)

    walk(stdlib, "stdlib", texts=False)
    for package in packages:
        site = next((site for site in sites if os.path.isdir(os.path.join(site, package))), None)
        if site is not None:
            walk(os.path.join(site, package), package, texts=True)
    top_level = {package.lower() for package in packages}
    for found in importlib.metadata.distributions(path=list(dict.fromkeys(sites))):
        name = (found.metadata["Name"] or "").lower().replace("-", "_")
        top = (found.read_text("top_level.txt") or name).lower().split()
        if name in versions or not top_level.intersection([name, *top]):
            continue
        versions[name] = found.version
        for file in found.files or ():
            if file.parent.name.endswith(".dist-info") and file.name == "METADATA":
                jobs.setdefault(f"{name}/METADATA", str(found.locate_file(file)))
    return sorted(jobs.items()), dict(sorted(versions.items()))


def collect(jobs, workers):
    """Return [(document name, text)] of all files, in the order of `jobs`."""
    documents = []
    with progress(len(jobs), "reading documentation", unit=" files") as bar:
        if workers == 1:
            for job in jobs:
                documents += read_file(job)
                bar.update()
        else:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                for found in pool.map(read_file, jobs, chunksize=32):
                    documents += found
                    bar.update()
    return documents


def deduplicate(documents):
    """Return the documents with every paragraph kept only where it first occurs; what has little left goes.

    Licences, inherited docstrings and copied argument lists would otherwise be the most frequent text of the corpus.
    """
    seen, kept = set(), []
    for name, text in documents:
        paragraphs = []
        for paragraph in re.split(r"\n[ \t]*\n", text):
            words = " ".join(paragraph.split())
            if len(words) >= SHORT:
                key = hashlib.blake2b(words.lower().encode("utf-8", "replace"), digest_size=12).digest()
                if key in seen:
                    continue
                seen.add(key)
            if words:
                paragraphs.append(paragraph.strip("\n").rstrip())
        # Headings that have lost what stood below them say nothing.
        while paragraphs and len(" ".join(paragraphs[-1].split())) < SHORT:
            paragraphs.pop()
        text = "\n\n".join(paragraphs).encode("utf-8", "replace").decode("utf-8")
        if len(text) >= 200:
            kept.append((name, text))
    return kept


def text_bytes(documents):
    """Return the UTF-8 bytes of all texts."""
    return sum(len(text.encode("utf-8")) for _, text in documents)


def split(documents, share=VAL_SHARE, least=MIN_VAL_BYTES):
    """Shuffle documents by a hash of their text; hold out the first `share` of the bytes, at least `least` bytes.

    Returns (train, val). A document above 1 % of the whole stays in training, so that validation has many voices.
    """
    total = text_bytes(documents)
    wanted = max(share * total, least)
    order = sorted(documents, key=lambda item: hashlib.sha256(item[1].encode("utf-8")).digest())
    train, val, held = [], [], 0
    for name, text in order:
        length = len(text.encode("utf-8"))
        if held < wanted and length <= max(0.01 * total, 20_000):
            val.append((name, text))
            held += length
        else:
            train.append((name, text))
    return train, val


def sample(documents, limit):
    """Yield texts of evenly spaced documents, about `limit` bytes in all."""
    total = sum(len(text) for _, text in documents)
    every = max(1, -(-total // limit))
    for number, (_, text) in enumerate(documents):
        if number % every == 0:
            yield text


def build(out, force=False, workers=None, stdlib=None, sites=None, min_bytes=MIN_BYTES, vocab_size=VOCAB_SIZE):
    """Build the corpus below `out`; return (dataset folder, tokenizer path). Raises InputError on too little text."""
    need_trainer()
    started = time.time()
    workers = workers or min(4, os.cpu_count() or 1)
    folder, model_path = Path(out) / "datasets" / NAME, Path(out) / "tokenizers" / "offline_1024_bpe.model"
    stdlib = stdlib or sysconfig.get_path("stdlib")
    sites = sites or [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    jobs, versions = find_files(stdlib, sites)
    import sentencepiece

    versions["sentencepiece (trainer)"] = sentencepiece.__version__
    # A changed tool may give a changed corpus, so its source counts as a version too.
    tools = [Path(__file__), Path(__file__).with_name("tokenize_docs.py"), Path(__file__).with_name("layout.py")]
    wanted = {"tools_sha256": [sha256_of(tool)[:16] for tool in tools], "versions": versions}
    old = read_json(folder / "manifest.json")
    if not force and isinstance(old, dict) and old.get("built_from") == wanted and complete(old, folder, model_path):
        print(f"{show(folder)} is already built from these versions (--force builds it again)")
        return folder, model_path
    need_space(out, 120_000_000, "the offline corpus")
    documents = collect(jobs, workers)
    raw_bytes = sum(len(text) for _, text in documents)
    documents = deduplicate(documents)
    train, val = split(documents)
    counted = {which: text_bytes(part) for which, part in (("train", train), ("val", val))}
    total = sum(counted.values())
    if total < min_bytes:
        raise InputError(
            f"the documentation installed here gives {size(total)} of text, the offline corpus needs at "
            f"least {size(min_bytes)}; run: pip install -r requirements.txt (numpy, torch and mlx bring most "
            f"of it), with this Python ({sys.executable})"
        )
    print(
        f"{size(total)} of text in {len(documents):,} documents ({size(raw_bytes)} before removing repetitions), "
        f"{time.time() - started:.0f} s; training a tokenizer of {vocab_size} pieces ...",
        flush=True,
    )
    with building(folder, replace=True) as new:
        new_model = new / model_path.name
        train_tokenizer(sample(train, TOKENIZER_BYTES), vocab_size, new_model)
        encoder = Encoder(new_model)
        splits = {}
        with progress(total, "tokenizing") as bar:
            for which, part in (("train", train), ("val", val)):
                writer = ShardWriter(new, which, SHARD_TOKENS)
                for _, text in part:
                    writer.add(encoder(text))
                    bar.update(len(text.encode("utf-8")))
                files = writer.close()
                splits[which] = {"documents": len(part), "text_bytes": counted[which], "tokens": writer.tokens}
                splits[which]["files"] = files
        by_source = {}
        for name, text in train + val:
            source = name.partition("/")[0]
            by_source[source] = by_source.get(source, 0) + len(text.encode("utf-8"))
        write_json(
            new / "manifest.json",
            {
                "name": NAME,
                "made_by": "data/offline.py",
                "tokenizer": {
                    "path": f"tokenizers/{model_path.name}",
                    "vocab_size": vocab_size,
                    "bos_id": encoder.model.bos_id(),
                    "sha256": sha256_of(new_model),
                },
                "splits": splits,
                "text_bytes_by_source": dict(sorted(by_source.items(), key=lambda item: -item[1])),
                "built_from": wanted,
            },
        )
        with atomic(model_path) as file, open(new_model, "rb") as source:
            shutil.copyfileobj(source, file)
        new_model.unlink()
    tokens = sum(part["tokens"] for part in splits.values())
    print(
        f"{size(total)} of text -> {tokens:,} tokens ({total / tokens:.2f} bytes a token), "
        f"{counted['val'] / total:.1%} held out, in {time.time() - started:.0f} s"
    )
    return folder, model_path


def complete(manifest, folder, model_path):
    """Say whether every file of a manifest lies there in its stated size, and the tokenizer with its hash."""
    files = [file for part in manifest["splits"].values() for file in part["files"]]
    lie = [
        (folder / file["name"]).is_file() and (folder / file["name"]).stat().st_size == file["bytes"] for file in files
    ]
    return all(lie) and model_path.is_file() and sha256_of(model_path) == manifest["tokenizer"]["sha256"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", default=str(DATA_ROOT), help="root of datasets/ and tokenizers/ (default: data/)")
    parser.add_argument("--force", action="store_true", help="build again even if the same versions are already built")
    parser.add_argument("--workers", type=int, help="processes that read source files (default: up to 4)")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers {args.workers}: expected a whole number of at least 1")
    finish(*build(args.out, args.force, args.workers))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
