"""Judge a submission folder of the challenge, ours or anybody's: what would a careful reviewer object to?

    python records/check.py records/track_10min_16mb/2026-04-30_Name
    python records/check.py FOLDER FOLDER ... --json > findings.json

Reads README.md, submission.json, the logs and the scripts; runs nothing of the folder (--import does: see below). Each
finding states its severity, the rule, where, what was expected and what was found:

    error     breaks a rule of the challenge, or the folder contradicts itself
    warning   a reviewer should look: unusual, incomplete, or suspicious
    info      what could not be judged, or is accepted practice

Exit code: 0 nothing above info, 1 the tool was used wrongly (no such folder), 2 warnings, 3 errors.

`--import` imports the script in a process of its own, with stand-ins for CUDA-only packages and a time limit. That
executes the folder's code: use it on folders that you trust. Without it, the script is compiled in memory and the names
that it imports are compared with requirements.txt and what the challenge's machines have installed.
"""

import datetime
import json
import math
import re
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import check_code  # noqa: F401  (their rules join the table)
import check_ours  # noqa: F401
from common import (
    BYTES_CAP,
    NATS_TO_BEAT,
    P_TO_BEAT,
    TRACKS,
    InputError,
    Log,
    Parser,
    bytes_implied,
    mean_std,
    p_below,
    p_text,
    run_tool,
)
from folder import (
    RULES,
    SEVERITIES,
    Complaints,
    Finding,
    Shown,
    Submission,
    agree,
    as_number,
    bpbs,
    file_seed,
    is_number,
    losses,
    rule,
    unit,
)

EXIT_CODES = {"info": 0, "warning": 2, "error": 3}
WEIGHTS = {".pt", ".pth", ".ptz", ".bin", ".npz", ".npy", ".safetensors", ".ckpt", ".rgpt", ".pkl"}
STRAY = {"__pycache__", ".DS_Store", ".git", ".ipynb_checkpoints", "wandb", ".venv", "node_modules", ".pytest_cache"}
TIME_CAP_MS = 600_000  # of training, and again of evaluation, in the 10-minute track
TIME_SLACK_MS = 500  # a run stops after the step that crossed the cap: all merged records end within 150 ms of it
# Validation set: tokens, bytes of text a token. All published records imply 151.0 to 151.1 million bytes, except the
# first baseline (151.48 million on today's tokens: its shards were of an earlier export).
KNOWN_TEXT = {
    "sp1024": (62_021_632, 2.4359), "sp4096": (45_508_608, 3.3197), "sp8192": (40_540_160, 3.7266),
    "caseops": (47_851_520, 3.1573), "byte": (151_080_000, 1.0),
}  # fmt: skip
TEXT_BYTES = (150.9e6, 151.7e6)


@rule
def files(s: Submission) -> Complaints:
    """README.md, submission.json, a train log and train_gpt.py are there; nothing else lies about."""
    for name in ("README.md", "submission.json"):
        if name not in s.files:
            other = s.json_name if name != "README.md" and s.json_name in s.files else None
            yield "warning" if other else "error", name, "the file", other or "none"
    if not s.logs:
        yield "error", s.folder.name, "at least one log of training", "none that states a step or a score"
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
def folder_name(s: Submission) -> Complaints:
    """YYYY-MM-DD_Name, without spaces."""
    name = s.folder.resolve().name
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)_[\w.+=-]+", name)
    if not match or not a_date(match[1]):
        yield "warning", name, "YYYY-MM-DD_Name without spaces", name


def a_date(text: object) -> bool:
    try:
        datetime.datetime.fromisoformat(str(text).replace("Z", "+00:00"))
        return True
    except ValueError:
        return False


