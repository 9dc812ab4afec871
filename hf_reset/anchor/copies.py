"""A copy of live views, in memory of its own: what an anchor and an average of the weights are both made of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_reset.anchor.optimizers.memory import OptimizerMemory
from hf_reset.anchor.scopes import (
    batch_norm_buffers,
    covers_all,
    named_parameters,
    refuse_rank_allocation,
    select_parameters,
    unwrapped,
)
from hf_reset.anchor.shards import Layout, copy_all, give_up_gathered, refuse_part_of_flat, shards_of
from hf_reset.config import Scope

_STATE = ("optimizer", "fresh")
_PASSING = (*_STATE, "gathered")  # kinds that may not be there at a given moment
_REST = "rest-"  # before the kind of what lies outside the scope


Live: TypeAlias = Mapping["Key", Tensor | float]
"""Where what an anchor holds lives: this rank's tensors, in place, and an optimizer's plain numbers."""


class Key(NamedTuple):
    """What one held value is a copy of.

    Attributes:
        kind: "parameter", "master" (DeepSpeed's float32 weights), "gathered" (ZeRO-3's whole copy of a small
            parameter), "buffer", "optimizer", or "fresh" (the optimizer's before its first step);
            "rest-parameter" and so on for what lies outside the scope.
        entry: of the optimizer's, the way to it, such as "exp_avg"; None for every other kind.
        name: the parameter's or the buffer's; "" for what an optimizer's parameters share.
    """

    kind: str
    entry: str | None
    name: str

    def __str__(self) -> str:
        """As it stands in a file: "kind/name", or "optimizer/entry/name"."""
        return "/".join(part for part in self if part is not None)

    @classmethod
    def parse(cls, text: str) -> Key:
        """The key that is written `text` in a file."""
        kind, _, rest = text.partition("/")
        if kind not in _STATE:
            return cls(kind, None, rest)
        entry, _, name = rest.partition("/")
        return cls(kind, entry, name)

    @property
    def is_optimizer(self) -> bool:
        """Whether it belongs to the optimizer, and not to the weights."""
        return self.kind in _STATE

    @property
    def is_rest(self) -> bool:
        """Whether it lies outside the scope."""
        return self.kind.startswith(_REST)

    @property
    def is_passing(self) -> bool:
        """Whether it may not be there at a given moment: optimizers and engines make and drop it."""
        return self.kind in _PASSING


class LiveViews:
    """The live values of a scope by key: this rank's share, as tensors to write in place.

    Args:
        model: the model being trained, wrapped or not.
        optimizer: its optimizer; None where only weights matter.
        scope: which trainable parameters, see `hf_reset.select_parameters`. A scope that covers all of them
            takes the running statistics of BatchNorm layers along.
        rest: whether the trainable parameters outside the scope are reachable too, see `rest`.

    Attributes:
        parameters: the parameters of the scope, by name.
        is_full: whether they are all that is trained.
        shards: how they lie under DDP, FSDP or DeepSpeed.
        memory: what the optimizer remembers of them.

    Raises:
        ScopeError: the scope selects nothing, everything by accident, or a tied head.
        UnsupportedError: the model's layout or the optimizer is one in which a reset could not be exact.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None = None, scope: Scope = "all", *, rest: bool = False
    ) -> None:
        self._model = unwrapped(model)
        give_up_gathered(model)
        refuse_part_of_flat(model, scope)
        self.parameters = select_parameters(self._model, scope)
        self.is_full = covers_all(self._model, self.parameters)
        self._rest = self._outside() if rest else {}
        reachable = {**self.parameters, **self._rest}
        refuse_rank_allocation(self._model, reachable)
        self.shards = shards_of(model, reachable, optimizer, full=self.is_full)
        self.memory = OptimizerMemory(optimizer, self.shards, self._model, self.parameters, full=self.is_full)
        self._whole = {Key("parameter", None, name): p for name, p in self.parameters.items()}
        self._buffers = batch_norm_buffers(self._model) if self.is_full or self._rest else []

    @property
    def layout(self) -> Layout:
        """What this rank holds of each parameter: the "whole", "rows" (FSDP2), or a piece of a "flat" tensor."""
        return self.shards.layout

    def weights(self) -> dict[Key, Tensor]:
        """Every tensor that holds weights of the scope, or with a full one BatchNorm's statistics."""
        live: dict[Key, Tensor]
        if self.layout == "whole":  # the usual case, at each reset, without a key made anew
            live = {key: p.detach() for key, p in self._whole.items()}
        else:
            live = {
                Key(part, None, name): tensor
                for name in self.parameters
                for part, tensor in self.shards.weights(name).items()
            }
        if self.is_full:
            live.update({Key("buffer", None, name): self._model.get_buffer(name) for name in self._buffers})
        return live

    def rest(self) -> dict[Key, Tensor]:
        """Every tensor that holds trainable weights outside the scope, and BatchNorm's statistics, if asked for."""
        live = {
            Key(_REST + part, None, name): tensor
            for name in self._rest
            for part, tensor in self.shards.weights(name).items()
            if part != "gathered"  # the next forward gathers anew
        }
        if self._rest:
            live.update({Key(_REST + "buffer", None, name): self._model.get_buffer(name) for name in self._buffers})
        return live

    def whole(self, key: Key, share: Tensor) -> Tensor:
        """The DTensor that a share is this rank's part of; where weights are no DTensors, the share itself."""
        return share if key.kind.endswith("buffer") else self.shards.whole(key.name, share, key.entry)

    def device_of(self, key: Key) -> torch.device:
        """Where a value of this key lies, or would lie if there were one."""
        if key.kind.endswith("buffer"):
            return self._model.get_buffer(key.name).device
        if key.name not in self.parameters:
            return torch.device("cpu")
        return self.shards.weights(key.name)["parameter"].device

    def give_up_gathered(self, kept: Collection[Key] = (), *, rest: bool = False) -> None:
        """Before a write: drop whole copies that an evaluation left, which would hide it.

        Args:
            kept: copies that will be written too.
            rest: whether the rest will be written, or only the scope.
        """
        if self.layout != "whole":
            others = set() if rest else set(self._rest)
            self.shards.give_up_gathered(others | {key.name for key in kept if key.kind == "gathered"})

    def _outside(self) -> dict[str, nn.Parameter]:
        trained = {name: p for name, p in named_parameters(self._model).items() if p.requires_grad}
        return {name: p for name, p in trained.items() if name not in self.parameters}


