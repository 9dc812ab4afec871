"""Text-classification data as a study of wrong labels needs it: checked, split, corrupted, and accounted for.

Every row dropped and every row added to a split is counted in words, for the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, concatenate_datasets

from hf_reset.errors import ConfigError, DataError
from hf_reset.noise.labels import NoiseKind, corrupt_labels
from hf_reset.study.runs import carve

Label = int | str
_MISSING = -1  # a clean label that nobody gave


@dataclass(frozen=True)
class Columns:
    """Which columns of the raw data hold what.

    Args:
        text: the text.
        text_pair: a second text (premise and hypothesis, question and passage); None for none.
        label: what training sees.
        clean_label: the true label where ``label`` has real noise; the test is measured on it. None: ``label``
            is taken as true, and noise may be added to it.
        validation_label: what validation sees; None: ``label``. A small trusted set: the column with its labels,
            or ``"clean_label"`` for the true ones behind added noise.
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


@dataclass(frozen=True)
class ClassificationData:
    """Splits with columns ``text``, ``text_pair`` (if asked for), ``label``, ``clean_label``, ``is_mislabelled``.

    Attributes:
        train: rows with noisy labels, numbered 0 … K − 1; ``clean_label`` is −1 where it is not known.
        validation: rows whose ``label`` chooses anchors: noisy like training's, or trusted.
        test: rows with true labels (as true as the data says).
        names: the K classes' names.
        notes: what was dropped, carved out or added, in sentences.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    names: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def mislabelled(self) -> np.ndarray:
        """Indices of the training rows whose label is known to be wrong, shape (M,)."""
        return np.flatnonzero(np.asarray(self.train["is_mislabelled"], dtype=bool))


def prepare_classification(
    splits: Mapping[str, Dataset],
    columns: Columns,
    *,
    noise_rate: float = 0.0,
    noise_kind: NoiseKind = "symmetric",
    noise_matrix: Sequence[Sequence[float]] | None = None,
    seed: int = 0,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    max_predict_samples: int | None = None,
) -> ClassificationData:
    """Check, split and corrupt.

    Rows without a label are dropped and counted. A validation or test split that is not given is taken from the
    training rows; noise is added to training and validation rows together, so that validation is noisy like
    training, unless its labels are trusted ones.

    Args:
        splits: ``train``, and optionally ``validation`` and ``test``, as they were loaded.
        columns: which columns hold what.
        noise_rate: share of training (and validation) rows given a wrong label; 0 adds none.
        noise_kind: see :func:`hf_reset.noise.labels.corrupt_labels`.
        noise_matrix: T[i, j] = P(noisy = j | clean = i), shape (K, K), for ``noise_kind="matrix"``; it sets the rate.
        seed: of the order of rows, the splits and the noise.
        validation_fraction: share of the training rows taken for validation where none is given.
        test_fraction: share of the training rows taken for the test where none is given.
        max_train_samples: use at most so many training rows.
        max_eval_samples: likewise for validation; with none given, how many are taken.
        max_predict_samples: likewise for the test.

    Returns:
        The splits, ready to be tokenized.

    Raises:
        ConfigError: noise is asked for on top of real noise.
        DataError: a split is empty, a column missing, a label neither integer nor string, a text empty or null,
            there is but one class, or validation has fewer rows than there are classes.
    """
    added = noise_rate > 0 or noise_kind == "matrix"
    if added and columns.clean_label is not None:
        raise ConfigError(
            f"`noise_rate` {noise_rate} (`noise_kind` {noise_kind!r}) would add noise to the real noise of "
            f"`clean_label_column` {columns.clean_label!r}. Give one of the two."
        )
    notes: list[str] = []
    train = _read(splits["train"], "train", columns, notes, added=added)
    # One draw orders the rows; test, validation and training are cut from it in this order.
    train = train.shuffle(seed=seed)
    if "test" in splits:
        test = _read(splits["test"], "test", columns, notes, added=added)
        test = _at_most(test, max_predict_samples, seed)
    else:
        test, train = _carve(train, "test", test_fraction, max_predict_samples, notes)
    if "validation" in splits:
        validation = _read(splits["validation"], "validation", columns, notes, added=added)
        validation = _at_most(validation, max_eval_samples, seed)
    else:
        validation, train = _carve(train, "validation", validation_fraction, max_eval_samples, notes)
    train = train.select(range(min(len(train), max_train_samples or len(train))))

    names = _class_names([train, validation, test], splits["train"].features.get(columns.label), columns)
    train, validation, test = (_numbered(rows, names) for rows in (train, validation, test))
    if added:
        noise = {"kind": noise_kind, "seed": seed, "matrix": noise_matrix}
        noise["rate"] = None if noise_kind == "matrix" else noise_rate
        if noise_kind == "instance":
            noise["text_column"] = [name for name in ("text", "text_pair") if name in train.column_names]
        train, validation = _corrupt(train, validation, noise, names, columns.trusted)
    data = ClassificationData(
        _finish(train, "train"), _finish(validation, "validation"), _finish(test, "test"), list(map(str, names)), notes
    )
    _check_sizes(data, columns)
    return data


def _read(rows: Dataset, split: str, columns: Columns, notes: list[str], *, added: bool) -> Dataset:
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
        made[name] = _label_values(rows, column, argument, split)
    made.setdefault("true", [None] * len(rows))
    required = "true" if split == "test" else "chooser" if split == "validation" else "given"
    kept = [index for index, label in enumerate(made[required]) if label is not None]
    if len(kept) < len(rows):
        column = wanted[required][1]
        notes.append(f"{len(rows) - len(kept)} of {len(rows)} {split} rows have no {column!r} and were dropped.")
    if not kept:
        argument, column = wanted[required]
        raise DataError(f"`{argument}` {column!r} is empty on all {len(rows)} rows of the {split} split.")
    made = {name: [values[index] for index in kept] for name, values in made.items()}
    for name, column in texts.items():
        _check_texts(made[name], f"{name}_column", column, split)
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


def _label_values(rows: Dataset, column: str, argument: str, split: str) -> list[Label | None]:
    """The labels as integers or strings, None where there is none."""
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


def _check_texts(texts: Sequence[Any], argument: str, column: str, split: str) -> None:
    bad = [row for row, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
    if not bad:
        return
    value = texts[bad[0]]
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"`{argument}` {column!r} must hold strings, got {value!r} ({type(value).__name__}) in the {split} "
            "split. Name the column that holds the text."
        )
    raise DataError(
        f"`{argument}` {column!r} has {len(bad)} empty or null texts in the {split} split (the first, {value!r}, in "
        f"row {bad[0]} of those with a label). Fill those rows or leave them out of the file."
    )


def _carve(
    rows: Dataset, split: str, fraction: float, at_most: int | None, notes: list[str]
) -> tuple[Dataset, Dataset]:
    taken, rest = carve(rows, split, fraction, at_most, notes)
    count = len(taken)
    labels = taken["true" if split == "test" else "chooser"]
    labelled = [index for index, label in enumerate(labels) if label is not None]
    if len(labelled) < count:
        notes.append(f"{count - len(labelled)} of these {split} rows have no label to be read by and were dropped.")
    return taken.select(labelled), rest


def _at_most(rows: Dataset, count: int | None, seed: int) -> Dataset:
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=seed).select(range(count))


def _class_names(splits: Sequence[Dataset], feature: Any, columns: Columns) -> list[Label]:
    """All classes that occur, sorted; those of the data set's own ClassLabel in its order."""
    train = {label for name in ("given", "true") for label in splits[0][name] if label is not None}
    found = train | {
        label for rows in splits[1:] for name in ("true", "chooser") for label in rows[name] if label is not None
    }
    if len({type(label) for label in found}) > 1:
        raise DataError(
            f"`label_column` {columns.label!r}: one column or split has integers, another strings as labels. "
            "Give the same kind everywhere."
        )
    given = {label for label in splits[0]["given"] if label is not None}
    if len(given) < 2:
        raise DataError(
            f"`label_column` {columns.label!r} has the one class {next(iter(given))!r} in training. "
            "Classification needs at least two; name another column with --label_column."
        )
    if isinstance(feature, ClassLabel) and found <= set(feature.names):
        return list(feature.names)
    return sorted(found)


