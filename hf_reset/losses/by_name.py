"""Losses by name, as `Trainer` takes them. To add one, write its rows and add a line to `LOSSES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hf_reset.errors import ConfigError
from hf_reset.losses.memory import REMEMBERING_LOSSES
from hf_reset.losses.reduce import Loss
from hf_reset.losses.robust import (
    active_passive_rows,
    cross_entropy_rows,
    generalized_cross_entropy_rows,
    hard_bootstrapping_rows,
    soft_bootstrapping_rows,
    symmetric_cross_entropy_rows,
)

cross_entropy = Loss(cross_entropy_rows)
generalized_cross_entropy = Loss(generalized_cross_entropy_rows)
symmetric_cross_entropy = Loss(symmetric_cross_entropy_rows)
active_passive = Loss(active_passive_rows)
soft_bootstrapping = Loss(soft_bootstrapping_rows)
hard_bootstrapping = Loss(hard_bootstrapping_rows)

Outputs: TypeAlias = dict[str, Tensor] | Sequence[Tensor]
"""What a model returns: a mapping, or a tuple that begins with the logits."""

LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "generalized_cross_entropy": generalized_cross_entropy,
    "gce": generalized_cross_entropy,
    "symmetric_cross_entropy": symmetric_cross_entropy,
    "sce": symmetric_cross_entropy,
    "active_passive": active_passive,
    "nce_rce": active_passive,
    "soft_bootstrapping": soft_bootstrapping,
    "hard_bootstrapping": hard_bootstrapping,
}


def compute_loss_func(name: str, *, shift: bool | None = None, **options: Any) -> Callable[..., Tensor]:
    """The loss called `name` as `Trainer`'s `compute_loss_func(outputs, labels, num_items_in_batch)`.

    `Trainer(..., compute_loss_func=compute_loss_func("gce", q=0.7))` uses it in training and in evaluation,
    so that `eval_loss` is this loss too. A trainer subclass sets `self.compute_loss_func` after
    `super().__init__`, which also suits TRL's SFTTrainer, whose constructor argument is deprecated; it then
    passes `shift=shifts_labels(model)`, because the logits' shape alone does not tell token classification
    from causal language modelling.

    Args:
        name: a key of `LOSSES`.
        shift: see `Loss`.
        options: the loss's own keywords, such as `q` or `alpha` and `beta`, and `ignore_index`.

    Raises:
        ConfigError: an unknown name, or an option that this loss does not take or cannot have.
    """
    loss = named_loss(name, **options)

    def compute(outputs: Outputs, labels: Tensor | None, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        if labels is None:
            raise ConfigError(f"loss {name!r} needs `labels` in every batch, and this one has none.")
        return loss(logits_of(outputs), labels, num_items_in_batch=num_items_in_batch, shift=shift, **options)

    return compute


def named_loss(name: str, **options: Any) -> Loss:
    """The loss called `name`, once it has been seen to take `options`.

    Raises:
        ConfigError: an unknown name, or an option that this loss does not take or cannot have.
    """
    if name not in LOSSES:
        remedy = " It remembers rows, which ResetTrainer knows: use `reset_loss`." if name in REMEMBERING_LOSSES else ""
        raise ConfigError(f"`loss` must be one of {', '.join(LOSSES)}, got {name!r}.{remedy}")
    loss = LOSSES[name]
    known = sorted([*loss.options, "ignore_index"])
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"loss {name!r} takes no {', '.join(unknown)}; it takes {', '.join(known)}.")
    loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), **options)  # refuses bad values before training
    return loss


def logits_of(outputs: Outputs) -> Tensor:
    """The logits among a model's outputs, a mapping or a tuple."""
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]


def shifts_labels(model: torch.nn.Module) -> bool:
    """Whether `model` is a causal language model, whose labels are to be shifted by the loss.

    Looks through PEFT and other wrappers at the class that transformers registers for causal modelling.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(base.__name__ in causal for module in model.modules() for base in type(module).__mro__)
