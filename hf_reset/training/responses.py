"""How surprising each response is behind its own and another prompt: two forwards a row, before training begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hf_reset.anchor.ranks import gathered
from hf_reset.losses.reduce import IGNORE_INDEX, per_example, scored_rows
from hf_reset.losses.robust import cross_entropy_rows
from hf_reset.rows.identity import Batch, pop_rows

if TYPE_CHECKING:
    from transformers import TrainingArguments


@torch.no_grad()
def losses_before_training(
    model: nn.Module, loader: Any, args: TrainingArguments
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Mean token loss of each response behind its own prompt, and behind the prompt of a row far away in the data set.

    The work is dealt out to the processes, in as many forwards on each, since a sharded model takes them together.
    No random number is drawn: the loader's data set and collator are used, not its sampler.

    Args:
        model: as training wraps it, a causal language model.
        loader: the training loader, of numbered rows.
        args: the training arguments: device, `per_device_eval_batch_size`, this process and how many there are.

    Returns:
        Of each process, row numbers (M,), and losses (M,) in nats, behind the own prompt and behind the other; NaN for
        a row without response.
    """
    count, size = len(loader.dataset), args.per_device_eval_batch_size
    positions = list(range(args.process_index, count, args.world_size)) or [0]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    was_training = model.training
    model.eval()
    for first in range(0, -(-count // args.world_size), size):
        chosen = positions[first : first + size] or positions[:1]
        own, others = (
            loader.collate_fn(loader.dataset.__getitems__(rows))
            for rows in (chosen, [(row + count // 2) % count for row in chosen])
        )
        numbers = pop_rows(own)
        assert numbers is not None
        in_place = _rows_of(own)
        swapped = [_behind(other, one) for one, other in zip(in_place, _rows_of(others), strict=True)]
        losses = [_losses(model, _padded(rows), args.device) for rows in (in_place, swapped)]
        found.append((numbers, losses[0], losses[1]))
    model.train(was_training)  # each step of training sets it anew
    rows, own, others = (torch.cat(part) for part in zip(*found, strict=True))
    return gathered((rows, own, others))


_Row: TypeAlias = tuple[Tensor, Tensor]
"""Tokens (T,) and labels (T,) of one row, without padding."""


def _rows_of(batch: Batch) -> list[_Row]:
    masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    rows = zip(batch["input_ids"], batch["labels"], masks, strict=True)
    return [(ids[mask], labels[mask]) for ids, labels, mask in rows]


def _behind(other: _Row, one: _Row) -> _Row:
    """What follows the prompt of `one` behind the prompt of `other`, its end where both would be longer than either."""
    begins, ends = _prompt_length(other), _prompt_length(one)
    room = max(len(one[0]), len(other[0])) - (len(one[0]) - ends)
    kept = slice(max(0, begins - room), begins)
    return torch.cat([other[0][kept], one[0][ends:]]), torch.cat([other[1][kept], one[1][ends:]])


def _prompt_length(row: _Row) -> int:
    scored = (row[1] != IGNORE_INDEX).nonzero()
    return int(scored[0]) if len(scored) else len(row[1])


def _padded(rows: list[_Row]) -> dict[str, Tensor]:
    """ "input_ids", "attention_mask" and "labels", padded on the right."""
    ids, labels = zip(*rows, strict=True)
    lengths = torch.tensor([len(one) for one in ids])
    return {
        "input_ids": pad_sequence(list(ids), batch_first=True),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORE_INDEX),
    }


def _losses(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    scored = scored_rows(model(**batch).logits, labels, shift=True)
    return per_example(cross_entropy_rows(scored.logits, scored.labels), scored).float().cpu()
