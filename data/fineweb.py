"""Download the published FineWeb shards of the parameter-golf challenge and the tokenizer that made them.

    python data/fineweb.py --train-shards 1          to try things (about 0.3 GB)
    python data/fineweb.py                           80 training shards, 8 billion tokens (about 16 GB)
    python data/fineweb.py --variant sp8192          another tokenizer; a wrong name lists what there is

Files go straight into place, under a `.part` name until they are complete and their hash is right. Run the same
command again to resume, to repair damaged files or to add shards; what is there is not fetched twice. See
data/README.md.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from layout import (
    DATA_ROOT,
    InputError,
    finish,
    load_sentencepiece,
    need_space,
    need_trainer,
    progress,
    read_json,
    run,
    sha256_of,
    shard_tokens,
    show,
    size,
    write_json,
)

REPO = "willdepueoai/parameter-golf"
PREFIX = "datasets"  # everything of the export lies below this folder of the repository
DEFAULT_SHARDS = 80
CHUNK = 1 << 20  # bytes
TRIES = 5  # in a row without a byte of progress
TIMEOUT = 20  # seconds without an answer
WITHOUT_NETWORK = (
    "without network: python data/offline.py builds a corpus from the documentation installed here, and "
    "data/tokenize_docs.py makes shards of your own documents"
)


class HubGone(InputError):
    """The hub does not answer."""


@dataclass(frozen=True)
class Remote:
    """One file of the hub: its path there, where it goes, its bytes, its hash (SHA-256, or git's SHA-1 if small)."""

    path: str
    local: Path
    bytes: int
    hash: str

    def digest(self):
        """Return a fresh hash object that gives `hash` once fed the whole file; None if it is of no known kind."""
        if re.fullmatch("[0-9a-f]{64}", self.hash):
            return hashlib.sha256()
        if re.fullmatch("[0-9a-f]{40}", self.hash):  # git hashes a small file behind a header
            return hashlib.sha1(b"blob %d\0" % self.bytes, usedforsecurity=False)
        return None

    def matches(self, path):
        """Say whether a local file has this content."""
        if path.stat().st_size != self.bytes:
            return False
        digest = self.digest()
        if digest is None:
            return True
        feed(digest, path)
        return digest.hexdigest() == self.hash


def feed(digest, path):
    """Update a hash with a whole file."""
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)


def explain(error):
    """Return the first line of an exception, short enough for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


class Hub:
    """The dataset repository: `head` and `stream` with retries, every failure as an InputError."""

    def __init__(self, endpoint=None, repo=REPO):
        # Imported here: it costs half a second, and reads HF_ENDPOINT and its kin when it is imported.
        import huggingface_hub
        from huggingface_hub import errors, utils

        try:
            import httpx2 as http  # huggingface_hub 2
        except ImportError:
            import httpx as http  # huggingface_hub 1

        self.api, self.errors, self.utils, self.http = huggingface_hub, errors, utils, http
        self.endpoint = (endpoint or huggingface_hub.constants.ENDPOINT).rstrip("/")
        self.repo = repo

    def url(self, path, revision):
        return self.api.hf_hub_url(self.repo, path, repo_type="dataset", revision=revision, endpoint=self.endpoint)

    def _trouble(self, error, what):
        """Return (InputError to raise, whether another try may help) for an exception of the library."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        place = f"{self.endpoint}, dataset {self.repo}"
        if status in (401, 403):
            return InputError(f"{place}: access to {what} refused (HTTP {status}); log in with: hf auth login"), False
        if status == 404:
            return InputError(f"{place}: {what} not found (HTTP 404); check --endpoint and --repo"), False
        if status is not None and status < 500 and status not in (408, 416, 429):
            return InputError(f"{place}: {what} failed with HTTP {status} ({explain(error)})"), False
        again = not isinstance(error, self.errors.OfflineModeIsEnabled)
        return HubGone(
            f"cannot get {what} from {self.endpoint} ({explain(error)}); check the network, then run the same "
            f"command again; {WITHOUT_NETWORK}"
        ), again

    def retry(self, what, call, tries=3):
        """Return call(), tried again after a pause when the trouble may pass."""
        for attempt in range(tries):
            try:
                return call()
            except (self.http.HTTPError, self.errors.HfHubHTTPError, OSError) as error:
                told, again = self._trouble(error, what)
                if not again or attempt == tries - 1:
                    raise told from None
                time.sleep(2**attempt)

    def head(self, path, revision="main"):
        """Return (commit, bytes, hash) of a file."""
        found = self.retry(
            path,
            lambda: self.api.get_hf_file_metadata(self.url(path, revision), timeout=TIMEOUT, endpoint=self.endpoint),
        )
        if not found.commit_hash or found.size is None or not found.etag:
            raise InputError(
                f"{self.endpoint} answers for {path} without commit, size or ETag, so it is not a Hugging Face "
                "hub; check --endpoint, HF_ENDPOINT and the proxy settings"
            )
        return found.commit_hash, found.size, found.etag

    def stream(self, path, revision, start=0):
        """Return a context manager that gives the response with the bytes of a file from `start` on."""
        headers = dict(self.utils.build_hf_headers())
        headers["Accept-Encoding"] = "identity"  # a compressed answer could not be resumed
        if start:
            headers["Range"] = f"bytes={start}-"
        return self.api.get_session().stream(
            "GET", self.url(path, revision), headers=headers, timeout=TIMEOUT, follow_redirects=True
        )

    def read(self, path, revision):
        """Return the bytes of a small file."""

        def call():
            with self.stream(path, revision) as response:
                response.raise_for_status()
                return b"".join(response.iter_bytes())

        return self.retry(path, call)


