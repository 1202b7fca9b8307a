"""Build a small training corpus without any network, from the documentation that Python packages bring along.

    python data/offline.py                        data/datasets/offline_sp1024, what `make demo` trains on
    python data/offline.py --vocab-size=8192      data/datasets/offline_sp8192

Docstrings are read from the source files; nothing is imported. The result has a tokenizer of its own, and is the same
for the same versions. data/README.md says what is in it.
"""

import ast
import contextlib
import hashlib
import importlib.metadata
import inspect
import multiprocessing
import os
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import layout
from tokenize_docs import train_tokenizer, write_dataset
from tool import InputError, Parser, run_tool, sha256_of

VOCAB_SIZE = 1024
MIN_BYTES = 8_000_000
VAL_SHARE = 0.04
MIN_VAL_BYTES = 200_000
TOKENIZER_CHARACTERS = 4_000_000
# What our requirements bring, directly or not. A fixed list, so that an unrelated package changes nothing.
PACKAGES = """numpy torch mlx mlx_lm transformers sympy networkx mpmath matplotlib huggingface_hub tokenizers
    safetensors sentencepiece fsspec filelock jinja2 tqdm httpx2 httpx yaml regex packaging pytest _pytest PIL rich
    click typer pygments setuptools pip""".split()
# Tests are not documentation; vendored copies repeat what other machines have as packages.
SKIP_FOLDERS = """__pycache__ test tests testing _vendor _distutils site-packages dist-packages idle_test lib2to3
    ensurepip""".split()
# Much source with few docstrings, or with the same ones for every model: reading it would double the time.
SKIP_PATHS = {"transformers/models", "mlx_lm/models", "torch/_inductor", "torch/_dynamo", "pygments/lexers"}
TEXT_ENDS = {".md", ".rst", ".txt"}
MAX_TEXT_FILE = 400_000  # bytes; larger text files are word lists and tables
SHORT = 40  # a paragraph of fewer characters is a heading ("Parameters", "Examples") and may repeat
Document = tuple[str, str]  # name, text


# ---- reading ---------------------------------------------------------------------------------------------------------


def docstrings(source: bytes, title: str) -> str:
    """The documentation in one Python source file: each documented object's line, then its docstring.

    Files that this Python cannot parse give "".
    """
    if b'"""' not in source:
        return ""  # saves parsing one file in four
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's files
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    found = [(title, ast.get_docstring(tree, clean=False))]
    with contextlib.suppress(RecursionError):  # an endless elif chain; what was found so far stands
        found += documented(tree, "")
    cleaned = [(heading, inspect.cleandoc(text).strip()) for heading, text in found if text]
    return "\n\n\n".join(f"{heading}\n\n{text}" for heading, text in cleaned if len(text) >= SHORT)


def documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str | None]]:
    """Yields (heading, docstring) of the classes, functions and documenting calls below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            heading = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                names = [argument.arg for argument in child.args.posonlyargs + child.args.args]
                heading += f"({', '.join(name for name in names if name not in ('self', 'cls'))})"
            yield heading, ast.get_docstring(child, clean=False)
            yield from documented(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from told_by_call(child.value)
        elif isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            # Definitions are statements; looking into expressions would triple the time.
            yield from documented(child, prefix)


def told_by_call(call: ast.Call) -> Iterator[tuple[str, str]]:
    """Yields the text of calls such as add_docstr(torch.abs, "..."), which document compiled functions."""
    if "doc" not in getattr(call.func, "attr", getattr(call.func, "id", "")).lower():
        return
    constants = [value.value for value in ast.walk(call) if isinstance(value, ast.Constant)]
    texts = [value for value in constants if isinstance(value, str)]
    if texts and len(text := max(texts, key=len)) > 100:
        named = call.args and isinstance(call.args[0], (ast.Name, ast.Attribute))
        yield ast.unparse(call.args[0]) if named else texts[0][:80], text


def read_file(job: tuple[str, str]) -> list[Document]:
    """The documents of one file. job: (document name, path)."""
    name, path = job
    try:
        raw = Path(path).read_bytes()
    except OSError:
        return []
    if name == "stdlib/pydoc_data/topics.py":
        topics = [node.value for node in ast.parse(raw).body if isinstance(node, ast.Assign)][:1]  # a dictionary
        found = [pair for values in topics for pair in sorted(ast.literal_eval(values).items())]
        return [(f"{name}#{topic}", text) for topic, text in found]
    if path.endswith((".py", ".pyi")):
        title = name.removeprefix("stdlib/").rpartition(".")[0].replace("/", ".").removesuffix(".__init__")
        return [(name, docstrings(raw, title))]
    text = raw.decode("utf-8", "replace").replace("\r\n", "\n")
    return [(name, text)] if "\ufffd" not in text else []


def find_files(stdlib: str, sites: list[str], packages: list[str] = PACKAGES) -> list[tuple[str, str]]:
    """(document name, path), sorted by name, of the readable files of this Python.

    stdlib: its folder; sites: folders with installed packages, the first that has a package wins.
    """
    roots = {"stdlib": stdlib}
    for package in packages:
        places = [os.path.join(site, package) for site in sites]
        if place := next(filter(os.path.isdir, places), None):
            roots[package] = place
    jobs = []
    for prefix, root in roots.items():
        ends = {".py", ".pyi"} if prefix == "stdlib" else {".py", ".pyi"} | TEXT_ENDS
        for folder, below, names in os.walk(root):
            here = f"{prefix}/{os.path.relpath(folder, root)}/".replace(os.sep, "/").replace("/./", "/")
            below[:] = [entry for entry in below if entry not in SKIP_FOLDERS and here + entry not in SKIP_PATHS]
            for name in names:
                path, end = os.path.join(folder, name), os.path.splitext(name)[1]
                if end in ends and (end not in TEXT_ENDS or os.path.getsize(path) <= MAX_TEXT_FILE):
                    jobs.append((here + name, path))
    return sorted(jobs)


def descriptions(sites: list[str], packages: list[str] = PACKAGES) -> tuple[list[Document], dict[str, str]]:
    """The packages' own descriptions, as documents, and {package: version}."""
    wanted = {package.lower() for package in packages}
    documents, versions = [], {}
    for found in importlib.metadata.distributions(path=list(dict.fromkeys(sites))):
        name = (found.metadata["Name"] or "").lower().replace("-", "_")
        modules = (found.read_text("top_level.txt") or "").lower().split()
        if name not in versions and wanted.intersection([name, *modules]):
            versions[name] = found.version
            documents.append((f"{name}/METADATA", str(found.metadata.get_payload() or "")))
    return sorted(documents), dict(sorted(versions.items()))


def collect(jobs: list[tuple[str, str]], workers: int) -> list[Document]:
    """The documents of all files, in the order of `jobs`."""
    spawn = multiprocessing.get_context("spawn")  # the trainers' libraries have threads, which a fork would not have
    with ProcessPoolExecutor(workers, spawn) as pool:  # it starts a process when it gets work
        found = pool.map(read_file, jobs, chunksize=32) if workers > 1 else map(read_file, jobs)
        bar = layout.progress(len(jobs), "reading documentation", " files", found)
        return [document for part in bar for document in part]


# ---- choosing --------------------------------------------------------------------------------------------------------


def deduplicate(documents: list[Document]) -> list[Document]:
    """The documents with every paragraph kept only where it first occurs; what has little left goes.

    Licences, inherited docstrings and copied argument lists would otherwise be the most frequent text of the corpus.
    """
    seen, kept = set(), []
    for name, text in documents:
        paragraphs = []
        for paragraph in re.split(r"\n[ \t]*\n", text.encode("utf-8", "replace").decode("utf-8")):
            words = " ".join(paragraph.split())
            if len(words) >= SHORT:
                key = hashlib.blake2b(words.lower().encode("utf-8"), digest_size=12).digest()
                if key in seen:
                    continue
                seen.add(key)
            if words:
                paragraphs.append(paragraph.strip("\n").rstrip())
        # Headings that have lost what stood below them say nothing.
        while paragraphs and len(" ".join(paragraphs[-1].split())) < SHORT:
            paragraphs.pop()
        text = "\n\n".join(paragraphs)
        if len(text) >= 200:
            kept.append((name, text))
    return kept


