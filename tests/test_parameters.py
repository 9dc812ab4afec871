"""Parameters that change amid training are in the next anchor, or refused; never silently left out."""

import pytest
import torch
from tiny import bert, callback, equal, plain_run, reset_run, weights
from torch import nn
from transformers import TrainerCallback

from hf_reset.errors import UnsupportedError
from hf_reset.training.parameters import TrainedParameters


def frozen_encoder():
    model = bert()
    for p in model.bert.parameters():
        p.requires_grad_(False)
    return model


class At(TrainerCallback):
    """Does something to the model once a step is done."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == self.step:
            self.change(model, optimizer)


def unfreeze(model, optimizer):
    late = list(model.bert.pooler.parameters())
    for p in late:
        p.requires_grad_(True)
    optimizer.optimizer.param_groups[0]["params"] += late


def replace_head(model, optimizer):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model.classifier = nn.Linear(16, 3)
    optimizer.optimizer.param_groups[0]["params"] += list(model.classifier.parameters())


@pytest.mark.parametrize(
    ("change", "name"), [(unfreeze, "bert.pooler.dense.weight"), (replace_head, "classifier.weight")]
)
def test_they_are_in_the_next_anchor_and_go_back_with_it(tmp_path, caplog, change, name):
    reset = callback(metric="always", greater_is_better=True, finish="last", probability=0.5)
    climbing = iter(range(100))

    class Always(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_always"] = float(next(climbing))  # every evaluation moves the anchor

    model = frozen_encoder()
    _, recorder = plain_run(
        tmp_path,
        model=model,
        callback=None,
        more_callbacks=[Always(), reset, At(4, change)],
        lr_scheduler_type="constant",
    )
    assert name in reset.store.names
    assert any("amid" in r.getMessage() or "since the last anchor" in r.getMessage() for r in caplog.records)
    later = [e for e in reset.events if e["kind"] == "reset" and e["anchor_step"] > 4]
    assert later
    for event in later:
        landed = recorder.after_step[event["step"] + 1]
        assert torch.equal(landed[name], recorder.evaluated[event["anchor_step"]][1][name])


def test_an_average_of_others_is_refused(tmp_path):
    late = At(4, unfreeze)
    trainer, _ = reset_run(
        tmp_path,
        model=frozen_encoder(),
        train=False,
        callbacks=[late],
        reset_probability=0.5,
        reset_patience=0,
        reset_ema_decay=0.5,
        reset_metric="step",
        reset_greater_is_better=True,
    )
    trainer.compute_metrics = lambda _: {"step": float(trainer.state.global_step)}
    with pytest.raises(UnsupportedError, match=r"`ema_decay` averages parameters of which 2 were unfrozen"):
        trainer.train()


def test_nothing_changed_is_nothing_said():
    model = bert()
    trained = TrainedParameters(model)
    assert trained.changes(model) == []
    before = weights(model)
    model.classifier.bias.requires_grad_(False)
    assert trained.changes(model) == ["classifier.bias"]
    assert trained.changes(model) == []
    assert equal(before, weights(model))
