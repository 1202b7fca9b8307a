"""The rules of check.py that hold the claims against the logs: scores, bytes of text, times, seeds, significance."""

import math
import re
import statistics

from common import NATS_TO_BEAT, P_TO_BEAT, bytes_implied, mean_std, p_below, p_text
from folder import Complaints, Submission, agree, file_seed, rule, unit
from logs import Line, Log, Shown

TIME_SLACK_MS = 500  # a run stops after the step that crossed the cap: all merged records end within 150 ms of it
# Validation set: tokens, bytes of text a token. All published records imply 151.0 to 151.1 million bytes, except the
# first baseline (151.48 million on today's tokens: its shards were of an earlier export).
KNOWN_TEXT = {
    "sp1024": (62_021_632, 2.4359),
    "sp4096": (45_508_608, 3.3197),
    "sp8192": (40_540_160, 3.7266),
    "caseops": (47_851_520, 3.1573),
    "byte": (151_080_000, 1.0),
}
TEXT_BYTES = (150.9e6, 151.7e6)


@rule
def val_tokens(s: Submission) -> Complaints:
    """The number of validation tokens is that of the known set (PR #2109 scored 36.6 million of 43.8)."""
    for name, log in s.claimed.items() if s.limits.fineweb else ():
        yield from too_few_tokens(name, log)


def too_few_tokens(name: str, log: Log) -> Complaints:
    known = KNOWN_TEXT.get(log.tokenizer, (None,))[0]
    if log.val_tokens and known and abs(log.val_tokens / known - 1) > 1e-3:
        severity = "error" if log.val_tokens < 0.995 * known else "warning"
        yield severity, name, f"{known:,} validation tokens ({log.tokenizer})", f"{log.val_tokens:,}"


@rule
def implied_bytes(s: Submission) -> Complaints:
    """tokens * loss / (ln 2 * bpb) is the size of the validation text: a byte count that is wrong shows here."""
    for name, log in s.logs.items():
        lengths = implied_lengths(log)
        if not lengths:
            if s.limits.fineweb:
                yield from by_training_loss(name, log)
            continue
        length, exact, line = next((entry for entry in reversed(lengths) if entry[1]), lengths[-1])
        for other, also_exact, other_line in lengths:
            if abs(other / length - 1) > (1e-3 if exact and also_exact else 2e-3):
                expected = f"{length:.4f} bytes a token, as in line {line}"
                yield "warning", f"{name}:{other_line}", expected, f"{other:.4f}"
                break
        if s.limits.fineweb:
            yield from of_known_text(f"{name}:{line}", log, length)


def implied_lengths(log: Log) -> list[tuple[float, bool, int]]:
    """Of every line with loss and score: the bytes a token that they imply, whether exactly, and its number."""
    found = []
    for score in log.all_scores:
        loss, bpb = score.values.get("val_loss", 0.0), score.values.get("val_bpb", 0.0)
        if 0 < loss < 100 and 0 < bpb < 100:
            exact = max(unit(loss) / loss, unit(bpb) / bpb) < 2e-5
            found.append((bytes_implied(1, loss, bpb), exact, score.number))
    return found


def by_training_loss(name: str, log: Log) -> Complaints:
    """A log without val_loss is judged by its last training losses (PRs #1545, #1576, #1632)."""
    trained = [step.values["train_loss"] for step in log.steps[-5:] if "train_loss" in step.values]
    known = next((ratio for tokens, ratio in KNOWN_TEXT.values() if tokens == log.val_tokens), None)
    scores = log.values("val_bpb")
    length = bytes_implied(1, statistics.fmean(trained), scores[-1]) if trained and scores and scores[-1] else 0
    if known and length and not abs(length / known - 1) <= 0.1:
        found = f"about {length:.2f}, by the training loss (the log has no val_loss)"
        yield "warning", f"{name}:{log.all_scores[-1].number}", f"{known:.4f} bytes a token of this set", found


def of_known_text(where: str, log: Log, length: float) -> Complaints:
    """Whether bytes a token are those of the challenge's validation set."""
    if min(abs(length / ratio - 1) for _, ratio in KNOWN_TEXT.values()) <= 1e-3:
        return
    known, text = KNOWN_TEXT.get(log.tokenizer, (None, None))[1], (log.val_tokens or 0) * length
    if known:
        off = abs(length / known - 1)
        expected = f"{known:.4f} bytes a token of {log.tokenizer} (within 0.1%)"
        yield "error" if off > 0.01 else "warning", where, expected, f"{length:.4f} ({length / known - 1:+.2%})"
    elif not text:
        yield "info", where, "the number of validation tokens, to judge the bytes", f"{length:.4f} bytes a token"
    elif not TEXT_BYTES[0] <= text <= TEXT_BYTES[1]:
        severity = "warning" if 0.99 * TEXT_BYTES[0] <= text <= 1.01 * TEXT_BYTES[1] else "error"
        yield severity, where, "151.1 million bytes of validation text", f"{text / 1e6:.2f} million"