def split(documents: list[Document]) -> tuple[list[str], list[str]]:
    """The texts of (train, val): shuffled by a hash of themselves, the first VAL_SHARE of the bytes held out.

    A document above 1 % of the whole stays in training, so that validation has many voices.
    """
    lengths = {text: len(text.encode("utf-8")) for _, text in documents}
    total = sum(lengths.values())
    wanted, longest = max(VAL_SHARE * total, MIN_VAL_BYTES), max(0.01 * total, 20_000)
    train, val, held = [], [], 0
    for text in sorted(lengths, key=lambda text: hashlib.sha256(text.encode("utf-8")).digest()):
        if held < wanted and lengths[text] <= longest:
            val.append(text)
            held += lengths[text]
        else:
            train.append(text)
    return train, val


# ---- building --------------------------------------------------------------------------------------------------------


def build(out, force=False, workers=1, stdlib=None, sites=None, min_bytes=MIN_BYTES, vocab_size=VOCAB_SIZE) -> Path:
    """Builds the corpus below `out`; returns the dataset's folder. Raises InputError on too little text."""
    root = Path(out)
    folder, model_path = root / f"datasets/offline_sp{vocab_size}", root / f"tokenizers/offline_{vocab_size}_bpe.model"
    sites = sites or [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    documents, versions = descriptions(sites)
    # A changed tool may give a changed corpus, so its source counts as a version too.
    tools = [sha256_of(Path(__file__).with_name(f"{tool}.py"))[:16] for tool in ("offline", "tokenize_docs", "layout")]
    versions |= {"python": platform.python_version(), "trainer": importlib.metadata.version("sentencepiece")}
    wanted = {"tools_sha256": tools, "versions": versions}
    manifest = layout.manifest_of(folder)
    if not force and manifest.get("built_from") == wanted:
        with contextlib.suppress(InputError, LookupError):  # incomplete or damaged: build it again
            _, *found = layout.check_dataset(folder, model_path)
            if found == [manifest["splits"][split]["tokens"] for split in ("train", "val")]:
                print(f"{layout.show(folder)} is already built from these versions (--force builds it again)")
                return folder
    layout.load_trainer()  # which judges the result: better missed now than after the work
    print("reading the documentation of the installed packages ...", flush=True)
    documents += collect(find_files(stdlib or sysconfig.get_path("stdlib"), sites), workers)
    train, val = split(deduplicate(sorted(documents)))
    total = sum(len(text.encode("utf-8")) for text in train + val)
    if total < min_bytes:
        raise InputError(
            f"the offline corpus: expected {layout.size(min_bytes)} of documentation, found {layout.size(total)}; run: "
            f"pip install -r requirements.txt (torch and mlx bring most of it), with this Python, {sys.executable}"
        )
    print(f"{len(train) + len(val):,} documents; training a tokenizer of {vocab_size} pieces ...", flush=True)
    every = -(-sum(map(len, train)) // TOKENIZER_CHARACTERS)
    model = train_tokenizer(train[::every], vocab_size)
    facts = {"made_by": "data/offline.py", "built_from": wanted}
    write_dataset(folder, model_path, model, {"val": val, "train": train}, workers, facts, "choose another --out")
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", default=str(layout.DATA_ROOT), help="root of datasets/ and tokenizers/ (default: data/)")
    add("--force", action="store_true", help="build again even if the same versions are already built")
    add("--vocab-size", type=layout.vocabulary, default=VOCAB_SIZE, metavar="N", help=f"pieces ({VOCAB_SIZE})")
    args = parser.parse_args(argv)
    processes = min(4, os.cpu_count() or 1)
    layout.finish(build(args.out, args.force, processes, vocab_size=args.vocab_size))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
