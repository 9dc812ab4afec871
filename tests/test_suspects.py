"""Suspects and confident learning: exact where the answer is known, against loops that say the definition, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from hf_reset.errors import DataError
from hf_reset.noise.matrices import empirical_matrix, pair_matrix, symmetric_matrix
from hf_reset.rows import estimate_noise, find_suspects, rank_by_margin

MATRICES = {
    "symmetric": symmetric_matrix(5, 0.4),
    "pair": pair_matrix(5, 0.3),
    "one class only": np.eye(5) - 0.5 * np.outer(np.eye(5)[2], np.eye(5)[2] - np.eye(5)[0]),
    "none": np.eye(5),
}


def planted(matrix, num_rows=600, seed=0):
    """Labels given by a transition matrix, and what a model that knows the clean ones says: 0.9, the rest shared."""
    rng = np.random.default_rng(seed)
    clean = rng.permutation(np.arange(num_rows) % len(matrix))
    given = np.array([rng.choice(len(matrix), p=matrix[label]) for label in clean])
    return symmetric_matrix(len(matrix), 0.1)[clean], given, clean


def unsure(num_rows=300, num_classes=4, seed=0):
    """Probabilities that prefer the first classes and know two thirds of the labels: rows miss every threshold."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=num_rows)
    known = np.where(rng.random(num_rows) < 2 / 3, labels, rng.integers(num_classes, size=num_rows))
    strengths = np.array([4.0, 2.0, 1.0, 0.5])[:num_classes] + 3 * np.eye(num_classes)[known]
    return np.array([rng.dirichlet(row) for row in strengths]), labels


@pytest.mark.parametrize("name", MATRICES)
def test_a_model_that_knows_names_the_mislabelled_rows_and_no_other(name):
    probabilities, given, clean = planted(MATRICES[name])
    table, estimate = find_suspects(probabilities, given), estimate_noise(probabilities, given)
    assert np.array_equal(table["is_label_issue"], given != clean)
    assert np.array_equal(table["predicted_label"], clean)
    assert estimate.rate == pytest.approx((given != clean).mean(), abs=1e-12)
    np.testing.assert_allclose(estimate.transition, empirical_matrix(clean, given, 5), atol=1e-12)
    for label in range(5):
        assert estimate.class_rates[label] == pytest.approx((clean != given)[given == label].mean(), abs=1e-12)
        assert estimate.counts[label] == (given == label).sum()
        for true in range(5):
            share = ((given == label) & (clean == true)).mean()
            assert estimate.joint[label, true] == pytest.approx(share, abs=1e-12)


def test_confident_learning_is_its_definition():
    """Northcutt et al. 2021, equations 1 to 3, a row at a time."""
    probabilities, given = unsure()
    thresholds = [probabilities[given == label, label].mean() for label in range(4)]
    counts = np.zeros((4, 4))
    for row, label in zip(probabilities, given, strict=True):
        confident = [j for j in range(4) if row[j] >= thresholds[j]]
        if confident:
            counts[label, max(confident, key=lambda j: row[j])] += 1
    joint = counts / counts.sum(axis=1, keepdims=True) * np.bincount(given)[:, None]
    joint /= joint.sum()
    assert 0 < counts.sum() < 290  # some rows are confidently nothing
    estimate = estimate_noise(probabilities, given)
    np.testing.assert_allclose(estimate.joint, joint, atol=1e-12)
    assert estimate.rate == pytest.approx(1 - np.trace(joint))
    assert estimate.joint.sum() == pytest.approx(1)
    np.testing.assert_allclose(estimate.joint.sum(axis=1), np.bincount(given) / 300)
    np.testing.assert_allclose(estimate.transition.sum(axis=1), 1)


