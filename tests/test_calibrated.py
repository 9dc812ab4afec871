"""Calibrated loss: against a general minimiser and planted noise; its identities; what Trainer hands over; refusals."""

from __future__ import annotations

import time

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import minimize
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, Trainer

from hf_reset.errors import DataError, MetricError, WeakEvidenceWarning
from hf_reset.metrics import calibrated_loss, calibrated_rows, with_calibrated_loss
from hf_reset.metrics.evaluation import MINIMUM_ROWS


def planted(num_rows, num_classes, noise, temperature, spread=2.0, seed=0):
    """Logits, and labels drawn from softmax(z / T) of which a share ε is then drawn from all classes alike."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_rows, num_classes)) * spread
    gumbel = rng.gumbel(size=logits.shape)
    labels = (logits / temperature + gumbel).argmax(axis=1)
    is_noisy = rng.random(num_rows) < noise
    labels[is_noisy] = rng.integers(num_classes, size=is_noisy.sum())
    return logits, labels


def objective(logits, labels, temperature, noise):
    """The definition, written as it stands."""
    exponentials = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    p = exponentials[np.arange(len(labels)), labels] / exponentials.sum(axis=1)
    return float(-np.log((1 - noise) * p + noise / logits.shape[1]).mean())


def plain(logits, labels):
    return float(torch.nn.functional.cross_entropy(torch.as_tensor(logits).double(), torch.as_tensor(labels)))


PLANTED = [(1000, 77, 0.4, 0.5), (1000, 6, 0.6, 0.1), (2000, 4, 0.4, 2.0), (200, 3, 0.2, 0.5), (500, 2, 0.0, 1.0)]


@pytest.mark.parametrize(("num_rows", "num_classes", "noise", "temperature"), PLANTED)
def test_no_general_minimiser_finds_less(num_rows, num_classes, noise, temperature):
    logits, labels = planted(num_rows, num_classes, noise, temperature)
    found = calibrated_loss(logits, labels)
    assert found.loss == pytest.approx(objective(logits, labels, found.temperature, found.noise), rel=1e-12)
    for start in [(-2.0, -4.0), (0.0, 0.0), (2.0, 0.0)]:
        other = minimize(
            lambda x: objective(logits, labels, np.exp(x[0]), 1 / (1 + np.exp(-x[1]))), start, method="Nelder-Mead"
        )
        assert found.loss <= other.fun + 1e-9


@pytest.mark.parametrize(("num_rows", "num_classes", "noise", "temperature"), PLANTED[:3])
def test_planted_noise_and_temperature_are_recovered(num_rows, num_classes, noise, temperature):
    found = [calibrated_loss(*planted(num_rows, num_classes, noise, temperature, seed=seed)) for seed in range(12)]
    # Mean of twelve within three standard errors: the fit is of maximum likelihood, whose bias is far below those.
    for values, truth in [
        (np.array([one.noise for one in found]), noise),
        (np.log([one.temperature for one in found]), np.log(temperature)),
    ]:
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - truth) < 3 * error
        assert error < 0.2
    assert found[0].wrong_labels == found[0].noise * (num_classes - 1) / num_classes


def test_a_single_fit_on_a_thousand_rows_is_within_a_twentieth():
    for seed in range(5):
        found = calibrated_loss(*planted(1000, 77, 0.4, 0.5, seed=seed))
        assert found.noise == pytest.approx(0.4, abs=0.08)
        assert found.temperature == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize(("noise", "temperature"), [(0.0, 0.5), (0.4, 0.5), (0.6, 1.0)])
def test_accuracy_on_right_labels_is_estimated_from_noisy_ones(noise, temperature):
    """Twelve times: the model's share of right answers before the labels were spoilt, within three standard errors."""
    errors = []
    for seed in range(12):
        logits, labels = planted(1000, 6, noise, temperature, seed=seed)
        _, right = planted(1000, 6, 0.0, temperature, seed=seed)  # the same draws, unspoilt
        errors.append(calibrated_loss(logits, labels).estimated_accuracy - (logits.argmax(axis=1) == right).mean())
    assert abs(np.mean(errors)) < 3 * np.std(errors, ddof=1) / np.sqrt(12) < 0.1


