"""The artifact and the checkpoints: exact round trips, both scripts read both, and every damage is one clear line."""

import dataclasses
import json
import math
import os
import random
import re
import resource
import stat
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import (
    ROOT,
    SCRIPTS,
    TINY,
    assert_refused,
    from_file,
    load_script,
    quicker_script,
    random_weights,
    run_in_process,
    script_or_skip,
    tree,
    within,
)

RICH = dict(layout="1+2x2+1", lora_rank=3, pass_vectors=True, loop_gate="gain")  # every kind of tensor there is
TRELLIS = dict(quantizer="trellis", quant_loss=0.5)


def curvature_of(module, weights):
    """Made up: of every weight another, over six octaves."""
    rng = np.random.default_rng(1)
    squares = {k: np.exp2(rng.uniform(-3, 3, v.shape)).astype(np.float32) for k, v in weights.items()}
    return module.Curvature({}, squares, 1)


def write(module, path, c, weights=None, loops=0):
    """An artifact of random weights, trained with all passes."""
    weights = weights or random_weights(module, c)
    loops = loops or module.parse_layout(c.layout).loops
    made = module.export_model(c, weights, loops, curvature_of(module, weights))
    path.write_bytes(made.data)
    return made


@pytest.fixture(scope="module")
def sound(any_script, config, tmp_path_factory):
    """The bytes of a small valid artifact of each quantizer."""
    path = tmp_path_factory.mktemp("sound") / "a.rgpt"
    cases = {"absmax": {}, "trellis": TRELLIS}
    return {name: write(any_script, path, config(any_script, **RICH, **more)).data for name, more in cases.items()}


@pytest.fixture
def artifact(sound, tmp_path):
    """A small valid artifact."""
    path = tmp_path / "model.int6.rgpt"
    path.write_bytes(sound["absmax"])
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Round trip
# ---------------------------------------------------------------------------------------------------------------------


def check_round_trip(module, c, weights, path):
    """Writes and reads; every value is within the error of its quantizer."""
    made = write(module, path, c, weights)
    found = module.read_artifact(path)
    assert found.loops == module.parse_layout(c.layout).loops and found.quantizer == c.quantizer
    assert found.model == {field: getattr(c, field) for field in module.MODEL_FIELDS}
    assert made.size == len(made.data)
    assert {name: value.shape for name, value in found.weights.items()} == module.param_shapes(c)
    assert found.bits.keys() == found.weights.keys() and made.size - sum(found.bits.values()) / 8 < 400
    for name, value in found.weights.items():
        weight, group = weights[name], module.param_group(name)
        assert value.dtype == np.float32 and np.isfinite(value).all(), name
        if module.calibrates(c):
            squares = curvature_of(module, weights).squares[name]
            width = module.width_of(c.quant_loss, module.count_params(c))
            cost = (squares * np.square(value.astype(np.float64) - weight)).mean()
            assert cost <= 1.5 * width**2 / 12 * 2**2, name  # the steps of a row and a column are of their means
            continue
        top = {"matrix": 31, "lora": 127, "embed": 127}.get(group, 2047)
        rows, back = weight.reshape(-1, weight.shape[-1]), value.reshape(-1, weight.shape[-1])
        largest = np.abs(rows).max(axis=1, keepdims=True).astype(np.float64)
        assert (np.abs(rows - back) <= 0.5001 * 2**0.25 * largest / top + 1e-30).all(), name
        assert (np.abs(back).max(axis=1) <= 1.02 * largest[:, 0]).all() and (back * rows >= 0).all(), name
    return found.weights


@pytest.mark.parametrize(
    "fields",
    [
        {},
        TRELLIS,
        RICH,
        RICH | TRELLIS,
        {"layout": "4", "loop_schedule": "", "skips": "none", "num_heads": 1},
        {"layout": "4", "loop_schedule": "", "vocab_size": 1, "model_dim": 2, "num_heads": 1} | TRELLIS,
        {"vocab_size": 513, "mlp_mult": 3, "model_dim": 48} | TRELLIS,  # more than two trellises and a row
        {"skips": "official", "layout": "1+3x2"},
    ],
    ids=lambda fields: ",".join(map(str, fields.values())) or "tiny",
)
def test_round_trip(any_script, config, tmp_path, fields):
    c = config(any_script, **fields)
    path = tmp_path / "a.rgpt"
    check_round_trip(any_script, c, random_weights(any_script, c), path)
    first = path.read_bytes()
    write(any_script, path, c)
    assert path.read_bytes() == first  # nothing of time, place or chance in it


