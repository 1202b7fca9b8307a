"""ROUND_FROM: from then on the model has rounded weights, and gradients change the exact ones behind them."""

import re

import numpy as np
import pytest
from conftest import assert_refused, random_weights, run_in_process
from test_resume import assert_same_run, result_of, stopping

ROUNDED = {
    "ITERATIONS": "24",
    "ROUND_FROM": "0.6",
    "QUANTIZER": "trellis",
    "QUANT_LOSS": "0.02",
    "CALIB_TOKENS": "512",
    "LORA_RANK": "2",
    "MATRIX_LR": "0.0005",
    "TIED_EMBED_LR": "0.0005",
    "SCALAR_LR": "0.0005",
}
TO_FIT = {"QUANT_LOSS": "0", "COUNT_CODE": "0", "BYTES_CAP": "30000", "TARGET_BYTES": "14000"}


def steps_and_weights(m, c):
    """Steps of two matrices, a row and column each its own, and weights."""
    weights, rng = random_weights(m, c), np.random.default_rng(1)
    names = ("tok_emb.weight", "blocks.1.attn.q.weight")
    shapes = {name: weights[name].shape for name in names}
    return {name: np.exp2(rng.integers(-9, -5, shape)).astype(np.float32) for name, shape in shapes.items()}, weights


def nearest(exact, steps):
    return {
        name: steps[name] * np.rint(value / steps[name]) if name in steps else value for name, value in exact.items()
    }


def test_gradients_of_rounded_weights_change_the_exact_ones(script, config):
    """A step is that of a model which has the rounded weights, and is made on the exact ones."""
    c = config(script, weight_decay=0.1, iterations=9)
    stream = script.TokenStream(script.find_shards(c.data_path, "train", c.vocab_size), c)
    steps, exact = steps_and_weights(script, c)
    rounded = nearest(exact, steps)
    assert all(np.abs(rounded[name] - exact[name]).max() > 0.001 for name in steps)
    engine, plain = script.Engine(c), script.Engine(c)
    engine.build(rounded)
    engine.round_to(steps, {name: exact[name] for name in steps})
    plain.build(rounded)
    for one in (engine, plain):
        assert all(np.array_equal(one.weights()[name], rounded[name]) for name in rounded)
        one.step(stream, 0, 2, 1.0, 0.9)
    after, of_plain = engine.exact_weights(), plain.weights()
    for name in exact:  # the same change, but for what decay takes off
        moved, expected = after[name] - exact[name], of_plain[name] - rounded[name]
        assert np.abs(expected).max() > 0 and np.abs(moved - expected).max() < 0.02 * np.abs(expected).max(), name
    assert all(np.array_equal(engine.weights()[name], value) for name, value in nearest(after, steps).items())
    kept = engine.exact_weights(), engine.weights()
    engine.warm_up(stream, 2)
    for before, now in zip(kept, (engine.exact_weights(), engine.weights())):
        assert all(np.array_equal(before[name], now[name]) for name in before)


def test_both_scripts_round_alike(both, config):
    found = []
    for m in both:
        c = config(m, muon_momentum=0.9)
        stream = m.TokenStream(m.find_shards(c.data_path, "train", c.vocab_size), c)
        steps, weights = steps_and_weights(m, c)
        engine = m.Engine(c)
        engine.build(weights)
        engine.round_to(steps, {name: weights[name] for name in steps})
        for step in range(3):
            engine.step(stream, step * c.train_batch_tokens, 2, 0.5, 0.9)
        found.append(engine.exact_weights())
    for name in found[0]:
        assert np.allclose(found[0][name], found[1][name], rtol=0, atol=2e-3), name


