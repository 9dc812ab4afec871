"""Run by torchrun: training under DDP, FSDP2 and FSDP1 on gloo; see test_ddp_fsdp.py for what must come of it."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

import torch
from tiny import TRAIN, VALIDATION, arguments, bert
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from worker import (
    FSDP,
    FSDP1,
    Counted,
    Weights,
    fresh_state,
    fsdp1_on_cpu,
    fsdp_on_cpu,
    raised,
    run_checks,
    trail,
    whole,
)

from hf_reset import ResetTrainer, ResetTrainingArguments, last_whole_checkpoint
from hf_reset.diagnostics import ExcursionDiffusionCallback

MODES = {"ddp": {}, "fsdp": FSDP, "fsdp1": FSDP1}
RESETS = {"reset_probability": 0.5, "reset_patience": 0}
# Without the first, Trainer scales a loss that ignores `num_items_in_batch` by the number of processes. Without the
# second, Adam makes a full step of what should be no gradient at all (that of the keys' biases) and is rounding.
GLOBAL_BATCH = {"average_tokens_across_devices": False, "adam_epsilon": 1e-3}


def trainer_for(folder, mode, *, dropout=0.1, callbacks=(), cls=ResetTrainer, metrics=None, **more):
    fresh_state()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch = {"per_device_train_batch_size": 8 // world, "per_device_eval_batch_size": 32 // world}
    batch["use_cpu"] = "ON_GPU" not in os.environ
    return cls(
        bert(dropout=dropout),
        arguments(folder, ResetTrainingArguments, **{**batch, **MODES[mode], **RESETS, **more}),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=list(callbacks),
        compute_metrics=metrics,
    )


def layout(trainer) -> str:
    """How the weights lie, so that no test passes by running another engine."""
    wrapped = type(trainer.model_wrapped).__name__
    return "FSDP2" if any(isinstance(p, DTensor) for p in trainer.model.parameters()) else wrapped


def trajectory(mode, folder: Path):
    """Weights after every step, with resets, without dropout: the same under every engine."""
    weights = Weights()
    trainer = trainer_for(folder, mode, dropout=0.0, callbacks=[weights], **GLOBAL_BATCH)
    trainer.train()
    return {
        "layout": layout(trainer),
        "after_step": weights.after_step,
        "evaluated": weights.evaluated,
        "events": trainer.reset_callback.events,
        "final": whole(trainer.model),
        "nbytes": trainer.reset_callback.store.nbytes,
    }


def resume(mode, scope, at, folder: Path):
    """A run, and the same run taken up at its checkpoints, with dropout."""
    settings = {"save_strategy": "steps", "save_steps": 3, "reset_scope": scope}
    whole_run = trainer_for(folder, mode, **settings)
    whole_run.train()
    ends = {}
    for step in at:
        again = trainer_for(folder, mode, **settings | {"save_strategy": "no"})
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        ends[step] = (whole(again.model), trail(again))
    other = trainer_for(folder / "other", mode, **settings | {"save_strategy": "no", "reset_seed": 8})
    other.train()
    return {
        "end": (whole(whole_run.model), trail(whole_run)),
        "resumed": ends,
        "other": whole(other.model),
    }


def auto(folder: Path):
    """A run that chooses its probability, and the same taken up at a checkpoint."""
    settings = {"reset_probability": "auto", "eval_steps": 1, "save_strategy": "steps", "save_steps": 5}
    trainer = trainer_for(folder, "ddp", **settings)
    trainer.train()
    again = trainer_for(folder, "ddp", **settings | {"save_strategy": "no"})
    again.train(resume_from_checkpoint=str(folder / "checkpoint-10"))
    return {"runs": [(t.reset_callback.events, t.reset_callback.reset_state.plan) for t in (trainer, again)]}


def unwatched(folder: Path):
    """Diagnostics that need the weights whole, where they are shared out."""
    watch = ExcursionDiffusionCallback()
    return raised(trainer_for(folder, "fsdp", callbacks=[watch], max_steps=3).train)


def held(mode, folder: Path, **more):
    """Reset at every step, evaluated after each: what the forward reads is the anchor, always."""
    weights = Weights()
    settings = {"eval_steps": 1, "max_steps": 6, "reset_probability": 1.0, **more}
    trainer = trainer_for(folder, mode, callbacks=[weights], **settings)
    trainer.train()
    return {"evaluated": weights.evaluated, "events": trainer.reset_callback.events, "final": whole(trainer.model)}


class Swap(TrainerCallback):
    """Right after an evaluation, when FSDP holds the root gathered, look at the anchor for a moment."""

    def __init__(self, probe):
        self.probe, self.store, self.seen = probe, None, []

    def on_evaluate(self, args, state, control, model, metrics, **kwargs):
        anchor = self.store()
        if anchor is None or not anchor.is_set:
            return
        was_training = model.training
        model.eval()
        with torch.no_grad():
            before = model(**self.probe).logits.clone()
            with anchor.swapped():
                inside, inside_weights = model(**self.probe).logits.clone(), whole(model)
            after = model(**self.probe).logits.clone()
        model.train(was_training)
        self.seen.append((state.global_step, before, inside, after, inside_weights))


def swapped(mode, folder: Path):
    probe = {k: torch.tensor(VALIDATION[:4][k]) for k in ("input_ids", "attention_mask")}
    weights, swap = Weights(), Swap(probe)
    trainer = trainer_for(folder, mode, callbacks=[weights, swap], reset_probability=0.0, reset_anchor="fixed")
    swap.store = lambda: trainer.reset_callback.store
    trainer.train()
    return {"seen": swap.seen, "evaluated": weights.evaluated, "events": trainer.reset_callback.events}


def collectives(mode, folder: Path):
    """Counts a step without and with resets; `optimizer_state="keep"` skips no forward and backward."""
    found = {}
    for name, probability, state in (("plain", 0.0, "keep"), ("reset", 0.5, "keep"), ("skipping", 0.5, "restore")):
        counted = Counted()
        trainer = trainer_for(
            folder / name,
            mode,
            callbacks=[counted],
            reset_probability=probability,
            reset_optimizer_state=state,
            max_grad_norm=1.0,
            max_steps=11,
        )
        trainer.train()
        found[name] = (counted.steps, trail(trainer))
    return found


def anchored(trainer):
    """The whole of what the anchor holds, weights and moments."""
    store = trainer.reset_callback.store
    held = {str(key): store._views.whole(key, value) for key, value in store._copy.held.items()}
    return {key: value.full_tensor() if isinstance(value, DTensor) else value.clone() for key, value in held.items()}


def saved(mode, folder: Path):
    """Checkpoints for another number of processes to take up."""
    trainer = trainer_for(folder, mode, save_strategy="steps", save_steps=3, max_steps=6)
    trainer.train()
    newest = {world: last_whole_checkpoint(folder, world_size=world) for world in (2, 8)}
    return {"layout": layout(trainer), "anchor": anchored(trainer), "trail": trail(trainer), "newest": newest}


class Taken(TrainerCallback):
    """The anchor when the first step of a resumed run begins."""

    def __init__(self):
        self.anchor = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.anchor is None:
            self.anchor = anchored(self.trainer)


def taken_up(mode, folder: Path):
    """Go on from a checkpoint of four processes."""
    said, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hf_reset.training.resume").addHandler(handler)
    taken = Taken()
    taken.trainer = trainer = trainer_for(folder, mode, max_steps=9, callbacks=[taken])
    trainer.train(resume_from_checkpoint=str(Path(os.environ["OF_FOUR"]) / f"{mode}-saved" / "checkpoint-6"))
    logging.getLogger("hf_reset.training.resume").removeHandler(handler)
    return {"anchor": taken.anchor, "trail": trail(trainer), "said": said, "end": whole(trainer.model)}


def flat(folder: Path):
    """FSDP1 without original parameters: a unit is one flat parameter."""
    config = {**FSDP1["fsdp_config"], "use_orig_params": False}
    found: dict = {"layouts": []}
    for name, mode in (("flat", {"fsdp_config": config}), ("original", {})):
        weights = Weights()
        # One group of weights without decay: a flat parameter cannot tell a bias from a matrix.
        trainer = trainer_for(folder / name, "fsdp1", dropout=0.0, callbacks=[weights], weight_decay=0.0, **mode)
        trainer.train()
        found[name] = (weights.after_step, weights.evaluated, trainer.reset_callback.events)
        found["layouts"].append(any(isinstance(p, FlatParameter) for p in trainer.model.parameters()))
    found["refused"] = raised(trainer_for(folder / "head", "fsdp1", fsdp_config=config, reset_scope="head").train)
    return found


def lost_state(folder: Path):
    """FSDP1 with sharded checkpoints: accelerate loads no optimizer state, and the run could not go on as it was."""
    config = {**FSDP1["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}
    saving = {"fsdp_config": config, "save_strategy": "steps", "save_steps": 3}
    trainer_for(folder, "fsdp1", max_steps=3, **saving).train()
    again = trainer_for(folder, "fsdp1", max_steps=6, **saving)
    return raised(lambda: again.train(resume_from_checkpoint=str(folder / "checkpoint-3")))


def other_world(folder: Path):
    """A checkpoint of four processes under FSDP1, whose shares are flat."""
    checkpoint = str(Path(os.environ["OF_FOUR"]) / "fsdp1-saved" / "checkpoint-6")
    return raised(lambda: trainer_for(folder, "fsdp1", max_steps=9).train(resume_from_checkpoint=checkpoint))


def checks():
    each = {
        "ddp-auto": auto,
        "fsdp-unwatched": unwatched,
        "fsdp1-flat": flat,
        "fsdp1-lost-state": lost_state,
        "fsdp1-other-world": other_world,
    }
    for mode in MODES:
        each[f"{mode}-trajectory"] = partial(trajectory, mode)
        each[f"{mode}-resume-all"] = partial(resume, mode, "all", (3, 6, 9, 12))
        each[f"{mode}-resume-head"] = partial(resume, mode, "head", (6, 12))
        each[f"{mode}-held"] = partial(held, mode)
        each[f"{mode}-held-bf16"] = partial(held, mode, bf16=True)
        each[f"{mode}-swapped"] = partial(swapped, mode)
        each[f"{mode}-collectives"] = partial(collectives, mode)
        each[f"{mode}-saved"] = partial(saved, mode)
        each[f"{mode}-taken-up"] = partial(taken_up, mode)
    return each


if __name__ == "__main__":
    if "ON_GPU" not in os.environ:
        fsdp_on_cpu()
        fsdp1_on_cpu()
    torch.set_num_threads(1)
    run_checks(checks())
