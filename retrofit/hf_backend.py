"""MLX as the tools of hf.py use it: a fast BLAS, no compiler on a Linux CPU, and how much memory there is."""

import contextlib
import ctypes
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "data") not in sys.path:
    sys.path.insert(1, str(ROOT / "data"))  # behind the folder of the tool that was started

OPENBLAS = False
if sys.platform == "linux":  # the BLAS of MLX's Linux package is 20 to 50 times slower; the one loaded first serves
    with contextlib.suppress(OSError):
        OPENBLAS = bool(ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL))

import mlx.core as mx  # noqa: E402
from tool import InputError  # noqa: E402

ON_CPU = mx.default_device() == mx.Device(mx.cpu)
if ON_CPU and sys.platform == "linux":
    mx.disable_compile()  # there it starts g++ for every kernel

GB = 1e9


def notices() -> list[str]:
    """What the user should know about this machine."""
    if ON_CPU and sys.platform == "linux" and not OPENBLAS:
        return [
            "notice: libopenblas.so.0 is missing, so matrix products are 20 to 50 times slower: "
            "apt install libopenblas0-pthread"
        ]
    return []


def command_line() -> str:
    """The command as logs keep it: a log is published, so an absolute path shows its last part only."""
    return " ".join(Path(part).name if Path(part).is_absolute() else part for part in ["hf.py", *sys.argv[1:]])


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype to compute in: half precision is 20 times slower on a CPU, so float32 there."""
    return mx.float32 if ON_CPU else stored


def available_memory() -> int | None:
    """Bytes that a model may use here; None where that is not known."""
    if not ON_CPU:
        return mx.device_info().get("max_recommended_working_set_size")
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return None


def require_memory(parts: dict[str, float], how_to_mend: str, held: float = 0.0) -> float:
    """The sum of an estimate in bytes. Raises InputError, with the estimate, if this machine has less.

    held: bytes of it that are in memory already, which a CPU's free memory does not count.
    """
    total = sum(parts.values())
    free = available_memory()
    if free is not None and ON_CPU:
        free += held
    if free is not None and total > free:
        listed = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())
        raise InputError(
            f"memory: expected about {total / GB:.2f} GB ({listed}), found {free / GB:.2f} GB free; {how_to_mend}"
        )
    return total
