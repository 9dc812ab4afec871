"""This rank's share of each parameter, as tensors that can be written in place.

The only room that knows how weights and optimizer state lie under DDP, FSDP and DeepSpeed. An anchor is a
copy of these views and a reset is one copy back; neither ever communicates.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter, FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.optim import Optimizer

from hf_reset.config import Scope
from hf_reset.errors import UnsupportedError

if TYPE_CHECKING:
    from accelerate import Accelerator

# What a rank holds of each parameter: all of it, rows in a DTensor, or a piece of a flat tensor.
Layout: TypeAlias = Literal["whole", "rows", "flat"]


class Shards:
    """Views for one process, DDP (every rank holds everything) and FSDP (every rank holds its share).

    FSDP2's shares are rows, in DTensors. FSDP1 cuts one flat tensor a unit: of a parameter a rank holds a
    one-dimensional piece, often an empty one.

    Args:
        model: the model, with its wrappers or without those around the whole of it but FSDP1's.
        parameters: the parameters of the scope, by name. They must be the objects that the optimizer holds.
        optimizer: a torch optimizer, with or without accelerate's wrapper; None where only weights matter.
    """

    def __init__(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: Optimizer | None = None
    ) -> None:
        self.parameters = parameters
        self._optimizer = unwrapped_optimizer(optimizer)
        self._fsdp = _fsdp_units(model)
        self.layout: Layout = "whole"
        if self._fsdp:
            self.layout = "rows" if any(isinstance(unit, FSDPModule) for unit in self._fsdp) else "flat"

    def weights(self, name: str) -> dict[str, Tensor]:
        """The tensors that together hold this rank's share of a parameter's value, by part."""
        return {"parameter": local_part(self.parameters[name])}

    def whole(self, name: str, share: Tensor, entry: str | None = None) -> Tensor:
        """A share of a parameter, or of an entry of its optimizer state, as the DTensor it is a share of.

        A tensor that every rank holds whole is given back as it is. Memory is shared, on whatever device.
        """
        like: Any = self.parameters.get(name)
        if like is not None and entry is not None and self._optimizer is not None:
            like = self._optimizer.state.get(like, {}).get(entry, like)
        if not isinstance(like, DTensor) or share.shape != like._local_tensor.shape:
            return share
        meta = TensorMeta(like.shape, like.stride(), share.dtype)
        spec = DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta)
        return DTensor(share, spec, requires_grad=False)  # not `from_local`: it would move a CPU anchor to the device

    def give_up_gathered(self, kept: Collection[str] = ()) -> None:
        """Before a write: give up gathered copies, which would otherwise hide it from the next forward.

        `kept` names parameters whose gathered copy will be written too. FSDP keeps the root's weights gathered
        after an evaluation, and unsharding is then a no-op.
        """
        for unit in self._fsdp:
            _reshard(unit)


class Zero12Shards(Shards):
    """Views for DeepSpeed ZeRO-1 and -2: whole low-precision weights, and a share of the float32 masters.

    The step reads the masters and overwrites the weights, so a reset writes both. The optimizer runs on flat
    partitions, one per parameter group; a parameter's entries are slices of theirs. The step count of Adam is
    one for a whole partition: a partial scope leaves it alone, a full one restores it.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        optimizer: Optimizer | None = None,
        *,
        full: bool = True,
    ) -> None:
        super().__init__(model, parameters, optimizer)
        self.layout = "flat"
        self._full = full

    def weights(self, name: str) -> dict[str, Tensor]:
        """The whole weight that the forward reads ("parameter"), and this rank's slice of its master."""
        return {"parameter": self.parameters[name].data, "master": self._slice(name, self._partition(name))}

    def optimizer_state(self, name: str) -> dict[str, Tensor | float]:
        """Slices of the flat state; the step count too where the scope is full."""
        partition = self._partition(name)
        if partition is None or self._optimizer is None:
            return {}
        entries: dict[str, Tensor | float] = {}
        for key, value in self._optimizer.state.get(partition, {}).items():
            if isinstance(value, Tensor) and value.shape == partition.shape:
                entries[key] = self._slice(name, value)
            elif self._full and isinstance(value, (Tensor, int, float)) and not isinstance(value, bool):
                entries[key] = value
        return entries

    def put_optimizer_state(self, name: str, key: str, value: Tensor | float) -> None:
        """Set a number of the partition, or make a flat entry that the optimizer has not made yet."""
        partition = self._partition(name)
        if partition is None or self._optimizer is None:
            return
        state = self._optimizer.state[partition]
        if not isinstance(value, Tensor) or value.dim() == 0:
            state[key] = value
            return
        if key not in state:
            state[key] = torch.zeros_like(partition)
        self._slice(name, state[key]).copy_(value)

    def _partition(self, name: str) -> Tensor | None:
        """The flat master that holds this rank's slice of a parameter; None where it holds none."""
        mapping = self.parameters[name]._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
        if mapping is None or self._optimizer is None:
            return None
        return self._optimizer.param_groups[mapping.param_group_index]["params"][0]

    def _slice(self, name: str, flat: Tensor | None) -> Tensor:
        """The part of a flat tensor that belongs to a parameter; empty where this rank has none."""
        parameter: Any = self.parameters[name]
        if flat is None:
            return parameter.data.new_empty(0, dtype=torch.float32)
        address = parameter._hp_mapping.get_hp_fragment_address()
        return flat.data.narrow(0, address.start, address.numel)


