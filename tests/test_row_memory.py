"""Row memory: what plain loops over the visits give; one process and several; saved exactly; bounds and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_reset.errors import ConfigError, DataError
from hf_reset.rows.memory import RowMemory
from hf_reset.rows.responses import ResponseMemory
from hf_reset.rows.suspects import find_suspects, suspect_responses, suspects_of

ROWS, CLASSES = 13, 4
LABELS = torch.arange(ROWS) % CLASSES


def steps(count=30, batch=5, seed=0):
    """Row numbers and logits of some steps, rows more than once in a step too."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(ROWS, (batch,), generator=generator), 3 * torch.randn(batch, CLASSES, generator=generator))
        for _ in range(count)
    ]


def filled(seen, resets=(), share_every=7, **options):
    memory = RowMemory(ROWS, CLASSES, **options)
    for step, (rows, logits) in enumerate(seen):
        memory.update(rows, logits, LABELS[rows])
        if step in resets:
            memory.mark_reset()
        if step % share_every == 0:
            memory.share()
    memory.share()
    return memory


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k].nan_to_num(9), other[k].nan_to_num(9)) for k in one)


def visits_of(row, seen, resets=()):
    """(excursion, probabilities) of each visit of a row, in order."""
    found = []
    for step, (rows, logits) in enumerate(seen):
        excursion = sum(reset < step for reset in resets)
        found += [(excursion, p.softmax(dim=0)) for r, p in zip(rows, logits, strict=True) if r == row]
    return found


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_memory_is_what_a_loop_over_visits_gives(decay):
    seen, resets = steps(), (8, 20)
    memory = filled(seen, resets, decay=decay)
    for row in range(ROWS):
        visits, label = visits_of(row, seen, resets), int(LABELS[row])
        weights = torch.tensor([decay**later for later in reversed(range(len(visits)))])
        probabilities = torch.stack([p for _, p in visits])
        margins = torch.tensor([float(p[label] - p[torch.arange(CLASSES) != label].max()) for _, p in visits])
        losses = torch.tensor([-math.log(p[label]) for _, p in visits])
        assert memory.visits[row] == len(visits)
        assert memory.labels[row] == label
        torch.testing.assert_close(memory.probabilities[row], (weights @ probabilities) / weights.sum())
        torch.testing.assert_close(memory.margins[row], (weights @ margins) / weights.sum())
        torch.testing.assert_close(memory.last_loss[row], losses[-1])
        assert memory.last_predicted[row] == probabilities[-1].argmax()
        assert memory.wrong_events[row] == (probabilities.argmax(dim=1) != label).sum()
        excursions = [excursion for excursion, _ in visits]
        first = torch.tensor([i == excursions.index(e) for i, e in enumerate(excursions)])
        since = torch.tensor([e == 2 for e in excursions])
        for tally, where in [(memory.total, first | True), (memory.first_visits, first), (memory.since_reset, since)]:
            assert tally.visits[row] == where.sum()
            torch.testing.assert_close(tally.mean("margin")[row], margins[where].mean(), equal_nan=True)
            torch.testing.assert_close(tally.mean("loss")[row], losses[where].mean(), equal_nan=True)
            assert tally.sums["wrong"][row] == (probabilities.argmax(dim=1) != label)[where].sum()


@pytest.mark.parametrize("share_every", [1, 3, 100])
def test_how_often_it_is_shared_changes_nothing(share_every):
    seen = steps()
    assert same_state(filled(seen, (8, 20), decay=0.5), filled(seen, (8, 20), share_every=share_every, decay=0.5))


def test_several_processes_keep_what_one_keeps():
    """Each step's five rows are met by two processes, three by the first: equal to the last bit, on both."""
    seen, resets = steps(), (8, 20)
    ranks = [RowMemory(ROWS, CLASSES, decay=0.5) for _ in range(2)]
    parts = [slice(0, 3), slice(3, 5)]

    def share():
        waiting = [memory.log.ordered() for memory in ranks]
        for memory in ranks:
            memory.share(lambda _: waiting)

    for step, (rows, logits) in enumerate(seen):
        for memory, part in zip(ranks, parts, strict=True):
            memory.update(rows[part], logits[part], LABELS[rows[part]])
            if step in resets:
                memory.mark_reset()
        if step % 7 == 0:
            share()
    share()
    alone = filled(seen, resets, decay=0.5)
    assert same_state(ranks[0], alone)
    assert same_state(ranks[1], alone)


def test_processes_that_meet_the_same_batch_count_once():
    seen = steps()
    memory = RowMemory(ROWS, CLASSES)
    for rows, logits in seen:
        memory.update(rows, logits, LABELS[rows])
    memory.share(lambda own: [own[1:], own])  # the first has met nothing in the first step
    assert same_state(memory, filled(seen))


