"""The artifact and the checkpoints: exact round trips, both scripts read both, and every damage is one clear line."""

import json
import lzma
import math
import random
import re
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, assert_refused, random_weights, run_in_process, script_or_skip, tree, within

RICH = dict(layout="1+2x2+1", lora_rank=3, loop_gate="gain")  # every kind of tensor there is


def write(module, path, c, weights=None, loops=0):
    """An artifact of random weights, trained with all passes."""
    return module.write_artifact(
        path, c, loops or module.parse_layout(c.layout).loops, weights or random_weights(module, c)
    )


@pytest.fixture
def artifact(any_script, config, tmp_path):
    """A small valid artifact."""
    path = tmp_path / "model.int6.rgpt"
    write(any_script, path, config(any_script, **RICH))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Round trip
# ---------------------------------------------------------------------------------------------------------------------


def check_round_trip(module, c, weights, path):
    """Writes and reads; every value is within the error of its scheme."""
    sizes = write(module, path, c, weights)
    model, loops, found = module.read_artifact(path)
    assert loops == module.parse_layout(c.layout).loops and model == {
        field: getattr(c, field) for field in module.MODEL_FIELDS
    }
    assert sizes["bytes_artifact"] == path.stat().st_size
    assert {name: value.shape for name, value in found.items()} == module.param_shapes(c)
    for name, value in found.items():
        weight, scheme = weights[name], module.scheme_of(c, name, weights[name].shape)
        assert value.dtype == np.float32
        if scheme == "f32":
            assert np.array_equal(value, np.clip(weight, -65504, 65504)), name
        elif scheme == "f16":
            assert np.array_equal(value, np.clip(weight, -65504, 65504).astype(np.float16).astype(np.float32)), name
        else:
            top = 2 ** (int(scheme[3:]) - 1) - 1
            rows, back = weight.reshape(-1, weight.shape[-1]), value.reshape(-1, weight.shape[-1])
            absmax, wide = c.quantizer == "absmax", (c.quant_sigma or 12.85) * (20 / 12.85 if "emb" in name else 1)
            exact = np.abs(rows).max(axis=1) / top if absmax else wide * rows.std(axis=1) / top
            eighths = 8 * np.log2(np.maximum(exact, 1e-31))  # a step is 2 ** (a whole number / 8)
            rounded = np.clip(np.ceil(eighths - 1e-4) if absmax else np.rint(eighths), -800, None)
            step = np.broadcast_to((2.0 ** (rounded / 8))[:, None], rows.shape)
            inside = np.abs(rows) <= step * (top + 0.5)
            assert (np.abs(rows - back)[inside] <= step[inside] * 0.5001 + 1e-9).all(), name
            assert (np.abs(back) <= step * top * 1.0001).all(), name
            assert inside.all() if absmax else inside.mean() > 0.99, name
            clipped = np.sign(rows) * step * top
            assert np.allclose(back[~inside], clipped[~inside], rtol=1e-5), name
            assert np.abs(back / step - np.rint(back / step)).max() < 1e-3 and (exact > 0).any() == back.any(), name
            assert (np.sign(back) * np.sign(rows) >= 0).all(), name
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"codec": "lzma"},
        {"quant_bits": "embed:16,*:6"},
        {"quantizer": "sigma"},
        {"quantizer": "sigma", "quant_sigma": 9.5},
        {"quant_bits": "*:3"},
        {"quant_bits": "core:7,embed:5,*:4"},
        RICH,
        RICH | {"codec": "lzma", "quant_bits": "embed:16,lora:8,*:6"},
        {"layout": "4", "loop_schedule": "", "skips": "none"},
        {"skips": "unrolled", "layout": "1+3x2"},
    ],
    ids=lambda fields: ",".join(map(str, fields.values())) or "tiny",
)
def test_round_trip(script, config, tmp_path, fields):
    c = config(script, **fields)
    path = tmp_path / "a.rgpt"
    check_round_trip(script, c, random_weights(script, c), path)
    first = path.read_bytes()
    write(script, path, c)
    assert path.read_bytes() == first  # nothing of time, place or chance in it
    assert [p.name for p in tmp_path.iterdir()] == ["a.rgpt"]  # no temporary file stays


