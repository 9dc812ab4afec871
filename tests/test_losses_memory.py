from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_reset.errors import ConfigError, DataError
from hf_reset.losses import EarlyLearningRegularization, RowWeights, robust

ROWS, CLASSES = 10, 4


def visits(steps=6, size=3, seed=0, rows=ROWS):
    """Batches (logits, labels, rows); each epoch of `rows // size` steps meets every row at most once."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    while len(found) < steps:
        order = torch.randperm(rows, generator=generator)
        found += [order[start : start + size] for start in range(0, rows - size + 1, size)]
    return [
        (2 * torch.randn(size, CLASSES, generator=generator), torch.randint(CLASSES, (size,), generator=generator), one)
        for one in found[:steps]
    ]


def by_the_formula(batches, weight, momentum):
    """Equation by equation, one row at a time: losses of each batch, and the targets at the end."""
    targets = {row: torch.zeros(CLASSES) for row in range(ROWS)}
    losses = []
    for logits, labels, rows in batches:
        p = logits.softmax(-1)
        for i, row in enumerate(rows.tolist()):
            targets[row] = momentum * targets[row] + (1 - momentum) * p[i]
        losses.append(
            torch.stack(
                [
                    -p[i, labels[i]].log() + weight * (1 - p[i] @ targets[row]).log()
                    for i, row in enumerate(rows.tolist())
                ]
            )
        )
    return losses, torch.stack([targets[row] for row in range(ROWS)])


def test_elr_equals_the_equations_of_the_paper():
    batches = visits(steps=9)
    elr = EarlyLearningRegularization(ROWS, CLASSES, weight=2.0, momentum=0.6)
    losses, targets = by_the_formula(batches, 2.0, 0.6)
    for batch, expected in zip(batches, losses, strict=True):
        torch.testing.assert_close(elr(*batch), expected)
    torch.testing.assert_close(elr.targets, targets)


def test_elr_remembers_from_visit_to_visit():
    """The paper's own code, built anew in each step, met an empty memory each time."""
    logits, labels, rows = visits(steps=1)[0]
    elr = EarlyLearningRegularization(ROWS, CLASSES)
    first, second = elr(logits, labels, rows), elr(logits, labels, rows)
    assert (second < first).all()
    assert (elr.targets[rows].sum(-1) > 0.5).all()
    untouched = torch.ones(ROWS, dtype=torch.bool).index_fill(0, rows, False)
    assert (elr.targets[untouched] == 0).all()


def test_elr_gradient_holds_the_target_fixed_and_opposes_a_label_the_memory_disbelieves():
    rows, label = torch.tensor([3]), torch.tensor([1])
    elr = EarlyLearningRegularization(ROWS, CLASSES, weight=3.0, momentum=0.9)
    elr.targets[3] = torch.tensor([0.95, 0.0, 0.0, 0.0])
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]], requires_grad=True)
    elr(logits, label, rows).sum().backward()
    fixed = elr.targets[3].clone()
    reference = torch.tensor([[2.0, 0.0, 0.0, 0.0]], requires_grad=True)
    p = reference.softmax(-1)
    (-p[0, 1].log() + 3.0 * (1 - p[0] @ fixed).log()).backward()
    torch.testing.assert_close(logits.grad, reference.grad)
    # Descent raises class 0, which the memory believes, where cross-entropy alone would lower it.
    assert logits.grad[0, 0] < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elr_is_finite_when_sure(dtype):
    elr = EarlyLearningRegularization(2, 3)
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    for _ in range(50):
        values = elr(logits, torch.tensor([0, 1]), torch.tensor([0, 1]))
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(logits.grad).all()


def test_elr_without_rows_or_weight_is_cross_entropy():
    logits, labels, rows = visits(steps=1)[0]
    expected = F.cross_entropy(logits, labels, reduction="none")
    elr = EarlyLearningRegularization(ROWS, CLASSES, weight=0.0)
    torch.testing.assert_close(elr(logits, labels), expected)
    assert (elr.targets == 0).all()
    torch.testing.assert_close(elr(logits, labels, rows), expected)


def test_a_row_twice_in_a_batch_moves_once_towards_the_mean():
    elr = EarlyLearningRegularization(ROWS, CLASSES, momentum=0.7)
    logits = torch.randn(3, CLASSES)
    elr(logits, torch.zeros(3, dtype=torch.long), torch.tensor([5, 2, 5]))
    p = logits.softmax(-1)
    torch.testing.assert_close(elr.targets[5], 0.3 * (p[0] + p[2]) / 2)
    torch.testing.assert_close(elr.targets[2], 0.3 * p[1])


def test_resume_is_exact():
    batches = visits(steps=8)
    whole, first = (EarlyLearningRegularization(ROWS, CLASSES) for _ in range(2))
    for batch in batches[:4]:
        whole(*batch), first(*batch)
    second = EarlyLearningRegularization(ROWS, CLASSES)
    second.load_state_dict(first.state_dict())
    first.targets.zero_()  # what was taken up is a copy
    for batch in batches[4:]:
        assert torch.equal(whole(*batch), second(*batch))
    assert torch.equal(whole.targets, second.targets)


