"""A submission folder as the rules of check.py see it: its files, logs, claims and the code that it ships.

Everything is read once, on demand, bounded in size, and nothing of the folder is executed.
"""

import ast
import base64
import binascii
import bz2
import json
import lzma
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from common import Log, read_log

SEVERITIES = ("info", "warning", "error")
CODE_SUFFIXES = {".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".so", ".pyx", ".ptx", ".cubin", ".pyc"}
LARGE = 8 << 20  # bytes; a larger file is not read
UNPACKED = 8 << 20  # bytes; a compressed script is not decoded further


@dataclass(frozen=True)
class Finding:
    severity: str
    rule: str
    where: str  # file, or file:line
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.severity:7}  {self.rule:14}  {self.where}: expected {self.expected}, found {self.found}"


class Shown(float):
    """A number of a JSON file that remembers how many decimals it was written with."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.unit = 10.0 ** -len(text.partition(".")[2].rstrip("e+-0123456789")) if "e" in text.lower() else (
            10.0 ** -len(text.partition(".")[2]))  # fmt: skip
        return number


def unit(value: float) -> float:
    """One unit of the last decimal that a number was written with."""
    return value.unit if isinstance(value, Shown) else 10.0 ** -len(repr(float(value)).partition(".")[2])


def agree(claim: float, value: float, slack: float = 0.0) -> bool:
    """Whether a claimed number is a value of a log, to the decimals of the coarser of the two (at least four)."""
    return abs(claim - value) <= max(min(unit(claim), 5e-3), min(unit(value), 1e-4), slack) * 1.001


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_number(value: object) -> float | None:
    return value if is_number(value) else None


@dataclass
class Source:
    """A code file that is shipped: its bytes as they lie, and its text, unpacked if it was compressed."""

    path: Path
    size: int
    text: str
    packed: bool = False
    error: SyntaxError | None = None
    tree: ast.Module | None = None


@dataclass
class Submission:
    """A folder as the rules see it. Files are read once, on demand; nothing is executed."""

    folder: Path
    track: str
    beat: float | None = None
    run_import: bool = False
    problems: list[tuple[str, str, str, str]] = field(default_factory=list)  # of reading: severity, where, ...

    @cached_property
    def files(self) -> dict[str, Path]:
        """Readable files by their path in the folder; links out of the folder are left out."""
        found, home = {}, self.folder.resolve()
        for path in sorted(self.folder.rglob("*"))[:5000]:
            name = path.relative_to(self.folder).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                self.problems.append(("error", name, "files inside the folder", "a link that leads out of it"))
            elif path.is_file() and path.resolve().is_relative_to(home):
                found[name] = path
                if path.stat().st_size > LARGE:
                    self.problems.append(("error", name, f"at most {LARGE >> 20} MiB", f"{path.stat().st_size} bytes"))
        return found

    def text(self, name: str) -> str:
        path = self.files.get(name)
        if path is None or path.stat().st_size > LARGE:
            return ""
        try:
            raw = path.read_bytes()
        except OSError as error:
            self.problems.append(("error", name, "a readable file", str(error.strerror)))
            return ""
        if b"\0" in raw[:65536]:
            self.problems.append(("error", name, "text", "binary data"))
            return ""
        return raw.decode("utf-8", "replace")

    @cached_property
    def readme(self) -> str:
        return self.text("README.md")

    @cached_property
    def json_name(self) -> str:
        other = [name for name in self.files if re.fullmatch(r"submission\w*\.json", name)]
        return "submission.json" if "submission.json" in self.files or not other else other[0]

    @cached_property
    def facts(self) -> dict:
        """submission.json; {} where it is missing or broken (rule `files` and `json` say so)."""
        return self.parse(self.json_name)

    def parse(self, name: str) -> dict:
        try:
            value = json.loads(self.text(name) or "{}", parse_float=Shown)
        except (ValueError, RecursionError) as error:
            self.problems.append(("error", name, "valid JSON", " ".join(str(error).split())[:80]))
            return {}
        if not isinstance(value, dict):
            self.problems.append(("error", name, "a JSON object", type(value).__name__))
            return {}
        return value

    @cached_property
    def logs(self) -> dict[str, Log]:
        """Training and evaluation logs, identical copies left out."""
        found, seen = {}, set()
        for name, path in sorted(self.files.items(), key=lambda item: file_seed(item[0]) is None):
            if path.suffix not in (".log", ".txt") or path.name == "requirements.txt":
                continue
            text = self.text(name)
            log = read_log(path) if text else None
            if log and (log.steps or log.all_scores) and text not in seen:
                found[name] = log
                seen.add(text)
        return found

    @cached_property
    def claimed(self) -> dict[str, Log]:
        """The logs whose scores submission.json claims; all of them where none matches."""
        wanted = [value for value in [self.bpb, *(row.get("val_bpb") for row in self.seed_results.values())]
                  if is_number(value)]  # fmt: skip
        names = {name: log for name, log in self.logs.items()
                 if any(agree(want, score) for want in wanted for score in bpbs(log))}  # fmt: skip
        seeded = {name: log for name, log in self.logs.items() if file_seed(name) is not None}
        return (names if len(names) > 1 or not seeded else names | seeded) or self.logs

    @cached_property
    def bpb(self) -> float | None:
        for key in ("val_bpb", "mean_val_bpb", "mean_bpb"):
            if key in self.facts:
                return as_number(self.facts[key])
        return None

    @cached_property
    def seed_results(self) -> dict[str, dict]:
        rows = self.facts.get("seed_results", self.facts.get("seeds"))
        rows = rows if isinstance(rows, dict) else {}
        return {str(seed): row for seed, row in rows.items() if isinstance(row, dict)}

    @cached_property
    def entry(self) -> str | None:
        """The script that trains: train_gpt.py, or the one that most likely is it."""
        names = [name for name in self.files if "/" not in name and name.endswith(".py")]
        if "train_gpt.py" in names and self.files["train_gpt.py"].stat().st_size:
            return "train_gpt.py"
        near = [name for name in names if name.startswith("train")]
        return near[0] if near else "train_gpt.py" if "train_gpt.py" in names else None

    @cached_property
    def shipped(self) -> dict[str, Source]:
        """The script and every file of the folder that it imports, executes, opens as code or starts."""
        found: dict[str, Source] = {}
        queue = [self.entry] if self.entry else []
        while queue and len(found) < 100:
            name = queue.pop()
            if name not in found:
                found[name] = read_source(self.files[name], self.text(name))
                queue += self.used_by(name, found[name])
        return found

    def used_by(self, name: str, source: Source) -> set[str]:
        home, wanted = name.rpartition("/")[0], set()
        for module in imported(source):
            path = module.replace(".", "/")
            stems = [f"{path.rsplit('/', i)[0]}" for i in range(path.count("/") + 1)]
            wanted |= {f"{stem}{end}" for stem in stems for end in (".py", ".so", "/__init__.py")}
        wanted |= {text for text in strings(source) if isinstance(text, str) and len(text) < 200}
        known = {path.rpartition("/")[2]: path for path in self.files}
        found = set()
        for text in wanted:
            for path in (f"{home}/{text}".lstrip("/"), text.lstrip("./"), known.get(text.rpartition("/")[2], "")):
                if path in self.files and (Path(path).suffix in CODE_SUFFIXES):
                    found.add(path)
                    break
        return found - {name}

    @property
    def ours(self) -> list[str]:
        """Seeds of result_seed<N>.json files: the folder was written by submit."""
        return [match[1] for name in self.files if (match := re.fullmatch(r"result_seed(\d+)\.json", name))]


def bpbs(log: Log) -> list[float]:
    return [score.values["val_bpb"] for score in log.all_scores if "val_bpb" in score.values]


def losses(log: Log) -> list[float]:
    return [score.values["val_loss"] for score in log.all_scores if "val_loss" in score.values]


def file_seed(name: str) -> int | None:
    match = re.search(r"seed[_-]?(\d+)|(?:^|/)\w*log_(\d+)\.txt$", name)
    return int(match[1] or match[2]) if match else None


# Sources -------------------------------------------------------------------------------------------------------------


def unpack(packed: str | bytes) -> str | None:
    """The text of a compressed script, decoded in memory and never executed; None where it is none."""
    raw = packed.encode("latin-1", "replace") if isinstance(packed, str) else packed
    raw = b"".join(raw.split()) if raw.isascii() else raw
    blobs = [raw]
    for decode in (base64.b85decode, lambda data: base64.b64decode(data, validate=True), base64.a85decode):
        try:
            blobs.append(decode(raw))
        except (ValueError, binascii.Error):
            pass
    lzma2 = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    makers = [lzma.LZMADecompressor, lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=lzma2), bz2.BZ2Decompressor,
              zlib.decompressobj, lambda: zlib.decompressobj(31)]  # fmt: skip
    for blob in blobs:
        for make in makers:
            try:
                text = make().decompress(blob, UNPACKED).decode("utf-8")
            except (ValueError, lzma.LZMAError, zlib.error, OSError, EOFError):
                continue
            if "import" in text:
                return text
    return None


def parse_source(text: str) -> tuple[ast.Module | None, SyntaxError | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text), None
    except SyntaxError as error:
        return None, error
    except (ValueError, RecursionError, MemoryError) as error:
        return None, SyntaxError(str(error) or type(error).__name__)


def read_source(path: Path, text: str) -> Source:
    source = Source(path, path.stat().st_size, text)
    if path.suffix != ".py":
        return source
    source.tree, source.error = parse_source(text)
    for value in strings(source):  # a script that is a small loader round a compressed one
        if len(value) > 2000 and len(value) > 0.5 * len(text) and (inner := unpack(value)):
            tree, error = parse_source(inner)
            source.text, source.packed, source.error = inner, True, error
            source.tree = tree or source.tree
            break
    return source


def strings(source: Source) -> list[str | bytes]:
    """String constants of a script, found by pattern where it does not parse."""
    if source.tree is None:
        return re.findall(r"[\"']([\w./-]+\.\w+)[\"']", source.text) if source.path.suffix == ".py" else []
    return [node.value for node in ast.walk(source.tree) if isinstance(node, ast.Constant)
            and isinstance(node.value, (str, bytes))]  # fmt: skip


def imported(source: Source) -> set[str]:
    """Names of the modules that a script imports, `a.b` for `from a import b` too."""
    if source.tree is None:
        return (
            set(re.findall(r"^\s*(?:import|from) ([\w.]+)", source.text, re.M))
            if source.path.suffix == ".py"
            else set()
        )
    found = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func)[-20:]:
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return {name for name in found if re.fullmatch(r"\w+(\.\w+)*", name)}


# The table of rules --------------------------------------------------------------------------------------------------
# A rule takes the submission and yields (severity, where, expected, found). `@rule` puts it into the table under the
# name of its function.

Complaints = Iterator[tuple[str, str, str, object]]
RULES: list[Callable[[Submission], Complaints]] = []


def rule(function: Callable[[Submission], Complaints]) -> Callable[[Submission], Complaints]:
    RULES.append(function)
    return function