def test_hints_are_not_credited_as_certainties():
    """Logits all but equal, and right in a third of four classes: a cold fit would call the labels noisy instead."""
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=400)
    hints = np.where(rng.random(400) < 0.1, labels, rng.integers(4, size=400))
    found = calibrated_loss(0.02 * np.eye(4)[hints], labels)
    assert found.temperature < 0.25
    assert found.estimated_accuracy < 0.3


@pytest.mark.parametrize("factor", [1e-4, 0.3, 7.0, 1e4])
def test_scale_of_the_logits_does_not_matter(factor):
    logits, labels = planted(800, 6, 0.4, 0.5)
    found, scaled = calibrated_loss(logits, labels), calibrated_loss(logits * factor, labels)
    assert scaled.loss == pytest.approx(found.loss, abs=1e-10)
    assert scaled.noise == pytest.approx(found.noise, abs=1e-6)
    assert scaled.temperature == pytest.approx(found.temperature * factor, rel=1e-6)
    np.testing.assert_allclose(scaled.rows, found.rows, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_never_above_plain_cross_entropy_nor_above_chance(seed):
    rng = np.random.default_rng(seed)
    num_rows, num_classes = int(rng.integers(1, 60)), int(rng.integers(2, 12))
    logits = rng.normal(size=(num_rows, num_classes)) * 10 ** rng.uniform(-4, 4)
    labels = rng.integers(num_classes, size=num_rows)
    for wanted in (labels, logits.argmax(axis=1), logits.argmin(axis=1)):
        found = calibrated_loss(logits, wanted)
        assert 0 <= found.loss <= min(plain(logits, wanted), np.log(num_classes)) + 1e-12
        assert 0 <= found.noise <= 1
        assert found.temperature > 0


def test_timid_and_confident_weights_compare_by_what_they_know():
    """Plain noisy cross-entropy prefers the timid half-right model, the calibrated figure the confident right one."""
    rng = np.random.default_rng(0)
    clean = rng.integers(6, size=2000)
    labels = np.where(rng.random(2000) < 0.4, rng.integers(6, size=2000), clean)
    known = np.where(rng.random(2000) < 0.8, clean, rng.integers(6, size=2000))  # the timid model's answers
    timid, confident = np.eye(6)[known] * 1.5, np.eye(6)[clean] * 12.0
    assert plain(timid, labels) < plain(confident, labels)
    assert calibrated_loss(confident, labels).loss < calibrated_loss(timid, labels).loss - 0.1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_logits_of_ten_thousand_are_finite(dtype):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(300, 5)).round(2) * 1e4).clip(-6e4, 6e4).astype(dtype)
    for labels in (rng.integers(5, size=300), logits.argmax(axis=1), logits.argmin(axis=1)):
        found = calibrated_loss(logits, labels)
        assert np.isfinite([found.loss, found.temperature, found.noise, *found.rows]).all()
        assert calibrated_rows(logits, labels, 1.0, 0.0).mean() == pytest.approx(plain(logits, labels), rel=1e-12)


def test_constant_logits_are_chance():
    found = calibrated_loss(np.zeros((50, 4)), np.arange(50) % 4)
    assert found.loss == pytest.approx(np.log(4), abs=1e-12)
    assert found.standard_error == pytest.approx(0, abs=1e-12)


def test_all_rows_right_cost_nothing():
    logits = np.random.default_rng(0).normal(size=(100, 4))
    found = calibrated_loss(logits, logits.argmax(axis=1))
    assert found.loss < 1e-3  # the coldest of the grid: closest calls lie within a thousandth of the spread
    assert found.noise == pytest.approx(0, abs=1e-3)


def test_rows_are_the_definition_and_left_out_where_there_is_no_label():
    logits, labels = planted(200, 5, 0.3, 0.7)
    hidden = labels.copy()
    hidden[::7] = -100
    found = calibrated_loss(logits, hidden)
    assert found == calibrated_loss(logits[hidden != -100], hidden[hidden != -100])
    assert found.rows.shape == (200,)
    assert np.array_equal(np.isnan(found.rows), hidden == -100)
    assert np.nanmean(found.rows) == pytest.approx(found.loss, rel=1e-12)
    values = found.rows[hidden != -100]
    assert found.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))
    np.testing.assert_array_equal(calibrated_rows(logits, hidden, found.temperature, found.noise), found.rows)
    one = calibrated_rows(logits[:1], labels[:1], 0.7, 0.3)
    assert one[0] == pytest.approx(objective(logits[:1], labels[:1], 0.7, 0.3), rel=1e-12)
    assert calibrated_rows(logits, labels, 1.0, 0.0).mean() == pytest.approx(plain(logits, labels), rel=1e-12)


