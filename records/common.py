"""What the record tools share: one-line errors, safe writing, statistics, and the reading of logs and run folders."""

import argparse
import json
import math
import os
import re
import statistics
import sys
import tomllib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
TRACKS = ("10min_16mb", "non_record_16mb", "local")  # a track's folders lie in records/track_<track>/
BYTES_CAP = 16_000_000  # code + artifact, decimal
NATS_TO_BEAT = 0.005  # a record must beat the last by this many nats a token ...
P_TO_BEAT = 0.01  # ... at this p


class InputError(ValueError):
    """A mistake that the user can mend. The message is one line: what, where, expected, found, how to mend."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as one line."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        raise InputError(f"{message}; see --help")


def run_tool(main, argv: list[str] | None = None) -> int:
    """Calls `main(argv)`, which returns an exit code; an InputError becomes one `error:` line and exit code 1."""
    try:
        return main(argv) or 0
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}; check path and space", file=sys.stderr)
    return 1


@contextmanager
def atomic(path: Path, mode: str = "w"):
    """Opens a temporary neighbour of `path`; on success it takes the name `path`, on failure it goes."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str = "a JSON object") -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected {what}, found nothing to read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: expected {what}, found no JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected {what}, found a {type(value).__name__}")
    return value


def read_toml(path: Path, what: str) -> dict:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected TOML, found an error ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: expected {what} (TOML), found nothing to read ({error.strerror})") from None


