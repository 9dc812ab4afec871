"""Run by torchrun: training under DDP and FSDP2 on gloo; see test_ddp_fsdp.py for what must come of it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import torch
from tiny import TRAIN, VALIDATION, arguments, bert
from transformers import TrainerCallback
from worker import FSDP, Weights, fresh_state, fsdp_on_cpu, run_checks, whole

from hf_reset import ResetTrainer, ResetTrainingArguments

MODES = {"ddp": {}, "fsdp": FSDP}
RESETS = {"reset_probability": 0.5, "reset_patience": 0}
# Without this, Trainer scales a loss that ignores `num_items_in_batch` by the number of processes.
GLOBAL_BATCH = {"average_tokens_across_devices": False, "learning_rate": 1e-3}


def trainer_for(folder, mode, *, dropout=0.1, callbacks=(), cls=ResetTrainer, metrics=None, **more):
    fresh_state()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    batch = {"per_device_train_batch_size": 8 // world, "per_device_eval_batch_size": 32 // world}
    return cls(
        bert(dropout=dropout),
        arguments(folder, ResetTrainingArguments, **{**batch, **MODES[mode], **RESETS, **more}),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=list(callbacks),
        compute_metrics=metrics,
    )


def layout(trainer) -> str:
    """Which engine is at work, so that no test passes by running another."""
    kinds = {type(p.data).__name__ for p in trainer.model.parameters()}
    return f"{trainer.accelerator.distributed_type.value}:{'/'.join(sorted(kinds))}"


def trail(trainer):
    return [(event["kind"], event["step"], event["metric"]) for event in trainer.reset_callback.events]


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


def resume(mode, scope, folder: Path):
    """A run, and the same run taken up at each of its checkpoints, with dropout."""
    settings = {"save_strategy": "steps", "save_steps": 3, "reset_scope": scope}
    whole_run = trainer_for(folder, mode, **settings)
    whole_run.train()
    ends = {}
    for step in (3, 6, 9, 12):
        again = trainer_for(folder, mode, **settings | {"save_strategy": "no"})
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        ends[step] = (whole(again.model), trail(again))
    newest = trainer_for(folder, mode, **settings | {"save_strategy": "no"})
    newest.train(resume_from_checkpoint=True)
    other = trainer_for(folder / "other", mode, **settings | {"save_strategy": "no", "reset_seed": 8})
    other.train()
    return {
        "end": (whole(whole_run.model), trail(whole_run)),
        "resumed": ends,
        "newest": (whole(newest.model), trail(newest)),
        "other": whole(other.model),
    }


def held(mode, folder: Path):
    """Reset at every step, evaluated after each: what the forward reads is the anchor, always."""
    weights = Weights()
    trainer = trainer_for(folder, mode, callbacks=[weights], eval_steps=1, max_steps=6, reset_probability=1.0)
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


class Counted(TrainerCallback):
    """Collective operations issued in each step, from its first forward to after its update and reset."""

    def __init__(self):
        self.steps, self._profile = {}, None

    def on_step_begin(self, args, state, control, **kwargs):
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        self._profile.stop()
        names = [event.name for event in self._profile.events() if event.name.startswith("c10d::")]
        self.steps[state.global_step - 1] = dict(Counter(names))


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
        )
        trainer.train()
        found[name] = (counted.steps, trail(trainer))
    return found


def checks():
    each = {}
    for mode in MODES:
        each[f"{mode}-trajectory"] = partial(trajectory, mode)
        each[f"{mode}-resume-all"] = partial(resume, mode, "all")
        each[f"{mode}-resume-head"] = partial(resume, mode, "head")
        each[f"{mode}-held"] = partial(held, mode)
        each[f"{mode}-swapped"] = partial(swapped, mode)
        each[f"{mode}-collectives"] = partial(collectives, mode)
    return each


if __name__ == "__main__":
    fsdp_on_cpu()
    torch.set_num_threads(1)
    run_checks(checks())
