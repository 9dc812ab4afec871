"""The two parts of the risk gradient, against gradients taken by hand, in a run that they do not disturb."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_reset.diagnostics import GradientPartsCallback
from hf_reset.diagnostics.gradients import gradient_parts, layer_groups, plot_gradients, risk_gradient
from hf_reset.errors import ConfigError, DataError
from hf_reset.noise import corrupt_labels

NOISY = corrupt_labels(tiny.TRAIN, rate=0.4, kind="symmetric", seed=0, column="labels")


def run(folder, *callbacks, model=None, **more):
    trainer = Trainer(
        model or tiny.bert(dropout=0.3),
        tiny.arguments(folder, **{"eval_strategy": "no", **more}),
        train_dataset=NOISY,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def records(trainer):
    return [record for record in trainer.state.log_history if "gradient/cosine" in record]


def by_hand(model, rows, total):
    """Gradient of the summed loss of some rows over all rows, as one vector."""
    model.eval()
    batch = {key: torch.tensor(rows[key]) for key in ("input_ids", "attention_mask")}
    loss = cross_entropy(model(**batch).logits, torch.tensor(rows["labels"]), reduction="sum") / total
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_parts_are_those_taken_by_hand_and_add_up_to_the_risk(tmp_path):
    watch = GradientPartsCallback(NOISY, every=5, sample=64, batch_size=7)
    start = tiny.bert(dropout=0.3)
    trainer = run(tmp_path, watch, model=tiny.bert(dropout=0.3))
    record, model = records(trainer)[-1], trainer.model
    assert record["step"] == 15
    flags = NOISY["is_mislabelled"]
    right, wrong = (NOISY.select([i for i, flag in enumerate(flags) if flag == kind])[:] for kind in (False, True))
    correct, false = by_hand(model, right, 64), by_hand(model, wrong, 64)
    assert record["gradient/correct_norm"] == pytest.approx(float(correct.norm()), rel=1e-4)
    assert record["gradient/wrong_norm"] == pytest.approx(float(false.norm()), rel=1e-4)
    assert record["gradient/cosine"] == pytest.approx(float(correct @ false / correct.norm() / false.norm()), abs=1e-4)
    path = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)]).detach()
    along = float(-(false @ path) / path.norm())
    assert record["gradient/wrong_along_path"] == pytest.approx(along, rel=1e-3, abs=1e-5)
    assert torch.allclose(correct + false, by_hand(model, NOISY[:], 64), atol=1e-6)


def test_training_is_bit_identical_with_and_without(tmp_path):
    plain = run(tmp_path)
    watched = run(tmp_path, GradientPartsCallback(NOISY, every=1, sample=20, batch_size=7))
    assert tiny.equal(tiny.weights(plain.model), tiny.weights(watched.model))
    assert len(records(watched)) == 15
    assert all(record["gradient/seconds"] > 0 for record in records(watched))


def test_groups_are_blocks_and_head_and_their_squares_add_up(tmp_path):
    model = tiny.bert()
    groups = layer_groups(model)
    assert list(groups) == ["below", "block 0", "block 1", "head"]
    assert groups["head"] == ["classifier.weight", "classifier.bias"]
    assert sorted(name for names in groups.values() for name in names) == sorted(dict(model.named_parameters()))
    record = records(run(tmp_path, GradientPartsCallback(NOISY, every=15)))[0]
    squares = sum(record[f"gradient/{group}/wrong_norm"] ** 2 for group in groups)
    assert math.sqrt(squares) == pytest.approx(record["gradient/wrong_norm"], rel=1e-5)


def test_parts_of_vectors_at_a_known_angle():
    correct = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([1.0])}
    wrong = {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([-2.0])}
    path = {"a": torch.tensor([0.0, -5.0]), "b": torch.tensor([0.0])}
    parts = gradient_parts(correct, wrong, path, {"first": ["a"], "second": ["b"]})
    assert (parts["first"].correct_norm, parts["first"].wrong_norm, parts["first"].cosine) == (3, 4, 0)
    assert parts["first"].wrong_along_path == 4  # its push, minus the gradient, went where the path goes
    assert parts["second"].cosine == -1
    assert math.isnan(parts["second"].wrong_along_path)  # which has not moved
    assert parts["all"].cosine == pytest.approx(-2 / math.sqrt(10 * 20))
    assert math.isnan(gradient_parts(correct, wrong, None, {})["all"].correct_along_path)


def test_frozen_parameters_and_ungraded_ones_are_left_out():
    model = tiny.bert()
    model.bert.embeddings.requires_grad_(False)
    batch = {key: torch.tensor(NOISY[:4][key]) for key in ("input_ids", "attention_mask")}
    gradient, squares = risk_gradient(model, [(batch, torch.tensor(NOISY[:4]["labels"]))], 4)
    assert not any("embeddings" in name for name in gradient)
    assert squares[0] == pytest.approx(sum(float(g.square().sum()) for g in gradient.values()), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_a_causal_model_is_scored_against_the_next_token():
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 20, (3, 6))
    labels = ids.clone()
    labels[:, :2] = -100
    gradient, _ = risk_gradient(model, [({"input_ids": ids}, labels)], 12)
    model(input_ids=ids, labels=labels).loss.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(gradient[name], p.grad, atol=1e-6), name


def test_the_noise_scale_is_that_of_gradients_row_by_row(tmp_path):
    record = records(run(tmp_path, GradientPartsCallback(NOISY, every=15, sample=64, batch_size=2)))[0]
    model = run(tmp_path).model  # the same, since watching changes nothing
    each = torch.stack([by_hand(model, NOISY.select([row])[:], 1) for row in range(64)])
    # Batches of two: their own scatter is that of 64 rows, some 15 %.
    assert record["gradient/variance"] == pytest.approx(float(each.var(dim=0).sum()), rel=0.4)


def test_the_figure(tmp_path):
    trainer = run(tmp_path, GradientPartsCallback(NOISY, every=3))
    assert plot_gradients(trainer.state.log_history, tmp_path / "a" / "parts.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(DataError, match=r"has no gradient records. Train with `diagnostics.GradientPartsCallback`"):
        plot_gradients([{"loss": 1.0}], tmp_path / "none.png")


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        (NOISY, {"every": 0}, ConfigError, "`every` must be at least 1, got 0"),
        (tiny.TRAIN, {}, DataError, "`dataset` needs labels and `is_mislabelled`"),
        (NOISY.filter(lambda row: not row["is_mislabelled"]), {}, DataError, "0 of .* rows of `dataset` are wrong"),
        (NOISY, {"sample": 1}, DataError, "A `sample` of 1 rows has none of one part"),
    ],
)
def test_bad_input(rows, options, error, message):
    with pytest.raises(error, match=message):
        GradientPartsCallback(rows, **options)


def test_a_model_without_blocks_has_all_in_one_group():
    model = nn.Linear(3, 2)
    assert layer_groups(model) == {"below": ["weight", "bias"]}
