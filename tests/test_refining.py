"""Losses of rows in a ResetTrainer: ELR with a memory that lives, weights, and refined targets."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_row_memory_trainer import CANNOT, RESETS, planted, same

from hf_reset import ResetTrainer, ResetTrainingArguments
from hf_reset.errors import ConfigError, DataError, UnsupportedError
from hf_reset.rows.refinement import RefinementConfig
from hf_reset.training.responses import _behind

# Validation rows are few here, and it says so.
pytestmark = pytest.mark.filterwarnings("ignore::hf_reset.errors.WeakEvidenceWarning")

PLAIN = {"reset_probability": 0.0, "reset_finish": "last"}
ELR = {"reset_loss": "elr", "reset_loss_options": '{"weight": 2.0, "momentum": 0.6}'}


class Heard(ResetTrainer):
    """Keeps each training batch: rows, logits, labels, and the loss that was made of them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.heard, self.refinements = [], []

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs["labels"].clone()
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        if model.training:
            rows = None if self.batch_rows is None else self.batch_rows.clone()
            self.refinements.append(self.refinement)
            self.heard.append((rows, outputs.logits.detach().clone(), labels, loss.detach().clone()))
        return (loss, outputs) if return_outputs else loss


def run(folder, *, train=tiny.TRAIN, validation=tiny.VALIDATION, resume=None, made=None, model=None, **more):
    trainer = Heard(
        model if model is not None else tiny.bert(),
        tiny.arguments(folder, ResetTrainingArguments, **more),
        train_dataset=train,
        eval_dataset=validation,
        **(made or {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# ELR


def test_elr_has_a_target_for_each_row_that_lives_from_epoch_to_epoch(tmp_path):
    trainer = run(tmp_path, max_steps=20, **ELR, **RESETS)
    targets = torch.zeros(64, tiny.CLASSES)
    for rows, logits, labels, loss in trainer.heard:
        p = logits.softmax(-1)
        targets[rows] = 0.6 * targets[rows] + 0.4 * p
        given = F.cross_entropy(logits, labels, reduction="none")
        torch.testing.assert_close(loss, (given + 2.0 * (1 - (p * targets[rows]).sum(-1)).log()).mean())
    assert len(trainer.heard) < 20  # some steps were discarded by resets
    torch.testing.assert_close(trainer._remembering.targets, targets)
    twice = trainer.row_memory.visits >= 2
    assert (targets[twice].sum(-1) > 0.6).all()  # 1 - 0.6 after one visit, 1 - 0.36 after two
    assert twice.sum() > 10
    evaluations = [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]
    assert all(loss > 0.5 for loss in evaluations)  # rows of another set: cross-entropy alone


def test_elr_resumes_exactly(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 6, "eval_steps": 4, **ELR, **RESETS}
    whole = run(tmp_path, **settings)
    again = run(tmp_path / "again", resume=str(tmp_path / "checkpoint-6"), **settings)
    assert same(again.rows_state(), whole.rows_state())
    assert "loss.targets" in whole.rows_state()
    assert tiny.equal(tiny.weights(again.model), tiny.weights(whole.model))
    run(tmp_path / "plain", **settings | {"reset_loss": None, "reset_loss_options": None})
    with pytest.raises(DataError, match=r'had no loss that remembers rows, and `reset_loss="elr"` is one'):
        run(tmp_path / "elr", resume=str(tmp_path / "plain" / "checkpoint-6"), **settings)


@pytest.mark.parametrize(("made", "words"), CANNOT.values(), ids=CANNOT.keys())
def test_elr_is_refused_without_rows_or_classes(tmp_path, made, words):
    with pytest.raises(UnsupportedError, match=r'`reset_loss="elr"`.*' + words):
        run(tmp_path, **made(), **ELR, **PLAIN, max_steps=2, eval_strategy="no")


# Weights


def test_row_weights_scale_each_rows_loss(tmp_path):
    weights = torch.linspace(0, 2, 64)
    trainer = run(tmp_path, made={"row_weights": weights.tolist()}, max_steps=4, eval_strategy="no", **PLAIN)
    for rows, logits, labels, loss in trainer.heard:
        torch.testing.assert_close(loss, (weights[rows] * F.cross_entropy(logits, labels, reduction="none")).mean())


def test_weights_of_one_are_the_models_own_loss(tmp_path):
    ours = run(tmp_path, made={"row_weights": [1.0] * 64}, **PLAIN)
    plain, _ = tiny.plain_run(tmp_path)
    for name, p in tiny.weights(plain.model).items():
        torch.testing.assert_close(tiny.weights(ours.model)[name], p, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weights", [[1.0] * 63, [-1.0] * 64, [float("nan")] * 64])
def test_wrong_weights_are_refused(tmp_path, weights):
    with pytest.raises(DataError, match=r"`row_weights` must be one number at least 0 for each of 64 training rows"):
        run(tmp_path, made={"row_weights": weights}, max_steps=2, eval_strategy="no", **PLAIN)


# Refinement

REFINE = {
    "max_steps": 90,
    "eval_steps": 15,
    "logging_steps": 15,
    "reset_patience": 0,
    "reset_probability": 0.05,
    "reset_ema_decay": 0,
}


def refined_run(folder, mode, *, made=None, resume=None, **more):
    data, is_wrong = planted(n=120)
    settings = {**REFINE, "reset_refine": mode, **more}
    validation, _ = planted(n=60, seed=6)
    return run(folder, train=data, validation=validation, made=made, resume=resume, **settings), is_wrong


def judged(trainer):
    return [event for event in trainer.reset_callback.events if event["kind"] == "refinement"]


@pytest.mark.parametrize("mode", ["soft", "mix", "drop"])
@pytest.mark.parametrize("loss", [None, "gce"])
def test_suspects_are_trained_towards_what_the_memory_predicts(tmp_path, mode, loss):
    """Every batch's loss is worked out again from the refinement of that moment."""
    trainer, is_wrong = refined_run(tmp_path, mode, reset_loss=loss)
    assert trainer.refinement.is_active
    first = next(record for record in judged(trainer) if record["suspects"])
    assert first["step"] >= 30  # every row was seen twice
    if loss is None:  # which learns faster
        assert is_wrong[trainer.refinement.is_suspect.numpy()].mean() > is_wrong.mean() + 0.15
    touched = 0
    for step, (rows, logits, labels, made) in enumerate(trainer.heard):
        refinement = trainer.refinements[step]
        p = logits.softmax(-1)
        every = -p.log() if loss is None else (1 - p**0.7) / 0.7
        targets = F.one_hot(labels, tiny.CLASSES).float()
        weights = torch.ones(len(rows))
        if refinement is not None and refinement.is_active:
            suspect = refinement.is_suspect[rows]
            touched += int(suspect.sum())
            weights[suspect] = 0.0 if mode == "drop" else 1.0
            if mode != "drop":
                believed = refinement.targets[rows]
                torch.testing.assert_close(believed.sum(-1), torch.ones(len(rows)))
                targets[suspect] = believed[suspect]
                if mode == "mix":
                    assert (believed[suspect].gather(1, labels[suspect][:, None]) >= 0.5).all()
        torch.testing.assert_close(made, (weights * (targets * every).sum(-1)).mean(), rtol=1e-4, atol=1e-5)
    assert touched > 20


STALLS = {"reset_patience": 50, "reset_min_delta": 9.0}  # the first evaluation stays the best, and resets never begin


def test_refinement_needs_no_resets_but_can_wait_for_them(tmp_path):
    """Two evaluations without a new best have passed at step 45."""
    waiting = {"made": {"refinement": RefinementConfig(mode="soft", begin="resets")}, **STALLS}
    trainer, _ = refined_run(tmp_path / "waits", "off", **waiting)
    assert trainer.reset_callback.reset_state.armed_step is None
    assert trainer.refinement is None
    assert judged(trainer) == []
    trainer, _ = refined_run(tmp_path, "soft", **STALLS)
    assert trainer.reset_callback.reset_state.armed_step is None
    assert judged(trainer)[0]["step"] == 45
    assert trainer.refinement.is_active
    trainer, _ = refined_run(tmp_path / "improves", "soft", reset_patience=50)
    assert trainer.reset_callback.reset_state.evaluations_since_best == 0
    assert trainer.refinement is None


def test_refinement_waits_where_the_labels_seem_better_than_the_model(tmp_path):
    """With a learning rate of nothing the model stays where it began: it knows less than the labels."""
    trainer, _ = refined_run(tmp_path, "soft", **STALLS, learning_rate=1e-9)
    assert not trainer.refinement.is_active
    assert "The model seems right in" in judged(trainer)[0]["reason"] or "seen fewer" in judged(trainer)[0]["reason"]
    assert "The model seems right in" in trainer.refinement.reason


def test_without_validation_logits_refinement_waits_for_resets(tmp_path):
    trainer, _ = refined_run(tmp_path, "soft", **STALLS, prediction_loss_only=True)
    assert trainer.refinement is None


def test_nothing_is_touched_before_every_row_was_seen_twice(tmp_path):
    trainer, _ = refined_run(tmp_path, "soft", reset_patience=0, reset_probability=0.0, eval_steps=5, max_steps=30)
    first, second = judged(trainer)  # two epochs of fifteen steps
    assert (first["step"], first["suspects"], second["step"]) == (5, 0, 30)
    assert second["suspects"] > 0
    assert "rows were seen fewer than 2 times" in first["reason"]


def test_a_run_that_refines_chooses_by_the_calibrated_loss_unless_a_metric_is_named(tmp_path):
    trainer, _ = refined_run(tmp_path, "soft", max_steps=30)
    assert trainer.reset_callback.config.metric == "eval_calibrated_loss"
    losses = [record["eval_calibrated_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert trainer.reset_callback.reset_state.best == min(losses)
    trainer, _ = refined_run(tmp_path / "named", "soft", max_steps=30, reset_metric="eval_loss")
    assert trainer.reset_callback.config.metric == "eval_loss"
    trainer, _ = refined_run(tmp_path / "off", "off", max_steps=30)
    assert trainer.reset_callback.config.metric is None


def test_a_run_that_smooths_judges_by_the_mean_of_two_evaluations(tmp_path):
    trainer, _ = refined_run(tmp_path, "soft", max_steps=60, reset_smooth=True)
    moves = [event for event in trainer.reset_callback.events if event["kind"] == "anchor"]
    losses = {r["step"]: r["eval_calibrated_loss"] for r in trainer.state.log_history if "eval_calibrated_loss" in r}
    steps = sorted(losses)
    assert len(moves) > 1
    for event in moves[1:]:  # before any reset, the evaluation before is the one before
        before = losses[steps[steps.index(event["anchor_step"]) - 1]]
        assert event["judged"] == (losses[event["anchor_step"]] + before) / 2
        assert event["metric"] == losses[event["anchor_step"]]
    assert [event["judged"] for event in moves] == sorted((event["judged"] for event in moves), reverse=True)


def test_refined_resume_is_exact(tmp_path):
    """The checkpoint lies between two judgements, and amid an epoch of 15 steps."""
    settings = {"save_strategy": "steps", "save_steps": 68, "reset_loss": "elr"}
    whole, _ = refined_run(tmp_path, "soft", **settings)
    again, _ = refined_run(tmp_path / "again", "soft", resume=str(tmp_path / "checkpoint-68"), **settings)
    assert any(record["step"] < 68 and record["suspects"] for record in judged(whole))
    assert same(again.rows_state(), whole.rows_state())
    assert {"refinement.targets", "loss.targets", "memory.classes"} <= whole.rows_state().keys()
    assert tiny.equal(tiny.weights(again.model), tiny.weights(whole.model))
    assert judged(again) == judged(whole)


def test_refinement_beats_plain_training_on_clean_labels(tmp_path):
    """The share of rows, mislabelled ones among them, that the model at the end names rightly."""
    data, _ = planted(n=120)
    clean = (torch.tensor(data["input_ids"])[:, 0] - 1) % tiny.CLASSES
    accuracy = {}
    for mode in ("off", "soft"):
        trainer, _ = refined_run(tmp_path, mode, max_steps=300, reset_probability=0.0, reset_finish="last")
        predicted = trainer.predict(data).predictions.argmax(-1)
        accuracy[mode] = (torch.tensor(predicted) == clean).float().mean()
    assert accuracy["soft"] > accuracy["off"] + 0.02


def test_a_configuration_of_ones_own(tmp_path):
    config = RefinementConfig(mode="mix", mix=0.7, min_visits=1, decay=0.5)
    trainer, _ = refined_run(tmp_path, "off", made={"refinement": config})
    assert trainer.refinement_config == config
    assert trainer.row_memory.decay == 0.5
    assert trainer.refinement.is_active
    with pytest.raises(ConfigError, match=r"`reset_refine` 'soft' and `refinement` of mode 'mix' contradict"):
        refined_run(tmp_path, "soft", made={"refinement": config})


@pytest.mark.parametrize(("made", "words"), CANNOT.values(), ids=CANNOT.keys())
def test_refinement_is_refused_without_rows_or_classes(tmp_path, made, words):
    with pytest.raises(UnsupportedError, match=r'`reset_refine="soft"`.*' + words):
        run(tmp_path, **made(), **PLAIN, reset_refine="soft", max_steps=2, eval_strategy="no")


def test_other_losses_beside_are_refused(tmp_path):
    with pytest.raises(
        UnsupportedError, match=r'`compute_loss_func` and `reset_refine="soft"` would both make the loss'
    ):
        run(tmp_path, made={"compute_loss_func": lambda *a, **k: None}, reset_refine="soft")
    with pytest.raises(UnsupportedError, match=r"`label_smoothing_factor` 0.1 has no effect with `reset_loss"):
        run(tmp_path, reset_loss="elr", label_smoothing_factor=0.1)


def test_a_loader_of_ones_own_is_refused(tmp_path):
    class Own(Heard):
        def get_train_dataloader(self):
            from torch.utils.data import DataLoader

            return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=8, collate_fn=self.data_collator))

    trainer = Own(
        tiny.bert(),
        tiny.arguments(tmp_path, ResetTrainingArguments, reset_refine="soft"),
        train_dataset=tiny.TRAIN,
        eval_dataset=tiny.VALIDATION,
    )
    with pytest.raises(UnsupportedError, match=r"`get_train_dataloader` was overridden"):
        trainer.train()


# Responses

WORDS = [f"word{i}" for i in range(8)]
PROMPTS = [f"repeat {WORDS[i % 8]} now" for i in range(48)]
RESPONSES = [f"{WORDS[i % 8]} {WORDS[i % 8]}" for i in range(48)]


@pytest.fixture(scope="module")
def tokenizer():
    from hf_reset.corpora import train_tokenizer

    return train_tokenizer([*PROMPTS, *RESPONSES], 300, "bpe")


def sft_run(folder, tokenizer, refinement=None, **more):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_reset import ResetTrainerMixin
    from hf_reset.training.sft import ResetSFTConfig

    class Trainer(ResetTrainerMixin, trl.SFTTrainer):
        heard: list = []  # noqa: RUF012

        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                with torch.no_grad():
                    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
                self.heard.append((self.batch_rows, logits, inputs["labels"], self.refinement))
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if model.training:
                self.heard[-1] += (loss.detach().clone(),)
            return loss

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    data = Dataset.from_dict({"prompt": PROMPTS, "completion": RESPONSES})
    settings = {"bf16": False, "max_length": 64, "max_steps": 20, "eval_steps": 5, "reset_refine": "soft"}
    settings |= {"reset_patience": 0, "reset_probability": 0.0, "reset_finish": "last"}
    made = Trainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)),
        tiny.arguments(folder, ResetSFTConfig, **settings | more),
        train_dataset=data,
        eval_dataset=data.select(range(16)),
        processing_class=tokenizer,
        refinement=refinement,
    )
    made.heard = []
    made.start = {name: p.clone() for name, p in made.model.state_dict().items()}
    made.train()
    return made


def token_losses(logits, labels):
    """Mean token loss of each sequence, by torch's own."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    scored = labels[:, 1:] != -100
    return losses.sum(1) / scored.sum(1), losses.sum(1)


def test_the_loss_of_a_response_behind_its_own_and_another_prompt(tmp_path, tokenizer):
    trainer = sft_run(tmp_path, tokenizer)
    memory = trainer.row_memory
    state = torch.get_rng_state()
    trainer.model.load_state_dict(trainer.start)
    trainer.model.eval()

    def parts(row):
        tokens, labels = (torch.tensor(trainer.train_dataset[row][name]) for name in ("input_ids", "labels"))
        return tokens[labels == -100], tokens[labels != -100]

    for row, other in ((0, 24), (5, 29), (47, 23)):  # half the data set away
        response = parts(row)[1]
        for prompt, seen in ((parts(row)[0], memory.before), (parts(other)[0], memory.reference)):
            with torch.no_grad():
                logits = trainer.model(input_ids=torch.cat([prompt, response])[None]).logits[0]
            loss = F.cross_entropy(logits[len(prompt) - 1 : -1], response)
            torch.testing.assert_close(seen[row], loss, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    sums, visits = torch.zeros(48), torch.zeros(48)
    weight, decay = torch.zeros(48), memory.decay
    for rows, logits, labels, _, _ in trainer.heard:
        for row, loss in zip(rows.tolist(), token_losses(logits, labels)[0], strict=True):
            sums[row], weight[row] = decay * sums[row] + loss, decay * weight[row] + 1
            visits[row] += 1
    assert torch.equal(memory.visits.float(), visits)
    torch.testing.assert_close(memory.losses, sums / weight, rtol=1e-4, atol=1e-4)
    table = trainer.suspects(budget=3)
    assert table["is_label_issue"].sum() <= 3
    assert table["rank"].min() == table.loc[table["ratio"].idxmax(), "rank"] == 1


def test_suspect_responses_are_weighed_down(tmp_path, tokenizer):
    known = RefinementConfig(mode="soft", noise_rate=0.25, suspect_weight=0.1)
    trainer = sft_run(tmp_path, tokenizer, refinement=known)
    active = [entry for entry in trainer.heard if entry[3] is not None and entry[3].is_active]
    assert active
    for rows, logits, labels, refinement, loss in active:
        weights = torch.where(refinement.is_suspect[rows], 0.1, 1.0)
        expected = (weights * token_losses(logits, labels)[1]).sum() / (labels[:, 1:] != -100).sum()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert int(trainer.refinement.is_suspect.sum()) == 12


def test_responses_are_weighed_down_from_the_first_step_or_once_resets_have_begun(tmp_path, tokenizer):
    known = RefinementConfig(mode="soft", noise_rate=0.25)
    trainer = sft_run(tmp_path, tokenizer, refinement=known, reset_probability=0.5, **STALLS)
    assert trainer.reset_callback.reset_state.armed_step is None
    assert all(entry[3] is not None and int(entry[3].is_suspect.sum()) == 12 for entry in trainer.heard)
    waiting = RefinementConfig(mode="soft", noise_rate=0.25, begin="resets")
    trainer = sft_run(tmp_path / "waits", tokenizer, refinement=waiting, reset_probability=0.5, **STALLS)
    assert trainer.refinement is None


def test_a_long_response_meets_the_end_of_a_long_prompt():
    """Behind another prompt no row gets longer than the longer of the two, which the model is known to take."""

    def row(prompt, response):
        return torch.tensor([*prompt, *response]), torch.tensor([-100] * len(prompt) + list(response))

    short, long = row([1, 2], range(10, 18)), row(range(30, 36), [40, 41])
    ids, labels = _behind(long, short)
    assert ids.tolist() == [34, 35, *range(10, 18)]
    assert labels.tolist() == [-100, -100, *range(10, 18)]
    assert _behind(short, long)[0].tolist() == [1, 2, 40, 41]
    assert _behind(long, row([1], []))[0].tolist() == list(range(30, 36))  # without a response nothing is scored


def test_packed_responses_are_refused(tmp_path, tokenizer):
    with pytest.raises(UnsupportedError, match=r'`reset_refine="soft"` needs to know the rows .*several rows into one'):
        sft_run(tmp_path, tokenizer, packing=True, packing_strategy="wrapped")
