"""retrofit/convert.py: the papers' rules, parents that are kept or repeated exactly, and files that start runs."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "retrofit"))
import common
import convert
from conftest import VOCAB, random_weights, run_in_process, tree, write_dataset

IDS = np.arange(20) * 7 % 300


def save(script, c, path, loops=1, weights=None, **more):
    """A model file of weights that are away from every start value; `more` goes into its model settings."""
    weights = weights or random_weights(script, c, seed=5)
    about = script.about(c, loops)
    about["model"] |= more
    script.save_tensors(path, {f"weights.{name}": value for name, value in weights.items()}, about)
    return weights


def logits(script, c, weights, loops):
    engine = script.Engine(c)
    engine.build(weights, training=False)
    return engine.next_logits(IDS, loops)


@pytest.fixture
def tool(script, monkeypatch, tmp_path):
    """`tool("parent.safetensors", "child.safetensors", "--layout=...", ...)` in tmp_path, with the script at hand."""
    monkeypatch.setattr(convert, "load_script", lambda name: script)
    monkeypatch.chdir(tmp_path)
    return lambda *flags: common.run_tool(convert.main, [str(flag) for flag in flags])


def converted(script, config, path, loops=None, **changes):
    """Config, weights and passes of a converted file."""
    weights, model, passes = script.load_model_file(str(path))
    return script.model_config(config(script), model), weights, passes


# ---- rules


def plan(init, layout, count, layers=""):
    import train_gpt

    return convert.plan_of(init, train_gpt.parse_layout(layout), count, layers)


RETROFITS = {  # arXiv 2511.07384: TinyLlama (22 layers), Llama-3.2-1B and OLMo-2-1B (16), its ablations, all layers
    "TinyLlama": (22, "4+8x4+4", "0-3,10-17,18-21", [*range(4), *range(10, 18), *range(18, 22)]),
    "TinyLlama by default": (22, "4+8x4+4", "", [*range(4), *range(10, 22)]),
    "Llama": (16, "4+6x4+4", "", [0, 1, 2, 3, *range(6, 16)]),
    "ablation": (16, "2+4x32+2", "", [0, 1, *range(10, 16)]),
    "own choice": (22, "2+4x4+2", "0-1,8-11,20-21", [0, 1, 8, 9, 10, 11, 20, 21]),
    "single layers, no coda": (5, "1+1x2", "0,3,", [0, 3]),
}


@pytest.mark.parametrize("case", RETROFITS)
def test_dropping_takes_the_papers_layers(case):
    count, layout, layers, expected = RETROFITS[case]
    found = plan("drop", layout, count, layers)
    assert found.sources == [[layer] for layer in expected] and found.passes == 1
    assert found.stands_for == expected


TIED = {  # arXiv 2410.20672: Gemma 2B (18 layers) in 2 and 3 loops, TinyLlama (22) in 2
    ("step", "9x2", 18): [[layer] for layer in (0, 2, 4, 6, 8, 11, 13, 15, 17)],
    ("step", "6x3", 18): [[layer] for layer in (0, 3, 7, 10, 14, 17)],
    ("step", "11x2", 22): [[layer] for layer in (0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21)],
    ("step", "1x3", 3): [[0]],
    ("average", "9x2", 18): [[layer, layer + 9] for layer in range(9)],
    ("average", "6x3", 18): [[layer, layer + 6, layer + 12] for layer in range(6)],
    ("lower", "9x2", 18): [[layer] for layer in range(9)],
    ("random", "2x2", 4): [[], []],
    ("average", "1+2x2+2", 7): [[0], [1, 3], [2, 4], [5], [6]],
    ("step", "1+2x3+1", 8): [[0], [1], [6], [7]],
    ("lower", "2+1x2", 4): [[0], [1], [2]],
}


@pytest.mark.parametrize("case", TIED, ids=lambda case: " ".join(map(str, case)))
def test_tying_takes_the_papers_layers(case):
    init, layout, count = case
    found = plan(init, layout, count)
    assert found.sources == TIED[case] and found.stands_for == list(range(count))


REFUSED_PLANS = {
    "keep, too few": (("keep", "1+2x2+1", 5), r"--init keep: expected a target with 5 blocks.*found 1 \+ 2 \+ 1"),
    "drop, too many": (("drop", "2+2x2+2", 5), "at most 5 blocks"),
    "tied, does not fit": (("average", "1+2x2+1", 5), r"applies 5 blocks.*found 1 \+ 2\*2 \+ 1 = 6"),
    "out of range": (("drop", "1+2x2+1", 5, "0,2-3,5"), "expected layers 0 to 4 of the parent, found 5"),
    "other sizes": (("drop", "1+2x2+1", 5, "0-1,2,4"), "expected 1, 2 and 1 layers.*found 2, 1, 1"),
    "twice": (("drop", "1+2x2+1", 5, "0,0-1,4"), "each once"),
    "falling": (("drop", "1+2x2+1", 5, "0,3-2,4"), "ranges that rise"),
    "no ranges": (("drop", "1+2x2+1", 5, "0-4"), "prelude,core,coda"),
    "layers of another": (("keep", "1+2x2+1", 4, "0,1-2,3"), "--layers: expected --init drop"),
}


@pytest.mark.parametrize("case", REFUSED_PLANS)
def test_a_target_that_does_not_fit_is_refused(case):
    arguments, message = REFUSED_PLANS[case]
    with pytest.raises(convert.InputError, match=message) as caught:
        plan(*arguments)
    assert "\n" not in str(caught.value)


# ---- exactness


@pytest.mark.parametrize("skips", ["none", "per_loop", "official"])
def test_a_parent_that_keeps_all_layers_is_itself_at_one_pass(script, tool, config, tmp_path, skips):
    c = config(script, layout="5", skips=skips, loop_schedule="", loop_gate="gain", xsa=True)
    weights = save(script, c, tmp_path / "a.safetensors")
    more = ("--lora-rank=2", "--pass-vectors=1", "--loop-gate=gain", "--gate-init=0.5")
    assert tool("a.safetensors", "b.safetensors", "--layout=1+3x3+1", "--init=keep", *more) == 0
    child, found, passes = converted(script, config, tmp_path / "b.safetensors")
    assert (child.layout, child.lora_rank, child.pass_vectors, child.xsa, passes) == ("1+3x3+1", 2, True, True, 1)
    assert np.array_equal(logits(script, child, found, 1), logits(script, c, weights, 1))
    assert found["loop_gate"].tolist() == [0.5] * 3 and not found["loop_embed"].any()
    assert not np.allclose(logits(script, child, found, 2), logits(script, c, weights, 1), atol=1e-3)


def test_a_scale_by_a_blocks_number_is_taken_into_the_matrices(script, tool, config, tmp_path):
    c = config(script, layout="4", loop_schedule="", norm_scale=True, rotary_dims=4, mlp_slope=0.5)
    weights = save(script, c, tmp_path / "a.safetensors")
    assert tool("a.safetensors", "b.safetensors", "--layout=1+1x2+1", "--init=drop", "--layers=0,2,3") == 0
    child, found, _ = converted(script, config, tmp_path / "b.safetensors")
    assert not child.norm_scale and (child.rotary_dims, child.mlp_slope) == (4, 0.5)
    third = weights["blocks.2.mlp.fc.weight"]
    assert np.allclose(found["blocks.1.mlp.fc.weight"], third / math.sqrt(3), rtol=1e-6)
    assert np.array_equal(found["blocks.1.attn.q.weight"], weights["blocks.2.attn.q.weight"])
    assert tool("a.safetensors", "c.safetensors", "--layout=1+2x2+1", "--init=keep", "--skips=per_loop") == 0
    child, found, _ = converted(script, config, tmp_path / "c.safetensors")
    assert np.abs(logits(script, child, found, 1) - logits(script, c, weights, 1)).max() < 1e-4


@pytest.mark.parametrize("init", convert.TYING)
def test_full_rank_with_a_row_a_pass_is_the_parent_and_without_is_not(script, tool, config, tmp_path, init):
    c = config(script, layout="6", skips="none", loop_schedule="")
    weights = save(script, c, tmp_path / "a.safetensors")
    parent = logits(script, c, weights, 1)
    files = {"rows": (), "none": ("--pass-vectors=0",)}
    differences = {}
    for name, more in files.items():
        flags = ("--layout=1+2x2+1", f"--init={init}", "--lora-rank=full", *more)
        assert tool("a.safetensors", f"{name}.safetensors", *flags) == 0
        child, found, passes = converted(script, config, tmp_path / f"{name}.safetensors")
        assert child.lora_rank == c.model_dim and child.pass_vectors == (not more) and passes == 2
        differences[name] = np.abs(logits(script, child, found, 2) - parent).max()
    assert differences["rows"] < 1e-4 < 1e-2 < differences["none"]


def test_official_shortcuts_follow_the_layers(any_script, config, tmp_path, monkeypatch):
    """Their order is that of the applied blocks, so that tied layers at full rank keep them, too."""
    monkeypatch.setattr(convert, "load_script", lambda name: any_script)
    c = config(any_script, layout="6", skips="official", loop_schedule="")
    weights = save(any_script, c, tmp_path / "a.safetensors")
    flags = ["--layout=3x2", "--init=average", "--lora-rank=full"]
    assert convert.main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), *flags]) == 0
    child, found, _ = converted(any_script, config, tmp_path / "b.safetensors")
    assert np.abs(logits(any_script, child, found, 2) - logits(any_script, c, weights, 1)).max() < 1e-4


def test_shortcuts_without_a_place_are_named(any_script, tool, config, tmp_path, capsys):
    c = config(any_script, layout="6", skips="per_loop", loop_schedule="")
    weights = save(any_script, c, tmp_path / "a.safetensors")
    assert tool("a.safetensors", "b.safetensors", "--layout=1+2x2+1", "--init=lower") == 0
    assert "shortcuts of the parent without a place in the child: 1 to 4, 2 to 3\n" in capsys.readouterr().out
    rows = converted(any_script, config, tmp_path / "b.safetensors")[1]["skip_weights"]
    assert np.array_equal(rows[0], weights["skip_weights"][0]) and not rows[1].any()


def test_what_is_missing_falls_with_the_rank(any_script, tool, config, tmp_path, capsys):
    c = config(any_script, layout="4", skips="none", loop_schedule="")
    save(any_script, c, tmp_path / "a.safetensors")
    missing = []
    for rank in (0, 1, 8, "full"):
        assert (
            tool("a.safetensors", f"{rank}.safetensors", "--layout=2x2", "--init=average", f"--lora-rank={rank}") == 0
        )
        missing.append(float(re.search(r"missing of the matrices: ([\d.]+)", capsys.readouterr().out)[1]))
    assert missing == sorted(missing, reverse=True) and missing[0] > 0.1 and missing[2] < 0.8 * missing[0]
    assert missing[3] == 0
    assert (
        tool("a.safetensors", "zero.safetensors", "--layout=2x2", "--init=average", "--lora-rank=3", "--lora=zero") == 0
    )
    child, found, _ = converted(any_script, config, tmp_path / "zero.safetensors")
    assert not child.pass_vectors and not any(found[name].any() for name in found if name.endswith("lora_b"))


@pytest.mark.parametrize("gate", ["x0", "gain"])
def test_a_looped_parent_is_unrolled_with_its_passes(script, tool, config, tmp_path, gate):
    """LoRA, rows, loop embeddings and gates of its passes, too, where passes of the child begin and end there."""
    c = config(script, layout="1+1x3+1", skips="none", lora_rank=2, pass_vectors=True, loop_gate=gate)
    weights = save(script, c, tmp_path / "a.safetensors", loops=3)
    flags = ("--layout=1+1x3+1", "--init=average", "--lora-rank=full")
    assert tool("a.safetensors", "b.safetensors", *flags) == 0
    child, found, passes = converted(script, config, tmp_path / "b.safetensors")
    assert passes == 3
    assert np.abs(logits(script, child, found, 3) - logits(script, c, weights, 3)).max() < 1e-4


def test_what_a_looped_parent_adds_elsewhere_is_refused(any_script, tool, config, tmp_path, capsys):
    c = config(any_script, layout="1+2x2+1", skips="none", loop_gate="gain")
    save(any_script, c, tmp_path / "a.safetensors", loops=2)
    before = tree(tmp_path)
    assert tool("a.safetensors", "b.safetensors", "--layout=2+1x2+2", "--init=average") == 1
    assert re.match(r"error: loop_embed: expected a pass that begins at layer 1, .*--layout", capsys.readouterr().err)
    same = ("a.safetensors", "b.safetensors", "--layout=1+2x2+1", "--init=average", "--loop-gate=none")
    assert tool(*same) == 1
    assert "loop_gate: expected a gate of the kind gain after layers 3 to 4" in capsys.readouterr().err
    assert tree(tmp_path) == before
    assert tool("a.safetensors", "b.safetensors", "--layout=1+2x4+1", "--init=keep", "--passes=1") == 0


# ---- into a run


def test_a_run_starts_from_the_file_with_the_parents_loss(script, tool, config, tiny, data, tmp_path, capsys):
    c = config(script, layout="4", skips="none", loop_schedule="")
    weights = random_weights(script, c, seed=5)
    weights["tok_emb.weight"] *= 5  # so that the loss tells one model from another
    save(script, c, tmp_path / "a.safetensors", weights=weights)
    assert tool("a.safetensors", "b.safetensors", "--layout=2x2", "--init=average", "--lora-rank=full") == 0
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:2] == ["python", f"{script.__name__}.py"] and "--pass_vectors=1" in command
    rates = [f"--{name}_lr=0" for name in ("matrix", "scalar", "tied_embed", "lora", "loop_gate")]
    outcome = run_in_process(script, *command[2:], "--run_id=a", "--iterations=1", *rates, **tiny)
    assert outcome.code == 0, outcome
    result = json.loads((tmp_path / "logs" / "a" / "result.json").read_text())
    here = ("--device=cpu", "--dtype=float32", "--compile=0")
    score = run_in_process(script, "--mode=eval", "--checkpoint=a.safetensors", *here, **data.env)
    expected = float(re.search(r"val_loss:([\d.]+)", score.out)[1])
    assert result["val_loss_raw"] == pytest.approx(expected, abs=1e-5)
    start = script.load_model_file("b.safetensors")[0]
    after = script.load_model_file(str(tmp_path / "logs" / "a" / "model.safetensors"))[0]
    assert all(np.array_equal(start[name], after[name]) for name in start)


def test_an_artifact_and_a_checkpoint_are_parents_too(any_script, tool, config, tmp_path):
    c = config(any_script, layout="4", loop_schedule="")
    weights = random_weights(any_script, c)
    tensors = {f"weights.{name}": value for name, value in weights.items()}
    tensors |= {f"exp_avg.{name}": value for name, value in weights.items()}  # a checkpoint has more than weights
    any_script.save_tensors(tmp_path / "checkpoint.safetensors", tensors, any_script.about(c, 1))
    (tmp_path / "a.rgpt").write_bytes(any_script.export_model(c, weights, 1).data)
    for parent in ("a.rgpt", "checkpoint.safetensors"):
        assert tool(parent, f"{parent}.safetensors", "--layout=1+2x2+1", "--init=keep") == 0
        found, expected = (any_script.load_model_file(name)[0] for name in (f"{parent}.safetensors", parent))
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


# ---- activations


def test_the_knee_is_where_a_falling_curve_turns_flat():
    assert convert.knee([9, 3, 1, 1, 1, 1, 1]) == 2
    assert convert.knee([1, 0.9, 0.8, 0.1, 0.05, 0.02, 0]) == 3
    assert convert.propose_band([0.5, 0.3, 0.1, 0.1, 0.1, 0.1, 0.3]) == (2, 5)
    assert convert.propose_band([0.5, 0.1, 0.1, 0.1, 0.4, 0.5]) == (1, 3)
    assert convert.propose_band([0.5, 0.1]) is None
    assert convert.propose_band([0.1, 0.2, 0.3, 0.4]) is None  # nothing falls


def test_angles_are_parts_of_half_a_turn():
    x = np.float32([[1, 0], [1, 0], [1, 1], [2, 0]])
    y = np.float32([[0, 3], [-2, 0], [1, 0], [5, 0]])
    assert convert.angles(x, y) == pytest.approx([0.5, 1, 0.25, 0])


def test_layers_that_hardly_move_the_state_are_the_band(script, tool, config, tmp_path, capsys):
    c = config(script, layout="6", skips="none", loop_schedule="")
    weights = save(script, c, tmp_path / "a.safetensors")
    for layer, scale in enumerate((1.0, 0.8, 0.01, 0.01, 0.01, 0.8)):
        for name in ("attn_scale", "mlp_scale"):
            weights[f"blocks.{layer}.{name}"] *= scale
        weights[f"blocks.{layer}.resid_mix"][:] = [[1.0], [0.0]]
    save(script, c, tmp_path / "a.safetensors", weights=weights)
    folder = write_dataset(tmp_path / "data", [np.arange(65) % VOCAB], [np.arange(400) * 7 % VOCAB])
    flags = ("--tokens", folder, "--sequences=2")
    assert tool("a.safetensors", *flags) == 0
    out = capsys.readouterr().out
    assert "band: layers 2 to 4, such as --layout 2+3x2+1 --init keep\n" in out
    found = [float(line.split()[1]) for line in out.splitlines() if re.match(r" +\d+  0\.", line)]
    assert len(found) == 6 and max(found[2:5]) < 0.02 < 0.1 < min(found[0], found[1], found[5])
    assert tool("a.safetensors", "b.safetensors", "--layout=2+3x2+1", "--init=keep", *flags) == 0
    losses = re.findall(r"loss of the (\w+)(?: at \d pass\w*)?: ([\d.]+)", capsys.readouterr().out)
    assert [name for name, _ in losses] == ["parent", "child", "child"] and losses[0][1] == losses[1][1]
    ids, targets = convert.read_tokens(script, c, str(folder), 2)
    engine = script.Engine(c)
    engine.build(weights, training=False)
    assert float(losses[0][1]) == pytest.approx(engine.token_losses(ids, targets, 1).mean(), abs=1e-4)


# ---- refusals


REFUSALS = {
    "nothing to do": ((), "OUT: expected a file to write, or --tokens"),
    "no target": (("b.safetensors",), "OUT: expected it together with --layout and --init"),
    "no file": (("--layout=1+2x2+1", "--init=keep", "--tokens=x"), "OUT: expected it together"),
    "no parent": (("b.safetensors", "--layout=1+2x2+1", "--init=keep"), "missing.safetensors: expected an artifact"),
    "out exists": (("a.safetensors", "--layout=1+2x2+1", "--init=keep"), "a.safetensors: expected a new file"),
    "suffix": (("b.rgpt", "--layout=1+2x2+1", "--init=keep"), "OUT: expected NAME.safetensors"),
    "folder": (("no/b.safetensors", "--layout=1+2x2+1", "--init=keep"), "no: expected a folder to write to"),
    "layout": (("b.safetensors", "--layout=two", "--init=keep"), 'LAYOUT: expected .*found "two"'),
    "init": (("b.safetensors", "--layout=1+2x2+1", "--init=upper"), "invalid choice: 'upper'"),
    "rank": (("b.safetensors", "--layout=2x2", "--init=step", "--lora-rank=33"), "0 to MODEL_DIM=32"),
    "rank no number": (("b.safetensors", "--layout=2x2", "--init=step", "--lora-rank=-1"), "a whole number or full"),
    "rank with one pass": (("b.safetensors", "--layout=4", "--init=keep", "--lora-rank=2"), "LORA_RANK: expected 0"),
    "svd of nothing": (("b.safetensors", "--layout=1+2x2+1", "--init=keep", "--lora-rank=2", "--lora=svd"), "tie no"),
    "kind without rank": (
        ("b.safetensors", "--layout=2x2", "--init=step", "--lora=svd"),
        "--lora: expected --lora-rank",
    ),
    "passes": (("b.safetensors", "--layout=1+2x2+1", "--init=keep", "--passes=2"), "--passes: expected 1 to 1"),
    "gate": (("b.safetensors", "--layout=1+2x2+1", "--init=keep", "--gate-init=nan"), "--gate-init: expected a number"),
    "no gate": (
        ("b.safetensors", "--layout=1+2x2+1", "--init=keep", "--loop-gate=none", "--gate-init=0"),
        "no loop gate",
    ),
    "sequences": (("--tokens=x", "--sequences=0"), "--sequences: expected 1 or more"),
    "tokens": (("--tokens=nowhere",), r"nowhere: expected fineweb_val_\*.bin, found none"),
    "fit": (("b.safetensors", "--layout=1+3x2+1", "--init=keep"), "--init keep: expected a target with 4 blocks"),
}


def test_bad_input_gets_one_line_and_writes_nothing(any_script, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "load_script", lambda name: any_script)
    monkeypatch.chdir(tmp_path)
    save(any_script, config(any_script, layout="4", loop_schedule=""), tmp_path / "a.safetensors")
    before = tree(tmp_path)
    for case, (flags, message) in REFUSALS.items():
        parent = "missing.safetensors" if case == "no parent" else "a.safetensors"
        assert common.run_tool(convert.main, [parent, *flags]) == 1, case
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and re.search(message, err), (case, err)
    assert tree(tmp_path) == before


def test_a_parent_that_diverged_is_refused(any_script, tool, config, tmp_path, capsys):
    c = config(any_script, layout="4", loop_schedule="")
    weights = random_weights(any_script, c)
    weights["blocks.1.mlp.fc.weight"][0, 0] = np.nan
    save(any_script, c, tmp_path / "a.safetensors", weights=weights)
    assert tool("a.safetensors", "b.safetensors", "--layout=2x2", "--init=average", "--lora-rank=2") == 1
    assert "expected finite weights, found others in blocks.1.mlp.fc.weight" in capsys.readouterr().err


def test_an_option_that_is_not_known_is_refused_by_name(any_script, tool, config, tmp_path, capsys, monkeypatch):
    c = config(any_script, layout="4", loop_schedule="")
    flags = ("b.safetensors", "--layout=1+2x2+1", "--init=keep")
    save(any_script, c, tmp_path / "a.safetensors", injection="concat")
    assert tool("a.safetensors", *flags) == 1
    assert "model settings: expected those that this version knows, found injection" in capsys.readouterr().err
    # A setting that the scripts have and this tool does not know: off it is carried on, on it is refused.
    monkeypatch.setattr(convert, "KNOWN", [name for name in convert.KNOWN if name != "xsa"])
    save(any_script, dataclasses.replace(c, xsa=True), tmp_path / "a.safetensors")
    assert tool("a.safetensors", *flags) == 1 and "error: xsa: " in capsys.readouterr().err
    save(any_script, c, tmp_path / "a.safetensors")
    assert tool("a.safetensors", *flags) == 0


def test_every_setting_of_a_model_is_known(any_script):
    """A new one is to be thought of here: does a tied block, a dropped layer, a new pass need anything for it?"""
    assert set(convert.KNOWN) == set(any_script.MODEL_FIELDS)
