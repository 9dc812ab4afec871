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


FORESEEN = {
    "nearly": lambda d, rng: d + rng.normal(0, 0.1 * d.std(), len(d)),
    "the other way round": lambda d, rng: -d + rng.normal(0, 0.3 * d.std(), len(d)),
    "exactly": lambda d, rng: d,
    "nothing": lambda d, rng: rng.standard_cauchy(len(d)),
    "where it is high": lambda d, rng: (d > np.quantile(d, 0.95)).astype(float),
}


@pytest.mark.parametrize("how", FORESEEN)
@pytest.mark.parametrize("name", POPULATIONS)
def test_what_is_foreseen_does_not_make_a_true_claim_ruled_out_oftener(name, how):
    population, floor = POPULATIONS[name]
    rng, foreseen = np.random.default_rng(2), FORESEEN[how](population, np.random.default_rng(3))
    highest = []
    for _ in range(COURSES):
        order = rng.permutation(len(population))
        low = np.full(len(population), floor)
        highest.append(capital(population[order], low, population.mean(), foreseen[order])[:-1].max())
    for level in (0.05, 0.3):
        share = (np.array(highest) >= 1 / level).mean()
        assert share <= level + 4 * math.sqrt(level * (1 - level) / COURSES), (level, share)


def test_what_is_foreseen_need_not_be_met():
    """Where nine tenths of the spread are known, half as many rows refute a claim two standard errors too low."""
    rng, found = np.random.default_rng(4), []
    population = rng.normal(0.02, 0.3, 2000)
    foreseen = population + rng.normal(0, 0.3 * population.std(), len(population))
    claim = population.mean() - 2 * population.std() / math.sqrt(len(population))
    for order in (rng.permutation(len(population)) for _ in range(100)):
        low = np.full(len(population), -1.5)
        ends = [capital(population[order], low, claim, x) >= 10 for x in (None, foreseen[order])]
        found.append([int(end.argmax()) for end in ends])
    without, with_it = np.median(found, axis=0)
    assert 0 < with_it < 0.6 * without


def test_the_game_with_what_is_foreseen_is_fair():
    """After the first fit of a slope, the mean over all orders of the four rows left is what it was, exactly."""
    from itertools import permutations

    rng = np.random.default_rng(5)
    first, rows = rng.normal(size=8), np.array([-0.5, 0.1, 0.3, 0.9])
    seen, x = np.concatenate([first, rows]), np.concatenate([first + rng.normal(size=8), [0.2, -1.0, 0.4, 2.0]])
    orders = [np.r_[0:8, np.array(order) + 8] for order in permutations(range(4))]
    ends = np.array([capital(seen[order][:11], np.full(12, -4.0), seen.mean(), x[order]) for order in orders])
    assert ends[:, -1].mean() == pytest.approx(ends[0, 7], abs=1e-12)
    assert ends[:, -1].std() > 0.01
    plain = capital(seen[:11], np.full(12, -4.0), seen.mean())
    assert not np.allclose(ends[0], plain)


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