def test_quality_and_rank_follow_the_margin():
    probabilities, given = unsure()
    table = find_suspects(probabilities, given)
    for row in range(20):
        others = np.delete(probabilities[row], given[row])
        margin = probabilities[row, given[row]] - others.max()
        assert table.loc[row, "margin"] == pytest.approx(margin)
        assert table.loc[row, "label_quality"] == pytest.approx((1 + margin) / 2)
        assert table.loc[row, "given_probability"] == probabilities[row, given[row]]
    assert table["label_quality"].between(0, 1).all()
    assert table.sort_values("rank")["margin"].is_monotonic_increasing
    assert sorted(table["rank"]) == list(range(1, 301))
    assert list(table.index) == list(range(300))
    first = ["is_label_issue", "label_quality", "given_label", "predicted_label"]
    assert list(table.columns[:4]) == first
    assert [table[name].dtype for name in first] == [bool, float, int, int]


def test_each_class_is_flagged_up_to_its_rate_the_worst_first():
    probabilities, given = unsure()
    table, estimate = find_suspects(probabilities, given), estimate_noise(probabilities, given)
    binds = []
    for label in range(4):
        of_class = table[table["given_label"] == label].sort_values("margin")
        below = int((of_class["margin"] < 0).sum())
        wanted = min(below, round(estimate.class_rates[label] * len(of_class)))
        binds.append(0 < wanted < below)
        assert of_class["is_label_issue"].tolist() == [True] * wanted + [False] * (len(of_class) - wanted)
    assert any(binds)


@pytest.mark.parametrize("noise_rate", [0.0, 0.1, 0.25])
def test_a_noise_rate_of_ones_own_is_a_share_of_all_rows(noise_rate):
    table = find_suspects(*unsure(), noise_rate=noise_rate)
    assert table["is_label_issue"].sum() == round(300 * noise_rate)
    assert (table["is_label_issue"] == (table["rank"] <= round(300 * noise_rate))).all()


def test_no_row_is_flagged_whose_label_is_the_prediction():
    table = find_suspects(*unsure(), noise_rate=1.0)
    assert (table["is_label_issue"] == (table["given_label"] != table["predicted_label"])).all()


def test_a_review_budget_keeps_the_worst():
    everything, few = find_suspects(*unsure()), find_suspects(*unsure(), budget=7)
    assert everything["is_label_issue"].sum() > 7
    worst = everything[everything["is_label_issue"]].nsmallest(7, "label_quality").index
    assert sorted(worst) == few.index[few["is_label_issue"]].tolist()
    assert not find_suspects(*unsure(), budget=0)["is_label_issue"].any()
    pd.testing.assert_frame_equal(find_suspects(*unsure(), budget=10_000), everything)


def test_rows_never_visited_or_without_label_say_nothing():
    probabilities, given, clean = planted(MATRICES["symmetric"])
    probabilities[::10], given[5::10] = np.nan, -100
    is_silent = np.arange(600) % 5 == 0
    table = find_suspects(probabilities, given)
    assert np.array_equal(table["is_label_issue"], (given != clean) & ~is_silent)
    for name in ("label_quality", "margin", "rank", "given_probability"):
        assert np.array_equal(table[name].isna(), is_silent)
    assert set(table["predicted_label"][::10]) == {-100}
    assert np.array_equal(table["predicted_label"][5::10], clean[5::10])
    assert set(table["given_label"][5::10]) == {-100}
    alone = estimate_noise(probabilities[~is_silent], given[~is_silent])
    np.testing.assert_array_equal(estimate_noise(probabilities, given).joint, alone.joint)


def test_a_class_that_no_row_was_given_or_is():
    probabilities, given, _ = planted(MATRICES["symmetric"])
    wider = np.hstack([probabilities, np.zeros((600, 1))])
    estimate, narrow = estimate_noise(wider, given), estimate_noise(probabilities, given)
    assert np.isnan(estimate.class_rates[5])
    assert estimate.rate == narrow.rate
    assert estimate.transition[5].tolist() == [0, 0, 0, 0, 0, 1]
    assert np.array_equal(
        find_suspects(wider, given)["is_label_issue"], find_suspects(probabilities, given)["is_label_issue"]
    )


