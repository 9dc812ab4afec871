"""Losses that remember rows: (logits, labels, rows) → one value a row, with something kept for each row.

A row is a training example, known by its index in the training set. What a loss keeps is one tensor, as large as
it says, and exact in `state_dict`. With several processes a row is met by another process in each epoch. Each
process then changes its own copy at once and `share` brings all copies together, replaying what every process
saw in the order of the steps: shared at least once an epoch, in which a row is met once, all processes keep
exactly what one process alone would.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hf_reset.errors import ConfigError, DataError

MAX_BYTES = 1 << 30
"""What a loss may keep for its rows without being told otherwise: 1 GiB."""

_T = TypeVar("_T")


class Gather(Protocol):
    """Every process's value of the argument, in rank order: `hf_reset.anchor.ranks.gathered`."""

    def __call__(self, value: _T, /) -> list[_T]: ...


class RememberingLoss(Protocol):
    """What a loss that remembers rows has, as `EarlyLearningRegularization` and `RowWeights` do."""

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits (N, C), labels (N,), row numbers (N,) → (N,); rows None: rows that are not remembered."""
        ...

    def share(self, gather: Gather) -> None:
        """Bring the copies of all processes together; a collective where there are several."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that is remembered."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave."""
        ...


class EarlyLearningRegularization:
    """Early-learning regularisation (ELR): cross-entropy + λ log(1 − ⟨p, t⟩), with a target t kept for each row.

    At each visit of a row its target first moves towards the prediction, t ← β t + (1 − β) p, beginning at 0. The
    second term then draws p towards t, which cancels the gradient of a label that early predictions spoke
    against. No gradient goes through t.

    It keeps (num_rows, num_classes) numbers of float32; with several processes, also what they met since the last
    `share`, at most as much again twice over where it is shared once an epoch.

    Args:
        num_rows: rows of the training set.
        num_classes: C.
        weight: λ ≥ 0; 0 is cross-entropy. The paper uses 3 for CIFAR-10 and 7 for CIFAR-100.
        momentum: β in [0, 1). The paper uses 0.7 for CIFAR-10 and 0.9 for CIFAR-100.
        shared: whether several processes train together and will call `share`.
        max_bytes: refuse to keep more than this.

    Raises:
        ConfigError: a value out of range, or targets larger than `max_bytes`.

    References:
        Sheng Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels", NeurIPS 2020,
        eq. 6 and 7, https://arxiv.org/abs/2007.00151.

    Example:
        >>> import torch
        >>> elr = EarlyLearningRegularization(num_rows=3, num_classes=2)
        >>> loss = elr(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([2]))
        >>> elr.targets.sum(dim=1).round(decimals=1).tolist()
        [0.0, 0.0, 0.3]
    """

    # As p and t near the same corner, log(1 − ⟨p, t⟩) falls without bound: held from here on.
    _LARGEST = 1.0 - 1e-4

    def __init__(
        self,
        num_rows: int,
        num_classes: int,
        *,
        weight: float = 3.0,
        momentum: float = 0.7,
        shared: bool = False,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if not 0.0 <= weight < float("inf"):
            raise ConfigError(f"`weight` must be at least 0 and finite, got {weight}. 0 is cross-entropy.")
        if not 0.0 <= momentum < 1.0:
            raise ConfigError(f"`momentum` must be in [0, 1), got {momentum}. The paper uses 0.7 to 0.9.")
        check_bytes(num_rows, num_classes, max_bytes)
        self.weight, self.momentum, self.shared = weight, momentum, shared
        self.targets = torch.zeros(num_rows, num_classes)
        self._visits: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, predictions, targets before

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor | None = None) -> Tensor:
        """The loss of each row, after its target has moved.

        Args:
            logits: (N, C).
            labels: (N,), integers in [0, C).
            rows: (N,), which rows of the training set these are; None, as in an evaluation: cross-entropy alone.

        Returns:
            (N,), float32, or float64 for float64 logits; may be below 0.

        Raises:
            DataError: a row beyond the training set, or another number of classes.
        """
        if not logits.is_floating_point() or logits.dtype.itemsize < 4:
            logits = logits.float()
        log_p = logits.log_softmax(dim=1)
        given = -log_p.gather(1, labels[:, None])[:, 0]
        if rows is None:
            return given
        p = log_p.exp()
        agreement = (p * self._moved(rows, p.detach())).sum(dim=1)
        return given + self.weight * torch.log1p(-agreement.clamp(max=self._LARGEST))

    def share(self, gather: Gather) -> None:
        """Replay the visits of all processes since the last call, step by step, on every process.

        Args:
            gather: see `Gather`. Every process must have taken the same number of steps.
        """
        for rows, _, before in reversed(self._visits):
            self.targets[rows] = before
        own = [(rows.cpu(), p.cpu()) for rows, p, _ in self._visits]
        self._visits.clear()
        shared, self.shared = self.shared, False  # what is replayed is known to all
        for step in zip(*gather(own), strict=True):
            for rows, p in distinct(step):
                self._moved(rows.to(self.targets.device), p.to(self.targets.device))
        self.shared = shared

    def state_dict(self) -> dict[str, Tensor]:
        """The targets, (num_rows, num_classes). With several processes, `share` first."""
        return {"targets": self.targets}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            DataError: the targets are of another number of rows or classes.
        """
        saved = state["targets"]
        if saved.shape != self.targets.shape:
            raise DataError(
                f"The targets to go on with are {tuple(saved.shape)} (rows, classes), and this training set has "
                f"{tuple(self.targets.shape)}. Resume with the data that the run began with."
            )
        self.targets = saved.to(self.targets.device, self.targets.dtype, copy=True)
        self._visits.clear()

    def _moved(self, rows: Tensor, p: Tensor) -> Tensor:
        """Move the targets of `rows` (N,) towards the predictions `p` (N, C), and return them."""
        if p.shape[1] != self.targets.shape[1]:
            raise DataError(
                f"The logits have {p.shape[1]} classes, and the targets were made for {self.targets.shape[1]}. "
                "Give the model's number of classes."
            )
        if self.targets.device != p.device:
            self.targets = self.targets.to(p.device)
        rows = rows.to(p.device)
        before = self.targets[rows]
        if self.shared:
            self._visits.append((rows, p.to(self.targets.dtype), before))
        # A row twice in one batch (sampling with replacement) moves once, towards the mean of both predictions.
        same = (rows[:, None] == rows[None, :]).to(p.dtype)
        mean = (same / same.sum(dim=1, keepdim=True)) @ p
        after = self.momentum * before + (1.0 - self.momentum) * mean.to(before.dtype)
        self.targets[rows] = after
        return after.to(p.dtype)


