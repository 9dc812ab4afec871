"""The row memory of a ResetTrainer: what it holds, that it costs the run nothing, resumes exactly, and refuses."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset
from transformers import BertConfig, BertForTokenClassification

from hf_reset import ResetTrainer, ResetTrainingArguments
from hf_reset.errors import AnchorFileError, DataError, UnsupportedError
from hf_reset.training.memory import FILE_NAME, is_classifier

RESETS = {"reset_probability": 0.3, "reset_patience": 0}
PLAIN = {"reset_probability": 0.0, "reset_finish": "last"}


def run(folder, *, cls=ResetTrainer, train=tiny.TRAIN, model=None, resume=None, **more):
    trainer = cls(
        model if model is not None else tiny.bert(),
        tiny.arguments(folder, ResetTrainingArguments, **more),
        train_dataset=train,
        eval_dataset=tiny.VALIDATION,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Heard(ResetTrainer):
    """Listens to the model's own forward, apart from the memory."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.heard = []
        self.model.register_forward_hook(self._hear, with_kwargs=True)

    def _hear(self, model, args, kwargs, output):
        if model.training:
            self.heard.append((self.batch_rows.clone(), output.logits.detach().clone()))


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name].nan_to_num(-1), other[name].nan_to_num(-1)) for name in one
    )


def test_it_holds_what_the_training_forward_said(tmp_path):
    trainer = run(tmp_path, cls=Heard, max_steps=20, gradient_accumulation_steps=2, **RESETS)
    memory = trainer.row_memory
    labels = torch.tensor(tiny.TRAIN["labels"])
    probabilities, visits = torch.zeros(64, tiny.CLASSES), torch.zeros(64, dtype=torch.int32)
    losses, wrong = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    for rows, logits in trainer.heard:
        for row, p in zip(rows.tolist(), logits.softmax(-1), strict=True):
            probabilities[row] += p
            visits[row] += 1
            losses[row] -= p[labels[row]].log()
            wrong[row] += p.argmax() != labels[row]
    skipped = sum(event["kind"] == "reset" for event in trainer.reset_callback.events)
    assert skipped >= 3
    assert int(visits.sum()) == (20 - skipped) * 16  # a discarded step has no forward, and none is made for it
    assert torch.equal(memory.visits, visits)
    assert torch.equal(memory.wrong_events, wrong)
    torch.testing.assert_close(memory.probabilities, probabilities / visits[:, None])
    torch.testing.assert_close(memory.total.mean("loss"), losses / visits)
    assert torch.equal(memory.labels.long(), labels)
    assert memory.log.excursion == skipped


def test_with_no_resets_and_no_refinement_it_is_the_plain_trainer(tmp_path):
    states, logs, ends = [], [], []
    for name in ("plain", "remembering"):
        torch.manual_seed(3)
        if name == "plain":
            trainer, _ = tiny.plain_run(tmp_path / name, save_strategy="steps", save_steps=5)
        else:
            trainer = run(tmp_path / name, save_strategy="steps", save_steps=5, **PLAIN)
            assert int(trainer.row_memory.visits.sum()) == 15 * 8
        states.append((torch.get_rng_state(), np.random.get_state()[1].tolist()))
        logs.append(
            [
                {k: v for k, v in h.items() if k in ("loss", "grad_norm", "eval_loss", "learning_rate", "step")}
                for h in trainer.state.log_history
            ]
        )
        ends.append(tiny.weights(trainer.model))
    assert tiny.equal(*ends)
    logs[1] = [h for h in logs[1] if len(h) > 1]
    assert [h for h in logs[0] if len(h) > 1] == logs[1]
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_turned_off_there_is_no_view_and_no_file(tmp_path):
    trainer = run(tmp_path, reset_row_memory=False, save_strategy="steps", save_steps=15, **PLAIN)
    assert trainer.row_memory is None
    assert isinstance(trainer.get_train_dataloader().dataset, Dataset)
    assert not (tmp_path / "checkpoint-15" / FILE_NAME).exists()
    with pytest.raises(DataError, match=r"There are no suspects: `reset_row_memory=False` turned the row memory off\."):
        trainer.suspects()


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulation"])
def test_resume_is_exact(tmp_path, more):
    """64 rows in steps of 8: step 6 is amid an epoch, with visits since the evaluation at step 4."""
    settings = {"save_strategy": "steps", "save_steps": 6, "eval_steps": 4, **RESETS, **more}
    whole = run(tmp_path, **settings)
    state = whole.row_memory.state_dict()
    for step in (6, 12):
        again = run(tmp_path / "again", resume=str(tmp_path / f"checkpoint-{step}"), **settings)
        assert same(again.row_memory.state_dict(), state)
        assert tiny.equal(tiny.weights(again.model), tiny.weights(whole.model))
        assert again.suspects().equals(whole.suspects())
    other = run(tmp_path / "other", **settings | {"reset_seed": 5})
    assert not same(other.row_memory.state_dict(), state)