@rule
def json_fields(s: Submission) -> Complaints:
    """submission.json has author, github_id, name, date and a finite val_bpb, of the right types."""
    where = s.json_name
    if not s.facts:
        return
    for key in ("author", "github_id", "name", "date"):
        value = s.facts.get(key)
        if value in (None, "") and not (key == "github_id" and s.track == "local"):
            yield "warning", where, f"the field {key}", "none" if key not in s.facts else repr(value)
        elif value is not None and not isinstance(value, str):
            yield "warning", where, f"text for {key}", type(value).__name__
    if isinstance(s.facts.get("date"), str) and not a_date(s.facts["date"]):
        yield "warning", where, "a date YYYY-MM-DD", s.facts["date"]
    if s.bpb is None:
        others = [key for key, value in s.facts.items() if key.endswith("bpb") and is_number(value)]
        claims = "val_bpb" in s.facts and s.facts["val_bpb"] is not None
        severity = "error" if claims or not others and not s.logs or "val_bpb" in s.facts else "warning"
        yield severity, where, "a finite number for val_bpb", repr(s.facts.get("val_bpb", "none"))
    elif not 0.3 < s.bpb < 10:
        yield "error", where, "bits per byte between 0.3 and 10 for val_bpb", s.bpb
    nulls = [key for key, value in s.facts.items() if isinstance(value, float) and not math.isfinite(value)]
    for key in nulls:
        yield "error", where, f"a finite number for {key}", s.facts[key]


SIZE_KEY = re.compile(r"(?:bytes_(?:total|model\w*)|\w*(?:artifact|model|total|submission)_\w*(?:bytes|size)\w*)$")


@rule
def artifact_size(s: Submission) -> Complaints:
    """The size of the artifact is stated, in submission.json or the log, and not null."""
    logged = any("model" in log.sizes or "total" in log.sizes for log in s.logs.values())
    stated = {key: value for key, value in s.facts.items() if SIZE_KEY.match(key)}
    stated |= {f"seed_results {seed}": row["artifact_bytes"] for seed, row in s.seed_results.items()
               if "artifact_bytes" in row}  # fmt: skip
    for key, value in stated.items():
        if value is None:
            yield "warning" if logged else "error", s.json_name, f"bytes for {key}", "null"
        elif isinstance(value, float) and not is_number(value):
            yield "error", s.json_name, f"bytes for {key}", repr(value)
    if s.facts and not stated:
        yield "warning" if logged else "error", s.json_name, "the artifact's size (bytes_total)", "none"


@rule
def cap(s: Submission) -> Complaints:
    """Code + artifact <= 16,000,000 bytes: as stated in JSON and logs, and recounted with all code that is shipped."""
    over = False
    for key in ("bytes_total", "artifact_bytes_max", "artifact_bytes", "artifact_size_bytes"):
        value = as_number(s.facts.get(key))
        if value is not None and value > BYTES_CAP:
            over = True
            yield "error", s.json_name, f"{key} within {BYTES_CAP:,}", f"{value:,.0f}"
    for name, log in s.claimed.items():
        line, total = log.sizes.get("total", (0, 0))
        if total > BYTES_CAP:
            over = True
            yield "error", f"{name}:{line}", f"a submission within {BYTES_CAP:,} bytes", f"{total:,}"
    code = sum(source.size for source in s.shipped.values())
    logs = [log for log in (*s.claimed.values(), *s.logs.values()) if "model" in log.sizes]
    models = [log.sizes["model"] for log in logs]
    if over or not models or not code:
        return
    model = max(size for _, size in models)
    if model + code > BYTES_CAP:
        counted = max(log.sizes.get("code_compressed", (0, 0))[1] for log in logs)
        found = f"{model + code:,} = artifact {model:,} + {', '.join(f'{n} {x.size:,}' for n, x in s.shipped.items())}"
        if counted and model + counted <= BYTES_CAP:  # accepted in review from PR #1530 on
            yield "warning", "code", f"{BYTES_CAP:,} bytes as shipped", f"{found}; its log counts a compressed copy"
        else:
            yield "error", "code", f"at most {BYTES_CAP:,} bytes as shipped", found


@rule
def code_bytes(s: Submission) -> Complaints:
    """The code bytes stated are those of the script here and of everything that it uses."""
    script = s.shipped.get(s.entry)
    if not script:
        return
    total = sum(source.size for source in s.shipped.values())
    stated = as_number(s.facts.get("bytes_code", s.facts.get("code_bytes")))
    counted = {size for log in s.claimed.values() for kind, (_, size) in log.sizes.items() if kind.startswith("code")}
    counts = sorted(counted | ({int(stated)} if stated else set()))
    scripts = [path.stat().st_size for name, path in s.files.items() if name.endswith(".py") and "/" not in name]
    if s.ours:  # the log's script lacks the settings baked into the one here; JSON states the one here
        if stated != total:
            yield "error", s.json_name, f"bytes_code {total}, as shipped", stated
    elif len(s.shipped) > 1 and counts and max(counts) < total * 0.99 and not near(counts, total):
        uncounted = ", ".join(f"{name} ({source.size:,})" for name, source in s.shipped.items() if name != s.entry)
        yield "warning", s.entry, f"{total:,} bytes of code counted: it uses {uncounted}", f"{max(counts):,}"
    elif counts and not near(counts, total) and not any(near(counts, size) for size in scripts):
        severity = "warning" if min(abs(count / total - 1) for count in counts) > 0.03 else "info"
        yield severity, s.entry, f"the {max(counts):,} bytes of code that were counted", f"{total:,}"
    elif stated and counted and not near(counted, stated):
        yield "info", s.json_name, f"bytes_code as in the logs ({', '.join(map(str, sorted(counted)))})", int(stated)


