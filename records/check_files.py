"""The rules of check.py for a folder's files and code, what submission.json states, and the bytes that are counted."""

import ast
import datetime
import math
import re
import statistics
import sys
from collections.abc import Iterator

from common import Track, is_number
from folder import Complaints, Source, Submission, file_seed, rule, weights_alone

WEIGHTS = {".pt", ".pth", ".ptz", ".bin", ".npz", ".npy", ".safetensors", ".ckpt", ".rgpt", ".pkl"}
STRAY = {"__pycache__", ".DS_Store", ".git", ".ipynb_checkpoints", "wandb", ".venv", "node_modules", ".pytest_cache"}


@rule
def files(s: Submission) -> Complaints:
    """README.md, submission.json and train_gpt.py are there; nothing else lies about."""
    for name in ("README.md", "submission.json"):
        if name not in s.files:
            other = s.json_name if name != "README.md" and s.json_name in s.files else None
            yield "warning" if other else "error", name, "the file", other or "none"
    if "README.md" in s.files and not s.readme.strip():
        yield "warning", "README.md", "a text", "an empty file"
    if s.entry is None:
        yield "error", "train_gpt.py", "the script", "none"
    elif not s.files[s.entry].stat().st_size:
        yield "error", s.entry, "a script", "an empty file"
    elif s.entry != "train_gpt.py" and not (s.ours and s.entry == "train_gpt_mlx.py"):
        yield "warning", s.entry, "a script named train_gpt.py", s.entry
    for name, path in s.files.items():
        if STRAY & set(path.relative_to(s.folder).parts):
            yield "warning", name, "only what belongs to the submission", "a left-over"
        elif path.suffix in WEIGHTS:
            yield "warning", name, "no weights or caches in the folder", f"{path.stat().st_size} bytes"


@rule
def train_logs(s: Submission) -> Complaints:
    """There are logs of training, and those that are named so state steps."""
    if not any(log.trained for log in s.logs.values()):
        found = "none that states a step" if s.logs else "none that states a step or a score"
        yield "error", s.folder.name, "at least one log of training", found
    for name in s.files:
        if re.fullmatch(r"train\w*\.(?:log|txt)", name) and not (name in s.logs and s.logs[name].trained):
            if twin := next((other for other in s.logs if s.text(other) == s.text(name)), None):
                yield "info" if file_seed(name) is None else "warning", name, "a log of its own", f"a copy of {twin}"
            else:
                yield "warning", name, "steps with a loss or a time, such as step:10/200 train_loss:5.1", "none"


@rule
def folder_name(s: Submission) -> Complaints:
    """YYYY-MM-DD_Name, without spaces."""
    name = s.folder.resolve().name
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)_[\w.+=-]+", name)
    if not match or not a_date(match[1]):
        yield "warning", name, "YYYY-MM-DD_Name without spaces", name


def a_date(text: str) -> bool:
    try:
        datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
        return True
    except ValueError:
        return False


@rule
def json_fields(s: Submission) -> Complaints:
    """submission.json has author, github_id, name, date and val_bpb, of the right types."""
    if s.json_name not in s.files:
        return
    where = s.json_name
    for key in ("author", "github_id", "name", "date"):
        value = s.facts.get(key)
        if value is None or value == "":
            if not (key == "github_id" and s.track == "local"):
                yield "warning", where, f"the field {key}", "none" if key not in s.facts else repr(value)
        elif not isinstance(value, str) or not value.strip():
            yield "warning", where, f"text for {key}", repr(value)
    date = s.facts.get("date")
    if isinstance(date, str) and date and not a_date(date):
        yield "warning", where, "a date YYYY-MM-DD", date
    if s.bpb is None:
        other = any(key.endswith("bpb") and value is not None for key, value in s.facts.items())
        severity = "warning" if other and "val_bpb" not in s.facts else "error"
        yield severity, where, "a number for val_bpb", "null" if "val_bpb" in s.facts else "none"
    elif not 0.3 < s.bpb < 10:
        yield "error", where, "bits per byte between 0.3 and 10 for val_bpb", s.bpb


