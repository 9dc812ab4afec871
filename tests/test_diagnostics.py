"""The label-memory callback: it counts rightly, on a fixed sample, and changes nothing of the training."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from hf_reset.corpora import train_tokenizer
from hf_reset.diagnostics import LabelMemoryCallback
from hf_reset.diagnostics.modes import evaluation_mode
from hf_reset.errors import ConfigError, DataError
from hf_reset.metrics import label_memory
from hf_reset.noise import corrupt_labels


def noisy_rows() -> Dataset:
    return corrupt_labels(tiny.TRAIN, rate=0.5, kind="symmetric", seed=0, column="labels")


NOISY = noisy_rows()


def run(output_dir, *callbacks, model=None, **more):
    trainer = Trainer(
        model or tiny.bert(dropout=0.3),
        tiny.arguments(output_dir, **{"eval_strategy": "no", **more}),
        train_dataset=NOISY,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def records(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "memory/wrong" in entry]


def test_training_is_bit_identical_with_and_without(tmp_path):
    plain = run(tmp_path)
    watched = run(tmp_path, LabelMemoryCallback(NOISY, every=1, sample=20, batch_size=7))
    assert tiny.equal(tiny.weights(plain.model), tiny.weights(watched.model))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, watched)]
    assert losses[0] == losses[1]
    # and dropout was on: another seed draws other masks
    other = run(tmp_path, data_seed=7, seed=8)
    assert not tiny.equal(tiny.weights(plain.model), tiny.weights(other.model))


def test_columns_are_those_of_the_model_inside_a_wrapper():
    """A wrapper's forward takes anything: under FSDP1 the Trainer hands the wrapped model to callbacks."""
    from hf_reset.diagnostics.label_memory import accepted_columns

    columns = ["input_ids", "attention_mask", "labels", "clean_label"]
    assert accepted_columns(torch.nn.DataParallel(tiny.bert()), columns) == ["input_ids", "attention_mask"]


class Asks(TrainerCallback):
    """Measures by itself, with the model as it stands after the step."""

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        wrong = NOISY.filter(lambda row: row["is_mislabelled"]).with_format("torch")
        model.eval()
        with torch.no_grad():
            logits = model(wrong["input_ids"][:], attention_mask=wrong["attention_mask"][:]).logits
        model.train()
        self.found.append(label_memory(logits.argmax(-1), wrong["labels"][:], wrong["clean_label"][:]))


def test_shares_are_those_of_all_mislabelled_rows_where_the_sample_holds_them(tmp_path):
    asks = Asks()
    trainer = run(tmp_path, LabelMemoryCallback(NOISY, every=3, sample=1000, batch_size=5), asks)
    assert [entry["step"] for entry in records(trainer)] == [3, 6, 9, 12, 15]
    for entry in records(trainer):
        expected = asks.found[entry["step"] - 1]
        assert {name: entry[name] for name in expected} == expected
        assert entry["epoch"] == pytest.approx(entry["step"] / 8)
        assert sum(expected.values()) == pytest.approx(1)


def test_memory_rises_while_the_rows_are_learnt_by_heart(tmp_path):
    model = tiny.bert(dropout=0.0)
    trainer = run(tmp_path, LabelMemoryCallback(NOISY, every=20), model=model, max_steps=200, logging_steps=500)
    wrong = [entry["memory/wrong"] for entry in records(trainer)]
    assert wrong[-1] > 0.9 > wrong[0]


def test_the_sample_is_fixed_by_its_seed_and_holds_mislabelled_rows_only():
    first, again, other = (LabelMemoryCallback(NOISY, sample=10, seed=s).rows["input_ids"][:] for s in (0, 0, 1))
    assert len(first) == 10
    assert first == again != other
    assert all(LabelMemoryCallback(NOISY, sample=10).rows["is_mislabelled"])