@rule
def time_caps(s: Submission) -> Complaints:
    """Training and evaluation each within the time that the track allows."""
    limit = s.limits.time_cap_ms
    if limit is None:
        return
    for name, log in s.claimed.items():
        trained = [(step.number, step.values["train_time"]) for step in log.steps if "train_time" in step.values]
        ends = [end for end in (log.train_end, trained[-1] if trained else None) if end]
        slack = max([TIME_SLACK_MS, *(2 * step.values.get("step_avg", 0) for step in log.steps[-1:])])
        if log.train_end is None and trained and trained[-1][1] % 6000 == 0:
            slack += 6000  # minutes to one decimal
        if ends and (end := max(ends, key=lambda end: end[1]))[1] > limit + slack:
            yield "error", f"{name}:{end[0]}", f"at most {limit / 1000:.0f} s of training", f"{end[1] / 1000:.1f} s"
        evals = [
            (score.number, score.values["eval_time"])
            for score in log.all_scores
            if "eval_time" in score.values and any(agree(want, score.values.get("val_bpb", 0)) for want in s.claims)
        ]
        evals += [log.eval_total] if log.eval_total else []
        if evals and (end := max(evals, key=lambda end: end[1]))[1] > limit:
            yield "error", f"{name}:{end[0]}", f"at most {limit / 1000:.0f} s of evaluation", f"{end[1] / 1000:.1f} s"


@rule
def monotonic(s: Submission) -> Complaints:
    """Steps and times of a log never go back, unless a new run begins or the script says that it resumes (PR #319)."""
    for name, log in s.logs.items():
        for line, expected, found in steps_back(log)[:3]:
            yield "error", f"{name}:{line.number}", expected, found
        for number, text in enumerate(log.lines, 1):
            if re.match(r"(?:step:\d|stopping_early|final_)", text) and re.search(r":~\d", text):
                yield "warning", f"{name}:{number}", "numbers as a script prints them", f"{text.strip()[:60]!r}"


def steps_back(log: Log) -> list[tuple[Line, str, str]]:
    """Lines whose step or time is before that of the line above, with what was expected and found."""
    step, clock, seen, resumes, found = -1, 0.0, {}, list(log.resumes), []
    for line in log.trained:
        while resumes and resumes[0][0] < line.number:  # the script says from where it went on
            step = resumes.pop(0)[1]
            clock = max([seen[at] for at in seen if at <= step], default=0.0)
        now = line.values.get("train_time")
        if line.step <= 1 < step:  # the next run in the same file
            step, clock, seen = line.step, now or 0.0, {}
            continue
        if line.step < step:
            found.append((line, f"a step after {step}", f"step {line.step}"))
        elif now is not None and now < clock - max(60.0, 0.001 * clock):
            expected = f"a time after the {clock:.0f} ms of step {step}"
            found.append((line, expected, f"step {line.step} at {now:.0f} ms"))
        step, clock = line.step, now if now is not None else clock
        seen[step] = clock
    return found


@rule
def step_averages(s: Submission) -> Complaints:
    """train_time is step_avg times the steps, where a log states both and means the average since the start."""
    for name, log in s.logs.items():
        both = [line for line in log.steps if line.step > 10 and {"train_time", "step_avg"} <= line.values.keys()]
        odd = []
        for line in both:
            now, due = line.values["train_time"], line.values["step_avg"] * line.step
            if abs(due - now) > 0.02 * now + 100:
                odd.append((line.number, now, due))
        for number, now, due in odd[:3] if len(odd) < 0.2 * len(both) else ():
            yield "warning", f"{name}:{number}", f"train_time {due:.0f} ms, step_avg times steps", f"{now:.0f} ms"


@rule
def finite(s: Submission) -> Complaints:
    """No loss or score of a log is NaN or infinite."""
    for name, log in s.logs.items():
        for line in [*log.steps, *log.all_scores]:
            values = {key: line.values.get(key, 0.0) for key in ("train_loss", "val_loss", "val_bpb")}
            if bad := [key for key, value in values.items() if not math.isfinite(value)]:
                yield "error", f"{name}:{line.number}", f"a finite {bad[0]}", values[bad[0]]
                break


def families(logs: dict[str, Log]) -> list[list[Log]]:
    """Logs that belong together: all, and those whose names differ by the seed only."""
    groups: dict[str, list[Log]] = {}
    for name, log in logs.items():
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(log)
    return [list(logs.values()), *(group for group in groups.values() if len(group) < len(logs))]


