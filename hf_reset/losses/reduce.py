"""The one reducer: from logits and labels as a Trainer has them, through a loss of rows, to one number.

What takes part (`ignore_index`), which label a token is scored against (`shift`), and what the sum is divided by
(`num_items_in_batch`) is settled here for every loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_reset.errors import ConfigError

IGNORE_INDEX = -100


class ScoredRows(NamedTuple):
    """Logits and labels in line with one another: M rows, one an example or token."""

    logits: Tensor
    """(M, C)."""
    labels: Tensor
    """(M,), all in [0, C): 0 stands where there is no label."""
    taking_part: Tensor
    """(M,), bool: False where the label was `ignore_index`."""
    examples: int
    """N or B: how many examples the M rows come from."""


@dataclass(frozen=True)
class Loss:
    """A loss of rows with the reducer behind it: called, it gives one number.

    Args of a call:
        logits: (N, C), one row an example; or (B, T, V), one row a token.
        labels: (N,) or (B, T), integers; positions equal to `ignore_index` take no part.
        ignore_index: label of the positions left out, −100.
        num_items_in_batch: divide the sum by this count instead of by the number of positions that take part:
            the labels of all micro-batches (and ranks) of one optimizer step, as `Trainer` passes it.
        shift: whether the row at position t is scored against the label at t + 1, as in causal language
            modelling, where model and `Trainer` carry labels unshifted. None: yes for (B, T, V), no for
            (N, C). Give False for token classification, masked language modelling or labels already shifted.
        options: the keywords of `rows`.

    A call returns a scalar, float32 (float64 for float64 logits); 0 where no position takes part. It raises
    ConfigError for an option with a value it cannot have, and for shapes that do not fit together.

    Attributes:
        rows: the loss itself, (M, C) and (M,) → (M,).

    Example:
        >>> import torch
        >>> from hf_reset.losses import generalized_cross_entropy
        >>> logits, labels = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([0, -100])
        >>> round(float(generalized_cross_entropy(logits, labels, q=1.0)), 6)
        0.5
    """

    rows: Callable[..., Tensor]

    @property
    def options(self) -> list[str]:
        """Names of the loss's own keywords, sorted."""
        return sorted(set(inspect.signature(self.rows).parameters) - {"logits", "labels"})

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        ignore_index: int = IGNORE_INDEX,
        num_items_in_batch: Tensor | float | None = None,
        shift: bool | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss as one number."""
        scored = scored_rows(logits, labels, ignore_index=ignore_index, shift=shift)
        values = self.rows(scored.logits, scored.labels, **options)
        return reduce(values, scored, num_items_in_batch=num_items_in_batch)


def scored_rows(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX, shift: bool | None = None
) -> ScoredRows:
    """Bring logits and labels into line, one row an example or token. Arguments as in a call of `Loss`.

    Raises:
        ConfigError: shapes that do not fit together, or `shift` for class logits.
    """
    if logits.ndim not in (2, 3) or logits.shape[:-1] != labels.shape:
        raise ConfigError(
            f"`logits` must be (N, C) with `labels` (N,), or (B, T, V) with (B, T); got "
            f"{tuple(logits.shape)} with {tuple(labels.shape)}."
        )
    if shift is None:
        shift = logits.ndim == 3
    labels = labels.to(logits.device)
    if shift:
        if logits.ndim != 3:
            raise ConfigError(
                "`shift` moves labels along a sequence and needs logits (B, T, V), got (N, C). "
                "Leave it out for class logits."
            )
        # The labels move, not the logits: a slice of the logits would have to be copied.
        labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    labels = labels.reshape(-1)
    taking_part = labels != ignore_index
    # A row left out still needs a label that exists; its weight 0 removes value and gradient alike.
    safe = torch.where(taking_part, labels, 0)
    return ScoredRows(logits.reshape(-1, logits.shape[-1]), safe, taking_part, logits.shape[0])


def reduce(
    values: Tensor,
    scored: ScoredRows,
    *,
    weights: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """Sum over the rows that take part, divided as transformers' `fixed_cross_entropy` divides.

    Args:
        values: (M,), what a loss of rows gave.
        scored: the rows it was given.
        weights: (N,) or (B,), at least 0: what each example's loss counts for. The divisor stays what it is
            without them, so that an example's pull does not depend on its neighbours in the batch, and
            micro-batches and ranks add up.
        num_items_in_batch: divide by this instead of by the number of rows that take part.

    Returns:
        Scalar.
    """
    if weights is not None:
        values = values * weights.to(values).repeat_interleave(values.shape[0] // scored.examples)
    total = torch.where(scored.taking_part, values, 0.0).sum()
    if num_items_in_batch is None:
        return total / scored.taking_part.sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(values.device)
    return total / num_items_in_batch


def per_example(values: Tensor, scored: ScoredRows) -> Tensor:
    """Mean over each example's own rows that take part: a sequence's mean token loss; itself for classes.

    Args:
        values: (M,), what a loss of rows gave.
        scored: the rows it was given.

    Returns:
        (N,) or (B,); NaN for an example of which nothing takes part.
    """
    taking_part = scored.taking_part.view(scored.examples, -1)
    sums = torch.where(taking_part, values.view(scored.examples, -1), 0.0).sum(dim=1)
    return sums / taking_part.sum(dim=1)
