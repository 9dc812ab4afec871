"""The report of an instruction-tuning study: its table, its figure, its generations, and what the numbers say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_reset.files import write_atomic
from hf_reset.report.plots import Panel, plot_runs
from hf_reset.report.reading import Measure, choice_caveats, compare_arms, never_reset
from hf_reset.report.results import Results
from hf_reset.report.tables import (
    RESETS,
    Column,
    Record,
    arms_of,
    markdown_report,
    markdown_table,
    most_suspect_table,
    named_as_known,
    print_markdown,
    print_summary,
)

COLUMNS = (
    Column("test_loss_last", "clean test loss, last"),
    Column("test_loss_best", "clean test loss, best"),
    Column("test_token_accuracy_last", "token accuracy, last"),
    Column("response_memory_last", "memory of wrong responses"),
    Column("suspects_auroc", "wrong responses among suspects (AUROC)"),
    Column("rouge_l_last", "ROUGE-L, last"),
    Column("exact_match_last", "exact match, last"),
)
README_COLUMNS = (*(c for c in COLUMNS if c.key.startswith(("test_loss", "response_memory"))), RESETS)

# Name of a curve in a record to its key in the log history.
CURVES = {"validation_loss": "eval_loss", "clean_loss": "clean_loss", "response_memory": "response_memory"}


def write_report(results: Results) -> Path:
    """Write `report.md` and `curves.png` beside `results.json`, and show the table.

    Args:
        results: the study; its configuration is that of the instruction-tuning recipe.

    Returns:
        The report's path.
    """
    records, asked = results.records, results.configuration
    clean = asked["noise_rate"] > 0  # of responses as they came, nobody said that they are
    measured = [column for column in COLUMNS if any(record.get(column.key) is not None for record in records)]
    columns = named_as_known(measured, clean)
    title = title_of(asked)
    figure = plot_runs(records, _panels(asked), results.path.with_name("curves.png"), title=title)
    sections = {"Reading": reading(records, clean=clean)}
    if suspects := most_suspect_table(records, "wrong responses"):
        sections["Most suspect responses"] = suspects
    if samples := samples_table(records, clean=clean):
        sections["Generated at the last step"] = samples
    report = markdown_report(
        results.as_dict(),
        columns,
        title=title,
        chosen_by=f"the {asked.get('reset_metric') or 'eval_loss'} of validation responses"
        + (
            ", wrong at the same rate as in training. No clean response chose anything." if asked["noise_rate"] else "."
        ),
        figure=figure.name,
        sections=sections,
    )
    path = write_atomic(results.path.with_name("report.md"), report)
    print_summary(records, columns)
    print_markdown(suspects)
    print(f"{path} has the report, {results.path} every number.")
    return path


def title_of(asked: Record) -> str:
    """Data and noise, in a line."""
    file = asked["train_file"]
    # The last two parts of a path: the file is mostly called "train", and its folder by the data's name.
    data = asked["dataset_name"] or (file and "/".join(Path(file).parts[-2:])) or "standard-library docstrings"
    rate = asked["noise_rate"]
    noise = f"{rate:.0%} of responses wrong ({asked['noise_kind']})" if rate else "as given"
    return f"Instruction tuning, {data}, {noise}"


def reading(records: Sequence[Record], *, clean: bool = True) -> str:
    """How the arms compare, and what the numbers say about the regime, in plain words."""
    without = [record for record in records if not record["can_reset"]]
    lines, verdicts = compare_arms(records, _measure(clean))
    caveats = choice_caveats(records)
    lines += caveats
    if without and all(record["test_loss_last"] <= record["test_loss_best"] + 0.02 for record in without):
        lines.append(
            "The plain arm did not overfit: its last weights are as good as its best. Train longer, with a larger "
            "learning rate or rank, to see what resets are for."
        )
    if (never := never_reset(records)) is not None:
        lines.append(never)
    if not (never or caveats) and verdicts <= {"better"} and any(record["can_reset"] for record in records):
        lines.append("Validation turned while training went on: the regime in which resets can help.")
    return "\n\n".join(lines) or "No reset arm was run."


def _measure(clean: bool) -> Measure:
    name = f"{'Clean' if clean else 'Held-out'} test loss"
    return Measure("test_loss", name, "nats a token", higher_is_better=False, tie=0.02)


def samples_table(records: Sequence[Record], *, clean: bool = True) -> str:
    """Prompts and held-out responses, with what each arm generates, from the first seed."""
    first = [record for record in records if record["seed"] == records[0]["seed"] and record.get("samples")]
    if not first:
        return ""
    arms = {arm: next(r["samples"] for r in first if r["arm"] == arm) for arm in arms_of(first)}
    rows = []
    for place, sample in enumerate(first[0]["samples"]):
        texts = [sample["prompt"], sample["clean"], *(arms[arm][place]["generated"] for arm in arms)]
        rows.append([" ".join(text.split())[:160] for text in texts])
    return markdown_table(["prompt", f"{'clean' if clean else 'held-out'} response", *arms], rows)


def _panels(asked: Record) -> list[Panel]:
    noisy = "noisy" if asked["noise_rate"] else "responses as given"
    memory = "loss, clean - given (nats a token)"
    clean = "clean " if asked["noise_rate"] else ""
    title = f"Loss on {clean}held-out responses\n(a diagnostic, chose nothing)"
    return [
        Panel("validation_loss", f"Validation loss ({noisy})", "nats a token", marks_resets=True),
        Panel("response_memory", "Memory of wrong responses", memory),
        Panel("clean_loss", title, "nats a token", final="test_loss_last"),
    ]
