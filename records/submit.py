"""Turn finished runs into a record folder in the challenge's form, ready for a pull request.

    python records/submit.py logs/RUN1 logs/RUN2 logs/RUN3 --track non_record_16mb --name LoopedBand --blurb "..."

One run folder for each seed of one configuration. The result is records/track_<track>/<date>_<name>/:

    train_gpt.py           the script of the runs, their configuration baked in as its defaults: started there with
                           plain `torchrun --standalone --nproc_per_node=8 train_gpt.py` it repeats the first run
    train_seed<N>.log      as the script wrote it; result_seed<N>.json and metrics_seed<N>.jsonl belong to it
    submission.json        every number computed from those files
    README.md              tables complete; what they mean is yours to write (--blurb, --prose)
    requirements.txt       the versions of the runs

Nothing is kept unless the folder passes records/check.py without an error and the baked script repeats the first steps
of the first run, here and now (--no-proof leaves that out and says so in the README).
"""

import ast
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from check import check_folder
from check_ours import BAKED
from common import (
    BYTES_CAP,
    NATS_TO_BEAT,
    P_TO_BEAT,
    RECORDS,
    ROOT,
    SOURCE_END,
    TRACKS,
    InputError,
    Log,
    Parser,
    markdown_table,
    mean_std,
    p_below,
    p_text,
    read_json,
    read_log,
    run_tool,
    short,
    write_json,
    write_text,
)

# Settings that say how a run was started, not what it was.
NOT_BAKED = ("mode", "preset", "run_id", "resume", "artifact", "checkpoint", "init_from", "log_dir", "prompt",
             "sample_tokens", "temperature", "top_k")  # fmt: skip
NEEDED = """run_id framework seed val_bpb val_loss val_bpb_raw complete fits config_sha256 dataset dataset_sha256
    bytes_artifact steps tokens train_flops train_time_ms eval_time_ms calib_time_ms versions device world_size layout
    params_stored val_tokens quantizer codec""".split()  # of result.json
PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "constriction", "tqdm")  # what train_gpt.py imports
PRESET = "submission"
TRAIN_CAP_MS = EVAL_CAP_MS = 600_000  # of the 10-minute track
PROOF_STEPS = 3
PROOF_TOLERANCE = 0.02  # relative, of a training loss: another device or no compilation rounds differently
FILL_IN = "TO FILL IN: what this entry tries, what it shows, whose ideas it builds on."


@dataclass
class Run:
    folder: Path
    result: dict
    log: Log
    source: str  # of the script that ran, from the head of its log

    @property
    def seed(self) -> int:
        return self.result["seed"]


def need(holds: object, what: object, expected: str, found: object, mend: str = "") -> None:
    if not holds:
        raise InputError(f"{what}: expected {expected}, found {found}" + (f"; {mend}" if mend else ""))


# Reading -------------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """A finished run's files. Refuses what is missing, unfinished, partial, over the cap or without its source."""
    need(folder.is_dir(), short(folder), "a run folder such as logs/RUN", "none")
    path = folder / "result.json"
    need(path.is_file(), short(folder), "the result.json of a finished run", "none",
         "the run was not finished: go on with RUN_ID and RESUME=1")  # fmt: skip
    result = read_json(path, "the result of a run")
    for name in ("train.log", "metrics.jsonl"):
        need((folder / name).is_file(), short(folder), name, "none")
    missing = [key for key in NEEDED if key not in result]
    need(not missing, short(path), "the keys of result.json", f"no {', '.join(missing)}")
    need(result["val_bpb"] is not None, short(path), "a finished run", "one stopped before its end",
         f"go on with RUN_ID={result['run_id']} RESUME=1")  # fmt: skip
    finite = all(isinstance(result[key], float) and math.isfinite(result[key]) for key in ("val_bpb", "val_loss"))
    need(finite, short(path), "finite numbers for val_bpb and val_loss", f"{result['val_bpb']}, {result['val_loss']}")
    partial = f"a partial one ({result.get('val_tokens')} tokens)"
    need(result["complete"], short(path), "a score on the whole validation set", partial, "run with VAL_MAX_TOKENS=0")
    smaller = "fewer blocks, a smaller MODEL_DIM, or QUANTIZER=fisher and TARGET_BYTES"
    cap = f"code + artifact within {result.get('bytes_cap')} bytes"
    need(result["fits"], short(path), cap, result.get("bytes_total"), smaller)
    log = read_log(folder / "train.log")
    need(log.config and log.source_bytes, short(folder / "train.log"), "the script's source and a config at its head",
         "none", "give a log as the script wrote it")  # fmt: skip
    try:
        text = (folder / "train.log").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{short(folder / 'train.log')}: expected UTF-8 text, found {error}") from None
    start = log.config.get("init_from")
    need(not start, short(folder), "a run from scratch", f"INIT_FROM={start}",
         "what it started from is not in the artifact's ten minutes")  # fmt: skip
    return Run(folder, result, log, text[: text.index(f"\n{SOURCE_END}\n")])


