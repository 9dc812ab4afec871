"""Label-transition matrices T[i, j] = P(noisy label = j | clean label = i), and what noise they leave learnable.

Classes are numbered in the order of the data set's `ClassLabel` names, or of the sorted label values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_reset.errors import ConfigError, DataError


def check_rate(rate: float, name: str = "rate") -> float:
    """Return `rate` as a float, or raise ConfigError where it is no share in [0, 1]."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or not 0 <= rate <= 1:
        raise ConfigError(f"`{name}` must be in [0, 1], the share of rows that get a wrong label, got {rate!r}.")
    return float(rate)


def symmetric_matrix(num_classes: int, rate: float) -> NDArray[np.float64]:
    """Each class is mistaken for each *other* class alike: T[i, i] = 1 − τ, T[i, j] = τ / (C − 1).

    Args:
        num_classes: C, at least 2.
        rate: τ in [0, 1], the share of wrong labels. (Some papers draw among all C classes instead, so that
            their rate τ' means τ = τ' (C − 1) / C here.)

    Returns:
        Row-stochastic matrix of shape (C, C).

    Raises:
        ConfigError: Fewer than two classes, or a rate outside [0, 1].
    """
    num_classes, rate = _check_num_classes(num_classes), check_rate(rate)
    matrix = np.full((num_classes, num_classes), rate / (num_classes - 1))
    np.fill_diagonal(matrix, 1 - rate)
    return matrix


def pair_matrix(num_classes: int, rate: float) -> NDArray[np.float64]:
    """Each class is mistaken for the next one only: T[i, i] = 1 − τ, T[i, (i + 1) mod C] = τ.

    Called "pair flipping" in Han et al., Co-teaching, NeurIPS 2018, arXiv 1804.06872.

    Args:
        num_classes: C, at least 2.
        rate: τ in [0, 1].

    Returns:
        Row-stochastic matrix of shape (C, C).

    Raises:
        ConfigError: Fewer than two classes, or a rate outside [0, 1].
    """
    num_classes, rate = _check_num_classes(num_classes), check_rate(rate)
    identity = np.eye(num_classes)
    return (1 - rate) * identity + rate * np.roll(identity, 1, axis=1)


def transition_matrix(matrix: ArrayLike, num_classes: int | None = None) -> NDArray[np.float64]:
    """Check a matrix of any array-like form and return it as float64, rows summing to 1.

    Args:
        matrix: T[i, j], shape (C, C), entries in [0, 1], each row summing to 1 within 1e-6.
        num_classes: C, if it is to be checked.

    Returns:
        A new array of shape (C, C), its rows divided by their sums.

    Raises:
        ConfigError: Wrong shape, entries that are no probabilities, or rows that do not sum to 1.
    """
    try:
        array = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`matrix` must be a square array of probabilities, got {matrix!r}.") from error
    wanted = "(C, C)" if num_classes is None else f"({num_classes}, {num_classes})"
    is_square = array.ndim == 2 and array.shape[0] == array.shape[1] >= 2
    if not is_square or num_classes not in (None, array.shape[0]):
        raise ConfigError(f"`matrix` must have shape {wanted}, one row and one column a class, got {array.shape}.")
    if not np.all((array >= 0) & (array <= 1)):
        raise ConfigError(f"`matrix` must hold probabilities in [0, 1], got {array.tolist()}.")
    sums = array.sum(axis=1)
    wrong = np.flatnonzero(np.abs(sums - 1) > 1e-6)
    if wrong.size:
        raise ConfigError(
            f"`matrix` must have rows that sum to 1, T[i, j] = P(noisy = j | clean = i), but row {wrong[0]} sums to "
            f"{sums[wrong[0]]:.6g}. If its columns are the clean classes, transpose it."
        )
    return array / sums[:, None]


