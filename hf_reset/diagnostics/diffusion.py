"""Drift, diffusion and distance along excursions, the Péclet number from them, and the gradient noise scale.

An excursion is a walk on a line, as `hf_reset.theory` has it, once a direction is chosen: here that of the last
improvement, from the anchor before to the anchor. Its drift v and diffusion D come from the increments of the
position along it, and the distance L is how far anchors have moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_reset.anchor.scopes import named_parameters, unwrapped
from hf_reset.diagnostics.modes import refuse_sharded
from hf_reset.errors import ConfigError, DataError, refuse_below_one
from hf_reset.planner.excursions import Entry
from hf_reset.training.hooks import HookKeywords, resets_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

LEVEL = 0.9  # of the intervals
FEWEST = 8  # increments, before anything is said


@dataclass(frozen=True)
class DriftDiffusion:
    """What the increments of a walk say.

    Attributes:
        drift: v, lengths a step.
        diffusion: D, lengths² a step.
        increments: how many it rests on.
        lag: steps each of them spans.
    """

    drift: float
    diffusion: float
    increments: int
    lag: int = 1

    def draws(self, count: int = 20_000, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Drifts and diffusions, (count,) each, from their joint posterior with a flat prior on v and log D.

        Its intervals are those of Student's t for v and of χ² for D, increments being independent and normal.
        """
        rng = np.random.default_rng(seed)
        diffusion = self.diffusion * (self.increments - 1) / rng.chisquare(self.increments - 1, count)
        error = np.sqrt(2 * diffusion / (self.lag * self.increments))
        return self.drift + error * rng.standard_normal(count), diffusion

    def intervals(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """90 % intervals of drift and diffusion."""
        drift, diffusion = self.draws()
        return _interval(drift), _interval(diffusion)

    def peclet(self, distance: float, distance_error: float = 0.0) -> tuple[float, tuple[float, float]]:
        """Pe = L v/(2D), and its 90 % interval.

        Args:
            distance: L > 0.
            distance_error: its standard error.

        Raises:
            ConfigError: the distance is not above 0.
        """
        if not distance > 0:
            raise ConfigError(f"`distance` must be above 0, got {distance!r}. It is how far the target lies.")
        drift, diffusion = self.draws()
        lengths = np.random.default_rng(1).normal(distance, distance_error, len(drift))
        return distance * self.drift / (2 * self.diffusion), _interval(lengths * drift / (2 * diffusion))


def drift_and_diffusion(excursions: Sequence[ArrayLike], *, lag: int = 1) -> DriftDiffusion:
    """v and D from positions along excursions: mean and half the variance of the increments, a step.

    Args:
        excursions: of each the positions, (steps + 1,), at successive steps.
        lag: steps an increment spans; those of one excursion do not overlap. With momentum μ take well above
            1/(1 − μ): within that time successive steps are not independent, and D comes out too small.

    Raises:
        ConfigError: `lag` is below 1.
        DataError: fewer than `FEWEST` increments, or a walk that does not spread.
    """
    if lag < 1:
        raise ConfigError(f"`lag` must be at least 1, got {lag!r}. It is in steps.")
    parts = [np.diff(np.asarray(positions, dtype=float)[::lag]) for positions in excursions]
    increments = np.concatenate(parts) if parts else np.empty(0)
    if len(increments) < FEWEST:
        raise DataError(f"{len(increments)} increments of {lag} steps say too little: at least {FEWEST} are needed.")
    variance = float(increments.var(ddof=1))
    if variance == 0:
        raise DataError("The walk does not spread: all its increments are the same, so there is no diffusion to see.")
    return DriftDiffusion(float(increments.mean()) / lag, variance / (2 * lag), len(increments), lag)


@dataclass(frozen=True)
class NoiseScale:
    """The gradient's signal and noise.

    Attributes:
        squared_norm: |G|² of the mean gradient, unbiased, and so now and then below 0.
        variance: tr Σ = Σ s² over coordinates, of one sample's gradient.
    """

    squared_norm: float
    variance: float

    @property
    def scale(self) -> float:
        """B = tr Σ/|G|², the batch size at which signal and noise are equal; infinite where no signal is seen."""
        return self.variance / self.squared_norm if self.squared_norm > 0 else math.inf


def noise_scale(small_square: float, large_square: float, small: float, large: float) -> NoiseScale:
    """From the squared norms of gradients of a small and a large batch: E|g_B|² = |G|² + tr Σ/B, solved.

    Args:
        small_square: mean |g|² of small batches.
        large_square: |g|² of a large one.
        small: samples in a small batch.
        large: samples in a large one.

    Raises:
        ConfigError: the batch sizes are not 0 < small < large.

    References:
        S. McCandlish, J. Kaplan, D. Amodei et al., "An empirical model of large-batch training" (2018),
        arXiv 1812.06162, appendix A.1.
    """
    if not 0 < small < large:
        raise ConfigError(f"`small` must be above 0 and below `large`, got {small!r} and {large!r}.")
    variance = (small_square - large_square) / (1 / small - 1 / large)
    return NoiseScale(large_square - variance / large, variance)


def noise_scale_of_strata(
    small_squares: Sequence[float], large_squares: Sequence[float], counts: Sequence[int], small: int, total: float
) -> NoiseScale:
    """The same from parts of a sample whose batches were not mixed, such as correct and wrong rows.

    Args:
        small_squares: of each part, the mean |g|² of its small batches.
        large_squares: of each part, |g|² of its mean gradient.
        counts: samples in each part.
        small: samples in a small batch.
        total: |g|² of the mean gradient of all.
    """
    weights = np.array(counts) / sum(counts)
    parts = [noise_scale(s, m, small, n) for s, m, n in zip(small_squares, large_squares, counts, strict=True)]
    within = np.array([part.variance for part in parts])
    squared_norm = total - float((weights**2 * within / np.array(counts)).sum())
    # The law of total variance: within the parts, and of their means about the mean.
    second_moment = float((weights * (within + [part.squared_norm for part in parts])).sum())
    return NoiseScale(squared_norm, second_moment - squared_norm)


class ExcursionDiffusionCallback(TrainerCallback):
    """Follows each excursion along the direction of the last improvement.

    At each evaluation with enough to go by, writes to `state.log_history` a record with `step`, `epoch`,
    "diffusion/drift", "diffusion/diffusion", "diffusion/peclet", each with "…_low" and "…_high" (90 %),
    "diffusion/distance" (mean distance of anchor moves so far) and "diffusion/increments". Put it after the reset
    callback. A resumed run starts anew.

    Cost: one dot product with the trainable weights a step (about 2 of the 6·batch·tokens operations a weight that a
    step of training makes), and two copies of them in memory. The training goes on bit for bit as without.

    Args:
        lag: steps an increment spans, see `drift_and_diffusion`.
        excursions: how many of the last to go by.

    Raises:
        ConfigError: `lag` or `excursions` is below 1.
        UnsupportedError: when training begins with sharded weights.
    """

    def __init__(self, *, lag: int = 1, excursions: int = 50) -> None:
        refuse_below_one(lag=lag, excursions=excursions)
        self.lag, self.keep = lag, excursions
        self.walks: list[list[float]] = []
        self.distances: list[float] = []
        self._anchor: dict[str, Tensor] = {}
        self._direction: dict[str, Tensor] = {}
        self._anchor_step: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """Begin with nothing known."""
        refuse_sharded(kwargs["model"], "ExcursionDiffusionCallback")
        self.walks, self.distances, self._anchor, self._direction, self._anchor_step = [], [], {}, {}, None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """Note the position; a reset begins a walk."""
        if not self._direction:
            return
        resets = resets_of(state)
        if resets is not None and resets.reset_state.last_reset_step == state.global_step - 1:
            self.walks = [*self.walks, [0.0]][-self.keep :]
        else:
            self.walks[-1].append(self._position(kwargs["model"]))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """Follow the anchor, and say what the walks so far show."""
        resets = resets_of(state)
        if resets is None:
            return
        if resets.reset_state.anchor_step not in (self._anchor_step, None):
            self._anchor_step = resets.reset_state.anchor_step
            self._follow(kwargs["model"])
        increments = sum((len(walk) - 1) // self.lag for walk in self.walks)
        if increments >= FEWEST and self.distances:
            state.log_history.append({**self.record(), "epoch": state.epoch, "step": state.global_step})

    def record(self) -> dict[str, float]:
        """The figures so far.

        Raises:
            DataError: too few increments, or a walk that does not spread.
        """
        found = drift_and_diffusion(self.walks, lag=self.lag)
        distance, n = float(np.mean(self.distances)), len(self.distances)
        error = float(np.std(self.distances, ddof=1)) / math.sqrt(n) if n > 1 else 0.0
        peclet, bounds = found.peclet(distance, error)
        drift, diffusion = found.intervals()
        named = {"drift": (found.drift, drift), "diffusion": (found.diffusion, diffusion), "peclet": (peclet, bounds)}
        record: dict[str, float] = {"diffusion/distance": distance, "diffusion/increments": found.increments}
        for name, (value, (low, high)) in named.items():
            record |= {f"diffusion/{name}": value, f"diffusion/{name}_low": low, f"diffusion/{name}_high": high}
        return record

    def _follow(self, model: nn.Module) -> None:
        """The anchor has moved to the weights as they are: a new direction, and a new walk."""
        before, self._anchor = self._anchor, _copied(model)
        if not before:
            return
        moved = {name: self._anchor[name] - old for name, old in before.items()}
        length = math.sqrt(sum(float(part.square().sum()) for part in moved.values()))
        if length > 0:
            self.distances.append(length)
            self._direction = {name: part / length for name, part in moved.items()}
            self.walks = [*self.walks, [0.0]][-self.keep :]

    def _position(self, model: nn.Module) -> float:
        named = named_parameters(unwrapped(model))
        with torch.no_grad():
            parts = [
                ((named[name].float() - self._anchor[name]) * unit).sum() for name, unit in self._direction.items()
            ]
            return float(torch.stack(parts).sum())


def plot_diffusion(log_history: Sequence[Entry], path: str | Path) -> Path:
    """Draw drift, diffusion and Péclet number with their intervals over training; returns the path.

    Raises:
        DataError: the log has no record of `ExcursionDiffusionCallback`.
    """
    records = [record for record in log_history if "diffusion/peclet" in record]
    if not records:
        raise DataError("The log has no diffusion records. Train with `diagnostics.ExcursionDiffusionCallback`.")
    from hf_reset.report.plots import curves_figure

    panels = [
        (title, unit, {"estimate": f"diffusion/{name}", "90 %": (f"diffusion/{name}_low", f"diffusion/{name}_high")})
        for name, title, unit in (
            ("drift", "Drift along the last improvement", "length a step"),
            ("diffusion", "Diffusion", "length² a step"),
            ("peclet", "Péclet number: below 1 resets help", "L v / (2 D)"),
        )
    ]
    return curves_figure(records, panels, path)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    named = named_parameters(unwrapped(model))
    return {name: p.detach().float().clone() for name, p in named.items() if p.requires_grad}


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
