"""Each failure signature provoked by a run of its own, and silence in a healthy one."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from datasets import Dataset
from tiny import CLASSES, TRAIN, VALIDATION, arguments, bert, callback, reset_run
from transformers import Trainer

from hf_reset.diagnostics import LabelMemoryCallback
from hf_reset.planner.excursions import recorded_events, with_events
from hf_reset.policy import ResetState
from hf_reset.training.advisor import ResetAdvisorCallback, _within_noise
from hf_reset.training.hooks import resets_of


def learnable(n, seed, noise=0.0):
    """The class is that of the first token's third; a share of the labels is shifted by one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 49, (n, 8), generator=generator)
    clean = (tokens[:, 0] - 1) // 16
    wrong = torch.rand(n, generator=generator) < noise
    return Dataset.from_dict(
        {
            "input_ids": tokens.tolist(),
            "attention_mask": [[1] * 8] * n,
            "labels": torch.where(wrong, (clean + 1) % CLASSES, clean).tolist(),
            "clean_label": clean.tolist(),
            "is_mislabelled": wrong.tolist(),
        }
    )


def advised(folder, reset, *, train=TRAIN, validation=VALIDATION, metrics=None, more=(), **settings):
    """The messages of a run by name, and its log history."""
    trainer = Trainer(
        bert(dropout=0.0),
        arguments(folder, lr_scheduler_type="constant", remove_unused_columns=True, **settings),
        train_dataset=train,
        eval_dataset=validation,
        callbacks=[reset, *more, ResetAdvisorCallback()],
        compute_metrics=metrics,
    )
    trainer.train()
    log = with_events(trainer.state.log_history, recorded_events(trainer.state.stateful_callbacks))
    records = [record for record in log if record.get("kind") == "advice"]
    assert len({record["name"] for record in records}) == len(records)  # once each
    return {record["name"]: record["message"] for record in records}, log


