"""Several runs of which noisy validation takes one: the better of two methods, or the value of a parameter."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from hf_reset.errors import DataError
from hf_reset.report.tables import Record, markdown_table


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


def settled_table(records: Sequence[Record], arms: Sequence[str]) -> str:
    """Markdown: a row a method, and the value of its parameter that noisy validation takes.

    A value's figure is the highest noisy accuracy of its run, as in `best_of`, averaged over settings and seeds; of
    equals the one named first is taken. Beside it stands the clean accuracy of that evaluation's weights.

    Args:
        records: of all values, on data that is in no other table.
        arms: "method, value", in the order of the plan; of each method the value that is used comes first.

    Raises:
        DataError: a value lacks a run that another has.
    """
    of_arm = {arm: [record for record in records if record["arm"] == arm] for arm in arms}
    runs = {arm: {(one["setting"]["name"], one["seed"]) for one in of_arm[arm]} for arm in arms}
    whole = set().union(*runs.values())
    if odd := [arm for arm in arms if runs[arm] != whole]:
        raise DataError(f"{odd[0]!r} lacks {len(whole - runs[odd[0]])} of {len(whole)} runs. Run the whole plan.")
    values: dict[str, list[str]] = {}
    for arm in arms:
        values.setdefault(arm.partition(", ")[0], []).append(arm.partition(", ")[2])
    rows, most = [], max(len(those) for those in values.values())
    for method, those in values.items():
        cells = [of_arm[f"{method}, {value}"] for value in those]
        noisy = [round(statistics.fmean(map(_best_accuracy, cell)), 9) for cell in cells]  # equals stay equal
        clean = [statistics.fmean(one["test_accuracy"]["accuracy"] for one in cell) for cell in cells]
        shown = [f"{value}: {one:.3f} ({other:.3f})" for value, one, other in zip(those, noisy, clean, strict=True)]
        rows.append([method, *shown, *[""] * (most - len(those)), those[noisy.index(max(noisy))]])
    return markdown_table(["method", "used", *["tried"] * (most - 1), "taken by noisy accuracy"], rows)


def _best_accuracy(record: Record) -> float:
    return max(value for _, value in record["history"]["accuracy"])
