"""Several processes on this machine follow one process: the same tokens, losses and score."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment, run_in_process, script_or_skip


def rows_of(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def launch(command, env, timeout=150):
    done = subprocess.run(
        command,
        env=clean_environment(**env, OMP_NUM_THREADS=1),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )
    return done


def torchrun(processes, *flags, **env):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        str(ROOT / "train_gpt.py"),
    ]
    return launch([*command, *flags], env)


def compare(module, tiny, tmp_path, several, processes, steps, *flags):
    """`several(flags, env)` runs the processes; their losses must be those of this process, across a switch."""
    flags = (
        f"--iterations={steps}",
        f"--val_loss_every={steps // 2}",
        "--train_log_every=1",
        "--checkpoint_every=4",
        *flags,
    )
    assert run_in_process(module, "--run_id=one", *flags, **tiny).code == 0
    done = several((*flags, "--run_id=several"), tiny)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:6000]
    one, many = tmp_path / "logs" / "one", tmp_path / "logs" / "several"
    left, right = rows_of(one), rows_of(many)
    assert [(row["step"], row["loops"]) for row in left] == [(row["step"], row["loops"]) for row in right]
    assert len([row for row in left if "train_loss" in row]) == steps and {row["loops"] for row in left} == {1, 2}
    for a, b in zip(left, right):
        for key in ("train_loss", "val_loss"):
            if key in a:
                assert b[key] == pytest.approx(a[key], abs=1e-4), (key, a["step"])
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, many)]
    assert [r["world_size"] for r in results] == [1, processes]
    for key in ("steps", "tokens", "train_flops", "loops", "config_sha256", "dataset_sha256", "val_tokens", "complete"):
        assert results[0][key] == results[1][key], key
    for key in ("val_loss_raw", "val_bpb_raw"):
        assert results[1][key] == pytest.approx(results[0][key], abs=2e-4)
    assert results[1]["val_bpb"] == pytest.approx(results[0]["val_bpb"], abs=2e-3)  # a rounding may fall otherwise
    log = (many / "train.log").read_text()
    assert (
        log.count("roundtrip_exact val_loss")
        == (ROOT / f"{module.__name__}.py").read_text().count("roundtrip_exact val_loss") + 1
    )
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in many.iterdir())  # rank 0 alone writes


def test_two_torch_ranks(tiny, tmp_path):
    """20 steps across a switch, with every parameter that a number of passes may leave without a gradient."""
    module = script_or_skip("train_gpt")
    compare(
        module,
        tiny,
        tmp_path,
        lambda flags, env: torchrun(2, *flags, **env),
        2,
        20,
        "--lora_rank=2",
        "--loop_gate=gain",
        "--skips=unrolled",
        "--quantizer=fisher",
        "--quant_loss=0.00001",
        "--calib_tokens=160",
    )


def test_three_torch_ranks_with_unequal_shares(tiny, tmp_path):
    """8 sequences on 3 ranks, in microbatches of one or two."""
    module = script_or_skip("train_gpt")
    compare(
        module,
        tiny,
        tmp_path,
        lambda flags, env: torchrun(3, *flags, **env),
        3,
        6,
        "--microbatch_tokens=64",
        "--eval_stride=16",
    )


def mlx_launch(processes, *flags, **env):
    found = shutil.which(
        "mlx.launch", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if not found:
        pytest.skip("mlx.launch is not installed")
    probe = "import mlx.core as mx; mx.distributed.init(backend='ring', strict=True); "
    probe += "print(mx.distributed.all_sum(mx.array(1.0)).item())"
    try:
        trial = launch([found, "-n", "2", "--backend", "ring", "--", sys.executable, "-c", probe], env, timeout=30)
    except subprocess.TimeoutExpired:
        pytest.skip("mlx.launch does not come back on this machine")
    if trial.returncode or "2.0" not in trial.stdout:
        pytest.skip(f"mlx.launch does not work on this machine: {(trial.stderr or trial.stdout).strip()[-200:]}")
    return launch(
        [
            found,
            "-n",
            str(processes),
            "--backend",
            "ring",
            "--",
            sys.executable,
            str(ROOT / "train_gpt_mlx.py"),
            *flags,
        ],
        env,
    )


def test_two_mlx_ranks(tiny, tmp_path):
    module = script_or_skip("train_gpt_mlx")
    compare(
        module,
        tiny,
        tmp_path,
        lambda flags, env: mlx_launch(2, *flags, **env),
        2,
        20,
        "--lora_rank=2",
        "--loop_gate=gain",
        "--skips=unrolled",
        "--quantizer=fisher",
        "--quant_loss=0.00001",
        "--calib_tokens=160",
    )
