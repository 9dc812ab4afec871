"""Transition matrices: their definitions, their errors, and what can be learned through them."""

from __future__ import annotations

import numpy as np
import pytest

from hf_reset.errors import ConfigError, DataError
from hf_reset.noise import (
    empirical_matrix,
    learnability,
    noise_rate,
    pair_matrix,
    symmetric_matrix,
    transition_matrix,
)


@pytest.mark.parametrize("make", [symmetric_matrix, pair_matrix])
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("rate", [0, 0.25, 1])
def test_rows_sum_to_one_and_the_diagonal_holds_what_stays_clean(make, classes, rate):
    matrix = make(classes, rate)
    assert matrix.shape == (classes, classes)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-15)
    np.testing.assert_allclose(np.diag(matrix), 1 - rate, atol=1e-15)
    assert noise_rate(matrix) == pytest.approx(rate)


def test_definitions_by_hand():
    np.testing.assert_allclose(symmetric_matrix(3, 0.4), [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    np.testing.assert_allclose(pair_matrix(3, 0.4), [[0.6, 0.4, 0], [0, 0.6, 0.4], [0.4, 0, 0.6]])


def test_noise_rate_weighs_classes():
    matrix = [[0.5, 0.5], [0, 1]]
    assert noise_rate(matrix) == 0.25
    assert noise_rate(matrix, [30, 10]) == 0.375


def test_empirical_matrix_counts():
    matrix = empirical_matrix([0, 0, 0, 0, 1, 1], [0, 0, 1, 2, 1, 0])
    np.testing.assert_array_equal(matrix, [[0.5, 0.25, 0.25], [0.5, 0.5, 0], [0, 0, 1]])
    assert empirical_matrix([0, 1], [0, 1], num_classes=5).shape == (5, 5)


def test_empirical_matrix_recovers_the_matrix_that_made_the_noise():
    rng, classes, rows = np.random.default_rng(0), 4, 40_000
    matrix = rng.dirichlet(np.ones(classes), size=classes)
    clean = rng.integers(classes, size=rows)
    noisy = (matrix.cumsum(axis=1)[clean] > rng.random((rows, 1))).argmax(axis=1)
    # Four standard errors of a share estimated from a quarter of the rows.
    np.testing.assert_allclose(empirical_matrix(clean, noisy), matrix, atol=4 * 0.5 / np.sqrt(rows / classes))


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_learnable_up_to_the_known_limits(classes):
    limit = (classes - 1) / classes
    assert learnability(symmetric_matrix(classes, limit - 0.01)).learnable
    assert not learnability(symmetric_matrix(classes, limit)).learnable
    assert learnability(pair_matrix(classes, 0.49)).learnable
    assert not learnability(pair_matrix(classes, 0.5)).learnable


def test_learnability_names_the_classes_that_are_lost_and_by_how_much():
    found = learnability([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0], [0.4, 0.2, 0.4]])
    assert not found.learnable
    assert found.unlearnable == [1, 2]
    np.testing.assert_allclose(found.margins, [0.2, -0.2, 0.0], atol=1e-12)


def test_the_check_returns_a_copy_with_exact_rows():
    given = np.array([[0.9, 0.1 + 5e-7], [0.0, 1.0]])
    checked = transition_matrix(given)
    assert checked is not given
    np.testing.assert_allclose(checked.sum(axis=1), 1, atol=1e-15)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.5, 0.5]], r"shape \(3, 3\).*got \(1, 2\)"),
        (np.eye(2), r"shape \(3, 3\).*got \(2, 2\)"),
        ([0.5, 0.5], r"shape \(3, 3\).*got \(2,\)"),
        ([[1, 0, 0], [0, 1, 0], [0, 0.5, 0.4]], "row 2 sums to 0.9. .*transpose"),
        ([[1.5, -0.5, 0], [0, 1, 0], [0, 0, 1]], r"probabilities in \[0, 1\]"),
        ([[np.nan, 0, 0], [0, 1, 0], [0, 0, 1]], r"probabilities in \[0, 1\]"),
        ([[1, 0], [0]], "square array of probabilities"),
        ("symmetric", "square array of probabilities, got 'symmetric'"),
    ],
)
def test_matrices_that_are_refused(matrix, message):
    with pytest.raises(ConfigError, match=message):
        transition_matrix(matrix, 3)


@pytest.mark.parametrize("make", [symmetric_matrix, pair_matrix])
def test_rates_and_class_counts_that_are_refused(make):
    for rate in (-0.1, 1.1, float("nan"), "0.4", True):
        with pytest.raises(ConfigError, match=r"`rate` must be in \[0, 1\]"):
            make(3, rate)
    with pytest.raises(ConfigError, match=r"`num_classes` must be at least 2.*got 1"):
        make(1, 0.1)


def test_labels_that_are_refused():
    with pytest.raises(DataError, match=r"one length, got shapes \(2,\) and \(1,\)"):
        empirical_matrix([0, 1], [0])
    with pytest.raises(DataError, match="one length"):
        empirical_matrix([], [])
    with pytest.raises(DataError, match="`noisy` must hold class numbers"):
        empirical_matrix([0, 1], [0, -1])
    with pytest.raises(DataError, match="`clean` must hold class numbers"):
        empirical_matrix([0.0, 1.0], [0, 1])
    with pytest.raises(DataError, match="`num_classes` is 2, but the labels go up to 2"):
        empirical_matrix([0, 1], [0, 2], num_classes=2)
    with pytest.raises(ConfigError, match=r"`class_counts` must hold one count.*each of 2 classes"):
        noise_rate(np.eye(2), [1, 2, 3])
