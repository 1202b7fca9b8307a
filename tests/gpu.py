"""What is worth running on one CUDA GPU, in calls of under ten minutes: `make gpu`, or without installing anything
`python3 tests/gpu.py` (torch, numpy, sentencepiece, safetensors and tqdm are needed; constriction, too, or its wheel in
wheels/ at the repository's root, which is unpacked beside the results).

    data       the text to train on, made here where there is none
    machine    what is there: versions, speed of copies and of products
    exact      the controls against the published code's numbers; compiled bfloat16 gradients against eager float32
    step       `record`: compilation, a step by number of passes, whole and in parts, memory, share of the peak
    kernels    where one step's time goes, kernel by kernel
    attention  which of its kernels torch takes, and the attention of one block by each, forward and backward
    baseline   a step of the challenge's model
    run        `record` for a minute across its switch, stopped and resumed, exported, scored; and again on the CPU
    choices    a step with another attention kernel, with mix-order reductions, with a larger microbatch

Each stage is a process of its own. What it finds goes part by part to --out/gpu.json, what it says to --out/gpu.log;
both are copied to the folder $OUT where that is set. None stops the others, and a second call with the same --out (of
an earlier machine its gpu.json is enough) does the parts that are missing or failed, in the time that the others leave.
Data is DATA_PATH with TOKENIZER_PATH where they have as many pieces as the preset, else the preset's own, else the
corpus of data/offline.py with as many. To try it elsewhere:

    python tests/gpu.py --device=cpu --out=logs/gpu_on_a_cpu --preset=smoke --seconds=6
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]
# Seconds that are kept for each stage, together one call; what one leaves, the next may use. All are estimates for 16
# cores, from traces of the compiler on two: a process starts in 10, torch.compile takes 45 for a number of passes that
# it has not seen and 10 for one that it has.
STAGES = {
    "data": 5,  # it is there; or it is made, in about 50, and a later stage waits for the next call
    "machine": 15,  # start
    "exact": 120,  # start, 20 of goldens and eager gradients, two compilations
    "step": 65,  # start, two compilations seen, 17 steps of 0.8 s and 17 of 1.2 s (tests/time_model.py)
    "kernels": 28,  # start, a compilation seen, two steps, the profiler's tables
    "attention": 15,  # start
    "baseline": 45,  # start, a compilation of 30, 15 steps of 0.3 s
    "run": 290,  # 2 x 30 of start and compilations seen, 30 of training, 8 of calibration, 144 of one round of the
    # export (4e-6 a weight, as MODE=preflight says), 10 of its scores, 35 of those of two devices
    "choices": 0,  # 60 for each of five parts, in what is left and in the next call
}
SEQUENCES_AT_ONCE = 2  # that eager float32 takes: its attention keeps all scores, 3 GB a visit of `record` for eight
ATTENTION = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")  # of torch
AGREEMENT = 0.002  # bits per byte between the score of an artifact on the GPU and in float32 on the CPU


class Findings:
    """What one stage found, part by part, in a file that all stages share; a part that is there is not done again."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage, self.failed = path, stage, False

    def all(self) -> dict:
        return json.loads(self.path.read_text()) if self.path.is_file() else {}

    def get(self, name: str) -> dict | None:
        return self.all().get(self.stage, {}).get(name)

    def part(self, name: str, work: Callable[..., dict], *arguments: object, may_fail: bool = False) -> None:
        """Adds what `work(*arguments)` returns. An error is told and does not stop the parts after it; where the work
        may fail, the error is what was found."""
        if self.get(name) is not None:
            return
        began = time.perf_counter()
        try:
            found = work(*arguments)
        except Exception as error:
            traceback.print_exc()
            if not may_fail:
                self.failed = True
                return
            found = {"error": (str(error) or type(error).__name__).splitlines()[0][:200]}
        everything = self.all()
        everything.setdefault(self.stage, {})[name] = found | {"took_s": round(time.perf_counter() - began, 1)}
        written = self.path.with_suffix(".tmp")
        written.write_text(json.dumps(everything, indent=1) + "\n")
        os.replace(written, self.path)  # so that a stage that is ended leaves a whole file