class Records:
    """What was verified here before: {path below the root: [bytes, mtime in ns, hash]}; makes a second run quick."""

    def __init__(self, root):
        self.root, self.path = Path(root), Path(root) / ".fineweb_verified.json"
        known = read_json(self.path)
        self.known = known if isinstance(known, dict) else {}
        self.lock = threading.Lock()

    def key(self, path):
        return path.relative_to(self.root).as_posix()

    def holds(self, path, hash=None):
        """Say whether a file is unchanged since it was verified (against `hash`, if given)."""
        entry = self.known.get(self.key(path))
        if not entry or not path.is_file():
            return False
        stat = path.stat()
        return entry[:2] == [stat.st_size, stat.st_mtime_ns] and hash in (None, entry[2])

    def add(self, path, hash):
        stat = path.stat()
        with self.lock:
            self.known[self.key(path)] = [stat.st_size, stat.st_mtime_ns, hash]
            write_json(self.path, self.known)


class Downloads:
    """Bring a list of remote files into place with a few threads, one progress bar and one way to stop them all."""

    def __init__(self, hub, revision, records, jobs):
        self.hub, self.revision, self.records, self.jobs = hub, revision, records, jobs
        self.stop = threading.Event()
        self.notes = []

    def present(self, remote):
        """Say whether the right file is there already. A wrong one is made ready for repair."""
        path, part = remote.local, part_of(remote.local)
        if not path.is_file():
            return False
        if self.records.holds(path, remote.hash):
            return True
        if remote.matches(path):
            self.records.add(path, remote.hash)
            return True
        found = path.stat().st_size
        if found < remote.bytes and not part.exists() and not path.is_symlink():
            os.replace(path, part)  # most likely cut short: go on from its end; the hash tells if that was wrong
            self.notes.append(f"repairing {path.name}: {size(found)} of {size(remote.bytes)} are here")
        else:
            path.unlink()
            self.notes.append(f"repairing {path.name}: its content is not the published one")
        return False

    def all(self, remotes):
        """Fetch what is missing; return the number of files fetched."""
        with ThreadPoolExecutor(self.jobs) as pool:
            here = list(pool.map(self.present, remotes))
        missing = [remote for remote, is_here in zip(remotes, here, strict=True) if not is_here]
        for note in self.notes:
            print(note, flush=True)
        if not missing:
            return 0
        started = sum(
            min(part_of(remote.local).stat().st_size, remote.bytes)
            for remote in missing
            if part_of(remote.local).exists()
        )
        total = sum(remote.bytes for remote in missing)
        need_space(missing[0].local.parent, total - started, f"downloading {len(missing)} files")
        print(
            f"downloading {len(missing)} files, {size(total - started)}"
            + (f" (going on after {size(started)})" if started else ""),
            flush=True,
        )
        with progress(total, "downloading", done=started) as self.bar, ThreadPoolExecutor(self.jobs) as pool:
            tasks = [pool.submit(self.fetch, remote) for remote in missing]
            try:
                done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            finally:  # one failure, or Ctrl-C: the others stop at their next chunk and keep their .part files
                if not all(task.done() for task in tasks) or any(task.exception() for task in tasks):
                    self.stop.set()
                    pool.shutdown(cancel_futures=True)
        for task in done:
            task.result()
        return len(missing)

    def fetch(self, remote):
        """Download one file, resuming its `.part`, check it and put it in place."""
        path, part = remote.local, part_of(remote.local)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{show(part)} is being written by another download; wait for it to end") from None
            for last in (False, True):
                resumed = self.transfer(remote, file)
                digest = remote.digest()
                if digest is not None:
                    feed(digest, part)
                if digest is None or digest.hexdigest() == remote.hash:
                    break
                # A wrong start (an older version, a damaged copy) is worth one download from scratch.
                self.restart(file)
                if last or not resumed:
                    raise InputError(
                        f"{path.name}: arrived with the wrong content (expected hash {remote.hash[:12]}..., "
                        f"found {digest.hexdigest()[:12]}...); run the same command again"
                    )
            os.fsync(file.fileno())
        os.replace(part, path)
        self.records.add(path, remote.hash)
        if self.bar.disable:
            print(f"  {path.name} {size(remote.bytes)}", flush=True)

    def restart(self, file):
        self.bar.update(-file.seek(0, os.SEEK_END))
        file.truncate(0)

    def transfer(self, remote, file):
        """Append the missing bytes to an open `.part` file; return whether it had some before."""
        had = file.seek(0, os.SEEK_END)
        if had > remote.bytes:
            file.truncate(0)
            had = 0
        reached, failures = had, 0
        while (start := file.seek(0, os.SEEK_END)) < remote.bytes:
            try:
                with self.hub.stream(remote.path, self.revision, start) as response:
                    if response.status_code == 416:
                        self.restart(file)
                    response.raise_for_status()
                    if start and response.status_code != 206:
                        self.restart(file)  # the server does not resume
                    elif start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                        self.restart(file)
                        raise OSError("the server went on at the wrong place")
                    for data in response.iter_bytes(CHUNK):
                        if self.stop.is_set():
                            raise InputError("stopped because another file failed")
                        file.write(data)
                        self.bar.update(len(data))
                        if (
                            file.tell() > reached
                        ):  # only new ground counts, or a server without ranges could go on forever
                            reached, failures = file.tell(), 0
                file.flush()
                if file.tell() > remote.bytes:
                    self.restart(file)
                    raise OSError(f"more than the announced {remote.bytes} bytes came")
                if file.tell() < remote.bytes:
                    raise OSError(f"only {file.tell()} of {remote.bytes} bytes came")
            except (self.hub.http.HTTPError, self.hub.errors.HfHubHTTPError, OSError) as error:
                if isinstance(error, OSError) and error.filename is None and error.errno in (28, 122):
                    raise  # disk full or over quota: trying again does not help
                file.flush()
                failures += 1
                told, again = self.hub._trouble(error, remote.path)
                if not again or failures >= TRIES or self.stop.wait(min(2 ** (failures - 1), 8) * PAUSE):
                    raise told from None
        return had > 0