def check_together(runs: list[Run]) -> None:
    """Runs of one submission differ in their seed and in nothing else."""
    first = runs[0]
    for run in runs[1:]:
        differs = sorted(key for key in first.log.config if first.log.config[key] != run.log.config.get(key))
        what = ", ".join(f"{key}={run.log.config.get(key)} instead of {first.log.config[key]}" for key in differs
                         if key not in ("seed", "run_id", "log_dir", "resume"))  # fmt: skip
        need(run.result["config_sha256"] == first.result["config_sha256"], short(run.folder),
             f"the configuration of {short(first.folder)}", what or "another")  # fmt: skip
        need(run.source == first.source, short(run.folder), f"the script of {short(first.folder)}", "another version")
        for key in ("framework", "dataset", "dataset_sha256", "world_size", "device", "val_tokens"):
            need(run.result[key] == first.result[key], short(run.folder), f"{key} {first.result[key]}", run.result[key])
    seeds = [run.seed for run in runs]
    need(len(set(seeds)) == len(seeds), "RUN", "one run a seed", f"seeds {', '.join(map(str, seeds))}")


def check_track(track: str, runs: list[Run]) -> None:
    """What a track asks for and the runs cannot have any more."""
    result, fineweb = runs[0].result, runs[0].result["dataset"].startswith("fineweb")
    if track == "local":
        return
    need(result["framework"] == "torch", "--track", "local for MLX runs (the challenge runs PyTorch)", track)
    need(fineweb, "--track", "local for text that is not FineWeb", f"{track} with {result['dataset']}")
    if track == "10min_16mb":
        eight = result["world_size"] == 8 and "H100" in result["device"]
        found = f"{result['world_size']} x {result['device']}"
        need(eight, "--track", "runs on 8 x H100", found, "use --track non_record_16mb")
        for run in runs:
            train, score = run.result["train_time_ms"] + (run.result["calib_time_ms"] or 0), run.result["eval_time_ms"]
            need(train <= TRAIN_CAP_MS, short(run.folder), "at most 600 s of training and calibration", f"{train} ms")
            need(score <= EVAL_CAP_MS, short(run.folder), "at most 600 s of evaluation", f"{score} ms")


# The script ----------------------------------------------------------------------------------------------------------


def field_defaults(source: str) -> dict[str, object]:
    """Default of every field of the script's Config."""
    tree = ast.parse(source)
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    return {node.target.id: ast.literal_eval(node.value) for node in config.body if isinstance(node, ast.AnnAssign)}


def from_folder(path: str, kind: str) -> str:
    """Where data lies as seen from a record folder, which is three levels below the root, here and in the challenge."""
    return f"../../../data/{kind}/{Path(path).name}"


def baked_settings(run: Run) -> dict[str, object]:
    """What differs from the script's defaults, as the record's own script states it."""
    config = dict(run.log.config)
    try:
        defaults = field_defaults(run.source)
    except (SyntaxError, ValueError, StopIteration):
        defaults = {}
    need(defaults and defaults.keys() == config.keys(), short(run.folder / "train.log"),
         "a script whose Config has the settings of the config line", "another", "was the log edited?")  # fmt: skip
    config["data_path"] = from_folder(config["data_path"], "datasets")
    config["tokenizer_path"] = from_folder(config["tokenizer_path"], "tokenizers")
    return {key: value for key, value in config.items() if key not in NOT_BAKED and value != defaults.get(key)}