def read_curve(path: Path) -> list[tuple[float, float]]:
    """(training FLOPs, val_bpb) of every validation in a metrics.jsonl; at least one."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        points = [(float(row["flops"]), float(row["val_bpb"])) for row in rows if "val_bpb" in row]
    except OSError as error:
        raise InputError(f"{path}: expected the metrics of a run, found nothing to read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the metrics of a run, found a line that is none ({error})") from None
    if not points or not all(map(math.isfinite, sum(points, ()))):
        raise InputError(f"{path}: expected finite validation scores, found {'others' if points else 'none'}")
    return points


# Statistics --------------------------------------------------------------------------------------------------------


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def welch_p(a: list[float], b: list[float], alternative: str = "two-sided") -> float | None:
    """p of Welch's t-test that `a` and `b` have one mean; alternative "less": that a's is not below b's.

    None where the test says nothing: fewer than two values on a side, or no spread on both."""
    if min(len(a), len(b)) < 2 or max(statistics.pstdev(a), statistics.pstdev(b)) < 1e-9:
        return None
    from scipy import stats

    return float(stats.ttest_ind(a, b, equal_var=False, alternative=alternative).pvalue)


def p_below(values: list[float], threshold: float) -> float | None:
    """One-sided p of the one-sample t-test that the mean is not below `threshold`; None as in `welch_p`."""
    if len(values) < 2 or statistics.pstdev(values) < 1e-9:
        return None
    from scipy import stats

    return float(stats.ttest_1samp(values, threshold, alternative="less").pvalue)


def bytes_implied(tokens: int, val_loss: float, val_bpb: float) -> float:
    """Bytes of the validation text that a loss (nats a token) and a score (bits a byte) over `tokens` tokens imply."""
    return tokens * val_loss / (math.log(2) * val_bpb)


# Logs --------------------------------------------------------------------------------------------------------------


@dataclass
class StepLine:
    """A line of a training log that names a step."""

    number: int  # of the line, from 1
    step: int
    values: dict[str, float]  # train_loss, val_loss, val_bpb, train_time (ms), step_avg (ms), ... as printed
    of: int | None = None  # the number of steps planned, where the line states it


@dataclass
class Score:
    """A line of a log that states a validation score and no step."""

    number: int  # of the line, from 1
    label: str  # what stands before the score: final_int8_zlib_roundtrip_exact, diagnostic quantized, ...
    values: dict[str, float]  # val_loss, val_bpb, eval_time (ms), ...


@dataclass
class Log:
    """What a training log says, in the challenge's keys; ours and other people's."""

    path: Path
    lines: list[str]
    steps: list[StepLine] = field(default_factory=list)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # label of a final line: val_loss, val_bpb, ...
    config: dict | None = None  # of our own logs
    source_bytes: int | None = None  # of the script at the head of our own logs
    all_scores: list[Score] = field(default_factory=list)  # in order; `scores` has the last of each label
    settings: dict[str, str] = field(default_factory=dict)  # hyperparameters as other people's logs print them
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # model, code, code_compressed, total: line, bytes
    val_tokens: int | None = None
    seed: int | None = None
    tokenizer: str | None = None  # sp1024, sp4096, sp8192, caseops, byte; None: not named
    resumes: list[tuple[int, int]] = field(default_factory=list)  # line and step from which a run of ours went on
    train_end: tuple[int, float] | None = None  # line and train time (ms) where training says that it stopped
    eval_total: tuple[int, float] | None = None  # line and time (ms) of all evaluation, where stated

    def score(self) -> dict[str, float] | None:
        """The last exact score of the log, if it has one."""
        exact = [values for label, values in self.scores.items() if label.endswith("_exact")]
        return exact[-1] if exact else next(reversed(self.scores.values()), None)


STAMP = re.compile(r"^\d{10}\.\d+ ?")  # Unix time before every line, as some scripts print it
STEP = re.compile(r"^\s*(?:\[[^\]]*\]\s*)?(?:step[: ]\s*(\d+)(?:/(\d+))?\b|(\d+)/(\d+) (?=\w+:))(.*)$")
PAIR = re.compile(r"\b([A-Za-z_]+)[:=]\s*~?(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|-?nan|-?inf)(ms|s|m)?\b")
SCORE = re.compile(
    r"^\s*([^\[\]{}()\"']{0,80}?)[\s:_]*\b(?:val_loss|val_bpb|(BPB(?: \([\w -]+\))?))[:=]\s*(\d[\d.]*|nan|inf)"
)
SIZE = re.compile(r"^\s*(Serialized model|Code size|Total submission size)([^:{]*):\s*(\d+) bytes", re.I)
OUR_SIZE = re.compile(r"^size: +(\d+) bytes of \d+: \w+ \(code (\d+)(?: packed)? \+ artifact (\d+)")
VAL_TOKENS = re.compile(r"^(?:val_loader:.*\btokens:|(?i:val(?:idation)?[_ ]tokens): ?|data: .* val tokens: )([\d,]+)")
SETTING = re.compile(r"\b([a-z_]\w*)[:=] ?([^\s:=]+)(?=\s|$)")
RESUME = re.compile(r"^resume: from step:(\d+);")
TOKENIZERS = (("caseops", "caseops"), ("byte", r"byte260|fineweb10B_bytes|kind=byte"),
              ("sp1024", r"sp1024|fineweb_1024"), ("sp4096", r"sp4096|fineweb_4096"),
              ("sp8192", r"sp8192|fineweb_8192"))  # fmt: skip
SOURCE_END = "=" * 120
UNITS = {"s": 1000.0, "m": 60_000.0}
TIMES = ("train_time", "eval_time", "step_avg", "elapsed", "total_eval_time")


def pairs(text: str) -> dict[str, float]:
    """The `name:number` pairs of a line; seconds and minutes become milliseconds for the times."""
    found = {}
    for name, value, unit in PAIR.findall(text):
        found[name] = float(value) * (UNITS.get(unit, 1.0) if name in TIMES else 1.0)
    return found


def read_head_lines(log: Log, line: str) -> None:
    """What a log states before its first step: seed, validation tokens, tokenizer, hyperparameters."""
    if match := VAL_TOKENS.match(line):
        log.val_tokens = int(match[1].replace(",", "") or 0) or None
    if "data" in line or "tokenizer" in line:  # the last one counts: a source at the head names its defaults
        named = next((name for name, form in TOKENIZERS if re.search(form, line)), None)
        log.tokenizer = named or log.tokenizer
    if log.seed is None and (match := re.match(r"Seed: (\d{1,19})\b", line)):
        log.seed = int(match[1])
    words = line.split()
    if (line.startswith("  ") and len(words) == 2 and words[0].endswith(":")) or (
        words and len(words) < 80 and all(re.fullmatch(r"[a-z_]\w*[:=][^\s:=]+", word) for word in words)
    ):
        for name, value in SETTING.findall(line):
            log.settings.setdefault(name, value)
            if name == "seed" and log.seed is None and value.isdigit() and len(value) < 20:
                log.seed = int(value)


def read_log(path: Path) -> Log:
    """Parses a training log. The source that our logs (and the challenge's) begin with is left out of the steps."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: expected a training log, found nothing to read ({error.strerror})") from None
    log, start = Log(path, text.splitlines()), 0
    if text.startswith('"""') and f"\n{SOURCE_END}\nconfig: " in text:
        end = text.index(f"\n{SOURCE_END}\nconfig: ")
        log.source_bytes = len(text[:end].encode())
        start = text[: end + 1].count("\n")
    for number, line in enumerate(log.lines[start:], start + 1):
        if len(line) > 100_000:
            continue
        line = STAMP.sub("", line)
        if line.startswith("config: {"):
            try:
                log.config = json.loads(line.removeprefix("config: ")) if log.config is None else log.config
            except ValueError:
                pass
        elif match := STEP.match(line):
            values = pairs(match[5])
            if loss := re.search(r"\| loss (\d+\.\d+)", match[5]):
                values["train_loss"] = float(loss[1])
            if "train_time" not in values and "t" in values:
                values["train_time"] = values["t"]  # some scripts shorten it
            if max(map(len, filter(None, match.groups()[:4]))) < 16:  # not a digit string made to overflow
                step, of = int(match[1] or match[3]), int(match[2] or match[4] or 0) or None
                log.steps.append(StepLine(number, step, values, of))
        elif ("val_" in line or "BPB" in line) and (match := SCORE.match(line)):
            label = re.split(r"\s+\w+[:=]", match[1])[0].strip(" :")
            bare = {"val_bpb": float(match[3].rstrip("."))} if match[2] else {}  # a line that states nothing but BPB
            log.all_scores.append(Score(number, label + (match[2] or "")[3:], pairs(line) | bare))
            log.scores[label] = log.all_scores[-1].values
        elif match := SIZE.match(line):
            kind = {"s": "model", "c": "code", "t": "total"}[match[1][0].lower()]
            kind += "_compressed" if kind == "code" and match[2].strip() == "(compressed)" else ""
            kind = "raw" if kind == "model" and not match[2].strip() else kind  # before it is compressed
            log.sizes[kind] = (number, int(match[3]))
        elif match := OUR_SIZE.match(line):
            log.sizes |= {name: (number, int(match[i])) for i, name in enumerate(("total", "code", "model"), 1)}
        elif match := RESUME.match(line):
            log.resumes.append((number, int(match[1])))
        elif line.startswith("stopping_early"):
            if (time := pairs(line).get("train_time")) is not None:
                log.train_end = (number, time)
        elif line.startswith("total_eval_time"):
            if (time := pairs(line).get("total_eval_time")) is not None:
                log.eval_total = (number, time)
        elif not log.steps:
            read_head_lines(log, line)
    if log.config is not None and isinstance(log.config, dict):
        log.seed = log.config.get("seed", log.seed)
    return log


# Showing -----------------------------------------------------------------------------------------------------------

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by the colour-blind


def short(path: Path) -> str:
    """A path as seen from the repository's root, where it lies in it."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def p_text(p: float | None) -> str:
    return "–" if p is None else "<0.0001" if p < 1e-4 else f"{p:.2g}"


def markdown_table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def plotting():
    """matplotlib's pyplot, for files only and in the one style of all pictures here."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("matplotlib: expected it installed, found none; run: make setup") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 10, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.edgecolor": "#888888"}
    pyplot.rcParams.update(style | {"axes.labelcolor": "#333333", "xtick.color": "#555555", "ytick.color": "#555555"})
    return pyplot


def save_picture(figure, path: Path) -> None:
    with atomic(path, "wb") as file:  # no date or version inside, so that the same numbers give the same bytes
        figure.savefig(file, format="png", metadata={"Software": None})
    plotting().close(figure)