@rule
def artifact_size(s: Submission) -> Complaints:
    """The size of the artifact is stated, in submission.json or the log, and not null."""
    severity = "warning" if any({"model", "total"} & log.sizes.keys() for log in s.logs.values()) else "error"
    for key, value in s.sizes.items():
        if value is None:
            yield severity, s.json_name, f"bytes for {key}", "null or no number"
    if s.json_name in s.files and not s.sizes:
        yield severity, s.json_name, "the artifact's size (bytes_total)", "none"


@rule
def cap(s: Submission) -> Complaints:
    """What counts is within the track's cap: as JSON and logs state it, and recounted with all code that is shipped."""
    limit, over = s.limits.bytes_cap, False
    for key, value in s.sizes.items():
        counts = not re.search("raw|uncompressed|cap|limit|budget", key)
        if counts and value is not None and not 0 < value <= limit:
            over = True
            yield "error", s.json_name, f"{key} within {limit:,}", f"{value:,.0f}"
    kind = "total" if s.counts_code else "model"
    for name, log in s.claimed.items():
        line, size = log.sizes.get(kind, (0, 0))
        if size > limit:
            over = True
            yield "error", f"{name}:{line}", f"a submission within {limit:,} bytes", f"{size:,}"
    logs = [log for log in s.logs.values() if "model" in log.sizes]
    if over or not logs or not s.counts_code or not s.code_size:
        return
    model = max(log.size("model") for log in logs)
    if model + s.code_size > limit:
        counted = max(log.size("code_compressed") or 0 for log in logs)
        shipped = ", ".join(f"{name} {source.size:,}" for name, source in s.shipped.items())
        found = f"{model + s.code_size:,} = artifact {model:,} + {shipped}"
        if counted and model + counted <= limit:  # accepted in review from PR #1530 on
            yield "warning", "code", f"{limit:,} bytes as shipped", f"{found}; its log counts a compressed copy"
        else:
            yield "error", "code", f"at most {limit:,} bytes as shipped", found


@rule
def flops(s: Submission) -> Complaints:
    """Training within the FLOPs that the track allows, if it limits them."""
    limit = s.limits.flops_cap
    if limit is None:
        return
    used = {s.json_name: s.facts.get("train_flops")}
    used |= {f"{s.json_name}, seed {seed}": value for seed, value in s.listed("train_flops").items()}
    used |= {f"result_seed{seed}.json": s.parse(f"result_seed{seed}.json").get("train_flops") for seed in s.ours}
    known = {where: value for where, value in used.items() if is_number(value)}
    if not known:
        yield "error", s.json_name, f"train_flops within {limit:.4g}", "none stated"
    for where, value in known.items():
        if not 0 < value <= limit:
            yield "error", where, f"train_flops within {limit:.4g}", f"{value:.4g}"


@rule
def evaluation(s: Submission) -> Complaints:
    """Scored as the scale model asks: enough text, windows that do not overlap, not many more passes than trained."""
    if s.limits.eval_cost is None:
        return
    for name, log in s.claimed.items():
        size, config = log.said.get("val_bytes", 0), log.config or {}
        result = s.parse(f"result_seed{file_seed(name)}.json")
        for wrong in wrong_scoring(s.limits, config, size, result.get("loops"), result.get("eval_loops")):
            yield "error", name, *wrong


def wrong_scoring(limits: Track, config: dict, size: int, loops: object, eval_loops: object) -> Iterator[tuple]:
    """What a scale model's track does not allow in a run with `size` bytes of validation text, trained with `loops`
    passes and scored with `eval_loops`: expected, found."""
    if size < limits.least_val_bytes:
        yield f"a validation text of at least {limits.least_val_bytes:,} bytes", f"{size:,}"
    if config.get("eval_stride") not in (0, config.get("train_seq_len")):
        yield "windows that do not overlap (EVAL_STRIDE=0)", config.get("eval_stride")
    cost = scoring_cost(str(config.get("layout")), loops, eval_loops)
    if cost is None or cost > limits.eval_cost:
        shown = "unknown" if cost is None else f"{cost:.2f} times"
        yield f"scoring at most {limits.eval_cost:g} times the cost of the trained passes", shown


