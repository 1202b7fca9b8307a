"""Run a declared matrix of training runs: a queue that survives interruption, then a table and a picture.

    python records/ablate.py records/ablations/NAME.toml             run what is missing, then report
    python records/ablate.py records/ablations/NAME.toml --list      what is done, what is left; runs nothing
    python records/ablate.py records/ablations/NAME.toml --report    only the table and the picture

A matrix, NAME.toml (settings are those of the script, in lower case):

    about = "Does a looped band pay at equal FLOPs?"     # opens the report
    script = "train_gpt.py"                              # or train_gpt_mlx.py
    seeds = [1337, 42, 2025]
    against = "baseline"                                 # the arm that Welch's test compares with
    processes = 1                                        # a run; more than 1 uses torchrun on as many GPUs
    [budget]                                             # of each run, exactly one: flops, tokens or seconds
    flops = 1e14
    [base]                                               # settings of every run
    model_dim = 256
    [arms.baseline]                                      # settings of one arm
    preset = "baseline"
    [arms.band]
    layout = "3+3x3+3"

Finished runs lie in NAME/<arm>_seed<N>/ beside the TOML (run.json, train.log, metrics.jsonl, result.json): commit them,
and another machine goes on from there. The script is that of the commit in result.json, and not at the head of every
log; one that differed from its commit lies there once, NAME/<script>.<first 12 digits of its SHA-256>.py. Runs in
hand lie in logs/NAME/ with their checkpoints; Ctrl-C, SIGTERM and --max-minutes stop them there, and the same command
resumes them, unless the script or their settings have changed: then they start anew. A run that diverged is a result
and is kept (diverged.json); other failures are tried again.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, bytes_implied, is_number, markdown_table, mean_std, number, p_text, read_result, short, welch_p
from draw import COLORS, canvas, draw_line, draw_validation, save_picture, tidy, zoom
from layout import building
from logs import SOURCE_END, read_metrics
from runs import git, handling, hold, launch, load_module
from tool import InputError, Parser, need, read_json, run_tool, write_json, write_text

BUDGETS = {"flops": "max_train_flops", "tokens": "iterations", "seconds": "max_wallclock_seconds"}  # their settings
KEYS = dict(about=str, script=str, seeds=list, against=str, processes=int, budget=dict, base=dict, arms=dict)
SCRIPTS = ("train_gpt.py", "train_gpt_mlx.py")
NEEDED = """val_bpb val_bpb_raw seed config_sha256 layout framework params_stored bytes_artifact tokens train_flops
    train_time_ms complete device world_size commit versions dataset dataset_sha256 val_tokens""".split()  # of a result
# Set by this tool, hence no business of a matrix.
OWN_SETTINGS = ("seed", "run_id", "log_dir", "resume", "mode", "artifact", "checkpoint")
BLEW_UP = "expected (a finite|finite|weights and gradients)"  # in what a run says whose model is worthless
MEANS = {  # columns of the report: key of a result, its unit, how it is written
    "before export": ("val_bpb_raw", 1, ".4f"),
    "parameters": ("params_stored", 1, ",.0f"),
    "artifact bytes": ("bytes_artifact", 1, ",.0f"),
    "M tokens": ("tokens", 1e6, ".2f"),
    "FLOPs": ("train_flops", 1, ".3g"),
    "minutes": ("train_time_ms", 6e4, ".1f"),
}


@dataclass
class Matrix:
    path: Path
    about: str
    script: str
    seeds: list[int]
    against: str
    processes: int
    budget: tuple[str, float]
    arms: dict[str, dict[str, str]]  # settings of each, base and budget not included
    base: dict[str, str]
    limits: dict[str, dict[str, str]] = field(default_factory=dict)  # the budget as settings of each arm

    @property
    def home(self) -> Path:  # of finished runs and the report
        return self.path.with_suffix("")

    @property
    def work(self) -> Path:  # of runs in hand
        return ROOT / "logs" / self.path.stem

    def runs(self) -> list["Run"]:
        """Seed by seed, so that a matrix cut short has every arm."""
        return [Run(self, arm, seed) for seed in self.seeds for arm in self.arms]

    def finished(self) -> list[tuple["Run", dict]]:
        """The runs that have ended, and their results."""
        return [(run, result) for run in self.runs() if (result := run.result())]


@dataclass
class Run:
    matrix: Matrix
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}_seed{self.seed}"

    @property
    def home(self) -> Path:
        return self.matrix.home / self.name

    @property
    def work(self) -> Path:
        return self.matrix.work / self.name

    @property
    def settings(self) -> dict[str, str]:
        """What the matrix asks for, but for the budget."""
        return self.matrix.base | self.matrix.arms[self.arm]

    def result(self) -> dict | None:
        """result.json of the finished run; {"diverged": reason} if it ended so; None if it is to be done."""
        settled, path = self.home / "diverged.json", self.home / "result.json"
        if not path.is_file():
            return read_json(settled, "the reason of a run that diverged") if settled.is_file() else None
        result = read_result(path, NEEDED, f"delete {short(self.home)} to run it again")
        reason = why_diverged(result)
        return {"diverged": reason} if reason else result

    def origin(self, script_sha256: str) -> dict[str, str]:
        """What makes this run the one that it is called, run.json: script, seed, budget, settings."""
        kind, amount = self.matrix.budget
        own = {"script_sha256": script_sha256, "seed": str(self.seed), "budget": f"{amount} {kind}"}
        return own | self.settings

    def flags(self) -> list[str]:
        own = {"seed": self.seed, "run_id": self.name, "log_dir": f"logs/{self.matrix.path.stem}"}
        every = self.settings | self.matrix.limits.get(self.arm, {}) | own
        return [f"--{name}={value}" for name, value in every.items()]


def of_commit(commit: str, script: str) -> bytes | None:
    """The script as a commit has it; None where it is not known here. A "+" behind it says that some file was changed,
    perhaps another one."""
    return git("show", f"{commit.removesuffix('+')}:{script}")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def why_diverged(result: dict) -> str | None:
    """Why a finished result is none, in words: a score that is null or not finite."""
    odd = [key for key in ("val_bpb_raw", "val_bpb") if not is_number(result.get(key))]
    return f"expected a finite {odd[0]}, found {result.get(odd[0])}" if odd else None


# The matrix ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def said_of(path: Path):
    """What is wrong is said of this file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}; see --help") from None