def near(counts, value: float) -> bool:
    return any(abs(count - value) <= 1e-3 * value for count in counts)


@rule
def total_bytes(s: Submission) -> Complaints:
    """The artifact bytes of submission.json are those of the logs."""
    totals = {name: log.sizes["total"][1] for name, log in s.logs.items() if "total" in log.sizes}
    models = {log.sizes["model"][1] for log in s.logs.values() if "model" in log.sizes}
    code = sum(source.size for source in s.shipped.values())
    for name, log in s.logs.items():
        if {"total", "model"} <= log.sizes.keys():
            line, total = log.sizes["total"]
            parts = [log.sizes[kind][1] for kind in ("code", "code_compressed") if kind in log.sizes]
            if parts and total - log.sizes["model"][1] not in parts:
                yield ("warning", f"{name}:{line}", f"total = artifact {log.sizes['model'][1]:,} + code {parts[-1]:,}",
                       f"{total:,}")  # fmt: skip
    stated = as_number(s.facts.get("bytes_total"))
    if stated and totals:
        known = {*totals.values(), *(model + code for model in models), statistics.fmean(totals.values())}
        if min(abs(stated - value) for value in known) > (0 if s.ours else max(1000.0, rounding(stated))):
            yield "warning", s.json_name, f"bytes_total as in a log ({max(totals.values()):,})", f"{stated:,.0f}"
    for seed, row in s.seed_results.items():
        value, known = as_number(row.get("artifact_bytes")), {*totals.values(), *models}
        if value and known and min(abs(value - size) for size in known) > rounding(value):
            yield "warning", s.json_name, f"artifact_bytes of seed {seed} as in a log", f"{value:,.0f}"


def rounding(value: float) -> float:
    """Half a unit of the last digit of a byte count that is not zero: 15,990,000 was rounded."""
    digits = f"{int(value)}"
    return 10.0 ** (len(digits) - len(digits.rstrip("0"))) / 2


@rule
def val_tokens(s: Submission) -> Complaints:
    """The number of validation tokens is that of the known set (PR #2109 scored 36.6 million of 43.8)."""
    if s.track == "local":
        return
    for name, log in s.claimed.items():
        known = KNOWN_TEXT.get(log.tokenizer, (None,))[0]
        if log.val_tokens and known and abs(log.val_tokens / known - 1) > 1e-3:
            severity = "error" if log.val_tokens < 0.995 * known else "warning"
            yield severity, name, f"{known:,} validation tokens ({log.tokenizer})", f"{log.val_tokens:,}"