def scoring_cost(layout: str, loops: object, eval_loops: object) -> float | None:
    """Blocks applied in scoring over those applied with the passes that were trained; None where that is not stated."""
    match = re.fullmatch(r"(?:(?:(\d+)\+)?(\d+)x\d+(?:\+(\d+))?)|\d+", layout)
    if not match or not is_number(loops) or not is_number(eval_loops):
        return None
    if match[2] is None:  # no loop
        return 1.0
    once, core = int(match[1] or 0) + int(match[3] or 0), int(match[2])
    return (once + core * eval_loops) / max(once + core * loops, 1)


@rule
def code_bytes(s: Submission) -> Complaints:
    """The code bytes stated are those of the script here and of everything that it uses."""
    script, total = s.shipped.get(s.entry), s.code_size
    if not script:
        return
    stated = s.facts.get("bytes_code", s.facts.get("code_bytes"))
    counted = {size for log in s.claimed.values() for kind, (_, size) in log.sizes.items() if kind.startswith("code")}
    counts = sorted(counted | ({int(stated)} if stated is not None else set()))
    scripts = [path.stat().st_size for name, path in s.files.items() if name.endswith(".py") and "/" not in name]
    crlf = script.path.read_bytes().count(b"\r\n")
    if crlf and near(counts, total - crlf) and not near(counts, total):  # core.autocrlf of whoever checked it out
        yield "warning", s.entry, f"{total - crlf:,} bytes as counted", f"{total:,}, since its lines end in CRLF here"
    elif s.ours:  # the log's script lacks the settings baked into the one here; JSON states the one here
        if stated != total:
            yield "error", s.json_name, f"bytes_code {total}, as shipped", stated
    elif len(s.shipped) > 1 and counts and max(counts) < total * 0.99 and not near(counts, total):
        uncounted = ", ".join(f"{name} ({source.size:,})" for name, source in s.shipped.items() if name != s.entry)
        yield "warning", s.entry, f"{total:,} bytes of code counted: it uses {uncounted}", f"{max(counts):,}"
    elif counts and not near(counts, total) and not any(near(counts, size) for size in scripts):
        severity = "warning" if min(abs(count / total - 1) for count in counts) > 0.03 else "info"
        yield severity, s.entry, f"the {max(counts):,} bytes of code that were counted", f"{total:,}"
    elif stated is not None and counted and not near(counted, stated):
        closest = min(abs(count / stated - 1) if stated else 1.0 for count in (*counted, *scripts))
        severity = "warning" if closest > 0.03 else "info"
        yield severity, s.json_name, f"bytes_code as in the logs ({', '.join(map(str, sorted(counted)))})", int(stated)


def near(counts, value: float) -> bool:
    return any(abs(count - value) <= 1e-3 * value for count in counts)


@rule
def total_bytes(s: Submission) -> Complaints:
    """The artifact bytes of submission.json are those of the logs, with or without code as the track asks."""
    models = [log.size("model") for log in s.logs.values() if "model" in log.sizes]
    totals = [log.size("total") for log in s.logs.values() if "total" in log.sizes] if s.counts_code else models
    for name, log in s.logs.items():
        line, total = log.sizes.get("total", (0, 0))
        parts = [log.size(kind) for kind in ("code", "code_compressed") if kind in log.sizes]
        if line and parts and "model" in log.sizes and total - log.size("model") not in parts:
            expected = f"total = artifact {log.size('model'):,} + code {parts[-1]:,}"
            yield "warning", f"{name}:{line}", expected, f"{total:,}"
        if s.counts_code and weights_alone(log):
            yield "error", f"{name}:{line}", "bytes with those of the code", "COUNT_CODE=0, the weights alone"
    stated = s.facts.get("bytes_total")
    if stated is not None and s.logs and not totals:
        yield "info", s.json_name, "a log that states bytes, to compare bytes_total with", "none"
    elif stated is not None and totals:
        with_code = {model + s.code_size for model in models} if s.counts_code else set()
        known = {*totals, *with_code, statistics.fmean(totals)}
        if min(abs(stated - value) for value in known) > (0 if s.ours else max(1000.0, rounding(stated))):
            yield "warning", s.json_name, f"bytes_total as in a log ({max(totals):,})", f"{stated:,.0f}"
    for seed, value in s.listed("artifact_bytes").items():
        known = {*totals, *models}
        if known and min(abs(value - size) for size in known) > rounding(value):
            yield "warning", s.json_name, f"artifact_bytes of seed {seed} as in a log", f"{value:,.0f}"


