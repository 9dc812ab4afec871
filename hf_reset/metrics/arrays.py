"""What users hand over, numpy arrays, torch tensors or lists, as checked numpy arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_reset.errors import DataError

IGNORE_INDEX = -100
"""The label of a row (or token) that takes no part, as in PyTorch's cross-entropy."""


def to_numpy(values: object) -> np.ndarray:
    """Return `values` as a numpy array; a tensor leaves its device, bfloat16 becomes float32."""
    detach = getattr(values, "detach", None)
    if detach is not None:  # a tensor, told without importing torch
        tensor = detach().cpu()
        return (tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DataError(f"Rows of one length are needed to make an array, got a {type(values).__name__}.") from error


def class_numbers(labels: object, num_rows: int, num_classes: int) -> NDArray[np.int64]:
    """Check labels against the rows and classes that they belong to.

    Args:
        labels: Class numbers, shape (N,) or (N, 1); −100 where a row has no label.
        num_rows: N.
        num_classes: K.

    Returns:
        int64, shape (N,).

    Raises:
        DataError: Another shape, targets of regression or of several labels a row, numbers outside [0, K).
    """
    array = to_numpy(labels)
    if array.ndim == 2 and array.shape[1] == num_classes > 1:
        raise DataError(
            f"`labels` has shape {array.shape}, one target a class: that is a multi-label problem, and one class "
            "number a row is needed here."
        )
    if array.size != num_rows or array.shape not in ((num_rows,), (num_rows, 1)):
        raise DataError(f"`labels` must hold one class number for each of {num_rows} rows, got shape {array.shape}.")
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"`labels` must be class numbers (integers), got {array.dtype}: targets of a regression have no classes."
        )
    array = array.reshape(num_rows).astype(np.int64)
    wrong = np.flatnonzero(((array < 0) | (array >= num_classes)) & (array != IGNORE_INDEX))
    if wrong.size:
        raise DataError(
            f"`labels` must lie in [0, {num_classes}), or be {IGNORE_INDEX} where a row has none, but row {wrong[0]} "
            f"is {array[wrong[0]]}."
        )
    return array