def planted(n=240, wrong=0.3, seed=5):
    """Rows whose every token tells the class; a share of the labels is another class."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(tiny.CLASSES, (n,), generator=generator)
    tokens = 1 + clean[:, None] + tiny.CLASSES * torch.randint(15, (n, 8), generator=generator)
    is_wrong = torch.rand(n, generator=generator) < wrong
    given = torch.where(is_wrong, (clean + 1 + torch.randint(2, (n,), generator=generator)) % tiny.CLASSES, clean)
    columns = {"input_ids": tokens.tolist(), "attention_mask": [[1] * 8] * n, "labels": given.tolist()}
    return Dataset.from_dict(columns), is_wrong.numpy()


def test_suspects_are_the_planted_wrong_labels(tmp_path):
    data, is_wrong = planted()
    trainer = run(tmp_path, train=data, max_steps=150, eval_strategy="no", logging_steps=50, **PLAIN)
    table = trainer.suspects()
    assert list(table.index) == list(range(240))
    quality = table["label_quality"].to_numpy()
    # AUROC as the chance that a wrong label looks worse than a right one.
    auroc = (quality[is_wrong][:, None] < quality[~is_wrong][None, :]).mean()
    assert auroc > 0.9
    assert table["in_training"].all()
    assert (table["visits"] == 5).all()
    assert (table["given_label"].to_numpy() == np.array(data["labels"])).all()
    worst = trainer.suspects(budget=20)
    assert worst["is_label_issue"].sum() == 20
    assert is_wrong[worst["is_label_issue"].to_numpy()].mean() > 0.9


def test_suspects_before_all_rows_were_visited(tmp_path):
    table = run(tmp_path, max_steps=5, eval_strategy="no", **PLAIN).suspects()
    assert table["in_training"].sum() == 40
    assert not table["is_label_issue"][~table["in_training"]].any()
    assert table["label_quality"].notna().sum() == 40


def token_classifier():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForTokenClassification(BertConfig(vocab_size=50, num_labels=tiny.CLASSES, **sizes))


def test_what_has_a_class_a_row():
    assert is_classifier(tiny.bert())
    assert not is_classifier(tiny.bert(num_labels=1))
    assert not is_classifier(tiny.bert(problem_type="multi_label_classification"))
    assert not is_classifier(token_classifier())


def relabelled(labels):
    return tiny.TRAIN.remove_columns("labels").add_column("labels", labels)


REGRESSION = relabelled([0.5] * 64)
MULTI_LABEL = relabelled([[1.0, 0.0, 1.0]] * 64)


class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield from tiny.TRAIN


CANNOT = {
    "regression": (
        lambda: {"model": tiny.bert(num_labels=1), "train": REGRESSION},
        "no classifier with one label a row",
    ),
    "multi-label": (lambda: {"train": MULTI_LABEL}, r"regression and multi-label have none\), and these are \(8, 3\)"),
    "stream": (lambda: {"train": Stream()}, "is a Stream, which is streamed"),
}


def test_a_head_of_another_width_than_the_models_config_says(tmp_path):
    model = tiny.bert()
    model.config.num_labels = 5  # model.num_labels, by which its own loss goes, stays 3
    settings = {"model": model, "max_steps": 2, "eval_strategy": "no", **PLAIN}
    with pytest.raises(DataError, match=r"the model gave logits \(8, 3\) where \(rows, classes\) \(8, 5\) are needed"):
        run(tmp_path, **settings).suspects()


def test_sequence_parallelism_has_no_rows(tmp_path):
    trainer = run(tmp_path, max_steps=1, eval_strategy="no", **PLAIN)
    trainer.accelerator.state.parallelism_config = type("Config", (), {"sp_enabled": True, "cp_enabled": False})()
    try:
        assert "sequences are dealt out" in trainer.why_unnumbered()
    finally:
        trainer.accelerator.state.parallelism_config = None


@pytest.mark.parametrize(("made", "words"), CANNOT.values(), ids=CANNOT.keys())
def test_what_has_no_rows_or_classes_trains_as_before_and_is_refused_where_asked_for(tmp_path, made, words):
    settings = {"max_steps": 2, "eval_strategy": "no", "eval_on_start": False, **PLAIN}
    trainer = run(tmp_path, **made(), **settings)
    assert trainer.state.global_step == 2
    assert trainer.row_memory is None
    with pytest.raises(DataError, match=words):
        trainer.suspects()
    with pytest.raises(UnsupportedError, match=r"`reset_row_memory=True`.*" + words):
        run(tmp_path, **made(), **settings, reset_row_memory=True)


def test_a_memory_over_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_reset.training.memory.MAX_BYTES", 1000)
    settings = {"max_steps": 2, "eval_strategy": "no", **PLAIN}
    with pytest.raises(DataError, match=r"takes 4864 bytes at least, more than `max_bytes` 1000"):
        run(tmp_path, **settings).suspects()
    with pytest.raises(UnsupportedError, match=r"`reset_row_memory=True` needs .*takes 4864 bytes at least"):
        run(tmp_path, **settings, reset_row_memory=True)


def test_more_classes_than_rows(tmp_path):
    trainer = run(tmp_path, model=tiny.bert(num_labels=100), max_steps=8, eval_strategy="no", **PLAIN)
    with pytest.raises(DataError, match=r"more classes than rows"):
        trainer.suspects()


def test_a_data_set_whose_length_changed_is_refused_at_a_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, **RESETS}
    run(tmp_path, max_steps=3, **settings)
    checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(DataError, match=r"had 64 training rows, and this training set has 60"):
        run(tmp_path, train=tiny.TRAIN.select(range(60)), resume=checkpoint, **settings)


def test_labels_that_changed_are_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, **RESETS}
    run(tmp_path, max_steps=8, **settings)
    moved = relabelled([(label + 1) % tiny.CLASSES for label in tiny.TRAIN["labels"]])
    again = {"train": moved, "resume": str(tmp_path / "checkpoint-6"), **settings}
    words = r"row numbers must mean the same row throughout a run"
    with pytest.raises(DataError, match=words):
        run(tmp_path, reset_row_memory=True, **again)
    trainer = run(tmp_path, **again)  # which asked for nothing that needs rows
    with pytest.raises(DataError, match=r"There are no suspects: .*" + words):
        trainer.suspects()


def test_a_checkpoint_without_memory(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 8}
    tiny.plain_run(tmp_path, **settings)
    checkpoint = str(tmp_path / "checkpoint-8")
    with caplog.at_level(logging.WARNING):
        trainer = run(tmp_path / "on", resume=checkpoint, **settings, **PLAIN)
    assert "the row memory begins with this resume" in caplog.text
    assert int(trainer.row_memory.visits.sum()) == 7 * 8
    with pytest.raises(AnchorFileError, match=r"`reset_row_memory=True` goes on from what the run remembered"):
        run(tmp_path / "on", resume=checkpoint, **settings, **PLAIN, reset_row_memory=True)


def test_a_second_training_begins_a_new_memory(tmp_path):
    trainer = run(tmp_path, max_steps=4, eval_strategy="no", **PLAIN)
    first = copy.copy(trainer.row_memory)
    trainer.train()
    assert trainer.row_memory is not first
    assert int(trainer.row_memory.visits.sum()) == 4 * 8


def test_a_checkpoint_of_another_number_of_classes_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, **RESETS}
    run(tmp_path, max_steps=3, **settings)
    file = tmp_path / "checkpoint-3" / FILE_NAME
    state = load_file(file)
    save_file(state | {"memory.classes": torch.zeros(64, 4)}, file, {"rows": "64"})
    with pytest.raises(DataError, match=r"has \(64, 4\) of 'classes', and this training set needs \(64, 3\)"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-3"), **settings)