def engine_of(args, *flags: str):
    """(trainer, Config, Engine with initial weights, TokenStream) of a preset with more settings."""
    import train_gpt as t

    settings = [f"--device={args.device}", *data_flags(args.preset), *args.settings.split(), *flags]
    c, _ = t.load_config(settings, {}, args.preset)
    engine = t.Engine(c)
    engine.build(t.initial_weights(c))
    return t, c, engine, t.TokenStream(t.find_shards(c.data_path, "train", c.vocab_size), c)


def data_flags(preset: str) -> list[str]:
    """The dataset to train on, as flags; made where there is none."""
    import train_gpt as t

    c, _ = t.load_config([], {}, preset)
    if preset == "smoke":
        t.make_smoke_data(c)
        return [f"--data_path={c.data_path}", f"--tokenizer_path={c.tokenizer_path}"]
    asked = os.environ.get("DATA_PATH"), os.environ.get("TOKENIZER_PATH")
    own = (c.data_path, c.tokenizer_path)
    fits = all(asked) and vocabulary(ROOT / asked[0]) == c.vocab_size  # `record` and `baseline` differ in theirs
    data, tokenizer = asked if fits else own
    if not list((ROOT / data).glob("fineweb_train_*.bin")):
        data, tokenizer = f"data/datasets/offline_sp{c.vocab_size}", f"data/tokenizers/offline_{c.vocab_size}_bpe.model"
        make = [sys.executable, "data/offline.py", f"--vocab-size={c.vocab_size}"]
        subprocess.run(make, cwd=ROOT, check=True, stdout=sys.stderr)
    return [f"--data_path={data}", f"--tokenizer_path={tokenizer}"]


def vocabulary(data: Path) -> int:
    """Pieces of a dataset's tokenizer, as its manifest says or else its name; 0 where neither does."""
    manifest = data / "manifest.json"
    if manifest.is_file():
        return json.loads(manifest.read_text())["tokenizer"]["vocab_size"]
    named = re.search(r"sp(\d+)$", data.name)
    return int(named[1]) if named else 0


def seconds_of(work, sync, times: int = 10) -> float:
    """Median seconds of `work()`, after two that do not count."""
    took = []
    for _ in range(times + 2):
        sync()
        began = time.perf_counter()
        work()
        sync()
        took.append(time.perf_counter() - began)
    return statistics.median(took[2:])


def synchronizer(device: str):
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def passes_of(args) -> list[int]:
    """1, and the most passes of the preset."""
    import train_gpt as t

    c, _ = t.load_config(args.settings.split(), {}, args.preset)
    return sorted({1, t.parse_layout(c.layout).loops})


def titled(loops: int) -> str:
    return f"{loops} pass" + "es" * (loops > 1)


# The stages: each takes the command line and adds to its findings ---------------------------------------------------


def data(args, found: Findings) -> None:
    for preset in (args.preset, "baseline" if args.device == "cuda" else "smoke"):
        found.part(preset, lambda preset=preset: {"flags": data_flags(preset)})


def machine(args, found: Findings) -> None:
    found.part("versions", versions, args)
    found.part("copies", copies, args)
    for m, k, n in [(8192, 8192, 8192), (65536, 512, 2048)] if args.device == "cuda" else [(256, 256, 256)]:
        found.part(f"product {m}x{k}x{n}", product, args, m, k, n)


def versions(args) -> dict:
    import torch

    import train_gpt as t

    if args.device != "cuda":
        return {"versions": t.versions(), "device": t.cpu_name()}
    facts = torch.cuda.get_device_properties(0)
    memory = {"memory_bytes": facts.total_memory, "multiprocessors": facts.multi_processor_count}
    return {"versions": t.versions(), "device": torch.cuda.get_device_name(), "cores": os.cpu_count()} | memory


def copies(args) -> dict:
    import torch

    size = 1 << (28 if args.device == "cuda" else 22)
    a, b = (torch.empty(size, device=args.device) for _ in range(2))
    return {"bytes_per_second": 8 * size / seconds_of(lambda: b.copy_(a), synchronizer(args.device))}


