"""A run of ours in mlx-lm: the model file computes what the scripts compute, the tokenizer encodes as SentencePiece,
and mlx-lm's own commands take the folder."""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece as spm
from conftest import (
    ROOT,
    TINY,
    Outcome,
    answer_of_server,
    assert_refused,
    made_up_documents,
    mlx_lm_command,
    random_weights,
    run_in_process,
    script_or_skip,
    tree,
)

mx = pytest.importorskip("mlx.core", reason="mlx cannot be imported here")
pytest.importorskip("mlx_lm", reason="mlx-lm cannot be imported here")
sys.path.insert(0, str(ROOT / "retrofit"))

import export_mlx  # noqa: E402
import recurrent_gpt  # noqa: E402
import tokenizer as fast  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import load, load_model  # noqa: E402
from tool import run_tool  # noqa: E402

# layout, skips, loop_gate, lora_rank, xsa, passes to run; R of the layout are trained, so 1 and 5 are test-time depths.
CONFIGURATIONS = [
    ("1+2x2+1", "per_loop", "x0", 0, False, 2),
    ("1+2x2+1", "per_loop", "x0", 0, True, 1),
    ("1+2x2+1", "per_loop", "gain", 2, True, 5),
    ("2+3x3+2", "none", "gain", 3, False, 3),
    ("2+3x3+1", "official", "none", 0, False, 3),
    ("2+3x3+1", "official", "x0", 2, True, 2),
    ("3x3", "none", "x0", 2, False, 2),
    ("3x3", "per_loop", "none", 0, True, 5),
    ("1+3x2", "per_loop", "gain", 0, False, 2),
    ("4", "official", "none", 0, False, 1),
    ("5", "per_loop", "x0", 0, True, 1),
    ("2", "none", "x0", 0, False, 3),
]
NAMES = "layout skips loop_gate lora_rank xsa".split()
LENGTH = 20  # tokens on which logits are compared
TEXT = "The quiet loop feeds the deep core. 12 plus 12 is 24."


