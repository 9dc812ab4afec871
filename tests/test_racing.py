"""Paired racing: what is decided is what full evaluations decide, fewer rows are met, and nothing partial gets out."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from test_validation_rows import noisy_rows
from tiny import Recorder, arguments, bert, equal, steps_of
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_reset import ResetTrainer, ResetTrainingArguments
from hf_reset.errors import ConfigError, ResetError, UnsupportedError
from hf_reset.metrics.calibrated import calibrated_loss
from hf_reset.training.evidence import Reference, paired_margin
from hf_reset.training.racing import CLEAR, LEVEL, ROWS, Race

pytestmark = pytest.mark.filterwarnings("ignore::hf_reset.errors.WeakEvidenceWarning")

FIT = calibrated_loss(np.eye(3), np.arange(3))
TRAIN, VALIDATION = noisy_rows(96, 1), noisy_rows(200, 2)
SETTINGS = {
    "max_steps": 64,
    "eval_steps": 4,
    "logging_strategy": "no",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "save_steps": 8,
    "per_device_eval_batch_size": 10,
    "reset_probability": 0.1,
    "reset_patience": 2,
    "reset_metric": "eval_calibrated_loss",
    "reset_evaluation": "paired",
}


def trainer_of(folder, *, model=None, callbacks=(), validation=VALIDATION, dropout=0.0, **more):
    return ResetTrainer(
        bert(dropout=dropout) if model is None else model,
        arguments(folder, ResetTrainingArguments, **{**SETTINGS, **more}),
        train_dataset=TRAIN,
        eval_dataset=validation,
        callbacks=list(callbacks),
    )


def run(folder, resume=None, callbacks=(), **more):
    recorder = Recorder()
    trainer = trainer_of(folder, callbacks=[recorder, *callbacks], **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def evaluations(trainer):
    return [record for record in trainer.state.log_history if "eval_runtime" in record or ROWS in record]


def lost(trainer):
    return [record for record in evaluations(trainer) if record.get("eval_race_lost")]


class Shadow(TrainerCallback):
    """The logits of all rows at each evaluation by the schedule, in the data set's order."""

    def __init__(self):
        self.logits = {}

    @torch.no_grad()
    def on_evaluate(self, args, state, control, model, **kwargs):
        model.eval()
        batch = {name: torch.tensor(VALIDATION[name]) for name in ("input_ids", "attention_mask")}
        self.logits[state.global_step] = model(**batch).logits.numpy()


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    shadow = Shadow()
    trainer, recorder = run(tmp_path_factory.mktemp("raced"), save_strategy="steps", callbacks=[shadow])
    return trainer, recorder, shadow


def test_races_decide_as_full_evaluations_would(raced):
    """Wherever the paired difference is over two standard errors; and with fewer rows where races are lost."""
    trainer, _, shadow = raced
    anchors = steps_of(trainer.reset_callback.events, "anchor")
    labels, compared = np.array(VALIDATION["labels"]), 0
    for record in evaluations(trainer):
        before = [step for step in anchors if step < record["step"]]
        if not before or record.get(ROWS) == 0:
            continue
        ours, theirs = (calibrated_loss(shadow.logits[s], labels).rows for s in (record["step"], before[-1]))
        margin = paired_margin(ours, theirs)
        if margin is not None and abs(margin) > CLEAR:
            compared += 1
            assert (record["step"] in anchors) == (margin < 0), record
        if not record.get("eval_race_lost"):  # the full figure is that of all rows, met in whatever order
            assert record["eval_calibrated_loss"] == pytest.approx(ours.mean(), rel=1e-5)
    assert compared >= 2
    rows = [record[ROWS] for record in lost(trainer)]
    assert len(rows) >= 6
    assert np.mean(rows) < 0.7 * len(labels)
    assert all(n % 10 == 0 and n < len(labels) for n in rows)


