"""Validation rows of language models, and resets that begin on their evidence."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_reset import ResetTrainer, ResetTrainingArguments
from hf_reset.training.response_rows import ResponseRows

WORDS, LENGTH, ROWS = 32, 8, 21


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes))


def texts(rows=ROWS, seed=0):
    """Random words: what is learnt of some says nothing of others, and validation soon turns. Row 3 has no response."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, WORDS, (rows, LENGTH))
    labels = ids.copy()
    for row, scored_from in enumerate(rng.integers(1, LENGTH - 1, rows)):
        labels[row, : LENGTH if row == 3 else scored_from] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def trainer_of(folder, *, cls=ResetTrainer, **more):
    settings = {"eval_steps": 5, "max_steps": 60, "learning_rate": 3e-2, "lr_scheduler_type": "constant", **more}
    return cls(
        llama(),
        tiny.arguments(folder, ResetTrainingArguments, **settings),
        train_dataset=texts(40, seed=1),
        eval_dataset=texts(),
    )


def rows_of(trainer, **more):
    trainer.response_rows, trainer.numbers_eval_rows = ResponseRows(), True
    trainer.predict(trainer.eval_dataset, **more)
    return trainer.response_rows.take_rows()


def test_each_rows_loss_is_its_share_of_the_loss_a_token(tmp_path):
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=ROWS)
    losses, baseline = rows_of(trainer)
    assert losses.shape == baseline.shape == (ROWS,)
    assert np.isnan(baseline).all()
    assert np.flatnonzero(np.isnan(losses)).tolist() == [3]
    assert np.nanmean(losses) == pytest.approx(trainer.predict(trainer.eval_dataset).metrics["test_loss"], rel=1e-5)
    data = trainer.eval_dataset.with_format("torch")
    tokens = [(row["labels"] != -100).sum().item() for row in data]
    unit = np.mean([count for count in tokens if count])
    for row in (0, 5, ROWS - 1):
        alone = trainer.model(input_ids=data[row]["input_ids"][None], labels=data[row]["labels"][None]).loss
        assert losses[row] == pytest.approx(alone.item() * tokens[row] / unit, rel=1e-4)


def test_batches_make_no_difference_and_nothing_is_left_over(tmp_path):
    whole, _ = rows_of(trainer_of(tmp_path, per_device_eval_batch_size=ROWS))
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=4)
    losses, _ = rows_of(trainer)
    np.testing.assert_allclose(losses, whole, rtol=1e-5)
    assert trainer.response_rows.take_rows() is None
    trainer.predict(trainer.eval_dataset)  # whose rows nobody takes
    trainer.predict(texts(5))
    assert len(trainer.response_rows.take_rows()[0]) == 5


def test_resets_of_a_language_model_begin_on_the_evidence_of_its_rows(tmp_path):
    """Far sooner than the eight evaluations that a sequence of values takes to say anything."""
    trainer = trainer_of(tmp_path, reset_probability=0.3)
    trainer.train()
    state = trainer.reset_callback.reset_state
    assert state.armed_step is not None
    assert state.armed_step < 8 * 5
    assert state.armed_margin >= 2
    assert state.learned is None
    assert state.resets > 0


def test_what_is_evaluated_does_not_change(tmp_path):
    """Collecting rows leaves each figure as it is, bit for bit, and is left out where patience asks for no evidence."""

    def losses(trainer):
        trainer.train()
        return [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]

    class Seen(ResetTrainer):
        def _get_dataloader(self, *args, **kwargs):
            self.numbered = self.numbers_eval_rows
            return super()._get_dataloader(*args, **kwargs)

    evidence = trainer_of(tmp_path / "evidence", cls=Seen, reset_probability=1e-9)
    patience = trainer_of(tmp_path / "patience", cls=Seen, reset_probability=1e-9, reset_patience=90)
    assert losses(evidence) == losses(patience)
    assert evidence.numbered
    assert not patience.numbered
    assert patience.response_rows is None


def test_another_metric_is_judged_by_its_own_values(tmp_path):
    def count(prediction):
        return {"score": 1.0}

    trainer = trainer_of(tmp_path, reset_metric="eval_score", reset_greater_is_better=True, max_steps=5)
    trainer.compute_metrics = count
    trainer.train()
    assert trainer.response_rows is None