@rule
def implied_bytes(s: Submission) -> Complaints:
    """tokens * loss / (ln 2 * bpb) is the size of the validation text: a byte count that is wrong shows here."""
    for name, log in s.logs.items():
        lengths = []
        for score in log.all_scores:
            loss, bpb = score.values.get("val_loss", 0.0), score.values.get("val_bpb", 0.0)
            if 0 < loss < 100 and 0 < bpb < 100:
                exact = max(unit(loss) / loss, unit(bpb) / bpb) < 2e-5
                lengths.append((bytes_implied(1, loss, bpb), exact, score.number))
        trained = [step.values["train_loss"] for step in log.steps[-5:] if "train_loss" in step.values]
        known = next((ratio for tokens, ratio in KNOWN_TEXT.values() if tokens == log.val_tokens), None)
        if not lengths and trained and known and bpbs(log) and s.track != "local":  # PRs #1545, #1576, #1632
            length = bytes_implied(1, statistics.fmean(trained), bpbs(log)[-1])
            if abs(length / known - 1) > 0.1:
                where = f"{name}:{log.all_scores[-1].number}"
                yield ("warning", where, f"{known:.4f} bytes a token of this validation set",
                       f"about {length:.2f}, by the training loss (the log has no val_loss)")  # fmt: skip
        if not lengths:
            continue
        length, exact, line = next((entry for entry in reversed(lengths) if entry[1]), lengths[-1])
        for other, also_exact, other_line in lengths:
            if abs(other / length - 1) > (1e-3 if exact and also_exact else 2e-3):
                yield (
                    "warning",
                    f"{name}:{other_line}",
                    f"{length:.4f} bytes a token, as in line {line}",
                    f"{other:.4f}",
                )
                break
        if s.track == "local":
            continue
        where, slack = f"{name}:{line}", 1e-3
        ratios = [ratio for _, ratio in KNOWN_TEXT.values()]
        known = KNOWN_TEXT.get(log.tokenizer, (None, None))[1]
        off = min(abs(length / ratio - 1) for ratio in ratios)
        if off <= slack:
            continue
        if known:
            off = abs(length / known - 1)
            expected = f"{known:.4f} bytes a token of {log.tokenizer} (within {slack:.1%})"
            yield "error" if off > 0.01 else "warning", where, expected, f"{length:.4f} ({length / known - 1:+.2%})"
        elif log.val_tokens:
            text = log.val_tokens * length
            if not TEXT_BYTES[0] <= text <= TEXT_BYTES[1]:
                severity = "error" if not 0.99 * TEXT_BYTES[0] <= text <= 1.01 * TEXT_BYTES[1] else "warning"
                yield severity, where, "151.1 million bytes of validation text", f"{text / 1e6:.2f} million"
        else:
            yield "info", where, "the number of validation tokens, to judge the bytes", f"{length:.4f} bytes a token"


@rule
def time_caps(s: Submission) -> Complaints:
    """Training within 600 s and evaluation within 600 s, for the 10-minute track."""
    if s.track != "10min_16mb":
        return
    for name, log in s.claimed.items():
        trained = [(step.number, step.values["train_time"]) for step in log.steps if "train_time" in step.values]
        ends = [end for end in (log.train_end, trained[-1] if trained else None) if end]
        slack = max([TIME_SLACK_MS, *(2 * step.values.get("step_avg", 0) for step in log.steps[-1:])])
        coarse = log.train_end is None and trained and trained[-1][1] % 6000 == 0  # minutes to one decimal
        if ends and (end := max(ends, key=lambda end: end[1]))[1] > TIME_CAP_MS + slack + 6000 * bool(coarse):
            yield "error", f"{name}:{end[0]}", "at most 600 s of training", f"{end[1] / 1000:.1f} s"
        claims = [want for want in (s.bpb, *(row.get("val_bpb") for row in s.seed_results.values())) if is_number(want)]
        evals = [(score.number, score.values["eval_time"]) for score in log.all_scores if "eval_time" in score.values
                 and any(agree(want, score.values.get("val_bpb", 0)) for want in claims)]  # fmt: skip
        evals += [log.eval_total] if log.eval_total else []
        if evals and (end := max(evals, key=lambda end: end[1]))[1] > TIME_CAP_MS:
            yield "error", f"{name}:{end[0]}", "at most 600 s of evaluation", f"{end[1] / 1000:.1f} s"


@rule
def monotonic(s: Submission) -> Complaints:
    """Steps and times of a log never go back, unless a new run begins or the script says that it resumes (PR #319)."""
    for name, log in s.logs.items():
        step, clock, seen, resumes = -1, 0.0, {}, list(log.resumes)
        complaints = 0
        for line in log.steps:
            while resumes and resumes[0][0] < line.number:  # the script says from where it went on
                step = resumes.pop(0)[1]
                clock = max([seen[at] for at in seen if at <= step], default=0.0)
            now = line.values.get("train_time")
            if line.step <= 1 < step:  # the next run in the same file
                step, clock, seen = line.step, now or 0.0, {}
                continue
            if now is None and "train_loss" not in line.values and "val_loss" not in line.values:
                continue  # a remark that names a step
            problem = None
            if line.step < step:
                problem = (f"a step after {step}", f"step {line.step}")
            elif now is not None and now < clock - max(60.0, 0.001 * clock):
                problem = (f"a time after the {clock:.0f} ms of step {step}", f"step {line.step} at {now:.0f} ms")
            if problem and (complaints := complaints + 1) <= 3:
                yield "error", f"{name}:{line.number}", *problem
            step, clock = line.step, now if now is not None else clock
            seen[step] = clock
        rates = [(line, line.values["train_time"], line.values["step_avg"] * line.step) for line in log.steps
                 if line.step > 10 and line.values.keys() >= {"train_time", "step_avg"}]  # fmt: skip
        odd = [(line, now, due) for line, now, due in rates if abs(due - now) > 0.02 * now + 100]
        if len(odd) < 0.2 * len(rates):  # otherwise its step_avg is not an average since the start
            for line, now, due in odd[:3]:
                yield (
                    "warning",
                    f"{name}:{line.number}",
                    f"train_time {due:.0f} ms, step_avg times steps",
                    f"{now:.0f} ms",
                )
        for number, text in enumerate(log.lines, 1):
            if re.match(r"(?:step:\d|stopping_early|final_)", text) and re.search(r":~\d", text):
                yield "warning", f"{name}:{number}", "numbers as a script prints them", f"{text.strip()[:60]!r}"


