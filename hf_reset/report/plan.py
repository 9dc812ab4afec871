"""`hf-reset plan`: a finished run's recommendation as text and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_reset.planner.excursions import Excursion
from hf_reset.planner.plan import (
    BINS,
    LOWER,
    UPPER,
    Counts,
    counts_of,
    hazard,
    improvements_per_interval,
)
from hf_reset.planner.recommendation import Recommendation
from hf_reset.report.plots import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito, as in `plots`


def recommendation_text(advice: Recommendation, interval: int, metric: str) -> str:
    """The recommendation in a few lines, each choice with its 90 % range."""
    low, high = advice.probability_range
    rows = [
        ("probability", _per_step(advice.probability), f"{_per_step(low)} to {_per_step(high)}"),
        ("patience", f"{advice.patience} evaluations", _span(advice.patience_range)),
        ("evaluate every", f"{advice.evaluation_interval} steps", _span(advice.evaluation_interval_range)),
    ]
    lines = [f"  {name:<15} {value:<32} (90 %: {span})" for name, value, span in rows]
    head = (
        f"{advice.excursions} excursions by {metric}, evaluated every {interval} steps; "
        f"{advice.improvements} ended with a new best; hazard: {advice.hazard}."
    )
    return "\n".join([head, *lines, advice.reason])


def plot_plan(excursions: Sequence[Excursion], interval: int, advice: Recommendation, path: str | Path) -> Path:
    """Draw the hazard of a new best by age, and what each probability would make of it; returns the path.

    Args:
        excursions: of the run.
        interval: steps between its evaluations.
        advice: what `recommend` made of them.
        path: where the picture goes, its suffix says the format; its folder is made if need be.
    """
    figure = new_figure(8.8, 3.6)
    left, right = figure.subplots(1, 2)
    counts = counts_of(excursions, interval)
    _draw_hazard(left, counts, interval)
    _draw_gain(right, counts, interval, advice)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def wilson(hits: float, trials: float, z: float = 1.645) -> tuple[float, float]:
    """The 90 % interval of a share (E. B. Wilson 1927)."""
    share, widened = hits / trials, 1 + z**2 / trials
    middle = (share + z**2 / (2 * trials)) / widened
    half = z / widened * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return middle - half, middle + half


def _draw_hazard(axis: Axes, counts: Counts, interval: int) -> None:
    ages = np.arange(1, 2 ** (BINS - 1) + 1)
    axis.plot(ages * interval, hazard(counts)[: len(ages)], color=_BLUE, drawstyle="steps-mid", label="estimate")
    for at, (hits, trials) in enumerate(zip(counts.hits, counts.trials, strict=True)):
        if trials:
            age = interval * (1 if at == 0 else 0.75 * 2**at + 0.5)  # the middle of ages 1, 2, 3–4, 5–8, …
            bounds, label = wilson(hits, trials), "seen, with 90 % interval" if at == 0 else None
            axis.plot([age, age], bounds, color=_GREY, linewidth=1)
            axis.plot([age], [hits / trials], "o", color=_ORANGE, markersize=4, label=label)
    axis.set_xscale("log")
    axis.set_title("Is the next evaluation a new best?", fontsize=10)
    axis.set_xlabel("steps since the anchor", fontsize=9)
    axis.set_ylabel("chance an evaluation", fontsize=9)


def _draw_gain(axis: Axes, counts: Counts, interval: int, advice: Recommendation) -> None:
    rates = np.geomspace(LOWER, UPPER, 61)
    gains = improvements_per_interval(hazard(counts), rates) / interval * 1000
    axis.plot(rates / interval, gains, color=_BLUE, label="foretold")
    axis.axvspan(
        max(advice.probability_range[0], LOWER / interval),
        max(advice.probability_range[1], LOWER / interval),
        color=_GREY,
        alpha=0.2,
        label="90 % of resamples",
    )
    axis.axvline(max(advice.probability, LOWER / interval), color=_ORANGE, linestyle="--", label="recommended")
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_title("What a probability would find", fontsize=10)
    axis.set_xlabel("probability of a reset, per step", fontsize=9)
    axis.set_ylabel("new bests in 1000 steps", fontsize=9)


def _per_step(probability: float) -> str:
    return f"{probability:.2g} (every {1 / probability:.0f} steps)" if probability else "0 (no resets)"


def _span(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]} to {bounds[1]}"