def rounding(value: float) -> float:
    """Half a unit of the last digit of a byte count that is not zero: 15,990,000 was rounded."""
    digits = f"{int(value)}"
    return 10.0 ** (len(digits) - len(digits.rstrip("0"))) / 2


@rule
def placeholders(s: Submission) -> Complaints:
    """Nothing is left to be filled in (PR #1640: the log said PENDING)."""
    form = re.compile(r"\b(PENDING|TODO|TBD|TO FILL IN|FIXME|PLACEHOLDER)\b|\bpending (?:run|compute|results)")
    others = [name for name in s.files if name.endswith((".log", ".txt")) and name not in s.logs]
    for name in ("README.md", s.json_name, *others):
        for number, line in enumerate(s.text(name).splitlines(), 1):
            if match := form.search(line):
                yield "warning", f"{name}:{number}", "finished text", f"{match[0]!r} in {line.strip()[:60]!r}"
                break


@rule
def compiles(s: Submission) -> Complaints:
    """Every shipped Python file compiles."""
    for name, source in s.shipped.items():
        if source.error is not None:
            newer = "f-string" in str(source.error) and sys.version_info < (3, 12)
            severity, where = "info" if newer else "error", f"{name}:{source.error.lineno or 1}"
            expected = "Python that 3.11 reads too" if newer else "a script that compiles"
            yield severity, where, expected, f"{source.error.msg}{' (unpacked)' * source.packed}"


TRAINS = (".backward", "autograd.grad")
SCORES = re.compile(r"no_grad|inference_mode|accum|score|bpb|eval")
SUMS = re.compile(r"(loss|nll|bits|byte|score)_?\w*sum")


def calls(node: ast.AST) -> list[tuple[int, str]]:
    """Line and name of every call below a node, in order."""
    return sorted((call.lineno, ast.unparse(call.func)) for call in ast.walk(node) if isinstance(call, ast.Call))


def first_scoring(function: ast.AST) -> float:
    """The line where a function first scores: a block without gradients, or a call or sum that says so."""
    lines = [line for line, call in calls(function) if SCORES.search(call)]
    sums = [node for node in ast.walk(function) if isinstance(node, ast.AugAssign)]
    return min([*lines, *(node.lineno for node in sums if SUMS.search(ast.unparse(node.target)))], default=math.inf)


def first_training(function: ast.FunctionDef) -> float | None:
    """The line where a function that is fed validation tokens, and no others, first takes a gradient and steps."""
    words = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    words |= {arg.arg for arg in function.args.args + function.args.kwonlyargs}
    feeds = any(re.fullmatch(r"val_(?:tokens|data|loader|seqs|ids)\w*", word) for word in words)
    loads = any(re.search(r"train_(?:loader|files|tokens|stream|batch)", word) for word in words)
    trains = [line for line, call in calls(function) if call.endswith(TRAINS)]
    steps = any(call.endswith(".step") for _, call in calls(function))
    return trains[0] if feeds and not loads and steps and trains else None


def scored_before(function: ast.FunctionDef, functions: list[ast.FunctionDef]) -> bool:
    """Whether all who call a function score first: an evaluation that trains on what it has scored is legal."""
    uses = []
    for user in functions:
        lines = [line for line, call in calls(user) if call.split(".")[-1] == function.name]
        if lines and user is not function:
            uses.append(user.name.startswith("eval") and first_scoring(user) < lines[0])
    return bool(uses) and all(uses)


@rule
def trains_on_val(s: Submission) -> Complaints:
    """No optimiser step on validation tokens before they are scored (PRs #1376, #1487, #1517): a suspicion only."""
    for name, source in s.shipped.items():
        functions = functions_of(source)
        for function in functions:
            line = first_training(function)
            if line and first_scoring(function) > line and not scored_before(function, functions):
                where = f"{name}{' (unpacked)' * source.packed}:{line}"
                found = f"{function.name}() only trains"
                yield "warning", where, "validation tokens scored before training on them", found


def functions_of(source: Source) -> list[ast.FunctionDef]:
    if source.tree is None or ".backward" not in source.text and "autograd.grad" not in source.text:
        return []
    return [node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)]
