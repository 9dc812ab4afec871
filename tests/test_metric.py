"""Which metric, in which direction, and what is asked where that is not clear."""

import numpy as np
import pytest
from tiny import arguments

from hf_reset import ResetConfig
from hf_reset.errors import MetricError
from hf_reset.training.metric import MetricWatch


def watch(tmp_path, config, args=None, **more):
    return MetricWatch.of(ResetConfig(**config), arguments(tmp_path, **(args or {})), **more)


@pytest.mark.parametrize(
    ("config", "args", "greater"),
    [
        ({"metric": "error_rate"}, {}, False),
        ({"metric": "eval_news_wer"}, {}, False),
        ({"metric": "error_rate", "greater_is_better": True}, {}, True),
        ({"metric": "quality", "greater_is_better": False}, {}, False),
        ({}, {"metric_for_best_model": "quality"}, True),  # Trainer says it
        ({}, {"metric_for_best_model": "quality", "greater_is_better": False}, False),
        ({}, {"metric_for_best_model": "error_rate", "greater_is_better": False}, False),
        ({"greater_is_better": False}, {"metric_for_best_model": "error_rate"}, False),
    ],
)
def test_a_direction_that_is_known(tmp_path, config, args, greater):
    assert watch(tmp_path, config, args).greater_is_better is greater


def test_a_direction_that_nobody_says_is_asked_for(tmp_path):
    with pytest.raises(MetricError, match=r"`metric` 'eval_quality' does not tell .* Set `greater_is_better`"):
        watch(tmp_path, {"metric": "quality"})
    assert watch(tmp_path, {"metric": "quality"}, strict=False).greater_is_better


def test_trainers_default_against_the_name_is_asked_about(tmp_path):
    """Trainer takes more errors for better there, and would load the worst checkpoint as its best."""
    with pytest.raises(MetricError, match=r"'eval_error_rate' .* lower is better, and Trainer takes greater"):
        watch(tmp_path, {}, {"metric_for_best_model": "error_rate"})


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.int64(3), np.array(0.25)])
def test_any_number_is_one(tmp_path, value):
    assert watch(tmp_path, {}).value_in({"eval_loss": value}) == float(value)
