"""What Trainer hands to every event of a callback, by name, beside arguments, state and control."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import DataLoader


class HookKeywords(TypedDict):
    """The keywords of an event: `**kwargs: Unpack[HookKeywords]`. Some events bring more, such as `metrics`."""

    model: nn.Module
    processing_class: object
    optimizer: Optimizer
    lr_scheduler: LRScheduler | None
    train_dataloader: DataLoader | None
    eval_dataloader: DataLoader | None
