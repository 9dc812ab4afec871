"""First-passage theory of stochastic resetting: when resets help, how often is best, and by how much.

A run is a particle on a line: a distance L from the target, a drift v towards it, a diffusion D around it, and with
a rate r it is put back to where it started. Time is counted in optimizer steps and lengths in the norm of the
parameters, so drift is length a step and diffusion length² a step. In the paper's symbols (Bae, Song, Jeong 2025,
arXiv 2406.00396, section 2): dθ = v dt + √(2D) dW, with Pe = L v / (2D).

In order: the closed forms in continuous time, the forms in which resets come at the ends of whole steps, the same
from observed times without any model, what an optimizer's drift and diffusion are, and a simulator for all of it.

References:
    M. R. Evans, S. N. Majumdar, "Diffusion with stochastic resetting", PRL 106 (2011) 160601, arXiv 1102.2704.
    S. Ray, D. Mondal, S. Reuveni, "Péclet number governs transition to acceleratory restart in drift-diffusion",
    J. Phys. A 52 (2019) 255002, arXiv 1811.08239.
    I. Eliazar, S. Reuveni, "Mean-performance of sharp restart I", J. Phys. A 53 (2020) 405004, arXiv 2003.14116.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import exprel, log_ndtr

from hf_reset.errors import ConfigError, DataError

Array: TypeAlias = NDArray[np.floating]
Floats: TypeAlias = "float | Array"

# Random-walk steps look at the target only when they end, so a walk passes it by this much on average, in standard
# deviations of a step: −ζ(1/2)/√(2π) (D. Siegmund 1979).
OVERSHOOT = 0.5825971579390106


def peclet_number(distance: ArrayLike, drift: ArrayLike, diffusion: ArrayLike) -> Floats:
    """Pe = L v / (2D): below 1 resets help, at 1 and above they do not; at 0 and below nothing else arrives.

    Args:
        distance: L > 0, from where resets go back to, to the target. Arguments broadcast.
        drift: v, towards the target where positive, in lengths a step.
        diffusion: D > 0, in lengths² a step.

    Returns:
        A float for plain numbers, else an array.

    Raises:
        ConfigError: an argument is not finite, or distance or diffusion is not above 0.
    """
    length, v, d = _line(distance, drift, diffusion)
    with np.errstate(over="ignore", under="ignore"):
        return _plain(length / d * (v / 2))


def mean_first_passage_time(distance: ArrayLike, drift: ArrayLike, diffusion: ArrayLike, rate: ArrayLike) -> Floats:
    """Mean steps to the target with resets at rate r: (1/r) [exp(L (√(v² + 4Dr) − v) / (2D)) − 1].

    Without resets L/v, and infinite for a drift that is zero or leads away. Ray, Mondal, Reuveni 2019, equation 6.

    Args:
        distance: L > 0. Arguments broadcast.
        drift: v, towards the target where positive.
        diffusion: D > 0.
        rate: r >= 0, resets a step in continuous time. See `rate_of` for a probability a step.

    Returns:
        A float for plain numbers, else an array; infinite where it is too large for a float.

    Raises:
        ConfigError: an argument is not finite, distance or diffusion is not above 0, or the rate is below 0.
    """
    length, v, d = _line(distance, drift, diffusion)
    r = _finite("rate", rate)
    if (r < 0).any():
        raise ConfigError(f"`rate` must be at least 0, got {rate!r}. It is resets a step; 0 never resets.")
    with np.errstate(all="ignore"):
        root = np.hypot(v, 2 * np.sqrt(r) * np.sqrt(d))
        pace = 2 * length / (v + root)  # has no difference of near-equal numbers for v >= 0
        towards = pace * exprel(r * pace)
        away = np.expm1(length / d * ((root - v) / 2)) / r
        free = np.where(v > 0, length / v, np.inf)
        return _plain(np.where(r == 0, free, np.where(v >= 0, towards, away)))


def optimal_reset_rate(distance: ArrayLike, drift: ArrayLike, diffusion: ArrayLike) -> Floats:
    """r* that makes the mean first-passage time least; 0 where resets cannot help (Pe >= 1).

    With g = L (√(v² + 4Dr) − v)/(2D), the optimum has Pe = g (2u − g) / (2 (g − u)), u = 1 − e^(−g), which falls
    from 1 as g grows; r* = 2 (g + Pe) u D/L². At v = 0, r* = 2.5396 D/L².

    Args, Raises: as `peclet_number`.

    Returns:
        Resets a step, in continuous time: a float for plain numbers, else an array.
    """
    length, _, d = _line(distance, drift, diffusion)
    pe = np.asarray(peclet_number(distance, drift, diffusion))
    g = np.vectorize(_best_exponent, otypes=[float])(pe)
    with np.errstate(all="ignore"):
        scaled = np.where(pe < 1, -2 * (g + pe) * np.expm1(-g), 0.0)
        return _plain(np.where(scaled > 0, scaled * (d / length) / length, 0.0))


def speed_up(distance: ArrayLike, drift: ArrayLike, diffusion: ArrayLike) -> Floats:
    """T_0 / T*: how many times sooner the best rate arrives than no resets. 1 for Pe >= 1, infinite for Pe <= 0."""
    free = np.asarray(mean_first_passage_time(distance, drift, diffusion, 0.0))
    rate = optimal_reset_rate(distance, drift, diffusion)
    best = np.asarray(mean_first_passage_time(distance, drift, diffusion, rate))
    with np.errstate(all="ignore"):
        return _plain(np.where(np.isinf(free), np.inf, np.where(np.asarray(rate) > 0, free / best, 1.0)))


def rate_of(probability: float) -> float:
    """The continuous rate of which a step survives as often as with `probability` a step: −log(1 − p)."""
    return -math.log1p(-_probability(probability)) if probability < 1 else math.inf


def probability_of(rate: float) -> float:
    """The probability a step that goes with a continuous `rate`: 1 − exp(−r)."""
    if not rate >= 0:
        raise ConfigError(f"`rate` must be at least 0, got {rate!r}.")
    return -math.expm1(-rate)


# ------------------------------------------------------------------------------------------ resets at whole steps


def survival(time: ArrayLike, distance: float, drift: float, diffusion: float) -> Array:
    """P(T > t) without resets: T is inverse Gaussian. Same shape as `time` (steps, at least 0)."""
    return -np.expm1(_log_arrived(np.asarray(time, dtype=float), *_scalars(distance, drift, diffusion)))


def mean_time_stepwise(distance: float, drift: float, diffusion: float, probability: float) -> float:
    """Mean whole steps to the target when each step that does not arrive ends in a reset with `probability` p.

    The particle moves continuously; a step in which it arrives is counted whole and not reset: with z = 1 − p and
    N = ⌈T⌉, (z/p) (1 − G(z))/G(z), G(z) = E[z^N] = 1 − p Σ_n z^n P(T > n). Near `mean_first_passage_time` at
    `rate_of(p)` where p and the step are small. Without resets, the mean of N.

    Args:
        distance, drift, diffusion: as `peclet_number`, plain numbers.
        probability: p in [0, 1].

    Raises:
        ConfigError: an argument has a value it cannot have.
    """
    line = _scalars(distance, drift, diffusion)
    p = _probability(probability)
    if p == 0:
        return math.inf if drift <= 0 else _sum_of_survival(line, 0.0)
    if p == 1:
        log_arrival = float(_log_arrived(np.array(1.0), *line))
        return _exp(-log_arrival)
    weight = _sum_of_survival(line, -math.log1p(-p))  # Σ z^n P(T > n) = (1 − G)/p
    return _ratio(weight * (1 - p), 1 - p * weight)


def mean_time_periodic(distance: float, drift: float, diffusion: float, period: float) -> float:
    """Mean time to the target with a reset every `period` steps: E[min(T, τ)] / P(T <= τ) ("sharp" restart).

    Args:
        distance, drift, diffusion: as `peclet_number`, plain numbers.
        period: τ > 0, in steps; infinity for no resets.

    Raises:
        ConfigError: an argument has a value it cannot have.
    """
    line = _scalars(distance, drift, diffusion)
    if not period > 0:
        raise ConfigError(f"`period` must be above 0, got {period!r}. It is the steps between two resets.")
    if math.isinf(period):
        return float(mean_first_passage_time(*line, 0.0))
    return _exp(_log_mean_periodic(float(period), line))


def optimal_period(distance: float, drift: float, diffusion: float) -> float:
    """τ* that makes `mean_time_periodic` least; infinite where no period helps.

    The hazard of T ends at v²/(4D), so a late reset helps as long as 4D/v² > L/v: up to Pe = 2, where a
    probability has long (Pe >= 1) ceased to help. Never below the best probability in speed (arXiv 2003.14116).
    """
    line = _scalars(distance, drift, diffusion)
    pe = float(peclet_number(*line))
    if pe >= 2:
        return math.inf
    scale = distance / diffusion * distance / max(1.0, -2 * pe)
    times = np.geomspace(scale * 1e-3, scale * 1e3, 121)
    # In logarithms: with a strong drift away the times themselves are too large for a float.
    values = np.array([_log_mean_periodic(tau, line) for tau in times])
    at = int(np.clip(values.argmin(), 1, len(times) - 2))
    found = minimize_scalar(
        lambda x: _log_mean_periodic(math.exp(x), line),
        bounds=(math.log(times[at - 1]), math.log(times[at + 1])),
        method="bounded",
        options={"xatol": 1e-9},
    )
    free = math.log(distance / drift) if drift > 0 else math.inf
    return math.exp(found.x) if found.fun < free - 1e-12 else math.inf


# ------------------------------------------------------------------------------------------------ without a model


def survival_of_times(times: ArrayLike, censored: ArrayLike | None = None) -> Array:
    """P(T > n) for n = 0 … longest time, from observed whole times: the product-limit estimate (Kaplan, Meier 1958).

    Args:
        times: (observations,) steps until the target, or until observation ended; whole, at least 1.
        censored: (observations,) True where observation ended before the target. None: nowhere.

    Returns:
        (longest time + 1,), from 1 downwards; it ends at 0 unless the longest times are censored.

    Raises:
        DataError: no times, a time that is not a whole number of at least 1, or flags of another length.
    """
    steps, open_ended = checked_times(times, censored)
    length = int(steps.max()) + 1
    arrived = np.bincount(steps[~open_ended], minlength=length)
    at_risk = len(steps) - np.cumsum(np.bincount(steps, minlength=length)) + np.bincount(steps, minlength=length)
    return np.cumprod(1 - arrived / np.maximum(at_risk, 1))


def mean_time_from_samples(
    times: ArrayLike, *, probability: float | None = None, period: int | None = None, censored: ArrayLike | None = None
) -> float:
    """Mean steps to the target under a reset protocol, from times observed without resets (or censored by them).

    With `probability` p: ((1 − p)/p) (1 − G(1 − p))/G(1 − p), G(z) = E[z^T]. With `period` τ: E[min(T, τ)] /
    P(T <= τ). With neither: without resets. What was never seen to arrive never arrives: beyond the longest time
    the estimate holds no hope, so that censored samples give a mean that is too large rather than too small.

    Args:
        times, censored: as `survival_of_times`.
        probability: p in [0, 1], of a reset after a step that does not arrive.
        period: τ >= 1, whole steps between two resets.

    Returns:
        Steps; infinite where the target was not seen to be reached that way.

    Raises:
        DataError: as `survival_of_times`.
        ConfigError: both protocols, or one with a value it cannot have.
    """
    if probability is not None and period is not None:
        raise ConfigError(f"give `probability` or `period`, not both: got {probability!r} and {period!r}.")
    alive = survival_of_times(times, censored)
    if period is not None:
        if period < 1 or period != int(period):
            raise ConfigError(f"`period` must be a whole number of at least 1, got {period!r}.")
        last = min(int(period), len(alive) - 1)
        held = float(alive[:last].sum() + max(int(period) - last, 0) * alive[-1])
        return _ratio(held, 1 - float(alive[last]))
    p = _probability(probability or 0.0)
    if p == 0:
        return math.inf if alive[-1] > 0 else float(alive.sum())
    return _ratio((1 - p) * _discounted(alive, p), 1 - p * _discounted(alive, p)) if p < 1 else _ratio(1, 1 - alive[1])


def squared_variation(times: ArrayLike) -> float:
    """CV², the variance of uncensored times over their squared mean; above 1 a reset now and then helps (1/Pe)."""
    steps, _ = checked_times(times, None)
    return float(steps.var() / steps.mean() ** 2)


def checked_times(times: ArrayLike, censored: ArrayLike | None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Observed times and flags as arrays of one shape (observations,); the errors of `survival_of_times`."""
    values = np.asarray(times, dtype=float)
    if values.ndim != 1 or not values.size:
        raise DataError(f"`times` must be a list of at least one time, got the shape {values.shape}.")
    if not (np.isfinite(values).all() and (values >= 1).all() and (values == np.floor(values)).all()):
        raise DataError("`times` must be whole numbers of steps of at least 1. Count the step that arrives.")
    flags = np.zeros(len(values), dtype=bool) if censored is None else np.asarray(censored, dtype=bool)
    if flags.shape != values.shape:
        raise DataError(f"`censored` must have one flag a time: got {flags.shape} flags for {values.shape} times.")
    return values.astype(np.int64), flags


