"""The tables of a comparison: every method beside the stronger best checkpoint of plain training.

The baseline is what a user has already: plain training, and the checkpoint that noisy validation chooses by its
loss or by its accuracy, whichever is better on that setting over its seeds. Other methods are read likewise; those
with resets or refinement by the calibrated loss, everywhere alike, since it is what they are run with.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_reset.errors import DataError
from hf_reset.report.results import value_at
from hf_reset.report.tables import Record, markdown_table, mean_and_sd, spread_text

CLASSIC = ("loss", "accuracy")  # what chooses a checkpoint without this package
_SHOWN = {"smoothed": "calibrated, smooth"}  # of `choices_table`
_TIE = 0.005  # of accuracy: differences below half a point count as none
_RESAMPLES = 10_000
_MOST_COLUMNS = 4  # settings beyond which a row a method would be too wide to read; `cells_table` has them then


@dataclass(frozen=True)
class Line:
    """One method in the table.

    Attributes:
        arm: its name.
        reading: what chose its checkpoint: "loss", "accuracy", "calibrated", "last", or "loss/accuracy" for the
            stronger of the two on each setting.
        cells: setting to the clean test accuracies of its seeds, seed to value.
    """

    arm: str
    reading: str
    cells: Mapping[str, Mapping[int, float]]

    @property
    def name(self) -> str:
        """The method, and what chose its checkpoint where that is not what the method is run with."""
        said = {"last": ", last", "accuracy": ", by accuracy"}
        return self.arm + said.get(self.reading, "")

    def mean(self, setting: str) -> float:
        """Mean over the seeds of a setting."""
        return statistics.fmean(self.cells[setting].values())


@dataclass(frozen=True)
class Difference:
    """A method less the baseline, over the settings and seeds that both have, in points of accuracy (0 to 100).

    Attributes:
        mean: over settings, each the mean of its seeds.
        low: lower end of the 95 % bootstrap interval; settings, and seeds within them, are drawn again.
        high: its upper end.
        wins: settings ahead by half a point and more.
        ties: within half a point.
        losses: behind.
        worst: the setting furthest behind, in points.
    """

    mean: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    worst: float

    @property
    def settings(self) -> int:
        """How many settings both have."""
        return self.wins + self.ties + self.losses

    @property
    def interval(self) -> str:
        """The mean and its interval, as the tables show them."""
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"

    @property
    def tally(self) -> str:
        """Won, tied and lost settings, as the tables show them."""
        return f"{self.wins} / {self.ties} / {self.losses}"


def settings_of(records: Sequence[Record]) -> list[str]:
    """Names of the settings, in the order in which they first appear."""
    return list(dict.fromkeys(record["setting"]["name"] for record in records))


def line(records: Sequence[Record], arm: str, reading: str) -> Line:
    """One method, read by `reading` ("loss/accuracy": the stronger on each setting, by its mean over seeds).

    Raises:
        DataError: the study has no record of that method.
    """
    cells: dict[str, Mapping[int, float]] = {}
    for setting in settings_of(records):
        of_cell = [one for one in records if one["setting"]["name"] == setting and one["arm"] == arm]
        if of_cell:
            ways = [
                {one["seed"]: one["test_accuracy"][way] for one in of_cell}
                for way in reading.split("/")
                if all(one["test_accuracy"].get(way) is not None for one in of_cell)
            ]
            if ways:
                cells[setting] = max(ways, key=lambda values: statistics.fmean(values.values()))
    if not cells:
        raise DataError(f"the study has no record of the arm {arm!r} with a reading by {reading!r}.")
    return Line(arm, reading, cells)


def difference(method: Line, baseline: Line, settings: Sequence[str], *, seed: int = 0) -> Difference | None:
    """A method less the baseline, paired by setting and seed; None where they share none.

    Args:
        method: the one.
        baseline: the other.
        settings: those to take in.
        seed: of the bootstrap's draws.
    """
    pairs = paired_points(method, baseline, settings)
    if not pairs:
        return None
    means = np.array([values.mean() for values in pairs])
    rng = np.random.default_rng(seed)
    resampled = np.array(
        [values[rng.integers(len(values), size=(_RESAMPLES, len(values)))].mean(1) for values in pairs]
    )
    drawn = rng.integers(len(pairs), size=(_RESAMPLES, len(pairs)))
    overall = resampled[drawn, np.arange(_RESAMPLES)[:, None]].mean(1)
    low, high = np.percentile(overall, [2.5, 97.5])
    return Difference(
        float(means.mean()),
        float(low),
        float(high),
        int((means > 100 * _TIE).sum()),
        int((np.abs(means) <= 100 * _TIE).sum()),
        int((means < -100 * _TIE).sum()),
        float(means.min()),
    )


def paired_points(method: Line, baseline: Line, settings: Sequence[str]) -> list[NDArray[np.float64]]:
    """The differences in points, an array over the shared seeds for each setting that both have."""
    pairs = []
    for setting in settings:
        mine, other = method.cells.get(setting, {}), baseline.cells.get(setting, {})
        shared = sorted(mine.keys() & other.keys())
        if shared:
            pairs.append(100 * np.array([mine[one] - other[one] for one in shared]))
    return pairs


def lines_of(records: Sequence[Record]) -> list[Line]:
    """The rows of the table: plain training's readings first, then each method by its own.

    Methods with resets or refinement are read by the calibrated loss, which chose their anchors, and by noisy accuracy.
    """
    found = [line(records, "plain", reading) for reading in ("last", "loss", "accuracy", "calibrated")]
    for arm in dict.fromkeys(record["arm"] for record in records):
        if arm != "plain":
            ours = any(record["is_ours"] for record in records if record["arm"] == arm)
            readings = ("calibrated", "accuracy") if ours else ("/".join(CLASSIC),)
            found += [line(records, arm, reading) for reading in readings]
    return found


def first_lines(records: Sequence[Record]) -> dict[str, Line]:
    """Each method as it is read first, by name: ours by the calibrated loss, plain training by its last weights."""
    found: dict[str, Line] = {}
    for one in lines_of(records):
        found.setdefault(one.arm, one)
    return found


def baseline_of(records: Sequence[Record]) -> Line:
    """The stronger best checkpoint of plain training, on each setting."""
    return line(records, "plain", "/".join(CLASSIC))


def comparison_table(records: Sequence[Record], settings: Sequence[str] | None = None) -> str:
    """Markdown: a row a method, its difference to the best checkpoint, and the settings where they are few.

    Args:
        records: of the study.
        settings: those to take in; None: all.
    """
    settings = settings_of(records) if settings is None else settings
    baseline = baseline_of(records)
    shown = settings if len(settings) <= _MOST_COLUMNS else []
    gaps = ["to best checkpoint (95 %)", "worst", "won / tied / lost"]
    rows, headings = [], ["method", "checkpoint by", "settings", *shown, *gaps, "seconds"]
    for one in lines_of(records):
        cells = [_cell(one.cells.get(setting)) for setting in shown]
        gap = difference(one, baseline, settings)
        if gap is None:
            continue
        seconds = mean_and_sd([r.get("train_seconds") for r in records if r["arm"] == one.arm])
        rows.append(
            [
                one.arm,
                one.reading,
                str(gap.settings),
                *cells,
                gap.interval,
                f"{gap.worst:+.1f}",
                gap.tally,
                "–" if seconds is None else f"{seconds[0]:.0f}",
            ]
        )
    return markdown_table(headings, rows)


def last_weights_table(records: Sequence[Record], settings: Sequence[str] | None = None) -> str:
    """Markdown: a row a method, its last step's weights beside what validation would choose.

    Both are held against the best checkpoint: for whoever lets training end and looks at nothing.

    Args:
        records: of the study.
        settings: those to take in; None: all.
    """
    settings = settings_of(records) if settings is None else settings
    baseline, rows = baseline_of(records), []
    for arm, first in first_lines(records).items():
        last = difference(line(records, arm, "last"), baseline, settings)
        chosen = paired_points(baseline if arm == "plain" else first, baseline, settings)
        if last is not None and chosen:
            best = f"{statistics.fmean(points.mean() for points in chosen):+.1f}"
            rows.append((last.mean, [arm, str(last.settings), best, last.interval, f"{last.worst:+.1f}", last.tally]))
    rows.sort(key=lambda row: -row[0])
    headings = ["method", "settings", "chosen, to best checkpoint", "last weights, to best checkpoint (95 %)", "worst"]
    return markdown_table([*headings, "won / tied / lost"], [row for _, row in rows])


def headline_table(records: Sequence[Record], settings: Sequence[str], arms: Sequence[str]) -> str:
    """Markdown: plain training's last weights, the best checkpoint, and some methods, on the settings all of them have.

    Args:
        records: of the study.
        settings: those to take in.
        arms: the methods, by name.
    """
    baseline = baseline_of(records)
    lines = [("plain, last step", line(records, "plain", "last")), ("plain, best checkpoint", baseline)]
    lines += [(one.name, one) for one in lines_of(records) if one.arm in arms]
    shared = [setting for setting in settings if all(setting in one.cells for _, one in lines)]
    if not shared:
        raise DataError(f"there is no setting that {', '.join(name for name, _ in lines)} all have a record on.")
    rows = []
    for name, one in lines:
        gap = difference(one, baseline, shared)
        mean = statistics.fmean(one.mean(setting) for setting in shared)
        told = ["–", "–", "–"]
        if gap is not None and one is not baseline:
            told = [gap.interval, f"{gap.worst:+.1f}", gap.tally]
        rows.append([name, f"{100 * mean:.1f} %", *told])
    heading = f"clean test accuracy, mean of {len(shared)} columns"
    return markdown_table(
        ["", heading, "points to the best checkpoint (95 %)", "worst column", "won / tied / lost"], rows
    )


def cells_table(records: Sequence[Record], arms: Sequence[str] | None = None) -> str:
    """Markdown: a row a setting, a column a method, mean ± sample standard deviation over the seeds.

    Args:
        records: of the study.
        arms: the methods; None: those with a record on most settings. The best checkpoint comes first.
    """
    settings = settings_of(records)
    lines = [one for one in lines_of(records) if one.arm != "plain" or one.reading == "last"]
    if arms is None:
        lines = [one for one in lines if 2 * len(one.cells) > len(settings)]
    else:
        lines = [one for one in lines if one.arm in arms]
    baseline = baseline_of(records)
    headings = ["setting", "seeds", "best checkpoint", *(one.name for one in lines)]
    rows = [
        [
            setting,
            str(len(baseline.cells.get(setting, {}))),
            *(_cell(one.cells.get(setting)) for one in (baseline, *lines)),
        ]
        for setting in settings
    ]
    return markdown_table(headings, rows)


def choices_table(records: Sequence[Record]) -> str:
    """Markdown: what each figure of noisy validation chose in plain training, and the noise level fitted.

    The fit is that of the evaluation that it chose; beside it the share of validation labels that are wrong.
    """
    ways = (*CLASSIC, "calibrated")
    if any("smoothed" in record["test_accuracy"] for record in records):
        ways = (*ways, "smoothed")
    rows, means = [], []
    for setting in settings_of(records):
        cell = [r for r in records if r["setting"]["name"] == setting and r["arm"] == "plain"]
        # Records of before "smoothed" lack it: of a setting, some seed must have it.
        if not cell or any(all(r["test_accuracy"].get(way) is None for r in cell) for way in ways):
            continue
        values = {way: [r["test_accuracy"][way] for r in cell if way in r["test_accuracy"]] for way in ways}
        means.append([statistics.fmean(values[way]) for way in ways])
        fitted = [value_at(r["history"].get("label_noise", []), r["best_step"]["calibrated"]) for r in cell]
        wrong = mean_and_sd([r.get("validation_wrong") for r in cell])
        rows.append(
            [
                *(setting, str(len(cell)), *(spread_text(values[way]) for way in ways)),
                *(spread_text(fitted), "–" if wrong is None else f"{wrong[0]:.3f}"),
            ]
        )
    if means:
        rows.append(["mean", "", *(f"{statistics.fmean(column):.3f}" for column in zip(*means, strict=True)), "", ""])
    chosen = [f"chosen by {_SHOWN.get(way, way)}" for way in ways]
    return markdown_table(["setting", "seeds", *chosen, "noise fitted", "labels wrong"], rows)


def suspects_table(records: Sequence[Record], settings: Sequence[str] | None = None) -> str:
    """Markdown: AUROC of each method's suspects against the labels that are known to be wrong.

    A row a method; where there are many settings, a row a setting, and the methods with a figure on most of them.
    """
    settings = settings_of(records) if settings is None else settings
    arms = [
        arm
        for arm in dict.fromkeys(record["arm"] for record in records)
        if any(_auroc(record) is not None for record in records if record["arm"] == arm)
    ]
    rows: list[list[str]] = []
    for arm in arms:
        of_arm = [record for record in records if record["arm"] == arm]
        for key, what in (("suspects_auroc", "row memory"), ("loss_auroc", "loss at best checkpoint")):
            cells = [
                spread_text([r.get(key) for r in of_arm if r["setting"]["name"] == setting]) for setting in settings
            ]
            if any(cell != "–" for cell in cells):
                rows.append([arm, _ranked_by(of_arm, key, what), *cells])
    if len(settings) <= _MOST_COLUMNS:
        return markdown_table(["method", "ranked by", *settings], rows)
    common = [row for row in rows if 2 * sum(cell != "–" for cell in row[2:]) > len(settings)]
    turned = [[setting, *(row[2 + place] for row in common)] for place, setting in enumerate(settings)]
    shown = [row for row in turned if any(cell != "–" for cell in row[1:])]
    return markdown_table(["setting", *(f"{method}, {ranked}" for method, ranked, *_ in common)], shown)


def _cell(seeds: Mapping[int, float] | None) -> str:
    return spread_text(list((seeds or {}).values()))


def _auroc(record: Record) -> float | None:
    return record.get("suspects_auroc") or record.get("loss_auroc")


def _ranked_by(records: Sequence[Record], key: str, otherwise: str) -> str:
    """What ranked the rows, where a record says so itself (as cleanlab's do)."""
    said = (record["ranked_by"] for record in records if key == "suspects_auroc" and "ranked_by" in record)
    return next(said, otherwise)
