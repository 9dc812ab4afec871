"""Run by test_validation.py: what an evaluation gives on each rank, and what a row memory keeps."""

from pathlib import Path

import tiny
import torch
from transformers import Trainer
from worker import RANK, run_checks

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
    run_checks({"calibrated": calibrated, "remembered": remembered})