class Zero3Shards(Zero12Shards):
    """Views for DeepSpeed ZeRO-3: a share of the low-precision weights and of their float32 masters.

    Small, persistent parameters are gathered on every rank all the time; a third part, "gathered", writes
    those copies too, so that no gather is needed. Padding at the end of a share is left out.
    """

    def weights(self, name: str) -> dict[str, Tensor]:
        """This rank's share ("parameter"), its master, and the gathered copy of a persistent parameter."""
        parameter: Any = self.parameters[name]
        share = parameter.ds_tensor.data.reshape(-1).narrow(0, 0, self._numel(parameter))
        parts = {"parameter": share, "master": self._slice(name, self._partition(name))}
        if parameter.ds_persist and _is_gathered(parameter):
            parts["gathered"] = parameter.data
        return parts

    def give_up_gathered(self, kept: Collection[str] = ()) -> None:
        """Give up gathered copies that will not be written: an evaluation may have left some."""
        for name, parameter in self.parameters.items():
            if _is_gathered(parameter) and name not in kept:
                parameter.partition()  # pyright: ignore[reportAttributeAccessIssue]

    def _partition(self, name: str) -> Tensor:
        zero, (group, _, _) = self._position(name)
        return zero.fp32_partitioned_groups_flat[group]

    def _slice(self, name: str, flat: Tensor | None) -> Tensor:
        assert flat is not None  # every rank has a share of every parameter, though it may be all padding
        _, (_, offset, _) = self._position(name)
        return flat.data.narrow(0, offset, self._numel(self.parameters[name]))

    def _position(self, name: str) -> tuple[Any, tuple[int, int, int]]:
        """ZeRO's optimizer, and the group, offset and length of a parameter's share in its flat masters."""
        parameter: Any = self.parameters[name]
        zero = parameter._z3_optimizer
        return zero, zero.grad_position[zero.get_param_id(parameter)]

    @staticmethod
    def _numel(parameter: Any) -> int:
        """Elements of the share that are not padding."""
        share = parameter.ds_tensor.ds_numel
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        return max(0, min(share, parameter.ds_numel - rank * share))


def shards_of(
    model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: Optimizer | None = None, *, full: bool = True
) -> Shards:
    """The views that fit how `model` is laid out.

    Args:
        model: the model, wrapped or not.
        parameters: those of the scope, by name.
        optimizer: the optimizer, wrapped or not; None where only weights matter.
        full: whether the scope holds every trainable parameter.

    Raises:
        UnsupportedError: the layout or the optimizer is one in which a reset could not be exact.
    """
    refuse_unsupported(model, parameters, optimizer)
    if any(hasattr(p, "ds_id") for p in parameters.values()):
        return Zero3Shards(model, parameters, optimizer, full=full)
    if any(hasattr(p, "_hp_mapping") for p in parameters.values()):
        return Zero12Shards(model, parameters, optimizer, full=full)
    return Shards(model, parameters, optimizer)


def give_up_gathered(model: nn.Module) -> None:
    """Reshard every FSDP unit, so that `named_parameters()` gives the sharded originals."""
    for unit in _fsdp_units(model):
        _reshard(unit)


def has_units(model: nn.Module) -> bool:
    """Whether FSDP has wrapped the model, or parts of it."""
    return bool(_fsdp_units(model))


def _fsdp_units(model: nn.Module) -> list[FSDPModule | FullyShardedDataParallel]:
    return [module for module in model.modules() if isinstance(module, (FSDPModule, FullyShardedDataParallel))]


def _reshard(unit: FSDPModule | FullyShardedDataParallel) -> None:
    """Give up a unit's gathered weights; FSDP1 has no public way, and its root keeps them after an evaluation."""
    if isinstance(unit, FSDPModule):
        unit.reshard()
        return
    handle = unit._handle
    if handle is None or not handle.uses_sharded_strategy or not hasattr(handle.flat_param, "_local_shard"):
        return  # nothing of its own, every rank whole, or not run yet
    handle.reshard(free_unsharded_flat_param=True)
    handle.post_reshard()
    handle._prefetched = False


def refuse_part_of_flat(model: nn.Module, scope: Scope) -> None:
    """FSDP1 without original parameters has one tensor a unit: it can only be reset whole."""
    if scope != "all" and any(isinstance(p, FlatParameter) for p in model.parameters()):
        raise UnsupportedError(
            f"`scope` {scope!r} is not supported under FSDP1 without original parameters, where a unit is one flat "
            'parameter. Set `fsdp_use_orig_params: true` in the accelerate config, choose `scope="all"`, or move to '
            "`fsdp_version: 2`."
        )


