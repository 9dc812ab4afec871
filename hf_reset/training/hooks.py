"""What a callback is handed at every event beside arguments, state and control, and how it finds the reset callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import DataLoader
    from transformers import TrainerCallback, TrainerState


class HookKeywords(TypedDict):
    """The keywords of an event: `**kwargs: Unpack[HookKeywords]`. Some events bring more, such as `metrics`."""

    model: nn.Module
    processing_class: object
    optimizer: Optimizer
    lr_scheduler: LRScheduler | None
    train_dataloader: DataLoader | None
    eval_dataloader: DataLoader | None


def resets_of(state: TrainerState) -> Any:
    """The run's `StochasticResetCallback`; None in a run without one, and before training begins."""
    return getattr(state, "_stochastic_reset_callback", None)


def introduce_resets(state: TrainerState, callback: TrainerCallback) -> None:
    """Let the other callbacks of a run find the one that resets."""
    state._stochastic_reset_callback = callback  # pyright: ignore[reportAttributeAccessIssue]
