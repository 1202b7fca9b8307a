"""Time a training step on this machine: `make bench`, or `python tests/bench.py --help`.

1. Programs: nine blocks, 128 and 256 wide, 8,192 tokens a step, sequences of 256. Whole programs, one after the other
   in turn, several rounds: train_gpt.py with torch's attention kernel and with its own products (`attend_by_products`),
   train_gpt_mlx.py, and --peer. A step's time is the difference of the `train_time:` of two step lines; the number
   given is the median over the rounds of each process's median. Warm-up is what the `warm_up:` lines say: cold in the
   first round (an empty compiler cache of its own), warm later.
2. Passes: 1+2x4+1 at 1 to 4 passes in one process, each step timed by itself: cost against work, and the first step
   after a switch against the steps after it. Then the same by parts: forward passes alone, forward and backward ones,
   and what is left of a step for the update; with the process's peak of memory.

Another program that prints the challenge's step lines is timed in the same rounds, at the same shape:

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
sys.path.insert(0, str(ROOT))
VOCAB, LENGTH, BATCH = 1024, 256, 8192
SHAPE = dict(num_heads=4, num_kv_heads=2, mlp_mult=2, train_seq_len=LENGTH, train_batch_tokens=BATCH, vocab_size=VOCAB)
BASELINE = dict(preset="baseline", iterations=100000, max_wallclock_seconds=0, val_loss_every=0, train_log_every=1)
# The same for a peer, in the names of the challenge.
PEER_SHAPE = {name.upper(): str(value) for name, value in SHAPE.items()} | dict(
    NUM_LAYERS="9", VAL_LOSS_EVERY="0", TRAIN_LOG_EVERY="1", WARMUP_STEPS="1", MAX_WALLCLOCK_SECONDS="0",
    VAL_BATCH_SIZE=str(BATCH), GRAD_ACCUM_STEPS="1", ITERATIONS="100000",
)  # fmt: skip
STEP_LINE = re.compile(r"step:(\d+)/\d+ .*train_loss:.*train_time:(\d+(?:\.\d+)?)ms")
WARM_UP_LINE = re.compile(r"warm_up: .*?([\d.]+)s$")
PROGRAMS = ("train_gpt:kernel", "train_gpt:products", "train_gpt_mlx")


class InputError(ValueError):
    """A mistake that the user can mend, in one line."""


class Timing(NamedTuple):
    """One process, read from its lines."""

    step_ms: float  # median
    warm_up_s: float | None  # compile time; None where no line says it
    first_line_s: float  # from the start to the first step line


# --- The programs -------------------------------------------------------------------------------------------------


def run_program(program: str) -> None:
    """`main()` of a script, with this attention where `program` names one; flags are those of the command line."""
    name, _, attention = program.partition(":")
    module = importlib.import_module(name)
    if attention == "products":
        module.attend = module.attend_by_products
    elif attention == "kernel":
        chosen = module.attend
        module.attend = lambda q, k, v: attend_by_kernel(q, k, v) if q.device.type == "cpu" else chosen(q, k, v)
    module.main()


def attend_by_kernel(q, k, v):
    """train_gpt's `attend` by torch's own kernel, which that one does not take on a CPU."""
    import torch.nn.functional as F

    n, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2).reshape(n, t, h * d)


def python(code: str, *arguments: str) -> list[str]:
    """A command that runs a line of this module."""
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}]; import bench; {code}",
        *arguments,
    ]


def flags(settings: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def make_data(folder: Path) -> dict[str, str]:
    """Shards of random ids and a tokenizer of 1,024 pieces; returns data_path and tokenizer_path."""
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
        ids = rng.randint(260, VOCAB, tokens).astype("<u2")  # letters and words: no control piece, no bytes
        (folder / f"fineweb_{split}_000000.bin").write_bytes(header.tobytes() + ids.tobytes())
    return {"data_path": str(folder), "tokenizer_path": str(folder / "bench.model")}


def training_flops(settings: dict, loops: int) -> float:
    """FLOPs of one training step."""
    module = importlib.import_module("train_gpt")
    c, _ = module.load_config(flags(SHAPE | settings), {}, "laptop")
    return 3 * module.flops_per_token(c, loops) * BATCH


# --- Part 1 -------------------------------------------------------------------------------------------------------


def time_command(name: str, command: list[str] | str, env: dict[str, str], args, folder: Path) -> Timing:
    """Starts a command (a list, or a line for the shell), reads its lines until it has said enough steps, ends it."""
    began, lines, stamps, first = time.perf_counter(), [], [], 0.0
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **env}
    process = subprocess.Popen(command, shell=isinstance(command, str), cwd=folder, env=env, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               start_new_session=True)  # fmt: skip
    timer = threading.Timer(args.limit, end_group, [process])
    timer.start()
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if match := STEP_LINE.search(line):
                first = first or time.perf_counter() - began
                stamps.append((int(match[1]), float(match[2])))
                if len(stamps) >= args.steps:
                    break
    finally:
        timer.cancel()
        end_group(process)
        process.wait()
    if len(stamps) < args.steps:
        said = next((line for line in reversed(lines) if line.strip()), "nothing")
        found = f"{len(stamps)} after {time.perf_counter() - began:.0f} s"
        raise InputError(f"{name}: expected {args.steps} step lines, found {found}; it said last: {said[:200]}")
    stamps = stamps[2:]  # the first steps are not typical
    apart = [(b - a) / (j - i) for (i, a), (j, b) in zip(stamps, stamps[1:]) if j > i]
    warm_ups = [float(match[1]) for line in lines if (match := WARM_UP_LINE.search(line))]
    return Timing(statistics.median(apart), sum(warm_ups) if warm_ups else None, first)


def end_group(process: subprocess.Popen) -> None:
    """Ends a process that we started, with its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def bench_programs(args, programs: list[str], peers: dict[str, str], data: dict[str, str], folder: Path, width: int):
    """Part 1 at one width."""
    found: dict[str, list[Timing]] = {}
    settings = BASELINE | SHAPE | data | {"model_dim": width, "log_dir": folder / "logs"}
    for turn in range(args.rounds):
        for name in [*programs, *peers]:
            note(f"{width} wide, round {turn + 1} of {args.rounds}: {name}")
            run_id = f"{name.replace(':', '_')}_{width}_{turn}"
            command: list[str] | str = python(f"bench.run_program({name!r})", *flags(settings | {"run_id": run_id}))
            env = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
            if name in peers:
                paths = {key.upper(): value for key, value in data.items()}
                command, env = peers[name], PEER_SHAPE | paths | {"MODEL_DIM": str(width), "RUN_ID": run_id}
            found.setdefault(name, []).append(time_command(name, command, env, args, folder))
    work, rows = training_flops({"preset": "baseline", "model_dim": width}, 1), []
    for name, timings in found.items():
        steps = [timing.step_ms for timing in timings]
        ms, later = statistics.median(steps), timings[1:] or timings
        warm = [t.warm_up_s for t in timings[1:] if t.warm_up_s is not None]
        rows.append([name, f"{ms:.0f}", f"{min(steps):.0f}-{max(steps):.0f}", f"{1000 * BATCH / ms:,.0f}",
                     f"{work / ms / 1e6:.0f}", seconds(timings[0].warm_up_s),
                     seconds(statistics.median(warm) if warm else None),
                     seconds(statistics.median([t.first_line_s for t in later]))])  # fmt: skip
    title = f"9 blocks, {width} wide, {BATCH} tokens a step, {args.rounds} processes each of {args.steps} steps"
    table(title, "program, ms/step, range, tokens/s, GFLOP/s, cold warm-up, later, start to step 1".split(", "), rows)
    pairs = [("train_gpt:products", "train_gpt:kernel")] + [(name, peer) for peer in peers for name in programs]
    for one, other in pairs:
        if one in found and other in found:
            ratios = [b.step_ms / a.step_ms for a, b in zip(found[one], found[other])]
            spread = f"{min(ratios):.2f}-{max(ratios):.2f} over the rounds"
            print(f"{one} is {statistics.median(ratios):.2f} x as fast as {other} ({spread})")


