"""The one reader of training logs and of metrics.jsonl, our own and other people's.

What is only decorated is read: thousands separators, units, quotes, time stamps or "[rank0]" before a line, colours,
line ends of Windows. Nothing of a log is executed.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from common import is_number
from tool import InputError, need

SOURCE_END = "=" * 120  # stands in our logs between the script's source and what the run says
TOKENIZERS = {  # name: how a log names it
    "caseops": "caseops",
    "byte": "byte260|fineweb10B_bytes|kind=byte",
    "sp1024": "sp1024|fineweb_1024",
    "sp4096": "sp4096|fineweb_4096",
    "sp8192": "sp8192|fineweb_8192",
}
TIMES = ("train_time", "eval_time", "step_avg", "elapsed", "total_eval_time")  # turned into milliseconds


def plain_text(raw: bytes) -> str:
    r"""The text of a file: UTF-8 without its byte order mark, every line end as \n, bytes that are none replaced."""
    return re.sub(r"\r\n?", "\n", raw.decode("utf-8-sig", "replace"))


class Shown(float):
    """A number that remembers what one unit of the last digit it was written with is worth."""

    def __new__(cls, text: str, factor: float = 1.0):
        number = super().__new__(cls, float(text) * factor)
        digits, _, power = text.lower().partition("e")
        last_digit = int(power or 0) - len(digits.partition(".")[2])
        number.unit = 10.0 ** min(max(last_digit, -300), 290) * factor
        return number


UNITS = {
    **dict.fromkeys(("", "b", "byte", "bytes"), 1),
    **{prefix + end: 1000**i for i, prefix in enumerate("kmg", 1) for end in ("", "b")},
    **{f"{prefix}ib": 1024**i for i, prefix in enumerate("kmg", 1)},
    **dict.fromkeys(("bpb", "bits/byte", "bits per byte", "nats", "tokens", "steps", "flops", "s", "ms"), 1),
}
QUANTITY = re.compile(
    r"""["'`~≈<≤=*\s]*
    (?P<number>[+-]?(?:\d{1,3}(?:[,_'’ \u00a0\u202f]\d{3})+|\d{1,3}(?:\.\d{3}){2,}|\d+|(?=\.\d))
        (?P<rest>(?:\.\d+)?(?:[eE][+-]?\d{1,3})?))
    ["'`*\s]*(?P<unit>[A-Za-z][A-Za-z/ ]*?)?["'`*\s]*
    (?:(?:\(|±|\+/-).*)?""",  # (mean of 3 seeds), ± 0.0004
    re.X | re.S,
)


def quantity(text: str) -> Shown | None:
    """The number in a text such as "17,500,000", "16.9 MB", "~1.21 bpb" or "1.21 ± 0.01"; None where it has none."""
    match = QUANTITY.fullmatch(text) if len(text) < 200 else None
    factor = UNITS.get((match["unit"] or "").lower()) if match else None
    if factor is None:
        return None
    whole = match["number"].removesuffix(match["rest"])
    return Shown(re.sub(r"[^\d+-]", "", whole) + match["rest"], factor)


@dataclass
class Line:
    """A line of a log that names a step, or states a validation score and no step."""

    number: int  # from 1
    values: dict[str, float]  # train_loss, val_loss, val_bpb, train_time (ms), step_avg (ms), ... as printed
    step: int | None = None
    label: str = ""  # what stands before the score: final_int8_zlib_roundtrip_exact, diagnostic quantized, ...


@dataclass
class Log:
    """What a training log says, in the challenge's keys; ours and other people's."""

    path: Path
    lines: list[str]
    steps: list[Line] = field(default_factory=list)
    all_scores: list[Line] = field(default_factory=list)  # in order
    config: dict | None = None  # of our own logs
    source: str | None = None  # the script at the head of our own logs
    said: dict[str, object] = field(default_factory=dict)  # what else our own logs state, the groups of OURS
    switches: dict[int, tuple[int, int]] = field(default_factory=dict)  # step of a change of passes: before, after
    settings: dict[str, str] = field(default_factory=dict)  # hyperparameters as other people's logs print them
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # model, code, code_compressed, total: line, bytes
    val_tokens: int | None = None
    seed: int | None = None
    tokenizer: str | None = None  # one of TOKENIZERS; None: not named
    resumes: list[tuple[int, int]] = field(default_factory=list)  # line and step from which a run of ours went on
    train_end: tuple[int, float] | None = None  # line and train time (ms) where training says that it stopped
    eval_total: tuple[int, float] | None = None  # line and time (ms) of all evaluation, where stated

    @property
    def trained(self) -> list[Line]:
        """The lines that report on a step of training, and do not only mention one."""
        return [line for line in self.steps if not {"train_loss", "val_loss", "train_time"}.isdisjoint(line.values)]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The last score of each label: val_loss, val_bpb, ..."""
        return {score.label: score.values for score in self.all_scores}

    def values(self, key: str) -> list[float]:
        """A key (val_bpb, val_loss, eval_time) of every line that states a score."""
        return [score.values[key] for score in self.all_scores if key in score.values]

    def size(self, kind: str) -> int | None:
        """The bytes of a kind that the log states."""
        return self.sizes[kind][1] if kind in self.sizes else None

    def score(self) -> dict[str, float] | None:
        """The last exact score of the log, else its last; None where it has none."""
        exact = [values for label, values in self.scores.items() if label.endswith("_exact")]
        return exact[-1] if exact else next(reversed(self.scores.values()), None)


PAIR = re.compile(r"\b([A-Za-z_]+)[:=]\s*~?(-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?|-?nan|-?inf)(ms|s|m)?\b")
COLOR = re.compile(r"\x1b\[[\d;]*m")
PREFIX = re.compile(  # what loggers and launchers put before a line; one blank behind it goes, too
    r"""(?:(?:\[[^\[\]]{0,60}\]  # [rank0] [2026-04-01 12:00:00] [INFO]
    | \d{4}-\d\d-\d\d T? | \d{1,2}:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?  # date, time of day
    | \d{10}\.\d+  # Unix time
    | [A-Z][a-z]{2}[ ]+\d{1,2}[ ]\d\d:\d\d:\d\d[ ][\w.-]+[ ][\w./-]+(?:\[\d+\])?(?=:)  # syslog
    | (?:DEBUG|INFO|WARNING|ERROR)\b(?::[\w.]+(?=:))? | (?:rank[ _]?)?\d+(?=:[ ]|\|)  # level and logger, rank
    | (?<=[\w\])])[ ]?[-|:>]+(?!\d) | [|>]+ | -[ ])[ ]?)+""",
    re.X,
)
# A step at the start of a line in any of the usual forms, or anywhere in the challenge's own form.
STEP = re.compile(
    r"\s*(?:step[: ]\s*(?P<a>\d{1,15})(?:/\d+)?\b|(?P<b>\d{1,15})/\d+ (?=\w+:))(?P<rest>.*)"
    r"|.*?\bstep:(?P<c>\d{1,15})/\d+(?= (?:train_loss|val_loss):)(?P<rest_c>.*)",
    re.I,
)
SCORE = re.compile(
    r"(?=.*(?:val_|BPB))\s*(?P<label>[^\[\]{}()\"']{0,80}?)[\s:_]*\b"
    r"(?:val_loss|val_bpb|(?P<bare>BPB(?: \([\w -]+\))?))[:=]\s*(?P<number>\d[\d.]*|nan|inf)"
)
SIZE = re.compile(
    r"\s*(?P<what>Serialized model|Code size|Total submission size)(?P<how>[^:{]*):\s*(?P<size>~?\d[\d.,_]*\s*[a-z]+)",
    re.I,
)
OUR_SIZE = re.compile(
    r"size: +(?P<total>\d+) bytes of \d+: \w+ "
    r"\(code (?P<code>\d+)(?: packed)?(?:, not counted)?(?: packed)? \+ artifact (?P<model>\d+)"
)
CONFIG = re.compile(r"config: (\{.*)")
OURS = re.compile(
    r"run: .*\bsha256: (?P<script_sha256>[0-9a-f]{64})\b"
    r"|device: (?P<device>.+?)  processes: (?P<world_size>\d{1,9})  "
    r"|data: .* val bytes: (?P<val_bytes>\d{1,15})"
    r"|score: .* before export, (?P<eval_loops>\d{1,9}) passes\)"
    r"|training: \d+ steps, (?P<tokens>\d{1,15}) tokens, (?P<train_flops>\d+(?:\.\d+)?(?:e\+?\d+)?) FLOPs"
)
KINDS = {"script_sha256": str, "device": str, "train_flops": float}  # of what it finds; the others are whole numbers
RESUME = re.compile(r"resume: from step:(\d{1,15});")
VAL_TOKENS = re.compile(r"(?:val_loader:.*\btokens:|(?i:val(?:idation)?[_ ]tokens): ?|data: .* val tokens: )([\d,]+)")
SETTING = re.compile(r"\b([a-z_]\w*)[:=] ?([^\s:=]+)(?=\s|$)")


def pairs(text: str) -> dict[str, float]:
    """The `name:number` pairs of a line; seconds and minutes become milliseconds for the times."""
    found = {}
    for name, value, unit in PAIR.findall(text):
        factor = {"s": 1000.0, "m": 60_000.0}.get(unit, 1.0) if name in TIMES else 1.0
        found[name] = float(value.replace(",", "")) * factor
    return found


def read_step(log: Log, number: int, match: re.Match) -> None:
    rest = match["rest"] or match["rest_c"] or ""
    values = pairs(rest)
    if loss := re.search(r"\| loss (\d+\.\d+)", rest):
        values["train_loss"] = float(loss[1])
    if "t" in values:  # some scripts shorten it
        values.setdefault("train_time", values["t"])
    step = int(match["a"] or match["b"] or match["c"])
    log.steps.append(Line(number, values, step))
    if passes := re.match(r" loops:(\d{1,4})->(\d{1,4})", rest):
        log.switches[step] = (int(passes[1]), int(passes[2]))


def read_score(log: Log, number: int, match: re.Match) -> None:
    values = pairs(match.string)
    if match["bare"]:  # a line that states nothing but BPB
        values["val_bpb"] = float(match["number"].rstrip("."))
    label = re.split(r"\s+\w+[:=]", match["label"])[0].strip(" :") + (match["bare"] or "")[3:]
    log.all_scores.append(Line(number, values, label=label))


def read_size(log: Log, number: int, match: re.Match) -> None:
    size, how = quantity(match["size"]), match["how"].strip()
    kind = {"s": "model", "c": "code", "t": "total"}[match["what"][0].lower()]
    if kind == "code" and how == "(compressed)":
        kind = "code_compressed"
    if size is not None and (kind != "model" or how):  # one without is of the model before it is compressed
        log.sizes[kind] = (number, round(size))


def read_head_line(log: Log, line: str) -> None:
    """What a log states before its first step: seed, validation tokens, tokenizer, hyperparameters."""
    if match := VAL_TOKENS.match(line):
        log.val_tokens = int(match[1].replace(",", "") or 0) or None
    if "data" in line or "tokenizer" in line:  # the last one counts: a source at the head names its defaults
        named = next((name for name, form in TOKENIZERS.items() if re.search(form, line)), None)
        log.tokenizer = named or log.tokenizer
    if log.seed is None and (match := re.match(r"Seed: (\d{1,19})\b", line)):
        log.seed = int(match[1])
    words = line.split()
    indented = line.startswith("  ") and len(words) == 2 and words[0].endswith(":")
    listed = 0 < len(words) < 80 and all(re.fullmatch(r"[a-z_]\w*[:=][^\s:=]+", word) for word in words)
    for name, value in SETTING.findall(line) if indented or listed else ():
        log.settings.setdefault(name, value)
        if name == "seed" and log.seed is None and value.isdigit() and len(value) < 20:
            log.seed = int(value)


def read_line(log: Log, number: int, line: str) -> None:
    """Adds what a line says to `log`. The first form that it has counts, and of what we say, the last word."""
    if match := OURS.match(line):
        log.said |= {name: KINDS.get(name, int)(text) for name, text in match.groupdict().items() if text}
    if match := CONFIG.match(line):
        log.config = log.config or read_config(match[1])
    elif match := STEP.match(line):
        read_step(log, number, match)
    elif match := SCORE.match(line):
        read_score(log, number, match)
    elif match := SIZE.match(line):
        read_size(log, number, match)
    elif match := OUR_SIZE.match(line):
        log.sizes |= {kind: (number, int(size)) for kind, size in match.groupdict().items()}
    elif match := RESUME.match(line):
        log.resumes.append((number, int(match[1])))
    elif line.startswith("stopping_early") and (time := pairs(line).get("train_time")) is not None:
        log.train_end = (number, time)
    elif line.startswith("total_eval_time") and (time := pairs(line).get("total_eval_time")) is not None:
        log.eval_total = (number, time)
    elif not log.steps:
        read_head_line(log, line)


def read_config(text: str) -> dict | None:
    try:
        return json.loads(text)  # its pattern begins as an object
    except (ValueError, RecursionError):
        return None


def parse_log(path: Path, text: str) -> Log:
    r"""What a log says whose text, with \n as line ends, was read from `path`."""
    log, start = Log(path, text.split("\n")), 0
    head = text.find(f"\n{SOURCE_END}\nconfig: ")
    if head >= 0 and not text.startswith("config: "):
        log.source = text[:head]
        log.lines = text.replace(log.source, "\n" * log.source.count("\n")).split("\n")  # a resumed run repeats it
        start = log.source.count("\n") + 1
    for number, line in enumerate(log.lines[start:], start + 1):
        if len(line) > 100_000 or not line:
            continue
        line = COLOR.sub("", line)
        if prefix := PREFIX.match(line):
            line = line[prefix.end() :]
        read_line(log, number, line)
    if log.config is not None:
        log.seed = log.config.get("seed", log.seed)
    return log


def read_text(path: Path, what: str) -> str:
    try:
        return plain_text(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: expected {what}, found nothing to read ({error.strerror})") from None


def read_log(path: Path) -> Log:
    """Parses a training log; a script's source at its head is kept apart. Raises InputError if there is no file."""
    return parse_log(path, read_text(path, "a training log"))


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, as of `parse_metrics`."""
    return parse_metrics(path, read_text(path, "the metrics of a run"))


def parse_metrics(path: Path | str, text: str) -> list[dict]:
    """The rows of a metrics.jsonl, each with a step; other values may be anything.

    A last line without an end is left out where it is cut: the run is writing it, or died. Raises InputError."""
    lines, rows = text.split("\n"), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"step": row["step"], **row})
        except (ValueError, TypeError, KeyError, RecursionError):
            if number == len(lines):  # empty where the file ends as it should
                break
            need(False, f"{path}: line {number}", "a JSON object with a step", repr(line[:40]))
        need(is_number(row["step"]), f"{path}: line {number}", "a step, a number", repr(row["step"])[:40])
    return rows
