"""Figures and tables of `recipes/studies/paper.py`, from its records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_reset.errors import DataError
from hf_reset.report.plots import mean_curve, new_figure, save_figure
from hf_reset.report.tables import Column, Record, arms_of, markdown_table, spread_text, summary_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442")
_MARKERS = {"restore": "o", "zero": "s", "keep": "^", "reset": "o"}
_COLUMNS = (
    Column("best", "clean test, best checkpoint"),
    Column("last", "clean test, last step"),
    Column("memorised_last", "wrong labels memorised, last step", digits=2),
    Column("best_step", "step of the best checkpoint", digits=0),
    Column("resets", "resets", digits=0),
    Column("moves", "better anchors after resets began", digits=1),
)


def draw(study: str, records: Sequence[Record], path: str | Path) -> Path:
    """Draw the figure of one study and write it to `path`; returns the path.

    Args:
        study: "a" to "g".
        records: of its results file.
        path: the picture's, whose suffix says the format.

    Raises:
        DataError: no records.
    """
    if not records:
        raise DataError(f"the study {study!r} has no record. Run `recipes/studies/paper.py --study {study}` first.")
    drawings: dict[str, Callable[[Sequence[Record]], Figure]] = {
        "a": _probabilities,
        "b": lambda records: _gains(records, "batch", "batch {}"),
        "c": _arms,
        "d": _orthogonality,
        "e": lambda records: _gains(records, "optimizer", "{}"),
        "f": _passages,
        "g": _arms,
    }
    return save_figure(drawings[study](records), path)


def table(study: str, records: Sequence[Record]) -> str:
    """The Markdown table of one study."""
    if study == "f":
        return _passage_table(records)
    return _gain_table(records) if "group" in records[0] else summary_table(records, _COLUMNS)


def auto_table(records: Sequence[Record], *, seconds: bool = False) -> str:
    """The Markdown table of the study of `probability="auto"`, and of others without plain training.

    Args:
        records: of `recipes/studies/run.py`.
        seconds: whether the time that training took is a column.
    """
    columns = [
        Column(key, f"clean test, {text}") for key, text in (("calibrated", "best checkpoint"), ("last", "last step"))
    ]
    more = [("resets", "resets"), ("evaluations", "evaluations to the end")]
    more += [("train_seconds", "seconds")] if seconds else []
    flat = [
        {**record, **record["test_accuracy"], "evaluations": len(record["history"]["calibrated_loss"])}
        for record in records
    ]
    named = [{**record, "arm": f"{record['setting']['name']}, {record['arm']}"} for record in flat]
    return summary_table(
        sorted(named, key=lambda record: record["setting"]["name"]),
        [*columns, *(Column(key, text, digits=0) for key, text in more)],
    )


def gains(records: Sequence[Record]) -> list[tuple[Record, float]]:
    """Of each run with resets, its record and its best checkpoint's gain on plain training of its group and seed."""
    plain = {(record.get("group"), record["seed"]): record["best"] for record in records if record["arm"] == "plain"}
    return [
        (record, record["best"] - plain[record.get("group"), record["seed"]])
        for record in records
        if record["arm"] != "plain" and (record.get("group"), record["seed"]) in plain
    ]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; NaN where one does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def _gain_table(records: Sequence[Record]) -> str:
    arms = [arm for arm in arms_of(records) if arm != "plain"]
    rows = []
    for group in dict.fromkeys(record["group"] for record in records):
        of_group = [record for record in records if record["group"] == group]
        plain = [record for record in of_group if record["arm"] == "plain"]
        row = [group, spread_text([record["peclet_at_arming"] for record in of_group], 1)]
        row += [spread_text([record["best"] for record in plain]), spread_text([record["last"] for record in plain])]
        for arm in arms:
            of_arm = [(record, gain) for record, gain in gains(of_group) if record["arm"] == arm]
            row += [spread_text([gain for _, gain in of_arm]), spread_text([record["last"] for record, _ in of_arm])]
        rows.append(row)
    heading = ["", "Péclet number at arming", "plain, best", "plain, last"]
    heading += [text for arm in arms for text in (f"{arm}, gain of the best", f"{arm}, last")]
    return markdown_table(heading, rows)


def _passage_table(records: Sequence[Record]) -> str:
    rows = []
    for arm in arms_of(records):
        of_arm = [record for record in records if record["arm"] == arm]
        ratios = [ratio for record in of_arm for ratio in _ratios(record)]
        row = [arm, spread_text([record.get("peclet") for record in of_arm], 2)]
        row += [spread_text([record[key] for record in of_arm], 4) for key in ("predicted_best", "observed_best")]
        rows.append([*row, spread_text([record.get("planned") for record in of_arm], 4), spread_text(ratios, 2)])
    heading = ["", "Péclet number", "best r, predicted", "best r of the grid, observed", "r that `auto` would take"]
    return markdown_table([*heading, "observed over predicted mean time, all r above 0"], rows)


