"""The report of a text-classification study: its table, its figure, and what the numbers say of the noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_reset.files import write_atomic
from hf_reset.report.model_card import write_model_card
from hf_reset.report.plots import Panel, plot_runs
from hf_reset.report.reading import Measure, armed_on_evidence, choice_caveats, compare_arms, never_reset
from hf_reset.report.results import Results, run_folder
from hf_reset.report.tables import (
    RESETS,
    Column,
    Record,
    markdown_report,
    most_suspect_table,
    named_as_known,
    print_markdown,
    print_summary,
)

COLUMNS = (
    Column("test_accuracy_last", "clean test accuracy, last"),
    Column("test_accuracy_best", "clean test accuracy, best"),
    Column("test_macro_f1_last", "macro-F1, last"),
    Column("label_memory_last", "wrong labels memorised", digits=2),
)
README_COLUMNS = (*(column for column in COLUMNS if column.key != "test_macro_f1_last"), RESETS)

# Name of a curve in a record to its key in the log history.
CURVES = {
    "validation_loss": "eval_loss",
    "calibrated_loss": "eval_calibrated_loss",
    "label_noise": "eval_label_noise",
    "validation_accuracy": "eval_accuracy",
    "clean_accuracy": "eval_clean_accuracy",
    "label_memory": "memory/wrong",
}

# How far agreement with validation's labels must exceed the share of them that is right, to be no accident.
_MARGIN = 0.05


def write_report(results: Results) -> Path:
    """Write `report.md` and `curves.png` beside `results.json`, and show the table.

    Args:
        results: the study; its configuration is that of the text-classification recipe.

    Returns:
        The report's path.
    """
    asked = results.configuration
    label, validation_label = asked["label_column"], asked["validation_label_column"]
    clean_known = _clean_known(asked)
    kind = "noisy labels" if clean_known else "labels as given"
    kind = "trusted labels" if validation_label not in (None, label) else kind
    panels, title = _panels(kind, clean_known), title_of(asked)
    figure = plot_runs(results.records, panels, results.path.with_name("curves.png"), title=title)
    columns = named_as_known(COLUMNS, clean_known)
    report = markdown_report(
        results.as_dict(),
        columns,
        title=title,
        chosen_by=chosen_by(label, validation_label, clean_known=clean_known),
        figure=figure.name,
        sections={
            "Reading": reading(results.records, clean=clean_known),
            **({"Most suspect rows": suspects} if (suspects := most_suspect_table(results.records)) else {}),
            "What was measured": _MEASURED + (_LOOKED_AT if clean_known else ""),
        },
    )
    path = write_atomic(results.path.with_name("report.md"), report)
    _complete_cards(results)
    print_summary(results.records, columns)
    print_markdown(suspects)
    print(f"{path} has the report, {results.path} every number.")
    return path


def write_card(folder: str | Path, records: Sequence[Record], asked: Record) -> Path:
    """Write the card of a saved model (or its adapters).

    Args:
        folder: of the model.
        records: of its arm, its own first, and those of other seeds where there are any.
        asked: configuration of the text-classification recipe.
    """
    return write_model_card(
        folder,
        records,
        title=title_of(asked),
        chosen_by=chosen_by(asked["label_column"], asked["validation_label_column"], clean_known=_clean_known(asked)),
        base_model=asked["model_name_or_path"],
        adapters=asked["lora_rank"] > 0,
        saved=asked["reset_finish"],
    )


def _complete_cards(results: Results) -> None:
    """Cards of arms with several seeds, written anew with the mean over all of them."""
    for record in results.records:
        folder = results.path.parent / run_folder(record["arm"], record["seed"]) / "model"
        others = [one for one in results.records if one["arm"] == record["arm"] and one is not record]
        if others and (folder / "README.md").is_file():
            write_card(folder, [record, *others], results.configuration)


def _clean_known(asked: Record) -> bool:
    return noise_is_added(asked) or asked["clean_label_column"] is not None


def noise_is_added(asked: Record) -> bool:
    """Whether labels were made wrong on purpose, by the recipe's configuration."""
    return asked["noise_rate"] > 0 or asked["noise_kind"] == "matrix"


def title_of(asked: Record) -> str:
    """Data and noise, in a line."""
    data = asked["dataset_name"] or Path(asked["train_file"] or "Standard-library docstrings").name
    noise = "labels as given"
    if noise_is_added(asked):
        rate = asked["noise_rate"]
        noise = f"{rate:.0%} {asked['noise_kind']} label noise" if rate else "noise by matrix"
    elif asked["clean_label_column"] is not None:
        noise = f"real noise in {asked['label_column']}"
    return f"{data}: {noise}"


