"""Measured first-passage times beside those that theory predicts: a linear classifier, and any small model.

The linear classifier has the margin loss ℓ = −ỹ w·x, x = y a u + ξ with a unit vector u and standard normal ξ, and
labels ỹ of which a share τ is wrong. Its gradient does not depend on w, so that SGD walks along u with exactly the
drift v = η (1 − 2τ) a and the diffusion D = η² s²/(2B), s² = 1 + a² − (1 − 2τ)² a²: noise lowers the Péclet number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_reset.anchor.store import AnchorStore
from hf_reset.planner.excursions import Excursion
from hf_reset.planner.plan import best_resets_per_interval, counts_of
from hf_reset.policy import uniform
from hf_reset.study.small import Splits, Training, batches, noisy_loss, take_step
from hf_reset.theory import first_passage, langevin


@dataclass(frozen=True)
class LinearWalk:
    """SGD on the linear classifier, from w = 0 until u·w reaches `distance`.

    Attributes:
        noise: τ, share of wrong labels.
        signal: a.
        rate: η.
        batch: B.
        distance: L.
    """

    noise: float
    signal: float = 0.25
    rate: float = 1.0
    batch: int = 4
    distance: float = 8.0

    @property
    def drift_and_diffusion(self) -> tuple[float, float]:
        """v and D, exactly."""
        mean = (1 - 2 * self.noise) * self.signal
        walk = langevin.sgd(-mean, 1 + self.signal**2 - mean**2, self.rate, self.batch)
        return float(walk.drift[0]), float(walk.diffusion[0])

    @property
    def line(self) -> tuple[float, float, float]:
        """L, v, D for the theory: the distance is longer by what steps overshoot it (`first_passage.OVERSHOOT`)."""
        drift, diffusion = self.drift_and_diffusion
        return self.distance + first_passage.OVERSHOOT * math.sqrt(2 * diffusion), drift, diffusion

    def times(self, probability: float, *, walkers: int, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps until arrival (walkers,), and whether each was stopped at `most` before.

        A step that does not arrive ends in a reset with `probability`.
        """
        rng = np.random.default_rng(seed)
        times, position, walking = np.full(walkers, most), np.zeros(walkers), np.arange(walkers)
        for step in range(1, most + 1):
            signs = np.where(rng.random((len(walking), self.batch)) < self.noise, -1.0, 1.0)
            seen = signs * (self.signal + rng.standard_normal(signs.shape))
            position = position + self.rate * seen.mean(axis=1)
            arrived = position >= self.distance
            times[walking[arrived]] = step
            walking, position = walking[~arrived], position[~arrived]
            if not len(walking):
                break
            position = np.where(rng.random(len(position)) < probability, 0.0, position)
        censored = np.zeros(walkers, dtype=bool)
        censored[walking] = True
        return times, censored

    def positions(self, *, excursions: int, steps: int, seed: int) -> np.ndarray:
        """u·w along so many excursions from 0, (excursions, steps + 1)."""
        rng = np.random.default_rng(seed)
        shape = (excursions, steps, self.batch)
        signs = np.where(rng.random(shape) < self.noise, -1.0, 1.0)
        moves = self.rate * (signs * (self.signal + rng.standard_normal(shape))).mean(axis=2)
        return np.concatenate([np.zeros((excursions, 1)), moves.cumsum(axis=1)], axis=1)


def linear_record(walk: LinearWalk, probabilities: Sequence[float], *, walkers: int, seed: int) -> dict[str, object]:
    """Mean steps to the target at each probability, measured and predicted, and the best of both."""
    points = []
    for probability in probabilities:
        predicted = first_passage.mean_time_stepwise(*walk.line, probability)
        times, censored = walk.times(probability, walkers=walkers, most=40_000, seed=seed)
        points.append(_point(probability, times, censored, predicted))
    best = first_passage.probability_of(float(first_passage.optimal_reset_rate(*walk.line)))
    return {
        "peclet": float(first_passage.peclet_number(*walk.line)),
        "points": points,
        "predicted_best": best,
        "observed_best": _observed_best(points),
    }


