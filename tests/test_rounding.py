"""ROUND_FROM: columns are rounded a part at a time and kept while training goes on in the others."""

import math
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


def made_rounding(m, c, seed=0):
    """A Rounding of random weights, with nothing rounded yet."""
    weights, rng = random_weights(m, c, seed), np.random.default_rng(seed)
    tensors = {"said": np.zeros(2, np.float32)}
    for name, weight in weights.items():
        value = m.as_matrix(weight)
        rows, columns = m.loss_steps(value, m.bends_of(name, np.ones_like(value), None), 0.05)
        tensors |= {f"rows.{name}": rows, f"columns.{name}": columns}
        if not m.is_vector(name):
            tensors[f"symbols.{name}"] = np.zeros(value.shape, np.int16)
            tensors[f"order.{name}"] = rng.permutation(value.shape[1]).astype(np.int32)
    assert {name: value.shape for name, value in tensors.items()} == m.rounding_shapes(c)
    return m.Rounding(c, tensors), weights


def test_parts_hold_every_column_once(any_script, config):
    m, c = any_script, config(any_script, lora_rank=2)
    rounding, _ = made_rounding(m, c)
    assert set(rounding.order) == {name for name in m.param_shapes(c) if not m.is_vector(name)}
    for name, order in rounding.order.items():
        parts = [rounding.columns(name, i, i + 1) for i in range(m.ROUND_PARTS)]
        assert np.concatenate(parts).tolist() == order.tolist() and sorted(order) == list(range(len(order)))
        assert rounding.columns(name, 2, 5).tolist() == np.concatenate(parts[2:5]).tolist()


def test_parts_of_weights_that_stand_still_are_one_rounding(any_script, config):
    """Part by part gives what all at once does, since no column repairs another."""
    m, c = any_script, config(any_script)
    rounding, weights = made_rounding(m, c)
    names = list(rounding.order)
    values = {name: m.as_matrix(weights[name]) for name in names}
    whole = m.round_all(values, {name: rounding.steps(name) for name in names}, True, {})
    for part in range(m.ROUND_PARTS):
        for name, symbols in rounding.round(names, weights, part).items():
            rounding.tensors[f"symbols.{name}"][:, rounding.columns(name, part, part + 1)] = symbols
    for name in names:
        assert np.array_equal(rounding.table(name).symbols, whole[name].symbols), name


def test_bytes_are_reckoned_from_some_of_the_rows(any_script, monkeypatch):
    """Within 5 % of what the coder makes of them."""
    m, rng = any_script, np.random.default_rng(3)
    value = (rng.standard_normal((512, 96)) * np.exp(rng.standard_normal((512, 1)) / 2)).astype(np.float32)
    bends = m.bends_of("tok_emb.weight", np.square(rng.standard_normal((512, 96))).astype(np.float32), None)
    steps = m.loss_steps(value, bends, 0.3)
    table = m.round_all({"tok_emb.weight": value}, {"tok_emb.weight": steps}, True, {})["tok_emb.weight"]
    ans, writer = m.constriction.stream.stack.AnsCoder(), m.Writer()
    m.code_table(writer, m.facts_of(table, True), table, True)
    size = writer.finish(ans) / 8
    for sample in (2**17, 2**13):
        monkeypatch.setattr(m, "SAMPLE", sample)
        assert abs(m.bytes_about("tok_emb.weight", value, bends, 0.3) / size - 1) < 0.05


def test_what_is_kept_stays_and_the_rest_is_trained(script, config, data):
    """The step is that of the other script, but for the kept numbers, which not even decay moves."""
    c = config(script, weight_decay=0.1, iterations=9)
    stream = script.TokenStream(script.find_shards(c.data_path, "train", c.vocab_size), c)
    weights, engines = random_weights(script, c), [script.Engine(c), script.Engine(c)]
    kept = {}
    for name in ("tok_emb.weight", "blocks.1.attn.q.weight", "blocks.0.mlp.fc.weight"):
        kept[name] = np.full(weights[name].shape, math.nan, np.float32)
        kept[name][:, 3:9] = np.round(weights[name][:, 3:9], 1)
    for engine in engines:
        engine.build(weights)
    engines[1].keep(kept)
    before = engines[1].weights()
    for engine in engines:
        engine.step(stream, 0, 2, 1.0, 0.9)
    free, held = (engine.weights() for engine in engines)
    for name in weights:
        fixed = ~np.isnan(kept[name]) if name in kept else np.zeros(weights[name].shape, bool)
        assert np.array_equal(held[name][fixed], before[name][fixed]), name
        if name in kept:
            assert np.array_equal(held[name][fixed], kept[name][fixed]), name
    assert all(np.abs(free[name] - weights[name]).max() > 0 for name in kept)
    moved = {name: ~np.isnan(kept[name]) for name in kept}
    assert all(np.abs(held[name] - before[name])[~moved[name]].max() > 0 for name in kept)