def test_tensors_of_any_type_equal_arrays():
    logits, labels = planted(300, 5, 0.3, 0.7)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.tensor(logits, dtype=dtype).requires_grad_()
        found = calibrated_loss(tensor, torch.tensor(labels))
        assert found == calibrated_loss(tensor.detach().double().numpy(), labels.tolist())
    assert calibrated_loss(logits, labels[:, None]) == calibrated_loss(logits, labels)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_diverged_model_is_not_a_number_and_no_error(value):
    logits, labels = planted(50, 4, 0.3, 0.7)
    logits[3, 1] = value
    found = calibrated_loss(logits, labels)
    assert np.isnan([found.loss, found.temperature, found.noise, found.standard_error]).all()
    labels[3] = -100  # where nobody looks, it does not matter
    assert np.isfinite(calibrated_loss(logits, labels).loss)


def test_the_value_is_frozen():
    with pytest.raises(AttributeError):
        calibrated_loss(np.eye(3), [0, 1, 2]).loss = 0.0  # pyright: ignore[reportAttributeAccessIssue]


def test_costs_less_than_a_hundredth_of_an_evaluation():
    """1 000 rows of 77 classes, against a forward of MiniLM's size (22 M parameters) over 64 rows of 32 tokens."""
    config = BertConfig(
        vocab_size=500, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model, ids = BertForSequenceClassification(config).eval(), torch.randint(500, (64, 32))
    logits, labels = planted(1000, 77, 0.4, 0.5)

    def seconds(call):
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    with torch.no_grad():
        evaluation = min(seconds(lambda: model(input_ids=ids)) for _ in range(2)) * 1000 / 64
    assert min(seconds(lambda: calibrated_loss(logits, labels)) for _ in range(5)) < 0.01 * evaluation


# What Trainer hands over.


def prediction(num_rows=200, seed=0):
    logits, labels = planted(num_rows, 4, 0.3, 0.7, seed=seed)
    return EvalPrediction(predictions=logits.astype(np.float32), label_ids=labels)


def expected(given):
    found = calibrated_loss(given.predictions, given.label_ids)
    assert found.metrics() == {
        "calibrated_loss": found.loss,
        "label_noise": found.wrong_labels,
        "temperature": found.temperature,
        "estimated_accuracy": found.estimated_accuracy,
    }
    return found.metrics()


def test_adds_its_figures_to_ones_own():
    given = prediction()
    assert with_calibrated_loss()(given) == expected(given)
    assert with_calibrated_loss(lambda p: {"rows": len(p.label_ids)})(given) == {"rows": 200, **expected(given)}


def test_logits_are_the_first_of_a_tuple_and_of_each_batch():
    given = prediction()
    metrics, hidden = with_calibrated_loss(), np.zeros((200, 7, 3))
    assert metrics(EvalPrediction((given.predictions, hidden), given.label_ids)) == expected(given)
    parts = [slice(0, 90), slice(90, 200)]
    as_lists = [(given.predictions[part], hidden[part]) for part in parts], [given.label_ids[part] for part in parts]
    assert metrics(EvalPrediction(*as_lists)) == expected(given)  # pyright: ignore[reportArgumentType]


def test_batches_add_up_and_start_afresh():
    def count(p, compute_result):
        return {"last": compute_result}

    metrics = with_calibrated_loss(count)
    for given in (prediction(seed=0), prediction(seed=1)):
        for part, is_last in [(slice(0, 90), False), (slice(90, 180), False), (slice(180, 200), True)]:
            batch = EvalPrediction(torch.tensor(given.predictions[part]), torch.tensor(given.label_ids[part]))  # pyright: ignore[reportArgumentType]
            result = metrics(batch, compute_result=is_last)
            assert result == ({"last": True, **expected(given)} if is_last else {"last": False})


@pytest.mark.parametrize("options", [{}, {"batch_eval_metrics": True}, {"eval_do_concat_batches": False}])
def test_in_a_trainer_it_is_the_loss_of_its_predictions(tmp_path, options):
    validation = tiny.rows(120, seed=2)
    arguments = tiny.arguments(tmp_path, per_device_eval_batch_size=50, **options)
    trainer = Trainer(tiny.bert(), arguments, eval_dataset=validation, compute_metrics=with_calibrated_loss())
    found = trainer.evaluate()
    with torch.no_grad():
        inputs = {name: torch.tensor(validation[name][:]) for name in ("input_ids", "attention_mask")}
        logits = tiny.bert().eval()(**inputs).logits
    wanted = calibrated_loss(logits, validation["labels"][:])
    assert found["eval_calibrated_loss"] == pytest.approx(wanted.loss, abs=1e-6)
    assert {"eval_label_noise", "eval_temperature", "eval_loss"} <= found.keys()


# Refusals, and warnings.

LABELS = np.array([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((4, 1)), np.zeros(4), r"at least 2 classes, got \(4, 1\)\. One column is a regression"),
        (np.zeros(4), LABELS, r"shape \(N, K\).*got \(4,\)"),
        (np.zeros((4, 3)), np.zeros(4), "targets of a regression have no classes"),
        (np.zeros((4, 3)), np.zeros((4, 3)), "multi-label problem"),
        (np.zeros((4, 5, 3)), np.zeros((4, 5), int), 'wrong in all its tokens at once.*"eval_loss".*as rows'),
        (np.zeros((4, 3)), LABELS[:3], r"each of 4 rows, got shape \(3,\)"),
        (np.zeros((4, 2)), LABELS, r"in \[0, 2\).*row 2 is 2"),
        (np.zeros((4, 3)), LABELS - 1, r"row 0 is -1"),
        (np.zeros((4, 3)), np.full(4, -100), "each of its 4 rows is -100"),
        (np.zeros((0, 3)), np.zeros(0, int), "no label"),
    ],
)
def test_what_has_no_calibrated_loss_is_refused_in_words(logits, labels, message):
    for function in (calibrated_loss, lambda z, y: calibrated_rows(z, y, 1.0, 0.1)):
        with pytest.raises(DataError, match=message):
            function(logits, labels)
    with pytest.raises(DataError, match=message):
        with_calibrated_loss()(EvalPrediction(predictions=logits, label_ids=labels))