class RowWeights:
    """Any loss of rows, times a weight for each row that comes from outside (a teacher, another run's suspects).

    The weights are kept as they are: nothing is learnt, so nothing has to be shared.

    Args:
        loss: a loss of rows, (N, C) and (N,) → (N,), or one that remembers rows itself.
        weights: (num_rows,), at least 0 and finite.

    Raises:
        DataError: weights of another shape, below 0 or not finite.
    """

    def __init__(self, loss: Callable[..., Tensor], weights: Sequence[float] | Tensor) -> None:
        self.loss = loss
        self.weights = torch.as_tensor(weights, dtype=torch.float32)
        if self.weights.ndim != 1 or not (self.weights.isfinite() & (self.weights >= 0)).all():
            raise DataError(
                f"`weights` must be one number at least 0 for each row of the training set, got shape "
                f"{tuple(self.weights.shape)} between {self.weights.min():.4g} and {self.weights.max():.4g}."
            )

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor | None = None) -> Tensor:
        """The weighted loss of each row, (N,); rows None: weight 1."""
        values = self.loss(logits, labels)
        if rows is None:
            return values
        if self.weights.device != values.device:
            self.weights = self.weights.to(values.device)
        return values * self.weights[rows.to(values.device)]

    def share(self, gather: Gather) -> None:
        """Nothing: all processes were given the same weights."""

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, (num_rows,)."""
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            DataError: they are of another number of rows.
        """
        if state["weights"].shape != self.weights.shape:
            raise DataError(
                f"There are weights for {len(state['weights'])} rows to go on with, and {len(self.weights)} were given."
            )
        self.weights = state["weights"].clone()


def check_bytes(num_rows: int, num_classes: int, max_bytes: int) -> None:
    """Refuse (num_rows, num_classes) numbers of float32 that are more than `max_bytes`.

    Raises:
        ConfigError: they are, or there is no row or class.
    """
    if num_rows < 1 or num_classes < 1:
        raise ConfigError(f"Rows and classes must be at least 1, got {num_rows} rows and {num_classes} classes.")
    if (needed := 4 * num_rows * num_classes) > max_bytes:
        raise ConfigError(
            f"A target for each of {num_rows} rows and {num_classes} classes takes {needed / 2**30:.1f} GiB, more than "
            f"`max_bytes` {max_bytes / 2**30:.1f} GiB. Raise it, train on fewer rows, or choose a loss without memory."
        )


def distinct(batches: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """What the processes met in one step, once where several met the same batch (tensor parallelism).

    Args:
        batches: of each process, in rank order, a tuple that begins with the row numbers (N,).
    """
    seen: set[tuple[int, ...]] = set()
    kept = []
    for batch in batches:
        rows = tuple(batch[0].tolist())
        if rows not in seen:
            seen.add(rows)
            kept.append(batch)
    return kept


REMEMBERING_LOSSES: dict[str, type[EarlyLearningRegularization]] = {
    "elr": EarlyLearningRegularization,
    "early_learning_regularization": EarlyLearningRegularization,
}
"""Losses by name that `ResetTrainer` makes for its training set; the rest of their keywords are options."""


def named_remembering_loss(
    name: str, num_rows: int, num_classes: int, *, shared: bool = False, **options: Any
) -> EarlyLearningRegularization:
    """The loss of `REMEMBERING_LOSSES` called `name`, for a training set.

    Args:
        name: a key of `REMEMBERING_LOSSES`.
        num_rows: rows of the training set.
        num_classes: C.
        shared: whether several processes train together.
        options: the loss's own keywords, such as `weight` and `momentum`.

    Raises:
        ConfigError: an unknown name, or an option that this loss does not take or cannot have.
    """
    if name not in REMEMBERING_LOSSES:
        raise ConfigError(f"`loss` must be one of {', '.join(REMEMBERING_LOSSES)}, got {name!r}.")
    made = REMEMBERING_LOSSES[name]
    known = sorted(set(inspect.signature(made).parameters) - {"num_rows", "num_classes", "shared"})
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"loss {name!r} takes no {', '.join(unknown)}; it takes {', '.join(known)}.")
    return made(num_rows, num_classes, shared=shared, **options)