def literal(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def bake(source: str, settings: dict[str, object]) -> str:
    """The script with one more preset, which is what it runs without flags. Nothing else changes.

    A run of a record's own script has such a preset already: it is replaced."""
    source, lines = BAKED.sub("", source, count=1), [f'    "{PRESET}": dict(']
    for i, (key, value) in enumerate(settings.items(), 1):  # not textwrap, which would break a path with spaces
        entry = f"{key}={literal(value)}" + (", " if i < len(settings) else "),")
        if len((lines[-1] + entry).rstrip()) > 120:
            lines.append(" " * 8)
        lines[-1] += entry
    preset = "".join(line.rstrip() + "\n" for line in lines)
    table, default = "PRESETS: dict[str, dict[str, object]] = {\n", re.compile(r'^DEFAULT_PRESET = ".*"$', re.M)
    need(source.count(table) == 1 and len(default.findall(source)) == 1, "train.log",
         "a script with one PRESETS table and one DEFAULT_PRESET", "another")  # fmt: skip
    return default.sub(f'DEFAULT_PRESET = "{PRESET}"', source.replace(table, table + preset))


def prove_configuration(script: Path, run: Run):
    """The baked script, without flags, has the configuration of the run: by its own hash. Returns it as a module."""
    spec = importlib.util.spec_from_file_location("baked_script", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules["baked_script"] = module
    try:
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        spec.loader.exec_module(module)
        config = module.load_config([], {}, module.DEFAULT_PRESET)[0]
    except Exception as error:  # whatever an edited source does
        found = f"{type(error).__name__}: {error}"
        raise InputError(f"{script.name}: expected the baked script to load, found {found}") from None
    finally:
        sys.dont_write_bytecode = before
        del sys.modules["baked_script"]
    config = dataclasses.replace(config, preset=run.log.config["preset"])  # early scripts hash the preset's name, too
    need(module.config_sha256(config) == run.result["config_sha256"], script.name,
         f"the run's configuration ({run.result['config_sha256'][:12]}) from the baked script without flags",
         module.config_sha256(config)[:12], "was the log's config line or source changed?")  # fmt: skip
    need(config.seed == run.seed, script.name, f"seed {run.seed}", config.seed)
    return module


def prove_run(folder: Path, run: Run, minutes: float) -> str:
    """Starts the record's script inside its folder and compares its first steps with the log. Returns what was seen."""
    expected = {step.step: step.values["train_loss"] for step in run.log.steps if "train_loss" in step.values}
    steps = sorted(expected)[:PROOF_STEPS]
    need(steps, short(run.folder / "train.log"), "training losses, to compare the proof with", "none")
    script = "train_gpt.py" if run.result["framework"] == "torch" else "train_gpt_mlx.py"
    with tempfile.TemporaryDirectory() as logs:
        fields = {name.upper() for name in run.log.config}
        env = {name: value for name, value in os.environ.items() if name not in fields}
        env |= {"LOG_DIR": logs, "RUN_ID": "proof", "COMPILE": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, script]
        if run.result["framework"] == "torch":
            count = run.result["world_size"] if "cpu" not in run.result["device"].lower() else 1
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))  # or torchrun sets 1
        output, log = Path(logs) / "output", Path(logs) / "proof" / "train.log"
        with open(output, "w") as file:
            process = subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT,
                                       stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        found, deadline = {}, time.monotonic() + 60 * minutes
        # A SIGTERM must not leave a whole training behind, which has a session of its own.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while process.poll() is None and len(found) < len(steps) and time.monotonic() < deadline:
                time.sleep(0.3)
                found = first_losses(log, steps)
        finally:
            process.terminate()  # torchrun hands it on to its processes, which have sessions of their own
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            signal.signal(signal.SIGTERM, before)
        found = first_losses(log, steps)  # it may have ended since the last look
        said = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
        error = next((line for line in reversed(said) if "error:" in line.lower()), said[-1] if said else "no output")
        need(len(found) == len(steps), "proof", f"{len(steps)} steps in {minutes:g} minutes from inside the folder",
             f"{len(found)} ({error})", "on the right machine it proves itself; --no-proof leaves it out")  # fmt: skip
    for step in steps:
        near = abs(found[step] / expected[step] - 1) <= PROOF_TOLERANCE
        need(near, f"proof, step {step}", f"a training loss near {expected[step]}, as in the log", found[step],
             "the folder does not repeat the run: was its log or data changed?")  # fmt: skip
    pairs = ", ".join(f"step {step} {found[step]:.4f} (log: {expected[step]:.4f})" for step in steps)
    return f"Started inside this folder, without flags and without compilation, the script gave {pairs}."


def first_losses(log: Path, steps: list[int]) -> dict[int, float]:
    if not log.is_file():
        return {}
    lines = [line for line in read_log(log).steps if line.step in steps]
    return {line.step: line.values["train_loss"] for line in lines if "train_loss" in line.values}


# The folder ----------------------------------------------------------------------------------------------------------


