"""records/contents.py: says what an artifact holds, to the byte."""

import hashlib
import json
import sys
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
import common
import contents
from conftest import random_weights, script_or_skip


@pytest.fixture
def artifact(config, tmp_path):
    module = script_or_skip("train_gpt")
    c = config(module, layout="1+2x2+1", lora_rank=3, quant_bits="core:5,embed:16,*:6")
    module.write_artifact(tmp_path / "model.int6.rgpt", c, 2, random_weights(module, c))
    return tmp_path / "model.int6.rgpt"


def run(*args) -> int:
    return common.run_tool(contents.main, [str(arg) for arg in args])


def test_lists_every_tensor_and_every_byte(artifact, capsys):
    module = script_or_skip("train_gpt")
    assert run(artifact) == 0
    out = capsys.readouterr().out
    for name in module.read_artifact(artifact)[2]:
        assert f"\n{name} " in out
    header, entries, frame = contents.read_contents(artifact)
    assert frame + sum(entry.size for entry in entries) == artifact.stat().st_size and header["loops"] == 2
    schemes = {entry.name: entry.scheme for entry in entries}
    assert (schemes["tok_emb.weight"], schemes["blocks.1.attn.q.weight"], schemes["blocks.0.attn.q.weight"]) == (
        "f16", "int5", "int6")  # fmt: skip
    assert {entry.kind for entry in entries} == set(contents.KINDS) - {"header"}
    assert artifact.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["tensors"][0].__setitem__(0, 5),
        lambda h: h["tensors"][0].__setitem__(0, "\x1b[2J"),
        lambda h: h["tensors"][0].__setitem__(0, "x" * 1000),
        lambda h: h["tensors"][0].__setitem__(1, [2**40, 1]),
        lambda h: h["tensors"][0].__setitem__(1, [True, 1.5]),
        lambda h: h["tensors"][0].__setitem__(1, "12"),
        lambda h: h["tensors"][0].__setitem__(2, None),
        lambda h: h["tensors"][0].__setitem__(2, "\x1b[2J"),
        lambda h: h["tensors"][0].__setitem__(3, float(h["tensors"][0][3])),
        lambda h: h.pop("model"),
        lambda h: h.pop("loops"),
        lambda h: h.update(loops=None),
        lambda h: h.update(codec="\x1b[2J"),
        lambda h: h["model"].update(layout="\x1b[2J"),
        lambda h: h["model"].update(model_dim="512"),
        lambda h: h.update(tensors=7),
        lambda h: h.update(model=[]),
    ],
)
def test_refuses_headers_that_were_made_up(artifact, capsys, change):
    """Signed again, as somebody would who means harm: one line, and nothing of the file reaches the terminal raw."""
    data, head = artifact.read_bytes(), contents.HEAD
    size = head.unpack_from(data)[2]
    header = json.loads(zlib.decompress(data[head.size : head.size + size]))
    change(header)
    packed = zlib.compress(json.dumps(header).encode())
    body = head.pack(data[:4], contents.VERSION, len(packed)) + packed + data[head.size + size : -32]
    artifact.write_bytes(body + hashlib.sha256(body).digest())
    assert run(artifact) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "\x1b" not in err


def test_refuses_other_files_in_one_line(artifact, tmp_path, capsys):
    good = artifact.read_bytes()
    for content, expected in (
        (None, "found nothing to read"), (b"", "another file"), (b"PK" * 99, "another file"),
        (good[:-1], "SHA-256"), (good[:4] + b"\1" + good[5:], "version"), (good[:50] + b"x" + good[51:], "SHA-256"),
    ):  # fmt: skip
        path = tmp_path / "other"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        assert run(path) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and expected in err, err
