"""What becomes of the weights: curvature, GPTQ, the steps that Fisher information gives, the trellis, the coder's
models, TARGET_BYTES, coded sizes."""

import dataclasses
import functools
import itertools
import json
import math
import re
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import (
    assert_refused,
    random_weights,
    run_in_process,
    write_dataset,
)
from scipy import special


def tiny_config(module, **fields):
    """A model of every kind of tensor, small enough to run in an instant."""
    sizes = dict(vocab_size=48, model_dim=32, num_heads=4, num_kv_heads=2, train_seq_len=16, train_batch_tokens=64)
    chosen = dict(layout="1+2x2+1", compile=False, device="cpu", dtype="float32", **sizes) | fields
    c = module.Config(**chosen)
    module.check_config(c)
    return c


def stream_of(module, folder, c, tokens=3000):
    """A real TokenStream over random tokens, one sequence after the other."""
    ids = np.random.default_rng(9).integers(0, c.vocab_size, tokens)
    write_dataset(folder, [ids[: tokens // 3], ids[tokens // 3 :]], [ids[:50]])
    c = dataclasses.replace(c, shuffle=False)
    return module.TokenStream(module.find_shards(str(folder), "train", c.vocab_size), c), ids


def engine_of(module, c, weights):
    engine = module.Engine(c)
    engine.build(weights)
    return engine


def matrices(module, c):
    """Names of the block matrices."""
    return [name for name in module.param_shapes(c) if module.param_group(name) == "matrix"]


# ---------------------------------------------------------------------------------------------------------------------
# GPTQ
# ---------------------------------------------------------------------------------------------------------------------


def layer(columns=200, samples=3000, seed=0, rank=40):
    """Weights [64, columns] and inputs [samples, columns] that depend on each other."""
    rng = np.random.default_rng(seed)
    rows = (0.05 * rng.standard_normal((64, columns))).astype(np.float32)
    inputs = rng.standard_normal((rank, columns))  # the same for any number of samples
    inputs = rng.standard_normal((samples, rank)) @ inputs
    inputs = (inputs + 0.5 * rng.standard_normal((samples, columns))) * np.geomspace(0.1, 3, columns)
    return rows, inputs.astype(np.float32)


EXPONENT = -22  # of the rows' steps, in quarter octaves: 0.45 of the weights' spread


def rounded(module, rows, factor=None, columns=None):
    """What stands for `rows` after rounding in steps of EXPONENT."""
    n, m = rows.shape
    steps = np.full((1, n), EXPONENT, np.int16), np.zeros((1, m), np.int16) if columns is None else columns[None]
    symbols = module.round_to_trellis(rows[None], *steps, None if factor is None else [factor])[0]
    assert symbols.dtype == np.int16 and symbols.shape == rows.shape
    return module.values_of(module.Table(steps[0][0], steps[1][0], np.zeros(n, np.int16), symbols), True)


def output_error(rows, found, inputs):
    return float(np.square(inputs @ (rows - found).T).sum())


def plain_gptq(module, rows, hessian):
    """The algorithm as in the paper: one column after the other, the whole rest brought up to date, in float64."""
    order, step = sorted(range(len(hessian)), key=lambda i: -hessian[i, i]), 2 ** (EXPONENT / 4)
    h = hessian[order][:, order].astype(np.float64)
    inverse = np.linalg.inv(h + 0.01 * np.diag(hessian).mean() * np.eye(len(h)))
    left, found = rows[:, order].astype(np.float64) / step, np.zeros(rows.shape)
    for i in range(len(h)):
        levels = module.trellis_path(left[None, :, i].astype(np.float32))[1][0]
        found[:, order[i]] = levels * step
        left -= np.outer((left[:, i] - levels) / inverse[i, i], inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]  # takes column i out of the problem
    return found


def test_gptq_has_less_error_than_rounding(any_script):
    rows, inputs = layer()
    hessian = inputs.T @ inputs / len(inputs)
    found, plain = rounded(any_script, rows, any_script.gptq_factor(hessian)), rounded(any_script, rows)
    assert output_error(rows, found, inputs) < 0.5 * output_error(rows, plain, inputs)
    _, fresh = layer(samples=6000)
    assert output_error(rows, found, fresh) < 0.5 * output_error(rows, plain, fresh)
    reference = plain_gptq(any_script, rows, hessian)
    assert (np.abs(found - reference) > 1e-6).mean() < 0.1  # float32 tips a few paths, and what follows them
    assert output_error(rows, found, inputs) < 1.02 * output_error(rows, reference, inputs)


def test_gptq_is_rounding_for_inputs_that_do_not_depend_on_each_other(any_script):
    rows, _ = layer()
    for diagonal in (np.ones(200), np.geomspace(1e-6, 1e3, 200)):
        factor = any_script.gptq_factor(np.diag(diagonal).astype(np.float32))
        assert np.array_equal(rounded(any_script, rows, factor), rounded(any_script, rows))


@pytest.mark.parametrize("kind", ["dead inputs", "few samples", "one sample", "no input at all", "tiny", "huge"])
def test_gptq_survives(any_script, kind):
    """Hessians that cannot be inverted: inputs that are always 0 and fewer samples than inputs."""
    rows, inputs = layer(samples={"few samples": 50, "one sample": 1}.get(kind, 3000))
    inputs = inputs * {"no input at all": 0, "tiny": 1e-12, "huge": 1e12}.get(kind, 1)
    if kind == "dead inputs":
        inputs[:, 5:150:3] = 0
    hessian = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    found, plain = rounded(any_script, rows, any_script.gptq_factor(hessian)), rounded(any_script, rows)
    error, of_plain = (output_error(rows, part, inputs) for part in (found, plain))
    assert error <= (1.0001 if kind in ("no input at all", "tiny") else 0.6) * of_plain
    if kind == "dead inputs":
        assert np.array_equal(found[:, 5:150:3], plain[:, 5:150:3])


@pytest.mark.parametrize("noise", [1e-3, 1.0])
def test_gptq_survives_what_is_no_hessian(any_script, noise):
    """Inputs that are nearly alike, weighted and multiplied in a rough format: not symmetric, not positive definite."""
    rng, rows = np.random.default_rng(0), normal(64, 256)
    x = np.ones((4096, 256)) + 0.01 * rng.standard_normal((4096, 256))
    x[:, 0] *= 20
    hessian = x.T @ x / len(x)
    hessian = (hessian * (1 + noise * rng.standard_normal(hessian.shape))).astype(np.float32)
    factor = any_script.gptq_factor(hessian)
    if noise == 1.0:
        assert factor is None  # rounded plainly, and counted
        return
    order, upper = factor
    assert sorted(order) == list(range(256)) and np.isfinite(upper).all() and np.diag(upper).min() > 0
    assert np.abs(rounded(any_script, rows, any_script.Factor(order, upper)) - rows).max() < 1


def test_a_matrix_without_a_hessian_is_rounded_plainly(script, tiny, monkeypatch):
    """Nothing helps against some matrices: they are counted, and the log says so."""
    assert script.gptq_factor(-np.eye(8, dtype=np.float32)) is None
    real = script.Engine.curvature

    def spoilt(self, *args):
        found = real(self, *args)
        names = sorted(found.hessians)[:3]
        return found._replace(hessians=found.hessians | {name: -found.hessians[name] for name in names})

    monkeypatch.setattr(script.Engine, "curvature", spoilt)
    flags = ("--quantizer=trellis", "--calib_tokens=64", "--iterations=2")
    outcome = run_in_process(script, *flags, **tiny)
    assert outcome.code == 0 and "\nnotice: 3 matrices were rounded without GPTQ, since" in outcome.out, outcome
    monkeypatch.setattr(script.Engine, "curvature", real)
    assert "without GPTQ" not in run_in_process(script, *flags, "--run_id=b", **tiny).out


# ---------------------------------------------------------------------------------------------------------------------
# Curvature
# ---------------------------------------------------------------------------------------------------------------------


START = 16 * 180  # of 186 sequences of 16: a calibration from here on begins again after the last


@pytest.mark.parametrize("loops", [3, 1])
def test_hessians_of_both_scripts_weigh_inputs_with_gradients(both, tmp_path, loops):
    """x x^T of every matrix's inputs times the squares of the gradient at its output, seen by hooks of PyTorch in every
    pass; gradients are those of the summed loss, so they do not depend on how sequences are put together."""
    c = tiny_config(both[0], calib_tokens=200, layout="1+2x3+1", lora_rank=2, pass_vectors=True, loop_gate="gain")
    weights, torch = random_weights(both[0], c), both[0].torch
    stream, _ = stream_of(both[0], tmp_path, c)
    parts = np.stack([stream.sequence(START // 16 + i) for i in range(12)]).astype(np.int64)
    ids, targets = (torch.from_numpy(part.copy()) for part in (parts[:, :-1], parts[:, 1:]))
    model, expected, visits = engine_of(both[0], c, weights).model, {}, {}

    def look(name, _, args, output):
        scale = args[2] if len(args) > 2 else 1.0  # of the output; the Hessian is of W x before it

        def seen(grad):
            x, g = args[0].detach().double().flatten(0, -2), grad.double().flatten(0, -2) * scale
            weight = g.square().sum(dim=1)
            expected[name] = expected.get(name, 0) + ((x * weight[:, None]).T @ x / 192).numpy()
            visits[name] = visits.get(name, 0) + 1

        output.register_hook(seen)

    linears = {name: part for name, part in model.named_modules() if isinstance(part, both[0].Linear)}
    names = {f"{name}.weight": part for name, part in linears.items() if name[0] == "b"}
    unseen = model.token_losses(ids, targets, loops)
    for name, part in names.items():
        part.probe = lambda x, y: y  # each by itself
        part.register_forward_hook(functools.partial(look, name))
    losses = model.token_losses(ids, targets, loops)
    assert torch.allclose(losses, unseen, rtol=1e-4)  # whoever looks changes nothing
    losses.sum().backward()
    assert set(expected) == set(matrices(both[0], c))  # embedding and LoRA are left to rounding
    assert visits == {name: loops if name[:9] in ("blocks.1.", "blocks.2.") else 1 for name in expected}
    for module in both:
        found = engine_of(module, c, weights).curvature(stream, START, loops).hessians
        assert found.keys() == expected.keys()
        for name, hessian in found.items():
            assert hessian.dtype == np.float32 and hessian.shape == expected[name].shape, name
            away = np.linalg.norm(hessian - expected[name])
            assert away <= 1e-3 * np.linalg.norm(expected[name]), (module.__name__, name)


def test_curvature_in_bfloat16(script, tmp_path):
    """What a GPU computes in is near what float32 gives; the sums are float32 in both."""
    c = tiny_config(script, calib_tokens=200, layout="1+2x3+1")
    stream, _ = stream_of(script, tmp_path, c)
    exact, rough = (
        engine_of(script, script.dataclasses.replace(c, dtype=dtype), random_weights(script, c)).curvature(stream, 0, 3)
        for dtype in ("float32", "bfloat16")
    )
    for kind in (0, 1):
        assert exact[kind].keys() == rough[kind].keys()
        for name, value in exact[kind].items():
            assert rough[kind][name].dtype == np.float32
            away = np.linalg.norm(rough[kind][name] - value) / np.linalg.norm(value)
            assert 0 < away < 0.05, (name, away)


def test_calibration_leaves_nothing_behind(script, tmp_path):
    """The next step is the one that would have come without it; nothing is trained that was not before."""
    c = tiny_config(script, calib_tokens=64)
    stream, _ = stream_of(script, tmp_path, c)
    after = []
    for calibrates in (False, True):
        engine = engine_of(script, c, random_weights(script, c))
        if calibrates:
            engine.curvature(stream, 0, 2)
            assert all(np.array_equal(value, random_weights(script, c)[k]) for k, value in engine.weights().items())
        engine.step(stream, 0, 2, 1.0, 0.9)
        after.append(engine.weights())
    assert all(np.array_equal(after[0][name], after[1][name]) for name in after[0])
    if script.FRAMEWORK == "torch":
        for training in (True, False):  # MODE=export has no optimizer
            engine.build(after[0], training)
            engine.curvature(stream, 0, 2)
            assert {p.requires_grad for p in engine.model.parameters()} == {training}
            assert all(p.grad is None or not p.grad.any() for p in engine.model.parameters())


def test_calibrations_of_two_processes_add_up(script, tmp_path, monkeypatch):
    """Each of two ranks sees its own part of the tokens; their sums are those of one process. What the ranks send is
    tested with real processes in test_distributed.py."""
    c = tiny_config(script, calib_tokens=16 * 7, microbatch_tokens=32)
    stream, _ = stream_of(script, tmp_path, c)
    engine = engine_of(script, c, random_weights(script, c))
    alone = engine.curvature(stream, 96, 2)
    sums = script.dist if script.FRAMEWORK == "torch" else script.mx.distributed
    sent = []
    name = "all_reduce" if script.FRAMEWORK == "torch" else "all_sum"
    monkeypatch.setattr(sums, name, lambda x, **rest: sent.append(1) or x)
    parts, counts, engine.world = [], [], 2
    monkeypatch.setattr(engine, "gather", lambda seen: counts.append(*seen) or np.array([[16 * 7]]))
    for engine.rank in (0, 1):
        parts.append(engine.curvature(stream, 96, 2))
    assert len(sent) == 2 * sum(map(len, alone[:2])) and sorted(counts) == [16 * 3, 16 * 4]
    assert alone[2] == parts[0][2] == parts[1][2] == 16 * 7
    for kind in (0, 1):
        for name, value in alone[kind].items():
            first, second = parts[0][kind][name], parts[1][kind][name]
            assert np.linalg.norm(first + second - value) <= 1e-5 * np.linalg.norm(value), name
            assert np.linalg.norm(first - second) > 1e-3 * np.linalg.norm(value), name


def test_calibration_sees_training_tokens_only(script, data, tiny, tmp_path, monkeypatch):
    """The artifact does not depend on the validation shards; those after the trained ones are looked at."""
    other = write_dataset(tmp_path / "other", [data.train[:1111], data.train[1111:1400], data.train[1400:]],
                          [data.val[::-1][:700]])  # fmt: skip
    looked, real = [], script.Engine.curvature

    def spied(self, stream, start, loops, seconds):
        sequence = stream.sequence
        stream.sequence = lambda number: looked.append((number, stream.total)) or sequence(number)
        return real(self, stream, start, loops, seconds)

    monkeypatch.setattr(script.Engine, "curvature", spied)
    for name, path in (("a", data.path), ("b", other)):
        flags = ("--quantizer=trellis", "--calib_tokens=128", "--iterations=2", f"--run_id={name}")
        outcome = run_in_process(script, *flags, **tiny | {"DATA_PATH": path})
        assert outcome.code == 0, outcome
    a, b = (tmp_path / "logs" / name for name in "ab")
    assert (a / "model.int6.rgpt").read_bytes() == (b / "model.int6.rgpt").read_bytes()
    results = [json.loads((folder / "result.json").read_text()) for folder in (a, b)]
    assert results[0]["val_bpb"] != results[1]["val_bpb"] and results[0]["calib_time_ms"] > 0
    assert looked == [(number, looked[0][1]) for number in range(2 * 8, 2 * 8 + 4)] * 2
    assert len(data.train) - 3 * 32 <= looked[0][1] <= len(data.train)
    assert re.search(r"export:   trellis, 0\.00500 nats aimed at, .* s of them calibration, 1 round\n", outcome.out)


def test_calibration_ends_when_its_time_is_up(script, tiny, tmp_path):
    """What was seen until then is what counts, and the log says so; at least one sequence is."""
    c = tiny_config(script, calib_tokens=16 * 50)
    stream, _ = stream_of(script, tmp_path, c)
    cut = engine_of(script, c, random_weights(script, c)).curvature(stream, 0, 2, -1.0)
    short = script.dataclasses.replace(c, calib_tokens=16)
    whole = engine_of(script, short, random_weights(script, c)).curvature(stream, 0, 2)
    assert cut[2] == whole[2] == 16
    for kind in (0, 1):
        assert all(np.array_equal(cut[kind][name], value) for name, value in whole[kind].items())
    flags = ("--iterations=0", "--max_wallclock_seconds=3", "--calib_seconds=2", "--quantizer=trellis", "--run_id=slow",
             "--calib_tokens=3200000")  # fmt: skip
    outcome = run_in_process(script, *flags, **tiny)
    assert outcome.code == 0, outcome
    assert re.search(r"notice: the calibration's time was up after \d+ of 3200000 tokens: more CALIB_S", outcome.out)
    result = json.loads((tmp_path / "logs/slow/result.json").read_text())
    assert 900 < result["calib_time_ms"] and result["train_time_ms"] + result["calib_time_ms"] <= 3000


def test_calibration_has_its_part_of_the_wallclock(script, tiny, tmp_path):
    flags = ("--iterations=0", "--max_wallclock_seconds=3", "--calib_seconds=2", "--quantizer=trellis", "--run_id=a",
             "--calib_tokens=128")  # fmt: skip
    outcome = run_in_process(script, *flags, "--train_log_every=1", **tiny)
    assert outcome.code == 0 and re.search(r" s of them calibration \(2 s were kept\), 1 round\n", outcome.out), outcome
    result = json.loads((tmp_path / "logs/a/result.json").read_text())
    assert 300 < result["train_time_ms"] <= 1100
    rows = [json.loads(row) for row in (tmp_path / "logs/a/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "lr_mul" in row][-1]
    assert last["lr_mul"] < 1  # the rate falls within the second that is left, not after two of the three
    c = script.Config(max_wallclock_seconds=600, calib_seconds=20, quantizer="trellis", iterations=0)
    assert script.progress_of(c, 0, 290, 0) == 0.5 and script.progress_of(c, 0, 580, 0) == 1
    for other in (dict(quantizer="absmax"), dict(calib_seconds=0)):
        assert script.progress_of(dataclasses.replace(c, **other), 0, 300, 0) == 0.5


@pytest.mark.parametrize("loops", [2, 1])
def test_fisher_information_of_both_scripts_is_of_sequences(both, tmp_path, loops):
    """Squares of the gradients of one sequence after the other, by autograd; with one pass some have no gradient."""
    c = tiny_config(both[0], calib_tokens=120, lora_rank=2, loop_gate="x0", microbatch_tokens=32)
    weights, torch = random_weights(both[0], c), both[0].torch
    stream, _ = stream_of(both[0], tmp_path, c)
    parts = np.stack([stream.sequence(START // 16 + i) for i in range(7)]).astype(np.int64)
    ids, targets = (torch.from_numpy(part.copy()) for part in (parts[:, :-1], parts[:, 1:]))
    model = engine_of(both[0], c, weights).model
    expected = {name: np.zeros(shape) for name, shape in both[0].param_shapes(c).items()}
    for i in range(7):
        losses = model.token_losses(ids[i : i + 1], targets[i : i + 1], loops)
        model.zero_grad(set_to_none=True)
        losses.sum().backward()
        for name, p in model.named_parameters():
            expected[name] += 0 if p.grad is None else p.grad.double().numpy() ** 2 / 112
    assert any(not square.any() for square in expected.values()) == (loops == 1)
    for module in both:
        found = engine_of(module, c, weights).curvature(stream, START, loops).squares
        assert found.keys() == expected.keys()
        for name, square in expected.items():
            assert found[name].dtype == np.float32 and found[name].shape == square.shape, name
            assert np.abs(found[name] - square).max() <= 1e-3 * square.max(), (module.__name__, name)


# ---------------------------------------------------------------------------------------------------------------------
# Steps and the trellis
# ---------------------------------------------------------------------------------------------------------------------


FC = "blocks.0.mlp.fc.weight"


def squares_like(value, seed=5, scale=6e-5):
    """Curvatures of rows and of columns, each over six octaves (three of the steps), times noise."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.exp2(rng.uniform(-3, 3, n)) for n in (value.size // value.shape[-1], value.shape[-1]))
    return (scale * np.outer(rows, columns) * rng.exponential(1, (len(rows), len(columns)))).astype("float32")


def squares_of(weights):
    """Squares for all tensors, so large that the first try of TARGET_BYTES has about two bits a weight."""
    return {name: squares_like(value, seed).reshape(value.shape) for seed, (name, value) in enumerate(weights.items())}


def normal(*shape, seed=1):
    return (0.05 * np.random.default_rng(seed).standard_normal(shape)).astype("float32")


def cases(module):
    """(name, weights, squares, width, GPTQ factor) of what a tensor may be."""
    (rows, inputs), zero_rows, outlier = layer(), normal(64, 200), normal(64, 200)
    dead, large = squares_like(rows), squares_like(rows, scale=1e29)
    zero_rows[::3] = dead[5:9] = dead[:, 7:50:3] = 0
    outlier[3, 5], outlier[9] = 400, 1e4 * outlier[9]
    factor, lora = module.gptq_factor(inputs.T @ inputs / len(inputs)), normal(3, 4, 100)
    vector, signs = 1 + normal(2, 200), np.where(np.arange(200) % 3, np.float32(-1), np.float32(1))
    untrained = np.full(8, 1.1, "float32")
    return {
        "plain": (FC, rows, squares_like(rows), 1e-3, None),
        "factor": (FC, rows, squares_like(rows), 3e-4, factor),
        "embedding": ("tok_emb.weight", rows, squares_like(rows), 3e-4, None),
        "lora": ("blocks.1.attn.q.lora_a", lora, squares_like(lora).reshape(lora.shape), 3e-4, None),
        "one column": (FC, normal(300, 1), squares_like(normal(300, 1)), 1e-4, None),
        "one row": (FC, normal(1, 300), squares_like(normal(1, 300)), 1e-4, None),
        "all zero": (FC, 0 * rows, squares_like(rows), 1e-3, None),
        "negative zero": (FC, -0.0 * np.abs(rows), squares_like(rows), 1e-3, None),
        "zero rows": (FC, zero_rows, squares_like(rows), 1e-3, factor),
        "outlier": (FC, outlier, squares_like(rows), 1e-4, None),
        "outlier, factor": (FC, outlier, squares_like(rows), 1e-4, factor),
        "no curvature": (FC, rows, 0 * rows, 1e-3, factor),
        "no curvature, no weights": (FC, 0 * rows, 0 * rows, 1e-3, None),
        "curvature of some": (FC, rows, dead, 1e-3, None),
        "huge curvature": (FC, rows, large, 1e11, None),
        "tiny curvature": (FC, rows, squares_like(rows, scale=1e-36), 1e-18, factor),
        "wide": (FC, rows, squares_like(rows), 1.0, factor),
        "tiny": (FC, np.float32(1e-9) * rows, squares_like(rows), 1e-10, factor),
        "huge": (FC, np.float32(1e30) * rows, squares_like(rows), 1e-3, factor),
        "vector": ("blocks.0.resid_mix", vector, squares_like(vector), 1e-4, None),
        "signs": ("blocks.0.attn_scale", signs, squares_like(signs[None])[0], 1e-9, None),
        "untrained": ("blocks.0.attn.q_gain", untrained, 0 * untrained, 1e-3, None),
        "gate": ("loop_gate", np.float32([0.3]), np.float32([1]), 1e-3, None),
    }


def shift_after(before):
    """What a trellis does, written down once more, as the parity check of its code (Ungerboeck 1982, octal 103, 024).
    From each number of a chain so far, (whether it was shifted by half a step, its parity): whether the next one is."""
    taps = [(1, 0), (6, 0), (2, 1), (4, 1)]  # how long ago, which of the two
    return sum(before[-ago][which] for ago, which in taps if ago <= len(before)) % 2


def plain_levels(symbols):
    levels, before = symbols.astype(float), []
    for column in range(symbols.shape[1]):
        for i, k in enumerate(symbols[:, column].tolist()):
            before = before if i % 256 else []
            shift = shift_after(before)
            levels[i, column] -= 0.5 * np.sign(k) * shift
            before.append((shift, k % 2))
    return levels


def test_levels_of_a_trellis(any_script):
    for shape in ((1, 5), (64, 3), (257, 2), (700, 4)):
        symbols = np.random.default_rng(1).integers(-9, 10, shape).astype(np.int16)
        shifted = any_script.half_levels(symbols)
        assert np.array_equal(symbols - 0.5 * np.sign(symbols) * shifted, plain_levels(symbols))
        assert shifted[::256].max() == 0 and (shape[0] < 64 or 0.3 < shifted.mean() < 0.6)


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_a_trellis_is_the_nearest_path(any_script, spread):
    """Of all paths of nine numbers, tried one by one, where those near 0 stay 0; and the levels are the integers'."""
    x = (spread * np.random.default_rng(2).standard_normal((20, 9))).astype(np.float32)
    symbols, levels = any_script.trellis_path(x)
    assert np.array_equal(plain_levels(symbols.T.astype(int)).T, levels)
    reach = np.arange(-60, 61)
    for row, found in zip(x.tolist(), np.square(levels - x).sum(axis=1)):
        paths = [(0.0, [])]
        for value in row:
            errors = [np.square(reach - 0.5 * np.sign(reach) * shift - value) for shift in (0, 1)]
            least = [[error[reach % 2 == parity].min() for parity in (0, 1)] for error in errors]
            if abs(value) < 0.125:  # stays 0, whatever its neighbours would like
                least = [[even, math.inf] for even, _ in least]
            paths = [(cost + least[shift_after(before)][parity], [*before, (shift_after(before), parity)])
                     for cost, before in paths for parity in (0, 1)]  # fmt: skip
        assert found == pytest.approx(min(cost for cost, _ in paths), rel=1e-4, abs=1e-6)


def table_of(module, name, value, squares, width, factor=None, quantizer="trellis"):
    c = module.Config(quantizer=quantizer)
    return module.make_tables(c, {name: value}, width, {name: factor}, {name: squares})[name]


def coded(module, table, trellis=True):
    """(bits of a table, what a reader makes of them)."""
    ans, (n, m) = module.constriction.stream.stack.AnsCoder(), table.symbols.shape
    writer, kept = module.Writer(), [part.copy() for part in table]
    module.code_table(writer, module.facts_of(table, trellis), table, trellis)
    assert all(np.array_equal(part, was) for part, was in zip(table, kept))
    bits = writer.finish(ans)
    found = module.Table(*(np.full(size, 77, np.int16) for size in (n, m, n, (n, m))))
    module.code_table(module.Reader(ans), np.zeros(module.FACTS), found, trellis)
    assert ans.is_empty()
    return bits, found


def test_integers_of_a_trellis_fit_16_bits(any_script):
    symbols, _ = any_script.trellis_path(np.float32([[1e6, -1e6, 32766.9, -32766.4] * 20]))
    assert 2**15 - 4 <= np.abs(symbols).max() <= 2**15 - 1
    large = np.int16([[2**15 - 1, -(2**15) + 1, 0]])
    for symbols in (large, large // 300, 0 * large):
        table = any_script.Table(np.int16([200]), np.int16([0, 3, -150]), np.int16([0]), symbols)
        assert np.array_equal(coded(any_script, table)[1].symbols, symbols)


@pytest.mark.parametrize("gptq", [False, True])
def test_weights_far_below_their_steps_stay_small(any_script, gptq):
    """Neurons that the calibration never saw at work: tiny rows with very wide steps. A nearest path alone would turn a
    few of them into loud ones, to be in a better state for their neighbours."""
    (rows, inputs), rng = layer(), np.random.default_rng(5)
    quiet, squares = rng.permutation(64)[:32], squares_like(rows)
    rows[quiet] *= np.geomspace(1e-3, 0.3, 32)[:, None].astype("float32")
    squares[quiet] = 0
    factor = any_script.gptq_factor(inputs.T @ inputs / len(inputs)) if gptq else None
    for width in (3e-4, 1e-3):
        back = any_script.values_of(table_of(any_script, FC, rows, squares, width, factor), True)
        away = np.sqrt(np.square(back - rows).mean(axis=1) / np.square(rows).mean(axis=1))
        assert away.max() < 4 and back.any(axis=1).sum() >= 20, (width, away.max())


def test_a_vector_that_no_pass_used_stays_whole(any_script):
    """Its gradient is 0, and yet it may be used with more passes: a gate must not be rounded to 0."""
    gates = np.float32([[1.0, 0.5]])
    for name in ("loop_gate", "blocks.1.attn_scale"):
        back = any_script.values_of(table_of(any_script, name, gates, 0 * gates, 0.01, None), True)
        assert np.allclose(back, gates, rtol=0.1), (name, back)
    rows, squares = np.float32([[1, 1, 1, 1], [0.9, 1, 1.1, 1]]), np.float32([[1] * 4, [0] * 4])
    back = any_script.values_of(table_of(any_script, "blocks.1.attn_scale", rows, squares, 0.2, None), True)
    assert np.allclose(back[1], rows[1], rtol=0.1), back  # of the pass that did not run


def test_matrices_of_one_shape_are_rounded_as_if_alone(any_script):
    """A stack is for speed only; float32 may tip a rounding."""
    parts = [layer(columns=140, seed=seed) for seed in range(3)]
    names = [f"blocks.{i}.mlp.fc.weight" for i in range(3)]
    weights = {name: rows for name, (rows, _) in zip(names, parts)}
    squares = {name: squares_like(rows) for name, rows in weights.items()}
    c = any_script.Config(quantizer="trellis")
    for gptq in (False, True):
        factors = {
            name: any_script.gptq_factor(x.T @ x / len(x)) if gptq else None for name, (_, x) in zip(names, parts)
        }
        found = any_script.make_tables(c, weights, 3e-4, factors, squares)
        assert list(found) == names
        for name in names:
            alone = table_of(any_script, name, weights[name], squares[name], 3e-4, factors[name])
            assert np.array_equal(found[name].rows, alone.rows) and np.array_equal(found[name].columns, alone.columns)
            assert (found[name].symbols != alone.symbols).mean() < (0.02 if gptq else 1e-9)


@pytest.mark.parametrize("quantizer", ["trellis", "absmax"])
def test_every_table_round_trips(any_script, quantizer):
    """What is decoded is, bit by bit, what was encoded; the levels are those that a trellis means; no error is larger
    than a step allows."""
    trellis = quantizer == "trellis"
    for case, (name, value, squares, width, factor) in cases(any_script).items():
        with np.errstate(all="raise", under="ignore"):
            table = table_of(any_script, name, value, squares, width, factor, quantizer)
            bits, found = coded(any_script, table, trellis)
        for part, expected in zip(found, table):
            assert part.dtype == np.int16 and np.array_equal(part, expected), case
        rows, back = value.reshape(-1, value.shape[-1]).astype(np.float64), any_script.values_of(table, trellis)
        step = np.exp2((table.rows[:, None].astype(float) + table.columns) / 4)
        assert back.dtype == np.float32 and back.shape == rows.shape, case
        levels = plain_levels(table.symbols) if trellis else table.symbols
        assert np.allclose(back, levels * step, rtol=1e-6, atol=1e-37), case
        assert bits < 18 * value.size + 500, case
        if "all zero" in case or "negative" in case or "no weights" in case:
            assert not back.any() and bits < 0.2 * value.size + 100, case
        if factor is None or not trellis:
            inside = np.abs(rows) <= step * (2**15 - 3)
            away = ((rows - back) / step)[inside]
            most = 1.01 if len(rows) > 2 and trellis else 1.1 if value.size > 100 else 3
            assert np.abs(away).max() <= 1.5 and np.square(away).mean() <= most / 12, case
            assert inside.mean() > 0.98, case


def test_steps_of_absmax_span_the_rows(any_script):
    """The largest weight of a row is between five sixths and all of the largest integer; rows of zeros cost nothing."""
    for name, top in ((FC, 31), ("tok_emb.weight", 127), ("blocks.1.attn.q.lora_a", 127), ("skip_weights", 2047)):
        rows = normal(64, 300) * np.geomspace(1e-3, 1e3, 64, dtype="float32")[:, None]
        table = table_of(any_script, name, rows, None, 0, None, "absmax")
        largest = np.abs(table.symbols).max(axis=1)
        assert largest.max() <= top and largest.min() >= top * 2**-0.25 - 1 and not table.columns.any()
        bits = coded(any_script, table, False)[0]
        rows[::2] = 0
        sparse = table_of(any_script, name, rows, None, 0, None, "absmax")
        assert not sparse.symbols[::2].any() and np.ptp(sparse.rows) <= np.ptp(table.rows)
        assert coded(any_script, sparse, False)[0] < bits


def test_what_a_trellis_gains(any_script):
    """Normal numbers: at the same entropy, almost a fifth of a bit less than rounding, from one bit to five."""
    x = np.random.default_rng(3).standard_normal((256, 1000)).astype(np.float32)

    def entropy(symbols, shifted):
        total = 0.0
        for part in (symbols[shifted == 0], symbols[shifted == 1]):
            counts = np.unique(part, return_counts=True)[1]
            total += (counts * np.log2(max(part.size, 1) / counts)).sum()
        return total / symbols.size

    for size in (0.5, 1, 2, 8):
        symbols, levels = any_script.trellis_path(size * x.T)
        bits = entropy(symbols.T, any_script.half_levels(symbols.T.astype(np.int16)))
        plain = entropy(np.rint(size * x), np.zeros(x.shape))
        error, rounding = np.square(levels - size * x.T).mean(), np.square(np.rint(size * x) - size * x).mean()
        saved = plain - bits - 0.5 * math.log2(error / rounding)
        assert 0.16 < saved < 0.22, (size, saved)


# ---------------------------------------------------------------------------------------------------------------------
# The coder's models
# ---------------------------------------------------------------------------------------------------------------------


def test_exp_is_the_exponential_function(any_script):
    x = -np.concatenate([[0.0], np.geomspace(1e-9, 349, 2000)])
    assert np.allclose(any_script.exp(x), np.exp(x), rtol=1e-12, atol=0)
    assert any_script.exp(np.array([-1e6]))[0] < 1e-150


def test_spread_models_are_the_mixture(any_script):
    """Frequencies of some spreads in all shapes of both kinds of states, beside SciPy's distribution functions."""
    spreads = range(any_script.SPREADS[0], any_script.SPREADS[1] + 1, 3)
    for spread, odd in itertools.product(spreads, (0, 1)):
        size, total = 2 ** (spread / 4), 2.0**22
        count = len(any_script.spread_model(spread, 0, odd)[0]) // 2 + 1
        first, later = (a + b / max(size, 0.35) for a, b in any_script.CUTS[odd])
        edges = np.append(first, np.arange(1, count) + later) / size
        normals, laplaces = special.ndtr(-edges), np.exp(-math.sqrt(2) * edges) / 2
        for shape in range(any_script.SHAPES):
            frequencies, bits = any_script.spread_model(spread, shape, odd)
            half = frequencies[len(frequencies) // 2 :]
            assert np.array_equal(frequencies, frequencies[::-1]) and half.min() >= 1 and len(half) <= 2**15
            assert np.array_equal(half, np.rint(half)) and len(half) >= min(16 * size, 2**15)
            above = (1 - shape / 4) * normals + shape / 4 * laplaces
            expected = total * np.concatenate([[1 - 2 * above[0]], above[:-1] - above[1:]])
            assert np.abs(half - expected).max() <= 1.5, (spread, shape)  # rounded, and at least 1
            least = 1 if spread <= 44 else 0.5  # of wider ones 16 bits are cut off
            assert least * total <= 1.0001 * frequencies.sum() <= 1.02 * total, (spread, shape)
            assert np.allclose(bits, -np.log2(half / frequencies.sum()), rtol=1e-9)


def entropy_bits(symbols) -> float:
    """Order 0, of all integers together."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float((counts * np.log2(counts.sum() / counts)).sum())


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "Laplace"])
@pytest.mark.parametrize("width", [4e-4, 1e-4])
@pytest.mark.parametrize("size", [1, 1e-6], ids=["", "tiny"])
def test_size_of_a_table_is_the_ideal_one(any_script, width, heavy, size):
    """Within a percent of the entropy of the integers that have one step and one kind of state."""
    rng, shape = np.random.default_rng(0), (256, 1024)
    rows = 0.05 * (rng.laplace(0, math.sqrt(0.5), shape) if heavy else rng.standard_normal(shape))
    table = table_of(any_script, FC, (size * rows).astype("float32"), squares_like(rows), size * width)
    contexts = 2 * (table.rows[:, None].astype(int) + table.columns) + any_script.half_levels(table.symbols)
    ideal = 0.0
    for context in np.unique(contexts):
        ideal += entropy_bits(table.symbols[contexts == context])
    bits = coded(any_script, table)[0]
    steps = entropy_bits(table.rows) + entropy_bits(table.columns)
    assert 1 < ideal / rows.size < 4.5 and steps < 10 * sum(shape)
    assert bits <= 1.012 * ideal + 1.2 * steps + 200
    assert bits - steps < 0.95 * entropy_bits(table.symbols)


@pytest.mark.parametrize("name", [FC, "tok_emb.weight"])
def test_size_of_absmax_is_the_entropy(any_script, name):
    rows = (0.02 * np.random.default_rng(0).standard_normal((512, 1024))).astype(np.float32)
    table = table_of(any_script, name, rows, None, 0, None, "absmax")
    bits, entropy = coded(any_script, table, False)[0], entropy_bits(table.symbols)
    assert entropy < bits < 1.005 * entropy


def test_bits_are_spent_where_the_loss_wants_them(any_script):
    """A quadratic loss: far less of it than with steps that are alike at as many bits, and as much as predicted."""
    rows = normal(192, 256)
    squares = squares_like(rows, scale=1.0)

    def loss_and_bits(curvature, width):
        table = table_of(any_script, FC, rows, curvature, width)
        error = np.square(any_script.values_of(table, True).astype(np.float64) - rows)
        return 0.5 * float((squares * error).sum()), coded(any_script, table)[0]

    for width in (0.1, 0.03, 0.005):  # 1.2, 2.8 and 5.3 bits a weight
        found, bits = loss_and_bits(squares, width)
        low, high = 0.1 * width, 10 * width
        for _ in range(9):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if loss_and_bits(np.ones_like(squares), middle)[1] > bits else (low, middle)
        alike, more = loss_and_bits(np.ones_like(squares), low)
        assert bits <= more <= 1.1 * bits and found < 0.5 * alike, width
        predicted = any_script.TRELLIS_GAIN * rows.size * width**2 / 24
        assert found < 1.06 * predicted, width
    assert found > 0.94 * predicted  # where no step is so wide that a weight is lost
    assert any_script.width_of(predicted, rows.size) == pytest.approx(width)


def test_steps_of_columns_know_what_gptq_makes_up_for(any_script):
    """Inputs that do not depend on each other: nothing to make up for, so a column's step follows its own input."""
    rows, rng = normal(64, 200), np.random.default_rng(2)
    of_rows, diagonal = np.exp2(rng.uniform(-3, 3, 64)), np.geomspace(0.1, 10, 200)[rng.permutation(200)]
    factor = any_script.gptq_factor(np.diag(diagonal).astype("float32"))
    squares = np.outer(of_rows, diagonal)
    with_factor, without = (
        any_script.loss_steps(rows, any_script.bends_of(FC, squares, f), 0.05) for f in (factor, None)
    )
    assert np.abs(with_factor[1] + 2 * np.log2(diagonal / diagonal.mean() + 0.01)).max() <= 0.51
    assert np.abs(with_factor[1] - without[1]).max() <= 1 and np.array_equal(with_factor[0], without[0])
    seen = squares.mean(axis=1) + any_script.ROW_FLOOR * squares.mean()
    assert np.abs(without[0] - 4 * np.log2(0.05 / np.sqrt(seen))).max() <= 0.51
    # And inputs that do: less is lost than with steps that know nothing of it, at no more bits.
    inputs = layer()[1] + rng.standard_normal((3000, 200)) * np.geomspace(0.5, 10, 200)
    hessian = inputs.T @ inputs / len(inputs)
    factor, squares = any_script.gptq_factor(hessian), np.outer(of_rows, np.diag(hessian)).astype("float32")
    found = []
    for curvature, width in ((squares, 0.1), (np.ones_like(squares), 0.1 / math.sqrt(np.median(squares)))):
        table = table_of(any_script, FC, rows, curvature, width, factor)
        error = (of_rows * np.square(inputs @ (any_script.values_of(table, True) - rows).T)).sum()
        found.append(math.log2(error) * rows.size / 2 + coded(any_script, table)[0])
    assert found[0] < found[1] - 0.3 * rows.size  # bits, at the same loss


def test_a_row_that_the_calibration_never_saw_is_not_free(any_script):
    """Its step is at most ten times that of a row of the mean curvature; by itself it would be all zeros."""
    rows, squares = normal(64, 200), np.full((64, 200), 1e-2, np.float32)
    squares[5] = 0
    steps = any_script.loss_steps(rows, any_script.bends_of("tok_emb.weight", squares, None), 0.005)[0]
    ratio = 2.0 ** ((steps[5] - steps[6]) / 4)
    assert 8 < ratio < 12


def test_no_weight_is_too_large_for_its_step(any_script):
    """A single outlier, equal weights, a loss that asks for steps finer than 16 bits: none is cut off."""
    rows = normal(64, 200)
    outlier, squares = rows.copy(), np.full_like(rows, 1e-2)
    outlier[3, 5] = 1e4
    for value, width in ((outlier, 1e-4), (rows, 1e-9), (np.full_like(rows, 0.05), 1e-4)):
        back = any_script.values_of(table_of(any_script, FC, value, squares, width), True)
        assert (np.abs(back - value).max(axis=1) <= 0.02 * np.abs(value).max(axis=1)).all()


# ---------------------------------------------------------------------------------------------------------------------
# TARGET_BYTES
# ---------------------------------------------------------------------------------------------------------------------


def gaussian_model(module, **fields):
    """A model of 30,000 random weights, and a curvature for it."""
    more = dict(layout="1x2", model_dim=48, num_heads=4, num_kv_heads=2, vocab_size=384, train_seq_len=64)
    c = tiny_config(module, **more | dict(quantizer="trellis", count_code="0") | fields)
    rng = np.random.default_rng(3)
    weights = {k: (0.05 * rng.standard_normal(s)).astype(np.float32) for k, s in module.param_shapes(c).items()}
    hessians = {}
    for name in matrices(module, c):
        x = rng.standard_normal((400, weights[name].shape[1])) * np.geomspace(0.1, 2, weights[name].shape[1])
        hessians[name] = (x.T @ x / 400).astype(np.float32)
    return c, weights, module.Curvature(hessians, squares_of(weights), 400)


@pytest.mark.parametrize("bits", [5.0, 0.8])
def test_target_bytes(any_script, tmp_path, bits):
    c, weights, curvature = gaussian_model(any_script)
    code, count = 123_456, any_script.count_params(c)
    target = code + int(bits * count / 8)
    made = any_script.export_model(dataclasses.replace(c, target_bytes=target), weights, 2, curvature, code)
    assert made.size == len(made.data) and 0.998 * target <= code + made.size <= target
    assert 2 <= made.rounds <= 4 and made.loss_aimed > 0 and made.plain_rounded == 0
    assert made.bits_per_weight == pytest.approx(bits, rel=0.15)
    (tmp_path / "a").write_bytes(made.data)
    found = any_script.read_artifact(tmp_path / "a")  # and it is an artifact, not filled up with anything
    assert sum(found.bits.values()) / 8 == pytest.approx(made.size, abs=400)
    fixed = dataclasses.replace(c, quant_loss=made.loss_aimed)
    again = any_script.export_model(fixed, weights, 2, curvature, code)
    assert again.rounds == 1 and again.size == pytest.approx(made.size, rel=2e-3)


def by_threads(world, work):
    """[work(engine)] of so many made-up engines, which exchange texts as processes do; of one that fails, its error."""
    texts, barrier = [""] * world, threading.Barrier(world, timeout=60)

    def start(rank):
        def exchange(text):
            texts[rank] = text
            barrier.wait()
            found = list(texts)
            barrier.wait()
            return found

        try:
            return work(types.SimpleNamespace(rank=rank, world=world, exchange=exchange))
        except ValueError as error:  # an InputError is one
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(start, range(world)))


def test_processes_that_share_an_export_make_the_same_artifact(any_script):
    c, weights, curvature = gaussian_model(any_script, layout="1", target_bytes=20_000)
    world = 3
    curvature.hessians["blocks.0.mlp.fc.weight"] *= -1  # it is rounded without GPTQ, and counted
    alone, dealt_out = any_script.export_model(c, weights, 2, curvature), []

    def export(engine):
        def share(work, sizes):
            return any_script.share_out(engine, lambda names: dealt_out.append(names) or work(names), sizes)

        return any_script.export_model(c, weights, 2, curvature, 0, share)

    made = by_threads(world, export)
    plain = [found._replace(tables=sorted(found.tables)) for found in (*made, alone)]
    assert all(found == plain[-1] for found in plain) and alone.rounds > 1 and alone.plain_rounded == 1
    assert len(dealt_out) == world * alone.rounds and all(dealt_out)
    assert sorted(sum(dealt_out, [])) == sorted([*weights] * alone.rounds)


def test_what_one_process_refuses_in_its_share_all_refuse(any_script):
    def refuse_a(names):
        any_script.require("a" not in names, "a", "another", "a")
        return names

    sizes = {"a": 3, "b": 2, "c": 1, "d": 1}
    errors = by_threads(3, lambda engine: any_script.share_out(engine, refuse_a, sizes))
    assert [str(error) for error in errors] == ["a: expected another, found a"] * 3
    assert by_threads(2, lambda engine: any_script.share_out(engine, list, sizes)) == [[["a", "c"], ["b", "d"]]] * 2


def test_rounds_of_made_up_sizes(any_script):
    """Bits that fall by less, or more, than one a doubling of the width: the target is met in at most five rounds."""
    target, count = 16_000_000, 36_000_000
    for at, power in itertools.product((1e-4, 1e-3, 0.1), (0.7, 0.85, 1.0, 1.2)):
        sizes, width, met = {}, any_script.width_of(0.005, count), False
        while not met:
            sizes[width] = int(count / 8 * math.log2(1 + (at / width) ** power))
            met = 0.998 * target <= sizes[width] <= target
            width = any_script.next_width(sizes, 0.999 * target, count)
            assert met or width not in sizes
        assert len(sizes) <= 5, (at, power, sizes)


def test_the_next_width_is_a_new_one_between_those_about_the_goal(any_script):
    """Of a small model, whose bytes fall in jumps: the nearest two were of one side, and led back to the third."""
    sizes = {0.0001575573: 7665, 0.0001359272: 8068, 0.0001397477: 8053, 0.0001457081: 7804}
    assert 0.000140 < any_script.next_width(sizes, 7992.0, 15_000) < 0.000145


def test_the_best_of_all_rounds_is_kept(any_script, monkeypatch):
    """The largest that fits, else the smallest, whichever round it came in."""
    c = tiny_config(any_script, quantizer="trellis")
    weights, made, tables = random_weights(any_script, c), [], {}
    curvature, make = any_script.Curvature({}, squares_of(weights), 1), any_script.make_tables
    files, assemble = {}, any_script.assemble

    def assembled(c, loops, table):
        first = id(next(iter(table.values())))  # `tables` keeps them all, so that no two have one
        if first not in files:
            files[first] = assemble(c, loops, table)
        return files[first]

    monkeypatch.setattr(any_script, "assemble", assembled)
    monkeypatch.setattr(
        any_script, "make_tables", lambda c, w, width, *r: tables.setdefault(width, make(c, w, width, *r))
    )
    for loss in (0.3, 0.01, 3.0, 0.1, 1.0, 0.03, 0.2, 2.0):
        made.append(any_script.export_model(dataclasses.replace(c, quant_loss=loss), weights, 2, curvature))
    monkeypatch.setattr(any_script, "make_tables", lambda c, w, width, *_: tables[width])
    ordered, widths = sorted(made, key=lambda one: one.size), list(tables)
    for target, best in ((ordered[3].size + 60, ordered[3]), (ordered[0].size - 200, ordered[0])):
        rest = iter([*widths[1:], widths[0]])
        monkeypatch.setattr(any_script, "width_of", lambda *_: widths[0])
        monkeypatch.setattr(any_script, "next_width", lambda *_, rest=rest: next(rest))
        found = any_script.export_model(dataclasses.replace(c, target_bytes=target), weights, 2, curvature)
        assert found.data == best.data and found.loss_aimed == best.loss_aimed and found.rounds == 8


def test_count_code_in_target_bytes(any_script, tiny, tmp_path, monkeypatch):
    """0, 1 and packed leave more or less to the weights, and `fits` agrees."""
    sizes = {}
    for count in ("0", "1", "packed"):
        code, target = any_script.code_size(count), any_script.code_size(count) + 8_000
        flags = (
            "--layout=1x2",
            "--quantizer=trellis",
            f"--target_bytes={target}",
            f"--count_code={count}",
            f"--run_id=c{count}",
        )
        outcome = run_in_process(any_script, *flags, "--calib_tokens=64", "--iterations=2", **tiny)
        result = json.loads((tmp_path / f"logs/c{count}/result.json").read_text())
        assert outcome.code == 0 and result["fits"] is True and result["count_code"] == count, outcome
        assert 0.99 * target < result["bytes_total"] <= target
        assert result["bytes_code"] == code == result["bytes_total"] - result["bytes_artifact"]
        sizes[count] = code
        said = {"0": "code 0, not counted + ", "1": f"code {code} + ", "packed": f"code {code} packed + "}[count]
        assert f"({said}artifact {result['bytes_artifact']}, " in outcome.out
    assert sizes["0"] == 0 < sizes["packed"] < 0.5 * sizes["1"]
    few = ("--iterations=2", "--bytes_cap=60000", "--quantizer=absmax", "--run_id=d")
    assert_refused(run_in_process(any_script, *few, **tiny), "BYTES_CAP", "code \\+ artifact within 60000 bytes")
    assert run_in_process(any_script, *few, "--count_code=0", **tiny).code == 0


@pytest.mark.parametrize("bits", [2.9, 3.1])
def test_fewer_than_three_bits_a_weight_are_noticed(any_script, tiny, monkeypatch, bits):
    whole, target = any_script.export_model, 30_000

    def export_model(c, *rest):  # without the rounds that meet the target
        made = whole(dataclasses.replace(c, target_bytes=0), *rest)
        return made._replace(bits_per_weight=bits, size=29_990)

    monkeypatch.setattr(any_script, "export_model", export_model)
    flags = ("--quantizer=trellis", f"--target_bytes={target}", "--count_code=0", "--calib_tokens=64", "--iterations=2")
    outcome = run_in_process(any_script, *flags, **tiny)
    assert outcome.code == 0 and ("\nnotice: fewer than three bits a weight: " in outcome.out) == (bits < 3), outcome


def test_target_that_is_missed(any_script, tiny, tmp_path, monkeypatch):
    """A file that is too large all the same is there, with its score; the run says so and fails."""
    monkeypatch.setitem(any_script.LEAST_BITS, "trellis", 0.0)  # or it is refused before the first step
    flags = ("--quantizer=trellis", "--target_bytes=400", "--count_code=0", "--calib_tokens=64", "--iterations=2")
    outcome = run_in_process(any_script, *flags, "--bytes_cap=400", "--run_id=a", **tiny)
    result = json.loads((tmp_path / "logs/a/result.json").read_text())
    over = result["bytes_total"] - 400
    assert outcome.code == 1 and over > 0 and result["val_bpb"] > 0 and outcome.err == "", outcome
    assert f"\nnotice: TARGET_BYTES missed by {over} bytes: " in outcome.out and result["fits"] is False
    assert len((tmp_path / "logs/a/model.int6.rgpt").read_bytes()) == result["bytes_artifact"]


def test_target_that_a_model_is_too_small_for(any_script, tiny, tmp_path):
    flags = ("--quantizer=trellis", "--target_bytes=900000", "--count_code=0", "--calib_tokens=64", "--iterations=2")
    outcome = run_in_process(any_script, *flags, "--run_id=a", **tiny)
    assert outcome.code == 0, outcome
    result = json.loads((tmp_path / "logs/a/result.json").read_text())
    left = 900_000 - result["bytes_total"]
    assert left > 100_000 and f"notice: {left} bytes of TARGET_BYTES are left" in outcome.out
    assert result["val_bpb"] == pytest.approx(result["val_bpb_raw"], abs=1e-3)


def test_what_is_not_finite_is_refused(any_script):
    c, weights, curvature = gaussian_model(any_script)
    for i, bad in itertools.product(range(3), (np.nan, np.inf, -1e31)):
        parts = [dict(part) for part in (weights, *curvature[:2])]
        parts[i][FC] = np.where(np.arange(parts[i][FC].shape[1]) == 3, np.float32(bad), parts[i][FC])
        with pytest.raises(any_script.InputError, match=re.escape(FC)):
            any_script.export_model(c, parts[0], 2, any_script.Curvature(*parts[1:], 1))


def test_a_file_that_no_reader_would_take_is_not_written(any_script, monkeypatch):
    c, weights, curvature = gaussian_model(any_script, quant_loss=1e9)
    monkeypatch.setattr(any_script, "WEIGHTS_A_BYTE", 20)
    with pytest.raises(any_script.InputError, match="20 weights a byte.*lower QUANT_LOSS"):
        any_script.export_model(c, {k: np.zeros_like(v) for k, v in weights.items()}, 2, curvature)


def test_both_scripts_write_the_same_bytes(both):
    contents = []
    for module in both:
        c, weights, curvature = gaussian_model(module)
        contents.append(module.export_model(c, weights, 2, curvature).data)
    assert contents[0] == contents[1]


def test_code_bytes_are_of_the_code_that_runs(script, monkeypatch, tmp_path):
    size = script.code_size()
    assert size == len(open(script.__file__, "rb").read())
    (tmp_path / "edited.py").write_text("")
    monkeypatch.setattr(script, "__file__", str(tmp_path / "edited.py"))
    assert script.code_size() == size