def read_declared(path: Path, what: str, keys: dict[str, type]) -> dict:
    """The TOML of a matrix, or of a plan of exports.py, as far as both are alike. Raises InputError."""
    try:
        with open(path, "rb") as file:
            toml = {"about": "", "script": SCRIPTS[0], "seeds": [1337]} | tomllib.load(file)
    except ValueError as error:  # no TOML, or no UTF-8
        raise InputError(f"{path}: expected TOML, found an error ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: expected {what} (TOML), found nothing to read ({error.strerror})") from None
    with said_of(path):
        named = re.fullmatch(r"[A-Za-z0-9._-]+\.toml", path.name)
        need(named, "the file's name", "letters, digits and ._-, ending in .toml", path.name)
        for key, value in toml.items():
            need(key in keys, key, f"one of {', '.join(keys)}", "an unknown key")
            need(type(value) is keys[key], key, f"a {keys[key].__name__}", value)
        need(toml["script"] in SCRIPTS, "script", " or ".join(SCRIPTS), toml["script"])
        seeds = toml["seeds"]
        whole = all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
        need(seeds and whole and len(set(seeds)) == len(seeds), "seeds", "different whole numbers", seeds)
    return toml


def read_settings(settings: dict) -> dict[str, str]:
    """Settings of the base or of an arm, as texts."""
    for name, value in settings.items():
        need(re.fullmatch("[a-z0-9_]+", name), name, "a setting in lower case", name)  # SEED would get by below
        need(name not in OWN_SETTINGS, name, "no setting that this tool makes itself", name)
        need(isinstance(value, (str, int, float, bool)), name, "a text or a number", value)
    return {name: str(int(value)) if isinstance(value, bool) else str(value) for name, value in settings.items()}


