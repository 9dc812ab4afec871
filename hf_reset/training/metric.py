"""The evaluation result that chooses weights: which one, in which direction, and the same on every rank."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from hf_reset.anchor.ranks import from_first, world_size
from hf_reset.errors import MetricError
from hf_reset.metrics.directions import greater_is_better as greater_by_name
from hf_reset.policy import ResetConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricWatch:
    """The metric that says which weights are better: one value for whatever chooses among evaluations.

    Args:
        key: its name among the evaluation's results, with the "eval_" prefix.
        greater_is_better: its direction.
        is_of_first_set: whether it is the first evaluation set's, because nobody has named one of several.
    """

    key: str
    greater_is_better: bool
    is_of_first_set: bool = False

    @classmethod
    def of(
        cls, config: ResetConfig, args: TrainingArguments, *, strict: bool = True, default: str = "loss"
    ) -> MetricWatch:
        """The metric of a configuration: as configured, else the Trainer's own, else the evaluation loss.

        The direction likewise: as configured, else the Trainer's where it is its metric, else by its name.

        Args:
            config: the configuration.
            args: the Trainer's arguments.
            strict: whether a direction that is not known is an error; else it is "greater", as Trainer has it.
            default: the evaluation loss, where it has another name, see `default_metric`.

        Raises:
            MetricError: neither says the direction and the name does not tell it, or they contradict each other.
        """
        own = _prefixed(args.metric_for_best_model or default)
        key = _prefixed(config.metric) if config.metric else own
        greater = config.greater_is_better
        if greater is None:
            by_name = greater_by_name(key)
            greater = args.greater_is_better if key == own else None
            if strict:
                _refuse_unclear(key, greater, by_name, is_set=greater != (not key.endswith("loss")))
            greater = by_name if greater is None else greater
        is_of_first_set = default != "loss" and not (config.metric or args.metric_for_best_model)
        return cls(key, True if greater is None else greater, is_of_first_set)

    def value_in(self, metrics: Mapping[str, float]) -> float | None:
        """The metric among an evaluation's results, None where they lack it.

        Raises:
            MetricError: it is there, and no number.
        """
        if self.key not in metrics:
            return None
        value = metrics[self.key]
        try:
            return float(value)
        except (TypeError, ValueError):
            raise MetricError(
                f"`metric` {self.key!r} must be a number, and the evaluation gave {value!r}. Return a float from "
                "`compute_metrics`."
            ) from None

    def is_trainers(self, args: TrainingArguments) -> bool:
        """Whether Trainer chooses its own best by the same metric."""
        return args.metric_for_best_model is not None and self.key == _prefixed(args.metric_for_best_model)

    def refuse_no_evaluation(self, args: TrainingArguments) -> None:
        """Without evaluations there is nothing to choose by.

        Raises:
            MetricError: none are scheduled.
        """
        if args.eval_strategy == "no":
            raise MetricError(
                f'`eval_strategy` is "no", so no evaluation can choose an anchor by {self.key!r}. Set '
                '`eval_strategy="steps"` with `eval_steps`, and pass an `eval_dataset` (its labels may be noisy).'
            )

    def agree(self, metrics: dict[str, float], args: TrainingArguments) -> None:
        """Let every rank have rank 0's value, where Trainer looks for its own best too: a collective.

        Results are equal on all ranks unless `compute_metrics` makes them differ. Ranks that then chose apart would
        never notice, or would wait for one another for ever in a save that takes all of them.
        """
        if world_size() == 1:
            return
        own: Any = metrics.get(self.key)
        number = float(own) if isinstance(own, numbers.Real) or getattr(own, "ndim", None) == 0 else None
        agreed = from_first(number, args.device)
        if _same(agreed, number):
            return
        logger.warning(
            "`metric` %r differs between ranks: rank 0 has %s, rank %s has %s. Rank 0's value decides on all of them; "
            "have `compute_metrics` return the same on every rank.",
            self.key,
            agreed,
            args.process_index,
            own,
        )
        if agreed is None:
            metrics.pop(self.key, None)
        else:
            metrics[self.key] = agreed


def default_metric(eval_dataset: object) -> str:
    """What chooses where nobody has named a metric: the loss, of the first evaluation set where there are several."""
    if isinstance(eval_dataset, dict) and eval_dataset:
        return f"{next(iter(eval_dataset))}_loss"
    return "loss"


def _refuse_unclear(key: str, said: bool | None, by_name: bool | None, *, is_set: bool) -> None:
    """`said` is what Trainer goes by, and `is_set` whether that is not merely its default for names without "loss"."""
    if said is None and by_name is None:
        raise MetricError(
            f"`metric` {key!r} does not tell by its name whether greater is better. Set `greater_is_better` "
            "(`reset_greater_is_better` among training arguments) to True or False."
        )
    if said is not None and by_name is not None and said != by_name and not is_set:
        raise MetricError(
            f"`metric` {key!r} is by its name one of which {'greater' if by_name else 'lower'} is better, and Trainer "
            f"takes {'greater' if said else 'lower'} for better, as it does for every name that does not end in "
            '"loss". Set `greater_is_better` in the training arguments, so that its best and the anchor agree (or in '
            "ResetConfig, where that is meant)."
        )


def _prefixed(name: str) -> str:
    return name if name.startswith("eval_") else f"eval_{name}"


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return one == other or (math.isnan(one) and math.isnan(other))