def product(args, m: int, k: int, n: int) -> dict:
    import torch

    x, w = (torch.randn(*shape, device=args.device, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
    return {"tflops": 2e-12 * m * k * n / seconds_of(lambda: x @ w, synchronizer(args.device))}


def exact(args, found: Findings) -> None:
    found.part("goldens", check_goldens, args.device)
    for loops in passes_of(args):
        found.part(f"gradients, {titled(loops)}", lambda loops=loops: gradient_errors(args, engine_of(args), loops))


def gradient_errors(args, compiled: tuple, loops: int) -> dict:
    """Of a microbatch of training: how far the gradients of the engine `compiled` are from those of eager float32, by
    parameter, over their norm. Not at the initial weights, whose zeros would hide most of the backward pass."""
    import numpy as np

    _, c, engine, stream = engine_of(args, "--dtype=float32", "--compile=0")
    ids, targets = next(stream.microbatches(0, c.train_batch_tokens, 0, 1, engine.largest))
    rng, weights = np.random.RandomState(0), engine.weights()
    weights = {name: (w + 0.02 * rng.standard_normal(w.shape)).astype(np.float32) for name, w in weights.items()}
    right = gradients(engine, weights, ids, targets, loops, SEQUENCES_AT_ONCE)
    mine = gradients(compiled[2], weights, ids, targets, loops, len(ids))
    errors = {name: float((mine[name] - g).norm() / g.norm()) for name, g in right.items() if g.norm() > 0}
    worst = sorted(errors, key=errors.get)[-5:]  # of a few numbers, such as gates, terms may cancel each other
    return {"median": statistics.median(errors.values()), "worst": {name: errors[name] for name in worst}}


def gradients(engine, weights: dict, ids, targets, loops: int, at_once: int) -> dict:
    """By parameter, float32 on the CPU, of the mean loss of ids [n, t], so many sequences at a time."""
    engine.set_weights(weights)
    for a in range(0, len(ids), at_once):
        some = (engine.tensor(part[a : a + at_once]) for part in (ids, targets))
        (engine.losses(*some, loops).sum() / ids.size).backward()
    return {name: p.grad.float().cpu().clone() for name, p in engine.model.named_parameters()}


def check_goldens(device: str) -> dict:
    """The largest errors of both controls; raises AssertionError where one is not the published model."""
    import numpy as np
    import rebuild
    import torch

    import train_gpt as t

    sizes = "--vocab_size=64 --model_dim=64 --num_heads=4 --num_kv_heads=2 --train_seq_len=32 --train_batch_tokens=64"
    found = {}
    for case in ("baseline", "pr319"):
        flags = [f"--preset={case}", *sizes.split(), "--compile=0", f"--device={device}"]
        golden = rebuild.golden_numbers(str(ROOT / "tests" / "golden" / "controls.npz"), case)
        logits = {}
        for dtype in ("float32", "bfloat16"):
            c, _ = t.load_config([*flags, f"--dtype={dtype}"], {}, "record")
            engine = t.Engine(c)
            torch.set_float32_matmul_precision("highest")
            engine.build(rebuild.golden_weights(t.param_shapes(c)), training=False)
            ids = rebuild.golden_ids()[0, :, :-1].astype(np.int64)
            with torch.no_grad():
                logits[dtype] = engine.model(engine.tensor(ids), t.parse_layout(c.layout).loops).cpu().numpy()
        errors = {dtype: float(np.abs(found - golden["logits"]).max()) for dtype, found in logits.items()}
        print(f"golden {case} on {engine.device_name}: largest errors {errors}")
        found[case] = errors
        assert errors["float32"] < 1e-3 and errors["bfloat16"] < 1.0, "this device does not compute the published model"
    return found


def step(args, found: Findings) -> None:
    ready = functools.cache(lambda: engine_of(args))
    for loops in passes_of(args):
        found.part(titled(loops), lambda loops=loops: step_times(args, ready(), loops))
        found.part(f"{titled(loops)}, parts", lambda loops=loops: step_parts(args, ready(), loops))


def step_times(args, ready: tuple, loops: int) -> dict:
    """Milliseconds of a step, one by one and as in training; FLOP/s; and the peak of memory."""
    t, c, engine, stream = ready
    began = time.perf_counter()
    engine.warm_up(stream, loops)
    compiled = time.perf_counter() - began
    if args.device == "cuda":
        t.torch.cuda.reset_peak_memory_stats()
    apart = seconds_of(lambda: engine.step(stream, 0, loops, 0.0, 0.9), engine.sync, args.steps)
    began = time.perf_counter()
    for _ in range(args.steps):
        engine.step(stream, 0, loops, 0.0, 0.9)
    engine.sync()
    together = (time.perf_counter() - began) / args.steps
    flops = 3 * t.flops_per_token(c, loops) * c.train_batch_tokens / together
    return {
        "microbatch": engine.largest,
        "compiled": engine.compiled,
        "warm_up_s": compiled,
        "step_ms_apart": 1000 * apart,
        "step_ms_as_in_training": 1000 * together,
        "tokens_per_second": c.train_batch_tokens / together,
        "tflops": flops / 1e12,
        "share_of_peak": flops / engine.peak_flops if engine.peak_flops else None,
        "peak_memory_bytes": engine.peak_memory(),
    }


def step_parts(args, ready: tuple, loops: int) -> dict:
    """Milliseconds of one step's forward passes, backward passes and update, between events on the device."""
    t, c, engine, stream = ready
    engine.warm_up(stream, loops)
    mark, between = stopwatch(args.device)
    sums = dict.fromkeys(("forward_ms", "backward_ms", "update_ms"), 0.0)
    marks = [mark()]
    for ids, targets in stream.microbatches(0, c.train_batch_tokens, 0, 1, engine.largest):
        loss = engine.objective(engine.tensor(ids), engine.tensor(targets), loops).sum() / c.train_batch_tokens
        marks.append(mark())
        loss.backward()
        marks.append(mark())
    engine.optimizer.update(0.0, 0.9, engine.dtype)
    marks.append(mark())
    engine.sync()
    for number, (a, b) in enumerate(zip(marks, marks[1:])):
        last = number == len(marks) - 2
        sums["update_ms" if last else ("forward_ms", "backward_ms")[number % 2]] += between(a, b)
    return sums


def stopwatch(device: str) -> tuple[Callable, Callable]:
    """`mark()`, a moment in the device's queue, and `between(a, b)`, milliseconds."""
    import torch

    def mark():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    if device == "cuda":
        return mark, lambda a, b: a.elapsed_time(b)
    return time.perf_counter, lambda a, b: 1000 * (b - a)


def kernels(args, found: Findings) -> None:
    found.part("one step", profile, args)


def profile(args) -> dict:
    """Milliseconds and calls of the 40 kernels that take longest in a step with all passes."""
    import torch

    t, c, engine, stream = engine_of(args)
    loops, kinds = t.parse_layout(c.layout).loops, torch.profiler.ProfilerActivity
    engine.warm_up(stream, loops)
    activities = [kinds.CUDA, kinds.CPU] if args.device == "cuda" else [kinds.CPU]
    with torch.profiler.profile(activities=activities) as seen:
        engine.step(stream, 0, loops, 0.0, 0.9)
        engine.sync()
    key = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, key))[:40]
    return {row.key[:100]: {"ms": getattr(row, key) / 1000, "calls": row.count} for row in rows}


