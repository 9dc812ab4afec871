"""Row numbers: each example of a batch is the row that its number says, and the batches are those of a plain run."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import Trainer, default_data_collator

from hf_reset.errors import DataError, UnsupportedError
from hf_reset.rows.identity import ROW_KEY, NumberedRows, NumberingCollator, pop_rows, why_unnumbered
from hf_reset.training.rows import NumberedBatchesMixin

ROWS = 23


def table(n=ROWS) -> Dataset:
    """Rows whose tokens say which row they are, of different lengths, with a column that no model takes."""
    return Dataset.from_dict(
        {
            "text": [f"row {i}" for i in range(n)],
            "input_ids": [[i + 1] * (2 + 5 * i % 7) for i in range(n)],
            "attention_mask": [[1] * (2 + 5 * i % 7) for i in range(n)],
            "labels": [i % tiny.CLASSES for i in range(n)],
        }
    )


def pad(examples):
    """A collator of the user's own: it knows nothing of rows."""
    width = max(len(example["input_ids"]) for example in examples)
    keys = ("input_ids", "attention_mask")
    batch = {key: torch.tensor([e[key] + [0] * (width - len(e[key])) for e in examples]) for key in keys}
    assert all(ROW_KEY not in example for example in examples)
    return {**batch, "labels": torch.tensor([example["labels"] for example in examples])}


