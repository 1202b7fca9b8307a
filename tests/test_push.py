"""retrofit/push.py: what goes up, the model card, and errors in one line; the hub is a stand-in, nothing is sent."""

import contextlib
import io
import json
import sys
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
from conftest import ROOT, Outcome, assert_refused, tree
from safetensors.numpy import save_file

sys.path.insert(0, str(ROOT / "retrofit"))

import push  # noqa: E402
from tool import run_tool  # noqa: E402

RESULT = {
    "val_bpb_raw": 2.1182, "val_loss_raw": 3.6266, "val_bpb": 2.1637, "val_loss": 3.7046, "eval_loops": 2,
    "val_tokens": 412928, "dataset": "mini_sp1024", "params_stored": 76524, "params_effective": 99000,
    "tokens": 21557248, "train_flops": 1.25e13, "complete": True,
}  # fmt: skip


def make_export(folder, **config):
    """A folder with the files that retrofit/export_mlx.py writes."""
    folder.mkdir()
    settings = {"model_type": "recurrent_gpt", "model_file": "recurrent_gpt.py", "loops": 2,
                "model": {"layout": "1+2x2+1"}, "exported_from": "model.safetensors"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings | config))
    (folder / "recurrent_gpt.py").write_text("# the model\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    save_file({"weights.tok_emb.weight": np.ones((4, 8), np.float32)}, folder / "model.safetensors")
    (folder / "result.json").write_text(json.dumps(RESULT))
    return folder


def make_retrofit(folder):
    """A folder with the files that retrofit/hf.py writes, in training."""
    make_export(folder, model_file="recurrent.py", recurrence={"layout": "10+6x2+14"}, model=None)
    (folder / "recurrent_gpt.py").rename(folder / "recurrent.py")
    (folder / "result.json").unlink()
    rows = [{"passes": 1, "loss": 3.656, "bits_per_byte": 1.2}, {"passes": 2, "loss": 3.66, "bits_per_byte": None}]
    (folder / "eval.json").write_text(json.dumps([*rows, "odd"]))
    log = {"text": "val.txt", "bytes": 100000, "untrained_one_pass": {"loss": 3.33, "bits_per_byte": 1.1}}
    (folder / "eval_log.json").write_text(json.dumps(log))
    made = {"parent": "HuggingFaceTB/SmolLM2-135M", "command": ["make", "/home/me/parent"]}
    (folder / "make.json").write_text(json.dumps(made))
    save_file({"b": np.ones(3, np.float32)}, folder / "model-trained.safetensors")
    (folder / "training").mkdir()
    (folder / "training" / "checkpoint.safetensors").write_bytes(b"large")
    (folder / "model.safetensors.123.part").write_bytes(b"half")
    return folder


class Hub:
    """Stands for huggingface_hub.HfApi; keeps what it is given."""

    def __init__(self, error=None, lose=()):
        self.error, self.lose, self.calls, self.sizes = error, lose, [], {}

    def create_repo(self, repo, private=None, exist_ok=False):
        self.calls.append(("create", repo, private, exist_ok))
        if self.error:
            raise self.error
        return Address(repo)

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        self.calls.append(("upload", repo_id))
        self.sizes = {name: (folder_path / name).stat().st_size for name in allow_patterns}

    def get_paths_info(self, repo_id, paths):
        return [SimpleNamespace(path=n, size=s) for n, s in self.sizes.items() if n in paths and n not in self.lose]


class Address(str):
    """As RepoUrl: a text that knows the full name of the repository."""

    @property
    def repo_id(self):
        return f"me/{self}" if "/" not in self else str(self)


def tool(*argv, hub=None, monkeypatch=None):
    if hub is not None:
        monkeypatch.setattr(push, "hub", lambda: hub)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_tool(push.main, [str(part) for part in argv])
    return Outcome(code, out.getvalue(), err.getvalue())


def no_network(*args, **kwargs):
    raise AssertionError("a dry run opened a connection")


def test_a_dry_run_says_what_would_go_up_and_writes_and_sends_nothing(tmp_path, monkeypatch):
    folder = make_export(tmp_path / "export")
    before = tree(tmp_path)
    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr(push, "hub", no_network)
    found = tool(folder, "me/mini", "--dry-run", "--private", "--license", "mit")
    assert found.code == 0 and found.err == "" and tree(tmp_path) == before
    assert "would push" in found.out and "to me/mini (private)" in found.out
    for name in ("config.json", "model.safetensors", "recurrent_gpt.py", "result.json", "README.md (written)"):
        assert name in found.out
    assert f"{(folder / 'model.safetensors').stat().st_size:,} bytes" in found.out
    assert "license: mit" in found.out and "7 files" in found.out


def test_the_card_of_a_run_has_the_score_of_the_weights_in_the_folder(tmp_path):
    for file, score, other in (("model.safetensors", "2.1182", "2.1637"), ("model.int6.rgpt", "2.1637", "2.1182")):
        card = tool(make_export(tmp_path / file, exported_from=file), "me/mini", "--dry-run").out
        assert score in card and other not in card
        assert 'load("me/mini", trust_remote_code=True)' in card and "Layout `1+2x2+1`" in card
        assert "412,928 tokens of mini_sp1024" in card and "not complete" not in card
    assert "middle blocks" not in tool(make_export(tmp_path / "flat", model={"layout": "9"}), "me/x", "--dry-run").out


def test_the_card_of_a_retrofit_has_every_number_of_passes_and_the_parent(tmp_path):
    found = tool(make_retrofit(tmp_path / "retrofit"), "me/deep", "--dry-run").out
    assert "base_model: HuggingFaceTB/SmolLM2-135M" in found
    assert "| parent | 3.3300 | 1.1000 |\n| 1 | 3.6560 | 1.2000 |\n| 2 | 3.6600 | – |" in found
    assert "Scored on val.txt, 100,000 bytes." in found and "Layout `10+6x2+14`" in found
    assert "/home/me" not in found
    files, _, stays = found.partition("stays here: ")
    assert "training/" in stays and "make.json" in stays and "123.part" in stays
    assert "model-trained.safetensors" in files and "checkpoint" not in files


def test_a_card_without_measurements_says_so_and_odd_files_do_no_harm(tmp_path):
    folder = make_export(tmp_path / "export")
    (folder / "result.json").write_text('{"val_bpb_raw": NaN, "tokens": "many", "dataset": null, "complete": false}')
    (folder / "eval.json").write_text("no json")
    found = tool(folder, "me/x", "--dry-run")
    assert found.code == 0 and "bits per byte (the weights before rounding) | – |" in found.out
    assert "not complete" in found.out
    (folder / "result.json").unlink()
    assert "Nothing yet." in tool(folder, "me/x", "--dry-run").out


def test_push_writes_the_card_uploads_and_looks_whether_all_arrived(tmp_path, monkeypatch):
    folder, hub = make_retrofit(tmp_path / "retrofit"), Hub()
    found = tool(folder, "deep", "--private", hub=hub, monkeypatch=monkeypatch)
    assert found.code == 0 and found.out.endswith("deep\n"), found
    assert hub.calls == [("create", "deep", True, True), ("upload", "me/deep")]
    assert set(hub.sizes) == {
        "config.json", "eval.json", "model-trained.safetensors", "model.safetensors", "recurrent.py", "README.md",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert "| 1 | 3.6560 |" in (folder / "README.md").read_text()


def test_a_card_of_your_own_is_kept_and_an_old_one_of_ours_or_of_mlx_lm_is_not(tmp_path, monkeypatch):
    folder, card = make_export(tmp_path / "export"), tmp_path / "export" / "README.md"
    mine = "---\nlicense: mit\n---\n# Mine\n"
    for text, kept in [(mine, True), ("---\nlanguage: en\n---\n\n", False), (f"{push.OURS}\n2.9999", False)]:
        card.write_text(text)
        hub = Hub()
        assert tool(folder, "me/x", hub=hub, monkeypatch=monkeypatch).code == 0
        assert (card.read_text() == text) == kept and "README.md" in hub.sizes
        assert kept or "2.1182" in card.read_text()


def refusal(status):
    request = httpx2.Request("POST", "https://hub.example/api")
    error = httpx2.HTTPStatusError(f"{status} said the server\nand more", request=request,
                                   response=httpx2.Response(status, request=request))  # fmt: skip
    return error


@pytest.mark.parametrize(
    "error, said",
    [
        (httpx2.ConnectError("[Errno 111] Connection refused"), "Connection refused.*run the same command again"),
        (ConnectionError("Cannot reach the hub: offline mode is enabled"), "offline mode"),
        (RuntimeError("xet: broken pipe"), "broken pipe.*nothing is lost"),
        (refusal(401), "access refused .HTTP 401.; log in .* hf auth login"),
        (refusal(403), "access refused .HTTP 403."),
        (refusal(404), "not found .HTTP 404, .*owner's name"),
        (refusal(500), "500 said the server.; nothing is lost"),
    ],
)
def test_an_upload_that_fails_says_so_in_one_line_and_loses_nothing(tmp_path, monkeypatch, error, said):
    folder = make_export(tmp_path / "export")
    before = tree(folder)
    found = tool(folder, "me/x", hub=Hub(error), monkeypatch=monkeypatch)
    assert_refused(found._replace(out=""), "me/x: ", said)
    assert {k: v for k, v in tree(folder).items() if k != "README.md"} == before


def test_an_upload_of_which_a_part_is_missing_is_not_called_done(tmp_path, monkeypatch):
    hub = Hub(lose=("model.safetensors",))
    found = tool(make_export(tmp_path / "export"), "me/x", hub=hub, monkeypatch=monkeypatch)
    assert_refused(found._replace(out=""), "expected 7 files, found 1 not there .*: model.safetensors")


def test_without_a_token_and_without_network_it_ends_at_once(tmp_path, monkeypatch):
    import huggingface_hub

    folder = make_export(tmp_path / "export")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    before = tree(folder)
    assert_refused(tool(folder, "me/x"), "token: expected one for the hub, found none; run hf auth login")
    assert tree(folder) == before
    hub = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="hf_none")
    found = tool(folder, "me/x", hub=hub, monkeypatch=monkeypatch)
    assert_refused(found._replace(out=""), "me/x: expected a finished upload, found an error")


@pytest.mark.parametrize("name", ["a/b/c", "https://hub.example/me/x", "me/x y", "me/..x", "-x", "x.git", "", "x" * 97])
def test_a_name_that_the_hub_does_not_allow_is_refused(tmp_path, name):
    assert_refused(
        tool(make_export(tmp_path / "export"), f" {name}".strip() or " ", "--dry-run"), "REPO: expected|--help"
    )


def test_a_folder_that_mlx_lm_could_not_load_is_refused_by_name(tmp_path):
    assert_refused(tool(tmp_path / "absent", "me/x", "--dry-run"), "absent: expected a folder of")
    assert_refused(tool(tmp_path, "me/x", "--dry-run"), "config.json: expected a model's folder")
    for lost in ("model.safetensors", "recurrent_gpt.py", "tokenizer.json"):
        folder = make_export(tmp_path / lost)
        (folder / lost).unlink()
        assert_refused(tool(folder, "me/x", "--dry-run"), f"expected {lost}, found no such file")
    folder = make_export(tmp_path / "index")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    assert_refused(tool(folder, "me/x", "--dry-run"), "expected model-00002-of-00002.safetensors")
    folder = make_export(tmp_path / "cut")
    weights = folder / "model.safetensors"
    for damaged in (weights.read_bytes()[:-1], b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]"):
        weights.write_bytes(damaged)
        assert_refused(tool(folder, "me/x", "--dry-run"), "expected a whole safetensors file")