def attention(args, found: Findings) -> None:
    found.part("torch's choice", attend_ms, args, "")
    for name in ATTENTION:
        found.part(name, attend_ms, args, name, may_fail=True)


def attend_ms(args, kernel: str) -> dict:
    """Milliseconds of one block's causal attention, forward and both ways, by a kernel or by the one torch takes."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _, c, engine, _ = engine_of(args)
    n, width = max(1, engine.largest // c.train_seq_len), c.model_dim // c.num_heads
    q, k, v = (
        torch.randn(n, c.train_seq_len, heads, width, device=args.device, dtype=engine.dtype).transpose(1, 2)
        for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    )
    grad, options = torch.randn_like(q), {"is_causal": True, "enable_gqa": c.num_heads != c.num_kv_heads}
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(*inputs, **options)

    with sdpa_kernel(getattr(SDPBackend, kernel)) if kernel else contextlib.nullcontext():
        chosen = SDPBackend(torch._fused_sdp_choice(*inputs, **options)).name
        there = 1000 * seconds_of(forward, engine.sync)
        both = 1000 * seconds_of(lambda: torch.autograd.grad(forward(), inputs, grad), engine.sync)
    return {"kernel": chosen, "forward_ms": there, "forward_and_backward_ms": both}


def baseline(args, found: Findings) -> None:
    of = argparse.Namespace(**vars(args) | {"preset": "baseline" if args.device == "cuda" else "smoke"})
    found.part("1 pass", lambda: step_times(of, engine_of(of), 1))


def run(args, found: Findings) -> None:
    """Each part needs the one before."""
    found.part("trained", train, args)
    if found.get("trained"):
        found.part("scores", scores, args)
    if found.get("scores"):
        found.part("scores agree", agreement, found.get("scores"))


def train(args) -> dict:
    """Trains, is stopped by a signal, goes on, exports in one round."""
    import train_gpt as t

    c, _ = t.load_config(args.settings.split(), {}, args.preset)
    kept = t.export_seconds(c)
    command = [*trainer(args), *args.settings.split(), f"--val_max_tokens={64 * c.train_seq_len}"]
    command += [f"--log_dir={args.out}", "--run_id=run", "--iterations=0", "--train_log_every=10"]
    command += [f"--max_wallclock_seconds={args.seconds + kept}", f"--lr_warmup_steps={min(c.lr_warmup_steps, 20)}"]
    command += ["--target_bytes=0", "--bytes_cap=99000000"]  # TARGET_BYTES takes four rounds
    folder = args.out / "run"
    if not (folder / "checkpoint.safetensors").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(command)
        log = folder / "train.log"
        while process.poll() is None and not (log.is_file() and b"\nstep:10/" in log.read_bytes()):
            time.sleep(0.2)
        time.sleep(args.seconds / 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 128 + signal.SIGTERM, "the stopped run did not say so"
    subprocess.run([*command, "--resume=1"], check=True)
    result = json.loads((folder / "result.json").read_text())
    kept_keys = "steps tokens loops train_time_ms tok_s val_bpb_raw val_bpb bytes_total calib_time_ms peak_mem_bytes"
    return {key: result[key] for key in kept_keys.split()}


def trainer(args, device: str = "") -> list[str]:
    """The start of a command line of train_gpt.py."""
    start = [sys.executable, str(ROOT / "train_gpt.py"), f"--preset={args.preset}", f"--device={device or args.device}"]
    return [*start, *data_flags(args.preset)]


def scores(args) -> dict:
    """Bits per byte of the artifact on this device as it is, and on the CPU in float32. Without overlap: at the
    preset's stride of 64 these 16,384 tokens would be 460,800."""
    import train_gpt as t

    c, _ = t.load_config(args.settings.split(), {}, args.preset)
    found = {}
    for device, dtype in ((args.device, c.dtype or "bfloat16"), ("cpu", "float32")):
        ask = [*trainer(args, device), "--mode=eval", f"--artifact={args.out / 'run' / 'model.int6.rgpt'}"]
        ask += [f"--dtype={dtype}", f"--val_max_tokens={8 * c.train_seq_len}", "--eval_stride=0", "--compile=0"]
        said = subprocess.run(ask, check=True, capture_output=True, text=True).stdout
        found[f"{device} {dtype}"] = float(said.split("val_bpb:")[1].split()[0])
    return found


