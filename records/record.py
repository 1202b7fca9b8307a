"""From the data to a checked record folder: a run a seed on the GPUs of this machine, then records/submit.py.

    python records/record.py --name mine --seeds 1337 42 2025 --author "Your Name" --github-id you

The same command goes on where it was stopped: a seed that is done is not run again, one with a checkpoint goes on from
it. Refused before the first run: settings and data that the script would refuse, a wrong name or author of the entry,
a text, way of scoring, size, bound on time or FLOPs or number of GPUs that the track does not allow, runs in hand of
other settings or another script. A seed that is too large or took too long ends it before the next.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import submit
import table
from check_files import wrong_scoring
from check_logs import OUR_RUN_KEYS, of_known_text, too_few_tokens
from check_ours import said_by
from common import ROOT, TRACKS, short
from logs import Log, parse_log, plain_text, read_log
from runs import handling, hold, launch
from tool import InputError, Parser, need, read_json, run_tool

SCRIPT = ROOT / "train_gpt.py"
ASK_GPUS = "import torch; n = torch.cuda.device_count(); print(n, torch.cuda.get_device_name(0) if n else 'cpu')"


@dataclass
class Plan:
    """What the runs of an entry have in common."""

    script: ModuleType
    source: str
    settings: list[str]  # of train_gpt.py, as flags
    track: str
    processes: int = 1
    device: str = "cpu"
    code_bytes: int = 0  # of the script that the folder will hold, where the track counts them

    def config(self, seed: int):
        flags = [*self.settings, f"--seed={seed}"]
        return self.script.load_config(flags, dict(os.environ), self.script.DEFAULT_PRESET)[0]


@contextlib.contextmanager
def as_the_script(plan: Plan):
    """Here paths mean what they mean in the runs, and what the script refuses is an InputError of this tool's."""
    try:
        with contextlib.chdir(ROOT):
            yield
    except plan.script.InputError as error:
        raise InputError(str(error)) from None


def gpus_here() -> tuple[int, str]:
    """How many CUDA GPUs this machine has, and the first one's name. Asked in another process: one that has looked at
    a GPU holds some of its memory to its end."""
    found = subprocess.run([sys.executable, "-c", ASK_GPUS], capture_output=True, text=True)
    need(found.returncode == 0, "torch", "a package that loads", found.stderr.strip().rpartition("\n")[2])
    count, _, name = found.stdout.strip().partition(" ")
    return int(count), name


def make_plan(args) -> Plan:
    """Raises InputError for settings that the script refuses."""
    source = plain_text(SCRIPT.read_bytes())
    script = submit.load_script(source.encode(), SCRIPT.name)
    try:
        often = [] if "CHECKPOINT_EVERY" in os.environ else ["--checkpoint_every=500"]
        settings = [*often, *shlex.split(args.settings)]
    except ValueError as error:
        raise InputError(f"--settings: expected flags as for a shell, found {error}") from None
    plan = Plan(script, source, settings, args.track)
    with as_the_script(plan):
        devices = {plan.config(seed).device for seed in args.seeds}
    if devices <= {"", "cuda"}:
        here, plan.device = gpus_here()
        plan.processes = max(1, here)
        enough = not here or (args.gpus or 1) <= here
        need(enough, "--gpus", f"at most the {here} GPUs of this machine", args.gpus)
    plan.processes = args.gpus or plan.processes
    return plan


def check_plan(plan: Plan, seed: int, home: Path, proof: bool) -> None:
    """Refuses before the first run what is known by then; `home`: the folder of the entry. Raises InputError."""
    config, script, track = plan.config(seed), plan.script, TRACKS[plan.track]
    need(config.mode == "train", "MODE", "train", config.mode)
    cap = config.target_bytes or config.bytes_cap
    need(cap <= track.bytes_cap, "TARGET_BYTES, BYTES_CAP", f"at most the track's {track.bytes_cap}", cap)
    sequences = config.train_batch_tokens // config.train_seq_len
    need(sequences >= plan.processes, "TRAIN_BATCH_TOKENS", f"a sequence for each of {plan.processes} GPUs", sequences)
    run = expected_run(plan, config)
    submit.check_track(plan.track, [run])
    need(not track.flops_cap or config.max_train_flops, "MAX_TRAIN_FLOPS", f"at most {track.flops_cap or 0:g}", "none")
    timed = not track.time_cap_ms or config.max_wallclock_seconds
    need(timed, "MAX_WALLCLOCK_SECONDS", f"at most {(track.time_cap_ms or 0) / 1000:g}", "none")
    script.prepare(config)
    script.find_shards(config.data_path, "train", config.vocab_size)
    check_score(plan, config, script.Score(config))
    for path in [submit.recorded_settings(run)[name] for name in ("data_path", "tokenizer_path")] if proof else []:
        there, mend = Path(os.path.normpath(home / path)), "link it there; --no-proof leaves the proof out"
        need(there.exists(), f"proof: {short(there)}", "the data, where the folder's script looks for it", "none", mend)
    leave_room(plan, run)


