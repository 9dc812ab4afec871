"""Accuracy, macro-F1 and label memory of predicted class numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_reset.errors import DataError


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Share of predictions equal to the reference.

    Args:
        predictions: Class numbers, shape (N,).
        references: Class numbers, shape (N,).

    Returns:
        A float in [0, 1].

    Raises:
        DataError: The two are empty or differ in length.
    """
    predicted, wanted = _same_length(predictions=predictions, references=references)
    return float((predicted == wanted).mean())


def macro_f1(predictions: ArrayLike, references: ArrayLike) -> float:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), each class alike however rare.

    The classes are those that occur in either list, as in scikit-learn.

    Args:
        predictions: Class numbers, shape (N,).
        references: Class numbers, shape (N,).

    Returns:
        A float in [0, 1].

    Raises:
        DataError: The two are empty or differ in length.
    """
    predicted, wanted = _same_length(predictions=predictions, references=references)
    classes, codes = np.unique(np.concatenate([predicted, wanted]), return_inverse=True)
    predicted, wanted = np.split(codes, 2)
    hits = np.bincount(predicted[predicted == wanted], minlength=len(classes))
    # 2 TP + FP + FN: each class's predictions and references, its hits in both.
    occurrences = np.bincount(predicted, minlength=len(classes)) + np.bincount(wanted, minlength=len(classes))
    return float((2 * hits / occurrences).mean())


def label_memory(predictions: ArrayLike, references: ArrayLike, clean_labels: ArrayLike) -> dict[str, float]:
    """What a model answers for the training rows whose label is wrong.

    The first share rises when wrong labels are memorised, the second when the model generalises over them
    (Liu et al., Early-Learning Regularization, NeurIPS 2020, arXiv 2007.00151, figure 1).

    Args:
        predictions: Predicted class numbers, shape (N,).
        references: Labels as given in training, shape (N,).
        clean_labels: True labels, shape (N,). Rows where these equal the references do not count.

    Returns:
        Shares of the mislabelled rows, summing to 1: "memory/wrong" (predicted as the wrong given label),
        "memory/clean" (as the true label), "memory/other" (as a third class).

    Raises:
        DataError: The lists are empty or differ in length, or no row is mislabelled.
    """
    predicted, given, clean = _same_length(predictions=predictions, references=references, clean_labels=clean_labels)
    mislabelled = given != clean
    if not mislabelled.any():
        raise DataError(
            "`references` equal `clean_labels` in every row: with no mislabelled row there is no memory of wrong "
            "labels to measure. Pass the labels as given in training, and the true ones."
        )
    wrong = float((predicted == given)[mislabelled].mean())
    right = float((predicted == clean)[mislabelled].mean())
    other = float(((predicted != given) & (predicted != clean))[mislabelled].mean())
    return {"memory/wrong": wrong, "memory/clean": right, "memory/other": other}


def _same_length(**lists: ArrayLike) -> list[NDArray[np.generic]]:
    arrays = {name: np.asarray(values) for name, values in lists.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1 or any(array.ndim != 1 or not array.size for array in arrays.values()):
        found = ", ".join(f"`{name}` {array.shape}" for name, array in arrays.items())
        raise DataError(f"One class number a row is needed in each list, and at least one row; got shapes {found}.")
    return list(arrays.values())