def test_both_scripts_keep_alike(both, config):
    steps = []
    for m in both:
        c = config(m, muon_momentum=0.9)
        stream = m.TokenStream(m.find_shards(c.data_path, "train", c.vocab_size), c)
        weights, engine = random_weights(m, c), m.Engine(c)
        kept = np.full(weights["blocks.1.attn.v.weight"].shape, math.nan, np.float32)
        kept[:, ::2] = 0.25
        engine.build(weights)
        engine.keep({"blocks.1.attn.v.weight": kept})
        for step in range(3):
            engine.step(stream, step * c.train_batch_tokens, 2, 0.5, 0.9)
        steps.append(engine.weights())
    for name in steps[0]:
        assert np.allclose(steps[0][name], steps[1][name], rtol=0, atol=2e-3), name


def test_a_run_rounds_in_training(script, tiny, tmp_path, monkeypatch):
    """What was rounded first is in the artifact as it was; FLOPs count the look at the curvature; all fits."""
    seen, keep = [], script.Engine.keep
    monkeypatch.setattr(script.Engine, "keep", lambda self, values: seen.append(values) or keep(self, values))
    env = tiny | ROUNDED | {"QUANT_LOSS": "0", "COUNT_CODE": "0", "BYTES_CAP": "30000", "TARGET_BYTES": "14000"}
    outcome = run_in_process(script, "--run_id=a", **env)
    assert outcome.code == 0, outcome
    parts, result = re.findall(r"rounded:(\d+)/17", outcome.out), result_of(tmp_path / "logs" / "a")
    assert parts == sorted(parts, key=int) and int(parts[-1]) >= 15 and "rounded anew" not in outcome.out
    assert len(seen) > 5 and 0.985 * 14000 <= result["bytes_total"] <= 14000
    assert result["calib_time_ms"] is None and result["fits"]
    artifact = script.read_artifact(tmp_path / "logs" / "a" / "model.int6.rgpt").weights
    for values in seen:
        for name, value in values.items():
            there = ~np.isnan(value)
            assert np.array_equal(script.as_matrix(artifact[name])[there], value[there]), name
    assert np.mean([~np.isnan(values["tok_emb.weight"]) for values in seen]) * len(seen) > 0.9  # no column twice
    assert run_in_process(script, "--run_id=b", "--round_from=0", **env).code == 0
    plain = result_of(tmp_path / "logs" / "b")
    c = script.load_config([], env, "smoke")[0]
    assert result["train_flops"] - plain["train_flops"] == script.train_flops_per_token(c, 2) * 512


def test_a_stopped_run_goes_on_bit_for_bit(script, tiny, tmp_path, monkeypatch):
    env = tiny | ROUNDED | {"ITERATIONS": "120"}  # a part every third step: the next two must keep what is rounded
    assert run_in_process(script, "--run_id=alone", **env).code == 0
    with monkeypatch.context() as patch:
        stopping(script, patch, 2 + 79)  # two of them warm up
        assert run_in_process(script, "--run_id=stopped", **env).code == 143
    path = tmp_path / "logs" / "stopped" / "checkpoint.safetensors"
    tensors, note = script.load_tensors(path)
    assert 0 < note["state"]["parts"] < script.ROUND_PARTS - 1 and "rounding.symbols.tok_emb.weight" in tensors
    content = path.read_bytes()
    script.save_tensors(path, {k: v for k, v in tensors.items() if k != "rounding.said"}, note)
    refused = run_in_process(script, "--run_id=stopped", "--resume", **env)
    assert_refused(refused, "expected the training state", "found another")
    older = {name: value for name, value in note["state"].items() if name != "parts"}
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


def test_what_does_not_fit_is_rounded_anew(any_script, tiny, tmp_path, monkeypatch):
    m, real = any_script, any_script.export_rounded

    def too_much(run):
        run.config = m.dataclasses.replace(run.config, target_bytes=8000)
        assert real(run) is None

    monkeypatch.setattr(m, "export_rounded", too_much)
    env = tiny | ROUNDED | {"QUANT_LOSS": "0", "COUNT_CODE": "0", "BYTES_CAP": "30000", "TARGET_BYTES": "14000"}
    outcome = run_in_process(m, "--run_id=a", **env)
    assert outcome.code == 0 and re.search(r"\d{4} bytes over TARGET_BYTES: all are rounded anew", outcome.out)
    assert result_of(tmp_path / "logs" / "a")["bytes_total"] <= 8000
    assert result_of(tmp_path / "logs" / "a")["calib_time_ms"] is not None


