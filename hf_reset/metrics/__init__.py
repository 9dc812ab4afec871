"""Measures of a classifier under label noise: as functions of arrays, and as `evaluate.Metric` modules.

`functions` (accuracy, macro-F1, label memory), `calibrated` (the validation loss that noise cannot fool) and
`evaluation` (the `compute_metrics` that adds it), `sequential` (whether one mean is above another, told before all rows
are met), `modules` (the functions for `evaluate`).

The functions need numpy only; `evaluate` is imported when one of the modules is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_reset.metrics.calibrated import CalibratedLoss, calibrated_loss, calibrated_rows
    from hf_reset.metrics.evaluation import with_calibrated_loss
    from hf_reset.metrics.functions import accuracy, label_memory, macro_f1
    from hf_reset.metrics.modules import Accuracy, LabelMemory, MacroF1

_HOME = {
    "Accuracy": "hf_reset.metrics.modules",
    "CalibratedLoss": "hf_reset.metrics.calibrated",
    "LabelMemory": "hf_reset.metrics.modules",
    "MacroF1": "hf_reset.metrics.modules",
    "accuracy": "hf_reset.metrics.functions",
    "calibrated_loss": "hf_reset.metrics.calibrated",
    "calibrated_rows": "hf_reset.metrics.calibrated",
    "label_memory": "hf_reset.metrics.functions",
    "macro_f1": "hf_reset.metrics.functions",
    "with_calibrated_loss": "hf_reset.metrics.evaluation",
}

__all__ = [
    "Accuracy",
    "CalibratedLoss",
    "LabelMemory",
    "MacroF1",
    "accuracy",
    "calibrated_loss",
    "calibrated_rows",
    "label_memory",
    "macro_f1",
    "with_calibrated_loss",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hf_reset.metrics' has no attribute {name!r}")
