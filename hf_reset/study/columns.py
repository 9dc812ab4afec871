"""Raw rows of text and labels, read by the names of their columns, with each thing that is wrong said by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset

from hf_reset.errors import DataError

Label = int | str


@dataclass(frozen=True)
class Columns:
    """Which columns of the raw data hold what.

    Args:
        text: the text.
        text_pair: a second text (premise and hypothesis, question and passage); None for none.
        label: what training sees.
        clean_label: the true label where `label` has real noise; the test is measured on it. None: `label`
            is taken as true, and noise may be added to it.
        validation_label: what validation sees; None: `label`. A small trusted set: the column with its labels,
            or `"clean_label"` for the true ones behind added noise.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    clean_label: str | None = None
    validation_label: str | None = None

    @property
    def trusted(self) -> bool:
        """Whether validation sees other labels than training does."""
        return self.validation_label is not None and self.validation_label != self.label

    @property
    def true_label(self) -> str:
        """The raw column that the test is measured on."""
        return self.clean_label or self.label


def read_rows(rows: Dataset, split: str, columns: Columns, notes: list[str], *, added: bool) -> Dataset:
    """The columns of interest under names of our own: text, text_pair, given, true, chooser (raw labels)."""
    if len(rows) == 0:
        raise DataError(f"the {split} split is empty (0 rows). Give a file or data set with rows.")
    wanted = _label_columns(split, columns, added=added)
    texts = {"text": columns.text} | ({"text_pair": columns.text_pair} if columns.text_pair else {})
    for argument, column in [("text", columns.text), ("text_pair", columns.text_pair)]:
        if column is not None and column not in rows.column_names:
            raise DataError(_no_column(f"{argument}_column", column, split, rows))
    if split == "validation" and wanted["true"][1] not in rows.column_names:
        del wanted["true"]  # only a diagnostic there
    for argument, column in wanted.values():
        if column not in rows.column_names:
            raise DataError(_no_column(argument, column, split, rows))
    made: dict[str, list[Any]] = {name: list(rows[column]) for name, column in texts.items()}
    for name, (argument, column) in wanted.items():
        made[name] = label_values(rows, column, argument, split)
    made.setdefault("true", [None] * len(rows))
    required = "true" if split == "test" else "chooser" if split == "validation" else "given"
    kept = [index for index, label in enumerate(made[required]) if label is not None]
    if len(kept) < len(rows):
        column = wanted[required][1]
        notes.append(f"{len(rows) - len(kept)} of {len(rows)} {split} rows have no {column!r} and were dropped.")
    if not kept:
        argument, column = wanted[required]
        raise DataError(f"`{argument}` {column!r} is empty on all {len(rows)} rows of the {split} split.")
    empty = _empty_texts(made, texts, split, notes)
    kept = [row for row in kept if row not in empty]
    made = {name: [values[index] for index in kept] for name, values in made.items()}
    return Dataset.from_dict(made)


def _label_columns(split: str, columns: Columns, *, added: bool) -> dict[str, tuple[str, str]]:
    """Which label columns a split must have: our name to (argument, raw column)."""
    given = ("label_column", columns.label)
    true = ("clean_label_column", columns.clean_label) if columns.clean_label else given
    chooser = given
    if columns.trusted and not (added and columns.validation_label == "clean_label"):
        chooser = ("validation_label_column", str(columns.validation_label))
    if split == "test":
        return {"given": true, "true": true, "chooser": true}
    if split == "validation":
        return {"given": chooser, "true": true, "chooser": chooser}
    return {"given": given, "true": true, "chooser": chooser}


def _no_column(argument: str, column: str, split: str, rows: Dataset) -> str:
    remedy = f"It has {', '.join(map(repr, rows.column_names))}; name one of them with --{argument}."
    if split == "validation" and argument == "label_column":
        remedy += (
            " To choose anchors by other labels give --validation_label_column; without a validation split it "
            "is taken from training."
        )
    return f"`{argument}` is {column!r}, which the {split} split does not have. {remedy}"


def label_values(rows: Dataset, column: str, argument: str, split: str) -> list[Label | None]:
    """The labels of a column as integers or strings, None where there is none.

    Raises:
        DataError: they are of another type, or of both.
    """
    feature = rows.features[column]
    values = list(rows[column])
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.names[value] for value in values]
    values = [None if value is None or value != value or value == "" else value for value in values]
    known = [value for value in values if value is not None]
    if len(known) < len(values) and all(isinstance(value, float) and value.is_integer() for value in known):
        # Readers of CSV turn a column of integers with gaps into floats.
        return [None if value is None else int(value) for value in values]
    for row, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, str))):
            raise DataError(
                f"`{argument}` {column!r} must hold integers or strings, got {value!r} ({type(value).__name__}) in "
                f"row {row} of the {split} split. Name another column or turn the labels into class names."
            )
    if len({type(value) for value in known}) > 1:
        raise DataError(f"`{argument}` {column!r} of the {split} split mixes integers and strings. Use one of them.")
    return values


def _empty_texts(made: Mapping[str, Sequence[Any]], texts: Mapping[str, str], split: str, notes: list[str]) -> set[int]:
    """Numbers of the rows, as the file has them, with a text that is null, empty or blank; they are noted."""
    found: set[int] = set()
    for name, column in texts.items():
        for row, text in enumerate(made[name]):
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"`{name}_column` {column!r} must hold strings, got {text!r} ({type(text).__name__}) in row {row} "
                    f"of the {split} split. Name the column that holds the text."
                )
        empty = [row for row, text in enumerate(made[name]) if text is None or not text.strip()]
        if empty:
            notes.append(
                f"{len(empty)} of {len(made[name])} {split} rows have no text in {column!r} and were dropped "
                f"(the first is row {empty[0]}, counted from 0)."
            )
        found.update(empty)
    if len(found) == len(made["text"]):
        raise DataError(
            f"`text_column` {texts['text']!r} has no text in any of the {len(found)} rows of the {split} split. Name "
            "the column that holds the text."
        )
    return found
