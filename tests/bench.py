"""Time a training step of both scripts on this machine: `make bench`, or `python tests/bench.py --help`.

1. Baseline shape: nine blocks, 256 wide, 8,192 tokens a step. Whole programs, one after the other in turn, several
   rounds; a step's time is the difference of the `train_time:` of two step lines, and the number given is the median
   over the rounds of each process's median. Compile time is what the `warm_up:` lines say, cold in the first round
   (an empty compiler cache of its own) and warm later.
2. Passes: 1+2x4+1 at 1, 2, 3 and 4 passes in one process, each step timed by itself: cost against work, and the first
   step after a switch against the steps after it.
3. Start to first step: the smoke preset with COMPILE=0, from the start of Python to its first step line.

Another program that prints the challenge's step lines is timed beside ours in the same rounds, at the same shape:

    python tests/bench.py --peer official='cd ~/parameter-golf && python train_gpt.py'

It gets the shape as the challenge's environment variables (NUM_LAYERS=9, MODEL_DIM=256, DATA_PATH=..., ...). The tokens
are random ids: a step costs the same whatever the text. Nothing else should run meanwhile.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_gpt", "train_gpt_mlx")
VOCAB, LENGTH, BATCH = 1024, 256, 8192
SHAPE = dict(model_dim=256, num_heads=4, num_kv_heads=2, mlp_mult=2, train_seq_len=LENGTH, train_batch_tokens=BATCH)
BASELINE = dict(layout="9", skips="official", loop_gate="none", loop_schedule="")
# The same for a peer, in the names of the challenge; its own names for what our layout says.
PEER_SHAPE = {name.upper(): str(value) for name, value in SHAPE.items()} | dict(
    NUM_LAYERS="9", VOCAB_SIZE=str(VOCAB), VAL_LOSS_EVERY="0", TRAIN_LOG_EVERY="1", WARMUP_STEPS="1",
    MAX_WALLCLOCK_SECONDS="0", VAL_BATCH_SIZE=str(BATCH), GRAD_ACCUM_STEPS="1",
)  # fmt: skip
STEP_LINE = re.compile(r"step:(\d+)/\d+ .*train_loss:.*train_time:(\d+(?:\.\d+)?)ms")
WARM_UP_LINE = re.compile(r"warm_up: .*?([\d.]+)s$")


class InputError(ValueError):
    """A mistake that the user can mend, in one line."""


class Timing(NamedTuple):
    """One process, read from its lines."""

    step_ms: float  # median
    warm_up_s: float | None  # compile time; None where no line says it
    first_line_s: float  # from start to the first step line


# --- Data ---------------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> dict[str, str]:
    """Shards of random ids below 1024 and a tokenizer of 1024 pieces; returns data_path and tokenizer_path."""
    import sentencepiece

    rng = np.random.RandomState(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(letters[rng.randint(0, 26, rng.randint(3, 9))]) for _ in range(2000)]
    lines = (" ".join(words[i] for i in rng.randint(0, len(words), 12)) for _ in range(2000))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "bench"), vocab_size=VOCAB, model_type="bpe",
        byte_fallback=True, num_threads=1, minloglevel=2)  # fmt: skip
    for split, tokens in (("train", 1_000_000), ("val", 8 * LENGTH + 1)):
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, tokens
        ids = rng.randint(0, VOCAB, tokens).astype("<u2")
        (folder / f"fineweb_{split}_000000.bin").write_bytes(header.tobytes() + ids.tobytes())
    return {"data_path": str(folder), "tokenizer_path": str(folder / "bench.model")}


def find_data(folder: Path) -> dict[str, str]:
    """The user's own shards, with the tokenizer that data/ tools put beside them."""
    models = sorted(folder.glob("*.model")) or sorted((folder.parent.parent / "tokenizers").glob("*1024*.model"))
    if not list(folder.glob("fineweb_train_*.bin")) or not models:
        raise InputError(f"--data: expected shards in {folder} and a 1024-piece .model there or in ../../tokenizers")
    return {"data_path": str(folder), "tokenizer_path": str(models[0])}


# --- Whole programs -----------------------------------------------------------------------------------------------


