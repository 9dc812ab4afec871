"""Tables and the Markdown report, rendered from the records of a results file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

Record: TypeAlias = Mapping[str, Any]
"""What one run gave, or was asked: names to JSON-plain values."""

_LETTERS = 90  # of a suspect row's text


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        key: the key of a record, e.g. `"test_accuracy_last"`. Absent or None shows as "–".
        heading: what stands above it.
        digits: digits after the point.
        scale: the factor between the record's unit and the one shown, e.g. 2**-20 for MiB.
    """

    key: str
    heading: str
    digits: int = 3
    scale: float = 1.0


RESETS = Column("resets", "resets", digits=0)
COST_COLUMNS = (
    RESETS,
    Column("train_seconds", "train seconds", digits=0),
    Column("peak_memory_bytes", "peak memory, MiB", digits=0, scale=2**-20),
)


def named_as_known(columns: Sequence[Column], clean: bool) -> list[Column]:
    """Columns whose heading says "clean" only where somebody said that the labels or responses are; else "held-out"."""
    return [
        column if clean else replace(column, heading=column.heading.replace("clean", "held-out")) for column in columns
    ]


def arms_of(records: Sequence[Record]) -> list[str]:
    """The arms in the order in which they first appear."""
    return list(dict.fromkeys(record["arm"] for record in records))


def mean_and_sd(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation (n − 1) of the values that are there.

    Returns:
        None when there is no value; the deviation is None when there is only one.
    """
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def summary_table(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """A Markdown table with one row an arm: mean ± sample standard deviation over its seeds.

    Args:
        records: the records of a results file.
        columns: what to show, left to right.
    """
    rows = [
        [
            arm,
            str(len(of_arm)),
            *(format_spread([record.get(column.key) for record in of_arm], column) for column in columns),
        ]
        for arm in arms_of(records)
        for of_arm in [[record for record in records if record["arm"] == arm]]
    ]
    return markdown_table(["arm", "seeds", *(column.heading for column in columns)], rows)


def records_table(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """A Markdown table with one row a record."""
    rows = [
        [
            record["arm"],
            str(record["seed"]),
            *(format_spread([record.get(column.key)], column) for column in columns),
        ]
        for record in records
    ]
    return markdown_table(["arm", "seed", *(column.heading for column in columns)], rows)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a pipe within a cell is escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def most_suspect_table(records: Sequence[Record], what: str = "wrong labels") -> str:
    """The training rows that the last arm's first run trusts least, in words and a table; empty where none was judged.

    Args:
        records: with `most_suspect` and `suspects_auroc` of `hf_reset.study.suspects`.
        what: looks suspect.
    """
    judged = [record for record in records if record.get("most_suspect")]
    if not judged:
        return ""
    shown = next(record for record in judged if record["arm"] == judged[-1]["arm"])
    names = list(shown["most_suspect"][0])
    rows = [[_suspect_cell(row.get(name)) for name in names] for row in shown["most_suspect"]]
    headings = ["given label" if name == "given" else str(name).replace("_", " ") for name in names]
    auroc = shown.get("suspects_auroc")
    said = f"The training rows that {shown['arm']} (seed {shown['seed']}) trusts least; all are in `suspects.csv`."
    said += "" if auroc is None else f" Ranked by it, {what} stand out with an area under the ROC of {auroc:.3f}."
    return f"{said}\n\n{markdown_table(headings, rows)}"


def _suspect_cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else " ".join(str(value).split())[:_LETTERS]


def print_summary(records: Sequence[Record], columns: Sequence[Column]) -> None:
    """The summary table with what a run cost, on the screen."""
    print_markdown(summary_table(records, [*columns, *COST_COLUMNS]))


def print_markdown(text: str) -> None:
    """Markdown on the screen; nothing for no text."""
    if not text:
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log has no edge
    console.print(Markdown(text))


def markdown_report(
    results: Record,
    columns: Sequence[Column],
    *,
    title: str,
    chosen_by: str,
    figure: str | None = None,
    sections: Mapping[str, str] | None = None,
) -> str:
    """The report of one study.

    Args:
        results: the content of a results file.
        columns: the measures, left to right; what a run cost is added.
        title: its heading.
        chosen_by: one sentence on what chose the anchors (noisy or trusted validation labels).
        figure: name of the picture beside the report; None for none.
        sections: further sections, heading to Markdown text.

    Returns:
        Markdown, ending in a newline.
    """
    shown = [*columns, *COST_COLUMNS]
    records = results["records"]
    parts = [f"# {title}", f"**What chose the anchors:** {chosen_by}", summary_table(records, shown)]
    parts.append("Mean ± sample standard deviation over seeds.")
    if figure:
        parts.append(f"![Curves of the run]({figure})")
    if results.get("notes"):
        parts += ["## Notes", "\n".join(f"- {note}" for note in results["notes"])]
    for heading, text in (sections or {}).items():
        parts += [f"## {heading}", text]
    parts += ["## Every run", records_table(records, shown)]
    parts += ["## Environment", _bullets(_flat(results.get("environment", {})))]
    parts += [
        "## Configuration",
        _bullets({k: v for k, v in results["configuration"].items() if v is not None}),
    ]
    return "\n\n".join(parts) + "\n"


def format_spread(values: Sequence[float | None], column: Column) -> str:
    """Such as "0.912 ± 0.012": mean ± sample standard deviation; of one value, itself; "–" for none."""
    scaled = [None if value is None else value * column.scale for value in values]
    spread = mean_and_sd(scaled)
    is_count = spread is not None and spread[1] is None and spread[0].is_integer() and column.digits <= 1
    return spread_text(scaled, 0 if is_count else column.digits)


def spread_text(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean ± sample standard deviation to so many digits; of one value, itself; "–" for none."""
    spread = mean_and_sd(values)
    if spread is None:
        return "–"
    mean, deviation = spread
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _flat(nested: Record) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(value if isinstance(value, Mapping) else {key: value})
    return flat


def _bullets(entries: Record) -> str:
    return "\n".join(f"- {key}: `{value}`" for key, value in entries.items())
