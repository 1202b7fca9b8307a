"""records/contents.py: says what an artifact holds, to the byte, by the trainer's own reader."""

import hashlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
import common
import contents
from conftest import random_weights, script_or_skip


@pytest.fixture(scope="module")
def tiny_script():
    """One module for all tests here: loading the script takes longer than reading an artifact."""
    return script_or_skip("train_gpt")


@pytest.fixture
def artifact(config, tmp_path, monkeypatch, tiny_script):
    c = config(tiny_script, layout="1+2x2+1", lora_rank=3)
    path = tmp_path / "model.int6.rgpt"
    path.write_bytes(tiny_script.export_model(c, random_weights(tiny_script, c), 2).data)
    monkeypatch.setattr(contents.layout, "load_trainer", lambda: tiny_script)
    return path


def run(*args) -> int:
    return common.run_tool(contents.main, [str(arg) for arg in args])


def test_lists_every_tensor_and_every_byte(artifact, capsys, tiny_script):
    assert run(artifact) == 0
    out = capsys.readouterr().out
    found = tiny_script.read_artifact(artifact)
    for name in found.weights:
        assert f"\n{name} " in out
    about, entries = contents.read_contents(artifact)
    assert about == "layout 1+2x2+1  32 wide  passes 2  quantizer absmax" and out.startswith(about)
    assert sum(entry.size for entry in entries) == artifact.stat().st_size
    assert f"all        {artifact.stat().st_size:>10,} bytes" in out
    sizes = {entry.name: entry for entry in entries}
    assert len(sizes) == len(found.weights) + 1 and 0 < sizes["header"].size < 3000
    embedding = sizes["tok_emb.weight"]
    assert 6 < 8 * embedding.size / embedding.weights < 13 and embedding.place == "embedding"
    query = sizes["blocks.1.attn.q.weight"]
    assert 4 < 8 * query.size / query.weights < 9 and (query.place, query.kind) == ("block 1", "attention")
    assert {entry.kind for entry in entries} == {"attention", "MLP", "LoRA", "embedding", "vectors", "header"}
    for key in ("kind", "place"):
        shown = [float(line.split(" bytes ")[1].split("%")[0]) for line in contents.sums(entries, key)[1:]]
        assert sum(shown) == pytest.approx(100, abs=0.5)
    assert "\nblock 3 " in out


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("model"),
        lambda h: h.pop("loops"),
        lambda h: h.update(loops=None),
        lambda h: h.update(loops=99),
        lambda h: h.update(quantizer="\x1b[2J"),
        lambda h: h["model"].update(layout="\x1b[2J"),
        lambda h: h["model"].update(model_dim="512"),
        lambda h: h["model"].update(model_dim=2**20),
        lambda h: h.update(model=[]),
    ],
)
def test_refuses_headers_that_were_made_up(artifact, capsys, change, tiny_script):
    """Signed again, as somebody would who means harm: one line, and nothing of the file reaches the terminal raw."""
    data, head = artifact.read_bytes(), tiny_script.ARTIFACT_HEAD
    magic, version, size = head.unpack_from(data)
    text, end, rest = zlib.decompress(data[head.size : head.size + size]).partition(b"\n")
    header = json.loads(text)
    change(header)
    packed = zlib.compress(json.dumps(header).encode() + end + rest)
    body = head.pack(magic, version, len(packed)) + packed + data[head.size + size : -32]
    artifact.write_bytes(body + hashlib.sha256(body).digest())
    assert run(artifact) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "\x1b" not in err


def test_refuses_other_files_in_one_line(artifact, tmp_path, capsys):
    good = artifact.read_bytes()
    cases = [
        (None, "No such file"),
        (b"", "expected an artifact"),
        (b"PK" * 99, "expected magic"),
        (good[:-1], "SHA-256"),
        (good[:4] + b"\1" + good[5:], "expected version"),
        (good[:50] + b"x" + good[51:], "SHA-256"),
    ]
    for content, expected in cases:
        path = tmp_path / "other"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        assert run(path) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and expected in err, err


def test_every_tool_starts_where_only_its_own_folder_is_known(tmp_path):
    """As from a shell, elsewhere."""
    tools = [path for folder in ("records", "data", "retrofit") for path in sorted((common.ROOT / folder).glob("*.py"))]
    tools = [path for path in tools if "__main__" in path.read_text()]
    assert len(tools) > 15
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for path in tools:
        done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0 and "usage" in done.stdout, f"{path.name}: {done.stderr}"
