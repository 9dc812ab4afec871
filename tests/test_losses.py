from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hf_reset.errors import ConfigError
from hf_reset.losses import (
    LOSSES,
    active_passive,
    compute_loss_func,
    cross_entropy,
    generalized_cross_entropy,
    hard_bootstrapping,
    label_log_probability,
    shifts_labels,
    soft_bootstrapping,
    soft_target_rows,
    symmetric_cross_entropy,
)
from hf_reset.losses import robust as losses
from hf_reset.losses.reduce import per_example, reduce, scored_rows

# Every loss of the package with settings that make it neither cross-entropy nor a constant.
CASES = {
    "cross_entropy": cross_entropy,
    "gce": partial(generalized_cross_entropy, q=0.4),
    "sce": partial(symmetric_cross_entropy, alpha=0.3, beta=0.8),
    "nce_rce": partial(active_passive, alpha=0.6, beta=0.7),
    "soft_bootstrapping": partial(soft_bootstrapping, beta=0.6),
    "hard_bootstrapping": partial(hard_bootstrapping, beta=0.6),
}
every_loss = pytest.mark.parametrize("loss", CASES.values(), ids=CASES.keys())


def batch(rows=12, classes=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, generator=generator, dtype=dtype)
    return logits, torch.randint(classes, (rows,), generator=generator)


def gradient(function, logits):
    logits = logits.clone().requires_grad_()
    function(logits).backward()
    return logits.grad


def naive_gce(logits, labels, q):
    p = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    return ((1 - p**q) / q).mean()


def naive_sce(logits, labels, alpha, beta, log_zero=-4.0):
    p, target = logits.softmax(-1), F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    reverse = -(p * torch.where(target == 1, 0.0, log_zero)).sum(-1)
    return (alpha * F.cross_entropy(logits, labels, reduction="none") + beta * reverse).mean()


def naive_nce_rce(logits, labels, alpha, beta, log_zero=-4.0):
    every = torch.stack([F.cross_entropy(logits, torch.full_like(labels, k), reduction="none") for k in range(5)])
    normalised = F.cross_entropy(logits, labels, reduction="none") / every.sum(0)
    return (alpha * normalised).mean() + naive_sce(logits, labels, 0.0, beta, log_zero)


def naive_bootstrapping(logits, labels, beta, hard):
    p, given = logits.softmax(-1), F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    own = F.one_hot(p.argmax(-1), logits.shape[1]).to(logits.dtype) if hard else p
    return -((beta * given + (1 - beta) * own) * p.log()).sum(-1).mean()


def test_values_and_gradients_equal_the_formulas_of_the_papers():
    logits, labels = batch()
    pairs = [
        (lambda x: generalized_cross_entropy(x, labels, q=0.4), lambda x: naive_gce(x, labels, 0.4)),
        (
            lambda x: symmetric_cross_entropy(x, labels, alpha=0.3, beta=0.8),
            lambda x: naive_sce(x, labels, 0.3, 0.8),
        ),
        (lambda x: cross_entropy(x, labels), lambda x: F.cross_entropy(x, labels)),
        (
            lambda x: active_passive(x, labels, alpha=0.6, beta=0.7),
            lambda x: naive_nce_rce(x, labels, 0.6, 0.7),
        ),
        (lambda x: soft_bootstrapping(x, labels, beta=0.6), lambda x: naive_bootstrapping(x, labels, 0.6, hard=False)),
        (lambda x: hard_bootstrapping(x, labels, beta=0.6), lambda x: naive_bootstrapping(x, labels, 0.6, hard=True)),
    ]
    for ours, reference in pairs:
        torch.testing.assert_close(ours(logits), reference(logits))
        torch.testing.assert_close(gradient(ours, logits), gradient(reference, logits))


@pytest.mark.parametrize("q", [0.0, 1e-9])
def test_gce_tends_to_cross_entropy(q):
    logits, labels = batch()
    torch.testing.assert_close(generalized_cross_entropy(logits, labels, q=q), F.cross_entropy(logits, labels))


