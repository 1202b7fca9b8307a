"""retrofit/exits.py: the rules on numbers made by hand, and its losses against what the scripts say."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, run_in_process

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "retrofit"))
import common
import exits


def by_hand():
    """Three passes and four tokens of two possible ones; probability of token 1 after each pass."""
    p = np.array([[0.5, 0.6, 0.4, 0.95], [0.8, 0.6, 0.6, 0.95], [0.9, 0.4, 0.6, 0.95]])
    return p, exits.look(np.log(np.stack([1 - p, p], axis=-1)) + 3, np.array([1, 0, 1, 1]))


def test_losses_and_changes_are_those_of_the_formulas():
    p, seen = by_hand()
    right = np.where(np.array([1, 0, 1, 1]), p, 1 - p)
    assert np.allclose(seen.losses, -np.log(right))
    assert np.allclose(seen.confidence, np.maximum(p, 1 - p))
    change = p[1:] * np.log(p[1:] / p[:-1]) + (1 - p[1:]) * np.log((1 - p[1:]) / (1 - p[:-1]))
    assert np.isinf(seen.change[0]).all() and np.allclose(seen.change[1:], change)


def test_who_leaves_when():
    _, seen = by_hand()
    left = dict(exits.rules(seen))
    assert left["oracle"].tolist() == [1, 2, 1, 0]  # of 1/2 the first of both is taken
    assert left["confidence 0.7"].tolist() == [1, 2, 2, 0] and left["confidence 0.9"].tolist() == [2, 2, 2, 0]
    assert left["change 0.1"].tolist() == [2, 1, 1, 1] and left["change 0.01"].tolist() == [2, 1, 2, 1]
    assert left["all after pass 2"].tolist() == [1] * 4
    rows = {row[0]: row[1:] for row in exits.table(seen, lambda loss: 2 * loss)}
    losses = -np.log([0.8, 0.6, 0.6, 0.95])
    assert rows["oracle"] == ["2.000", f"{losses.mean():.4f}", f"{2 * losses.mean():.4f}", "0.2500,0.5000,0.2500"]


@pytest.mark.parametrize("kind", ("model.safetensors", "model.int6.rgpt"))
def test_every_passes_loss_is_the_scripts(script, kind, data, tmp_path, capsys):
    env = TINY | data.env | {"LOG_DIR": str(tmp_path), "ITERATIONS": "2"}
    assert run_in_process(script, "--run_id=a", "--eval_loops=2,1", **env).code == 0
    where = [f"--{name}={data.env[name.upper()]}" for name in ("data_path", "tokenizer_path")]
    path = tmp_path / "a" / kind
    plain = ["--device=cpu", "--dtype=float32", *where]
    assert exits.main([str(path), *plain]) == 0
    rows = re.findall(r"\| all after pass (\d) \| [^|]*\| ([\d.]+) ", capsys.readouterr().out)
    outcome = run_in_process(script, "--mode=eval", "--eval_loops=1,2", f"--checkpoint={path}", "--compile=0", *plain)
    said = re.findall(r"val_loss:([\d.]+) .* loops:(\d)", outcome.out)
    assert outcome.code == 0 and [n for n, _ in rows] == [n for _, n in said] == ["1", "2"]
    assert np.allclose([float(loss) for _, loss in rows], [float(loss) for loss, _ in said], rtol=0, atol=2e-4)


def test_a_model_of_one_pass_is_refused(data, tmp_path):
    env = TINY | data.env | {"LOG_DIR": str(tmp_path), "ITERATIONS": "1", "LAYOUT": "2", "LOOP_SCHEDULE": ""}
    script = exits.load_script("train_gpt.py")
    assert run_in_process(script, "--run_id=a", **env).code == 0
    with pytest.raises(common.InputError, match="expected a model of more than one pass, found 1"):
        exits.main([str(tmp_path / "a" / "model.safetensors")])
    with pytest.raises(common.InputError, match="no file"):
        exits.main([str(tmp_path / "none")])
    with pytest.raises(common.InputError, match="--beam=2: expected a setting"):
        exits.main([str(tmp_path / "a" / "model.safetensors"), "--beam=2"])
