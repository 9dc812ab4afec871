"""Excursions read from logs written by hand."""

from __future__ import annotations

import json

import pytest

from hf_reset.errors import DataError
from hf_reset.planner import excursions
from hf_reset.planner.excursions import Excursion, excursions_of


def evaluation(step, loss):
    return {"step": step, "eval_loss": loss, "epoch": 0.1}


def test_excursions_of_a_plain_run():
    log = [evaluation(10 * k, v) for k, v in enumerate([3.0, 2.0, 2.5, 1.5, 1.6, 1.7], start=1)]
    log.insert(2, {"step": 25, "loss": 1.0})
    assert excursions_of(log) == [
        Excursion(10, (10,), True),
        Excursion(20, (10, 20), True),
        Excursion(40, (10, 20), False),
    ]
    assert excursions.evaluation_interval(log) == 10


def test_excursions_of_a_run_with_resets():
    log = [evaluation(10, 2.0), evaluation(20, 2.5), {"kind": "reset", "step": 23}, evaluation(30, 1.9)]
    log += [{"kind": "anchor", "step": 30}, {"kind": "reset", "step": 39}, evaluation(40, 1.8), evaluation(50, 1.7)]
    assert excursions_of(log) == [
        Excursion(10, (10,), False),
        Excursion(24, (6,), True),
        Excursion(40, (10,), True),  # the reset of the last step before: that evaluation saw the anchor itself
    ]


def test_a_lost_race_is_an_evaluation_without_a_new_best():
    log = [
        evaluation(10, 2.0),
        {"step": 20, "eval_race_lost": 1},
        {"step": 30, "eval_race_lost": 1},
        evaluation(50, 1.9),
    ]
    assert excursions_of(log) == [Excursion(10, (10, 20, 40), True)]
    assert excursions.evaluation_interval(log) == 10


def test_direction_and_margin():
    log = [{"step": 10 * k, "eval_f1": v} for k, v in enumerate([0.1, 0.2, 0.25, 0.4], start=1)]
    found = excursions_of(log, metric="eval_f1", greater_is_better=True, min_delta=0.07)
    assert found == [Excursion(10, (10,), True), Excursion(20, (10, 20), True)]


def test_the_metric_is_the_one_whose_values_the_anchors_have():
    log = [{"step": step, "eval_loss": 1.0 / step, "eval_f1": 0.5, "eval_runtime": 0.1} for step in (10, 20)]
    assert excursions.metric_of(log) == "eval_loss"
    by_loss = [*log, *({"kind": "anchor", "step": step, "metric": 1.0 / step} for step in (10, 20))]
    assert excursions.metric_of(by_loss) == "eval_loss"
    by_f1 = [*log, {"kind": "anchor", "step": 10, "metric": 0.5}]
    assert excursions.metric_of(by_f1) == "eval_f1"


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ([{"step": 1, "loss": 1.0}], "no evaluation with 'eval_loss'.*Train with `eval_strategy` set"),
        ([{"step": 1, "eval_f1": 1.0}], "It has eval_f1: name one as `metric`"),
        ([], "no evaluation"),
    ],
)
def test_logs_without_evaluations(log, message):
    with pytest.raises(DataError, match=message):
        excursions_of(log)


def test_read_log(tmp_path):
    with pytest.raises(DataError, match=r"has no trainer_state\.json"):
        excursions.read_log(tmp_path)
    for step in (5, 15):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step}]}))
    assert excursions.read_log(tmp_path) == [{"step": 15}]
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps({"epochs": 3}))
    with pytest.raises(DataError, match="no `log_history`: another program than Trainer wrote it"):
        excursions.read_log(tmp_path)
    file.write_text('{"log_history": [')
    with pytest.raises(DataError, match="cannot be read as JSON"):
        excursions.read_log(tmp_path)