def test_a_lost_race_logs_what_it_measured_and_no_more(raced):
    trainer, *_ = raced
    for record in lost(trainer):
        names = {name for name in record if not name.endswith(("_runtime", "_per_second", "_preparation_time"))}
        assert names == {"epoch", "step", ROWS, "eval_race_difference", "eval_race_bound", "eval_race_lost"}
        assert record["eval_race_bound"] <= record["eval_race_difference"]
    steps = {record["step"] for record in lost(trainer)}
    assert steps
    assert not steps & set(steps_of(trainer.reset_callback.events, "anchor"))
    assert 64 not in steps  # the last one is carried to the end
    assert sum(map(math.isnan, trainer.reset_callback.reset_state.values)) == len(steps)


def test_weights_just_put_back_are_answered_by_the_anchor(tmp_path):
    """And not evaluated: the run is the one that would have evaluated them."""
    settings = {"reset_probability": 0.25, "reset_patience": 0, "reset_full_evaluation_every": 1, "max_steps": 24}
    trainer, recorder = run(tmp_path / "paired", **settings)
    full, other = run(tmp_path / "full", reset_evaluation="full", **settings)
    answered = [record for record in evaluations(trainer) if record.get(ROWS) == 0]
    resets = steps_of(trainer.reset_callback.events, "reset")
    assert answered
    assert all(record["step"] - 1 in resets for record in answered)
    assert all("eval_runtime" not in record and "eval_race_lost" not in record for record in answered)
    theirs = {record["step"]: record["eval_calibrated_loss"] for record in evaluations(full)}
    assert all(record["eval_calibrated_loss"] == pytest.approx(theirs[record["step"]]) for record in answered)
    assert resets == steps_of(full.reset_callback.events, "reset")
    assert equal(recorder.after_step[24], other.after_step[24])


def test_full_evaluations_come_at_least_as_often_as_asked(tmp_path):
    trainer, _ = run(tmp_path, reset_full_evaluation_every=3, max_steps=48)
    row = ["".join("x" if record.get("eval_race_lost") else "." for record in evaluations(trainer))]
    assert "xx." in row[0]
    assert "xxx" not in row[0]


def test_resume_is_exact(raced):
    trainer, recorder, _ = raced
    resumed, again = run(trainer.args.output_dir, resume=f"{trainer.args.output_dir}/checkpoint-32")
    assert any(record["step"] > 32 for record in lost(trainer))
    one, other = (asdict(t.reset_callback.reset_state) for t in (trainer, resumed))
    np.testing.assert_equal(one, other)  # NaN among the values
    assert [record[ROWS] for record in lost(resumed)] == [record[ROWS] for record in lost(trainer)]
    assert equal(again.after_step[64], recorder.after_step[64])


def test_it_races_by_the_plain_loss_and_under_an_average(tmp_path):
    trainer, _ = run(tmp_path / "loss", reset_metric="eval_loss", metric_for_best_model="loss", reset_probability=0)
    assert lost(trainer)
    assert trainer.state.best_metric == trainer.reset_callback.reset_state.best  # Trainer's own: a lost race is none
    assert not any("eval_calibrated_loss" in record for record in evaluations(trainer))
    averaged, _ = run(tmp_path / "ema", reset_ema_decay=0.9, max_steps=40)
    assert lost(averaged)
    callback = averaged.reset_callback
    with callback.store.swapped():  # what was raced, and anchored, is the average
        value = averaged.evaluate()["eval_calibrated_loss"]
    assert value == pytest.approx(callback.reset_state.anchor_metric, rel=1e-5)


def test_evaluations_of_the_users_are_never_races(raced):
    trainer, *_ = raced
    assert ROWS not in trainer.evaluate()
    assert len(trainer.predict(VALIDATION).predictions) == 200


