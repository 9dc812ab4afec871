"""Measures of a classifier under label noise: as functions of arrays, and as ``evaluate.Metric`` modules.

The functions need numpy only; ``evaluate`` is imported when one of the modules is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_reset.metrics.functions import accuracy, label_memory, macro_f1
    from hf_reset.metrics.modules import Accuracy, LabelMemory, MacroF1

_HOME = {
    "Accuracy": "hf_reset.metrics.modules",
    "LabelMemory": "hf_reset.metrics.modules",
    "MacroF1": "hf_reset.metrics.modules",
    "accuracy": "hf_reset.metrics.functions",
    "label_memory": "hf_reset.metrics.functions",
    "macro_f1": "hf_reset.metrics.functions",
}

__all__ = ["Accuracy", "LabelMemory", "MacroF1", "accuracy", "label_memory", "macro_f1"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hf_reset.metrics' has no attribute {name!r}")
