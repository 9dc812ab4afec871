"""Validation rows in a Trainer: where they come from, that resets begin on them, and that a resume has them."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import Recorder, arguments, bert, equal, plain_run, reset_run, steps_of
from transformers import Trainer

from hf_reset import ResetTrainer, ResetTrainingArguments, StochasticResetCallback
from hf_reset.errors import MetricError
from hf_reset.metrics import with_calibrated_loss
from hf_reset.metrics.evaluation import CalibratedMetrics

pytestmark = pytest.mark.filterwarnings("ignore::hf_reset.errors.WeakEvidenceWarning")


def noisy_rows(n, seed):
    """The first token says the class, the others are noise; two labels in five are wrong."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 3, n)
    label = np.where(rng.random(n) < 0.4, (true + rng.integers(1, 3, n)) % 3, true)
    ids = rng.integers(4, 50, (n, 8))
    ids[:, 0] = true + 1
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * 8] * n, "labels": label.tolist()})


TRAIN, VALIDATION = noisy_rows(96, 1), noisy_rows(200, 2)
LONG = {"max_steps": 160, "eval_steps": 8, "logging_steps": 40, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
ON_EVIDENCE = {"reset_probability": 0.2, "reset_metric": "eval_calibrated_loss", "reset_finish": "last"}


def run(folder, resume=None, **more):
    recorder = Recorder()
    trainer = ResetTrainer(
        bert(dropout=0.1),
        arguments(folder, ResetTrainingArguments, **{**LONG, **ON_EVIDENCE, **more}),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=[recorder],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), save_strategy="steps", save_steps=8)


def test_resets_begin_when_validation_has_turned(whole):
    trainer, _ = whole
    state, resets = trainer.reset_callback.reset_state, steps_of(trainer.reset_callback.events, "reset")
    assert state.armed_step is not None
    assert resets
    assert min(resets) >= state.armed_step
    logged = [record["eval_calibrated_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    best = int(np.argmin(logged[: state.armed_step // 8]))
    assert state.armed_step >= 8 * (best + 1) + 16  # two evaluations after the best at least


def test_a_resume_has_the_rows_and_goes_on_bit_for_bit(whole):
    trainer, recorder = whole
    armed = trainer.reset_callback.reset_state.armed_step
    for step in (armed - 8, armed + 8):  # between the turn and its proof, and on an excursion
        resumed, again = run(trainer.args.output_dir, resume=f"{trainer.args.output_dir}/checkpoint-{step}")
        assert resumed.reset_callback.reset_state == trainer.reset_callback.reset_state
        assert equal(again.after_step[160], recorder.after_step[160])
        np.testing.assert_array_equal(
            resumed.reset_callback.run.evidence.anchor, trainer.reset_callback.run.evidence.anchor
        )


def test_the_plain_callback_takes_the_rows_of_the_metric(tmp_path):
    """Equal to ResetTrainer, whose rows come by themselves, as long as no step is skipped."""
    metric = with_calibrated_loss()
    fields = {"probability": 0.2, "metric": "eval_calibrated_loss", "finish": "last"}
    by_hand = StochasticResetCallback(rows=metric, **fields)
    trainer = Trainer(
        bert(dropout=0.0),
        arguments(tmp_path / "plain", **LONG),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        compute_metrics=metric,
        callbacks=[by_hand],
    )
    trainer.train()
    own = ResetTrainer(
        bert(dropout=0.0),
        arguments(tmp_path / "own", ResetTrainingArguments, **LONG, **ON_EVIDENCE),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
    )
    own.train()
    assert by_hand.reset_state == own.reset_callback.reset_state
    assert by_hand.reset_state.resets > 0


def test_other_metrics_get_the_evidence_without_a_word_in_the_logs(tmp_path):
    trainer, _ = run(tmp_path, reset_metric=None, max_steps=16)
    assert isinstance(trainer.compute_metrics, CalibratedMetrics)
    assert trainer.reset_callback.run.evidence.anchor.shape == (200,)
    assert not any("eval_calibrated_loss" in record for record in trainer.state.log_history)


@pytest.mark.parametrize(
    "settings",
    [
        {"reset_patience": 2},
        {"reset_probability": 0.0},
        {"prediction_loss_only": True},
    ],
)
def test_nothing_is_wrapped_where_nobody_asks(tmp_path, settings):
    trainer, _ = run(tmp_path, **{"reset_metric": None, "max_steps": 8, **settings})
    assert trainer.compute_metrics is None


@pytest.mark.parametrize("model", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_what_is_no_single_label_classifier_has_no_rows(tmp_path, model):
    width = model.get("num_labels", 3)
    labels = torch.zeros(32, width).squeeze(-1).tolist()
    rows = TRAIN.select(range(32)).remove_columns("labels").add_column("labels", labels)
    trainer = ResetTrainer(
        bert(**model),
        arguments(tmp_path, ResetTrainingArguments, max_steps=3, reset_probability=0.5),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    assert trainer.compute_metrics is None


def test_the_calibrated_loss_without_logits_is_refused(tmp_path):
    with pytest.raises(MetricError, match="`prediction_loss_only` is True"):
        run(tmp_path, prediction_loss_only=True)


def test_a_user_s_own_metrics_stay(tmp_path):
    recorder = Recorder()
    trainer = ResetTrainer(
        bert(),
        arguments(tmp_path, ResetTrainingArguments, max_steps=3, reset_metric="calibrated_loss"),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        compute_metrics=lambda prediction: {"mine": 1.0},
        callbacks=[recorder],
    )
    trainer.train()
    evaluation = next(record for record in trainer.state.log_history if "eval_loss" in record)
    assert {"eval_mine", "eval_calibrated_loss", "eval_label_noise"} <= evaluation.keys()


def test_with_nothing_to_reset_it_is_the_plain_trainer(tmp_path):
    _, one = plain_run(tmp_path / "plain")
    idle, two = reset_run(tmp_path / "idle", reset_probability=0.0, reset_finish="last")
    assert idle.compute_metrics is None
    assert equal(one.after_step[15], two.after_step[15])


def test_a_short_run_ends_with_its_last_weights_and_says_so(tmp_path, caplog):
    """Two evaluations, neither far from chance: nothing says that the better one is better."""
    with caplog.at_level("INFO", "hf_reset.training.callback"):
        trainer, recorder = run(tmp_path, max_steps=4, eval_steps=2, learning_rate=1e-4, reset_finish="anchor")
    assert trainer.reset_callback.reset_state.learned < 2
    assert equal(dict(recorder.after_step[4]), {n: p.detach() for n, p in trainer.model.named_parameters()})
    assert "cannot tell the anchor" in caplog.text


def test_auto_knows_the_calibrated_loss_at_the_anchor(tmp_path):
    """By which it takes labels for clean."""
    trainer, _ = run(tmp_path, reset_probability="auto", max_steps=48)
    state = trainer.reset_callback.reset_state
    assert state.plan.loss == state.anchor_metric
