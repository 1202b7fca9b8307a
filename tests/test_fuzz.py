"""Damaged artifacts, at random: reading gives an error of one line or the right tensors, never a crash, a hang, a huge
allocation or other weights. More than half of the files are signed again, so that their checksum is right.

    python -m pytest tests/test_fuzz.py --fuzz=10000       so many files instead of some hundreds
    python tests/test_fuzz.py 4711 1                       only the file of this number, without limits

The files are read in a process of its own, whose memory and time are limited: a failed allocation inside the coder ends
the process, and the test then names the file.
"""

import copy
import itertools
import json
import math
import random
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME, SHAPE, SCHEME, SIZE, CRC = range(5)  # of an entry in the header
SECONDS, MEBIBYTES = 5, 200  # of processor time that one file may take; 200 MiB in all


def bases(module, folder):
    """Whole artifacts to begin from, as (header, payload, tensors): both coders, all kinds of tensors and of bits."""
    import numpy as np

    found = []
    for codec, more in (
        ("ans", dict(quant_bits="core:7,embed:8,lora:8,*:6", lora_rank=2, loop_gate="gain")),
        ("ans", dict(quant_bits="embed:16,attn:3,*:5", quantizer="sigma")),
        ("lzma", dict(quant_bits="prelude:16,*:6", lora_rank=2)),
        ("ans", dict(quant_bits="coda:16,*:6", lora_rank=2, quantizer="fisher", quant_loss=100.0)),
        ("lzma", dict(quantizer="fisher", quant_loss=1.0)),
        ("ans", dict(quantizer="fisher", quant_loss=10.0)),  # with spreads of rows
    ):
        c = module.Config(
            layout="1+2x2+1", vocab_size=48, model_dim=32, num_heads=4, num_kv_heads=2, train_seq_len=16, codec=codec,
            **more,
        )  # fmt: skip
        rng, path = np.random.default_rng(0), folder / "base.rgpt"
        weights = {k: rng.standard_normal(s).astype(np.float32) for k, s in module.param_shapes(c).items()}
        squares = {k: np.exp2(rng.uniform(-3, 3, v.shape)).astype(np.float32) for k, v in weights.items()}
        if c.quant_loss == 10:
            squares = {k: np.ones_like(v) for k, v in weights.items()}
            weights = {k: v * np.exp2(rng.uniform(-3, 3, v.shape[:-1] + (1,))).astype("f4") for k, v in weights.items()}
        module.write_artifact(path, c, 2, weights, squares=squares)
        content = path.read_bytes()
        size = struct.unpack_from("<4sII", content)[2]
        header = json.loads(zlib.decompress(content[12 : 12 + size]))
        found.append((header, content[12 + size : -32], module.read_artifact(path)[2], content))
    (header, payload, *_), start, spreads = found[-1], 0, 0
    for entry in header["tensors"]:
        spreads += entry[SCHEME] == "grid" and module.GRID_HEAD.unpack_from(payload, start)[4] > 0
        start += entry[SIZE]
    assert spreads, "no tensor has spreads of its rows"
    return found


def signed(module, header, payload):
    """A file whose lengths and checksum are right, whatever its header says (bytes: as they are)."""
    head = header if isinstance(header, bytes) else zlib.compress(json.dumps(header).encode(), 1)
    body = struct.pack("<4sII", b"RGPT", module.ARTIFACT_VERSION, len(head)) + head + payload
    return body + module.hashlib.sha256(body).digest()


def damaged(rng, data, low=0, high=None):
    """`data` with bits flipped, or a part cut, repeated, moved, overwritten or swapped, between these places."""
    data, high = bytearray(data), len(data) if high is None else high
    a, b = sorted(rng.randrange(low, high + 1) for _ in range(2))
    b = min(b, a + rng.choice([1, 2, 4, 32, 1 << 30]))
    kind = rng.choice(["flip", "flip", "bytes", "cut", "repeat", "swap", "end", "zero"])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 2, 16])):
            data[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        data[a:b] = rng.randbytes(b - a)
    elif kind == "cut":
        del data[a:b]
    elif kind == "repeat":
        data[a:a] = data[a:b] * rng.choice([1, 1, 3])
    elif kind == "swap":
        c, d = sorted(rng.randrange(low, high + 1) for _ in range(2))
        if b <= c:
            data = data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]
    elif kind == "end":
        del data[a:]
    else:
        data[a:b] = bytes(b - a)
    return bytes(data)