def _ratios(record: Record) -> list[float]:
    points = [one for one in record["points"] if one["probability"] and one["observed"] and one["predicted"]]
    return [one["observed"] / one["predicted"] for one in points]


def _probabilities(records: Sequence[Record]) -> Figure:
    """The paper's figure 1: curves, with the overfitting point, and what each probability comes to."""
    figure = new_figure(13.0, 3.9)
    axes = figure.subplots(1, 3)
    plain = [record for record in records if record["arm"] == "plain"]
    turned = sum(record["best_step"] for record in plain) / len(plain)
    for axis, series, label in (
        (axes[0], "validation_loss", "noisy validation loss"),
        (axes[1], "memorised", "wrong labels memorised, share"),
    ):
        _curves(axis, records, series, skip=("r = 0.0003", "r = 0.003", "r = 0.03"))
        axis.axvline(turned, color="#555555", linestyle=":", label="overfitting begins (plain)")
        _label(axis, "optimizer step", label)
    axes[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(0.13, 1.0), fontsize=7)
    axis = axes[2]
    for key, colour, label in (("best", "#0072B2", "best checkpoint"), ("last", "#D55E00", "last step")):
        arms = [arm for arm in arms_of(records) if arm != "plain"]
        for record in records:
            if record["arm"] != "plain":
                axis.plot(record["config"]["probability"], record[key], ".", color=colour, alpha=0.5)
        means = [sum(values) / len(values) for arm in arms for values in [_values(records, arm, key)]]
        axis.plot([float(arm.removeprefix("r = ")) for arm in arms], means, color=colour, label=label)
        mean = sum(_values(records, "plain", key)) / len(plain)
        axis.axhline(mean, color=colour, linestyle=":", label=f"plain, {label}")
    axis.set_xscale("log")
    _label(axis, "reset probability r a step", "clean test accuracy")
    axis.legend(frameon=False, fontsize=7)
    return figure


def _arms(records: Sequence[Record]) -> Figure:
    """A row an arm: clean accuracy at the best and the last weights, and wrong labels memorised."""
    arms = arms_of(records)
    figure = new_figure(10.0, 1.4 + 0.32 * len(arms))
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, keys, label in (
        (left, ("best", "last"), "clean test accuracy"),
        (right, ("memorised_best", "memorised_last"), "wrong labels memorised, share"),
    ):
        for key, colour, marker in zip(keys, ("#0072B2", "#D55E00"), ("o", "D"), strict=True):
            for row, arm in enumerate(arms):
                values = _values(records, arm, key)
                axis.plot(values, [row] * len(values), marker, color=colour, alpha=0.35, markersize=4, linestyle="none")
                name = {"best": "best checkpoint", "last": "last step"}.get(key) if row == 0 else None
                axis.plot(sum(values) / len(values), row, marker, color=colour, markersize=8, label=name)
        axis.set_yticks(range(len(arms)), arms)
        _label(axis, label, "")
    left.invert_yaxis()
    left.legend(frameon=False, fontsize=8)
    return figure


def _gains(records: Sequence[Record], key: str, name: str) -> Figure:
    """Gain against the noise (or, without one, by group), and against the effective Péclet number."""
    figure = new_figure(11.0, 4.2)
    left, right = figure.subplots(1, 2)
    values = list(dict.fromkeys(record[key] for record in records))
    colours = dict(zip(values, _COLOURS, strict=False))
    found = gains(records)
    by_noise = "noise" in records[0]
    groups = list(dict.fromkeys(record["group"] for record in records))
    for value, colour in colours.items():
        of_value = [(record, gain) for record, gain in found if record[key] == value]
        for arm in dict.fromkeys(record["arm"] for record, _ in of_value):
            points = [(record, gain) for record, gain in of_value if record["arm"] == arm]
            label = name.format(value) + ("" if arm == "reset" else f", {arm}")
            style = {"color": colour, "marker": _MARKERS[arm], "linestyle": "none"}
            where = [record["noise"] if by_noise else groups.index(record["group"]) for record, _ in points]
            left.plot(where, [gain for _, gain in points], alpha=0.4, markersize=4, **style)
            means = {x: [g for p, (_, g) in zip(where, points, strict=True) if p == x] for x in dict.fromkeys(where)}
            line = {**style, "linestyle": "-" if by_noise else "none"}
            left.plot(list(means), [sum(g) / len(g) for g in means.values()], label=label, markersize=8, **line)
            seen = [(record["peclet_at_arming"], gain) for record, gain in points if record["peclet_at_arming"]]
            right.plot(*zip(*seen, strict=True), alpha=0.7, **style) if seen else None
    both = [(record["peclet_at_arming"], gain) for record, gain in found if record["peclet_at_arming"]]
    right.set_xscale("log")
    _plain_ticks(right.xaxis)
    right.set_title(f"Spearman's rank correlation {rank_correlation(*zip(*both, strict=True)):+.2f}", fontsize=10)
    for axis in (left, right):
        axis.axhline(0, color="#999999", linewidth=0.8)
    if not by_noise:
        left.set_xticks(range(len(groups)), groups, rotation=35, ha="right", fontsize=7)
    gain = "gain of the best checkpoint, clean test accuracy"
    _label(left, "share of wrong labels" if by_noise else "", gain)
    _label(right, "effective Péclet number at the anchor when resets begin", gain)
    left.legend(frameon=False, fontsize=7)
    return figure


