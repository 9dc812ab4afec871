"""Where a Trainer's validation rows come from: its own `compute_metrics`, wrapped where need be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import Trainer

from hf_reset.errors import MetricError
from hf_reset.losses.by_name import shifts_labels
from hf_reset.metrics.calibrated import METRIC_NAMES
from hf_reset.metrics.evaluation import CalibratedMetrics
from hf_reset.policy import ResetConfig
from hf_reset.training.evidence import RowSource
from hf_reset.training.memory import is_classifier
from hf_reset.training.response_rows import ResponseRows, ResponseRowsMixin

CALIBRATED = METRIC_NAMES[0]
_LABELS = ("labels", "label", "label_ids")


def row_source(
    trainer: Trainer, config: ResetConfig, *, judges_rows: bool = False, races: bool = False
) -> RowSource | None:
    """Have the Trainer's evaluations leave the losses of their rows behind, where something asks for them.

    `config.metric` "calibrated_loss" puts `with_calibrated_loss` around `compute_metrics`. Resets that begin on
    evidence, refinement, and races do the same for single-label classifiers, but add nothing to the metrics then.
    Resets of causal language models take the losses of responses, where the evaluation loss chooses.

    Args:
        trainer: its `compute_metrics` is wrapped.
        config: what asks.
        judges_rows: whether refinement asks too.
        races: whether evaluations are to be races against the anchor.

    Returns:
        What hands the rows over; None where nobody asks, or there are none to be had.

    Raises:
        MetricError: the calibrated loss is to choose anchors, and `prediction_loss_only` keeps the logits away.
    """
    own: Any = trainer.compute_metrics
    metric = (config.metric or trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
    by_name = metric == CALIBRATED
    if by_name and trainer.args.prediction_loss_only:
        raise MetricError(
            f'`metric` "eval_{CALIBRATED}" is worked out from logits, and `prediction_loss_only` is True. Set it to '
            'False, or choose anchors by "eval_loss".'
        )
    if isinstance(own, CalibratedMetrics):
        own.keeps_last = races
        return own
    on_evidence = config.can_reset and config.patience is None
    if not by_name and not ((judges_rows or races or on_evidence) and has_class_rows(trainer)):
        return _response_rows(trainer) if on_evidence and metric == "loss" else None
    source = CalibratedMetrics(own, adds_metrics=by_name)
    source.keeps_last = races
    trainer.compute_metrics = source  # pyright: ignore[reportAttributeAccessIssue]
    return source


def _response_rows(trainer: Trainer) -> ResponseRows | None:
    """Have a causal language model's evaluations leave the losses of their responses, where these can be had."""
    model: Any = trainer.model
    if not isinstance(trainer, ResponseRowsMixin) or not shifts_labels(model):
        return None
    trainer.numbers_eval_rows = True
    trainer.response_rows = ResponseRows()
    return trainer.response_rows


def judged_by(trainer: Trainer, config: ResetConfig) -> ResetConfig:
    """The configuration of a run that refines: it chooses by the calibrated loss where nobody named a metric.

    Refined targets make a model confident and right, which noisy cross-entropy charges it for: it chooses nothing new
    then (recipes/studies/README.md has the figures). Only single-label classifiers have a calibrated loss.
    """
    is_named = config.metric is not None or trainer.args.metric_for_best_model is not None
    return config if is_named or not has_class_rows(trainer) else replace(config, metric=f"eval_{CALIBRATED}")


def has_class_rows(trainer: Trainer) -> bool:
    """Whether evaluations give one row of logits and one class number an example, as far as can be told before."""
    if trainer.args.prediction_loss_only or trainer.args.batch_eval_metrics or trainer.eval_dataset is None:
        return False
    if isinstance(trainer.eval_dataset, dict) or trainer.preprocess_logits_for_metrics is not None:
        return False
    return is_classifier(trainer.model) and _label_is_class(trainer.eval_dataset)


def _label_is_class(dataset: Any) -> bool:
    """Whether the first row's label is one whole number; False where it cannot be looked at."""
    try:
        row = dataset[0]
        label = next(row[name] for name in _LABELS if name in row)
    except (StopIteration, TypeError, KeyError, IndexError):
        return False
    if getattr(label, "ndim", 0) != 0:
        return False
    value = label.item() if hasattr(label, "item") else label
    return isinstance(value, int) and not isinstance(value, bool)
