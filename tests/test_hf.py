"""retrofit/hf.py: one pass stays the parent, deeper passes decode and train as they should, bad input is refused."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "retrofit"), str(ROOT / "data")]
mx = pytest.importorskip("mlx.core", reason="mlx cannot be imported here")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import hf  # noqa: E402
import hf_backend  # noqa: E402
import hf_gguf  # noqa: E402
import hf_parent  # noqa: E402
import hf_text  # noqa: E402
import hf_train  # noqa: E402
import mlx_lm  # noqa: E402
import recurrent  # noqa: E402
from conftest import answer_of_server, assert_refused, mlx_lm_command, tree  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_config, save_model  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from tool import run_tool  # noqa: E402

VOCAB = 288
DIM = 32
BASE = {
    "hidden_size": DIM,
    "num_hidden_layers": 6,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
GPT2 = {"n_ctx": 128, "n_embd": DIM, "n_head": 4, "n_layer": 6, "n_positions": 128, "layer_norm_epsilon": 1e-5}
NEOX = {
    "max_position_embeddings": 128,
    "hidden_size": DIM,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "layer_norm_eps": 1e-5,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 4 + ["full_attention", "sliding_attention"]}
CONFIGS = {
    "llama": BASE | {"tie_word_embeddings": False},
    "llama with windows": BASE | WINDOWS,
    "mistral": BASE,
    "qwen2": BASE,
    "qwen3": BASE,
    "olmo2": BASE,
    "gpt2": GPT2 | {"vocab_size": VOCAB},
    "gpt_neox": NEOX | {"vocab_size": VOCAB},
    "smollm3": BASE | {"no_rope_layers": [1, 1, 1, 0, 1, 1]},
}
FAMILIES = list(CONFIGS)
LAYOUT = "2+2x3+2"
TEXT = "The cat sat on the mat, and 42 dogs ran past. It rained; nobody minded much. " * 40


def config_of(name):
    return CONFIGS[name] | {"model_type": name.split()[0], "eos_token_id": 0}


def random_parent(name, seed=0):
    """A parent with random weights, large enough for its layers to matter."""
    config = config_of(name)
    model_class, arguments = _get_classes(config)
    parent = model_class(arguments.from_dict(config))
    rng = np.random.default_rng(seed)
    weights = [
        (k, mx.array(rng.normal(float(w.ndim == 1 and "norm" in k), 0.15, w.shape).astype(np.float32)))
        for k, w in tree_flatten(parent.parameters())
    ]
    parent.load_weights(weights)
    parent.eval()
    return parent, config


def random_ids(shape, seed=1):
    return mx.array(np.random.default_rng(seed).integers(0, VOCAB, shape))


def recurrent_of(parent, config, layout=LAYOUT, **more):
    """The recurrent model around a parent's modules."""
    recurrence = {"layout": layout, "layers": [], "inject": "gate", "gate": 0.5} | more
    model = hf_parent.grown(parent, config, recurrence)
    model.loops = recurrent.parse_layout(layout)[2]
    model.eval()
    return model


def with_lora(model, seed=2):
    """A LoRA on the core that is not zero, and gates that differ by channel."""
    model.add_lora(hf_train.linear_paths(model), 2)
    rng = np.random.default_rng(seed)
    for _, module in model.named_modules():
        if hasattr(module, "lora_b"):
            module.lora_b = mx.array(rng.normal(0, 0.1, module.lora_b.shape).astype(np.float32))
    model.inject.gate = mx.array(rng.uniform(0.2, 0.5, DIM).astype(np.float32))
    return model


def write_tokenizer(folder, more=0):
    """A byte-level tokenizer of 257 + `more` pieces, none of which merge."""
    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<{i}>" for i in range(more))]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_parent(folder, name="llama", bits=0):
    """A parent's folder; returns its model."""
    parent, config = random_parent(name)
    if bits:
        parent, config = quantize_model(parent, config, 32, bits)
    folder.mkdir(parents=True)
    save_model(folder, parent)
    save_config(dict(config), folder / "config.json")
    write_tokenizer(folder)
    return parent


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def tool(*args):
    """hf.py in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_tool(hf.main, [str(arg) for arg in args])
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True)
def _no_notice(monkeypatch):
    monkeypatch.setattr(hf_backend, "OPENBLAS", True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A parent, a text, and the folder made of the parent; tests copy what they change."""
    folder = tmp_path_factory.mktemp("hf")
    write_parent(folder / "parent")
    (folder / "text.txt").write_text(TEXT)
    made = tool("make", folder / "parent", "--layout", "2+2x2+2", "--out", folder / "made")
    assert made.code == 0, made.err
    return folder


@pytest.fixture
def made(home, tmp_path):
    return Path(shutil.copytree(home / "made", tmp_path / "made"))


TRAIN = ("--steps", 6, "--batch", 2, "--length", 16, "--val-bytes", 60, "--save-every", 3, "--eval-passes", "1,2")


@pytest.fixture(scope="module")
def lora(home):
    """The folder with a trained LoRA; tests copy what they change."""
    folder = Path(shutil.copytree(home / "made", home / "lora"))
    outcome = tool("train", folder, "--text", home / "text.txt", *TRAIN, "--steps", 3, "--lr", 0.01)
    assert outcome.code == 0, outcome.err
    return folder


