"""Damaged artifacts, at random: reading gives an error of one line or the right tensors, never a crash, a hang, a huge
allocation or other weights. More than half of the files are signed again, so that their checksum is right.

    python -m pytest tests/test_fuzz.py --fuzz=10000       so many files instead of some hundreds
    python tests/test_fuzz.py 4711 1                       only the file of this number, without limits

The files are read in a process of its own, whose memory and time are limited: a failed allocation inside the coder ends
the process, and the test then names the file.
"""

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
SECONDS, MEBIBYTES = 5, 200  # of processor time that one file may take; 200 MiB in all


def bases(module):
    """Whole artifacts to begin from, as (config, header, code, tables, weights, content): all kinds of tensors, both
    quantizers."""
    import numpy as np

    found, made, make = [], [], module.make_tables
    module.make_tables = lambda *args: made.append(make(*args)) or made[-1]
    for more in (
        dict(layout="1+2x2+1", lora_rank=2, loop_gate="gain"),
        dict(vocab_size=300),
        dict(lora_rank=2, quantizer="trellis", quant_loss=100.0),
        dict(layout="1+1x2+1", quantizer="trellis", quant_loss=1.0),
        dict(quantizer="trellis", quant_loss=10.0, vocab_size=300),
    ):
        sizes = dict(vocab_size=48, model_dim=32, num_heads=4, num_kv_heads=2, train_seq_len=16)
        c, rng = module.Config(**dict(layout="2x2") | sizes | more), np.random.default_rng(0)
        weights = {k: rng.standard_normal(s).astype(np.float32) for k, s in module.param_shapes(c).items()}
        squares = {k: np.exp2(rng.uniform(-3, 3, v.shape)).astype(np.float32) for k, v in weights.items()}
        content = module.export_model(c, weights, 2, module.Curvature({}, squares, 1)).data
        size = struct.unpack_from("<4sII", content)[2]
        header, code = json.loads(zlib.decompress(content[12 : 12 + size])), content[12 + size : -32]
        read = {name: module.values_of(table, module.calibrates(c)) for name, table in made[-1].items()}
        facts = {name: module.facts_of(table, module.calibrates(c)) for name, table in made[-1].items()}
        found.append((c, header, code, (made[-1], facts), read, content))
    module.make_tables = make
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
    kinds = [0, 1, -1, 0.5, "", "1", "absmax", "trellis", "x" * 1000, None, True, [], [[]], {}, {"a": 1}]
    other = rng.choice([*header["model"].values()])
    return rng.choice([*near, *near, rng.choice(huge), rng.choice(kinds), other, rng.randrange(-9, 99)])


def changed_header(rng, header):
    """One or two values anywhere in the header are others, or missing; seldom those that decide nothing of the numbers,
    such as how a gate works, which no checksum can know."""
    header = json.loads(json.dumps(header))
    free = ("loop_gate", "train_seq_len", "skips", "loops", "layout")
    for _ in range(rng.choice([1, 1, 1, 2])):
        holder = rng.choice([header, header["model"], header["model"]])
        key = rng.choice([key for key in holder if key not in free or rng.random() < 0.2])
        if rng.random() < 0.2 and key != "model":
            del holder[key]
        elif key != "model" or rng.random() < 0.1:
            holder[key] = other_value(rng, header, holder[key])
        if not isinstance(header.get("model"), dict):
            break
    return header


def other_model(rng, header):
    """A header for a model of other sizes: what asks for memory, last of all."""
    header = json.loads(json.dumps(header))
    field = rng.choice(["vocab_size", "model_dim", "mlp_mult", "lora_rank", "num_heads", "layout", "train_seq_len"])
    sizes = [1, 3, 64, 2**10, 2**16, 2**18, 2**20, 2**22, 2**26, 2**31, 2**40]
    layout = rng.choice(["4", "2x2", "1+2x3+1", "1+1x2+2", "2+2x2", "900", "1x999", "1+2x2"])
    header["model"][field] = layout if field == "layout" else rng.choice(sizes)
    header["loops"] = 1
    return header


