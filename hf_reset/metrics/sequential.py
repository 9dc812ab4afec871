"""Is the mean of all rows' differences above a value? A test that may be looked at after every row.

A betting confidence sequence for sampling without replacement. The N rows are met in random order. Somebody who
believes that their mean lies above m stakes a part of a capital, 1 at first, on each next row. Where he is wrong this
is a fair game or a losing one, so that the capital reaches 1/α, at any time before the last row, with a probability of
at most α (Ville). No variance is assumed and nothing is asymptotic; what must be known is the lowest that each row's
difference can be, and that is known of a loss that cannot fall below a floor: the floor less the other loss of the row.

References: Ian Waudby-Smith, Aaditya Ramdas, "Estimating means of bounded random variables by betting", Journal of the
Royal Statistical Society B 86 (2024), section 5 (without replacement), https://arxiv.org/abs/2010.09686; Jean Ville,
"Étude critique de la notion de collectif", 1939.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Floats = NDArray[np.float64]

STAKE = 3.0  # a bet λ = STAKE/(σ √N) wins most where the mean lies three standard errors (of all N rows) above m
_MOST = 0.9  # of what could be lost on one row; all of it would be ruin
_FIRST_SPREAD = 0.25  # σ before the first row, as a share of the lowest difference


def capital(differences: ArrayLike, lowest: ArrayLike, mean: float) -> _Floats:
    """The capital against "the mean of all N differences is at most `mean`", after each of the rows met so far.

    K_t = Π_{s≤t} (1 + λ_s (d_s − m_s)), where m_s = (N m − Σ_{r<s} d_r) / (N − s + 1) is what the mean of the rows left
    would be, λ_s = min(STAKE / (σ_s √N), 0.9 / (m_s − l_s)), σ_s the spread of the rows before, and l_s the lowest that
    any row left can be. K falls as m rises, so that each level of it gives a confidence bound.

    Args:
        differences: d, of the rows met, in the order in which they were met; shape (n,).
        lowest: the lowest that each difference can be, for all rows in the same order; shape (N,), N at least n.
        mean: m.

    Returns:
        Shape (n,), at least 0; inf where the rows left cannot bring the mean down to m.
    """
    met, floors = np.asarray(differences, np.float64), np.asarray(lowest, np.float64)
    total, before = len(floors), np.arange(len(met))
    sums, squares = (np.concatenate([[0.0], np.cumsum(values)])[:-1] for values in (met, met * met))
    expected = (total * mean - sums) / (total - before)
    room = expected - np.minimum.accumulate(floors[::-1])[::-1][: len(met)]
    scale = float(np.abs(floors).max(initial=0.0)) or 1.0
    is_open = room > 1e-9 * scale  # at 0 all rows left must be at their lowest: there is nothing to win or lose
    variance = np.maximum(squares - sums * sums / np.maximum(before, 1), 0.0) + (_FIRST_SPREAD * scale) ** 2
    stake = np.minimum(STAKE / np.sqrt(variance / (before + 1) * total), _MOST / np.where(is_open, room, np.inf))
    with np.errstate(over="ignore"):
        found = np.cumprod(1 + np.where(is_open, stake * (met - expected), 0.0))
    at_least = sums + met + floors.sum() - np.cumsum(floors)[: len(met)]
    return np.where(at_least > total * (mean + 1e-9 * scale), np.inf, found)


def lower_bound(differences: ArrayLike, lowest: ArrayLike, level: float) -> float:
    """A lower confidence bound of the mean of all N differences: the largest m that is ruled out, by bisection.

    Over the whole course of a race no bound lies above the mean, with a probability of at least 1 − `level`.

    Args:
        differences: as in `capital`.
        lowest: as in `capital`.
        level: α, in (0, 1).

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
        is_ruled_out = capital(met, floors, middle)[-1] >= 1 / level
        low, high = (middle, high) if is_ruled_out else (low, middle)
    return low