@rule
def finite(s: Submission) -> Complaints:
    """No loss or score of a log is NaN or infinite."""
    for name, log in s.logs.items():
        for line in [*log.steps, *log.all_scores]:
            if bad := [
                key for key in ("train_loss", "val_loss", "val_bpb") if not math.isfinite(line.values.get(key, 0))
            ]:
                yield "error", f"{name}:{line.number}", f"a finite {bad[0]}", line.values[bad[0]]
                break


def families(logs: dict[str, Log]) -> list[list[Log]]:
    """Logs that belong together: all, and those whose names differ by the seed only."""
    groups: dict[str, list[Log]] = {}
    for name, log in logs.items():
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(log)
    return [list(logs.values()), *(group for group in groups.values() if len(group) < len(logs))]


def means(logs: dict[str, Log], key: str) -> list[tuple[float, float, float]]:
    """Mean, sample and population deviation of each score that every log of a family states."""
    found = []
    for family in families(logs):
        for label in family[0].scores if len(family) > 1 else ():
            values = [log.scores[label][key] for log in family if key in log.scores.get(label, {})]
            if len(values) > 1 and all(map(math.isfinite, values)):
                found.append((statistics.fmean(values), statistics.stdev(values), statistics.pstdev(values)))
    return found


@rule
def scores(s: Submission) -> Complaints:
    """val_bpb, val_loss, each seed's result, mean and std of submission.json are those of the logs."""
    if not s.logs:
        return
    rows = [as_number(row.get("val_bpb")) for row in s.seed_results.values()]
    for key, stated in (("val_bpb", s.bpb), ("val_loss", as_number(s.facts.get("val_loss")))):
        known = [value for log in s.logs.values() for value in (bpbs(log) if key == "val_bpb" else losses(log))]
        known += [step.values[key] for log in s.logs.values() for step in log.steps[-3:] if key in step.values]
        averages = means(s.logs, key)
        listed = [as_number(row.get(key)) for row in s.seed_results.values()]
        if listed and all(value is not None for value in listed):
            averages.append((statistics.fmean(listed), 0, 0))
        if stated is not None and known:
            if not any(agree(stated, mean, 1.5e-5) for mean, _, _ in averages) and not any(
                agree(stated, value) for value in known
            ):
                nearest = min([*known, *(mean for mean, _, _ in averages)], key=lambda value: abs(value - stated))
                severity = "error" if abs(nearest - stated) > 5e-4 else "warning"
                yield severity, s.json_name, f"{key} from the logs (nearest: {nearest:.6f})", stated
    for seed, row in s.seed_results.items():
        logs = {name: log for name, log in s.logs.items() if file_seed(name) == int(seed)} if seed.isdigit() else {}
        stated = as_number(row.get("val_bpb"))
        if stated is not None and not logs and len(s.logs) < len(s.seed_results):
            yield "warning", s.json_name, f"a log of seed {seed}", "none"
        elif stated is not None and not any(agree(stated, v) for log in (logs or s.logs).values() for v in bpbs(log)):
            yield "error", s.json_name, f"val_bpb of seed {seed} from its log", stated
        steps, last = as_number(row.get("steps")), {step.step for log in logs.values() for step in log.steps[-2:]}
        ends = last | {int(m[1]) for log in logs.values() for line in log.lines[-3000:]
                       if (m := re.search(r"(?i)stopping[_ ]early.*? step:? ?(\d+)", line))}  # fmt: skip
        if steps and last and int(steps) not in ends:
            yield "warning", s.json_name, f"steps of seed {seed} from its log ({max(ends)})", int(steps)
    std = as_number(s.facts.get("val_bpb_std"))
    if std is not None and (len(s.logs) > 1 or len(rows) > 1):
        spreads = [spread for _, *pair in means(s.logs, "val_bpb") for spread in pair]
        if len(rows) > 1 and None not in rows:
            spreads += [statistics.stdev(rows), statistics.pstdev(rows)]
        if spreads and min(abs(std - spread) for spread in spreads) > min(max(unit(std), 1.5e-5), 5e-4):
            yield "warning", s.json_name, f"val_bpb_std {spreads[0]:.5f} as computed from the seeds", std


