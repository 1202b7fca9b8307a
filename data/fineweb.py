"""Download the published FineWeb shards of the parameter-golf challenge and the tokenizer that made them.

    python data/fineweb.py --train-shards 1          to try things (about 0.3 GB)
    python data/fineweb.py                           80 training shards, 8 billion tokens (about 16 GB)
    python data/fineweb.py --variant sp8192          another tokenizer; a wrong name lists what there is

The same command again goes on after an interruption, mends files that were cut short, or adds shards: what is there is
not fetched twice. huggingface_hub does the transfer and heeds its own settings (HF_ENDPOINT for a mirror, HF_TOKEN,
proxies). Needs neither torch nor mlx. See data/README.md.
"""

import os
import re
import shutil
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import layout
from tool import InputError, Parser, need, read_json, run_tool, sha256_of, write_json

REPO = "willdepueoai/parameter-golf"
PREFIX = "datasets"  # everything of the export lies below this folder of the repository
DEFAULT_SHARDS = 80
DOCUMENTS = ("docs_selected.source_manifest.json", "docs_selected.jsonl")
MADE_BY = "data/fineweb.py"
WITHOUT_NETWORK = (
    "without network: python data/offline.py builds a corpus from the documentation installed here, and "
    "data/tokenize_docs.py makes shards of your own documents"
)


@contextmanager
def one_line(where: str):
    """Turns what huggingface_hub raises into an InputError; errors of this machine's disk pass."""
    import httpx2

    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: hf_xet
        cause = error.__cause__ or error  # "not found locally", which hides why
        status = getattr(getattr(cause, "response", None), "status_code", None)
        found = (str(cause).strip() or type(cause).__name__).splitlines()[0][:160]
        if status in (401, 403):
            raise InputError(f"{where}: access refused (HTTP {status}); log in with: hf auth login") from None
        if status == 404:
            raise InputError(f"{where}: not found ({found}); check --repo, --revision and --endpoint") from None
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a full disk, a folder that may not be written
        again = "what has arrived is kept: run the same command again later"
        raise InputError(f"cannot get data from {where} ({found}); {again}; {WITHOUT_NETWORK}") from None