@pytest.mark.parametrize("fields", [{}, TRELLIS], ids=["absmax", "trellis"])
def test_initial_and_extreme_weights(any_script, config, tmp_path, fields):
    """Rows of zeros, constants, one large value, values beyond float16, tiny values: none becomes nan or infinite."""
    c, path = config(any_script, **RICH, **fields), tmp_path / "a.rgpt"
    with np.errstate(all="raise", under="ignore"):
        write(any_script, path, c, any_script.initial_weights(c))
        found = any_script.read_artifact(path).weights
        assert not found["blocks.0.attn.proj.weight"].any()
        for name in ("blocks.0.attn_scale", "blocks.0.resid_mix", "skip_weights"):
            assert np.allclose(found[name], any_script.initial_weights(c)[name], atol=1e-2), name
        weights = random_weights(any_script, c)
        weights["skip_weights"][0, :4] = 1e5, -1e9, 1e29, 7e4
        weights["blocks.0.attn_scale"][:2] = 1e6, -1e6
        weights["blocks.1.attn_scale"][:] = 1e29
        weights["tok_emb.weight"][:3] = np.array([[1e8], [0.0], [1e-7]])
        weights["tok_emb.weight"][4, 0] = 1e4
        weights["blocks.1.mlp.fc.weight"][:3] = np.array([[-1e8], [0.0], [1e-30]])
        write(any_script, path, c, weights)
        found = any_script.read_artifact(path).weights
    for name, value in found.items():
        assert np.isfinite(value).all(), name
    assert found["skip_weights"][0, 2] == pytest.approx(1e29, rel=1e-3)
    assert found["blocks.1.attn_scale"] == pytest.approx(1e29, rel=1e-2)
    assert not found["tok_emb.weight"][1].any() and found["tok_emb.weight"][0] == pytest.approx(1e8, rel=0.01)
    assert found["tok_emb.weight"][4, 0] == pytest.approx(1e4, rel=0.01)
    assert found["blocks.1.mlp.fc.weight"][0] == pytest.approx(-1e8, rel=0.05)
    assert not found["blocks.1.mlp.fc.weight"][1].any()
    assert np.abs(found["blocks.1.mlp.fc.weight"][2] - 1e-30).max() <= 1e-30


@pytest.mark.parametrize("fields", [{}, TRELLIS], ids=["absmax", "trellis"])
def test_scripts_write_the_same_bytes_and_read_each_other(both, config, tmp_path, fields):
    contents, found = [], []
    for module in both:
        path = tmp_path / module.__name__
        write(module, path, config(module, **RICH, **fields))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    for module in both:
        found.append(module.read_artifact(tmp_path / both[0].__name__))
    assert found[0].model == found[1].model and found[0].bits == found[1].bits
    assert all(np.array_equal(found[0].weights[name], found[1].weights[name]) for name in found[0].weights)


def test_the_stream_is_the_same_on_every_machine(any_script, config, tmp_path):
    """CRC-32 of a file of made-up integers, which depends on the coder and its models only. Files of another machine
    could not be read if it changed: a change needs another ARTIFACT_VERSION."""
    ans = any_script.constriction.stream.stack.AnsCoder()
    for i, shape in enumerate(((300, 20), (1, 50), (2, 9))):
        n, m = shape
        numbers = (np.arange(n * m) * 7919 % 23 - 11).reshape(shape).astype(np.int16)
        rows, columns = np.arange(n) % 5 - 8, np.arange(m) % 7
        table = any_script.Table(*(part.astype(np.int16) for part in (rows, columns, 3 * (i > 0) * rows)), numbers)
        writer = any_script.Writer()
        any_script.code_table(writer, any_script.facts_of(table, i < 2), table, i < 2)
        writer.finish(ans)
    assert zlib.crc32(ans.get_compressed().astype("<u4").tobytes()) == 1130283349


