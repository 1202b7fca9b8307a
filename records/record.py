"""From the data to a checked record folder: a run a seed on the GPUs of this machine, then records/submit.py.

    python records/record.py --name mine --seeds 1337 42 2025 --author "Your Name" --github-id you

The same command goes on where it was stopped: a seed that is done is not run again, one with a checkpoint goes on from
it. Refused before the first run: a wrong name or author of the entry, a text, time or number of GPUs that the track
does not allow, seeds in hand of other settings or another train_gpt.py. submit.py may still refuse more.
"""

import dataclasses
import fcntl
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import submit
import table
from common import ROOT, TRACKS, InputError, Parser, need, read_json, run_tool, short
from logs import Log, read_log

SCRIPT = ROOT / "train_gpt.py"
OF_A_RUN = {"seed", "run_id", "log_dir", "resume", "checkpoint_every"}  # settings in which runs of an entry may differ


def gpus_here() -> tuple[int, str]:
    """How many CUDA GPUs this machine has, and what the first one is called."""
    import torch

    count = torch.cuda.device_count()
    return count, torch.cuda.get_device_name(0) if count else "cpu"


def check_plan(config, track: str, processes: int, device: str) -> None:
    """Refuses before the first run what the track would refuse after the last. Raises InputError."""
    expected = {
        "framework": "torch",
        "dataset": Path(config.data_path).name,
        "world_size": processes,
        "device": device,
        "train_flops": config.max_train_flops or math.inf,
        "train_time_ms": 1000 * config.max_wallclock_seconds or math.inf,
        "calib_time_ms": 0,  # within those
        "eval_time_ms": 0,
    }
    submit.check_track(track, [submit.Run(SCRIPT, expected, Log(SCRIPT, [], config=dataclasses.asdict(config)))])


def check_in_hand(folder: Path, config, source: str, processes: int) -> None:
    """A run that was begun before must be one of this script with these settings. Raises InputError."""
    log, mend = read_log(folder / "train.log"), "choose another name, or delete the folder"
    need(log.source == source, short(folder), "a run of this train_gpt.py", "one of another version", mend)
    asked = dataclasses.asdict(config)
    differs = {name for name in asked if name not in OF_A_RUN and log.config.get(name) != asked[name]}
    found = ", ".join(f"{name}={log.config.get(name)}, not {asked[name]}" for name in sorted(differs))
    need(not differs, short(folder), "a run with these settings", found, mend)
    if is_done(folder):
        found = submit.read_run(folder).result["world_size"]  # refuses a run that blew up or is too large
        need(found == processes, short(folder), f"a run of {processes} processes", found, mend)


def is_done(folder: Path) -> bool:
    path = folder / "result.json"
    return path.is_file() and bool(read_json(path, "the result of a run").get("complete"))


def hold(path: Path):
    """A locked file: two of this tool would move and overwrite each other's runs. Raises InputError if it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        need(False, short(path), "no other record.py at these runs", "one", "wait for it, or choose another name")
    return file


def run_script(arguments: list[str], processes: int) -> int:
    """Trains, on all GPUs. Returns the exit code; a stop reaches the script, which is waited for."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    process = subprocess.Popen([sys.executable, *launch, str(SCRIPT), *arguments], cwd=ROOT)
    # Ctrl-C and a closed terminal reach every process by themselves: the script then writes its checkpoint.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(folder: Path, seed: int, settings: list[str], processes: int) -> bool:
    """Brings one seed to its end, from where it stands. False where it was stopped or failed."""
    if is_done(folder):
        print(f"{short(folder)}: done", flush=True)
        return True
    resume = (folder / "checkpoint.safetensors").is_file()
    if folder.exists() and not resume:
        kept = folder.with_name(f"{folder.name}.stopped_{time.strftime('%Y%m%d-%H%M%S')}")
        os.replace(folder, kept)
        print(f"{short(folder)}: stopped before its first checkpoint; kept as {kept.name}, begun anew", flush=True)
    place = [f"--log_dir={folder.parent}", f"--run_id={folder.name}", f"--seed={seed}"]
    return run_script([*settings, *place, *["--resume=1"] * resume], processes) == 0


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
    entry = [*map(str, folders.values()), f"--name={args.name}", f"--track={args.track}", *of_submit]
    submit.free_home(submit.parse_args(entry))

    source = SCRIPT.read_bytes()
    script = submit.load_script(source, SCRIPT.name)
    settings = ["--checkpoint_every=500", *shlex.split(args.settings)]
    try:
        config = script.load_config(settings, dict(os.environ), script.DEFAULT_PRESET)[0]
    except script.InputError as error:
        raise InputError(str(error)) from None
    here, device = gpus_here()
    processes = max(1, here if args.gpus is None else args.gpus)
    check_plan(config, args.track, processes, device)
    for folder in folders.values():
        if (folder / "result.json").is_file() or (folder / "checkpoint.safetensors").is_file():
            check_in_hand(folder, config, source.decode(), processes)

    lock = hold(args.log_dir / f".{args.name}.lock")  # until this process ends
    for seed, folder in folders.items():
        if not train(folder, seed, settings, processes):
            if is_done(folder):
                submit.read_run(folder)  # says what is wrong with it
            print(f"{short(folder)}: not finished; the same command goes on", file=sys.stderr)
            return 1
    lock.close()
    return submit.main(entry) or table.main([])


if __name__ == "__main__":
    sys.exit(run_tool(main))
