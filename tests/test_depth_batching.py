"""retrofit/depth_batching.py: closed forms of every kind of batching, the paper's figures, the command line."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "retrofit"))
import common
import depth_batching as batching

FULL, HALF = 20.937, 10.819  # milliseconds of the paper's Gemma, whole and one of two passes


def machine(slots=32, passes=2, block_ms=HALF, once_ms=0.0):
    return batching.Machine(slots, passes, block_ms, once_ms)


def equal(sequences=640, length=64):
    return np.full(sequences, length)


def test_the_papers_times_give_the_papers_rates():
    """1528 tokens per second for sequence-wise batching; 1479 depth-wise if nobody leaves."""
    lengths = equal()
    assert round(batching.sequence_rate(machine(passes=1, block_ms=FULL), lengths)) == 1528
    assert round(batching.depth_rate(machine(), lengths, np.full(lengths.sum(), 2))) == 1479


@pytest.mark.parametrize("slots,passes,once_ms", [(32, 2, 0.0), (8, 3, 1.5), (1, 4, 0.25)])
def test_equal_lengths_have_closed_forms(slots, passes, once_ms):
    m, lengths = machine(slots, passes, 2.0, once_ms), equal(10 * slots, 17)
    whole = 1000 * slots / (passes * 2.0 + once_ms)
    assert batching.static_rate(m, lengths) == pytest.approx(whole)
    assert batching.sequence_rate(m, lengths) == pytest.approx(whole)
    everything = np.full(lengths.sum(), passes)
    assert batching.depth_rate(m, lengths, everything) == pytest.approx(whole)
    first = 1000 * slots / (2.0 + once_ms)
    assert batching.depth_rate(m, lengths, np.ones_like(everything)) == pytest.approx(first)


def step_by_step(m, lengths, exits):
    """Depth-wise batching as one would tell it, a pass at a time; to compare with."""
    queue, exits, time, slots = list(lengths), list(exits), 0.0, []
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    waiting = [exits[a:b] for a, b in zip(bounds, bounds[1:])]
    assert len(waiting) == len(queue)
    while waiting or slots:
        while waiting and len(slots) < m.slots:
            slots.append(list(waiting.pop(0)))
        time += m.block_ms
        ended = False
        for slot in slots:
            slot[0] -= 1
            if slot[0] == 0:
                slot.pop(0)
                ended = True
        time += m.once_ms * ended
        slots = [slot for slot in slots if slot]
    return 1000 * sum(lengths) / time


@pytest.mark.parametrize("once_ms", [0.0, 0.7])
def test_unequal_lengths_and_exits_are_as_told_step_by_step(once_ms):
    rng = np.random.default_rng(3)
    m, lengths = machine(5, 3, 1.3, once_ms), rng.integers(1, 30, 60)
    exits = rng.integers(1, 4, lengths.sum())
    assert batching.depth_rate(m, lengths, exits) == pytest.approx(step_by_step(m, lengths, exits))
    longest = [lengths[i : i + 5].max() for i in range(0, 60, 5)]
    assert batching.static_rate(m, lengths) == pytest.approx(1000 * lengths.sum() / sum(longest) / (3.9 + once_ms))
    slower = step_by_step(m._replace(block_ms=3.9 + once_ms, once_ms=0.0), lengths, np.ones(lengths.sum(), int))
    assert batching.sequence_rate(m, lengths) == pytest.approx(slower)


def test_rates_are_ordered_as_what_they_may_do():
    rng = np.random.default_rng(0)
    m, lengths = machine(), rng.integers(1, 128, 1000)
    exits = batching.draw_exits(np.array([0.5, 0.5]), lengths.sum(), rng)
    static, sequence = batching.static_rate(m, lengths), batching.sequence_rate(m, lengths)
    assert static < sequence < batching.depth_rate(m, lengths, exits)


def test_exits_are_drawn_with_their_shares():
    shares, rng = np.array([0.2, 0.0, 0.5, 0.3]), np.random.default_rng(0)
    counts = np.bincount(batching.draw_exits(shares, 100_000, rng), minlength=5)
    assert counts[0] == 0 and counts[1:] / 100_000 == pytest.approx(shares, abs=0.01)
    assert (batching.draw_exits(np.array([1.0]), 10, rng) == 1).all()
    for part, expected in ((0, [1, 0, 0, 0]), (0.5, shares), (1, [0, 0, 0, 1])):
        assert batching.between(shares, part) == pytest.approx(expected)


def test_fewer_sequences_than_slots():
    m = machine(slots=32)
    assert batching.sequence_rate(m, np.array([4, 2])) == pytest.approx(6000 / (4 * 2 * HALF))
    assert batching.depth_rate(m, np.array([4, 2]), np.full(6, 1)) == pytest.approx(6000 / (4 * HALF))


def test_the_default_is_the_papers_case(tmp_path, capsys):
    """2877 tokens per second, 1.88 times sequence-wise batching; here with an end of the queue at which slots idle."""
    out = tmp_path / "picture.png"
    assert common.run_tool(batching.main, ["--sequences=400", f"--out={out}"]) == 0
    text = capsys.readouterr().out
    rates = {name: float(rate) for name, rate in re.findall(r"\| (\w[^|]*\w) \| [\d.]+ \| (\d+) \|", text)}
    assert rates["looped, depth-wise, with exits"] / rates["full model, sequence-wise"] == pytest.approx(1.88, abs=0.04)
    assert rates["looped, depth-wise, nobody leaves"] == rates["looped, sequence-wise"]
    even = float(re.search(r"even with the best sequence-wise: ([\d.]+) mean passes", text)[1])
    assert even == pytest.approx(FULL / HALF, abs=0.02)
    assert out.read_bytes().startswith(b"\x89PNG")


REFUSED = {
    "shares": (["--exits=0.5,0.6"], "--exits: expected shares"),
    "no shares": (["--exits=half"], '--exits: expected shares .*found "half"'),
    "negative share": (["--exits=1.5,-0.5"], "--exits: expected shares"),
    "time": (["--block-ms=0"], "--block-ms: expected a number above 0"),
    "not a number": (["--once-ms=nan"], "--once-ms: expected 0 or more"),
    "slots": (["--slots=0"], "--slots: expected 1 or more"),
    "too many": (["--sequences=100000000"], "--sequences: expected at most"),
    "picture": (["--out=a.svg"], "--out: expected a file NAME.png"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_line(case, capsys):
    flags, message = REFUSED[case]
    assert common.run_tool(batching.main, flags) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(message, err), err
