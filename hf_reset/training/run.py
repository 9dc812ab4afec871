"""One call of `train()`: what the callback keeps of it, and what it refuses about its evaluations."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_reset.errors import MetricError
from hf_reset.training.evidence import RowEvidence
from hf_reset.training.metric import MetricWatch


@dataclass
class Run:
    """One call of `train()`, from its beginning to its end.

    Attributes:
        watch: the metric that chooses anchors.
        seed: of the draws.
        observed_step: steps done at the last evaluation taken in.
        saved_step: steps done at the last save of the anchor.
        seen: whether an evaluation since the last step had the metric.
        unseen: results of the evaluations since then that lacked it.
        ended: whether training is over, and further evaluations are none of its own.
        evidence: validation rows at the anchor and since, where evaluations leave some.
    """

    watch: MetricWatch
    seed: int
    observed_step: int = -1
    saved_step: int = -1
    seen: bool = False
    unseen: set[str] = field(default_factory=set)
    ended: bool = False
    evidence: RowEvidence = field(default_factory=RowEvidence)

    def begin_step(self) -> None:
        """Evaluations are complete; the next belong to another step."""
        self.unseen, self.seen = set(), False

    def note_absence(self, metrics: Mapping[str, object]) -> None:
        """One data set's results lack the metric: an error, unless another of a dict of them may have it."""
        self.unseen |= {name for name, value in metrics.items() if isinstance(value, numbers.Real) and name != "epoch"}
        if "eval_runtime" in metrics:  # the results of the one and only evaluation set
            self.refuse_unseen_metric()

    def refuse_unseen_metric(self) -> None:
        """An error once the evaluations since the last step are complete, and none had the metric."""
        if self.seen or not self.unseen:
            return
        raise MetricError(
            f"`metric` {self.watch.key!r} is not among the evaluation's results, which are "
            f"{', '.join(sorted(self.unseen))}. Set `metric` to one of them, or have `compute_metrics` return it."
        )


def refuse_no_evaluation(watch: MetricWatch, args: TrainingArguments) -> None:
    """An error where no evaluation is configured, so that none could choose an anchor."""
    if args.eval_strategy == "no":
        raise MetricError(
            f'`eval_strategy` is "no", so no evaluation can choose an anchor by {watch.key!r}. Set '
            '`eval_strategy="steps"` with `eval_steps`, and pass an `eval_dataset` (its labels may be noisy).'
        )