def coded(module, c, tables, facts):
    """The code of tables, with facts that may be others than a writer would state."""
    ans = module.constriction.stream.stack.AnsCoder()
    for name, table in reversed(tables.items()):
        writer, trellis = module.Writer(), module.calibrates(c)
        chosen = facts[name] if name in facts else module.facts_of(table, trellis)
        module.code_table(writer, chosen, table, trellis)
        writer.finish(ans)
    return ans.get_compressed().astype("<u4").tobytes()


def changed_tables(rng, module, c, header, tables):
    """Facts, steps, middles or integers of one tensor are others, or two of one shape changed places, coded as a writer
    would; the CRC-32 is the old one, or, one time of four, the new one of what could not be numbers."""
    tables, facts, header = dict(tables[0]), dict(tables[1]), dict(header)
    name = rng.choice(list(tables))
    table = module.Table(*(part.copy() for part in tables[name]))
    what = rng.choice(["facts", "facts", "steps", "middles", "symbols", "swap", "infinite"])
    if what == "facts":
        facts[name], place = facts[name].copy(), rng.randrange(11)
        facts[name][place] += rng.choice([1, -1, 2, 8, -30, 60])
    else:
        del facts[name]
    if what in ("steps", "middles"):
        part = table.middles if what == "middles" else rng.choice([table.rows, table.columns])
        part[rng.randrange(len(part))] += rng.choice([1, -1, 40])
    elif what == "symbols":
        table.symbols[rng.randrange(len(table.symbols)), rng.randrange(table.symbols.shape[1])] += rng.choice(
            [1, -1, 2]
        )
    elif what == "swap":
        other = rng.choice([key for key in tables if tables[key].symbols.shape == table.symbols.shape])
        tables[name], tables[other] = tables[other], tables[name]
        facts.pop(other, None)
        return header, coded(module, c, tables, facts)
    elif what == "infinite":
        table.rows[:], table.columns[:], table.symbols[:] = 480, 480, 3
        tables[name] = table
        header["crc"] = module.checksum(tables)
    tables[name] = table
    try:
        return header, coded(module, c, tables, facts)
    except (ValueError, KeyError, OverflowError):  # no model of a writer has such a number
        return header, b""


def mutation(module, originals, number):
    """(what was done, whether the checksum is right, the tensors of the original, the file)."""
    rng = random.Random(number)
    c, header, code, tables, weights, content = rng.choice(originals)
    kind = rng.choice("file file packed_header code code code value value model model tables tables tables".split())
    if kind == "file":
        return kind, False, weights, damaged(rng, content)
    if kind == "packed_header":
        packed = zlib.compress(json.dumps(header).encode(), 9)
        return kind, True, weights, signed(module, damaged(rng, packed), code)
    if kind == "tables":
        return kind, True, weights, signed(module, *changed_tables(rng, module, c, header, tables))
    if kind == "code":
        return kind, True, weights, signed(module, header, damaged(rng, code))
    if kind == "model" and rng.random() < 0.5:  # so large that the bytes behind it are there, too
        code = code * rng.choice([1, 4])
    header = changed_header(rng, header) if kind == "value" else other_model(rng, header)
    return kind, True, weights, signed(module, header, code)


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

    decoded, walk = [0], module.code_table

    def counted(*args):
        walk(*args)
        decoded[0] += 1

    wrong, said, seen = [], {}, dict(signed=0, read=0, refused=0, reached=0)
    with tempfile.TemporaryDirectory() as folder:
        path, originals = Path(folder) / "bad.rgpt", bases(module)
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
            module.code_table = counted
            signal.setitimer(signal.ITIMER_PROF, SECONDS if limited else 0)
            try:
                found = module.read_artifact(path).weights
                seen["read"] += 1
                if found.keys() != tensors.keys() or any(
                    not np.array_equal(found[k].ravel(), tensors[k].ravel()) for k in tensors
                ):
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
            module.code_table = walk
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
