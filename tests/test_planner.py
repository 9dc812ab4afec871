"""Plans from excursions whose law is known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from hf_reset import planner
from hf_reset.errors import ConfigError
from hf_reset.metrics import calibrated_loss
from hf_reset.planner import (
    LOWER,
    PRIOR,
    UPPER,
    Counts,
    Plan,
    counts_of,
    plan_after_evaluation,
    plan_after_reset,
    recommend,
)
from hf_reset.planner.excursions import Excursion


def excursions_from(law, n, interval=10, cut=30, seed=0):
    """Excursions evaluated every interval until a new best, whose age follows `law(rng)`, or until `cut` of them."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        age = int(law(rng))
        seen = min(age, cut)
        found.append(Excursion(0, tuple(interval * k for k in range(1, seen + 1)), age <= cut))
    return found


def early_or_never(rng):
    return rng.integers(1, 3) if rng.random() < 0.3 else 1000


def only_late(rng):
    return 8 + rng.integers(0, 4)


def test_luby_sequence():
    expected = [1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8]
    assert [planner.luby(i) for i in range(1, 16)] == expected
    assert planner.luby(2**40 - 1) == 2**39
    with pytest.raises(ConfigError, match="`i` must be at least 1, got 0"):
        planner.luby(0)


# ---------------------------------------------------------------------------------------------- hazard and renewal


def test_renewal_by_hand():
    # A new best at the second evaluation or never: only excursions of two intervals are worth anything.
    hazard = np.array([0.0, 0.5] + [0.0] * 254)
    by_period = planner.improvements_by_period(hazard)
    assert by_period[:4] == pytest.approx([0, 0.5 / 2, 0.5 / 2.5, 0.5 / 3])
    transform = 0.5 * math.exp(-2 * 0.7)
    rate = planner.improvements_per_interval(hazard, np.array([0.7]))
    assert rate == pytest.approx([0.7 * transform / (1 - transform)])


def test_a_constant_hazard_without_resets_is_geometric():
    rate = planner.improvements_per_interval(np.full(256, 0.02), np.array([1e-7]))
    assert rate == pytest.approx([0.02], rel=1e-5)


def test_the_prior_alone_is_best_at_its_own_choice():
    grid = 2.0 ** np.arange(-5, 1.01, 0.01)
    rare = 0.01 * planner.hazard(Counts())
    best = grid[planner.improvements_per_interval(rare, grid).argmax()]
    assert best == pytest.approx(PRIOR, rel=0.03)
    assert planner.best_resets_per_interval(Counts()) == PRIOR


def test_hazard_follows_many_data():
    excursions = excursions_from(lambda rng: rng.geometric(0.2), 3000)
    counts = counts_of(excursions, 10)
    assert planner.hazard(counts)[:8] == pytest.approx(0.2, abs=0.03)
    assert counts.excursions == 3000
    assert sum(counts.hits) == sum(e.improved for e in excursions)


def test_falling_hazard_says_sooner_and_rising_says_not_at_all():
    sooner = planner.best_resets_per_interval(counts_of(excursions_from(early_or_never, 200), 10))
    assert sooner >= 0.35
    assert planner.best_resets_per_interval(counts_of(excursions_from(only_late, 60), 10)) == LOWER
    constant = counts_of(excursions_from(lambda rng: rng.geometric(0.05), 400), 10)
    assert LOWER <= planner.best_resets_per_interval(constant) <= UPPER


def test_periodic_choice():
    falling = counts_of(excursions_from(early_or_never, 300), 10)
    assert planner.best_resets_per_interval(falling, periodic=True) == 1 / 2  # new bests come at 1 and 2
    assert planner.best_resets_per_interval(counts_of(excursions_from(only_late, 60), 10), periodic=True) < 1 / 8


# ---------------------------------------------------------------------------------------------------------- online


