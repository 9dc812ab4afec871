"""A validation figure that label noise cannot fool: cross-entropy after the best temperature and noise level.

Plain cross-entropy on noisy labels charges a model for every wrong label that it is confident against, so it
prefers timid weights. Here two numbers are fitted on the same rows first: a temperature T, which takes the
model's confidence out of the judgement, and a level ε of uniform label noise, which bounds what one wrong label
can cost (at most log(K / ε)). Both weigh against no model in particular, so weights compare by what they know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_reset.errors import DataError
from hf_reset.metrics.arrays import IGNORE_INDEX, class_numbers, to_numpy
from hf_reset.metrics.pairs import PairFit, fit_pairs, partners_of

METRIC_NAMES = ("calibrated_loss", "label_noise", "temperature", "estimated_accuracy")
"""What `with_calibrated_loss` adds; `Trainer` puts `eval_` in front."""

# Inverse temperatures of the coarse search, in units of the logits' own spread: from all but uniform
# predictions to all but hard ones. Each is twice the one before, so that its exponentials are squares.
_COLDEST, _HOTTEST = 10, -6
_COLDEST_CREDITED = 0.25
_REFINEMENTS = 20
_CHUNK_ELEMENTS = 1 << 15  # what stays in a core's cache between the passes over it

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CalibratedLoss:
    """What `calibrated_loss` found."""

    loss: float
    """Mean of −log[(1 − ε) softmax(z / T)_y + ε / K] over the labelled rows, in nats; NaN for logits not finite."""
    temperature: float
    """T > 0, fitted. Where every labelled row is predicted right, any T small enough would do."""
    noise: float
    """ε in [0, 1], fitted: the share of labels that look drawn uniformly from all K classes, the right one among
    them. Confident mistakes of the model look the same, so a poor model's ε is too high."""
    num_classes: int
    """K."""
    estimated_accuracy: float
    """The share of right labels that the model would name, as the fit has it: mean over the labelled rows of the
    largest softmax(z / T). T counts as 1/4 at least: colder fits take the hints of a model near chance, which is
    often wrong, for certainties among wrong labels. Where noise is not uniform, this is too low."""
    rows: NDArray[np.float64] = field(repr=False, compare=False)
    """The value of each row, shape (N,); NaN where it has no label. `loss` is their mean, for paired tests."""
    pair_noise: float = 0.0
    """δ in [0, 1], fitted: the share of labels that look like the right class's one partner, see
    `hf_reset.metrics.pairs`; 0 where labels are not wrong in pairs."""

    @property
    def wrong_labels(self) -> float:
        """ε (K − 1) / K + δ, the share of labels that look wrong: τ of `hf_reset.noise.symmetric_matrix` and pairs."""
        return self.noise * (self.num_classes - 1) / self.num_classes + self.pair_noise

    def metrics(self) -> dict[str, float]:
        """`METRIC_NAMES` and their values; "label_noise" is `wrong_labels`."""
        values = (self.loss, self.wrong_labels, self.temperature, self.estimated_accuracy)
        return dict(zip(METRIC_NAMES, values, strict=True))

    @property
    def standard_error(self) -> float:
        """Of `loss`, from the spread of the rows; NaN for fewer than two."""
        values = self.rows[~np.isnan(self.rows)]
        return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def calibrated_loss(logits: ArrayLike, labels: ArrayLike) -> CalibratedLoss:
    """Cross-entropy after the best temperature and noise level: min over T, ε of −log[(1 − ε) softmax(z/T)_y + ε/K].

    Unchanged when all logits are multiplied by one positive number, never above plain cross-entropy
    (T = 1, ε = 0), never above log K. ε is solved for exactly at each temperature, where the loss is convex in
    it; T is searched on a grid over 16 octaves, then between the neighbours of the best.

    Where each class is called one other in particular (pair noise) more often than naming these partners costs, the
    label of a row is explained by its class's partner too, see `hf_reset.metrics.pairs`; without that ε would come out
    near 0, T take its part, and weights that know more look worse.

    Args:
        logits: z, shape (N, K), K at least 2, any floating type; numpy or torch.
        labels: y, class numbers, shape (N,); rows of −100 are left out.

    Returns:
        A `CalibratedLoss`. Its figures are NaN where a labelled row's logits are not finite, so that a
        diverged model is no better than any other.

    Raises:
        DataError: Shapes or labels that do not fit (regression, multi-label, tokens), or no labelled row.

    References:
        Chuan Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2 (temperature),
        https://arxiv.org/abs/1706.04599. Aritra Ghosh et al., "Robust Loss Functions under Label Noise for Deep
        Neural Networks", AAAI 2017, https://arxiv.org/abs/1712.09482 (why bounded losses resist noise).

    Example:
        >>> import numpy as np
        >>> found = calibrated_loss(np.eye(3) * 20.0, np.array([0, 1, 0]))  # sure of every row, wrong in the last
        >>> round(found.loss, 2), round(found.noise, 2)
        (0.87, 0.5)
    """
    fit = _Rows.of(logits, labels)
    if not fit.is_finite:
        return CalibratedLoss(math.nan, math.nan, math.nan, fit.num_classes, math.nan, fit.spread(math.nan))
    temperature, noise = _best_fit(fit)
    values = _row_losses(fit.log_p(1 / temperature), noise, fit.num_classes)
    pair_noise, paired = 0.0, fit.with_pairs()
    if paired is not None and paired.values.mean() < values.mean():
        temperature, noise, pair_noise, values = math.exp(-paired.log_beta), *paired[1:]
    accuracy = fit.largest_p(1 / max(temperature, _COLDEST_CREDITED))
    return CalibratedLoss(
        float(values.mean()), temperature, noise, fit.num_classes, accuracy, fit.spread(values), pair_noise
    )