def _orthogonality(records: Sequence[Record]) -> Figure:
    """Cosine and norms of the gradient's two parts along plain training, and the gain, by normalisation."""
    figure = new_figure(13.0, 3.9)
    cosine, norms, gained = figure.subplots(1, 3)
    plain = [record for record in records if record["arm"] == "plain"]
    by_norm = [{**record, "arm": record["group"]} for record in plain]
    _curves(cosine, by_norm, "cosine")
    cosine.axhline(0, color="#999999", linewidth=0.8)
    _label(cosine, "optimizer step", "cosine of correct and wrong part (plain)")
    _curves(norms, by_norm, "wrong_norm")
    _label(norms, "optimizer step", "norm of the wrong part (plain)")
    groups = list(dict.fromkeys(record["group"] for record in records))
    for row, group in enumerate(groups):
        values = [gain for record, gain in gains(records) if record["group"] == group]
        gained.plot(values, [row] * len(values), "o", color=_COLOURS[row], alpha=0.5, markersize=5)
        gained.plot(sum(values) / len(values), row, "D", color=_COLOURS[row], markersize=8)
    gained.axvline(0, color="#999999", linewidth=0.8)
    gained.set_yticks(range(len(groups)), groups)
    gained.invert_yaxis()
    _label(gained, "gain of the best checkpoint, clean test accuracy", "")
    cosine.legend(frameon=False, fontsize=8)
    return figure


def _passages(records: Sequence[Record]) -> Figure:
    """Mean time against the probability, predicted and observed: the linear classifier, and the transformer by seed."""
    figure = new_figure(11.5, 4.2)
    axes = figure.subplots(1, 2)
    linear = [record for record in records if "linear" in record and record["seed"] == records[0]["seed"]]
    others = [record for record in records if "linear" not in record]
    for axis, shown, title in zip(axes, (linear, others), ("linear classifier", "small transformer"), strict=True):
        for record, colour in zip(shown, _COLOURS, strict=False):
            points = [point for point in record["points"] if point["probability"] and point["observed"]]
            x = [point["probability"] for point in points]
            name = f"Pe {record['peclet']:.2f}" if "peclet" in record else f"seed {record['seed']}"
            error = [point["error"] for point in points]
            axis.errorbar(x, [p["observed"] for p in points], error, color=colour, marker="o", linestyle="none")
            predicted = [math.nan if p["predicted"] is None else p["predicted"] for p in points]
            axis.plot(x, predicted, color=colour, label=f"{name}, predicted")
            if record["predicted_best"]:
                axis.axvline(record["predicted_best"], color=colour, linestyle=":", linewidth=0.9)
        axis.set_xscale("log")
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)
        if shown is others:
            probabilities = sorted({p["probability"] for record in shown for p in record["points"] if p["probability"]})
            axis.set_xticks(probabilities, [f"{probability:g}" for probability in probabilities])
            axis.set_xticks([], minor=True)
        axis.set_title(f"{title} (dotted: the best as predicted)", fontsize=10)
        _label(axis, "reset probability r a step", "mean steps to the target")
        axis.legend(frameon=False, fontsize=7)
    return figure


def _curves(axis: Axes, records: Sequence[Record], series: str, skip: Sequence[str] = ()) -> None:
    """Of each arm its mean over seeds, and thin lines for these."""
    for arm, colour in zip([arm for arm in arms_of(records) if arm not in skip], _COLOURS, strict=False):
        curves = [
            [(step, value) for step, value in record["history"][series] if value is not None and math.isfinite(value)]
            for record in records
            if record["arm"] == arm
        ]
        for curve in curves:
            axis.plot(*zip(*curve, strict=True), color=colour, linewidth=0.5, alpha=0.3)
        axis.plot(*zip(*mean_curve(curves), strict=True), color=colour, linewidth=1.6, label=arm)


def _values(records: Sequence[Record], arm: str, key: str) -> list[float]:
    return [record[key] for record in records if record["arm"] == arm and record[key] is not None]


def _plain_ticks(axis: Axis) -> None:
    """Numbers as they are on a logarithmic axis of one or two decades."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")
    axis.set_tick_params(which="both", labelsize=7)


def _label(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
