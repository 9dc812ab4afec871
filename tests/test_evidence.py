"""The paired comparison of validation rows, against what its standard error promises."""

import json
import math

import numpy as np
import pytest

from hf_reset.metrics import with_calibrated_loss
from hf_reset.training.evidence import RowEvidence, paired_margin


def test_the_margin_is_in_standard_errors():
    """Rows that differ by nothing give a standard normal; rows that differ by δ, one about δ √n / σ."""
    rng = np.random.default_rng(0)
    common = rng.exponential(3.0, (2000, 200))  # what both evaluations share drops out, however large
    ones = np.array([paired_margin(rows + rng.normal(0, 0.1, 200), rows) for rows in common])
    assert abs(ones.mean()) < 4 / math.sqrt(2000)
    assert abs(ones.std() - 1) < 4 / math.sqrt(2 * 2000)
    apart = np.array([paired_margin(rows + rng.normal(0.02, 0.1, 200), rows) for rows in common])
    assert abs(apart.mean() - 0.02 * math.sqrt(200) / 0.1) < 0.15  # four errors of the mean, and Student's bias


def test_rows_without_a_label_take_no_part():
    above, below = np.array([1.0, 2.0, 4.0, np.nan, 9.0]), np.array([0.5, 1.0, 2.0, 1.0, np.nan])
    assert paired_margin(above, below) == paired_margin(above[:3], below[:3])
    assert paired_margin(above[:1], below[:1]) is None
    assert paired_margin(below, below) is None  # the same weights


def test_two_evaluations_are_averaged_and_a_reset_forgets_them():
    rng = np.random.default_rng(1)
    anchor, first, second = rng.random((3, 50))
    evidence = RowEvidence().moved(anchor, None)
    assert evidence.margins(first).worse == paired_margin(first, anchor)
    evidence = evidence.seen(first)
    assert evidence.margins(second).worse == paired_margin((first + second) / 2, anchor)
    assert evidence.left().margins(second).worse == paired_margin(second, anchor)
    assert evidence.moved(second, None).margins(first).worse == paired_margin(first, second)


def test_weights_just_put_back_are_no_worse_than_themselves():
    """Not unknown: the sequence of values, which stands in for unknown margins, may well lie above its best."""
    rows = np.random.default_rng(4).random(30)
    assert RowEvidence().moved(rows, None).margins(rows.copy()).worse == 0.0


def test_no_anchor_or_another_evaluation_set_says_nothing():
    rows = np.arange(5.0)
    assert RowEvidence().margins(rows).worse is None
    assert RowEvidence().moved(rows, None).margins(np.arange(4.0)).worse is None


def test_it_survives_json_exactly():
    rng = np.random.default_rng(2)
    anchor, rows, baseline = rng.random((3, 20))
    anchor[3] = np.nan
    evidence = RowEvidence().moved(anchor, baseline).seen(rows)
    again = RowEvidence.from_json(json.loads(json.dumps(evidence.as_json())))
    np.testing.assert_array_equal(again.anchor, anchor)
    assert again.margins(rows) == evidence.margins(rows)
    assert RowEvidence.from_json(RowEvidence().as_json()) == RowEvidence()


class Prediction:
    def __init__(self, predictions, label_ids):
        self.predictions, self.label_ids = predictions, label_ids


@pytest.mark.filterwarnings("ignore::hf_reset.errors.WeakEvidenceWarning")
def test_the_metric_hands_over_its_rows_once():
    labels = np.array([0, 0, 1, -100])
    metric = with_calibrated_loss()
    assert metric.take_rows() is None
    loss = metric(Prediction(np.random.default_rng(3).normal(size=(4, 2)), labels))["calibrated_loss"]
    rows, baseline = metric.take_rows()
    assert metric.take_rows() is None
    assert np.nanmean(rows) == pytest.approx(loss)
    np.testing.assert_allclose(baseline[:3], [-math.log(2 / 3), -math.log(2 / 3), -math.log(1 / 3)])
    assert np.isnan(baseline[3])
