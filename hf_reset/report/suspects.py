"""The report on suspect labels: the worst rows with the reasons, and which class is taken for which.

One file: HTML with its picture inside, or Markdown with the picture beside it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_reset.errors import ConfigError
from hf_reset.files import write_atomic, written_whole
from hf_reset.report.tables import markdown_table

if TYPE_CHECKING:
    import pandas as pd

    from hf_reset.rows.confident import NoiseEstimate

CAUTION = (
    "A flag is a reason to read a row, not to delete it. Do not drop rows of a test set by this list: what is hard for "
    "the model would go with what is wrong, and the test would flatter it."
)
BLIND_SPOT = (
    "What this cannot see: mistakes that a model can learn, such as one class called another by rule, or annotators "
    "who share a confusion. Predictions then repeat the mistake, and the label looks right."
)
_WORST, _LETTERS, _CLASSES, _CONFUSIONS = 30, 240, 16, 10
_HEADINGS = ("row", "text", "given", "predicted", "why")
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}"
    "td,th{border-bottom:1px solid #ccc;padding:.3rem .6rem;text-align:left;vertical-align:top}img{max-width:100%}"
)


def write_suspects_report(
    path: str | Path,
    table: pd.DataFrame,
    noise: NoiseEstimate,
    names: Sequence[str],
    *,
    title: str,
    run: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Path:
    """Write the report; its suffix says the format.

    Args:
        path: ends in .html or .md; the picture of the latter lies beside it, as NAME.png.
        table: of `hf_reset.rows.find_suspects`, with `text`, `given_class` and `predicted_class`.
        noise: of the same predictions.
        names: of the K classes.
        title: its heading.
        run: facts on the run, shown as they are.
        notes: what was left out, in sentences.

    Returns:
        The path.

    Raises:
        ConfigError: another suffix.
    """
    path = Path(path)
    if path.suffix not in (".html", ".md"):
        raise ConfigError(f"`report` {str(path)!r} must end in .html or .md.")
    worst = table.loc[table["is_label_issue"]].sort_values(by="rank").head(_WORST)
    cells = [[str(row), *_told(line)] for row, line in zip(worst.index, worst.to_dict("records"), strict=True)]
    summary, confusions = summary_lines(table, noise, run, notes), confusion_rows(noise, names)
    picture = confusion_picture(noise, names)
    if path.suffix == ".html":
        return write_atomic(path, _as_html(title, summary, cells, confusions, picture))
    beside = path.with_suffix(".png")
    if picture is not None:
        with written_whole(beside) as temporary:
            temporary.write_bytes(picture)
    return write_atomic(path, _as_markdown(title, summary, cells, confusions, beside.name if picture else None))


def summary_lines(table: pd.DataFrame, noise: NoiseEstimate, run: Mapping[str, Any], notes: Sequence[str]) -> list[str]:
    """What was judged, found and left out, in sentences."""
    judged, flagged = int(table["rank"].notna().sum()), int(table["is_label_issue"].sum())
    lines = [
        f"{flagged} of {judged} judged rows are flagged; about {noise.rate:.0%} of the labels are estimated to be "
        "wrong (confident learning; too low where the noise can be learnt).",
        "The run: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in run.items()) + ".",
    ]
    if "in_training" in table and (held := int((table["rank"].notna() & ~table["in_training"]).sum())):
        lines.append(
            f"{held} rows were held out to choose the anchors by, and judged by what was predicted for them at each "
            "evaluation; the others by what was predicted before each visit's own update (column in_training)."
        )
    return [*lines, *notes]


def reason(row: Mapping[str, Any]) -> str:
    """Why a row is flagged: what is predicted instead, how often, and by what margin."""
    return (
        f"another class than {row['given_class']!r} at {row['wrong_events']} of {row['visits']} visits, on average "
        f"{row['predicted_class']!r}; the given label has probability {row['given_probability']:.2f}, margin "
        f"{row['margin']:+.2f}"
    )


def confusion_rows(noise: NoiseEstimate, names: Sequence[str]) -> list[list[str]]:
    """The most frequent confusions: given class, true class by estimate, and its share of the rows of that label."""
    shares = given_to_true(noise)
    joint = noise.joint.copy()
    np.fill_diagonal(joint, 0)
    order = np.argsort(-joint, axis=None, kind="stable")[:_CONFUSIONS]
    places = [divmod(int(place), len(names)) for place in order if joint.flat[place] > 0]
    return [[names[given], names[true], f"{shares[given, true]:.0%}"] for given, true in places]


def given_to_true(noise: NoiseEstimate) -> np.ndarray:
    """P(true = j | given = i), shape (K, K); rows of zeros for classes that no row was given."""
    sums = noise.joint.sum(axis=1, keepdims=True)
    return noise.joint / np.where(sums > 0, sums, 1)


def confusion_picture(noise: NoiseEstimate, names: Sequence[str]) -> bytes | None:
    """A PNG of `given_to_true`, of the classes most confused where there are many; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    wrong = noise.joint - np.diag(np.diag(noise.joint))
    shown = np.sort(np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:_CLASSES])
    shares = given_to_true(noise)[np.ix_(shown, shown)]
    side = 2.5 + 0.42 * len(shown)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [_cut(names[one], 18) for one in map(int, shown)]
    axis.set_xticks(range(len(shown)), labels, rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(len(shown)), labels, fontsize=8)
    for (given, true), share in np.ndenumerate(shares):
        if share >= 0.005:
            colour = "white" if share > 0.5 else "black"
            axis.text(true, given, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xlabel("true class, by estimate")
    axis.set_ylabel("given label")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _told(row: Mapping[Any, Any]) -> list[str]:
    text = _cut(" ".join(str(row["text"]).split()), _LETTERS)
    return [text, str(row["given_class"]), str(row["predicted_class"]), reason(row)]


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


_CONFUSION_HEADINGS = ("given label", "taken to be", "of the rows of that label")
_SECTIONS = ("The worst rows", "What is taken for what")


def _as_markdown(
    title: str, summary: list[str], worst: list[list[str]], confusions: list[list[str]], picture: str | None
) -> str:
    # A text may hold what Markdown or HTML would act on.
    worst = [[html.escape(cell, quote=False).replace("`", "'") for cell in line] for line in worst]
    parts = [f"# {title}", *summary, f"**{CAUTION}**", BLIND_SPOT, f"## {_SECTIONS[0]}"]
    parts += [markdown_table(_HEADINGS, worst) if worst else "No row is flagged.", f"## {_SECTIONS[1]}"]
    parts += [f"![Confusion of labels]({picture})"] if picture else []
    parts += [markdown_table(_CONFUSION_HEADINGS, confusions) if confusions else "No confusion was found."]
    return "\n\n".join(parts) + "\n"


def _as_html(
    title: str, summary: list[str], worst: list[list[str]], confusions: list[list[str]], picture: bytes | None
) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in summary)]
    parts += [f"<p><b>{CAUTION}</b></p>", f"<p>{BLIND_SPOT}</p>", f"<h2>{_SECTIONS[0]}</h2>"]
    parts += [_html_table(_HEADINGS, worst) if worst else "<p>No row is flagged.</p>", f"<h2>{_SECTIONS[1]}</h2>"]
    if picture is not None:
        data = base64.b64encode(picture).decode()
        parts.append(f'<img alt="Confusion of labels" src="data:image/png;base64,{data}">')
    parts.append(_html_table(_CONFUSION_HEADINGS, confusions) if confusions else "<p>No confusion was found.</p>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def _html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{heading}</th>" for heading in headings) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"