HEADLINE = re.compile(
    r"(?:val[_\\ ]*bpb|bpb)[`*:=|\s~≈]{1,12}(\d\.\d{3,8})\b|\b(\d\.\d{3,8})[`*\s]{1,4}(?:val_)?bpb\b(?!\s*[:=])", re.I
)


def a_claim(match: re.Match) -> bool:
    """Whether a score in a README is a claim: no difference, and nobody else's."""
    line = match.string[match.string.rfind("\n", 0, match.start()) + 1 : match.end()]
    before = match.string[: match.start(1 if match[1] else 2)][-1:]
    others = r"(?i)baseline|sota|\bvs\b|previous|prior|base:|current|PR ?#|penalty|beat|pre-|compar|over|threshold"
    return (
        float(match[1] or match[2]) > 0.5
        and before not in ("+", "-", "\u2212", "\u00b1")
        and not re.search(others, line)
    )


@rule
def readme_score(s: Submission) -> Complaints:
    """The first score that the README claims is in a log, or the mean of several."""
    match = next((match for match in HEADLINE.finditer(s.readme[:6000]) if a_claim(match)), None)
    if match is None:
        if s.readme:
            yield "info", "README.md", "a score in bits per byte", "none that was recognised"
        return
    claim, where = Shown(match[1] or match[2]), f"README.md:{s.readme[: match.start()].count(chr(10)) + 1}"
    known = [value for log in s.logs.values() for value in bpbs(log)]
    known += [step.values["val_bpb"] for log in s.logs.values() for step in log.steps if "val_bpb" in step.values]
    listed = [v for row in s.seed_results.values() if (v := as_number(row.get("val_bpb"))) is not None]
    known += [mean for mean, _, _ in means(s.logs, "val_bpb")] + ([statistics.fmean(listed)] if listed else [])
    line = s.readme[s.readme.rfind("\n", 0, match.start()) + 1 :].partition("\n")[0]
    shown = [
        claim,
        *map(Shown, re.findall(r"\b\d\.\d{4,8}\b", line)),
    ]  # a row of a table may begin with another's score
    if not any(agree(one, value, 1.5e-5) for one in shown for value in known):
        nearest = f"nearest {min(known, key=lambda value: abs(value - claim)):.5f}" if known else "the logs have none"
        yield "warning" if known else "error", where, f"a score that a log states ({nearest})", f"{float(claim)}"
    if s.bpb is not None and abs(s.bpb - claim) > max(unit(s.bpb), unit(claim)) * 1.5:
        yield "info", where, f"val_bpb of {s.json_name} ({s.bpb})", f"{float(claim)}"


@rule
def placeholders(s: Submission) -> Complaints:
    """Nothing is left to be filled in (PR #1640: the log said PENDING)."""
    texts = {"README.md": s.readme, s.json_name: s.text(s.json_name)} | {
        name: s.text(name) for name in s.files if name.endswith((".log", ".txt")) and name not in s.logs
    }
    for name, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            if match := re.search(
                r"\b(PENDING|TODO|TBD|TO FILL IN|FIXME|PLACEHOLDER)\b|\bpending (?:run|compute|results)", line
            ):
                yield "warning", f"{name}:{number}", "finished text", f"{match[0]!r} in {line.strip()[:60]!r}"
                break


# Settings that say where and when a run was, not what it was.
RUN_SETTINGS = re.compile(r"seed|run_id|log|path|dir|files|rank|time|port|host|out|artifact|val_loss_every|name"
                          r"|params|hf_|device|url|gpu|mem|core|allocated|reserved|shards|tokens$")  # fmt: skip