def agreement(found: dict) -> dict:
    one, other = (found[name] for name in found if name != "took_s")
    assert abs(one - other) < AGREEMENT, f"expected two scores within {AGREEMENT}, found {found}"
    return {"difference": one - other}


def choices(args, found: Findings) -> None:
    """The most passes first; `step` has the times to compare with."""
    import torch

    import train_gpt as t

    taken = (Findings(found.path, "attention").get("torch's choice") or {}).get("kernel")
    for name in ATTENTION[:3]:
        if name != taken:
            part = f"{name}, {titled(passes_of(args)[-1])}"
            found.part(part, with_kernel, args, name, passes_of(args)[-1], may_fail=True)
    for loops in passes_of(args) if hasattr(torch._inductor.config.triton, "mix_order_reduction") else ():
        found.part(f"mix-order reductions, {titled(loops)}", with_mix_order, args, loops, may_fail=True)
    _, c, engine, _ = engine_of(args)
    most, memory = engine.largest, torch.cuda.get_device_properties(0).total_memory if args.device == "cuda" else 0
    while 2 * most <= c.train_batch_tokens and t.memory_needed(c, 2 * most) < 0.8 * memory:
        most *= 2
    larger = functools.cache(lambda: engine_of(args, f"--microbatch_tokens={most}"))
    for loops in passes_of(args)[::-1] if most > engine.largest else ():
        found.part(f"microbatch {most}, {titled(loops)}", lambda loops=loops: step_times(args, larger(), loops))