def empirical_matrix(clean: ArrayLike, noisy: ArrayLike, num_classes: int | None = None) -> NDArray[np.float64]:
    """Estimate T from pairs of labels: T[i, j] = #(clean = i, noisy = j) / #(clean = i).

    Args:
        clean: Clean labels as class numbers, shape (N,).
        noisy: Noisy labels as class numbers, shape (N,).
        num_classes: C. Default: the largest class number + 1.

    Returns:
        Row-stochastic matrix of shape (C, C). A class without a clean row says nothing about its noise and gets
        the identity's row.

    Raises:
        DataError: The two differ in length, are empty, or hold anything but class numbers below C.
    """
    clean, noisy = np.asarray(clean), np.asarray(noisy)
    if clean.shape != noisy.shape or clean.ndim != 1 or clean.size == 0:
        raise DataError(
            f"`clean` and `noisy` must be label lists of one length, got shapes {clean.shape} and {noisy.shape}."
        )
    for name, labels in (("clean", clean), ("noisy", noisy)):
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise DataError(f"`{name}` must hold class numbers from 0 on, got {labels[:5].tolist()} …")
    found = int(max(clean.max(), noisy.max())) + 1
    classes = found if num_classes is None else num_classes
    if found > classes:
        raise DataError(f"`num_classes` is {classes}, but the labels go up to {found - 1}.")
    counts = np.zeros((classes, classes))
    np.add.at(counts, (clean, noisy), 1)
    absent = counts.sum(axis=1) == 0
    counts[absent] = np.eye(classes)[absent]
    return counts / counts.sum(axis=1, keepdims=True)


class Learnability(NamedTuple):
    """What `learnability` found."""

    learnable: bool
    """Whether in every row the clean class is the strictly most probable noisy label."""
    margins: NDArray[np.float64]
    """T[i, i] − max over j ≠ i of T[i, j], shape (C,). Not above zero: class i cannot be learned from counts."""
    unlearnable: list[int]
    """The classes whose margin is not above zero."""


def learnability(matrix: ArrayLike) -> Learnability:
    """Can the clean classes still be told from noisy labels alone, given enough of them?

    Where the clean class is certain given x, the best classifier of noisy labels answers argmax_j T[i, j] for
    clean class i. It is the clean classifier iff the diagonal is the strict maximum of each row (Ghosh, Kumar &
    Sastry, AAAI 2017, arXiv 1712.09482); for symmetric noise that means τ < (C − 1) / C, for pair noise τ < 1/2.
    A small margin means many examples are needed. Where this fails, no choice of checkpoint or loss that sees
    noisy labels only can help.

    Args:
        matrix: T[i, j], shape (C, C).

    Returns:
        A `Learnability`.

    Raises:
        ConfigError: `matrix` is not a row-stochastic square matrix.
    """
    array = transition_matrix(matrix)
    others = array.copy()
    np.fill_diagonal(others, -np.inf)
    margins = np.diag(array) - others.max(axis=1)
    # Rates such as 1 − 1/3 are not exact in binary: what is equal up to rounding counts as equal.
    unlearnable = np.flatnonzero(margins <= 1e-12).tolist()
    return Learnability(not unlearnable, margins, unlearnable)


def noise_rate(matrix: ArrayLike, class_counts: Sequence[float] | None = None) -> float:
    """Expected share of wrong labels, Σ_i π_i (1 − T[i, i]).

    Args:
        matrix: T[i, j], shape (C, C).
        class_counts: Rows (or shares) of each clean class, shape (C,). Default: all alike.

    Returns:
        The rate, in [0, 1].

    Raises:
        ConfigError: The matrix is not row-stochastic, or the counts do not fit it.
    """
    array = transition_matrix(matrix)
    weights = np.ones(len(array)) if class_counts is None else np.asarray(class_counts, dtype=np.float64)
    if weights.shape != (len(array),) or weights.min() < 0 or weights.sum() == 0:
        raise ConfigError(
            f"`class_counts` must hold one count, not negative, for each of {len(array)} classes, got {class_counts!r}."
        )
    return float(1 - np.average(np.diag(array), weights=weights))


def _check_num_classes(num_classes: int) -> int:
    if num_classes < 2:
        raise ConfigError(f"`num_classes` must be at least 2: a label needs another to turn into, got {num_classes}.")
    return num_classes
