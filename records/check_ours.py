"""The rules of check.py for folders that submit.py wrote: log, result, metrics and script of a run state the same."""

import json
import math
import re
from pathlib import Path

from common import SOURCE_END, Log
from folder import Complaints, Submission, is_number, rule


@rule
def our_numbers(s: Submission) -> Complaints:
    """Log, result_seed<N>.json and metrics_seed<N>.jsonl of a run of ours state the same numbers."""
    for seed in s.ours:
        name, result = f"train_seed{seed}.log", s.parse(f"result_seed{seed}.json")
        log = s.logs.get(name)
        if log is None:
            yield "error", name, f"the log of result_seed{seed}.json", "none"
            continue
        score = log.score() or {}
        listed = s.seed_results.get(seed, {})
        for key in ("val_loss", "val_bpb"):
            if is_number(result.get(key)) and abs(result[key] - score.get(key, math.nan)) <= 1e-6:
                if is_number(listed.get(key)) and abs(listed[key] - result[key]) > 1e-9:
                    yield "error", s.json_name, f"{key} {result[key]} of result_seed{seed}.json", listed[key]
            else:
                yield "error", f"result_seed{seed}.json", f"{key} {score.get(key)} of its log", result.get(key)
        for key, kind in (("bytes_artifact", "model"), ("bytes_code", "code"), ("bytes_total", "total")):
            if kind in log.sizes and result.get(key) != log.sizes[kind][1]:
                yield "error", f"result_seed{seed}.json", f"{key} {log.sizes[kind][1]} of its log", result.get(key)
        for key, value in said_by(log).items():
            close = key == "train_time_ms" and is_number(result.get(key)) and abs(result[key] - value) <= 1
            if result.get(key) != value and not close:
                yield "error", f"result_seed{seed}.json", f"{key} {value} of its log", result.get(key)
        if result.get("complete") is False:
            yield "error", f"result_seed{seed}.json", "a whole run on the whole validation set", "complete: false"
        yield from our_metrics(s, seed, log)


def said_by(log: Log) -> dict[str, object]:
    """What a log of ours says of its run, in the keys of result.json; the last word counts, if it was resumed."""
    said = {"seed": log.seed, "val_tokens": log.val_tokens, "steps": log.steps[-1].step if log.steps else None}
    if log.config:
        said |= {"layout": log.config.get("layout"), "dataset": Path(log.config.get("data_path") or "").name or None}
    for line in log.lines:
        if match := re.match(r"device: (.+?)  processes: (\d+)  ", line):
            said |= {"device": match[1], "world_size": int(match[2])}
        elif match := re.match(r"training: \d+ steps, (\d+) tokens, ", line):
            said["tokens"] = int(match[1])
    times = [step.values["train_time"] for step in log.steps if {"val_loss", "train_time"} <= step.values.keys()]
    evals = [score.values["eval_time"] for score in log.all_scores if "eval_time" in score.values]
    said |= {"train_time_ms": times[-1] if times else None, "eval_time_ms": evals[-1] if evals else None}
    return {key: value for key, value in said.items() if value is not None}


def our_metrics(s: Submission, seed: str, log: Log) -> Complaints:
    name, rows = f"metrics_seed{seed}.jsonl", {}
    for number, line in enumerate(s.text(name).splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["step"], "val_loss" in row] = (number, row)
        except (ValueError, KeyError, TypeError, RecursionError):
            yield "error", f"{name}:{number}", "a JSON object with a step", line[:40]
            return
    if not rows:
        yield "error", name, "the metrics of the run", "none"
        return
    shown, logged = {"train_loss": 6e-5, "val_loss": 6e-5, "val_bpb": 6e-5, "train_time": 0.6}, set()
    for line in log.steps:
        if not {"train_loss", "val_loss"} & set(line.values):
            continue  # a change of passes, a new epoch
        if any(line.number < at and line.step > step for at, step in log.resumes):
            continue  # of an interrupted run, done again later
        key = line.step, "val_loss" in line.values
        logged.add(key)
        if key not in rows:
            yield "error", name, f"step {line.step} of the log", "none"
            return
        number, row = rows[key]
        for shown_key, slack in shown.items():
            value = row.get("train_time_ms" if shown_key == "train_time" else shown_key)
            said = line.values.get(shown_key)
            if said is not None and (not is_number(value) or abs(value - said) > slack):
                yield "error", f"{name}:{number}", f"{shown_key} {said:g} of step {line.step} in the log", value
                return
    if extra := sorted(set(rows) - logged):
        number = rows[extra[0]][0]
        yield "error", f"{name}:{number}", "a step of the log", f"step {extra[0][0]}, which the log does not have"


@rule
def our_source(s: Submission) -> Complaints:
    """The script here is the one at the head of each log, but for the preset and its name as the default."""
    for seed in s.ours:
        log, name = s.logs.get(f"train_seed{seed}.log"), f"train_seed{seed}.log"
        if log is None:
            continue
        text = s.text(name)
        if log.source_bytes is None or f"\n{SOURCE_END}\n" not in text:
            yield "error", name, "the script's source at its head", "none"
            continue
        logged = text[: text.index(f"\n{SOURCE_END}\n")]
        shipped = s.shipped[s.entry] if s.entry else None
        unpacked = shipped.text if shipped else ""
        if plain(logged) != plain(unpacked):
            pairs = zip(plain(logged).splitlines(), plain(unpacked).splitlines())
            line = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), "its end")
            yield "error", s.entry or name, f"the script of {name}, but for its preset", f"another from line {line} on"
        code = log.sizes.get("code", (0, None))[1]
        if shipped and shipped.packed:  # another release of LZMA may differ by some bytes, and so do the settings
            expected, slack = shipped.size, 0.03 * shipped.size
        else:  # the log drops the last line's end
            expected, slack = len(logged.encode()), 1
        if code is not None and abs(code - expected) > slack:
            yield "error", f"{name}:{log.sizes['code'][0]}", f"code {expected} bytes, as shipped or at its head", code


BAKED = re.compile(r'^    "submission": dict\(.*?\),\n(?=    "|\})', re.M | re.S)


def plain(source: str) -> str:
    """A script without what submit bakes in: the preset "submission" and the name of the default one."""
    source = BAKED.sub("", source, count=1)
    return re.sub(r'^DEFAULT_PRESET = ".*"$', "DEFAULT_PRESET", source, flags=re.M).rstrip()