PAUSE = 1.0  # seconds before the first new try; tests make it shorter


def part_of(path):
    return path.with_name(path.name + ".part")


def entries(manifest, key, where):
    """Return manifest[key] as a list of objects with a name; raise InputError if it is something else."""
    found = manifest.get(key) if isinstance(manifest, dict) else None
    if not isinstance(found, list) or not all(isinstance(entry, dict) and entry.get("name") for entry in found):
        raise InputError(
            f"{where}: not a manifest of this kind (no list {key!r} with names); check --endpoint and --repo"
        )
    return found


def plan(manifest, variant, shards, where):
    """Return (dataset name, training shards, validation shards, tokenizer path) from the hub's manifest.

    shards: training shards wanted, or None for the usual number. Raises InputError with what there is instead.
    """
    datasets = entries(manifest, "datasets", where)
    short = {entry["name"].rpartition("_")[2]: entry for entry in datasets}
    entry = short.get(variant) or next((entry for entry in datasets if entry["name"] == variant), None)
    if entry is None:
        raise InputError(f"no variant {variant!r} in {where}; there are: {', '.join(sorted(short)) or 'none'}")
    tokenizers = {one["name"]: one for one in entries(manifest, "tokenizers", where)}
    model = tokenizers.get(entry.get("tokenizer_name"), {}).get("model_path")
    if not model:
        raise InputError(
            f"variant {variant!r} has no SentencePiece model in {where}, and the trainers read no other; "
            f"there are: {', '.join(sorted(short))}"
        )
    for name in (entry["name"], model):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise InputError(f"{where}: refusing the path {name!r}, which leads out of the data folder")
    stats = entry.get("stats") or {}
    counts = [stats.get("files_train"), stats.get("files_val")]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise InputError(f"{where}: no files_train and files_val for {entry['name']}; check --endpoint and --repo")
    if shards is not None and shards > counts[0]:
        raise InputError(
            f"variant {variant!r} has {counts[0]} training shards, --train-shards asks for {shards}; ask for "
            f"at most {counts[0]}"
        )
    return entry["name"], min(shards or DEFAULT_SHARDS, counts[0]), counts[1], model


def wanted_paths(name, train, val, model, with_docs):
    """Return the paths below PREFIX of everything to download, the small and the held-out first."""
    paths = [model]
    paths += [f"datasets/{name}/fineweb_val_{number:06d}.bin" for number in range(val)]
    paths += [f"datasets/{name}/fineweb_train_{number:06d}.bin" for number in range(train)]
    if with_docs:
        paths += ["docs_selected.source_manifest.json", "docs_selected.jsonl"]
    return paths


