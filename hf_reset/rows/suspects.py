"""The rows whose label looks wrong, ranked: a table with cleanlab's column names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hf_reset.errors import DataError
from hf_reset.metrics.arrays import IGNORE_INDEX, to_numpy
from hf_reset.rows.confident import check_predictions, estimate_noise

if TYPE_CHECKING:
    from hf_reset.rows.memory import RowMemory
    from hf_reset.rows.responses import ResponseMemory


def find_suspects(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    noise_rate: float | None = None,
    budget: int | None = None,
    margins: ArrayLike | None = None,
    **columns: ArrayLike | None,
) -> pd.DataFrame:
    """Rank rows by how wrong their label looks.

    The margin of a row is the probability of its given label less that of the most probable other class (Pleiss
    et al., NeurIPS 2020, arXiv 2001.10528, there of logits). Flagged are rows of margin below 0: of each given
    class at most the share of wrong labels that `estimate_noise` finds in it, the lowest margins first; with
    `noise_rate`, at most that share of all rows instead.

    Noise that a model can learn, such as one class called another by rule, shows neither here nor in any other
    list made from predictions. Read the rows before dropping any, and do not drop rows of a test set by such a
    list: what is hard for the model would go with what is wrong.

    Args:
        probabilities: Predicted class probabilities, shape (N, K), rows summing to 1; NaN in all classes of a
            row that was never predicted. Best from before the model learnt the row: a mean over the visits of
            a run with resets, or out-of-fold.
        labels: Given class numbers, shape (N,); −100 where a row has none.
        noise_rate: Share of wrong labels in [0, 1]; None to estimate it class by class.
        budget: At most this many rows are flagged, the worst. None: no limit.
        margins: In [−1, 1], shape (N,), to rank by instead, such as means over visits; NaN where there is none.
        **columns: More columns of the table, each (N,), such as `visits`, `wrong_events`, `in_training`.

    Returns:
        A table indexed by the row's number, 0 … N − 1, with the columns `is_label_issue`, `label_quality`
        ((1 + margin) / 2 in [0, 1], low is bad, below 0.5 where another class is more probable), `given_label`,
        `predicted_label`, `margin`, `given_probability`, `rank` (1 is the worst), and those of `columns`. A row
        without label or prediction is no issue; quality, margin and rank are missing there, and the missing
        label is −100.

    Raises:
        DataError: Shapes, labels or probabilities that do not fit, more classes than rows, no row to judge, or
            an option out of range.

    Example:
        >>> import numpy as np
        >>> table = find_suspects(np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9]]), [0, 0, 1, 0])
        >>> table.index[table["is_label_issue"]].tolist(), table["label_quality"].round(2).tolist()
        ([3], [0.9, 0.8, 0.8, 0.1])
    """
    predicted, given = check_predictions(probabilities, labels)
    estimate = estimate_noise(predicted, given)
    judged_by = _margins_of(predicted, given) if margins is None else margins
    is_unknown = np.isnan(predicted[:, 0])
    best = np.where(is_unknown, IGNORE_INDEX, np.nan_to_num(predicted).argmax(axis=1))
    at_given = predicted[np.arange(len(given)), np.maximum(given, 0)]
    at_given[given == IGNORE_INDEX] = np.nan
    allowed = np.nan_to_num(estimate.class_rates) * estimate.counts if noise_rate is None else None
    columns = {"given_probability": at_given, **columns}
    return rank_by_margin(judged_by, given, best, noise_rate=noise_rate, allowed=allowed, budget=budget, **columns)


def rank_by_margin(
    margins: ArrayLike,
    labels: ArrayLike,
    predicted_labels: ArrayLike,
    *,
    noise_rate: float | None = None,
    allowed: ArrayLike | None = None,
    budget: int | None = None,
    **columns: ArrayLike | None,
) -> pd.DataFrame:
    """The table of `find_suspects` from margins alone, for row memories that keep no class probabilities.

    Args:
        margins: In [−1, 1], shape (N,); NaN where a row was never predicted.
        labels: Given class numbers, shape (N,); −100 where a row has none.
        predicted_labels: Class numbers, shape (N,); −100 where a row was never predicted.
        noise_rate: At most this share of the judged rows is flagged. None: no such limit.
        allowed: At most how many rows of each given class are flagged, shape (K,). None: no such limit.
        budget: At most how many rows are flagged. None: no limit.
        **columns: More columns, each (N,).

    Returns:
        The table, with `columns` before `rank`.

    Raises:
        DataError: Lengths that differ, or an option out of range.
    """
    values, given = to_numpy(margins).astype(np.float64), to_numpy(labels)
    if values.shape != given.shape or values.ndim != 1:
        raise DataError(f"`margins` must hold one number for each of {len(given)} labels, got shape {values.shape}.")
    if (np.abs(values) > 1 + 1e-6).any():
        raise DataError(f"`margins` must lie in [-1, 1], differences of probabilities, got {np.nanmin(values):.4g}.")
    values = np.where(given == IGNORE_INDEX, np.nan, values).clip(-1, 1)
    judged = int((~np.isnan(values)).sum())
    is_issue = values < 0
    if allowed is not None:
        is_issue = lowest_of_each_class(values, given, is_issue, to_numpy(allowed))
    for limit in (_rows_allowed(noise_rate, judged), _check_budget(budget)):
        is_issue = is_issue if limit is None else lowest(values, is_issue, limit)
    table = {
        "is_label_issue": is_issue,
        "label_quality": (1 + values) / 2,
        "given_label": given,
        "predicted_label": to_numpy(predicted_labels),
        "margin": values,
        **{name: to_numpy(column) for name, column in columns.items() if column is not None},
    }
    if taken := sorted({*list(table)[:5], "rank"} & columns.keys()):
        raise DataError(f"`{taken[0]}` is a column of the table already. Call yours by another name.")
    return _ranked(table)


def suspects_of(
    memory: RowMemory,
    *,
    labels: ArrayLike | None = None,
    noise_rate: float | None = None,
    budget: int | None = None,
    in_training: ArrayLike | None = None,
) -> pd.DataFrame:
    """The table of `find_suspects` from what a run keeps of its rows.

    Args:
        memory: After `share`.
        labels: Given class numbers of all rows, shape (N,); None: those seen, −100 in rows not visited.
        noise_rate: As in `find_suspects`. A memory that keeps no class probabilities estimates none: there
            None flags every margin below 0.
        budget: As in `find_suspects`.
        in_training: Which rows were in the training set, shape (N,), for a column of that name.

    Returns:
        The table, with the columns `visits`, `wrong_events`, `mean_loss` and `in_training` too.

    Raises:
        DataError: As `find_suspects`; nothing has been visited, too.
    """
    given = memory.labels.long() if labels is None else labels
    columns: dict[str, ArrayLike | None] = {
        "visits": memory.visits,
        "wrong_events": memory.wrong_events,
        "mean_loss": memory.total.mean("loss"),
        "in_training": in_training,
    }
    if memory.keeps_probabilities:
        return find_suspects(
            memory.probabilities, given, noise_rate=noise_rate, budget=budget, margins=memory.margins, **columns
        )
    predicted = memory.last_predicted.long()
    return rank_by_margin(memory.margins, given, predicted, noise_rate=noise_rate, budget=budget, **columns)


def suspect_responses(
    memory: ResponseMemory,
    *,
    noise_rate: float | None = None,
    budget: int | None = None,
    in_training: ArrayLike | None = None,
) -> pd.DataFrame:
    """The responses that look as if they belonged to other prompts, from what a run keeps of them.

    Args:
        memory: After `share`, and with the losses before training set.
        noise_rate: Share of misplaced responses in [0, 1]; None: the memory's `estimated_noise`.
        budget: At most this many rows are flagged, the worst. None: no limit.
        in_training: Which rows were in the training set, shape (N,), for a column of that name.

    Returns:
        A table indexed by the row's number with the columns `is_label_issue`, `label_quality` (1 / (1 + ratio) in
        [0, 1], low is bad, below 0.5 where the prompt hinders), `loss_before` (mean token loss before training, behind
        the own prompt), `reference_loss` (behind another's), `ratio` of the two, `loss` (in training, see
        `ResponseMemory.losses`), `visits`, `in_training` where given, and `rank` (1 is the worst). What is missing in
        a row without visit or reference is NaN; without reference it is no issue.

    Raises:
        DataError: An option out of range.
    """
    ratios = to_numpy(memory.ratios).astype(np.float64)
    is_judged = ~np.isnan(ratios)
    rate = memory.estimated_noise if noise_rate is None else noise_rate
    is_issue = is_judged
    for limit in (_rows_allowed(rate, int(is_judged.sum())), _check_budget(budget)):
        is_issue = is_issue if limit is None else lowest(-ratios, is_issue, limit)
    table = {
        "is_label_issue": is_issue,
        "label_quality": 1 / (1 + ratios),
        "loss_before": to_numpy(memory.before),
        "loss": to_numpy(memory.losses),
        "reference_loss": to_numpy(memory.reference),
        "ratio": ratios,
        "visits": to_numpy(memory.visits),
        **({} if in_training is None else {"in_training": to_numpy(in_training)}),
    }
    return _ranked(table)


def lowest(values: NDArray[np.float64], among: NDArray[np.bool_], limit: int) -> NDArray[np.bool_]:
    """Which rows have the `limit` lowest values of those `among`; of equals the first. Shape (N,)."""
    rows = np.flatnonzero(among)
    rows = rows[np.argsort(values[rows], kind="stable")][:limit]
    chosen = np.zeros(len(among), dtype=bool)
    chosen[rows] = True
    return chosen


def lowest_of_each_class(
    values: NDArray[np.float64], given: np.ndarray, among: NDArray[np.bool_], allowed: np.ndarray
) -> NDArray[np.bool_]:
    """Which rows have the lowest values of their class, of each at most `allowed` (K,), rounded. Shape (N,)."""
    order = np.lexsort((values, given))
    order = order[among[order]]
    classes = given[order]
    place = np.arange(len(order)) - np.searchsorted(classes, classes)  # within the class, lowest value first
    chosen = np.zeros(len(values), dtype=bool)
    chosen[order[place < np.rint(allowed)[classes]]] = True
    return chosen


def _margins_of(predicted: NDArray[np.float64], given: NDArray[np.int64]) -> NDArray[np.float64]:
    rows, labels = np.arange(len(given)), np.maximum(given, 0)
    others = predicted.copy()
    others[rows, labels] = -np.inf
    return np.where(given == IGNORE_INDEX, np.nan, predicted[rows, labels] - others.max(axis=1))


def _rows_allowed(noise_rate: float | None, judged: int) -> int | None:
    if noise_rate is None:
        return None
    if not 0 <= noise_rate <= 1:
        raise DataError(f"`noise_rate` must be in [0, 1], the share of wrong labels, got {noise_rate}.")
    return round(noise_rate * judged)


def _check_budget(budget: int | None) -> int | None:
    if budget is not None and (isinstance(budget, bool) or budget != int(budget) or budget < 0):
        raise DataError(f"`budget` must be a number of rows to review, 0 or more, got {budget!r}.")
    return budget


def _ranked(table: dict[str, np.ndarray]) -> pd.DataFrame:
    num_rows = len(table["is_label_issue"])
    for name, column in table.items():
        if column.shape != (num_rows,):
            raise DataError(f"`{name}` must hold one value for each of {num_rows} rows, got shape {column.shape}.")
    frame = pd.DataFrame(table, index=pd.RangeIndex(num_rows, name="row"))
    frame["rank"] = frame["label_quality"].rank(method="first").astype("Int64")
    return frame
