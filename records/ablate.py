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
    [arms.baseline]                                      # settings of one arm; or [factors] with lists, whose
    preset = "baseline"                                  # product makes the arms; or both
    [arms.band]
    layout = "3+3x3+3"

Finished runs lie in NAME/<arm>_seed<N>/ beside the TOML (train.log, metrics.jsonl, result.json): commit them, and
another machine goes on from there. Runs in hand lie in logs/NAME/ with their checkpoints; Ctrl-C, SIGTERM and
--max-minutes stop them there, and the same command resumes them, unless the script or their settings have changed: then
they start anew. A run that diverged is a result and is kept; other failures are tried again.
"""

import dataclasses
import fcntl
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import (
    COLORS,
    ROOT,
    InputError,
    Parser,
    markdown_table,
    mean_std,
    number,
    p_text,
    plotting,
    read_curve,
    read_json,
    read_log,
    read_toml,
    run_tool,
    save_picture,
    short,
    welch_p,
    write_text,
)  # fmt: skip

BUDGETS = ("flops", "tokens", "seconds")
KEYS = {"about": str, "script": str, "seeds": list, "against": str, "processes": int, "budget": dict, "base": dict,
        "arms": dict, "factors": dict}  # fmt: skip
SCRIPTS = ("train_gpt.py", "train_gpt_mlx.py")
KEPT = ("train.log", "metrics.jsonl", "result.json")  # of a finished run; weights stay in logs/
NEEDED = """val_bpb val_bpb_raw seed config_sha256 layout framework params_stored bytes_artifact tokens train_flops
    train_time_ms complete device world_size commit versions dataset dataset_sha256 val_tokens""".split()  # of a result
SETTLED = "diverged.json"  # stands for result.json where the loss became infinite
# Set by this tool, hence no business of a matrix.
OWN_SETTINGS = ("seed", "run_id", "log_dir", "resume", "mode", "artifact", "checkpoint")


@dataclass
class Matrix:
    path: Path
    about: str
    script: str
    seeds: list[int]
    against: str
    processes: int
    budget: tuple[str, float]
    arms: dict[str, dict[str, object]]  # settings of each, base and budget not included
    base: dict[str, object]
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

    def result(self) -> dict | None:
        """result.json of the finished run; {"diverged": reason} if it ended so; None if it is to be done."""
        path = self.home / "result.json"
        if not path.is_file():
            path = self.home / SETTLED
            return read_json(path, "the reason of a run that diverged") if path.is_file() else None
        result = read_json(path, "the result of a finished run")
        mend = f"delete {short(self.home)} to run it again"
        if missing := [key for key in NEEDED if key not in result]:
            raise InputError(f"{short(path)}: expected the keys of result.json, found no {', '.join(missing)}; {mend}")
        for key in ("val_bpb", "val_bpb_raw"):
            if not isinstance(result[key], float) or not math.isfinite(result[key]):
                raise InputError(f"{short(path)}: {key}: expected a finite number, found {result[key]}; {mend}")
        return result

    def flags(self) -> list[str]:
        settings = self.matrix.base | self.matrix.arms[self.arm] | self.matrix.limits.get(self.arm, {})
        return [*(f"--{name}={value}" for name, value in settings.items()), f"--seed={self.seed}",
                f"--run_id={self.name}", f"--log_dir=logs/{self.matrix.path.stem}"]  # fmt: skip


# The matrix ----------------------------------------------------------------------------------------------------------


def value_text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)


def read_matrix(path: Path) -> Matrix:
    """Reads and checks the TOML, as far as that goes without the script."""
    toml = read_toml(path, "a matrix")

    def need(holds, what, expected, found):
        if not holds:
            raise InputError(f"{path}: {what}: expected {expected}, found {found}; see --help")

    need(path.suffix == ".toml" and slug(path.stem) == path.stem, "the file's name",
         "letters, digits and ._-, ending in .toml", path.name)  # fmt: skip
    for key, value in toml.items():
        need(key in KEYS, key, f"one of {', '.join(KEYS)}", "an unknown key")
        kind = KEYS[key]
        need(type(value) is kind, key, f"a {kind.__name__}", value)
    script = toml.get("script", SCRIPTS[0])
    need(script in SCRIPTS, "script", " or ".join(SCRIPTS), script)
    seeds = toml.get("seeds", [1337])
    whole = all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    need(seeds and whole and len(set(seeds)) == len(seeds), "seeds", "different whole numbers", seeds)
    budget = toml.get("budget", {})
    one = len(budget) == 1 and set(budget) <= set(BUDGETS)
    need(one, "[budget]", f"exactly one of {', '.join(BUDGETS)}", ", ".join(budget) or "none")
    (kind, amount) = next(iter(budget.items()))
    need(type(amount) in (int, float) and 0 < amount < 1e30, f"[budget] {kind}", "a number above 0", amount)
    base, factors = toml.get("base", {}), toml.get("factors", {})
    for name, values in factors.items():
        need(isinstance(values, list) and values, f"[factors] {name}", "a list of values", values)
    listed = toml.get("arms", {})
    need(listed or factors, "[arms.NAME], [factors]", "at least one arm or factor", "none")
    arms: dict[str, dict[str, object]] = {}
    for name, settings in (listed or {"": {}}).items():
        need(isinstance(settings, dict), f"[arms.{name}]", "a table of settings", settings)
        for values in itertools.product(*factors.values()):
            chosen = dict(zip(factors, values))
            parts = [name, *(f"{factor}-{value_text(value)}" for factor, value in chosen.items())]
            arm = slug(".".join(part for part in parts if part))
            need(arm not in arms, f"arm {arm}", "one name an arm", "two")
            need(re.match("[A-Za-z0-9]", arm), f"arm {arm}", "a name that begins with a letter or digit", arm)
            both = set(settings) & set(chosen)
            need(not both, f"arm {arm}", "each setting once", f"{', '.join(both)} also in [factors]")
            arms[arm] = settings | chosen
    for settings in (base, *arms.values()):
        for name, value in settings.items():
            need(re.fullmatch("[a-z0-9_]+", name), name, "a setting in lower case", name)  # SEED would get by below
            need(name not in OWN_SETTINGS, name, "no setting that this tool makes itself", name)
            need(isinstance(value, (str, int, float, bool)), name, "a text or a number", value)
    against = toml.get("against", next(iter(arms)))
    need(against in arms, "against", f"one of the arms {', '.join(arms)}", against)
    processes = toml.get("processes", 1)
    several = processes > 1 and script == SCRIPTS[0]
    need(processes == 1 or several, "processes", "1, or more with train_gpt.py", processes)
    base = {name: value_text(value) for name, value in base.items()}
    arms = {arm: {name: value_text(value) for name, value in settings.items()} for arm, settings in arms.items()}
    return Matrix(path, toml.get("about", ""), script, seeds, against, processes, (kind, amount), arms, base)


def load_script(name: str):
    spec = importlib.util.spec_from_file_location("script_of_the_matrix", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise InputError(f"{name}: expected its packages, found {error}; run: make setup") from None
    return module


def prepare(matrix: Matrix) -> tuple[object, dict[str, str], dict[str, str | None]]:
    """Turns the budget into settings and has the script check every arm.

    Returns its module, {arm: config hash} and {arm: hash of its data, None where they are not here yet}."""
    script, (kind, amount), hashes, data = load_script(matrix.script), matrix.budget, {}, {}
    names = dict(tokens="iterations", seconds="max_wallclock_seconds", flops="max_train_flops")
    budgets = dict.fromkeys(names.values(), "0")
    for arm, settings in matrix.arms.items():
        if twice := set(budgets) & (set(settings) | set(matrix.base)):
            raise InputError(f"{matrix.path}: {', '.join(twice)}: expected the budget in [budget] alone; remove it")
        limits = matrix.limits[arm] = budgets | {names[kind]: str(amount)}
        try:
            if kind == "tokens":
                limits["iterations"] = "1"
                flags = Run(matrix, arm, matrix.seeds[0]).flags()
                batch = script.load_config(flags, {}, script.DEFAULT_PRESET)[0].train_batch_tokens
                limits["iterations"] = str(round(amount / batch))
                if abs(int(limits["iterations"]) * batch / amount - 1) > 0.01:
                    raise InputError(f"[budget] tokens: expected a multiple of {batch} tokens a step, found {amount}")
            config = script.load_config(Run(matrix, arm, matrix.seeds[0]).flags(), {}, script.DEFAULT_PRESET)[0]
        except ValueError as error:  # the script's InputError is one
            raise InputError(f"{matrix.path}: arm {arm}: {error}") from None
        if config.val_max_tokens:
            print(f"notice: arm {arm}: VAL_MAX_TOKENS={config.val_max_tokens}: its scores will be partial", flush=True)
        hashes[arm] = script.config_sha256(config)
        here = {name: str(ROOT / getattr(config, name)) for name in ("data_path", "tokenizer_path")}
        try:
            data[arm] = script.dataset_sha256(dataclasses.replace(config, **here))
        except OSError:  # the run says so, or makes them (preset smoke)
            data[arm] = None
    if len(set(hashes.values())) < len(hashes):
        same = [arm for arm in hashes if list(hashes.values()).count(hashes[arm]) > 1]
        raise InputError(f"{matrix.path}: expected arms that differ, found {', '.join(same)} to be one configuration")
    return script, hashes, data


def is_of(folder: Path, source: str, script, config_hash: str) -> bool:
    """Whether the run in `folder` is of this script and these settings, every part of it, by the heads of its log."""
    path = folder / "train.log"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not text.startswith(source) or text.count(source) < len(re.findall(r"^config: \{", text, re.M)):
        return False
    try:
        return script.config_sha256(script.Config(**(read_log(path).config or {}))) == config_hash
    except TypeError:  # no settings of this script
        return False


def check_labels(matrix: Matrix) -> None:
    """Refuses a finished run whose own log names another seed, setting or budget than the TOML, which labels it.

    Needs no script, since a report may be written again when the script has long changed."""
    kind, amount = matrix.budget
    for run in matrix.runs():
        result = run.result()
        if result is None:
            continue
        config = read_log(run.home / "train.log").config or {}
        mend = f"delete {short(run.home)} to run it again"
        for seed in (config.get("seed"), result.get("seed", run.seed)):
            if seed != run.seed:
                raise InputError(f"{short(run.home)}: expected a run of seed {run.seed}, found {seed}; {mend}")
        if kind == "tokens":
            planned = (config.get("iterations") or 0) * (config.get("train_batch_tokens") or 0)
        else:
            planned = config.get("max_train_flops" if kind == "flops" else "max_wallclock_seconds")
        if not planned or abs(planned / amount - 1) > 0.01:
            raise InputError(f"{short(run.home)}: expected a budget of {amount} {kind}, found {planned}; {mend}")
        for name, text in (matrix.base | matrix.arms[run.arm]).items():
            if not same(config.get(name), text):
                raise InputError(f"{short(run.home)}: expected {name}={text}, found {config.get(name)}; {mend}")


def same(found: object, text: str) -> bool:
    """Whether a setting as a log states it is the one that the TOML gives."""
    if isinstance(found, bool):
        return found == (text.lower() in ("1", "true", "yes"))
    if isinstance(found, (int, float)):
        try:
            return float(text) == found
        except ValueError:
            return False
    return found == text


def check_finished(matrix: Matrix, script, hashes: dict[str, str], data: dict[str, str | None]) -> None:
    """Refuses to add runs to a matrix whose finished runs had other settings, another script or other data."""
    source, datasets = (ROOT / matrix.script).read_text(encoding="utf-8"), set()
    for run in matrix.runs():
        result = run.result()
        if result is None:
            continue
        mend = f"delete {short(run.home)} to run it again, or give the arm another name"
        settings = InputError(f"{short(run.home)}: expected the settings of the TOML, found others; {mend}")
        if "diverged" not in result and result["config_sha256"] != hashes[run.arm]:
            raise settings
        log = (run.home / "train.log").read_text(encoding="utf-8", errors="replace")
        if not log.startswith(source):
            commit = (result.get("commit") or "its commit").rstrip("+")
            raise InputError(
                f"{short(run.home)}: expected a run of this {matrix.script}, found one of another version; runs of two "
                f"scripts are no comparison: git checkout {commit} -- {matrix.script}, or start a new matrix"
            )
        if not is_of(run.home, source, script, hashes[run.arm]):
            raise settings
        if "diverged" not in result:
            datasets.add(result["dataset_sha256"])
            if len(datasets) == 1 and data[run.arm] not in (None, *datasets):
                raise InputError(f"{short(run.home)}: expected runs on the data that is here, found one on other data; "
                                 "mend data_path, or start a new matrix")  # fmt: skip
    check_labels(matrix)
    one_dataset(matrix, datasets)


def one_dataset(matrix: Matrix, hashes: set[str]) -> None:
    if len(hashes) > 1:
        raise InputError(f"{short(matrix.home)}: expected runs on one dataset, found {len(hashes)} that differ; "
                         "run the matrix again on one")  # fmt: skip


# The queue -----------------------------------------------------------------------------------------------------------


def find_devices(matrix: Matrix, jobs: int) -> list[dict[str, str]]:
    """One entry for each process that may run at a time: the environment that binds it to its device."""
    gpus = []
    if matrix.script == SCRIPTS[0] and shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        gpus = re.findall(r"^GPU (\d+):", listing.stdout, re.M) if listing.returncode == 0 else []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [gpu for gpu in visible.split(",") if gpu] if visible is not None and gpus else gpus
    device = (matrix.base | next(iter(matrix.arms.values()))).get("device", "")
    if gpus and device in ("", "cuda"):
        groups = [gpus[i : i + matrix.processes] for i in range(0, len(gpus), matrix.processes)]
        groups = [group for group in groups if len(group) == matrix.processes]
        if not groups:
            raise InputError(f"processes: expected at most {len(gpus)} (the GPUs here), found {matrix.processes}")
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[: jobs or len(groups)]]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if jobs > len(cores):
        raise InputError(f"--jobs: expected at most {len(cores)} (the cores here), found {jobs}")
    if jobs <= 1:
        return [{}]
    each = len(cores) // jobs
    shares = [cores[i * each : (i + 1) * each] for i in range(jobs)]
    return [{"OMP_NUM_THREADS": str(each), "OPENBLAS_NUM_THREADS": str(each),
             "ABLATE_CORES": ",".join(map(str, share))} for share in shares]  # fmt: skip


def bind_to(cores: str):
    """What a new process calls to stay on its cores ("0,1"; "" = all)."""

    def bind():
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, map(int, cores.split(",")))

    return bind


class Queue:
    """Runs what is missing, one process a device. The lock is handed down, so that an orphan still holds it."""

    def __init__(self, matrix: Matrix, script, hashes: dict[str, str], devices: list[dict[str, str]], deadline: float):
        self.matrix, self.devices, self.deadline, self.stopping = matrix, devices, deadline, False
        self.script, self.hashes = script, hashes
        self.source = (ROOT / matrix.script).read_text(encoding="utf-8")
        self.settings = {field.upper() for field in script.Config.__dataclass_fields__} | set(script.REPLACED)
        self.total, self.busy, self.failed, self.seconds = len(matrix.runs()), {}, [], {}
        matrix.work.mkdir(parents=True, exist_ok=True)
        matrix.home.mkdir(parents=True, exist_ok=True)
        self.lock = open(matrix.work / "ablate.lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{short(matrix.work)}: expected this matrix to be idle, found a process that runs it; "
                             "wait for it or stop it") from None  # fmt: skip
        self.waiting = [run for run in matrix.runs() if run.result() is None]  # now that nobody else finishes any

    def start(self, run: Run, device: int) -> None:
        checkpoint, env = run.work / "checkpoint.safetensors", dict(os.environ)
        there = checkpoint.is_file()
        resume = there and is_of(run.work, self.source, self.script, self.hashes[run.arm])
        if resume and (self.result_in_hand(run) or {}).get("val_bpb") is not None:
            self.finish(run, "had finished without this tool")  # which had been killed
            return
        if resume:
            (run.work / "result.json").unlink(missing_ok=True)  # of before; what this process leaves is the result
        elif run.work.exists():
            shutil.rmtree(run.work)  # it stopped before its first checkpoint, or was another run
        for name in self.settings & set(env):  # a stray MATRIX_LR=... must not reach some of the runs
            del env[name]
        env |= self.devices[device]
        cores = env.pop("ABLATE_CORES", "")
        launch = [sys.executable]
        if self.matrix.processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.matrix.processes}"]
        command = [*launch, self.matrix.script, *run.flags(), *(["--resume=1"] if resume else [])]
        output = open(self.matrix.work / f"{run.name}.out", "w", encoding="utf-8")  # collect() reads why it failed
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=[self.lock.fileno()], preexec_fn=bind_to(cores),
        )  # fmt: skip
        self.busy[device] = (run, process, output, time.monotonic())
        anew = "started anew (what lay in logs/ is of another script or other settings)"
        word = "resumed" if resume else anew if there else "started"
        print(f"[{self.total - len(self.waiting)}/{self.total}] {run.name}: {word}{self.left()}", flush=True)

    def left(self) -> str:
        """Time left, from the runs finished so far; an arm not seen yet counts like the mean of the others."""
        if not self.seconds:
            return ""
        known = [value for values in self.seconds.values() for value in values]
        mean = {arm: mean_std(values)[0] for arm, values in self.seconds.items()}
        rest = sum(mean.get(run.arm, mean_std(known)[0]) for run in self.waiting)
        for run, _, _, began in self.busy.values():
            rest += max(mean.get(run.arm, mean_std(known)[0]) - (time.monotonic() - began), 0)
        return f", about {rest / len(self.devices) / 60:.0f} min left"

    def collect(self, device: int) -> None:
        """Keeps what a process that ended has left."""
        run, process, output, began = self.busy.pop(device)
        output.close()
        minutes = (time.monotonic() - began) / 60
        if (self.result_in_hand(run) or {}).get("val_bpb") is not None:  # exit code 1: an artifact over the cap
            self.seconds.setdefault(run.arm, []).append(60 * minutes)
            self.finish(run, f"in {minutes:.1f} min")
        elif self.stopping or process.returncode in (  # torchrun ends with 1 when it is told to stop
            128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL
        ):  # fmt: skip
            print(f"    {run.name}: stopped after {minutes:.1f} min; the same command goes on", flush=True)
        else:
            tail = (self.matrix.work / f"{run.name}.out").read_text(encoding="utf-8", errors="replace").splitlines()
            said = next((line for line in reversed(tail) if line.startswith("error:")), tail[-1] if tail else "nothing")
            if "a finite loss" in said:
                self.keep(run, said.removeprefix("error: "))
                print(f"    {run.name}: diverged, kept as a result: {said}", flush=True)
            else:
                self.failed.append(run)
                print(f"    {run.name}: failed ({process.returncode}): {said}", flush=True)

    def result_in_hand(self, run: Run) -> dict | None:
        path = run.work / "result.json"
        return read_json(path, "the result of a run") if path.is_file() else None

    def finish(self, run: Run, how: str) -> None:
        """Keeps a run that has a score; one that is not finite is no score."""
        result = self.result_in_hand(run)
        finite = math.isfinite(result["val_bpb"])
        self.keep(run, None if finite else f"expected a finite score, found {result['val_bpb']}")
        cap = "" if result["fits"] else ", artifact over the cap"
        print(f"    {run.name}: {result['val_bpb']:.4f} bpb {how}{cap}{self.left()}", flush=True)

    def keep(self, run: Run, diverged: str | None) -> None:
        """Copies the files of a finished run beside the matrix: whole, or not at all."""
        part = run.home.with_name(f"{run.name}.tmp")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name in KEPT:
            if (run.work / name).is_file() and not (diverged and name == "result.json"):
                shutil.copyfile(run.work / name, part / name)
        if diverged:
            (part / SETTLED).write_text(json.dumps({"diverged": diverged}) + "\n", encoding="utf-8")
        shutil.rmtree(run.home, ignore_errors=True)  # it has no result, or this run would not have been started
        os.replace(part, run.home)
        # Whoever deletes run.home wants the run again, not the end of this one resumed.
        (run.work / "checkpoint.safetensors").unlink(missing_ok=True)

    def stop(self) -> None:
        """Asks the runs in hand for a checkpoint and an end."""
        if not self.stopping:
            self.stopping = True
            for _, process, _, _ in self.busy.values():
                process.terminate()

    def work(self) -> None:
        """Until nothing is left, the time is up, or a signal comes."""
        signalled = []
        before = {number: signal.signal(number, lambda n, _: signalled.append(n)) for number in
                  (signal.SIGTERM, signal.SIGINT)}  # fmt: skip
        try:
            while self.busy or (self.waiting and not self.stopping):
                if (signalled or time.monotonic() > self.deadline) and not self.stopping:
                    print("stopping: runs in hand write a checkpoint", flush=True)
                    self.stop()
                for device in range(len(self.devices)):
                    if device in self.busy and self.busy[device][1].poll() is not None:
                        self.collect(device)
                    if device not in self.busy and self.waiting and not self.stopping:
                        self.start(self.waiting.pop(0), device)
                time.sleep(0.2)
        except BaseException:  # a full disk, say: the runs in hand must not go on alone
            self.stop()
            for _, process, _, _ in self.busy.values():
                process.wait()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if signalled:
            raise KeyboardInterrupt


# The report ----------------------------------------------------------------------------------------------------------


def describe_budget(matrix: Matrix) -> str:
    kind, amount = matrix.budget
    return {"flops": f"{amount:.3g} training FLOPs", "tokens": f"{amount:,.0f} tokens",
            "seconds": f"{amount:g} seconds of training"}[kind]  # fmt: skip


def report(matrix: Matrix) -> str:
    """Writes README.md and matrix.png beside the finished runs, from their files alone. Returns the table."""
    check_labels(matrix)
    finished = {arm: [] for arm in matrix.arms}
    diverged = {arm: 0 for arm in matrix.arms}
    for run in matrix.runs():
        result = run.result()
        if result and "diverged" in result:
            diverged[run.arm] += 1
        elif result:
            finished[run.arm].append((run, result))
    results = [result for found in finished.values() for _, result in found]
    if not results:
        return "nothing finished yet\n"
    one_dataset(matrix, {result["dataset_sha256"] for result in results})
    scores = {arm: [result["val_bpb"] for _, result in found] for arm, found in finished.items()}
    rows, plan = [], len(matrix.seeds)
    for arm in sorted(matrix.arms, key=lambda arm: mean_std(scores[arm])[0] if scores[arm] else 1e9):
        if not scores[arm]:
            said = f"diverged {diverged[arm]} times" if diverged[arm] else "not run yet"
            rows.append([arm, f"0/{plan}", said, *["–"] * 9])
            continue
        mean, std = mean_std(scores[arm])

        def average(key, arm=arm):
            return mean_std([result[key] for _, result in finished[arm]])[0]

        p = "" if arm == matrix.against else p_text(welch_p(scores[arm], scores[matrix.against]))
        n = f"{len(scores[arm])}/{plan}" + (f", {diverged[arm]} diverged" if diverged[arm] else "")
        layout = finished[arm][0][1]["layout"]
        rows.append([
            f"**{arm}**" if arm == matrix.against else arm, n, number(mean), number(std), p,
            number(average("val_bpb_raw")), f"`{layout}`", f"{average('params_stored'):,.0f}",
            f"{average('bytes_artifact'):,.0f}", f"{average('tokens') / 1e6:.2f}", f"{average('train_flops'):.3g}",
            f"{average('train_time_ms') / 6e4:.1f}",
        ])  # fmt: skip
    head = ["arm", "n", "val_bpb", "std", f"p against {matrix.against}", "before export", "layout", "parameters",
            "artifact bytes", "M tokens", "FLOPs", "minutes"]  # fmt: skip
    table = markdown_table(head, rows)
    sample, partial = results[0], [result for result in results if not result["complete"]]
    left = len(matrix.runs()) - len(results) - sum(diverged.values())
    devices = sorted({f"{result['device']} x {result['world_size']}" for result in results})
    commits = sorted({str(result["commit"]) for result in results})
    versions = sorted({f"{name} {v}" for result in results for name, v in result["versions"].items()
                       if name in ("python", result["framework"])})  # fmt: skip
    settings = " ".join(f"`{name}={value}`" for name, value in matrix.base.items()) or "the presets' own"
    arms = "\n".join(
        f"- `{arm}`: " + (" ".join(f"`{name}={value}`" for name, value in settings.items()) or "nothing more")
        for arm, settings in matrix.arms.items()
    )
    notes = [f"**{left} of {len(matrix.runs())} runs are still to be done.**"] if left else []
    if partial:
        notes.append(f"**Partial: {len(partial)} runs scored a part of the validation set only.**")
    if plan < 3 or any(len(found) < 3 for found in scores.values()):
        notes.append("Fewer than three seeds: this says which arm is ahead, and no more.")
    if matrix.budget[0] == "seconds" and len(devices) > 1:
        notes.append("**Runs on different devices under a budget of time: no fair comparison.**")
    text = f"""<!-- written by records/ablate.py from {matrix.path.name} and the runs in this folder -->
