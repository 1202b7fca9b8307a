"""MODE=export: another artifact of weights that were trained already, in either script, of either script's file."""

import json
import math

import numpy as np
import pytest
from conftest import SCRIPTS, TINY, assert_refused, load_script, run_in_process, script_or_skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The run folder of a tiny model of each script."""
    logs = tmp_path_factory.mktemp("trained")
    for name in SCRIPTS:
        if not isinstance(module := load_script(name), str):
            assert run_in_process(module, **TINY | data.env | {"LOG_DIR": str(logs), "RUN_ID": name}).code == 0
    return logs


@pytest.mark.parametrize("maker", SCRIPTS)
def test_repeats_the_artifact_and_makes_others(script, maker, trained, data, tmp_path):
    script_or_skip(maker)
    flags = ("--mode=export", f"--checkpoint={trained / maker / 'model.safetensors'}", f"--log_dir={tmp_path}")
    env = data.env | {"DEVICE": "cpu", "DTYPE": "float32", "COMPILE": "0", "PRESET": "laptop", "VAL_MAX_TOKENS": "0"}
    assert run_in_process(script, *flags, "--run_id=same", **env).code == 0
    assert (tmp_path / "same" / "model.int6.rgpt").read_bytes() == (trained / maker / "model.int6.rgpt").read_bytes()
    was = json.loads((trained / maker / "result.json").read_text())
    now = json.loads((tmp_path / "same" / "result.json").read_text())
    for key in ("val_bpb", "val_bpb_raw"):
        assert now[key] == pytest.approx(was[key], abs=1e-3)
    assert now["steps"] == 0 and now["complete"] is True and now["calib_time_ms"] is now["config_sha256"] is None
    if maker != script.__name__:
        return
    results = {}
    for name, more in (("near", ()), ("far", ("--quant_loss=0.5",))):
        chosen = ("--quantizer=trellis", "--quant_loss=0.00001", "--calib_tokens=512", *more)
        outcome = run_in_process(script, *flags, f"--run_id={name}", *chosen, **env)
        assert outcome.code == 0 and "export:   trellis" in outcome.out, outcome
        results[name] = json.loads((tmp_path / name / "result.json").read_text())
        assert results[name]["val_bpb_raw"] == now["val_bpb_raw"] and results[name]["calib_time_ms"] > 0
    assert results["near"]["quantizer"] == results["far"]["quantizer"] == "trellis"
    assert results["near"]["val_bpb"] == pytest.approx(now["val_bpb_raw"], abs=0.02)
    far, near = (results[name]["bytes_artifact"] for name in ("far", "near"))
    assert far < 0.2 * near and near < now["bytes_artifact"]


def test_passes_that_are_not_scored_keep_their_weights(script, data, tmp_path):
    """What no token has touched counts for nothing, and would be rounded to 0."""
    flags = ("--eval_loops=1", "--run_id=a", "--quantizer=trellis", "--calib_tokens=512", "--quant_loss=0.0001")
    env = TINY | data.env | {"LOG_DIR": str(tmp_path), "PASS_VECTORS": "1"}
    assert run_in_process(script, *flags, **env).code == 0
    weights = script.load_model_file(str(tmp_path / "a" / "model.safetensors"))[0]
    found = script.read_artifact(tmp_path / "a" / "model.int6.rgpt").weights
    for name in ("loop_gate", "blocks.1.attn_scale", "blocks.2.mlp_scale"):
        assert np.abs(found[name][1]).max() > 0.5 * np.abs(weights[name][1]).max() > 0, name


@pytest.mark.parametrize("first", [math.nan, 2.0])
def test_of_a_list_of_passes_one_that_diverges_costs_itself_alone(script, trained, data, tmp_path, monkeypatch, first):
    """The passes that count, the first, must have a score; of the others those that have one are kept."""
    losses = {"2": first, "1": 3.0, "4": math.nan}
    monkeypatch.setattr(script, "evaluate", lambda c, engine, tokens, loops, stop=None: losses[str(loops)])
    path = trained / script.__name__ / "model.safetensors"
    flags = ("--mode=eval", "--eval_loops=2,1,4", "--compile=0", f"--checkpoint={path}")
    outcome = run_in_process(script, *flags, **data.env)
    if math.isnan(first):
        assert outcome.code == 1 and outcome.out == "" and "a finite loss, found nan" in outcome.err
        return
    lines = outcome.out.splitlines()
    assert outcome.code == 0 and len(lines) == 3 and "val_loss:nan" in lines[2] and "stride:32" in lines[0]
    flags = ("--run_id=a", "--eval_loops=2,1,4")
    assert run_in_process(script, *flags, **TINY | data.env | {"LOG_DIR": str(tmp_path)}).code == 0
    by_loops = json.loads((tmp_path / "a" / "result.json").read_text(), parse_constant=pytest.fail)["val_bpb_by_loops"]
    assert list(by_loops) == ["2", "1"]


def test_refuses_rounded_weights_and_a_used_name(script, trained, data, tmp_path):
    maker = script.__name__
    artifact = f"--artifact={trained / maker / 'model.int6.rgpt'}"
    outcome = run_in_process(script, "--mode=export", artifact, f"--log_dir={tmp_path}", **data.env)
    assert_refused(outcome, "MODE=export: expected CHECKPOINT=<file>", "rounded already")
    flags = ("--mode=export", f"--checkpoint={trained / maker / 'model.safetensors'}", f"--log_dir={trained}")
    flags += ("--compile=0",)  # to find out whether that works takes longer than all the rest
    assert_refused(run_in_process(script, *flags, f"--run_id={maker}", **data.env), "RUN_ID", "a new name")