def diffusing(peclet, length, *, intervals=800, interval=20, seed=0, probability=None):
    """A walk on a line with resets by an online plan: L²/D = `length` intervals, seen at evaluations only.

    Returns the chosen resets an interval over the second half (geometric mean), and the improvements.
    """
    rng = np.random.default_rng(seed)
    diffusion = 1 / length / interval
    drift = 2 * peclet * diffusion
    plan, position, chosen, improvements = Plan(interval=interval, probability=PRIOR / interval), 0.0, [], 0
    for step in range(1, intervals * interval + 1):
        position += drift + math.sqrt(2 * diffusion) * rng.standard_normal()
        if rng.random() < (plan.probability if probability is None else probability / interval):
            position, plan = 0.0, plan_after_reset(plan, step)
        if step % interval == 0:
            improved = position >= 1
            plan = plan_after_evaluation(plan, step, improved=improved, first=False)
            position, improvements = (0.0 if improved else position), improvements + improved
            chosen.append(plan.probability * interval)
    return float(np.exp(np.log(chosen[intervals // 2 :]).mean())), improvements


# The best x of five, each found by 40 walks of 1 000 intervals: for Pe 0, L²/D 3 it is 0.25, and 0.5 at Pe −1. The last
# two by 200 walks of 600 at 1/32, 1/16, 1/8 and 1/4, and a parabola through the best three.
@pytest.mark.parametrize(
    ("peclet", "length", "best"),
    [(0.0, 3.0, 0.25), (0.0, 10.0, 0.15), (-0.3, 2.0, 0.4), (0.25, 10.0, 0.1), (0.5, 10.0, 0.05)],
)
def test_auto_finds_the_best_within_a_factor_of_two(peclet, length, best):
    chosen = np.exp(np.mean([np.log(diffusing(peclet, length, seed=seed)[0]) for seed in range(3)]))
    assert best / 2 <= chosen <= best * 2


def test_auto_goes_to_its_lower_bound_where_resets_do_harm():
    assert diffusing(3.0, 3.0)[0] == pytest.approx(LOWER, rel=0.05)
    assert diffusing(1.0, 10.0)[0] < 2 * LOWER  # seldom seen beyond the ages that resets allow
    auto, without = diffusing(1.5, 3.0, seed=1)[1], diffusing(1.5, 3.0, seed=1, probability=0.0)[1]
    assert auto > without - 3 * math.sqrt(without)


def test_nothing_known_keeps_the_prior():
    plan = Plan()
    for step in range(25, 400, 25):
        plan = plan_after_evaluation(plan, step, improved=step == 25, first=step == 25)
        assert plan.probability == PRIOR / 25
        plan = plan_after_reset(plan, step + 3)
    assert plan.interval == 25
    assert sum(plan.counts.hits) == 0  # the first best had no anchor to start from
    assert plan.counts.excursions == pytest.approx((1 - 0.98**14) / 0.02)


def test_plan_counts_ages_from_the_last_reset():
    plan = Plan(probability=0.05, interval=10, start=10)
    plan = plan_after_evaluation(plan, 20, improved=False, first=False)
    plan = plan_after_reset(plan, 24)
    plan = plan_after_evaluation(plan, 30, improved=False, first=False)  # age 6: within the first interval
    plan = plan_after_evaluation(plan, 40, improved=True, first=False)  # age 16: the second
    assert plan.counts.trials[:3] == pytest.approx((2 * 0.98 - 0.02 * 0, 0.98, 0), abs=0.05)
    assert plan.counts.hits[1] > 0.9
    assert plan.start == 40


def test_an_evaluation_before_the_first_step_tells_no_interval():
    plan = plan_after_evaluation(Plan(), 0, improved=True, first=True)
    assert (plan.interval, plan.probability) == (None, None)
    assert plan_after_evaluation(plan, 15, improved=False, first=False).interval == 15


def test_before_resets_begin_nothing_is_counted():
    """A run that still learns what is easy has a new best at each evaluation: that says nothing of excursions."""
    plan = Plan()
    for step in range(10, 400, 10):
        plan = plan_after_evaluation(plan, step, improved=True, first=step == 10, counted=False)
    assert plan.counts == Counts()
    plan = plan_after_evaluation(plan, 400, improved=True, first=False)
    assert plan.counts.hits[0] > 0.9


def test_where_labels_are_clean_the_lower_bound_stands_until_excursions_say_otherwise():
    def learning(loss):
        return plan_after_evaluation(Plan(), 10, improved=True, first=True, loss=loss)

    assert learning(None).probability == learning(0.33).probability == PRIOR / 10
    plan = learning(0.32)
    assert plan.probability == LOWER / 10
    plan = plan_after_evaluation(plan, 20, improved=False, first=False, loss=0.7)
    assert plan.probability == LOWER / 10, "what counts is the anchor's"
    assert plan_after_evaluation(plan, 30, improved=True, first=False, loss=0.7).probability == PRIOR / 10
    told = replace(plan, counts=counts_of(excursions_from(early_or_never, 200), 10))
    assert plan_after_evaluation(told, 40, improved=False, first=False).probability > 5 * LOWER / 10


def test_no_model_can_have_so_small_a_loss_where_a_tenth_of_the_labels_is_wrong():
    rng, truth = np.random.default_rng(0), np.arange(4000) % 4
    wrong = rng.random(4000) < 0.1
    known = np.eye(4)[truth] * 8.0  # a model that knows the right class of each row, and is sure
    uniform = np.where(wrong, (truth + rng.integers(1, 4, 4000)) % 4, truth)
    for labels in (uniform, np.where(wrong, (truth + 1) % 4, truth)):
        assert calibrated_loss(known, labels).loss > planner.plan.CLEAN - 3 * 0.01  # its standard error
    assert calibrated_loss(known, truth).loss < planner.plan.CLEAN


def test_plan_survives_json():
    plan = plan_after_reset(
        Plan(interval=7, probability=0.1, loss=0.2, counts=counts_of([Excursion(0, (7, 14), True)], 7)), 20
    )
    assert Plan.from_plain(json.loads(json.dumps(asdict(plan)))) == plan


# ------------------------------------------------------------------------------------------------- recommendations


def test_recommendation_of_a_falling_hazard():
    advice = recommend(excursions_from(early_or_never, 120), 10, seed=1)
    assert advice.hazard == "falling"
    low, high = advice.probability_range
    assert 0 < low <= advice.probability <= high <= 1
    assert advice.patience == 2  # new bests come at the first or second evaluation
    assert "going back every" in advice.reason
    assert advice == recommend(excursions_from(early_or_never, 120), 10, seed=1)
    assert json.loads(json.dumps(advice.as_plain()))["excursions"] == 120


def test_recommendation_of_a_rising_hazard():
    advice = recommend(excursions_from(only_late, 60), 10)
    assert (advice.probability, advice.hazard, advice.evaluation_interval) == (0.0, "rising", 10)
    assert advice.patience in (10, 11)
    assert "Do not reset" in advice.reason


def test_too_few_excursions_say_so():
    for few in ([], [Excursion(0, (10,), True)], excursions_from(lambda rng: 1000, 40)):
        advice = recommend(few, 10)
        assert advice.hazard == "unknown"
        assert advice.probability == PRIOR / 10
        assert advice.probability_range[0] < advice.probability < advice.probability_range[1]
        assert "say too little" in advice.reason


def test_uncertainty_shrinks_with_data():
    def width(n):
        low, high = recommend(excursions_from(early_or_never, n, seed=3), 10).probability_range
        return math.log(high / low)

    assert width(1000) < width(40)


def test_recommend_checks_its_arguments():
    with pytest.raises(ConfigError, match="`interval` must be at least 1"):
        recommend([], 0)
