"""The best evaluated weights are kept, apart from the anchor, and without touching the training."""

import pytest
from tiny import equal, reset_run, weights

from hf_reset import ResetConfig
from hf_reset.errors import MetricError
from hf_reset.training.best_weights import BestWeightsCallback

# Best after 6 of 15 steps; two resets after that.
RESETS = {"reset_probability": 0.3, "reset_finish": "last", "learning_rate": 2e-2}


@pytest.mark.parametrize("scope", ["all", "head"])
@pytest.mark.parametrize("storage", ["cpu", "device"])
def test_all_weights_of_the_best_evaluation_whatever_the_scope(tmp_path, scope, storage):
    best = BestWeightsCallback(ResetConfig(scope=scope), storage=storage)
    trainer, recorder = reset_run(tmp_path, callbacks=[best], reset_scope=scope, **RESETS)
    losses = {step: loss for step, (loss, _) in recorder.evaluated.items()}
    assert best.best == min(losses.values()) == losses[best.step]
    last = weights(trainer.model)
    with best.swapped():
        assert equal(weights(trainer.model), recorder.evaluated[best.step][1])
    assert equal(weights(trainer.model), last)
    assert not equal(last, recorder.evaluated[best.step][1])


def test_the_training_is_untouched(tmp_path):
    alone, _ = reset_run(tmp_path / "alone", **RESETS)
    watched, _ = reset_run(tmp_path / "watched", callbacks=[BestWeightsCallback(ResetConfig())], **RESETS)
    assert equal(weights(alone.model), weights(watched.model))


def test_evaluations_after_training_are_not_taken_in(tmp_path):
    best = BestWeightsCallback(ResetConfig(greater_is_better=True))
    trainer, _ = reset_run(tmp_path, callbacks=[best], **RESETS)
    before, best.best = best.step, 0.0  # now any loss would be a new best
    trainer.state.global_step = 99
    trainer.evaluate()
    assert best.step == before


def test_a_resumed_run_knows_the_best_of_before(tmp_path):
    path = tmp_path / "best.safetensors"
    saving = {"save_strategy": "steps", "save_steps": 3, **RESETS}
    reset_run(tmp_path, callbacks=[BestWeightsCallback(ResetConfig(), path=path)], **saving)
    whole = BestWeightsCallback(ResetConfig(), path=path)
    trainer, recorder = reset_run(tmp_path, callbacks=[whole], resume=str(tmp_path / "checkpoint-12"), **saving)
    assert whole.step is not None
    assert whole.step < 12, "the best came before the checkpoint"
    assert set(recorder.evaluated) == {15}
    with whole.swapped():
        loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(whole.best)


@pytest.mark.parametrize("resume", [None, "checkpoint-6", "checkpoint-9"])
def test_smooth_weights_are_the_anchor_of_a_run_that_smooths(tmp_path, resume):
    """Through resets, and after a resume between them: the way that counts is the one that weights have come."""
    options = {"reset_probability": 0.4, "reset_patience": 0, "reset_smooth": True, "reset_finish": "last"}
    options |= {"learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 3}

    def train(checkpoint):
        best = BestWeightsCallback(ResetConfig(smooth=True), path=tmp_path / "best.safetensors")
        return best, *reset_run(tmp_path, callbacks=[best], resume=checkpoint, **options)

    best, trainer, _ = train(None)
    events = trainer.reset_callback.events
    assert [event["kind"] for event in events].count("reset") > 1
    if resume is not None:
        best, trainer, _ = train(str(tmp_path / resume))
        assert trainer.reset_callback.events == events
    state = trainer.reset_callback.reset_state
    assert (best.best, best.step) == (state.best, state.anchor_step)
    logged = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert state.best > min(logged)
    with best.swapped():
        found = weights(trainer.model)
    with trainer.reset_callback.store.swapped():
        assert equal(weights(trainer.model), found)


def test_no_evaluation_no_best():
    with (
        pytest.raises(MetricError, match="No evaluation gave a finite metric"),
        BestWeightsCallback(ResetConfig()).swapped(),
    ):
        pass
