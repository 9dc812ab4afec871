"""One method beside the others, on the very runs that both have: beside each, and column by column beside the best."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from hf_reset.errors import DataError
from hf_reset.report.comparison import Line, baseline_of, difference, first_lines, lines_of, paired_points, settings_of
from hf_reset.report.tables import Record, markdown_table, spread_text

TRUE_LABELS = {"train_on": "clean validation", "then_train_on": "clean validation", "validate_on": "clean labels"}
"""The overrides of a study's arm that is given the validation rows' true labels, and what each has to say."""


def rivals_table(records: Sequence[Record], ours: str, settings: Sequence[str] | None = None) -> str:
    """Markdown: one method beside each other one, on the very runs (setting and seed) that both have.

    Args:
        records: of the study.
        ours: the method, by name; its checkpoint is chosen by the calibrated loss, or noisy loss or accuracy where it
            is not one of this package's.
        settings: those to take in; None: all.

    Raises:
        DataError: the study has no record of it.
    """
    settings = settings_of(records) if settings is None else settings
    baseline, lines = baseline_of(records), lines_of(records)
    mine, rows = _line_of(records, ours), []
    for one in lines:
        gap = difference(mine, one, settings) if one.arm != ours else None
        if gap is None:
            continue
        its, own = _on_runs_of(one, mine), _on_runs_of(mine, one)
        means = [[values.mean() for values in paired_points(part, baseline, settings)] for part in (its, own)]
        rows.append(
            [
                one.name if one.arm != "plain" else f"plain, by {one.reading}",
                str(sum(len(its.cells.get(setting, {})) for setting in settings)),
                *(f"{statistics.fmean(points):+.1f}" if points else "–" for points in means),
                gap.interval,
                gap.tally,
            ]
        )
    return markdown_table(
        [
            "beside",
            "runs",
            "it, to best checkpoint",
            f"{ours}, to it",
            "the second less the first (95 %)",
            "won / tied / lost",
        ],
        rows,
    )


def _on_runs_of(one: Line, other: Line) -> Line:
    """The part of a line whose settings and seeds another has too."""
    cells = {
        setting: {seed: value for seed, value in seeds.items() if seed in other.cells.get(setting, {})}
        for setting, seeds in one.cells.items()
    }
    return Line(one.arm, one.reading, {setting: seeds for setting, seeds in cells.items() if seeds})


def best_rivals_table(records: Sequence[Record], ours: str, settings: Sequence[str] | None = None) -> str:
    """Markdown: on each setting the rival that comes out best beside one method, and how far that is ahead of it.

    Which is best is seen on the clean tests, so this is what a user would have who always guessed right. Each pair is
    read on the seeds that both have.

    Args:
        records: of the study.
        ours: the method, by name, read as in `rivals_table`.
        settings: those to take in; None: all.

    Returns:
        The table; where no rival has a run that it has, a sentence that says so.

    Raises:
        DataError: the study has no record of it.
    """
    settings = settings_of(records) if settings is None else settings
    names = _rivals_of(records)
    mine, rivals = _line_of(records, ours), [one for one in lines_of(records) if one.arm in names]
    rows, gaps = [], []
    for setting in settings:
        beside = [(paired_points(mine, one, [setting]), one) for one in rivals]
        if not (found := [(points[0].mean(), one) for points, one in beside if points]):
            continue
        _, best = min(found, key=lambda pair: pair[0])
        gap = difference(mine, best, [setting])  # of the best alone: it draws ten thousand times
        assert gap is not None
        its, own = (_on_runs_of(*pair).cells[setting] for pair in ((best, mine), (mine, best)))
        shown = [spread_text(list(seeds.values())) for seeds in (its, own)]
        rows.append([setting, str(len(found)), best.name, str(len(its)), *shown, f"{gap.mean:+.1f}"])
        gaps.append(gap)
    if not gaps:
        return f"No other method was run where {ours} was."
    won, tied, lost = (sum(getattr(gap, part) for gap in gaps) for part in ("wins", "ties", "losses"))
    mean = statistics.fmean(gap.mean for gap in gaps)
    rows.append(["won / tied / lost; mean", *[""] * 4, f"{won} / {tied} / {lost}", f"{mean:+.1f}"])
    headings = ["setting", "rivals", "the best of them", "seeds", "it", ours, "the second less the first"]
    return markdown_table(headings, rows)


def ours_on_most(records: Sequence[Record]) -> list[str]:
    """The methods of this package with a record on most of the settings, by name; where none has, all of them."""
    ours = {record["arm"] for record in records if record["is_ours"]}
    lines = [one for arm, one in first_lines(records).items() if arm in ours]
    most = [one for one in lines if 2 * len(one.cells) > len(settings_of(records))]
    return [one.arm for one in most or lines]


def _rivals_of(records: Sequence[Record]) -> list[str]:
    """The methods but plain training that are not of this package and see no label but the noisy ones, by name."""
    theirs = [one for one in records if not one["is_ours"] and not TRUE_LABELS.keys() & one.get("overrides", {}).keys()]
    return [arm for arm in dict.fromkeys(record["arm"] for record in theirs) if arm != "plain"]


def _line_of(records: Sequence[Record], arm: str) -> Line:
    """A method as it is read first."""
    found = first_lines(records).get(arm)
    if found is None:
        raise DataError(f"the study has no record of the arm {arm!r}.")
    return found
