"""How often to reset, from what a run has shown: excursions → hazard → probability.

The evaluations of an excursion are trials: the hazard at age k is the chance that an evaluation k intervals after the
anchor is a new best, none before it having been one. By renewal theory a hazard gives the improvements a step
of any way to reset; a falling one says reset sooner, a rising one says do not.

Ages are counted in evaluation intervals, since nothing is seen between two evaluations, and x = r · interval is the
resets an interval. The hazard is constant within ages 1, 2, 3–4, 5–8, …, and weakly held to a prior: shapes of first
passages at several Péclet numbers, at the run's own height, weighed by how well they fit, and most of them diffusive;
together best at x = 1/2. One falling shape alone would call ages that resets seldom let an excursion reach hopeless,
however high the hazard is before them. Everything is a pure function of plain values, so all
ranks choose the same without talking, and a resumed run repeats its choices.

References:
    S. Ray, D. Mondal, S. Reuveni, J. Phys. A 52 (2019) 255002, arXiv 1811.08239, for restart and the hazard's fall.
    M. Luby, A. Sinclair, D. Zuckerman, "Optimal speedup of Las Vegas algorithms", Inf. Process. Lett. 47 (1993) 173.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_reset.errors import ConfigError
from hf_reset.planner.excursions import Excursion

Array: TypeAlias = NDArray[np.floating]

# Resets an evaluation interval, x: no choice is outside the bounds. Above 1 most excursions would never be evaluated.
PRIOR, LOWER, UPPER = 1 / 2, 1 / 32, 1.0
BINS = 8  # ages 1, 2, 3–4, …, 65 and more
# Labels of which a share τ is wrong at random cost any model H(τ) nats at least. A calibrated validation loss below
# H(1/10) shows that fewer are: there is little to save a run from, and LOWER stands where nothing else is known.
CLEAN = 0.325
ENOUGH_HITS, ENOUGH_EXCURSIONS = 3.0, 8.0  # below either, nothing can be said and the prior stands
_FORGETTING = 0.98  # of what is known, at each excursion's end: half is gone after 34, since the anchor moves on
_PRIOR_HITS = 2.0  # what a bin's prior weighs, in improvements
_GRID = 2.0 ** np.arange(-5, 0.125, 0.25)
_AGES = np.arange(1, 257)
_BIN_OF_AGE = np.minimum([(int(k) - 1).bit_length() for k in _AGES], BINS - 1)


def luby(i: int) -> int:
    """The i-th term (from 1) of 1, 1, 2, 1, 1, 2, 4, 1, …: excursions that need no estimate.

    Within a logarithmic factor of the best schedule for any distribution of first-passage times (Luby et al. 1993).

    Raises:
        ConfigError: i is below 1.
    """
    if i < 1:
        raise ConfigError(f"`i` must be at least 1, got {i!r}. The sequence begins with its first term.")
    while (i + 1) & i:  # not yet the last of a block of 2^k − 1 terms
        i -= (1 << (i.bit_length() - 1)) - 1
    return (i + 1) // 2


# ---------------------------------------------------------------------------------------------- hazard and renewal


@dataclass(frozen=True)
class Counts:
    """Trials and improvements by age, (BINS,) each: what a hazard is estimated from."""

    hits: tuple[float, ...] = (0.0,) * BINS
    trials: tuple[float, ...] = (0.0,) * BINS
    excursions: float = 0.0

    def after(self, age: int, interval: int, improved: bool) -> Counts:
        """With one evaluation more, `age` steps into an excursion."""
        at = _bin(age, interval)
        hits, trials = list(self.hits), list(self.trials)
        hits[at] += improved
        trials[at] += 1
        return replace(self, hits=tuple(hits), trials=tuple(trials))

    def with_excursion(self, forgetting: float = 1.0) -> Counts:
        """With one evaluated excursion more ended, and all before it forgotten a little."""
        return Counts(
            tuple(forgetting * value for value in self.hits),
            tuple(forgetting * value for value in self.trials),
            forgetting * self.excursions + 1,
        )

    @property
    def say_enough(self) -> bool:
        """Whether there are excursions and improvements enough to say anything."""
        return sum(self.hits) >= ENOUGH_HITS and self.excursions >= ENOUGH_EXCURSIONS


def counts_of(excursions: Sequence[Excursion], interval: int) -> Counts:
    """The trials of all excursions, none forgotten."""
    hits, trials = trial_tables(excursions, interval)
    return Counts(tuple(hits.sum(axis=0).tolist()), tuple(trials.sum(axis=0).tolist()), float(len(excursions)))


def trial_tables(excursions: Sequence[Excursion], interval: int) -> tuple[Array, Array]:
    """Improvements and trials, (excursions, BINS) each."""
    hits, trials = np.zeros((len(excursions), BINS)), np.zeros((len(excursions), BINS))
    for row, excursion in enumerate(excursions):
        bins = [_bin(age, interval) for age in excursion.ages]
        np.add.at(trials[row], bins, 1)
        hits[row, bins[-1]] += excursion.improved
    return hits, trials


def _bin(age: int, interval: int) -> int:
    return min((math.ceil(age / interval) - 1).bit_length(), BINS - 1)


def hazard(counts: Counts) -> Array:
    """The hazard by age, (256,), at intervals 1, 2, …: chance that an evaluation of that age is a new best.

    Gamma–Poisson: a bin with s improvements in n trials, where the prior expects m a trial, has
    m (s + κ)/(n m + κ), κ = 2. m is the mean over the prior's shapes, each at the height of the run's improvements, by
    prior weight times likelihood.
    """
    hits, trials = np.array(counts.hits), np.array(counts.trials)
    height = (hits.sum() + 1) / (_SHAPES @ trials + 1)
    each_shape = np.minimum(height[:, None] * _SHAPES, 0.95)
    fit = np.log(each_shape) @ hits + np.log1p(-each_shape) @ (trials - hits) + _LOG_WEIGHTS
    weights = np.exp(fit - fit.max())
    expected = weights @ each_shape / weights.sum()
    each = expected * (hits + _PRIOR_HITS) / (trials * expected + _PRIOR_HITS)
    return np.minimum(each, 0.999)[_BIN_OF_AGE]


def improvements_per_interval(hazard: Array, resets_per_interval: Array) -> Array:
    """Improvements an evaluation interval under resets at rate x: x G/(1 − G), G = E[e^(−x K)], K the first passage.

    Args:
        hazard: (ages,); beyond them the last value holds.
        resets_per_interval: x > 0, (rates,).

    Returns:
        (rates,).
    """
    x = np.asarray(resets_per_interval, dtype=float)[:, None]
    alive = np.concatenate([[1.0], np.cumprod(1 - hazard)])
    ages = np.arange(1, len(hazard) + 1)
    passed = (np.exp(-x * ages) * (alive[:-1] * hazard)).sum(axis=1)
    last, x = hazard[-1], x[:, 0]
    tail = alive[-1] * np.exp(-x * len(hazard)) * last * np.exp(-x) / (1 - (1 - last) * np.exp(-x))
    transform = passed + tail
    return x * transform / np.maximum(1 - transform, 1e-300)


def improvements_by_period(hazard: Array) -> Array:
    """Improvements an interval with a reset every K = 1, 2, … intervals: P(T <= K) / E[min(T, K)], (ages,)."""
    alive = np.concatenate([[1.0], np.cumprod(1 - hazard)])
    return (1 - alive[1:]) / np.cumsum(alive[:-1])


def best_resets_per_interval(counts: Counts, *, periodic: bool = False, prior: float = PRIOR) -> float:
    """The x within the bounds that makes improvements a step most; `prior` where too little is known."""
    if not counts.say_enough:
        return prior
    if periodic:
        rates = improvements_by_period(hazard(counts))[: round(1 / LOWER)]
        return 1 / (1 + int(np.round(rates / rates.max(), 9).argmax()))
    rates = improvements_per_interval(hazard(counts), _GRID)
    return float(_GRID[np.round(rates / rates.max(), 9).argmax()])  # rounded: the same on every machine


# ---------------------------------------------------------------------------------------------------------- online


@dataclass(frozen=True)
class Plan:
    """What `probability="auto"` knows and has chosen: JSON-plain, part of the saved state.

    Attributes:
        probability: r in use; None before the first evaluation has told the interval.
        interval: optimizer steps between the first two evaluations.
        start: steps done when the current excursion started.
        evaluated: whether the current excursion has had an evaluation.
        counts: of the excursions so far, older ones forgotten by and by.
        loss: the calibrated loss of the validation labels at the anchor, in nats; None: not known.
    """

    probability: float | None = None
    interval: int | None = None
    start: int = 0
    evaluated: bool = False
    counts: Counts = Counts()
    loss: float | None = None

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Plan:
        """A plan from what `asdict` and JSON made of it."""
        counts = values["counts"]
        known = Counts(tuple(counts["hits"]), tuple(counts["trials"]), counts["excursions"])
        return cls(**{**values, "counts": known})


def plan_after_evaluation(
    plan: Plan,
    step: int,
    *,
    improved: bool,
    first: bool,
    periodic: bool = False,
    counted: bool = True,
    loss: float | None = None,
) -> Plan:
    """Take in one evaluation, and choose the probability anew.

    Where labels are clean, by their loss at the anchor (`CLEAN`), there is little that resets save a run from, and the
    lower bound stands until excursions say otherwise.

    Args:
        plan: what is known so far.
        step: optimizer steps done.
        improved: whether it was a new best.
        first: whether it was the first best: there was no anchor to start from.
        periodic: whether resets come every round(1/r) steps rather than by chance.
        counted: whether resets have begun. Before, a run learns what is easy, each evaluation better than the last,
            and says nothing of what excursions find.
        loss: the calibrated loss of the validation labels, in nats; None: not known.
    """
    age = step - plan.start
    if plan.interval is None and age > 0:
        plan = replace(plan, interval=age)
    if improved:
        plan = replace(plan, loss=loss)
    interval = plan.interval
    if interval is None or age <= 0:
        return replace(plan, start=step) if improved else plan
    if counted and not first:
        plan = replace(plan, counts=plan.counts.after(age, interval, improved), evaluated=True)
    if improved:
        plan = _excursion_ended(plan, step)
    prior = LOWER if plan.loss is not None and plan.loss < CLEAN else PRIOR
    chosen = best_resets_per_interval(plan.counts, periodic=periodic, prior=prior)
    return replace(plan, probability=chosen / interval)


def plan_after_reset(plan: Plan, step: int) -> Plan:
    """The excursion is censored; `step` steps are done, the last of which ended in the reset."""
    return _excursion_ended(plan, step)


def _excursion_ended(plan: Plan, step: int) -> Plan:
    counts = plan.counts.with_excursion(_FORGETTING) if plan.evaluated else plan.counts
    return replace(plan, counts=counts, start=step, evaluated=False)


def _passage_hazard(peclet: float, length: float) -> Array:
    """Hazard of a first passage with L²/D = `length` intervals, mean of each bin (BINS,); T is inverse Gaussian."""
    alive = [1.0]
    for k in range(1, len(_AGES) + 1):
        drifted, spread = 2 * peclet * k / length, 2 * math.sqrt(k / length)
        late = math.erfc((drifted - 1) / spread) - math.exp(2 * peclet) * math.erfc((drifted + 1) / spread)
        if late / 2 < 1e-6 * alive[-1] or alive[-1] < 1e-9:  # nobody is left to tell: the last hazard holds
            break
        alive.append(late / 2)
    found = 1 - np.array(alive[1:]) / np.array(alive[:-1])
    found = np.concatenate([found, np.full(len(_AGES) - len(found), found[-1])])
    return np.array([found[b == _BIN_OF_AGE].mean() for b in range(BINS)])


# (Pe, L²/D in intervals): prior weight. Together they are best at the prior's x where improvements are rare. Settled on
# simulated walks of Pe −0.3 to 2: `auto` within a factor of two of the best, and at its lower bound from Pe 1 on.
_PASSAGES: dict[tuple[float, float], float] = {
    (0.0, 1.75): 0.5,
    (0.0, 10.0): 0.15,
    (-0.5, 3.0): 0.15,
    (-0.5, 10.0): 0.1,
    (0.5, 3.0): 0.025,
    (1.0, 3.0): 0.025,
    (1.0, 10.0): 0.025,
    (2.0, 10.0): 0.025,
}
_SHAPES = np.array([_passage_hazard(*shape) for shape in _PASSAGES])
_LOG_WEIGHTS = np.log(list(_PASSAGES.values()))