def test_resets_too_frequent(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_reset.training.advisor"):
        said, _ = advised(tmp_path, callback(probability=0.9), eval_steps=5, max_steps=120)
    assert "Resets come every 1 steps, 4 of them between two evaluations" in said["too_frequent"]
    assert caplog.text.count("too_frequent: Resets come every") == 1


def test_resets_too_rare(tmp_path):
    said, _ = advised(tmp_path, callback(probability=0.03, patience=1), eval_steps=1, max_steps=50)
    assert "Overfitting comes between resets" in said["too_rare"]
    assert "too_frequent" not in said


def test_an_anchor_near_chance(tmp_path):
    said, _ = advised(tmp_path, callback(probability=0.6), max_steps=36, learning_rate=2e-3)
    assert "hardly better than guessing" in said["near_chance"]


def test_a_late_anchor(tmp_path):
    train = learnable(48, seed=1, noise=0.5)
    always = itertools.count()
    said, _ = advised(
        tmp_path,
        callback(probability=0.01, metric="rank", greater_is_better=True, patience=0),
        train=train,
        metrics=lambda _: {"rank": next(always)},  # a metric that takes the last weights for the best
        more=[LabelMemoryCallback(train, every=10)],
        max_steps=120,
        eval_steps=10,
    )
    assert "of the wrong labels were memorised by then" in said["late_anchor"]


def test_a_scope_whose_reset_changes_nothing(tmp_path):
    said, _ = advised(
        tmp_path,
        callback(probability=0.25, scope=r"classifier\.bias", patience=1, optimizer_state="keep"),
        eval_steps=2,
        max_steps=80,
        learning_rate=2e-3,
    )
    assert r"Resets of scope 'classifier\\.bias' change nothing at validation" in said["scope_without_effect"]


def test_improvements_that_may_be_noise(tmp_path):
    counted = itertools.count(11)
    said, _ = advised(
        tmp_path,
        callback(probability=0.01, metric="accuracy", patience=0),
        metrics=lambda _: {"accuracy": next(counted) / 32},  # one row more at each evaluation
        max_steps=24,
    )
    assert "on 32 validation rows: they may be noise" in said["within_noise"]


@pytest.mark.parametrize(("margin", "is_noise"), [(-0.8, True), (-4.0, False)])
def test_improvements_of_a_loss_are_judged_by_their_rows(margin, is_noise):
    """Where evaluations leave their rows behind, the margin of an anchor move is its own standard errors."""

    class Loader:
        dataset = VALIDATION

    events = [{"kind": "anchor", "step": 10 * k, "metric": 1.0 - 0.01 * k, "margin": margin} for k in range(6)]
    said = _within_noise(events, ResetState(armed_step=5), Loader(), "eval_calibrated_loss", -1)
    assert (said is not None) == is_noise
    if is_noise:
        assert "better by 0.01 in the middle, with a paired standard error of 0.013 on 32 validation rows" in said
    bare = [{k: v for k, v in event.items() if k != "margin"} for event in events]
    assert _within_noise(bare, ResetState(armed_step=5), Loader(), "eval_loss", -1) is None  # nothing to judge by


def test_validation_that_follows_the_wrong_labels(tmp_path):
    train = learnable(48, seed=1, noise=0.5)
    said, _ = advised(
        tmp_path,
        callback(probability=0.05, patience=2),
        train=train,
        validation=train,  # wrong in the same way as what is trained on
        more=[LabelMemoryCallback(train, every=10)],
        max_steps=150,
        eval_steps=10,
        learning_rate=4e-3,
    )
    assert "The validation set follows the wrong labels: it still improves with" in said["blind_validation"]


def test_a_trusted_set_sees_what_validation_does_not(tmp_path):
    train = learnable(48, seed=1, noise=0.5)
    said, _ = advised(
        tmp_path,
        callback(probability=0.05, patience=2, metric="noisy_loss"),
        train=train,
        validation={"noisy": train, "trusted": learnable(64, seed=2)},
        max_steps=150,
        eval_steps=10,
        learning_rate=4e-3,
    )
    assert "while trusted labels lost" in said["blind_validation"]


def test_silence_on_a_healthy_run(tmp_path, caplog):
    """Labels wrong here and there, excursions of two evaluations, and something to learn."""
    train = learnable(256, seed=3, noise=0.2)
    with caplog.at_level(logging.WARNING, logger="hf_reset.training.advisor"):
        said, log = advised(
            tmp_path,
            callback(probability=0.05, patience=2),
            train=train,
            validation=learnable(200, seed=4, noise=0.2),
            more=[LabelMemoryCallback(train, every=10)],
            max_steps=200,
            eval_steps=10,
            learning_rate=2e-3,
        )
    assert said == {}
    assert not [record for record in caplog.records if record.name == "hf_reset.training.advisor"]
    assert sum(record.get("kind") == "reset" for record in log) >= 5  # resets did begin


def test_a_resumed_run_says_nothing_twice(tmp_path):
    settings = {"eval_steps": 5, "save_strategy": "steps", "save_steps": 100}
    _, log = advised(tmp_path, callback(probability=0.9), max_steps=100, **settings)
    before = [record["name"] for record in log if record.get("kind") == "advice"]
    assert "too_frequent" in before
    trainer = Trainer(
        bert(dropout=0.0),
        arguments(tmp_path, lr_scheduler_type="constant", **settings | {"max_steps": 110}),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=[callback(probability=0.9), ResetAdvisorCallback()],
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-100"))
    saved = recorded_events(trainer.state.stateful_callbacks)
    after = [record["name"] for record in saved if record["kind"] == "advice"]
    assert after.count("too_frequent") == 1


@pytest.mark.parametrize("advice", [True, False])
def test_reset_trainer_brings_it_along(tmp_path, advice):
    trainer, _ = reset_run(
        tmp_path,
        reset_probability=0.9,
        reset_patience=0,
        reset_advice=advice,
        eval_steps=5,
        max_steps=100,
        lr_scheduler_type="constant",
    )
    saved = recorded_events(trainer.state.stateful_callbacks)
    assert any(record["kind"] == "advice" for record in saved) == advice


def test_without_resets_there_is_no_advice(tmp_path):
    trainer = Trainer(
        bert(), arguments(tmp_path), train_dataset=TRAIN, eval_dataset=VALIDATION, callbacks=[ResetAdvisorCallback()]
    )
    trainer.train()
    assert not recorded_events(trainer.state.stateful_callbacks)
    assert resets_of(trainer.state) is None


def test_a_run_that_was_to_have_no_resets_is_not_told_that_they_are_too_rare(tmp_path):
    said, _ = advised(tmp_path, callback(probability=0.0, patience=1), eval_steps=1, max_steps=50)
    assert said == {}
