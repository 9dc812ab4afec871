"""How surprising each response of a training set is without its prompt: one forward a row, before training begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_reset.anchor.ranks import gathered
from hf_reset.losses.reduce import IGNORE_INDEX, per_example, scored_rows
from hf_reset.losses.robust import cross_entropy_rows
from hf_reset.rows.identity import Batch, pop_rows

if TYPE_CHECKING:
    from transformers import TrainingArguments


@torch.no_grad()
def losses_without_prompts(model: nn.Module, loader: Any, args: TrainingArguments) -> list[tuple[Tensor, Tensor]]:
    """Mean token loss of each response by itself, behind the token that begins a text.

    The work is dealt out to the processes, in as many forwards on each, since a sharded model takes them together.
    No random number is drawn: the loader's data set and collator are used, not its sampler.

    Args:
        model: as training wraps it, a causal language model.
        loader: the training loader, of numbered rows.
        args: the training arguments: device, `per_device_eval_batch_size`, this process and how many there are.

    Returns:
        Of each process, row numbers (M,) and losses (M,) in nats; NaN for a row without response.
    """
    positions = list(range(args.process_index, len(loader.dataset), args.world_size)) or [0]
    most = -(-len(loader.dataset) // args.world_size)
    start = _start_token(getattr(model, "module", model).config)
    found: list[tuple[Tensor, Tensor]] = []
    was_training = model.training
    model.eval()
    for first in range(0, most, args.per_device_eval_batch_size):
        chosen = positions[first : first + args.per_device_eval_batch_size] or positions[:1]
        batch = loader.collate_fn(loader.dataset.__getitems__(chosen))
        rows = pop_rows(batch)
        assert rows is not None
        found.append((rows, _losses(model, _responses_alone(batch, start), args.device)))
    model.train(was_training)  # each step of training sets it anew
    rows, losses = (torch.cat(part) for part in zip(*found, strict=True))
    return gathered((rows, losses))


def _start_token(config: object) -> int:
    """What begins a text: the tokens of a model's configuration, in the order of preference."""
    text = getattr(config, "get_text_config", lambda: config)()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(text, name, None)
        if token is not None:
            return int(token[0] if isinstance(token, (list, tuple)) else token)
    return 0


def _responses_alone(batch: Batch, start: int) -> dict[str, Tensor]:
    """The tokens that are scored, behind `start`, padded on the right: "input_ids", "attention_mask", "labels"."""
    responses = [ids[labels != IGNORE_INDEX] for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    width = 1 + max(1, *(len(response) for response in responses)) if responses else 2
    ids = torch.full((len(responses), width), start, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    for row, response in enumerate(responses):
        ids[row, 1 : 1 + len(response)] = labels[row, 1 : 1 + len(response)] = response
        mask[row, : 1 + len(response)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _losses(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    scored = scored_rows(model(**batch).logits, labels, shift=True)
    return per_example(cross_entropy_rows(scored.logits, scored.labels), scored).float().cpu()