def requirements(run: Run) -> str:
    """The packages of the script, in the versions of the run; tqdm's, which no run states, from this repository."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([A-Za-z0-9-]+)(?:\[\w+\])?==([0-9.]+)", text, re.M)) | run.result["versions"]
    names = PACKAGES if run.result["framework"] == "torch" else ("mlx", *PACKAGES[1:])
    return "".join(f"{name}=={pins[name].split('+')[0]}\n" for name in names if name in pins)


def against_score(runs: list[Run], beat: float) -> dict:
    """The two p-values of a claim to beat a score: at all, and by the challenge's 0.005 nats a token."""
    ratio = runs[0].result["val_loss"] / runs[0].result["val_bpb"]  # nats a token for a bit a byte
    losses = [run.result["val_loss"] for run in runs]
    margin = p_below(losses, beat * ratio - NATS_TO_BEAT)
    return {"score_to_beat": beat, "p_below": p_below(losses, beat * ratio), "p_below_by_0.005_nats": margin,
            "beats_by_margin": margin is not None and margin < P_TO_BEAT and len(runs) >= 3}  # fmt: skip


def summary(runs: list[Run], args, code_bytes: int) -> dict:
    """submission.json: the keys of the challenge's recent records, and a few of ours behind them."""
    bpb, bpb_std = mean_std([run.result["val_bpb"] for run in runs])
    loss, loss_std = mean_std([run.result["val_loss"] for run in runs])
    first = runs[0].result
    artifact = max(run.result["bytes_artifact"] for run in runs)
    train = max(run.result["train_time_ms"] + (run.result["calib_time_ms"] or 0) for run in runs)
    evaluation = max(run.result["eval_time_ms"] for run in runs)
    seed_results = {
        str(run.seed): {
            "val_loss": run.result["val_loss"], "val_bpb": run.result["val_bpb"],
            "val_bpb_before_export": run.result["val_bpb_raw"], "artifact_bytes": run.result["bytes_artifact"],
            "steps": run.result["steps"], "tokens": run.result["tokens"], "train_flops": run.result["train_flops"],
            "train_time_s": run.result["train_time_ms"] / 1000, "eval_time_s": run.result["eval_time_ms"] / 1000,
        }
        for run in runs
    }  # fmt: skip
    return {
        "author": args.author, "github_id": args.github_id, "name": args.name, "date": args.date, "track": args.track,
        "val_loss": loss, "val_bpb": bpb, "val_loss_std": loss_std, "val_bpb_std": bpb_std,
        "seeds": [run.seed for run in runs], "seed_results": seed_results,
        "bytes_total": artifact + code_bytes, "bytes_code": code_bytes, "bytes_model": artifact,
        "hardware": f"{first['world_size']} x {first['device']}", "framework": first["framework"],
        "pytorch_version" if first["framework"] == "torch" else "mlx_version": first["versions"][first["framework"]],
        "layout": first["layout"], "params_stored": first["params_stored"],
        "train_flops": mean_std([run.result["train_flops"] for run in runs])[0],
        "dataset": first["dataset"], "val_tokens": first["val_tokens"],
        "compliance": {
            "train_under_600s": train <= TRAIN_CAP_MS, "eval_under_600s": evaluation <= EVAL_CAP_MS,
            "artifact_under_16mb": artifact + code_bytes <= BYTES_CAP,
            "whole_validation_set": all(run.result["complete"] for run in runs),
        },
        "against": against_score(runs, args.beat) if args.beat else None,
        "blurb": args.blurb or FILL_IN, "technique_summary": args.blurb or FILL_IN,
    }  # fmt: skip