class Copy:
    """A copy of live values by key. It knows no model: the live views are passed in.

    Args:
        storage: "device", beside what is copied, or "cpu" (pinned where that is on CUDA).
        least: floating-point values are held in this precision at least; None: as they are.

    Attributes:
        held: the copied value of each key, numbers as tensors.
    """

    def __init__(self, storage: Literal["device", "cpu"] = "device", *, least: torch.dtype | None = None) -> None:
        self.storage = storage
        self.held: dict[Key, Tensor] = {}
        self._least = least

    def __bool__(self) -> bool:
        return bool(self.held)

    @property
    def nbytes(self) -> int:
        """Bytes that the copy takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.held.values())

    @torch.no_grad()
    def take(self, live: Live) -> bool:
        """Copy the live values, into the memory of the last copy where they still fit.

        Returns:
            Whether all of that memory, and none besides, was used again.
        """
        before, self.held = self.held, {key: self.room(value, self.held.get(key)) for key, value in live.items()}
        pairs = [(self.held[key], value) for key, value in live.items() if isinstance(value, Tensor)]
        copy_all(pairs, non_blocking=True)
        self._wait_for([value for _, value in pairs])
        return len(before) == len(self.held) and all(self.held.get(key) is held for key, held in before.items())

    @torch.no_grad()
    def put_back(self, live: Live) -> None:
        """Copy back into those live tensors that are held, in one fused call."""
        copy_all(self.pairs(live), non_blocking=True)

    @torch.no_grad()
    def exchange(self, live: Live) -> None:
        """Live and held tensors change places, one at a time. They must have one dtype for both to stay exact."""
        for tensor, held in self.pairs(live):
            kept = tensor.clone()
            tensor.copy_(held)
            held.copy_(kept)

    @torch.no_grad()
    def lerp(self, live: Live, weight: float) -> None:
        """Go a part of the way to the live values: held ← held + `weight` · (live − held). Integers are copied."""
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for tensor, held in self.pairs(live):
            if not held.is_floating_point():
                held.copy_(tensor)
                continue
            targets, sources = groups.setdefault((held.device, held.dtype), ([], []))
            targets.append(held)
            sources.append(tensor.to(held.device, held.dtype))
        for targets, sources in groups.values():
            torch._foreach_lerp_(targets, sources, weight)  # pyright: ignore[reportPrivateImportUsage]

    def room(self, value: Tensor | float, used: Tensor | None = None) -> Tensor:
        """Memory for one value (a number is copied into it at once): `used` where that fits."""
        if not isinstance(value, Tensor):
            return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        dtype = value.dtype
        if self._least is not None and value.is_floating_point():
            dtype = torch.promote_types(dtype, self._least)
        if used is not None and used.shape == value.shape and used.dtype == dtype:
            return used
        device = torch.device("cpu") if self.storage == "cpu" else value.device
        pinned = self.storage == "cpu" and value.device.type == "cuda"
        return torch.empty(value.shape, dtype=dtype, device=device, pin_memory=pinned)

    def pairs(self, live: Live) -> list[tuple[Tensor, Tensor]]:
        """Each live tensor that is held, and its held value."""
        held = self.held
        return [(value, held[key]) for key, value in live.items() if key in held and isinstance(value, Tensor)]

    def _wait_for(self, sources: Iterable[Tensor]) -> None:
        """A copy from CUDA to pinned memory has landed only once the device has caught up."""
        if self.storage == "cpu":
            for device in {source.device for source in sources if source.device.type == "cuda"}:
                torch.cuda.synchronize(device)
