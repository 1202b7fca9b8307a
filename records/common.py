"""What the record tools share: the tracks, results, statistics, and how numbers and tables are shown.

Errors, exit codes and safe writing come from data/tool.py, which this makes known.
"""

import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
if str(ROOT / "data") not in sys.path:
    sys.path.insert(1, str(ROOT / "data"))  # behind the folder of the tool that was started

from tool import InputError, Parser, need, read_json, run_tool, write_text  # noqa: E402, F401 (for tests and retrofit/)

NATS_TO_BEAT = 0.005  # a record must beat the last by this many nats a token ...
P_TO_BEAT = 0.01  # ... at this p


@dataclass(frozen=True)
class Track:
    """A class of submissions and what it allows; its folders lie in records/track_<name>/."""

    title: str
    bytes_cap: int = 16_000_000  # decimal
    counts_code: bool | None = True  # whether the code's bytes count; None: as the runs were made (COUNT_CODE)
    time_cap_ms: float | None = None  # of training, and again of evaluation
    flops_cap: float | None = None  # of training
    fineweb: bool = True  # whether it is scored on the challenge's validation text, whose size is known
    least_val_bytes: int = 0  # of the held-out text
    eval_cost: float | None = None  # forward FLOPs of scoring at most so many times those at the trained depth


def mini(title: str, bytes_cap: int, flops_cap: float) -> Track:
    """The scale model of the challenge: budgets of bytes and FLOPs, which no machine's noise reaches. FLOPs over bytes
    squared are the challenge's: 8 H100 for 600 s at 40 % of their peak, 1.9e18, to 16,000,000 bytes."""
    return Track(title, bytes_cap, False, None, flops_cap, False, 500_000, 3.0)


TRACKS = {
    "10min_16mb": Track("ten minutes on 8xH100, 16,000,000 bytes", time_cap_ms=600_000),
    "non_record_16mb": Track("16,000,000 bytes, any training time and hardware"),
    "mini": mini("the scale model, 80,000 bytes of weights and 5e13 training FLOPs", 80_000, 5e13),
    "mini160": mini("its finals, 160,000 bytes and 2e14 FLOPs", 160_000, 2e14),
    "mini40": mini("its trials, 40,000 bytes and 1.25e13 FLOPs", 40_000, 1.25e13),
    "local": Track("own text, own machine: to be compared within one dataset only", counts_code=None, fineweb=False),
}

LARGEST = 1e100  # what is larger is no measurement, and overflows where it is drawn or squared
# Keys of result.json whose values are numbers, or null where there is none.
MEASURED = """steps tokens train_flops train_time_ms eval_time_ms calib_time_ms val_loss val_bpb val_loss_raw
    val_bpb_raw bytes_artifact bytes_code bytes_total val_tokens params_stored loops""".split()


def is_number(value: object) -> bool:
    """Whether a value is a finite int or float; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def read_result(path: Path, needed: Iterable[str] = (), mend: str = "") -> dict:
    """The object in a result.json. Raises InputError where it lacks one of the keys `needed`, or where a number is
    none; it may be null, NaN or infinite."""
    result = read_json(path, "the result of a run")
    missing = [key for key in needed if key not in result]
    need(not missing, short(path), "the keys of result.json", f"no {', '.join(missing)}", mend)
    by_loops = result.get("val_bpb_by_loops") or {}
    need(isinstance(by_loops, dict), f"{short(path)}: val_bpb_by_loops", "an object", repr(by_loops)[:40])
    for key, value in {**{key: result.get(key) for key in MEASURED}, **by_loops}.items():
        fine = value is None or is_number(value) or isinstance(value, float) and not math.isfinite(value)
        need(fine, f"{short(path)}: {key}", "a number or null", repr(value)[:40])
    return result


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def welch_p(a: list[float], b: list[float]) -> float | None:
    """p of Welch's two-sided t-test that `a` and `b` have one mean.

    None where the test says nothing: fewer than two values on a side, or no spread on both."""
    if min(len(a), len(b)) < 2 or max(statistics.pstdev(a), statistics.pstdev(b)) < 1e-9:
        return None
    from scipy import stats

    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def p_below(values: list[float], threshold: float) -> float | None:
    """One-sided p of the one-sample t-test that the mean is not below `threshold`; None as in `welch_p`."""
    if len(values) < 2 or statistics.pstdev(values) < 1e-9:
        return None
    from scipy import stats

    return float(stats.ttest_1samp(values, threshold, alternative="less").pvalue)


def bytes_implied(tokens: int, val_loss: float, val_bpb: float) -> float:
    """Bytes of the validation text that a loss (nats a token) and a score (bits a byte) over `tokens` tokens imply."""
    return tokens * val_loss / (math.log(2) * val_bpb)


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


def facts_of(results: list[dict]) -> dict:
    """What submission.json says of its runs, from their result.json."""
    first, seeds = results[0], {}
    loss, bpb = (mean_std([result[key] for result in results]) for key in ("val_loss", "val_bpb"))
    for result in results:
        seeds[str(result["seed"])] = {
            **{key: result[key] for key in ("val_loss", "val_bpb", "steps", "tokens", "train_flops")},
            "train_time_s": result["train_time_ms"] / 1000,
            "eval_time_s": result["eval_time_ms"] / 1000,
            "val_bpb_before_export": result["val_bpb_raw"],
            "artifact_bytes": result["bytes_artifact"],
        }
    return {
        "val_loss": loss[0],
        "val_bpb": bpb[0],
        "val_loss_std": loss[1],
        "val_bpb_std": bpb[1],
        "seeds": [result["seed"] for result in results],
        "seed_results": seeds,
        "hardware": f"{first['world_size']} x {first['device']}",
        "framework": first["framework"],
        "train_flops": mean_std([result["train_flops"] for result in results])[0],
        **{key: first[key] for key in ("layout", "params_stored", "dataset", "val_tokens")},
    }


def page_tool(argv: list[str] | None, about: str, log: Path, measure: Callable, report: Callable) -> int:
    """The tool of a page: `measure()` gives the text of its log, `report(text)` makes the page and its pictures."""
    parser = Parser(about)
    parser.add_argument("--report", action="store_true", help=f"make the page from {log.name}, and measure nothing")
    if not parser.parse_args(argv).report:
        text = measure()
        log.parent.mkdir(exist_ok=True)
        write_text(log, text)
    report(log.read_text(encoding="utf-8"))
    return 0