_MEASURED = (
    "The test was read once, after training: by the weights of the last step (those that training left, somewhere on "
    "an excursion where resets were on) and by the best evaluated ones. Memorised: the share of the mislabelled "
    "training rows that the last weights give their wrong label back."
)
_LOOKED_AT = (
    " The accuracy curve is on the clean labels behind the validation rows; it is there to be looked at and chose "
    "nothing."
)


def chosen_by(label: str, validation_label: str | None, *, clean_known: bool) -> str:
    """Which kind of validation chose the anchors, in a sentence or two."""
    if validation_label not in (None, label):
        return (
            f"trusted validation labels (column {validation_label!r}), other than those trained on (column {label!r}). "
            "Do not set these results beside some that were chosen on noisy labels."
        )
    kind = "noisy like the training labels" if clean_known else "as given, like the training labels"
    return f"validation labels {kind} (column {label!r}).{' No clean label chose anything.' if clean_known else ''}"


def reading(records: Sequence[Record], *, clean: bool = True) -> str:
    """How the arms compare, and which regime the study was in: noise that resets hold off, or that validation shares.

    A model that errs on nothing agrees with noisy validation labels as often as these are right. One that agrees
    clearly more often has learnt the mistakes themselves: then they are systematic.
    """
    lines, verdicts = compare_arms(records, _measure(clean))
    caveats = choice_caveats(records)
    lines += caveats
    lines += [said for said in (noise_found(records), armed_on_evidence(records)) if said is not None]
    if (never := never_reset(records)) is not None:
        lines.append(never)
    lines += [
        f"{record['arm']} (seed {record['seed']}) corrected no label at its end: {record['why_not_refined']}"
        for record in records
        if record.get("why_not_refined")
    ]
    systematic = [record for record in records if _learnt_the_noise(record)]
    if systematic:
        agreement = max(record["validation_accuracy_best"] for record in systematic)
        right = systematic[0]["validation_labels_right"]
        lines.append(
            f"The noise is systematic ({len(systematic)} of {len(records)} runs show it): at its best evaluation a "
            f"model agreed with up to {agreement:.0%} of the noisy validation labels, of which {right:.0%} are right. "
            "It has learnt the mistakes themselves. Noisy validation cannot see a bias that it shares, so resetting "
            "does not help against this noise; a small trusted set can (`--validation_label_column`)."
        )
    if any(record["can_reset"] for record in records):
        if not (never or systematic or caveats) and verdicts <= {"better"}:
            lines.append("Validation turned while training went on: the regime in which resetting can help.")
    else:
        lines.append("No reset arm was run.")
    return "\n\n".join(lines)


def noise_found(records: Sequence[Record]) -> str | None:
    """The share of validation labels that look wrong, as the calibrated loss has it at each run's best evaluation."""
    found = [record["label_noise_best"] for record in records if record.get("label_noise_best") is not None]
    if not found:
        return None
    low, high = min(found), max(found)
    shares = f"{low:.0%}" if round(100 * low) == round(100 * high) else f"{low:.0%} to {high:.0%}"
    rights = [record.get("validation_labels_right") for record in records]
    right = next((value for value in rights if value is not None), None)
    known = "" if right is None else f" {1 - right:.0%} are."
    return (
        f"About {shares} of the validation labels look wrong (the noise level that the calibrated loss fits, at the "
        f"best evaluation of each run, of labels wrong at random or in pairs).{known}"
    )


def _measure(clean: bool) -> Measure:
    name = f"{'Clean' if clean else 'Held-out'} test accuracy"
    return Measure("test_accuracy", name, "points", scale=100, tie=0.005, is_share=True)


def _learnt_the_noise(record: Record) -> bool:
    right, agreement = record.get("validation_labels_right"), record.get("validation_accuracy_best")
    return right is not None and right < 1 and agreement is not None and agreement > right + _MARGIN


def _panels(kind: str, clean_known: bool) -> list[Panel]:
    final: dict[str, Any] = {
        "final": "test_accuracy_last",
        "final_label": f"{'clean' if clean_known else 'held-out'} test, last step",
    }
    if clean_known:
        accuracy = Panel("clean_accuracy", "Clean accuracy on validation rows (chose nothing)", "accuracy", **final)
    else:
        accuracy = Panel("validation_accuracy", "Validation accuracy (labels as given)", "accuracy", **final)
    return [
        Panel("validation_loss", f"Validation loss ({kind})", "cross-entropy, nats", marks_resets=True),
        Panel("calibrated_loss", "The same, calibrated\n(temperature and noise level fitted)", "nats"),
        Panel("label_memory", "Mislabelled training examples memorised", "share", limits=(0, 1)),
        accuracy,
    ]
