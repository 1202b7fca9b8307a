"""A run that is killed, stopped, resumed, started from other weights, or goes wrong; and what runs leave behind."""

import dataclasses
import json
import os
import random
import re
import signal
import time

import numpy as np
import pytest
from conftest import assert_refused, random_weights, run_in_process, start_process, tree

RUN = {
    "ITERATIONS": "60",
    "CHECKPOINT_EVERY": "1",
    "VAL_LOSS_EVERY": "8",
    "LOOP_SCHEDULE": "0:1,0.4:2",
    "GRAD_CLIP_NORM": "1",
}
TIMES = {
    "run_id",
    "commit",
    "train_time_ms",
    "eval_time_ms",
    "tok_s",
    "peak_mem_bytes",
    "calib_time_ms",
}  # differ between equal runs


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def rows_of(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(module, a, b):
    """Weights, optimizer, artifact, result and every logged loss are equal bit for bit; only clocks differ."""
    for name in ("model.safetensors", "model.int6.rgpt"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    (left, about_a), (right, about_b) = (module.load_tensors(f / "checkpoint.safetensors") for f in (a, b))
    assert left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)
    for about in (about_a, about_b):
        for key in ("seconds", "eval_seconds"):
            about["state"].pop(key, None)
    assert about_a == about_b
    first, second = result_of(a), result_of(b)
    assert {k: v for k, v in first.items() if k not in TIMES} == {k: v for k, v in second.items() if k not in TIMES}
    kept = ("step", "train_loss", "val_loss", "val_bpb", "grad_norm", "loops", "lr_mul", "tokens", "flops")
    logs = [[{k: row[k] for k in kept if k in row} for row in rows_of(folder)] for folder in (a, b)]
    assert logs[0] == logs[1]


def wait_for(condition, process, seconds=60, pause=0.0):
    """Polls until `condition()`; fails if the process ends first."""
    until = time.time() + seconds
    while not condition():
        time.sleep(pause)
        assert process.poll() is None, process.communicate()
        assert time.time() < until, "nothing happened"


def steps_logged(folder):
    """The number of the last step that metrics.jsonl has."""
    try:
        return max([row["step"] for row in rows_of(folder)], default=0)
    except (OSError, ValueError, KeyError):
        return 0


def kill_while_a_checkpoint_is_written(process, folder):
    """Stops the process whenever a temporary file is seen, and kills it if the file is still there."""

    def caught():
        if not any(name.endswith(".tmp") and "checkpoint" in name for name in os.listdir(folder)):
            return False
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.01)
        if any(name.endswith(".tmp") and "checkpoint" in name for name in os.listdir(folder)):
            process.kill()
            return True
        process.send_signal(signal.SIGCONT)
        return False

    wait_for(caught, process)
    process.communicate()


def test_killed_and_stopped_runs_end_like_one_left_alone(script, tiny, tmp_path):
    """One run killed twice, the first time while it writes a checkpoint, then stopped by SIGTERM, against the same run
    left alone. All in processes of their own, forked from one: in this one, the two frameworks may have another matrix
    library."""
    env = tiny | RUN
    alone, killed = tmp_path / "logs" / "alone", tmp_path / "logs" / "killed"
    there = killed / "checkpoint.safetensors"  # a first step is logged before it is saved
    other = start_process(script, "--run_id=alone", "--checkpoint_every=0", **env)
    rng = random.Random(os.getpid())
    points = [rng.randint(2, 14), rng.randint(22, 30), rng.randint(34, 44)]
    try:
        for number, point in enumerate(points):
            process = start_process(script, "--run_id=killed", *["--resume"] * (number > 0), **env)
            try:
                wait_for(lambda point=point: there.exists() and steps_logged(killed) >= point, process, pause=0.005)
                if number == 0:
                    kill_while_a_checkpoint_is_written(process, killed)
                    assert list(killed.glob("*.tmp")), "killed after the checkpoint was whole"
                else:
                    process.send_signal(signal.SIGKILL if number == 1 else signal.SIGTERM)
                    out, err = process.communicate(timeout=60)
            finally:
                process.kill()
            assert process.returncode == (-signal.SIGKILL if number < 2 else 143), f"stopped too late: {points}"
            assert there.exists(), points
            assert (killed / "result.json").exists() == (number == 2)
        assert err == "" and "RESUME=1" in out.splitlines()[-1] and "RUN_ID=killed" in out.splitlines()[-1]
        result = result_of(killed)
        assert set(script.SCORES) < result.keys() and result["complete"] is False and result["val_bpb"] is None
        state = script.load_tensors(killed / "checkpoint.safetensors")[1]["state"]
        assert points[2] <= result["steps"] == state["step"] < 60
        last = start_process(script, "--run_id=killed", "--resume", **env)
        assert last.wait(timeout=60) == 0 and other.wait(timeout=60) == 0, last.communicate()
    finally:
        other.kill()
    assert_same_run(script, alone, killed)
    assert result_of(killed).keys() == result.keys()
    assert not list(killed.glob("*.tmp")), "a half-written file stays behind"