@pytest.fixture(scope="module", autouse=True)
def no_compilation():
    """On Linux mx.compile starts a C++ compiler for every kernel."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def script():
    return script_or_skip("train_gpt_mlx")


def small(script, **options):
    """A Config of a small model."""
    sizes = dict(model_dim=32, num_heads=4, num_kv_heads=2, vocab_size=97, train_seq_len=48)
    return dataclasses.replace(script.Config(), **(sizes | options))


def options_of(script, c):
    return {name: getattr(c, name) for name in script.MODEL_FIELDS}


def exported_model(script, c, weights, loops):
    """The model file's model, with a run's weights as they lie in its files."""
    model = recurrent_gpt.Model(recurrent_gpt.ModelArgs.from_dict({"model": options_of(script, c), "loops": loops}))
    named = {f"weights.{name}": mx.array(value) for name, value in weights.items()}
    model.load_weights(list(model.sanitize(named).items()), strict=True)
    return model


def script_logits(script, c, weights, ids, loops):
    model = script.RecurrentGPT(c)
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in weights.items()]))
    return np.array(model(ids, loops))


def in_parts(model, ids, cuts):
    """Logits of ids [n, t] read in parts that end at `cuts`, from the cache."""
    cache = make_prompt_cache(model)
    parts = [model(ids[:, a:b], cache=cache) for a, b in zip([0, *cuts], [*cuts, ids.shape[1]])]
    return np.array(mx.concatenate(parts, axis=1)), cache


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=lambda case: "-".join(map(str, case)))
def test_the_model_file_computes_the_scripts_logits_with_and_without_cache(script, case):
    *values, loops = case
    assert_logits(script, dict(zip(NAMES, values)), loops)


def test_the_model_file_knows_rows_a_pass(script):
    assert_logits(script, dict(layout="1+2x3+1", pass_vectors=True, loop_gate="gain"), 5)


def test_the_model_file_knows_the_recipe(script):
    parts = dict(rotary_dims=4, norm_scale=True, mlp_slope=0.5)
    assert_logits(script, dict(layout="1+2x2+1", loop_gate="gain", xsa=True) | parts, 2)


def assert_logits(script, options, loops):
    """The model file's logits are the script's: whole, token by token, and in parts."""
    c = small(script, **options)
    weights = random_weights(script, c)
    ids = mx.array(np.random.default_rng(1).integers(0, c.vocab_size, (2, LENGTH)))
    expected, model = script_logits(script, c, weights, ids, loops), exported_model(script, c, weights, loops)
    assert np.abs(expected).max() > 0.5
    assert np.abs(np.array(model(ids)) - expected).max() < 1e-4
    one_by_one, cache = in_parts(model, ids, range(1, LENGTH))
    assert np.abs(one_by_one - expected).max() < 1e-4
    assert np.abs(in_parts(model, ids, [9, 10, 11, 16])[0] - expected).max() < 1e-4
    layout = script.parse_layout(c.layout)
    assert len(cache) == layout.prelude + layout.core * loops + layout.coda
    assert len(model.layers) == layout.blocks == len({id(block) for block in model.layers})


def test_a_cache_of_another_number_of_passes_is_refused(script):
    c = small(script, layout="1+2x2+1")
    two, three = (exported_model(script, c, random_weights(script, c), loops) for loops in (2, 3))
    with pytest.raises(ValueError, match="expected one for each of 8 visits .loops=3., found 6"):
        three(mx.array([[1, 2]]), cache=make_prompt_cache(two))


def test_the_two_scripts_and_the_model_file_are_one_model(both):
    """The other script, once; tests/test_parity.py has the rest."""
    torch_script, mlx_script = both
    import torch

    c = small(torch_script, layout="1+2x3+1", lora_rank=2, loop_gate="gain", xsa=True)
    weights, ids = random_weights(torch_script, c), np.random.default_rng(2).integers(0, c.vocab_size, (1, LENGTH))
    model = torch_script.RecurrentGPT(c)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    with torch.no_grad():
        expected = model(torch.tensor(ids), 3).numpy()
    found = exported_model(mlx_script, c, weights, 3)(mx.array(ids))
    assert np.abs(np.array(found) - expected).max() < 1e-4


def test_the_model_file_visits_the_blocks_as_the_scripts_do(script):
    for text in ("4", "2x3", "5x2", "3+3x3+5", "2+1x4", "4x2+3", "1+4x3+2"):
        layout = script.parse_layout(text)
        assert recurrent_gpt.parse_layout(text) == layout
        for skips in script.CHOICES["skips"]:
            assert recurrent_gpt.skip_rows(layout, skips) == script.skip_rows(layout, skips)
            for loops in range(1, layout.loops + 1):
                assert recurrent_gpt.visits(layout, skips, loops) == script.visits(layout, skips, loops)


def test_the_model_file_knows_every_option_and_parameter_of_the_scripts(script):
    """A new option of the scripts fails here until the model file knows it."""
    known = {field.name for field in dataclasses.fields(recurrent_gpt.ModelArgs)} - {"loops", "model_type"}
    assert known == set(script.MODEL_FIELDS)
    assert set(recurrent_gpt.SKIPS) == set(script.CHOICES["skips"])
    assert set(recurrent_gpt.LOOP_GATES) == set(script.CHOICES["loop_gate"])
    for name in ("RMS_EPS", "ROPE_BASE", "LOGIT_SOFTCAP"):
        assert getattr(recurrent_gpt, name) == getattr(script, name)
    more = (dict(lora_rank=2, loop_gate="gain"), dict(skips="none", xsa=True), dict(pass_vectors=True))
    for options in (dict(), dict(layout="3"), *more):
        c = small(script, **(dict(layout="1+2x2+1") | options))
        shapes = script.param_shapes(c)
        model = exported_model(script, c, {name: np.zeros(shape, "f") for name, shape in shapes.items()}, 2)
        assert len(tree_flatten(model.parameters())) == len(shapes)


@pytest.mark.parametrize(
    "changed, said",
    [
        (dict(new_norm=True), "options that it does not know: new_norm"),
        (dict(xsa=None), "options that config.json lacks: xsa"),
        (dict(skips="dense"), "skips: expected one of per_loop, official, none, found 'dense'"),
        (dict(loop_gate="tanh"), "loop_gate: expected one of x0, gain, none, found 'tanh'"),
        (dict(layout="3-3"), "layout: expected P.CxR.D"),
        (dict(loops=0), "loops: expected a whole number of at least 1, found 0"),
        (dict(loops="2"), "loops: expected a whole number"),
        (dict(skips="official", loops=4), "loops: expected at most 2 with skips=official"),
    ],
)
def test_what_the_model_file_does_not_know_it_refuses_by_name(script, changed, said):
    options = options_of(script, small(script, layout="1+2x2+1")) | changed
    loops = options.pop("loops", 2)
    options = {name: value for name, value in options.items() if value is not None}
    with pytest.raises(ValueError, match=said):
        recurrent_gpt.ModelArgs.from_dict({"model": options, "loops": loops})


# The tokenizer -------------------------------------------------------------------------------------------------------


def hard_texts(count):
    """Random letters of many scripts, with the ASCII, spaces and markup between them that real pages have. Combining
    marks only as in "e\u0301": retrofit/tokenizer.py says why."""
    rng, texts = np.random.default_rng(0), []
    ranges = [
        (32, 127),
        (32, 127),
        (0xA0, 0x250),
        (0x370, 0x480),
        (0x48A, 0x530),
        (0x5D0, 0x5EB),
        (0x904, 0x93A),
        (0x3041, 0x3097),
    ]
    ranges += [(0x2010, 0x2050), (0x2100, 0x2190), (0x2460, 0x24FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4)]
    ranges += [(0xFF01, 0xFFEF), (0x1F300, 0x1F650), (0, 32)]
    bits = ["<s>", "</s>", "<unk>", "  ", "\u2581", "\n", "\t", "e\u0301", "\u00a0", "12345", " the ", "<0x41>"]
    for _ in range(count):
        text = ""
        for _ in range(rng.integers(1, 40)):
            low, high = ranges[rng.integers(len(ranges))]
            text += bits[rng.integers(len(bits))] if rng.random() < 0.2 else chr(rng.integers(low, high))
        texts.append(text)
    return texts


def train_tokenizer(path, documents, **options):
    """A SentencePiece model, of 320 pieces unless the options say another number."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_writer=model, minloglevel=2,
        **(dict(vocab_size=320, model_type="bpe", byte_fallback=True) | options),
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


