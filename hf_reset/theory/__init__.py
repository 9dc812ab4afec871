"""Theory of stochastic resetting, pure numpy and scipy: when resets help, how often is best, and by how much.

* `first_passage`: Péclet number, mean first-passage times, the best rate, period and speed-up;
* `langevin`: what an optimizer's drift and diffusion are, and a simulator of the walk they make.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_reset.theory import first_passage, langevin
    from hf_reset.theory.first_passage import (
        OVERSHOOT,
        mean_first_passage_time,
        mean_time_from_samples,
        mean_time_periodic,
        mean_time_stepwise,
        optimal_period,
        optimal_reset_rate,
        peclet_number,
        probability_of,
        rate_of,
        speed_up,
        squared_variation,
        survival,
        survival_of_times,
    )

__all__ = [
    "OVERSHOOT",
    "first_passage",
    "langevin",
    "mean_first_passage_time",
    "mean_time_from_samples",
    "mean_time_periodic",
    "mean_time_stepwise",
    "optimal_period",
    "optimal_reset_rate",
    "peclet_number",
    "probability_of",
    "rate_of",
    "speed_up",
    "squared_variation",
    "survival",
    "survival_of_times",
]


def __getattr__(name: str) -> object:
    if name in ("first_passage", "langevin"):
        return importlib.import_module(f"hf_reset.theory.{name}")
    if name in __all__:
        return getattr(importlib.import_module("hf_reset.theory.first_passage"), name)
    raise AttributeError(f"module 'hf_reset.theory' has no attribute {name!r}")
