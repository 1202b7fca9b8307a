"""Both scripts are one model: shared sections, weights, logits, gradients, updates, controls, identities, checkpoints.

Everything runs in float32 on the CPU at tiny sizes. Tolerances are the promises of design.md section 9.
"""

import ast
import dataclasses
import itertools
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "golden")]

import rebuild  # noqa: E402
import sync_shared  # noqa: E402

import train_gpt_mlx as mlx_script  # noqa: E402  (before torch: it chooses the BLAS that MLX uses)

mx = mlx_script.mx

import train_gpt as torch_script  # noqa: E402

torch = torch_script.torch
SCRIPTS = {"torch": torch_script, "mlx": mlx_script}
PATHS = {"torch": ROOT / "train_gpt.py", "mlx": ROOT / "train_gpt_mlx.py"}
LAYOUTS = ("9", "4", "5x3", "1+3x3+2", "2+2x2+1")
SKIPS, GATES = ("per_loop", "official", "none"), ("x0", "gain", "none")


def tiny(layout: str, **changes):
    """A Config of the torch script; the MLX script takes it as well, since CONFIG is shared."""
    sizes = dict(vocab_size=48, model_dim=32, num_heads=4, num_kv_heads=2, train_seq_len=16, train_batch_tokens=64)
    c = torch_script.Config(layout=layout, compile=False, device="cpu", dtype="float32", **{**sizes, **changes})
    torch_script.check_config(c)
    return c


def perturbed(c, seed: int = 5) -> dict[str, np.ndarray]:
    """Initial weights moved away from zero and from the identity, so that every parameter matters."""
    rng = np.random.RandomState(seed)
    weights = torch_script.initial_weights(c)
    for name, value in weights.items():
        spread = {"tok_emb.weight": 0.5, "loop_embed": 0.5}.get(name, 0.15)
        weights[name] = (value + spread * rng.standard_normal(value.shape)).astype(np.float32)
    return weights