class Watched(Trainer):
    """Records each batch that the model is given, and the row numbers beside it where there are any."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_seen, self.eval_seen = [], []

    def compute_loss(self, model, inputs, *args, **kwargs):
        assert ROW_KEY not in inputs
        rows = getattr(self, "batch_rows", None)
        seen = self.train_seen if model.training else self.eval_seen
        seen.append((rows, {key: value.clone() for key, value in inputs.items()}))
        return super().compute_loss(model, inputs, *args, **kwargs)


class Numbered(NumberedBatchesMixin, Watched):
    """Always numbers its rows."""

    numbers_eval_rows = True

    def wants_rows(self, args):
        return True


def run(folder, cls, data, *, resume=None, collator=pad, **more):
    settings = {"eval_strategy": "no", "max_steps": 9, "per_device_train_batch_size": 4, **more}
    trainer = cls(
        tiny.bert(),
        tiny.arguments(folder, **settings),
        train_dataset=data,
        eval_dataset=table(7),
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def numbers_are_right(seen):
    return all(torch.equal(rows + 1, inputs["input_ids"][:, 0].cpu()) for rows, inputs in seen)


def same_batches(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for (_, a), (_, b) in zip(one, other, strict=True)
    )


class Rows(torch.utils.data.Dataset):
    """A torch data set, with a method that a loader looks for."""

    def __init__(self):
        self.table, self.epochs = table(), []

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        return self.table[index]

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


SOURCES = {
    "datasets": table,
    "torch": Rows,
    "list": lambda: list(table()),
    "subset": lambda: Subset(table(ROWS), range(ROWS)),
}


SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 5},
    "workers": {"dataloader_num_workers": 2, "max_steps": 7},
    "by_length": {"train_sampling_strategy": "group_by_length", "dataloader_drop_last": True},
    "all_columns": {"remove_unused_columns": False},
}


@pytest.mark.parametrize(
    ("source", "settings"),
    [("datasets", name) for name in SETTINGS]
    + [("list", "plain"), ("list", "by_length"), ("torch", "workers"), ("subset", "plain")],
)
def test_numbers_are_right_and_batches_are_those_of_a_plain_run(tmp_path, source, settings):
    ours, plain = (run(tmp_path, cls, SOURCES[source](), **SETTINGS[settings]) for cls in (Numbered, Watched))
    assert numbers_are_right(ours.train_seen)
    assert same_batches(ours.train_seen, plain.train_seen)
    assert tiny.equal(tiny.weights(ours.model), tiny.weights(plain.model))
    logs = [[(h["loss"], h["grad_norm"]) for h in t.state.log_history if "grad_norm" in h] for t in (ours, plain)]
    assert logs[0] == logs[1] != []


def test_random_states_are_those_of_a_plain_run(tmp_path):
    states = []
    for cls in (Numbered, Watched):
        run(tmp_path, cls, table())
        states.append((torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1:] == states[1][1:]


def test_every_row_is_met_once_an_epoch(tmp_path):
    seen = run(tmp_path, Numbered, table(), max_steps=12).train_seen  # two epochs of six batches
    for epoch in (seen[:6], seen[6:]):
        assert sorted(torch.cat([rows for rows, _ in epoch]).tolist()) == list(range(ROWS))


def test_batches_skipped_at_a_resume(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = run(tmp_path, Numbered, table(), **saving)
    resumed = run(tmp_path, Numbered, table(), resume=str(tmp_path / "checkpoint-4"), **saving)
    assert numbers_are_right(resumed.train_seen)
    assert same_batches(resumed.train_seen, whole.train_seen[4:])
    rows, again = ([r.tolist() for r, _ in seen] for seen in (whole.train_seen[4:], resumed.train_seen))
    assert rows == again


def test_evaluation_rows_are_numbered_too(tmp_path):
    trainer = run(tmp_path, Numbered, table(), max_steps=4, eval_strategy="steps", eval_steps=2)
    assert torch.cat([rows for rows, _ in trainer.eval_seen]).tolist() == 2 * list(range(7))
    assert numbers_are_right(trainer.eval_seen)


def test_collator_of_transformers(tmp_path):
    even = table().map(lambda row: {"input_ids": row["input_ids"][:2], "attention_mask": [1, 1]})
    assert numbers_are_right(run(tmp_path, Numbered, even, collator=default_data_collator).train_seen)


def test_the_users_collator_and_data_set_stay_in_place(tmp_path):
    data, other = Rows(), Rows()
    trainer, _ = run(tmp_path, Numbered, data), run(tmp_path, Watched, other)
    assert trainer.data_collator is pad
    assert trainer.train_dataset is data
    assert set(data.epochs) == {0, 1}  # the loader's view passes on what the loader asks for
    assert data.epochs == other.epochs


def test_a_view_fetches_batches_as_the_data_set_can():
    fetched = []

    class Fast(Rows):
        def __getitems__(self, indices):
            fetched.append(list(indices))
            return [self.table[index] for index in indices]

    loader = DataLoader(NumberedRows(Fast()), batch_size=4, collate_fn=NumberingCollator(pad))
    batch = next(iter(loader))
    assert fetched == [[0, 1, 2, 3]]
    assert pop_rows(batch).tolist() == [0, 1, 2, 3]
    assert ROW_KEY not in batch
    assert pop_rows(batch) is None


def test_a_view_numbers_by_what_it_is_told_and_pickles():
    view = pickle.loads(pickle.dumps(NumberedRows(list("abc"), np.array([7, 5, 6]))))
    assert [view[index] for index in (0, 2, -1)] == [(7, "a"), (6, "c"), (6, "c")]
    with pytest.raises(AttributeError):
        _ = view.column_names
    with pytest.raises(DataError, match=r"must number each of 3 rows, got 2"):
        NumberedRows(list("abc"), [1, 2])


def test_batches_that_cannot_hold_numbers_are_refused():
    items = [NumberedRows([1, 2])[0]]
    with pytest.raises(UnsupportedError, match=r"batches that are mappings, and the collator made a list"):
        NumberingCollator(lambda examples: examples)(items)
    with pytest.raises(DataError, match=r"'reset_row' is where a batch holds its row numbers"):
        NumberingCollator(lambda examples: {ROW_KEY: 1})(items)


class Stream(IterableDataset):
    def __iter__(self):
        yield from table()


def test_what_has_no_rows_is_said_and_trains_as_before(tmp_path):
    ours, plain = (run(tmp_path, cls, Stream(), max_steps=4) for cls in (Numbered, Watched))
    assert "is a Stream, which is streamed" in ours.why_unnumbered()
    assert all(rows is None for rows, _ in ours.train_seen)
    assert same_batches(ours.train_seen, plain.train_seen)


def test_reasons_in_words():
    from transformers import DataCollatorWithFlattening
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    class Packed:
        packing = True

    assert why_unnumbered(table(), pad, None) is None
    assert "several rows into one sequence" in why_unnumbered(table(), pad, Packed())
    for collator in (DataCollatorWithFlattening(), DataCollatorForLanguageModeling(0, padding_free=True)):
        assert "padding-free" in why_unnumbered(table(), collator, None)
    assert why_unnumbered(table(), DataCollatorForLanguageModeling(0), None) is None
    assert "no training set" in why_unnumbered(None, pad, None)


# TRL's data path.

QUESTIONS = [f"What is {row} plus one?" for row in range(ROWS)]
ANSWERS = [f"Take {row}. It is {row + 1}." for row in range(ROWS)]


@pytest.fixture(scope="module")
def tokenizer():
    from hf_reset.corpora import train_tokenizer

    return train_tokenizer([*QUESTIONS, *ANSWERS], 400, "bpe")


def sft_run(folder, mixin, tokenizer, *, questions=QUESTIONS, **more):
    """Six steps of TRL's own trainer on prompts and completions; what the model was given, in order."""
    trl = pytest.importorskip("trl")
    from transformers import LlamaConfig, LlamaForCausalLM

    class Watching(*((NumberedBatchesMixin,) if mixin else ()), trl.SFTTrainer):
        seen: list = []  # noqa: RUF012

        def wants_rows(self, args):
            return True

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.seen.append((getattr(self, "batch_rows", None), inputs["input_ids"].clone()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"bf16": False, "max_length": 64, "eval_strategy": "no", "max_steps": 6, **more}
    trainer = Watching(
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)),
        tiny.arguments(folder, trl.SFTConfig, **settings),
        train_dataset=Dataset.from_dict({"prompt": questions, "completion": ANSWERS}),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("shuffle", [False, True])