def test_two_label_columns_are_refused():
    with pytest.raises(DataError, match=r"2 arrays of labels.*`label_names`"):
        with_calibrated_loss()(EvalPrediction(predictions=np.zeros((4, 3)), label_ids=(LABELS, LABELS)))


@pytest.mark.parametrize(("temperature", "noise", "name"), [(0, 0.1, "temperature"), (1.0, 1.5, "noise")])
def test_fits_out_of_range_are_refused(temperature, noise, name):
    with pytest.raises(DataError, match=f"`{name}` must be"):
        calibrated_rows(np.zeros((4, 3)), LABELS, temperature, noise)


@pytest.mark.parametrize("name", ["calibrated_loss", "eval_calibrated_loss", "temperature"])
def test_the_same_name_twice_is_refused(name):
    with pytest.raises(MetricError, match=f"returns '{name}' itself.*Rename yours"):
        with_calibrated_loss(lambda p: {name: 1.0})(prediction())
    with pytest.raises(MetricError, match="Rename yours"):
        with_calibrated_loss(with_calibrated_loss())(prediction())


def test_batches_need_a_function_that_takes_them():
    with pytest.raises(MetricError, match="must take `compute_result`, but yours does not"):
        with_calibrated_loss(lambda p: {})(prediction(), compute_result=False)


def test_few_rows_are_warned_of_once_with_what_they_can_tell_apart():
    metrics, given = with_calibrated_loss(), prediction(MINIMUM_ROWS - 1)
    error = calibrated_loss(given.predictions, given.label_ids).standard_error
    with pytest.warns(WeakEvidenceWarning, match=rf"99 labelled.*standard error of {error:.2g} nats.*Hold out more"):
        metrics(given)
    metrics(given)  # warnings are errors here
    with_calibrated_loss()(prediction(MINIMUM_ROWS))