@rule
def seeds(s: Submission) -> Complaints:
    """The logs are of distinct seeds, each the one that its name states."""
    stated: dict[int, str] = {}
    for name, log in s.logs.items():
        named = file_seed(name)
        if named is not None and log.seed is not None and named != log.seed:
            yield "error", name, f"a run of seed {named}", f"seed {log.seed}"
        if log.seed is not None and name in s.claimed:
            key = re.sub(r"\d+", "#", name)
            twin = stated.setdefault((key, log.seed), name)
            if twin != name and (named is None or file_seed(twin) != named):
                yield "warning", name, "another seed than every other log", f"seed {log.seed}, as in {twin}"
    listed = s.facts.get("seeds")
    if isinstance(listed, list):
        if len({str(seed) for seed in listed}) < len(listed):
            yield "error", s.json_name, "distinct seeds", listed
        if s.seed_results and {str(seed) for seed in listed} != set(s.seed_results):
            yield "warning", s.json_name, f"seed_results of the seeds {listed}", ", ".join(s.seed_results)
        have = {log.seed for log in s.logs.values()} | {file_seed(name) for name in s.logs}
        missing = [seed for seed in listed if isinstance(seed, int) and seed not in have]
        if missing and s.logs and None not in have - {None}:
            yield "warning", s.json_name, "a log for every seed", f"none for {', '.join(map(str, missing))}"


@rule
def one_config(s: Submission) -> Complaints:
    """All seeds ran one configuration and one script (PR #2118)."""
    for family in families({name: log for name, log in s.claimed.items() if file_seed(name) is not None})[:1]:
        first = family[0] if family else None
        for log in family[1:]:
            name = log.path.relative_to(s.folder).as_posix()
            if first.config and log.config:
                config = {key: value for key, value in log.config.items() if key not in OUR_RUN_KEYS}
                base = {key: value for key, value in first.config.items() if key not in OUR_RUN_KEYS}
                differs = sorted(key for key in base.keys() | config.keys() if base.get(key) != config.get(key))
                severity = "error"
            else:
                common = first.settings.keys() & log.settings.keys()
                differs = sorted(key for key in common if first.settings[key] != log.settings[key]
                                 and not RUN_SETTINGS.search(key))  # fmt: skip
                severity = "warning"
            if differs:
                settings = (first.config or first.settings, log.config or log.settings)
                found = ", ".join(f"{key} {settings[1].get(key)} for {settings[0].get(key)}" for key in differs[:4])
                more = f" and {len(differs) - 4} more" if len(differs) > 4 else ""
                yield severity, name, f"the settings of {first.path.name}", found + more
            sizes = [entry.sizes.get("code", (0, 0))[1] for entry in (first, log)]
            if all(sizes) and sizes[0] != sizes[1]:
                yield (
                    "info" if near([sizes[0]], sizes[1]) else "warning",
                    name,
                    f"the script of {first.path.name} ({sizes[0]:,} bytes)",
                    f"{sizes[1]:,} bytes",
                )


OUR_RUN_KEYS = {"seed", "run_id", "log_dir", "resume", "mode", "preset"}


@rule
def significance(s: Submission) -> Complaints:
    """A record needs three seeds and beats the last one by 0.005 nats a token at p < 0.01."""
    if s.track != "10min_16mb" or not s.facts:
        return
    final = {}  # by seed: the score and loss that its log ends in, or what submission.json lists
    for seed, row in s.seed_results.items():
        if is_number(row.get("val_bpb")):
            final[seed] = (row["val_bpb"], as_number(row.get("val_loss")))
    for log in [] if final else s.claimed.values():
        scored = [score.values for score in log.all_scores if "val_bpb" in score.values]
        if scored:
            final[str(log.seed)] = (scored[-1]["val_bpb"], scored[-1].get("val_loss"))
    if len(final) < 3:
        yield "warning", s.json_name, "three seeds for a record", f"{len(final)}"
    ratio = next((loss / bpb for bpb, loss in final.values() if loss and bpb), None)
    if s.beat is None:
        yield "info", s.json_name, "--beat SCORE, to judge the 0.005-nat margin", "none given"
    elif ratio is None or len(final) < 2:
        yield "warning", s.json_name, "val_loss and val_bpb of several seeds", "none, so the margin cannot be judged"
    else:
        values = [bpb * ratio for bpb, _ in final.values()]
        p = p_below(values, s.beat * ratio - NATS_TO_BEAT)
        margin = s.beat * ratio - mean_std(values)[0]
        if p is None or p >= P_TO_BEAT:
            expected = f"{NATS_TO_BEAT} nats below {s.beat} at p < {P_TO_BEAT}"
            yield "error", s.json_name, expected, f"{margin:.4f} nats, p = {p_text(p)}"