# {matrix.path.stem}

{matrix.about.strip()}

Budget of each run: {describe_budget(matrix)}. `val_bpb`: bits per byte of the artifact as read back from disk, lower is
better; std: sample standard deviation over seeds; p: Welch's t-test, two-sided, each arm by itself (not corrected for
the number of arms).

{table}
{"".join(note + chr(10) + chr(10) for note in notes)}![loss against FLOPs, and final scores](matrix.png)

- Data: `{sample["dataset"]}`, sha256 {sample["dataset_sha256"][:12]}, {sample["val_tokens"]:,} validation tokens.
- Seeds: {", ".join(map(str, matrix.seeds))}. Script: `{matrix.script}` of commit {", ".join(commits)}.
- Devices: {"; ".join(devices)}. {", ".join(versions)}. Minutes are of training alone, perhaps beside other runs.
- Settings of every run: {settings}.

Arms, and what each sets beyond that:

{arms}

Again: `python records/ablate.py {short(matrix.path)}`. Each run's log, metrics and result lie in its folder here.
"""
    draw(matrix, finished)
    write_text(matrix.home / "README.md", text)
    return table


def draw(matrix: Matrix, finished: dict[str, list]) -> None:
    """Left: validation bpb against training FLOPs, a line a seed. Right: final scores, mean and standard deviation."""
    plt = plotting()
    shown = [arm for arm in matrix.arms if finished[arm]]
    height = max(4.2, 1.2 + 0.32 * len(shown))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), dpi=130, layout="constrained", width_ratios=(3, 2))
    ends = []
    for i, arm in enumerate(shown):
        color, style = COLORS[i % len(COLORS)], ("-", "--", ":", "-.")[i // len(COLORS) % 4]
        for j, (run, result) in enumerate(finished[arm]):
            points = read_curve(run.home / "metrics.jsonl")
            ends += [y for x, y in points if x >= 0.15 * points[-1][0]]
            left.plot(*zip(*points), style, color=color, linewidth=1.3, alpha=0.8, label=None if j else arm)
            right.plot(result["val_bpb"], i, "o", color=color, markersize=4, alpha=0.45)
        mean, std = mean_std([result["val_bpb"] for _, result in finished[arm]])
        right.errorbar(mean, i, xerr=std or 0, fmt="D", color=color, capsize=4, markersize=6)
        right.annotate(f"{mean:.4f}", (mean, i), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
    low, high = min(ends), max(ends)
    left.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    left.set(xlabel="training FLOPs", ylabel="validation, bits per byte (before export)")
    left.legend(frameon=False)
    right.set_yticks(range(len(shown)), shown)
    right.set(xlabel="final bits per byte, artifact from disk", ylim=(len(shown) - 0.4, -0.6))
    right.margins(x=0.12)
    for axes in (left, right):
        axes.spines["right"].set_visible(False)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.suptitle(f"{matrix.path.stem}: {describe_budget(matrix)} a run", x=0.01, ha="left", fontsize=11)
    save_picture(figure, matrix.home / "matrix.png")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("matrix", type=Path, metavar="NAME.toml", help="the matrix")
    parser.add_argument("--list", action="store_true", help="show the runs and their state; run nothing")
    parser.add_argument("--report", action="store_true", help="only write the table and the picture")
    parser.add_argument("--max-minutes", type=float, default=0.0, help="stop in good order after so long (0 = never)")
    parser.add_argument("--jobs", type=int, default=0, help="processes at a time (default: one a GPU, else one)")
    args = parser.parse_args(argv)
    for flag, value in (("--max-minutes", args.max_minutes), ("--jobs", args.jobs)):
        if not 0 <= value < 1e9:
            raise InputError(f"{flag}: expected 0 or more, found {value}")
    matrix = read_matrix(args.matrix)
    if args.report:
        print(report(matrix), end="")
        return 0
    script, hashes, data = prepare(matrix)
    check_finished(matrix, script, hashes, data)
    states = [(run, run.result()) for run in matrix.runs()]
    if args.list:
        for run, result in states:
            there = "to go on" if (run.work / "checkpoint.safetensors").is_file() else "waiting"
            bpb = (result or {}).get("val_bpb")
            print(f"{run.name:40} {there if result is None else 'diverged' if bpb is None else f'{bpb:.4f}'}")
        return 0
    devices = find_devices(matrix, args.jobs)
    todo = sum(result is None for _, result in states)
    plan = f"{len(states)} runs, {todo} to do, {len(devices)} at a time, {describe_budget(matrix)} each"
    print(f"{matrix.path.stem}: {plan}", flush=True)
    deadline = time.monotonic() + 60 * args.max_minutes if args.max_minutes else float("inf")
    queue = Queue(matrix, script, hashes, devices, deadline)
    try:
        queue.work()
    finally:
        print(report(matrix), end="")
        queue.lock.close()  # or it waits for the garbage collector
    if queue.failed:
        names = ", ".join(run.name for run in queue.failed)
        raise InputError(f"{len(queue.failed)} runs failed ({names}): see logs/{matrix.path.stem}/<run>.out; "
                         "the same command tries them again")  # fmt: skip
    left = sum(run.result() is None for run in matrix.runs())
    rest = f"; {left} runs left, the same command goes on" if left else ""
    print(f"report: {short(matrix.home / 'README.md')}{rest}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