def refuse_lost_state(model: nn.Module, optimizer: Optimizer | None) -> None:
    """At a resume: under FSDP1, accelerate loads from a sharded checkpoint what a new optimizer has, nothing."""
    raw = unwrapped_optimizer(optimizer)
    if not any(isinstance(unit, FullyShardedDataParallel) for unit in _fsdp_units(model)) or raw is None or raw.state:
        return
    groups = [group for group in raw.param_groups if any(p.numel() for p in group["params"])]
    if any(group.get("momentum") != 0 for group in groups):  # SGD without momentum has no state
        raise UnsupportedError(
            f"The state of {type(raw).__name__} was not loaded from the checkpoint, so the run would not go on as it "
            "was: under FSDP1 accelerate loads it from whole checkpoints only. Set `fsdp_state_dict_type: "
            "FULL_STATE_DICT` and start anew, or move to `fsdp_version: 2`."
        )


def refuse_unsupported(
    model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: Optimizer | None = None
) -> None:
    """Say in words what cannot be done, on every rank alike, before anything is stored."""
    refuse_unsupported_zero(parameters, optimizer)
    sharded = [name for name, p in parameters.items() if isinstance(p, DTensor)]
    if sharded and not any(isinstance(unit, FSDPModule) for unit in _fsdp_units(model)):
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


def refuse_unsupported_zero(parameters: dict[str, nn.Parameter], optimizer: Optimizer | None = None) -> None:
    """Under DeepSpeed, only those of its optimizers are right whose masters can be reached in memory."""
    in_zero = any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters.values())
    if in_zero and optimizer is None:
        raise UnsupportedError(
            "Under DeepSpeed ZeRO an anchor needs the optimizer, which holds the float32 masters. Pass `optimizer`."
        )
    zero = next((one for one in _chain(optimizer) if type(one).__module__.startswith("deepspeed.runtime")), None)
    if zero is None:
        return
    name = type(zero).__name__
    if name not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer") or not all(
        hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters.values()
    ):
        raise UnsupportedError(
            f"Resets under DeepSpeed's {name} are not supported: it keeps float32 masters that cannot be reached, and "
            "the next step would undo a reset of the weights alone. Set `zero_optimization.stage` to 1, 2 or 3, "
            "without ZenFlow or SuperOffload."
        )
    if getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False):
        raise UnsupportedError(
            "Resets under ZeRO-3 with weights or optimizer on NVMe are not supported: a reset would have to go "
            'through the disk. Set `offload_optimizer.device` and `offload_param.device` to "cpu" or "none".'
        )
    if any(getattr(p, "ds_secondary_tensor", None) is not None for p in parameters.values()):
        raise UnsupportedError(
            "Resets under ZeRO-3 with `zero_hpz_partition_size` above 1 are not supported: its second set of shares "
            "would hide a reset. Set it to 1."
        )


def unwrapped_optimizer(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer inside the wrappers of accelerate and DeepSpeed; a wrapper of the user's own is the user's."""
    return None if optimizer is None else list(_chain(optimizer))[-1]


def _chain(optimizer: Optimizer | None) -> Iterator[Optimizer]:
    """An optimizer and what it wraps, from the outside in, as far as the wrappers are the host's."""
    while optimizer is not None:
        yield optimizer
        is_hosts = type(optimizer).__module__.partition(".")[0] in ("accelerate", "deepspeed")
        inner = getattr(optimizer, "optimizer", None)
        optimizer = inner if is_hosts and hasattr(inner, "param_groups") else None


def _is_gathered(parameter: Any) -> bool:
    """Whether ZeRO-3 holds the whole of a parameter on this rank at the moment."""
    return parameter.ds_status.name == "AVAILABLE"


def whole_state(accelerator: Accelerator, wrapped: nn.Module | None) -> dict[str, Tensor]:
    """A model's whole state dict, on rank 0 at least; a collective, to be called on every rank.

    Args:
        accelerator: the Trainer's.
        wrapped: the model as it prepared it (`trainer.model_wrapped`).
    """
    state: Any = accelerator.get_state_dict(wrapped) or {}  # ZeRO-3 gathers on rank 0 only
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]], *, non_blocking: bool = False) -> None:
    """Copy each source (second) into its target (first), in one fused call per device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype, torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        key = (target.device, target.dtype, source.device, source.dtype)
        group = groups.get(key)
        if group is None:
            group = groups[key] = ([], [])
        group[0].append(target)
        group[1].append(source)
    for targets, sources in groups.values():
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            targets, sources, non_blocking=non_blocking
        )


def local_part(tensor: Tensor) -> Tensor:
    """A view of this rank's part that shares memory and takes no part in autograd."""
    if isinstance(tensor, DTensor):
        return tensor._local_tensor.detach()
    return tensor.detach()