def test_gce_at_q_1_is_half_the_mean_absolute_error():
    logits, labels = batch()
    absolute = (logits.softmax(-1) - F.one_hot(labels, logits.shape[1])).abs().sum(-1).mean()
    torch.testing.assert_close(generalized_cross_entropy(logits, labels, q=1.0), absolute / 2)


@pytest.mark.parametrize("classes", [10, 77, 1000])
def test_gce_by_default_weighs_a_label_at_chance_alike_whatever_the_number_of_classes(classes):
    """As with ten classes and the paper's q = 0.7: 10^-0.7 of the gradient of cross-entropy."""
    logits, labels = torch.zeros(1, classes, dtype=torch.float64), torch.tensor([3])
    ratio = gradient(lambda x: generalized_cross_entropy(x, labels), logits) / gradient(
        lambda x: F.cross_entropy(x, labels), logits
    )
    torch.testing.assert_close(ratio, torch.full_like(ratio, 10**-0.7))


def test_gce_by_default_is_the_papers_up_to_ten_classes():
    logits, labels = batch()
    assert torch.equal(generalized_cross_entropy(logits, labels), generalized_cross_entropy(logits, labels, q=0.7))


def test_sce_limits_are_cross_entropy_and_mean_absolute_error():
    logits, labels = batch()
    only_ce = symmetric_cross_entropy(logits, labels, alpha=1.0, beta=0.0)
    torch.testing.assert_close(only_ce, F.cross_entropy(logits, labels))
    only_reverse = symmetric_cross_entropy(logits, labels, alpha=0.0, beta=0.5, log_zero=-6.0)
    torch.testing.assert_close(only_reverse, 3.0 * generalized_cross_entropy(logits, labels, q=1.0))


