"""`make mac` off a Mac: it says what it needs, its checks pass on a CPU, and a check that fails ends in exit code 1."""

import mac
import numpy as np
import pytest
from conftest import script_or_skip


@pytest.fixture
def quick(monkeypatch):
    """Float32 alone, which a CPU without a fast library does in a second."""
    for name in ("GOLDEN_TOLERANCE", "COMPILED_TOLERANCE"):
        monkeypatch.setattr(mac, name, {"float32": getattr(mac, name)["float32"]})
    return script_or_skip("train_gpt_mlx")


def test_elsewhere_one_line_says_that_it_needs_a_mac(monkeypatch, capsys):
    monkeypatch.setattr(mac.platform, "machine", lambda: "riscv64")
    assert mac.run_tool(mac.main, []) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: make mac: expected a Mac with Apple silicon, found ")
    assert err.count("\n") == 1 and "--device=cpu" in err


def arguments(*flags):
    parser = mac.Parser("")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(list(flags))


def test_checks_pass_on_a_cpu_and_see_a_wrong_model(quick, monkeypatch):
    lines = mac.goldens(arguments()) + mac.compiled(arguments())
    assert len(lines) == 2 + 3 and all(line.startswith("pass") for line in lines), lines
    real = quick.rotate
    monkeypatch.setattr(quick, "rotate", lambda x, cos, sin: real(x, cos, -sin))
    found = mac.goldens(arguments())
    assert all(line.startswith("FAIL") and "(at most 0.001)" in line for line in found), found


def test_a_compiled_step_that_differs_is_seen(quick, monkeypatch):
    """As if what mx.compile made forgot the learning rate; on a CPU nothing else tells the two engines apart."""
    real = quick.Engine.step
    monkeypatch.setattr(quick.Engine, "step", lambda self, a, b, loops, lr, *rest: real(
        self, a, b, loops, lr * (1.5 if self.runs_ahead else 1), *rest))  # fmt: skip
    assert all(line.startswith("FAIL") for line in mac.compiled(arguments()))


@pytest.mark.parametrize("fault", (None, "raises", "fails"))
def test_the_exit_code_says_whether_all_passed_and_the_others_run_nevertheless(fault, quick, monkeypatch, capsys):
    def broken(args):
        if fault == "raises":
            raise ValueError("not\nhere")
        return ["FAIL  x"] if fault else ["pass  x"]

    broken.__name__ = "goldens"
    monkeypatch.setattr(mac, "goldens", broken)
    for name in ("compiled", "speed", "resume"):
        monkeypatch.setattr(mac, name, type(name, (), {"__name__": name, "__call__": lambda self, args: ["pass  y"]})())
    assert mac.run_tool(mac.main, ["--device=cpu"]) == bool(fault)
    out = capsys.readouterr().out
    assert out.count("pass  y") == 3 and out.endswith("--- 1 FAILED\n" if fault else "--- all checks passed\n")
    assert ("FAIL  ValueError: not here" in out) == (fault == "raises")


def test_numbers_that_are_none_do_not_pass():
    assert mac.verdict("x", {"losses": (np.nan, 1.0)}).startswith("FAIL")
    assert mac.verdict("x", {"losses": (1.0, 1.0)}) == "pass  x: losses 1 (at most 1)"
