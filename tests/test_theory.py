"""Tabled values, limits and identities, and simulated walks within three standard errors."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from hf_reset import theory
from hf_reset.errors import ConfigError, DataError
from hf_reset.theory import langevin

# Ray, Mondal, Reuveni 2019, and worked out apart from this code: Pe, r* L²/D, T_0/T*.
TABLE = [
    (-1.0, 4.545, math.inf),
    (0.0, 2.540, math.inf),
    (0.1, 2.319, 3.67),
    (0.25, 1.977, 1.76),
    (0.5, 1.372, 1.175),
    (0.75, 0.716, 1.03),
    (0.9, 0.294, 1.004),
    (1.0, 0.0, 1.0),
    (1.5, 0.0, 1.0),
]


def mean_by_formula(distance, drift, diffusion, rate):
    """The formula as it is printed, for arguments at which it does no harm."""
    exponent = distance * (math.sqrt(drift**2 + 4 * diffusion * rate) - drift) / (2 * diffusion)
    return (math.exp(exponent) - 1) / rate


@pytest.mark.parametrize(("pe", "scaled_rate", "gain"), TABLE)
@pytest.mark.parametrize(("distance", "diffusion"), [(1.0, 1.0), (3.0, 0.2)])
def test_tabled_optimum_and_speed_up(pe, scaled_rate, gain, distance, diffusion):
    drift = 2 * diffusion * pe / distance
    assert theory.peclet_number(distance, drift, diffusion) == pytest.approx(pe, rel=1e-12)
    rate = theory.optimal_reset_rate(distance, drift, diffusion)
    assert rate * distance**2 / diffusion == pytest.approx(scaled_rate, abs=6e-4)
    assert theory.speed_up(distance, drift, diffusion) == pytest.approx(gain, rel=2e-3)


def test_no_drift():
    rate = theory.optimal_reset_rate(2.0, 0.0, 0.5)
    assert 2.0 * math.sqrt(rate / 0.5) == pytest.approx(1.59362, abs=1e-5)
    assert theory.mean_first_passage_time(2.0, 0.0, 0.5, rate) == pytest.approx(1.5441 * 4 / 0.5, rel=1e-4)


def test_the_optimum_is_one():
    for pe in (-30.0, -3.0, 0.0, 0.4, 0.8, 0.97):
        rate = theory.optimal_reset_rate(1.0, 2 * pe, 1.0)
        best, *others = theory.mean_first_passage_time(1.0, 2 * pe, 1.0, rate * np.array([1, 0.98, 1.02]))
        assert best < min(others)
    # Near the threshold r* L²/D ≈ 3 (1 − Pe), from the first terms of the series.
    assert theory.optimal_reset_rate(1.0, 2 * (1 - 1e-6), 1.0) == pytest.approx(3e-6, rel=1e-5)


@pytest.mark.parametrize("drift", [-0.7, 0.0, 0.3, 2.0])
@pytest.mark.parametrize("rate", [0.01, 0.5, 7.0])
def test_mean_time_is_the_printed_formula(drift, rate):
    expected = mean_by_formula(1.3, drift, 0.6, rate)
    assert theory.mean_first_passage_time(1.3, drift, 0.6, rate) == pytest.approx(expected, rel=1e-12)


def test_without_resets():
    assert theory.mean_first_passage_time(3.0, 2.0, 1.0, 0.0) == 1.5
    assert theory.mean_first_passage_time(3.0, 0.0, 1.0, 0.0) == math.inf
    assert theory.mean_first_passage_time(3.0, -1.0, 1.0, 0.0) == math.inf
    assert theory.mean_first_passage_time(3.0, 2.0, 1.0, 1e-13) == pytest.approx(1.5, rel=1e-12)


def test_extreme_arguments_give_numbers_and_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert theory.mean_first_passage_time(1e6, -1e6, 1e-6, 1e3) == math.inf
        assert theory.mean_first_passage_time(1.0, 1.0, 1.0, 1e308) == math.inf
        assert theory.mean_first_passage_time(1e200, 1e200, 1.0, 1e-3) == pytest.approx(1.0005, rel=1e-6)
        assert theory.mean_first_passage_time(1e-8, 1e-3, 1e-12, 1e-300) == pytest.approx(1e-5, rel=1e-12)
        assert theory.peclet_number(1e200, 1e200, 1e-200) == math.inf
        assert theory.optimal_reset_rate(1e-3, -1e5, 1e-9) == pytest.approx(1e8, rel=1e-6)  # |v|/L
        assert theory.optimal_reset_rate(1.0, 1e300, 1e-300) == 0.0
        assert theory.speed_up(1.0, -1e9, 1e-9) == math.inf


def test_arguments_broadcast():
    rates = theory.optimal_reset_rate([1.0, 2.0], np.zeros((3, 1)), 1.0)
    assert rates.shape == (3, 2)
    assert rates[1, 1] == theory.optimal_reset_rate(2.0, 0.0, 1.0)
    assert isinstance(theory.optimal_reset_rate(1, 0, 1), float)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (theory.peclet_number, (0.0, 1.0, 1.0), "`distance` must be above 0, got 0.0"),
        (theory.peclet_number, (1.0, 1.0, 0.0), "`diffusion` must be above 0, got 0.0"),
        (theory.optimal_reset_rate, (1.0, 1.0, -2.0), "`diffusion` must be above 0, got -2.0"),
        (theory.optimal_reset_rate, (-1.0, 1.0, 1.0), "`distance` must be above 0, got -1.0"),
        (theory.mean_first_passage_time, (1.0, math.nan, 1.0, 0.1), "`drift` must be a finite number, got nan"),
        (theory.mean_first_passage_time, (1.0, "fast", 1.0, 0.1), "`drift` must be a finite number, got 'fast'"),
        (theory.mean_first_passage_time, (1.0, 0.0, 1.0, -0.1), "`rate` must be at least 0, got -0.1"),
        (theory.mean_time_stepwise, (1.0, 0.0, 1.0, 1.5), r"`probability` must be in \[0, 1\], got 1.5"),
        (theory.mean_time_periodic, (1.0, 0.0, 1.0, 0), "`period` must be above 0, got 0"),
        (langevin.simulate, (1.0, 0.0, 0.0), "`diffusion` must be above 0 and finite, got 0.0"),
        (langevin.sgd, (1.0, 1.0, 0.1, 0), "`batch_size` must be at least 1, got 0"),
        (langevin.sgd, (1.0, 1.0, 0.0, 8), "`learning_rate` must be above 0"),
    ],
)
def test_bad_arguments_are_named(function, arguments, message):
    with pytest.raises(ConfigError, match=message):
        function(*arguments)


# ------------------------------------------------------------------------------------------ whole steps and periods


@pytest.mark.parametrize("pe", [-1.0, 0.0, 0.3, 3.0])
@pytest.mark.parametrize("rate", [0.0005, 0.005])
def test_simulated_walks_agree_with_the_formulas(pe, rate):
    distance, diffusion = 10.0, 0.5
    if pe < 0 and rate < 0.001:
        rate = 0.02  # the mean time without it is 10⁵ steps
    drift = 2 * diffusion * pe / distance
    walks = langevin.simulate(distance, drift, diffusion, rate, walkers=3000, seed=1)
    mean, error = walks.mean()
    stepwise = theory.mean_time_stepwise(distance, drift, diffusion, theory.probability_of(rate))
    assert abs(mean - stepwise) < 3 * error
    # In continuous time an arrival is not put off to the end of its step, half a step on average.
    continuous = theory.mean_first_passage_time(distance, drift, diffusion, rate)
    assert abs(mean - 0.5 - continuous) < 3 * error
    assert error < 0.035 * mean


def test_a_wrong_formula_would_be_seen():
    mean, error = langevin.simulate(10.0, 0.03, 0.5, 0.005, walkers=3000, seed=1).mean()
    without = theory.mean_first_passage_time(10.0, 0.03, 0.5, 0.0)
    assert abs(mean - without) > 10 * error


def test_walks_seen_only_at_the_ends_of_steps_go_further():
    mean, error = langevin.simulate(10.0, 0.03, 0.5, 0.005, walkers=6000, seed=2, bridge=False).mean()
    further = 10.0 + theory.OVERSHOOT * math.sqrt(2 * 0.5)
    probability = theory.probability_of(0.005)
    # Seen at step ends, no half step is put off: the correction of the distance is all there is to it.
    assert abs(mean - theory.mean_first_passage_time(further, 0.03, 0.5, theory.rate_of(probability))) < 3 * error
    assert abs(mean - theory.mean_time_stepwise(10.0, 0.03, 0.5, probability)) > 3 * error


@pytest.mark.parametrize("period", [60, 200])
def test_simulated_periodic_resets(period):
    mean, error = langevin.simulate(10.0, 0.03, 0.5, period=period, walkers=3000, seed=3).mean()
    assert abs(mean - 0.5 - theory.mean_time_periodic(10.0, 0.03, 0.5, period)) < 3 * error


def test_stepwise_limits():
    # One step an excursion: the step arrives or is undone, so that the time is geometric.
    chance = 1 - float(theory.survival(1.0, 2.0, -0.5, 0.5))
    assert theory.mean_time_stepwise(2.0, -0.5, 0.5, 1.0) == pytest.approx(1 / chance)
    assert theory.mean_time_periodic(2.0, -0.5, 0.5, 1e-3) > 1e6
    assert theory.mean_time_stepwise(30.0, 0.1, 1.0, 0.0) == pytest.approx(300.5)  # Wald, and half a step
    assert theory.mean_time_stepwise(30.0, 0.0, 1.0, 0.0) == math.inf
    # A small probability: continuous time and half a step.
    expected = theory.mean_first_passage_time(300.0, 0.0, 1.0, theory.rate_of(1e-5)) + 0.5
    assert theory.mean_time_stepwise(300.0, 0.0, 1.0, 1e-5) == pytest.approx(expected, rel=1e-6)


def test_survival_integrates_to_the_mean():
    time = np.linspace(0, 400, 400_001)
    alive = theory.survival(time, 3.0, 0.2, 0.05)
    assert (alive.sum() - 0.5) * time[1] == pytest.approx(15.0, rel=1e-6)
    assert theory.survival(0.0, 1.0, 5.0, 1.0) == 1


@pytest.mark.parametrize("pe", [-40.0, -1.0, 0.0, 0.5, 1.5])
def test_the_best_period_is_at_least_as_good_as_the_best_rate(pe):
    period = theory.optimal_period(1.0, 2 * pe, 1.0)
    by_rate = theory.mean_first_passage_time(1.0, 2 * pe, 1.0, theory.optimal_reset_rate(1.0, 2 * pe, 1.0))
    best = theory.mean_time_periodic(1.0, 2 * pe, 1.0, period)
    assert best < by_rate
    for other in (0.97, 1.03):
        assert theory.mean_time_periodic(1.0, 2 * pe, 1.0, other * period) > best


def test_no_period_helps_from_a_peclet_number_of_two():
    assert theory.optimal_period(1.0, 4.0, 1.0) == math.inf
    assert theory.mean_time_periodic(1.0, 4.0, 1.0, math.inf) == 0.25
    assert theory.mean_time_periodic(1.0, 4e5, 1.0, 1.0) == pytest.approx(2.5e-6, rel=1e-6)


def test_probability_and_rate_are_inverse():
    assert theory.probability_of(theory.rate_of(0.02)) == pytest.approx(0.02, rel=1e-14)
    assert theory.rate_of(1e-18) == 1e-18
    assert theory.rate_of(1.0) == math.inf
    with pytest.raises(ConfigError, match="`rate` must be at least 0"):
        theory.probability_of(-1.0)


# -------------------------------------------------------------------------------------------------- without a model


def test_times_observed_without_resets_foretell_those_with():
    free = langevin.simulate(10.0, 0.1, 0.5, walkers=20_000, seed=4)
    assert theory.squared_variation(free.times) == pytest.approx(1.0, abs=0.1)  # Pe = 1, and CV² = 1/Pe
    foretold = theory.mean_time_from_samples(free.times, probability=0.01)
    assert foretold == pytest.approx(theory.mean_time_stepwise(10.0, 0.1, 0.5, 0.01), rel=0.03)
    periodic = theory.mean_time_from_samples(free.times, period=80)
    assert periodic == pytest.approx(theory.mean_time_periodic(10.0, 0.1, 0.5, 80) + 0.5, rel=0.03)
    assert theory.mean_time_from_samples(free.times) == pytest.approx(free.times.mean(), rel=1e-12)


def test_censored_times_foretell_the_same():
    rng = np.random.default_rng(0)
    times = rng.geometric(0.05, size=200_000)
    ends = rng.geometric(0.03, size=200_000)
    observed, censored = np.minimum(times, ends), ends < times
    # A constant hazard: no protocol changes the mean of 20 steps.
    for protocol in ({"probability": 0.2}, {"period": 7}, {"probability": 1.0}):
        assert theory.mean_time_from_samples(observed, censored=censored, **protocol) == pytest.approx(20, rel=0.03)
    naive = theory.mean_time_from_samples(observed[~censored], period=7)
    assert naive < 15  # leaving the censored out would flatter


def test_small_samples_by_hand():
    assert theory.survival_of_times([1, 2, 2, 4], [False, False, True, False]) == pytest.approx(
        [1, 0.75, 0.5, 0.5, 0.0]
    )
    # Half arrive in the first step, half never: a reset each step makes the time geometric with 1/2.
    times, censored = [1, 1, 9, 9], [False, False, True, True]
    assert theory.mean_time_from_samples(times, censored=censored, period=1) == 2.0
    assert theory.mean_time_from_samples(times, censored=censored, probability=1.0) == 2.0
    assert theory.mean_time_from_samples(times, censored=censored) == math.inf
    # p = 1/2: E[min(T, R)] / P(T <= R), R geometric: P(T <= R) = 1/2, E = 1/2·1 + 1/2·2.
    assert theory.mean_time_from_samples(times, censored=censored, probability=0.5) == pytest.approx(3.0)
    assert theory.mean_time_from_samples([9, 9], censored=[True, True], period=3) == math.inf


@pytest.mark.parametrize(
    ("times", "censored", "message"),
    [
        ([], None, "`times` must be a list of at least one time"),
        ([1, 0], None, "`times` must be whole numbers"),
        ([1.5], None, "`times` must be whole numbers"),
        ([1, 2], [True], "`censored` must have one flag a time"),
    ],
)
def test_bad_times(times, censored, message):
    with pytest.raises(DataError, match=message):
        theory.mean_time_from_samples(times, censored=censored)


def test_one_protocol_at_a_time():
    with pytest.raises(ConfigError, match="`probability` or `period`, not both"):
        theory.mean_time_from_samples([1], probability=0.1, period=3)
    with pytest.raises(ConfigError, match="`period` must be a whole number of at least 1, got 0"):
        theory.mean_time_from_samples([1], period=0)


# ------------------------------------------------------------------------------------------------------- optimizers


def walked(step, steps=4000, walkers=4000, seed=0):
    """Displacements of many runs of an optimizer on a gradient of mean 0.3 and variance 4/8."""
    rng = np.random.default_rng(seed)
    position, state = np.zeros(walkers), None
    for _ in range(steps):
        update, state = step(0.3 + rng.normal(scale=math.sqrt(4 / 8), size=walkers), state)
        position -= update
    return position


def assert_walks_like(expected, displacement, steps, slack=0.0):
    drift, diffusion = expected.along([1.0])
    n = len(displacement)
    mean_error = displacement.std() / math.sqrt(n)
    assert abs(displacement.mean() - drift * steps) < 3 * mean_error + slack * abs(drift * steps)
    variance = displacement.var()
    assert abs(variance / (2 * diffusion * steps) - 1) < 3 * math.sqrt(2 / n) + slack


def test_sgd_and_momentum_walk_as_said():
    assert_walks_like(langevin.sgd(0.3, 4.0, 0.1, 8), walked(lambda g, _: (0.1 * g, None)), 4000)

    def heavy_ball(gradient, buffer):
        buffer = 0.9 * (0.0 if buffer is None else buffer) + 0.5 * gradient
        return 0.1 * buffer, buffer

    # The start of the buffer costs 1/(1 − μ) = 10 of 4 000 steps.
    expected = langevin.momentum(0.3, 4.0, 0.1, 8, momentum=0.9, dampening=0.5)
    assert_walks_like(expected, walked(heavy_ball), 4000, slack=0.005)
    ten_times = langevin.sgd(0.3, 4.0, 1.0, 8)
    plain = langevin.momentum(0.3, 4.0, 0.1, 8)
    assert plain.along([1.0]) == pytest.approx(ten_times.along([1.0]))


def test_adam_walks_as_said():
    def adam(gradient, state):
        first, second, count = state or (0.0, 0.0, 0)
        count += 1
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        corrected = math.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        return 0.1 * corrected * first / (np.sqrt(second) + 1e-8), (first, second, count)

    # The second moment's own noise is left out of the theory: a few parts in a hundred at 1/(1 − β₂) = 1 000 steps.
    assert_walks_like(langevin.adaptive(0.3, 4.0, 0.1, 8), walked(adam, walkers=2000), 4000, slack=0.06)


def test_adaptive_limits():
    noisy = langevin.adaptive(1e-6, 4.0, 0.1, 16)
    assert noisy.drift == pytest.approx([-0.1 * 1e-6 * 4 / 2])
    assert noisy.diffusion == pytest.approx([0.1**2 / 2])
    assert langevin.adaptive(-5.0, 1e-12, 0.1, 1).drift == pytest.approx([0.1])
    assert langevin.adaptive(0.0, 0.0, 0.1, 1, epsilon=0.0).drift == [0.0]


def test_along_a_direction():
    dynamics = langevin.sgd([1.0, -2.0], [4.0, 8.0], 0.5, 2)
    assert dynamics.along([0.0, 3.0]) == pytest.approx((1.0, 0.25 * 8 / 4))
    assert dynamics.along([1.0, 1.0]) == pytest.approx((0.5 / math.sqrt(2), 0.25 * 6 / 4))
    with pytest.raises(DataError, match="`direction` must be a finite vector other than 0"):
        dynamics.along([0.0, 0.0])


def test_decompose_in_a_frame_that_is_not_orthogonal():
    correct, wrong = np.array([2.0, 0.0, 0.0]), np.array([-1.0, 1.0, 0.0])
    gradient = 3 * np.array([1.0, 0, 0]) + 2 * wrong / math.sqrt(2) + np.array([0, 0, 0.5])
    parts = langevin.decompose(gradient, correct, wrong)
    assert (parts.correct, parts.wrong, parts.residual) == pytest.approx((3, 2, 0.5))
    assert parts.cosine == pytest.approx(-1 / math.sqrt(2))
    # Wrong labels at an obtuse angle take from the drift towards the target.
    assert parts.towards_correct == pytest.approx(gradient[0])
    assert parts.across == pytest.approx(gradient[1])
    with pytest.raises(DataError, match="parallel"):
        langevin.decompose(gradient, correct, -3 * correct)
    with pytest.raises(DataError, match="`wrong` must be a finite vector"):
        langevin.decompose(gradient, correct, [1.0, 2.0])


def test_a_drift_that_changes_on_the_way():
    # A linear model: the drift falls to nothing at the target, which only noise reaches; resets then help.
    def pull(x):
        return 0.02 * (10 - x)

    free, free_error = langevin.simulate(11.0, pull, 0.05, walkers=500, seed=5, max_time=1e6).mean()
    constant, _ = langevin.simulate(11.0, 0.2, 0.05, walkers=500, seed=5).mean()
    assert free - 3 * free_error > constant


def test_walkers_that_do_not_arrive_are_censored():
    walks = langevin.simulate(100.0, -1.0, 0.1, walkers=5, max_time=10)
    assert walks.censored.all()
    assert walks.times.tolist() == [10.0] * 5
    with pytest.raises(DataError, match="5 of 5 walkers did not arrive: raise `max_time`"):
        walks.mean()