def stopping(module, monkeypatch, step):
    """Makes the run stop as if SIGTERM came after this step."""
    real = module.Engine.step
    count = {"steps": 0}

    def counted(self, *args, **kwargs):
        done = real(self, *args, **kwargs)
        count["steps"] += 1
        if count["steps"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(module.Engine, "step", counted)


def test_resume_needs_the_same_settings(any_script, tiny, tmp_path, monkeypatch):
    env, folder = tiny | {"RUN_ID": "a", "ITERATIONS": "12"}, tmp_path / "logs" / "a"
    with monkeypatch.context() as patch:
        stopping(any_script, patch, 6)  # two of them warm up
        assert run_in_process(any_script, **env).code == 143
    content = (folder / "checkpoint.safetensors").read_bytes()
    for flag, name in (
        ("--layout=1+2x3+1 --loop_schedule=", "LAYOUT"),
        ("--model_dim=64", "MODEL_DIM"),
        ("--matrix_lr=0.1", "settings"),
        ("--iterations=20", "settings"),
        ("--train_batch_tokens=512", "settings"),
        ("--skips=none", "SKIPS"),
        ("--seed=7", "SEED|settings"),
    ):
        outcome = run_in_process(any_script, *flag.split(), "--resume", **env)
        assert_refused(outcome, re.escape(str(folder)), name, "expected", "found", "INIT_FROM|own settings")
    assert_refused(run_in_process(any_script, **env), "RUN_ID", "another", "RESUME=1")  # a name in use
    good = folder / "checkpoint.safetensors"
    for damaged in (b"", content[: len(content) // 2], b"PK\x03\x04" * 99):
        good.write_bytes(damaged)
        assert_refused(run_in_process(any_script, "--resume", **env), re.escape(str(good)), "expected", "found")
    tensors, about = any_script.parse_tensors(content), None
    good.write_bytes(content)
    about = any_script.load_tensors(good)[1]
    weights = {k: v for k, v in tensors.items() if k.startswith("weights.")}
    for changed, note in (
        (weights, {k: v for k, v in about.items() if k != "state"}),  # a model.safetensors
        (weights, about),
        ({k: v for k, v in tensors.items() if "exp_avg_sq" not in k}, about),
        ({k: v[:1] if k.startswith("momentum") else v for k, v in tensors.items()}, about),
        (tensors, about | {"state": {}}),
        (tensors, about | {"state": None}),
        (tensors, about | {"state": {k: v for k, v in about["state"].items() if k != "config_sha256"}}),
    ):
        any_script.save_tensors(good, changed, note)
        assert_refused(run_in_process(any_script, "--resume", **env), re.escape(str(good)), "expected", "found")
    good.write_bytes(content)
    # How a run is logged, scored and exported decides nothing of what it learns: these may change on the way.
    other = """checkpoint_every=5 train_log_every=3 val_loss_every=4 eval_stride=16 val_max_tokens=640
        count_code=0 target_bytes=40000 quantizer=trellis calib_tokens=512 bytes_cap=400000"""
    outcome = run_in_process(any_script, "--resume", *(f"--{setting}" for setting in other.split()), **env)
    assert outcome.code == 0, outcome
    assert result_of(folder)["quantizer"].startswith("trellis") and result_of(folder)["eval_stride"] == 16
    assert run_in_process(any_script, **env | {"RUN_ID": "b"}).code == 0
    learnt = [(tmp_path / "logs" / name / "model.safetensors").read_bytes() for name in "ab"]
    assert learnt[0] == learnt[1]
    outcome = run_in_process(any_script, "--resume", **env)  # a finished run is finished
    assert outcome.code == 0 and result_of(folder)["steps"] == 12
    assert result_of(folder)["val_loss"] == result_of(tmp_path / "logs" / "b")["val_loss"]


def test_resume_with_other_data_is_refused(any_script, tiny, data, tmp_path, monkeypatch):
    from conftest import write_dataset

    env, folder = tiny | {"RUN_ID": "a", "ITERATIONS": "12"}, tmp_path / "logs" / "a"
    with monkeypatch.context() as patch:
        stopping(any_script, patch, 6)
        assert run_in_process(any_script, **env).code == 143
    other = write_dataset(tmp_path / "other", [data.train[::-1]], [data.val])
    outcome = run_in_process(any_script, "--resume", **env | {"DATA_PATH": other})
    assert_refused(outcome, re.escape(str(folder)) + "|" + re.escape(str(other)), "expected", "found")


# ---------------------------------------------------------------------------------------------------------------------
# INIT_FROM
# ---------------------------------------------------------------------------------------------------------------------


def parent(module, c, path, loops=1):
    """A file of random weights; returns them."""
    weights = random_weights(module, c, seed=5)
    module.save_tensors(path, {f"weights.{k}": v for k, v in weights.items()}, module.about(c, loops))
    return weights


def logits(module, c, weights, loops):
    engine = module.Engine(c)
    engine.build(weights, training=False)
    return engine.next_logits(np.arange(20) * 7 % 300, loops)


@pytest.mark.parametrize(
    ("theirs", "mine", "skips"),
    [
        ("4", "1+2x2+1", "none"),
        ("4", "1+2x2+1", "per_loop"),
        ("4", "4x3", "none"),
        ("4", "4x2", "per_loop"),
        ("3", "3x3", "per_loop"),
        ("5", "1+3x3+1", "per_loop"),
        ("1+2x2+1", "1+2x3+1", "per_loop"),
    ],
)
@pytest.mark.parametrize("gate", ["x0", "gain"])
def test_init_from_another_layout_is_the_parent(script, config, tmp_path, theirs, mine, skips, gate):
    """New per-pass parameters are the identity: with the parent's number of passes the child is the parent."""
    common = dict(skips=skips, loop_gate=gate, loop_schedule="", seed=9)
    a, b = config(script, layout=theirs, **common), config(script, layout=mine, **common, lora_rank=2)
    passes = script.parse_layout(theirs).loops
    weights = parent(script, a, tmp_path / "parent.safetensors", passes)
    (tmp_path / "parent.rgpt").write_bytes(script.export_model(a, weights, passes).data)
    child = script.transfer_weights(b, *script.load_model_file(str(tmp_path / "parent.safetensors"))[:2])
    assert {k: v.shape for k, v in child.items()} == script.param_shapes(b)
    assert np.array_equal(logits(script, a, weights, passes), logits(script, b, child, passes))
    for name, value in weights.items():
        if name.startswith("blocks.") or name == "tok_emb.weight":
            assert np.array_equal(child[name], value), name
    # A row of skip_weights goes to the shortcut between the same blocks, wherever it lies in the table.
    for key, row in script.skip_rows(script.parse_layout(theirs), skips).items():
        assert np.array_equal(
            child["skip_weights"][script.skip_rows(script.parse_layout(mine), skips)[key]], weights["skip_weights"][row]
        )
    from_artifact = script.transfer_weights(b, *script.load_model_file(str(tmp_path / "parent.rgpt"))[:2])
    assert {k: v.shape for k, v in from_artifact.items()} == script.param_shapes(b)


def test_lora_is_not_left_behind(any_script, config):
    """Where there are passes to use it, a child has the LoRA of its parent."""
    a = config(any_script, lora_rank=2)
    theirs = any_script.initial_weights(a)
    for rank in (0, 4):
        c = dataclasses.replace(a, lora_rank=rank)
        with pytest.raises(any_script.InputError, match=f"LORA_RANK: expected the file's 2, found {rank}"):
            any_script.transfer_weights(c, theirs, dataclasses.asdict(a))
    flat = config(any_script, layout="4", loop_schedule="")
    with pytest.raises(any_script.InputError, match="retrofit/convert.py"):
        any_script.transfer_weights(flat, theirs, dataclasses.asdict(a))


def test_gates_of_one_kind_do_not_start_those_of_the_other(any_script, config):
    """A gate of 0.3 toward x0 is nothing that a gain should begin with."""
    a, b = (config(any_script, loop_gate=kind, loop_gate_init=1.0) for kind in ("x0", "gain"))
    theirs = any_script.initial_weights(a) | {"loop_gate": np.float32([0.3, 0.3])}
    for c, gates in ((a, [0.3, 0.3]), (b, [1, 1])):
        assert (
            any_script.transfer_weights(c, theirs, dataclasses.asdict(a))["loop_gate"].tolist()
            == np.float32(gates).tolist()
        )


def test_init_from_starts_a_run_at_the_parents_loss(script, config, tiny, data, tmp_path):
    """Through the command line: validation before anything is learnt gives the parent's score."""
    c = config(script, layout="4", loop_schedule="")
    path = tmp_path / "parent.safetensors"
    parent(script, c, path)
    score = run_in_process(
        script, "--mode=eval", f"--checkpoint={path}", "--device=cpu", "--dtype=float32", "--compile=0", **data.env
    )
    frozen = ("--matrix_lr=0", "--scalar_lr=0", "--tied_embed_lr=0", "--iterations=2", "--loop_schedule=0:1,0.99:2")
    outcome = run_in_process(script, f"--init_from={path}", "--run_id=a", *frozen, **tiny)
    assert outcome.code == 0, outcome
    expected = float(re.search(r"val_loss:([\d.]+)", score.out).group(1))
    assert result_of(tmp_path / "logs" / "a")["val_loss_raw"] == pytest.approx(expected, abs=1e-5)
    kept, about = script.load_tensors(tmp_path / "logs" / "a" / "model.safetensors")
    assert np.array_equal(kept["weights.tok_emb.weight"], script.load_tensors(path)[0]["weights.tok_emb.weight"])


def test_a_run_with_a_parent_is_resumed(script, config, tiny, tmp_path, monkeypatch):
    """With its own settings, INIT_FROM among them, though its parent is gone."""
    path = tmp_path / "parent.safetensors"
    parent(script, config(script, layout="4", loop_schedule=""), path)
    flags = [f"--init_from={path}", "--iterations=6"]
    assert run_in_process(script, *flags, "--run_id=whole", **tiny).code == 0
    with monkeypatch.context() as patch:
        stopping(script, patch, 5)  # two of them warm up
        assert run_in_process(script, *flags, "--run_id=stopped", **tiny).code == 143
    path.unlink()
    outcome = run_in_process(script, *flags, "--run_id=stopped", "--resume", **tiny)
    assert outcome.code == 0, outcome
    whole, stopped = (result_of(tmp_path / "logs" / name) for name in ("whole", "stopped"))
    assert whole["steps"] == stopped["steps"] == 6 and whole["val_loss"] == stopped["val_loss"]


def test_files_of_other_versions_are_read_or_refused_by_name(script, config, tmp_path):
    c = config(script, layout="4", loop_schedule="")
    weights = {f"weights.{name}": value for name, value in script.initial_weights(c).items()}
    for inject, known in (("none", True), ("add", False)):
        about = script.about(c, 1)
        about["model"] = {name: value for name, value in about["model"].items() if name != "pass_vectors"}
        about["model"]["inject"] = inject
        script.save_tensors(tmp_path / "a.safetensors", weights, about)
        if known:
            assert script.load_model_file(str(tmp_path / "a.safetensors"))[1] == script.about(c, 1)["model"]
            continue
        with pytest.raises(script.InputError, match="model settings: expected .* found inject; .* another version"):
            script.load_model_file(str(tmp_path / "a.safetensors"))


def test_init_from_what_cannot_serve(script, config, tiny, tmp_path):
    path = tmp_path / "parent.safetensors"
    for fields, patterns in (
        (dict(layout="5", loop_schedule=""), ("LAYOUT", "4 blocks", "found 5")),
        (dict(model_dim=64), ("MODEL_DIM", "expected", "found")),
        (dict(mlp_mult=3), ("MLP_MULT", "expected", "found")),
        (dict(vocab_size=300), ("VOCAB_SIZE", "expected", "found")),
        (dict(num_heads=4, num_kv_heads=2), ("NUM_HEADS", "expected")),
        (dict(num_kv_heads=2), ("NUM_KV_HEADS", "expected", "found")),
    ):
        parent(script, config(script, **fields), path)
        before = tree(tmp_path)
        outcome = run_in_process(script, f"--init_from={path}", **tiny)
        assert_refused(outcome, "INIT_FROM", *patterns)
        assert tree(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# The switch
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skips", ["per_loop", "official", "none"])
@pytest.mark.parametrize("layout", ["2x3", "3x3", "1+2x3+1", "1+3x3+2", "4x3", "2+1x3+2"])
def test_switch_keeps_every_shortcut_between_its_blocks(script, layout, skips):
    """1 to 2 to 3 passes, odd and even cores: a trained row of skip_weights goes on connecting the same blocks."""
    shape, links = script.parse_layout(layout), []
    for loops in (1, 2, 3):
        plan = script.visits(shape, skips, loops)
        assert [v.block for v in plan] == [block for block, _ in script.block_order(shape, loops)]
        pairs = {}
        for visit in plan:
            if visit.skip_from >= 0:
                assert plan[visit.skip_from].saves
                pairs.setdefault(visit.skip_row, set()).add((plan[visit.skip_from].block, visit.block))
        links.append(pairs)
    moved = [row for a, b in zip(links, links[1:]) for row in a if row in b and a[row] != b[row]]
    lost = [row for a, b in zip(links, links[1:]) for row in a if row not in b]
    if skips == "official":
        assert moved, "the published rule scrambles its skips; if it does not, this test sees nothing"
    else:
        assert not moved and not lost


@pytest.mark.parametrize("layout", ["1+2x3+1", "3x3"])
def test_switch_moves_no_weight_and_no_state(script, tiny, monkeypatch, layout):
    """Between two steps nothing changes: not at a switch, not by validation, not by a checkpoint; and warming up for
    every number of passes leaves the start as it was."""
    after, before = [], []
    real_step, real_warm_up = script.Engine.step, script.Engine.warm_up
    warming = []

    def everything(engine):
        found = {f"weights.{k}": np.array(v) for k, v in engine.weights().items()}
        return found | {k: np.array(v) for k, v in engine.optimizer.state().items()}

    def step(self, stream, start, loops, *rest):
        if not warming:
            before.append((loops, everything(self)))
        done = real_step(self, stream, start, loops, *rest)
        if not warming:
            after.append((loops, everything(self)))
        return done

    def warm_up(self, *args):
        warming.append(1)
        kept, steps = everything(self), self.optimizer.steps
        real_warm_up(self, *args)
        warming.pop()
        now = everything(self)
        assert self.optimizer.steps == steps
        assert all(np.array_equal(kept[k], now[k]) for k in kept)
        if not after:
            after.append((0, now))

    monkeypatch.setattr(script.Engine, "step", step)
    monkeypatch.setattr(script.Engine, "warm_up", warm_up)
    flags = (f"--layout={layout}", "--loop_schedule=0:1,0.34:2,0.67:3", "--iterations=9", "--lora_rank=2", "--run_id=a")
    outcome = run_in_process(script, *flags, "--checkpoint_every=2", "--val_loss_every=3", **tiny)
    assert outcome.code == 0, outcome
    assert [loops for loops, _ in before] == [1, 1, 1, 1, 2, 2, 2, 3, 3]
    for (_, a), (loops, b) in zip(after, before):
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a), f"before a step with {loops} passes"
    moved = [sum(not np.array_equal(b[k], a[k]) for k in a) for (_, b), (_, a) in zip(before, after[1:])]
    assert min(moved) > 20  # the test sees weights move where they should
    assert outcome.out.count("loops:1->2") == outcome.out.count("loops:2->3") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Going wrong, budgets, logs
# ---------------------------------------------------------------------------------------------------------------------


def test_loss_that_is_not_finite(script, tiny, tmp_path):
    outcome = run_in_process(script, "--matrix_lr=1e38", "--checkpoint_every=1", "--run_id=a", **tiny)
    folder = tmp_path / "logs" / "a"
    text = outcome.out + outcome.err
    assert outcome.code == 1 and "expected a finite" in text and outcome.err.count("\n") <= 1, outcome
    line = next(line for line in text.splitlines() if "expected a finite" in line)
    bad = int(re.search(r"\bstep (\d+)\b", line).group(1))
    assert re.search("found loss.*(nan|inf)", line) and "lower" in line and bad >= 2
    assert "expected a finite" in (folder / "train.log").read_text()
    tensors, about = script.load_tensors(folder / "checkpoint.safetensors")
    assert about["state"]["step"] == bad - 1  # from before
    assert not list(folder.glob("*.tmp")) and not (folder / "model.int6.rgpt").exists()
    if (folder / "result.json").exists():
        assert result_of(folder)["complete"] is False
    assert all(np.isfinite(row["train_loss"]) for row in rows_of(folder) if "train_loss" in row)


def test_loss_that_is_not_finite_at_a_given_step(script, tiny, tmp_path, monkeypatch):
    """The step named is the first whose loss is nan, wherever it lies: in the middle, before a switch, at the end."""
    for bad in (3, 4, 5, 8):
        with monkeypatch.context() as patch:
            real, count = script.Engine.step, {"steps": -2}  # two steps warm up

            def step(self, *args, real=real, count=count, bad=bad):
                count["steps"] += 1
                if count["steps"] == bad:
                    weights = self.weights()
                    weights["tok_emb.weight"] = weights["tok_emb.weight"] * np.float32("nan")
                    self.set_weights(weights)
                return real(self, *args)

            patch.setattr(script.Engine, "step", step)
            outcome = run_in_process(script, "--checkpoint_every=1", f"--run_id=a{bad}", **tiny)
        assert outcome.code == 1 and f"step {bad}:" in outcome.out + outcome.err, (bad, outcome)
        state = script.load_tensors(tmp_path / "logs" / f"a{bad}" / "checkpoint.safetensors")[1]["state"]
        assert state["step"] == bad - 1
        assert not (tmp_path / "logs" / f"a{bad}" / "model.int6.rgpt").exists()


def test_budgets(any_script, config, tiny, tmp_path):
    def run(name, *flags):
        outcome = run_in_process(any_script, f"--run_id={name}", *flags, **tiny)
        assert outcome.code == 0, outcome
        return result_of(tmp_path / "logs" / name)

    for steps in (1, 7):
        result = run(f"steps{steps}", f"--iterations={steps}")
        assert result["steps"] == steps and result["tokens"] == 256 * steps
    c = config(any_script)
    one, two = (3 * any_script.flops_per_token(c, loops) * 256 for loops in (1, 2))
    for number, budget in enumerate((1.5 * one, 4 * one + 4 * two, 20 * one)):
        result = run(f"flops{number}", "--iterations=0", f"--max_train_flops={budget!r}")
        spent = result["train_flops"]
        assert 0 < spent <= budget < spent + two, (spent, budget)
        ones = sum(row["loops"] == 1 for row in rows_of(tmp_path / "logs" / f"flops{number}") if "train_loss" in row)
        assert spent == pytest.approx(ones * one + (result["steps"] - ones) * two)
    result = run("time", "--iterations=0", "--max_wallclock_seconds=2.0", "--lr_warmup_steps=0")
    assert 1000 < result["train_time_ms"] <= 2100 and result["steps"] > 3
    rows = [row for row in rows_of(tmp_path / "logs" / "time") if "lr_mul" in row]
    assert rows[0]["lr_mul"] == 1 and rows[-1]["lr_mul"] < 0.7  # the rate falls with the clock
    result = run("first", "--iterations=5", "--max_wallclock_seconds=100", f"--max_train_flops={100 * one}")
    assert result["steps"] == 5  # the first budget that is used up
    assert len({row["lr_mul"] for row in rows_of(tmp_path / "logs" / "steps7") if "lr_mul" in row}) > 1


# The patterns with which the challenge's tools read a log.
TRAIN_LINE = re.compile(r"^step:(\d+)/(\d+) train_loss:([\d.]+) .*train_time:(\d+)ms step_avg:([\d.]+)ms")
VAL_LINE = re.compile(r"^step:(\d+)/(\d+) val_loss:([\d.]+) val_bpb:([\d.]+) .*train_time:(\d+)ms step_avg:([\d.]+)ms")
FINAL_LINE = re.compile(r"^final_int6_roundtrip_exact val_loss:(\d+\.\d{8}) val_bpb:(\d+\.\d{8})$")


def test_what_a_run_leaves_behind(script, config, tiny, tmp_path):
    flags = ("--run_id=a", "--iterations=30", "--val_loss_every=10", "--checkpoint_every=7", "--train_log_every=4")
    outcome = run_in_process(script, *flags, **tiny)
    folder = tmp_path / "logs" / "a"
    assert outcome.code == 0 and outcome.err == "", outcome  # no progress bar: not a terminal
    files = [
        "checkpoint.safetensors",
        "metrics.jsonl",
        "model.int6.rgpt",
        "model.safetensors",
        "result.json",
        "train.log",
    ]
    assert sorted(p.name for p in folder.iterdir()) == files
    for name in ("train.log", "metrics.jsonl", "result.json"):
        content = (folder / name).read_bytes()
        assert b"\r" not in content and b"\x1b" not in content and content.endswith(b"\n"), name
    assert "\r" not in outcome.out

    log = (folder / "train.log").read_text()
    source = (script.Path(script.__file__)).read_text()
    assert source in log  # the code that ran
    lines = log[log.index(source) + len(source) :].splitlines()
    assert any(line.startswith("config: ") and json.loads(line[8:])["model_dim"] == 32 for line in lines)
    assert any(line.startswith("versions: ") and json.loads(line[10:])["numpy"] == np.__version__ for line in lines)
    trained = [TRAIN_LINE.match(line) for line in lines if "train_loss:" in line]
    scored = [VAL_LINE.match(line) for line in lines if line.startswith("step:") and "val_loss:" in line]
    final = [FINAL_LINE.match(line) for line in lines if "roundtrip_exact" in line]
    assert None not in [*trained, *scored, *final] and len(final) == 1
    assert [int(m[1]) for m in trained] == [*range(1, 11), 12, 16, 20, 24, 28] and {m[2] for m in trained} == {"30"}
    assert [int(m[1]) for m in scored] == [10, 20, 30]
    switch = [line for line in lines if re.match(r"step:15/30 loops:1->2 ", line)]
    assert len(switch) == 1

    times = [int(m) for line in lines if line.startswith("step:") for m in re.findall(r" train_time:(\d+)ms", line)]
    assert times == sorted(times) and len(times) >= len(trained) + len(scored), "train_time runs backwards"

    rows = rows_of(folder)
    assert [row["step"] for row in rows if "train_loss" in row] == [int(m[1]) for m in trained]
    for row, m in zip([row for row in rows if "train_loss" in row], trained):
        assert f"{row['train_loss']:.4f}" == m[3] and row["loops"] == (1 if row["step"] <= 15 else 2)
        assert row["tokens"] == 256 * row["step"]
    assert [row["train_time_ms"] for row in rows] == sorted(row["train_time_ms"] for row in rows)
    flops = [row["flops"] for row in rows if "train_loss" in row]
    one, two = (3 * script.flops_per_token(config(script), loops) * 256 for loops in (1, 2))
    assert flops == pytest.approx([min(s, 15) * one + max(s - 15, 0) * two for s in (int(m[1]) for m in trained)])

    result = result_of(folder)
    keys = """
        run_id framework layout loops eval_loops eval_stride params_stored params_effective seed steps tokens
        train_flops train_time_ms eval_time_ms calib_time_ms tok_s peak_mem_bytes val_tokens val_loss_raw
        val_bpb_raw val_loss val_bpb val_bpb_by_loops bytes_code bytes_artifact bytes_total bytes_cap fits
        bits_per_weight
        quantizer count_code device world_size versions commit script_sha256 config_sha256
        dataset dataset_sha256 complete
    """.split()
    assert result.keys() == set(keys)
    assert (result["val_loss"], result["val_bpb"]) == pytest.approx((float(final[0][1]), float(final[0][2])), abs=1e-8)
    assert result["run_id"] == "a" and result["loops"] == 2 and result["steps"] == 30 and result["complete"] is True
    assert result["framework"] == script.FRAMEWORK and result["tokens"] == 30 * 256 and result["world_size"] == 1
    assert result["train_flops"] == pytest.approx(15 * one + 15 * two) and result["calib_time_ms"] is None
    assert result["val_tokens"] == 1499 // 32 * 32 and result["dataset"] == "tiny"
    weights = script.load_tensors(folder / "model.safetensors")[0]
    assert result["params_stored"] == sum(v.size for v in weights.values())
    core = sum(
        v.size
        for k, v in weights.items()
        if k.split(".")[2:3] and k.split(".")[2] in "12" and k.startswith("weights.blocks")
    )
    assert result["params_effective"] == result["params_stored"] + core
    assert result["val_loss_raw"] < np.log(320) - 0.3  # it has learnt something


def test_run_ids_are_made_and_never_reused(script, tiny, tmp_path):
    flags = ("--iterations=1", "--log_dir=" + str(tmp_path / "logs"))
    first = run_in_process(script, *flags, **tiny)
    second = run_in_process(script, *flags, "--seed=2", **tiny)
    assert first.code == second.code == 0
    assert len(list((tmp_path / "logs").iterdir())) == 2
