"""Run by test_validation.py: what an evaluation gives on each rank, with a last batch that needs padding."""

from pathlib import Path

import tiny
import torch
from transformers import Trainer
from worker import run_checks

from hf_reset.metrics import with_calibrated_loss


def evaluated(folder: Path, **options):
    """The metrics of 121 rows, which fill neither the ranks nor the batches evenly."""
    arguments = tiny.arguments(folder, per_device_eval_batch_size=10, **options)
    validation = tiny.rows(121, seed=2)
    return Trainer(tiny.bert(), arguments, eval_dataset=validation, compute_metrics=with_calibrated_loss()).evaluate()


def calibrated(folder: Path):
    """The whole evaluation at once, and batch by batch."""
    return {"whole": evaluated(folder), "batches": evaluated(folder, batch_eval_metrics=True)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_checks({"calibrated": calibrated})