def averages(s: Submission, key: str) -> list[tuple[float, float, float]]:
    """Mean, sample and population deviation of each score that every log of a family states, or every seed's result."""
    pairs = [(family, label) for family in families(s.logs) if len(family) > 1 for label in family[0].scores]
    groups = [[log.scores[label][key] for log in family if key in log.scores.get(label, {})] for family, label in pairs]
    listed = list(s.listed(key).values())
    groups += [listed] if len(listed) == len(s.seed_results) else []
    sound = [values for values in groups if len(values) > 1 and all(map(math.isfinite, values))]
    return [(statistics.fmean(values), statistics.stdev(values), statistics.pstdev(values)) for values in sound]


@rule
def scores(s: Submission) -> Complaints:
    """val_bpb, val_loss and val_bpb_std of submission.json are those of a log, or of several."""
    for key, stated in (("val_bpb", s.bpb), ("val_loss", s.facts.get("val_loss"))):
        known = [value for log in s.logs.values() for value in log.values(key)]
        known += [step.values[key] for log in s.logs.values() for step in log.steps[-3:] if key in step.values]
        if stated is None or not known:
            if stated is not None and s.logs:
                severity = "warning" if key == "val_bpb" else "info"
                yield severity, s.json_name, f"a log that states {key}, to compare with {stated}", "none"
            continue
        means = [mean for mean, _, _ in averages(s, key)]
        if not any(agree(stated, mean, 1.5e-5) for mean in means) and not any(agree(stated, x) for x in known):
            nearest = min([*known, *means], key=lambda value: abs(value - stated))
            severity = "error" if abs(nearest - stated) > 5e-4 else "warning"
            yield severity, s.json_name, f"{key} from the logs (nearest: {nearest:.6f})", stated
    std = s.facts.get("val_bpb_std")
    spreads = [spread for _, *pair in averages(s, "val_bpb") for spread in pair]
    if std is not None and spreads:
        if min(abs(std - spread) for spread in spreads) > min(max(unit(std), 1.5e-5), 5e-4):
            yield "warning", s.json_name, f"val_bpb_std {spreads[0]:.5f} as computed from the seeds", std


@rule
def seed_scores(s: Submission) -> Complaints:
    """Each seed's result in submission.json is that of its log."""
    for seed, row in s.seed_results.items() if s.logs else ():
        logs = [log for name, log in s.logs.items() if f"{file_seed(name)}" == seed]
        stated, steps = row.get("val_bpb"), row.get("steps")
        if stated is not None and not logs and len(s.logs) < len(s.seed_results):
            yield "warning", s.json_name, f"a log of seed {seed}", "none"
        else:
            for key in ("val_bpb", "val_loss"):
                known = [value for log in logs or s.logs.values() for value in log.values(key)]
                if row.get(key) is not None and known and not any(agree(row[key], value) for value in known):
                    yield "error", s.json_name, f"{key} of seed {seed} from its log", row[key]
        last = {step.step for log in logs for step in log.steps[-2:]}
        stops = [re.search(r"(?i)stopping[_ ]early.*? step:? ?(\d+)", x) for log in logs for x in log.lines[-3000:]]
        ends = last | {int(match[1]) for match in stops if match}
        if steps is not None and last and int(steps) not in ends:
            yield "warning", s.json_name, f"steps of seed {seed} from its log ({max(ends)})", int(steps)


HEADLINE = re.compile(
    r"(?:val[_\\ ]*bpb|bpb)[`*:=|\s~≈]{1,12}(\d\.\d{3,8})\b|\b(\d\.\d{3,8})[`*\s]{1,4}(?:val_)?bpb\b(?!\s*[:=])", re.I
)
OF_OTHERS = re.compile(
    r"(?i)baseline|sota|\bvs\b|previous|prior|base:|current|PR ?#|penalty|beat|pre-|compar|over|threshold"
)


def a_claim(match: re.Match) -> bool:
    """Whether a score in a README is a claim: no difference, and nobody else's."""
    line = match.string[match.string.rfind("\n", 0, match.start()) + 1 : match.end()]
    before = match.string[: match.start(1 if match[1] else 2)][-1:]
    return float(match[1] or match[2]) > 0.5 and before not in tuple("+-\u2212\u00b1") and not OF_OTHERS.search(line)


