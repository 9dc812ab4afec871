"""What an optimizer's drift and diffusion are, and a simulator of the walk they make.

SGD with learning rate η and batch size B moves the parameters by −η (∇L + ξ), ξ of variance s²/B a coordinate. Seen
over many steps this is overdamped Langevin dynamics dθ = v dt + √(2D) dW, time in steps, with v = −η ∇L and
D = η² s²/(2B) (Bae, Song, Jeong 2025, arXiv 2406.00396, section 2). `first_passage` says what follows from v and D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_reset.errors import ConfigError, DataError
from hf_reset.theory.first_passage import Array


@dataclass(frozen=True)
class Langevin:
    """Drift and diffusion a step, one value a coordinate, shape (coordinates,).

    Attributes:
        drift: v, in lengths a step.
        diffusion: D, in lengths² a step.
    """

    drift: Array
    diffusion: Array

    def along(self, direction: ArrayLike) -> tuple[float, float]:
        """(v, D) along a direction (coordinates,) of any length: û·v and Σ û² D.

        Raises:
            DataError: the direction is zero or of another shape.
        """
        unit = _unit("direction", direction, self.drift.shape)
        return float(unit @ self.drift), float(unit**2 @ self.diffusion)


def sgd(gradient: ArrayLike, gradient_variance: ArrayLike, learning_rate: float, batch_size: int) -> Langevin:
    """Plain SGD: v = −η ∇L, D = η² s²/(2B).

    Good while the gradient changes little within the steps looked at, and batches are drawn independently (without
    replacement within an epoch, an epoch's noise sums to less).

    Args:
        gradient: ∇L, of the mean loss, (coordinates,) or a number.
        gradient_variance: s², of a single sample's gradient, coordinate by coordinate; broadcasts.
        learning_rate: η > 0.
        batch_size: B >= 1, samples a step over all processes and accumulated batches.

    Raises:
        ConfigError: an argument has a value it cannot have.
    """
    slope, variance = _moments(gradient, gradient_variance, batch_size)
    return _moved(slope, variance, np.asarray(_checked_rate(learning_rate)))


def momentum(
    gradient: ArrayLike,
    gradient_variance: ArrayLike,
    learning_rate: float,
    batch_size: int,
    *,
    momentum: float = 0.9,
    dampening: float = 0.0,
) -> Langevin:
    """SGD with momentum μ: SGD at the learning rate η (1 − d)/(1 − μ).

    m ← μ m + (1 − d) g, θ ← θ − η m: each gradient, signal and noise alike, is in the end applied
    (1 − d) Σ μ^k = (1 − d)/(1 − μ) times. So drift grows by that factor and diffusion by its square: momentum 0.9
    has the Péclet number of SGD with ten times the learning rate, a tenth. Nesterov's form sums to the same.

    Holds for times well above 1/(1 − μ) steps: shorter excursions see less than this diffusion, and a reset that
    zeroes the buffer starts each of them anew.

    Args, Raises: as `sgd`; `momentum` in [0, 1), `dampening` in [0, 1) as in `torch.optim.SGD`.
    """
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        if not 0 <= value < 1:
            raise ConfigError(f"`{name}` must be in [0, 1), got {value!r}.")
    return sgd(gradient, gradient_variance, _checked_rate(learning_rate) * (1 - dampening) / (1 - momentum), batch_size)


def adaptive(
    gradient: ArrayLike,
    gradient_variance: ArrayLike,
    learning_rate: float,
    batch_size: int,
    *,
    epsilon: float = 1e-8,
) -> Langevin:
    """Adam and AdamW: SGD with a learning rate of its own for each coordinate, η/(√(g² + s²/B) + ε).

    The second moment settles at E[g_B²] = g² + s²/B, and the first sums to one whatever β₁. Where noise prevails
    (|g| ≪ s/√B) v = −η g √B/s and D = η²/2: the diffusion no longer depends on the noise, batch size or scale of the
    loss, and Pe = L |g| √B/(η s). Where signal prevails v = −η sign g, and D falls as s²/(B g²).

    Limits: the gradient is stationary over 1/(1 − β₂) steps; times are well above 1/(1 − β₁) steps; the second
    moment is taken as its mean, so that its own noise and its correlation with the gradient are left out. Decoupled
    weight decay λ adds the drift −η λ θ, which is not in it.

    Args, Raises: as `sgd`; `epsilon` >= 0 as in the optimizer.
    """
    slope, variance = _moments(gradient, gradient_variance, batch_size)
    if not epsilon >= 0:
        raise ConfigError(f"`epsilon` must be at least 0, got {epsilon!r}.")
    scale = np.sqrt(slope**2 + variance) + epsilon
    return _moved(slope, variance, _checked_rate(learning_rate) / np.where(scale > 0, scale, 1.0))


@dataclass(frozen=True)
class Components:
    """A gradient in the frame of two directions that need not be orthogonal.

    Attributes:
        correct: coefficient of the unit vector of the correct gradient.
        wrong: coefficient of the unit vector of the wrong gradient.
        residual: norm of what lies outside their plane.
        cosine: of the angle between them.
    """

    correct: float
    wrong: float
    residual: float
    cosine: float

    @property
    def towards_correct(self) -> float:
        """What acts along the correct direction: its own part and the share of the wrong one, a + b cos φ.

        The paper takes cos φ = 0, where the wrong part adds nothing. Where cos φ < 0 the wrong labels slow the drift
        towards the target itself and so lower the Péclet number; where cos φ > 0 they help it along.
        """
        return self.correct + self.wrong * self.cosine

    @property
    def across(self) -> float:
        """What acts at right angles to the correct direction: the latent bias proper, b sin φ."""
        return self.wrong * math.sqrt(max(0.0, 1 - self.cosine**2))


def decompose(gradient: ArrayLike, correct: ArrayLike, wrong: ArrayLike) -> Components:
    """Write a gradient as a ĉ + b ŵ + rest, ĉ and ŵ the directions of the correct and of the wrong part.

    With c = ĉ·ŵ, a = (g·ĉ − c g·ŵ)/(1 − c²) and b likewise; the rest is orthogonal to both.

    Args:
        gradient: g, (coordinates,).
        correct: the gradient of the loss on true labels, same shape; only its direction counts.
        wrong: the gradient that wrong labels add, same shape; only its direction counts.

    Raises:
        DataError: shapes differ, a direction is zero, or the two are parallel, where the parts cannot be told apart.
    """
    g = np.asarray(gradient, dtype=float)
    c, w = _unit("correct", correct, g.shape), _unit("wrong", wrong, g.shape)
    cosine = float(np.clip(c @ w, -1, 1))
    sine_squared = float(((w - cosine * c) ** 2).sum())
    if sine_squared < 1e-12:
        raise DataError(f"`correct` and `wrong` are parallel (cosine {cosine:.6f}): their shares cannot be told apart.")
    on_correct, on_wrong = float(g @ c), float(g @ w)
    a, b = (on_correct - cosine * on_wrong) / sine_squared, (on_wrong - cosine * on_correct) / sine_squared
    return Components(a, b, float(np.linalg.norm(g - a * c - b * w)), cosine)


@dataclass(frozen=True)
class FirstPassages:
    """Simulated times.

    Attributes:
        times: (walkers,) time until the target, or until the simulation ended.
        censored: (walkers,) True where it ended first.
    """

    times: Array
    censored: NDArray[np.bool_]

    def mean(self) -> tuple[float, float]:
        """The mean time and its standard error.

        Raises:
            DataError: a walker has not arrived, so that the mean is not known.
        """
        if self.censored.any():
            raise DataError(f"{self.censored.sum()} of {len(self.times)} walkers did not arrive: raise `max_time`.")
        return float(self.times.mean()), float(self.times.std(ddof=1) / math.sqrt(len(self.times)))


def simulate(
    distance: float,
    drift: float | Callable[[Array], Array],
    diffusion: float,
    rate: float = 0.0,
    *,
    period: float | None = None,
    time_step: float = 1.0,
    max_time: float = 1e5,
    walkers: int = 1000,
    seed: int = 0,
    bridge: bool = True,
) -> FirstPassages:
    """Walk x ← x + v dt + √(2D dt) ξ from 0 until `distance`, put back to 0 by resets at the ends of steps.

    Args:
        distance: L > 0.
        drift: v, or a function of the positions (walkers,) for one that changes on the way.
        diffusion: D > 0.
        rate: r >= 0; a step ends in a reset with probability 1 − exp(−r dt).
        period: time between resets, in place of `rate`; rounded to whole steps.
        time_step: dt > 0.
        max_time: a walker that has not arrived by then is censored.
        walkers: how many, at once.
        seed: of a generator of its own.
        bridge: also see the arrivals between two steps, as a Brownian bridge has them: exactly the law of
            `first_passage.mean_time_stepwise` (a constant drift). Without, only the ends of steps count, and walkers go
            `first_passage.OVERSHOOT`·√(2D dt) further on average.

    Raises:
        ConfigError: an argument has a value it cannot have.
    """
    _check_walk(distance, diffusion, time_step, rate, period)
    rng = np.random.default_rng(seed)
    steps = math.ceil(max_time / time_step)
    every = None if period is None else max(1, round(period / time_step))
    times = np.full(walkers, float(steps))
    walking, position = np.arange(walkers), np.zeros(walkers)
    spread = math.sqrt(2 * diffusion * time_step)
    for step in range(1, steps + 1):
        pull = drift(position) if callable(drift) else drift
        after = position + pull * time_step + spread * rng.standard_normal(len(position))
        arrived = after >= distance
        if bridge:
            gap = np.maximum(distance - position, 0) * np.maximum(distance - after, 0)
            arrived |= rng.random(len(position)) < np.exp(-2 * gap / spread**2)
        times[walking[arrived]] = step
        walking, position = walking[~arrived], after[~arrived]
        if not len(walking):
            break
        if every is not None:
            position = position * (step % every != 0)
        elif rate:
            position = np.where(rng.random(len(position)) < -math.expm1(-rate * time_step), 0.0, position)
    censored = np.zeros(walkers, dtype=bool)
    censored[walking] = True
    return FirstPassages(times * time_step, censored)


def _check_walk(distance: float, diffusion: float, time_step: float, rate: float, period: float | None) -> None:
    for name, value in (("distance", distance), ("diffusion", diffusion), ("time_step", time_step)):
        if not 0 < value < math.inf:
            raise ConfigError(f"`{name}` must be above 0 and finite, got {value!r}.")
    if not rate >= 0 or (rate and period is not None):
        raise ConfigError(f"`rate` must be at least 0, and 0 where a `period` is given, got {rate!r} and {period!r}.")


def _moments(gradient: ArrayLike, gradient_variance: ArrayLike, batch_size: int) -> tuple[Array, Array]:
    """∇L and s²/B, of one shape (coordinates,)."""
    if not batch_size >= 1:
        raise ConfigError(f"`batch_size` must be at least 1, got {batch_size!r}.")
    slope, variance = np.broadcast_arrays(
        np.atleast_1d(np.asarray(gradient, dtype=float)), np.asarray(gradient_variance, dtype=float) / batch_size
    )
    if not (np.isfinite(slope).all() and np.isfinite(variance).all() and (variance >= 0).all()):
        raise ConfigError("`gradient` must be finite, and `gradient_variance` finite and at least 0.")
    return slope, variance


def _moved(slope: Array, variance: Array, learning_rate: Array) -> Langevin:
    return Langevin(-learning_rate * slope, learning_rate**2 * variance / 2)


def _checked_rate(learning_rate: float) -> float:
    if not 0 < learning_rate < math.inf:
        raise ConfigError(f"`learning_rate` must be above 0 and finite, got {learning_rate!r}.")
    return float(learning_rate)


def _unit(name: str, vector: ArrayLike, shape: tuple[int, ...]) -> Array:
    values = np.asarray(vector, dtype=float)
    norm = float(np.linalg.norm(values)) if values.shape == shape else math.nan
    if not 0 < norm < math.inf:
        raise DataError(f"`{name}` must be a finite vector other than 0 of shape {shape}, got shape {values.shape}.")
    return values / norm
