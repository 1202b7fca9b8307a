"""What only a Mac can confirm of train_gpt_mlx.py, in some minutes: `make mac`, or `python tests/mac.py`.

    goldens    both controls against the published code's numbers on Metal: logits, and the losses of three steps
    compiled   a step that mx.compile made, launched ahead, against the plain function: losses and weights
    speed      tokens a second and peak memory of the presets `laptop` and `mini`, for each number of passes
    resume     a run that is stopped by a signal and goes on is the run that was not stopped

The block between the lines is to be pasted into an issue. Exit code 1 where a check failed. Anywhere else, small and
without compilation:

    python tests/mac.py --device=cpu
"""

import contextlib
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden"), str(ROOT / "data")]

import rebuild  # noqa: E402
from tool import Parser, need, run_tool  # noqa: E402

# Largest differences from the golden numbers of float32 on a CPU, whose logits lie between -30 and 30: of logits, of
# losses. Of compiled from plain: of losses, of weights over how far they went.
GOLDEN_TOLERANCE = {"float32": (1e-3, 1e-3), "bfloat16": (1.0, 0.1)}
COMPILED_TOLERANCE = {"float32": (1e-3, 0.05), "bfloat16": (0.1, 0.5)}  # Adam makes whole steps of rounding errors
RESUMED_TOLERANCE = 1e-3  # of training losses, float32
SMALL = "--model_dim=32 --num_heads=2 --num_kv_heads=1 --train_seq_len=32 --train_batch_tokens=128"  # on a CPU
RUN = "--preset=smoke --dtype=float32 --compile=1 --loop_schedule=0:1,0.3:2 --val_loss_every=0 --train_log_every=1"


class Tokens:
    """A stream of given sequences [n, length + 1], the same for every step, in microbatches of `rows`."""

    def __init__(self, sequences: np.ndarray, rows: int):
        self.parts = [sequences[i : i + rows] for i in range(0, len(sequences), rows)]

    def microbatches(self, *_):
        for part in self.parts:
            yield part[:, :-1], part[:, 1:]


def engine_of(args, *flags: str):
    """(trainer, Config, Engine) on the device that is asked for; nothing is built yet."""
    import train_gpt_mlx as t

    c, _ = t.load_config([f"--device={args.device}", *flags], {}, "laptop")
    return t, c, t.Engine(c)


def goldens(args) -> list[str]:
    sizes = "--vocab_size=64 --model_dim=64 --num_heads=4 --num_kv_heads=2 --train_seq_len=32 --train_batch_tokens=64"
    ids, lines = rebuild.golden_ids(), []
    for case in ("baseline", "pr319"):
        golden = rebuild.golden_numbers(ROOT / "tests" / "golden" / "controls.npz", case)
        for dtype, most in GOLDEN_TOLERANCE.items():
            t, c, engine = engine_of(args, f"--preset={case}", *sizes.split(), f"--dtype={dtype}")
            engine.build(rebuild.golden_weights(t.param_shapes(c)))
            loops = t.parse_layout(c.layout).loops
            engine.next_logits(ids[0, 0, :-1], loops)  # puts the weights into the model
            logits = engine.model(engine.tensor(ids[0, :, :-1]), loops)
            steps = [(Tokens(ids[step], 2), t.momentum_at(c, step)) for step in range(rebuild.STEPS)]
            losses = [engine.read(engine.step(tokens, 0, loops, 1.0, momentum))[0] for tokens, momentum in steps]
            off = np.abs(np.array(logits) - golden["logits"]).max(), np.abs(np.array(losses) - golden["loss"]).max()
            lines.append(verdict(f"{case} {dtype}", {"logits": (off[0], most[0]), "losses": (off[1], most[1])}))
    return lines


def compiled(args) -> list[str]:
    shape = [
        "--layout=1+2x2+1",
        "--loop_schedule=0:1,0.5:2",
        "--vocab_size=256",
        *SMALL.split(),
        "--grad_clip_norm=1",
        "--lora_rank=2",
        "--xsa=1",
    ]
    ids, lines = np.random.RandomState(0).randint(0, 256, (4, 33)), []
    for dtype, most in COMPILED_TOLERANCE.items():
        for loops, rows in ((1, 4), (2, 4), (2, 1)):
            found = []
            for is_plain in (True, False):
                t, c, engine = engine_of(args, *shape, f"--dtype={dtype}", f"--compile={int(not is_plain)}")
                engine.runs_ahead = not is_plain
                weights = t.initial_weights(c)
                engine.build(weights)
                steps = [engine.step(Tokens(ids, rows), 0, loops, 0.5, 0.9) for _ in range(4)]
                found.append(([engine.read(step)[0] for step in steps], engine.weights()))
            (plain, ours), (other, theirs) = found
            moved = np.sqrt(sum(np.square(ours[name] - weights[name]).sum() for name in weights))
            apart = np.sqrt(sum(np.square(ours[name] - theirs[name]).sum() for name in weights)) / moved
            off = {"losses": (np.abs(np.subtract(plain, other)).max(), most[0]), "weights": (apart, most[1])}
            lines.append(verdict(f"{loops} passes, {4 // rows} microbatches, {dtype}", off))
    return lines


