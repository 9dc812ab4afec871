"""Noise put into labels and responses on purpose, and what can be said of it."""

from __future__ import annotations

from hf_reset.noise.instructions import corrupt_responses
from hf_reset.noise.labels import corrupt_labels
from hf_reset.noise.matrices import (
    Learnability,
    empirical_matrix,
    learnability,
    noise_rate,
    pair_matrix,
    symmetric_matrix,
    transition_matrix,
)

__all__ = [
    "Learnability",
    "corrupt_labels",
    "corrupt_responses",
    "empirical_matrix",
    "learnability",
    "noise_rate",
    "pair_matrix",
    "symmetric_matrix",
    "transition_matrix",
]
