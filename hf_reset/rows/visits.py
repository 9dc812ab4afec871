"""Visits of rows as training goes by: kept as they come, shared among processes later, replayed in order.

A visit costs a step nothing but a few small tensors left on the model's device: they come to the CPU many steps at
a time. With several processes each keeps its own visits until `VisitLog.ordered` brings all together in the order of
the steps, so that what is made of them is what one process alone would make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_reset.errors import ConfigError, DataError
from hf_reset.losses.memory import Gather, distinct

_BATCHES_ON_DEVICE = 64


class Visits(NamedTuple):
    """Visits of one step, on one process."""

    rows: Tensor
    """(B,), int64: row numbers of the training set."""
    values: Tensor
    """(B, W), float32: what is known of each."""
    step: int
    """Counts the calls of `VisitLog.add`, which all processes make together."""
    excursion: int
    """Counts the resets before it."""


class VisitLog:
    """The visits of this process that have not been taken yet, and the count of steps and of resets."""

    def __init__(self, step: int = 0, excursion: int = 0) -> None:
        self.step = step
        self.excursion = excursion
        self._on_device: list[Visits] = []
        self._kept: list[Visits] = []

    def __len__(self) -> int:
        """Batches that wait."""
        return len(self._on_device) + len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes that wait."""
        return sum(v.rows.nbytes + v.values.nbytes for v in [*self._on_device, *self._kept])

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Keep what a step saw: `rows` (B,), `values` (B, W)."""
        self._on_device.append(Visits(rows.detach(), values.detach(), self.step, self.excursion))
        self.step += 1
        if len(self._on_device) >= _BATCHES_ON_DEVICE:
            self._fetch()

    def clock(self) -> Tensor:
        """The counts of steps and of resets, (2,), int64: all there is to save once no visit waits."""
        return torch.tensor([self.step, self.excursion])

    def mark_reset(self) -> None:
        """What follows belongs to the next excursion."""
        self.excursion += 1

    def ordered(self, gather: Gather | None = None) -> list[Visits]:
        """All processes' visits since the last call, on the CPU, in the order of the steps and then of the ranks.

        Processes that met the same batch (tensor parallelism) count once.

        Args:
            gather: every process's value of its argument, in rank order; None where there is one process.
        """
        self._fetch()
        own, self._kept = self._kept, []
        by_step: dict[int, list[Visits]] = {}
        for visits in own if gather is None else [visits for rank in gather(own) for visits in rank]:
            by_step.setdefault(visits.step, []).append(visits)
        return [visits for step in sorted(by_step) for visits in _met_once(by_step[step])]

    def _fetch(self) -> None:
        """Bring what is on the device to the CPU, in two copies."""
        if not self._on_device:
            return
        sizes = [len(visits.rows) for visits in self._on_device]
        rows = torch.cat([visits.rows for visits in self._on_device]).cpu().split(sizes)
        values = torch.cat([visits.values for visits in self._on_device]).cpu().split(sizes)
        for visits, own_rows, own_values in zip(self._on_device, rows, values, strict=True):
            self._kept.append(visits._replace(rows=own_rows, values=own_values))
        self._on_device.clear()


def _met_once(visits: list[Visits]) -> list[Visits]:
    """One step's visits by all processes, without those of a batch that another process met too."""
    return [visits[0]._replace(rows=rows, values=values) for rows, values in distinct([v[:2] for v in visits])]


class Turn(NamedTuple):
    """Visits of which each is of another row."""

    rows: Tensor
    """(M,), int64."""
    values: Tensor
    """(M, W), float32."""
    excursions: Tensor
    """(M,), int64."""


def turns(visits: Sequence[Visits], num_rows: int) -> Iterator[Turn]:
    """Deal visits out so that no turn has a row twice, and each row's visits keep their order.

    Visits with a value that is not finite (a diverged model) say nothing and are left out.

    Args:
        visits: in order.
        num_rows: rows of the training set.

    Raises:
        DataError: a row number beyond the training set.
    """
    if not visits:
        return
    rows, values = torch.cat([v.rows for v in visits]).long(), torch.cat([v.values for v in visits])
    if ((rows < 0) | (rows >= num_rows)).any():
        raise DataError(
            f"Row numbers must lie in [0, {num_rows}), the rows that this memory was made for, got "
            f"{int(rows.min())} to {int(rows.max())}. Make it for the training set as given to the Trainer."
        )
    excursions = torch.cat([torch.full_like(v.rows, v.excursion, dtype=torch.long) for v in visits])
    order = rows.argsort(stable=True)
    order = order[values[order].isfinite().all(dim=1)]
    _, counts = rows[order].unique_consecutive(return_counts=True)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    for turn in range(int(counts.max()) if len(counts) else 0):
        chosen = order[place == turn]
        yield Turn(rows[chosen], values[chosen], excursions[chosen])