def test_excursions_are_evaluated_where_they_end(tmp_path):
    trainer, _ = run(
        tmp_path, reset_evaluation="full", reset_evaluation_at="excursion", reset_probability=0.2, max_steps=48
    )
    armed, resets = trainer.reset_callback.reset_state.armed_step, steps_of(trainer.reset_callback.events, "reset")
    after = [record["step"] for record in evaluations(trainer) if record["step"] > armed]
    assert after[-1] == 48
    assert after[:-1] == [step for step in resets if step - 1 not in resets and step > armed]


def test_unlike_order_is_noticed():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 30)
    race = Race(Reference(rng.random(30) + 2, labels, {}, FIT), is_plain=False, seed=0, step=4)
    block = race.order[:10]
    assert not race.enter(rng.normal(size=(10, 3)), labels[block])
    with pytest.raises(UnsupportedError, match="an order of its own, and these came in another"):
        race.enter(rng.normal(size=(10, 3)), labels[race.order[11:21]])


def test_a_diverged_candidate_has_lost_and_rows_without_a_label_take_no_part():
    rng = np.random.default_rng(0)
    labels = np.where(np.arange(120) < 9, -100, rng.integers(0, 3, 120))
    rows = np.where(labels == -100, np.nan, rng.random(120) + 2)
    race = Race(Reference(rows, labels, {}, FIT), is_plain=True, seed=0, step=4)
    block, following = race.order[:40], race.order[40:80]
    assert not race.enter(rng.normal(size=(40, 3)), labels[block])
    assert np.isnan(race.differences()).sum() == 80 + (labels[block] == -100).sum()
    assert math.isfinite(race.figures()["eval_race_difference"])
    assert race.enter(np.full((40, 3), np.nan), labels[following])


def test_what_was_met_is_foreseen_the_next_time_and_survives_a_checkpoint():
    reference = Reference(np.full(4, 1.0), np.zeros(4, np.int64), {}, FIT)
    once = reference.met(np.array([0.5, np.nan, np.inf, -0.25]))
    twice = once.met(np.array([np.nan, np.nan, 2.0, 0.75]))
    assert once.foreseen.tolist() == [0.5, 0.0, 0.0, -0.25]
    assert twice.foreseen.tolist() == [0.5, 0.0, 2.0, 0.75]
    again = Reference.from_json(json.loads(json.dumps(twice.as_json())))
    assert again.foreseen.tolist() == twice.foreseen.tolist()
    assert Reference.from_json(json.loads(json.dumps(reference.as_json()))).foreseen is None


def test_a_candidate_like_the_last_one_is_told_from_fewer_rows():
    rng = np.random.default_rng(0)
    labels, anchor = rng.integers(0, 3, 800), 1.0 + rng.random(800)
    logits = rng.normal(size=(800, 3)) + np.eye(3)[labels]
    losses = -np.log(np.exp(logits[np.arange(800), labels]) / np.exp(logits).sum(axis=1))
    anchor = np.maximum(losses + rng.normal(0, 0.5, 800), 0.0)
    anchor -= (anchor - losses).mean()  # no better and no worse
    unknown = Reference(anchor, labels, {}, FIT)
    known = unknown.met(losses - anchor + rng.normal(0, 0.1, 800))
    met = {name: [] for name in ("unknown", "known")}
    for seed in range(20):
        for name, reference in (("unknown", unknown), ("known", known)):
            race = Race(reference, is_plain=True, seed=seed, step=0)
            assert is_lost(race, logits)
            met[name].append(race.rows)
    assert np.mean(met["known"]) < 0.6 * np.mean(met["unknown"])


def test_a_full_evaluation_foresees_too(tmp_path):
    shadow = Shadow()
    trainer, _ = run(tmp_path, max_steps=40, reset_full_evaluation_every=1, callbacks=[shadow])  # all to the end
    anchor, reference = trainer.reset_callback.reset_state.anchor_step, trainer.reset_callback.run.evidence.reference
    assert not lost(trainer)
    assert anchor < 40
    labels = np.array(VALIDATION["labels"])
    ours, theirs = (calibrated_loss(shadow.logits[step], labels).rows for step in (40, anchor))
    np.testing.assert_allclose(reference.foreseen, ours - theirs, atol=1e-4)


