"""Decisions are values: tested without a model."""

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from hf_reset import ResetConfig, policy
from hf_reset.errors import ConfigError
from hf_reset.policy import ResetState, decide, observe


def run(config, metrics, every=3, steps=30, greater=False, seed=0):
    """Evaluate every `every` steps and decide at each; returns the steps of anchors and of resets."""
    state, anchors, resets = ResetState(), [], []
    for step in range(steps):
        if decide(config, state, step, seed=seed):
            state = state.after_reset(step)
            resets.append(step)
        if (step + 1) % every == 0 and metrics:
            state, moved = observe(config, state, metrics.pop(0), step + 1, greater_is_better=greater)
            if moved:
                anchors.append(step + 1)
    return anchors, resets, state


def test_config_is_frozen_and_json_plain():
    config = ResetConfig(scope=("a", "b"), max_resets=3)
    assert ResetConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.probability = 0.5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("probability", 1.5, r"`probability` must be in \[0, 1\], got 1.5"),
        ("probability", -0.1, r"`probability` must be in \[0, 1\], got -0.1"),
        ("probability", math.nan, r"`probability` must be in \[0, 1\], got nan"),
        ("probability", "often", r"`probability` must be in \[0, 1\], got 'often'"),
        ("probability", "Auto", r"`probability` must be in \[0, 1\], got 'Auto'.*\"auto\" chooses it during the run"),
        ("policy", "sometimes", "`policy` must be one of 'bernoulli', 'periodic', 'luby', got 'sometimes'"),
        ("anchor", "worst", "`anchor` must be one of 'best', 'fixed'"),
        ("optimizer_state", "drop", "`optimizer_state` must be one of 'restore', 'zero', 'keep'"),
        ("storage", "disk", "`storage` must be one of 'device', 'cpu'"),
        ("finish", "best", "`finish` must be one of 'anchor', 'last'"),
        ("patience", -1, "`patience` must be an integer of at least 0, got -1"),
        ("patience", "long", "`patience` must be an integer of at least 0, got 'long'"),
        ("max_resets", 1.5, "`max_resets` must be an integer of at least 0, got 1.5"),
        ("seed", "x", "`seed` must be an integer, got 'x'"),
        ("min_delta", -1.0, "`min_delta` must be a finite number of at least 0, got -1.0"),
        ("min_delta", math.inf, "`min_delta` must be a finite number"),
        ("metric", "", "`metric` must be the name of an evaluation result or None"),
        ("smooth", 2, "`smooth` must be True or False, got 2"),
        ("greater_is_better", "yes", "`greater_is_better` must be True, False or None, got 'yes'"),
        ("scope", "last:0", '`scope` "last:K" needs a whole K of at least 1'),
        ("scope", "last:x", '`scope` "last:K" needs a whole K of at least 1'),
        ("scope", "(", "is not a valid regular expression"),
        ("scope", [], '`scope` must be "all", "head"'),
        ("scope", [1], '`scope` must be "all", "head"'),
        ("scope", "", '`scope` must be "all", "head"'),
    ],
)
def test_config_names_argument_value_and_remedy(field, value, message):
    with pytest.raises(ConfigError, match=message):
        ResetConfig(**{field: value})


def test_uniform_is_a_pure_function_that_moves_no_generator():
    before = random.getstate(), np.random.get_state()[1].tolist()
    assert policy.uniform(3, 5) == policy.uniform(3, 5)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert policy.uniform(3, 5) != policy.uniform(3, 6) != policy.uniform(4, 5)


