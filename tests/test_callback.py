"""The callback in every set-up of the Trainer that it must be right in, and what it refuses."""

import itertools
import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from tiny import (
    TRAIN,
    VALIDATION,
    Recorder,
    arguments,
    bert,
    callback,
    equal,
    plain_run,
    rows,
    steps_of,
    weights,
)
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_reset import ResetConfig, StochasticResetCallback
from hf_reset.errors import ConfigError, MetricError, NoEffectWarning, ScopeError
from hf_reset.planner.excursions import recorded_events
from hf_reset.training.metric import MetricWatch


def lands_on_anchors(reset, recorder):
    """Every reset put back the weights evaluated at its anchor; there were some."""
    resets = [event for event in reset.events if event["kind"] == "reset"]
    assert resets
    return all(
        equal(recorder.after_step[event["step"] + 1], recorder.evaluated[event["anchor_step"]][1]) for event in resets
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 1e-3},
        {"bf16": True},
        {"activation_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"eval_on_start": True},
        {"eval_strategy": "epoch", "num_train_epochs": 3, "max_steps": -1},
        {"optim": "adamw_torch_fused"},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"save_strategy": "best", "metric_for_best_model": "loss", "save_total_limit": 1},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=lambda settings: next(iter(settings)) + "-" + str(next(iter(settings.values()))),
)
def test_set_ups_of_the_trainer(tmp_path, settings):
    reset = callback()
    _, recorder = plain_run(tmp_path, callback=reset, **settings)
    assert lands_on_anchors(reset, recorder)


def test_a_dict_of_evaluation_sets(tmp_path):
    reset = callback(metric="eval_b_loss")
    recorder = Recorder()
    trainer = Trainer(
        bert(),
        arguments(tmp_path),
        train_dataset=TRAIN,
        eval_dataset={"a": rows(16, seed=3), "b": VALIDATION, "c": rows(16, seed=4)},
        callbacks=[reset, recorder],
    )
    trainer.train()
    assert lands_on_anchors(reset, recorder)
    by_step = {h["step"]: h["eval_b_loss"] for h in trainer.state.log_history if "eval_b_loss" in h}
    assert {e["metric"] for e in reset.events} <= set(by_step.values())


def test_load_best_model_at_end_agrees_and_stands(tmp_path):
    """The best checkpoint that Trainer loads from disk is the anchor, bit for bit."""
    reset = callback()
    trainer, recorder = plain_run(
        tmp_path, callback=reset, save_strategy="steps", save_steps=3, load_best_model_at_end=True
    )
    assert lands_on_anchors(reset, recorder)
    assert equal(weights(trainer.model), reset.store.tensors())
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{reset.reset_state.anchor_step}")


def test_load_best_model_at_end_wins_over_a_fixed_anchor(tmp_path):
    reset = callback(probability=0.05, anchor="fixed")
    trainer, recorder = plain_run(
        tmp_path, callback=reset, save_strategy="steps", save_steps=3, load_best_model_at_end=True
    )
    best = trainer.state.best_global_step
    assert best > reset.reset_state.anchor_step  # else this shows nothing
    assert equal(weights(trainer.model), recorder.evaluated[best][1])


def test_several_train_calls_on_one_instance_start_afresh(tmp_path):
    reset = callback()
    trainer, _ = plain_run(tmp_path, callback=reset, optim="sgd")
    first = list(reset.events)
    with torch.no_grad():
        for p, fresh in zip(trainer.model.parameters(), bert().parameters(), strict=True):
            p.copy_(fresh)
    torch.manual_seed(7)
    trainer.args.seed = 8  # another order of draws
    trainer.train()
    assert reset.events
    assert reset.events != first
    assert reset.events[0]["kind"] == "anchor"
    assert reset.events[0]["distance"] is None  # no anchor was left over from the first call
    assert steps_of(reset.events, "anchor")[0] == 3


def test_one_instance_serves_two_trainers_in_turn(tmp_path):
    reset = callback()
    plain_run(tmp_path / "a", callback=reset)
    first = list(reset.events)
    plain_run(tmp_path / "b", callback=reset)
    assert reset.events == first


def test_evaluating_outside_of_training_moves_nothing(tmp_path):
    reset = callback()
    trainer, _ = plain_run(tmp_path, callback=reset, train=False)
    trainer.evaluate()
    assert reset.events == []
    trainer.train()
    before = list(reset.events)
    trainer.evaluate()
    assert reset.events == before