def test_normalised_cross_entropy_over_all_labels_sums_to_one():
    logits, _ = batch()
    losses = [active_passive(logits, torch.full((12,), k), alpha=1.0, beta=0.0) for k in range(5)]
    torch.testing.assert_close(sum(losses), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("loss", [soft_bootstrapping, hard_bootstrapping])
def test_bootstrapping_at_beta_1_is_cross_entropy(loss):
    logits, labels = batch()
    torch.testing.assert_close(loss(logits, labels, beta=1.0), F.cross_entropy(logits, labels))


def test_soft_targets_equal_cross_entropy_with_probabilities():
    logits, labels = batch()
    targets = batch(seed=1)[0].softmax(-1)
    torch.testing.assert_close(soft_target_rows(logits, targets).mean(), F.cross_entropy(logits, targets))
    ours, reference = (
        gradient(lambda x: soft_target_rows(x, targets).mean(), logits),
        gradient(lambda x: F.cross_entropy(x, targets), logits),
    )
    torch.testing.assert_close(ours, reference)
    hard = F.one_hot(labels, 5)
    torch.testing.assert_close(soft_target_rows(logits, hard), F.cross_entropy(logits, labels, reduction="none"))


@pytest.mark.parametrize("name", LOSSES)
def test_expected_rows_are_the_loss_of_labels_drawn_from_the_targets(name):
    logits, labels = batch()
    targets = batch(seed=1)[0].softmax(-1)
    every = torch.stack([LOSSES[name].rows(logits, torch.full((12,), k)) for k in range(5)], dim=1)
    torch.testing.assert_close(losses.expected_rows(LOSSES[name].rows, logits, targets), (targets * every).sum(1))
    certain = losses.expected_rows(LOSSES[name].rows, logits, F.one_hot(labels, 5))
    torch.testing.assert_close(certain, LOSSES[name].rows(logits, labels))


@pytest.mark.parametrize("name", LOSSES)
def test_rows_are_what_the_reducer_averages(name):
    logits, labels = batch()
    rows = LOSSES[name].rows(logits, labels)
    assert rows.shape == (12,)
    torch.testing.assert_close(rows.mean(), LOSSES[name](logits, labels))
    alone = torch.stack([LOSSES[name](logits[i : i + 1], labels[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(rows, alone)


def test_weights_scale_each_example_and_leave_the_divisor():
    logits, labels = batch()
    logits, labels = logits.view(3, 4, -1), labels.view(3, 4)
    labels[1, 2] = -100
    scored = scored_rows(logits, labels)
    values = losses.cross_entropy_rows(scored.logits, scored.labels)
    weights = torch.tensor([1.0, 0.0, 0.5])
    sums = [cross_entropy(logits[i : i + 1], labels[i : i + 1], num_items_in_batch=1) for i in range(3)]
    expected = (sums[0] + 0.5 * sums[2]) / 8  # 3 shifted labels a sequence, one of them ignored
    torch.testing.assert_close(reduce(values, scored, weights=weights), expected)
    expected = (sums[0] + 0.5 * sums[2]) / 20
    torch.testing.assert_close(reduce(values, scored, weights=weights, num_items_in_batch=20), expected)


def test_mean_of_each_sequence():
    logits, labels = batch()
    logits, labels = logits.view(3, 4, -1), labels.view(3, 4)
    labels[1, 2:] = labels[2] = -100
    scored = scored_rows(logits, labels)
    means = per_example(losses.cross_entropy_rows(scored.logits, scored.labels), scored)
    for i in range(2):
        torch.testing.assert_close(means[i], cross_entropy(logits[i : i + 1], labels[i : i + 1]))
    assert means[2].isnan()


@every_loss
def test_gradcheck(loss):
    logits, labels = batch(rows=6)
    labels[2] = -100
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())


@every_loss
def test_gradcheck_per_token(loss):
    logits, labels = batch(rows=6)
    logits, labels = logits.view(2, 3, -1), labels.view(2, 3)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_extreme_logits(loss, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]]).to(dtype)
    labels = torch.tensor([0, 0, 1])
    assert torch.isfinite(loss(logits, labels))
    assert torch.isfinite(gradient(lambda x: loss(x, labels), logits)).all()
    assert loss(logits[:1], labels[:1]) == 0.0  # certain and right costs nothing, to the last digit


def test_log_probability_keeps_its_digits_at_large_logits():
    logits, labels = batch()
    shifted = label_log_probability((logits + 4096).float(), labels)
    reference = label_log_probability((logits + 4096).float().double() - 4096, labels)
    torch.testing.assert_close(shifted.double(), reference, rtol=0, atol=1e-5)
    assert (shifted <= 0).all()


@every_loss
def test_ignore_index_equals_slicing(loss):
    logits, labels = batch()
    keep = torch.arange(12) % 3 != 0
    masked = torch.where(keep, labels, -7)
    whole = gradient(lambda x: loss(x, masked, ignore_index=-7), logits)
    torch.testing.assert_close(loss(logits, masked, ignore_index=-7), loss(logits[keep], labels[keep]))
    torch.testing.assert_close(whole[keep], gradient(lambda x: loss(x, labels[keep]), logits[keep]))
    assert (whole[~keep] == 0).all()


@every_loss
def test_nothing_to_score_is_zero_with_zero_gradient(loss):
    logits, _ = batch()
    labels = torch.full((12,), -100)
    assert loss(logits, labels) == 0
    assert (gradient(lambda x: loss(x, labels), logits) == 0).all()


@every_loss
@pytest.mark.parametrize("count", [5, torch.tensor(5)])
def test_num_items_in_batch_makes_micro_batches_add_up(loss, count):
    logits, labels = batch(rows=5)
    parts = [loss(logits[part], labels[part], num_items_in_batch=count) for part in (slice(2), slice(2, 5))]
    torch.testing.assert_close(sum(parts), loss(logits, labels))


@every_loss
def test_tokens_are_shifted_once(loss):
    logits, labels = batch(rows=12)
    logits, labels = logits.view(3, 4, -1), labels.view(3, 4)
    expected = loss(logits[:, :-1].reshape(9, -1), labels[:, 1:].reshape(9))
    torch.testing.assert_close(loss(logits, labels), expected)
    torch.testing.assert_close(loss(logits, labels, shift=False), loss(logits.reshape(12, -1), labels.reshape(12)))


@every_loss
def test_chunks_do_not_change_the_result(loss, monkeypatch):
    logits, labels = batch()
    whole = loss(logits, labels), gradient(lambda x: loss(x, labels), logits)
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 2 * logits.shape[1] + 1)
    pieces = loss(logits, labels), gradient(lambda x: loss(x, labels), logits)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-15)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest floating tensor that any operation makes anew, views and in-place results apart."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.made.append((tensor.untyped_storage().nbytes(), str(function)))
        return result


