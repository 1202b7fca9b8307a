"""records/exports.py: many exports of trained models, a line each, resumed where they stopped, and a report."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
import exports
from conftest import TINY, run_in_process

PLAN = """
about = "Tiny models."
models = "tiny"
runs = ["loop"]
seeds = [1, 2]
[base]
calib_tokens = 512
[exports.sigma]
quantizer = "sigma"
quant_sigma = [12.85, 40.0]
[exports.fisher]
quantizer = "fisher"
quant_loss = 0.01
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A plan in a folder of its own, with the logs that it looks for beside it."""
    monkeypatch.setattr(exports, "LOGS", tmp_path / "logs")
    path = tmp_path / "plans" / "few.toml"
    path.parent.mkdir()
    path.write_text(PLAN)
    return path


def models(data, plan):
    for seed in (1, 2):
        env = TINY | data.env | {"LOG_DIR": str(exports.LOGS / "tiny"), "RUN_ID": f"loop_seed{seed}", "SEED": str(seed)}
        assert run_in_process(exports.load_script("train_gpt.py"), **env).code == 0


def test_exports_resume_and_report(data, plan, capsys, monkeypatch):
    models(data, plan)
    whole, stop = exports.Model.export, iter(range(9))

    def interrupted(*args):
        if next(stop) == 4:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(exports.Model, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exports.main([str(plan)])
    lines = plan.with_suffix("") / "exports.jsonl"
    assert len(lines.read_text().splitlines()) == 4 and not list(lines.parent.glob("*.tmp"))
    with open(lines, "a") as file:
        file.write('{"run": "loop", "seed"')  # a line that was cut off
    with open(lines, "a") as file:
        file.write("\n")
    monkeypatch.setattr(exports.Model, "export", whole)
    capsys.readouterr()
    assert exports.main([str(plan)]) == 0
    assert "6 exports, 2 to do" in capsys.readouterr().out
    found = exports.read_lines(exports.read_plan(plan))
    assert len(found) == 6
    for line in found:
        result = json.loads((exports.LOGS / f"tiny/loop_seed{line['seed']}/result.json").read_text())
        assert line["val_bpb_raw"] == pytest.approx(result["val_bpb_raw"], abs=1e-4) and not line["partial"]
        assert line["gap"] == line["val_bpb"] - line["val_bpb_raw"] and 0.3 < line["bits_per_weight"] < 9
    by = {(line["kind"], line["settings"].get("quant_sigma"), line["seed"]): line for line in found}
    assert by["sigma", 40.0, 1]["bits_per_weight"] < by["sigma", 12.85, 1]["bits_per_weight"] - 1
    assert by["fisher", None, 2]["loss"] == pytest.approx(0.01) and by["fisher", None, 2]["calib_seconds"] > 0
    table = (plan.with_suffix("") / "README.md").read_text()
    mean = sum(by["fisher", None, seed]["gap"] for seed in (1, 2)) / 2
    row = next(line for line in table.splitlines() if "| fisher |" in line)
    assert f"| {mean:.4f} |" in row and "| loss=0.01 | 2 |" in row
    assert (plan.with_suffix("") / "exports.png").stat().st_size > 5000
    assert "still to be done" not in table


def test_other_script_and_missing_weights(data, plan):
    with pytest.raises(exports.InputError, match=r"model\.safetensors: expected the weights of finished.*/tiny.toml$"):
        exports.main([str(plan)])
    plan.write_text(PLAN.replace('["loop"]', '["loop", "other/wide"]'))
    with pytest.raises(exports.InputError, match=r"other/wide_seed2/model\..*/tiny.toml and python .*/other.toml$"):
        exports.main([str(plan)])
    plan.write_text(PLAN)
    lines = plan.with_suffix("") / "exports.jsonl"
    old = dict(run="loop", seed=1, kind="sigma", settings={"quantizer": "sigma"}, script_sha256="0")
    lines.write_text(json.dumps(old) + "\n")
    with pytest.raises(exports.InputError, match="expected exports of this train_gpt.py, found some of another"):
        exports.main([str(plan)])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("quant_sigma = [12.85, 40.0]", "matrix_lr = 1", r"\[exports.sigma\] matrix_lr: expected one of quantizer"),
        ("calib_tokens = 512", "seed = 1", r"\[base\] seed: expected one of"),
        ('models = "tiny"', "", "models: expected a value, found none"),
        ("seeds = [1, 2]", "seeds = []", "seeds: expected whole numbers"),
        ("about", "abuot", "abuot: expected one of about"),
        ("[base]", "[base", "expected TOML, found an error"),
    ],
)
def test_refusals(plan, old, new, expected):
    plan.write_text(PLAN.replace(old, new))
    with pytest.raises(exports.InputError, match=expected):
        exports.main([str(plan)])
