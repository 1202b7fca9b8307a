"""How many passes, early exits: LOOP_SAMPLE, EXIT_WEIGHT."""

import dataclasses
import json
import math

import numpy as np
import pytest
from conftest import TINY, run_in_process
from scipy import stats
from test_parity import (
    SCRIPTS,
    Fixed,
    array,
    assert_close,
    engine_of,
    logits_of,
    numbers,
    perturbed,
    same,
    tiny,
    torch_script,
)

# ---- early exits


def distributions(logits):
    z = logits.astype(np.float64)
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_divergence_is_kullback_and_leiblers(script):
    rng = np.random.RandomState(0)
    theirs, mine = (3 * rng.standard_normal((2, 5, 7)).astype(np.float32) for _ in range(2))
    p, q = distributions(theirs), distributions(mine)
    found = numbers(SCRIPTS[script].divergence(array(script, theirs), array(script, mine)))
    assert np.allclose(found, (p * np.log(p / q)).sum(axis=-1), rtol=1e-4, atol=1e-5)


def hidden(script, engine, ids, loops, exits=None):
    if script == "torch":
        with torch_script.torch.no_grad():
            return engine.model.hidden(array(script, ids), loops, exits)
    engine.next_logits(ids[0], loops)  # puts the weights into the model
    return engine.model.hidden(array(script, ids.astype(np.int32)), loops, exits)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "layout,options",
    [
        ("2+2x3+2", dict()),
        ("3x3", dict(skips="none", loop_gate="gain", lora_rank=2)),
        ("1+3x3", dict(pass_vectors=True)),
    ],
)
def test_an_exit_is_the_model_with_fewer_passes(script, layout, options):
    c, ids = tiny(layout, **options), np.random.RandomState(3).randint(0, 48, (2, 16))
    engine, exits = engine_of(script, c, perturbed(c)), []
    last = numbers(hidden(script, engine, ids, 3, exits))
    assert np.array_equal(last, numbers(hidden(script, engine, ids, 3))) and len(exits) == 2
    for passes, found in enumerate(exits, 1):
        assert np.array_equal(numbers(found), numbers(hidden(script, engine, ids, passes)))


def test_exits_are_one_in_both_scripts():
    """The loss is what its formula says, and both scripts take the same steps from it."""
    c = tiny("1+2x3+1", exit_weight=0.1)
    weights, stream = perturbed(c), Fixed(c)
    ((ids, targets),) = stream.microbatches(0, 64, 0, 1, 64)
    plain = engine_of("torch", c, weights)
    logits = [logits_of("torch", plain, ids, loops) for loops in (1, 2, 3)]

    def kl(a, b):
        p, q = distributions(a), distributions(b)
        return (p * np.log(p / q)).sum(axis=-1).mean()

    text = -np.log(np.take_along_axis(distributions(logits[2]), targets[..., None], axis=-1)).mean()
    expected = text + 0.1 * (kl(logits[2], logits[0]) + kl(logits[2], logits[1]))
    ends = {}
    for script in SCRIPTS:
        engine = engine_of(script, c, weights)
        losses = [engine.read(engine.step(stream, 64 * step, 3, 1.0, 0.9))[0] for step in range(3)]
        assert losses[0] == pytest.approx(expected, abs=1e-4)
        ends[script] = losses, engine.weights()
        scored = engine.token_losses(ids, targets, 3)  # which is of the text alone
        assert scored.mean() == pytest.approx(plain_loss(engine, script, ids, targets), abs=1e-5)
    assert np.allclose(ends["mlx"][0], ends["torch"][0], rtol=0, atol=1e-4)
    assert_close(ends["mlx"][1], ends["torch"][1], 2e-3, base=weights)


@pytest.mark.parametrize("script", SCRIPTS)
def test_exits_of_weight_zero_change_no_bit_of_a_step(script, monkeypatch):
    """Against steps on the loss of the text alone; nor is an exit computed."""
    c = tiny("1+2x3+1")
    weights = perturbed(c)

    def steps(c, objective):
        engine, stream = engine_of(script, c, weights), Fixed(c)
        owner = engine if script == "torch" else engine.model
        owner.objective = getattr(engine.model, objective)
        losses = [engine.read(engine.step(stream, 64 * step, 3, 1.0, 0.9)) for step in range(2)]
        return {"losses": losses} | engine.weights()

    plain = steps(c, "token_losses")
    assert not same(steps(dataclasses.replace(c, exit_weight=0.1), "objective"), plain)
    monkeypatch.setattr(SCRIPTS[script], "divergence", None)
    assert same(steps(c, "objective"), plain)


def plain_loss(engine, script, ids, targets):
    logits = logits_of(script, engine, ids, 3)
    return -np.log(np.take_along_axis(distributions(logits), targets[..., None], axis=-1)).mean()


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_passes_cannot_have_is_refused(name, data, tmp_path):
    script, env = SCRIPTS[name], TINY | data.env | {"LOG_DIR": str(tmp_path)}
    for more, said in (
        (("--exit_weight=0.1", "--skips=official"), "EXIT_WEIGHT: expected 0 with SKIPS=official"),
        (("--exit_weight=0.1", "--layout=4", "--loop_schedule="), "EXIT_WEIGHT: expected 0 with one pass"),
    ):
        outcome = run_in_process(script, "--run_id=other", *more, **env)
        assert outcome.code == 1 and said in outcome.err and outcome.err.count("\n") == 1, outcome
        assert not (tmp_path / "other").exists()