def test_one_class_in_validation_is_warned_of():
    given = prediction()
    with pytest.warns(WeakEvidenceWarning, match="each validation label is class 2, so it rewards"):
        with_calibrated_loss()(EvalPrediction(given.predictions, np.full(200, 2)))


# Labels that go wrong in pairs


def in_pairs(rows, num_classes, rate, *, right=0.9, strength=6.0, seed=0):
    """Logits of a confident model, right in a share of the rows; labels moved to the next class at a rate."""
    rng = np.random.default_rng(seed)
    clean = rng.integers(0, num_classes, rows)
    answers = np.where(rng.random(rows) < right, clean, rng.integers(0, num_classes, rows))
    logits = strength * np.eye(num_classes)[answers] + rng.normal(0, 0.5, (rows, num_classes))
    given = np.where(rng.random(rows) < rate, (clean + 1) % num_classes, clean)
    return logits, given, clean


@pytest.mark.parametrize("num_classes", [4, 20])
def test_pair_noise_is_recovered(num_classes):
    """By a model that is always right, within three standard errors of the share, sqrt(0.4 × 0.6 / N)."""
    logits, given, _ = in_pairs(2000, num_classes, 0.4, right=1.0)
    found = calibrated_loss(logits, given)
    assert found.pair_noise == pytest.approx(0.4, abs=3 * np.sqrt(0.24 / 2000))
    assert found.wrong_labels == found.pair_noise + found.noise * (num_classes - 1) / num_classes
    assert found.loss == pytest.approx(found.rows.mean())
    cost = (num_classes * np.log(num_classes - 1) + np.log(2000) / 2) / 2000
    noise_itself = -np.log(0.6) * 0.6 - np.log(0.4) * 0.4
    assert found.loss == pytest.approx(noise_itself + cost, abs=0.03)  # three standard errors of −log q, and a little
    scaled = calibrated_loss(7.0 * logits, given)
    assert (scaled.loss, scaled.pair_noise) == pytest.approx((found.loss, found.pair_noise), abs=1e-6)


def test_under_pair_noise_weights_that_know_more_look_better():
    """One knows the noise and hedges between a class and its partner, the other is sure, and more often right."""
    _, given, clean = in_pairs(800, 4, 0.4, seed=1)
    rng = np.random.default_rng(2)
    hedging, sure = (np.where(rng.random(800) < right, clean, rng.integers(0, 4, 800)) for right in (0.8, 0.95))
    hedged = np.log(0.55 * np.eye(4)[hedging] + 0.35 * np.eye(4)[(hedging + 1) % 4] + 0.025)
    confident = 8.0 * np.eye(4)[sure]
    assert calibrated_loss(confident, given).loss < calibrated_loss(hedged, given).loss
    assert calibrated_loss(confident, given).estimated_accuracy > 0.85


@pytest.mark.parametrize("num_classes", [3, 6, 77])
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_partners_are_not_named_where_labels_are_wrong_alike(num_classes, noise):
    """Naming them costs more than the accidents of 400 rows gain: they take no large share in any of twenty draws."""
    for seed in range(20):
        logits, labels = planted(400, num_classes, noise, 1.0, seed=seed)
        assert calibrated_loss(logits, labels).pair_noise < 0.05


def test_partners_cost_what_they_say():
    """A class a partner, log(K − 1) nats each, and log(N) / 2: the least that pairs must gain."""
    from hf_reset.metrics.pairs import partners_of

    labels = np.repeat(np.arange(4), 25)
    moved = labels.copy()
    moved[::5] = (moved[::5] + 1) % 4
    assert partners_of(labels, moved, 4).tolist() == [1, 2, 3, 0]
    assert partners_of(labels, labels, 4) is None  # nothing is wrong
    moved = labels.copy()
    moved[0] = 1  # one label: log 3 + log(100) / 2 to say, log 3 to gain
    assert partners_of(labels, moved, 4) is None
    assert partners_of(labels % 2, 1 - labels % 2, 2) is None
