"""Run by torchrun on two processes: what differs or fails on one rank must be known to both; see test_failures.py."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from engines import trainer_for
from worker import RANK, fsdp_on_cpu, raised, run_checks, trail, whole

from hf_reset import ResetConfig, StochasticResetCallback
from hf_reset.training.best_weights import BestWeightsCallback

SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}


class Heard(logging.Handler):
    """Warnings of the callback on this rank."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []
        logging.getLogger("hf_reset.training.metric").addHandler(self)

    def emit(self, record):
        self.said.append(record.getMessage())

    def stop(self):
        logging.getLogger("hf_reset.training.metric").removeHandler(self)
        return self.said


def differing_metric(folder: Path):
    """`compute_metrics` that climbs on rank 0 and falls on rank 1, and once is missing or not finite on rank 1."""
    heard, calls = Heard(), []

    def metrics(_):
        calls.append(None)
        n = len(calls)
        if RANK == 0:
            return {"score": float(n)}
        return {} if n == 2 else {"score": float("nan") if n == 3 else -float(n)}

    trainer = trainer_for(folder, "ddp", metrics=metrics, reset_metric="score", metric_for_best_model="score")
    trainer.train()
    return {
        "said": heard.stop(),
        "trail": trail(trainer),
        "best": trainer.state.best_metric,
        "end": whole(trainer.model),
    }


def best_weights(folder: Path):
    """The best weights are kept in a file that takes all ranks to write, and `compute_metrics` differs by rank.

    The callback comes before the one that resets, which `ResetTrainer` adds last.
    """
    calls = []

    def metrics(_):
        calls.append(None)
        return {"score": float(len(calls)) * (1 if RANK == 0 else -1)}

    best = BestWeightsCallback(ResetConfig(metric="score"), path=folder / "best")
    trainer = trainer_for(folder, "fsdp", metrics=metrics, callbacks=[best], reset_metric="score", reset_finish="last")
    trainer.train()
    with best.swapped():
        kept = whole(trainer.model)
    return {"best": best.best, "step": best.step, "kept": kept, "end": whole(trainer.model)}


def absent_on_first(folder: Path):
    """Rank 0 lacks the metric: an error on both, where rank 1 alone would have gone on."""
    heard = Heard()
    metrics = (lambda _: {}) if RANK == 0 else (lambda _: {"score": 1.0})
    found = raised(trainer_for(folder, "ddp", metrics=metrics, reset_metric="score").train)
    return found | {"said": heard.stop()}


def missing(mode, folder: Path):
    """A checkpoint that has lost (a part of) its anchor."""
    trainer_for(folder, mode, **SAVING).train()
    lost = {"ddp": "reset_anchor.safetensors", "fsdp": "reset_anchor/__1_0.distcp"}[mode]
    torch.distributed.barrier()
    if RANK == 0:
        shutil.copytree(folder / "checkpoint-6", folder / "kept")
        (folder / "checkpoint-6" / lost).unlink()
    torch.distributed.barrier()
    again = trainer_for(folder, mode, max_steps=9)
    found = raised(lambda: again.train(resume_from_checkpoint=str(folder / "checkpoint-6")))
    newest = trainer_for(folder, mode, max_steps=9)
    newest.train(resume_from_checkpoint=True)  # passes over the one that is not whole
    return found | {"lost": lost, "resumed_at": newest.state.log_history and trail(newest)}


def unseen_by_one(folder: Path):
    """Rank 1 looks for the anchor where there is none, as on a machine without the shared disk."""
    settings = SAVING | {"reset_probability": 0.5}
    trainer_for(folder, "ddp", **settings).train()
    torch.distributed.barrier()
    again = trainer_for(folder, "ddp", max_steps=9)
    load = again._load_optimizer_and_scheduler

    def elsewhere(checkpoint):
        load(checkpoint)
        if RANK == 1:
            again.reset_callback.resume_from_checkpoint = str(folder / "elsewhere")

    again._load_optimizer_and_scheduler = elsewhere
    return raised(lambda: again.train(resume_from_checkpoint=str(folder / "checkpoint-6")))


def full_disk(mode, folder: Path):
    """The disk fills up between the random state and the anchor of the second checkpoint."""
    disk = Path(os.environ["SMALL_DISK"]) / mode
    filler = disk / "filler"
    trainer = trainer_for(disk, mode, **SAVING)
    write = trainer._save_scaler

    def fill_first(output_dir):
        write(output_dir)
        torch.distributed.barrier()
        if output_dir.endswith("checkpoint-6") and RANK == 0:
            free = shutil.disk_usage(disk).free
            filler.write_bytes(b"\0" * (free - 64 * 1024))  # room for the random states, and no more
        torch.distributed.barrier()

    trainer._save_scaler = fill_first
    found = raised(trainer.train)
    torch.distributed.barrier()
    if RANK == 0:
        filler.unlink()
    torch.distributed.barrier()
    again = trainer_for(disk, mode, **SAVING)
    again.train(resume_from_checkpoint=True)
    straight = trainer_for(folder, mode, **SAVING)
    straight.train()
    same = all(
        torch.equal(p, q) for p, q in zip(whole(again.model).values(), whole(straight.model).values(), strict=True)
    )
    torch.distributed.barrier()
    if RANK == 0:
        shutil.rmtree(disk)
    return found | {"same": same, "trails": (trail(again), trail(straight))}


def refused_on_one(folder: Path):
    """One rank is misconfigured: both hear of it before a step."""
    scope = "head" if RANK == 0 else "no_such_layer"
    return raised(trainer_for(folder, "ddp", reset_scope=scope).train)


def plain_callback(folder: Path):
    """The stock Trainer with the plain callback saves and resumes too."""
    from transformers import Trainer

    callbacks = [StochasticResetCallback(probability=0.5, patience=0) for _ in range(3)]
    runs = [trainer_for(folder, "ddp", cls=Trainer, callbacks=[callbacks[0]], **SAVING | {"max_steps": 9})]
    runs[0].train()
    runs.append(trainer_for(folder, "ddp", cls=Trainer, callbacks=[callbacks[1]], max_steps=9))
    runs[1].train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    return {"ends": [whole(run.model) for run in runs], "events": [callback.events for callback in callbacks[:2]]}


def checks():
    each = {"differing-metric": differing_metric, "absent-on-first": absent_on_first, "refused-on-one": refused_on_one}
    each |= {"unseen-by-one": unseen_by_one, "plain-callback": plain_callback, "best-weights": best_weights}
    for mode in ("ddp", "fsdp"):
        each[f"missing-{mode}"] = partial(missing, mode)
        if "SMALL_DISK" in os.environ:
            each[f"full-disk-{mode}"] = partial(full_disk, mode)
    return each


def one_dies(folder: Path):
    """An error in a user's own code on one rank, in the middle of training."""

    def metrics(_):
        if RANK == 1:
            raise RuntimeError("compute_metrics failed on purpose")
        return {"score": 1.0}

    trainer_for(folder, "ddp", metrics=metrics).train()


if __name__ == "__main__":
    fsdp_on_cpu()
    torch.set_num_threads(1)
    if sys.argv[2:] == ["one-dies"]:
        one_dies(Path(sys.argv[1]))
    run_checks(checks())
