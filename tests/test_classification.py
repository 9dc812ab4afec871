"""Preparing classification data: splits, noise, real noise, and each bad input by name."""

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_reset.errors import ConfigError, DataError
from hf_reset.study.classification import prepare_classification
from hf_reset.study.columns import Columns

NAMES = ["cat", "dog", "owl"]


def rows(count=60, offset=0, **more):
    texts = [f"text number {index + offset}" for index in range(count)]
    return Dataset.from_dict({"text": texts, "label": [NAMES[i % 3] for i in range(count)], **more})


def mislabelled(split):
    return sum(split["is_mislabelled"])


def test_validation_is_noisy_like_training_and_the_test_is_clean():
    data = prepare_classification({"train": rows(200)}, Columns(), noise_rate=0.4, seed=1, max_predict_samples=20)
    pool = len(data.train) + len(data.validation)
    assert pool == 180
    assert mislabelled(data.train) + mislabelled(data.validation) == round(0.4 * 180), "one noise process made both"
    assert mislabelled(data.validation) > 0
    assert mislabelled(data.test) == 0
    assert len(data.notes) == 2
    assert len(data.mislabelled) == mislabelled(data.train)
    texts = [*data.train["text"], *data.validation["text"], *data.test["text"]]
    assert len(set(texts)) == 200, "no row is in two splits"
    wrong = data.train.select(data.mislabelled)
    assert all(a != b for a, b in zip(wrong["label"], wrong["clean_label"], strict=True))


def test_clean_labels_are_the_original_ones():
    train = rows(90)
    truth = dict(zip(train["text"], train["label"], strict=True))
    data = prepare_classification({"train": train}, Columns(), noise_rate=0.5)
    for split in (data.train, data.validation, data.test):
        assert [data.names[label] for label in split["clean_label"]] == [truth[text] for text in split["text"]]


def test_the_seed_decides_splits_and_noise():
    one, same, other = (prepare_classification({"train": rows()}, Columns(), noise_rate=0.4, seed=s) for s in (0, 0, 1))
    assert one.train.to_dict() == same.train.to_dict()
    assert one.train["text"][:] != other.train["text"][:]


def test_given_splits_are_used_and_cut():
    splits = {"train": rows(60), "validation": rows(30, 100), "test": rows(30, 200)}
    data = prepare_classification(splits, Columns(), max_train_samples=50, max_eval_samples=12, max_predict_samples=7)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [50, 12, 7]
    assert not data.notes
    assert set(data.validation["text"]) <= set(splits["validation"]["text"])
    assert mislabelled(data.train) == 0


def test_trusted_validation_labels_stay_clean():
    columns = Columns(validation_label="clean_label")
    data = prepare_classification({"train": rows(200)}, columns, noise_rate=0.4)
    assert mislabelled(data.train) > 50
    assert mislabelled(data.validation) == 0


def real(count=60, **changes):
    """Real noise: every third noisy label wrong, the first two rows without one."""
    noisy = [NAMES[(i + (i % 4 == 0)) % 3] for i in range(count)]
    noisy[:2] = [None, None]
    return rows(count, noisy=noisy)


REAL = Columns(label="noisy", clean_label="label")


def test_real_noise_trains_on_one_column_and_tests_on_the_other():
    data = prepare_classification({"train": real(), "test": rows(15, 100)}, REAL)
    assert len(data.train) + len(data.validation) == 58
    assert "2 of 60 train rows have no 'noisy' and were dropped." in data.notes
    assert mislabelled(data.train) + mislabelled(data.validation) == 14  # i % 4 == 0, less the row dropped
    assert data.test["label"] == data.test["clean_label"]


def test_a_validation_split_may_have_other_labels():
    splits = {"train": real(), "validation": rows(12, 100), "test": rows(15, 200)}
    with pytest.raises(DataError, match=r"`label_column` is 'noisy', which the validation split does not have"):
        prepare_classification(splits, REAL)
    columns = Columns(label="noisy", clean_label="label", validation_label="label")
    data = prepare_classification(splits, columns)
    assert mislabelled(data.validation) == 0
    assert columns.trusted


def test_rows_whose_clean_label_is_unknown_count_as_neither():
    labels = [None if i % 5 == 0 else NAMES[i % 3] for i in range(60)]
    train = Dataset.from_dict({**real().to_dict(), "label": labels})
    data = prepare_classification({"train": train, "test": rows(12, 100)}, REAL)
    unknown = [i for i, label in enumerate(data.train["clean_label"]) if label < 0]
    assert unknown
    assert not any(data.train["is_mislabelled"][i] for i in unknown)
    assert any("have no clean label" in note for note in data.notes)


def test_a_test_taken_from_training_has_clean_labels_only():
    labels = [None if i % 5 == 0 else NAMES[i % 3] for i in range(60)]
    train = Dataset.from_dict({**real().to_dict(), "label": labels})
    data = prepare_classification({"train": train}, REAL, test_fraction=0.5)
    assert min(data.test["clean_label"]) >= 0


def test_class_names_keep_the_order_of_the_data_set():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["owl", "dog", "cat"])})
    train = Dataset.from_dict({"text": [f"t{i}" for i in range(48)], "label": [0, 1, 2, -1] * 12}, features=features)
    data = prepare_classification({"train": train}, Columns())
    assert data.names == ["owl", "dog", "cat"]
    assert any("12 of 48 train rows" in note for note in data.notes), "-1 is no label"