def test_the_artifact_holds_what_the_model_had(script, tiny, tmp_path, monkeypatch):
    """The last steps' multiples, whole; FLOPs count the look at the curvature; all fits, with little left over."""
    models, finish = [], script.finish
    monkeypatch.setattr(script, "finish", lambda run: models.append(run.engine.weights()) or finish(run))
    env = tiny | ROUNDED | TO_FIT | {"ITERATIONS": "60"}
    outcome = run_in_process(script, "--run_id=a", **env)
    assert outcome.code == 0, outcome
    fits, result = re.findall(r"rounded:(\d)/4", outcome.out), result_of(tmp_path / "logs" / "a")
    assert fits == [str(i) for i in range(1, 5)] and "rounded anew" not in outcome.out
    assert 0.93 * 14000 <= result["bytes_total"] <= 14000 and result["calib_time_ms"] is None and result["fits"]
    artifact = script.read_artifact(tmp_path / "logs" / "a" / "model.int6.rgpt")
    assert artifact.quantizer == "uniform"
    for name, value in models[0].items():  # but for the order of two products
        assert np.allclose(artifact.weights[name], value, rtol=1e-6, atol=0), name
    assert result["val_loss"] == pytest.approx(result["val_loss_raw"], rel=1e-5)
    assert run_in_process(script, "--run_id=b", "--round_from=0", **env).code == 0
    plain = result_of(tmp_path / "logs" / "b")
    c = script.load_config([], env, "smoke")[0]
    assert result["train_flops"] - plain["train_flops"] == script.train_flops_per_token(c, 2) * 512