def readme(runs: list[Run], args, facts: dict, settings: dict[str, object], proof: str) -> str:
    """README.md of the folder."""
    result, n = runs[0].result, len(runs)
    script = "train_gpt.py" if result["framework"] == "torch" else "train_gpt_mlx.py"
    rows = [
        [run.seed, f"{run.result['val_bpb']:.6f}", f"{run.result['val_loss']:.6f}", f"{run.result['val_bpb_raw']:.6f}",
         run.result["steps"], run.result["tokens"], f"{run.result['train_flops']:.4g}",
         f"{run.result['train_time_ms'] / 1000:.1f} s", f"{run.result['eval_time_ms'] / 1000:.1f} s",
         run.result["bytes_artifact"]]
        for run in runs
    ]  # fmt: skip
    if n > 1:
        for label, i in (("**mean**", 0), ("**std**", 1)):
            pair = (mean_std([run.result[key] for run in runs])[i] for key in ("val_bpb", "val_loss", "val_bpb_raw"))
            rows.append([label, *(f"{value:.6f}" for value in pair), *[""] * 6])
    head = ["seed", "val_bpb", "val_loss", "before export", "steps", "tokens", "FLOPs", "training", "evaluation",
            "artifact bytes"]  # fmt: skip
    std = f" ± {facts['val_bpb_std']:.4f}" if n > 1 else ""
    against = facts["against"]
    claim = "" if against is None else (
        f"Against {against['score_to_beat']}: p = {p_text(against['p_below'])} that the mean is not below it, "
        f"p = {p_text(against['p_below_by_0.005_nats'])} that it is not below it by {NATS_TO_BEAT} nats a token "
        f"(one-sided t-test over {n} seeds; a record needs three seeds and p < {P_TO_BEAT} for the latter).\n\n")
    foreign = "" if result["dataset"].startswith("fineweb") else (
        f"**The text is `{result['dataset']}`, not FineWeb: compare with runs on the same data only.**\n\n")
    run_line = (f"torchrun --standalone --nproc_per_node={result['world_size']} {script}"
                if script == "train_gpt.py" else f"python {script}")  # fmt: skip
    listed = "".join(f"    {key} = {literal(value)}\n" for key, value in settings.items())
    caps, asked = facts["compliance"], args.track == "10min_16mb"
    packed = ", compressed (it unpacks itself in memory)," if runs[0].log.config.get("pack_code") else ""

    def said(key: str) -> str:
        return "yes" if caps[key] else "no" if asked else "no, and this track does not ask for it"

    return f"""# {args.name}

**val_bpb {facts["val_bpb"]:.4f}{std}** ({n} seed{"s" * (n > 1)}, artifact read back from disk) |
**{facts["bytes_total"]:,} bytes** of {BYTES_CAP:,} | {facts["hardware"]}

{args.blurb or FILL_IN}

{args.prose}{foreign}## Results

{markdown_table(head, rows)}
{claim}Layout `{facts["layout"]}`, {facts["params_stored"]:,} parameters; artifact {result["quantizer"]}, coder \
{result["codec"]}; {facts["val_tokens"]:,} validation tokens, all of them scored.
Numbers: computed from the logs and results here.

## Rules

| rule | kept |
|---|---|
| code {facts["bytes_code"]:,} + artifact {facts["bytes_model"]:,} (largest seed) within {BYTES_CAP:,} bytes | \
{said("artifact_under_16mb")} |
| training within 600 s (on {facts["hardware"]}) | {said("train_under_600s")} |
| evaluation within 600 s | {said("eval_under_600s")} |
| the whole validation set scored ({facts["val_tokens"]:,} tokens) | {said("whole_validation_set")} |

## Run

From inside this folder, with the data in `data/` at the repository's root:

    {run_line}

`SEED=<N>` before it gives another seed. {proof}
The script is the one at the head of each log{packed} but for its default: the preset `{PRESET}`, which states

{listed}
## Files

`train_seed<N>.log` as the script wrote it, source included; `result_seed<N>.json` and `metrics_seed<N>.jsonl`: the same
run's numbers for programs; `submission.json`, `requirements.txt`, `{script}`.
"""


def put(part: Path, home: Path, replace: bool) -> None:
    """Gives a finished folder its name. What was there goes only when the new one is in its place."""
    # Asked again: another submit may have made it during the proof.
    need(replace or not home.exists(), short(home), "a new folder", "one of that name", "--replace, or --name")
    old = part.with_name("replaced")
    if home.exists():
        os.replace(home, old)
    try:
        os.replace(part, home)
    except BaseException:
        if old.exists():
            os.replace(old, home)
        raise


def git_setting(name: str) -> str:
    found = subprocess.run(["git", "config", name], capture_output=True, text=True, cwd=ROOT)
    return found.stdout.strip() if found.returncode == 0 else ""