def read_matrix(path: Path) -> Matrix:
    """Reads and checks the TOML, as far as that goes without the script."""
    toml, arms = read_declared(path, "a matrix", KEYS), {}
    with said_of(path):
        budget = toml.get("budget", {})
        one = len(budget) == 1 and set(budget) <= set(BUDGETS)
        need(one, "[budget]", f"exactly one of {', '.join(BUDGETS)}", ", ".join(budget) or "none")
        [(kind, amount)] = budget.items()
        need(type(amount) in (int, float) and 0 < amount < 1e30, f"[budget] {kind}", "a number above 0", amount)
        need(toml.get("arms"), "[arms.NAME]", "at least one arm", "none")
        for arm, settings in toml["arms"].items():
            need(isinstance(settings, dict), f"[arms.{arm}]", "a table of settings", settings)
            named = re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", arm)
            need(named, f"arm {arm}", "letters, digits and ._-, a letter or digit first", arm)
            arms[arm] = read_settings(settings)
        base, against = read_settings(toml.get("base", {})), toml.get("against", next(iter(arms)))
        need(against in arms, "against", f"one of the arms {', '.join(arms)}", against)
        script, processes = toml["script"], toml.get("processes", 1)
        several = processes > 1 and script == SCRIPTS[0]
        need(processes == 1 or several, "processes", "1, or more with train_gpt.py", processes)
    return Matrix(path, toml["about"], script, toml["seeds"], against, processes, (kind, amount), arms, base)


# The script and what it makes of the matrix --------------------------------------------------------------------------


def load_script(name: str):
    """A trainer as a module. Raises InputError where its packages are missing."""
    try:
        return load_module(ROOT / name)
    except ImportError as error:
        raise InputError(f"{name}: expected its packages, found {error}; run: make setup") from None


@dataclass
class Plan:
    """The script as it is now, and what it makes of a matrix."""

    script: object  # the module
    source: str
    data: dict[str, str | None] = field(default_factory=dict)  # hash of each arm's data, None where they are not here


def configure(matrix: Matrix, script, arm: str):
    """Config of an arm's first run, with the matrix's budget as settings of the arm."""

    def load():
        return script.load_config(Run(matrix, arm, matrix.seeds[0]).flags(), {}, script.DEFAULT_PRESET)[0]

    kind, amount = matrix.budget
    twice = set(BUDGETS.values()) & (set(matrix.arms[arm]) | set(matrix.base))
    need(not twice, ", ".join(twice), "the budget in [budget] alone", "another", "remove it")
    limits = matrix.limits[arm] = dict.fromkeys(BUDGETS.values(), "0") | {BUDGETS[kind]: str(amount)}
    if kind == "tokens":
        limits["iterations"] = "1"
        batch = load().train_batch_tokens
        steps = round(amount / batch)
        limits["iterations"] = str(steps)
        need(abs(steps * batch / amount - 1) <= 0.01, "[budget] tokens", f"a multiple of {batch} tokens a step", amount)
    return load()


def prepare(matrix: Matrix) -> Plan:
    """Loads the script and has it check every arm. Raises InputError."""
    plan, seen = Plan(load_script(matrix.script), (ROOT / matrix.script).read_bytes().decode()), {}
    for arm in matrix.arms:
        try:
            config = configure(matrix, plan.script, arm)
        except ValueError as error:  # the script's InputError is one
            raise InputError(f"{matrix.path}: arm {arm}: {error}") from None
        twin = seen.setdefault(json.dumps(dataclasses.asdict(config) | {"run_id": ""}), arm)
        need(twin == arm, matrix.path, "arms that differ", f"{twin} and {arm} to be one")
        if config.val_max_tokens:
            print(f"notice: arm {arm}: VAL_MAX_TOKENS={config.val_max_tokens}: its scores will be partial", flush=True)
        here = {name: str(ROOT / getattr(config, name)) for name in ("data_path", "tokenizer_path")}
        try:
            plan.data[arm] = plan.script.dataset_sha256(dataclasses.replace(config, **here))
        except (OSError, ValueError):  # the run says so, or makes them (preset smoke)
            plan.data[arm] = None
    return plan


