"""One call of `train()`: what the callback keeps for as long as it lasts."""

from __future__ import annotations

import contextlib
import math
import numbers

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainingArguments
from transformers.optimization import GreedyLR

from hf_reset.config import ResetConfig
from hf_reset.errors import MetricError
from hf_reset.planner.excursions import LOST
from hf_reset.training.evidence import RowEvidence
from hf_reset.training.metric import MetricWatch
from hf_reset.training.parameters import TrainedParameters


class Run:
    """One call of `train()`, from its beginning to its end.

    Args:
        config: the configuration.
        args: the Trainer's arguments.
        default: the metric where neither names one, see `default_metric`.

    Attributes:
        watch: the metric that chooses anchors.
        seed: of the draws.
        chooses: whether weights are chosen, by resets or at the end; else the run is the plain Trainer's.
        observed_step: steps done at the last evaluation taken in.
        saved_step: steps done at the last save of the anchor.
        seen: whether an evaluation since the last step had the metric.
        unseen: results of the evaluations since then that lacked it.
        ended: whether training is over, and further evaluations are none of its own.
        evidence: validation rows at the anchor and since, where evaluations leave some.
        is_due: whether the Trainer's own evaluation is due, as the last batch of any evaluation found.
        trained: the parameters that train; None where no anchor is kept.

    Raises:
        MetricError: the direction of the metric cannot be told.
    """

    def __init__(self, config: ResetConfig, args: TrainingArguments, default: str = "loss") -> None:
        # Without resets and without evaluations there is nothing to choose, and nothing to choose by.
        self.chooses = config.can_reset or (config.needs_anchor and args.eval_strategy != "no")
        self.watch = MetricWatch.of(config, args, strict=self.chooses, default=default)
        self.seed = args.seed if config.seed is None else config.seed
        # Trainer looks for its own metric itself, and says it in its own words if that is missing.
        self._is_trainers = self.watch.is_trainers(args)
        self.observed_step = self.saved_step = -1
        self.seen, self.unseen = False, set[str]()
        self.ended = self.is_due = False
        self.evidence = RowEvidence()
        self.trained: TrainedParameters | None = None

    def value_in(self, metrics: dict[str, float], args: TrainingArguments) -> float | None:
        """The metric of an evaluation, the same on every rank; None where it has none.

        In the plain Trainer's run nothing is agreed on, and nothing about the metric is an error. A race that was lost
        has no value of the metric: NaN, which is never a best.
        """
        if metrics.get(LOST):
            self.seen = True
            return math.nan
        if not self.chooses:
            with contextlib.suppress(MetricError):
                return self.watch.value_in(metrics)
            return None
        self.watch.agree(metrics, args)
        value = self.watch.value_in(metrics)
        if value is None:
            self._note_absence(metrics)
        else:
            self.seen = True
        return value

    def begin_step(self) -> None:
        """Evaluations are complete; the next belong to another step."""
        self.unseen, self.seen = set(), False

    def _note_absence(self, metrics: dict[str, float]) -> None:
        """One data set's results lack the metric: an error, unless another of a dict of them may have it."""
        self.unseen |= {name for name, value in metrics.items() if isinstance(value, numbers.Real) and name != "epoch"}
        if "eval_runtime" in metrics:  # the results of the one and only evaluation set
            self.refuse_unseen_metric()

    def refuse_unseen_metric(self) -> None:
        """An error once the evaluations since the last step are complete, and none had the metric."""
        if self.seen or not self.unseen or self._is_trainers:
            return
        raise MetricError(
            f"`metric` {self.watch.key!r} is not among the evaluation's results, which are "
            f"{', '.join(sorted(self.unseen))}. Set `metric` to one of them, or have `compute_metrics` return it."
        )


def pass_over_once(schedule: object) -> None:
    """Let a learning rate that goes by the metric pass over the evaluation being reported.

    It is one of weights just put back: no better than the best, which was theirs, and no sign that learning has come
    to rest. Trainer steps such a schedule next, and has no other way to be told.
    """
    if isinstance(schedule, (ReduceLROnPlateau, GreedyLR)):
        vars(schedule)["step"] = lambda *_: vars(schedule).pop("step")
