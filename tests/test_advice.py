"""Each signature where it belongs, and silence beside it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_reset.planner import advice
from hf_reset.planner.advice import Seen, seen_since


def overfitting(ages, slope=0.01, noise=0.002, seed=0):
    """Evaluations that get worse with age, as between resets on noisy labels."""
    scatter = np.random.default_rng(seed).normal(scale=noise, size=len(ages))
    return [Seen(10 * k, age, slope * age / 10 + e, k) for k, (age, e) in enumerate(zip(ages, scatter, strict=True))]


def test_seen_since_counts_ages_from_anchors_and_resets():
    log = [
        {"step": 10, "eval_loss": 2.0},
        {"kind": "anchor", "step": 10, "metric": 2.0},
        {"step": 20, "eval_loss": 2.5},
        {"kind": "reset", "step": 23, "metric": 2.0},
        {"step": 25, "loss": 1.0},
        {"step": 30, "eval_loss": 2.25},
        {"kind": "reset", "step": 39, "metric": 2.0},
        {"step": 40, "eval_loss": 2.0},  # the anchor itself, evaluated again
        {"step": 50, "eval_loss": 1.5},
    ]
    assert seen_since(log, "eval_loss", greater_is_better=False, since=10) == [
        Seen(20, 10, 0.5, 0),
        Seen(30, 6, 0.25, 1),
        Seen(50, 10, -0.5, 2),
    ]
    assert [s.worse_by for s in seen_since(log, "eval_loss", greater_is_better=True, since=20)] == [-0.25, 0.5]


def test_too_frequent():
    said = advice.too_frequent(3.0, 20, 8)
    assert "Resets come every 3 steps, 7 of them between two evaluations" in said
    assert "Lower `probability` to about 0.025" in said
    assert advice.too_frequent(20.0, 20, 50) is None
    assert advice.too_frequent(3.0, 20, 2) is None


def test_too_rare():
    old = overfitting([10, 20, 30, 40, 50, 60, 70, 80] * 2)
    said = advice.too_rare(200.0, 10, old)
    assert "more than 40 steps after the anchor validation is worse than there, by 0.06" in said
    assert "Raise `probability` to about 0.05" in said
    assert advice.too_rare(20.0, 10, old) is None  # resets are frequent: these were long by chance
    assert advice.too_rare(200.0, 10, overfitting([10, 20, 50] * 1)) is None  # one old evaluation says nothing
    assert advice.too_rare(200.0, 10, overfitting([10, 20, 50, 60, 70, 80] * 2, slope=0.0)) is None
    assert advice.too_rare(200.0, 10, overfitting([10, 20, 50, 60, 70, 80] * 2, slope=-0.01)) is None


def test_late_anchor():
    assert "70 % of the wrong labels were memorised by then" in advice.late_anchor(90, memory=0.7)
    assert advice.late_anchor(90, memory=0.1) is None
    losses = {"training_loss": 0.3, "validation_loss": 1.4, "chance": math.log(6)}
    assert "the training loss was 0.3 against 1.4" in advice.late_anchor(90, **losses)
    assert advice.late_anchor(90, **losses | {"training_loss": 1.2}) is None
    assert advice.late_anchor(90, **losses | {"validation_loss": 0.4, "training_loss": 0.1}) is None  # clean labels
    assert advice.late_anchor(90, training_loss=0.1) is None
    assert advice.late_anchor(90, memory=0.1, **losses) is None  # what is known goes before what is guessed


def test_near_chance():
    assert "guessing has 1.79" in advice.near_chance(1.785, math.log(6), 5, is_loss=True)
    # The best that a perfect model can do at 40 % noise, of six classes and of two.
    assert advice.near_chance(1.32, math.log(6), 50, is_loss=True) is None
    assert advice.near_chance(0.673, math.log(2), 50, is_loss=True) is None
    assert advice.near_chance(1.785, math.log(6), 1, is_loss=True) is None
    assert "Raise `patience`" in advice.near_chance(0.27, 0.25, 5, is_loss=False)
    assert advice.near_chance(0.5, 0.25, 5, is_loss=False) is None


def test_scope_without_effect():
    steady = [Seen(10 * k, 10, 0.1 + 0.002 * (k % 3), k) for k in range(8)]
    said = advice.scope_without_effect("head", [0.1] * 8, steady)
    assert "Resets of scope 'head' change nothing at validation" in said
    assert '"all"' in said
    assert advice.scope_without_effect("all", [0.1] * 8, steady) is None  # quick to overfit, but not for want of scope
    back = [Seen(10 * k, 10, 0.1 if k % 2 else 0.01, k // 2) for k in range(1, 17)]
    assert advice.scope_without_effect("head", [0.1] * 8, back) is None
    assert advice.scope_without_effect("head", [0.1] * 8, steady[:4]) is None
    assert "moved nothing" in advice.scope_without_effect("all", [0.0] * 4, [])
    assert advice.scope_without_effect("all", [0.0, 0.0, 0.1, 0.0], []) is None


def test_within_noise():
    said = advice.within_noise([0.01, 0.02, 0.01], 100)
    assert "better by 0.01 in the middle, with a paired standard error of at least 0.01 on 100 validation rows" in said
    assert advice.within_noise([0.01, 0.02, 0.01], 1000) is None
    assert advice.within_noise([0.01], 100) is None
    assert "standard error of 0.02" in advice.within_noise([0.01, 0.02, 0.01], 1000, standard_error=0.02)
    assert advice.within_noise([0.1, 0.2, 0.1], 20, standard_error=0.02) is None


def test_the_least_paired_error_is_a_bound():
    """Rows that turn right and rows that turn wrong: the error of their difference is never below the bound."""
    rng = np.random.default_rng(0)
    for worse in (0.0, 0.05, 0.2):
        change = rng.choice([1, -1, 0], p=[worse + 0.02, worse, 0.98 - 2 * worse], size=(4000, 500)).mean(axis=1)
        assert change.std() > 0.97 * math.sqrt(0.02 / 500)


def test_blind_validation():
    rising = list(np.linspace(0.5, 0.9, 12))
    falling = [0.6, 0.65, 0.7, *np.linspace(0.69, 0.6, 9)]
    assert "trusted labels lost 0.1" in advice.blind_validation(rising, falling, trusted_error=0.02)
    assert advice.blind_validation(rising, falling, trusted_error=0.1) is None
    assert advice.blind_validation(falling, falling) is None
    assert "with 80 % of the wrong labels memorised" in advice.blind_validation(rising, memory=0.8)
    assert advice.blind_validation(rising, memory=0.8, armed=True) is None
    assert advice.blind_validation(rising, memory=0.1) is None
    assert advice.blind_validation(falling, memory=0.8) is None
    assert advice.blind_validation(rising) is None
    assert advice.blind_validation(rising[:4], memory=0.8) is None


@pytest.mark.parametrize("seed", range(20))
def test_silence_on_a_healthy_run(seed):
    """Excursions of a few evaluations that get a little worse and are put back."""
    rng = np.random.default_rng(seed)
    ages = rng.integers(1, 40, size=40)
    seen = [Seen(10 * k, int(a), 0.0005 * a + 0.01 * abs(rng.normal()), k) for k, a in enumerate(ages)]
    assert advice.too_frequent(20.0, 10, 40) is None
    assert advice.too_rare(20.0, 10, seen) is None
    assert advice.scope_without_effect("all", [0.1] * 40, seen) is None