# The tool ------------------------------------------------------------------------------------------------------------


def guess_track(folder: Path) -> str:
    """The track from the folder's parent, such as track_10min_16mb; else from submission.json; else non_record_16mb."""
    parent = folder.resolve().parent.name.removeprefix("track_")
    if parent in TRACKS:
        return parent
    try:
        stated = str(json.loads((folder / "submission.json").read_text(encoding="utf-8")).get("track"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return "non_record_16mb"
    stated = stated.removeprefix("track_").replace("-", "_")
    return stated if stated in TRACKS else "non_record_16mb"


def check_folder(
    folder: Path, track: str | None = None, beat: float | None = None, run_import: bool = False
) -> list[Finding]:
    """All findings on a submission folder, worst first. `beat`: the score (bits per byte) that a record is to beat."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a submission folder, found {'a file' if folder.exists() else 'none'}")
    folder = folder.resolve()  # "." has no name
    submission, found = Submission(folder, track or guess_track(folder), beat, run_import), []
    for function in RULES:
        try:
            found += [Finding(severity, function.__name__, str(where), " ".join(str(expected).split()),
                              " ".join(str(value).split())[:300])
                      for severity, where, expected, value in function(submission)]  # fmt: skip
        except Exception as error:  # a foreign folder must not stop the judgement: the rule itself is then the finding
            found.append(Finding("warning", function.__name__, folder.name, "a folder that this rule can read",
                                 f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"))  # fmt: skip
    found += [
        Finding(severity, "readable", where, expected, what) for severity, where, expected, what in submission.problems
    ]
    return sorted(dict.fromkeys(found), key=lambda finding: -SEVERITIES.index(finding.severity))


def worst(findings: list[Finding]) -> str:
    return max((finding.severity for finding in findings), key=SEVERITIES.index, default="info")


def report(folder: Path, findings: list[Finding], seconds: float, show_info: bool) -> None:
    shown = [finding for finding in findings if show_info or finding.severity != "info"]
    print(f"{folder}")
    width = max((len(finding.rule) for finding in shown), default=0)
    for finding in shown:
        print(f"  {finding.severity:7}  {finding.rule:{width}}  {finding.where}: expected {finding.expected}, "
              f"found {finding.found}")  # fmt: skip
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in reversed(SEVERITIES)}
    verdict = {"error": "does not hold", "warning": "needs a look", "info": "sound"}[worst(findings)]
    print(
        f"  {verdict}: {counts['error']} errors, {counts['warning']} warnings, {counts['info']} notes ({seconds:.1f} s)"
    )


def parse_args(argv: list[str] | None):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="submission folders")
    parser.add_argument("--track", choices=TRACKS, help="default: from the parent folder or submission.json")
    parser.add_argument("--beat", type=float, metavar="BPB", help="the score that a record is to beat")
    parser.add_argument("--json", action="store_true", help="findings as JSON, for programs")
    parser.add_argument("--quiet", action="store_true", help="leave out findings of severity info")
    parser.add_argument("--import", dest="run_import", action="store_true", help="import the script: runs its code")
    args = parser.parse_args(argv)
    if args.beat is not None and not 0 < args.beat < 16:
        raise InputError(f"--beat: expected a score in bits per byte, found {args.beat}")
    for folder in args.folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: expected a submission folder, found {'a file' if folder.exists() else 'none'}")
    return args


def main(argv: list[str] | None = None) -> int:
    args, everything = parse_args(argv), []
    results = []
    for folder in args.folders:
        began = time.perf_counter()
        findings = check_folder(folder, args.track, args.beat, args.run_import)
        everything += findings
        if args.json:
            track = args.track or guess_track(folder)
            results.append({"folder": str(folder), "track": track, "verdict": worst(findings),
                            "findings": [asdict(finding) for finding in findings]})  # fmt: skip
        else:
            report(folder, findings, time.perf_counter() - began, not args.quiet)
    if args.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    return EXIT_CODES[worst(everything)]


if __name__ == "__main__":
    sys.exit(run_tool(main))