def test_integer_labels_may_have_gaps():
    train = Dataset.from_dict({"text": [f"t{i}" for i in range(40)], "label": [1, 7] * 20})
    assert prepare_classification({"train": train}, Columns()).names == ["1", "7"]


def test_a_pair_of_texts_is_kept():
    train = rows(40, second=[f"second {i}" for i in range(40)])
    data = prepare_classification({"train": train}, Columns(text_pair="second"), noise_rate=0.4)
    for split in (data.train, data.validation, data.test):
        assert all(pair.startswith("second") for pair in split["text_pair"])


@pytest.mark.parametrize("kind", ["pair", "instance", "matrix"])
def test_every_kind_of_noise(kind):
    matrix = [[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]] if kind == "matrix" else None
    rate = 0.0 if matrix else 0.5
    data = prepare_classification(
        {"train": rows(120)}, Columns(), noise_rate=rate, noise_kind=kind, noise_matrix=matrix
    )
    assert mislabelled(data.train) + mislabelled(data.validation) == pytest.approx(51, abs=2)
    assert mislabelled(data.test) == 0


def bad(**changes):
    return Dataset.from_dict({**rows(30).to_dict(), **changes})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (rows(0), r"the train split is empty \(0 rows\)"),
        (bad(label=["cat"] * 30), r"`label_column` 'label' has the one class 'cat'"),
        (bad(label=[0.5] * 30), r"`label_column` 'label' must hold integers or strings, got 0\.5 \(float\) in row 0"),
        (bad(label=[True, False] * 15), r"must hold integers or strings, got True"),
        (bad(label=[[1]] * 30), r"must hold integers or strings, got \[1\]"),
        (bad(label=[None] * 30), r"`label_column` 'label' is empty on all 30 rows"),
        (bad(text=[" "] * 30), r"`text_column` 'text' has no text in any of the 30 rows of the train split"),
        (bad(text=list(range(30))), r"`text_column` 'text' must hold strings, got 0 \(int\) in row 0"),
        (
            rows(30).rename_column("label", "topic"),
            r"`label_column` is 'label'.*It has 'text', 'topic'.*--label_column",
        ),
        (rows(30).rename_column("text", "body"), r"`text_column` is 'text', which the train split does not have"),
    ],
)
def test_bad_rows_are_named(train, message):
    with pytest.raises(DataError, match=message):
        prepare_classification({"train": train}, Columns())


def test_a_row_without_text_is_dropped_and_counted_by_its_own_number():
    texts = [*(f"t{n}" for n in range(57)), None, " ", ""]
    labels = [None, *rows()["label"][1:]]
    data = prepare_classification({"train": Dataset.from_dict({"text": texts, "label": labels})}, Columns())
    assert "1 of 60 train rows have no 'label' and were dropped." in data.notes
    assert (
        "3 of 60 train rows have no text in 'text' and were dropped (the first is row 57, counted from 0)."
        in data.notes
    )
    assert len(data.train) + len(data.validation) + len(data.test) == 56


def test_a_validation_class_that_training_lacks_is_refused():
    validation = Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": ["fox", "cat", "dog", "owl"]})
    with pytest.raises(DataError, match="validation has classes that no training row is labelled with: fox"):
        prepare_classification({"train": rows(), "validation": validation, "test": rows(9, 100)}, Columns())


def test_the_same_rows_in_two_splits_are_refused():
    with pytest.raises(DataError, match="30 of 30 test rows are in the train split too"):
        prepare_classification({"train": rows(60), "validation": rows(9, 90), "test": rows(30)}, Columns())


def test_fewer_validation_rows_than_classes():
    with pytest.raises(DataError, match="validation has 2 rows, fewer than the 3 classes"):
        prepare_classification({"train": rows(), "validation": rows(2, 100)}, Columns())
    with pytest.raises(DataError, match="validation has 2 rows"):
        prepare_classification({"train": rows()}, Columns(), max_eval_samples=2)


def test_labels_of_two_kinds_do_not_mix():
    test = Dataset.from_dict({"text": list("abc"), "label": [0, 1, 2]})
    with pytest.raises(DataError, match="integers, another strings"):
        prepare_classification({"train": rows(), "test": test}, Columns())


def test_noise_on_top_of_real_noise_is_refused():
    with pytest.raises(ConfigError, match=r"`noise_rate` 0\.2.*real noise of `clean_label_column` 'label'"):
        prepare_classification({"train": real()}, REAL, noise_rate=0.2)


def test_splits_that_leave_nothing_are_refused():
    with pytest.raises(DataError, match="`max_eval_samples` 60 would leave no row"):
        prepare_classification({"train": rows(), "test": rows(9, 100)}, Columns(), max_eval_samples=60)
    with pytest.raises(ConfigError, match=r"`validation_fraction` must be in \(0, 1\)"):
        prepare_classification({"train": rows()}, Columns(), validation_fraction=1.0)


def test_a_class_that_only_the_test_has_is_reported():
    test = Dataset.from_dict({"text": ["a", "b"], "label": ["fox", "cat"]})
    data = prepare_classification({"train": rows(), "test": test}, Columns())
    assert "fox" in data.names
    assert any("fox" in note for note in data.notes)
