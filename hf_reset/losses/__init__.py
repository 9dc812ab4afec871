"""Losses that resist wrong labels, for class logits (N, C) and for tokens (B, T, V). In reading order:

* `robust`: each loss as a pure function, (logits, labels) → one value a row;
* `reduce`: the one reducer, which leaves out, shifts and divides for all of them;
* `by_name`: each loss as one number, and by its name for a `Trainer`;
* `memory`: losses that remember rows, (logits, labels, rows) → one value a row.

Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_reset.losses.by_name import (
        LOSSES,
        active_passive,
        compute_loss_func,
        cross_entropy,
        generalized_cross_entropy,
        hard_bootstrapping,
        shifts_labels,
        soft_bootstrapping,
        symmetric_cross_entropy,
    )
    from hf_reset.losses.memory import REMEMBERING_LOSSES, EarlyLearningRegularization, RowWeights
    from hf_reset.losses.reduce import Loss
    from hf_reset.losses.robust import label_log_probability, soft_target_rows

_HOME = {
    "LOSSES": "by_name",
    "REMEMBERING_LOSSES": "memory",
    "EarlyLearningRegularization": "memory",
    "Loss": "reduce",
    "RowWeights": "memory",
    "active_passive": "by_name",
    "compute_loss_func": "by_name",
    "cross_entropy": "by_name",
    "generalized_cross_entropy": "by_name",
    "hard_bootstrapping": "by_name",
    "label_log_probability": "robust",
    "shifts_labels": "by_name",
    "soft_bootstrapping": "by_name",
    "soft_target_rows": "robust",
    "symmetric_cross_entropy": "by_name",
}

__all__ = [
    "LOSSES",
    "REMEMBERING_LOSSES",
    "EarlyLearningRegularization",
    "Loss",
    "RowWeights",
    "active_passive",
    "compute_loss_func",
    "cross_entropy",
    "generalized_cross_entropy",
    "hard_bootstrapping",
    "label_log_probability",
    "shifts_labels",
    "soft_bootstrapping",
    "soft_target_rows",
    "symmetric_cross_entropy",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"hf_reset.losses.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hf_reset.losses' has no attribute {name!r}")
