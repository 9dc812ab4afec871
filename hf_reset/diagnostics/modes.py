"""Look at a model in mid-training and leave no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from hf_reset.anchor.scopes import named_parameters, unwrapped
from hf_reset.anchor.shards import shards_of
from hf_reset.errors import UnsupportedError


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` and no gradients; on leaving, each module is back in the mode of its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Collators and models that draw random numbers draw none of the training's."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def refuse_sharded(model: nn.Module, name: str) -> None:
    """Raise UnsupportedError where no process holds the weights whole (FSDP, DeepSpeed).

    Args:
        model: the model, wrapped or not.
        name: of what needs them whole.
    """
    if shards_of(model, named_parameters(unwrapped(model))).layout != "whole":
        raise UnsupportedError(
            f"{name} needs the weights whole on each process, and FSDP or DeepSpeed shares them out. Watch a run "
            "under DDP or on one device, or leave the callback out."
        )
