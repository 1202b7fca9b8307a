"""What only a CUDA device shows: a step after a switch of passes compiles nothing and waits for nothing. Skipped where
there is none."""

import math

import pytest
from conftest import script_or_skip

STEPS = (1, 1, 2, 2, 1)  # passes of each


@pytest.fixture
def engine(config):
    script = script_or_skip("train_gpt")
    if not script.torch.cuda.is_available():
        pytest.skip("no CUDA device")
    parts = dict(xsa=True, rotary_dims=4, norm_scale=True, mlp_slope=0.5, muon_row_norm=True, weight_decay=0.1)
    c = config(script, device="cuda", dtype="", compile=True, loop_gate="gain", grad_clip_norm=1.0, **parts)
    engine = script.Engine(c)
    engine.build(script.initial_weights(c))
    stream = script.TokenStream(script.find_shards(c.data_path, "train", c.vocab_size), c)
    for passes in script.loop_counts(c):
        engine.warm_up(stream, passes)
    return engine, stream


def test_steps_compile_nothing_and_wait_for_nothing(engine):
    (engine, stream), torch = engine, script_or_skip("train_gpt").torch
    counters, batch = torch._dynamo.utils.counters, engine.config.train_batch_tokens
    assert engine.compiled and not counters["graph_break"]
    counters.clear()
    torch.cuda.set_sync_debug_mode("error")  # whatever waits raises
    try:
        results = [engine.step(stream, i * batch, passes, 1.0, 0.9) for i, passes in enumerate(STEPS)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not counters["stats"]["unique_graphs"] and not counters["graph_break"]
    assert all(math.isfinite(number) for result in results for number in engine.read(result))