def passage_record(
    model: nn.Module,
    splits: Splits,
    training: Training,
    anchor: AnchorStore,
    optimizer: torch.optim.Optimizer,
    probabilities: Sequence[float],
    *,
    free: int,
    repeats: int,
    horizon: int,
    seed: int,
) -> dict[str, object]:
    """From one anchor: times to a better validation without resets, what these predict, and what resets then take.

    Evaluations come at ages that are multiples of `training.every`, so that excursions are independent and alike.

    Args:
        model: whose anchor it is.
        splits: its rows; noisy validation says what is better.
        training: how it trains.
        anchor: set.
        optimizer: of the model, as the anchor was made with.
        probabilities: above 0, per step.
        free: excursions without resets.
        repeats: runs at each probability.
        horizon: steps after which one of either is given up, and counted as censored.
        seed: of all draws.
    """
    anchor.restore()
    target, numbers = noisy_loss(model, splits.validation), count(10_000 * seed)

    def passages(probability: float, runs: int) -> tuple[np.ndarray, np.ndarray]:
        live = (model, splits, training, anchor, optimizer)
        found = [_passage(*live, target, horizon, probability, next(numbers)) for _ in range(runs)]
        taken, late = (np.array(part) for part in zip(*found, strict=True))
        return taken, late

    times, censored = passages(0.0, free)

    def predicted(probability: float | None) -> float:
        return first_passage.mean_time_from_samples(times, probability=probability, censored=censored)

    points = [_point(0.0, times, censored, predicted(None))]
    points += [_point(p, *passages(p, repeats), predicted(p)) for p in probabilities]
    excursions = [
        Excursion(0, tuple(range(training.every, time + 1, training.every)), not late)
        for time, late in zip(times.tolist(), censored.tolist(), strict=True)
    ]
    grid = np.geomspace(0.001, 1 / training.every, 60)
    means = [predicted(p) for p in grid]
    return {
        "points": points,
        "predicted_best": float(grid[int(np.argmin(means))]) if np.isfinite(means).any() else None,
        "observed_best": _observed_best(points),
        "planned": best_resets_per_interval(counts_of(excursions, training.every)) / training.every,
        "free_times": times.tolist(),
        "free_censored": censored.tolist(),
    }


def _passage(
    model: nn.Module,
    splits: Splits,
    training: Training,
    anchor: AnchorStore,
    optimizer: torch.optim.Optimizer,
    target: float,
    horizon: int,
    probability: float,
    seed: int,
) -> tuple[int, bool]:
    """Steps from the anchor, resets included, until validation is below `target`; and whether that took too long."""
    draw, age = batches(len(splits.train.given), training.batch, seed), 0
    anchor.restore()
    for step in range(1, horizon + 1):
        take_step(model, optimizer, splits.train, draw())
        age += 1
        if age % training.every == 0 and noisy_loss(model, splits.validation) < target:
            return step, False
        if uniform(seed, step) < probability:
            anchor.restore()
            age = 0
    return horizon, True


def _point(probability: float, times: np.ndarray, censored: np.ndarray, predicted: float) -> dict[str, object]:
    """Measured mean and its standard error; a prediction that is infinite is None.

    Where some are censored, all steps over the arrivals: right for what renews itself, as resets make it.
    """
    arrivals = len(times) - int(censored.sum())
    mean = float(times.sum()) / arrivals if arrivals else None
    error = float(times.std(ddof=1)) / math.sqrt(len(times))
    return {
        "probability": probability,
        "predicted": predicted if math.isfinite(predicted) else None,
        "observed": mean,
        "error": mean / math.sqrt(arrivals) if mean is not None and censored.any() else error,
        "censored": int(censored.sum()),
        "count": len(times),
    }


def _observed_best(points: Sequence[dict[str, Any]]) -> float | None:
    """The probability with the least mean, None where nothing arrived.

    Without resets nothing renews itself, so that steps over arrivals are no mean.
    """
    sure = [point for point in points if point["observed"] and (point["probability"] or not point["censored"])]
    return min(sure, key=lambda point: point["observed"])["probability"] if sure else None
