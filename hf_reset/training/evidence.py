"""Has validation really turned? The paired comparison of validation rows on which resets begin.

Two evaluations of one run see the same rows, so the difference of their mean losses has far less noise than
either mean: what counts is the spread of the rows' *differences*. Pure numpy; `hf_reset.policy` decides by the
numbers that come from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_reset.metrics.calibrated import CalibratedLoss

_Rows: TypeAlias = NDArray[np.float64]

LossRows: TypeAlias = tuple[_Rows, _Rows]
"""Each validation row's loss, and that of a model that knows the labels' frequencies alone: (N,) and (N,)."""

EVALUATIONS = 2  # that are averaged before they are held against the anchor: one alone swings with its last batches


class RowSource(Protocol):
    """What an evaluation leaves behind for a paired comparison: `hf_reset.metrics.evaluation.CalibratedMetrics`.

    Attributes:
        latest: what the calibrated loss found at the last evaluation, None before the first.
    """

    latest: CalibratedLoss | None

    def take_rows(self) -> LossRows | None:
        """Losses of the rows of the last evaluation, and those of a model that knows the labels' frequencies alone.

        Both of shape (N,), lower is better, in the evaluation set's order, NaN where a row has no label. None where
        there was no evaluation since the last call.
        """
        ...


@dataclass(frozen=True)
class Margins:
    """What one evaluation says, in standard errors of a paired difference.

    Args:
        worse: how far validation lies above the anchor's (mean of the last `EVALUATIONS` since the anchor);
            None where that cannot be told, below 0 where it is better.
        learned: how far the anchor lies below what the labels' frequencies alone give. None: not known.
    """

    worse: float | None = None
    learned: float | None = None


@dataclass(frozen=True)
class Reference:
    """What a race against the anchor needs of it (`hf_reset.training.racing`), and what answers for it.

    Attributes:
        rows: its rows' losses, by the metric that chooses, shape (N,); NaN where a row has no label.
        labels: shape (N,).
        metrics: the numbers that its evaluation gave, by name.
        fit: what the calibrated loss found there.
        foreseen: each row's loss less the anchor's when it was last met, shape (N,), 0 before; None where none was.
            Candidates of one run are alike, so that it says much of the next.
    """

    rows: _Rows
    labels: NDArray[np.int64]
    metrics: dict[str, float]
    fit: CalibratedLoss
    foreseen: _Rows | None = None

    def met(self, differences: _Rows) -> Reference:
        """With what was found of the rows met: their losses less the anchor's, (N,); not finite in others."""
        before = 0.0 if self.foreseen is None else self.foreseen
        return replace(self, foreseen=np.where(np.isfinite(differences), differences, before))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        fit = {**vars(self.fit), "rows": self.fit.rows.tolist()}
        return {
            "rows": self.rows.tolist(),
            "labels": self.labels.tolist(),
            "metrics": self.metrics,
            "fit": fit,
            "foreseen": None if self.foreseen is None else self.foreseen.tolist(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Reference:
        """What `as_json` gave."""
        fit = CalibratedLoss(**{**values["fit"], "rows": np.array(values["fit"]["rows"])})
        labels = np.array(values["labels"], np.int64)
        known = values.get("foreseen")  # an older checkpoint has none
        foreseen = None if known is None else np.array(known)
        return cls(np.array(values["rows"]), labels, values["metrics"], fit, foreseen)


@dataclass(frozen=True)
class RowEvidence:
    """The anchor's validation rows, and those of the evaluations since.

    Attributes:
        anchor: the rows' losses at the anchor, shape (N,); None before the first.
        baseline: those of the labels' frequencies, shape (N,).
        recent: of the last evaluations since the anchor, oldest first, `EVALUATIONS` - 1 of them; NaN in rows that a
            race did not come to.
        reference: of the anchor, where evaluations are races against it.
    """

    anchor: _Rows | None = None
    baseline: _Rows | None = None
    recent: tuple[_Rows, ...] = field(default=())
    reference: Reference | None = None

    @property
    def learned(self) -> float | None:
        """How far the anchor lies below the labels' frequencies, in standard errors; None where it is not known."""
        return None if self.anchor is None or self.baseline is None else paired_margin(self.baseline, self.anchor)

    def margins(self, rows: _Rows) -> Margins:
        """What an evaluation with these rows says of itself and of the anchor."""
        if self.anchor is None or self.anchor.shape != rows.shape:
            return Margins()  # no anchor yet, or the evaluation set is another one now
        worse = paired_margin(_mean_of_known([*self.recent, rows]), self.anchor)
        return Margins(0.0 if worse is None else worse, self.learned)  # None: weights just put back, no worse

    def seen(self, rows: _Rows) -> RowEvidence:
        """With one more evaluation that the anchor did not move to."""
        return replace(self, recent=(*self.recent, rows)[-(EVALUATIONS - 1) :])

    def moved(self, rows: _Rows, baseline: _Rows | None) -> RowEvidence:
        """With the anchor at the weights just evaluated."""
        return RowEvidence(rows, baseline)

    def left(self) -> RowEvidence:
        """After a reset: the evaluations of the excursion that ended say nothing of the next."""
        return replace(self, recent=())

    def as_json(self) -> dict[str, object]:
        """Plain values; numbers survive the way through JSON exactly."""
        return {
            "anchor": None if self.anchor is None else self.anchor.tolist(),
            "baseline": None if self.baseline is None else self.baseline.tolist(),
            "recent": [rows.tolist() for rows in self.recent],
            "reference": None if self.reference is None else self.reference.as_json(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RowEvidence:
        """What `as_json` gave."""
        anchor, baseline = (None if values[key] is None else np.array(values[key]) for key in ("anchor", "baseline"))
        known = values.get("reference")  # a checkpoint of before races has none
        reference = None if known is None else Reference.from_json(known)
        return cls(anchor, baseline, tuple(np.array(rows) for rows in values["recent"]), reference)


def _mean_of_known(evaluations: list[_Rows]) -> _Rows:
    """Each row's mean over the evaluations that came to it, NaN where none did."""
    values = np.array(evaluations)
    count = (~np.isnan(values)).sum(axis=0)
    return np.divide(np.nansum(values, axis=0), count, out=np.full(values.shape[1], np.nan), where=count > 0)


def paired_margin(above: _Rows, below: _Rows) -> float | None:
    """Mean of `above` - `below` over the rows that have both, in standard errors of that mean.

    Args:
        above: one loss a row, shape (N,).
        below: another loss of the same rows, shape (N,).

    Returns:
        None for fewer than two such rows, and where the difference is the same in every row (identical weights).
    """
    difference = above - below
    difference = difference[np.isfinite(difference)]
    if len(difference) < 2:
        return None
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return float(difference.mean()) / error if error > 0 else None