TOKENIZERS = {
    "smoke": dict(),
    "as tokenize_docs makes them": dict(add_dummy_prefix=False, split_digits=True, pad_id=0, bos_id=1, eos_id=2,
                                        unk_id=3, required_chars="\u2581"),
    "identity": dict(normalization_rule_name="identity", remove_extra_whitespaces=False),
    "without bytes": dict(byte_fallback=False, character_coverage=0.98),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_fast_tokenizer_encodes_held_out_documents_as_sentencepiece(script, tmp_path, kind):
    documents = made_up_documents()
    path = train_tokenizer(tmp_path / "bpe.model", documents[1500:], **TOKENIZERS[kind])
    special = fast.convert(path, tmp_path, 64)
    texts = documents[:300] + hard_texts(200)
    assert fast.differing(path, tmp_path, texts) == []
    model = spm.SentencePieceProcessor(model_file=str(path))
    assert special["bos"] == model.bos_id() and special["unk"] == model.unk_id()


def test_mlx_lm_reads_text_and_writes_text_as_the_run_does(exported):
    """Through transformers: BOS first, "<s>" in a text is three letters, ids decode to SentencePiece's text."""
    model = spm.SentencePieceProcessor(model_file=exported.tokenizer)
    for text in [TEXT, "a<s>b</s> <unk>", *hard_texts(40)]:
        ids = exported.tokenizer_of_mlx_lm.encode(text)
        assert ids == [model.bos_id(), *model.encode(text)]
        assert exported.tokenizer_of_mlx_lm.decode(ids[1:]) == model.decode(ids[1:])
    assert exported.tokenizer_of_mlx_lm.eos_token_ids == {model.bos_id()}
    detokenizer = exported.tokenizer_of_mlx_lm.detokenizer
    for i in model.encode(TEXT):
        detokenizer.add_token(i)
    detokenizer.finalize()
    assert detokenizer.text.strip() == TEXT


def test_a_tokenizer_that_a_fast_one_cannot_follow_is_refused(data, tmp_path):
    def changed(change):
        proto = fast.read_model(data.tokenizer)
        change(proto)
        (tmp_path / "odd.model").write_bytes(proto.SerializeToString())

    for change, said in [
        (lambda proto: setattr(proto.trainer_spec, "model_type", 1), "another type of model"),
        (lambda proto: setattr(proto.pieces[300], "type", fast.USER_DEFINED), "user-defined pieces"),
        (lambda proto: setattr(proto.pieces[300], "type", fast.UNUSED), "unused pieces"),
        (lambda proto: setattr(proto.trainer_spec, "treat_whitespace_as_suffix", True), "spaces as suffixes"),
        (lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False), "spaces that are not escaped"),
        (lambda proto: setattr(proto.pieces[300], "piece", proto.pieces[301].piece), "a piece twice"),
    ]:
        changed(change)
        with pytest.raises(fast.InputError, match=f"odd.model: .* found {said}"):
            fast.convert(tmp_path / "odd.model", tmp_path, 64)
    (tmp_path / "odd.model").write_bytes(b"\xff no model")
    with pytest.raises(fast.InputError, match="expected a SentencePiece model, found something else"):
        fast.convert(tmp_path / "odd.model", tmp_path, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.model"]


def test_a_fast_tokenizer_that_would_cut_a_text_differently_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(fast, "merge_pairs", lambda proto: [])
    with pytest.raises(fast.InputError, match="a fast tokenizer that encodes .*: expected .*, found"):
        fast.convert(data.tokenizer, tmp_path, 64)


# The export ----------------------------------------------------------------------------------------------------------


class Exported(NamedTuple):
    run: Path  # a run's folder
    folder: Path  # its export
    tokenizer: str
    tokenizer_of_mlx_lm: object
    model: object
    config: dict
    said: str


def tool(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_tool(export_mlx.main, [str(part) for part in argv])
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def exported(script, data, tmp_path_factory):
    """A run of the script, a few steps long, and its export as mlx-lm loads it."""
    logs = tmp_path_factory.mktemp("logs")
    env = TINY | data.env | dict(LOG_DIR=logs, RUN_ID="looped", ITERATIONS=2, MODEL_DIM=64, LORA_RANK=2, XSA=1)
    assert run_in_process(script, **(env | dict(LOOP_GATE="gain", LOOP_SCHEDULE=""))).code == 0
    outcome = tool(logs / "looped", "--out", logs / "exported")
    assert outcome.code == 0, outcome
    model, tokenizer, config = load(str(logs / "exported"), trust_remote_code=True, return_config=True)
    return Exported(
        logs / "looped", logs / "exported", data.env["TOKENIZER_PATH"], tokenizer, model, config, outcome.out
    )


def logits_of_run(script, file, ids, loops):
    weights, model, _ = script.load_model_file(str(file))
    return script_logits(script, script.model_config(script.Config(), model), weights, ids, loops)


def test_a_run_is_exported_with_the_tokenizer_that_its_log_names(script, exported):
    assert {path.name for path in exported.folder.iterdir()} == {
        "config.json", "model.safetensors", "recurrent_gpt.py", "result.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    ids = mx.array(np.arange(3, 23)[None])
    expected = logits_of_run(script, exported.run / "model.safetensors", ids, 2)
    assert np.abs(np.array(exported.model(ids)) - expected).max() < 1e-4
    assert "checked: logits within" in exported.said and "2 passes" in exported.said
    assert exported.config["exported_from"] == "model.safetensors"
    ours = exported.folder / "model.safetensors"  # the scripts read it as they read a run's
    assert np.array_equal(logits_of_run(script, ours, ids, 2), expected)


def test_the_number_of_passes_can_be_set_when_loading(script, exported):
    ids = mx.array(np.arange(3, 23)[None])
    for loops in (1, 4):
        model, _ = load_model(exported.folder, model_config={"loops": loops}, trust_remote_code=True)
        expected = logits_of_run(script, exported.run / "model.safetensors", ids, loops)
        assert np.abs(np.array(model(ids)) - expected).max() < 1e-4
        assert len(make_prompt_cache(model)) == 2 + 2 * loops


def test_an_artifact_and_a_checkpoint_are_exported_as_well(script, exported, tmp_path):
    ids = mx.array(np.arange(3, 23)[None])
    for name, more in (("model.int6.rgpt", ["--loops", "3"]), ("checkpoint.safetensors", [])):
        out = tmp_path / name
        assert tool(exported.run / name, "--out", out, *more).code == 0
        model, config = load_model(out, trust_remote_code=True)
        loops = 3 if more else 2
        assert config["exported_from"] == name and config["loops"] == loops
        expected = logits_of_run(script, exported.run / name, ids, loops)
        assert np.abs(np.array(model(ids)) - expected).max() < 1e-4


def test_bad_input_is_refused_in_one_line_and_nothing_is_written(exported, tmp_path):
    out, run = tmp_path / "new", exported.run
    damaged = tmp_path / "damaged.rgpt"
    damaged.write_bytes((run / "model.int6.rgpt").read_bytes()[:-5])
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    wrong = train_tokenizer(tmp_path / "other.model", ["one two three four five"] * 9, vocab_size=280)
    before = tree(tmp_path)
    for argv, said in [
        ([tmp_path / "absent"], "absent: expected a run's folder"),
        ([tmp_path], "expected a run's folder or one of"),
        ([damaged], "its SHA-256 at the end"),
        ([run / "result.json"], "damaged or foreign file"),
        ([alone], "expected a train.log that names the tokenizer.*--tokenizer"),
        ([alone, "--tokenizer", tmp_path / "no.model"], "no.model: expected the run's tokenizer, found no file"),
        ([run, "--tokenizer", wrong], "a tokenizer of VOCAB_SIZE=320 pieces, found 280"),
        ([run, "--tokenizer", run / "result.json"], "expected a SentencePiece model"),
        ([run, "--loops", "0"], "loops: expected a whole number of at least 1"),
        ([run, "--loops", "two"], "invalid int value"),
        ([run, "--out", exported.folder], "expected a new folder, found something there"),
    ]:
        argv = argv if "--out" in argv else [*argv, "--out", out]
        assert_refused(tool(*argv), said)
    assert tree(tmp_path) == before


def test_an_export_that_differs_from_the_script_is_refused_and_leaves_nothing(exported, tmp_path, monkeypatch):
    wrong = tmp_path / "recurrent_gpt.py"
    source = export_mlx.MODEL_FILE.read_text()
    wrong.write_text(source.replace("scale=-1.0", "scale=1.0"))
    monkeypatch.setattr(export_mlx, "MODEL_FILE", wrong)
    assert_refused(tool(exported.run, "--out", tmp_path / "out" / "new"), "expected logits within 0.001")
    assert list((tmp_path / "out").iterdir()) == []


# mlx-lm's commands ---------------------------------------------------------------------------------------------------


def test_generate_writes_what_the_script_would_write(script, exported, monkeypatch):
    out = mlx_lm_command(
        monkeypatch, "generate", "--model", exported.folder, "--prompt", TEXT, "--max-tokens", 6, "--temp", 0
    )
    model = spm.SentencePieceProcessor(model_file=exported.tokenizer)
    ids = [model.bos_id(), *model.encode(TEXT)]
    for _ in range(6):
        logits = logits_of_run(script, exported.run / "model.safetensors", mx.array([ids[-32:]]), 2)
        ids.append(int(logits[0, -1].argmax()))
    assert model.decode(ids[-6:]).strip() in out


def test_batch_generate_gives_each_prompt_what_it_gets_alone(exported):
    from mlx_lm import batch_generate, generate

    model, tokenizer = exported.model, exported.tokenizer_of_mlx_lm
    prompts = [tokenizer.encode(text) for text in (TEXT, "A", "Depth mixes the core")]
    alone = [generate(model, tokenizer, prompt, max_tokens=5) for prompt in prompts]
    together = batch_generate(model, tokenizer, prompts, max_tokens=5).texts
    assert [text.strip() for text in together] == [text.strip() for text in alone]  # which keep other spaces
    text = generate(model, tokenizer, prompts[0], max_tokens=5, kv_bits=8, kv_group_size=32)
    assert isinstance(text, str)


def test_convert_quantizes_every_matrix_and_the_result_loads(exported, tmp_path, monkeypatch):
    out, ids = tmp_path / "q", mx.array(np.arange(3, 23)[None])
    mlx_lm_command(
        monkeypatch, "convert", "--model", exported.folder, "--mlx-path", out, "-q", "--q-bits", 8, "--q-group-size", 32
    )
    model, tokenizer = load(str(out), trust_remote_code=True)
    quantized = {name for name, _ in tree_flatten(model.parameters()) if name.endswith(".scales")}
    assert len(quantized) == 6 * len(model.layers) + 1
    assert np.abs(np.array(model(ids)) - np.array(exported.model(ids))).max() < 0.1
    assert [tokenizer.encode(text) for text in hard_texts(20)] == [
        exported.tokenizer_of_mlx_lm.encode(text) for text in hard_texts(20)
    ]


def test_lora_trains_every_stored_block_once_and_fuse_keeps_what_it_learned(script, exported, tmp_path, monkeypatch):
    for name, part in (("train", slice(0, 4)), ("valid", slice(4, 6))):
        lines = [json.dumps({"text": text[:90]}) for text in made_up_documents()[part]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    adapter, fused = tmp_path / "adapter", tmp_path / "fused"
    options = ("--iters", 2, "--batch-size", 2, "--val-batches", 1, "--num-layers", -1, "--learning-rate", 0.01)
    train = ("--model", exported.folder, "--train", "--data", tmp_path, *options, "--adapter-path", adapter)
    mlx_lm_command(monkeypatch, "lora", *train)
    assert len(mx.load(str(adapter / "adapters.safetensors"))) == 2 * 6 * len(exported.model.layers)
    mlx_lm_command(monkeypatch, "fuse", "--model", exported.folder, "--adapter-path", adapter, "--save-path", fused)
    ids = mx.array(np.arange(3, 23)[None])
    adapted, _ = load(str(exported.folder), adapter_path=str(adapter), trust_remote_code=True)
    found, _ = load_model(fused, trust_remote_code=True)
    assert np.abs(np.array(found(ids)) - np.array(adapted(ids))).max() < 1e-4
    assert np.abs(np.array(found(ids)) - np.array(exported.model(ids))).max() > 1e-3


def test_server_answers_a_request(exported, monkeypatch):
    answer = answer_of_server(monkeypatch, exported.folder, TEXT)
    expected = exported.tokenizer_of_mlx_lm.encode(TEXT)
    assert answer["usage"]["prompt_tokens"] == len(expected)
    assert answer["usage"]["completion_tokens"] == 4