# --------------------------------------------------------------------------------------------------- private parts


def _best_exponent(pe: float) -> float:
    """The g of `optimal_reset_rate` at one Péclet number."""
    if pe >= 1:
        return 0.0
    if pe < -20:  # e^(−g) is nothing beside 1
        return (1 - pe) + math.hypot(1, pe)
    root: Any = brentq(lambda g: _gap(g) - (1 - pe), 1e-300, 50.0, xtol=1e-300)
    return float(root)


def _gap(g: float) -> float:
    """1 − Pe at the optimum with exponent g, by series where the closed form is a difference of near-equals."""
    if g < 0.5:
        terms = [(-1) ** n * g ** (n - 2) / math.factorial(n) for n in range(2, 20)]
        return sum((1 - n) * t for n, t in enumerate(terms, start=2) if n > 2) / sum(terms)
    u = -math.expm1(-g)
    return 1 - g * (2 * u - g) / (2 * (g - u))


def _log_arrived(time: Array, length: float, v: float, d: float) -> Array:
    """log P(T <= t)."""
    with np.errstate(all="ignore"):
        spread = np.sqrt(2 * d * time)
        behind = log_ndtr((v * time - length) / spread)
        reflected = length / d * v + log_ndtr(-(v * time + length) / spread)
        both = np.logaddexp(behind, reflected)
    return np.where(time > 0, np.minimum(both, 0.0), -np.inf)