def speed(args) -> list[str]:
    lines = []
    for preset in ("laptop", "mini"):
        t, c, engine = engine_of(args, f"--preset={preset}", *(SMALL.split() if args.device == "cpu" else []))
        engine.build(t.initial_weights(c))
        shape = c.train_batch_tokens // c.train_seq_len, c.train_seq_len + 1
        rows = max(1, engine.largest // c.train_seq_len)
        tokens = Tokens(np.random.RandomState(0).randint(0, c.vocab_size, shape), rows)
        for loops in t.loop_counts(c):
            t.mx.reset_peak_memory()
            first = t.seconds_of(engine, engine.warm_up, tokens, loops)
            took = t.seconds_of(engine, engine.warm_up, tokens, loops, args.steps) / args.steps
            lines.append(f"{preset}, loops:{loops}: {c.train_batch_tokens / took:,.0f} tokens a second, {took:.3f} s a "
                         f"step, first {first:.1f} s, peak {t.mx.get_peak_memory() / 2**20:.0f} MiB, "
                         f"{str(engine.dtype).split('.')[-1]}, compiled: {engine.compiled}")  # fmt: skip
    return lines


def resume(args) -> list[str]:
    losses, small = {}, SMALL.split() if args.device == "cpu" else []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("whole", "stopped"):
            flags = [*RUN.split(), *small, f"--device={args.device}", f"--log_dir={folder}", f"--run_id={name}"]
            command, rows = [sys.executable, "train_gpt_mlx.py", *flags], Path(folder, name, "metrics.jsonl")
            command.append(f"--iterations={30 if args.device == 'cpu' else 400}")
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while name == "stopped" and process.poll() is None and not (rows.is_file() and rows.stat().st_size > 1500):
                time.sleep(0.02)
            if name == "stopped":
                process.send_signal(signal.SIGTERM)
            code, said = process.wait(600), process.stderr.read()
            if name == "stopped":
                assert code == 128 + signal.SIGTERM, f"the stopped run ended with {code}: {said[-300:]}"
                code = subprocess.run([*command, "--resume=1"], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
            assert code == 0, f"the run {name} ended with {code}: {said[-300:]}"
            found = [json.loads(row) for row in rows.read_text().splitlines()]
            losses[name] = [row["train_loss"] for row in found if "train_loss" in row]
        log = Path(folder, "stopped", "train.log").read_text()
    at = int(log.rsplit("resume: from step:", 1)[1].split(";")[0])
    off = np.abs(np.subtract(losses["whole"], losses["stopped"])).max()
    return [verdict(f"stopped at step {at} of {len(losses['whole'])}", {"losses": (off, RESUMED_TOLERANCE)})]


def verdict(what: str, off: dict[str, tuple[float, float]]) -> str:
    """A line on how far numbers are off and how far they may be."""
    failed = [name for name, (found, most) in off.items() if not found <= most]
    said = ", ".join(f"{name} {found:.2g} (at most {most:g})" for name, (found, most) in off.items())
    return f"{'FAIL' if failed else 'pass'}  {what}: {said}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--steps", type=int, default=5, help="that are timed for each number of passes")
    args = parser.parse_args(argv)
    here = platform.system(), platform.machine()
    is_mac = here == ("Darwin", "arm64") or args.device == "cpu"
    mend = "--device=cpu runs the same checks, small and without compilation"
    need(is_mac, "make mac", "a Mac with Apple silicon", " ".join(here), mend)
    import train_gpt_mlx as t

    source = f"{t.source_commit()}, script {t.source_sha256()[:12]}"
    print(f"--- make mac, {platform.platform()}, {engine_of(args)[2].device_name}\ncommit {source}\n{t.versions()}")
    failed = 0
    for check in (goldens, compiled, speed, resume):
        try:
            lines = check(args)
        except Exception as error:  # the other checks are of use nevertheless
            lines = [f"FAIL  {type(error).__name__}: {' '.join(str(error).split())[:300]}"]
        failed += sum(line.startswith("FAIL") for line in lines)
        with contextlib.suppress(BrokenPipeError):
            print("\n".join([f"{check.__name__}:", *(f"  {line}" for line in lines)]), flush=True)
    print(f"--- {'all checks passed' if not failed else f'{failed} FAILED'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
