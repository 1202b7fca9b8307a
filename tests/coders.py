"""Time the artifact's coder on one core, beside general compressors on the same integers.

    python tests/coders.py                       a Gaussian model of the record's kind, 36 M weights, 12.85 sigma
    python tests/coders.py logs/RUN/model.safetensors --preset=demo    the weights of a run, quantized with its settings

zlib, bz2 and lzma come with Python; brotli and zstandard are shown where they are installed (`pip install brotli
zstandard`). They get one byte an integer, all matrices one after the other. Overhead: bytes above the order-0 entropy
of each matrix's integers; ours include steps and histograms, and the time to encode includes that to quantize.

Without a file, also the same weights by QUANTIZER=gptq and fisher, with made-up inputs and curvatures; their
overhead is over the entropy of their own integers, which fisher undercuts: its coder knows how wide each is spread. And
a whole artifact of the record preset with TARGET_BYTES: how near, in how many rounds, in how many seconds.
"""

import bz2
import importlib.util
import lzma
import os
import platform
import sys
import tempfile
import time
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as script

# The record preset with 3 more blocks of coda has 36 M weights in its matrices.
GAUSSIAN = ["--preset=record", "--quantizer=sigma", "--target_bytes=0", "--layout=3+3x3+6"]


def gaussian_weights(c: script.Config) -> dict[str, np.ndarray]:
    """Rows of Gaussian weights whose standard deviations differ by 20 %, as after training."""
    rng, weights = np.random.default_rng(0), script.initial_weights(c)
    for name, value in weights.items():
        if script.param_group(name) != "scalar":
            scale = 0.05 * np.exp(0.2 * rng.standard_normal((value.shape[0], *[1] * (value.ndim - 1))))
            weights[name] = (scale * rng.standard_normal(value.shape)).astype(np.float32)
    return weights


def compressors():
    """(name, compress, decompress) of what is installed."""
    yield "zlib-9", lambda data: zlib.compress(data, 9), zlib.decompress
    yield "bz2-9", lambda data: bz2.compress(data, 9), bz2.decompress
    yield "lzma-9e", lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress
    if importlib.util.find_spec("zstandard"):
        import zstandard

        yield "zstd-22", zstandard.ZstdCompressor(level=22).compress, zstandard.ZstdDecompressor().decompress
    if importlib.util.find_spec("brotli"):
        import brotli

        yield "brotli-11", lambda data: brotli.compress(data, quality=11), brotli.decompress


