"""What can be watched in a run: what it memorises, which gradients pull at it, how it drifts and spreads.

Names load on first use, so that a part of this package that needs no Trainer does not import one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_reset.diagnostics.diffusion import ExcursionDiffusionCallback
    from hf_reset.diagnostics.gradients import GradientPartsCallback
    from hf_reset.diagnostics.label_memory import LabelMemoryCallback
    from hf_reset.training.best_weights import BestWeightsCallback

_HOME = {
    "ExcursionDiffusionCallback": "hf_reset.diagnostics.diffusion",
    "GradientPartsCallback": "hf_reset.diagnostics.gradients",
    "BestWeightsCallback": "hf_reset.training.best_weights",
    "LabelMemoryCallback": "hf_reset.diagnostics.label_memory",
}

__all__ = ["BestWeightsCallback", "ExcursionDiffusionCallback", "GradientPartsCallback", "LabelMemoryCallback"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hf_reset.diagnostics' has no attribute {name!r}")
