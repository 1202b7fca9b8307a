"""What is worth running on one CUDA GPU, in calls of under ten minutes: `make gpu`, or without installing anything
`python3 tests/gpu.py` (torch, numpy, sentencepiece, safetensors and tqdm are needed; constriction, too, or its wheel in
wheels/ at the repository's root, which is unpacked beside the results).

    data       the text to train on, made here where there is none
    machine    what is there: versions, speed of copies and of products, which attention kernel torch takes
    exact      the controls against the published code's numbers; compiled bfloat16 gradients against eager float32
    step       `record`: compilation, milliseconds of a step by number of passes and microbatch, share of the peak
    kernels    where one step's time goes, kernel by kernel
    attention  the attention of one block, forward and backward, by each of torch's kernels
    baseline   a step of the challenge's model
    run        `record` for a minute across its switch, stopped and resumed, exported, scored; and again on the CPU

Each stage is a process of its own; its findings go to --out/<stage>.json, what it says to <stage>.log. None stops the
others, and a second call does what is missing or failed, with the time of what need not be done again. Data is
DATA_PATH with TOKENIZER_PATH where they have as many pieces as the preset, else the preset's own, else the corpus of
data/offline.py with as many. To try it elsewhere:

    python tests/gpu.py --device=cpu --out=/tmp/gpu --preset=smoke --seconds=6
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]
# Seconds that are kept for each stage, the sum of which is one call; what one leaves, the next may use.
STAGES = {
    "data": 50,
    "machine": 30,
    "exact": 100,
    "step": 160,
    "kernels": 35,
    "attention": 35,
    "baseline": 40,
    "run": 140,
}


def engine_of(args, *flags: str):
    """(trainer, Config, Engine with initial weights, TokenStream) of a preset with more settings."""
    import train_gpt as t

    c, _ = t.load_config([f"--device={args.device}", *data_flags(args.preset), *flags], {}, args.preset)
    engine = t.Engine(c)
    engine.build(t.initial_weights(c))
    return t, c, engine, t.TokenStream(t.find_shards(c.data_path, "train", c.vocab_size), c)


def data_flags(preset: str) -> list[str]:
    """The dataset to train on, as flags; made where there is none."""
    import train_gpt as t

    if preset == "smoke":
        t.make_smoke_data(t.load_config(["--preset=smoke"], {}, "smoke")[0])
        return []
    c, _ = t.load_config([], {}, preset)
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


# The stages: each takes the command line and returns its findings ----------------------------------------------------


def data(args) -> dict:
    return {preset: data_flags(preset) for preset in (args.preset, "baseline")}


def machine(args) -> dict:
    import torch

    import train_gpt as t

    sync, cuda = synchronizer(args.device), args.device == "cuda"
    found = {"versions": t.versions(), "device": torch.cuda.get_device_name() if cuda else t.cpu_name()}
    if cuda:
        facts = torch.cuda.get_device_properties(0)
        found |= {"memory_bytes": facts.total_memory, "multiprocessors": facts.multi_processor_count}
    size = 1 << (28 if cuda else 22)
    a, b = (torch.empty(size, device=args.device) for _ in range(2))
    found["copy_bytes_per_second"] = 8 * size / seconds_of(lambda: b.copy_(a), sync)
    for m, k, n in [(8192, 8192, 8192), (65536, 512, 2048)] if cuda else [(256, 256, 256)]:
        x, w = (torch.randn(*shape, device=args.device, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
        rate = 2e-12 * m * k * n / seconds_of(lambda x=x, w=w: x @ w, sync)
        found[f"product_{m}x{k}x{n}_tflops"] = rate
    return found


def exact(args) -> dict:
    import torch

    check_goldens(args.device)
    found = {"goldens": "both controls"}
    for on in (False, True):
        options = torch._inductor.config.triton
        has_option = hasattr(options, "mix_order_reduction")
        if on and not has_option:
            continue
        gradients = {}
        for kind, flags in (("eager", ("--dtype=float32", "--compile=0")), ("compiled", ("--dtype=bfloat16",))):
            t, c, engine, stream = engine_of(args, *flags)
            torch._dynamo.reset()
            if has_option:
                options.mix_order_reduction = on
            count = 8 * c.train_seq_len
            for loops in sorted({1, t.parse_layout(c.layout).loops}):
                engine.optimizer.grads.zero_()
                for ids, targets in stream.microbatches(0, count, 0, 1, count):
                    engine.losses(engine.tensor(ids), engine.tensor(targets), loops).mean().backward()
                named = engine.model.named_parameters()
                gradients[kind, loops] = {name: p.grad.float().cpu().clone() for name, p in named}
        for loops in {loops for _, loops in gradients}:
            errors = {
                name: float((gradients["compiled", loops][name] - g).norm() / g.norm().clamp(min=1e-12))
                for name, g in gradients["eager", loops].items()
                if g.norm() > 0
            }
            worst = max(errors, key=errors.get)
            key = f"gradient_error_{loops}_passes" + "_mix_order" * on
            found[key] = {"median": statistics.median(errors.values()), "worst": errors[worst], "of": worst}
    return found


def check_goldens(device: str) -> None:
    """Raises AssertionError where a control on this device is not the published model."""
    import numpy as np
    import rebuild
    import torch

    import train_gpt as t

    sizes = "--vocab_size=64 --model_dim=64 --num_heads=4 --num_kv_heads=2 --train_seq_len=32 --train_batch_tokens=64"
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
        assert errors["float32"] < 1e-3 and errors["bfloat16"] < 1.0, "this device does not compute the published model"


def step_times(args, *flags: str) -> dict:
    """By number of passes: milliseconds of a step, one by one and as in training; FLOP/s; and the peak of memory."""
    t, c, engine, stream = engine_of(args, *flags)
    found = {"largest_microbatch": engine.largest, "compiled": engine.compiled}
    for loops in sorted({1, t.parse_layout(c.layout).loops}):
        began = time.perf_counter()
        engine.warm_up(stream, loops)
        compiled = time.perf_counter() - began
        apart = seconds_of(lambda loops=loops: engine.step(stream, 0, loops, 0.0, 0.9), engine.sync, args.steps)
        began = time.perf_counter()
        for _ in range(args.steps):
            engine.step(stream, 0, loops, 0.0, 0.9)
        engine.sync()
        together = (time.perf_counter() - began) / args.steps
        flops = 3 * t.flops_per_token(c, loops) * c.train_batch_tokens / together
        found[f"{loops}_passes"] = {
            "warm_up_s": compiled,
            "step_ms_apart": 1000 * apart,
            "step_ms_as_in_training": 1000 * together,
            "tokens_per_second": c.train_batch_tokens / together,
            "tflops": flops / 1e12,
            "share_of_peak": flops / engine.peak_flops if engine.peak_flops else None,
        }
    return found | {"peak_memory_bytes": engine.peak_memory()}


def step(args) -> dict:
    import torch

    import train_gpt as t

    found = {"default": step_times(args)}
    if args.device == "cuda":
        c, most = t.load_config([], {}, args.preset)[0], found["default"]["largest_microbatch"]
        memory = torch.cuda.get_device_properties(0).total_memory
        while t.memory_needed(c, 2 * most) < 0.8 * memory and 2 * most <= c.train_batch_tokens:
            most *= 2
        if most > found["default"]["largest_microbatch"]:
            found[f"microbatch {most}"] = step_times(args, f"--microbatch_tokens={most}")
    return found


def kernels(args) -> dict:
    import torch

    t, c, engine, stream = engine_of(args)
    loops, kinds = t.parse_layout(c.layout).loops, torch.profiler.ProfilerActivity
    engine.warm_up(stream, loops)
    activities = [kinds.CUDA, kinds.CPU] if args.device == "cuda" else [kinds.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        engine.step(stream, 0, loops, 0.0, 0.9)
        engine.sync()
    key = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    rows = sorted(profile.key_averages(), key=lambda row: -getattr(row, key))[:40]
    return {row.key[:100]: {"ms": getattr(row, key) / 1000, "calls": row.count} for row in rows}


def attention(args) -> dict:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import train_gpt as t

    c, _ = t.load_config([], {}, args.preset)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    n, width = (65536 if args.device == "cuda" else 256) // c.train_seq_len, c.model_dim // c.num_heads
    q, k, v = (
        torch.randn(n, heads, c.train_seq_len, width, device=args.device, dtype=dtype, requires_grad=True)
        for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    )
    sync, found = synchronizer(args.device), {}

    def both_ways():
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y.backward(y)

    found["torch's choice"] = 1000 * seconds_of(both_ways, sync)
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                found[name] = 1000 * seconds_of(both_ways, sync)
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0][:120]
    return {"milliseconds forward and backward": found}


def baseline(args) -> dict:
    return step_times(argparse.Namespace(**vars(args) | {"preset": "baseline" if args.device == "cuda" else "smoke"}))


def run(args) -> dict:
    """Trains, is stopped by a signal, goes on, exports; then the same artifact in float32 on the CPU."""
    import train_gpt as t

    c, _ = t.load_config([f"--preset={args.preset}"], {}, args.preset)
    kept = c.calib_seconds if t.calibrates(c) else 0.0
    common = [sys.executable, str(ROOT / "train_gpt.py"), f"--preset={args.preset}", f"--device={args.device}"]
    common += [*data_flags(args.preset), f"--val_max_tokens={64 * c.train_seq_len}"]
    train = [*common, f"--log_dir={args.out}", "--run_id=run", "--iterations=0", "--train_log_every=10"]
    train += [f"--max_wallclock_seconds={args.seconds + kept}", f"--lr_warmup_steps={min(c.lr_warmup_steps, 20)}"]
    folder = args.out / "run"
    if not (folder / "checkpoint.safetensors").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(train)
        log = folder / "train.log"
        while process.poll() is None and not (log.is_file() and b"\nstep:10/" in log.read_bytes()):
            time.sleep(0.2)
        time.sleep(args.seconds / 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 128 + signal.SIGTERM, "the stopped run did not say so"
    subprocess.run([*train, "--resume=1"], check=True)
    result = json.loads((folder / "result.json").read_text())
    scores = {}
    for device, dtype in ((args.device, c.dtype or "bfloat16"), ("cpu", "float32")):
        ask = [*common[:3], "--mode=eval", f"--artifact={folder / 'model.int6.rgpt'}", f"--device={device}"]
        ask += [*data_flags(args.preset), f"--dtype={dtype}", f"--val_max_tokens={8 * c.train_seq_len}", "--compile=0"]
        ask += ["--eval_stride=0"]  # at a stride of 64 these 16,384 tokens are 460,800, too many for a CPU
        said = subprocess.run(ask, check=True, capture_output=True, text=True).stdout
        scores[f"{device} {dtype}"] = float(said.split("val_bpb:")[1].split()[0])
    kept_keys = "steps tokens loops train_time_ms tok_s val_bpb_raw val_bpb bytes_total calib_time_ms peak_mem_bytes"
    return {key: result[key] for key in kept_keys.split()} | {"bpb_by_device": scores}


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
    with open(args.out / f"{name}.log", "w") as log:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="record", help="whose model is looked at")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "logs" / "gpu")))
    parser.add_argument("--seconds", type=float, default=70.0, help="of training in the stage `run`")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--budget", type=float, default=590.0, help="seconds of one call")
    parser.add_argument("--stage", choices=STAGES, help="this one only, in this process")
    args = parser.parse_args()
    args.given, args.out = [flag for flag in sys.argv[1:] if not flag.startswith("--stage")], args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage:
        found = globals()[args.stage](args)
        (args.out / f"{args.stage}.json").write_text(json.dumps(found, indent=1) + "\n")
        return 0
    places = [bool(os.environ.get(name)) for name in ("DATA_PATH", "TOKENIZER_PATH")]
    if sum(places) == 1:
        parser.error("expected DATA_PATH and TOKENIZER_PATH, or neither, found one of them")
    began, env, failed = time.monotonic(), unpack_wheels(args.out), 0
    todo = {name: limit for name, limit in STAGES.items() if not (args.out / f"{name}.json").is_file()}
    for name in STAGES:
        path, left = args.out / f"{name}.json", args.budget - (time.monotonic() - began)
        kept = todo.pop(name, 0)
        if path.is_file():
            how = "done before"
        else:
            limit = min(left, max(kept, left - sum(todo.values())))
            how = run_stage(name, args, env, limit) if left > 5 else "left for the next call"
        failed += not path.is_file()
        print(f"== {name}: {how}, {time.monotonic() - began:.0f} s", flush=True)
        shown = path if path.is_file() else args.out / f"{name}.log"
        print(shown.read_text()[-3000:] if shown.is_file() else "", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