def other_value(rng, header, value):
    """Something to put where `value` was: near it, of another kind, huge, or from elsewhere in the header."""
    near = [value + 1, value - 1, -value, value * 2, value ^ (1 << rng.randrange(32))] if type(value) is int else []
    huge = [2**31 - 1, 2**31, 2**32, 2**40, 2**63, 2**64, 2**70, -(2**63), 10**100, 1e308, math.inf, math.nan]
    kinds = [0, 1, -1, 0.5, "", "1", "int6", "grid", "x" * 1000, None, True, [], [[]], {}, {"a": 1}]
    entry = copy.deepcopy(rng.choice(header["tensors"]))  # a list in itself would have no end
    return rng.choice([*near, *near, rng.choice(huge), rng.choice(kinds), rng.choice(entry), rng.randrange(-9, 99)])


def changed_header(rng, header):
    """One value anywhere in the header, or an entry, is another, missing, doubled or swapped."""
    header = json.loads(json.dumps(header))
    spots = [(header, key) for key in header] + [(header["model"], key) for key in header["model"]] * 2
    for entry in header["tensors"]:
        spots += [(entry, i) for i in range(5)] + [(entry[SHAPE], i) for i in range(len(entry[SHAPE]))]
    for _ in range(rng.choice([1, 1, 1, 2])):
        holder, key = rng.choice(spots)
        kind = rng.choice(["set", "set", "set", "set", "delete", "entries"])
        if kind == "entries" and isinstance(header.get("tensors"), list) and len(header["tensors"]) > 2:
            i, j = (rng.randrange(len(header["tensors"])) for _ in range(2))
            entries = header["tensors"]
            what = rng.choice(["swap", "double", "drop", "tail"])
            if what == "swap":
                entries[i], entries[j] = entries[j], entries[i]
            elif what == "double":
                entries.insert(i, entries[j])
            elif what == "drop":
                del entries[i]
            else:
                entries[i], entries[j] = entries[i][:2] + entries[j][2:], entries[j][:2] + entries[i][2:]
        elif kind == "delete":
            if key in holder if isinstance(holder, dict) else key < len(holder):
                del holder[key]
        elif isinstance(holder, dict) or key < len(holder):
            value = holder.get(key) if isinstance(holder, dict) else holder[key]
            holder[key] = other_value(rng, header, value) if isinstance(header.get("tensors"), list) else None
        if not isinstance(header.get("tensors"), list):
            break
    return header


def other_model(rng, module, header):
    """A header for a model of other sizes, whose entries agree with it: what asks for memory, last of all."""
    header = json.loads(json.dumps(header))
    field = rng.choice(["vocab_size", "model_dim", "mlp_mult", "lora_rank", "num_heads", "layout", "train_seq_len"])
    sizes = [1, 3, 64, 2**10, 2**16, 2**18, 2**20, 2**22, 2**26, 2**31, 2**40]
    layout = rng.choice(["4", "2x2", "1+2x3+1", "1+1x2+2", "2+2x2", "900", "1x999", "1+2x2"])
    header["model"][field] = layout if field == "layout" else rng.choice(sizes)
    header["loops"] = 1
    try:
        quantizer = rng.choice(["absmax", "fisher"])
        c = module.Config(**header["model"], quant_bits=rng.choice(["*:3", "*:6", "*:16"]), quantizer=quantizer)
        shapes = module.param_shapes(c)
        sizes = {name: (tensor[SIZE], tensor[CRC]) for tensor in header["tensors"] for name in [tensor[NAME]]}
        header["tensors"] = [
            [name, list(shape), module.scheme_of(c, name, shape), *sizes.get(name, (1, 0))]
            for name, shape in shapes.items()
        ]
    except (ValueError, ArithmeticError):
        pass  # only the setting is another
    return header


def shifted_bounds(rng, header):
    """Where one tensor ends and the next begins is another place."""
    header = json.loads(json.dumps(header))
    i = rng.randrange(len(header["tensors"]) - 1)
    by = rng.choice([1, -1, 2, 4, -4, 2**31, header["tensors"][i + 1][SIZE], -header["tensors"][i][SIZE]])
    header["tensors"][i][SIZE] += by
    header["tensors"][i + 1][SIZE] -= by
    return header


def swapped_tensors(rng, header, payload):
    """Two tensors change places in the payload, with scheme, bytes and CRC-32 of their entries."""
    header = json.loads(json.dumps(header))
    ends = [0]
    for entry in header["tensors"]:
        ends.append(ends[-1] + entry[SIZE])
    parts = [payload[a:b] for a, b in zip(ends, ends[1:])]
    i = rng.randrange(len(parts))
    alike = [j for j, entry in enumerate(header["tensors"]) if entry[SHAPE] == header["tensors"][i][SHAPE]]
    j = rng.choice(alike if rng.random() < 0.8 else range(len(parts)))
    a, b = header["tensors"][i], header["tensors"][j]
    a[SCHEME:], b[SCHEME:], parts[i], parts[j] = b[SCHEME:], a[SCHEME:], parts[j], parts[i]
    return header, b"".join(parts)


