"""What only a CUDA device shows: a step after a switch of passes compiles nothing and waits for nothing, gradients are
added up four at a time, no kernel spills registers. Skipped where torch is no CUDA build or sees no device; a GPU's
driver and a C++ compiler are needed, and CUPTI, which comes with torch, for the names of kernels."""

import math
import re
import subprocess
from pathlib import Path

import pytest
from conftest import script_or_skip

STEPS = (1, 1, 2, 2, 1)  # passes of each
PARTS = dict(xsa=True, rotary_dims=4, norm_scale=True, mlp_slope=0.5, muon_row_norm=True, weight_decay=0.1)


@pytest.fixture
def script():
    module = script_or_skip("train_gpt")
    if module.torch.version.cuda is None:
        pytest.skip(f"needs a CUDA build of torch, found {module.torch.__version__}")
    if not module.torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return module


@pytest.fixture
def build(script, config):
    """`build(model_dim=512, ...)` is an engine with initial weights, not yet compiled, and its stream."""

    def make(**fields):
        fields = dict(device="cuda", dtype="", compile=True, loop_gate="gain", grad_clip_norm=1.0) | PARTS | fields
        engine = script.Engine(config(script, **fields))
        engine.build(script.initial_weights(engine.config))
        assert engine.compiled
        c = engine.config
        return engine, script.TokenStream(script.find_shards(c.data_path, "train", c.vocab_size), c)

    return make


@pytest.fixture
def warm(script, build):
    engine, stream = build()
    for passes in script.loop_counts(engine.config):
        engine.warm_up(stream, passes)
    return engine, stream


def test_steps_compile_nothing_and_wait_for_nothing(warm, script):
    (engine, stream), torch = warm, script.torch
    counters, batch = torch._dynamo.utils.counters, engine.config.train_batch_tokens
    assert not counters["graph_break"]
    counters.clear()
    torch.cuda.set_sync_debug_mode("error")  # whatever waits raises
    try:
        results = [engine.step(stream, i * batch, passes, 1.0, 0.9) for i, passes in enumerate(STEPS)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not counters["stats"]["unique_graphs"] and not counters["graph_break"]
    assert all(math.isfinite(number) for result in results for number in engine.read(result))


def test_gradients_are_added_up_by_vectorised_kernels(warm, script):
    """Those of parameters that do not start at 16 bytes would not be."""
    (engine, stream), torch = warm, script.torch
    ids, targets = next(stream.microbatches(0, engine.config.train_batch_tokens, 0, 1, engine.largest))
    loss = engine.objective(engine.tensor(ids), engine.tensor(targets), 2).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        loss.backward()
        engine.sync()
    names = [event.name for event in seen.events() if event.device_type.name == "CUDA"]
    if not names:
        pytest.skip("needs a profiler that sees kernels (CUPTI)")
    adds = [name for name in names if "CUDAFunctor_add" in name]
    assert len(adds) >= len([*engine.model.parameters()]) and all("vectorized" in name for name in adds), adds


def test_no_kernel_spills_registers(build, script, tmp_path, monkeypatch):
    """At the width of `record`: its reductions are what does not fit where torch joins them (`mix_order_reduction`)."""
    triton, counts = pytest.importorskip("triton"), {}
    engine, stream = build(model_dim=512, num_heads=8, num_kv_heads=4, mlp_mult=4, rotary_dims=16,
                           train_batch_tokens=65536)  # fmt: skip
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):  # after the engine has tried the compiler
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    script.torch._dynamo.reset()
    for passes in script.loop_counts(engine.config):
        engine.warm_up(stream, passes)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for cubin in tmp_path.rglob("*.cubin"):
        said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        counts[cubin.name] = sum(map(int, re.search(r"STACK:(\d+) .*LOCAL:(\d+)", said).groups()))
    assert len(counts) > 10 and not any(counts.values()), {name: n for name, n in counts.items() if n}