def parse_args(argv: list[str] | None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, one for each seed")
    parser.add_argument("--track", choices=TRACKS, required=True, help="where it belongs")
    parser.add_argument("--name", required=True, help="name of the entry: letters, digits, . _ -")
    parser.add_argument("--author", default="", help="default: git's user.name")
    parser.add_argument("--github-id", default="", help="default: git's github.user")
    parser.add_argument("--blurb", default="", help="a sentence or two: what it is")
    parser.add_argument("--prose", type=Path, help="file of Markdown that goes into the README")
    parser.add_argument("--beat", type=float, help="score (bits per byte) that it is to beat")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="YYYY-MM-DD (default: today)")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the tracks (default: records/)")
    parser.add_argument("--replace", action="store_true", help="replace a folder of that name")
    parser.add_argument("--no-proof", action="store_true", help="do not start the baked script")
    parser.add_argument("--proof-minutes", type=float, default=5.0, help="how long the proof may take (default: 5)")
    args = parser.parse_args(argv)
    name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name)
    need(name, "--name", 'letters, digits, ".", "_" and "-", no spaces', f'"{args.name}"')
    try:
        written = datetime.date.fromisoformat(args.date).isoformat()
    except ValueError:
        written = None
    need(written == args.date, "--date", "YYYY-MM-DD", f'"{args.date}"')  # 20261121 is a date, too
    need(args.beat is None or 0 < args.beat < 16, "--beat", "a score in bits per byte", args.beat)
    args.author = args.author or git_setting("user.name")
    args.github_id = args.github_id or git_setting("github.user") or None
    need(args.author, "--author", "a name", "none, in git's user.name neither", 'give --author="..."')
    need(args.github_id or args.track == "local", "--github-id", "a GitHub user",
         "none, in git's github.user neither", "give --github-id=...")  # fmt: skip
    try:
        args.prose = args.prose.read_text(encoding="utf-8").strip() + "\n\n" if args.prose else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prose: expected a text file, found {error}") from None
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    check_together(runs)
    check_track(args.track, runs)
    home = args.out / f"track_{args.track}" / f"{args.date}_{args.name}"
    need(args.replace or not home.exists(), short(home), "a new folder", "one of that name", "--replace, or --name")
    if home.exists() and not (args.blurb or args.prose) and (home / "README.md").is_file():
        theirs = FILL_IN not in (home / "README.md").read_text(encoding="utf-8", errors="replace")
        need(not theirs, short(home), "a README without words of yours", "one with them",
             "repeat them with --blurb and --prose, or delete the folder")  # fmt: skip
    if len({str(run.result["versions"]) for run in runs}) > 1:
        print("notice: the runs had different package versions; requirements.txt states the first run's")
    settings = baked_settings(runs[0])
    script = "train_gpt.py" if runs[0].result["framework"] == "torch" else "train_gpt_mlx.py"
    part = args.out / f".submit.{os.getpid()}.tmp" / home.name  # as deep below the root as the folder will be
    try:
        part.mkdir(parents=True)
        baked = bake(runs[0].source, settings)
        (part / script).write_text(baked, encoding="utf-8")
        module = prove_configuration(part / script, runs[0])
        if runs[0].log.config.get("pack_code"):
            (part / script).write_bytes(module.packed(baked))
        for run in runs:
            for name in ("train.log", "result.json", "metrics.jsonl"):
                stem, _, suffix = name.partition(".")
                shutil.copyfile(run.folder / name, part / f"{stem}_seed{run.seed}.{suffix}")
        write_text(part / "requirements.txt", requirements(runs[0]))
        facts = summary(runs, args, len((part / script).read_bytes()))
        total = facts["bytes_total"]
        need(total <= BYTES_CAP, script, f"code + artifact within {BYTES_CAP} bytes", total)
        write_json(part / "submission.json", facts)
        not_proven = "**Not proven on the machine that wrote this folder: start it before you submit it.**"
        write_text(part / "README.md", readme(runs, args, facts, settings, not_proven))
        findings = check_folder(part)
        errors = [finding for finding in findings if finding.severity == "error"]
        for finding in findings:
            if finding.severity != "info":
                print(finding)
        need(not errors, short(home), "a folder without errors", f"{len(errors)} (above)", "nothing was written")
        if not args.no_proof:
            print("proof: the baked script takes its first steps, this can take minutes ...", flush=True)
            proof = prove_run(part, runs[0], args.proof_minutes)
            print(proof)
            write_text(part / "README.md", readme(runs, args, facts, settings, proof))
        home.parent.mkdir(parents=True, exist_ok=True)
        put(part, home, args.replace)
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)
    std = f" ± {facts['val_bpb_std']:.4f}" if facts["val_bpb_std"] is not None else ""
    print(f"{short(home)}: {facts['val_bpb']:.4f}{std} bits per byte, {len(runs)} seeds, {facts['bytes_total']} bytes")
    if not args.blurb:
        print(f"next: say in {short(home)}/README.md and submission.json what it is, then records/table.py")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
