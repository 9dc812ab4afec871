"""Losses that resist wrong labels, for class logits (N, C) and for tokens (B, T, V).

* `robust`: cross-entropy, GCE and SCE, and how to name one for a `Trainer`.

Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_reset.losses.robust import (
        LOSSES,
        compute_loss_func,
        cross_entropy,
        generalized_cross_entropy,
        label_log_probability,
        shifts_labels,
        symmetric_cross_entropy,
    )

_HOME = {
    "LOSSES": "hf_reset.losses.robust",
    "compute_loss_func": "hf_reset.losses.robust",
    "cross_entropy": "hf_reset.losses.robust",
    "generalized_cross_entropy": "hf_reset.losses.robust",
    "label_log_probability": "hf_reset.losses.robust",
    "shifts_labels": "hf_reset.losses.robust",
    "symmetric_cross_entropy": "hf_reset.losses.robust",
}

__all__ = [
    "LOSSES",
    "compute_loss_func",
    "cross_entropy",
    "generalized_cross_entropy",
    "label_log_probability",
    "shifts_labels",
    "symmetric_cross_entropy",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hf_reset.losses' has no attribute {name!r}")