REFUSED = {
    "a dict": ({"validation": {"one": VALIDATION}}, "`eval_dataset` is a dict"),
    "regression": ({"model": "regression"}, "no loss of a single row"),
    "another metric": ({"reset_metric": "eval_accuracy"}, "chosen by 'eval_accuracy', which has no rows"),
    "no logits": ({"prediction_loss_only": True, "reset_metric": None}, "`prediction_loss_only` is True"),
    "batches": ({"batch_eval_metrics": True}, "`batch_eval_metrics` is True"),
    "best checkpoint": (
        {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 4},
        "`load_best_model_at_end` needs each evaluation's figures",
    ),
    "plateau": ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "ReduceLROnPlateau sets the learning rate"),
    "early stopping": ({"callbacks": [EarlyStoppingCallback(1)], "metric_for_best_model": "loss"}, "EarlyStopping"),
    "another loss": ({"reset_loss": "gce", "reset_metric": "eval_loss"}, "`eval_loss` is another loss"),
    "an average": ({"reset_smooth": True}, "there is nothing to average with: set `smooth`"),
    "no anchor": ({"reset_probability": 0.0, "reset_finish": "last"}, "this run keeps none"),
    "excursions without resets": (
        {"reset_evaluation": "full", "reset_evaluation_at": "excursion", "reset_probability": 0.0},
        "no step can end in a reset",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_when_training_begins(tmp_path, case):
    settings, words = dict(REFUSED[case][0]), REFUSED[case][1]
    if settings.get("model") == "regression":
        settings |= {"model": bert(num_labels=1), "reset_metric": "eval_loss"}
    with pytest.raises(ResetError, match=words):
        trainer_of(tmp_path, **settings).train()


def test_values_that_mean_nothing_are_refused(tmp_path):
    for field, value in (("evaluation", "race"), ("evaluation_at", "reset"), ("full_evaluation_every", 0)):
        with pytest.raises(ConfigError, match=f"`reset_{field}` must be"):
            arguments(tmp_path, ResetTrainingArguments, **{f"reset_{field}": value})


def test_few_rows_that_a_fit_makes_nothing_of_prove_nothing():
    """All 32 rows met are right less often than chance, so that ε is fitted as 1: that is no floor for the others."""
    labels = np.arange(300) % 3
    anchor = np.where(np.arange(300) % 5 < 2, 2.0, 0.5)  # 1.1 on average, as chance; of the rows met likewise
    race = Race(Reference(anchor, labels, {}, FIT), is_plain=False, seed=1, step=4)
    given = labels[race.order[:32]]
    named = np.where(np.arange(32) % 4 == 0, given, (given + 1 + np.arange(32) % 2) % 3)
    assert calibrated_loss(np.eye(3)[named], given).noise == pytest.approx(1.0)
    assert not race.enter(np.eye(3)[named], given)


def test_the_error_level_is_that_of_losing_though_clearly_better():
    """Candidates better by exactly `CLEAR` standard errors lose their race in `LEVEL` of random orders at most."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 120)
    logits = rng.normal(size=(120, 3)) + 1.5 * np.eye(3)[labels]
    losses = -np.log(np.exp(logits[np.arange(120), labels]) / np.exp(logits).sum(axis=1))
    noise = rng.normal(0, 0.3, 120)
    anchor = losses + noise - noise.mean() + CLEAR * noise.std(ddof=1) / math.sqrt(120)
    anchor = np.maximum(anchor, 0.0)
    count = 200
    found = sum(
        is_lost(Race(Reference(anchor, labels, {}, FIT), is_plain=True, seed=s, step=0), logits) for s in range(count)
    )
    assert found / count <= LEVEL + 4 * math.sqrt(LEVEL * (1 - LEVEL) / count)


def is_lost(race, logits):
    return any(race.enter(logits[rows], race.reference.labels[rows]) for rows in race.order.reshape(-1, 8))
