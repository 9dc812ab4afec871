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


def test_no_evaluation_no_best():
    with (
        pytest.raises(MetricError, match="No evaluation gave a finite metric"),
        BestWeightsCallback(ResetConfig()).swapped(),
    ):
        pass
