"""Label noise: exact counts, the right classes, tied to rows and not to their places; and its refusals."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars

from hf_reset.errors import ConfigError, DataError, NoEffectWarning
from hf_reset.noise import corrupt_labels, empirical_matrix, pair_matrix, symmetric_matrix

disable_progress_bars()

ROWS, CLASSES = 300, 5
TOPICS = ("river lake stream", "train rail track", "apple pear plum", "iron copper tin", "hawk owl wren")


def make_data(rows: int = ROWS, classes: int = CLASSES, seed: int = 0) -> Dataset:
    """Texts of a few topics; the label follows the topic, unevenly distributed."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.35, size=rows) - 1, classes - 1)
    texts = [
        f"{' '.join(rng.choice(TOPICS[label % 5].split(), 3))} {rng.choice(['a', 'few', 'notes'])} {i}"
        for i, label in enumerate(labels)
    ]
    features = Features({"text": Value("string"), "label": ClassLabel(names=[f"c{i}" for i in range(classes)])})
    return Dataset.from_dict({"text": texts, "label": labels.tolist()}, features=features)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return make_data()


SETTINGS = {
    "symmetric": {"kind": "symmetric", "rate": 0.4},
    "pair": {"kind": "pair", "rate": 0.4},
    "instance": {"kind": "instance", "rate": 0.4},
    "matrix": {"kind": "matrix", "matrix": symmetric_matrix(CLASSES, 0.4)},
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


def columns(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(np.array(dataset[name][:]) for name in ("label", "clean_label", "is_mislabelled"))


# ------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("kind", ["symmetric", "pair", "instance"])
@pytest.mark.parametrize("rate", [0, 0.1, 1 / 3, 0.4, 0.655, 0.99, 1])
def test_exactly_the_asked_share_is_wrong(data, kind, rate):
    noisy = corrupt_labels(data, rate=rate, kind=kind, seed=3)
    label, clean, mislabelled = columns(noisy)
    assert mislabelled.sum() == round(rate * ROWS)
    np.testing.assert_array_equal(mislabelled, label != clean)
    np.testing.assert_array_equal(clean, data["label"][:])
    assert noisy["text"][:] == data["text"][:]


def test_matrix_counts_are_exact_in_each_class(data):
    matrix = np.random.default_rng(0).dirichlet(np.ones(CLASSES), size=CLASSES)
    label, clean, _ = columns(corrupt_labels(data, kind="matrix", matrix=matrix, seed=0))
    for i in range(CLASSES):
        counts = np.bincount(label[clean == i], minlength=CLASSES)
        assert counts.sum() == (clean == i).sum()
        assert np.all(np.abs(counts - matrix[i] * counts.sum()) < 1)


def test_matrix_shares_that_are_whole_numbers_are_met():
    data = Dataset.from_dict({"text": [str(i) for i in range(200)], "label": [0, 1] * 100})
    label, clean, _ = columns(corrupt_labels(data, kind="matrix", matrix=[[0.71, 0.29], [0.07, 0.93]], rate=0.18))
    np.testing.assert_allclose(empirical_matrix(clean, label), [[0.71, 0.29], [0.07, 0.93]], atol=1e-12)


def test_pair_goes_to_the_next_class_and_symmetric_to_all_others_alike():
    data = make_data(6000)
    label, clean, wrong = columns(corrupt_labels(data, rate=0.5, kind="pair", seed=1))
    np.testing.assert_array_equal(label[wrong], (clean[wrong] + 1) % CLASSES)
    label, clean, wrong = columns(corrupt_labels(data, rate=0.5, kind="symmetric", seed=1))
    steps = np.bincount((label - clean)[wrong] % CLASSES, minlength=CLASSES)
    assert steps[0] == 0
    expected = wrong.sum() / (CLASSES - 1)
    assert np.all(np.abs(steps[1:] - expected) < 4 * np.sqrt(expected)), steps
    # and in each class the same share is wrong, up to chance
    for i in range(CLASSES):
        rows = clean == i
        assert abs(wrong[rows].mean() - 0.5) < 4 * 0.5 / np.sqrt(rows.sum())


def test_symmetric_in_two_classes_is_the_other_one():
    data = Dataset.from_dict({"text": [str(i) for i in range(10)], "label": [0, 1] * 5})
    label, clean, wrong = columns(corrupt_labels(data, rate=1, kind="symmetric", seed=0))
    np.testing.assert_array_equal(label, 1 - clean)
    assert wrong.all()


# ----------------------------------------------------------------------------------------- instance noise


def test_instance_noise_mislabels_alike_texts_alike():
    """In one class, texts of one topic get one wrong class, texts of another a different one, mostly."""
    topics = [TOPICS[i % 2] for i in range(600)]
    # Both topics are in each class, so the class alone cannot tell which wrong label comes.
    data = Dataset.from_dict(
        {"text": [f"{topic} {i}" for i, topic in enumerate(topics)], "label": [i // 2 % 5 for i in range(600)]}
    )
    clean = np.array(data["label"][:])

    def predictability(noisy: Dataset) -> float:
        """How often the wrong class is the one most frequent for this class and topic."""
        label, _, wrong = columns(noisy)
        hits = 0
        for i in range(5):
            for topic in TOPICS[:2]:
                rows = wrong & (clean == i) & (np.array(topics) == topic)
                hits += np.bincount(label[rows], minlength=5).max()
        return hits / wrong.sum()

    instance = [corrupt_labels(data, rate=0.5, kind="instance", seed=s, text_column="text") for s in range(3)]
    symmetric = [corrupt_labels(data, rate=0.5, kind="symmetric", seed=s) for s in range(3)]
    assert min(map(predictability, instance)) > 0.5 > 0.4 > max(map(predictability, symmetric))
    # Another seed is another map from texts to wrong classes, not only another choice of rows.
    both = columns(instance[0])[2] & columns(instance[1])[2]
    assert (columns(instance[0])[0] != columns(instance[1])[0])[both].mean() > 0.3


def test_instance_noise_takes_features_instead_of_text():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((200, 4))
    data = Dataset.from_dict({"id": list(range(200)), "label": [i % 3 for i in range(200)]})
    noisy = corrupt_labels(data, rate=0.3, kind="instance", seed=0, features=points)
    assert sum(noisy["is_mislabelled"]) == 60
    # The features matter, and their unit and origin do not.
    scaled = corrupt_labels(data, rate=0.3, kind="instance", seed=0, features=points * 1024 + 512)
    other = corrupt_labels(data, rate=0.3, kind="instance", seed=0, features=-points)
    assert scaled["label"][:] == noisy["label"][:]
    assert other["label"][:] != noisy["label"][:]
    assert other["is_mislabelled"][:] == noisy["is_mislabelled"][:]
    # Each row goes with its own: shuffled together, they give the same.
    places = rng.permutation(200)
    shuffled = corrupt_labels(data.select(places), rate=0.3, kind="instance", seed=0, features=points[places])
    assert shuffled["label"][:] == [noisy["label"][:][place] for place in places]


def test_instance_flip_rates_are_truncated_normal():
    """The share of seeds in which a row is chosen is spread as q_i is, not constant over rows."""
    from hf_reset.noise.labels import _flip_rates, _Rows, _sample_exactly

    uniform = (np.arange(2000) + 0.5) / 2000
    rates = _flip_rates(uniform, 0.4)
    assert abs(rates.mean() - 0.4) < 1e-3
    assert abs(rates.std() - 0.1) < 1e-3
    assert np.all((_flip_rates(uniform, 0.02) > 0) & (_flip_rates(uniform, 0.98) <= 1))
    # Rows with a high rate are chosen more often, in proportion to it.
    rng, times = np.random.default_rng(0), np.zeros(2000)
    for _ in range(200):
        times[_sample_exactly(rates, 800, _Rows(rng.random((2000, 3)), np.arange(2000)))] += 1
    low, high = rates < 0.3, rates > 0.5
    assert times[low].mean() / 200 == pytest.approx(rates[low].mean(), abs=0.01)
    assert times[high].mean() / 200 == pytest.approx(rates[high].mean(), abs=0.01)


def test_text_pairs_and_the_only_text_column_are_found():
    rows = 40
    data = Dataset.from_dict(
        {
            "premise": [f"red fox {i}" for i in range(rows)],
            "hypothesis": [f"blue sea {i % 7}" for i in range(rows)],
            "label": [i % 3 for i in range(rows)],
        }
    )
    pair = ["premise", "hypothesis"]
    assert sum(corrupt_labels(data, rate=0.5, kind="instance", text_column=pair)["is_mislabelled"]) == 20
    with pytest.raises(DataError, match=r"`text_column` must be given: .* 2 columns of text \(premise, hyp"):
        corrupt_labels(data, rate=0.5, kind="instance")
    alone = data.remove_columns("hypothesis")
    assert sum(corrupt_labels(alone, rate=0.5, kind="instance")["is_mislabelled"]) == 20


# ----------------------------------------------------------------------------------- what it depends on


def test_shuffling_before_and_after_are_the_same(data, setting):
    """A row keeps its noise wherever it stands."""
    places = np.random.default_rng(5).permutation(ROWS)
    before = corrupt_labels(data.select(places), seed=7, **setting)
    after = corrupt_labels(data, seed=7, **setting).select(places)
    assert before.to_dict() == after.to_dict()


def test_equal_rows_share_out_their_noise_in_any_order():
    data = Dataset.from_dict({"text": ["same"] * 30, "label": [0, 1, 2] * 10})
    noisy = corrupt_labels(data, rate=0.5, kind="symmetric", seed=0)
    shuffled = corrupt_labels(data.shuffle(seed=1), rate=0.5, kind="symmetric", seed=0)
    assert sum(noisy["is_mislabelled"]) == 15
    pairs = [sorted(zip(d["clean_label"][:], d["label"][:], strict=True)) for d in (noisy, shuffled)]
    assert pairs[0] == pairs[1]


def test_order_of_columns_and_format_do_not_matter(data, setting):
    plain = corrupt_labels(data, seed=0, **setting)
    turned = corrupt_labels(data.select_columns(["label", "text"]), seed=0, **setting)
    assert turned["label"][:] == plain["label"][:]
    formatted = corrupt_labels(data.with_format("numpy"), seed=0, **setting)
    assert formatted.with_format(None)["label"][:] == plain["label"][:]


def test_seeds_differ_and_repeat(data, setting):
    first, again, other = (corrupt_labels(data, seed=seed, **setting) for seed in (0, 0, 1))
    assert first.to_dict() == again.to_dict()
    assert first["label"][:] != other["label"][:]
    # so that datasets' cache keeps serving what was mapped from it
    assert first._fingerprint == again._fingerprint != other._fingerprint


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_a_lower_rate_is_a_part_of_a_higher_one(data, kind):
    low, high = (corrupt_labels(data, rate=rate, kind=kind, seed=0) for rate in (0.2, 0.6))
    label, _, wrong = columns(low)
    assert columns(high)[2][wrong].all()
    np.testing.assert_array_equal(columns(high)[0][wrong], label[wrong])


def test_global_generators_are_left_alone(data, setting):
    def states() -> list[object]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    before = states()
    corrupt_labels(data, seed=0, **setting)
    assert states() == before


def test_the_same_in_another_process(data):
    """No dependence on Python's hash seed."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_noise_labels import *\n"
        "print(sum(i * y for i, y in enumerate("
        "corrupt_labels(make_data(), seed=0, **SETTINGS['symmetric'])['label'][:])))"
    )
    here = sum(i * y for i, y in enumerate(corrupt_labels(data, seed=0, **SETTINGS["symmetric"])["label"][:]))
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(there.stdout) == here


# ------------------------------------------------------------------------------------------------ types


def test_types_are_kept(data):
    noisy = corrupt_labels(data, rate=0.4, kind="symmetric", seed=0)
    assert noisy.column_names == ["text", "label", "clean_label", "is_mislabelled"]
    assert noisy.features["label"] == noisy.features["clean_label"] == data.features["label"]
    assert noisy.features["is_mislabelled"] == Value("bool")
    assert data.column_names == ["text", "label"]


@pytest.mark.parametrize(
    ("values", "feature"),
    [(["no", "yes", "maybe"], Value("string")), ([10, -3, 7], Value("int32")), ([True, False], Value("bool"))],
)
def test_plain_values_are_classes_in_sorted_order(values, feature):
    rows = [values[i % len(values)] for i in range(30)]
    features = Features({"id": Value("int64"), "topic": feature})
    data = Dataset.from_dict({"id": list(range(30)), "topic": rows}, features=features)
    noisy = corrupt_labels(data, rate=1, kind="pair", seed=0, column="topic")
    order = sorted(values)
    following = {value: order[(i + 1) % len(order)] for i, value in enumerate(order)}
    assert noisy["topic"][:] == [following[value] for value in rows]
    assert noisy["clean_label"][:] == rows
    assert noisy.features["topic"] == noisy.features["clean_label"] == feature


def test_classes_of_a_class_label_count_even_where_absent():
    names = ["a", "b", "c"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    data = Dataset.from_dict({"text": [str(i) for i in range(100)], "label": [0, 1] * 50}, features=features)
    assert set(corrupt_labels(data, rate=0.9, kind="symmetric", seed=0)["label"]) == {0, 1, 2}


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.5}, r"`rate` must be in \[0, 1\].*got 1.5"),
        ({"rate": -0.1}, r"`rate` must be in \[0, 1\].*got -0.1"),
        ({"rate": float("nan")}, r"`rate` must be in \[0, 1\].*got nan"),
        ({"rate": "0.4"}, r"`rate` must be in \[0, 1\].*got '0.4'"),
        ({}, '`rate` must be given for kind="symmetric"'),
        ({"rate": 0.4, "kind": "uniform"}, "`kind` must be one of symmetric, pair, matrix, instance, got 'uniform'"),
        ({"rate": 0.4, "matrix": np.eye(5)}, 'kind="symmetric" takes no `matrix`'),
        ({"rate": 0.4, "kind": "matrix"}, 'kind="matrix" needs `matrix`'),
        ({"kind": "matrix", "matrix": np.eye(4)}, r"`matrix` must have shape \(5, 5\).*got \(4, 4\)"),
        (
            {"kind": "matrix", "matrix": pair_matrix(5, 0.4), "rate": 0.2},
            "`rate` 0.2 contradicts `matrix`, which makes 0.4 of these rows wrong",
        ),
        ({"rate": 0.4, "text_column": "text"}, '`text_column` go with kind="instance"'),
        ({"rate": 0.4, "kind": "instance", "text_column": "txt"}, "`text_column` 'txt' is not.*text, label"),
        ({"rate": 0.4, "kind": "instance", "features": np.ones((3, 2))}, r"shape \(300, S\).*got shape \(3, 2\)"),
        ({"rate": 0.4, "kind": "instance", "features": np.full((300, 2), np.inf)}, "finite"),
        ({"rate": 0.4, "column": "topic"}, "`column` 'topic' is not in the data set. Its columns are text, label"),
    ],
)
def test_arguments_that_are_refused(data, arguments, message):
    with pytest.raises((ConfigError, DataError), match=message):
        corrupt_labels(data, **arguments)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, 1.0, 2.0], "'label' must hold integers or strings, one a row, got 0.0"),
        ([0, None, None], "'label' has no label in 2 rows .the first is row 1"),
        ([1, 1, 1], "'label' must hold at least two classes, got only 1"),
        ([[0], [1], [0, 1]], r"'label' must hold integers or strings, one a row, got \[0\]"),
    ],
)
def test_label_columns_that_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        corrupt_labels(Dataset.from_dict({"text": ["a", "b", "c"], "label": labels}), rate=0.5)


def test_data_sets_that_are_refused(data):
    with pytest.raises(DataError, match="`dataset` must hold rows, got an empty one"):
        corrupt_labels(data.select([]), rate=0.5)
    with pytest.raises(DataError, match=r"must be a datasets\.Dataset, got DatasetDict. Pass one split"):
        corrupt_labels(DatasetDict(train=data), rate=0.5)
    with pytest.raises(DataError, match="already has the column clean_label and is_mislabelled"):
        corrupt_labels(corrupt_labels(data, rate=0.1), rate=0.1)
    unlabelled = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    with pytest.raises(DataError, match="holds -1, which is none of its 2 classes"):
        corrupt_labels(Dataset.from_dict({"text": list("abc"), "label": [0, -1, 1]}, features=unlabelled), rate=0.5)
    with pytest.raises(DataError, match=r"Row 1 has .None,. for text where text is needed"):
        corrupt_labels(Dataset.from_dict({"text": ["a b", None], "label": [0, 1]}), rate=0.5, kind="instance")
    with pytest.raises(DataError, match="no words to tell texts apart"):
        corrupt_labels(Dataset.from_dict({"text": ["!", "?"], "label": [0, 1]}), rate=0.5, kind="instance")


def test_a_rate_that_rounds_to_no_row_is_said():
    data = Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, 1]})
    with pytest.warns(NoEffectWarning, match="`rate` 0.1 of 4 rows rounds to none"):
        corrupt_labels(data, rate=0.1)


def test_without_scikit_learn_the_extra_is_named():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from datasets import Dataset; from hf_reset.noise import corrupt_labels\n"
        "data = Dataset.from_dict({'text': ['a b', 'c d'], 'label': [0, 1]})\n"
        "corrupt_labels(data, rate=0.5, kind='symmetric')\n"
        "corrupt_labels(data, rate=0.5, kind='instance', features=[[0.0], [1.0]])\n"
        "try: corrupt_labels(data, rate=0.5, kind='instance')\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'needs scikit-learn: pip install "hf-reset[recipes]"' in run.stdout