def test_a_wall_clock_bounds_the_look_at_the_curvature(script, tiny, tmp_path, monkeypatch):
    """Which is in training's seconds: none are kept for after it."""
    asked, look = [], script.Engine.curvature
    patched = lambda self, *args: asked.append(args[3]) or look(self, *args)  # noqa: E731
    monkeypatch.setattr(script.Engine, "curvature", patched)
    env = tiny | ROUNDED | {"ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "4", "CALIB_SECONDS": "0.5"}
    assert run_in_process(script, "--run_id=a", **env).code == 0
    assert asked == [0.5] and 3 < result_of(tmp_path / "logs" / "a")["train_time_ms"] / 1000 < 4.5
    c = script.load_config([], env, "smoke")[0]
    assert script.seconds_to_train(c) == 4


def test_a_stopped_run_goes_on_bit_for_bit(script, tiny, tmp_path, monkeypatch):
    env = tiny | ROUNDED | {"ITERATIONS": "120"}
    assert run_in_process(script, "--run_id=alone", **env).code == 0
    with monkeypatch.context() as patch:
        stopping(script, patch, 2 + 83)  # two of them warm up
        assert run_in_process(script, "--run_id=stopped", **env).code == 143
    path = tmp_path / "logs" / "stopped" / "checkpoint.safetensors"
    tensors, note = script.load_tensors(path)
    assert 0 < note["state"]["fits"] < script.ROUND_FITS and "rounding.exact.tok_emb.weight" in tensors
    exact, rounded = (tensors[f"{kind}.tok_emb.weight"] for kind in ("rounding.exact", "weights"))
    assert (exact != rounded).mean() > 0.9  # whoever reads the weights gets the model's
    content = path.read_bytes()
    script.save_tensors(path, {k: v for k, v in tensors.items() if k != "rounding.width"}, note)
    refused = run_in_process(script, "--run_id=stopped", "--resume", **env)
    assert_refused(refused, "expected the training state", "found another")
    older = {name: value for name, value in note["state"].items() if name != "fits"}
    script.save_tensors(path, tensors, note | {"state": older})
    refused = run_in_process(script, "--run_id=stopped", "--resume", **env)
    assert_refused(refused, "found that of another version")
    path.write_bytes(content)
    changed = run_in_process(script, "--run_id=stopped", "--resume", **env | {"QUANT_LOSS": "0.03"})
    assert_refused(changed, "config_sha256")  # what is rounded in training is trained around
    assert run_in_process(script, "--run_id=stopped", "--resume", **env).code == 0
    assert_same_run(script, tmp_path / "logs" / "alone", tmp_path / "logs" / "stopped")
    assert run_in_process(script, "--run_id=stopped", "--resume", **env).code == 0  # a finished run is finished
    assert_same_run(script, tmp_path / "logs" / "alone", tmp_path / "logs" / "stopped")


@pytest.mark.parametrize("asked", (0.97, 0.5))
def test_what_is_over_the_target_is_cut_or_rounded_anew(any_script, tiny, tmp_path, monkeypatch, asked):
    """A little by rounding fewer fractions up, much by an export as after any training."""
    m, real, found = any_script, any_script.export_rounded, []

    def too_much(run):
        size = real(run).size
        run.config = m.dataclasses.replace(run.config, target_bytes=round(asked * size))
        found.append((run.config.target_bytes, real(run)))
        return found[0][1]

    monkeypatch.setattr(m, "export_rounded", too_much)
    outcome = run_in_process(m, "--run_id=a", **tiny | ROUNDED | TO_FIT | {"TARGET_BYTES": "13000"})
    [(target, made)], result = found, result_of(tmp_path / "logs" / "a")
    anew = re.search(r"\d+ bytes over TARGET_BYTES: all is rounded anew", outcome.out)
    assert outcome.code == 0 and (made is None) == bool(anew) == (result["calib_time_ms"] is not None) == (asked == 0.5)
    assert (0.97 if made else 0.8) * target < result["bytes_total"] <= target


def test_bytes_are_reckoned_from_some_of_the_rows(any_script, monkeypatch):
    """Within 5 % of what the coder makes of them."""
    m, rng = any_script, np.random.default_rng(3)
    value = (rng.standard_normal((512, 96)) * np.exp(rng.standard_normal((512, 1)) / 2)).astype(np.float32)
    squares = np.square(rng.standard_normal((512, 96))).astype(np.float32)
    bends = {"tok_emb.weight": m.bends_of("tok_emb.weight", squares, None)}
    table = m.plain_table("tok_emb.weight", value, *m.loss_steps(value, bends["tok_emb.weight"], 0.3))
    kind = m.CODED.index("uniform")
    ans, writer = m.constriction.stream.stack.AnsCoder(), m.Writer()
    m.code_table(writer, m.facts_of(table, kind), table, kind)
    size = writer.finish(ans) / 8
    for sample in (2**17, 2**13):
        monkeypatch.setattr(m, "SAMPLE", sample)
        assert abs(m.bytes_about({"tok_emb.weight": value}, bends, 0.3) / size - 1) < 0.05


def test_what_is_refused_and_what_decides(any_script, config, tiny, tmp_path):
    m = any_script
    assert_refused(
        run_in_process(m, "--round_from=0.6", "--quantizer=absmax", **tiny), "ROUND_FROM", "QUANTIZER=trellis"
    )
    assert_refused(run_in_process(m, "--round_from=1", "--quantizer=trellis", **tiny), "ROUND_FROM", "at most 0.99")
    early = run_in_process(m, "--round_from=0.5", "--quantizer=trellis", **tiny)  # where the second pass comes on
    assert_refused(early, "ROUND_FROM", "after the last switch of LOOP_SCHEDULE, 0.5")
    c = config(m, quantizer="trellis", calib_tokens=512, round_from=0.8)
    assert m.config_sha256(c) != m.config_sha256(m.dataclasses.replace(c, eval_loops="3"))  # of the curvature
    for round_from, same in ((0.0, True), (0.8, False)):
        hashes = {
            m.config_sha256(m.dataclasses.replace(c, round_from=round_from, target_bytes=target)) for target in (0, 9)
        }
        assert (len(hashes) == 1) == same


def test_a_vector_that_grows_from_zero_is_whole(any_script, tiny, tmp_path, monkeypatch):
    """Its steps are those of what it has become, not of the gate of 0 whose curvature was looked at."""
    m, real = any_script, any_script.begin_rounding

    def grown(run):
        rounding, exact = real(run), run.engine.exact_weights()
        exact["loop_gate"] = np.array([1, 0.25], np.float32)
        run.engine.exact_weights = lambda: exact
        return rounding

    monkeypatch.setattr(m, "begin_rounding", grown)
    env = tiny | ROUNDED | {"LOOP_GATE": "gain", "LOOP_GATE_INIT": "0", "QUANT_LOSS": "0.00001"}
    assert run_in_process(m, "--run_id=a", **env).code == 0
    gate = m.read_artifact(tmp_path / "logs" / "a" / "model.int6.rgpt").weights["loop_gate"]
    assert np.allclose(gate, [1, 0.25], rtol=0.05)


def test_weights_that_blew_up_are_not_rounded(any_script, tiny, tmp_path, monkeypatch):
    """One line, as where a loss is no number; an infinite weight may come before one."""
    m, real = any_script, any_script.begin_rounding

    def blown_up(run):
        rounding, exact = real(run), run.engine.exact_weights()
        exact["tok_emb.weight"][3, 5] = np.inf
        run.engine.exact_weights = lambda: exact
        return rounding

    monkeypatch.setattr(m, "begin_rounding", blown_up)
    outcome = run_in_process(m, "--run_id=a", **tiny | ROUNDED)
    line = "error: tok_emb.weight: expected weights and gradients below 1e+30, found inf\n"
    assert (outcome.code, outcome.err) == (1, line)
