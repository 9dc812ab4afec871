"""Several runs, of which noisy validation takes one: what trying two methods and keeping the better gives."""

from __future__ import annotations

from collections.abc import Sequence

from hf_reset.errors import DataError
from hf_reset.report.tables import Record


def best_of(records: Sequence[Record], arms: Sequence[str]) -> list[Record]:
    """One record for each setting and seed that all the arms have: that of the arm with the best noisy accuracy.

    Accuracy is what losses of different kinds have in common. Of each run its highest counts, whatever then chose the
    run's checkpoint; of equals the arm named first is taken. Nothing of the clean test is looked at.

    Args:
        records: of the study.
        arms: two methods or more, by name.

    Returns:
        Copies of the records taken, under the arm "best of …", with the seconds of all the runs.

    Raises:
        DataError: fewer than two arms, or no setting and seed that all of them have.
    """
    cells: dict[tuple[str, int], dict[str, Record]] = {}
    for record in records:
        if record["arm"] in arms:
            cells.setdefault((record["setting"]["name"], record["seed"]), {})[record["arm"]] = record
    whole = [[cell[arm] for arm in arms] for cell in cells.values() if len(cell) == len(set(arms))]
    if len(set(arms)) < 2 or not whole:
        raise DataError(f"there is no best of {', '.join(arms)}: it takes two arms, and a setting and seed they share.")
    name = f"best of {', '.join(arms)}"
    return [
        {**max(runs, key=_best_accuracy), "arm": name, "train_seconds": sum(run["train_seconds"] for run in runs)}
        for runs in whole
    ]


def _best_accuracy(record: Record) -> float:
    return max(value for _, value in record["history"]["accuracy"])
