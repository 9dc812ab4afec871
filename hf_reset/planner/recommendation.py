"""What to choose next time, from a finished run's excursions: probability, patience and evaluation interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from hf_reset.errors import ConfigError
from hf_reset.planner.excursions import Excursion
from hf_reset.planner.plan import (
    ENOUGH_EXCURSIONS,
    ENOUGH_HITS,
    LOWER,
    UPPER,
    Array,
    Counts,
    best_resets_per_interval,
    trial_tables,
)


@dataclass(frozen=True)
class Recommendation:
    """What to choose next time, each with a 90 % bootstrap interval over excursions.

    Attributes:
        probability: r, per optimizer step; 0 where resets would not pay. With its range, as the others.
        patience: evaluations without a new best before resets begin.
        evaluation_interval: optimizer steps between evaluations.
        excursions: how many the advice rests on.
        improvements: how many of these ended with a new best.
        hazard: "falling", "rising" (or level: not enough of a fall for resets to pay), or "unknown".
        reason: in words.
    """

    probability: float
    probability_range: tuple[float, float]
    patience: int
    patience_range: tuple[int, int]
    evaluation_interval: int
    evaluation_interval_range: tuple[int, int]
    excursions: int
    improvements: int
    hazard: str
    reason: str

    def as_plain(self) -> dict[str, object]:
        """JSON-plain."""
        return asdict(self)


def recommend(excursions: Sequence[Excursion], interval: int, *, seed: int = 0, resamples: int = 200) -> Recommendation:
    """Probability, patience and evaluation interval from a run's excursions.

    The probability maximises improvements a step. The patience is what 9 of 10 improvements of the run needed: waiting
    longer is overfitting, waiting less mistakes a pause for the end. The interval gives a mean excursion two
    evaluations.

    Args:
        excursions: of the run, see `excursions_of`.
        interval: steps between its evaluations.
        seed: of the bootstrap.
        resamples: bootstrap resamples, at least 20.

    Raises:
        ConfigError: the interval or the resamples are too small.
    """
    if interval < 1 or resamples < 20:
        raise ConfigError(f"`interval` must be at least 1 and `resamples` 20, got {interval!r} and {resamples!r}.")
    tables, waits = trial_tables(excursions, interval), [_wait(excursion, interval) for excursion in excursions]
    rows = np.arange(len(excursions))
    chosen, patience, few = _choice(tables, waits, rows)
    rng = np.random.default_rng(seed)
    again = [_choice(tables, waits, rng.choice(rows, len(rows))) for _ in range(resamples)] if len(rows) else []
    low, high = np.quantile([LOWER, UPPER] if few else [draw[0] for draw in again], [0.05, 0.95]).tolist()
    least, most = np.quantile([draw[1] for draw in again] or [patience], [0.05, 0.95])
    shape = "unknown" if few else "rising" if chosen <= LOWER else "falling"
    spans = [interval if few else _interval_for(x, interval) for x in (high, chosen, low)]
    return Recommendation(
        probability=_probability(chosen, interval, shape),
        probability_range=(_probability(low, interval, shape), high / interval),
        patience=patience,
        patience_range=(math.floor(least), math.ceil(most)),
        evaluation_interval=spans[1],
        evaluation_interval_range=(min(spans), max(spans)),
        excursions=len(excursions),
        improvements=sum(excursion.improved for excursion in excursions),
        hazard=shape,
        reason=_reason(excursions, chosen / interval, shape),
    )


def _probability(resets_per_interval: float, interval: int, shape: str) -> float:
    """Per step; 0 at the lower bound, where the data speak against resets."""
    never = resets_per_interval <= LOWER and shape != "unknown"
    return 0.0 if never else resets_per_interval / interval


def _wait(excursion: Excursion, interval: int) -> int | None:
    """Evaluations that its improvement took, None without one."""
    return math.ceil(excursion.ages[-1] / interval) if excursion.improved else None


def _choice(
    tables: tuple[Array, Array], waits: Sequence[int | None], rows: NDArray[np.integer]
) -> tuple[float, int, bool]:
    """x and patience from some of the excursions, and whether these are too few."""
    hits, trials = (table[rows].sum(axis=0) for table in tables)
    counts = Counts(tuple(hits), tuple(trials), float(len(rows)))
    needed = [wait for row in rows if (wait := waits[row]) is not None]
    patience = max(1, math.ceil(np.quantile(needed, 0.9))) if needed else 2
    return best_resets_per_interval(counts), patience, not counts.say_enough


def _interval_for(resets_per_interval: float, interval: int) -> int:
    """Steps between evaluations that give a mean excursion two; as it is where resets do not pay."""
    return interval if resets_per_interval <= LOWER else max(1, round(interval / resets_per_interval / 2))


def _reason(excursions: Sequence[Excursion], probability: float, shape: str) -> str:
    improved = sum(excursion.improved for excursion in excursions)
    if shape == "unknown":
        return (
            f"{len(excursions)} excursions with {improved} improvements say too little: the probability is the "
            "prior's, a reset every two evaluations, and the best may lie anywhere in the range. It takes at least "
            f"{ENOUGH_EXCURSIONS:.0f} excursions and {ENOUGH_HITS:.0f} improvements: evaluate more often, or train "
            "longer."
        )
    if shape == "rising":
        return (
            f"New bests are not rarer late in an excursion than early ({improved} improvements in {len(excursions)} "
            "excursions): a reset would throw away progress. Do not reset; keep the best weights."
        )
    return (
        f"New bests come early in an excursion or not at all ({improved} improvements in {len(excursions)} "
        f"excursions): going back every {1 / probability:.0f} steps on average finds most new bests a step."
    )
