"""Rows from files of every kind, by name, and what cannot be read."""

import gzip
import json

import pytest

from hf_reset.errors import DataError
from hf_reset.study.splits import load_file, load_named, refuse_same_rows

ROWS = [{"text": "a", "label": 1}, {"text": "b", "label": None}]


def write(path, kind):
    if kind == "csv":
        path.write_text("text,label\na,1\nb,\n")
    elif kind == "tsv":
        path.write_text("text\tlabel\na\t1\nb\t\n")
    elif kind == "parquet":
        from datasets import Dataset

        Dataset.from_list(ROWS).to_parquet(path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
        if kind == "jsonl.gz":
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "jsonl.gz", "parquet"])
def test_files_of_every_kind_are_read(tmp_path, kind):
    rows = load_file(write(tmp_path / f"rows.{kind}", kind), argument="train_file")
    assert rows["text"][:] == ["a", "b"]
    assert rows["label"][:] == [1, None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", "a", r"`train_file` .*rows\.txt' has none of the suffixes csv"),
        ("rows.json", "{", "cannot be read as json, or is empty"),
        ("rows.csv", "", "cannot be read as csv, or is empty"),
        ("none.csv", None, "is not a file"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_file(tmp_path / name, argument="train_file")


def test_an_unknown_data_set_is_named_with_the_remedy(tmp_path):
    with pytest.raises(DataError, match=r"`dataset_name` .* cannot be loaded .*--train_file"):
        load_named(str(tmp_path / "nothing"))


def test_a_local_directory_is_a_data_set(tmp_path):
    write(tmp_path / "train.csv", "csv")
    assert load_named(str(tmp_path))["train"].num_rows == 2


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_only_an_empty_cell_is_a_missing_label(tmp_path, suffix):
    names = ["None", "NA", "null", "nan", "N/A", ""]
    lines = ["text,label", *(f"t{n},{name}" for n, name in enumerate(names))]
    (tmp_path / f"rows.{suffix}").write_text("\n".join(lines).replace(",", "\t" if suffix == "tsv" else ","))
    assert load_file(tmp_path / f"rows.{suffix}", argument="train_file")["label"][:] == [*names[:-1], None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,1\nb, c,2\n", "has 3 cells in line 3, and 2 columns. Put a text with ','"),
        ("text,label\nb, c,2\nd, e,1\n", "has 3 cells in line 2"),  # which pandas takes for an index
        ('text,label\n"a\nb",1\nc\n', "has 1 cells in line 4"),
        ("text,label,label\na,1,2\n", "has the column 'label' twice in line 1"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_lines_that_do_not_fit_the_columns_are_named(tmp_path, content, message, zipped):
    path = tmp_path / ("rows.csv.gz" if zipped else "rows.csv")
    path.write_bytes(gzip.compress(content.encode()) if zipped else content.encode())
    with pytest.raises(DataError, match=message):
        load_file(path, argument="train_file")


def test_splits_that_share_most_rows_are_refused_and_few_are_noted():
    notes = []
    splits = {"train": list("abcdef"), "validation": list("ghij"), "test": list("aklm")}
    refuse_same_rows(splits, notes)
    assert notes == ["1 of 4 test rows have the text of a row of the train split."]
    with pytest.raises(DataError, match="3 of 4 validation rows are in the train split too"):
        refuse_same_rows({**splits, "validation": list("abcz")}, notes)
    with pytest.raises(DataError, match="4 of 4 test rows are in the validation split too"):
        refuse_same_rows({**splits, "test": list("ghij")}, notes)