# ---- how many


@pytest.mark.parametrize("mean,cap", [(2, 64), (3, 64), (4, 64), (4, 6), (8, 8)])
def test_drawn_passes_have_the_mean_that_is_scheduled(mean, cap):
    """Against the mixture of Poisson and log-normal by quadrature, before and after the cap; alike in both scripts."""
    c = tiny(f"1+2x{mean}+1", loop_sample=cap)
    draws = np.array([torch_script.draw_loops(c, mean, step) for step in range(2500)])
    assert all(SCRIPTS["mlx"].draw_loops(c, mean, step) == draws[step] for step in range(50))
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    rates = np.exp(math.log(mean - 1) - 1 / 8 + points / 2)
    chances = weights / weights.sum() @ stats.poisson.pmf(np.arange(300), rates[:, None])
    passes = np.minimum(1 + np.arange(300), cap)
    expected = chances @ passes
    assert cap < 64 or math.isclose(expected, mean, rel_tol=1e-3)
    spread = math.sqrt(chances @ np.square(passes - expected))
    assert abs(draws.mean() - expected) < 4 * spread / math.sqrt(len(draws))
    assert abs(draws.std() - spread) < 0.08 * spread and draws.min() == 1 and draws.max() <= cap
    assert torch_script.draw_loops(c, 1, 7) == 1  # before the switch there is nothing to draw
    assert {torch_script.draw_loops(dataclasses.replace(c, loop_sample=0), mean, step) for step in range(9)} == {mean}
    assert torch_script.loop_counts(c) == list(range(1, cap + 1))


def test_mlx_traces_a_step_once_for_each_number_of_passes(only_traced):
    """Compiled as on a GPU; learning rate and momentum change from step to step, and are no constants of a trace."""
    c = tiny("1+2x3+1", loop_sample=4)
    engine, stream, traced = engine_of("mlx", c, perturbed(c)), Fixed(c), []
    objective = engine.model.objective
    engine.model.objective = lambda ids, targets, loops: traced.append(loops) or objective(ids, targets, loops)
    engine.compiled = True
    for step, loops in enumerate((1, 2, 1, 3, 2, 1)):
        engine.step(stream, 64 * step, loops, 1 - step / 10, 0.9 + step / 100)
    assert traced == [1, 2, 3]


def test_flops_are_those_of_the_formula():
    """An amended formula must leave what was published as it was."""
    c = tiny("1+2x3+1", lora_rank=2)
    linears = torch_script.linear_shapes(c).values()
    matrices = sum(a * b for a, b in linears)  # LoRA is added to them once a microbatch
    forward = 2 * (8 * (matrices + 16 * 32) + 48 * 32)
    assert torch_script.flops_per_token(c, 3) == forward
    assert torch_script.train_flops_per_token(c, 3) == 3 * forward
    exits = dataclasses.replace(c, exit_weight=0.1)
    whole = torch_script.train_flops_per_token(exits, 3)
    assert whole == 3 * (forward + 2 * 2 * (matrices + 16 * 32 + 48 * 32))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_draws_its_passes_and_counts_them(name, data, tmp_path):
    """Every step has the passes that its seed and number draw, no draw is a switch, and FLOPs are added up as drawn."""
    script = SCRIPTS[name]
    flags = ("--eval_loops=2,1,4", "--loop_sample=4", "--exit_weight=0.1", "--loop_schedule=0:1,0.25:2", "--run_id=a")
    outcome = run_in_process(script, *flags, LOG_DIR=tmp_path, **TINY | data.env)
    assert outcome.code == 0, outcome
    log = (tmp_path / "a" / "train.log").read_text()
    assert log.count("loops:1->2") == 1 and "loops:2->" not in log
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train_loss" in row]
    c = script.load_config(list(flags), TINY | {key: str(value) for key, value in data.env.items()}, "")[0]
    expected = [script.draw_loops(c, 1 if step < 2 else 2, step) for step in range(8)]
    assert [row["loops"] for row in steps] == expected and len(set(expected)) > 2
    flops = np.cumsum([script.train_flops_per_token(c, n) * 256 for n in expected])
    assert np.allclose([row["flops"] for row in steps], flops, rtol=1e-12)
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    by_loops = result["val_bpb_by_loops"]
    assert list(by_loops) == ["2", "1", "4"] and by_loops["2"] == result["val_bpb"]
    assert all(f"loops:{n} val_loss:" in log and f"val_bpb:{by_loops[n]:.4f}" in log for n in "14")
    assert result["eval_loops"] == 2 and math.isclose(result["train_flops"], flops[-1])


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flags,idle", [(["--loop_gate_init=0"], True), (["--loop_gate_init=1"], False),
                                        (["--loop_gate_init=0", "--loop_schedule=0:1,0.99:2"], False)])  # fmt: skip
def test_a_pass_that_is_paid_for_and_not_used_is_said(name, flags, idle, data, tmp_path):
    env = TINY | data.env | {"LOG_DIR": str(tmp_path), "LOOP_GATE": "gain", "LOOP_GATE_LR": "0.001"}
    outcome = run_in_process(SCRIPTS[name], "--run_id=a", "--iterations=4", *flags, **env)
    assert outcome.code == 0
    assert ("notice: the passes after the first are hardly used, their gates are 0.0" in outcome.out) == idle, outcome