def check_finished(matrix: Matrix, plan: Plan | None = None) -> None:
    """Refuses finished runs that are not what the TOML calls them, or of different data.

    With a plan also those that its script and data would not make again. Tokenizers may differ, as bits per byte allow,
    but not the held-out text. Raises InputError."""
    datasets, sizes = set(), set()
    for run, result in matrix.finished():
        here, found = short(run.home), read_json(run.home / "run.json", "what a finished run was made of")
        commit = (result.get("commit") or "its commit").rstrip("+")
        script = f"git checkout {commit} -- {matrix.script} (or take the copy beside it)"
        mend = f"two scripts are no comparison: {script}, or start a new matrix"
        current = not plan or found.get("script_sha256") == sha256(plan.source)
        need(current, here, f"a run of this {matrix.script}", "one of another version", mend)
        wanted = run.origin(found.get("script_sha256"))
        for name in wanted | found:
            is_same, mend = wanted.get(name) == found.get(name), f"delete {here} to run it again, or rename the arm"
            need(is_same, here, f"{name}={wanted.get(name)}", found.get(name), mend)
        if data := result.get("dataset_sha256"):
            datasets.add(data)
            if is_number(result.get("val_bpb")) and is_number(result.get("val_loss")):
                sizes.add(bytes_implied(result["val_tokens"], result["val_loss"], result["val_bpb"]))
            mend = "mend data_path, or start a new matrix"
            known = not plan or plan.data[run.arm] in (None, data)
            need(known, here, "runs on the data that is here", "one on other data", mend)
    one_text = sizes and max(sizes) < 1.001 * min(sizes)  # the last sequence may be cut elsewhere
    one, found = len(datasets) < 2 or one_text, f"{len(datasets)} that differ"
    need(one, short(matrix.home), "runs on one dataset, or one held-out text", found, "run the matrix again on one")


# The queue -----------------------------------------------------------------------------------------------------------


def visible_gpus() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    gpus = re.findall(r"^GPU (\d+):", listing.stdout, re.M) if listing.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [gpu for gpu in visible.split(",") if gpu] if visible is not None and gpus else gpus