class Tally:
    """How often each row was visited, and sums over its visits of the numbers named. (1 + names) × 4 bytes a row."""

    def __init__(self, num_rows: int, *names: str) -> None:
        self.visits = torch.zeros(num_rows, dtype=torch.int32)
        self.sums = {name: torch.zeros(num_rows) for name in names}

    def add(self, rows: Tensor, values: dict[str, Tensor], where: Tensor | None = None) -> None:
        """Count a visit of each of `rows` (M,), no row twice, with its `values`, each (M,); of those `where` only."""
        if where is not None:
            rows, values = rows[where], {name: values[name][where] for name in self.sums}
        self.visits[rows] += 1
        for name, total in self.sums.items():
            total[rows] += values[name]

    def clear(self) -> None:
        """Forget all visits."""
        for tensor in (self.visits, *self.sums.values()):
            tensor.zero_()

    def mean(self, name: str) -> Tensor:
        """Mean of the number over each row's visits, (N,), float32; NaN where there was none."""
        return self.sums[name] / torch.where(self.visits > 0, self.visits, torch.nan)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All that is held, by name."""
        return {f"{prefix}.visits": self.visits} | {f"{prefix}.{name}": total for name, total in self.sums.items()}


class VisitMemory:
    """What `RowMemory` and `ResponseMemory` share: the log, three tallies, decayed means, and how they are saved."""

    def __init__(self, num_rows: int, decay: float, names: tuple[str, ...]) -> None:
        if num_rows < 1:
            raise ConfigError(f"A row memory needs at least 1 row, got {num_rows}.")
        if not 0 < decay <= 1:
            raise ConfigError(f"`decay` must be in (0, 1], got {decay}. 1 weighs all visits alike.")
        self.num_rows, self.decay = num_rows, decay
        self.log = VisitLog()
        self.total, self.since_reset, self.first_visits = (Tally(num_rows, *names) for _ in range(3))
        self.last_loss = torch.full((num_rows,), torch.nan)
        self._last_excursion = torch.full((num_rows,), -1, dtype=torch.int32)
        self._weight = torch.zeros(num_rows)

    def mark_reset(self) -> None:
        """The weights were reset: a new excursion begins."""
        self.log.mark_reset()
        self.since_reset.clear()

    def share(self, gather: Gather | None = None) -> None:
        """Enter all visits since the last call, in order. How often it is called changes nothing in the outcome.

        Args:
            gather: every process's value of its argument, in rank order (`hf_reset.anchor.ranks.gathered`); None
                where there is one process.

        Raises:
            DataError: a row number beyond the training set.
        """
        for turn in turns(self.log.ordered(gather), self.num_rows):
            self._enter(turn)

    @property
    def nbytes(self) -> int:
        """Bytes held, without the visits that wait."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def visits(self) -> Tensor:
        """(N,), int32."""
        return self.total.visits

    def state_dict(self) -> dict[str, Tensor]:
        """All that has been entered, with the counts of steps and resets; copies nothing.

        Raises:
            DataError: visits still wait: call `share` first.
        """
        if len(self.log):
            raise DataError("Visits of rows have not been entered yet. Call `share` before `state_dict`.")
        return self._tensors() | {"clock": self.log.clock()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave; visits that wait are dropped.

        Raises:
            DataError: it is of another training set, or of other options.
        """
        clock = self.log.clock()
        copy_state(self._tensors() | {"clock": clock}, state)
        self.log = VisitLog(*clock.tolist())

    def _enter(self, turn: Turn) -> None:
        raise AssertionError("Each memory enters visits in its own way.")

    def _count(self, turn: Turn, seen: dict[str, Tensor], kept: list[tuple[Tensor, Tensor]]) -> None:
        """Add the numbers `seen` to the tallies, and to each decayed total its values (M, …)."""
        rows, excursions = turn.rows, turn.excursions
        self.total.add(rows, seen)
        self.since_reset.add(rows, seen, excursions == self.log.excursion)
        self.first_visits.add(rows, seen, excursions != self._last_excursion[rows])
        self._last_excursion[rows], self.last_loss[rows] = excursions.int(), seen["loss"]
        for total, values in [(self._weight, torch.ones(len(rows))), *kept]:
            total[rows] = self.decay * total[rows] + values

    def _mean(self, total: Tensor) -> Tensor:
        """Of a decayed total, (N,) or (N, K); NaN in rows not visited."""
        weight = torch.where(self._weight > 0, self._weight, torch.nan)
        return total / weight.view(-1, *[1] * (total.ndim - 1))

    def _tensors(self) -> dict[str, Tensor]:
        return {
            **self.total.tensors("total"),
            **self.since_reset.tensors("since_reset"),
            **self.first_visits.tensors("first_visits"),
            "last_loss": self.last_loss,
            "last_excursion": self._last_excursion,
            "weight": self._weight,
        }


def copy_state(own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Fill `own` from `saved`, in place.

    Raises:
        DataError: they are of another number of rows or classes, or hold something else.
    """
    if own.keys() != saved.keys():
        raise DataError(
            f"The row memory to go on with holds {', '.join(sorted(own.keys() ^ saved.keys()))} where this one does "
            "not, or the other way round. Resume with the options that the run began with."
        )
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise DataError(
                f"The row memory to go on with has {tuple(saved[name].shape)} of {name!r}, and this training set needs "
                f"{tuple(tensor.shape)}. Resume with the data that the run began with."
            )
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def check_bound(needed: int, max_bytes: int) -> None:
    """Raise ConfigError where a memory needs more than it may take."""
    if needed > max_bytes:
        raise ConfigError(
            f"A row memory of this training set takes {needed} bytes at least, more than `max_bytes` {max_bytes}. "
            "Raise it, train on fewer rows, or do without what needs rows."
        )
