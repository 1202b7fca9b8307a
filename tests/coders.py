"""Time the artifact's coder on one core, beside general compressors on the same integers.

    python tests/coders.py                       a Gaussian model of the record's kind, 36 M weights
    python tests/coders.py logs/RUN/model.safetensors --preset=demo    the weights of a run

Both quantizers; `trellis` with made-up inputs and curvatures, spread by about an octave, at about three bits a weight.
Overhead: bytes above the order-0 entropy of each matrix's integers, steps included; that of `trellis` is negative, for
its coder knows how wide each integer is spread. To encode includes to round. The general compressors get the integers
of `absmax`, a byte each; brotli and zstandard are shown where they are installed (`pip install brotli zstandard`).
Without a file also a whole artifact of the record preset with TARGET_BYTES: how near, in how many rounds and seconds.
"""

import bz2
import dataclasses
import importlib.util
import lzma
import os
import platform
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as script

# The record preset with 3 more blocks of coda has 36 M weights in its matrices.
GAUSSIAN = ["--preset=record", "--target_bytes=0", "--layout=3+3x3+6"]


def gaussian_weights(c: script.Config) -> dict[str, np.ndarray]:
    """Rows of Gaussian weights whose standard deviations differ by 20 %, as after training."""
    rng, weights = np.random.default_rng(0), script.initial_weights(c)
    for name, value in weights.items():
        if not script.is_vector(name):
            scale = 0.05 * np.exp(0.2 * rng.standard_normal((value.shape[0], *[1] * (value.ndim - 1))))
            weights[name] = (scale * rng.standard_normal(value.shape)).astype(np.float32)
    return weights


def made_up_curvature(weights: dict[str, np.ndarray]) -> script.Curvature:
    """Of inputs that depend on each other and of rows and columns that matter more or less."""
    rng, hessians, squares = np.random.default_rng(1), {}, {}
    for name, value in weights.items():
        n, m = value.size // value.shape[-1], value.shape[-1]
        diagonal = np.exp2(2 * rng.standard_normal(m))
        if script.param_group(name) == "matrix":
            x = rng.standard_normal((4096, m), dtype=np.float32) * np.sqrt(diagonal, dtype=np.float32)
            mixed = x + x[:, rng.permutation(m)]
            hessians[name] = (mixed.T @ mixed / len(x)).astype(np.float32)
            diagonal = np.diag(hessians[name])
        rows = np.exp2(2 * rng.standard_normal(n))[:, None]
        squares[name] = (rows * diagonal).astype(np.float32).reshape(value.shape)
    return script.Curvature(hessians, squares, 0)


def compressors() -> Iterator[tuple]:
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


def line(name: str, size: float, entropy: float, first: float, second: float) -> None:
    print(f"{name:12} {size:12,.0f} {100 * (size / entropy - 1):8.2f}% {first:7.1f}s {second:7.1f}s", flush=True)


def entropy_bits(symbols: np.ndarray) -> float:
    """Order 0, of all integers together."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float((counts * np.log2(counts.sum() / counts)).sum())


def time_quantizer(c: script.Config, weights: dict[str, np.ndarray], seen: script.Curvature) -> dict:
    """Prints one line, in processor seconds; returns the tables."""
    began = time.process_time()
    factors = {name: script.gptq_factor(hessian) for name, hessian in seen.hessians.items()}
    curvatures = [np.median(part) for part in seen.squares.values()]
    width = 0.6 * float(np.median([value.std() for value in weights.values()]) * np.sqrt(np.median(curvatures)))
    tables = script.make_tables(c, weights, width, factors, seen.squares)
    ans = script.constriction.stream.stack.AnsCoder()
    for table in reversed(tables.values()):
        writer, trellis = script.Writer(), script.calibrates(c)
        script.code_table(writer, script.facts_of(table, trellis), table, trellis)
        writer.finish(ans)
    middle, size = time.process_time(), ans.num_valid_bits() / 8
    for table in tables.values():
        found = script.Table(*(np.zeros_like(part) for part in table))
        script.code_table(script.Reader(ans), np.zeros(script.FACTS), found, script.calibrates(c))
        assert np.array_equal(found.symbols, table.symbols)
    entropy = sum(entropy_bits(table.symbols) for table in tables.values()) / 8
    line(f"ours {c.quantizer}", size, entropy, middle - began, time.process_time() - middle)
    return tables


def time_record(weights: dict[str, np.ndarray], seen: script.Curvature) -> None:
    """A whole artifact, with the search for TARGET_BYTES."""
    c, _ = script.load_config(["--preset=record"], {}, script.DEFAULT_PRESET)
    shapes = script.param_shapes(c)
    weights = {name: value for name, value in weights.items() if name in shapes}
    seen = script.Curvature(*({k: v for k, v in part.items() if k in shapes} for part in seen[:2]), 0)
    code, began = script.code_size(c.count_code), time.perf_counter()
    made = script.export_model(c, weights, script.parse_layout(c.layout).loops, seen, code)
    total, target = code + made.size, c.target_bytes
    print(f"record preset, TARGET_BYTES={target}: {total} bytes with the code ({100 * total / target:.2f} %), "
          f"{made.rounds} rounds, {time.perf_counter() - began:.0f} s")  # fmt: skip


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
    seen = made_up_curvature(weights)
    matrices = {name: value for name, value in weights.items() if not script.is_vector(name)}
    curvature = script.Curvature(seen.hessians, {name: seen.squares[name] for name in matrices}, 0)
    count = sum(value.size for value in matrices.values())
    print(f"{files[0] if files else 'Gaussian weights'}: {count:,} weights in {len(matrices)} matrices")
    print(f"{platform.machine()} {script.cpu_name()}, one thread, numpy {np.__version__}")
    print(f"{'coder':12} {'bytes':>12} {'overhead':>9} {'encode':>8} {'decode':>8}")
    time_quantizer(dataclasses.replace(c, quantizer="trellis", target_bytes=0), matrices, curvature)
    plain = dataclasses.replace(c, quantizer="absmax", target_bytes=0, quant_loss=0.0)
    tables = time_quantizer(plain, matrices, script.Curvature({}, curvature.squares, 0))
    data = b"".join(table.symbols.astype(np.int8).tobytes() for table in tables.values())
    entropy = sum(entropy_bits(table.symbols) for table in tables.values()) / 8
    for name, compress, decompress in compressors():
        began = time.perf_counter()
        packed = compress(data)
        middle = time.perf_counter()
        assert decompress(packed) == data
        line(name, len(packed), entropy, middle - began, time.perf_counter() - middle)
    if not files:
        time_record(weights, seen)


if __name__ == "__main__":
    main()
