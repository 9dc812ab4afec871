"""The advisor: says in the log what goes wrong with a run's resets, once each, and what to do about it."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence, Sized
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_reset.planner import advice
from hf_reset.planner.excursions import Event, evaluation_interval, recorded_events, with_events
from hf_reset.policy import ResetConfig, ResetState, probability_now
from hf_reset.training.callback import StochasticResetCallback
from hf_reset.training.hooks import HookKeywords, resets_of
from hf_reset.training.metric import MetricWatch
from hf_reset.training.resume import record_event

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)


class ResetAdvisorCallback(TrainerCallback):
    """After each evaluation, look for the failure signatures of `hf_reset.planner.advice`; name each once.

    A message goes to the log (as a warning, on one process), to W&B as an alert where it reports there, and into
    `trainer_state.json`, beside the resets, as a record with `kind` "advice", `name`, `message` and `step`. It changes
    nothing of the training, and reads only what is logged already: an evaluation of 100 records takes less than a
    millisecond.

    What it can know depends on what is there: `diagnostics.LabelMemoryCallback` tells it of memorised labels, and an
    evaluation set named "trusted" in a dict of them (`eval_dataset={"noisy": …, "trusted": …}`) of noise that
    validation cannot see. Put it after the reset callback; `ResetTrainer` does by itself (`reset_advice`).
    """

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """Look, and say what is new."""
        resets: StochasticResetCallback | None = resets_of(state)
        if resets is None or resets.reset_state.anchor_step is None or not resets.config.can_reset:
            return
        saved = recorded_events(state.stateful_callbacks)
        said = {record["name"] for record in saved if record["kind"] == "advice"}
        for name, message in _signatures(resets, args, state, kwargs).items():
            if message is not None and name not in said:
                record = {"kind": "advice", "name": name, "message": message, "step": state.global_step}
                record_event(state, {**record, "epoch": state.epoch})
                if state.is_world_process_zero:
                    _say(name, message, args)


def _signatures(
    resets: StochasticResetCallback, args: TrainingArguments, state: TrainerState, kwargs: HookKeywords
) -> dict[str, str | None]:
    """Each signature's message, None where it does not apply."""
    config, now, history = resets.config, resets.reset_state, with_events(state.log_history, resets.events)
    watch = MetricWatch.of(config, args, default=resets.default_metric)
    key, greater = watch.key, watch.greater_is_better
    memory = _latest(history, "memory/wrong")
    sign = 1 if greater else -1
    noisy = [sign * record[key] for record in history if key in record]
    found = {"blind_validation": _blind(history, key, sign, noisy, memory, now)}
    if now.armed_step is None:
        return found
    interval = evaluation_interval(history, key)
    excursion = _mean_excursion(config, now, resets.events)
    seen = advice.seen_since(history, key, greater_is_better=greater, since=now.armed_step)
    waited = min(now.evaluations_since_best, sum(r.get("step", 0) > now.armed_step for r in history if key in r))
    distances = [event["distance"] for event in resets.events if event["kind"] == "reset"]
    return found | {
        "too_frequent": advice.too_frequent(excursion, interval, waited),
        "too_rare": advice.too_rare(excursion, interval, seen),
        "late_anchor": _late(history, key, now, _chance(kwargs.get("model"), is_loss=not greater)),
        "near_chance": _near_chance(now, waited, kwargs.get("model"), greater),
        "scope_without_effect": advice.scope_without_effect(str(config.scope), distances[-8:], seen),
        "within_noise": _within_noise(resets.events, now, kwargs.get("eval_dataloader"), key, sign),
    }


def _mean_excursion(config: ResetConfig, now: ResetState, events: Sequence[Event]) -> float:
    """Steps between two resets: as observed over the last eight or more, else as configured."""
    steps = [event["step"] for event in events if event["kind"] == "reset"]
    if len(steps) > 8:
        return (steps[-1] - steps[-9]) / 8
    probability = probability_now(config, now)
    return 1 / probability if probability else math.inf


def _blind(
    history: Sequence[Event], key: str, sign: int, noisy: list[float], memory: float | None, now: ResetState
) -> str | None:
    name = key.removeprefix("eval_").split("_", 1)[-1]
    trusted = [sign * record[f"eval_trusted_{name}"] for record in history if f"eval_trusted_{name}" in record]
    if len(trusted) != len(noisy) or len(trusted) < advice.ENOUGH:
        return advice.blind_validation(noisy, memory=memory, armed=now.armed)
    # The scatter from one evaluation to the next bounds the noise of one of them from above.
    error = float(np.std(np.diff(trusted)))
    return advice.blind_validation(noisy, trusted, trusted_error=error)


def _late(history: Sequence[Event], key: str, now: ResetState, chance: float | None) -> str | None:
    assert now.anchor_step is not None
    is_loss = key.endswith("loss")
    return advice.late_anchor(
        now.anchor_step,
        memory=_nearest(history, "memory/wrong", now.anchor_step),
        training_loss=_nearest(history, "loss", now.anchor_step),
        validation_loss=now.anchor_metric if is_loss else _nearest(history, "eval_loss", now.anchor_step),
        chance=chance,
    )


def _near_chance(now: ResetState, waited: int, model: nn.Module, greater: bool) -> str | None:
    chance = _chance(model, is_loss=not greater)
    if chance is None or now.anchor_metric is None:
        return None
    return advice.near_chance(now.anchor_metric, chance, waited, is_loss=not greater)


def _within_noise(
    events: Sequence[Event], now: ResetState, loader: DataLoader | None, key: str, sign: int
) -> str | None:
    """For accuracies, and where evaluations leave their rows behind."""
    rows = getattr(loader, "dataset", None)
    if not isinstance(rows, Sized) or now.armed_step is None:
        return None
    pairs = pairwise([event for event in events if event["kind"] == "anchor"])
    moves = [(sign * (b["metric"] - a["metric"]), b.get("margin")) for a, b in pairs if b["step"] > now.armed_step][-5:]
    gains = [gain for gain, _ in moves]
    errors = [gain / abs(margin) for gain, margin in moves if margin]
    if not errors and not key.endswith("accuracy"):
        return None
    return advice.within_noise(gains, len(rows), standard_error=float(np.median(errors)) if errors else None)


def _chance(model: nn.Module, *, is_loss: bool) -> float | None:
    """The loss, or the least accuracy, of guessing; None unless the model sorts into classes."""
    config = getattr(model, "config", None)
    labels = getattr(config, "num_labels", 0) if type(model).__name__.endswith("Classification") else 0
    return None if labels < 2 else math.log(labels) if is_loss else 1 / labels


def _latest(history: Sequence[Event], name: str) -> float | None:
    return next((record[name] for record in reversed(history) if name in record), None)


def _nearest(history: Sequence[Event], name: str, step: int) -> float | None:
    """The value logged nearest to a step."""
    found = [(abs(record["step"] - step), record[name]) for record in history if name in record and "step" in record]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _say(name: str, message: str, args: TrainingArguments) -> None:
    logger.warning("%s: %s", name, message)
    wandb: Any = sys.modules.get("wandb")  # there if Trainer reports to it
    if "wandb" in (args.report_to or ()) and getattr(wandb, "run", None) is not None:
        wandb.run.alert(title=f"Resets: {name.replace('_', ' ')}", text=message)
