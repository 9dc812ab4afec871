"""What a run says of its resets, from values to words."""

import re

import pytest
from tiny import callback, plain_run

from hf_reset import ResetConfig
from hf_reset.policy import ResetState
from hf_reset.training import narration
from hf_reset.training.metric import MetricWatch

LOSS, F1 = MetricWatch("eval_loss", False), MetricWatch("eval_f1", True)
MOVES = [{"kind": "anchor", "step": 20, "metric": 0.6}, {"kind": "anchor", "step": 60, "metric": 0.5}]


@pytest.mark.parametrize(
    ("patience", "state", "why"),
    [
        (0, {}, "`patience` is 0"),
        (2, {"evaluations_since_best": 2}, "2 evaluations brought no better eval_loss"),
        (None, {"worse": 2.34}, "validation lies 2.3 standard errors above the anchor's"),
    ],
)
def test_the_beginning(patience, state, why):
    now = ResetState(anchor_step=20, anchor_metric=0.6, armed_step=40, **state)
    said = narration.beginning(ResetConfig(patience=patience), now, LOSS)
    assert said == f"Resets begin after step 40: {why}. The anchor lies at step 20 (eval_loss 0.6)."


def test_the_gain_is_since_resets_began_in_the_metrics_direction():
    state = ResetState(best=0.5, anchor_step=60, anchor_metric=0.5, armed_step=40)
    assert narration.gain(state, LOSS, MOVES) == pytest.approx(0.1)
    assert narration.gain(state, F1, MOVES) == pytest.approx(-0.1)
    assert narration.gain(ResetState(best=0.5), LOSS, MOVES) is None


@pytest.mark.parametrize(
    ("config", "state", "why"),
    [
        ({"max_resets": 0}, {}, "`max_resets` is 0"),
        ({"probability": 0}, {}, "`probability` is 0"),
        ({}, {}, "validation never turned by 2 standard errors"),
        ({}, {"values": (1.0,) * 60}, r"validation never turned by 2\.8 standard errors"),
        ({}, {"armed_step": 90, "waiting": True}, "at step 90 a better anchor was found, and no evaluation since was"),
        ({"patience": 3}, {"evaluations_since_best": 1}, "only 1 evaluation had passed .* of a `patience` of 3"),
        ({"patience": 3}, {"armed_step": 90}, "with r = 0.01 none of the 10 steps after step 90 drew one"),
        ({"policy": "periodic", "patience": 3}, {"armed_step": 90}, "a period of 100 did not end in 10 steps"),
    ],
)
def test_why_no_reset_happened(config, state, why):
    now = ResetState(anchor_step=20, anchor_metric=0.6, **state)
    said = narration.ending(ResetConfig(**config), now, LOSS, MOVES, 100, narration.WITH_LAST)
    assert said.startswith("No reset happened, because ")
    assert re.search(why, said)


def test_a_run_says_it_twice_and_no_more(tmp_path, caplog):
    reset = callback()
    plain_run(tmp_path, callback=reset)
    said = [record.getMessage() for record in caplog.records if record.name == "transformers.hf_reset"]
    assert len(said) == 2
    assert "Resets begin after step 3: `patience` is 0. The anchor lies at step 3" in said[0]
    assert f"{reset.reset_state.resets} resets in 15 steps. The anchor lies at step" in said[1]
    assert said[1].endswith("The model ends with the anchor's weights.")


def test_a_run_without_anything_to_reset_says_nothing(tmp_path, caplog):
    plain_run(tmp_path, callback=callback(probability=0, finish="last"))
    assert not [record for record in caplog.records if record.name == "transformers.hf_reset"]