def loaded(folder, **model_config):
    """A folder's model as mlx-lm loads it."""
    return load_model(Path(folder), trust_remote_code=True, model_config=model_config)[0]


def any_lora(model):
    return any(hasattr(module, "lora_a") for _, module in model.named_modules())


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_is_the_parent_bit_for_bit(name):
    parent, config = random_parent(name)
    ids = random_ids((2, 20))
    expected = parent(ids)
    for layout in ("2+2x1+2", "0+6x1+0"):
        model = recurrent_of(parent, config, layout)
        assert mx.array_equal(model(ids), expected), layout
        assert mx.array_equal(model.head(model.hidden(ids, 1)), expected), layout
        assert not mx.array_equal(model.head(model.hidden(ids, 2)), expected), layout


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_decoding_equals_the_full_pass_at_three_passes_with_a_lora(name):
    model = with_lora(recurrent_of(*random_parent(name)))
    ids = random_ids((2, 20))
    full = model(ids)
    cache = make_prompt_cache(model)
    assert len(cache) == 2 + 2 * 3 + 2
    parts = [model(ids[:, :11], cache=cache), *(model(ids[:, i : i + 1], cache=cache) for i in range(11, 20))]
    difference = mx.abs(mx.concatenate(parts, axis=1) - full).max().item()
    assert difference < 1e-5 * max(1.0, mx.abs(full).max().item())


def test_a_cache_of_another_number_of_passes_is_refused():
    model = recurrent_of(*random_parent("llama"))
    cache = make_prompt_cache(model)
    model.loops = 2
    with pytest.raises(ValueError, match="8 visits"):
        model(random_ids((1, 4)), cache=cache)


def by_hand(model, ids, passes, stop=None):
    """The state before the output layer of a qwen3 of layout 2+2xR+2, layer by layer; no gradient flows back from pass
    `stop` to what came before it."""
    h = model.model.embed_tokens(ids)
    for layer in model.layers[:2]:
        h = layer(h, "causal")
    entry = h
    for number in range(passes):
        if number == stop:
            h, entry = mx.stop_gradient(h), mx.stop_gradient(entry)
        h = model.inject.gate * h + (1 - model.inject.gate) * entry if number else h
        for layer in model.layers[2:4]:
            h = layer(h, "causal")
    for layer in model.layers[4:]:
        h = layer(h, "causal")
    return model.model.norm(h)


def test_three_passes_are_the_layers_listed_three_times_with_the_gate_between():
    model = recurrent_of(*random_parent("qwen3"))
    ids = random_ids((1, 9))
    assert mx.allclose(model.hidden(ids), by_hand(model, ids, 3), atol=1e-5)


def test_damping_moves_the_state_by_its_share_of_a_pass():
    parent, config = random_parent("qwen3")
    ids = random_ids((1, 9))
    still = recurrent_of(parent, config, inject="damp", gate=0.0)
    assert mx.allclose(still(ids), parent(ids), atol=1e-5)
    whole = recurrent_of(parent, config, inject="damp", gate=1.0)
    assert mx.allclose(whole(ids), recurrent_of(parent, config, inject="none")(ids), atol=1e-4)


def test_concatenation_starts_as_the_gate():
    parent, config = random_parent("qwen3")
    ids = random_ids((1, 9))
    gate, concat = (recurrent_of(parent, config, inject=kind, gate=0.25)(ids) for kind in ("gate", "concat"))
    assert mx.allclose(gate, concat, atol=1e-4)


@pytest.mark.parametrize("layout", ["2+2x3+2", "0+6x3+0"])
def test_the_teacher_of_the_distillation_is_one_pass(layout):
    model = with_lora(recurrent_of(*random_parent("llama with windows"), layout))
    ids = random_ids((2, 12))
    deep, first = model.hidden_and_first(ids, 3)
    assert mx.array_equal(deep, model.hidden(ids, 3))
    assert mx.array_equal(first, model.hidden(ids, 1))