def flags(settings: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def time_command(
    name: str, command: list[str] | str, env: dict[str, str], steps: int, limit: float, folder: Path
) -> Timing:
    """Starts a command (a list, or a line for the shell), reads its lines until it has said `steps` steps, ends it."""
    began, lines, stamps, first = time.perf_counter(), [], [], 0.0
    process = subprocess.Popen(command, shell=isinstance(command, str), cwd=folder, env={**os.environ, **env},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    timer = threading.Timer(limit, end_group, [process])
    timer.start()
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if match := STEP_LINE.search(line):
                first = first or time.perf_counter() - began
                stamps.append((int(match[1]), float(match[2])))
                if len(stamps) >= steps:
                    break
    finally:
        timer.cancel()
        end_group(process)
        process.wait()
    if len(stamps) < min(steps, 5):
        said = next((line for line in reversed(lines) if line.strip()), "nothing")
        found = f"{len(stamps)} after {time.perf_counter() - began:.0f} s"
        raise InputError(f"{name}: expected {steps} step lines, found {found}; it said last: {said[:200]}")
    stamps = stamps[2:] if len(stamps) > 4 else stamps  # the first steps are not typical
    apart = [(b - a) / (j - i) for (i, a), (j, b) in zip(stamps, stamps[1:]) if j > i]
    warm_ups = [float(match[1]) for line in lines if (match := WARM_UP_LINE.search(line))]
    return Timing(statistics.median(apart), sum(warm_ups) if warm_ups else None, first)


def end_group(process: subprocess.Popen) -> None:
    """Ends a process that we started, with its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def bench_baseline(args, scripts: list[str], peers: dict[str, str], data: dict[str, str], folder: Path) -> None:
    """Part 1."""
    found: dict[str, list[Timing]] = {}
    commands: dict[str, tuple] = {}
    for script in scripts:
        settings = {"preset": "baseline", "vocab_size": VOCAB, **SHAPE, **BASELINE, **data, "log_dir": folder / "logs"}
        settings |= {"iterations": 100000, "max_wallclock_seconds": 0, "val_loss_every": 0, "train_log_every": 1}
        env = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        commands[script] = ([sys.executable, str(ROOT / f"{script}.py"), *flags(settings)], env)
    for name, command in peers.items():
        paths = {key.upper(): value for key, value in data.items()}
        commands[name] = (command, PEER_SHAPE | paths | {"ITERATIONS": "100000", "RUN_ID": f"bench_{os.getpid()}"})
    for turn in range(args.rounds):
        for name, (command, env) in commands.items():
            if isinstance(command, list):
                command = [*command, f"--run_id={name}_{turn}"]
            note(f"baseline shape, round {turn + 1} of {args.rounds}: {name}")
            timing = time_command(name, command, {"PYTHONUNBUFFERED": "1", **env}, args.steps, args.limit, folder)
            found.setdefault(name, []).append(timing)
    work = training_flops(scripts[0], BASELINE, 1)
    rows = []
    for name, timings in found.items():
        steps = [timing.step_ms for timing in timings]
        ms = statistics.median(steps)
        cold, warm = timings[0].warm_up_s, [t.warm_up_s for t in timings[1:] if t.warm_up_s is not None]
        row = [
            name,
            f"{ms:.0f}",
            f"{min(steps):.0f}-{max(steps):.0f}",
            f"{1000 * BATCH / ms:,.0f}",
            f"{work / ms / 1e6:.0f}",
        ]
        rows.append([*row, seconds(cold), seconds(statistics.median(warm) if warm else None)])
    title = (
        f"Baseline shape: 9 blocks, 256 wide, {BATCH} tokens a step, {args.rounds} processes each of {args.steps} steps"
    )
    table(title, ["program", "ms/step", "range", "tokens/s", "GFLOP/s", "warm-up cold", "warm-up later"], rows)
    for peer in peers:
        for script in scripts:
            ratios = [a.step_ms / b.step_ms for a, b in zip(found[peer], found[script])]
            spread = f"{min(ratios):.2f}-{max(ratios):.2f} over the rounds"
            print(f"{script} is {statistics.median(ratios):.2f} x as fast as {peer} ({spread})")


# --- Passes -------------------------------------------------------------------------------------------------------


def worker(script: str, settings: dict, steps: int, passes: int) -> None:
    """Runs in a process of its own: for every number of passes, warm-up seconds and the ms of each step, as JSON."""
    module = importlib.import_module(script)
    c, _ = module.load_config(flags(settings), {}, "laptop")
    engine = module.Engine(c)
    engine.build(module.initial_weights(c))
    stream = module.TokenStream(module.find_shards(c.data_path, "train", c.vocab_size), c.vocab_size)
    out: dict[str, list] = {"warm_up": [], "steps": [], "flops": []}
    for loops in range(1, passes + 1):
        began = time.perf_counter()
        engine.warm_up(stream, loops)
        out["warm_up"].append(time.perf_counter() - began)
    start = 0
    for loops in range(1, passes + 1):
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            for handle in engine.step(stream, start, loops, 1.0, 0.9):
                float(handle.item())
            engine.sync()
            times.append(1000 * (time.perf_counter() - began))
            start += c.train_batch_tokens
        out["steps"].append(times)
        out["flops"].append(3 * module.flops_per_token(c, loops) * c.train_batch_tokens)
    print("BENCH " + json.dumps(out))


def bench_passes(args, script: str, data: dict[str, str], folder: Path) -> list[list[str]]:
    """Part 2 for one script: rows of the table."""
    layout = {"layout": f"1+2x{args.passes}+1", "vocab_size": VOCAB}
    settings = {**SHAPE, **data, **layout, "loop_schedule": schedule(args.passes), "max_wallclock_seconds": 0}
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}; import bench; " \
           f"bench.worker({script!r}, {settings!r}, {args.steps}, {args.passes})"  # fmt: skip
    runs = []
    for turn in range(args.rounds):
        note(f"1 to {args.passes} passes, round {turn + 1} of {args.rounds}: {script}")
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=args.limit
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"{script}: expected an end within {args.limit:.0f} s; raise --limit") from None
        if done.returncode:
            raise InputError(
                f"{script}: stopped: {(done.stderr.strip().splitlines() or ['no reason given'])[-1][:200]}"
            )
        runs.append(json.loads(done.stdout.rsplit("BENCH ", 1)[1]))
    rows = []
    for i in range(args.passes):
        after = [statistics.median(run["steps"][i][1:]) for run in runs]
        first = [run["steps"][i][0] / ms for run, ms in zip(runs, after)]
        ms, work = statistics.median(after), runs[0]["flops"][i]
        rate = work / ms / 1e6
        one = statistics.median([statistics.median(run["steps"][0][1:]) for run in runs])
        cost, need = ms / one, work / runs[0]["flops"][0]
        rows.append(
            [
                script if i == 0 else "",
                str(i + 1),
                f"{ms:.0f}",
                f"{1000 * BATCH / ms:,.0f}",
                f"{rate:.0f}",
                f"{cost:.2f}",
                f"{need:.2f}",
                f"{need / cost:.2f}",
                f"{statistics.median(first):.2f}",
                seconds(runs[0]["warm_up"][i]),
                seconds(runs[-1]["warm_up"][i] if len(runs) > 1 else None),
            ]
        )
    return rows


def schedule(passes: int) -> str:
    """1, 2, ... passes at even parts of training."""
    return ",".join(f"{i / passes:.3f}:{i + 1}" for i in range(passes))


def training_flops(script: str, settings: dict, loops: int) -> float:
    """FLOPs of one training step at the benchmark's shape."""
    module = importlib.import_module(script)
    c, _ = module.load_config(flags({**SHAPE, "vocab_size": VOCAB, **settings}), {}, "laptop")
    return 3 * module.flops_per_token(c, loops) * BATCH


# --- Start --------------------------------------------------------------------------------------------------------


def bench_start(args, scripts: list[str], folder: Path) -> list[list[str]]:
    """Part 3: rows of the table. The first start makes the smoke data, too."""
    rows = []
    for script in scripts:
        own = folder / f"smoke_{script}"
        settings = {"preset": "smoke", "compile": 0, "log_dir": folder / "logs", "data_path": own / "shards",
                    "tokenizer_path": own / "smoke.model"}  # fmt: skip
        times = []
        for turn in range(args.rounds + 1):
            note(f"start to first step, {turn + 1} of {args.rounds + 1}: {script}")
            command = [sys.executable, str(ROOT / f"{script}.py"), *flags(settings), f"--run_id=start_{script}_{turn}"]
            timing = time_command(script, command, {"PYTHONUNBUFFERED": "1"}, 5, args.limit, folder)
            times.append(timing.first_line_s)
        rows.append([script, f"{times[0]:.1f} s", f"{statistics.median(times[1:]):.1f} s"])
    return rows


# --- Report -------------------------------------------------------------------------------------------------------


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def note(text: str) -> None:
    """What runs now, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text} ...", end="", file=sys.stderr, flush=True)


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Prints a Markdown table."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}\n")
    for row in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    print(flush=True)


def machine(scripts: list[str]) -> str:
    """The processor, the versions and the load that was there before we began."""
    module = importlib.import_module(scripts[0])
    versions = ", ".join(
        f"{name} {number}" for name, number in module.versions().items() if name in ("python", "torch", "mlx")
    )
    return f"{module.cpu_name()}; {versions}; load before the start: {os.getloadavg()[0]:.1f}"


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """The options, and the peers by name. Raises InputError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each program (default: 3)")
    parser.add_argument("--steps", type=int, default=10, help="steps of each process (default: 10)")
    parser.add_argument("--passes", type=int, default=4, help="largest number of passes in part 2 (default: 4)")
    parser.add_argument("--parts", default="baseline,passes,start", help="which parts to run (default: all three)")
    parser.add_argument("--script", action="append", choices=SCRIPTS, help="only this script (default: both)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME='COMMAND'", help="another program to time")
    parser.add_argument("--data", type=Path, help="folder of your own shards of 1024 pieces (default: random ids)")
    parser.add_argument(
        "--limit", type=float, default=900, help="seconds after which a process is ended (default: 900)"
    )
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - {"baseline", "passes", "start"}:
        raise InputError(f"--parts: expected some of baseline,passes,start, found {', '.join(sorted(unknown))}")
    if args.rounds < 1 or args.steps < 5 or args.passes < 1:
        raise InputError("--rounds, --steps, --passes: expected at least 1, 5 and 1")
    peers = dict(peer.partition("=")[::2] for peer in args.peer)
    if not all(name and command for name, command in peers.items()) or set(peers) & set(SCRIPTS):
        raise InputError(f"--peer: expected NAME='COMMAND' with a name of its own, found {args.peer}")
    return args, peers


def main(argv: list[str] | None = None) -> int:
    sys.path.insert(0, str(ROOT))
    folder = Path(tempfile.mkdtemp(prefix="bench_"))
    try:
        args, peers = parse(argv)
        scripts = []
        for script in args.script or SCRIPTS:
            try:
                importlib.import_module(script)
                scripts.append(script)
            except ImportError as error:
                print(f"notice: {script} is left out ({error})")
        if not scripts:
            raise InputError("train_gpt.py, train_gpt_mlx.py: expected one that can be imported; run: make setup")
        print(machine(scripts))
        if os.getloadavg()[0] > 0.5:
            print("notice: something else was running; times and ratios will be off")
        data = find_data(args.data.resolve()) if args.data else make_data(folder)
        if "baseline" in args.parts:
            bench_baseline(args, scripts, peers, data, folder)
        if "passes" in args.parts:
            rows = [row for script in scripts for row in bench_passes(args, script, data, folder)]
            title = f"Passes: 1+2x{args.passes}+1, same width and batch; cost and work relative to one pass; first step"
            head = "program, passes, ms/step, tokens/s, GFLOP/s, cost, work, work/cost, first step, cold warm-up, later"
            table(f"{title} after the switch relative to the steps after it", head.split(", "), rows)
        if "start" in args.parts:
            rows = bench_start(args, scripts, folder)
            table("Start to first step: smoke preset, COMPILE=0", ["program", "making its data", "later"], rows)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