def changed_coder(rng, header, payload):
    """One tensor's model: the length of its steps, the lowest symbol, the alphabet or the frequencies of a part."""
    start = 0
    entries = [entry for entry in header["tensors"] if entry[SCHEME].startswith("int")]
    chosen = rng.choice(entries)
    for entry in header["tensors"]:
        if entry is chosen:
            break
        start += entry[SIZE]
    end, payload = start + chosen[SIZE], bytearray(payload)
    length = struct.unpack_from("<I", payload, start)[0]
    part = start + 4 + rng.choice([0, length])
    low, size = struct.unpack_from("<hH", payload, part)
    what = rng.choice(["length", "low", "size", "frequency", "frequency", "all", "rotate"])
    if what == "length":
        struct.pack_into("<I", payload, start, rng.choice([0, 3, length - 1, length + 1, 2 * length, 2**31, 2**32 - 1]))
    elif what == "low":
        low = rng.choice([low + 1, low - 1, -low, -(2**15), 2**15 - 1, rng.randrange(-900, 900)])
        struct.pack_into("<h", payload, part, low)
    elif what == "size":
        size = rng.choice([0, 1, max(size - 1, 0), size + 1, 256, 257, 2**16 - 1])
        struct.pack_into("<H", payload, part + 2, size)
    elif what == "frequency" and size:
        at = part + 4 + 2 * rng.randrange(size)
        struct.pack_into("<H", payload, min(at, end - 2), rng.choice([0, 1, 2, 2**16 - 1, rng.randrange(2**16)]))
    elif what == "all":
        for at in range(part + 4, min(part + 4 + 2 * size, end - 1), 2):
            struct.pack_into("<H", payload, at, rng.choice([0, 1, 2**16 - 1, rng.randrange(2**16)]))
    else:
        middle = min(part + 4 + 2 * size, end)
        payload[part + 4 : middle] = payload[part + 6 : middle] + payload[part + 4 : part + 6]
    return bytes(payload)


def changed_grid(rng, module, header, payload):
    """Of one tensor with steps of rows and columns: how its symbols are spread, the lengths, or steps and spreads of
    rows, coded anew."""
    import numpy as np

    header, start = json.loads(json.dumps(header)), 0
    chosen = rng.choice([entry for entry in header["tensors"] if entry[SCHEME] == "grid"])
    for entry in header["tensors"]:
        if entry is chosen:
            break
        start += entry[SIZE]
    end, head, i = start + chosen[SIZE], module.GRID_HEAD, rng.randrange(3)
    scale, shape, *lengths = head.unpack_from(payload, start)
    bounds = [*itertools.accumulate([start + head.size, *lengths]), end]
    parts = [payload[a:b] for a, b in zip(bounds, bounds[1:])]
    what, by = rng.choice(["scale", "shape", "lengths", "steps", "all", "all", "swap"]), rng.choice([1, -1, 8])
    if what == "scale":
        scale = rng.choice([scale + by, -scale, -(2**15), 2**15 - 1, rng.randrange(-700, 700)])
    elif what == "shape":
        shape = rng.choice([0, 1, 2, 3, 4, 5, 255])
    elif what == "lengths":
        length = rng.choice([0, 3, lengths[i] + by, lengths[i] + 4 * by, 2 * lengths[i], 2**31, 2**32 - 1])
        lengths[(i + 1) % 3] += rng.choice([0, lengths[i] - length])  # or all that follows lies elsewhere
        lengths[i] = length
    elif what == "swap":
        parts[:2] = parts[1::-1]
    else:
        count, limit = chosen[SHAPE][-1], module.GRID_LIMITS[i]
        count = count if i == 1 else math.prod(chosen[SHAPE][:-1])
        steps = module.decode_symbols(parts[i], count, header["codec"]) if parts[i] else np.zeros(count, np.int16)
        if what == "all":  # the symbols are spread as before, so they are the right ones; the weights are not
            steps, scale = steps + np.int16(by), scale + (by if i < 2 else -by)
        else:
            others = [rng.randrange(-limit, limit + 1) for _ in range(count)]
            few = [step if rng.random() < 0.9 else other for step, other in zip(steps.tolist(), others)]
            beyond = rng.choice([1, -1]) * (limit + 1)
            steps = rng.choice([few, few, others, [beyond] * count, few + few[:1], few[1:] or [0, 0]])
        parts[i] = module.encode_symbols(np.array(steps, np.int16), header["codec"])
        lengths[i] = len(parts[i])
    data = head.pack(scale, shape, *(length % 2**32 for length in lengths)) + b"".join(parts)
    chosen[SIZE] = len(data)
    return header, payload[:start] + data + payload[end:]