def test_sft_rows_are_those_given_even_shuffled(tmp_path, tokenizer, shuffle):
    ours, plain = (sft_run(tmp_path, mixin, tokenizer, shuffle_dataset=shuffle) for mixin in (True, False))
    assert len(ours.seen) == len(plain.seen) == 6
    for (rows, tokens), (_, expected) in zip(ours.seen, plain.seen, strict=True):
        assert torch.equal(tokens, expected)
        for row, text in zip(rows.tolist(), tokenizer.batch_decode(tokens), strict=True):
            assert f"Take {row}. It is {row + 1}." in text
    assert ours.num_train_rows == ROWS


def test_sft_rows_that_preparation_drops_leave_the_others_their_numbers(tmp_path, tokenizer):
    long = [4 * question if row in (0, 7) else question for row, question in enumerate(QUESTIONS)]
    trainer = sft_run(tmp_path, True, tokenizer, questions=long, max_length=12)  # no room for their responses
    assert len(trainer.train_dataset) == ROWS - 2
    assert trainer.num_train_rows == ROWS
    seen = [
        (row, text)
        for rows, tokens in trainer.seen
        for row, text in zip(rows.tolist(), tokenizer.batch_decode(tokens), strict=True)
    ]
    assert all(f"What is {row} plus one?" in text for row, text in seen)
    assert {row for row, _ in seen} == set(range(ROWS)) - {0, 7}


def test_sft_packing_has_no_rows_and_trains(tmp_path, tokenizer):
    trainer = sft_run(tmp_path, True, tokenizer, packing=True, packing_strategy="wrapped", max_steps=2)
    assert "several rows into one sequence" in trainer.why_unnumbered()
    assert all(rows is None for rows, _ in trainer.seen)