def test_equal_probabilities_everywhere_flag_nothing():
    table = find_suspects(np.full((30, 3), 1 / 3), np.arange(30) % 3)
    assert not table["is_label_issue"].any()
    assert set(table["label_quality"]) == {0.5}


def test_margins_of_ones_own_rank_instead():
    probabilities, given = unsure()
    margins = np.linspace(1, -1, 300)
    table = find_suspects(probabilities, given, margins=margins, noise_rate=0.1)
    assert table.index[table["is_label_issue"]].tolist() == list(range(270, 300))
    assert np.array_equal(table["margin"], margins)
    alone = rank_by_margin(margins, given, table["predicted_label"], noise_rate=0.1)
    pd.testing.assert_frame_equal(alone, table.drop(columns="given_probability"))


def test_more_columns_pass_through():
    visits, in_training = np.arange(300), np.arange(300) % 2 == 0
    table = find_suspects(*unsure(), visits=torch.tensor(visits), wrong_events=None, in_training=in_training)
    assert np.array_equal(table["visits"], visits)
    assert np.array_equal(table["in_training"], in_training)
    assert "wrong_events" not in table


def test_tensors_and_float32_equal_arrays():
    probabilities, given = unsure()
    rounded = probabilities.astype(np.float32)
    found = find_suspects(torch.tensor(rounded), torch.tensor(given))
    pd.testing.assert_frame_equal(found, find_suspects(rounded, given.tolist()))


LABELS = np.array([0, 1, 2, 1])
RIGHT = np.full((4, 3), 1 / 3)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.full(4, 0.5), LABELS, r"shape \(N, K\).*got \(4,\)"),
        (np.ones((4, 1)), LABELS, r"at least 2 classes, got \(4, 1\)"),
        (np.full((4, 5), 0.2), LABELS, r"more classes than rows, shape \(4, 5\).*transpose"),
        (RIGHT * 3, LABELS, "row 0 sums to 3.*Logits need a softmax"),
        (np.add(RIGHT, [0.5, -0.5, 0]), LABELS, "must not be below 0.*-0.1667 the least"),
        (np.where(np.eye(4, 3) > 0, np.nan, RIGHT), LABELS, "NaN in some classes of row 0"),
        (np.eye(4, 3, dtype=int), LABELS, "floating-point"),
        ([[0.5, 0.5], [1.0]], LABELS, "Rows of one length"),
        (RIGHT, LABELS[:3], r"each of 4 rows, got shape \(3,\)"),
        (RIGHT, LABELS + 1, r"in \[0, 3\).*row 2 is 3"),
        (RIGHT, LABELS * 0.5, "targets of a regression"),
        (RIGHT, np.zeros((4, 3), int), "multi-label"),
        (RIGHT, np.full(4, -100), "No row has both"),
        (np.full((4, 3), np.nan), LABELS, "No row has both"),
    ],
)
def test_bad_input_is_refused_in_words(probabilities, labels, message):
    for function in (find_suspects, estimate_noise):
        with pytest.raises(DataError, match=message):
            function(probabilities, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_rate": 1.2}, r"`noise_rate` must be in \[0, 1\].*got 1.2"),
        ({"budget": -1}, "`budget` must be a number of rows"),
        ({"budget": 2.5}, "`budget` must be a number of rows"),
        ({"visits": [1, 2]}, r"`visits` must hold one value for each of 4 rows, got shape \(2,\)"),
        ({"margins": [0.1, 0.2]}, r"`margins` must hold one number for each of 4"),
        ({"margins": [0.1, 0.2, -3.0, 0.0]}, r"`margins` must lie in \[-1, 1\]"),
        ({"rank": LABELS}, "`rank` is a column of the table already"),
    ],
)
def test_bad_options_are_refused_in_words(options, message):
    with pytest.raises(DataError, match=message):
        find_suspects(RIGHT, LABELS, **options)