def plan(manifest: dict, variant: str, shards: int | None, where: str) -> tuple[str, str, list[str]]:
    """(dataset name, path of its tokenizer, paths of its shards) of a variant in the hub's manifest.

    shards: training shards wanted, None for the usual number. An InputError says what there is instead.
    """
    try:
        models = {entry["name"]: entry.get("model_path") for entry in manifest["tokenizers"]}
        published = {}
        for entry in manifest["datasets"]:
            counts = int(entry["stats"]["files_train"]), int(entry["stats"]["files_val"])
            published[entry["name"].rpartition("_")[2]] = (entry["name"], models.get(entry["tokenizer_name"]), *counts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"found {type(error).__name__} {error}; check --repo"
        raise InputError(f"{where}: expected the challenge's datasets and tokenizers, {found}") from None
    known = ", ".join(sorted(short for short, entry in published.items() if entry[1])) or "none"
    name, model, train, val = published.get(variant, (None, None, 0, 0))
    if model is None:
        problem = "has no SentencePiece model, and the trainers read no other" if name else "is not published"
        raise InputError(f"--variant {variant}: {problem} in {where}; there are: {known}")
    if not re.fullmatch(r"\w[\w.-]*", name) or not re.fullmatch(r"tokenizers/\w[\w.-]*", str(model)):
        raise InputError(f"{where}: refusing {name!r} with {model!r}, which may lead out of the data folder")
    need((shards or 0) <= train, "--train-shards", f"at most {train} of variant {variant}", shards)
    counts = {"val": val, "train": min(shards or DEFAULT_SHARDS, train)}
    names = [f"fineweb_{split}_{number:06d}.bin" for split, count in counts.items() for number in range(count)]
    return name, model, [f"datasets/{name}/{shard}" for shard in names]


def is_right(path: Path, size: int, sha256: str | None) -> bool:
    """Whether a file has this size and, if one is given, this hash."""
    right = path.is_file() and path.stat().st_size == size
    return right and sha256 in (None, sha256_of(path))


def describe(folder: Path, model_path: Path, stated: dict, hub: dict) -> None:
    """Writes the manifest of what lies in the dataset's folder."""
    splits = {}
    for split in ("train", "val"):
        files = []
        for path in sorted(folder.glob(f"fineweb_{split}_*.bin")):
            size, sha256 = stated.get(f"datasets/{folder.name}/{path.name}") or (path.stat().st_size, sha256_of(path))
            files.append({"name": path.name, "tokens": layout.shard_tokens(path), "bytes": size, "sha256": sha256})
        splits[split] = {"tokens": sum(file["tokens"] for file in files), "files": files}
    entry = layout.tokenizer_entry(model_path, layout.load_sentencepiece(model_path), sha256_of(model_path))
    layout.write_manifest(folder, folder.name, entry, splits, made_by=MADE_BY, hub=hub)


def download(args) -> Path:
    """Does the whole job of the command line; returns the dataset's folder.

    What arrives lies in a folder of its own, where the next run finds it, until it is found right.
    """
    from huggingface_hub import HfApi, utils  # which read their environment variables when imported

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    root = Path(args.out).resolve()
    arrivals = root / "fineweb.part"
    api = HfApi(endpoint=args.endpoint)
    where = f"{api.endpoint}, dataset {args.repo}"
    with one_line(where):
        commit = api.dataset_info(args.repo, revision=args.revision, timeout=20).sha
        state = {"repo_id": args.repo, "repo_type": "dataset", "revision": commit}
        fetch = partial(api.snapshot_download, **state, local_dir=arrivals)
        fetch(allow_patterns=f"{PREFIX}/manifest.json")
    manifest = read_json(arrivals / PREFIX / "manifest.json", f"the manifest of {where}")
    name, model, shards = plan(manifest, args.variant, args.train_shards, f"the manifest of {where}")
    folder = root / "datasets" / name
    downloaded = layout.manifest_of(folder).get("made_by", MADE_BY) == MADE_BY
    need(downloaded, layout.show(folder), "downloaded shards", "your own", "choose another --out")

    remote = [f"{PREFIX}/{path}" for path in (model, *shards, *(DOCUMENTS if args.with_docs else ()))]
    with one_line(where):
        found = {file.path: file for file in api.get_paths_info(paths=remote, **state)}
    lacking = next((path for path in remote if path not in found), None)
    need(lacking is None, where, lacking, "no such file", "ask for fewer --train-shards")
    # {path: (bytes, SHA-256; None for a small file that git holds itself)}
    stated = {
        path.removeprefix(f"{PREFIX}/"): (file.size, file.lfs and file.lfs.sha256) for path, file in found.items()
    }
    layout.claim_tokenizer(root, root / model, name, stated[model][1] or "", "choose another --out")
    missing = []
    for path, (size, sha256) in stated.items():
        # A tokenizer is small and decides the score: hashed every time. So is everything where the user asks.
        if not is_right(root / path, size, sha256 if args.verify or path == model else None):
            missing.append(path)
    if missing:
        print(f"downloading {len(missing)} files, {layout.size(sum(stated[path][0] for path in missing))}", flush=True)
        with one_line(where):
            fetch(allow_patterns=[f"{PREFIX}/{path}" for path in missing])
    for path in missing:
        arrived = arrivals / PREFIX / path
        if not is_right(arrived, *stated[path]):
            arrived.unlink(missing_ok=True)
            raise InputError(f"{path}: arrived with the wrong content; run the same command again")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(arrived, root / path)
    write_json(root / "manifest.json", manifest)
    describe(folder, root / model, stated, {"repo": args.repo, "revision": commit})
    shutil.rmtree(arrivals)
    print(f"{layout.show(folder)}: {len(missing)} files downloaded, {len(stated) - len(missing)} were here")
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--variant", default="sp1024", help="tokenizer variant (default sp1024)")
    shards = f"training shards of 100 million tokens; 1 is enough to try (default {DEFAULT_SHARDS})"
    add("--train-shards", type=layout.positive, metavar="N", help=shards)
    add("--with-docs", action="store_true", help="also docs_selected.jsonl, the text itself (tens of GB)")
    add("--out", default=str(layout.DATA_ROOT), help="root of datasets/ and tokenizers/ (default: data/)")
    add("--endpoint", metavar="URL", help="the hub or a mirror (default: HF_ENDPOINT, else huggingface.co)")
    add("--repo", default=REPO, help=f"dataset repository (default {REPO})")
    state = "state of the repository; manifest.json says which you have (default newest)"
    add("--revision", metavar="COMMIT", help=state)
    add("--verify", action="store_true", help="compare the SHA-256 of every file that is here, not only its size")
    args = parser.parse_args(argv)
    address = not args.endpoint or re.match("https?://", args.endpoint)
    need(address, "--endpoint", "an address of http:// or https://", repr(args.endpoint))
    need(re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo), "--repo", "owner/name", repr(args.repo))
    layout.finish(download(args))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