def test_initial_and_extreme_weights(script, config, tmp_path):
    """Rows of zeros, constants, one large value, values beyond float16, tiny values: none becomes nan or infinite."""
    c, path = config(script, **RICH), tmp_path / "a.rgpt"
    found = check_round_trip(script, c, script.initial_weights(c), path)
    assert not found["blocks.0.attn.proj.weight"].any()
    weights = random_weights(script, c)
    weights["skip_weights"][0, :4] = 1e5, -1e9, 3e38, 7e4
    weights["blocks.0.attn_scale"][:2] = 1e6, -1e6
    weights["tok_emb.weight"][:3] = np.array([[1e8], [0.0], [1e-7]])
    weights["tok_emb.weight"][4, 0] = 1e4
    weights["blocks.1.mlp.fc.weight"][:3] = np.array([[-1e8], [0.0], [1e-30]])
    for bits in (8, 16):
        write(script, path, config(script, **RICH, quant_bits=f"embed:{bits},lora:8,*:6"), weights)
        found = script.read_artifact(path)[2]
        for name, value in found.items():
            assert np.isfinite(value).all(), name
        assert found["skip_weights"][0, :4].tolist() == [65504, -65504, 65504, 65504]  # clipped, not infinite
        assert not found["tok_emb.weight"][1].any() and (found["tok_emb.weight"][0] > 0).all()
        assert found["tok_emb.weight"][4, 0] == pytest.approx(1e4, rel=0.01)
        assert (found["blocks.1.mlp.fc.weight"][0] < 0).all() and not found["blocks.1.mlp.fc.weight"][1].any()
        assert np.abs(found["blocks.1.mlp.fc.weight"][2] - 1e-30).max() < 4e-31  # half of the smallest step


def test_scripts_write_the_same_bytes_and_read_each_other(both, config, tmp_path):
    for codec in ("ans", "lzma"):
        contents, weights = [], []
        for module in both:
            path = tmp_path / f"{module.__name__}.{codec}"
            write(module, path, config(module, **RICH, codec=codec))
            contents.append(path.read_bytes())
        assert contents[0] == contents[1]
        for module in both:
            weights.append(module.read_artifact(tmp_path / f"{both[0].__name__}.{codec}"))
        assert weights[0][:2] == weights[1][:2]
        assert all(np.array_equal(weights[0][2][name], weights[1][2][name]) for name in weights[0][2])


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