def test_uniform_is_uniform_within_four_standard_errors():
    n = 50_000
    draws = np.array([policy.uniform(1, step) for step in range(n)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / n)
    assert abs((draws < 0.01).mean() - 0.01) < 4 * math.sqrt(0.01 * 0.99 / n)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / math.sqrt(n)


def test_bernoulli_decides_by_the_draw_alone():
    config = ResetConfig(probability=0.3, patience=0)
    anchors, resets, _ = run(config, [1.0], every=1, steps=200, seed=9)
    assert anchors == [1]
    assert resets == [step for step in range(1, 200) if policy.uniform(9, step) < 0.3]


def test_probability_zero_never_and_one_always():
    assert run(ResetConfig(probability=0, patience=0), [1.0])[1] == []
    assert run(ResetConfig(probability=1, patience=0), [1.0])[1] == list(range(3, 30))


@pytest.mark.parametrize(("probability", "gap"), [(0.25, 4), (0.3, 3), (1.0, 1)])
def test_periodic_gaps(probability, gap):
    _, resets, _ = run(ResetConfig(probability=probability, policy="periodic", patience=0), [1.0])
    assert resets[0] == 3 + gap - 1  # the first excursion is as long as the others
    assert {b - a for a, b in itertools.pairwise(resets)} <= {gap}
    assert len(resets) > 5


def test_luby_excursions():
    config = ResetConfig(probability=0.3, policy="luby", patience=0)
    _, resets, _ = run(config, [1.0], steps=48)
    assert resets[0] == 3 + 3 - 1  # evaluated after 3 steps; one unit of round(1/0.3) steps
    assert [b - a for a, b in itertools.pairwise(resets)] == [3 * n for n in (1, 2, 1, 1, 2, 4, 1, 1)]
    with pytest.raises(ConfigError, match=r'"luby" needs no estimate, so `probability` "auto" would have no effect'):
        ResetConfig(probability="auto", policy="luby")
    assert run(ResetConfig(probability=0, policy="luby", patience=0), [1.0])[1] == []


def auto_run(metrics, seed=0, every=10, config=None):
    """The probabilities in force after each evaluation, the resets, and the last state."""
    config, state, chosen, resets = config or ResetConfig(probability="auto", patience=0), ResetState(), [], []
    for step in range(every * len(metrics)):
        if decide(config, state, step, seed=seed):
            state = state.after_reset(step)
            resets.append(step)
        if (step + 1) % every == 0:
            metric = metrics[(step + 1) // every - 1]
            state, _ = observe(config, state, metric, step + 1, greater_is_better=False)
            chosen.append(policy.probability_now(config, state))
    return chosen, resets, state


def test_auto_keeps_the_prior_until_it_knows_better():
    chosen, resets, state = auto_run([1.0] * 200)
    assert set(chosen) == {0.05}  # half a reset in the ten steps between two evaluations
    assert resets == [step for step in range(10, 2000) if policy.uniform(0, step) < 0.05]
    assert state.plan.counts.excursions > 8


def test_auto_goes_down_while_every_evaluation_is_a_new_best():
    chosen, _, _ = auto_run([1.0 - 0.001 * k for k in range(200)])
    assert chosen[0] == 0.05
    assert chosen[-1] == pytest.approx(0.1 / 32)
    assert chosen == sorted(chosen, reverse=True)


def test_auto_is_a_pure_function_and_its_state_is_plain():
    metrics = [2 - math.sqrt(k) * 0.1 + 0.3 * policy.uniform(1, k) for k in range(120)]
    assert auto_run(metrics) == auto_run(metrics)
    state = auto_run(metrics)[2]
    assert ResetState.from_plain(json.loads(json.dumps(dataclasses.asdict(state)))) == state
    assert ResetState.from_plain(dataclasses.asdict(ResetState(resets=3))) == ResetState(resets=3)


def test_auto_with_a_period():
    config = ResetConfig(probability="auto", policy="periodic", patience=0)
    _, resets, _ = auto_run([1.0] * 20, config=config)
    assert {b - a for a, b in itertools.pairwise(resets)} == {20}  # two evaluations: the prior's
    with pytest.raises(ConfigError, match='`period` is not known for `probability` "auto"'):
        _ = config.period


def test_patience_counts_evaluations_without_a_new_best_and_resets_stay_on():
    config = ResetConfig(probability=1, patience=2)
    anchors, resets, state = run(config, [3.0, 2.0, 2.5, 1.5, 1.6, 1.7, 1.0, 1.1])
    assert anchors == [3, 6, 12, 21]
    assert state.armed_step == 18  # two evaluations after the best of step 12
    assert resets == list(range(18, 30))  # still on after the new best of step 21


def test_patience_zero_begins_with_the_first_anchor():
    assert run(ResetConfig(probability=1, patience=0), [1.0])[1][0] == 3


def test_fixed_anchor_stays_once_resets_have_begun():
    config = ResetConfig(probability=1, patience=1, anchor="fixed")
    anchors, _, state = run(config, [3.0, 2.0, 2.5, 1.0])
    assert anchors == [3, 6]
    assert (state.anchor_step, state.anchor_metric, state.best) == (6, 2.0, 1.0)


def test_min_delta_is_a_strict_margin_in_both_directions():
    assert run(ResetConfig(min_delta=0.5), [2.0, 1.6, 1.5, 1.4])[0] == [3, 12]
    assert run(ResetConfig(min_delta=0.5), [1.0, 1.4, 1.5, 1.6], greater=True)[0] == [3, 12]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_never_a_best(bad):
    config = ResetConfig(probability=1, patience=2)
    anchors, resets, _ = run(config, [bad, bad, bad])
    assert anchors == []
    assert resets == []
    anchors, resets, _ = run(config, [1.0, bad, bad])
    assert anchors == [3]
    assert resets[0] == 9  # but it does count as an evaluation without a new best


def test_max_resets():
    assert run(ResetConfig(probability=1, patience=0, max_resets=4), [1.0])[1] == [3, 4, 5, 6]
    assert run(ResetConfig(probability=1, patience=0, max_resets=0), [1.0])[1] == []


def test_what_needs_an_anchor():
    assert not ResetConfig(probability=0, finish="last").needs_anchor
    assert not ResetConfig(max_resets=0, finish="last").needs_anchor
    assert ResetConfig(probability=0).needs_anchor
    assert ResetConfig(finish="last").needs_anchor


def test_floor_zero_needs_no_torch():
    code = (
        "import sys\nimport hf_reset, hf_reset.policy, hf_reset.noise, hf_reset.corpora, hf_reset.cli\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------- resets that begin on evidence


def watched(margins, config=None, learned=9.0):
    """The state after a first best and then one evaluation, with no new best, for each margin."""
    state, _ = observe(config or ResetConfig(), ResetState(), 1.0, 10, greater_is_better=False)
    for number, worse in enumerate(margins):
        step = 20 + 10 * number
        state, _ = observe(
            config or ResetConfig(), state, 1.5, step, greater_is_better=False, worse=worse, learned=learned
        )
    return state


def test_resets_begin_once_two_evaluations_say_that_validation_has_turned():
    assert watched([2.5]).armed_step is None  # one evaluation alone is a fluctuation
    assert watched([2.5, 1.9]).armed_step is None
    assert watched([0.0, 2.0]).armed_step == 30
    assert watched([0.0, 2.0]).armed_margin == 2.0
    assert watched([0.0, 2.0, 5.0]).armed_margin == 2.0  # that of the evaluation on which they began
    assert watched([0.0, 2.0, -1.0]).armed_step == 30  # and stay on


def test_resets_wait_until_harm_is_seen_from_a_better_anchor_too():
    state = watched([2.0, 2.0])
    config = ResetConfig(probability=1.0)
    assert decide(config, state, 31, seed=0)
    state, moved = observe(config, state, 0.5, 40, greater_is_better=False)
    assert moved
    assert (state.waiting, state.armed_step) == (True, 30)
    assert not decide(config, state, 41, seed=0)
    for step, worse in ((50, 0.9), (60, None), (70, 1.0)):
        assert state.waiting
        assert not decide(config, state, step - 1, seed=0)
        state, _ = observe(config, state, 1.5, step, greater_is_better=False, worse=worse)
    assert not state.waiting
    assert decide(config, state, 71, seed=0)


def test_with_patience_a_better_anchor_is_waited_for_no_longer():
    config = ResetConfig(probability=1.0, patience=1)
    state = watched([None], config)
    state, moved = observe(config, state, 0.5, 30, greater_is_better=False)
    assert moved
    assert decide(config, state, 31, seed=0)


def test_a_fixed_anchor_never_makes_resets_wait():
    config = ResetConfig(probability=1.0, anchor="fixed")
    state = watched([2.0, 2.0], config)
    state, moved = observe(config, state, 0.5, 40, greater_is_better=False)
    assert not moved
    assert decide(config, state, 41, seed=0)


def test_the_more_evaluations_the_more_it_takes():
    """The shares of runs with an alarm that `turned_at` states: tests that only fluctuate, two in a row averaged."""
    assert [policy.turned_at(n) for n in (0, 1, 10)] == [2.0] * 3
    assert policy.turned_at(60) == pytest.approx(math.sqrt(4 + 2 * math.log(6)))
    rng = np.random.default_rng(0)
    tests = rng.normal(size=(20_000, 61))
    averaged = (tests[:, 1:] + tests[:, :-1]) / math.sqrt(2)
    bars = np.array([policy.turned_at(n) for n in range(1, 61)])
    shares = [(averaged[:, :n] >= bar).any(axis=1).mean() for n, bar in ((10, bars[:10]), (60, bars), (60, 2.0))]
    assert shares == pytest.approx([0.18, 0.40, 0.69], abs=4 * math.sqrt(0.25 / 20_000) + 0.005)


def test_a_pause_is_a_turn_only_where_it_is_a_tenth_of_the_run():
    def paused(evaluations):
        state = ResetState(best=1.0, anchor_step=10, values=(1.0,) * 57, evaluations_since_best=evaluations - 1)
        state, _ = observe(ResetConfig(), state, 1.5, 580, greater_is_better=False, worse=4.0)
        return state.armed

    assert not paused(5)
    assert paused(6)  # of 58


def test_a_run_near_chance_is_not_armed():
    assert watched([3.0, 3.0], learned=1.9).armed_step is None
    assert watched([3.0, 3.0], learned=2.0).armed_step == 30
    assert watched([3.0, 3.0], learned=None).armed_step == 30  # not known


def test_patience_does_not_ask_for_evidence():
    assert watched([None, None], ResetConfig(patience=2)).armed_step == 30
    assert watched([3.0, 3.0], ResetConfig(patience=2)).armed_margin is None  # patience asked for no evidence


@pytest.mark.parametrize(
    ("fields", "config", "expected"),
    [
        ({"worse": 0.9, "learned": 9.0}, {}, False),  # the last weights are as good, as far as can be told
        ({"worse": 1.0, "learned": 9.0}, {}, True),
        ({"worse": 5.0, "learned": 1.9}, {}, False),  # the anchor knows no more than the labels' frequencies
        ({"worse": None, "learned": 9.0}, {}, True),  # the last evaluation was the best
        ({"worse": None, "learned": None}, {}, True),  # no rows: as the user said
        ({"worse": 0.0, "learned": 9.0, "armed_step": 5}, {}, True),  # validation did turn
        ({"worse": 0.0, "learned": 9.0}, {"patience": 2}, True),
        ({"worse": 0.0, "learned": 9.0}, {"max_resets": 0}, True),  # the best weights are what was asked for
        ({"worse": 5.0, "learned": 9.0}, {"finish": "last"}, False),
    ],
)
def test_a_run_that_validation_cannot_judge_ends_with_its_last_weights(fields, config, expected):
    assert policy.finishes_with_anchor(ResetConfig(**config), ResetState(anchor_step=1, **fields)) is expected


def excursions(harmed):
    """The stretch after each excursion: seen to go wrong or not."""
    state, stretches = ResetState(anchor_step=1), []
    for step, went_wrong in enumerate(harmed):
        state = dataclasses.replace(state, harmed=went_wrong).after_reset(step)
        stretches.append(state.stretch)
    return stretches


def test_excursions_that_end_unharmed_double():
    assert excursions([False] * 6) == [0, 1, 1, 2, 2, 3]
    assert excursions([False] * 4 + [True, False, True]) == [0, 1, 1, 2, 1, 1, 0]


def test_a_new_anchor_brings_excursions_back_to_their_length():
    state = dataclasses.replace(watched([2.0, 2.0]), stretch=3, fruitless=1)
    state, moved = observe(ResetConfig(), state, 0.5, 90, greater_is_better=False)
    assert moved
    assert (state.stretch, state.fruitless, state.harmed) == (0, 0, False)


def test_harm_is_one_standard_error_and_is_remembered_until_the_reset():
    state = watched([0.9])
    assert not state.harmed
    state = watched([1.0, -2.0])
    assert state.harmed
    assert not state.after_reset(40).harmed


@pytest.mark.parametrize("name", ["bernoulli", "periodic"])
def test_stretched_excursions_are_rarer_by_their_factor(name):
    config = ResetConfig(probability=0.1, policy=name)
    state = ResetState(anchor_step=1, armed_step=0, stretch=2)
    resets, steps = 0, 20_000
    for step in range(steps):
        if decide(config, state, step, seed=0):
            resets += 1
            state = dataclasses.replace(state, last_reset_step=step)
    expected = steps * 0.1 / 4
    assert abs(resets - expected) < 4 * math.sqrt(expected)
    impatient = dataclasses.replace(config, patience=0)
    assert sum(decide(impatient, state, step, seed=0) for step in range(steps, steps + 400)) > 2 * 400 * 0.1 / 4


def alarms(correlation, runs=200, evaluations=60):
    """Share of runs that only fluctuate in which the sequence of values ever says that validation has turned."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(runs):
        values = list(rng.normal(size=evaluations))
        for i in range(1, evaluations):
            values[i] += correlation * values[i - 1]
        margins = (policy.sequence_margin(values[:n], greater_is_better=False) for n in range(8, evaluations + 1))
        found += any(margin >= policy.TURNED for margin in margins)
    return found / runs


def test_a_sequence_without_rows_seldom_takes_a_fluctuation_for_a_turn():
    assert alarms(0.0) < 0.10 + 4 * math.sqrt(0.10 * 0.90 / 200)
    assert alarms(0.5) < 0.19 + 4 * math.sqrt(0.19 * 0.81 / 200)


def test_a_steep_and_steady_rise_is_not_taken_for_noise():
    """As a language model's validation on few rows: the best at once, then ten rises, each far above the noise."""
    rng = np.random.default_rng(0)
    for steepness in (3, 10, 100):
        rises = 2.4 + 0.01 * steepness * np.arange(10) + rng.normal(0, 0.01, 10)
        assert policy.sequence_margin(rises, greater_is_better=False) > policy.TURNED


def test_a_sequence_without_rows_sees_a_turn():
    turned = np.abs(np.arange(40) - 10.0) / 2 + np.random.default_rng(0).normal(0, 0.3, 40)
    assert policy.sequence_margin(turned[:30], greater_is_better=False) > policy.TURNED
    assert policy.sequence_margin(-turned[:30], greater_is_better=True) > policy.TURNED
    assert policy.sequence_margin([math.nan, *turned[:30]], greater_is_better=False) > policy.TURNED
    assert policy.sequence_margin(range(7), greater_is_better=False) is None
    assert policy.sequence_margin([1.0] * 9, greater_is_better=False) is None


def test_the_state_survives_json():
    state = watched([1.0, 2.5])
    assert ResetState(**json.loads(json.dumps(dataclasses.asdict(state)))) == state


def test_numbers_of_numpy_are_numbers():
    config = ResetConfig(
        probability=np.float32(0.25), patience=np.int64(2), min_delta=np.float64(0.5), greater_is_better=np.bool_(True)
    )
    assert config == ResetConfig(probability=0.25, patience=2, min_delta=0.5, greater_is_better=True)
    assert all(type(value).__module__ == "builtins" for value in (config.probability, config.patience))


SMOOTH = ResetConfig(probability=1.0, smooth=True, patience=None)


def test_smooth_judges_by_the_mean_with_the_evaluation_before():
    """By hand: 4, then means 3, 2.5, 3, 2.25 and 2.5; unsmoothed, the dip at the second would stay until the fifth."""
    anchors, _, state = run(ResetConfig(smooth=True), [4.0, 2.0, 3.0, 3.0, 1.5, 3.5], every=1, steps=6)
    assert anchors == [1, 2, 3, 5]
    assert (state.best, state.anchor_metric, state.anchor_before) == (2.25, 1.5, 3.0)


def test_the_way_after_a_reset_begins_at_the_anchor():
    state = ResetState()
    for step, value in [(10, 4.0), (20, 2.0), (30, 5.0)]:
        state, _ = observe(SMOOTH, state, value, step, greater_is_better=False)
    assert (state.anchor_step, state.best, state.anchor_metric, state.anchor_before) == (20, 3.0, 2.0, 4.0)
    state = state.after_reset(34)
    assert state.before(35) == 4.0, "the anchor, evaluated again at once, has come its own way"
    assert state.before(40) == 2.0, "what comes later has come from the anchor"
    same, moved = observe(SMOOTH, state, 2.0, 35, greater_is_better=False)
    assert not moved
    assert same.before(45) == 2.0
    later, moved = observe(SMOOTH, same, 3.9, 45, greater_is_better=False)
    assert moved
    assert later.best == (2.0 + 3.9) / 2


def test_a_diverged_evaluation_is_never_averaged_into_a_best():
    state = ResetState()
    for step, value in enumerate([3.0, math.nan, 1.0, 1.5]):
        state, moved = observe(SMOOTH, state, value, step + 1, greater_is_better=False)
        assert moved == (step in (0, 3))
    assert state.best == 1.25


def test_without_smooth_nothing_is_averaged():
    anchors, _, state = run(ResetConfig(), [4.0, 2.0, 3.0, 1.9], every=1, steps=4)
    assert anchors == [1, 2, 4]
    assert state.best == state.anchor_metric == 1.9