def expected_run(plan: Plan, config) -> submit.Run:
    """A run of the plan, as far as it is known before."""
    result = {
        "framework": "torch",
        "dataset": Path(config.data_path).name,
        "world_size": plan.processes,
        "device": plan.device,
        "train_flops": config.max_train_flops,
        "train_time_ms": 1000 * config.max_wallclock_seconds,
        "calib_time_ms": 0,  # within those
        "eval_time_ms": 0,
        "seed": config.seed,
        "config_sha256": plan.script.config_sha256(config),
    }
    log = Log(SCRIPT, [], config=dataclasses.asdict(config), source=plan.source)
    return submit.Run(SCRIPT, result, log)


def check_score(plan: Plan, config, score) -> None:
    """Refuses a text or a way of scoring that the track does not allow. Raises InputError."""
    track, tokens = TRACKS[plan.track], len(score.tokens) - 1
    need(not score.partial, "VAL_MAX_TOKENS", "0, for a score on the whole validation set", config.val_max_tokens)
    if track.fineweb:  # by the rules of check.py, which will see such a line
        log = parse_log(SCRIPT, f"data: {config.data_path}  val tokens: {tokens}")
        for severity, _, *wrong in (*too_few_tokens("", log), *of_known_text("", log, score.bytes / tokens)):
            need(severity != "error", config.data_path, *wrong, "get the whole data again")
    if track.eval_cost is not None:
        trained = plan.script.loops_at(config, 1.0)
        passes = plan.script.eval_passes(config, trained)[0]
        for wrong in wrong_scoring(track, dataclasses.asdict(config), score.bytes, trained, passes):
            need(False, f"--track={plan.track}", *wrong)


def leave_room(plan: Plan, run: submit.Run) -> None:
    """The folder's script states its settings and so is larger than the one that runs: TARGET_BYTES makes up for it, by
    a round number, that every order of the seeds and every LZMA leads to the same."""

    def size(source: str) -> int:
        return len({"1": source.encode(), "packed": plan.script.packed(source), "0": b""}[run.count_code])

    baked, _, _ = submit.baked_script(run, plan.script)
    plan.code_bytes, target = size(baked), run.log.config["target_bytes"]
    room = (TRACKS[plan.track].bytes_cap - (plan.code_bytes - size(plan.source)) - 100) // 1000 * 1000
    if target > room and plan.code_bytes:
        plan.settings.append(f"--target_bytes={room}")


def check_in_hand(plan: Plan, folder: Path, seed: int) -> None:
    """A run that was begun before must be one of this script with these settings. Raises InputError."""
    log, config = read_log(folder / "train.log"), plan.config(seed)
    mend = "choose another name, or give runs that are done to records/submit.py"
    need(log.source == plan.source, short(folder), "a run of this train_gpt.py", "one of another version", mend)
    asked = dataclasses.asdict(config)
    for key in sorted({*asked} - OUR_RUN_KEYS | {"seed"}):
        same, found = log.config.get(key) == asked[key], f"{key}={log.config.get(key)}, not {asked[key]}"
        need(same, short(folder), "a run with these settings", found, mend)
    said = said_by(log)
    count, device = said["world_size"], said["device"]
    need(count == plan.processes, short(folder), f"a run of {plan.processes} processes", count, mend)
    same = device == plan.device or plan.device == "cpu" and str(device).startswith("cpu ")
    need(same, short(folder), f"a run on {plan.device}", device, mend)
    if is_done(folder):
        result = accepted(plan, folder).result
        same = result["config_sha256"] == plan.script.config_sha256(config)
        need(same, short(folder), "the result of a run with these settings", "another's, such as of MODE=export", mend)
        same = result["dataset_sha256"] == plan.script.dataset_sha256(config)
        need(same, short(folder), f"a run on {config.data_path} as it is now", "one on other data", mend)


