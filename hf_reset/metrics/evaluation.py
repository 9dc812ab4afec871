"""The calibrated loss as a `compute_metrics` for any `Trainer`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_reset.errors import DataError, MetricError, WeakEvidenceWarning
from hf_reset.metrics.arrays import IGNORE_INDEX, class_numbers, to_numpy
from hf_reset.metrics.calibrated import METRIC_NAMES, CalibratedLoss, calibrated_loss, check_logits

if TYPE_CHECKING:
    from transformers import EvalPrediction

MINIMUM_ROWS = 100
"""Fewer labelled validation rows than this, and `with_calibrated_loss` warns."""


def with_calibrated_loss(compute_metrics: Callable[..., Mapping[str, float]] | None = None) -> CalibratedMetrics:
    """A `compute_metrics` for any `Trainer` that adds the calibrated loss of the validation labels.

    `Trainer(..., compute_metrics=with_calibrated_loss(mine))` gives what `mine` gives, and beside it
    `calibrated_loss`, `label_noise` (the share of validation labels that look wrong,
    `CalibratedLoss.wrong_labels`), `temperature` and `estimated_accuracy`; `Trainer` calls them
    `eval_calibrated_loss` and so on. Anchors are chosen by it with `reset_metric="eval_calibrated_loss"`,
    checkpoints with `metric_for_best_model="eval_calibrated_loss"`. Right under any sharding: `Trainer` gathers
    the rows and drops the last batch's padding before it calls this. `batch_eval_metrics` works, at the cost of
    keeping the logits. With `prediction_loss_only` no `Trainer` calls `compute_metrics` at all.

    It warns once, with `WeakEvidenceWarning`, where the figure says less than it seems: below
    `MINIMUM_ROWS` labelled rows, or where all labels are of one class.

    Args:
        compute_metrics: Your own, called with the same arguments; None for none.

    Returns:
        The function. It raises DataError for what is no single-label classification, MetricError where
        `compute_metrics` returns one of its names, or takes no `compute_result` though
        `batch_eval_metrics` is on.

    Example:
        >>> import numpy as np
        >>> from transformers import EvalPrediction
        >>> rows = EvalPrediction(predictions=np.eye(2)[[0, 1] * 50], label_ids=np.array([0, 1] * 50))
        >>> sorted(with_calibrated_loss()(rows))
        ['calibrated_loss', 'estimated_accuracy', 'label_noise', 'temperature']
    """
    return CalibratedMetrics(compute_metrics)


class CalibratedMetrics:
    """The function that `with_calibrated_loss` returns; between two batches of an evaluation it keeps the rows."""

    def __init__(
        self, compute_metrics: Callable[..., Mapping[str, float]] | None = None, *, adds_metrics: bool = True
    ) -> None:
        self.compute_metrics = compute_metrics
        self.latest: CalibratedLoss | None = None  # of the last evaluation
        self.adds_metrics = adds_metrics  # False: the rows alone are wanted, and the metrics stay those of the user
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []
        self._rows: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        self._has_warned = False
        self.keeps_last = False  # for races: whether `last` is kept
        self.last: tuple[NDArray[Any], NDArray[Any]] | None = None  # logits and labels of the last evaluation

    def __call__(self, prediction: EvalPrediction, compute_result: bool | None = None) -> dict[str, float]:
        """Return the metrics; `compute_result`: None for a whole evaluation, else whether this batch is the last."""
        metrics = self._own(prediction, compute_result)
        self._kept.append(_logits_and_labels(prediction.predictions, prediction.label_ids))
        if compute_result is False:
            return metrics
        logits, labels = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
        self._kept.clear()
        self.latest = found = calibrated_loss(logits, labels)
        self._rows = found.rows, _frequency_rows(labels)
        self.last = (logits, labels) if self.keeps_last else None
        if not self.adds_metrics:
            return metrics
        self._warn(found, labels)
        return metrics | found.metrics()

    def take_rows(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """The rows' losses of the last evaluation, and those that the labels' frequencies alone would give.

        Both of shape (N,), in nats, NaN where a row has no label; None where there was no evaluation since the last
        call. For the paired test on which resets begin, see `hf_reset.training.evidence`.
        """
        rows, self._rows = self._rows, None
        return rows

    def leave(self, rows: NDArray[np.float64], baseline: NDArray[np.float64], fit: CalibratedLoss) -> None:
        """Have `take_rows` and `latest` say this: of an evaluation not carried to the end, or not carried out."""
        self._rows, self.latest = (rows, baseline), fit

    def _own(self, prediction: EvalPrediction, compute_result: bool | None) -> dict[str, float]:
        if self.compute_metrics is None:
            return {}
        options = {} if compute_result is None else {"compute_result": compute_result}
        if options and not _takes_compute_result(self.compute_metrics):
            raise MetricError(
                "`batch_eval_metrics` is on, so `compute_metrics` is called a batch at a time and must take "
                "`compute_result`, but yours does not. Add the argument, or turn `batch_eval_metrics` off."
            )
        metrics = dict(self.compute_metrics(prediction, **options) or {})
        names = METRIC_NAMES if self.adds_metrics else ()
        taken = sorted(set(metrics) & {prefix + name for name in names for prefix in ("", "eval_")})
        if taken:
            raise MetricError(
                f"`compute_metrics` returns {taken[0]!r} itself, which `with_calibrated_loss` adds. Rename yours, or "
                "pass it to Trainer unwrapped."
            )
        return metrics

    def _warn(self, found: CalibratedLoss, labels: np.ndarray) -> None:
        given = labels[labels != IGNORE_INDEX]
        reasons = []
        if len(given) < MINIMUM_ROWS:
            reasons.append(
                f"it rests on {len(given)} labelled validation rows, fewer than {MINIMUM_ROWS}, and has a standard "
                f"error of {found.standard_error:.2g} nats: of two evaluations that differ by less than about "
                f"{2 * found.standard_error:.2g} nats neither is known to be better. Hold out more rows."
            )
        if len(np.unique(given)) == 1:
            reasons.append(
                f"each validation label is class {given[0]}, so it rewards predicting that class always. Shuffle "
                "before splitting, or split by class."
            )
        if reasons and not self._has_warned:
            self._has_warned = True
            message = "`calibrated_loss` is weak evidence: " + " And ".join(reasons)
            warnings.warn(message, WeakEvidenceWarning, stacklevel=3)


def _frequency_rows(labels: np.ndarray) -> NDArray[np.float64]:
    """−log of each row's label's own frequency, shape (N,); NaN where a row has no label."""
    given = labels != IGNORE_INDEX
    _, codes, counts = np.unique(labels[given], return_inverse=True, return_counts=True)
    rows = np.full(len(labels), np.nan)
    rows[given] = -np.log(counts[codes] / given.sum())
    return rows


def _takes_compute_result(function: Callable[..., object]) -> bool:
    parameters = inspect.signature(function).parameters
    return "compute_result" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _logits_and_labels(predictions: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """One (n, K) and one (n,) from what `Trainer` hands over: arrays, tuples of them, or lists of batches."""
    if isinstance(predictions, list):  # eval_do_concat_batches=False
        parts = [_logits_and_labels(*batch) for batch in zip(predictions, labels, strict=True)]
        logits, labels = (np.concatenate(kind) for kind in zip(*parts, strict=True))
        return logits, labels
    if isinstance(predictions, (tuple, Mapping)):  # logits come first, hidden states and the like after them
        predictions = next(iter(predictions.values() if isinstance(predictions, Mapping) else predictions))
    if isinstance(labels, tuple):
        raise DataError(
            f"There are {len(labels)} arrays of labels a row; `calibrated_loss` needs one class number. Set "
            "`label_names` to that one column."
        )
    logits = check_logits(to_numpy(predictions))
    return logits, class_numbers(labels, *logits.shape)