def test_events_are_saved_with_the_trainers_state_and_not_among_its_logs(tmp_path):
    reset = callback()
    trainer, _ = plain_run(tmp_path, callback=reset)
    trainer.save_state()
    saved = json.loads((tmp_path / "trainer_state.json").read_text())
    assert recorded_events(saved["stateful_callbacks"]) == reset.events
    assert {"kind", "step", "metric", "distance"} <= reset.events[0].keys()
    assert not any("kind" in record for record in trainer.state.log_history)


def without_times(trainer):
    timed = ("runtime", "per_second")
    return [{k: v for k, v in r.items() if not any(t in k for t in timed)} for r in trainer.state.log_history]


def test_records_of_the_log_lie_where_the_plain_trainer_has_them(tmp_path):
    """Code that takes them by position finds the same kind of record; with nothing to reset, the same record."""
    plain, _ = plain_run(tmp_path / "plain")
    resets, _ = plain_run(tmp_path / "resets", callback=callback())
    idle, _ = plain_run(tmp_path / "idle", callback=callback(probability=0, finish="last"))
    assert [record.keys() for record in resets.state.log_history] == [r.keys() for r in plain.state.log_history]
    assert without_times(idle) == without_times(plain)


def test_optimizer_state_modes_in_a_run(tmp_path):
    """At the first reset: restored moments are the anchor's, zeroed ones are gone, kept ones are the plain run's."""

    class Moments(TrainerCallback):
        def __init__(self):
            self.at = {}

        def on_step_end(self, args, state, control, **kwargs):
            p = kwargs["model"].classifier.weight
            self.at[state.global_step] = {k: v.clone() for k, v in kwargs["optimizer"].state[p].items()}

    runs = {}
    for mode in ("restore", "zero", "keep", None):
        spy = Moments()
        reset = callback(optimizer_state=mode, max_resets=1) if mode else None
        plain_run(tmp_path / str(mode), callback=reset, model=bert(dropout=0), more_callbacks=[spy])
        runs[mode] = spy.at
        if reset:
            step, anchor = next((e["step"] + 1, e["anchor_step"]) for e in reset.events if e["kind"] == "reset")
    plain = runs[None]
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(runs["restore"][step][key], plain[anchor][key])
        assert runs["zero"][step] == {}  # as a new optimizer
        assert torch.equal(runs["keep"][step][key], plain[step][key])
        assert not torch.equal(plain[step][key], plain[anchor][key])


def test_finish_last_leaves_the_last_weights(tmp_path):
    reset = callback(probability=0, finish="last")
    trainer, recorder = plain_run(tmp_path, callback=reset)
    assert equal(weights(trainer.model), recorder.after_step[15])


def test_max_resets_zero_keeps_the_best_in_memory(tmp_path):
    reset = callback(max_resets=0)
    trainer, recorder = plain_run(tmp_path, callback=reset)
    assert steps_of(reset.events, "reset") == []
    best = min(recorder.evaluated, key=lambda step: recorder.evaluated[step][0])
    assert equal(weights(trainer.model), recorder.evaluated[best][1])