@rule
def readme_score(s: Submission) -> Complaints:
    """The first score that the README claims is in a log, or the mean of several."""
    match = next((match for match in HEADLINE.finditer(s.readme[:6000]) if a_claim(match)), None)
    if match is None:
        if s.readme:
            yield "info", "README.md", "a score in bits per byte", "none that was recognised"
        return
    claim, where = Shown(match[1] or match[2]), f"README.md:{s.readme[: match.start()].count(chr(10)) + 1}"
    known = [value for log in s.logs.values() for value in log.values("val_bpb")]
    known += [step.values["val_bpb"] for log in s.logs.values() for step in log.steps if "val_bpb" in step.values]
    listed = list(s.listed("val_bpb").values())
    known += [mean for mean, _, _ in averages(s, "val_bpb")] + ([statistics.fmean(listed)] if listed else [])
    line = s.readme[s.readme.rfind("\n", 0, match.start()) + 1 :].partition("\n")[0]
    shown = [claim, *map(Shown, re.findall(r"\b\d\.\d{4,8}\b", line))]  # a table's row may begin with another's score
    if not any(agree(one, value, 1.5e-5) for one in shown for value in known):
        nearest = f"nearest {min(known, key=lambda value: abs(value - claim)):.5f}" if known else "the logs have none"
        yield "warning" if known else "error", where, f"a score that a log states ({nearest})", f"{float(claim)}"
    if s.bpb is not None and abs(s.bpb - claim) > max(unit(s.bpb), unit(claim)) * 1.5:
        yield "info", where, f"val_bpb of {s.json_name} ({s.bpb})", f"{float(claim)}"


@rule
def seeds(s: Submission) -> Complaints:
    """The logs are of distinct seeds, each the one that its name states."""
    stated: dict[tuple, str] = {}
    for name, log in s.logs.items():
        named = file_seed(name)
        if named is not None and log.seed is not None and named != log.seed:
            yield "error", name, f"a run of seed {named}", f"seed {log.seed}"
        if log.seed is not None and name in s.claimed:
            twin = stated.setdefault((re.sub(r"\d+", "#", name), log.seed), name)
            if twin != name and (named is None or file_seed(twin) != named):
                yield "warning", name, "another seed than every other log", f"seed {log.seed}, as in {twin}"
    if len(set(s.seeds)) < len(s.seeds):
        yield "error", s.json_name, "distinct seeds", s.seeds
    if s.seeds and s.seed_results and set(map(str, s.seeds)) != set(s.seed_results):
        yield "warning", s.json_name, f"seed_results of the seeds {s.seeds}", ", ".join(s.seed_results)
    have = {log.seed for log in s.logs.values()} | {file_seed(name) for name in s.logs}
    missing = [seed for seed in s.seeds if seed not in have]
    if missing and s.logs:
        yield "warning", s.json_name, "a log for every seed", f"none for {', '.join(map(str, missing))}"


# Settings that say where, when and how often, not what a run was: of other people's logs, and of ours.
RUN_SETTINGS = re.compile(
    r"seed|run_id|log|path|dir|files|rank|time|port|host|out|artifact|val_loss_every|name"
    r"|params|hf_|device|url|gpu|mem|core|allocated|reserved|shards|tokens$"
)
OUR_RUN_KEYS = set(
    """seed run_id log_dir resume mode preset artifact checkpoint val_loss_every train_log_every
    checkpoint_every microbatch_tokens prompt sample_tokens temperature top_k""".split()
)


@rule
def one_config(s: Submission) -> Complaints:
    """All seeds ran one configuration and one script (PR #2118)."""
    family = families({name: log for name, log in s.claimed.items() if file_seed(name) is not None})[0]
    for log in family[1:]:
        first, name = family[0], log.path.relative_to(s.folder).as_posix()
        if first.config and log.config:
            severity, old, new = "error", first.config, log.config
            keys = (old.keys() | new.keys()) - OUR_RUN_KEYS
        else:
            severity, old, new = "warning", first.settings, log.settings
            keys = {key for key in old.keys() & new.keys() if not RUN_SETTINGS.search(key)}
        if differs := sorted(key for key in keys if old.get(key) != new.get(key)):
            found = ", ".join(f"{key} {new.get(key)} for {old.get(key)}" for key in differs[:4])
            more = f" and {len(differs) - 4} more" if len(differs) > 4 else ""
            yield severity, name, f"the settings of {first.path.name}", found + more
        one, two = (entry.sizes.get("code", (0, 0))[1] for entry in (first, log))
        if one and two and one != two:
            severity = "info" if abs(one / two - 1) <= 1e-3 else "warning"
            yield severity, name, f"the script of {first.path.name} ({one:,} bytes)", f"{two:,} bytes"


@rule
def significance(s: Submission) -> Complaints:
    """A record needs three seeds and beats the last one by 0.005 nats a token at p < 0.01."""
    if s.track != "10min_16mb" or not s.facts:
        return
    final = {seed: (score, s.seed_results[seed].get("val_loss")) for seed, score in s.listed("val_bpb").items()}
    for log in [] if final else s.claimed.values():  # otherwise by the score that each log ends in
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
        if p is None or p >= P_TO_BEAT:
            expected = f"{NATS_TO_BEAT} nats below {s.beat} at p < {P_TO_BEAT}"
            margin = s.beat * ratio - mean_std(values)[0]
            yield "error", s.json_name, expected, f"{margin:.4f} nats, p = {p_text(p)}"