@pytest.mark.parametrize("asked,low,high", ((0.98, 0.955, 0.98), (1.03, 1.005, 1.03)))
def test_the_last_columns_make_up_for_bytes(any_script, tiny, tmp_path, monkeypatch, asked, low, high):
    """A target that is lower, or higher, when all but the last columns are rounded is met with those."""
    m, real, sizes = any_script, any_script.export_rounded, []

    def moved(run):
        settled = real(run).size
        run.config = m.dataclasses.replace(run.config, target_bytes=round(asked * settled))
        run.state.parts = m.ROUND_PARTS - 1
        sizes.append((settled, run.config.target_bytes))
        return real(run)

    monkeypatch.setattr(m, "export_rounded", moved)
    env = tiny | ROUNDED | {"MODEL_DIM": "64", "COUNT_CODE": "0", "BYTES_CAP": "90000", "QUANT_LOSS": "0.00001"}
    assert run_in_process(m, "--run_id=a", **env).code == 0
    [(settled, target)] = sizes
    assert low * settled <= result_of(tmp_path / "logs" / "a")["bytes_total"] <= high * settled


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


def test_a_wall_clock_bounds_the_look_at_the_curvature(script, tiny, tmp_path, monkeypatch):
    """Which is in training's seconds: none are kept for after it."""
    asked, look = [], script.Engine.curvature
    monkeypatch.setattr(script.Engine, "curvature", lambda self, *args: asked.append(args[3]) or look(self, *args))
    env = tiny | ROUNDED | {"ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "4", "CALIB_SECONDS": "0.5"}
    late = run_in_process(script, "--run_id=a", **env | {"CALIB_SECONDS": "0.8"})
    assert_refused(
        late, "CALIB_SECONDS", "less than half of what is left of MAX_WALLCLOCK_SECONDS .* 0.8", "ROUND_FROM=0"
    )
    outcome = run_in_process(script, "--run_id=a", **env | {"CALIB_TOKENS": "1000000"})
    rounded = re.findall(r"rounded:(\d+)/17", outcome.out)
    assert outcome.code == 0 and len(rounded) > 2 and int(rounded[-1]) > 8, outcome  # it trains on to the end
    assert re.search(r"time was up after \d+ of 1000000 tokens of CALIB_TOKENS", outcome.out)
    assert asked == [0.5] and 3 < result_of(tmp_path / "logs" / "a")["train_time_ms"] / 1000 < 4.5
    assert script.seconds_to_train(script.load_config([], env, "smoke")[0]) == 4


def test_weights_that_blew_up_are_not_rounded(any_script, tiny, tmp_path, monkeypatch):
    """One line, as where a loss is no number; an infinite weight may come before one."""
    m, real = any_script, any_script.begin_rounding

    def blown_up(run):
        weights = run.engine.weights()
        weights["tok_emb.weight"][3, 5] = np.inf
        monkeypatch.setattr(run.engine, "weights", lambda: weights)
        return real(run)

    monkeypatch.setattr(m, "begin_rounding", blown_up)
    outcome = run_in_process(m, "--run_id=a", **tiny | ROUNDED)
    line = "error: tok_emb.weight: expected weights and gradients below 1e+30, found inf\n"
    assert (outcome.code, outcome.err) == (1, line)


def test_a_vector_that_grows_from_zero_is_whole(any_script, tiny, tmp_path, monkeypatch):
    """Steps settled for a gate of 0 would clip what it becomes."""
    m, real = any_script, any_script.export_rounded

    def grown(run):
        weights = run.engine.weights()
        weights["loop_gate"] = np.array([1, 0.25], np.float32)
        run.engine.set_weights(weights)
        run.rounding.tensors["rows.loop_gate"][:] = -143
        return real(run)

    monkeypatch.setattr(m, "export_rounded", grown)
    env = tiny | ROUNDED | {"LOOP_GATE": "gain", "LOOP_GATE_INIT": "0"}
    assert run_in_process(m, "--run_id=a", **env).code == 0
    gate = m.read_artifact(tmp_path / "logs" / "a" / "model.int6.rgpt").weights["loop_gate"]
    assert np.allclose(gate, [1, 0.25], rtol=1e-3)
