"""Planner, in pure numpy: how often to reset, and what went wrong with resets. In reading order:

* `excursions`: what a run's log says about the way from the anchor to the next better validation;
* `plan`: their hazard, and from it the probability and the period, online too;
* `recommendation`: what to choose next time, from a finished run;
* `advice`: the failure signatures of resets, in words and with the remedy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_reset.planner import advice, excursions, plan, recommendation
    from hf_reset.planner.plan import (
        BINS,
        LOWER,
        PRIOR,
        UPPER,
        Counts,
        Plan,
        best_resets_per_interval,
        counts_of,
        hazard,
        improvements_by_period,
        improvements_per_interval,
        luby,
        plan_after_evaluation,
        plan_after_reset,
    )
    from hf_reset.planner.recommendation import Recommendation, recommend

__all__ = [
    "BINS",
    "LOWER",
    "PRIOR",
    "UPPER",
    "Counts",
    "Plan",
    "Recommendation",
    "advice",
    "best_resets_per_interval",
    "counts_of",
    "excursions",
    "hazard",
    "improvements_by_period",
    "improvements_per_interval",
    "luby",
    "plan",
    "plan_after_evaluation",
    "plan_after_reset",
    "recommend",
    "recommendation",
]


def __getattr__(name: str) -> object:
    if name in ("advice", "excursions", "plan", "recommendation"):
        return importlib.import_module(f"hf_reset.planner.{name}")
    if name in __all__:
        room = "recommendation" if name in ("Recommendation", "recommend") else "plan"
        return getattr(importlib.import_module(f"hf_reset.planner.{room}"), name)
    raise AttributeError(f"module 'hf_reset.planner' has no attribute {name!r}")