def test_checkpoints_are_read_by_both(both, config, tmp_path):
    for a in both:
        c = config(a, **RICH)
        weights, path = random_weights(a, c), tmp_path / f"{a.__name__}.safetensors"
        a.save_tensors(path, {f"weights.{k}": v for k, v in weights.items()}, a.about(c, 2))
        for b in both:
            found, model, loops = b.load_model_file(str(path))
            assert loops == 2 and model["layout"] == c.layout
            assert all(np.array_equal(found[name], weights[name]) for name in weights)


def test_model_of_long_sequences(any_script, config, tmp_path):
    """Settings of this machine, or defaults of what an artifact does not state, keep no valid file from being read."""
    c = config(any_script, train_seq_len=2**18, train_batch_tokens=2**18)
    assert c.calib_tokens < c.train_seq_len
    check_round_trip(any_script, c, random_weights(any_script, c), tmp_path / "a.rgpt")


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def refusal(module, path):
    """The one line with which an artifact is refused; fails if it is read or something else is raised."""
    with within(30), pytest.raises(module.InputError) as caught:
        module.read_artifact(path)
    line = str(caught.value)
    assert str(path) in line and "\n" not in line, line
    return line


def test_flipped_bytes(script, artifact):
    good, rng = artifact.read_bytes(), random.Random(0)
    places = [*range(16), *range(len(good) - 32, len(good)), *(rng.randrange(len(good)) for _ in range(120))]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        artifact.write_bytes(bad)
        refusal(script, artifact)
    artifact.write_bytes(good)
    script.read_artifact(artifact)


def test_truncated_and_lengthened(script, artifact):
    good, rng = artifact.read_bytes(), random.Random(1)
    for length in [*range(50), *(rng.randrange(len(good)) for _ in range(100)), *range(len(good) - 40, len(good))]:
        artifact.write_bytes(good[:length])
        refusal(script, artifact)
    for more in (b"\0", b"\0" * 32, good):
        artifact.write_bytes(good + more)
        refusal(script, artifact)


