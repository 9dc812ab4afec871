"""Run by torchrun: a moving average of the weights under DDP, FSDP2 and ZeRO; see test_averages.py."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from tiny import TRAIN, VALIDATION, arguments, bert
from transformers import TrainerCallback
from worker import FSDP, deepspeed_on_cpu, fresh_state, fsdp_on_cpu, run_checks, trail
from zero import config_of

from hf_reset import ResetTrainer, ResetTrainingArguments

DECAY = 0.8
ZERO = ("z2-bf16", "z3-fp32", "z3_persistent-bf16")
LORA = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all", "modules_to_save": ["pooler"]}


def adapted():
    """LoRA on a base that does not move, with trained biases and a trained copy of the pooler."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(bert(dropout=0.0), peft.LoraConfig(**LORA))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)  # random before training, not zero
    return model


def settings_of(mode: str) -> dict:
    if mode in ZERO:
        config = config_of(mode)
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        return {"deepspeed": config, "use_cpu": False, "bf16": mode.endswith("bf16")}
    return FSDP if mode == "fsdp" else {}


class Watch(TrainerCallback):
    """This rank's shares: live, averaged, and evaluated; each step's average beside that of a twin."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.twin, self.after_step, self.averages, self.evaluated, self.losses = None, {}, {}, {}, {}
        self.differs, self.moved = [], []

    def live(self):
        average = self.trainer.reset_callback.average
        return {str(key): value.clone() for key, value in average._live().items()}

    def averaged(self):
        average = self.trainer.reset_callback.average
        return {str(key): value.clone() for key, value in average._copy.held.items()}

    def on_step_begin(self, args, state, control, **kwargs):
        live, self.layout = self.live(), self.trainer.reset_callback.average.layout
        if self.twin is None:
            self.twin = self.averaged()
            if state.global_step == 0 and not all(torch.equal(v, live[k].float()) for k, v in self.twin.items()):
                self.differs.append("the average at the start")
        elif not same(live, self.after_step[state.global_step]):
            self.moved.append(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        live, found = self.live(), self.averaged()
        resets = [event["step"] for event in self.trainer.reset_callback.events if event["kind"] == "reset"]
        for key, value in self.twin.items():
            if state.global_step - 1 in resets:
                value.copy_(live[key])
            else:
                value.lerp_(live[key].float(), 1 - DECAY)
        if not same(self.twin, found):
            self.differs.append(state.global_step)
        self.after_step[state.global_step], self.averages[state.global_step] = live, found

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.trainer.reset_callback.average is not None:
            self.evaluated[state.global_step], self.losses[state.global_step] = self.live(), metrics["eval_loss"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def trainer_for(folder: Path, mode: str, kind: str, **more):
    fresh_state()
    trainer = ResetTrainer(
        adapted() if kind == "lora" else bert(dropout=0.0),
        arguments(
            folder,
            ResetTrainingArguments,
            **{
                **settings_of(mode),
                "reset_ema_decay": DECAY,
                "reset_scope": "head" if kind == "head" else "all",
                "reset_probability": 0.6,
                "reset_patience": 0,
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 16,
                "average_tokens_across_devices": False,
                "max_steps": 9,
                "max_grad_norm": 0.0,
                **more,
            },
        ),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
    )
    watch = Watch(trainer)
    trainer.add_callback(watch)
    return trainer, watch


def loss_of_saved(folder: Path):
    """The validation loss of what lies in a checkpoint, by plain PyTorch on one process; None where it is in shares."""
    if (folder / "adapter_config.json").is_file():
        model = peft.PeftModel.from_pretrained(bert(dropout=0.0), folder)
    elif (folder / "model.safetensors").is_file():
        model = bert(dropout=0.0)
        model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    else:
        return None
    with torch.no_grad():
        return model.eval()(**{key: torch.tensor(VALIDATION[key]) for key in VALIDATION.column_names}).loss.item()


def average(mode: str, kind: str, folder: Path):
    """A run with resets and an average, what it saved, and the same taken up at a checkpoint."""
    trainer, watch = trainer_for(folder, mode, kind, save_strategy="steps", save_steps=3)
    trainer.train()
    checkpoints = {step: folder / f"checkpoint-{step}" for step in (3, 6, 9)}
    again, later = trainer_for(folder / "again", mode, kind)
    again.train(resume_from_checkpoint=str(checkpoints[3]))
    end, _ = trainer_for(folder / "last", mode, kind, reset_finish="last", reset_probability=0.0)
    end.train()
    end.save_model(str(folder / "end"))
    finished = end.evaluate()["eval_loss"]
    return {
        "layout": watch.layout,
        "trail": trail(trainer),
        "differs": watch.differs,
        "moved": watch.moved,
        "after_step": watch.after_step,
        "averages": watch.averages,
        "evaluated": watch.evaluated,
        "losses": watch.losses,
        "saved": {step: loss_of_saved(path) for step, path in checkpoints.items()},
        "final_loss": trainer.evaluate()["eval_loss"],
        "resumed": (trail(again), later.differs, later.moved, later.after_step, later.averages),
        "finished": (finished, loss_of_saved(folder / "end"), dict(end.reset_callback.reset_state.__dict__)),
    }


def checks():
    zero = "ON_ZERO" in os.environ
    cases = [(mode, kind) for mode in (("z3-fp32",) if zero else ("ddp", "fsdp")) for kind in ("all", "head", "lora")]
    if zero:
        cases += [("z2-bf16", "all"), ("z3_persistent-bf16", "all")]
    return {f"{mode}-{kind}": partial(average, mode, kind) for mode, kind in cases}


if __name__ == "__main__":
    deepspeed_on_cpu() if "ON_ZERO" in os.environ else fsdp_on_cpu()
    torch.set_num_threads(1)
    run_checks(checks())
