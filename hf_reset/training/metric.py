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
from hf_reset.policy import ResetConfig, is_better

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricWatch:
    """The metric that says which weights are better: one value for whatever chooses among evaluations.

    Args:
        key: its name among the evaluation's results, with the "eval_" prefix.
        greater_is_better: its direction.
        min_delta: how much better than the best counts as a new best, in its units.
    """

    key: str
    greater_is_better: bool
    min_delta: float = 0.0

    @classmethod
    def of(cls, config: ResetConfig, args: TrainingArguments) -> MetricWatch:
        """The metric of a configuration: as configured, else the Trainer's own, else the evaluation loss.

        The direction likewise: as configured, else the Trainer's where it is its metric, else by name.
        """
        key = _prefixed(config.metric or args.metric_for_best_model or "loss")
        greater = config.greater_is_better
        if greater is None and key == _prefixed(args.metric_for_best_model or "loss"):
            greater = args.greater_is_better
        if greater is None:
            greater = not key.endswith("loss")
        return cls(key, greater, config.min_delta)

    def value_in(self, metrics: Mapping[str, Any]) -> float | None:
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

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether `value` is a new best: finite, and better than `best` (None: there is none yet)."""
        return is_better(value, best, greater_is_better=self.greater_is_better, min_delta=self.min_delta)

    def agree(self, metrics: dict[str, Any], args: TrainingArguments) -> None:
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


def _prefixed(name: str) -> str:
    return name if name.startswith("eval_") else f"eval_{name}"


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return one == other or (math.isnan(one) and math.isnan(other))