def calibrated_rows(logits: ArrayLike, labels: ArrayLike, temperature: float, noise: float) -> NDArray[np.float64]:
    """Each row's −log[(1 − ε) softmax(z / T)_y + ε / K], for a temperature and a noise level known already.

    Args:
        logits: z, shape (N, K).
        labels: y, shape (N,).
        temperature: T > 0.
        noise: ε in [0, 1].

    Returns:
        Shape (N,), in nats; NaN where a row has no label (−100) or its logits are not finite.

    Raises:
        DataError: As `calibrated_loss`; or T or ε out of range.
    """
    if not 0 < temperature < math.inf:
        raise DataError(f"`temperature` must be above 0, got {temperature}. 1 leaves the logits as they are.")
    if not 0 <= noise <= 1:
        raise DataError(f"`noise` must be in [0, 1], got {noise}. 0 is plain cross-entropy.")
    rows = _Rows.of(logits, labels)
    with np.errstate(invalid="ignore"):
        return rows.spread(_row_losses(rows.log_p(1 / temperature), noise, rows.num_classes))


@dataclass(frozen=True)
class _Rows:
    """The labelled rows: logits less the row's largest (n, K), the same at the label (n,), and where they were."""

    below: _Floats
    at_label: _Floats
    labels: NDArray[np.int64]
    is_labelled: NDArray[np.bool_]

    @classmethod
    def of(cls, logits: ArrayLike, labels: ArrayLike) -> _Rows:
        values = check_logits(to_numpy(logits))
        wanted = class_numbers(labels, *values.shape)
        is_labelled = wanted != IGNORE_INDEX
        if not is_labelled.any():
            raise DataError(f"`labels` holds no label: each of its {len(wanted)} rows is {IGNORE_INDEX}.")
        with np.errstate(invalid="ignore"):  # inf − inf: such a row becomes NaN
            below = values[is_labelled].astype(np.float64)
            below -= below.max(axis=1, keepdims=True)
        given = wanted[is_labelled]
        return cls(below, below[np.arange(len(below)), given], given, is_labelled)

    @property
    def num_classes(self) -> int:
        return self.below.shape[1]

    @cached_property
    def scale(self) -> float:
        """See `_typical_spread`."""
        return _typical_spread(self.below)

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.below).all())

    def spread(self, values: _Floats | float) -> _Floats:
        """The labelled rows' values at their places among all rows, NaN elsewhere."""
        out = np.full(len(self.is_labelled), np.nan)
        out[self.is_labelled] = values
        return out

    def with_pairs(self) -> PairFit | None:
        """The fit with partners, where labels look wrong in pairs."""
        partners = partners_of(self.below.argmax(axis=1), self.labels, self.num_classes) if self.scale > 0 else None
        if partners is None:
            return None
        octaves = [octave * math.log(2) - math.log(self.scale) for octave in range(_HOTTEST, _COLDEST + 1)]
        return fit_pairs(self.below, self.labels, partners, octaves)

    def log_p(self, beta: float) -> _Floats:
        """log softmax(β z)_y, shape (n,)."""
        return np.concatenate([self.at_label[part] * beta - _log_sum(self.below[part] * beta) for part in self._parts])

    def largest_p(self, beta: float) -> float:
        """Mean of max_k softmax(β z)_k."""
        return float(np.concatenate([np.exp(-_log_sum(self.below[part] * beta)) for part in self._parts]).mean())

    def log_p_slope(self, beta: float) -> tuple[_Floats, _Floats]:
        """log softmax(β z)_y and its derivative to β, z_y − Σ_k p_k z_k, both of shape (n,)."""
        values, slopes = [], []
        for part in self._parts:
            shares = np.exp(self.below[part] * beta)
            sums = shares.sum(axis=1)
            values.append(self.at_label[part] * beta - np.log(sums))
            slopes.append(self.at_label[part] - np.einsum("nk,nk->n", shares, self.below[part]) / sums)
        return np.concatenate(values), np.concatenate(slopes)

    def log_p_doubling(self, beta: float, times: int) -> _Floats:
        """log softmax(β 2^j z)_y for j = 0 … times − 1, shape (times, n): one exponential, then squares of it."""
        sums = np.empty((times, len(self.below)))
        for part in self._parts:
            shares = np.exp(self.below[part] * beta)
            for octave in range(times):
                sums[octave, part] = shares.sum(axis=1)
                np.multiply(shares, shares, out=shares)
        betas = beta * 2.0 ** np.arange(times)
        return betas[:, None] * self.at_label - np.log(sums)

    @property
    def _parts(self) -> list[slice]:
        size = max(1, _CHUNK_ELEMENTS // self.num_classes)
        return [slice(start, start + size) for start in range(0, len(self.below), size)]


def check_logits(values: np.ndarray) -> np.ndarray:
    """Return class logits (N, K) as they are.

    Raises:
        DataError: Another shape: regression, tokens, or predictions that are no logits.
    """
    if values.ndim == 3:
        raise DataError(
            f"`logits` has shape {values.shape}, a row of classes for each token. Label noise is fitted a row of "
            "the data set, and a wrong response is wrong in all its tokens at once, which no noise level a token "
            'describes (nor do the logits of a whole validation set fit into memory): use "eval_loss" for causal and '
            "sequence-to-sequence models. For token classification pass the tokens as rows, (tokens, classes)."
        )
    if values.ndim != 2 or values.shape[1] < 2:
        hint = "One column is a regression, which has no classes." if values.ndim == 2 else "Are these predictions?"
        raise DataError(f"`logits` must have shape (N, K) with at least 2 classes, got {values.shape}. {hint}")
    return values


def _log_sum(exponents: _Floats) -> _Floats:
    return np.log(np.exp(exponents, out=exponents).sum(axis=1))


def _row_losses(log_p: _Floats, noise: float, num_classes: int) -> _Floats:
    """−log[(1 − ε) p + ε / K], finite where p itself is 0 in floating point."""
    with np.errstate(divide="ignore"):
        return -np.logaddexp(log_p + np.log1p(-noise), np.log(noise / num_classes))


def _best_fit(rows: _Rows) -> tuple[float, float]:
    """The best (T, ε), plain cross-entropy's (1, 0) among the candidates."""
    candidates = [(float(-rows.log_p(1.0).mean()), 0.0, 0.0)]
    if rows.scale > 0:  # constant logits know nothing, at any temperature
        candidates += _search(rows, math.log(2.0**_HOTTEST / rows.scale))
    _, log_beta, noise = min(candidates)
    return math.exp(-log_beta), noise


def _typical_spread(below: _Floats) -> float:
    """The rows' median distance from the largest logit to the mean, or their mean distance where that is 0."""
    spreads = -below.mean(axis=1)
    return float(np.median(spreads)) or float(spreads.mean())


def _search(rows: _Rows, hottest: float) -> list[tuple[float, float, float]]:
    """Candidates (loss, log β, ε): the best of the grid, and what is found between its neighbours."""
    octaves = _COLDEST - _HOTTEST + 1
    losses, noises = _fit_noise(rows.log_p_doubling(math.exp(hottest), octaves), rows.num_classes)
    best = int(losses.argmin())
    start = hottest + best * math.log(2)
    found = [(float(losses[best]), start, float(noises[best]))]
    if 0 < best < octaves - 1:
        found += _descend(rows, start)
    return found


def _descend(rows: _Rows, start: float) -> list[tuple[float, float, float]]:
    """Follow dF/d log β to its zero next to `start`, F(β) = min over ε, by regula falsi (Illinois)."""
    loss, noise, slope = _loss_and_slope(rows, start)
    found = [(loss, start, noise)]
    here, slope_here = start, slope
    there = start - math.copysign(math.log(2), slope)  # the neighbour on the side where the loss falls
    loss, noise, slope_there = _loss_and_slope(rows, there)
    found.append((loss, there, noise))
    for _ in range(_REFINEMENTS):
        crosses = slope_here * slope_there < 0
        middle = (here * slope_there - there * slope_here) / (slope_there - slope_here) if crosses else 0.0
        middle = middle if crosses else (here + there) / 2
        loss, noise, slope = _loss_and_slope(rows, middle)
        found.append((loss, middle, noise))
        if abs(slope) < 1e-7:
            break
        if slope * slope_there < 0:
            here, slope_here = there, slope_there
        else:
            slope_here /= 2
        there, slope_there = middle, slope
    return found


def _loss_and_slope(rows: _Rows, log_beta: float) -> tuple[float, float, float]:
    """F, the ε that gives it, and dF/d log β (that of the loss at fixed ε, since ε is at its minimum)."""
    beta = math.exp(log_beta)
    log_p, slopes = rows.log_p_slope(beta)
    losses, noises = _fit_noise(log_p[None], rows.num_classes)
    values = _row_losses(log_p, float(noises[0]), rows.num_classes)
    from_model = np.exp(np.log1p(-noises[0]) + log_p + values) if noises[0] < 1 else 0.0
    return float(losses[0]), float(noises[0]), float(-(from_model * slopes).mean() * beta)


def _fit_noise(log_p: _Floats, num_classes: int) -> tuple[_Floats, _Floats]:
    """For each temperature the best ε and its loss: log_p (G, n) → losses (G,), ε (G,).

    The loss is convex in ε: Newton's steps on its derivative, halving the bracket where one leaves it.
    """
    p, uniform = np.exp(log_p), 1 / num_classes
    difference = uniform - p
    low, high = np.zeros(len(p)), np.ones(len(p))
    noise = np.full(len(p), 0.5)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        never = (uniform / p).mean(axis=1) <= 1  # the derivative at ε = 0 is not below 0
        always = p.mean(axis=1) <= uniform
        for _ in range(60):
            ratio = difference / (p + noise[:, None] * difference)
            slope = -ratio.mean(axis=1)
            high, low = np.where(slope > 0, noise, high), np.where(slope > 0, low, noise)
            step = noise - slope / np.einsum("gn,gn->g", ratio, ratio) * p.shape[1]
            following = np.where((step > low) & (step < high), step, (low + high) / 2)
            moved, noise = np.abs(following - noise), following
            if (moved[~(never | always)] < 1e-10).all():
                break
    noise = np.where(never, 0.0, np.where(always, 1.0, noise))
    losses = [_row_losses(log, float(level), num_classes).mean() for log, level in zip(log_p, noise, strict=True)]
    return np.array(losses), noise
