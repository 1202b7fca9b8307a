"""records/switch.py: what a pass that comes on does to the loss."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, clean_environment, load_script

sys.path.insert(0, str(ROOT / "records"))

import ablate  # noqa: E402
import switch  # noqa: E402

TOML = """about = "Two ways."
[budget]
tokens = 6144
[base]
{base}
[arms.hard]
loop_gate = "x0"
loop_gate_init = -2
[arms.identity]
loop_gate = "gain"
loop_gate_init = 0
"""
STEPS = 24


@pytest.fixture
def matrix(tmp_path, data, monkeypatch):
    """A matrix of two arms, 24 steps each, with the switch at the middle."""
    settings = {k.lower(): v for k, v in (TINY | data.env).items()}
    for name in ("iterations", "max_wallclock_seconds"):
        del settings[name]
    base = "\n".join(f'{name} = "{value}"' for name, value in settings.items())
    path = tmp_path / "switch.toml"
    path.write_text(TOML.format(base=base))
    monkeypatch.setattr(ablate, "ROOT", tmp_path)  # of the runs in hand
    (tmp_path / "train_gpt.py").write_text((ROOT / "train_gpt.py").read_text())
    monkeypatch.chdir(tmp_path)
    for name in load_script("train_gpt").os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["switch.py"])
    return path


def test_the_loss_around_a_switch_is_told(matrix, capsys, monkeypatch):
    """A pass that enters as the identity raises nothing at once, a hard one does; what is done is not done again."""
    assert switch.main([str(matrix)]) == 0
    found = {}
    for arm in ("hard", "identity"):
        seen = json.loads((matrix.with_suffix("") / f"{arm}_seed1337.json").read_text())
        assert seen["steps"] == STEPS and len(seen["switches"]) == 1
        (one,) = seen["switches"]
        assert one["step"] == STEPS // 2 and one["loops"] == 2 and set(one["after"]) == {"1", "10"}  # 50 is beyond
        found[arm] = one
    assert found["hard"]["before"] == found["identity"]["before"] > 1  # with one pass they are one model
    rise = {arm: one["after"]["1"] - one["before"] for arm, one in found.items()}
    assert rise["identity"] < 0.02 < rise["hard"]
    page = (matrix.with_suffix("") / "README.md").read_text()
    assert f"{rise['hard']:+.4f}" in page and "| – |" in page and (matrix.with_suffix("") / "switch.png").is_file()
    monkeypatch.setattr(switch, "train", lambda *_: pytest.fail("trained again"))
    assert switch.main([str(matrix)]) == 0
    matrix.write_text(matrix.read_text().replace("loop_gate_init = -2", "loop_gate_init = -3"))
    with pytest.raises(switch.InputError, match="hard_seed1337.json: expected loop_gate_init=-3, found -2; delete it"):
        switch.main([str(matrix)])


def test_an_arm_without_a_switch_is_refused(matrix):
    matrix.write_text(matrix.read_text().replace("0:1,0.5:2", "0:2"))
    with pytest.raises(switch.InputError, match="arm hard: expected a LOOP_SCHEDULE that switches"):
        switch.main([str(matrix)])
    assert not list(Path(matrix.with_suffix("")).glob("*.json")) and not (matrix.parent / "logs").exists()


def test_a_budget_of_seconds_is_refused(matrix):
    matrix.write_text(matrix.read_text().replace("tokens = 6144", "seconds = 60"))
    with pytest.raises(switch.InputError, match="expected flops or tokens, found seconds"):
        switch.main([str(matrix)])
