"""This rank's share of each parameter, as tensors that can be written in place.

The only room that knows how weights and optimizer state lie under DDP, FSDP and DeepSpeed. An anchor is a
copy of these views and a reset is one copy back; neither ever communicates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from hf_reset.errors import UnsupportedError


class Shards:
    """Views for one process, DDP (every rank holds everything) and FSDP2 (every rank holds its rows).

    Args:
        model: the model inside DDP or `torch.compile`, or an FSDP2 module.
        parameters: the parameters of the scope, by name. They must be the objects that the optimizer holds.
        optimizer: a torch optimizer, with or without accelerate's wrapper; None where only weights matter.
    """

    sharded: bool = False

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: Any = None) -> None:
        self._parameters = parameters
        self._optimizer = unwrapped_optimizer(optimizer)
        self._fsdp = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.sharded = bool(self._fsdp)

    def weights(self, name: str) -> dict[str, Tensor]:
        """The tensors that together hold this rank's share of a parameter's value, by part."""
        return {"parameter": _local(self._parameters[name])}

    def optimizer_state(self, name: str) -> dict[str, Any]:
        """This rank's share of the optimizer's state of a parameter: tensors to write in place, and numbers."""
        if self._optimizer is None:
            return {}
        state = self._optimizer.state.get(self._parameters[name], {})
        return {
            key: _local(value) if isinstance(value, Tensor) else value
            for key, value in state.items()
            if isinstance(value, (Tensor, int, float)) and not isinstance(value, bool)
        }

    def put_optimizer_state(self, name: str, key: str, value: Any) -> None:
        """Set an entry that is a number, or that the optimizer has not made yet."""
        parameter = self._parameters[name]
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.dim() == parameter.dim() > 0:
            value = DTensor.from_local(
                value,
                parameter.device_mesh,
                parameter.placements,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        self._optimizer.state[parameter][key] = value

    def settle(self) -> None:
        """Before a write: give up gathered copies, which would otherwise hide it from the next forward.

        FSDP keeps the root's weights gathered after an evaluation, and unsharding is then a no-op.
        """
        for module in self._fsdp:
            module.reshard()


def shards_of(model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: Any = None) -> Shards:
    """The views that fit how `model` is laid out.

    Raises:
        UnsupportedError: the layout or the optimizer is one in which a reset could not be exact.
    """
    refuse_unsupported(model, parameters, optimizer)
    return Shards(model, parameters, optimizer)


def settle(model: nn.Module) -> None:
    """Reshard every FSDP2 module, so that `named_parameters()` gives the sharded originals."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_unsupported(model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: Any = None) -> None:
    """Say in words what cannot be done, on every rank alike, before anything is stored."""
    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise UnsupportedError(
            "Resets under FSDP1 are not supported: its flat parameters keep gathered copies that would hide a "
            "reset. Set `fsdp_version: 2` in the accelerate config (or `version: 2` in `fsdp_config`)."
        )
    if any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters.values()):
        raise UnsupportedError(
            "Resets under DeepSpeed ZeRO are not supported yet: writing only the module's weights would be undone "
            "by the next step. Launch with DDP or FSDP2."
        )
    sharded = [name for name, p in parameters.items() if isinstance(p, DTensor)]
    if sharded and not any(isinstance(module, FSDPModule) for module in modules):
        raise UnsupportedError(
            f"Parameter {sharded[0]!r} is a DTensor outside FSDP2 (tensor parallelism, or a model sharded at load "
            "time), where resets are not supported. Launch with DDP or FSDP2."
        )
    raw = unwrapped_optimizer(optimizer)
    if callable(getattr(raw, "train", None)) and callable(getattr(raw, "eval", None)):
        raise UnsupportedError(
            f"Optimizer {type(raw).__name__} is schedule-free: the weights it evaluates are not those it trains, so "
            "the best evaluated weights cannot be put back mid-training. Choose another `optim`, such as "
            '"adamw_torch".'
        )


def refuse_zeroing(optimizer: Any) -> None:
    """Quantised optimizer state has no all-zero form that means "fresh"."""
    raw = unwrapped_optimizer(optimizer)
    if type(raw).__module__.startswith("bitsandbytes"):
        raise UnsupportedError(
            f'`optimizer_state="zero"` cannot be done for {type(raw).__name__}, whose state is quantised. Choose '
            '`optimizer_state="restore"` or "keep".'
        )


def unwrapped_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's wrapper."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]], *, non_blocking: bool = False) -> None:
    """Copy each source (second) into its target (first), in one fused call per device and dtype."""
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        key = (target.device, target.dtype, source.device, source.dtype)
        targets, sources = groups.setdefault(key, ([], []))
        targets.append(target)
        sources.append(source)
    for targets, sources in groups.values():
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            targets, sources, non_blocking=non_blocking
        )


def _local(tensor: Tensor) -> Tensor:
    """A view of this rank's part that shares memory and takes no part in autograd."""
    if isinstance(tensor, DTensor):
        return tensor._local_tensor.detach()
    return tensor.detach()