def with_kernel(args, name: str, loops: int) -> dict:
    """Step times where torch may take this attention kernel alone. Compilation has a cache of its own, since torch's
    keys do not tell which kernels are allowed."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before, torch_caches = dict(os.environ), args.out / f"inductor_{name.lower()}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(torch_caches)
    torch._dynamo.reset()
    try:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return step_times(args, engine_of(args), loops)
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch._dynamo.reset()


def with_mix_order(args, loops: int) -> dict:
    """Gradients' errors and step times with the reductions that `Engine` switches off."""
    import torch

    ready = engine_of(args)
    torch._dynamo.reset()
    with torch._inductor.config.patch("triton.mix_order_reduction", True):
        errors = gradient_errors(args, ready, loops)
        torch._inductor.config.triton.mix_order_reduction = True  # gradient_errors made another Engine
        return {"gradient_errors": errors} | step_times(args, ready, loops)


# The plan ------------------------------------------------------------------------------------------------------------


def unpack_wheels(out: Path) -> dict[str, str]:
    """The environment of the stages: with what lies in wheels/, which goes before what is installed."""
    for wheel in sorted((ROOT / "wheels").glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(out / "site")
    more = [str(out / "site")] if (out / "site").is_dir() else []
    return os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), *more]).strip(os.pathsep)}


def run_stage(name: str, args, env: dict[str, str], limit: float) -> str:
    """Runs one stage in a process of its own; returns how it ended."""
    command = [sys.executable, __file__, *args.given, f"--stage={name}"]
    with open(args.out / "gpu.log", "a") as log:
        print(f"== {name}", file=log, flush=True)
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            return "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            return f"ended after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def hand_out(out: Path) -> None:
    """Copies what says how it went to the folder $OUT."""
    if not os.environ.get("OUT"):
        return
    folder = Path(os.environ["OUT"])
    folder.mkdir(parents=True, exist_ok=True)
    for path in [out / "gpu.json", out / "gpu.log", *sorted((out / "run").glob("*.json*")), out / "run" / "train.log"]:
        if path.is_file():
            shutil.copy(path, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="record", help="whose model is looked at")
    parser.add_argument("--settings", default="", help="of train_gpt.py, beside the preset: '--compile=1 ...'")
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "gpu")
    parser.add_argument("--seconds", type=float, default=30.0, help="of training in the stage `run`")
    parser.add_argument("--steps", type=int, default=6, help="that are timed")
    parser.add_argument("--budget", type=float, default=590.0, help="seconds of one call")
    parser.add_argument("--stage", choices=STAGES, help="this one only, in this process")
    args = parser.parse_args()
    args.given, args.out = [flag for flag in sys.argv[1:] if not flag.startswith("--stage")], args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    return do_stage(args.stage, args) if args.stage else do_all(args, parser)


def do_stage(name: str, args) -> int:
    """Does what is missing of a stage; "done" stands in its findings where nothing is missing any more."""
    found = Findings(args.out / "gpu.json", name)
    globals()[name](args, found)
    if not found.failed:
        found.part("done", dict)
    return int(found.failed)


def do_all(args, parser) -> int:
    places = [bool(os.environ.get(name)) for name in ("DATA_PATH", "TOKENIZER_PATH")]
    if sum(places) == 1:
        parser.error("expected DATA_PATH and TOKENIZER_PATH, or neither, found one of them")
    began, env, failed = time.monotonic(), unpack_wheels(args.out), 0
    findings = {name: Findings(args.out / "gpu.json", name) for name in STAGES}
    todo = {name: limit for name, limit in STAGES.items() if not findings[name].get("done")}
    for name, found in findings.items():
        kept, left = todo.pop(name, 0), args.budget - (time.monotonic() - began)
        how = "done before"
        if not found.get("done"):
            limit = left if name == "data" else min(left, max(kept, left - sum(todo.values())))
            how = run_stage(name, args, env, limit) if left > 5 else "left for the next call"
        failed += not found.get("done")
        print(f"== {name}: {how}, {time.monotonic() - began:.0f} s", flush=True)
        print(json.dumps(found.all().get(name, {}), indent=1)[-3000:], flush=True)
        hand_out(args.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