def test_each_module_keeps_its_mode_and_generators_their_state(tmp_path):
    callback = LabelMemoryCallback(NOISY, data_collator=drawing_collator)
    model = tiny.bert()
    model.train()
    model.bert.embeddings.eval()
    trainer = Trainer(model, tiny.arguments(tmp_path, eval_strategy="no"), train_dataset=NOISY)
    trainer.state.global_step = 50
    modes = [module.training for module in model.modules()]
    states = generators()
    for event in (callback.on_train_begin, callback.on_step_end):
        event(trainer.args, trainer.state, trainer.control, model=model, processing_class=None)
    assert [module.training for module in model.modules()] == modes
    assert generators() == states
    assert trainer.state.log_history[-1]["step"] == 50


def drawing_collator(rows):
    random.random(), np.random.rand(), torch.rand(1)
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def generators() -> list[object]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_rows_of_several_lengths_are_padded_with_the_trainers_tokenizer(tmp_path):
    texts = [" ".join("abcdefg"[: 1 + i % 7]) for i in range(40)]
    tokenizer = train_tokenizer(texts, vocab_size=20)
    data = corrupt_labels(Dataset.from_dict({"text": texts, "label": [0, 1] * 20}), rate=0.5, kind="pair", seed=0)
    data = data.map(lambda batch: tokenizer(batch["text"]), batched=True)
    trainer = Trainer(
        tiny.bert(),
        tiny.arguments(tmp_path, eval_strategy="no", max_steps=4),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[LabelMemoryCallback(data, every=2, batch_size=6)],
    )
    trainer.train()
    assert [entry["step"] for entry in records(trainer)] == [2, 4]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_adapters_are_watched_too(tmp_path):
    model = get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    assert len(records(run(tmp_path, LabelMemoryCallback(NOISY, every=5), model=model))) == 3


def test_the_history_survives_a_checkpoint(tmp_path):
    options = {"lr_scheduler_type": "constant", "save_steps": 6, "eval_strategy": "no"}
    run(tmp_path, LabelMemoryCallback(NOISY, every=2), save_strategy="steps", max_steps=6, **options)
    resumed = Trainer(
        tiny.bert(dropout=0.3),
        tiny.arguments(tmp_path, max_steps=10, **options),
        train_dataset=NOISY,
        callbacks=[LabelMemoryCallback(NOISY, every=2)],
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    whole = run(tmp_path / "whole", LabelMemoryCallback(NOISY, every=2), max_steps=10, **options)
    assert [e["step"] for e in records(resumed)] == [2, 4, 6, 8, 10]
    assert records(resumed) == records(whole)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: tiny.TRAIN,
            {},
            "lacks the column clean_label, is_mislabelled; it has input_ids, .*labels.*corrupt_labels",
        ),
        (lambda: NOISY.remove_columns("labels"), {}, "lacks the column labels"),
        (lambda: corrupt_labels(tiny.TRAIN, rate=0, column="labels"), {}, "None of the 64 rows.* is mislabelled"),
        (noisy_rows, {"every": 0}, "`every` must be at least 1, got 0"),
        (noisy_rows, {"sample": 0}, "`sample` must be at least 1, got 0"),
        (noisy_rows, {"batch_size": -1}, "`batch_size` must be at least 1, got -1"),
    ],
)
def test_what_is_refused(make, options, message):
    with pytest.raises((ConfigError, DataError), match=message):
        LabelMemoryCallback(make(), **options)


def test_rows_that_were_not_tokenized_are_refused_when_training_begins(tmp_path):
    data = NOISY.remove_columns(["input_ids", "attention_mask"])
    with pytest.raises(DataError, match=r"no column that the model takes: it has labels, .*the model takes input"):
        run(tmp_path, LabelMemoryCallback(data))


@pytest.mark.parametrize("fails", [False, True])
def test_a_frozen_part_in_evaluation_mode_stays_there_after_a_look(fails):
    model = tiny.bert().train()
    model.bert.embeddings.eval()
    before = [module.training for module in model.modules()]
    assert True in before
    assert False in before
    with contextlib.suppress(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        if fails:
            raise RuntimeError
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