def mutation(module, originals, number):
    """(what was done, whether the checksum is right, the tensors of the original, the file)."""
    rng = random.Random(number)
    header, payload, tensors, content = rng.choice(originals)
    kind = rng.choice("""file file packed_header payload payload value value value model model bounds coder coder coder
        swap""".split())
    if kind == "file":
        return kind, False, tensors, damaged(rng, content)
    if kind == "packed_header":
        packed = zlib.compress(json.dumps(header).encode(), 9)
        return kind, True, tensors, signed(module, damaged(rng, packed), payload)
    if kind == "swap":
        return kind, True, tensors, signed(module, *swapped_tensors(rng, header, payload))
    if kind == "coder" and any(entry[SCHEME] == "grid" for entry in header["tensors"]):
        return "grid", True, tensors, signed(module, *changed_grid(rng, module, header, payload))
    if kind in ("payload", "coder"):
        payload = damaged(rng, payload) if kind == "payload" else changed_coder(rng, header, payload)
    if kind == "model" and rng.random() < 0.5:  # so large that the parts behind it are there, too
        payload = payload * rng.choice([1, 4])
    header = {
        "value": lambda: changed_header(rng, header), "model": lambda: other_model(rng, module, header),
        "bounds": lambda: shifted_bounds(rng, header),
    }.get(kind, lambda: header)()  # fmt: skip
    return kind, True, tensors, signed(module, header, payload)


def in_status(word):
    """Kibibytes from /proc/self/status; 0 where there is none."""
    try:
        return next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith(word))
    except OSError:
        return 0


def read_all(first, count, limited):
    """The process that reads: a line with the number before each file, then a line of JSON with what was seen."""
    import resource
    import signal

    sys.path.insert(0, str(ROOT))
    import numpy as np

    import train_gpt as module

    def late(number, frame):
        raise TimeoutError(f"took longer than {SECONDS} s")

    decoded, decode = [0], module.decode_tensor

    def counted(*args):
        value = decode(*args)
        decoded[0] += 1
        return value

    module.decode_tensor = counted
    wrong, said, seen = [], {}, dict(signed=0, read=0, refused=0, reached=0)
    with tempfile.TemporaryDirectory() as folder:
        path, originals = Path(folder) / "bad.rgpt", bases(module, Path(folder))
        before = in_status("VmHWM")
        if limited and before:
            limit = 1024 * in_status("VmSize") + (1 << 30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGPROF, late)
        for number in range(first, first + count):
            print(number, flush=True)
            kind, is_signed, tensors, content = mutation(module, originals, number)
            path.write_bytes(content)
            decoded[0], problem = 0, ""
            signal.setitimer(signal.ITIMER_PROF, SECONDS if limited else 0)
            try:
                found = module.read_artifact(path)[2]
                seen["read"] += 1
                if found.keys() != tensors.keys() or any(not np.array_equal(found[k], tensors[k]) for k in tensors):
                    problem = "other weights, read without an error"
            except module.InputError as error:
                seen["refused"] += 1
                line = str(error)
                problem = "" if str(path) in line and "\n" not in line else f"a message such as {line[:200]!r}"
                if "allocate" in line or "unreadable ()" in line:  # as MemoryError says it
                    problem = f"refused only since memory is limited: {line[:200]}"
                said[kind] = line[len(str(path)) :][:100]
            except BaseException as error:
                problem = f"{type(error).__name__}: {str(error)[:200]}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            seen["signed"] += is_signed
            seen["reached"] += decoded[0] > 0
            if problem:
                wrong.append(f"file {number} ({kind}): {problem}")
        seen["mebibytes"] = (in_status("VmHWM") - before) // 1024
    print(json.dumps(seen | {"wrong": wrong[:20], "said": said}))


def test_fuzz(request):
    count = int(request.config.getoption("--fuzz"))
    done = subprocess.run(
        [sys.executable, __file__, "0", str(count), "limited"], capture_output=True, text=True, timeout=120 + count / 10
    )
    last = (done.stdout.splitlines() or ["none"])[-1]
    assert done.returncode == 0, f"the process ended at file {last}: {done.stderr[-2000:]}"
    seen = json.loads(last)
    assert not seen["wrong"], "\n".join(seen["wrong"])
    assert seen["read"] + seen["refused"] == count and seen["refused"] > count / 2, seen
    assert seen["signed"] >= count / 2, seen  # their checksum stops nothing
    assert seen["reached"] >= count / 3, seen  # so far that at least one tensor was decoded
    assert seen["mebibytes"] <= MEBIBYTES, seen


if __name__ == "__main__":
    read_all(int(sys.argv[1]), int(sys.argv[2]), "limited" in sys.argv)
