"""Arms are values: what they override is what differs, and nothing else."""

from dataclasses import FrozenInstanceError

import pytest

from hf_reset import ResetTrainingArguments
from hf_reset.errors import ConfigError
from hf_reset.study.arms import PLAIN, REFINE, RESET, RESET_ALONE, Arm, arguments_of, planned_runs


def test_both_arms_share_each_seed():
    assert planned_runs([3, 5], compare=True, resets=True) == [
        *[(PLAIN, 3), (RESET, 3)],
        *[(PLAIN, 5), (RESET, 5)],
    ]
    assert planned_runs([0], compare=False, resets=True) == [(RESET, 0)]
    assert planned_runs([0], compare=False, resets=False) == [(PLAIN, 0)]


def test_a_study_that_refines_stands_beside_its_resets_alone_and_plain(tmp_path):
    runs = planned_runs([4], compare=True, resets=True, refines=True)
    assert runs == [(PLAIN, 4), (RESET_ALONE, 4), (REFINE, 4)]
    assert planned_runs([4], compare=False, resets=True, refines=True) == [(REFINE, 4)]
    study = ResetTrainingArguments(str(tmp_path), reset_refine="soft", use_cpu=True)
    asked = [arguments_of(study, arm, seed) for arm, seed in runs]
    assert [(args.reset_refine, args.reset_probability > 0) for args in asked] == [
        *[("off", False), ("off", True), ("soft", True)],
    ]
    assert [args.output_dir.split("/")[-1] for args in asked] == ["plain-seed4", "reset-seed4", "reset+refine-seed4"]


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_needed_and_differ(seeds):
    with pytest.raises(ConfigError, match="`seeds`"):
        planned_runs(seeds, compare=False, resets=True)


def test_comparing_needs_resets():
    with pytest.raises(ConfigError, match="`compare` with `reset_probability` 0"):
        planned_runs([0], compare=True, resets=False)


def test_a_run_differs_from_its_study_by_folder_seed_and_overrides(tmp_path):
    study = ResetTrainingArguments(str(tmp_path), reset_probability=0.3, learning_rate=1e-3, use_cpu=True)
    plain = arguments_of(study, PLAIN, 4)
    assert (plain.seed, plain.reset_probability, plain.learning_rate) == (4, 0.0, 1e-3)
    assert plain.output_dir == f"{tmp_path}/plain-seed4"
    assert arguments_of(study, RESET, 4).reset_probability == 0.3
    smoothed = arguments_of(study, Arm("smoothed", {"label_smoothing_factor": 0.1, "reset_scope": "head"}), 0)
    assert (smoothed.label_smoothing_factor, smoothed.reset_config().scope) == (0.1, "head")
    assert study.reset_probability == 0.3, "the study's own arguments stay"


def test_the_plain_arm_is_plain_whatever_the_study_asks_for(tmp_path):
    study = ResetTrainingArguments(str(tmp_path), reset_refine="soft", reset_ema_decay=0.9, use_cpu=True)
    plain, reset = (arguments_of(study, arm, 0) for arm in (PLAIN, RESET))
    assert (plain.reset_refine, plain.reset_ema_decay) == ("off", None)
    assert (reset.reset_refine, reset.reset_ema_decay) == ("soft", 0.9)


def test_an_arm_is_a_frozen_value():
    assert Arm("plain", {"reset_probability": 0.0, "reset_refine": "off", "reset_ema_decay": None}) == PLAIN
    assert len({PLAIN, RESET, Arm("reset")}) == 2
    with pytest.raises(FrozenInstanceError):
        PLAIN.name = "other"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"reset_probabilty": 0.1}, "the arm 'odd' overrides `reset_probabilty`, which is no training argument"),
        ({"reset_probability": 2.0}, r"`probability` must be in \[0, 1\]"),
    ],
)
def test_what_an_arm_cannot_override_is_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        arguments_of(ResetTrainingArguments(str(tmp_path), use_cpu=True), Arm("odd", overrides), 0)