@pytest.mark.parametrize("share_at", [9, 15])
def test_resumed_is_uninterrupted(share_at):
    seen, resets = steps(), (8, 20)
    first = RowMemory(ROWS, CLASSES, decay=0.7)
    for step, (rows, logits) in enumerate(seen[:share_at]):
        first.update(rows, logits, LABELS[rows])
        if step in resets:
            first.mark_reset()
    first.share()
    second = RowMemory(ROWS, CLASSES, decay=0.7)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for step, (rows, logits) in enumerate(seen[share_at:], start=share_at):
        second.update(rows, logits, LABELS[rows])
        if step in resets:
            second.mark_reset()
    second.share()
    whole = filled(seen, resets, decay=0.7)
    assert same_state(second, whole)
    assert not same_state(first, whole)


def test_after_a_reset_the_former_excursion_is_forgotten_at_once():
    memory = filled(steps())
    before = memory.total.visits.clone()
    memory.mark_reset()
    assert not memory.since_reset.visits.any()
    assert torch.equal(memory.total.visits, before)
    assert memory.since_reset.mean("margin").isnan().all()


def test_many_steps_between_shares_wait_in_order():
    seen = steps(count=150)  # more than stay on the device
    memory = RowMemory(ROWS, CLASSES, decay=0.5)
    for rows, logits in seen:
        memory.update(rows, logits, LABELS[rows])
    assert len(memory.log) == 150
    assert memory.log.nbytes == 150 * 5 * (28 + 4 * CLASSES)
    memory.share()
    assert len(memory.log) == memory.log.nbytes == 0
    assert same_state(memory, filled(seen, decay=0.5))


def test_beyond_its_bound_it_keeps_margins_but_no_probabilities():
    seen, bound = steps(), ROWS * (76 + 4 * CLASSES)
    whole, compact = filled(seen, max_bytes=bound), filled(seen, max_bytes=bound - 1)
    assert whole.nbytes == bound
    assert compact.nbytes == ROWS * 76
    for name in ("margins", "wrong_events", "last_predicted", "last_loss", "labels"):
        assert torch.equal(getattr(whole, name), getattr(compact, name)), name
    with pytest.raises(ConfigError, match=r"are not kept: they need 1196 bytes. Raise `max_bytes`"):
        _ = compact.probabilities
    with pytest.raises(ConfigError, match="at least, more than `max_bytes` 900"):
        RowMemory(ROWS, CLASSES, max_bytes=900)
    with pytest.raises(ConfigError, match="more than `max_bytes` 100"):
        ResponseMemory(ROWS, max_bytes=100)


def test_suspects_of_a_memory_are_those_of_its_arrays():
    memory = filled(steps(count=2))
    assert (memory.visits == 0).any()
    table = suspects_of(memory, in_training=torch.arange(ROWS) > 3, noise_rate=0.5)
    columns = {"visits": memory.visits, "wrong_events": memory.wrong_events, "in_training": torch.arange(ROWS) > 3}
    margins, columns["mean_loss"] = memory.margins, memory.total.mean("loss")
    wanted = find_suspects(memory.probabilities, memory.labels, margins=margins, noise_rate=0.5, **columns)
    assert table.equals(wanted[table.columns])
    assert set(table.columns) == set(wanted.columns)
    assert table["is_label_issue"].any()
    assert suspects_of(memory, labels=LABELS)["given_label"].tolist() == LABELS.tolist()
    compact = suspects_of(filled(steps(count=2), max_bytes=ROWS * 80), noise_rate=0.5)
    for name in ("is_label_issue", "label_quality", "rank", "visits", "wrong_events", "mean_loss"):
        assert compact[name].equals(table[name]), name


def test_unlabelled_and_diverged_rows_leave_no_trace():
    memory = RowMemory(3, 2)
    logits = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [1.0, 0.0]])
    memory.update(torch.arange(3), logits, torch.tensor([0, 1, -100]))
    memory.share()
    assert memory.visits.tolist() == [1, 0, 0]
    assert memory.labels.tolist() == [0, -100, -100]
    assert memory.margins.isnan().tolist() == [False, True, True]


def test_update_neither_keeps_a_graph_nor_changes_logits():
    logits = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    before = logits.detach().clone()
    memory = RowMemory(2, 3)
    memory.update(torch.tensor([0, 1]), logits, torch.tensor([2, 0]))
    memory.share()
    assert torch.equal(logits, before)
    assert not memory.probabilities.requires_grad
    torch.testing.assert_close(memory.probabilities, before.float().softmax(dim=1))


