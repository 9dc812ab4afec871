"""Refinement: who is suspect, what they are trained on, and each limit that holds it back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hf_reset import RefinementConfig
from hf_reset.errors import ConfigError
from hf_reset.rows import ResponseMemory, RowMemory, refine, refine_responses
from hf_reset.rows.refinement import memory_accuracy

ROWS, CLASSES = 240, 4
CLEAN = torch.arange(ROWS) % CLASSES
SOFT = RefinementConfig(mode="soft")


def corrupted(rate=0.4, seed=0):
    """The clean labels, a share of each class moved to the next: pair noise, exactly."""
    given = CLEAN.clone()
    for label in range(CLASSES):
        rows = torch.nonzero(label == CLEAN)[:, 0]
        moved = rows[
            torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: round(rate * len(rows))]
        ]
        given[moved] = (label + 1) % CLASSES
    return given


def memory_of(answers, given, visits=2, strength=3.0, **options):
    """A memory in which each row was predicted as `answers`, with 0.87 of the probability for strength 3."""
    memory = RowMemory(len(given), CLASSES, **options)
    for _ in range(visits):
        memory.update(torch.arange(len(given)), strength * torch.eye(CLASSES)[answers], given)
    memory.share()
    return memory


def test_a_memory_that_knows_corrects_the_mislabelled_and_no_other():
    given = corrupted()
    memory = memory_of(CLEAN, given)
    found = refine(memory, SOFT)
    assert found.is_active
    assert torch.equal(found.is_suspect, given != CLEAN)
    assert found.targets is not None
    assert torch.equal(found.targets[found.is_suspect], memory.probabilities[found.is_suspect])
    assert torch.equal(found.targets[~found.is_suspect], torch.eye(CLASSES)[given][~found.is_suspect])
    torch.testing.assert_close(found.targets.sum(dim=1), torch.ones(ROWS))
    assert torch.equal(found.weights, torch.ones(ROWS))
    assert found.reason == "40% of the labels look wrong."


def test_mix_keeps_a_part_of_the_given_label_and_drop_leaves_out():
    given = corrupted()
    memory = memory_of(CLEAN, given)
    soft, mixed = refine(memory, SOFT), refine(memory, RefinementConfig(mode="mix", mix=0.25))
    assert soft.targets is not None
    assert mixed.targets is not None
    row = int(torch.nonzero(mixed.is_suspect)[0])
    torch.testing.assert_close(mixed.targets[row], 0.25 * torch.eye(CLASSES)[given[row]] + 0.75 * soft.targets[row])
    dropped = refine(memory, RefinementConfig(mode="drop"))
    assert dropped.targets is None
    assert torch.equal(dropped.weights, (given == CLEAN).float())
    assert torch.equal(dropped.is_suspect, mixed.is_suspect)


def test_clean_labels_are_left_alone():
    assert not refine(memory_of(CLEAN, CLEAN), SOFT).is_active
    assert not refine(memory_of(CLEAN, corrupted()), RefinementConfig()).is_active


def test_it_waits_until_every_row_in_training_was_seen_twice():
    given = corrupted()
    memory = memory_of(CLEAN, given, visits=1)
    found = refine(memory, SOFT)
    assert not found.is_active
    assert found.targets is None
    assert found.reason == "240 rows were seen fewer than 2 times."
    assert refine(memory, replace(SOFT, min_visits=1)).is_active
    most = torch.arange(ROWS) < 200
    memory.update(torch.arange(200), 3 * torch.eye(CLASSES)[CLEAN[:200]], given[:200])
    memory.share()
    assert refine(memory, SOFT).reason.startswith("40 rows")
    assert refine(memory, SOFT, in_training=most).is_active


@pytest.mark.parametrize(("accuracy", "is_active"), [(0.55, False), (0.65, True), (None, True), (math.nan, False)])
def test_it_waits_while_labels_are_right_more_often_than_the_model(accuracy, is_active):
    """Labels are right in 60 %, which uniform noise is said to explain."""
    found = refine(memory_of(CLEAN, corrupted()), SOFT, fitted_noise=0.4, estimated_accuracy=accuracy)
    assert found.is_active == is_active
    if accuracy == 0.55:
        assert found.reason == "The model seems right in 55% of the rows, the labels in 60%."


def test_where_noise_is_not_uniform_the_fit_has_no_say():
    given = corrupted()
    found = refine(memory_of(CLEAN, given), SOFT, fitted_noise=0.02, estimated_accuracy=0.3)
    assert torch.equal(found.is_suspect, given != CLEAN)


def test_at_most_the_noise_found_is_touched_the_lowest_margins_first():
    """A memory that contradicts every label, the later rows the more strongly."""
    memory = RowMemory(ROWS, CLASSES)
    strength = torch.linspace(0.1, 0.4, ROWS)
    for _ in range(2):
        memory.update(torch.arange(ROWS), strength[:, None] * torch.eye(CLASSES)[(CLEAN + 1) % CLASSES], CLEAN)
    memory.share()
    assert (memory.margins < 0).all()
    for rate in (0.1, 0.25):
        found = refine(memory, replace(SOFT, noise_rate=rate))
        assert found.is_suspect.sum() <= round(rate * ROWS)
        for label in range(CLASSES):
            of_class = torch.nonzero(label == CLEAN)[:, 0]
            assert found.is_suspect[of_class].sum() == round(rate * len(of_class))
            worst = of_class[memory.margins[of_class].argsort()][: round(rate * len(of_class))]
            assert found.is_suspect[worst].all()


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_no_class_is_emptied(share):
    """All rows given class 3 look wrong, and no other."""
    answers = torch.where(CLEAN == 3, 0, CLEAN)
    found = refine(memory_of(answers, CLEAN), replace(SOFT, min_class_share=share, noise_rate=1.0))
    assert found.is_suspect[CLEAN == 3].sum() == 60 - 60 * share
    assert not found.is_suspect[CLEAN != 3].any()


def test_unlabelled_and_unseen_rows_are_no_suspects():
    given = corrupted()
    given[:20] = -100
    found = refine(memory_of(CLEAN, given), SOFT, in_training=given != -100)
    assert torch.equal(found.is_suspect, (given != CLEAN) & (given != -100))
    assert found.targets is not None
    assert not found.targets[:20].any()


def test_a_memory_over_its_bound_can_drop_but_not_soften():
    given = corrupted()
    memory = memory_of(CLEAN, given, max_bytes=76 * ROWS)
    dropped = refine(memory, RefinementConfig(mode="drop"), fitted_noise=0.4, estimated_accuracy=0.9)
    assert torch.equal(dropped.is_suspect, given != CLEAN)
    with pytest.raises(
        ConfigError, match=r'"soft" trains towards mean predictions.*Raise its `max_bytes`, or use "drop"'
    ):
        refine(memory, SOFT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "hard"}, "`mode` must be one of off, soft, drop, mix, got 'hard'"),
        ({"min_visits": 0}, "`min_visits` must be at least 1, got 0"),
        ({"noise_rate": 1.5}, r"`noise_rate` must be in \[0, 1\], got 1.5"),
        ({"mix": -0.1}, r"`mix` must be in \[0, 1\]"),
        ({"suspect_weight": 2}, r"`suspect_weight` must be in \[0, 1\]"),
        ({"decay": 0}, r"`decay` must be in \(0, 1\]"),
        ({"min_class_share": 0}, r"`min_class_share` must be in \(0, 1\]"),
    ],
)
def test_configuration_is_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        RefinementConfig(**options)


def responses(share_misplaced=0.3, num_rows=1000, strength=0.5):
    """To a misplaced response each prompt is as good as any other; to one in its place its own is, by `strength`."""
    generator = torch.Generator().manual_seed(0)
    is_misplaced = torch.arange(num_rows) < share_misplaced * num_rows
    own, others = 4 + 0.2 * torch.randn(2, num_rows, generator=generator)
    memory = ResponseMemory(num_rows)
    memory.set_reference(torch.arange(num_rows), torch.where(is_misplaced, own, own * (1 - strength)), others)
    return memory, is_misplaced


def test_misplaced_responses_are_counted_by_those_that_their_own_prompt_hinders():
    for share in (0.0, 0.3, 0.6):
        memory, is_misplaced = responses(share)
        error = 2 * math.sqrt(1000 * share) / 2 / 1000  # of twice a share that is a fair coin's
        assert memory.estimated_noise == pytest.approx(share, abs=4 * error)
        found = refine_responses(memory, SOFT)
        assert int(found.is_suspect.sum()) == round(1000 * memory.estimated_noise)
        assert found.is_active == is_misplaced.any()
    assert ResponseMemory(3).estimated_noise == 0


def test_nothing_is_said_where_prompts_say_nothing():
    """Half of the responses are then harder behind their own prompt; ten standard errors more than two in five."""
    memory, _ = responses(0.3, num_rows=3000, strength=0.0)
    assert memory.estimated_noise == 0
    assert not refine_responses(memory, SOFT).is_active


def test_what_is_learnt_by_heart_does_not_change_the_judgement():
    memory, _ = responses(0.3)
    before = memory.estimated_noise, memory.ratios.clone()
    for _ in range(5):
        memory.update(torch.arange(1000), torch.full((1000,), 0.1))
    memory.share()
    assert before[0] == memory.estimated_noise > 0.2
    assert torch.equal(memory.ratios, before[1])


def test_misplaced_responses_are_weighed_down_or_left_out():
    memory, is_misplaced = responses()
    found = refine_responses(memory, replace(SOFT, noise_rate=0.3))
    assert found.targets is None
    assert (found.is_suspect == is_misplaced).float().mean() > 0.98  # seven standard deviations apart
    assert found.is_suspect.sum() == 300
    assert torch.equal(found.weights, torch.where(found.is_suspect, 0.2, 1.0))
    dropped = refine_responses(memory, RefinementConfig(mode="drop", noise_rate=0.1))
    assert torch.equal(dropped.weights, (~dropped.is_suspect).float())
    assert dropped.is_suspect.sum() == 100
    assert not refine_responses(memory, RefinementConfig()).is_active


def test_a_response_that_was_not_looked_at_is_no_suspect():
    memory = ResponseMemory(4)
    memory.set_reference(torch.tensor([0, 1]), torch.tensor([1.2, 0.5]), torch.tensor([1.0, 1.0]))
    found = refine_responses(memory, replace(SOFT, noise_rate=0.5))
    assert found.is_suspect.tolist() == [True, False, False, False]


@pytest.mark.parametrize("right", [0.3, 0.6, 0.9])
def test_the_memorys_accuracy_is_told_from_how_often_it_agrees_with_noisy_labels(right):
    """Uniform noise at 0.4; three standard errors of the share that agrees, over 1 - 0.4 - 0.4 / 3."""
    draw, rows, rate = torch.Generator().manual_seed(3), 4000, 0.4

    def changed(labels, share):
        away = torch.randint(1, CLASSES, (rows,), generator=draw)
        return torch.where(torch.rand(rows, generator=draw) < share, (labels + away) % CLASSES, labels)

    clean = torch.arange(rows) % CLASSES
    memory = memory_of(changed(clean, 1 - right), changed(clean, rate))
    error = 3 * math.sqrt(0.25 / rows) / (1 - rate - rate / 3)
    assert memory_accuracy(memory, rate) == pytest.approx(right, abs=error)
    assert math.isnan(memory_accuracy(memory, 0.75))  # labels that tell nothing
    assert math.isnan(memory_accuracy(RowMemory(4, CLASSES), rate))


def test_nothing_is_touched_while_the_memory_is_worse_than_the_labels():
    """Its mean predictions are of the past: a model that has just become good is no reason to train towards them."""
    given = corrupted()
    poor = (CLEAN + 2 * (torch.arange(ROWS) // CLASSES % 2)) % CLASSES  # every other answer is wrong
    found = refine(memory_of(poor, given), SOFT, fitted_noise=0.4, estimated_accuracy=0.9)
    assert not found.is_active
    assert found.reason.startswith("The memory seems right in")
    assert refine(memory_of(CLEAN, given), SOFT, fitted_noise=0.4, estimated_accuracy=0.9).is_active