def _numbered(rows: Dataset, names: Sequence[Label]) -> Dataset:
    number = {name: index for index, name in enumerate(names)}
    numbered = {
        ours: [_MISSING if value is None else number[value] for value in rows[raw]]
        for ours, raw in (("label", "given"), ("clean_label", "true"), ("chooser", "chooser"))
    }
    texts = {name: list(rows[name]) for name in ("text", "text_pair") if name in rows.column_names}
    return Dataset.from_dict({**texts, **numbered})


def _corrupt(
    train: Dataset, validation: Dataset, noise: Mapping[str, Any], names: Sequence[Label], trusted: bool
) -> tuple[Dataset, Dataset]:
    """Training and validation rows corrupted as one set, so that one noise process made both."""
    pool = concatenate_datasets([train, validation]).remove_columns(["clean_label", "chooser"])
    pool = pool.cast_column("label", ClassLabel(names=list(map(str, names))))
    labels = list(corrupt_labels(pool, **noise)["label"])
    train = _replaced(train, "label", labels[: len(train)])
    return train, validation if trusted else _replaced(validation, "chooser", labels[len(train) :])


def _replaced(rows: Dataset, column: str, values: list[int]) -> Dataset:
    return Dataset.from_dict({name: values if name == column else list(rows[name]) for name in rows.column_names})


def _finish(rows: Dataset, split: str) -> Dataset:
    """The chooser becomes the label of validation; what is known to be wrong is marked."""
    labels = list(rows["chooser"] if split == "validation" else rows["label"])
    clean = list(rows["clean_label"])
    texts = {name: list(rows[name]) for name in ("text", "text_pair") if name in rows.column_names}
    wrong = [true != _MISSING and given != true for given, true in zip(labels, clean, strict=True)]
    return Dataset.from_dict({**texts, "label": labels, "clean_label": clean, "is_mislabelled": wrong})


def _check_sizes(data: ClassificationData, columns: Columns) -> None:
    if len(data.validation) < len(data.names):
        raise DataError(
            f"validation has {len(data.validation)} rows, fewer than the {len(data.names)} classes of "
            f"`label_column` {columns.label!r}: its loss cannot choose an anchor. Give more with --validation_file, "
            "--validation_fraction or --max_eval_samples."
        )
    unseen = set(data.test["label"]) - set(data.train["label"])
    if unseen:
        names = ", ".join(data.names[index] for index in sorted(unseen))
        data.notes.append(f"The test has classes that no training row is labelled with: {names}.")
    unknown = sum(label == _MISSING for label in data.train["clean_label"])
    if unknown:
        data.notes.append(f"{unknown} training rows have no clean label; they count as neither right nor wrong.")
