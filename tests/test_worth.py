"""records/worth.py: a law that is known is found again, and what follows from it."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))

import worth  # noqa: E402
from common import InputError  # noqa: E402

EMBEDDING = 37_000


def made_up(phis, noise=0.0):
    """Runs at four budgets by a law with these phi of one and two blocks; a block has 15,000 parameters."""
    truth, points, rng = np.array([1.2, 3.0, 0.3, 4.0, 0.35, *phis]), [], np.random.default_rng(1)
    for flops in (3e12, 6e12, 12e12, 24e12):
        for blocks, loops in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)):
            own, looped = 15e3 * blocks, loops > 1
            cost = 6 * (EMBEDDING + own * loops)
            layout, core = (f"{blocks}x{loops}", own) if looped else (str(blocks), 0.0)
            points.append(worth.Point(layout, blocks * looped, loops, own - core, core, flops / cost, flops, 0.0))
    losses = worth.law(truth, points, [1, 2]) + noise * rng.standard_normal(len(points))
    return [point._replace(bpb=loss) for point, loss in zip(points, losses)]


@pytest.mark.parametrize("phis", [(0.0, 0.5), (0.5, 0.5), (1.0, 0.0)])
def test_the_worth_of_a_pass_is_found_again(phis):
    points = made_up(phis, 0.001)
    best = worth.fit(points, np.array([point.bpb for point in points]))
    assert best[-2:] == pytest.approx(phis, abs=0.1)
    fits = worth.intervals(points, best, 30)[:, -2:]
    for phi, low, high in zip(phis, fits.min(axis=0), fits.max(axis=0)):
        assert low - 0.05 <= phi <= high + 0.05 and high - low < 0.5


def test_where_a_loop_begins_to_pay():
    points = {point.layout: point for point in made_up((0.5, 0.0))}
    truth = np.array([1.2, 3.0, 0.3, 4.0, 0.35, 0.5, 0.0])
    at = worth.crossing(truth, points["1"], points["1x2"], [1, 2])
    for factor, ahead in ((0.9, False), (1.1, True)):
        one, two = (p._replace(tokens=p.tokens / p.flops * at * factor) for p in (points["1"], points["1x2"]))
        assert (worth.law(truth, [two], [1, 2]) < worth.law(truth, [one], [1, 2]))[0] == ahead
    assert worth.crossing(truth, points["2"], points["2x2"], [1, 2]) == math.inf


def result_of(p):
    stored = EMBEDDING + p.once + p.core
    return dict(layout=p.layout, params_stored=stored, params_effective=stored + p.core * (p.loops - 1),
                tokens=p.tokens, train_flops=p.flops, val_bpb_raw=p.bpb, dataset_sha256="one")  # fmt: skip


def test_the_page(tmp_path, monkeypatch, capsys):
    """From finished runs; an arm that sets more than a layout does not count, nor one that diverged."""
    points, strange = made_up((0.5, 0.5), 0.001), {"layout": "9x9", "diverged": "at once"}
    arms = {point.layout: {"layout": point.layout} for point in points} | {"more": {"layout": "1x2", "lora_rank": "4"}}
    runs = [(SimpleNamespace(arm=p.layout, home=tmp_path), result_of(p)) for p in points]
    runs += [(SimpleNamespace(arm="more"), strange), (SimpleNamespace(arm="1"), strange)]
    log = tmp_path / "train.log"
    log.write_text('config: {"vocab_size": 1000, "model_dim": 37}\n')
    matrix = SimpleNamespace(arms=arms, finished=lambda: runs)
    monkeypatch.setattr(worth, "read_matrix", lambda path: matrix)
    monkeypatch.setattr(worth, "DRAWS", 4)
    assert worth.points_of([None]) == points
    assert worth.main(["a.toml", f"--out={tmp_path}"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert (
        f"fitted to {len(points)} runs" in page
        and "phi, 2 blocks looped" in page
        and "`1` and `1x2`" in page
        and "9x9" not in page
    )
    assert (tmp_path / "worth.png").stat().st_size > 10_000 and "written: " in capsys.readouterr().out
    runs[:] = runs[:3]
    with pytest.raises(InputError, match="runs: expected more than 5"):
        worth.points_of([None])
    for more, message in (
        ({"pass_vectors": True}, "tied and on from the first step, found pass_vectors"),
        ({}, "one text"),
    ):
        log.write_text("config: " + json.dumps({"vocab_size": 1000, "model_dim": 37} | more))
        runs[0] = runs[0][0], runs[0][1] | {"dataset_sha256": "another"}
        with pytest.raises(InputError, match=message):
            worth.points_of([None])
