"""The rules of check.py for folders that submit.py wrote: log, result, metrics and script of a run state the same."""

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

from common import facts_of, is_number
from folder import Complaints, Submission, rule, weights_alone
from logs import Log, parse_metrics
from tool import InputError

# Relative: the log rounds them.
SLACK = {"val_loss": 1e-7, "val_bpb": 1e-7, "train_time_ms": 1e-3, "train_flops": 5e-3}
SHOWN = {"train_loss": 6e-5, "val_loss": 6e-5, "val_bpb": 6e-5, "train_time": 0.6}  # of a log; how finely it shows it


@rule
def our_numbers(s: Submission) -> Complaints:
    """Log, result_seed<N>.json and metrics_seed<N>.jsonl of a run of ours state the same numbers."""
    for seed in s.ours:
        name, where = f"train_seed{seed}.log", f"result_seed{seed}.json"
        log, result = s.logs.get(name), s.parse(where)
        if log is None:
            yield "error", name, f"the log of {where}", "none"
            continue
        for key, expected in said_by(log).items():
            found = result.get(key)
            close = is_number(found) and is_number(expected) and abs(found - expected) <= SLACK.get(key, 0) * expected
            if found != expected and not close:
                yield "error", where, f"{key} {expected} of its log", found
        if result.get("complete") is not True:
            yield "error", where, "a whole run on the whole validation set", f"complete: {result.get('complete')}"
        yield from our_metrics(s, seed, log)


@rule
def our_facts(s: Submission) -> Complaints:
    """submission.json and the page say of the runs, all of them, what their results say."""
    results = [s.parse(f"result_seed{seed}.json") for seed in s.ours]
    if not results:
        return
    try:
        facts = facts_of(results)
    except (KeyError, TypeError, ValueError) as error:
        yield "error", "result_seed<N>.json", "whole results of runs", f"without {error}"
        return
    stated = {key: s.parse(s.json_name).get(key) for key in facts}
    for one in (facts, stated):
        one["seeds"] = sorted(map(str, one["seeds"])) if isinstance(one["seeds"], list) else one["seeds"]
    for key, expected, found in differences("", facts, stated):
        yield "error", s.json_name, f"{key} {expected}, by the results here", found
    if f"val_bpb {facts['val_bpb']:.4f}" not in s.readme:
        yield "error", "README.md", f"val_bpb {facts['val_bpb']:.4f}, the mean of the results", "no such score"


def differences(where: str, expected: object, found: object) -> Iterator[tuple]:
    """(key, expected, found) of every value of `expected` that is another in `found`, and of seeds it does not have."""
    if isinstance(expected, dict):
        found = found if isinstance(found, dict) else {}
        for key in sorted(expected.keys() | found.keys() if where == "seed_results" else expected):
            yield from differences(f"{where}.{key}".lstrip("."), expected.get(key), found.get(key))
    elif is_number(expected) and is_number(found):
        if not math.isclose(expected, found, rel_tol=1e-9):
            yield where, expected, found
    elif expected != found:
        yield where, expected, found


def said_by(log: Log) -> dict[str, object]:
    """What a log of ours says of its run, in the keys of result.json, None where it does not; the last word counts, if
    it was resumed."""
    config, score = log.config or {}, log.score() or {}
    times = [step.values["train_time"] for step in log.steps if {"val_loss", "train_time"} <= step.values.keys()]
    said = {
        "val_loss": score.get("val_loss"),
        "val_bpb": score.get("val_bpb"),
        "bytes_artifact": log.size("model"),
        "bytes_code": log.size("code"),
        "bytes_total": log.size("total"),
        "count_code": config.get("count_code"),
        "seed": log.seed,
        "steps": log.steps[-1].step if log.steps else None,
        "val_tokens": log.val_tokens,
        "layout": config.get("layout"),
        "dataset": Path(str(config.get("data_path") or "")).name or None,
        "train_time_ms": times[-1] if times else None,
        "eval_time_ms": next(reversed(log.values("eval_time")), None),
        **{key: log.said.get(key) for key in ("script_sha256", "device", "world_size", "tokens", "train_flops")},
    }
    if log.sizes:  # it came to its end
        looped = re.search(r"x(\d+)", str(config.get("layout")))
        said["eval_loops"] = log.said.get("eval_loops")
        said["loops"] = said["eval_loops"] and (int(looped[1]) if looped else 1)
    return said