def test_dropped_layers_are_the_parent_without_them(home, tmp_path):
    outcome = tool("make", home / "parent", "--drop", "1,4", "--layout", "1+2x2+1", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    model, _ = load_model(tmp_path / "out", trust_remote_code=True, model_config={"loops": 1})
    parent, _ = load_model(home / "parent")
    parent.model.layers = [parent.model.layers[i] for i in (0, 2, 3, 5)]
    ids = random_ids((1, 9))
    assert mx.array_equal(model(ids), parent(ids))


def test_a_four_bit_parent_keeps_its_pass(tmp_path):
    parent = write_parent(tmp_path / "parent", bits=4)
    outcome = tool("make", tmp_path / "parent", "--layout", "2+2x2+2", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    model, _ = load_model(tmp_path / "out", trust_remote_code=True, model_config={"loops": 1})
    assert hf_train.is_quantized(model)
    ids = random_ids((1, 9))
    assert mx.array_equal(model(ids), parent(ids))
    (tmp_path / "text.txt").write_text(TEXT)
    command = ("train", tmp_path / "out", "--text", tmp_path / "text.txt", *TRAIN)
    assert_refused(tool(*command, "--train", "core"), "whole weights", "lora")
    outcome = tool(*command, "--steps", 2)
    assert outcome.code == 0, outcome.err
    trained, _ = mlx_lm.load(str(tmp_path / "out"), trust_remote_code=True, model_config={"loops": 1})
    assert hf_train.is_quantized(trained) and not mx.array_equal(trained(ids), parent(ids))
    outcome = tool("merge", tmp_path / "out")
    assert outcome.code == 0 and "rounded" in outcome.out, outcome
    merged = loaded(tmp_path / "out", loops=1)
    assert hf_train.is_quantized(merged) and not any_lora(merged)
    new = [(path, m.fuse()) for path, m in trained.named_modules() if hasattr(m, "lora_a")]
    trained.update_modules(tree_unflatten(new))
    assert mx.array_equal(merged(ids), trained(ids))


def test_mlx_lm_loads_generates_and_takes_the_number_of_passes(home):
    text = []
    for loops in (1, 3):
        model, tokenizer = mlx_lm.load(str(home / "made"), trust_remote_code=True, model_config={"loops": loops})
        assert len(make_prompt_cache(model)) == 4 + 2 * loops
        text.append(mlx_lm.generate(model, tokenizer, "The cat", max_tokens=5))
    parent, _ = load_model(home / "parent")
    assert text[0] == mlx_lm.generate(parent, tokenizer, "The cat", max_tokens=5)


# Measuring the parent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, layout", [(30, "10+6x2+14"), (12, "4+2x2+6"), (6, "2+1x2+3"), (2, "1+1x2+0"), (1, "0+1x2+0")]
)
def test_the_proposed_band_is_the_fifth_that_begins_at_a_third(count, layout):
    assert hf_parent.propose(count) == layout
    assert hf_parent.check_layout(layout, count)


def test_a_jump_of_the_scale_is_named_only_where_it_lies_inside_the_band():
    rms = np.full(31, 5.0)
    rms[12:] = 60.0
    assert any("at layer 11 (5 to 60)" in line for line in hf_parent.explain(rms, "10+6x2+14", "gate", 0.5))
    for layout in ("12+6x2+12", "5+6x2+19"):
        assert not any("jumps" in line for line in hf_parent.explain(rms, layout, "gate", 0.5))


def test_make_without_a_layout_measures_and_says_why(home, tmp_path):
    outcome = tool("make", home / "parent", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    for words in ("proposed --layout 2+1x2+3", "state rms", "gate: a further pass", "bit for bit"):
        assert words in outcome.out
    assert len(json.loads((tmp_path / "out/make.json").read_text())["state_rms"]) == 7
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["recurrence"]["gate"] == 0.5 and config["loops"] == 2


# GGUF -----------------------------------------------------------------------------------------------------------------


def write_gguf(path, parent, config, **changes):
    """A llama as llama.cpp stores it: rotary pairs side by side."""
    theirs = {v: k for k, v in hf_gguf.LAYER.items()} | {v: k for k, v in hf_gguf.OUTSIDE.items()}
    arrays = {}
    for name, w in tree_flatten(parent.parameters()):
        name = name.removesuffix(".weight")
        number = name.split(".")[2] if ".layers." in name else None
        short = theirs[name.split(".", 3)[3] if number else name]
        if short in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if short == "attn_q" else "num_key_value_heads"]
            w = w.reshape(heads, 2, -1, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)
        arrays[f"blk.{number}.{short}.weight" if number else f"{short}.weight"] = w.astype(mx.float16)
    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ1", "12"]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": mx.array(6, mx.uint32),
        "llama.embedding_length": mx.array(DIM, mx.uint32),
        "llama.feed_forward_length": mx.array(64, mx.uint32),
        "llama.attention.head_count": mx.array(4, mx.uint32),
        "llama.attention.head_count_kv": mx.array(2, mx.uint32),
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5, mx.float32),
        "llama.context_length": mx.array(128, mx.uint32),
        "llama.rope.freq_base": mx.array(10000.0, mx.float32),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": mx.array([3] + [1] * (len(pieces) - 1), mx.int32),
        "tokenizer.ggml.merges": ["Ġ 1", "1 2"],
        "tokenizer.ggml.bos_token_id": mx.array(0, mx.uint32),
        "tokenizer.ggml.eos_token_id": mx.array(0, mx.uint32),
    } | changes
    mx.save_gguf(str(path), arrays, metadata)


def test_a_gguf_becomes_the_model_it_was_made_from(tmp_path):
    parent, config = random_parent("llama")
    parent.load_weights([(k, w.astype(mx.float16)) for k, w in tree_flatten(parent.parameters())])
    write_gguf(tmp_path / "m.gguf", parent, config)
    hf_gguf.convert(tmp_path / "m.gguf", tmp_path / "parent")
    written = json.loads((tmp_path / "parent/config.json").read_text())
    written["vocab_size"] = VOCAB  # the tokenizer of this test is smaller than the embedding
    (tmp_path / "parent/config.json").write_text(json.dumps(written))
    model, _ = load_model(tmp_path / "parent")
    ids = random_ids((1, 9))
    assert mx.array_equal(model(ids), parent(ids))


