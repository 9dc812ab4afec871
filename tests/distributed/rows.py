"""Run by torchrun: what several processes remember of rows; see test_rows.py for what must come of it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from engines import GLOBAL_BATCH, trainer_for
from worker import Weights, fsdp1_on_cpu, fsdp_on_cpu, raised, run_checks, whole

from hf_reset import RefinementConfig, ResetTrainer

LOSSES = {"plain": {}, "elr": {"reset_loss": "elr"}}
# Sampling and resets as in one process; evaluations amid epochs of eight steps, and a save before one ends.
SETTINGS = {
    "max_steps": 28,
    "reset_probability": 0.2,
    "eval_steps": 5,
    "save_strategy": "steps",
    "save_steps": 6,
    **GLOBAL_BATCH,
}


def remembered(mode, loss, folder: Path):
    """What is remembered at the end of a run without dropout: the same under every engine."""
    weights = Weights()
    trainer = trainer_for(folder, mode, dropout=0.0, callbacks=[weights], **SETTINGS, **LOSSES[loss])
    trainer.train()
    return {
        "state": {name: tensor.clone() for name, tensor in trainer.rows_state().items()},
        "suspects": trainer.suspects(),
        "end": whole(trainer.model),
        "resets": trainer.reset_callback.reset_state.resets,
    }


def resumed(mode, folder: Path):
    """All of it, with dropout, whole and taken up amid an epoch and between two judgements."""
    found = {}
    # Where two labels in three are said to be wrong, a model of a few steps is trusted over them.
    cls = partial(ResetTrainer, refinement=RefinementConfig(mode="soft", noise_rate=0.65))
    settings = {**SETTINGS, "max_steps": 40, "reset_loss": "elr", "cls": cls}
    for name, checkpoint in (("whole", None), ("again", str(folder / "whole" / "checkpoint-36"))):
        trainer = trainer_for(folder / name, mode, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        found[name] = {name: tensor.clone() for name, tensor in trainer.rows_state().items()} | whole(trainer.model)
    return found


def responses(folder: Path):
    """Each response's loss at a validation of 21 rows, which two processes cannot share alike; a run's arming; and what
    another's look at its 39 training rows said before the first step."""
    from test_response_rows import rows_of, trainer_of
    from worker import fresh_state

    fresh_state()
    losses, _ = rows_of(trainer_of(folder / "rows", per_device_eval_batch_size=2))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = trainer_of(folder, reset_probability=0.3, per_device_train_batch_size=8 // world)
    trainer.train()
    state = trainer.reset_callback.reset_state
    cls = partial(ResetTrainer, refinement=RefinementConfig(mode="soft", noise_rate=0.25))
    judge = trainer_of(folder / "judge", cls=cls, max_steps=1, per_device_eval_batch_size=8)
    judge.train_dataset = judge.train_dataset.select(range(39))
    judge.train()
    return {
        "losses": losses,
        "armed": state.armed_step,
        "margin": state.armed_margin,
        "resets": state.resets,
        "looked_at": torch.stack([judge.row_memory.before, judge.row_memory.reference]),
        "is_suspect": judge.refinement.is_suspect,
    }


def refused(folder: Path):
    """Regression has no classes: all processes say so, and none waits."""
    from tiny import TRAIN, VALIDATION, arguments, bert
    from worker import fresh_state

    from hf_reset import ResetTrainingArguments

    fresh_state()
    trainer = ResetTrainer(
        bert(num_labels=1),
        arguments(folder, ResetTrainingArguments, reset_row_memory=True),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
    )
    return raised(trainer.train)


def checks():
    each = {"refused": refused, "responses": responses}
    for mode in ("ddp", "fsdp", "fsdp1"):
        each[f"{mode}-resumed"] = partial(resumed, mode)
        for loss in LOSSES:
            each[f"{mode}-{loss}"] = partial(remembered, mode, loss)
    return each


if __name__ == "__main__":
    fsdp_on_cpu()
    fsdp1_on_cpu()
    torch.set_num_threads(1)
    run_checks(checks())
