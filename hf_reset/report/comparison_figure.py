"""The figure of a comparison: each method's difference to the best checkpoint, a point a setting and seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_reset.report.comparison import Line, baseline_of, difference, lines_of, paired_points, settings_of
from hf_reset.report.plots import new_figure, save_figure
from hf_reset.report.tables import Record


def plot_comparison(
    records: Sequence[Record], path: str | Path, *, share: float = 0.25, title: str | None = None
) -> Path:
    """Each method's difference to the best checkpoint: a point a setting and seed, and the mean with its interval.

    Each method by the checkpoint that it is run with, plain training by each choice. Those that were seen on fewer than
    five settings, or than `share` of many, are left to the table: their means say little beside others'.
    """
    baseline, settings = baseline_of(records), settings_of(records)
    read: dict[str, Line] = {}
    for one in lines_of(records):
        read.setdefault(f"plain, by {one.reading}" if one.arm == "plain" else one.arm, one)
    seen = {name: len(paired_points(one, baseline, settings)) for name, one in read.items()}
    least = max(min(5, len(settings)), share * len(settings))
    shown = [name for name, count in seen.items() if count >= least and name != "plain, by last"]
    shown.reverse()  # the first one highest
    figure = new_figure(8.5, 0.42 * len(shown) + 1.6)
    axis = figure.subplots()
    looks = _looks(settings)
    for height, one in enumerate(read[name] for name in shown):
        for place, setting in enumerate(settings):
            points = [point for seeds in paired_points(one, baseline, [setting]) for point in seeds]
            offset = 0.5 * ((place + 0.5) / len(settings) - 0.5)
            colour, marker = looks[setting]
            axis.plot(points, [height + offset] * len(points), marker, ms=4, alpha=0.75, color=colour, mew=0)
        gap = difference(one, baseline, settings)
        if gap is not None:
            axis.plot([gap.low, gap.high], [height, height], color="black", lw=1.6, solid_capstyle="round")
            axis.plot([gap.mean], [height], "D", color="black", ms=5)
    axis.axvline(0, color="black", lw=0.8, ls=":")
    axis.set_yticks(range(len(shown)), [f"{name} ({seen[name]} columns)" for name in shown], fontsize=8)
    axis.set_ylim(-0.8, len(shown) - 0.2)
    axis.set_xlabel("clean test accuracy less that of the stronger best checkpoint, points")
    # Colours say the data, shapes what is done to the labels.
    colours = {_data_and_noise(setting)[0]: look[0] for setting, look in looks.items()}
    markers = {_data_and_noise(setting)[1]: look[1] for setting, look in looks.items()}
    handles = [axis.plot([], [], "s", ms=5, mew=0, color=one, label=name)[0] for name, one in colours.items()]
    handles += [axis.plot([], [], one, ms=5, mew=0, color="#666666", label=name)[0] for name, one in markers.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    return save_figure(figure, path)


def _data_and_noise(setting: str) -> tuple[str, str]:
    data, _, noise = setting.rpartition("-")
    return data or setting, noise


def _looks(settings: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each setting: by its data set, and by its noise."""
    palette = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
    markers = ["o", "^", "D", "v", "P", "X", "*", "p"]
    parts = {setting: _data_and_noise(setting) for setting in settings}
    data, noise = (list(dict.fromkeys(pair[place] for pair in parts.values())) for place in (0, 1))
    return {
        setting: (palette[data.index(own) % len(palette)], markers[noise.index(kind) % len(markers)])
        for setting, (own, kind) in parts.items()
    }
