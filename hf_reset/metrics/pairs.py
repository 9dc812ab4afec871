"""Calibration where labels go wrong in pairs: each class is called one other in particular.

With pair noise a model learns that a class has two names. Fitted with uniform noise its logits look uncertain, and the
more it knows, the worse a confident mistake seems: the judgement goes wrong way round. Here the label of a row is
explained by the predicted class, by that class's *partner*, or by any class alike:

    q_y = (1 − ε − δ) p_y + δ Σ_j p_j [π(j) = y] + ε / K,   p = softmax(z / T),

with the partners π read off the labels themselves, and paid for: naming a partner for each class takes log(K − 1) nats
a class, and the share δ half of log N, which is what a code for the labels would have to say first (Rissanen's minimum
description length). Where labels are not wrong in pairs that is more than it gains, and nothing changes.

Reference: Jorma Rissanen, "Modeling by shortest data description", Automatica 14 (1978) 465-471.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]
_ROUNDS, _CLOSE = 400, 1e-9  # of expectation and maximisation, and when the shares stand still
_STEPS = 24  # of the golden section between the neighbours of the best temperature
_GOLDEN = (math.sqrt(5) - 1) / 2


class PairFit(NamedTuple):
    """What was fitted; n labelled rows, K classes."""

    log_beta: float
    """log 1/T."""
    noise: float
    """ε."""
    pair_noise: float
    """δ."""
    values: _Floats
    """−log q_y of each row, with what the partners cost shared among the rows: (n,), in nats."""


def partners_of(predicted: NDArray[np.int64], labels: NDArray[np.int64], num_classes: int) -> NDArray[np.int64] | None:
    """The class that each class is mostly mistaken for, where naming them says more than it costs.

    Args:
        predicted: class numbers, (n,).
        labels: given class numbers, (n,).
        num_classes: K.

    Returns:
        π, (K,), −1 for a class whose rows are never called another; None where wrong labels are spread too evenly, or
        there are two classes, of which each can only be mistaken for the other.
    """
    if num_classes < 3:
        return None
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (predicted, labels), 1)
    right = np.trace(counts)
    np.fill_diagonal(counts, -1)
    partners = np.where(counts.max(axis=1) > 0, counts.argmax(axis=1), -1)
    named = int((partners >= 0).sum())
    paired = float(counts.max(axis=1).clip(min=0).sum())
    other = len(labels) - right - paired
    alike = (paired + other) / (num_classes - 1)
    gain = _log_power(paired, paired / alike) + _log_power(other, other / (num_classes - 2) / alike) if alike else 0.0
    return partners if gain > _cost(named, num_classes, len(labels)) else None


def fit_pairs(
    below: _Floats, labels: NDArray[np.int64], partners: NDArray[np.int64], log_betas: Sequence[float]
) -> PairFit:
    """The best T, ε and δ.

    Args:
        below: logits less each row's largest, (n, K).
        labels: class numbers, (n,).
        partners: of `partners_of`, (K,).
        log_betas: log 1/T of a coarse search, evenly spaced and increasing.
    """
    is_partner = partners[None, :] == labels[:, None]
    num_classes = below.shape[1]
    best = min((_at(below, labels, is_partner, log_beta) for log_beta in log_betas), key=_mean)
    width = float(log_betas[1] - log_betas[0])
    low, high = best.log_beta - width, best.log_beta + width
    left, right = (_at(below, labels, is_partner, low + part * (high - low)) for part in (1 - _GOLDEN, _GOLDEN))
    for _ in range(_STEPS):
        best = min(best, left, right, key=_mean)
        if _mean(left) <= _mean(right):  # the inner point that stays is one of the next two
            high, right = right.log_beta, left
            left = _at(below, labels, is_partner, high - _GOLDEN * (high - low))
        else:
            low, left = left.log_beta, right
            right = _at(below, labels, is_partner, low + _GOLDEN * (high - low))
    cost = _cost(int((partners >= 0).sum()), num_classes, len(labels)) / len(labels)
    return best._replace(values=best.values + cost)


def _mean(fit: PairFit) -> float:
    return float(fit.values.mean())


def _at(below: _Floats, labels: NDArray[np.int64], is_partner: NDArray[np.bool_], log_beta: float) -> PairFit:
    """The best ε and δ at one temperature, by expectation and maximisation: the three shares of a mixture."""
    p = np.exp(below * math.exp(log_beta))
    p /= p.sum(axis=1, keepdims=True)
    parts = np.stack([p[np.arange(len(p)), labels], (p * is_partner).sum(axis=1), np.full(len(p), 1 / p.shape[1])])
    shares = np.array([0.6, 0.2, 0.2])
    for _ in range(_ROUNDS):
        weighed = shares[:, None] * parts
        after = (weighed / weighed.sum(axis=0)).mean(axis=1)
        moved, shares = np.abs(after - shares).max(), after
        if moved < _CLOSE:
            break
    return PairFit(log_beta, float(shares[2]), float(shares[1]), -np.log(shares @ parts))


def _cost(named: int, num_classes: int, rows: int) -> float:
    """Nats that the partners and their share take to say."""
    return named * math.log(num_classes - 1) + math.log(rows) / 2


def _log_power(count: float, ratio: float) -> float:
    return count * math.log(ratio) if count > 0 else 0.0
