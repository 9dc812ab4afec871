"""What can be watched in a run: what it memorises, and its best weights beside its last.

Names load on first use, so that a part of this package that needs no Trainer does not import one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_reset.diagnostics.label_memory import LabelMemoryCallback
    from hf_reset.training.best_weights import BestWeightsCallback

_HOME = {
    "BestWeightsCallback": "hf_reset.training.best_weights",
    "LabelMemoryCallback": "hf_reset.diagnostics.label_memory",
}

__all__ = ["BestWeightsCallback", "LabelMemoryCallback"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hf_reset.diagnostics' has no attribute {name!r}")
