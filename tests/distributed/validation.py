"""Run by test_validation.py: what an evaluation gives on each rank, what races decide, and what a row memory keeps."""

import os
from pathlib import Path

import test_racing
import tiny
import torch
from engines import GLOBAL_BATCH
from transformers import Trainer
from worker import RANK, fresh_state, run_checks

from hf_reset import ResetTrainer, ResetTrainingArguments
from hf_reset.anchor.ranks import gathered, world_size
from hf_reset.metrics import with_calibrated_loss
from hf_reset.rows import RowMemory


def evaluated(folder: Path, **options):
    """The metrics of 121 rows, which fill neither the ranks nor the batches evenly."""
    arguments = tiny.arguments(folder, per_device_eval_batch_size=10, **options)
    validation = tiny.rows(121, seed=2)
    return Trainer(tiny.bert(), arguments, eval_dataset=validation, compute_metrics=with_calibrated_loss()).evaluate()


def calibrated(folder: Path):
    """The whole evaluation at once, and batch by batch."""
    return {"whole": evaluated(folder), "batches": evaluated(folder, batch_eval_metrics=True)}


def raced(folder: Path):
    """What became of each evaluation of a run, in races over 123 rows: the last block fills no rank's batch."""
    fresh_state()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = {"per_device_train_batch_size": 8 // world, "per_device_eval_batch_size": 10 // world}
    settings = {**test_racing.SETTINGS, **GLOBAL_BATCH, **sizes, "max_steps": 40}
    trainer = ResetTrainer(
        tiny.bert(dropout=0.0),
        tiny.arguments(folder, ResetTrainingArguments, **settings),
        train_dataset=test_racing.TRAIN,
        eval_dataset=test_racing.noisy_rows(123, 2),
    )
    trainer.train()
    names = ("step", test_racing.ROWS, "eval_race_lost")
    told = [[record.get(name) for name in names] for record in test_racing.evaluations(trainer)]
    return {"told": told, "anchors": tiny.steps_of(trainer.reset_callback.events, "anchor")}


def remembered(folder: Path):
    """A row memory after forty steps of which each process meets its own half."""
    generator = torch.Generator().manual_seed(0)
    memory = RowMemory(20, 3, decay=0.5)
    for step in range(40):
        rows = torch.randperm(20, generator=generator)[:8]
        logits, labels = torch.randn(8, 3, generator=generator), rows % 3
        own = rows.chunk(world_size())[RANK] if world_size() > 1 else rows
        at = torch.isin(rows, own)
        memory.update(rows[at], logits[at], labels[at])
        if step % 15 == 9:
            memory.mark_reset()
        if step % 10 == 4:
            memory.share(gathered)
    memory.share(gathered)
    return memory.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_checks({"calibrated": calibrated, "remembered": remembered, "raced": raced})
