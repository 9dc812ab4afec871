"""The figure of a study: a row of panels, its arms against one another, thin lines for seeds and their mean.

A record brings its curves along: `record["history"]` maps a series' name to `[[step, value], …]` and
`record["reset_steps"]` lists the steps at which a reset happened. matplotlib is imported only when a figure
is drawn, and drawn on without a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_reset.errors import DataError
from hf_reset.report.tables import Record, arms_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by all common forms of colour vision; dashes tell arms apart in grey.
_WITHOUT_RESETS = (("#D55E00", (0, (5, 2))), ("#E69F00", (0, (1, 1))), ("#CC79A7", "dashdot"))
_WITH_RESETS = (("#0072B2", "solid"), ("#009E73", (0, (3, 1, 1, 1))), ("#56B4E9", (0, (8, 1))))


_ENTRIES_A_PANEL = 2  # of a legend, in a row


@dataclass(frozen=True)
class Panel:
    """One panel of the figure.

    Args:
        series: name of the curve in `record["history"]`.
        title: what stands above it.
        ylabel: quantity and unit.
        marks_resets: draw a rug of the resets and of where they began, one row a seed, under the curves.
        final: key of a record whose value is drawn as a marker at the end of the run (the mean over seeds).
        final_label: what the legend says of that marker.
        limits: lower and upper end of the vertical axis; None lets the data choose.
    """

    series: str
    title: str
    ylabel: str
    marks_resets: bool = False
    final: str | None = None
    final_label: str = "at the last step"
    limits: tuple[float, float] | None = None


def plot_runs(
    records: Sequence[Record],
    panels: Sequence[Panel],
    path: str | Path,
    *,
    title: str | None = None,
    xlabel: str = "optimizer step",
) -> Path:
    """Draw the panels side by side and write them to `path` (its suffix says the format).

    A panel for which no record has a curve is left out.

    Args:
        records: the records of a results file.
        panels: left to right.
        path: where the picture goes; its folder is made if need be.
        title: a line above all panels.
        xlabel: label of the horizontal axes.

    Returns:
        The path.

    Raises:
        DataError: no record has a curve for any panel.
    """
    drawn = [panel for panel in panels if any(_curve(record, panel.series) for record in records)]
    if not drawn:
        names = ", ".join(panel.series for panel in panels)
        raise DataError(f"no record has a curve to draw: `history` holds none of {names}.")
    figure = new_figure(4.2 * len(drawn), 3.7)
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    styles = arm_styles(records)
    for axis, panel in zip(axes, drawn, strict=True):
        _draw_panel(axis, panel, records, styles)
        axis.set_xlabel(xlabel)
    handles, labels = _legend_entries(axes)
    rows = -(-len(labels) // (_ENTRIES_A_PANEL * len(drawn)))  # a longer legend would be cut off at both ends
    figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(labels) // rows), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return save_figure(figure, path)


def curves_figure(
    records: Sequence[Record],
    panels: Sequence[tuple[str, str, Mapping[str, str | tuple[str, str]]]],
    path: str | Path,
) -> Path:
    """Draw what a diagnostic logged in one run, against the step, and write it to `path`; returns the path.

    Args:
        records: with `step` and the named values, in order.
        panels: of each its title, the vertical axis' label, and the lines: what the legend says, and the key of the
            value; or two keys, of the lower and upper edge of a band.
        path: where the picture goes, its suffix says the format; its folder is made if need be.
    """
    figure = new_figure(4.2 * len(panels), 3.5)
    for axis, (title, unit, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, keys in lines.items():
            first, last = (keys, keys) if isinstance(keys, str) else keys
            points = [(r["step"], r[first], r[last]) for r in records if first in r and last in r]
            steps, low, high = zip(*points, strict=True) if points else ((), (), ())
            if first == last:
                axis.plot(steps, low, label=label, linewidth=1.4)
            else:
                axis.fill_between(steps, low, high, label=label, alpha=0.2)
        axis.axhline(0, color="#999999", linewidth=0.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.set_ylabel(unit, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7)
    return save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, to be drawn without pyplot: no global state, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure, its suffix says the format; its folder is made if need be. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _draw_panel(axis: Axes, panel: Panel, records: Sequence[Record], styles: Record) -> None:
    for arm, (colour, dash) in styles.items():
        of_arm = [record for record in records if record["arm"] == arm]
        curves = [curve for record in of_arm if (curve := _curve(record, panel.series))]
        if not curves:
            continue
        for curve in curves:
            axis.plot(*zip(*curve, strict=True), color=colour, linestyle=dash, linewidth=0.8, alpha=0.4)
        mean = mean_curve(curves)
        axis.plot(*zip(*mean, strict=True), color=colour, linestyle=dash, linewidth=2.2, label=arm)
        finals = [record[panel.final] for record in of_arm if panel.final and record.get(panel.final) is not None]
        if finals:
            end = max(step for curve in curves for step, _ in curve)
            marker = {
                "marker": "D",
                "markersize": 7,
                "markeredgecolor": "white",
                "linestyle": "none",
                "zorder": 5,
            }
            label = f"{arm}: {panel.final_label}"
            axis.plot([end], [sum(finals) / len(finals)], color=colour, label=label, clip_on=False, **marker)
    if panel.limits:
        axis.set_ylim(*panel.limits)
    if panel.marks_resets:
        _draw_rug(axis, records, styles)
    axis.set_title(panel.title, fontsize=10)
    axis.set_ylabel(panel.ylabel, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)


def _draw_rug(axis: Axes, records: Sequence[Record], styles: Record) -> None:
    rows = [record for record in records if record.get("reset_steps") or _began(record) is not None]
    if not rows:
        return
    low, high = axis.get_ylim()
    row_height = 0.045 * (high - low)
    axis.set_ylim(low - row_height * (len(rows) + 0.5), high)
    for row, record in enumerate(rows):
        steps, armed = record.get("reset_steps") or [], _began(record)
        height = low - row_height * (row + 0.5)
        label = "a reset (one row a seed)" if row == 0 else None
        mark = {"marker": "|", "markersize": 5, "markeredgewidth": 1.0, "linestyle": "none"}
        colour = styles[record["arm"]][0]
        axis.plot(steps, [height] * len(steps), color=colour, label=label, **mark)
        if armed is not None:
            begun = {"marker": 5, "markersize": 5, "linestyle": "none", "label": None if row else "resets begin"}
            axis.plot([armed], [height], color=colour, **begun)


def _began(record: Record) -> int | None:
    """The step at which resets began, of a run that had any to begin."""
    return record.get("armed_step") if record.get("can_reset") else None


def _legend_entries(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return list(entries.values()), list(entries)


def _curve(record: Record, name: str) -> list[tuple[float, float]]:
    return [(step, value) for step, value in record.get("history", {}).get(name, []) if value is not None]


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean over the curves at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, sum(table[step] for table in tables) / len(tables)) for step in shared]


def arm_styles(records: Sequence[Record]) -> dict[str, Any]:
    """Colour and dash of each arm: warm ones without resets, cold ones with; past three of a kind they come again."""
    resets = {record["arm"]: bool(record.get("can_reset")) for record in records}
    of_kind = {True: cycle(_WITH_RESETS), False: cycle(_WITHOUT_RESETS)}
    return {arm: next(of_kind[resets[arm]]) for arm in arms_of(records)}
