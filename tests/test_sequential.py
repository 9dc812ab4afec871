"""The sequential test of races: its error level over whole courses, what it finds, and what is certain."""

import math

import numpy as np
import pytest

from hf_reset.metrics.sequential import capital, lower_bound

COURSES = 500
POPULATIONS = {
    "normal": (np.random.default_rng(0).normal(0.02, 0.3, 200), -2.0),
    "few very low": (np.where(np.arange(200) < 5, -2.0, 0.05), -2.0),
    "few very high": (np.where(np.arange(200) < 5, 2.0, -0.05), -2.0),
    "at the floor": (np.where(np.arange(60) < 30, -1.0, 1.0), -1.0),
}


def courses(population, floor):
    """All differences in random orders, and their floors."""
    rng = np.random.default_rng(1)
    for _ in range(COURSES):
        yield rng.permutation(population), np.full(len(population), floor)


@pytest.mark.parametrize("name", POPULATIONS)
def test_a_true_claim_is_ruled_out_as_seldom_as_promised(name):
    """Over the whole course, against the worst claim that is true: the mean itself. Within four standard errors."""
    population, floor = POPULATIONS[name]
    highest = np.array([capital(d, low, population.mean())[:-1].max() for d, low in courses(population, floor)])
    for level in (0.05, 0.1, 0.2):
        assert (highest >= 1 / level).mean() <= level + 4 * math.sqrt(level * (1 - level) / COURSES), level


def test_it_is_not_merely_cautious():
    """A mean five standard errors above the claim takes less than half of the rows, in nine courses of ten."""
    population, floor = POPULATIONS["normal"]
    claim = population.mean() - 5 * population.std() / math.sqrt(len(population))
    found = [int((capital(d, low, claim) >= 10).argmax()) for d, low in courses(population, floor)]
    assert 0 < np.quantile(found, 0.9) < len(population) / 2


def test_the_capital_is_a_fair_game_where_the_claim_is_the_mean():
    """Its mean over all orders of four rows is 1 before the last one, exactly."""
    from itertools import permutations

    rows = np.array([-0.5, 0.1, 0.3, 0.9])
    ends = [capital(np.array(order)[:3], np.full(4, -0.7), rows.mean())[-1] for order in permutations(rows)]
    assert np.mean(ends) == pytest.approx(1.0, abs=1e-12)
    assert np.std(ends) > 0.05


def test_less_is_ruled_out_the_more_is_claimed_to_be_allowed():
    population, floor = POPULATIONS["normal"]
    ends = [capital(population[:80], np.full(200, floor), mean)[-1] for mean in np.linspace(-1, 1, 101)]
    assert (np.diff(ends) <= 0).all()


def test_the_bound_rises_to_the_mean_and_never_past_what_is_certain():
    population, floor = POPULATIONS["normal"]
    lowest = np.full(200, floor)
    bounds = [lower_bound(population[:n], lowest, 0.1) for n in (0, 1, 50, 120, 199, 200)]
    assert bounds == sorted(bounds)
    assert bounds[0] == floor
    assert bounds[-1] == pytest.approx(population.mean())
    assert (
        capital(population[:120], lowest, bounds[3] - 1e-6)[-1]
        >= 10
        > capital(population[:120], lowest, bounds[3] + 1e-6)[-1]
    )
    # Two rows left of floor 0 cannot undo what four have won.
    assert capital([1.0, 1.0, 1.0, 1.0], np.zeros(6), 0.6)[-1] == math.inf


def test_rows_that_must_all_be_at_their_floor_prove_nothing():
    assert capital([1.0, -1.0, -1.0], np.full(3, -1.0), -1 / 3)[-1] < math.inf
    assert capital([0.0, 0.0], np.zeros(4), 0.0).tolist() == [1.0, 1.0]
