"""The report of a text-classification study: its table, its figure, and what the numbers say of the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_reset.files import write_atomic
from hf_reset.report.plots import Panel, plot_runs
from hf_reset.report.results import Results
from hf_reset.report.tables import Column, markdown_report

COLUMNS = (
    Column("test_accuracy_last", "clean accuracy, last"),
    Column("test_accuracy_best", "clean accuracy, best"),
    Column("test_macro_f1_last", "macro-F1, last"),
    Column("label_memory", "wrong labels memorised"),
)

# How far agreement with validation's labels must exceed the share of them that is right, to be no accident.
_MARGIN = 0.05


def write_classification_report(
    results: Results, *, title: str, label: str, validation_label: str | None, clean_known: bool
) -> Path:
    """Write ``report.md`` and ``curves.png`` beside ``results.json``.

    Args:
        results: the study.
        title: data and noise, in a line.
        label: the column that training sees.
        validation_label: the column that validation sees; None: the same.
        clean_known: whether clean labels are known beside noisy ones.

    Returns:
        The report's path.
    """
    trusted = validation_label not in (None, label)
    kind = "trusted labels" if trusted else "noisy labels" if clean_known else "labels as given"
    figure = plot_runs(results.records, _panels(kind, clean_known), results.path.with_name("curves.png"), title=title)
    report = markdown_report(
        results.as_dict(),
        COLUMNS,
        title=title,
        chosen_by=chosen_by(label, validation_label, clean_known=clean_known),
        figure=figure.name,
        sections={"Reading": reading(results.records), "What was measured": _MEASURED},
    )
    return write_atomic(results.path.with_name("report.md"), report)


_MEASURED = (
    "The test was read once, after training: by the weights of the last step (those that training left, somewhere on "
    "an excursion in the reset arm) and by the best evaluated ones. Memorised: the share of the mislabelled training "
    "rows that the last weights give their wrong label back. The accuracy curve is on the clean labels behind the "
    "validation rows, where they are known; it is there to be looked at and chose nothing."
)


def chosen_by(label: str, validation_label: str | None, *, clean_known: bool) -> str:
    """Which kind of validation chose the anchors, in a sentence or two."""
    if validation_label not in (None, label):
        return (
            f"trusted validation labels (column {validation_label!r}), other than those trained on (column {label!r}). "
            "Do not set these results beside some that were chosen on noisy labels."
        )
    kind = "noisy like the training labels" if clean_known else "as given, like the training labels"
    return f"validation labels {kind} (column {label!r}). No clean label chose anything."


def reading(records: Sequence[Mapping[str, Any]]) -> str:
    """Which regime the study was in: noise that resets hold off, or noise that validation shares.

    A model that errs on nothing agrees with noisy validation labels as often as these are right. One that agrees
    clearly more often has learnt the mistakes themselves: then they are systematic.
    """
    lines = []
    resets = [record["resets"] for record in records if record["arm"] == "reset"]
    if resets and max(resets) == 0:
        lines.append(
            "Resets never began: validation went on improving to the end. The run was too short to overfit, or the "
            "noise is of a kind that validation shares."
        )
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
    if not lines and resets:
        lines.append("Validation turned while training went on: the regime in which resetting can help.")
    return "\n\n".join(lines) or "No reset arm was run."


def _learnt_the_noise(record: Mapping[str, Any]) -> bool:
    right, agreement = record.get("validation_labels_right"), record.get("validation_accuracy_best")
    return right is not None and right < 1 and agreement is not None and agreement > right + _MARGIN


def _panels(kind: str, clean_known: bool) -> list[Panel]:
    final: dict[str, Any] = {"final": "test_accuracy_last", "final_label": "clean test, last step"}
    if clean_known:
        accuracy = Panel("clean_accuracy", "Clean accuracy on validation rows (chose nothing)", "accuracy", **final)
    else:
        accuracy = Panel("validation_accuracy", "Validation accuracy (labels as given)", "accuracy", **final)
    return [
        Panel("validation_loss", f"Validation loss ({kind})", "cross-entropy, nats", marks_resets=True),
        Panel("label_memory", "Mislabelled training examples memorised", "share", limits=(0, 1)),
        accuracy,
    ]