@every_loss
def test_holds_no_second_tensor_of_logits_size(loss, monkeypatch):
    """Beyond the logits, only their gradient is as large, and it has the logits' type: half of float32."""
    logits = torch.randn(4, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(64, (4, 16))
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 64)
    with LargestTensor() as record:
        loss(logits, labels).backward()
    whole = logits.numel() * logits.element_size()
    assert [size for size, _ in record.made if size > whole] == []
    assert len([name for size, name in record.made if size == whole and "empty_like" in name]) == 1
    assert len([size for size, _ in record.made if size == whole]) == 1


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )


def test_equals_the_loss_of_a_causal_model():
    model = tiny_llama()
    ids = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :2] = -100
    outputs = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(8))
    ours = compute_loss_func("cross_entropy", shift=shifts_labels(model))(outputs, labels, torch.tensor(8))
    torch.testing.assert_close(ours, outputs.loss)
    as_tuple = compute_loss_func("gce", q=1e-7)((outputs.logits,), labels)
    torch.testing.assert_close(as_tuple, model(input_ids=ids, labels=labels).loss, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
def test_shifts_labels_looks_through_peft_and_knows_classifiers():
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForTokenClassification

    assert shifts_labels(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))
    bert = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert not shifts_labels(BertForTokenClassification(bert))


def test_names_reach_the_losses():
    logits, labels = batch()
    for name, loss in LOSSES.items():
        assert compute_loss_func(name)({"logits": logits}, labels) == loss(logits, labels)
    named = compute_loss_func("sce", alpha=0.3, beta=0.8)({"logits": logits}, labels)
    assert named == symmetric_cross_entropy(logits, labels, alpha=0.3, beta=0.8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: compute_loss_func("elr"), r"`loss` must be one of cross_entropy, .*got 'elr'"),
        (lambda: compute_loss_func("gce", alpha=1.0), r"loss 'gce' takes no alpha; it takes ignore_index, q"),
        (lambda: compute_loss_func("gce", q=1.5), r"`q` must be in \[0, 1\], got 1.5"),
        (lambda: compute_loss_func("gce", q=float("nan")), r"`q` must be in \[0, 1\], got nan"),
        (
            lambda: compute_loss_func("sce", alpha=-1.0),
            r"at least 0 and not both 0, got alpha=-1.0, beta=1.0",
        ),
        (lambda: compute_loss_func("sce", alpha=0, beta=0), r"not both 0"),
        (lambda: compute_loss_func("sce", log_zero=1.0), r"`log_zero` stands for log 0"),
        (lambda: compute_loss_func("nce_rce", beta=-1.0), r"at least 0 and not both 0"),
        (lambda: compute_loss_func("soft_bootstrapping", beta=2.0), r"`beta` must be in \[0, 1\], got 2.0"),
        (lambda: compute_loss_func("hard_bootstrapping", beta=-1.0), r"`beta` must be in \[0, 1\], got -1.0"),
        (lambda: compute_loss_func("gce")({"logits": torch.zeros(1, 2)}, None), r"needs `labels`"),
        (lambda: cross_entropy(torch.zeros(3, 2), torch.zeros(2).long()), r"got \(3, 2\) with \(2,\)"),
        (
            lambda: cross_entropy(torch.zeros(3, 2), torch.zeros(3).long(), shift=True),
            r"`shift` moves labels",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