def test_other_files(script, tmp_path, data):
    for name, content, found in (
        ("empty.rgpt", b"", "found 0 bytes"),
        ("zip.rgpt", b"PK\x03\x04" * 50, "magic"),
        ("text.rgpt", b"some text " * 50, "magic"),
        ("zeros.rgpt", bytes(10_000), "magic"),
        ("shard.rgpt", (data.path / "fineweb_val_000000.bin").read_bytes(), "magic"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert found in refusal(script, path)
        assert_refused(
            run_in_process(script, "--mode=eval", f"--artifact={path}"), re.escape(str(path)), "expected", "found"
        )


def parts(content):
    """(header, code) of an artifact."""
    size = struct.unpack_from("<4sII", content)[2]
    return json.loads(zlib.decompress(content[12 : 12 + size])), content[12 + size : -32]


def signed(module, header, payload, version=None, magic=b"RGPT"):
    """An artifact whose length and checksum are right, whatever its header says."""
    head = header if isinstance(header, bytes) else zlib.compress(json.dumps(header).encode())
    body = (
        struct.pack("<4sII", magic, module.ARTIFACT_VERSION if version is None else version, len(head)) + head + payload
    )
    return body + module.hashlib.sha256(body).digest()


def set_at(*path, to):
    """A change of a header: header[path[0]][path[1]]... = to."""

    def change(header):
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = to

    return change


def without(*path):
    def change(header):
        for key in path[:-1]:
            header = header[key]
        del header[path[-1]]

    return change


CHANGES = {
    "loops 0": set_at("loops", to=0),
    "loops 3": set_at("loops", to=3),
    "loops text": set_at("loops", to="many"),
    "loops infinite": set_at("loops", to=math.inf),
    "loops nan": set_at("loops", to=math.nan),
    "loops list": set_at("loops", to=[2]),
    "loops missing": without("loops"),
    "model missing": without("model"),
    "model null": set_at("model", to=None),
    "model list": set_at("model", to=[]),
    "layout": set_at("model", "layout", to="1+2x3+1"),
    "layout word": set_at("model", "layout", to="deep"),
    "layout number": set_at("model", "layout", to=4),
    "dim": set_at("model", "model_dim", to=64),
    "dim text": set_at("model", "model_dim", to="32"),
    "dim 0": set_at("model", "model_dim", to=0),
    "heads": set_at("model", "num_heads", to=3),
    "heads true": set_at("model", "num_heads", to=True),
    "vocabulary": set_at("model", "vocab_size", to=321),
    "skips": set_at("model", "skips", to="unet"),
    "gate": set_at("model", "loop_gate", to="none"),
    "lora": set_at("model", "lora_rank", to=4),
    "lora negative": set_at("model", "lora_rank", to=-1),
    "model field missing": without("model", "num_heads"),
    "quantizer": set_at("quantizer", to="trellis"),
    "quantizer unknown": set_at("quantizer", to="fisher"),
    "quantizer null": set_at("quantizer", to=None),
    "quantizer list": set_at("quantizer", to=["absmax"]),
    "quantizer missing": without("quantizer"),
    "crc": set_at("crc", to=0),
    "crc text": set_at("crc", to="0"),
    "crc null": set_at("crc", to=None),
    "crc missing": without("crc"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_signed_header_with_another_meaning(script, artifact, case):
    header, payload = parts(artifact.read_bytes())
    CHANGES[case](header)
    artifact.write_bytes(signed(script, header, payload))
    refusal(script, artifact)


def test_signed_files_of_another_structure(script, artifact):
    content = artifact.read_bytes()
    header, code = parts(content)
    artifact.write_bytes(signed(script, header, code))
    script.read_artifact(artifact)  # the helper itself signs well
    for other in (script.ARTIFACT_VERSION - 1, script.ARTIFACT_VERSION + 1):
        artifact.write_bytes(signed(script, header, code, version=other))
        assert f"expected version {script.ARTIFACT_VERSION}, found {other}" in refusal(script, artifact)
    artifact.write_bytes(signed(script, header, code, magic=b"RGPU"))
    assert "expected magic b'RGPT', found b'RGPU'" in refusal(script, artifact)
    deep = b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for head in (
        b"",
        b"{}",
        b"[]",
        b"null",
        b"1",
        b'"RGPT"',
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        deep,
        b'{"quantizer":"absmax"}',
    ):
        for packed in (head, zlib.compress(head), zlib.compress(head)[:-1], zlib.compress(head) + b"\0"):
            artifact.write_bytes(signed(script, packed, code))
            refusal(script, artifact)
    right = zlib.compress(json.dumps(header).encode())
    for packed in (right[:-1], right + b"\0", right + right, right[:40], json.dumps(header).encode()):
        artifact.write_bytes(signed(script, packed, code))
        refusal(script, artifact)
    for other in (b"", b"\1\0\0\0" + code, code[:-1], code[:-4], code + b"\0", code + b"\0\0\0\1", code[1:], code[4:]):
        artifact.write_bytes(signed(script, header, other))
        refusal(script, artifact)
    for size in (0, 1, len(content), 2**31, 2**32 - 1):  # a length of the header that is wrong
        body = content[:8] + struct.pack("<I", size) + content[12:-32]
        artifact.write_bytes(body + script.hashlib.sha256(body).digest())
        refusal(script, artifact)


@pytest.mark.parametrize("quantizer", ["absmax", "trellis"])
def test_signed_code_that_is_damaged(any_script, sound, tmp_path, quantizer):
    """A checksum is no proof: code that is cut or overwritten is refused, or read as the right numbers."""
    path = tmp_path / "a.rgpt"
    header, code = parts(sound[quantizer])
    rng = random.Random(2)
    for _ in range(60):
        bad = bytearray(code)
        for _ in range(rng.choice([1, 4, 64])):
            place = rng.randrange(len(bad))
            bad[place] = bad[place] ^ rng.randrange(1, 256)
        path.write_bytes(signed(any_script, header, bytes(bad)))
        refusal(any_script, path)
    for length in range(0, len(code) - 4, len(code) // 16 // 4 * 4):
        path.write_bytes(signed(any_script, header, code[:length]))
        refusal(any_script, path)


def forged(module, c, path, change):
    """An artifact of all zeros in which `change` has altered tables and facts, with a right CRC-32 and checksum."""
    tables, ans = {}, module.constriction.stream.stack.AnsCoder()
    for name, shape in module.param_shapes(c).items():
        n, m = math.prod(shape[:-1]), shape[-1]
        tables[name] = module.Table(*(np.zeros(size, np.int16) for size in (n, m, n, (n, m))))
    facts = {name: module.facts_of(table, module.calibrates(c)) for name, table in tables.items()}
    change(tables, facts)
    for name, table in reversed(tables.items()):
        writer = module.Writer()
        module.code_table(writer, facts[name], table, module.calibrates(c))
        writer.finish(ans)
    header = {"model": {field: getattr(c, field) for field in module.MODEL_FIELDS}, "loops": 1, "crc": 0}
    header |= {"quantizer": c.quantizer, "crc": module.checksum(tables)}
    path.write_bytes(signed(module, header, ans.get_compressed().astype("<u4").tobytes()))


def test_signed_code_with_other_numbers(any_script, config, tmp_path, recwarn):
    """What no writer writes is refused, or is finite, even where every checksum is right: steps that are infinite,
    models that do not exist."""
    c, path, name = config(any_script, **TRELLIS), tmp_path / "a.rgpt", "blocks.0.attn.q.weight"
    forged(any_script, c, path, lambda tables, facts: None)
    assert not any(value.any() for value in any_script.read_artifact(path).weights.values())

    def steps(tables, facts):
        tables[name].rows[:], tables[name].columns[:], tables[name].symbols[:] = 480, 480, 2
        facts[name] = any_script.facts_of(tables[name], True)

    forged(any_script, c, path, steps)
    assert "not finite" in refusal(any_script, path)
    assert not recwarn.list
    real = any_script.spread_coder
    for place, value in ((1, 5), (1, -1), (3, 61), (3, -25), (4, 5), (6, 61), (10, -1)):

        def model(tables, facts, place=place, value=value):
            facts[name][place] = value

        with pytest.MonkeyPatch.context() as patch:
            legal = lambda spread, shape, odd: real(min(max(spread, -24), 60), min(max(shape, 0), 4), odd)  # noqa: E731
            patch.setattr(any_script, "spread_coder", legal)
            forged(any_script, c, path, model)
        assert "spread" in refusal(any_script, path)


BOMB_READER = """
import json, resource, signal, sys, time
import {name} as module
def used():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
limit = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
def late(number, frame):
    raise TimeoutError
signal.signal(signal.SIGALRM, late)
for path in sys.argv[1:]:
    began, memory = time.time(), used()
    signal.alarm(2)
    try:
        module.load_model_file(path)
        said = "read"
    except module.InputError as error:
        said = "refused: " + str(error)
    except BaseException as error:
        said = type(error).__name__ + ": " + str(error)[:200]
    signal.alarm(0)
    print(json.dumps([path, said, time.time() - began, (used() - memory) / 1024]), flush=True)
"""


def bombs(module, c, folder):
    """Small, signed files whose header asks for a huge model."""
    folder.mkdir()
    deep = zlib.compress(b" " * (1 << 28), 1)
    for quantizer in ("absmax", "trellis"):
        base = folder / "base"
        write(module, base, dataclasses.replace(c, quantizer=quantizer), loops=1)
        header, code = parts(base.read_bytes())
        base.unlink()
        for name, fields in {
            "dim": dict(model_dim=2**34),
            "dim and hidden": dict(model_dim=2**21, mlp_mult=2**21),
            "lora": dict(layout="1+2x2+1", lora_rank=2**40),
            "heads": dict(model_dim=2**40 + 2),
            "vocabulary": dict(vocab_size=2**40),
            "dim of a gigabyte": dict(model_dim=2**20),
            "lora of a gigabyte": dict(layout="1+2x2+1", lora_rank=2**20),
            "blocks": dict(layout="1000000000"),
            "passes": dict(layout="1+2x1000000000+1"),
            "odd dim": dict(model_dim=2**40 + 1),
            "sequence": dict(train_seq_len=10**13),
            "many blocks": dict(layout="1000", model_dim=256, num_heads=1, num_kv_heads=1),
        }.items():
            changed = header | {"model": header["model"] | fields}
            (folder / f"{quantizer} {name}").write_bytes(signed(module, changed, code))
        (folder / f"{quantizer} header").write_bytes(signed(module, deep, code))
    return sorted(folder.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory in use from /proc")
def test_allocation_bombs(config, tmp_path):
    """A few kilobytes that ask for terabytes: refused within a second, in a process whose memory is limited, because an
    allocation that fails inside the coder ends it. The reader is shared: the script that starts faster reads."""
    name = quicker_script()
    module = script_or_skip(name)
    paths = bombs(module, config(module), tmp_path / "bombs")
    assert len(paths) == 26
    code = BOMB_READER.format(name=name)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    rows = {row[0]: row[1:] for row in map(json.loads, done.stdout.splitlines())}
    wrong = {}
    for path in paths:
        said, seconds, mebibytes = rows.get(str(path), ("the process ended: " + done.stderr[:100], 0, 0))
        for_want_of_memory = "allocate" in said or "unreadable ()" in said
        if not said.startswith("refused") or for_want_of_memory or seconds > 1 or mebibytes > 200:
            wrong[path.name] = f"{said[:120]} ({seconds:.1f} s, {mebibytes:.0f} MiB)"
    assert not wrong, "\n".join(f"{k}: {v}" for k, v in wrong.items())
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 << 20


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def test_bad_checkpoints(script, config, tiny, tmp_path):
    c = config(script)
    good_path = tmp_path / "good.safetensors"
    tensors = {f"weights.{k}": v for k, v in random_weights(script, c).items()}
    about = script.about(c, 2)
    script.save_tensors(good_path, tensors, about)
    good = good_path.read_bytes()
    script.load_model_file(str(good_path))
    path, rng = tmp_path / "bad.safetensors", random.Random(3)

    def check():
        for flags in ((f"--init_from={path}",), ("--mode=eval", f"--checkpoint={path}")):
            outcome = run_in_process(script, *flags, **tiny)
            assert_refused(outcome, re.escape(str(path)), "expected", "found")

    for length in (0, 3, 8, 100, len(good) // 2, len(good) - 1, *(rng.randrange(len(good)) for _ in range(20))):
        path.write_bytes(good[:length])
        with pytest.raises(script.InputError, match="bad.safetensors"):
            script.load_model_file(str(path))
    check()
    for content in (b"PK\x03\x04" * 1000, bytes(1000), b"\xff" * 1000, b"text " * 1000):
        path.write_bytes(content)
        check()
    path.write_bytes(script.pack_tensors({"a": np.zeros(3, np.float32)}))
    check()
    for note in ("{}", "[]", "null", "{", '{"model": 1}', '{"model": {}}', '{"model": {"layout": "4"}, "loops": 1}'):
        path.write_bytes(script.pack_tensors(tensors, metadata={"recurrent_gpt": note}))
        check()
    notes = (
        about | {"loops": None},
        about | {"loops": "x"},
        about | {"loops": -1},
        about | {"loops": 10**9},
        {k: v for k, v in about.items() if k != "loops"},
        about | {"model": about["model"] | {"model_dim": "32"}},
        about | {"model": about["model"] | {"layout": "5"}},
        about | {"model": about["model"] | {"layout": "1000000000"}},
        about | {"model": about["model"] | {"train_seq_len": 10**13}},
    )
    for note in notes:
        script.save_tensors(path, tensors, note)
        with within(30):
            check()
    for change in (
        {k: v for k, v in tensors.items() if "mlp" not in k},
        tensors | {"weights.more": np.zeros(2, np.float32)},
        tensors | {"weights.tok_emb.weight": np.zeros((320, 31), np.float32)},
        {},
    ):
        script.save_tensors(path, change, about)
        check()


def test_checkpoint_that_is_not_finite_is_refused(script, config, tiny, tmp_path):
    """A flipped bit in a checkpoint has no checksum to tell, but a weight that is no number is seen."""
    c, path = config(script), tmp_path / "bad.safetensors"
    weights = random_weights(script, c)
    weights["tok_emb.weight"][3, 3] = np.nan
    script.save_tensors(path, {f"weights.{k}": v for k, v in weights.items()}, script.about(c, 2))
    outcome = run_in_process(script, f"--init_from={path}", **tiny)
    assert outcome.code == 1 and not list(tmp_path.rglob("*.rgpt")), outcome


# ---------------------------------------------------------------------------------------------------------------------
# From a run to a score
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The run folder of a trained tiny model of each script that there is: {name: folder}."""
    logs, folders = tmp_path_factory.mktemp("trained"), {}
    for name in SCRIPTS:
        module = load_script(name)
        if not isinstance(module, str):
            env = TINY | data.env | {"LOG_DIR": str(logs), "RUN_ID": name, "ITERATIONS": "4"}
            outcome = run_in_process(module, **env)
            assert outcome.code == 0, outcome
            folders[name] = logs / name
    return folders


def only_notices(text):
    return all(line.startswith("notice: ") for line in text.splitlines())


def scored(outcome):
    """(loss, bpb) of MODE=eval."""
    assert outcome.code == 0 and only_notices(outcome.err), outcome
    loss, bpb = re.search(r"val_loss:([\d.]+) val_bpb:([\d.]+)", outcome.out).groups()
    return float(loss), float(bpb)


@pytest.mark.parametrize("maker", SCRIPTS)
def test_eval_of_every_file_in_both_scripts(script, maker, trained, data):
    """MODE=eval repeats the score of the run from the artifact, and the score before export from a checkpoint."""
    script_or_skip(maker)
    result = json.loads((trained[maker] / "result.json").read_text())
    for flag, key in (
        ("--artifact=model.int6.rgpt", ""),
        ("--checkpoint=model.safetensors", "_raw"),
        ("--checkpoint=checkpoint.safetensors", "_raw"),
    ):
        flag = flag.replace("=", f"={trained[maker]}/")
        loss, bpb = scored(
            run_in_process(script, "--mode=eval", flag, "--device=cpu", "--dtype=float32", "--compile=0", **data.env)
        )
        assert loss == pytest.approx(result[f"val_loss{key}"], abs=1e-4)
        assert bpb == pytest.approx(result[f"val_bpb{key}"], abs=1e-3)
    assert result["val_bpb"] != result["val_bpb_raw"]  # the file was scored, not the weights in memory


def test_eval_with_other_settings(script, trained, data):
    """More passes and a stride change the score; settings that do not fit the file's model are refused."""
    flags = (
        "--mode=eval",
        f"--artifact={trained[script.__name__]}/model.int6.rgpt",
        "--device=cpu",
        "--dtype=float32",
        "--compile=0",
    )
    plain = scored(run_in_process(script, *flags, **data.env))
    others = [scored(run_in_process(script, *flags, m, **data.env)) for m in ("--eval_loops=1", "--eval_stride=8")]
    assert plain not in others
    listed = run_in_process(script, *flags, "--eval_loops=1,0,4", **data.env).out.splitlines()
    assert [re.search(r"loops:(\d+)", line)[1] for line in listed] == ["1", "2", "4"]
    scores = [re.search(r"val_bpb:([\d.]+)", line)[1] for line in listed]
    assert len(set(scores)) == 3 and [float(score) for score in scores[:2]] == [others[0][1], plain[1]]
    outcome = run_in_process(
        script, *flags, "--val_max_tokens=320", **data.env | {"TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "32"}
    )
    assert scored(outcome) and "partial" in outcome.out
    for more, name in (
        ("--eval_stride=512", "EVAL_STRIDE"),
        ("--eval_stride=64", "EVAL_STRIDE"),
    ):  # the model's sequence is 32
        assert_refused(run_in_process(script, *flags, more, **data.env), name, "32", "found")
    small = {"TRAIN_SEQ_LEN": "16", "TRAIN_BATCH_TOKENS": "16", "VAL_MAX_TOKENS": "16"}
    assert_refused(run_in_process(script, *flags, **data.env | small), "VAL_MAX_TOKENS", "32", "found 16")
    outcome = run_in_process(script, *flags, "--model_dim=64", "--skips=per_loop", "--layout=9", **data.env)
    assert scored(outcome) == plain  # the file's model, and a line that says so
    said = [line for line in outcome.err.splitlines() if "as the file says" in line]
    asked = ("LAYOUT=1+2x2+1, as the file says, not 9", "MODEL_DIM=32, as the file says, not 64")
    assert said == [f"notice: {text}" for text in asked], outcome.err
    places = (f"--data_path={data.path}/none", f"--tokenizer_path={data.tokenizer}")
    outcome = run_in_process(script, *flags, *places)
    assert outcome.code == 1 and outcome.out == "" and only_notices(outcome.err.rsplit("error: ")[0]), outcome
    assert re.search(r"error: .*/none: expected fineweb_val_\*\.bin, found none; .*\n$", outcome.err)


@pytest.mark.parametrize("maker", SCRIPTS)
def test_sample_from_every_file_in_both_scripts(script, maker, trained, data):
    script_or_skip(maker)
    texts, start = [], ("--mode=sample", "--prompt=The early", "--device=cpu", "--dtype=float32", "--sample_tokens=16")
    for flag in ("--checkpoint=checkpoint.safetensors", "--checkpoint=model.safetensors", "--artifact=model.int6.rgpt"):
        flags = (*start, flag.replace("=", f"={trained[maker]}/"))
        outcome = run_in_process(script, *flags, **data.env)
        assert outcome.code == 0 and only_notices(outcome.err) and outcome.out.startswith("The early"), outcome
        assert len(outcome.out) > 15
        texts.append(outcome.out)
    assert texts[0] == texts[1] and run_in_process(script, *flags, **data.env) == outcome  # the seed decides
    assert run_in_process(script, *flags, "--seed=2", **data.env) != outcome
    greedy = [run_in_process(script, *flags, "--temperature=0", f"--seed={seed}", **data.env) for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    no_prompt = run_in_process(script, *flags, "--prompt=", **data.env)
    assert no_prompt.code == 0 and only_notices(no_prompt.err)


def test_cap(script, trained, tiny, tmp_path):
    """PASS and FAIL by one byte, in result.json, in the log and in the exit code; hopeless sizes are refused first."""
    result = json.loads((trained[script.__name__] / "result.json").read_text())
    code, size = result["bytes_code"], result["bytes_artifact"]
    assert code == (ROOT / f"{script.__name__}.py").stat().st_size
    assert size == (trained[script.__name__] / "model.int6.rgpt").stat().st_size
    assert result["bytes_total"] == code + size and result["bytes_cap"] == 16_000_000 and result["fits"] is True
    for cap, fits in ((code + size, True), (code + size - 1, False)):
        outcome = run_in_process(script, f"--bytes_cap={cap}", f"--run_id=cap{cap}", "--iterations=4", **tiny)
        folder = tmp_path / "logs" / f"cap{cap}"
        found, log = json.loads((folder / "result.json").read_text()), (folder / "train.log").read_text()
        assert found["bytes_total"] == code + size, "the same run, another size"
        assert (found["fits"], found["bytes_cap"], outcome.code) == (fits, cap, 0 if fits else 1)
        assert re.search(rf"^size: .*{cap}: {'PASS' if fits else 'FAIL'}", log.rsplit("---", 1)[1], re.M)
        assert bool(re.search("PASS", log.rsplit("---", 1)[1])) == fits
    before = tree(tmp_path)
    assert_refused(run_in_process(script, f"--bytes_cap={code + size // 2}", **tiny), "BYTES_CAP", "expected", "found")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_modes_of_the_umask(any_script, tiny, tmp_path, mask):
    before = os.umask(mask)
    try:
        assert run_in_process(any_script, "--iterations=1", "--run_id=a", **tiny).code == 0
    finally:
        os.umask(before)
    files = list((tmp_path / "logs/a").iterdir())
    assert len(files) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}, files


def test_packed_script_runs_and_counts_its_own_bytes(script, tiny, tmp_path):
    """What is counted is what is shipped: the packed file, run from anywhere, is this script."""
    path = tmp_path / "elsewhere" / "train_gpt.py"
    path.parent.mkdir()
    path.write_bytes(script.packed(script.script_source()))
    assert (
        path.stat().st_size == script.code_size("packed") < 0.5 * script.code_size("1") and script.code_size("0") == 0
    )
    shipped = from_file(path)
    assert run_in_process(shipped, "--help").out == script.help_text() + "\n"  # test_submit.py starts Python for it
    outcome = run_in_process(shipped, **tiny | {"COUNT_CODE": "packed", "RUN_ID": "packed", "ITERATIONS": "1"})
    assert outcome.code == 0, outcome
    result = json.loads((tmp_path / "logs/packed/result.json").read_text())
    assert result["bytes_code"] == path.stat().st_size and result["script_sha256"] == script.source_sha256()
