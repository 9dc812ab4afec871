"""A report compares the arms, never recommends what lost, and says when validation could not choose."""

import numpy as np
import pytest

from hf_reset.report import classification, instructions
from hf_reset.report.reading import Measure, choice_caveats, compare_arms, never_reset
from hf_reset.report.tables import most_suspect_table, named_as_known
from hf_reset.study.classification import paired_gain

ACCURACY = Measure("test_accuracy", "Accuracy", "points", scale=100, tie=0.005, is_share=True)


def record(arm, seed, last, best=None, **more):
    losses = [[10, 2.0], [20, 1.0], [30, 1.5]]
    given = {"test_accuracy_last": last, "test_accuracy_best": last if best is None else best, "test_rows": 500}
    run = {"steps": 30, "best_step": 20, "history": {"validation_loss": losses}}
    return {"arm": arm, "seed": seed, "can_reset": arm != "base", "resets": 3, **run, **given, **more}


def study(base, other, **more):
    pairs = enumerate(zip(base, other, strict=True))
    return [one for seed, (a, b) in pairs for one in (record("base", seed, a), record("odd", seed, b, **more))]


def test_what_lost_in_every_seed_is_not_praised():
    """TREC, 350 rows: plain 0.500, reset 0.347 in three of three seeds."""
    said = classification.reading(study([0.5, 0.52, 0.48], [0.35, 0.34, 0.35]))
    assert "odd lost at the last step and at the best evaluation" in said
    assert "-15.3 points (better in 0, worse in 3 of 3 seeds)" in said
    assert "can help" not in said
    losses = {"test_loss_last": 4.0, "test_loss_best": 3.5}
    records = [{**record("base", 0, 0.5), **losses}, {**record("odd", 0, 0.5), **losses, "test_loss_best": 3.9}]
    assert "odd lost at the best evaluation" in instructions.reading(records)
    assert "can help" not in instructions.reading(records)


def test_what_gained_is_said_to_have_and_seeds_that_disagree_tell_nothing():
    gained = classification.reading(study([0.6, 0.62], [0.8, 0.81]))
    assert "odd gained at the last step" in gained
    assert "can help" in gained
    assert "No difference between them can be told" in classification.reading(study([0.6, 0.7], [0.8, 0.65]))


@pytest.mark.parametrize(("difference", "verdict"), [(0.05, "alike"), (0.1, "better"), (-0.1, "worse")])
def test_one_seed_must_be_beyond_two_standard_errors_of_the_test(difference, verdict):
    """At 0.5 with 500 rows the standard error of a difference is about 0.032."""
    _, verdicts = compare_arms(study([0.5], [0.5 + difference]), ACCURACY)
    assert verdicts == {verdict}


def test_a_lower_loss_is_a_gain():
    loss = Measure("test_accuracy", "Loss", "nats", higher_is_better=False, tie=0.02)
    assert compare_arms(study([4.0, 4.1], [3.5, 3.6]), loss)[1] == {"better"}


def test_nothing_to_compare_is_no_verdict():
    assert compare_arms([record("odd", 0, 0.5)], ACCURACY) == ([], set())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"history": {"validation_loss": [[30, 1.0]]}}, "one evaluation was all there was"),
        ({"best_step": 30}, "the best evaluation was the last step"),
        ({"validation_rows": 42, "validation_gain": 0.05, "validation_gain_error": 0.04}, "its 42 rows cannot tell"),
    ],
)
def test_a_validation_that_could_not_choose_is_said(more, words):
    assert not choice_caveats([record("odd", 0, 0.5)])
    (said,) = choice_caveats([record("odd", 0, 0.5, **more)])
    assert words in said
    assert "can help" not in classification.reading([record("odd", 0, 0.5, **more)])


def test_a_gain_beyond_two_standard_errors_could_be_told():
    assert not choice_caveats([record("odd", 0, 0.5, validation_gain=0.09, validation_gain_error=0.04)])


def test_patience_never_reached_is_told_from_no_draw():
    assert "patience was never reached" in never_reset([record("odd", 0, 0.5, resets=0)])
    assert "none was drawn" in never_reset([record("odd", 0, 0.5, resets=0, armed_step=10)])
    assert never_reset([record("odd", 0, 0.5)]) is None


def test_clean_is_said_only_of_what_somebody_called_clean():
    for report in (classification, instructions):
        held_out = [column.heading for column in named_as_known(report.COLUMNS, False)]
        assert not any("clean" in heading for heading in held_out)
        assert any("held-out" in heading for heading in held_out)
        assert any("clean" in column.heading for column in named_as_known(report.COLUMNS, True))
    assert "Held-out test accuracy" in classification.reading(study([0.6], [0.8]), clean=False)
    assert "No clean label" not in classification.chosen_by("label", None, clean_known=False)


def test_the_gain_is_paired_by_row():
    """Each row's cross-entropy is log 2 less under the best weights: no spread, however much the rows differ."""
    best = np.array([[0.0, -5.0], [3.0, 0.0], [0.0, 1.0]])
    probability = np.exp(best) / np.exp(best).sum(axis=1, keepdims=True)
    labels = [0, 0, 1]
    halved = probability[np.arange(3), labels] / 2
    last = np.log([[h, 1 - h] if y == 0 else [1 - h, h] for h, y in zip(halved, labels, strict=True)])
    found = paired_gain(last, best, labels)
    assert found["validation_gain"] == pytest.approx(np.log(2))
    assert found["validation_gain_error"] == pytest.approx(0, abs=1e-12)
    assert found["validation_rows"] == 3


def test_the_report_says_how_many_labels_look_wrong_and_on_what_evidence_resets_began():
    said = classification.reading(study([0.5], [0.6], label_noise_best=0.384, validation_labels_right=0.6))
    assert "About 38% of the validation labels look wrong" in said
    assert "40% are." in said
    assert "Resets began" not in said
    both = study([0.5], [0.6], label_noise_best=0.384, armed_step=520, armed_margin=2.34)
    both[0]["armed_margin"], both[1]["label_noise_best"] = None, 0.41
    said = classification.reading([{**both[0], "label_noise_best": 0.384}, both[1]])
    assert "About 38% to 41% of the validation labels look wrong" in said
    assert "odd seed 0 after step 520 (2.3)" in said


def test_the_most_suspect_rows_are_shown_as_a_table():
    row = {"row": 7, "text": "a  | b", "given": "x", "predicted": "y", "label_quality": 0.0123, "is_wrong": True}
    table = most_suspect_table([record("odd", 0, 0.5, most_suspect=[row], suspects_auroc=0.875)])
    assert "| 7 | a \\| b | x | y | 0.012 | yes |" in table
    assert "ROC of 0.875" in table
    del row["is_wrong"]
    assert "is wrong" not in most_suspect_table([record("odd", 0, 0.5, most_suspect=[row])])
    assert most_suspect_table([record("odd", 0, 0.5)]) == ""


def test_the_report_says_why_no_label_was_corrected():
    why = {"why_not_refined": "The model seems right in 43% of the rows, the labels in 60%."}
    said = classification.reading([record("base", 0, 0.5), record("odd", 0, 0.6, **why)])
    assert "odd (seed 0) corrected no label at its end: The model seems right in 43%" in said
    assert "corrected no label" not in classification.reading(study([0.5], [0.6]))
