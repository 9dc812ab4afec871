"""The loop over arms and seeds, and what a run saves."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file
from tiny import equal, reset_run

from hf_reset import ResetConfig
from hf_reset.report.results import Results
from hf_reset.study.arms import PLAIN, RESET
from hf_reset.study.runs import run_arms, save_final_model
from hf_reset.training.best_weights import BestWeightsCallback


def test_runs_that_have_a_record_are_skipped(tmp_path):
    results = Results(tmp_path, recipe="r", configuration={}, environment={})
    results.add({"arm": "plain", "seed": 0, "x": 1})
    ran, said = [], []

    def run_one(arm, seed):
        ran.append((arm, seed))
        return {"x": 2}

    run_arms(results, [(PLAIN, 0), (RESET, 0)], run_one, say=said.append)
    assert ran == [(RESET, 0)]
    assert [r["x"] for r in results.records] == [1, 2]
    assert "skipped" in said[0]


@pytest.mark.parametrize("finish", ["anchor", "last"])
def test_the_saved_model_of_a_partial_scope_is_weights_that_were_evaluated(tmp_path, finish):
    """Whether the run kept what lay beside the anchor, or ended with its last weights, as those of a study do."""
    best = BestWeightsCallback(ResetConfig())
    options = {"reset_probability": 0.4, "reset_patience": 0, "reset_scope": "head", "learning_rate": 2e-2}
    trainer, recorder = reset_run(tmp_path, callbacks=[best], reset_finish=finish, **options)
    step = trainer.reset_callback.reset_state.anchor_step
    assert step < 15
    save_final_model(trainer, "anchor", best, str(tmp_path / "model"))
    evaluated = recorder.evaluated[step][1]
    assert equal(load_file(tmp_path / "model" / "model.safetensors"), evaluated)
    assert not equal(recorder.after_step[15], evaluated)


def test_a_run_that_never_began_to_reset_saves_the_weights_that_training_would_end_with(tmp_path):
    """On evidence, and without any: a few rows cannot tell the anchor from the last weights, which then stay."""
    best = BestWeightsCallback(ResetConfig())
    trainer, recorder = reset_run(
        tmp_path, callbacks=[best], reset_finish="last", reset_probability=0.4, learning_rate=2e-2
    )
    callback = trainer.reset_callback
    assert callback.reset_state.anchor_step < 15
    callback.reset_state = replace(callback.reset_state, armed_step=None, learned=0.0, worse=None)
    assert not callback.reset_state.armed
    save_final_model(trainer, "anchor", best, str(tmp_path / "model"))
    assert equal(load_file(tmp_path / "model" / "model.safetensors"), recorder.after_step[15])