def test_smollm_takes_every_digit_by_itself(tmp_path):
    parent, config = random_parent("llama")
    for kind, split in (("smollm", True), ("gpt-2", False)):
        write_gguf(tmp_path / "m.gguf", parent, config, **{"tokenizer.ggml.pre": kind})
        tokenizer, _ = hf_gguf.convert_tokenizer(hf_gguf.read(tmp_path / "m.gguf")[1])
        tokens = tokenizer.encode("a 12<|endoftext|>").tokens
        assert tokens == ["a", *(["Ġ", "1", "2"] if split else ["Ġ1", "2"]), "<|endoftext|>"]
        assert tokenizer.decode(tokenizer.encode("a 12 é").ids) == "a 12 é"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"general.architecture": "gemma"}, "found gemma"),
        ({"tokenizer.ggml.model": "llama"}, "byte-level BPE"),
        ({"tokenizer.ggml.pre": "qwen2"}, "found qwen2"),
    ],
)
def test_a_gguf_of_another_kind_is_refused(tmp_path, changes, words):
    write_gguf(tmp_path / "m.gguf", *random_parent("llama"), **changes)
    assert_refused(tool("make", tmp_path / "m.gguf", "--out", tmp_path / "out"), "m.gguf", words)
    assert not list(tmp_path.glob("out*"))


def test_damaged_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK no gguf")
    (tmp_path / "m.whl").write_bytes(b"no wheel")
    for name in ("m.gguf", "m.whl", "gone.gguf", "gone.whl"):
        assert_refused(tool("make", tmp_path / name, "--out", tmp_path / "out"), name, "expected")
    assert not list(tmp_path.glob("out*"))


# Refusals -------------------------------------------------------------------------------------------------------------


