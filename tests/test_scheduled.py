"""Only the Trainer's own scheduled evaluations of its own data choose; a user's neither choose nor disturb."""

import pytest
from tiny import TRAIN, VALIDATION, Recorder, arguments, bert, callback, equal, rows, weights
from transformers import Trainer, TrainerCallback

from hf_reset import ResetConfig, ResetTrainer
from hf_reset.training.best_weights import BestWeightsCallback

# A test set on which every evaluation is far better than on validation: all rows alike.
TEST = rows(1, seed=9).select([0] * 16)


class Evaluates(TrainerCallback):
    """What people do: evaluate something else from a callback."""

    def __init__(self, event, **how):
        self.how, self.trainer, self.busy = how, None, False
        setattr(self, event, self._evaluate)

    def _evaluate(self, args, state, control, **kwargs):
        if self.trainer is not None and not self.busy and state.global_step:
            self.busy = True
            self.trainer.evaluate(**self.how)
            self.busy = False


def run(folder, extra=None, cls=Trainer, first=False, **how):
    reset, best, recorder = callback(), BestWeightsCallback(ResetConfig()), Recorder()
    callbacks = [best, reset, recorder]
    if extra is not None:
        callbacks.insert(0 if first else 3, extra)
    # No dropout and no more threads: evaluating more must not change the training either.
    trainer = cls(
        bert(dropout=0.0), arguments(folder), train_dataset=TRAIN, eval_dataset=VALIDATION, callbacks=callbacks, **how
    )
    if extra is not None:
        extra.trainer = trainer
    trainer.train()
    return reset, best, trainer


def trail(reset):
    """What happened; distances differ where ResetTrainer skips the update that a reset undoes."""
    return [(event["kind"], event["step"], event["metric"]) for event in reset.events]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("cls", [Trainer, ResetTrainer], ids=["callback", "trainer"])
@pytest.mark.parametrize("how", [{}, {"metric_key_prefix": "test"}], ids=["default-prefix", "test-prefix"])
@pytest.mark.parametrize(("event", "first"), [("on_step_end", False), ("on_step_end", True), ("on_evaluate", False)])
def test_a_users_evaluation_changes_nothing(tmp_path, alone, event, first, how, cls):
    reset, best, trainer = run(tmp_path, Evaluates(event, eval_dataset=TEST, **how), cls, first)
    assert trail(reset) == trail(alone[0])
    assert (best.best, best.step) == (alone[1].best, alone[1].step)
    assert equal(weights(trainer.model), weights(alone[2].model))


def test_an_overridden_evaluate_that_looks_at_another_set_too(tmp_path, alone):
    class Both(Trainer):
        def evaluate(self, *args, **kwargs):
            super().evaluate(TEST)
            return super().evaluate(self.eval_dataset)

    reset, _, _ = run(tmp_path, cls=Both)
    assert trail(reset) == trail(alone[0])


def test_an_evaluation_amid_a_step(tmp_path, alone):
    class Amid(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 4:
                self.evaluate(TEST)
                self.model.train()
            return super().training_step(*args, **kwargs)

    reset, _, _ = run(tmp_path, cls=Amid)
    assert trail(reset) == trail(alone[0])


def test_a_trainer_that_evaluates_in_its_own_way(tmp_path):
    """As the question-answering examples of transformers do: no call of Trainer.evaluate at all."""

    class Own(Trainer):
        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            metrics = {"eval_loss": 1.0 / (1 + self.state.global_step), "eval_runtime": 0.0}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    reset, _, _ = run(tmp_path, cls=Own)
    assert [event["step"] for event in reset.events if event["kind"] == "anchor"] == [3, 6, 9, 12, 15]
