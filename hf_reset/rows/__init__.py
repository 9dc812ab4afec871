"""Rows: what a run knows of each training example, and what it does with it. In reading order:

* `identity`: which row each example of a batch is, through data set, loader and collator;
* `visits`: what each step saw of its rows, shared among processes and replayed in order;
* `memory` and `responses`: what is kept of each row, for classes and for responses to prompts;
* `confident`: noise rates and the confusion of labels, estimated from predicted probabilities;
* `suspects`: the rows whose label or response looks wrong, ranked, as a table;
* `refinement`: what to train on in their place, and the limits to it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_reset.rows.confident import NoiseEstimate, estimate_noise
    from hf_reset.rows.memory import RowMemory
    from hf_reset.rows.refinement import Refinement, RefinementConfig, refine, refine_responses
    from hf_reset.rows.responses import ResponseMemory
    from hf_reset.rows.suspects import find_suspects, rank_by_margin, suspect_responses, suspects_of

_HOME = {
    "NoiseEstimate": "hf_reset.rows.confident",
    "Refinement": "hf_reset.rows.refinement",
    "RefinementConfig": "hf_reset.rows.refinement",
    "ResponseMemory": "hf_reset.rows.responses",
    "RowMemory": "hf_reset.rows.memory",
    "estimate_noise": "hf_reset.rows.confident",
    "find_suspects": "hf_reset.rows.suspects",
    "rank_by_margin": "hf_reset.rows.suspects",
    "refine": "hf_reset.rows.refinement",
    "refine_responses": "hf_reset.rows.refinement",
    "suspect_responses": "hf_reset.rows.suspects",
    "suspects_of": "hf_reset.rows.suspects",
}

__all__ = [
    "NoiseEstimate",
    "Refinement",
    "RefinementConfig",
    "ResponseMemory",
    "RowMemory",
    "estimate_noise",
    "find_suspects",
    "rank_by_margin",
    "refine",
    "refine_responses",
    "suspect_responses",
    "suspects_of",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hf_reset.rows' has no attribute {name!r}")
