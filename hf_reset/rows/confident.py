"""How many labels are wrong, and which class is taken for which, from predicted probabilities and given labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_reset.errors import DataError
from hf_reset.metrics.arrays import IGNORE_INDEX, class_numbers, to_numpy


@dataclass(frozen=True, eq=False)
class NoiseEstimate:
    """What `estimate_noise` found; K classes, numbered as the labels are."""

    rate: float
    """Share of wrong labels among the rows that were judged, in [0, 1]."""
    class_rates: NDArray[np.float64]
    """P(true ≠ i | given = i), shape (K,): the share of wrong labels among those that say i; NaN for a class
    that no row was given."""
    joint: NDArray[np.float64]
    """Q[i, j] = P(given = i, true = j), shape (K, K), summing to 1. Off the diagonal: what is taken for what."""
    transition: NDArray[np.float64]
    """T[j, i] = P(given = i | true = j), shape (K, K), rows summing to 1: the matrix of `hf_reset.noise`. The
    identity's row for a class that is no row's true one."""
    counts: NDArray[np.int64]
    """Rows judged of each given class, shape (K,)."""


def estimate_noise(probabilities: ArrayLike, labels: ArrayLike) -> NoiseEstimate:
    """Estimate noise rates and the confusion of labels by confident learning.

    A row counts for class j where its probability of j is at least what rows given j have on average, and it is
    j's if that is the most probable such class. The counts by given class are then scaled to how often each
    label was given. Predictions of rows that the model was trained on flatter their given labels: use
    predictions from before a row was learnt (a row memory, or out-of-fold), or the rates come out too low.

    Args:
        probabilities: Predicted class probabilities, shape (N, K), rows summing to 1; a row of NaN was never
            predicted and is left out.
        labels: Given class numbers, shape (N,); −100 is left out.

    Returns:
        A `NoiseEstimate`.

    Raises:
        DataError: Shapes, labels or probabilities that do not fit, more classes than rows, or no row to judge.

    References:
        Curtis Northcutt, Lu Jiang, Isaac Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels",
        JAIR 70, 2021, eq. 1 to 3, https://arxiv.org/abs/1911.00068.

    Example:
        >>> import numpy as np
        >>> found = estimate_noise(np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9]]), [0, 0, 1, 0])
        >>> found.rate, found.class_rates.round(2).tolist()
        (0.25, [0.33, 0.0])
    """
    predicted, given = check_predictions(probabilities, labels)
    is_judged = (given != IGNORE_INDEX) & ~np.isnan(predicted[:, 0])
    if not is_judged.any():
        raise DataError("No row has both a label and a prediction, so there is nothing to judge labels by.")
    predicted, given = predicted[is_judged], given[is_judged]
    num_classes = predicted.shape[1]
    counts = np.bincount(given, minlength=num_classes)
    joint = _confident_counts(predicted, given, counts)
    joint *= (counts / joint.sum(axis=1))[:, None] / len(given)
    with np.errstate(invalid="ignore"):
        class_rates = 1 - np.diag(joint) * len(given) / counts
    return NoiseEstimate(
        rate=float(np.clip(1 - np.trace(joint), 0, 1)),
        class_rates=np.clip(class_rates, 0, 1),
        joint=joint,
        transition=_rows_to_one(joint.T),
        counts=counts,
    )


def _confident_counts(
    predicted: NDArray[np.float64], given: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """C[i, j]: rows given i that confidently are j. A given class without a confident row is taken to be right."""
    num_classes = len(counts)
    sums = np.zeros(num_classes)
    np.add.at(sums, given, predicted[np.arange(len(given)), given])
    with np.errstate(invalid="ignore"):
        thresholds = np.where(counts > 0, sums / counts, np.inf)  # no row was given it: nothing can be its
    # A mean of equal probabilities can lie above them all by rounding.
    confident = np.where(predicted >= thresholds - 1e-9, predicted, -1.0)
    is_counted = confident.max(axis=1) >= 0
    table = np.zeros((num_classes, num_classes))
    np.add.at(table, (given[is_counted], confident.argmax(axis=1)[is_counted]), 1)
    empty = np.flatnonzero(table.sum(axis=1) == 0)
    table[empty, empty] = 1
    return table


def _rows_to_one(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    sums = matrix.sum(axis=1, keepdims=True)
    return np.where(sums > 0, matrix / np.where(sums > 0, sums, 1), np.eye(len(matrix)))


def check_predictions(probabilities: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Check class probabilities (N, K) and the labels (N,) that they are held against.

    Returns:
        Both as arrays: float64, and int64 with −100 where a row has no label.

    Raises:
        DataError: What `estimate_noise` refuses.
    """
    array = to_numpy(probabilities)
    if array.ndim != 2 or array.shape[1] < 2:
        raise DataError(
            f"`probabilities` must have shape (N, K), one column for each of at least 2 classes, got {array.shape}. "
            "For two classes with one probability p give the columns 1 - p and p."
        )
    if array.shape[1] > array.shape[0]:
        raise DataError(
            f"`probabilities` has more classes than rows, shape {array.shape}: too little to tell how labels go "
            "wrong. If its rows are the classes, transpose it."
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"`probabilities` must be floating-point numbers, got {array.dtype}.")
    array = array.astype(np.float64)
    unknown = np.isnan(array)
    wrong = np.flatnonzero(unknown.any(axis=1) & ~unknown.all(axis=1))
    if wrong.size:
        raise DataError(f"`probabilities` is NaN in some classes of row {wrong[0]}: give all of them, or NaN in all.")
    sums = array.sum(axis=1)
    wrong = np.flatnonzero((array < 0).any(axis=1) | (np.abs(sums - 1) > 0.01))
    if wrong.size:
        raise DataError(
            f"`probabilities` must not be below 0 and must sum to 1 in each row, but row {wrong[0]} sums to "
            f"{sums[wrong[0]]:.4g} with {array[wrong[0]].min():.4g} the least. Logits need a softmax first."
        )
    return array, class_numbers(labels, *array.shape)