class Normed(nn.Module):
    """Any module that returns a loss can be trained; this one has BatchNorm statistics."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.norm, self.head = nn.Embedding(50, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.head(self.norm(self.embed(input_ids).mean(1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_batch_norm_statistics_belong_to_the_evaluated_weights(tmp_path):
    class Statistics(TrainerCallback):
        def __init__(self):
            self.at = {}

        def on_step_end(self, args, state, control, **kwargs):
            self.at[state.global_step] = kwargs["model"].norm.running_mean.clone()

    spy, reset = Statistics(), callback()
    plain_run(tmp_path, model=Normed(), callback=reset, more_callbacks=[spy])
    resets = [e for e in reset.events if e["kind"] == "reset"]
    assert resets
    assert all(torch.equal(spy.at[e["step"] + 1], spy.at[e["anchor_step"]]) for e in resets)


def test_a_metric_of_the_greater_is_better_kind(tmp_path):
    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    reset = callback(metric="accuracy", max_resets=0)
    trainer = Trainer(
        bert(),
        arguments(tmp_path),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=[reset],
        compute_metrics=accuracy,
    )
    trainer.train()
    seen = [h["eval_accuracy"] for h in trainer.state.log_history if "eval_accuracy" in h]
    running = [value for i, value in enumerate(seen) if value > max(seen[:i], default=-1)]
    assert [event["metric"] for event in reset.events] == running


def test_a_nan_metric_is_never_a_best(tmp_path):
    values = iter([np.nan, 0.5, np.nan, 0.4, 0.6])
    reset = callback(metric="score")
    trainer = Trainer(
        bert(),
        arguments(tmp_path),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=[reset],
        compute_metrics=lambda _: {"score": next(values)},
    )
    trainer.train()
    assert [e["metric"] for e in reset.events if e["kind"] == "anchor"] == [0.5, 0.6]


@pytest.mark.parametrize(
    ("config", "args", "key", "greater"),
    [
        ({}, {}, "eval_loss", False),
        ({}, {"metric_for_best_model": "f1"}, "eval_f1", True),
        ({"metric": "f1"}, {}, "eval_f1", True),
        ({"metric": "eval_f1"}, {"metric_for_best_model": "loss", "greater_is_better": False}, "eval_f1", True),
        ({"metric": "f1"}, {"metric_for_best_model": "eval_f1", "greater_is_better": False}, "eval_f1", False),
        ({"metric": "error", "greater_is_better": False}, {}, "eval_error", False),
    ],
)
def test_the_metric_and_its_direction(tmp_path, config, args, key, greater):
    watch = MetricWatch.of(ResetConfig(**config), arguments(tmp_path, **args))
    assert watch.key == key
    assert watch.greater_is_better is greater


# What is refused


def test_no_evaluation_configured(tmp_path):
    with pytest.raises(MetricError, match=r'`eval_strategy` is "no".*Set `eval_strategy="steps"`'):
        plain_run(tmp_path, callback=callback(), eval_strategy="no")


def test_nothing_to_refuse_where_nothing_is_asked(tmp_path):
    plain_run(tmp_path, callback=callback(probability=0, finish="last"), eval_strategy="no")


@pytest.mark.parametrize("options", [{"probability": 0}, {"max_resets": 0}, {"probability": 0, "ema_decay": 0.5}])
def test_without_resets_and_evaluations_it_is_the_plain_trainer_and_says_so(tmp_path, caplog, options):
    """There are no best weights to finish with, and no reason to refuse to train."""
    plain, _ = plain_run(tmp_path / "plain", eval_strategy="no")
    reset, averages = callback(**options), "ema_decay" in options
    reset.can_average = averages
    trainer, recorder = plain_run(tmp_path / "reset", callback=reset, eval_strategy="no")
    assert equal(recorder.after_step[15], weights(plain.model))
    assert equal(weights(trainer.model), weights(plain.model)) is not averages
    assert reset.store is None
    assert not reset.events
    said = [record.getMessage() for record in caplog.records if record.name == "transformers.hf_reset"]
    assert len(said) == (not averages)
    assert averages or '`eval_strategy` is "no", so no weights can be told to be the best' in said[0]


def test_a_metric_that_the_evaluation_lacks(tmp_path):
    with pytest.raises(MetricError, match=r"`metric` 'eval_f1' is not among .*eval_loss.*`compute_metrics`"):
        plain_run(tmp_path, callback=callback(metric="f1"))


def test_a_run_whose_metric_is_never_finite_says_that_nothing_was_reset(tmp_path):
    trainer = Trainer(
        bert(),
        arguments(tmp_path),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=[callback(metric="score")],
        compute_metrics=lambda _: {"score": float("nan")},
    )
    with pytest.warns(NoEffectWarning, match=r"No evaluation gave a finite 'eval_score'.* nothing was reset"):
        trainer.train()


def test_a_metric_that_no_set_of_a_dict_has(tmp_path):
    trainer = Trainer(
        bert(),
        arguments(tmp_path),
        train_dataset=TRAIN,
        eval_dataset={"a": VALIDATION, "b": VALIDATION},
        callbacks=[callback()],
    )
    with pytest.raises(MetricError, match=r"'eval_loss' is not among .*eval_a_loss.*eval_b_loss"):
        trainer.train()
    assert trainer.state.global_step == 3  # said before another step is taken


def test_a_metric_that_is_no_number(tmp_path):
    trainer = Trainer(
        bert(),
        arguments(tmp_path),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=[callback(metric="score")],
        compute_metrics=lambda _: {"score": "high"},
    )
    with pytest.raises(MetricError, match=r"`metric` 'eval_score' must be a number, .* gave 'high'"):
        trainer.train()


def test_two_reset_callbacks(tmp_path):
    with pytest.raises(ConfigError, match=r"Two reset callbacks are in one Trainer.*Pass one"):
        plain_run(tmp_path, callback=callback(), more_callbacks=[callback()])


def test_a_scope_is_checked_when_training_begins(tmp_path):
    trainer, _ = plain_run(tmp_path, callback=callback(scope="adapters"), train=False)
    with pytest.raises(ScopeError, match='"adapters" needs a PEFT model'):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StochasticResetCallback(probabilty=0.1), "`probabilty` is not a field .* mean `probability`"),
        (lambda: StochasticResetCallback(ResetConfig(), patience=1), "`config` and the field `patience` were both"),
        (lambda: StochasticResetCallback({"probability": 1}), "`config` must be a ResetConfig, got"),
        (lambda: StochasticResetCallback(probability=2), r"`probability` must be in \[0, 1\], got 2"),
    ],
)
def test_the_constructor_names_what_is_wrong(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_every_choice_of_auto_is_in_the_audit_trail(tmp_path):
    class Chosen(TrainerCallback):
        """What is in force after each evaluation."""

        seen: ClassVar[dict[int, float]] = {}

        def on_evaluate(self, args, state, control, **kwargs):
            self.seen[state.global_step] = reset.reset_state.plan.probability

    reset = callback(probability="auto", patience=0)  # from the first evaluation on, so that all of them count
    # A small rate: nearly every evaluation is a new best, and resets would do harm.
    trainer, _ = plain_run(
        tmp_path,
        callback=reset,
        more_callbacks=[Chosen()],
        eval_steps=1,
        max_steps=30,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
    )
    plans = [event for event in reset.events if event["kind"] == "plan"]
    assert plans[0]["probability"] == 0.5  # of one step between two evaluations
    assert len({event["probability"] for event in plans}) > 1
    said = {event["step"]: event["probability"] for event in plans}
    in_force = 0.0
    for step, probability in Chosen.seen.items():
        in_force = said.get(step, in_force)
        assert probability == in_force
    saved = recorded_events(trainer.state.stateful_callbacks)
    assert [record for record in saved if record["kind"] == "plan"] == plans
    assert plans[-1]["improvements"] > 3


def test_luby_lands_on_anchors(tmp_path):
    reset = callback(probability=0.6, policy="luby")
    _, recorder = plain_run(tmp_path, callback=reset)
    assert lands_on_anchors(reset, recorder)
    steps = steps_of(reset.events, "reset")
    assert [b - a for a, b in itertools.pairwise(steps)][:2] == [2, 4]


class Rates(TrainerCallback):
    """What the schedule was told: a value an evaluation, unless it was passed over."""

    def __init__(self):
        self.told = []

    def on_train_begin(self, args, state, control, lr_scheduler, **kwargs):
        step = type(lr_scheduler).step

        def stepping(schedule, metrics, *more):
            self.told.append((state.global_step, float(metrics)))
            return step(schedule, metrics, *more)

        lr_scheduler.__class__ = type("Told", (type(lr_scheduler),), {"step": stepping})


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_rate_that_goes_by_the_metric_passes_over_the_anchors_own_evaluations(tmp_path, schedule):
    """Weights just put back cannot be better than themselves: that is no plateau."""
    reset, rates = callback(), Rates()
    plain_run(tmp_path, callback=reset, more_callbacks=[rates], lr_scheduler_type=schedule, eval_steps=1)
    just_reset = {step + 1 for step in steps_of(reset.events, "reset")}
    assert len(just_reset) > 2
    assert [step for step, _ in rates.told] == [step for step in range(1, 16) if step not in just_reset]


@pytest.mark.parametrize("sets", [{"a": VALIDATION, "b": VALIDATION}, VALIDATION], ids=["dict", "one"])
def test_with_nothing_to_reset_no_metric_is_an_error(tmp_path, sets):
    def log(folder, *callbacks):
        args = arguments(tmp_path / folder)
        trainer = Trainer(bert(), args, train_dataset=TRAIN, eval_dataset=sets, callbacks=list(callbacks))
        trainer.train()
        return without_times(trainer)

    assert log("idle", callback(probability=0, finish="last", metric="quality")) == log("plain")