class Fixed:
    """A token stream of random ids, or of given batches [step, sequence, length + 1]."""

    def __init__(self, c, batches: np.ndarray | None = None):
        self.c, self.batches = c, batches
        self.ids = np.random.RandomState(9).randint(0, c.vocab_size, 4096)

    def microbatches(self, start, batch, rank, world, largest):
        if self.batches is not None:
            rows = self.batches[start]
            yield rows[:, :-1], rows[:, 1:]
            return
        length = self.c.train_seq_len
        for a, b in torch_script.microbatch_bounds(batch // length, length, largest):
            part = self.ids[start + a * length : start + b * length + 1].astype(np.int64)
            yield part[:-1].reshape(b - a, length), part[1:].reshape(b - a, length)


def engine_of(script: str, c, weights):
    engine = SCRIPTS[script].Engine(c)
    engine.build(weights)
    return engine


def logits_of(script: str, engine, ids: np.ndarray, loops: int) -> np.ndarray:
    if script == "torch":
        with torch.no_grad():
            return engine.model(torch.from_numpy(ids), loops).numpy()
    engine.next_logits(ids[0], loops)  # puts the weights into the model
    return np.array(engine.model(mx.array(ids.astype(np.int32)), loops))


def gradients_of(script: str, engine, ids: np.ndarray, targets: np.ndarray, loops: int) -> dict[str, np.ndarray]:
    """Of the sum of the losses over TRAIN_BATCH_TOKENS, as in a step."""
    if script == "mlx":
        params, arrays = engine.params, (mx.array(ids.astype(np.int32)), mx.array(targets.astype(np.int32)))
        return {name: np.array(g) for name, g in engine.function("gradients", loops)(params, *arrays)[1].items()}
    params, losses = dict(engine.model.named_parameters()), engine.losses
    loss = losses(torch.from_numpy(ids), torch.from_numpy(targets), loops).sum() / engine.config.train_batch_tokens
    engine.optimizer.grads.zero_()
    loss.backward()
    found = {name: p.grad.numpy().copy() for name, p in params.items()}
    engine.optimizer.grads.zero_()
    return found


def updated(script: str, engine, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights after an update by these gradients."""
    if script == "torch":
        for name, p in engine.model.named_parameters():
            p.grad.copy_(torch.from_numpy(grads[name]))
        engine.optimizer.update(1.0, 0.9, torch.float32)
        return engine.weights()
    arrays, optimizer = {name: mx.array(value) for name, value in grads.items()}, engine.optimizer
    _, weights = optimizer.update(
        lambda state, numbers: optimizer.rule(engine.params, arrays, state, numbers), (), 1.0, 0.9
    )
    return {name: np.array(value) for name, value in weights.items()}


def train(script: str, c, weights, loops: list[int], stream=None) -> tuple[list[float], dict[str, np.ndarray], object]:
    """Losses, weights and the engine after one step for each entry of `loops`."""
    engine, stream = engine_of(script, c, weights), stream or Fixed(c)
    size = 1 if stream.batches is not None else c.train_batch_tokens
    losses = [
        engine.read(engine.step(stream, step * size, passes, 1.0, torch_script.momentum_at(c, step)))[0]
        for step, passes in enumerate(loops)
    ]
    return losses, engine.weights(), engine


def assert_close(
    mine: dict, theirs: dict, tolerance: float, base: dict | None = None, noise: dict | None = None
) -> None:
    """Every array equal to `tolerance` times its norm (or the norm of how far it went from `base`). Where `noise` is
    true nothing is compared."""
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        size = np.linalg.norm(theirs[name] - (base[name] if base else 0))
        difference = value - theirs[name]
        if noise is not None:
            difference[noise[name]] = 0
        assert np.linalg.norm(difference) <= tolerance * size + 1e-7, name


def only_rounding(grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where a gradient is rounding errors, less than 1e-4 of the others in its tensor: Adam makes a whole step of it,
    in a direction of chance."""
    found = {name: (np.abs(g) < 1e-4 * np.sqrt(np.square(g).mean())) & (g != 0) for name, g in grads.items()}
    assert sum(part.sum() for part in found.values()) < 0.005 * sum(part.size for part in found.values())
    return found


def same(a: dict, b: dict) -> bool:
    """Equal to the last bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# ---- one design in two files

SECTIONS = [
    *("CONFIG", "MODEL THE PLAN", "MODEL THE FORWARD PASS", "SCHEDULES", "OPTIMIZER", "DATA AND BYTES", "ENGINE"),
    *("TRAIN", "EXPORT", "ROUNDING AND FINISH", "RUN LOG", "MAIN"),
]
OF_A_FRAMEWORK = ("MODEL, THE FORWARD PASS", "OPTIMIZER", "ENGINE")


def test_sections_stand_in_order_and_the_shared_ones_are_equal_byte_for_byte():
    parts = {script: sync_shared.sections(path.read_text()) for script, path in PATHS.items()}
    titles = {script: [sync_shared.title(part) for part in found[1:]] for script, found in parts.items()}
    assert titles["torch"] == titles["mlx"]
    named = [title.removesuffix(" [shared]") for title in titles["torch"]]
    assert [name.replace("MODEL, ", "MODEL ") for name in named] == SECTIONS
    assert [title for title in titles["torch"] if not title.endswith("[shared]")] == list(OF_A_FRAMEWORK)
    for title, mine, theirs in zip(titles["torch"], parts["torch"][1:], parts["mlx"][1:]):
        if title.endswith("[shared]"):
            assert mine == theirs, title


# What only one framework needs.
ONLY = {
    "torch": {"Engine.can_compile", "Engine.eager", "Engine.probed", "Optimizer.update_adam", "Optimizer.update_muon",
              "Probe", "Probe.__call__", "Probe.backward", "launched_as", "memory_needed"},
    "mlx": {"with_probe", "with_probe_vjp", "Engine.function", "Engine.mean_over_ranks",
            "Engine.sum_over_ranks", "Optimizer.rule"},
}  # fmt: skip


def framework_names(script: str) -> list[str]:
    """Classes, methods and functions of the three framework sections, in order."""
    parts = sync_shared.sections(PATHS[script].read_text())[1:]
    tree = ast.parse("".join(part for part in parts if not sync_shared.title(part).endswith("[shared]")))
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.ClassDef):
            inner = [n.name.replace("forward", "__call__") for n in node.body if isinstance(n, ast.FunctionDef)]
            names += [node.name, *(f"{node.name}.{name}" for name in inner)]
    return names


def test_framework_sections_have_the_same_names():
    names = {script: framework_names(script) for script in SCRIPTS}
    assert all(ONLY[script] <= set(names[script]) for script in SCRIPTS)
    mine, theirs = ([name for name in names[script] if name not in ONLY[script]] for script in SCRIPTS)
    assert mine == theirs


# Lines after `ruff format`: what they are. More are to be asked for, not squeezed in.
LINES = {"torch": 3574, "mlx": 3466}


@pytest.mark.parametrize("script", SCRIPTS)
def test_length_is_honest(script):
    """The file is as `ruff format` leaves it, so that its lines are counted as they are read."""
    path = PATHS[script]
    assert subprocess.run([sys.executable, "-m", "ruff", "format", "--check", path], cwd=ROOT).returncode == 0
    lines = path.read_text().splitlines()
    assert max(len(line) for line in lines) <= 120
    assert len(lines) <= LINES[script]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_function_is_above_60_lines(script):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(PATHS[script].read_text())) if isinstance(node, kinds)]
    assert len(found) > 150
    too_long = {node.name: node.end_lineno - node.lineno + 1 for node in found if node.end_lineno - node.lineno >= 60}
    assert not too_long


# ---- weights, logits, gradients, updates


@pytest.mark.parametrize("layout,skips", [*zip(LAYOUTS, itertools.cycle(SKIPS)), ("9", "official"), ("5x3", "none")])
def test_names_shapes_and_initial_weights(layout, skips):
    c = tiny(layout, skips=skips, lora_rank=2 if "x" in layout else 0)
    weights = torch_script.initial_weights(c)
    assert {name: value.shape for name, value in weights.items()} == torch_script.param_shapes(c)
    for script in SCRIPTS:
        assert same(engine_of(script, c, weights).weights(), weights), script
        assert same(SCRIPTS[script].initial_weights(c), weights), script


def model_cases():
    """Every combination of settings in one layout; in the others every pair of shortcuts and gate."""
    for layout, (i, skips), (j, gate), rank in itertools.product(LAYOUTS, enumerate(SKIPS), enumerate(GATES), (0, 2)):
        if "x" not in layout:
            if gate == "none" and not rank:
                yield layout, skips, gate, rank
        elif layout == "1+3x3+2" or rank == 2 * ((i + j) % 2):
            yield layout, skips, gate, rank


@pytest.mark.parametrize("layout,skips,gate,rank", list(model_cases()))
def test_logits_gradients_and_three_steps(layout, skips, gate, rank):
    clip = 0.5 if rank else 0.0
    c = tiny(layout, skips=skips, loop_gate=gate, lora_rank=rank, grad_clip_norm=clip)
    weights, stream = perturbed(c), Fixed(c)
    engines = {script: engine_of(script, c, weights) for script in SCRIPTS}
    passes = range(1, torch_script.parse_layout(layout).loops + 1)
    trained = passes[(SKIPS.index(skips) + GATES.index(gate) + rank) % len(passes)]
    ((ids, targets),) = stream.microbatches(0, 64, 0, 1, 64)
    noise = None
    for loops in passes if layout == "1+3x3+2" else {trained, passes[-1]}:
        logits = {script: logits_of(script, engine, ids, loops) for script, engine in engines.items()}
        assert np.abs(logits["torch"] - logits["mlx"]).max() < 1e-4
        losses = {script: engine.token_losses(ids, targets, loops) for script, engine in engines.items()}
        assert np.abs(losses["torch"] - losses["mlx"]).max() < 1e-4
        grads = {script: gradients_of(script, engine, ids, targets, loops) for script, engine in engines.items()}
        assert_close(grads["mlx"], grads["torch"], 1e-3)
        noise = only_rounding(grads["torch"]) if loops == trained else noise
    mine, theirs = (train(script, c, weights, [trained] * 3) for script in ("mlx", "torch"))
    assert np.allclose(mine[0], theirs[0], rtol=0, atol=1e-4)
    assert_close(mine[1], theirs[1], 1e-3, base=weights, noise=noise)
    assert_close(mine[2].optimizer.state(), theirs[2].optimizer.state(), 1e-3)  # the updates alone do not show clipping


# Every part of the recipe, and what it is off.
RECIPE = dict(xsa=True, rotary_dims=4, norm_scale=True, mlp_slope=0.5, muon_row_norm=True, weight_decay=2.0)


@pytest.mark.parametrize("part", RECIPE)
def test_part_of_the_recipe(part):
    """The same logits, gradients and steps in both scripts, and not those of a model without it."""
    plain, c = tiny("1+3x2+1"), tiny("1+3x2+1", **{part: RECIPE[part]})
    weights, stream = perturbed(c), Fixed(c)
    engines = {script: engine_of(script, c, weights) for script in SCRIPTS}
    ((ids, targets),) = stream.microbatches(0, 64, 0, 1, 64)
    logits = {script: logits_of(script, engine, ids, 2) for script, engine in engines.items()}
    assert np.abs(logits["torch"] - logits["mlx"]).max() < 1e-4
    grads = {script: gradients_of(script, engine, ids, targets, 2) for script, engine in engines.items()}
    assert_close(grads["mlx"], grads["torch"], 1e-3)
    mine, theirs = (train(script, c, weights, [2] * 3) for script in ("mlx", "torch"))
    assert np.allclose(mine[0], theirs[0], rtol=0, atol=1e-4)
    assert_close(mine[1], theirs[1], 1e-3, base=weights, noise=only_rounding(grads["torch"]))
    assert not np.allclose(train("torch", plain, weights, [2] * 3)[0], theirs[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scale_of_norms_and_slope_in_other_words(script):
    """What the i-th block, from 1, reads is divided by sqrt(i): as if its v and fc were, since q and k are normed. With
    a slope of 1 the MLP squares, whatever the sign; with a slope of a half the sign counts."""
    c = tiny("4", norm_scale=True)
    weights = perturbed(c)
    ids = np.random.RandomState(3).randint(0, c.vocab_size, (2, 16))
    other = dict(weights)
    for name in weights:
        if name.endswith(("attn.v.weight", "mlp.fc.weight")):
            other[name] = weights[name] / np.float32(math.sqrt(int(name.split(".")[1]) + 1))
    plain = tiny("4")
    found = [
        logits_of(script, engine_of(script, *of), ids, 1) for of in ((c, weights), (plain, other), (plain, weights))
    ]
    assert np.abs(found[0] - found[1]).max() < 1e-4 < 1e-2 < np.abs(found[0] - found[2]).max()
    turned = {name: -value if name.endswith("mlp.fc.weight") else value for name, value in weights.items()}
    for slope, differs in ((1.0, False), (0.5, True)):
        c = tiny("4", mlp_slope=slope)
        one, two = (logits_of(script, engine_of(script, c, some), ids, 1) for some in (weights, turned))
        assert (np.abs(one - two).max() > 1e-2) == differs


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_of_one_length_and_decay(script):
    """With MUON_ROW_NORM the size of a gradient's rows does not count. A decay takes its part of matrices and
    embedding, and of nothing else."""
    steps = {}
    for row_norm in (False, True):
        c = tiny("2", muon_row_norm=row_norm)
        weights, found = perturbed(c), []
        for scale in (1.0, np.linspace(1, 5, c.model_dim, dtype=np.float32)[:, None]):
            engine = engine_of(script, c, weights)
            grads = {name: np.ones_like(value) * 1e-3 for name, value in weights.items()}
            name = "blocks.1.attn.q.weight"
            grads[name] = np.random.RandomState(5).standard_normal(weights[name].shape).astype(np.float32) * scale
            found.append(updated(script, engine, grads)[name])
        steps[row_norm] = np.abs(found[0] - found[1]).max()
    assert steps[True] < 1e-5 < 1e-3 < steps[False]
    kinds = (tiny("2"), tiny("2", weight_decay=0.5))
    plain, decayed = (updated(script, engine_of(script, c, weights), grads) for c in kinds)
    for name, value in weights.items():
        rate = {"matrix": c.matrix_lr, "embed": c.tied_embed_lr}.get(torch_script.param_group(name), 0)
        assert np.allclose(plain[name] - decayed[name], 0.5 * rate * value, atol=1e-6), name


def with_rows(c, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same model with PASS_VECTORS: what a pass shares becomes a row of its own."""
    shapes = torch_script.param_shapes(dataclasses.replace(c, pass_vectors=True))
    return {name: np.broadcast_to(value, shapes[name]).copy() for name, value in weights.items()}


def test_a_row_a_pass_gives_both_scripts_the_same_logits_gradients_and_steps():
    c = tiny("1+3x2+1", pass_vectors=True, lora_rank=1)
    weights, stream = perturbed(c), Fixed(c)
    engines = {script: engine_of(script, c, weights) for script in SCRIPTS}
    ((ids, targets),) = stream.microbatches(0, 64, 0, 1, 64)
    for loops in (1, 2, 3):
        logits = {script: logits_of(script, engine, ids, loops) for script, engine in engines.items()}
        assert np.abs(logits["torch"] - logits["mlx"]).max() < 1e-4
    grads = {script: gradients_of(script, engine, ids, targets, 2) for script, engine in engines.items()}
    assert_close(grads["mlx"], grads["torch"], 1e-3)
    rows = [name for name in weights if torch_script.is_vector(name) and name.startswith(("blocks.1", "blocks.3"))]
    assert len(rows) == 2 * 4
    for name in rows:
        assert len(weights[name]) == 2 and all(np.abs(row).max() > 1e-6 for row in grads["torch"][name]), name
    mine, theirs = (train(script, c, weights, [2] * 3) for script in ("mlx", "torch"))
    assert np.allclose(mine[0], theirs[0], rtol=0, atol=1e-4)
    assert_close(mine[1], theirs[1], 1e-3, base=weights, noise=only_rounding(grads["torch"]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_equal_rows_are_the_model_without_them_and_each_row_is_of_its_pass(script):
    plain = tiny("1+2x3+1")
    c, ids = dataclasses.replace(plain, pass_vectors=True), np.random.RandomState(3).randint(0, 48, (2, 16))
    weights = perturbed(plain)
    rows = with_rows(plain, weights)
    found = {loops: logits_of(script, engine_of(script, plain, weights), ids, loops) for loops in (1, 2, 3, 4)}
    engine = engine_of(script, c, rows)
    assert all(np.array_equal(logits_of(script, engine, ids, loops), found[loops]) for loops in found)
    for leaf, row in itertools.product(("attn.q_gain", "attn_scale", "mlp_scale", "resid_mix"), range(3)):
        name = f"blocks.2.{leaf}"
        changed = rows[name].copy()
        changed[row] += 0.5
        moved = engine_of(script, c, rows | {name: changed})
        for loops, before in found.items():
            same_logits = np.array_equal(logits_of(script, moved, ids, loops), before)
            assert same_logits == (loops <= row), (name, row, loops)


def test_rows_a_pass_are_counted_and_start_as_those_of_a_parent():
    plain, c = tiny("1+2x3+1"), tiny("1+2x3+1", pass_vectors=True)
    m, dim, heads = torch_script, 32, 4
    assert m.count_params(c) - m.count_params(plain) == 2 * 2 * (4 * dim + heads)
    assert m.effective_params(c) == m.effective_params(plain)  # every application has its vectors either way
    assert same(m.initial_weights(c), with_rows(plain, m.initial_weights(plain)))
    assert all(value.flags.c_contiguous for value in m.initial_weights(c).values())  # or safetensors saves others
    parent, rows = perturbed(plain), perturbed(c)
    assert same(m.transfer_weights(c, parent, dataclasses.asdict(plain)), with_rows(plain, parent))
    longer = dataclasses.replace(c, layout="1+2x4+1")
    found = m.transfer_weights(longer, rows, dataclasses.asdict(c))["blocks.1.resid_mix"]
    assert np.array_equal(found, rows["blocks.1.resid_mix"][[0, 1, 2, 2]])
    first = m.transfer_weights(tiny("4"), rows, dataclasses.asdict(c))["blocks.1.resid_mix"]
    assert np.array_equal(first, rows["blocks.1.resid_mix"][0])  # one pass is the first
    with pytest.raises(m.InputError, match=r"INIT_FROM: blocks.1.*expected shape .* found .*PASS_VECTORS"):
        m.transfer_weights(plain, rows, dataclasses.asdict(c))
    with pytest.raises(m.InputError, match="PASS_VECTORS: expected 0 with one pass"):
        tiny("4", pass_vectors=True)


@pytest.mark.parametrize(
    "setting", [{"rotary_dims": 4}, {"norm_scale": True}, {"mlp_slope": 0.5}, {"xsa": True}], ids=str
)
def test_weights_are_not_taken_into_another_function(setting):
    plain, c = tiny("2"), tiny("2", **setting)
    for ours, theirs in ((c, plain), (plain, c)):
        with pytest.raises(torch_script.InputError, match=f"INIT_FROM: {[*setting][0].upper()}: expected the file's"):
            torch_script.transfer_weights(ours, perturbed(theirs), dataclasses.asdict(theirs))
    assert same(torch_script.transfer_weights(c, perturbed(c), dataclasses.asdict(c)), perturbed(c))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_from_before_rows_a_pass_has_none(script, tmp_path):
    """Its file does not state the setting."""
    m, c, path = SCRIPTS[script], tiny("1+2x2+1"), tmp_path / "model.safetensors"
    about = m.about(c, 2)
    del about["model"]["pass_vectors"]
    m.save_tensors(path, {f"weights.{name}": value for name, value in perturbed(c).items()}, about)
    weights, model, _ = m.load_model_file(str(path))
    assert model["pass_vectors"] is False and same(weights, perturbed(c))


@pytest.mark.parametrize("script", SCRIPTS)
def test_attention_says_nothing_of_its_own_value(script):
    """XSA takes off the part along v of the same position and group, and nothing else."""
    rng = np.random.RandomState(3)
    y, v = rng.standard_normal((2, 5, 4 * 8)).astype(np.float32), rng.standard_normal((2, 5, 2, 8)).astype(np.float32)
    found = numbers(SCRIPTS[script].without_own(array(script, y), array(script, v))).reshape(2, 5, 2, 2, 8)
    heads, own = y.reshape(2, 5, 2, 2, 8), v[:, :, :, None]
    expected = heads - (heads * own).sum(-1, keepdims=True) / np.square(own).sum(-1, keepdims=True) * own
    assert np.allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs((found * own).sum(-1)).max() < 1e-5


def test_long_sequences_and_microbatches():
    """128 positions take the CPU's path of two halves; microbatches change nothing but rounding."""
    c = tiny("1+2x2+1", train_seq_len=160, train_batch_tokens=960)
    weights = perturbed(c)
    whole = {script: train(script, c, weights, [2, 2]) for script in SCRIPTS}
    for script, tokens in (("torch", 160), ("torch", 400), ("mlx", 400)):
        parts = train(script, dataclasses.replace(c, microbatch_tokens=tokens), weights, [2, 2])
        assert np.allclose(parts[0], whole["torch"][0], rtol=0, atol=1e-4)
        assert_close(parts[1], whole["torch"][1], 1e-3, base=weights)
    assert_close(whole["mlx"][1], whole["torch"][1], 1e-3, base=weights)


@pytest.mark.parametrize("microbatch", (0, 32))
def test_a_step_that_was_traced_once_is_the_step(microbatch, tmp_path):
    """What mx.compile relies on, without its compilers: the graph of a first step, given other weights, state, tokens
    and rates, makes of them what the function makes; so nothing that changes was left out of its inputs."""
    c = tiny("1+2x2+1", lora_rank=1, grad_clip_norm=0.5, microbatch_tokens=microbatch)
    plain, replayed, loops = engine_of("mlx", c, perturbed(c)), engine_of("mlx", c, perturbed(c)), 2
    function, path = replayed.function("step", loops), str(tmp_path / "step.mlxfn")
    made = []

    def traced(*inputs):
        if not made:
            mx.export_function(path, lambda *arrays: leaves(function(*refilled(inputs, iter(arrays)))), *leaves(inputs))
            made.append(function(*inputs))
        return refilled(made[0], iter(mx.import_function(path)(*leaves(inputs))))

    replayed.functions["step", loops] = traced
    for number, lr_mul in enumerate((1.0, 0.7, 0.4)):
        rest = (number * c.train_batch_tokens, loops, lr_mul, 0.85 + 0.03 * number)
        losses = [engine.read(engine.step(Fixed(c), *rest)) for engine in (plain, replayed)]
        assert np.allclose(*losses, rtol=0, atol=1e-6)
    assert_close(replayed.weights(), plain.weights(), 1e-5, base=perturbed(c))
    assert_close(replayed.optimizer.state(), plain.optimizer.state(), 1e-5)


def leaves(tree) -> list:
    """The arrays in nested tuples and dicts, in order."""
    if isinstance(tree, mx.array):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(part)]


def refilled(tree, arrays):
    """The same tuples and dicts with the next of these arrays in the place of each."""
    if isinstance(tree, mx.array):
        return next(arrays)
    if isinstance(tree, dict):
        return {name: refilled(part, arrays) for name, part in tree.items()}
    return tuple(refilled(part, arrays) for part in tree)


def test_a_step_that_runs_ahead_is_the_step():
    """Not waiting for a step before the next is launched changes nothing."""
    c = tiny("1+2x2+1", microbatch_tokens=32)
    plain, ahead = engine_of("mlx", c, perturbed(c)), engine_of("mlx", c, perturbed(c))
    ahead.runs_ahead = True
    found = {engine: [engine.step(Fixed(c), 64 * n, 2, 1.0, 0.9) for n in range(3)] for engine in (plain, ahead)}
    read = [[engine.read(results) for results in steps] for engine, steps in found.items()]
    assert read[0] == read[1] and same(plain.weights(), ahead.weights())


@pytest.mark.parametrize("microbatch", (0, 32))
def test_a_step_is_one_function_and_the_model_holds_the_weights_alone(microbatch):
    """With several microbatches `gradients` adds up those before the last. Weights of before the step are let go."""
    c = tiny("1+2x2+1", microbatch_tokens=microbatch)
    engine, calls = engine_of("mlx", c, perturbed(c)), []
    for kind in ("losses", "gradients", "step"):
        function = engine.function(kind, 2)
        engine.functions[kind, 2] = lambda *args, kind=kind, function=function: calls.append(kind) or function(*args)
    engine.step(Fixed(c), 0, 2, 1.0, 0.9)
    assert calls == ["gradients"] * (1 if microbatch else 0) + ["step"]
    held = dict(mlx_script.tree_flatten(engine.model.parameters()))
    assert held.keys() == engine.params.keys() and all(held[name] is p for name, p in engine.params.items())


# ---- the controls

GOLDEN = {
    "baseline": dict(layout="9", skips="official", loop_gate="none"),
    "pr319": dict(layout="5x3", skips="none", loop_gate="x0", loop_gate_init=1 / 3),
}


@pytest.mark.parametrize("script,case", list(itertools.product(SCRIPTS, GOLDEN)))
def test_controls_are_the_published_models(script, case):
    preset = torch_script.load_config([f"--preset={case}"], {}, "record")[0]
    assert {name: getattr(preset, name) for name in GOLDEN[case]} == GOLDEN[case]
    c = tiny(**GOLDEN[case], vocab_size=rebuild.VOCAB, model_dim=64, train_seq_len=rebuild.SEQ,
             train_batch_tokens=rebuild.SEQ * rebuild.BATCH)  # fmt: skip
    weights = rebuild.golden_weights(torch_script.param_shapes(c))
    batches, golden = rebuild.golden_ids(), rebuild.golden_numbers(ROOT / "tests" / "golden" / "controls.npz", case)
    loops, engine = torch_script.parse_layout(c.layout).loops, engine_of(script, c, weights)
    logits = logits_of(script, engine, batches[0][:, :-1], loops)
    assert np.abs(logits - golden["logits"]).max() < 1e-4
    grads = gradients_of(script, engine, batches[0][:, :-1], batches[0][:, 1:], loops)
    losses, after, _ = train(script, c, weights, [loops] * 3, Fixed(c, batches))
    assert np.allclose(losses, golden["loss"], rtol=0, atol=1e-4)
    for name in weights:
        for found, key in ((grads[name], "grad"), (after[name], "weights3")):
            shown = golden[f"{key}/{name}"]
            part = found.ravel()[: shown.size].reshape(shown.shape) if found.size > 64 else found
            assert np.abs(part - shown).max() < 1e-4, f"{key} {name}"
        assert math.isclose(np.linalg.norm(grads[name]), golden[f"grad_norm/{name}"], rel_tol=1e-4, abs_tol=1e-6), name
        moved = np.linalg.norm(after[name] - weights[name])
        assert math.isclose(moved, golden[f"weights3_norm/{name}"], rel_tol=1e-3, abs_tol=1e-6), name


def array(script: str, value: np.ndarray):
    return torch.from_numpy(value) if script == "torch" else mx.array(value)


def numbers(value) -> np.ndarray:
    return value.numpy() if isinstance(value, torch.Tensor) else np.array(value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_rms_norm_eps(script):
    """At the size of a fresh embedding the eps counts; the golden numbers do not see it."""
    x = np.random.RandomState(0).standard_normal((4, 32)).astype(np.float32) * 1e-3
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.square(wide).mean(axis=-1, keepdims=True) + 2.0**-23)
    found = numbers(SCRIPTS[script].rms_norm(array(script, x)))
    assert np.allclose(found, expected, rtol=1e-5, atol=0)


def test_momentum_warm_up():
    c = tiny("9", muon_momentum_warmup_start=0.85, muon_momentum=0.95, muon_momentum_warmup_steps=500)
    expected = {0: 0.85, 1: 0.8502, 250: 0.9, 500: 0.95, 9999: 0.95}
    for script in SCRIPTS.values():
        assert all(math.isclose(script.momentum_at(c, step), value, rel_tol=1e-9) for step, value in expected.items())


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_rate_warm_up_and_warm_down(script):
    """Step n of n is the first at the full rate; the warm-down is by progress, and both may be on at once."""
    c = tiny("9", lr_warmup_steps=4, warmdown_frac=0.5, iterations=10)
    assert [script.lr_mul_at(c, step, 0.0) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    for progress, factor in ((0.5, 1.0), (0.75, 0.5), (0.9, 0.2), (1.0, 0.0)):
        assert math.isclose(script.lr_mul_at(c, 99, progress), factor, abs_tol=1e-12)
        assert math.isclose(script.lr_mul_at(c, 1, progress), 0.5 * factor, abs_tol=1e-12)
    short, endless = dataclasses.replace(c, iterations=2), dataclasses.replace(c, iterations=0)
    assert script.lr_mul_at(short, 1, 0.0) == 1.0  # a run shorter than its warm-up still gets to the full rate
    assert script.lr_mul_at(endless, 1, 0.0) == 0.5
    c = dataclasses.replace(c, lr_warmup_steps=0, warmdown_frac=0.0)
    assert script.lr_mul_at(c, 0, 0.0) == script.lr_mul_at(c, 0, 1.0) == 1.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_rate_is_multiplied(script):
    """The first step at half the rates goes half as far, in every group."""
    c = tiny("1+2x2+1", lora_rank=2)
    weights = perturbed(c)
    ends = []
    for factor in (1.0, 0.5):
        engine = engine_of(script, c, weights)
        engine.step(Fixed(c), 0, 2, factor, 0.9)
        ends.append(engine.weights())
    for name, start in weights.items():
        whole, half = (end[name] - start for end in ends)
        assert np.abs(whole).max() > 1e-3 and np.allclose(half, whole / 2, rtol=0, atol=1e-6), name


def test_parameters_are_aligned():
    """Whatever lies before it, every parameter and its gradient start where a GPU reads 16 bytes at once, and matrices
    of one shape lie side by side."""
    c = tiny("1+2x3+1", num_heads=2, lora_rank=1, model_dim=16)  # gates are three numbers
    engine = engine_of("torch", c, torch_script.initial_weights(c))
    for name, p in engine.model.named_parameters():
        assert p.data_ptr() % 16 == 0 and p.grad.data_ptr() % 16 == 0, name
    places = engine.optimizer.places
    matrices = sorted(places[name] for name in places if torch_script.param_group(name) == "matrix")
    assert all(b[0] == a[1] for a, b in zip(matrices, matrices[1:]) if a[2] == b[2])
    assert len({shape for _, _, shape in matrices}) == 3 and len(engine.optimizer.stacks) == 3


def test_memory_that_a_microbatch_needs():
    """The traces that `memory_needed` was fitted to; 24 GB take half of it."""
    for flags, gib in ((["--layout=3+3x3+5"], 20.8), (["--layout=3+3x1+5", "--loop_schedule="], 13.7)):
        flags = ["--preset=record", "--vocab_size=1024", *flags]
        c = torch_script.load_config(flags, {}, "record")[0]
        assert torch_script.memory_needed(c, 65536) / 2**30 == pytest.approx(gib, rel=0.12), flags
    assert torch_script.memory_needed(c, 32768) < 0.8 * 24e9


@pytest.mark.parametrize("script,shape", list(itertools.product(SCRIPTS, [(2, 8, 8), (3, 16, 8), (2, 8, 16)])))
def test_newton_schulz(script, shape):
    """Against float64, at a size where its eps counts; and a zero gradient stays zero."""
    g = np.random.RandomState(1).standard_normal(shape).astype(np.float32) * np.float32(3e-9)
    x = g.astype(np.float64)
    x = x / (np.sqrt(np.square(x).sum(axis=(1, 2), keepdims=True)) + 1e-7)
    for _ in range(5):
        xx = x @ x.swapaxes(1, 2)
        x = 3.4445 * x + (-4.7750 * xx + 2.0315 * xx @ xx) @ x
    found = numbers(SCRIPTS[script].newton_schulz(array(script, g)))
    assert np.allclose(found, x, rtol=1e-3, atol=1e-4)
    assert not numbers(SCRIPTS[script].newton_schulz(array(script, g * 0))).any()


def test_rotary_sign():
    """The sign in MLX's own terms: rope with scale=-1."""
    x = np.random.RandomState(2).standard_normal((2, 16, 4, 8)).astype(np.float32)
    cos, sin = (table[:, None] for table in torch_script.rotary_tables(16, 8))
    a, b = np.split(x, 2, axis=-1)
    expected = np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)
    rope = mx.fast.rope(mx.array(x).swapaxes(1, 2), 8, traditional=False, base=10000.0, scale=-1.0, offset=0)
    assert np.abs(np.array(rope.swapaxes(1, 2)) - expected).max() < 1e-5
    few = [table[:, None] for table in torch_script.rotary_tables(16, 4)]
    rope = mx.fast.rope(mx.array(x).swapaxes(1, 2), 4, traditional=False, base=10000.0, scale=-1.0, offset=0)
    for script, module in SCRIPTS.items():
        found = module.rotate(array(script, x), array(script, cos), array(script, sin))
        assert np.abs(numbers(found) - expected).max() < 1e-6, script
        found = numbers(module.rotate(array(script, x), *(array(script, table) for table in few)))
        assert np.abs(np.array(rope.swapaxes(1, 2)) - found).max() < 1e-5, script
        assert np.array_equal(found[..., 4:], x[..., 4:])


# ---- identity: the recurrence adds nothing of its own


def plain_gpt(script: str, c, weights: dict, ids: np.ndarray, order: list[int], shortcuts: dict) -> np.ndarray:
    """Logits of a GPT without any recurrence that applies the blocks of `order` one after the other, with U-Net
    shortcuts {to application: (from application, row)}. Written for this test; only the leaf functions are the script's
    own."""
    m = SCRIPTS[script]
    lib = torch if script == "torch" else mx
    w = {name: array(script, value) for name, value in weights.items()}
    ids = array(script, ids.astype(np.int64 if script == "torch" else np.int32))
    n, t = ids.shape
    width = c.model_dim // c.num_heads
    cos, sin = (array(script, table[:t, None]) for table in m.rotary_tables(t, width))
    x = x0 = m.rms_norm(w["tok_emb.weight"][ids])
    outputs = []
    for number, i in enumerate(order):
        if number in shortcuts:
            source, row = shortcuts[number]
            x = x + w["skip_weights"][row] * outputs[source]
        b = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items() if name.startswith(f"blocks.{i}.")}
        x = b["resid_mix"][0] * x + b["resid_mix"][1] * x0
        h = m.rms_norm(x)
        q = (h @ b["attn.q.weight"].T).reshape(n, t, c.num_heads, width)
        k = (h @ b["attn.k.weight"].T).reshape(n, t, c.num_kv_heads, width)
        v = (h @ b["attn.v.weight"].T).reshape(n, t, c.num_kv_heads, width)
        q = m.rotate(m.rms_norm(q), cos, sin) * b["attn.q_gain"][:, None]
        k = m.rotate(m.rms_norm(k), cos, sin)
        x = x + m.attend(q, k, v) @ (b["attn_scale"][:, None] * b["attn.proj.weight"]).T
        h = m.rms_norm(x) @ b["mlp.fc.weight"].T
        h = lib.where(h > 0, h, h * 0)
        x = x + (h * h) @ (b["mlp_scale"][:, None] * b["mlp.proj.weight"]).T
        outputs.append(x)
    logits = m.rms_norm(x) @ w["tok_emb.weight"].T
    return numbers(30.0 * lib.tanh(logits / 30.0))


def at_identity(c) -> dict[str, np.ndarray]:
    """Perturbed blocks with per-pass parameters at their identity: zero embeddings and LoRA products, unit gates."""
    weights = perturbed(c)
    for name, value in weights.items():
        if name == "loop_embed" or name.endswith("lora_b"):
            value[:] = 0
        elif name == "loop_gate":
            value[:] = 1
    return weights


def mirrored(core: int, passes: int, skips: str) -> dict[int, tuple[int, int]]:
    """Shortcuts of a core that is applied `passes` times: block i of a pass to block core-1-i of it, row i."""
    pairs = {a * core + core - 1 - i: (a * core + i, i) for a in range(passes) for i in range(core // 2)}
    return pairs if skips == "per_loop" else {}


@pytest.mark.parametrize("script,core,skips", list(itertools.product(SCRIPTS, (4, 5), ("none", "per_loop"))))
def test_one_pass_is_the_plain_gpt(script, core, skips):
    ids = np.random.RandomState(3).randint(0, 48, (2, 16))
    for layout in (f"{core}", f"{core}x1"):
        c = tiny(layout, skips=skips)
        weights = perturbed(c)
        assert not {"loop_embed", "loop_gate"} & weights.keys()
        found = logits_of(script, engine_of(script, c, weights), ids, 1)
        assert np.array_equal(found, plain_gpt(script, c, weights, ids, list(range(core)), mirrored(core, 1, skips)))


@pytest.mark.parametrize("skips", ("none", "per_loop"))
@pytest.mark.parametrize("script,gate,core", list(itertools.product(SCRIPTS, GATES, (2, 3))))
def test_two_passes_at_the_identity_are_the_blocks_listed_twice(script, gate, core, skips):
    c = tiny(f"{core}x2", skips=skips, loop_gate=gate, lora_rank=2)
    weights, ids = at_identity(c), np.random.RandomState(3).randint(0, 48, (2, 16))
    found = logits_of(script, engine_of(script, c, weights), ids, 2)
    listed = plain_gpt(script, c, weights, ids, list(range(core)) * 2, mirrored(core, 2, skips))
    assert np.array_equal(found, listed)
    for name in ("loop_embed", "loop_gate", "blocks.0.mlp.fc.lora_b"):  # and each of them can leave the identity
        if name in weights:
            moved = engine_of(script, c, weights | {name: weights[name] + np.float32(0.5)})
            assert not np.array_equal(logits_of(script, moved, ids, 2), found), name


@pytest.mark.parametrize("script,gate,skips", list(itertools.product(SCRIPTS, GATES, ("none", "per_loop"))))
def test_passes_beyond_the_trained_ones_reuse_the_last_row(script, gate, skips):
    c = tiny("1+2x2+1", skips=skips, loop_gate=gate, lora_rank=2)
    longer = dataclasses.replace(c, layout="1+2x4+1")
    weights, ids = perturbed(c), np.random.RandomState(3).randint(0, 48, (2, 16))
    stretched = {
        name: np.concatenate([value, value[-1:], value[-1:]]) if name.startswith("loop_") or ".lora_" in name else value
        for name, value in weights.items()
    }
    found = logits_of(script, engine_of(script, c, weights), ids, 4)
    assert np.array_equal(found, logits_of(script, engine_of(script, longer, stretched), ids, 4))


@pytest.mark.parametrize("script,gate", list(itertools.product(SCRIPTS, GATES)))
def test_more_passes_of_a_layout_that_has_none(script, gate):
    """A layout of one pass has no parameter of a pass: more passes are its blocks listed again."""
    c = tiny("3", skips="none", loop_gate=gate)
    weights, ids = perturbed(c), np.random.RandomState(3).randint(0, 48, (2, 16))
    found = logits_of(script, engine_of(script, c, weights), ids, 2)
    assert np.allclose(found, plain_gpt(script, c, weights, ids, [0, 1, 2] * 2, {}), atol=1e-5)


# ---- switching passes on


def test_a_switch_leaves_every_shortcut_between_its_blocks():
    for p, core, d in itertools.product(range(4), range(1, 6), range(4)):
        layout = torch_script.Layout(p, core, 3, d)
        ends: dict[int, tuple[int, int]] = {}
        before: set[int] = set()
        for loops in (1, 2, 3):
            plan = torch_script.visits(layout, "per_loop", loops)
            rows = {v.skip_row: (plan[v.skip_from].block, v.block) for v in plan if v.skip_from >= 0}
            assert before <= rows.keys(), f"{layout}: {loops} passes drop a trained shortcut"
            for row, pair in rows.items():
                assert ends.setdefault(row, pair) == pair, f"{layout}: row {row} moves at {loops} passes"
            before = set(rows)


def test_shortcuts_are_those_of_the_design():
    """per_loop: prelude i to coda D-1-i, core c to C-1-c with one row for all passes."""
    for p, core, d, loops in itertools.product(range(4), range(1, 6), range(4), (1, 2, 3)):
        layout = torch_script.Layout(p, core, 3, d)
        plan = torch_script.visits(layout, "per_loop", loops)
        n = len(plan)
        found = {(v.skip_from, number): v.skip_row for number, v in enumerate(plan) if v.skip_from >= 0}
        assert {number for number, v in enumerate(plan) if v.saves} == {source for source, _ in found}
        ends = {(i, n - 1 - i) for i in range(min(p, d))}
        inner = [{(p + a * core + i, p + a * core + core - 1 - i) for i in range(core // 2)} for a in range(loops)]
        assert found.keys() == ends.union(*inner)
        assert len({tuple(sorted(found[pair] for pair in pairs)) for pairs in inner}) == 1
        assert len(set(found.values())) == min(p, d) + core // 2 == len(torch_script.skip_rows(layout, "per_loop"))


def test_the_official_rule_moves_shortcuts():
    """So that the test above is seen to tell the rules apart."""
    layout = torch_script.Layout(2, 3, 3, 2)
    pairs = []
    for loops in (1, 3):
        plan = torch_script.visits(layout, "official", loops)
        pairs.append({v.skip_row: (plan[v.skip_from].block, v.block) for v in plan if v.skip_from >= 0})
    assert any(pairs[0][row] != pairs[1][row] for row in pairs[0])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_pass_that_comes_on_with_a_gain_of_0_changes_nothing(script):
    """LOOP_GATE=gain LOOP_GATE_INIT=0: the loss is the same before and after a switch, and the gate learns at once."""
    c = tiny("1+2x3+1", loop_gate="gain", loop_gate_init=0.0, lora_rank=2, loop_gate_lr=0.02)
    fresh = torch_script.initial_weights(c)
    assert not fresh["loop_gate"].any() and len(fresh["loop_gate"]) == 3
    weights = perturbed(c) | {name: fresh[name] for name in ("loop_gate", "loop_embed")}
    _, trained, engine = train(script, c, weights, [1, 1, 1])
    assert not trained["loop_gate"].any() and trained["loop_embed"][0].any() and not trained["loop_embed"][1:].any()
    ((ids, targets),) = Fixed(c).microbatches(192, 64, 0, 1, 64)
    losses = [engine.token_losses(ids, targets, loops) for loops in (1, 2, 3)]
    assert np.abs(losses[1] - losses[0]).max() < 1e-5 and np.abs(losses[2] - losses[0]).max() < 1e-5
    gradient = gradients_of(script, engine, ids, targets, 3)["loop_gate"]
    assert gradient[0] == 0 and np.abs(gradient[1:]).min() > 1e-3
    engine.step(Fixed(c), 192, 2, 1.0, 0.9)
    moved = engine.weights()["loop_gate"]
    assert moved[0] == moved[2] == 0 and 0.005 < abs(moved[1]) < 0.04
    after = [engine.token_losses(ids, targets, loops) for loops in (1, 2)]
    assert np.abs(after[1] - after[0]).max() > 1e-4


@pytest.mark.parametrize("script,gate", list(itertools.product(SCRIPTS, ("x0", "gain"))))
def test_the_first_pass_is_never_gated(script, gate):
    c = tiny("1+2x3+1", loop_gate=gate)
    weights, ids = perturbed(c), np.random.RandomState(3).randint(0, 48, (2, 16))
    other = weights | {"loop_gate": weights["loop_gate"] + np.float32([7, 0, 0])}
    for loops in (1, 2, 3):
        found = [logits_of(script, engine_of(script, c, w), ids, loops) for w in (weights, other)]
        assert np.array_equal(*found)


@pytest.mark.parametrize("script,layout", list(itertools.product(SCRIPTS, ("1+3x3+2", "2+2x3+1"))))
def test_a_switch_moves_no_weight_and_no_state(script, layout):
    c = tiny(layout, lora_rank=2)
    _, _, engine = train(script, c, perturbed(c), [1, 1])
    for loops in (1, 2, 3):
        weights, state, steps = engine.weights(), engine.optimizer.state(), engine.optimizer.steps
        engine.warm_up(Fixed(c), loops)
        assert same(engine.weights(), weights) and same(engine.optimizer.state(), state)
        assert engine.optimizer.steps == steps
        engine.step(Fixed(c), 0, loops, 0.0, 0.9)  # a step at rate 0: state moves, weights do not
        assert same(engine.weights(), weights) and not same(engine.optimizer.state(), state)


@pytest.mark.parametrize("gate", ("x0", "gain"))
def test_training_across_switches_agrees(gate):
    """A pass that is off has zero gradients, for which Adam still decays its moments, in both scripts."""
    c = tiny("1+3x3+2", loop_gate=gate, lora_rank=2, loop_gate_lr=0.02)
    weights = perturbed(c)
    mine, theirs = (train(script, c, weights, [1, 1, 2, 2, 3, 3]) for script in ("mlx", "torch"))
    assert np.allclose(mine[0], theirs[0], rtol=0, atol=1e-3)
    assert_close(mine[1], theirs[1], 2e-3, base=weights)
    one = train("mlx", c, weights, [1, 1])[1]
    assert np.array_equal(one["loop_embed"][1:], weights["loop_embed"][1:])  # never touched, never moved


@pytest.mark.parametrize("first,second", list(itertools.product(SCRIPTS, SCRIPTS)))
def test_a_checkpoint_of_either_script_resumes_in_either(first, second, tmp_path):
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"only its hash is looked at")
    c = tiny("1+2x2+1", lora_rank=2, loop_schedule="0:1,0.5:2", tokenizer_path=str(tokenizer), data_path=str(tmp_path))
    weights, stream, size = perturbed(c), Fixed(c), c.train_batch_tokens
    _, _, engine = train(first, c, weights, [1, 1])
    path = tmp_path / "checkpoint.safetensors"
    state = SCRIPTS[first].TrainState(step=2, tokens=2 * size, flops=0.5, seconds=1.5, loops=1, scored=1)
    SCRIPTS[first].save_checkpoint(c, engine, types.SimpleNamespace(checkpoint=path), state, {})
    loaded, optimizer_state, rounded, found = SCRIPTS[second].load_checkpoint(c, path)
    assert not rounded
    assert dataclasses.asdict(found) == dataclasses.asdict(state)
    assert same(loaded, engine.weights()) and same(optimizer_state, engine.optimizer.state())
    resumed = SCRIPTS[second].Engine(c)
    resumed.build(loaded)
    resumed.optimizer.load_state(optimizer_state, found.step)
    for run in (engine, resumed):
        for step in (2, 3):
            run.step(stream, step * size, 2, 0.8, 0.9)
    assert resumed.optimizer.steps == engine.optimizer.steps == 4
    if first == second:
        assert same(resumed.weights(), engine.weights()) and same(resumed.optimizer.state(), engine.optimizer.state())
    else:
        assert_close(resumed.weights(), engine.weights(), 1e-3, base=weights)


# ---- optimizer groups


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_parameter_is_in_exactly_one_group(script, monkeypatch):
    m = SCRIPTS[script]
    c = tiny("1+3x3+2", lora_rank=2)
    groups = {name: m.param_group(name) for name in m.param_shapes(c)}
    assert set(groups.values()) == {"embed", "scalar", "gate", "lora", "matrix"}
    assert {name for name, group in groups.items() if group == "matrix"} == {
        name for name in groups if name.startswith("blocks.") and name.endswith(".weight")
    }
    kinds = {name: set() for name in groups}
    for name in engine_of(script, c, perturbed(c)).optimizer.state():
        kind, _, parameter = name.partition(".")
        kinds[parameter].add(kind)
    for name, found in kinds.items():
        assert found == ({"momentum"} if groups[name] == "matrix" else {"exp_avg", "exp_avg_sq"}), name
    for patterns in ({"scalar": "nothing"}, {"lora": r"loop_gate|.*lora_[ab]"}, {"gate": "nothing"}):
        monkeypatch.setattr(m, "PARAM_GROUPS", m.PARAM_GROUPS | patterns)
        with pytest.raises(ValueError, match="parameter (skip_weights|loop_|blocks)"):
            engine_of(script, c, perturbed(c))
        monkeypatch.undo()


@pytest.mark.parametrize("script", SCRIPTS)
def test_rates_of_the_groups(script):
    """One step at one group's rate moves that group alone."""
    rates = dict(embed="tied_embed_lr", scalar="scalar_lr", gate="loop_gate_lr", lora="lora_lr", matrix="matrix_lr")
    off = dict.fromkeys(rates.values(), 0.0)
    for group, rate in rates.items():
        c = tiny("1+2x2+1", lora_rank=2, **(off | {rate: 0.01}))
        weights = perturbed(c)
        after = train(script, c, weights, [2])[1]
        moved = {name for name in weights if not np.array_equal(weights[name], after[name])}
        assert moved == {name for name in weights if torch_script.param_group(name) == group}
