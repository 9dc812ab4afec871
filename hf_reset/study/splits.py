"""Raw splits: from local files, a named data set or the embedded corpus, and taken from training where not given."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_reset.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


def load_splits(
    embedded: Callable[[], Mapping[Any, Dataset]],
    *,
    files: Mapping[str, str | None],
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
) -> dict[str, Dataset]:
    """The raw splits that were asked for: local files, a named data set, or the embedded corpus.

    Args:
        embedded: makes the embedded corpus.
        files: a file for each of `train`, `validation` and `test`; None where none was given.
        dataset_name: on the hub, or a local directory.
        dataset_config_name: its configuration.

    Raises:
        ConfigError: files and a name were both given, or files without one for training.
        DataError: a file or data set cannot be read.
    """
    if any(files.values()) and files["train"] is None:
        raise ConfigError("`validation_file` or `test_file` was given without `train_file`. Give --train_file.")
    if files["train"] is not None and dataset_name is not None:
        raise ConfigError(f"`train_file` and `dataset_name` {dataset_name!r} were both given. Give one.")
    if files["train"] is not None:
        return {split: load_file(file, argument=f"{split}_file") for split, file in files.items() if file}
    if dataset_name is not None:
        return load_named(dataset_name, dataset_config_name)
    return {str(split): rows for split, rows in embedded().items()}


def load_file(path: str | Path, *, argument: str) -> Dataset:
    """A local csv, tsv, json, jsonl or parquet file, or one of these gzipped, as a data set.

    Args:
        path: the file.
        argument: name of the option it came by, for messages.

    Raises:
        DataError: the file is missing, has another suffix, or cannot be read.
    """
    from datasets import Dataset, load_dataset

    path = Path(path)
    suffixes = [suffix.lstrip(".").lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in _FORMATS:
        raise DataError(f"`{argument}` {str(path)!r} has none of the suffixes {', '.join(_FORMATS)} (or with .gz).")
    if not path.is_file():
        raise DataError(f"`{argument}` {str(path)!r} is not a file. Check the path (seen from {Path.cwd().name!r}).")
    options: dict[str, Any] = {}
    if _FORMATS[kind] == "csv":
        delimiter = "\t" if kind == "tsv" else ","
        check_table(path, delimiter, argument=argument)
        # Only an empty cell is a missing one: None, NA and null are names like others.
        options = {"delimiter": delimiter, "keep_default_na": False, "na_values": [""]}
    try:
        loaded = load_dataset(_FORMATS[kind], data_files=str(path), **options)["train"]
    except Exception as error:  # whatever the reader of that format raises: the file is not what its suffix says
        reason = error.__cause__ or error
        raise DataError(
            f"`{argument}` {str(path)!r} cannot be read as {_FORMATS[kind]}, or is empty ({reason})."
        ) from error
    assert isinstance(loaded, Dataset)
    return loaded


def check_table(path: Path, delimiter: str, *, argument: str) -> None:
    """Refuse a csv or tsv file whose lines have not one cell a column, which readers pass over in silence.

    Args:
        path: the file, gzipped or not.
        delimiter: between cells.
        argument: name of the option it came by.

    Raises:
        DataError: a column's name stands twice, or a line has another number of cells than the first; the line is
            named as an editor counts.
    """
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter)
        try:
            header = next(lines, [])
            for cells in lines:
                if cells and len(cells) != len(header):
                    raise DataError(
                        f"`{argument}` {str(path)!r} has {len(cells)} cells in line {lines.line_num}, and "
                        f"{len(header)} columns. Put a text with {delimiter!r} or a line break in it in double quotes."
                    )
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"`{argument}` {str(path)!r} cannot be read as csv ({error}, near line {lines.line_num})."
            ) from error
    if doubled := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(
            f"`{argument}` {str(path)!r} has the column {doubled[0]!r} twice in line 1. Rename one of them."
        )


def refuse_same_rows(splits: Mapping[str, Sequence[Any]], notes: list[str]) -> None:
    """Refuse splits that share most of their rows; note how many where they share a few.

    Args:
        splits: what makes a row the same, a value a row, for `train`, `validation` and `test`.
        notes: receives the notes.

    Raises:
        DataError: more than half of a held-out split's rows are in another split.
    """
    for held_out, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        there = set(splits[other])
        count = sum(row in there for row in splits[held_out])
        total = len(splits[held_out])
        if 2 * count > total:
            raise DataError(
                f"{count} of {total} {held_out} rows are in the {other} split too: what is measured or chosen on them "
                f"says nothing of other rows. Give another --{held_out}_file, or none to take one from training."
            )
        if count:
            notes.append(f"{count} of {total} {held_out} rows have the text of a row of the {other} split.")


def load_named(name: str, config: str | None = None) -> dict[str, Dataset]:
    """The splits of a data set on the hub, or of a local directory, by name.

    Raises:
        DataError: it cannot be loaded, or has no `train` split.
    """
    from datasets import DatasetDict, load_dataset

    try:
        loaded = load_dataset(name, config)
    except Exception as error:  # offline, no such name, a script refused: the remedy is the same
        raise DataError(
            f"`dataset_name` {name!r} cannot be loaded ({error}). Check the name and the network, or give "
            "local files with --train_file."
        ) from error
    assert isinstance(loaded, DatasetDict)
    if "train" not in loaded:
        raise DataError(f"`dataset_name` {name!r} has no split 'train', only {', '.join(map(str, loaded))}.")
    return {str(split): rows for split, rows in loaded.items()}


def take_split(
    rows: Dataset, split: str, fraction: float, at_most: int | None, notes: list[str]
) -> tuple[Dataset, Dataset]:
    """The first rows, for a split that was not given, and the rest; a note says so.

    Args:
        rows: those of training.
        split: `"validation"` or `"test"`.
        fraction: share of the rows to take, in (0, 1).
        at_most: take exactly so many instead; None: the fraction.
        notes: receives the note.

    Raises:
        ConfigError: the fraction is not one.
        DataError: nothing would be left to train on.
    """
    argument = "max_predict_samples" if split == "test" else "max_eval_samples"
    if not 0 < fraction < 1:
        raise ConfigError(f"`{split}_fraction` must be in (0, 1), got {fraction}. 0.15 takes 15 % of the rows.")
    count = at_most if at_most is not None else math.ceil(fraction * len(rows))
    if count >= len(rows):
        raise DataError(
            f"`{argument}` {count} would leave no row to train on: there are {len(rows)}. Give less, or a "
            f"--{split}_file."
        )
    notes.append(f"No {split} split was given: {count} of {len(rows)} training rows were taken for it.")
    return rows.select(range(count)), rows.select(range(count, len(rows)))


def at_most(rows: Dataset, count: int | None) -> Dataset:
    """The first rows, as many as there are up to a count; None: all."""
    return rows if count is None else rows.select(range(min(count, len(rows))))