def find_devices(matrix: Matrix, jobs: int) -> list[dict[str, str]]:
    """One entry for each run at a time: the environment that gives it its GPUs, or its share of the cores."""
    device = (matrix.base | next(iter(matrix.arms.values()))).get("device", "")
    gpus = visible_gpus() if matrix.script == SCRIPTS[0] and device in ("", "cuda") else []
    if gpus:
        each = matrix.processes
        groups = [gpus[i : i + each] for i in range(0, len(gpus) - each + 1, each)]
        need(groups, "processes", f"at most {len(gpus)} (the GPUs here)", each)
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[: jobs or len(groups)]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    need(jobs <= cores, "--jobs", f"at most {cores} (the cores here)", jobs)
    if jobs <= 1:
        return [{}]
    return [dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(cores // jobs))] * jobs


class Queue:
    """Runs what is missing, one run a device. The lock is handed down, so that an orphan still holds it."""

    def __init__(self, matrix: Matrix, plan: Plan, devices: list[dict[str, str]]):
        self.matrix, self.plan, self.devices = matrix, plan, devices
        self.head = f"{plan.source}\n{SOURCE_END}\n"  # with which a run begins its log
        self.busy: dict[int, tuple] = {}  # by device: run, process, start
        self.failed: list[Run] = []
        self.stopping = False
        self.lock = hold(matrix.work / "ablate.lock")
        self.lock.seek(0)
        owner, mine, mend = self.lock.read(), short(matrix.path), f"rename one of the two, or delete {self.lock.name}"
        need(owner in ("", mine), short(matrix.work), f"runs of {mine}", f"those of {owner}", mend)
        if not owner:
            self.lock.write(mine)
            self.lock.flush()
        matrix.home.mkdir(parents=True, exist_ok=True)
        self.waiting = [run for run in matrix.runs() if run.result() is None]  # now that nobody else finishes any

    def work(self, deadline: float) -> None:
        """Until nothing is left, the clock (time.monotonic) shows `deadline`, or a signal comes."""
        signals = []
        with handling(lambda number, _: signals.append(number), signal.SIGTERM, signal.SIGINT):
            try:
                while (self.busy or self.waiting) and not signals and time.monotonic() < deadline:
                    for device in range(len(self.devices)):
                        if device in self.busy and self.busy[device][1].poll() is not None:
                            self.collect(device)
                        if device not in self.busy and self.waiting:
                            self.start(self.waiting.pop(0), device)
                    time.sleep(0.2)
            finally:  # the time is up, a signal, or an error such as a full disk: no run in hand may go on alone
                self.stop()
        if signals:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Ends the runs in hand with a checkpoint."""
        self.stopping = True
        if self.busy:
            print("stopping: runs in hand write a checkpoint", flush=True)
        for _, process, _ in self.busy.values():
            process.terminate()
        for device in list(self.busy):
            self.busy[device][1].wait()
            self.collect(device)

    def start(self, run: Run, device: int) -> None:
        there, origin = (run.work / "checkpoint.safetensors").is_file(), run.origin(sha256(self.plan.source))
        started = self.matrix.work / f"{run.name}.json"  # beside its folder, which the run makes itself
        resume = there and started.is_file() and read_json(started) == origin and self.is_of_script(run)
        if resume and self.result_in_hand(run):
            self.finish(run, "had finished without this tool")  # which had been killed
            return
        if resume:
            (run.work / "result.json").unlink(missing_ok=True)  # of before; what this process leaves is the result
        elif run.work.exists():
            shutil.rmtree(run.work)  # it stopped before its first checkpoint, or was another run
        write_json(started, origin)
        command = [*launch(self.matrix.processes), self.matrix.script, *run.flags(), f"--resume={int(resume)}"]
        with open(self.output(run), "w", encoding="utf-8") as output:  # collect() reads why it failed
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment() | self.devices[device],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
            )
        self.busy[device] = (run, process, time.monotonic())
        anew = "started anew (what lay in logs/ is of another script or other settings)"
        word = "resumed" if resume else anew if there else "started"
        total = len(self.matrix.runs())
        print(f"[{total - len(self.waiting)}/{total}] {run.name}: {word}", flush=True)

    def is_of_script(self, run: Run) -> bool:
        """Whether every part of a run in hand was made by this script: each begins its log with the source."""
        path = run.work / "train.log"
        text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
        parts = len(re.findall(r"^config: \{", text, re.M))
        return text.startswith(self.head) and text.count(self.head) >= parts

    def environment(self) -> dict[str, str]:
        """This process's, without settings of the script: a stray MATRIX_LR must not reach some of the runs."""
        fields = dataclasses.fields(self.plan.script.Config)
        settings = {item.name.upper() for item in fields} | set(self.plan.script.REPLACED)
        return {name: value for name, value in os.environ.items() if name not in settings}

    def output(self, run: Run) -> Path:
        return self.matrix.work / f"{run.name}.out"

    def result_in_hand(self, run: Run) -> dict | None:
        """The result of a run that came to its end, with a score or without; None if it did not."""
        path = run.work / "result.json"
        result = read_result(path) if path.is_file() else {}
        ended = result.get("val_bpb") is not None or result.get("bytes_artifact") is not None
        return result if ended else None

    def collect(self, device: int) -> None:
        """Keeps what a process that ended has left."""
        run, process, began = self.busy.pop(device)
        minutes = (time.monotonic() - began) / 60
        stopped = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)
        tail = self.output(run).read_text(encoding="utf-8", errors="replace").splitlines()
        said = next((line for line in reversed(tail) if line.startswith("error:")), tail[-1] if tail else "nothing")
        ended, ours = self.result_in_hand(run), self.is_of_script(run)
        if ours and re.search(BLEW_UP, said):
            self.keep(run, said.removeprefix("error: "))
        elif ended and ours:  # with exit code 1 where the artifact is over the cap
            self.finish(run, f"in {minutes:.1f} min")
        elif self.stopping or process.returncode in stopped:  # torchrun ends with 1 when it is told to stop
            print(f"    {run.name}: stopped after {minutes:.1f} min; the same command goes on", flush=True)
        else:
            said = f"{self.matrix.script} was changed meanwhile" if ended else said
            self.failed.append(run)
            print(f"    {run.name}: failed ({process.returncode}): {said}", flush=True)

    def finish(self, run: Run, how: str) -> None:
        """Keeps a run that came to its end."""
        result = self.result_in_hand(run)
        reason = why_diverged(result)
        self.keep(run, reason)
        if not reason:
            cap = "" if result["fits"] else ", artifact over the cap"
            print(f"    {run.name}: {result['val_bpb']:.4f} bpb {how}{cap}", flush=True)

    def keep(self, run: Run, diverged: str | None) -> None:
        """Copies the files of a finished run beside the matrix, whole or not at all; the script once, if no commit has
        it."""
        source = self.plan.source
        copy = self.matrix.home / f"{Path(self.matrix.script).stem}.{sha256(source)[:12]}.py"
        commit = str((self.result_in_hand(run) or {}).get("commit"))
        if not copy.is_file() and of_commit(commit, self.matrix.script) != source.encode():
            write_text(copy, source)
        log = (run.work / "train.log").read_bytes().decode("utf-8", "replace")
        with building(run.home, replace=True) as part:  # what lies there has no result, or the run were not started
            write_json(part / "run.json", run.origin(sha256(source)))
            write_text(part / "train.log", log.replace(self.head, ""))  # a resumed run has it twice
            for name in ("metrics.jsonl", *([] if diverged else ["result.json"])):
                if (run.work / name).is_file():
                    shutil.copyfile(run.work / name, part / name)
            if diverged:
                write_json(part / "diverged.json", {"diverged": diverged})
        if diverged:
            print(f"    {run.name}: diverged, kept as a result: {diverged}", flush=True)
        # Whoever deletes run.home wants the run again, not the end of this one resumed.
        (run.work / "checkpoint.safetensors").unlink(missing_ok=True)


# The report ----------------------------------------------------------------------------------------------------------


def describe_budget(matrix: Matrix) -> str:
    kind, amount = matrix.budget
    words = {"flops": "{:.3g} training FLOPs", "tokens": "{:,.0f} tokens", "seconds": "{:g} seconds of training"}
    return words[kind].format(amount)


def arm_row(matrix: Matrix, arm: str, ended: int, scored: dict[str, list[dict]]) -> list[str]:
    """A row of the report's table: means over an arm's seeds, of which so many have ended."""
    found, planned = scored[arm], len(matrix.seeds)
    diverged = ended - len(found)
    if not found:
        said = f"diverged {diverged} times" if diverged else "not run yet"
        return [arm, f"0/{planned}", said, *["–"] * (3 + len(MEANS))]
    scores, others = ([one["val_bpb"] for one in scored[name]] for name in (arm, matrix.against))
    mean, std = mean_std(scores)
    n = f"{len(found)}/{planned}" + (f", {diverged} diverged" if diverged else "")
    name, p = (f"**{arm}**", "") if arm == matrix.against else (arm, p_text(welch_p(scores, others)))
    means = [format(statistics.fmean(one[key] for one in found) / unit, form) for key, unit, form in MEANS.values()]
    return [name, n, number(mean), number(std), p, f"`{found[0]['layout']}`", *means]


def by_passes(scored: dict[str, list[dict]]) -> str:
    """A table of val_bpb by passes at test time (EVAL_LOOPS), means over seeds; "" where no run scored several."""
    found: dict[str, dict[int, list[float]]] = {arm: {} for arm in scored}
    for arm, result in ((arm, result) for arm, results in scored.items() for result in results):
        for passes, bpb in (result.get("val_bpb_by_loops") or {}).items():
            found[arm].setdefault(int(passes), []).append(bpb)
    columns = sorted({passes for scores in found.values() for passes in scores})
    rows = [
        [arm, *(number(statistics.fmean(scores[passes]) if passes in scores else None) for passes in columns)]
        for arm, scores in found.items()
        if len(scores) > 1
    ]
    said = "The same artifacts with other numbers of passes, `val_bpb`:\n\n"
    return said + markdown_table(["arm", *columns], rows) + "\n" if rows else ""


def notes(matrix: Matrix, finished: list[tuple[Run, dict]], scored: dict[str, list[dict]]) -> list[str]:
    """What a reader of the table must know."""
    diverged = [f"`{run.name}`: {result['diverged']}" for run, result in finished if "diverged" in result]
    results = [result for found in scored.values() for result in found]
    left, partial = len(matrix.runs()) - len(finished), sum(not result["complete"] for result in results)
    devices = {(result["device"], result["world_size"]) for result in results}
    unfair = matrix.budget[0] == "seconds" and len(devices) > 1
    said = {
        f"**{left} of {len(matrix.runs())} runs are still to be done.**": left,
        f"**{len(diverged)} runs diverged and are in no mean.** {'; '.join(diverged)}.": diverged,
        f"**Partial: {partial} runs scored a part of the validation set only.**": partial,
        "Fewer than three seeds: this says which arm is ahead, and no more.": min(map(len, scored.values())) < 3,
        "**Runs on different devices under a budget of time: no fair comparison.**": unfair,
    }
    return [note for note, holds in said.items() if holds]


def several(values) -> str:
    """Each value once, in order."""
    return ", ".join(sorted(set(map(str, values))))


def listed(settings: dict[str, object]) -> str:
    return " ".join(f"`{name}={value}`" for name, value in settings.items())


def origins(matrix: Matrix, kept: list[tuple[Run, dict]]) -> str:
    """What the runs were made of and on."""
    results = [result for _, result in kept]
    scripts = [read_json(run.home / "run.json")["script_sha256"][:12] for run, _ in kept]
    packages = ("python", results[0]["framework"])
    versions = [f"{name} {result['versions'].get(name)}" for result in results for name in packages]
    data = [
        f"`{one['dataset']}`, sha256 {one['dataset_sha256'][:12]}, {one['val_tokens']:,} validation tokens"
        for one in results
    ]
    return f"""\
- Data: {several(data)}.
- Seeds: {", ".join(map(str, matrix.seeds))}. Script: `{matrix.script}` of commit \
{several(result["commit"] for result in results)}, sha256 {several(scripts)}.
- Devices: {several(f"{result['device']} x {result['world_size']}" for result in results)}. {several(versions)}. \
Minutes are of training alone, perhaps beside other runs.
- Settings of every run: {listed(matrix.base) or "the presets' own"}.
"""


def report(matrix: Matrix) -> str:
    """Writes README.md and matrix.png beside the finished runs, from their files alone. Returns the table."""
    check_finished(matrix)
    finished = matrix.finished()
    if not finished:
        return "nothing finished yet\n"
    kept = [(run, result) for run, result in finished if "diverged" not in result]
    scored = {arm: [result for run, result in kept if run.arm == arm] for arm in matrix.arms}
    means = {arm: statistics.fmean(one["val_bpb"] for one in found) for arm, found in scored.items() if found}
    arms = sorted(matrix.arms, key=lambda arm: means.get(arm, math.inf))
    head = ["arm", "n", "val_bpb", "std", f"p against {matrix.against}", "layout", *MEANS]
    rows = [arm_row(matrix, arm, sum(run.arm == arm for run, _ in finished), scored) for arm in arms]
    table, said = markdown_table(head, rows), [note + "\n\n" for note in notes(matrix, finished, scored)]
    picture = "![loss against FLOPs, and final scores](matrix.png)\n\n" if kept else ""
    text = f"""<!-- written by records/ablate.py from {matrix.path.name} and the runs in this folder -->
# {matrix.path.stem}

{matrix.about.strip()}

Budget of each run: {describe_budget(matrix)}. `val_bpb`: bits per byte of the artifact as read back from disk, lower is
better; std: sample standard deviation over seeds; p: Welch's t-test, two-sided, each arm by itself (not corrected for
the number of arms).

{table}
{"".join(said)}{by_passes(scored)}{picture}{origins(matrix, kept) if kept else ""}
Arms, and what each sets beyond that:

{chr(10).join(f"- `{arm}`: {listed(settings) or 'nothing more'}" for arm, settings in matrix.arms.items())}

Again, with that script: `python records/ablate.py {short(matrix.path)}`. Each run's log, metrics and result lie in its
folder here.
"""
    if kept:
        draw(matrix, {arm: found for arm, found in scored.items() if found}, kept)
    write_text(matrix.home / "README.md", text)
    return table


def draw(matrix: Matrix, scored: dict[str, list[dict]], kept: list[tuple[Run, dict]]) -> None:
    """Left: validation bpb against training FLOPs, a line a seed; where nothing was scored on the way, the final scores
    by passes. Right: final scores, mean and standard deviation."""
    figure, (left, right) = canvas(11, max(4.2, 1.2 + 0.32 * len(scored)), ncols=2, width_ratios=(3, 2))
    metrics = {arm: [run.home / "metrics.jsonl" for run, _ in kept if run.arm == arm] for arm in scored}
    scored_once = all(sum("val_bpb" in row for row in read_metrics(path)) < 2 for path in sum(metrics.values(), []))
    of_passes = scored_once and by_passes(scored)
    shown = []
    for i, (arm, results) in enumerate(scored.items()):
        if of_passes:
            points = sorted((int(n), bpb) for n, bpb in (results[0].get("val_bpb_by_loops") or {}).items())
            draw_line(left, points, i, arm, marker="o", markersize=3)
            shown += [bpb for _, bpb in points]
        else:
            shown += draw_validation(left, metrics[arm], i, arm)
        scores, color = [result["val_bpb"] for result in results], COLORS[i % len(COLORS)]
        mean, std = mean_std(scores)
        right.plot(scores, [i] * len(scores), "o", color=color, markersize=4, alpha=0.45)
        right.errorbar(mean, i, xerr=std or 0, fmt="D", color=color, capsize=4, markersize=6)
        right.annotate(f"{mean:.4f}", (mean, i), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
    if of_passes:  # of which some blow up
        left.set(xlabel="passes at test time", ylim=(min(shown) - 0.02, min(shown) + 1))
        left.set_ylabel("validation, bits per byte (artifact from disk, first seed)")
    else:
        zoom(left, shown)
        left.set(xlabel="training FLOPs", ylabel="validation, bits per byte (before export)")
    left.legend(frameon=False, fontsize=8)
    right.set_yticks(range(len(scored)), scored)
    right.set(xlabel="final bits per byte, artifact from disk", ylim=(len(scored) - 0.4, -0.6))
    right.margins(x=0.12)
    tidy(left)
    tidy(right)
    figure.suptitle(f"{matrix.path.stem}: {describe_budget(matrix)} a run", x=0.01, ha="left", fontsize=11)
    save_picture(figure, matrix.home / "matrix.png")


# The command ---------------------------------------------------------------------------------------------------------


def run_matrix(matrix: Matrix, plan: Plan, jobs: int, max_minutes: float) -> None:
    """Runs what is missing and reports. Raises InputError if runs failed."""
    devices = find_devices(matrix, jobs)
    queue = Queue(matrix, plan, devices)
    counts = f"{len(matrix.runs())} runs, {len(queue.waiting)} to do, {len(devices)} at a time"
    print(f"{matrix.path.stem}: {counts}, {describe_budget(matrix)} each", flush=True)
    try:
        queue.work(time.monotonic() + 60 * max_minutes if max_minutes else math.inf)
    finally:
        print(report(matrix), end="")
        queue.lock.close()  # or it waits for the garbage collector
    names = ", ".join(run.name for run in queue.failed)
    mend = f"see logs/{matrix.path.stem}/<run>.out; the same command tries them again"
    need(not names, short(matrix.path), "no failures", f"{len(queue.failed)} runs failed ({names})", mend)
    left = sum(run.result() is None for run in matrix.runs())
    rest = f"; {left} runs left, the same command goes on" if left else ""
    print(f"report: {short(matrix.home / 'README.md')}{rest}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("matrix", type=Path, metavar="NAME.toml", help="the matrix")
    parser.add_argument("--list", action="store_true", help="show the runs and their state; run nothing")
    parser.add_argument("--report", action="store_true", help="only write the table and the picture")
    parser.add_argument("--max-minutes", type=float, default=0.0, help="stop in good order after so long (0 = never)")
    parser.add_argument("--jobs", type=int, default=0, help="processes at a time (default: one a GPU, else one)")
    args = parser.parse_args(argv)
    for flag, value in (("--max-minutes", args.max_minutes), ("--jobs", args.jobs)):
        need(0 <= value < 1e9, flag, "0 or more", value)
    matrix = read_matrix(args.matrix)
    if args.report:
        print(report(matrix), end="")
        return 0
    plan = prepare(matrix)
    check_finished(matrix, plan)
    if args.list:
        for run in matrix.runs():
            result, there = run.result(), (run.work / "checkpoint.safetensors").is_file()
            waits = "to go on" if there else "waiting"
            print(f"{run.name:40} {waits if result is None else result.get('val_bpb', 'diverged')}")
        return 0
    run_matrix(matrix, plan, args.jobs, args.max_minutes)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
