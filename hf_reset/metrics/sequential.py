"""Is the mean of all rows' differences above a value? A test that may be looked at after every row.

A betting confidence sequence for sampling without replacement. The N rows are met in random order. Somebody who
believes that their mean lies above m stakes a part of a capital, 1 at first, on each next row. Where he is wrong this
is a fair game or a losing one, so that the capital reaches 1/α, at any time before the last row, with a probability of
at most α (Ville). No variance is assumed and nothing is asymptotic; what must be known is the lowest that each row's
difference can be, and that is known of a loss that cannot fall below a floor: the floor less the other loss of the row.

Where something is known of each row beforehand (what its difference was when it was last met), what the rows met could
be foreseen by is taken out of the game: its mean over the rows left is known, so that the game stays fair, and it is
won the sooner the less there is to be seen (a control variate).

References: Ian Waudby-Smith, Aaditya Ramdas, "Estimating means of bounded random variables by betting", Journal of the
Royal Statistical Society B 86 (2024), section 5 (without replacement), https://arxiv.org/abs/2010.09686; Jean Ville,
"Étude critique de la notion de collectif", 1939; Shubhanshu Shekhar, Ziyu Xu, Zachary Lipton, Pierre Liang, Aaditya
Ramdas, "Risk-limiting financial audits via weighted sampling without replacement", UAI 2023, section 3 (control
variates), https://arxiv.org/abs/2305.06884.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Floats = NDArray[np.float64]

STAKE = 3.0  # a bet λ = STAKE/(σ √N) wins most where the mean lies three standard errors (of all N rows) above m
_MOST = 0.9  # of what could be lost on one row; all of it would be ruin
_FIRST_SPREAD = 0.25  # σ before the first row, as a share of the lowest difference
_DOUBT = 5.0  # rows: a slope fitted on as many counts half
_FITS = 1.5  # the rows of one fit of the slope, as a multiple of those of the fit before; the first on 8


def capital(differences: ArrayLike, lowest: ArrayLike, mean: float, foreseen: ArrayLike | None = None) -> _Floats:
    """The capital against "the mean of all N differences is at most `mean`", after each of the rows met so far.

    K_t = Π_{s≤t} (1 + λ_s (e_s − m_s)), where e = d − β_s x, m_s = (N m − Σ_{r<s} d_r) / (N − s + 1) − β_s x̄_s is what
    its mean over the rows left would be, x̄_s the mean of their x, β_s the slope of d on x over rows before (0 where
    nothing is foreseen), λ_s = min(STAKE / (σ_s √N), 0.9 / (m_s − l_s)), σ_s the spread of e over the rows before, and
    l_s the lowest that e can be in any row left. K falls as m rises, so that each level of it gives a confidence bound.

    Args:
        differences: d, of the rows met, in the order in which they were met; shape (n,).
        lowest: the lowest that each difference can be, for all rows in the same order; shape (N,), N at least n.
        mean: m.
        foreseen: x, anything known of all rows before the first was met, in the same order; shape (N,).

    Returns:
        Shape (n,), at least 0; inf where the rows left cannot bring the mean down to m.
    """
    met, floors = np.asarray(differences, np.float64), np.asarray(lowest, np.float64)
    total, before = len(floors), np.arange(len(met))
    x = np.zeros(total) if foreseen is None else np.asarray(foreseen, np.float64)
    slope, lowest_left = _slopes(met, floors, x)
    unseen = met - slope * x[: len(met)]
    sums, squares = _sums_before(unseen), _sums_before(unseen * unseen)
    x_left = x.sum() - _sums_before(x[: len(met)])
    expected = (total * mean - _sums_before(met) - slope * x_left) / (total - before)
    room = expected - lowest_left
    scale = float(np.abs(floors).max(initial=0.0)) or 1.0
    is_open = room > 1e-9 * scale  # at 0 all rows left must be at their lowest: there is nothing to win or lose
    variance = np.maximum(squares - sums * sums / np.maximum(before, 1), 0.0) + (_FIRST_SPREAD * scale) ** 2
    stake = np.minimum(STAKE / np.sqrt(variance / (before + 1) * total), _MOST / np.where(is_open, room, np.inf))
    with np.errstate(over="ignore"):
        found = np.cumprod(1 + np.where(is_open, stake * (unseen - expected), 0.0))
    at_least = np.cumsum(met) + floors.sum() - np.cumsum(floors)[: len(met)]
    return np.where(at_least > total * (mean + 1e-9 * scale), np.inf, found)


def _slopes(met: _Floats, floors: _Floats, x: _Floats) -> tuple[_Floats, _Floats]:
    """At each row met, the slope of d on x over rows before, (n,), and the lowest that d − βx can be in a row left."""
    slope, lowest_left = np.zeros(len(met)), np.zeros(len(met))
    start, end, beta = 0, 8, 0.0
    while start < len(met):
        end = min(end, len(met))
        slope[start:end] = beta
        lowest_left[start:end] = np.minimum.accumulate((floors - beta * x)[::-1])[::-1][start:end]
        d, known = met[:end] - met[:end].mean(), x[:end] - x[:end].mean()
        spread = float(known @ known)
        beta = float(known @ d) / (spread * (1 + _DOUBT / end)) if spread > 0 else 0.0
        start, end = end, math.ceil(_FITS * end)
    return slope, lowest_left


def _sums_before(values: _Floats) -> _Floats:
    return np.concatenate([[0.0], np.cumsum(values)])[:-1]


def lower_bound(differences: ArrayLike, lowest: ArrayLike, level: float, foreseen: ArrayLike | None = None) -> float:
    """A lower confidence bound of the mean of all N differences: the largest m that is ruled out, by bisection.

    Over the whole course of a race no bound lies above the mean, with a probability of at least 1 − `level`.

    Args:
        differences: as in `capital`.
        lowest: as in `capital`.
        level: α, in (0, 1).
        foreseen: as in `capital`.

    Returns:
        The bound; the lowest mean that is still possible, where nothing above it is ruled out.
    """
    met, floors = np.asarray(differences, np.float64), np.asarray(lowest, np.float64)
    low = float(np.concatenate([met, floors[len(met) :]]).mean())
    if len(met) in (0, len(floors)):
        return low
    high = max(float(met.mean()), low)
    for _ in range(50):
        middle = (low + high) / 2
        is_ruled_out = capital(met, floors, middle, foreseen)[-1] >= 1 / level
        low, high = (middle, high) if is_ruled_out else (low, middle)
    return low