def _log_mean_periodic(period: float, line: tuple[float, float, float]) -> float:
    edges = np.concatenate([[0.0], np.geomspace(period * 1e-18, period, 61)])
    held = _integral(lambda t: -np.expm1(_log_arrived(t, *line)), _with_front(edges, *line))
    return math.log(held) - float(_log_arrived(np.array(period), *line))


def _sum_of_survival(line: tuple[float, float, float], decay: float) -> float:
    """Σ_{n >= 0} e^(−decay·n) P(T > n): term by term at first, then as an integral over half-shifted blocks."""
    first = 4096
    n = np.arange(first, dtype=float)
    total = float((np.exp(-decay * n) * survival(n, *line)).sum())
    edges = first * 2.0 ** np.arange(0, 1 + (60 if decay == 0 else math.ceil(math.log2(max(2.0, 60 / decay))))) - 0.5
    return total + _integral(lambda t: np.exp(-decay * t) * survival(t, *line), _with_front(edges, *line))


def _integral(function: Callable[[Array], Array], edges: Array) -> float:
    """Gauss–Legendre with 64 nodes between each two edges."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    half = np.diff(edges)[:, None] / 2
    points = edges[:-1, None] + half * (nodes + 1)
    return float((half * weights * function(points)).sum())


def _with_front(edges: Array, length: float, v: float, d: float) -> Array:
    """More edges about L/v, where survival falls within a small share of the time if Pe is large."""
    pe = length / d * v / 2
    if pe < 10:
        return edges
    front = length / v * (1 + np.arange(-8, 9) / math.sqrt(pe))
    return np.unique(np.concatenate([edges, front[(front > edges[0]) & (front < edges[-1])]]))


def _discounted(alive: Array, p: float) -> float:
    """Σ_n (1 − p)^n P(T > n), the last value held for ever."""
    powers = np.exp(np.arange(len(alive)) * math.log1p(-p))
    return float((powers * alive).sum() + alive[-1] * powers[-1] * (1 - p) / p)


def _ratio(steps: float, chance: float) -> float:
    return steps / chance if chance > 1e-15 else math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _line(distance: ArrayLike, drift: ArrayLike, diffusion: ArrayLike) -> tuple[Array, Array, Array]:
    return _positive("distance", distance), _finite("drift", drift), _positive("diffusion", diffusion)


def _scalars(distance: float, drift: float, diffusion: float) -> tuple[float, float, float]:
    length, v, d = _line(distance, drift, diffusion)
    return float(length), float(v), float(d)


def _positive(name: str, value: ArrayLike) -> Array:
    array = _finite(name, value)
    if not (array > 0).all():
        meaning = {"distance": "how far the target lies", "diffusion": "the noise of a step, e.g. η² s²/(2B)"}
        raise ConfigError(f"`{name}` must be above 0, got {value!r}. It is {meaning.get(name, 'a size')}.")
    return array


def _finite(name: str, value: ArrayLike) -> Array:
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        array = np.array(math.nan)
    if not np.isfinite(array).all():
        raise ConfigError(f"`{name}` must be a finite number, got {value!r}.")
    return array


def _probability(value: float) -> float:
    if not 0 <= value <= 1:
        raise ConfigError(f"`probability` must be in [0, 1], got {value!r}. It is per optimizer step.")
    return float(value)


def _plain(array: ArrayLike) -> Floats:
    array = np.asarray(array, dtype=float)
    return float(array) if array.ndim == 0 else array
