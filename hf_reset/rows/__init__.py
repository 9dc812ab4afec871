"""Rows: what a run knows of each training example, and what it does with it. In reading order:

* `identity`: which row each example of a batch is, through data set, loader and collator;
* `confident`: noise rates and the confusion of labels, estimated from predicted probabilities;
* `suspects`: the rows whose label looks wrong, ranked, as a table.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_reset.rows.confident import NoiseEstimate, estimate_noise
    from hf_reset.rows.suspects import find_suspects, rank_by_margin

_HOME = {
    "NoiseEstimate": "hf_reset.rows.confident",
    "estimate_noise": "hf_reset.rows.confident",
    "find_suspects": "hf_reset.rows.suspects",
    "rank_by_margin": "hf_reset.rows.suspects",
}

__all__ = ["NoiseEstimate", "estimate_noise", "find_suspects", "rank_by_margin"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hf_reset.rows' has no attribute {name!r}")