def test_refusals_name_what_is_wrong():
    memory = filled(steps())
    with pytest.raises(DataError, match=r"logits \(B, 4\) and labels \(B,\), got \(2, 3\)"):
        memory.update(torch.tensor([0, 1]), torch.zeros(2, 3), torch.tensor([0, 1]))
    memory.update(torch.tensor([ROWS]), torch.zeros(1, CLASSES), torch.tensor([0]))
    with pytest.raises(DataError, match="Call `share` before `state_dict`"):
        memory.state_dict()
    with pytest.raises(DataError, match=r"must lie in \[0, 13\).*13 to 13"):
        memory.share()
    memory.update(torch.tensor([0]), torch.zeros(1, CLASSES), LABELS[:1] + 1)
    with pytest.raises(DataError, match=r"Row 0 had label 0 and now has 1.*not refined ones"):
        memory.share()
    with pytest.raises(DataError, match=r"training set needs \(14,\).*Resume with the data"):
        RowMemory(ROWS + 1, CLASSES).load_state_dict(filled(steps()).state_dict())
    with pytest.raises(DataError, match="Resume with the options"):
        ResponseMemory(ROWS).load_state_dict(filled(steps()).state_dict())
    with pytest.raises(ConfigError, match=r"`decay` must be in \(0, 1\], got 0"):
        RowMemory(ROWS, CLASSES, decay=0)
    with pytest.raises(ConfigError, match="needs at least 2, got 1"):
        RowMemory(ROWS, 1)
    with pytest.raises(ConfigError, match="at least 1 row, got 0"):
        RowMemory(0, CLASSES)


def test_responses_mean_last_first_and_since_reset():
    memory = ResponseMemory(3, decay=0.5)
    memory.set_reference(torch.tensor([2, 0]), torch.tensor([1.0, 3.0]), torch.tensor([4.0, 2.0]))
    for step, losses in enumerate([[1.0, 8.0], [2.0, math.nan], [4.0, 6.0]]):
        memory.update(torch.tensor([0, 1]), torch.tensor(losses))
        if step == 0:
            memory.mark_reset()
    memory.share()
    assert memory.visits.tolist() == [3, 2, 0]
    torch.testing.assert_close(
        memory.losses, torch.tensor([(0.25 + 1 + 4) / 1.75, (4 + 6) / 1.5, math.nan]), equal_nan=True
    )
    assert memory.ratios.nan_to_num(-1).tolist() == [1.5, -1, 0.25]
    assert memory.last_loss[:2].tolist() == [4.0, 6.0]
    assert memory.first_visits.mean("loss")[:2].tolist() == [1.5, 7.0]
    assert memory.since_reset.mean("loss")[:2].tolist() == [3.0, 6.0]
    assert memory.nbytes == 3 * 48


def test_responses_are_saved_exactly_and_refused_in_words():
    memory = ResponseMemory(3)
    memory.set_reference(torch.arange(3), torch.tensor([1.0, 1.5, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    memory.update(torch.tensor([1]), torch.tensor([0.5]))
    memory.share()
    other = ResponseMemory(3)
    other.load_state_dict(memory.state_dict())
    assert same_state(memory, other)
    with pytest.raises(DataError, match=r"One loss a row.*got \(2,\) for 1 rows"):
        memory.update(torch.tensor([1]), torch.tensor([0.5, 1.0]))
    with pytest.raises(DataError, match="are at least 0, got -1"):
        memory.set_reference(torch.tensor([1]), torch.tensor([1.0]), torch.tensor([-1.0]))
    memory.set_reference(
        torch.tensor([0, 1]), torch.tensor([0.0, 1e-6]), torch.zeros(2)
    )  # certain, whatever the prompt
    assert memory.ratios[:2].tolist() == [1, 1]
    with pytest.raises(DataError, match=r"One loss a row.*got \(2,\) for 1 rows"):
        memory.set_reference(torch.tensor([1]), torch.tensor([1.0, 1.0]), torch.tensor([1.0]))


def test_suspect_responses_are_those_that_their_own_prompt_hinders_most():
    """Two of ten are harder behind their own prompt; as many again are not, though they are misplaced, too."""
    memory = ResponseMemory(11)
    own = torch.tensor([1.0, 2.5, 3.0, 1.9, 0.5, 0.6, 0.7, 0.8, 1.8, 1.1])
    memory.set_reference(torch.arange(10), own, torch.full((10,), 2.0))
    memory.update(torch.arange(11), torch.full((11,), 0.1))
    memory.share()
    table = suspect_responses(memory, in_training=torch.arange(11) < 10)
    assert np.flatnonzero(table["is_label_issue"]).tolist() == [1, 2, 3, 8]
    assert table["rank"][[2, 1, 3, 8, 9]].tolist() == [1, 2, 3, 4, 5]
    assert table["label_quality"][:3].tolist() == pytest.approx([1 / 1.5, 1 / 2.25, 1 / 2.5])
    assert table[["ratio", "label_quality", "reference_loss", "rank"]].isna().sum().tolist() == [1, 1, 1, 1]
    assert table["visits"].tolist() == [1] * 11
    assert table["in_training"].tolist() == [True] * 10 + [False]
    assert np.flatnonzero(suspect_responses(memory, budget=1)["is_label_issue"]).tolist() == [2]
    assert np.flatnonzero(suspect_responses(memory, noise_rate=0.5)["is_label_issue"]).tolist() == [1, 2, 3, 8, 9]
    with pytest.raises(DataError, match="`noise_rate` must be in"):
        suspect_responses(memory, noise_rate=2)
