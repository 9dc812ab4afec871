"""Run by torchrun in DeepSpeed's environment: ZeRO-1, -2 and -3 on gloo; see test_deepspeed.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from tiny import TRAIN, VALIDATION, arguments, bert
from transformers import TrainerCallback
from worker import Counted, deepspeed_on_cpu, fresh_state, run_checks, trail

from hf_reset import AnchorStore, ResetTrainer, ResetTrainingArguments
from hf_reset.errors import UnsupportedError

CONFIGS = [f"{stage}-{dtype}" for stage in ("z1", "z2", "z3", "z3_persistent") for dtype in ("fp32", "bf16")]
CONFIGS += ["z2_offload-fp32", "z3_offload-fp32"]


def config_of(name: str, batch: int = 4) -> dict:
    stage, dtype = name.split("-")
    zero: dict = {"stage": int(stage[1])}
    if stage.startswith("z3"):
        zero["stage3_param_persistence_threshold"] = 20 if "persistent" in stage else 0
    if "offload" in stage:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
    }


class Loop:
    """Training by hand on DeepSpeed's engine."""

    def __init__(self, name: str):
        import deepspeed

        model = bert(dropout=0.0)
        decayed = [p for n, p in model.named_parameters() if p.dim() > 1]
        others = [p for n, p in model.named_parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=5e-3)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config_of(name), model_parameters=model.parameters()
        )
        self.model = self.engine.module

    def step(self, start: int) -> float:
        rank = torch.distributed.get_rank()
        rows = TRAIN[start + 4 * rank : start + 4 * rank + 4]
        loss = self.engine(**{key: torch.tensor(value) for key, value in rows.items()}).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self) -> float:
        self.engine.eval()
        loss = self.engine(**{key: torch.tensor(value) for key, value in VALIDATION[:8].items()}).loss.item()
        self.engine.train()
        return loss

    def state(self) -> dict[str, torch.Tensor]:
        """Whole masters and moments through DeepSpeed's own API, and the weights that the forward reads."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if hasattr(self.optimizer, "_hp_optimizer_states_linked"):
            # With two parameter groups DeepSpeed links these after the first group's first step, the second's never.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
        found = {}
        for name, p in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([p]):
                found[f"weight/{name}"] = p.data.clone().float()
            found[f"master/{name}"] = safe_get_full_fp32_param(p).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}/{name}"] = safe_get_full_optimizer_state(p, key).clone()
        return found

    def counts(self) -> list[float]:
        """Adam's step counts, one a flat partition."""
        inner = self.optimizer.optimizer
        return [float(state["step"]) for state in inner.state.values() if "step" in state]


def exact(name: str, scope: str, folder: Path):
    """Two steps, an anchor, one step away, a reset: all is as it was, and the next step starts from there."""
    loop, twin = Loop(name), Loop(name)
    for start in (0, 8):
        loop.step(start), twin.step(start)
    anchor = AnchorStore(loop.engine, loop.optimizer, scope=scope)
    loop.evaluate()
    anchor.snapshot()
    at_anchor, counts, evaluated = loop.state(), loop.counts(), loop.evaluate()
    loop.step(16)
    away, distance = loop.state(), anchor.squared_distance()
    anchor.restore()
    back, back_counts = loop.state(), loop.counts()
    found = {"names": anchor.names, "nbytes": anchor.nbytes, "layout": anchor.layout}
    found |= {"at_anchor": at_anchor, "away": away, "back": back, "counts": (counts, back_counts)}
    found |= {"losses": (evaluated, loop.evaluate()), "squared_distance": distance, "distance": anchor.distance()}
    with anchor.swapped():
        found["swapped"] = loop.evaluate()
    loop.step(24), twin.step(24)
    found |= {"next": loop.state(), "twin": twin.state()}
    anchor.save(folder / f"anchor-{torch.distributed.get_rank()}.safetensors")
    again = AnchorStore(loop.engine, loop.optimizer, scope=scope)
    again.load(folder / f"anchor-{torch.distributed.get_rank()}.safetensors")
    again.restore()
    loop.evaluate()
    again.restore()  # right after an evaluation, when copies may still be gathered
    found["reloaded"] = loop.state()
    return found


class Watch(TrainerCallback):
    """This rank's shares after each step."""

    def __init__(self):
        self.after_step, self.losses = {}, {}

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        store = AnchorStore(model, optimizer)
        self.after_step[state.global_step] = {k: v.clone() for k, v in store._live().items() if torch.is_tensor(v)}

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses[state.global_step] = metrics["eval_loss"]