def refused_make(home, tmp_path, *args, words=()):
    """`make` with these arguments is refused, and leaves nothing."""
    before = tree(tmp_path)
    outcome = tool("make", *args)
    assert_refused(outcome._replace(out=""), *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("family, words", [("gemma3_text", "by number"), ("deepseek_v3", "untested")])
def test_an_untested_family_is_refused_by_name(home, tmp_path, family, words):
    parent = Path(shutil.copytree(home / "parent", tmp_path / "parent"))
    config = json.loads((parent / "config.json").read_text()) | {"model_type": family}
    (parent / "config.json").write_text(json.dumps(config))
    refused_make(home, tmp_path, parent, "--out", tmp_path / "out", words=(family, words, "llama"))


@pytest.mark.parametrize(
    "args, words",
    [
        (("--layout", "4+6x2+14"), "P\\+C\\+D = 6.*found 24"),
        (("--layout", "two"), "P\\+CxR\\+D"),
        (("--layout", "2+2x0+2"), "P\\+CxR\\+D"),
        (("--drop", "4-9"), "0 to 5.*4-9"),
        (("--drop", "4-2"), "0 to 5"),
        (("--gate", "1.5"), "at most 1"),
        (("--layout", "1+2x2+1"), "--drop"),
        (("--drop", "0-5"), "a layer that stays, found all 6"),
        (("--text", "EMPTY"), "a text to measure on, found an empty one"),
    ],
)
def test_layers_out_of_range_are_refused(home, tmp_path, args, words):
    (tmp_path / "empty.txt").touch()
    args = [tmp_path / "empty.txt" if value == "EMPTY" else value for value in args]
    refused_make(home, tmp_path, home / "parent", *args, "--out", tmp_path / "out", words=(words,))


def test_a_tokenizer_that_does_not_fit_or_is_missing_is_refused(home, tmp_path):
    parent = Path(shutil.copytree(home / "parent", tmp_path / "parent"))
    write_tokenizer(parent, more=VOCAB)
    refused_make(home, tmp_path, parent, "--out", tmp_path / "out", words=("vocab_size 288", "tokenizer"))
    (parent / "tokenizer.json").write_text("{}")
    refused_make(home, tmp_path, parent, "--out", tmp_path / "out", words=("tokenizer",))
    for file in parent.glob("tokenizer*"):
        file.unlink()
    refused_make(home, tmp_path, parent, "--out", tmp_path / "out", words=("tokenizer.json", "found none"))


def test_too_little_memory_is_refused_with_the_estimate(home, made, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_backend, "available_memory", lambda: 1000)
    refused_make(home, tmp_path, home / "parent", "--out", tmp_path / "out", words=("memory: expected about .* GB",))
    monkeypatch.setattr(hf_backend, "available_memory", lambda: 10**6)
    before = tree(made)
    outcome = tool("train", made, "--text", home / "text.txt", *TRAIN, "--length", 128, "--batch", 8)
    assert_refused(outcome, "memory: expected about", "activations", "found 0.00 GB")
    assert tree(made) == before


def test_the_hub_without_network_or_token_is_one_line(tmp_path, monkeypatch):
    import httpx2
    import huggingface_hub
    from huggingface_hub import errors

    def fails_with(error):
        def download(*args, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    response = httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co"))
    for error, words in (
        (errors.LocalEntryNotFoundError("no connection\nmore"), "network"),
        (errors.OfflineModeIsEnabled("offline"), "network"),
        (errors.GatedRepoError("gated", response=response), "hf auth login"),
        (errors.RepositoryNotFoundError("none", response=response), "check the name"),
    ):
        fails_with(error)
        refused_make(None, tmp_path, "some/model", "--out", tmp_path / "out", words=("some/model", words))
    refused_make(None, tmp_path, "no/such/folder", "--out", tmp_path / "out", words=("no/such/folder",))


def test_a_folder_with_files_is_never_overwritten(home, made, tmp_path):
    before = tree(made)
    refused_make(home, tmp_path, home / "parent", "--out", made, words=("empty folder",))
    assert tree(made) == before
    refused_make(home, tmp_path, made, "--out", tmp_path / "out", words=("hf.py made",))


def test_a_make_that_fails_on_the_way_leaves_nothing(home, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(hf_parent, "save_config", full)
    refused_make(home, tmp_path, home / "parent", "--out", tmp_path / "out", words=("space",))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("t.csv", "a,b", "another ending"),
        ("t.jsonl", '{"text": "a"}\n{"words": 1}\n', "line 2"),
        ("t.jsonl", "{not json\n", "line 1"),
        ("t.txt", "", "more than"),
        ("t.txt", TEXT[:70], "tokens"),
        ("t.jsonl.xz", "no xz", "damage"),
    ],
)
def test_a_text_that_cannot_serve_is_refused(made, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    before = tree(made)
    assert_refused(tool("train", made, "--text", tmp_path / name, *TRAIN), words)
    assert tree(made) == before


def test_settings_out_of_range_are_refused(home, made):
    before = tree(made)
    assert_refused(tool("eval", made, "--text", home / "text.txt", "--length", 512), "from 2 to 128, .* found 512")
    for args in (("--batch", 0), ("--batch", -1), ("--max-bytes", -5)):  # a batch below 0 scored nothing, and said 0.0
        assert_refused(
            tool("eval", made, "--text", home / "text.txt", *args), f"{args[0]}: expected .* found {args[1]}"
        )
    for args in (
        ("--steps", 0),
        ("--rank", 100000),
        ("--length", 129),
        ("--lr", "nan"),
        ("--distill", 2),
        ("--eval-passes", "1,x"),
        ("--train", "some"),
        ("--seed", -1),
        ("--eval-every", -1),
        ("--save-every", -1),
        ("--minutes", "nan"),
        ("--resume", "--restart"),
    ):
        assert_refused(tool("train", made, "--text", home / "text.txt", *TRAIN, *args), "expected|invalid choice")
    assert tree(made) == before


# Passes and loss ------------------------------------------------------------------------------------------------------


def settings(**more):
    values = dict(train="lora", rank=2, steps=100, batch=2, accumulate=1, length=16, lr=1e-3, warmup=0.1, clip=1.0)
    values |= dict(weight_decay=0.0, passes=0, mean=4.0, cap=8, curriculum="1-sqrt", curriculum_share=0.75, bptt=8)
    return hf_train.Settings(**(values | dict(distill=0.5, temperature=1.0, seed=0) | more))


@pytest.mark.parametrize("mean", [1.0, 4.0])
def test_drawn_passes_have_the_formulas_mean_before_and_after_the_cap(mean):
    rng = np.random.default_rng(0)
    drawn = np.array([hf_train.draw_passes(mean, 10**9, rng) for _ in range(8000)])
    error = 4 * drawn.std() / len(drawn) ** 0.5
    assert abs(drawn.mean() - (mean + 1)) < error
    assert abs(hf_train.expected_passes(mean, 200) - (mean + 1)) < 1e-6
    for cap in (2, 4):
        assert abs(np.minimum(drawn, cap).mean() - hf_train.expected_passes(mean, cap)) < error
    assert drawn.min() == 1 and hf_train.expected_passes(mean, 1) == 1


def test_the_curriculum_grows_in_whole_passes_to_the_mean():
    for kind, middle in (("const", 4), ("linear", 2), ("1-sqrt", 2)):
        means = [hf_train.mean_at(settings(curriculum=kind, curriculum_share=1.0), step) for step in range(101)]
        assert means == sorted(means) and means[-1] == 4 and means[50] == middle
        assert means[0] == (4 if kind == "const" else 1)


# Training FLOPs of a curriculum over those of the constant mean R, by the formulas of Retrofitted Recurrence
# (arXiv 2511.07384): layers 4 + 8 looped + 4, a gradient through the last 8 passes. R = 4 is what its authors logged.
# A column is the share of the training in which the mean grows.
GROWS = (0.25, 0.5, 0.75, 1.0)
FLOPS = {
    (4, "linear"): (0.925, 0.85, 0.775, 0.70),
    (8, "linear"): (0.903, 0.805, 0.708, 0.611),
    (32, "linear"): (0.915, 0.831, 0.746, 0.662),
    (4, "1-sqrt"): (0.894, 0.787, 0.681, 0.575),
    (8, "1-sqrt"): (0.866, 0.733, 0.599, 0.465),
    (32, "1-sqrt"): (0.882, 0.764, 0.646, 0.528),
}


@pytest.mark.parametrize("mean, kind", FLOPS)
def test_a_curriculum_costs_the_papers_share_of_the_flops(mean, kind):
    def flops(s, step):
        """Of the layers, for each token and parameter of a layer."""
        passes = hf_train.mean_at(s, step)
        taught = min(passes, s.bptt)
        return 6 * (4 + 8 * taught + 4) + 2 * 8 * (passes - taught)

    for share, expected in zip(GROWS, FLOPS[mean, kind]):
        s = settings(mean=mean, curriculum=kind, curriculum_share=share, steps=2000)
        spent = np.mean([flops(s, step) for step in range(s.steps)])
        assert abs(spent / flops(settings(mean=mean, curriculum="const"), 0) - expected) < 0.002


def test_passes_depend_on_the_step_alone():
    s = settings()
    assert [hf_train.passes_at(s, i) for i in range(20)] == [hf_train.passes_at(s, i) for i in range(20)]
    assert all(type(hf_train.passes_at(s, i)) is int for i in range(20))
    assert {hf_train.passes_at(settings(passes=3), i) for i in range(9)} == {3}


def test_training_traces_the_model_once_for_each_number_of_passes(home, made, monkeypatch, only_traced):
    """`train` as mlx-lm's trainer compiles it: a Python integer is a constant of the trace."""
    passes, traced, make_loss = (1, 2, 1, 3, 2, 1), [], hf_train.make_loss

    def noted(s):
        loss = make_loss(s)
        return lambda model, tokens, passes: traced.append(passes) or loss(model, tokens, passes)

    def ends(run, step):
        if step == len(passes):  # before the trainer reads a loss, which nobody has computed
            raise hf_train.Stopped("traced")

    monkeypatch.setattr(hf_train, "make_loss", noted)
    monkeypatch.setattr(hf_train, "passes_at", lambda s, micro: passes[micro])
    monkeypatch.setattr(hf_train.Run, "between", ends)
    monkeypatch.setattr(hf_train.Run, "validate", lambda run, step: None)
    outcome = tool("train", made, "--text", home / "text.txt", *TRAIN, "--steps", 7)
    assert outcome.code == 0 and "traced" in outcome.out, outcome
    assert traced == [1, 2, 3]


def loss_and_gradient(model, s, tokens, passes):
    (value, count), gradient = nn.value_and_grad(model, hf_train.make_loss(s))(model, tokens, passes)
    assert count.item() == tokens[:, 1:].size
    return value, dict(tree_flatten(gradient))


@pytest.mark.parametrize("bptt", [0, 1, 2, 3, 4, 9])
def test_truncated_gradients_are_those_of_hand_placed_stops(bptt):
    """Of the last `bptt` of four passes: 4, more than 4 and 0 are all of them, to the last bit."""
    model = recurrent_of(*random_parent("qwen3"))
    model.inject.gate = mx.linspace(0.2, 0.5, DIM)
    tokens = random_ids((2, 13))
    stop = 4 - bptt if 0 < bptt < 4 else None

    def expected(model):
        h = by_hand(model, tokens[:, :-1], 4, stop)
        return nn.losses.cross_entropy(model.head(h), tokens[:, 1:]).mean()

    _, gradient = loss_and_gradient(model, settings(bptt=bptt, distill=0.0), tokens, 4)
    theirs = dict(tree_flatten(nn.value_and_grad(model, expected)(model)[1]))
    assert gradient.keys() == theirs.keys()
    for k in gradient:
        assert mx.linalg.norm(gradient[k] - theirs[k]) <= 1e-4 * mx.linalg.norm(theirs[k]), k
    prelude = mx.abs(gradient["model.layers.0.mlp.up_proj.weight"]).max().item()
    assert (prelude == 0) == (stop is not None)
    if stop is None:
        _, whole = loss_and_gradient(model, settings(bptt=0, distill=0.0), tokens, 4)
        assert all(mx.array_equal(gradient[k], whole[k]) for k in whole)


def test_a_distillation_of_weight_zero_changes_no_bit():
    model = with_lora(recurrent_of(*random_parent("llama")))
    tokens = random_ids((2, 17))
    plain, gradient = loss_and_gradient(model, settings(distill=0.0), tokens, 3)
    logits = model.head(model.hidden(tokens[:, :-1], 3))
    assert mx.allclose(plain, nn.losses.cross_entropy(logits, tokens[:, 1:]).mean(), rtol=1e-5)
    for change in ({"temperature": 5.0}, {"rank": 9}):
        value, other = loss_and_gradient(model, settings(distill=0.0, **change), tokens, 3)
        assert mx.array_equal(value, plain) and all(mx.array_equal(other[k], gradient[k]) for k in gradient)
    model.hidden_and_first = None  # a teacher of weight 0 is not computed
    assert mx.array_equal(loss_and_gradient(model, settings(distill=0.0), tokens, 3)[0], plain)


def test_the_distilled_loss_is_the_papers():
    model = with_lora(recurrent_of(*random_parent("llama")))
    tokens = random_ids((2, 17))
    value, _ = loss_and_gradient(model, settings(distill=0.3, temperature=2.0), tokens, 3)
    student, teacher = (model.head(model.hidden(tokens[:, :-1], n)) for n in (3, 1))
    ce = nn.losses.cross_entropy(student, tokens[:, 1:]).mean()
    log_p, log_q = (nn.log_softmax(x / 2) for x in (teacher, student))
    kl = (mx.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert mx.allclose(value, 0.7 * ce + 0.3 * 4 * kl, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gpt_neox"])
def test_chunks_give_the_loss_and_gradient_of_the_whole(name, monkeypatch):
    """mistral's output layer is its embedding, which two paths use."""
    model = recurrent_of(*random_parent(name))
    tokens, s = random_ids((2, 17)), settings()
    whole, gradient = loss_and_gradient(model, s, tokens, 2)
    monkeypatch.setattr(hf_train, "CHUNK", 5)
    value, chunked = loss_and_gradient(model, s, tokens, 2)
    assert mx.allclose(value, whole, rtol=1e-5)
    assert gradient.keys() == chunked.keys()
    for k in gradient:
        assert mx.allclose(gradient[k], chunked[k], rtol=1e-3, atol=1e-5), k


# Training and scoring -------------------------------------------------------------------------------------------------


def trained_tensors(folder):
    return mx.load(str(folder / hf_train.TRAINED_FILE))


def test_a_resumed_training_equals_an_uninterrupted_one(home, made, tmp_path, monkeypatch):
    whole = Path(shutil.copytree(made, tmp_path / "whole"))
    command = ("--text", home / "text.txt", *TRAIN)
    outcome = tool("train", whole, *command)
    assert outcome.code == 0, outcome.err
    between = hf_train.Run.between

    def stops_after_three(run, step):
        run.stop = step == 3
        between(run, step)

    monkeypatch.setattr(hf_train.Run, "between", stops_after_three)
    outcome = tool("train", made, *command)
    assert outcome.code == 0 and "stopped after step 3 of 6" in outcome.out
    monkeypatch.undo()
    assert_refused(tool("train", made, *command)._replace(out=""), "--resume", "--restart")
    assert_refused(tool("train", made, *command, "--resume", "--lr", "0.1")._replace(out=""), "lr 0.0003 -> 0.1")
    outcome = tool("train", made, *command, "--resume")
    assert outcome.code == 0, outcome.err
    one, two = trained_tensors(whole), trained_tensors(made)
    assert one.keys() == two.keys() and any(k.endswith("lora_b") for k in one)
    assert all(mx.array_equal(one[k], two[k]) for k in one)
    one, two = (mx.load(str(f / "training/checkpoint.safetensors")) for f in (whole, made))
    assert all(mx.array_equal(one[k], two[k]) for k in one)
    assert_refused(tool("train", made, *command, "--resume")._replace(out=""), "all 6 done")
    assert not list(made.rglob("part-*")) and not (made / "training/trainer.safetensors").exists()


@pytest.mark.parametrize("what", ["lora", "core", "inject", "all"])
def test_training_changes_what_it_should_and_nothing_of_the_parent(home, made, what):
    before = (made / "model.safetensors").read_bytes()
    outcome = tool("train", made, "--text", home / "text.txt", *TRAIN, "--train", what, "--passes", 2, "--lr", 0.01)
    assert outcome.code == 0, outcome.err
    assert (made / "model.safetensors").read_bytes() == before
    names = {k.removeprefix(recurrent.TRAINED) for k in trained_tensors(made)}
    numbers = {int(k.split(".")[2]) for k in names if ".layers." in k}
    assert "inject.gate" in names
    assert numbers == {"lora": {2, 3}, "core": {2, 3}, "inject": set(), "all": set(range(6))}[what]
    assert ("lm_head.weight" in names) == (what == "all")
    steps = [line for line in outcome.out.splitlines() if "val_loss at" in line]
    losses = [
        [float(part.split(":")[1]) for part in line.split("passes ")[1].split()] for line in (steps[0], steps[-1])
    ]
    assert losses[1][1] < losses[0][1], "two passes did not learn"
    model, _ = mlx_lm.load(str(made), trust_remote_code=True)
    assert set(names) <= set(dict(tree_flatten(model.parameters())))
    parent, _ = load_model(home / "parent")
    ids = random_ids((1, 9))
    alone, _ = load_model(made, trust_remote_code=True, model_config={"loops": 1, "parent_only": True})
    assert mx.array_equal(alone(ids), parent(ids))


def test_accumulated_steps_and_restart(home, made):
    command = ("train", made, "--text", home / "text.txt", *TRAIN, "--accumulate", 2)
    outcome = tool(*command)
    assert outcome.code == 0 and "step:6/6 train_loss" in outcome.out, outcome.err
    first = trained_tensors(made)
    outcome = tool(*command, "--restart")
    assert outcome.code == 0, outcome.err
    assert all(mx.array_equal(first[k], w) for k, w in trained_tensors(made).items())
    lines = [json.loads(line) for line in (made / "training/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["passes"] == [1, 2] and any("peak_memory" in line for line in lines)


def test_eval_scores_every_byte_once_beside_the_parent(home, made, tmp_path):
    assert tool("train", made, "--text", home / "text.txt", *TRAIN, "--steps", 2).code == 0
    texts = ["The cat sat é.", "42 dogs " * 5]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    outcome = tool("eval", made, "--text", path, "--passes", "1,3", "--length", 16)
    assert outcome.code == 0, outcome.err
    table = json.loads((made / "eval.json").read_text())
    assert [sorted(entry) for entry in table] == [["bits_per_byte", "loss", "passes"]] * 2
    assert [entry["passes"] for entry in table] == [1, 3]
    log = json.loads((made / "eval_log.json").read_text())
    size = sum(len(text.encode()) for text in texts)
    assert log["bytes"] == size == log["tokens"]  # a byte is a token here
    parent, _ = load_model(home / "parent")
    tokenizer = hf_parent.read_tokenizer(made, {"vocab_size": VOCAB})
    windows = hf_text.scoring_windows(texts, hf_text.Encoder(tokenizer), 16)
    total = 0.0
    for row in windows.rows:
        logits = parent(mx.array(row[None, :-1]))
        total += nn.losses.cross_entropy(logits, mx.array(row[None, 1:])).sum().item()
    assert abs(log["untrained_one_pass"]["loss"] - total / size) < 1e-5
    assert abs(log["untrained_one_pass"]["bits_per_byte"] - total / size / np.log(2)) < 1e-5
    assert table[0]["loss"] != log["untrained_one_pass"]["loss"]


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_scan_gives_the_loss_of_every_band_run_twice_and_left_out(tmp_path, name):
    parent = write_parent(tmp_path / "parent", name)
    (tmp_path / "text.txt").write_text(TEXT)
    command = ("scan", tmp_path / "parent", "--text", tmp_path / "text.txt", "--max-bytes", 40, "--length", 100)
    outcome = tool(*command, "--width", 2, "--every", 2, "--gate", 0.25, "--out", tmp_path / "bands.jsonl")
    assert outcome.code == 0, outcome.err
    log, *bands = map(json.loads, (tmp_path / "bands.jsonl").read_text().splitlines())
    assert [band["layout"] for band in bands] == ["0+2x2+4", "2+2x2+2", "4+2x2+0"]
    tokenizer = hf_parent.read_tokenizer(tmp_path / "parent", {"vocab_size": VOCAB})
    ids = mx.array([hf_text.Encoder(tokenizer)(TEXT[:40])])

    def loss(model):
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean().item()

    config = config_of(name)
    assert abs(log["parent_loss"] - loss(parent)) < 1e-5
    for start, band in zip((0, 2, 4), bands):
        others = [i for i in range(6) if i not in (start, start + 1)]
        twice = recurrent_of(parent, config, band["layout"], gate=0.25)
        assert abs(band["two_passes"] - loss(twice)) < 1e-5
        without = recurrent_of(random_parent(name)[0], config, "0+4x1+0", layers=others)
        assert abs(band["left_out"] - loss(without)) < 1e-5
    best = min(bands, key=lambda band: band["two_passes"])["layout"]
    assert f"--layout {best}" in outcome.out.splitlines()[-1]


@pytest.mark.parametrize("args", [("--width", 6), ("--width", -1), ("--every", 0), ("--gate", 0), ("--max-bytes", -1)])
def test_a_scan_out_of_range_is_refused(home, args):
    assert_refused(tool("scan", home / "parent", "--text", home / "text.txt", *args), f"{args[0]}: .*found {args[1]}")


def test_no_code_of_a_folder_runs_in_our_tools(home, made):
    (made / "recurrent.py").write_text("raise SystemExit(9)")
    assert tool("eval", made, "--text", home / "text.txt", "--passes", "1", "--max-bytes", 50).code == 0


# mlx-lm's commands ----------------------------------------------------------------------------------------------------


def test_convert_quantizes_a_folder_with_and_without_a_lora(home, lora, tmp_path, monkeypatch):
    ids = random_ids((1, 9))
    for folder in (home / "made", lora):
        out, whole = tmp_path / folder.name, loaded(folder)
        options = ("--model", folder, "--mlx-path", out, "-q", "--q-bits", 8, "--q-group-size", 32)
        mlx_lm_command(monkeypatch, "convert", *options)
        quantized = loaded(out)
        logits = quantized(ids)
        assert quantized.loops == 2 and not mx.array_equal(logits, whole(ids))
        nn.quantize(whole, 32, 8)  # all but the LoRA and the gate
        assert mx.array_equal(logits, whole(ids)) and any_lora(whole) == (folder == lora)


def test_the_server_answers_from_a_folder_with_a_lora(lora, monkeypatch):
    answer = answer_of_server(monkeypatch, lora, "The cat")
    model, tokenizer = mlx_lm.load(str(lora), trust_remote_code=True)
    assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode("The cat"))
    assert answer["choices"][0]["text"] == mlx_lm.generate(model, tokenizer, "The cat", max_tokens=4)


def test_a_merged_lora_is_the_same_model_and_takes_mlx_lms_own(home, lora, tmp_path, monkeypatch):
    merged, ids = Path(shutil.copytree(lora, tmp_path / "merged")), random_ids((1, 9))
    outcome = tool("merge", merged)
    assert outcome.code == 0, outcome.err
    for loops in (1, 3):
        expected = loaded(lora, loops=loops)(ids)
        assert mx.abs(loaded(merged, loops=loops)(ids) - expected).max() < 1e-4 * mx.abs(expected).max()
    assert mx.array_equal(loaded(merged, loops=1, parent_only=True)(ids), loaded(home / "parent")(ids))
    assert_refused(tool("merge", merged), "a trained LoRA, found none")
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": TEXT[:60]}) + "\n") * 4)
    options = ("--train", "--data", tmp_path, "--iters", 2, "--batch-size", 2, "--val-batches", 1, "--num-layers", -1)
    adapter = tmp_path / "adapter"
    mlx_lm_command(monkeypatch, "lora", "--model", merged, *options, "--adapter-path", adapter)
    found = mx.load(str(adapter / "adapters.safetensors"))
    assert {int(name.split(".")[2]) for name in found} == set(range(6))