def calibrated(c: script.Config, weights: dict[str, np.ndarray], names: list[str], line) -> None:
    """Times gptq and fisher (processor seconds). Curvatures of rows and columns are spread by about an octave."""
    gaussian = weights
    rng, c = np.random.default_rng(1), script.dataclasses.replace(c, quant_sigma=0.0)
    weights, hessians, squares = {name: weights[name] for name in names}, {}, {}
    for name, rows in weights.items():
        x = rng.standard_normal((4096, rows.shape[1]), dtype=np.float32) * np.exp2(rng.standard_normal(rows.shape[1]))
        mixed = x + x[:, rng.permutation(rows.shape[1])]
        hessians[name] = (mixed.T @ mixed / len(x)).astype(np.float32)
        squares[name] = np.exp2(2 * rng.standard_normal(len(rows)))[:, None] * np.diag(hessians[name])
    for quantizer in ("gptq", "fisher"):
        began = time.process_time()
        factors = {name: script.gptq_factor(hessian) for name, hessian in hessians.items()}
        wide = [rows.std() * np.sqrt(np.median(squares[name])) for name, rows in weights.items()]
        wide = script.SIGMA if quantizer == "gptq" else 0.6 * float(np.median(wide))
        config = script.dataclasses.replace(c, quantizer=quantizer)
        parts = script.encode_tensors(config, weights, wide, factors, squares)
        middle = time.process_time()
        for name, part in parts.items():
            script.decode_tensor(part.data, name, part.scheme, weights[name].shape, c.codec, part.check)
        reading, size = time.process_time() - middle, sum(len(part.data) for part in parts.values())
        line(quantizer, size, middle - began, reading, sum(part.entropy_bits for part in parts.values()) / 8)
    record, _ = script.load_config(["--preset=record"], {}, script.DEFAULT_PRESET)
    kept = {name: value for name, value in (gaussian | weights).items() if name in script.param_shapes(record)}
    code, began = script.code_size(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seen = [{name: part[name] for name in kept if name in part} for part in (hessians, squares)]
        sizes = script.write_artifact(Path(folder) / "a.rgpt", record, 1, kept, seen[0], code, seen[1])
    total, target = code + sizes["bytes_artifact"], record.target_bytes
    print(f"record preset, TARGET_BYTES={target}: {total} bytes with the code ({100 * total / target:.2f} %), "
          f"{sizes['rounds']} rounds, {time.perf_counter() - began:.0f} s")  # fmt: skip


def main() -> None:
    if "--help" in sys.argv:
        print(__doc__)
        return
    files = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    flags = [argument for argument in sys.argv[1:] if argument.startswith("--")] or GAUSSIAN
    c = script.load_config(flags, {}, script.DEFAULT_PRESET)[0]
    if files:
        weights, model, _ = script.load_model_file(files[0])
        c = script.model_config(c, model)
    else:
        weights = gaussian_weights(c)
    names = [name for name, shape in script.param_shapes(c).items() if script.scheme_of(c, name, shape)[:3] == "int"]
    began = time.perf_counter()
    coded = script.encode_tensors(c, {name: weights[name] for name in names}, script.sigma_of(c, 0), {}, {})
    encode, began = time.perf_counter() - began, time.perf_counter()
    for name, part in coded.items():
        script.decode_tensor(part.data, name, part.scheme, weights[name].shape, c.codec, part.check)
    decode = time.perf_counter() - began
    count = sum(part.weights for part in coded.values())
    entropy = sum(part.entropy_bits for part in coded.values()) / 8
    source = files[0] if files else "Gaussian weights"
    print(f"{source}: {count:,} weights in {len(names)} matrices, {c.quantizer} {c.quant_bits}")
    print(f"{platform.machine()} {script.cpu_name()}, one thread, numpy {np.__version__}")
    print(f"order-0 entropy {entropy:,.0f} bytes, {8 * entropy / count:.4f} bits a weight")
    print(f"{'coder':12} {'bytes':>12} {'overhead':>9} {'encode':>8} {'decode':>8}")

    def line(name: str, size: int, first: float, second: float, entropy: float = entropy) -> None:
        print(f"{name:12} {size:12,} {100 * (size / entropy - 1):8.2f}% {first:7.1f}s {second:7.1f}s", flush=True)

    line(f"ours ({c.codec})", sum(len(part.data) for part in coded.values()), encode, decode)
    if not files:
        calibrated(c, weights, names, line)
    parts = []
    for name in names:
        shape, top = weights[name].shape, script.largest_symbol(script.scheme_of(c, name, weights[name].shape))
        rows = weights[name].reshape(-1, shape[-1])
        wider = script.EMBED_SIGMA if script.param_group(name) == "embed" else 1.0
        sigma = 0.0 if c.quantizer == "absmax" else script.sigma_of(c, 0) * wider
        steps = script.step_sizes(script.row_exponents(rows, top, sigma))
        parts.append(script.quantize(rows[None], steps[None], top)[0].astype(np.int8).tobytes())
    data = b"".join(parts)
    for name, compress, decompress in compressors():
        began = time.perf_counter()
        packed = compress(data)
        middle = time.perf_counter()
        assert decompress(packed) == data
        line(name, len(packed), middle - began, time.perf_counter() - middle)


if __name__ == "__main__":
    main()