def is_done(folder: Path) -> bool:
    """Whether a run has come to the closing block of its log, which comes after a complete result."""
    path = folder / "result.json"
    if not path.is_file() or not read_json(path, "the result of a run").get("complete"):
        return False
    return "total" in read_log(folder / "train.log").sizes


def accepted(plan: Plan, folder: Path) -> submit.Run:
    """A run that is done. Raises InputError where no entry can be made of it."""
    run, cap = submit.read_run(folder), TRACKS[plan.track].bytes_cap
    submit.check_track(plan.track, [run])
    total = run.result["bytes_artifact"] + plan.code_bytes
    expected = f"artifact and the folder's script within {cap} bytes"
    need(total <= cap, short(folder), expected, total, "lower TARGET_BYTES")
    return run


def run_script(arguments: list[str], processes: int) -> int:
    """Trains, on all GPUs. Returns the exit code, more than 128 after a stop, which is handed on and waited for.

    The run has a session of its own: Ctrl-C, a closed terminal and SIGTERM reach it through here alone, and none that
    this process ignores, as under nohup. Ctrl-Z does not pause it."""
    stops, process = [], None

    def stop(number, frame) -> None:
        stops.append(number)
        if process:
            process.send_signal(signal.SIGTERM if number == signal.SIGQUIT else number)

    with handling(stop, signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
        command = [*launch(processes), str(SCRIPT), *arguments]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, close_fds=False)  # the lock goes along
        if stops:  # before there was a process
            process.terminate()
        code = process.wait()
    return 128 + stops[0] if stops else code


def train(plan: Plan, folder: Path, seed: int) -> bool:
    """Brings one seed to its end, from where it stands. False where it was stopped or failed. Raises InputError where
    no entry can be made of it."""
    if is_done(folder):
        print(f"{short(folder)}: done", flush=True)
        return True
    same = plain_text(SCRIPT.read_bytes()) == plan.source
    need(same, SCRIPT.name, "the script of the seeds before", "one that was edited meanwhile", "put it back")
    resume = (folder / "checkpoint.safetensors").is_file()
    if folder.exists() and not resume:
        kept = folder.with_name(f"{folder.name}.stopped_{time.strftime('%Y%m%d-%H%M%S')}")
        os.replace(folder, kept)
        print(f"{short(folder)}: stopped before its first checkpoint; kept as {kept.name}, begun anew", flush=True)
    place = [f"--log_dir={folder.parent}", f"--run_id={folder.name}", f"--seed={seed}", f"--resume={int(resume)}"]
    code = run_script([*plan.settings, *place], plan.processes)
    if code in (0, 1) and is_done(folder):  # 1: larger than TARGET_BYTES, which may be within the cap
        accepted(plan, folder)
        return True
    how = "stopped" if code > 128 else f"failed with exit code {code}, its last lines say why"
    print(f"{short(folder)}: {how}; the same command goes on", file=sys.stderr)
    return False


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__ + "\nEvery other flag is one of records/submit.py, which makes the folder.")
    parser.add_argument("--name", required=True, help="of the runs and of the entry")
    parser.add_argument("--track", choices=TRACKS, default="10min_16mb")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337, 42, 2025])
    parser.add_argument("--gpus", type=int, help="processes, one a GPU (default: all GPUs)")
    parser.add_argument("--settings", default="", help='of train_gpt.py, such as "--matrix_lr=0.03 --lora_rank=4"')
    parser.add_argument("--log-dir", type=Path, default=ROOT / "logs")
    args, of_submit = parser.parse_known_args(argv)
    folders = {seed: args.log_dir.resolve() / f"{args.name}_{seed}" for seed in args.seeds}
    need(len(folders) == len(args.seeds), "--seeds", "different seeds", " ".join(map(str, args.seeds)))
    need(args.gpus is None or args.gpus > 0, "--gpus", "1 or more", args.gpus)
    entry = [*map(str, folders.values()), f"--name={args.name}", f"--track={args.track}", *of_submit]
    home = submit.free_home(asked := submit.parse_args(entry)).resolve()

    plan = make_plan(args)
    with as_the_script(plan):
        check_plan(plan, args.seeds[0], home, not asked.no_proof)
        for seed, folder in folders.items():
            if (folder / "result.json").is_file() or (folder / "checkpoint.safetensors").is_file():
                check_in_hand(plan, folder, seed)

    lock = hold(args.log_dir / f".{args.name}.lock")
    for seed, folder in folders.items():
        if not train(plan, folder, seed):
            return 1
    lock.close()
    return submit.main(entry) or table.main([])


if __name__ == "__main__":
    sys.exit(run_tool(main))