def test_lzma_needs_no_constriction_and_ans_does(script, config, tmp_path, monkeypatch):
    for codec in ("ans", "lzma"):
        write(script, tmp_path / codec, config(script, codec=codec))
    find = script.importlib.util.find_spec
    monkeypatch.setattr(
        script.importlib.util, "find_spec", lambda name, *rest: None if name == "constriction" else find(name, *rest)
    )
    script.read_artifact(tmp_path / "lzma")
    assert_refused(
        run_in_process(script, "--mode=eval", f"--artifact={tmp_path / 'ans'}"),
        "constriction",
        "pip install constriction",
    )
    with pytest.raises(script.InputError, match="^CODEC=ans: expected the package constriction"):
        script.read_artifact(tmp_path / "ans")  # not "damaged"
    with pytest.raises(script.InputError, match="pip install constriction"):
        write(script, tmp_path / "new", config(script, codec="ans"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("quantizer", ["absmax", "sigma"])
@pytest.mark.parametrize(
    "fields",
    [
        dict(layout="3+3x3+3", model_dim=128, num_heads=4, num_kv_heads=2),
        dict(layout="4", model_dim=192, num_heads=4, mlp_mult=3),
        dict(layout="1+2x2+1", model_dim=128, num_heads=2, vocab_size=1024, lora_rank=4),
        dict(layout="2x2", model_dim=96, quant_bits="embed:16,*:6"),
        dict(layout="2x2", model_dim=128, quant_bits="core:7,*:8"),
    ],
    ids=lambda fields: fields["layout"],
)
def test_estimate_is_within_15_percent(any_script, config, tmp_path, fields, quantizer):
    c = config(any_script, **fields, quantizer=quantizer)
    rng = np.random.default_rng(0)
    weights = {
        k: (0.05 * rng.standard_normal(shape)).astype(np.float32) for k, shape in any_script.param_shapes(c).items()
    }
    sizes = write(any_script, tmp_path / "a", c, weights)
    assert any_script.estimated_bytes(c, 12.85) == pytest.approx(sizes["bytes_artifact"], rel=0.15)
    assert sizes["entropy_bits_per_weight"] < sizes["bits_per_weight"] < sizes["entropy_bits_per_weight"] + 1


def test_coder_comes_close_to_the_entropy(any_script):
    """A large matrix: within 2 % of the order-0 entropy of its symbols, and one symbol only costs almost nothing."""
    rng = np.random.default_rng(0)
    symbols = np.clip(np.rint(8 * rng.standard_normal((512, 1024))), -31, 31).astype(np.int16)
    counts = np.bincount((symbols + 31).ravel())
    entropy = float((counts * np.log2(counts.sum() / np.maximum(counts, 1))).sum()) / 8
    data = any_script.encode_symbols(symbols, "ans")
    assert entropy < len(data) < 1.02 * entropy
    assert np.array_equal(any_script.decode_symbols(data, symbols.size, "ans"), symbols.ravel())
    for constant in (-31, 0, 127):
        same = np.full((64, 1024), constant, dtype=np.int16)
        data = any_script.encode_symbols(same, "ans")
        assert len(data) < 64 and np.array_equal(any_script.decode_symbols(data, same.size, "ans"), same.ravel())


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
    places = [*range(16), *range(len(good) - 32, len(good)), *(rng.randrange(len(good)) for _ in range(250))]
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
    """(header, payload) of an artifact."""
    size = struct.unpack_from("<4sII", content)[2]
    return json.loads(zlib.decompress(content[12 : 12 + size])), content[12 + size : -32]


NAME, SHAPE, SCHEME, SIZE, CRC = range(5)  # of an entry in the header


def place(header, number):
    """(start, end) of a tensor in the payload."""
    sizes = [entry[SIZE] for entry in header["tensors"]]
    return sum(sizes[:number]), sum(sizes[: number + 1])


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


def swap_entries(header):
    header["tensors"][1], header["tensors"][2] = header["tensors"][2], header["tensors"][1]


CHANGES = {
    "shape": set_at("tensors", 1, SHAPE, to=[32, 33]),
    "shape transposed": set_at("tensors", 0, SHAPE, to=[32, 320]),
    "shape flat": set_at("tensors", 1, SHAPE, to=[1024]),
    "shape a word": set_at("tensors", 1, SHAPE, to="ab"),
    "shape null": set_at("tensors", 1, SHAPE, to=None),
    "shape negative": set_at("tensors", 1, SHAPE, to=[-32, -32]),
    "name": set_at("tensors", 1, NAME, to="blocks.0.attn.r.weight"),
    "name twice": set_at("tensors", 1, NAME, to="tok_emb.weight"),
    "name a path": set_at("tensors", 1, NAME, to="../../x"),
    "order": swap_entries,
    "tensor left out": lambda h: h["tensors"].pop(),
    "tensor doubled": lambda h: h["tensors"].append(h["tensors"][-1]),
    "no tensors": set_at("tensors", to=[]),
    "tensors null": set_at("tensors", to=None),
    "tensors a dict": set_at("tensors", to={}),
    "entry empty": set_at("tensors", 1, to=[]),
    "entry null": set_at("tensors", 1, to=None),
    "entry a text": set_at("tensors", 1, to="abcde"),
    "entry a dict": set_at("tensors", 1, to={"name": 1, "shape": 2, "scheme": 3, "bytes": 4, "crc": 5}),
    "entry too short": without("tensors", 1, CRC),
    "entry too long": lambda h: h["tensors"][1].append(0),
    "crc": set_at("tensors", 1, CRC, to=0),
    "crc of another": lambda h: set_at("tensors", 1, CRC, to=h["tensors"][2][CRC])(h),
    "crc negative": lambda h: set_at("tensors", 1, CRC, to=h["tensors"][1][CRC] - 2**32)(h),
    "crc text": lambda h: set_at("tensors", 1, CRC, to=str(h["tensors"][1][CRC]))(h),
    "crc null": set_at("tensors", 1, CRC, to=None),
    "crc of a vector": lambda h: set_at("tensors", 8, CRC, to=h["tensors"][8][CRC] ^ 1)(h),
    "all but the names and shapes swapped": lambda h: set_at(
        "tensors", 2, slice(SCHEME, None), to=h["tensors"][3][SCHEME:]
    )(h),
    "bytes": set_at("tensors", 1, SIZE, to=7),
    "bytes 0": set_at("tensors", 1, SIZE, to=0),
    "bytes negative": set_at("tensors", 1, SIZE, to=-7),
    "bytes far": set_at("tensors", 1, SIZE, to=2**70),
    "bytes a fraction": set_at("tensors", 1, SIZE, to=7.5),
    "bytes null": set_at("tensors", 1, SIZE, to=None),
    "bytes infinite": set_at("tensors", 1, SIZE, to=math.inf),
    "scheme too narrow": set_at("tensors", 1, SCHEME, to="int4"),
    "scheme of vectors": set_at("tensors", 1, SCHEME, to="f16"),
    "scheme of few numbers": set_at("tensors", 1, SCHEME, to="f32"),
    "scheme of a vector": set_at("tensors", 8, SCHEME, to="int8"),
    "scheme unknown": set_at("tensors", 1, SCHEME, to="int2"),
    "scheme a list": set_at("tensors", 1, SCHEME, to=["int6"]),
    "scheme null": set_at("tensors", 1, SCHEME, to=None),
    "codec": set_at("codec", to="lzma"),
    "codec unknown": set_at("codec", to="zstd"),
    "codec null": set_at("codec", to=None),
    "codec list": set_at("codec", to=["ans"]),
    "codec missing": without("codec"),
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
    "model field missing": without("model", "rope_base"),
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
    "softcap": set_at("model", "logit_softcap", to=1e9),
    "softcap nan": set_at("model", "logit_softcap", to=math.nan),
    "rope nan": set_at("model", "rope_base", to=math.nan),
    "rope infinite": set_at("model", "rope_base", to=math.inf),
    "rope 0": set_at("model", "rope_base", to=0),
}


@pytest.mark.parametrize("case", CHANGES)
def test_signed_header_with_another_meaning(script, artifact, case):
    header, payload = parts(artifact.read_bytes())
    CHANGES[case](header)
    artifact.write_bytes(signed(script, header, payload))
    refusal(script, artifact)


def test_signed_files_of_another_structure(script, artifact):
    content = artifact.read_bytes()
    header, payload = parts(content)
    artifact.write_bytes(signed(script, header, payload))
    script.read_artifact(artifact)  # the helper itself signs well
    for other in (4, 6):
        artifact.write_bytes(signed(script, header, payload, version=other))
        assert f"expected version 5, found {other}" in refusal(script, artifact)
    artifact.write_bytes(signed(script, header, payload, magic=b"RGPU"))
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
        b'{"codec":"ans"}',
    ):
        for packed in (head, zlib.compress(head), zlib.compress(head)[:-1], zlib.compress(head) + b"\0"):
            artifact.write_bytes(signed(script, packed, payload))
            refusal(script, artifact)
    right = zlib.compress(json.dumps(header).encode())
    for packed in (right[:-1], right + b"\0", right + right, right[:40], json.dumps(header).encode()):
        artifact.write_bytes(signed(script, packed, payload))
        refusal(script, artifact)
    for other in (b"", payload[:-1], payload + b"\0", payload[1:]):
        artifact.write_bytes(signed(script, header, other))
        refusal(script, artifact)
    for size in (0, 1, len(content), 2**31, 2**32 - 1):  # a length of the header that is wrong
        body = content[:8] + struct.pack("<I", size) + content[12:-32]
        artifact.write_bytes(body + script.hashlib.sha256(body).digest())
        refusal(script, artifact)


@pytest.mark.parametrize("codec", ["ans", "lzma"])
def test_signed_payload_with_damaged_symbols(script, config, tmp_path, codec):
    """A checksum is no proof: a coded tensor cut, emptied or overwritten is refused, or read as finite numbers."""
    path = tmp_path / "a.rgpt"
    write(script, path, config(script, codec=codec))
    header, payload = parts(path.read_bytes())
    rng, good = random.Random(2), script.read_artifact(path)[2]
    number = next(i for i, e in enumerate(header["tensors"]) if e[SCHEME] == "int6")
    start, end = place(header, number)
    read = 0
    for _ in range(60):
        bad = bytearray(payload)
        for _ in range(rng.choice([1, 4, 64])):
            bad[rng.randrange(start, end)] = rng.randrange(256)
        path.write_bytes(signed(script, header, bytes(bad)))
        with within(30):
            try:
                found = script.read_artifact(path)[2]
                assert all(np.array_equal(found[name], good[name]) for name in good)
                read += 1
            except script.InputError as error:
                assert str(path) in str(error) and "\n" not in str(error)
    assert read < 20
    exponents = 4 + struct.unpack_from("<I", payload, start)[0]
    for kept in (0, 2, 4, 6, exponents - 1, exponents, exponents + 3, exponents + 6, end - start - 60):
        changed = json.loads(json.dumps(header))
        changed["tensors"][number][SIZE] = kept
        path.write_bytes(signed(script, changed, payload[: start + kept] + payload[end:]))
        refusal(script, path)


@pytest.mark.parametrize("codec", ["ans", "lzma"])
def test_signed_payload_with_other_numbers(script, config, tmp_path, codec):
    """What no writer writes is refused even where every checksum, also the tensor's own, is right: steps that are
    infinite, integers beyond the scheme, floats that are not finite; and two tensors of one shape that were swapped
    with all that the header says of them."""
    path = tmp_path / "a.rgpt"
    write(script, path, config(script, codec=codec))
    header, payload = parts(path.read_bytes())
    names = [entry[NAME] for entry in header["tensors"]]

    def changed(number, scheme, data, numbers=b""):
        """Refusal of the file in which one tensor has this scheme and these bytes, with a right CRC-32."""
        new, (start, end) = json.loads(json.dumps(header)), place(header, number)
        name, shape = new["tensors"][number][:2]
        crc = zlib.crc32(numbers, zlib.crc32(f"{name} {tuple(shape)}".encode()))
        new["tensors"][number][SCHEME:] = [scheme, len(data), crc]
        path.write_bytes(signed(script, new, payload[:start] + data + payload[end:]))

    def integers(symbols, exponents):
        steps = script.encode_symbols(exponents, codec)
        data = struct.pack("<I", len(steps)) + steps + script.encode_symbols(symbols, codec)
        return data, exponents.astype("<i2").tobytes() + symbols.astype("<i2").tobytes()

    number = names.index("blocks.0.attn.q.weight")
    rows, columns = header["tensors"][number][SHAPE]
    good, steps = np.full((rows, columns), 31, np.int16), np.full(rows, -40, np.int16)
    changed(number, "int6", *integers(good, steps))
    value = script.read_artifact(path)[2]["blocks.0.attn.q.weight"]
    assert (value == 31 * 2.0**-5).all()  # the helper itself makes a right tensor
    for top, exponent in ((32, -40), (-32, -40), (127, -40), (31, 801), (31, 32767), (31, -32767), (0, 32767)):
        symbols, exponents = good.copy(), steps.copy()
        symbols[3, 5], exponents[7] = top, exponent
        changed(number, "int6", *integers(symbols, exponents))
        refusal(script, path)
    changed(number, "int6", *integers(good.ravel()[:-1], steps))
    refusal(script, path)
    changed(number, "int6", *integers(good, steps[:-1]))
    refusal(script, path)
    for place_of, kind, scheme in ((names.index("blocks.0.attn_scale"), "<f4", "f32"), (number, "<f2", "f16")):
        for bad in (np.nan, np.inf):
            values = np.ones(math.prod(header["tensors"][place_of][SHAPE]), kind)
            changed(place_of, scheme, values.tobytes(), values.tobytes())
            script.read_artifact(path)
            values[1] = bad
            changed(place_of, scheme, values.tobytes(), values.tobytes())
            refusal(script, path)
    one, two = names.index("blocks.0.attn.q.weight"), names.index("blocks.1.attn.q.weight")
    new, spans = json.loads(json.dumps(header)), [place(header, i) for i in range(len(names))]
    new["tensors"][one][SCHEME:], new["tensors"][two][SCHEME:] = (header["tensors"][i][SCHEME:] for i in (two, one))
    order = [two if i == one else one if i == two else i for i in range(len(names))]
    path.write_bytes(signed(script, new, b"".join(payload[slice(*spans[i])] for i in order)))
    refusal(script, path)


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


def xz_with_huge_dictionary():
    """A small xz stream whose header says that unpacking it takes a dictionary of 4 GiB."""
    small = bytearray(lzma.compress(bytes(1000), preset=6))
    block = 12  # after the stream's header: size, flags, filter id 0x21, 1 property byte, the dictionary's size
    assert small[block + 2 : block + 4] == b"\x21\x01"
    small[block + 4] = 40
    length = 4 * (small[block] + 1)
    small[block + length - 4 : block + length] = struct.pack("<I", zlib.crc32(small[block : block + length - 4]))
    return bytes(small)


def bombs(module, c, folder):
    """Small, signed, consistent files whose header asks for a huge model."""
    (folder / "valid").mkdir(parents=True)
    for codec in ("ans", "lzma"):
        base = folder / f"base.{codec}"
        write(module, base, module.dataclasses.replace(c, codec=codec), loops=1)
        header, payload = parts(base.read_bytes())
        base.unlink()
        for name, fields in {
            "dim": dict(model_dim=2**34),
            "dim and hidden": dict(model_dim=2**21, mlp_mult=2**21),
            "lora": dict(layout="1+2x2+1", lora_rank=2**40),
            "heads": dict(model_dim=2**40 + 2),
            "vocabulary": dict(vocab_size=2**40),
            "dim of a gigabyte": dict(model_dim=2**20),
            "lora of a gigabyte": dict(layout="1+2x2+1", lora_rank=2**20),
        }.items():
            model = header["model"] | fields
            # Every tensor has coded bytes, so that a reader that trusts the shapes decodes them.
            values = module.Config(**model, train_batch_tokens=model["train_seq_len"])
            try:
                with within(30):
                    shapes = module.param_shapes(values)
            except BaseException:
                continue
            known = {e[NAME]: (e, payload[slice(*place(header, i))]) for i, e in enumerate(header["tensors"])}
            found = [known.get(n) or known["tok_emb.weight"] for n in shapes]
            entries = [[n, list(s), *entry[SCHEME:]] for (n, s), (entry, _) in zip(shapes.items(), found)]
            changed = header | {"model": model, "tensors": entries, "loops": 1}
            (folder / f"{codec} {name}").write_bytes(signed(module, changed, b"".join(part for _, part in found)))
        for name, fields in {
            "blocks": dict(layout="1000000000"),
            "passes": dict(layout="1+2x1000000000+1"),
            "odd dim": dict(model_dim=2**40 + 1),
            "sequence": dict(train_seq_len=10**13),
        }.items():
            changed = header | {"model": header["model"] | fields}
            (folder / f"{codec} {name}").write_bytes(signed(module, changed, payload))
        deep = zlib.compress(b" " * (1 << 28))
        (folder / f"{codec} header").write_bytes(signed(module, deep, payload))
        if codec == "lzma":  # a stream that needs a dictionary of 1.5 GB: properties and check of its block changed
            new = json.loads(json.dumps(header))
            huge = struct.pack("<hH", 0, 2) + xz_with_huge_dictionary()
            huge = struct.pack("<I", len(huge)) + huge + huge
            new["tensors"][0][SIZE] += len(huge) - place(header, 0)[1]
            (folder / "lzma dictionary").write_bytes(signed(module, new, huge + payload[place(header, 0)[1] :]))
    # One symbol takes no bits: an honest tensor and a bomb look alike but for the size that the model has.
    (folder / "valid").rmdir()
    return sorted(folder.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory in use from /proc")
@pytest.mark.parametrize("name", SCRIPTS)
def test_allocation_bombs(name, config, tmp_path):
    """A few kilobytes that ask for terabytes: refused within a second, in a process whose memory is limited, because an
    allocation that fails inside the coder ends the process."""
    module = script_or_skip(name)
    paths = bombs(module, config(module), tmp_path / "bombs")
    assert len(paths) >= 12
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


def test_lzma_bomb_is_not_unpacked(any_script, config, tmp_path):
    """Coded bytes that unpack to 4 GiB give no more than the tensor holds."""
    import tracemalloc

    data = struct.pack("<hH", 0, 2) + lzma.compress(bytes(1 << 24)) * 3
    tracemalloc.start()
    with pytest.raises(ValueError, match="instead of"):
        any_script.decode_symbols(data, 1000, "lzma")
    assert tracemalloc.get_traced_memory()[1] < 1 << 24  # the decoder's own window is 8 MiB
    tracemalloc.stop()


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
    script.save_file({"a": np.zeros(3, np.float32)}, path)
    check()
    for note in ("{}", "[]", "null", "{", '{"model": 1}', '{"model": {}}', '{"model": {"layout": "4"}, "loops": 1}'):
        script.save_file(tensors, path, metadata={"recurrent_gpt": note})
        check()
    notes = (
        about | {"loops": None},
        about | {"loops": "x"},
        about | {"loops": 0},
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
    from conftest import TINY, load_script

    logs, folders = tmp_path_factory.mktemp("trained"), {}
    for name in SCRIPTS:
        module = load_script(name)
        if not isinstance(module, str):
            env = TINY | data.env | {"LOG_DIR": str(logs), "RUN_ID": name, "ITERATIONS": "20"}
            outcome = run_in_process(module, **env)
            assert outcome.code == 0, outcome
            folders[name] = logs / name
    return folders


def scored(outcome):
    """(loss, bpb) of MODE=eval."""
    assert outcome.code == 0 and outcome.err == "", outcome
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
    for more in ("--eval_loops=1", "--eval_loops=4", "--eval_stride=8"):
        assert scored(run_in_process(script, *flags, more, **data.env)) != plain
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
    assert_refused(
        run_in_process(script, *flags, f"--data_path={data.path}/none", **data.env), "none", "expected", "found none"
    )


@pytest.mark.parametrize("maker", SCRIPTS)
def test_sample_from_every_file_in_both_scripts(script, maker, trained, data):
    script_or_skip(maker)
    texts = []
    for flag in ("--artifact=model.int6.rgpt", "--checkpoint=checkpoint.safetensors", "--checkpoint=model.safetensors"):
        flag = flag.replace("=", f"={trained[maker]}/")
        flags = ("--mode=sample", flag, "--prompt=The early", "--sample_tokens=40", "--device=cpu", "--dtype=float32")
        outcome = run_in_process(script, *flags, **data.env)
        assert outcome.code == 0 and outcome.err == "" and outcome.out.startswith("The early"), outcome
        assert len(outcome.out) > 30 and run_in_process(script, *flags, **data.env) == outcome  # the seed decides
        assert run_in_process(script, *flags, "--seed=2", **data.env) != outcome
        greedy = run_in_process(script, *flags, "--temperature=0", "--seed=2", **data.env)
        assert greedy == run_in_process(script, *flags, "--temperature=0", **data.env)
        texts.append(outcome.out)
    assert texts[1] == texts[2]
    no_prompt = run_in_process(
        script, "--mode=sample", flag, "--sample_tokens=5", "--device=cpu", "--top_k=0", **data.env
    )
    assert no_prompt.code == 0 and no_prompt.err == ""


def test_cap(script, trained, tiny, tmp_path):
    """PASS and FAIL by one byte, in result.json, in the log and in the exit code; hopeless sizes are refused first."""
    result = json.loads((trained[script.__name__] / "result.json").read_text())
    code, size = result["bytes_code"], result["bytes_artifact"]
    assert code == (ROOT / f"{script.__name__}.py").stat().st_size
    assert size == (trained[script.__name__] / "model.int6.rgpt").stat().st_size
    assert result["bytes_total"] == code + size and result["bytes_cap"] == 16_000_000 and result["fits"] is True
    for cap, fits in ((code + size, True), (code + size - 1, False)):
        outcome = run_in_process(script, f"--bytes_cap={cap}", f"--run_id=cap{cap}", "--iterations=20", **tiny)
        folder = tmp_path / "logs" / f"cap{cap}"
        found, log = json.loads((folder / "result.json").read_text()), (folder / "train.log").read_text()
        assert found["bytes_total"] == code + size, "the same run, another size"
        assert (found["fits"], found["bytes_cap"], outcome.code) == (fits, cap, 0 if fits else 1)
        assert re.search(rf"^size: .*{cap}: {'PASS' if fits else 'FAIL'}", log.rsplit("---", 1)[1], re.M)
        assert bool(re.search("PASS", log.rsplit("---", 1)[1])) == fits
    before = tree(tmp_path)
    assert_refused(run_in_process(script, f"--bytes_cap={code + size // 2}", **tiny), "BYTES_CAP", "expected", "found")
    assert tree(tmp_path) == before