def our_metrics(s: Submission, seed: str, log: Log) -> Complaints:
    """The steps of a log are those of its metrics.jsonl, with the same numbers. Only the first difference is told."""
    name = f"metrics_seed{seed}.jsonl"
    try:
        listed = enumerate(parse_metrics(name, s.text(name)), 1)
        rows = {(row["step"], "val_loss" in row): (number, row) for number, row in listed}
    except InputError as error:
        yield "error", *re.split(": expected |, found ", str(error), maxsplit=2)
        return
    if not rows:
        yield "error", name, "the metrics of the run", "none"
        return
    lines = [line for line in log.steps if not {"train_loss", "val_loss"}.isdisjoint(line.values)]
    logged, last = set(), {(line.step, "val_loss" in line.values): line.number for line in lines}
    for line in lines:  # the others tell of a change of passes, a new epoch
        again = last[line.step, "val_loss" in line.values] > line.number  # a run stopped while scoring scores anew
        if any(line.number < at and (line.step > step or line.step == step and again) for at, step in log.resumes):
            continue  # of an interrupted run, done again later
        key = line.step, "val_loss" in line.values
        logged.add(key)
        if key not in rows:
            yield "error", name, f"step {line.step} of the log", "none"
            return
        number, row = rows[key]
        for shown, slack in SHOWN.items():
            value, said = row.get("train_time_ms" if shown == "train_time" else shown), line.values.get(shown)
            if said is not None and (not is_number(value) or not abs(value - said) <= slack):
                yield "error", f"{name}:{number}", f"{shown} {said:g} of step {line.step} in the log", value
                return
    if extra := sorted(set(rows) - logged, key=str):
        step = extra[0][0]
        yield "error", f"{name}:{rows[extra[0]][0]}", "a step of the log", f"step {step}, which the log does not have"


@rule
def our_source(s: Submission) -> Complaints:
    """The script here is the one at the head of each log, but for the preset and its name as the default."""
    shipped = s.shipped.get(s.entry)
    for seed in s.ours:
        name = f"train_seed{seed}.log"
        log = s.logs.get(name)
        if log is None:
            continue
        if log.source is None:
            yield "error", name, "the script's source at its head", "none"
            continue
        hashes = [hashlib.sha256((log.source + end).encode()).hexdigest() for end in ("", "\n")]
        stated = log.said.get("script_sha256", hashes[0])
        if stated not in hashes:
            yield "error", name, f"the source of SHA-256 {stated[:12]}, as it says", hashes[0][:12]
        logged, here = plain(log.source), plain(shipped.text if shipped else "")
        if logged != here:
            both = enumerate(zip(logged.splitlines(), here.splitlines()), 1)
            line = next((i for i, (a, b) in both if a != b), "its end")
            yield "error", s.entry or name, f"the script of {name}, but for its preset", f"another from line {line} on"
        if weights_alone(log):
            expected, slack = 0, 0
        elif shipped and shipped.packed:  # another release of LZMA may differ by some bytes, and so do the settings
            expected, slack = shipped.size, 0.03 * shipped.size
        else:  # the log drops the last line's end
            expected, slack = len(log.source.encode()), 1
        code = log.size("code")
        if code is not None and abs(code - expected) > slack:
            yield "error", f"{name}:{log.sizes['code'][0]}", f"code {expected} bytes, as shipped or at its head", code


# The preset that submit adds: a text, or a call in the scripts before those.
BAKED = re.compile(r'^    "submission": (?:""".*?""",\n|dict\(.*?\),\n(?=    "|\}))', re.M | re.S)


def plain(source: str) -> str:
    """A script without what submit bakes in: the preset "submission" and the name of the default one."""
    source = BAKED.sub("", source, count=1)
    return re.sub(r'^DEFAULT_PRESET = ".*"$', "DEFAULT_PRESET", source, flags=re.M).rstrip()
