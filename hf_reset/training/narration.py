"""What a run says of its resets: one line when they begin, one at the end. Pure: from values to words."""

from __future__ import annotations

from collections.abc import Sequence

from hf_reset.planner.excursions import Entry
from hf_reset.policy import ResetConfig, ResetState, period_of, probability_now, turned_at
from hf_reset.training.metric import MetricWatch

# Whose weights the model ends with.
WITH_ANCHOR = "The model ends with the anchor's weights."
WITH_MIXTURE = (
    "The anchor was written without the weights outside the scope, so the model ends with the anchor's beside the last "
    "step's, which were not evaluated together: evaluate it, or start anew."
)
WITH_AVERAGE = "The model ends with the moving average."
WITH_LAST = "The model ends with the weights of the last step."
WITH_UNTOLD = (
    "The model ends with the weights of the last step: validation cannot tell the anchor from them. More validation "
    "rows would tell; a number for `patience` ends with the anchor all the same."
)


def opening(config: ResetConfig, watch: MetricWatch, chooses: bool) -> str | None:
    """What was not asked for in so many words, before the first step; None where all was.

    Args:
        config: the configuration.
        watch: the metric that chooses.
        chooses: whether weights are chosen at all.
    """
    if chooses and watch.is_of_first_set:
        return (
            f"There are several evaluation sets, and the first one's {watch.key!r} chooses. Name another as `metric`."
        )
    if chooses or not config.needs_anchor or config.ema_decay is not None:
        return None
    return (
        'Nothing is to be reset and `eval_strategy` is "no", so no weights can be told to be the best: the model ends '
        'with the last ones. For the best evaluated ones (`finish="anchor"`) set `eval_strategy` and `eval_steps`.'
    )


def beginning(config: ResetConfig, state: ResetState, watch: MetricWatch) -> str:
    """Why resets begin, and where they will lead."""
    if config.patience == 0:
        why = "`patience` is 0"
    elif config.patience is not None:
        why = f"{_times(state.evaluations_since_best, 'evaluation')} brought no better {watch.key}"
    else:
        why = f"validation lies {state.worse or 0:.1f} standard errors above the anchor's"
    return f"Resets begin after step {state.armed_step}: {why}. {_where(state, watch)}."


def ending(
    config: ResetConfig,
    state: ResetState,
    watch: MetricWatch,
    events: Sequence[Entry],
    steps: int,
    weights: str,
) -> str:
    """How many resets there were, where the anchor lies, and what that gained; or why there was none.

    Args:
        config: the configuration.
        state: what has happened.
        watch: the metric that chose anchors.
        events: the audit trail.
        steps: optimizer steps done.
        weights: whose weights the model ends with, in words.
    """
    if not state.resets:
        return f"No reset happened, because {_why_none(config, state, watch, steps)}. {_where(state, watch)}. {weights}"
    gained = gain(state, watch, events)
    judged = f"{gained:.4g} better than when they began" if gained else "no better than when they began"
    return f"{_times(state.resets, 'reset')} in {steps} steps. {_where(state, watch)}, {judged}. {weights}"


def gain(state: ResetState, watch: MetricWatch, events: Sequence[Entry]) -> float | None:
    """How much better the best is than the anchor was when resets began, in the metric's units; None before that."""
    if state.armed_step is None or state.best is None:
        return None
    moves = [event for event in events if event["kind"] == "anchor" and event["step"] <= state.armed_step]
    before = moves[-1].get("judged", moves[-1]["metric"]) if moves else None
    if before is None:
        return None
    return state.best - before if watch.greater_is_better else before - state.best


def _where(state: ResetState, watch: MetricWatch) -> str:
    if state.anchor_step is None:
        return "There is no anchor"
    metric = "" if state.anchor_metric is None else f" ({watch.key} {state.anchor_metric:.4g})"
    return f"The anchor lies at step {state.anchor_step}{metric}"


def _why_none(config: ResetConfig, state: ResetState, watch: MetricWatch, steps: int) -> str:
    if config.max_resets == 0:
        return "`max_resets` is 0"
    if config.probability == 0:
        return "`probability` is 0"
    if state.armed_step is None:
        if config.patience is None:
            return f"validation never turned by {turned_at(len(state.values)):.2g} standard errors"
        since = _times(state.evaluations_since_best, "evaluation")
        return f"only {since} had passed without a better {watch.key} at the end, of a `patience` of {config.patience}"
    if state.waiting:
        began = f"after they began at step {state.armed_step} a better anchor was found"
        return f"{began}, and no evaluation since was clearly worse than it"
    left = _times(steps - state.armed_step, "step")
    probability = probability_now(config, state)
    if config.policy == "bernoulli" or not probability:
        return f"with r = {probability:.3g} none of the {left} after step {state.armed_step} drew one"
    return f"they began at step {state.armed_step}, and a period of {period_of(probability)} did not end in {left}"


def _times(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