def download(args):
    """Do the whole job of the command line; return (dataset folder, tokenizer path)."""
    need_trainer()
    root = Path(args.out).resolve()
    records = Records(root)
    hub = Hub(args.endpoint, args.repo)
    where = f"the manifest of {args.repo} at {hub.endpoint}"
    try:
        commit, _, _ = hub.head(f"{PREFIX}/manifest.json")
        raw = hub.read(f"{PREFIX}/manifest.json", commit)
        try:
            manifest = json.loads(raw)
        except ValueError:
            raise InputError(f"{where}: not JSON; check --endpoint and --repo") from None
        name, train, val, model = plan(manifest, args.variant, args.train_shards, where)
        paths = wanted_paths(name, train, val, model, args.with_docs)
        with ThreadPoolExecutor(8) as pool:
            heads = list(pool.map(lambda path: hub.head(f"{PREFIX}/{path}", commit), paths))
    except HubGone as error:
        return already_here(args, root, records, error)
    remotes = [
        Remote(f"{PREFIX}/{path}", root / path, found[1], found[2]) for path, found in zip(paths, heads, strict=True)
    ]
    if args.verify:
        records.known.clear()
    started = time.time()
    fetched = Downloads(hub, commit, records, args.jobs).all(remotes)
    write_json(root / "manifest.json", manifest)
    folder = root / "datasets" / name
    describe(folder, root / model, records, {"repo": args.repo, "revision": commit})
    total = sum(remote.bytes for remote in remotes)
    print(
        f"{len(remotes)} files, {size(total)}, in {show(folder)}: {fetched} downloaded, "
        f"{len(remotes) - fetched} were here, {time.time() - started:.0f} s"
    )
    return folder, root / model


def already_here(args, root, records, error):
    """Without network: return the wanted dataset if it is complete from an earlier run, else raise `error`."""
    manifest = read_json(root / "manifest.json")
    if manifest is None:
        raise error
    name, train, val, model = plan(
        manifest, args.variant, args.train_shards, f"{show(root / 'manifest.json')} (an old copy)"
    )
    missing = [path for path in wanted_paths(name, train, val, model, args.with_docs) if not records.holds(root / path)]
    if missing:
        raise error
    print(f"notice: the hub is out of reach; using the {train + val} shards of {name} that were downloaded before")
    return root / "datasets" / name, root / model


def describe(folder, model_path, records, hub):
    """Write the dataset's manifest from the verified files in its folder."""
    splits = {}
    for split in ("train", "val"):
        files = [
            {
                "name": path.name,
                "tokens": shard_tokens(path),
                "bytes": path.stat().st_size,
                "sha256": records.known[records.key(path)][2],
            }
            for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))
            if records.holds(path)
        ]
        splits[split] = {"tokens": sum(file["tokens"] or 0 for file in files), "files": files}
    model = load_sentencepiece(model_path)
    write_json(
        folder / "manifest.json",
        {
            "name": folder.name,
            "made_by": "data/fineweb.py",
            "hub": hub,
            "tokenizer": {
                "path": f"tokenizers/{model_path.name}",
                "vocab_size": model.vocab_size(),
                "bos_id": model.bos_id(),
                "sha256": sha256_of(model_path),
            },
            "splits": splits,
        },
    )


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--variant", default="sp1024", help="tokenizer variant (default sp1024)")
    parser.add_argument(
        "--train-shards",
        type=int,
        metavar="N",
        help=f"training shards of 100 million tokens; 1 is enough to try (default {DEFAULT_SHARDS})",
    )
    parser.add_argument(
        "--with-docs", action="store_true", help="also docs_selected.jsonl, the text itself (tens of GB)"
    )
    parser.add_argument("--out", default=str(DATA_ROOT), help="root of datasets/ and tokenizers/ (default: data/)")
    parser.add_argument(
        "--endpoint", help="address of the hub or of a mirror (default: HF_ENDPOINT, else huggingface.co)"
    )
    parser.add_argument("--repo", default=REPO, help=f"dataset repository (default {REPO})")
    parser.add_argument("--jobs", type=int, default=4, help="files at a time (default 4)")
    parser.add_argument("--verify", action="store_true", help="hash every file again, also those verified before")
    args = parser.parse_args(argv)
    for flag in ("train_shards", "jobs"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise InputError(f"--{flag.replace('_', '-')} {value}: expected a whole number of at least 1")
    if args.endpoint and not re.match("https?://", args.endpoint):
        raise InputError(f"--endpoint {args.endpoint!r}: expected an address that starts with http:// or https://")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise InputError(f"--repo {args.repo!r}: expected owner/name")
    return args


def main(argv=None):
    finish(*download(parse(argv)))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
