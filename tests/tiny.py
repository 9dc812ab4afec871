"""A model, data and arguments small enough that a run takes a second."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_reset import ResetTrainer, ResetTrainingArguments, StochasticResetCallback

CLASSES = 3


def rows(n: int, seed: int = 0) -> Dataset:
    """Random token ids with random labels: there is nothing to learn but the rows themselves."""
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict(
        {
            "input_ids": torch.randint(1, 50, (n, 8), generator=generator).tolist(),
            "attention_mask": [[1] * 8] * n,
            "labels": torch.randint(0, CLASSES, (n,), generator=generator).tolist(),
        }
    )


TRAIN, VALIDATION = rows(64, seed=1), rows(32, seed=2)


def bert(dropout: float = 0.1, **config) -> BertForSequenceClassification:
    """A two-layer BERT of 14 000 parameters, the same at every call, without moving the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(
                **{
                    "vocab_size": 50,
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 32,
                    "num_labels": CLASSES,
                    "hidden_dropout_prob": dropout,
                    "attention_probs_dropout_prob": dropout,
                    **config,
                }
            )
        )


def arguments(output_dir, cls=TrainingArguments, **more):
    """Fifteen steps, evaluated every three, at a learning rate that overfits at once."""
    return cls(
        **{
            "output_dir": str(output_dir),
            "max_steps": 15,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 32,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "no",
            "logging_steps": 1,
            "learning_rate": 5e-3,
            "optim": "adamw_torch",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 7,
            **more,
        }
    )


class Recorder(TrainerCallback):
    """Copies of the weights after each step and at each evaluation, and the learning rate of each step."""

    def __init__(self):
        self.after_step, self.evaluated, self.rates = {}, {}, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.after_step[state.global_step] = weights(kwargs["model"])
        self.rates[state.global_step] = kwargs["lr_scheduler"].get_last_lr()[0]

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.evaluated[state.global_step] = (metrics.get("eval_loss"), weights(kwargs["model"]))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def plain_run(output_dir, *, callback=None, model=None, more_callbacks=(), train=True, **more):
    """A stock Trainer with the plain callback (or none); returns trainer and recorder."""
    recorder = Recorder()
    callbacks = [c for c in (callback, recorder, *more_callbacks) if c is not None]
    trainer = Trainer(
        model if model is not None else bert(),
        arguments(output_dir, **more),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=callbacks,
    )
    if train:
        trainer.train()
    return trainer, recorder


def reset_run(output_dir, *, model=None, train=True, callbacks=(), resume=None, **more):
    """A ResetTrainer configured by its arguments."""
    recorder = Recorder()
    trainer = ResetTrainer(
        model if model is not None else bert(),
        arguments(output_dir, ResetTrainingArguments, **more),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=[recorder, *callbacks],
    )
    if train:
        trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def callback(**fields) -> StochasticResetCallback:
    return StochasticResetCallback(**{"probability": 0.5, "patience": 0, **fields})


def steps_of(events, kind: str) -> list[int]:
    return [event["step"] for event in events if event["kind"] == kind]