def trainer_for(folder: Path, name: str, **more):
    fresh_state()
    watch = Watch()
    settings = {
        "deepspeed": config_of(name),
        "use_cpu": False,
        "bf16": name.endswith("bf16"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "reset_probability": 0.5,
        "reset_patience": 0,
        "max_grad_norm": 0.0,
        "max_steps": 11,
        **more,
    }
    model = bert(dropout=0.0)
    trainer = ResetTrainer(
        model,
        arguments(folder, ResetTrainingArguments, **settings),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=[watch],
    )
    return trainer, watch


def resume(name: str, folder: Path):
    whole_run, watch = trainer_for(folder, name, save_strategy="steps", save_steps=3)
    whole_run.train()
    found = {"layout": whole_run.accelerator.distributed_type.value, "trail": trail(whole_run)}
    found |= {"after_step": watch.after_step, "losses": watch.losses, "resumed": {}}
    for step in (3, 9):
        again, watch = trainer_for(folder, name)
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        found["resumed"][step] = (watch.after_step, trail(again))
    return found


def collectives(name: str, folder: Path):
    """Operations issued in each step, without and with resets."""
    found = {}
    for arm, probability in (("plain", 0.0), ("reset", 0.5)):
        counted = Counted()
        trainer, _ = trainer_for(folder / arm, name, reset_probability=probability)
        trainer.add_callback(counted)
        trainer.train()
        found[arm] = (counted.steps, trail(trainer))
    return found


def refusals(folder: Path):
    """What cannot be right is said, in words, on every rank."""
    said = {}
    for case, stage in (("stage 0 in bf16", 0), ("hierarchical", 3)):
        config = config_of("z3-bf16")
        config["zero_optimization"] = {"stage": stage}
        import deepspeed

        model = bert(dropout=0.0)
        engine, optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config
        )
        if case == "hierarchical":
            for p in engine.module.parameters():
                p.ds_secondary_tensor = p.ds_tensor
        try:
            AnchorStore(engine, optimizer)
        except UnsupportedError as error:
            said[case] = str(error)
        if case == "hierarchical":
            for p in engine.module.parameters():
                p.ds_secondary_tensor = None
            optimizer.swap_optimizer = True
            try:
                AnchorStore(engine, optimizer)
            except UnsupportedError as error:
                said["nvme"] = str(error)
            optimizer.swap_optimizer = False
            try:
                AnchorStore(engine)
            except UnsupportedError as error:
                said["no optimizer"] = str(error)
    return said


def rows(name: str, folder: Path):
    """What is remembered of rows with ELR, whole and taken up amid an epoch of eight steps."""
    settings = {"reset_probability": 0.0, "reset_loss": "elr", "save_strategy": "steps", "save_steps": 6}
    found = {}
    for run, checkpoint in (("whole", None), ("again", str(folder / "whole" / "checkpoint-6"))):
        trainer, _ = trainer_for(folder / run, name, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        found[run] = {name: tensor.clone() for name, tensor in trainer.rows_state().items()}
    return found


def other_world(name: str, folder: Path):
    """A checkpoint of two processes, taken up by another number of them."""
    trainer, _ = trainer_for(folder, name, max_steps=3, save_strategy="steps", save_steps=3)
    trainer.train()
    if torch.distributed.get_rank() == 0:
        for rank in range(2):
            old = folder / "checkpoint-3" / f"reset_anchor-rank{rank}-of-2.safetensors"
            old.rename(old.with_name(f"reset_anchor-rank{rank}-of-3.safetensors"))
    torch.distributed.barrier()
    again, _ = trainer_for(folder, name, max_steps=6)
    try:
        again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    except Exception as error:
        return {"raised": (type(error).__name__, str(error))}
    return {}


def checks():
    each = {f"exact-{name}-{scope}": partial(exact, name, scope) for name in CONFIGS for scope in ("all", "head")}
    for name in ("z1-fp32", "z2-bf16", "z3-fp32", "z3_persistent-bf16", "z2_offload-fp32", "z3_offload-fp32"):
        each[f"resume-{name}"] = partial(resume, name)
        each[f"collectives-{name}"] = partial(collectives, name)
    each |= {f"other-world-{name}": partial(other_world, name) for name in ("z2-fp32", "z3-fp32")}
    each |= {f"rows-{name}": partial(rows, name) for name in ("z2-fp32", "z3-fp32")}
    return each | {"refusals": refusals}


if __name__ == "__main__":
    deepspeed_on_cpu()
    torch.set_num_threads(1)
    run_checks(checks())