# --- Part 2 -------------------------------------------------------------------------------------------------------


def worker(script: str, settings: dict, steps: int, passes: int) -> None:
    """Runs in a process of its own: for every number of passes, warm-up seconds and the ms of each step, as JSON."""
    module = importlib.import_module(script)
    c, _ = module.load_config(flags(settings), {}, "laptop")
    engine = module.Engine(c)
    engine.build(module.initial_weights(c))
    stream = module.TokenStream(module.find_shards(c.data_path, "train", c.vocab_size), c)
    out: dict[str, list] = {"warm_up": [], "steps": [], "parts": [], "peak": 0.0}
    for loops in range(1, passes + 1):
        began = time.perf_counter()
        engine.warm_up(stream, loops)
        out["warm_up"].append(time.perf_counter() - began)
    for number in range(steps * passes):
        began = time.perf_counter()
        engine.read(engine.step(stream, number * BATCH, number // steps + 1, 1.0, 0.9))
        engine.sync()
        out["steps"].append(1000 * (time.perf_counter() - began))
    for loops in range(1, passes + 1):
        out["parts"].append(time_parts(module, engine, stream, loops, steps))
    out["peak"] = engine.peak_memory() / 2**20
    print("BENCH " + json.dumps(out))


def time_parts(module, engine, stream, loops: int, times: int) -> list[float]:
    """Median milliseconds of a step's forward passes, and of those with its backward passes."""

    def forward(ids, targets) -> None:
        engine.token_losses(ids, targets, loops)  # waits: it gives numbers

    def both_ways(ids, targets) -> None:
        ids, targets = engine.tensor(ids), engine.tensor(targets)
        if module.FRAMEWORK == "torch":
            engine.objective(ids, targets, loops).mean().backward()
            engine.sync()
        else:
            module.mx.eval(engine.function("gradients", loops)(engine.params, ids, targets))

    found = []
    for work in (forward, both_ways):
        took = []
        for _ in range(times + 1):  # the first may compile
            began = time.perf_counter()
            for batch in stream.microbatches(0, BATCH, 0, 1, engine.largest):
                work(*batch)
            took.append(1000 * (time.perf_counter() - began))
        found.append(statistics.median(took[1:]))
    return found


def bench_passes(args, script: str, data: dict[str, str], folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Part 2 for one script: rows of both tables."""
    schedule = ",".join(f"{i / args.passes:.3f}:{i + 1}" for i in range(args.passes))
    shape = {"layout": f"1+2x{args.passes}+1", "loop_schedule": schedule, "model_dim": args.widths[-1]}
    call = f"bench.worker({script!r}, {SHAPE | data | shape!r}, {args.steps}, {args.passes})"
    runs = []
    for turn in range(args.rounds):
        note(f"1 to {args.passes} passes, round {turn + 1} of {args.rounds}: {script}")
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        try:
            done = subprocess.run(python(call), env=env, capture_output=True, text=True, timeout=args.limit)
        except subprocess.TimeoutExpired:
            raise InputError(f"{script}: expected an end within {args.limit:.0f} s; raise --limit") from None
        if done.returncode:
            raise InputError(f"{script}: stopped: {(done.stderr.strip().splitlines() or ['without a word'])[-1][:200]}")
        runs.append(json.loads(done.stdout.rsplit("BENCH ", 1)[1]))
    rows, by_part, one, less = [], [], 0.0, training_flops(shape, 1)
    for i in range(args.passes):
        parts = [run["steps"][i * args.steps : (i + 1) * args.steps] for run in runs]
        after = [statistics.median(part[1:]) for part in parts]
        ms, work = statistics.median(after), training_flops(shape, i + 1)
        one = one or ms
        first = statistics.median(part[0] / median for part, median in zip(parts, after))
        rows.append([script, str(i + 1), f"{ms:.0f}", f"{1000 * BATCH / ms:,.0f}", f"{work / ms / 1e6:.0f}",
                     f"{ms / one:.2f}", f"{work / less:.2f}", f"{work / less / (ms / one):.2f}", f"{first:.2f}",
                     seconds(runs[0]["warm_up"][i])])  # fmt: skip
        forward, both = (statistics.median(found) for found in zip(*(run["parts"][i] for run in runs)))
        peak = f"{statistics.median(run['peak'] for run in runs):.0f}" if i + 1 == args.passes else "-"
        by_part.append([script, str(i + 1), *(f"{x:.0f}" for x in (forward, both - forward, ms - both)), peak])
    return rows, by_part


# --- Report -------------------------------------------------------------------------------------------------------


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def note(text: str) -> None:
    """What runs now, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Prints a Markdown table."""
    note("")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}\n")
    for row in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    print(flush=True)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """The options, and the peers by name. Raises InputError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each program (default: 3)")
    parser.add_argument("--steps", type=int, default=10, help="steps of each process (default: 10)")
    parser.add_argument("--passes", type=int, default=4, help="largest number of passes in part 2; 0 = leave it out")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[128, 256], help="default: 128 256; part 2 has the last"
    )
    parser.add_argument("--program", action="append", choices=PROGRAMS, help="only this one (default: all)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME='COMMAND'", help="another program to time")
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a process is ended")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.steps < 5 or args.passes < 0:
        raise InputError("--rounds, --steps, --passes: expected at least 1, 5 and 0")
    peers = dict(peer.partition("=")[::2] for peer in args.peer)
    if not all(name and command for name, command in peers.items()) or set(peers) & set(PROGRAMS):
        raise InputError(f"--peer: expected NAME='COMMAND' with a name of its own, found {args.peer}")
    return args, peers


def main(argv: list[str] | None = None) -> int:
    folder = Path(tempfile.mkdtemp(prefix="bench_"))
    try:
        args, peers = parse(argv)
        programs = [*(args.program or PROGRAMS)]
        try:
            importlib.import_module("mlx.core")
        except ImportError as error:
            print(f"notice: train_gpt_mlx is left out ({error})")
            programs = [name for name in programs if name != "train_gpt_mlx"]
        module = importlib.import_module("train_gpt")
        versions = ", ".join(
            f"{name} {v}" for name, v in module.versions().items() if name in ("python", "torch", "mlx")
        )
        print(f"{module.cpu_name()}; {versions}; load before the start: {os.getloadavg()[0]:.1f}")
        if os.getloadavg()[0] > 0.5:
            print("notice: something else was running; times and ratios will be off")
        data = make_data(folder)
        for width in args.widths:
            bench_programs(args, programs, peers, data, folder, width)
        if args.passes:
            scripts = dict.fromkeys(name.partition(":")[0] for name in programs)
            rows, by_part = (sum(parts, []) for parts in zip(*(bench_passes(args, s, data, folder) for s in scripts)))
            head = "program, passes, ms/step, tokens/s, GFLOP/s, cost, work, work/cost, first step, cold warm-up"
            table("Passes; cost and work relative to one pass, the first step after a switch to those after it",
                  head.split(", "), rows)  # fmt: skip
            head = "program, passes, forward ms, backward ms, update ms, peak MiB"
            table("Parts of a step; the peak is that of the whole process", head.split(", "), by_part)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
