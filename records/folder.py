"""A submission folder as the rules of check.py see it: its files, logs, claims and the code that it ships.

Everything is read once, on demand, bounded in size, and nothing of the folder is executed.
"""

import ast
import base64
import bz2
import contextlib
import itertools
import json
import lzma
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from common import TRACKS, Track, is_number
from logs import Log, Shown, parse_log, plain_text, quantity

SEVERITIES = ("info", "warning", "error")
CODE_SUFFIXES = {".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".so", ".pyx", ".ptx", ".cubin", ".pyc"}
LARGE = 8 << 20  # bytes; a larger file is not read
UNPACKED = 8 << 20  # bytes; a compressed script is not decoded further
SCORE_KEYS = ("val_bpb", "mean_val_bpb", "mean_bpb")  # of submission.json, the first that is there counts
NUMBER_KEYS = {*SCORE_KEYS, *"val_loss val_bpb_std val_loss_std bytes_code code_bytes steps train_flops".split()}
SIZE_KEY = re.compile(r"(?:bytes_(?:total|model\w*)|\w*(?:artifact|model|total|submission)_\w*(?:bytes|size)\w*)$")


# A rule takes the submission and yields (severity, where, expected, found); `@rule` puts it into the table.

Complaints = Iterator[tuple[str, str, str, object]]
RULES: list[Callable[["Submission"], Complaints]] = []


def rule(function: Callable[["Submission"], Complaints]) -> Callable[["Submission"], Complaints]:
    RULES.append(function)
    return function


def unit(value: float) -> float:
    """One unit of the last decimal that a number was written with."""
    return value.unit if isinstance(value, Shown) else 10.0 ** -len(repr(float(value)).partition(".")[2])


def agree(claim: float, value: float, slack: float = 0.0) -> bool:
    """Whether a claimed number is a value of a log, to the decimals of the coarser of the two (at least four)."""
    return abs(claim - value) <= max(min(unit(claim), 5e-3), min(unit(value), 1e-4), slack) * 1.001


def number_in(value: object) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    value = quantity(value) if isinstance(value, str) else value
    return value if is_number(value) else None


def file_seed(name: str) -> int | None:
    match = re.search(r"seed[_-]?(\d{1,15})(?!\d)|(?:^|/)\w*log_(\d{1,15})\.txt$", name)
    return int(match[1] or match[2]) if match else None


@dataclass
class Submission:
    """A folder as the rules see it. `problems`, of reading it, are findings too: severity, where, expected, found."""

    folder: Path
    track: str
    beat: float | None = None
    problems: list[tuple[str, str, str, object]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def limits(self) -> Track:
        return TRACKS[self.track]

    @cached_property
    def counts_code(self) -> bool:
        """Whether the bytes of the code count: as the track asks, else as the runs were made."""
        if self.limits.counts_code is not None:
            return self.limits.counts_code
        return not any(weights_alone(log) for log in self.logs.values())

    @cached_property
    def files(self) -> dict[str, Path]:
        """Readable files by their path in the folder; links out of the folder are left out."""
        found, home = {}, self.folder.resolve()
        for path in sorted(self.folder.rglob("*"))[:5000]:
            name = path.relative_to(self.folder).as_posix()
            inside = path.exists() and path.resolve().is_relative_to(home)
            if path.is_symlink() and not inside:
                self.problems.append(("error", name, "files inside the folder", "a link that leads out of it"))
            elif inside and path.is_file():
                found[name] = path
                if path.stat().st_size > LARGE:
                    self.problems.append(("error", name, f"at most {LARGE >> 20} MiB", f"{path.stat().st_size} bytes"))
        return found

    def text(self, name: str) -> str:
        """The text of a file, whatever its line ends; "" where it has none that can be read."""
        if name in self.texts or name not in self.files or self.files[name].stat().st_size > LARGE:
            return self.texts.get(name, "")
        try:
            raw = self.files[name].read_bytes()
        except OSError as error:
            self.problems.append(("error", name, "a readable file", error.strerror))
            raw = b""
        if b"\0" in raw[:65536]:
            self.problems.append(("error", name, "text", "binary data"))
            raw = b""
        self.texts[name] = plain_text(raw)
        return self.texts[name]

    def parse(self, name: str) -> dict:
        """The JSON object of a file; {} where there is none, which is a finding if there is such a file."""

        def once(pairs: list[tuple[str, object]]) -> dict:
            twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            if twice:
                self.problems.append(("error", name, "every key once", f"{', '.join(twice)} several times"))
            return dict(pairs)

        if name not in self.files:
            return {}
        try:
            value = json.loads(self.text(name), parse_float=Shown, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            found = " ".join(str(error).split())[:80] if self.text(name).strip() else "an empty file"
            self.problems.append(("error", name, "valid JSON", found))
            return {}
        if not isinstance(value, dict):
            self.problems.append(("error", name, "a JSON object", type(value).__name__))
            return {}
        return value

    @cached_property
    def readme(self) -> str:
        return self.text("README.md")

    @cached_property
    def json_name(self) -> str:
        other = [name for name in self.files if re.fullmatch(r"submission\w*\.json", name)]
        return "submission.json" if "submission.json" in self.files or not other else other[0]

    @cached_property
    def facts(self) -> dict:
        """submission.json, its numbers read; {} where it is missing or broken (`files` and `readable` say so)."""
        return self.with_numbers(self.parse(self.json_name))

    def with_numbers(self, values: dict, whose: str = "") -> dict:
        """`values` with text such as "17,500,000" turned into numbers. What should be one and is none becomes None."""
        read = dict(values)
        for key, value in values.items():
            if value is not None and (key in NUMBER_KEYS or SIZE_KEY.match(key)):
                read[key] = number_in(value)
                if read[key] is None:
                    self.problems.append(("error", self.json_name, f"a number for {key}{whose}", repr(value)[:60]))
        return read

    @cached_property
    def bpb(self) -> float | None:
        """The score that submission.json claims."""
        return next((self.facts[key] for key in SCORE_KEYS if key in self.facts), None)

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds that submission.json lists."""
        listed = self.facts.get("seeds")
        if listed is None:
            return []
        listed = re.split(r"[,;\s]+", listed.strip("[] ")) if isinstance(listed, str) else listed
        numbers = [number_in(seed) for seed in (listed if isinstance(listed, (list, dict)) else [listed])]
        if any(number is None or number != int(number) for number in numbers):
            self.problems.append(("error", self.json_name, "whole numbers as seeds", repr(listed)[:60]))
        return [int(number) for number in numbers if number is not None]

    @cached_property
    def seed_results(self) -> dict[str, dict]:
        """By seed, what submission.json states of its run: an object of objects, or a list in any of its forms."""
        rows = self.facts.get("seed_results")
        if rows is None:
            rows = self.facts["seeds"] if isinstance(self.facts.get("seeds"), dict) else {}
        if isinstance(rows, list):
            named = self.seeds if len(self.seeds) == len(rows) else [f"number {i}" for i in range(1, len(rows) + 1)]
            pairs = [(row.get("seed", seed) if isinstance(row, dict) else seed, row) for seed, row in zip(named, rows)]
        elif isinstance(rows, dict):
            pairs = list(rows.items())
        else:
            self.problems.append(("error", self.json_name, "results by seed", repr(rows)[:60]))
            return {}
        found = {}
        for name, row in pairs:
            digits = re.fullmatch(r"\D*(\d{1,15})", str(name))
            seed = digits[1] if digits else str(name)
            read = self.with_numbers(row if isinstance(row, dict) else {"val_bpb": row}, f" of seed {seed}")
            if seed in found or not any(is_number(value) for value in read.values()):
                self.problems.append(("error", self.json_name, f"one result of seed {seed}", repr(row)[:60]))
            found[seed] = read
        return found

    @property
    def claims(self) -> list[float]:
        """The scores that submission.json claims, of all seeds and of each."""
        return [*([] if self.bpb is None else [self.bpb]), *self.listed("val_bpb").values()]

    @cached_property
    def sizes(self) -> dict[str, float | None]:
        """The sizes that submission.json states, bytes; None where it is null or cannot be read."""
        found = {key: value for key, value in self.facts.items() if SIZE_KEY.match(key)}
        for seed, row in self.seed_results.items():
            found |= {f"{key} of seed {seed}": value for key, value in row.items() if SIZE_KEY.match(key)}
        return found

    def listed(self, key: str) -> dict[str, float]:
        """By seed, a number of `seed_results`, where it is stated."""
        return {seed: row[key] for seed, row in self.seed_results.items() if is_number(row.get(key))}

    @cached_property
    def logs(self) -> dict[str, Log]:
        """Training and evaluation logs, identical copies left out."""
        found, seen = {}, set()
        for name, path in sorted(self.files.items(), key=lambda item: file_seed(item[0]) is None):
            if path.suffix not in (".log", ".txt") or path.name == "requirements.txt":
                continue
            text = self.text(name)
            log = parse_log(path, text)
            if (log.steps or log.all_scores) and text not in seen:
                found[name] = log
                seen.add(text)
        return found

    @cached_property
    def claimed(self) -> dict[str, Log]:
        """The logs whose scores submission.json claims; all of them where none matches."""
        meant = {
            name: log
            for name, log in self.logs.items()
            if any(agree(claim, score) for claim in self.claims for score in log.values("val_bpb"))
        }
        seeded = {name: log for name, log in self.logs.items() if file_seed(name) is not None}
        return (meant if len(meant) > 1 else meant | seeded) or self.logs

    @property
    def ours(self) -> list[str]:
        """Seeds of result_seed<N>.json files: the folder was written by submit."""
        return [match[1] for name in self.files if (match := re.fullmatch(r"result_seed(\d+)\.json", name))]

    @cached_property
    def entry(self) -> str | None:
        """The script that trains: train_gpt.py, or the one that most likely is it."""
        near = [name for name in self.files if re.fullmatch(r"train[^/]*\.py", name)]
        whole = [name for name in near if name == "train_gpt.py" and self.files[name].stat().st_size]
        return next(iter(whole + near), None)

    @cached_property
    def shipped(self) -> dict[str, "Source"]:
        """The script and every code file of the folder that it imports or names, and those that these do."""
        found: dict[str, Source] = {}
        queue = [self.entry] if self.entry else []
        code = [name for name in self.files if Path(name).suffix in CODE_SUFFIXES]
        while queue and len(found) < 100:
            name = queue.pop()
            found[name] = source = read_source(self.files[name], self.text(name))
            queue += [other for other in code if other not in {*found, *queue} and mentions(source.text, other)]
        return found

    @property
    def code_size(self) -> int:
        """Bytes of all shipped code as it lies on the disk."""
        return sum(source.size for source in self.shipped.values())


def weights_alone(log: Log) -> bool:
    """Whether a run of ours counted its weights and not its code (COUNT_CODE=0)."""
    return log.config is not None and str(log.config.get("count_code")) == "0"


@dataclass
class Source:
    """A code file that is shipped: its bytes as they lie, and its text, unpacked if it was compressed."""

    path: Path
    size: int
    text: str
    packed: bool = False
    error: SyntaxError | None = None
    tree: ast.Module | None = None


def unpack(packed: str | bytes) -> str | None:
    """The text of a compressed script, decoded in memory and never executed; None where it is none."""
    raw = packed.encode("latin-1", "replace") if isinstance(packed, str) else packed
    raw = b"".join(raw.split()) if raw.isascii() else raw
    blobs = [raw]
    for decode in (base64.b85decode, lambda data: base64.b64decode(data, validate=True), base64.a85decode):
        with contextlib.suppress(ValueError):
            blobs.append(decode(raw))
    lzma2 = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    makers = (
        lzma.LZMADecompressor,
        lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=lzma2),
        bz2.BZ2Decompressor,
        zlib.decompressobj,
        lambda: zlib.decompressobj(31),
    )
    for blob, make in itertools.product(blobs, makers):
        with contextlib.suppress(ValueError, lzma.LZMAError, zlib.error, OSError, EOFError):
            text = make().decompress(blob, UNPACKED).decode("utf-8")
            if "import" in text:
                return text
    return None


def read_source(path: Path, text: str, packed: bool = False) -> Source:
    """A code file, or the script inside where it is a small loader round a compressed one."""
    source = Source(path, path.stat().st_size, text, packed)
    if path.suffix != ".py":
        return source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source.tree = ast.parse(text)
    except SyntaxError as error:
        source.error = error
    except (ValueError, RecursionError, MemoryError) as error:
        source.error = SyntaxError(str(error) or type(error).__name__)
    constants = [node.value for node in ast.walk(source.tree or ast.Pass()) if isinstance(node, ast.Constant)]
    longest = max((value for value in constants if isinstance(value, (str, bytes))), key=len, default="")
    if not packed and len(longest) > max(2000, 0.5 * len(text)) and (inner := unpack(longest)):
        return read_source(path, inner, packed=True)
    return source


def mentions(text: str, name: str) -> bool:
    """Whether a script imports a file of its folder, or has its name as a string: to run it, or to read it as code."""
    path = Path(name)
    module = re.escape(path.parent.name if path.stem == "__init__" else path.stem)
    statement = rf"^\s*(?:import|from)\b.*\b{module}\b"
    call = rf"import\w*\(\s*[\"'][\w.]*\b{module}\b"
    string = rf"""["'](?:[^"'\n]*/)?{re.escape(path.name)}["']"""
    return re.search(f"{statement}|{call}|{string}", text, re.M) is not None
