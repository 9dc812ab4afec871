"""Small models with wrong labels, passages beside their theory, and the study of the paper's experiments."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import load_script
from torch.nn import functional as F

from hf_reset.anchor.store import AnchorStore
from hf_reset.config import ResetConfig
from hf_reset.errors import ConfigError, DataError
from hf_reset.report import paper as report
from hf_reset.study.cells import complete
from hf_reset.study.passages import LinearWalk, linear_record, passage_record
from hf_reset.study.small import (
    SmallNet,
    SmallTransformer,
    Training,
    at_arming,
    bags,
    batches,
    clusters,
    parts_of_risk,
    row_gradients,
    run,
    take_step,
)

ROOT = Path(__file__).parents[1]
SHORT = Training(steps=40, every=5)


script = load_script("studies/paper.py")


@pytest.fixture
def splits():
    return clusters(0, noise=0.4, train=120, validation=60, test=80)


def fresh(norm="layer"):
    torch.manual_seed(0)
    return SmallNet(norm, width=16, depth=2)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def test_rows_have_the_noise_asked_for():
    found = clusters(3, noise=0.4, train=4000)
    assert float(found.train.is_wrong.float().mean()) == pytest.approx(0.4, abs=0.03)
    assert not found.test.is_wrong.any()
    assert torch.equal(found.train.features, clusters(3, noise=0.4, train=4000).train.features)
    with pytest.raises(ConfigError, match=r"`noise` must be in \[0, 1\), got 1\.5"):
        bags(0, noise=1.5)


def test_without_resets_it_is_a_plain_loop(splits):
    model, plain = fresh(), fresh()
    record = run(model, splits, SHORT, ResetConfig(probability=0.0, patience=0), seed=5)
    optimizer, draw = torch.optim.SGD(plain.parameters(), lr=SHORT.rate), batches(120, SHORT.batch, 5)
    for _ in range(SHORT.steps):
        take_step(plain, optimizer, splits.train, draw())
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(plain), strict=True))
    assert record["resets"] == 0
    assert [step for step, _ in record["history"]["validation_loss"]] == list(range(0, 41, 5))


def test_probability_one_holds_the_run_at_its_anchor(splits):
    model = fresh()
    record = run(model, splits, replace(SHORT, observe_from=20), ResetConfig(probability=1.0, patience=0), seed=5)
    stopped = fresh()
    run(stopped, splits, replace(SHORT, steps=20), ResetConfig(probability=0.0), seed=5)
    assert record["reset_steps"] == list(range(20, 40))
    assert (record["best_step"], record["best"]) == (20, record["last"])
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(stopped), strict=True))


def test_scopes_of_the_small_net_leave_the_rest_alone(splits):
    model = fresh()
    config = ResetConfig(probability=1.0, patience=0, scope="last:1")
    run(model, splits, replace(SHORT, observe_from=20), config, seed=5)
    stopped = fresh()
    run(stopped, splits, replace(SHORT, steps=20), ResetConfig(probability=0.0), seed=5)
    same = {name: torch.equal(p, q) for (name, p), q in zip(model.named_parameters(), weights(stopped), strict=True)}
    assert all(is_same == ("blocks.0" not in name) for name, is_same in same.items())


def test_peclet_number_at_arming_follows_the_optimizer(splits):
    model = fresh()
    anchor = AnchorStore(model)
    anchor.snapshot()
    found = {
        name: at_arming(model, anchor, splits.train, training, [0.5])["peclet_at_arming"]
        for name, training in {
            "sgd": Training(rate=0.1),
            "twice": Training(rate=0.2),
            "large": Training(rate=0.1, batch=64),
            "momentum": Training(optimizer="momentum", rate=0.01),
        }.items()
    }
    assert found["twice"] == pytest.approx(found["sgd"] / 2, rel=1e-6)
    assert found["large"] == pytest.approx(found["sgd"] * 4, rel=1e-6)
    assert found["momentum"] == pytest.approx(found["sgd"], rel=1e-6)
    # By hand: Pe = L |v| / (2 D), the steps' spread along û taken from the rows themselves.
    each, correct = row_gradients(model, splits.train)
    unit = -each[correct].mean(axis=0) / np.linalg.norm(each[correct].mean(axis=0))
    drift, diffusion = -0.1 * each.mean(axis=0) @ unit, 0.01 * (each @ unit).var() / 32
    assert found["sgd"] == pytest.approx(0.5 * drift / (2 * diffusion), rel=1e-4)
    assert at_arming(model, anchor, splits.train, Training(), []) == {"peclet_at_arming": None}


def test_gradients_of_rows_sum_to_the_risk_and_its_parts(splits):
    model = fresh()
    each, correct = row_gradients(model, splits.train)
    F.cross_entropy(model(splits.train.features)["logits"], splits.train.given).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()
    assert each.mean(axis=0) == pytest.approx(whole, abs=1e-5)
    parts = parts_of_risk(model, splits.train, {name: torch.zeros_like(p) for name, p in model.named_parameters()})
    assert parts.correct_norm == pytest.approx(np.linalg.norm(each[correct].sum(axis=0)) / 120, rel=1e-3)
    assert parts.wrong_norm == pytest.approx(np.linalg.norm(each[~correct].sum(axis=0)) / 120, rel=1e-3)


def test_linear_walk_has_the_drift_and_diffusion_it_says():
    walk = LinearWalk(0.4)
    drift, diffusion = walk.drift_and_diffusion
    moves = np.diff(walk.positions(excursions=100, steps=200, seed=0), axis=1)
    error = moves.std() / np.sqrt(moves.size)
    assert abs(moves.mean() - drift) < 3 * error
    assert moves.var() / 2 == pytest.approx(diffusion, rel=3 * np.sqrt(2 / moves.size))


def test_linear_times_agree_with_theory():
    found = linear_record(LinearWalk(0.45), [0.0, 0.005, 0.02], walkers=400, seed=1)
    for point in found["points"]:
        assert abs(point["observed"] - point["predicted"]) < 3 * point["error"]
        assert point["censored"] == 0
    assert found["peclet"] == pytest.approx(0.78, abs=0.01)


def test_passages_from_an_anchor_are_counted_and_censored():
    torch.manual_seed(0)
    model, splits = SmallTransformer(width=16), bags(0, noise=0.4, train=80, validation=40, test=10)
    training = Training(optimizer="adamw", rate=0.003, every=5)
    optimizer = training.of(model)
    anchor = AnchorStore(model, optimizer)
    anchor.snapshot()
    found = passage_record(model, splits, training, anchor, optimizer, [0.05], free=4, repeats=3, horizon=20, seed=0)
    assert [point["count"] for point in found["points"]] == [4, 3]
    assert all(time % 5 == 0 or late for time, late in zip(found["free_times"], found["free_censored"], strict=True))
    assert 1 / 32 <= 5 * found["planned"] <= 1


def test_what_the_results_file_has_is_skipped(tmp_path):
    cell = {"arm": "x", "linear": {"noise": 0.4, "distance": 1.0}, "seed": 0}
    complete(tmp_path / "f.json", [cell], script.carry_out)
    written = (tmp_path / "f.json").read_text()
    complete(tmp_path / "f.json", [cell], script.carry_out)
    assert (tmp_path / "f.json").read_text() == written
    complete(tmp_path / "f.json", [cell, {**cell, "seed": 1}], script.carry_out)
    assert [record["seed"] for record in json.loads((tmp_path / "f.json").read_text())["records"]] == [0, 1]


@pytest.mark.parametrize("study", sorted(script.STUDIES))
def test_cells_differ_and_their_settings_exist(study):
    cells = list(script.STUDIES[study]())
    assert len({json.dumps(cell) for cell in cells}) == len(cells)
    for cell in cells:
        Training(**cell.get("training", {}))
        ResetConfig(**cell.get("config", {}))


@pytest.mark.parametrize("study", "ag")
def test_committed_results_draw(study, tmp_path):
    records = json.loads((ROOT / script.RESULTS / f"{study}.json").read_text())["records"]
    assert report.draw(study, records, tmp_path / "x.png").stat().st_size > 10_000
    assert report.table(study, records).count("\n") >= 5


def test_gains_are_paired_by_group_and_seed():
    records = [
        {"group": "a", "arm": "plain", "seed": 0, "best": 0.5},
        {"group": "a", "arm": "reset", "seed": 0, "best": 0.75},
        {"group": "b", "arm": "reset", "seed": 0, "best": 0.9},
    ]
    assert [gain for _, gain in report.gains(records)] == [0.25]
    assert report.rank_correlation([1, 2, 3, 9], [2, 4, 8, 16]) == pytest.approx(1)
    assert report.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert report.rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(0.75**0.5)  # mean ranks 1.5, 1.5, 3
    assert math.isnan(report.rank_correlation([1, 1], [1, 2]))
    with pytest.raises(DataError, match="the study 'a' has no record"):
        report.draw("a", [], "x.png")