class Processes:
    """Copies of a loss that gather from one another, without processes."""

    def __init__(self, count, **options):
        self.losses = [EarlyLearningRegularization(ROWS, CLASSES, shared=True, **options) for _ in range(count)]

    def step(self, batches):
        return [loss(*batch) for loss, batch in zip(self.losses, batches, strict=True)]

    def share(self):
        own = [[(rows, p) for rows, p, _ in loss._visits] for loss in self.losses]
        for loss in self.losses:
            loss.share(lambda value: own)


@pytest.mark.parametrize("every", [1, 3])
def test_two_processes_equal_one(every):
    """Twelve rows in epochs of three steps of two batches of two: shared each epoch, or each step."""
    global_batches = visits(steps=9, size=4, rows=ROWS + 2)
    alone = EarlyLearningRegularization(ROWS + 2, CLASSES)
    two = Processes(2)
    for loss in two.losses:
        loss.targets = torch.zeros(ROWS + 2, CLASSES)
    for step, (logits, labels, rows) in enumerate(global_batches):
        halves = [(logits[part], labels[part], rows[part]) for part in (slice(2), slice(2, 4))]
        torch.testing.assert_close(torch.cat(two.step(halves)), alone(logits, labels, rows), rtol=0, atol=1e-6)
        if (step + 1) % every == 0:
            two.share()
            for loss in two.losses:
                torch.testing.assert_close(loss.targets, alone.targets, rtol=0, atol=1e-6)
    assert torch.equal(two.losses[0].targets, two.losses[1].targets)


def test_without_sharing_two_processes_differ_from_one():
    """The control of the test above: an unshared memory forgets what the other process saw."""
    global_batches = visits(steps=9, size=4, rows=ROWS + 2)
    alone, half = (EarlyLearningRegularization(ROWS + 2, CLASSES) for _ in range(2))
    for logits, labels, rows in global_batches:
        alone(logits, labels, rows), half(logits[:2], labels[:2], rows[:2])
    assert (half.targets - alone.targets).abs().max() > 0.05


def test_a_row_met_by_both_processes_is_replayed_in_order():
    """The padding at the end of an epoch gives both processes the same row: both end with the same target."""
    two = Processes(2)
    one, other = visits(steps=2)
    same_row = (other[0], other[1], torch.stack([one[2][0], *other[2][1:]]))
    two.step([one, same_row])
    assert not torch.equal(two.losses[0].targets, two.losses[1].targets)
    two.share()
    assert torch.equal(two.losses[0].targets, two.losses[1].targets)
    alone = EarlyLearningRegularization(ROWS, CLASSES)
    alone(*one), alone(*same_row)
    torch.testing.assert_close(two.losses[0].targets, alone.targets)


def test_a_batch_that_both_processes_met_counts_once():
    """Tensor parallelism gives every process of a group the same batch."""
    two, batch = Processes(2), visits(steps=1)[0]
    two.step([batch, batch])
    two.share()
    alone = EarlyLearningRegularization(ROWS, CLASSES)
    alone(*batch)
    assert torch.equal(two.losses[0].targets, alone.targets)


def test_weights_from_outside():
    logits, labels, rows = visits(steps=1)[0]
    weights = torch.linspace(0, 1, ROWS)
    weighted = RowWeights(robust.cross_entropy_rows, weights)
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(weighted(logits, labels, rows), weights[rows] * expected)
    torch.testing.assert_close(weighted(logits, labels), expected)
    other = RowWeights(robust.cross_entropy_rows, torch.ones(ROWS))
    other.load_state_dict(weighted.state_dict())
    assert torch.equal(other.weights, weights)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: EarlyLearningRegularization(5, 2, momentum=1.0),
            ConfigError,
            r"`momentum` must be in \[0, 1\), got 1",
        ),
        (lambda: EarlyLearningRegularization(5, 2, weight=-1.0), ConfigError, r"`weight` must be at least 0"),
        (lambda: EarlyLearningRegularization(0, 2), ConfigError, r"at least 1, got 0 rows"),
        (
            lambda: EarlyLearningRegularization(10**6, 1000),
            ConfigError,
            r"1000000 rows and 1000 classes takes 3.7 GiB, more than `max_bytes` 1.0 GiB",
        ),
        (
            lambda: EarlyLearningRegularization(5, 2).load_state_dict({"targets": torch.zeros(4, 2)}),
            DataError,
            r"are \(4, 2\) \(rows, classes\), and this training set has \(5, 2\)",
        ),
        (
            lambda: EarlyLearningRegularization(5, 2)(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([0])),
            DataError,
            r"logits have 3 classes, and the targets were made for 2",
        ),
        (lambda: RowWeights(robust.cross_entropy_rows, [1.0, -1.0]), DataError, r"at least 0 for each row"),
        (lambda: RowWeights(robust.cross_entropy_rows, [[1.0]]), DataError, r"got shape \(1, 1\)"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()
