"""Rows from files of every kind, by name, and what cannot be read."""

import gzip
import json

import pytest

from hf_reset.errors import DataError
from hf_reset.study.splits import load_file, load_named

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
