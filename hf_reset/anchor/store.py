"""The anchor: a copy of the parameters of a scope, and putting it back in place."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_reset.anchor.copies import Copy, Key, LiveViews
from hf_reset.anchor.file import Header, Shapes, read_copy, write_copy
from hf_reset.anchor.optimizers.look import KEEP, Look
from hf_reset.anchor.optimizers.memory import from_header, to_header
from hf_reset.anchor.optimizers.put_back import Held
from hf_reset.anchor.optimizers.reach import Place
from hf_reset.anchor.shards import Layout, copy_all
from hf_reset.config import Scope
from hf_reset.errors import AnchorError, AnchorFileError

_CHUNK = 1 << 22  # elements compared at a time, so that a distance costs megabytes and not a second model


class AnchorStore:
    """Keeps one anchor of a model's parameters, and puts it back. For the callback, and for one's own loop.

    The anchor holds this rank's share of the scope (and, under `optimizer_state="restore"`, of its optimizer
    state), never a copy of the model. Neither `snapshot` nor `restore` communicates.

    Args:
        model: the model being trained, wrapped or not.
        optimizer: its optimizer; None leaves optimizer state alone.
        scope: which trainable parameters, see `hf_reset.select_parameters`. A scope that covers all of them
            takes the running statistics of BatchNorm layers along.
        optimizer_state: on restore, "restore" what it was at the snapshot, "zero" it, or "keep" it.
        storage: "device", beside the weights, or "cpu" (pinned where the weights are on CUDA).
        keep_rest: whether `snapshot` copies the trainable weights outside the scope too, for `finish` and `swapped`:
            the bytes of these weights, without optimizer state. With a scope that covers everything it makes no
            difference.

    Raises:
        ScopeError: the scope selects nothing, everything by accident, or a tied head.
        UnsupportedError: the model's layout or the optimizer is one in which a reset could not be exact.

    Example:
        >>> anchor = AnchorStore(model, optimizer, scope="head")
        >>> anchor.snapshot()  # at a new best
        >>> anchor.restore()  # later: back to it, in place
        >>> with anchor.swapped():
        ...     evaluate(model)  # on the anchor, for a moment
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        scope: Scope = "all",
        optimizer_state: Literal["restore", "zero", "keep"] = "restore",
        storage: Literal["device", "cpu"] = "device",
        *,
        keep_rest: bool = False,
    ) -> None:
        self.scope = scope
        self.optimizer_state = optimizer_state
        self.storage: Literal["device", "cpu"] = storage
        self._views = LiveViews(model, optimizer, scope, rest=keep_rest)
        self._copy = Copy(storage)
        self._look = Look(KEEP, {}, {})  # what the optimizer is to remember after a reset, its tensors apart
        self._held: Held | None = None  # the optimizer's part of what a reset puts back, once one did
        self._fresh = Copy(storage)  # those tensors, where they are not the anchor's but a fresh optimizer's
        if optimizer_state != "keep":
            self._views.memory.rehearse()
        if optimizer_state == "restore":
            self._views.memory.look()  # to refuse now what it could not do at the first snapshot
        elif optimizer_state == "zero":
            look = self._views.memory.fresh()
            self._fresh.take(_keyed("fresh", look))
            self._look = look._replace(tensors={})
        self._swapped = False

    @property
    def names(self) -> list[str]:
        """Names of the parameters in the scope, in model order."""
        return list(self._views.parameters)

    @property
    def is_full(self) -> bool:
        """Whether the scope is all that is trained."""
        return self._views.is_full

    @property
    def holds_all(self) -> bool:
        """Whether all trainable weights of the snapshot are held: the scope is full, or the rest was kept."""
        return bool(self._copy) and (self.is_full or any(key.is_rest for key in self._copy.held))

    @property
    def is_set(self) -> bool:
        """Whether there is an anchor to restore."""
        return bool(self._copy)

    @property
    def layout(self) -> Layout:
        """What this rank holds of each parameter, and so what `save` writes.

        "whole": all of it; one file for all ranks. "rows": FSDP2's; `save` and `load` are for all ranks at once, and
        the path is one directory for all. "flat": a piece of a flat tensor (DeepSpeed, FSDP1); a file a rank, for
        one number of processes.
        """
        return self._views.layout

    @property
    def needs_gradients(self) -> bool:
        """Whether the optimizer's step may fail where no parameter has a gradient; a few do."""
        return self._views.memory.needs_gradients

    @property
    def nbytes(self) -> int:
        """Bytes the anchor holds on this rank; before the first snapshot, those it would hold."""
        if self._copy:
            return self._copy.nbytes + self._fresh.nbytes
        return sum(tensor.nbytes for tensor in self._live().values()) + self._fresh.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """The anchored value of each parameter by name, this rank's share; to read, not to write."""
        self._require_set("tensors")
        return {name: self._copy.held[Key("parameter", None, name)] for name in self.names}

    def snapshot(self) -> None:
        """Take the live parameters as the anchor, into the memory of the last one."""
        self._refuse_swapped("snapshot")
        live, arranged = {**self._views.weights(), **self._views.rest()}, self._look.arrangements
        if self.optimizer_state == "restore":
            look = self._views.memory.look()
            live.update(_keyed("optimizer", look))
            self._look = look._replace(tensors={})  # live ones, which the optimizer may let go of
        held, self._held = self._held, None  # what fails half-way is nothing to go by
        if self._copy.take(live) and self._look.arrangements == arranged:
            self._held = held

    @torch.no_grad()
    def restore(self) -> None:
        """Put the anchor back into the live parameters, in place.

        Raises:
            AnchorError: there is no anchor yet, or it is swapped in.
        """
        self._refuse_swapped("restore")
        self._require_set("restore")
        self._views.give_up_gathered(kept=self._copy.held)
        pairs = self._copy.pairs(self._views.weights())
        if self.optimizer_state != "keep":
            if self._held is None:
                copied = (self._copy if self.optimizer_state == "restore" else self._fresh).held.items()
                self._held = Held({Place(key.entry or "", key.name): held for key, held in copied if key.is_optimizer})
            pairs += self._views.memory.put_back(self._look, self._held)
        copy_all(pairs, non_blocking=True)

    def finish(self) -> bool:
        """Leave the model as it was when the anchor was taken: `restore`, and the weights outside the scope.

        Returns:
            Whether all trainable weights are the anchor's, see `holds_all`.

        Raises:
            AnchorError: there is no anchor yet, or it is swapped in.
        """
        self.restore()
        rest = self._views.rest()
        if rest:
            self._views.give_up_gathered(rest=True)
            self._copy.put_back(rest)
        return self.holds_all

    def distance(self) -> float:
        """Euclidean distance ‖θ − θ_c‖ of the live parameters from the anchor (this rank's share of it)."""
        return math.sqrt(self.squared_distance())

    @torch.no_grad()
    def squared_distance(self) -> float:
        """‖θ − θ_c‖² over this rank's share; shares of all ranks add up. It holds no second copy."""
        self._require_set("distance")
        totals: dict[torch.device, Tensor] = {}
        for name in self.names:
            parts = self._views.shards.weights(name)
            part = "master" if "master" in parts else "parameter"
            live, held = parts[part].reshape(-1), self._copy.held[Key(part, None, name)].reshape(-1)
            for start in range(0, live.numel(), _CHUNK):
                gap = live[start : start + _CHUNK].float()
                gap = gap - held[start : start + _CHUNK].to(gap.device, non_blocking=True)
                square = torch.dot(gap, gap).double()
                totals[gap.device] = totals[gap.device] + square if gap.device in totals else square
        return sum(float(total) for total in totals.values())

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """For a moment, the live parameters are the anchor's; they come back on leaving.

        All that the anchor holds: with `keep_rest` the model is as it was at the snapshot, as `finish` leaves it.
        Without it, what lies outside a partial scope stays live. Optimizer state stays where it is. One tensor at a
        time is held twice.
        """
        self._refuse_swapped("swapped")
        self._require_set("swapped")
        self._exchange()
        self._swapped = True
        try:
            yield
        finally:
            self._swapped = False
            self._exchange()

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, object] | None = None) -> None:
        """Write the anchor, whole or not at all: a safetensors file, of this rank's share where it is sharded.

        Under FSDP2 all ranks call it with one path, which becomes a `torch.distributed.checkpoint` directory.

        Args:
            path: the file. It is written under a temporary name beside it, flushed to disk, and renamed.
            metadata: JSON-plain values to keep in the file's header.

        Raises:
            AnchorFileError: the disk is full or the place cannot be written.
        """
        self._refuse_swapped("save")
        header = {"scope": json.dumps(self.scope), "optimizer_state": self.optimizer_state}
        header["metadata"] = json.dumps(metadata or {})
        header["optimizer"] = to_header(self._look.form)
        write_copy(path, {**self._copy.held, **self._fresh.held}, header, self._views)

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read an anchor that `save` wrote; live parameters do not change until `restore`.

        Under FSDP2 all ranks call it, and their number may be another than when it was written. Values are cast
        to the live parameters' device (or the storage) and dtype.

        Returns:
            The metadata that was saved with it.

        Raises:
            AnchorFileError: the file is missing, truncated, or belongs to another model or scope.
        """
        self._refuse_swapped("load")
        live, check = self._live(), partial(self._check_fit, path)
        copy = Copy(self.storage)
        header = read_copy(path, copy, live, self._views, check=check, wanted=self._is_wanted)
        if header["optimizer_state"] == self.optimizer_state:
            self._look = from_header(path, header)
        else:
            self.refuse_unknown_fresh()
        self._fresh.held = {key: copy.held.pop(key) for key in list(copy.held) if key.kind == "fresh"}
        self._copy = copy
        self._held = None
        return json.loads(header["metadata"])

    def refuse_unknown_fresh(self) -> None:
        """Where training goes on without an anchor file, "zero" must know what the optimizer was when fresh.

        Raises:
            UnsupportedError: it does not.
        """
        if self.optimizer_state == "zero":
            self._views.memory.refuse_unknown_fresh()

    def _is_wanted(self, key: Key) -> bool:
        if key.is_rest:
            return key in self._views.rest()
        kind = {"restore": "optimizer", "zero": "fresh"}.get(self.optimizer_state)
        return not key.is_optimizer or key.kind == kind

    def _live(self) -> dict[Key, Tensor]:
        """Every live tensor that an anchor copies."""
        state = _keyed("optimizer", self._views.memory.look()) if self.optimizer_state == "restore" else {}
        return {**self._views.weights(), **self._views.rest(), **state}

    def _exchange(self) -> None:
        rest = self._views.rest()
        self._views.give_up_gathered(rest=bool(rest))
        self._copy.exchange({**self._views.weights(), **rest})

    def _check_fit(self, path: str | os.PathLike[str], header: Header, shapes: Shapes) -> None:
        saved_scope = json.loads(header["scope"])
        live = {
            key: self._views.whole(key, value).shape
            for key, value in self._live().items()
            if not key.is_passing and (not key.is_rest or key in shapes)  # it may have been written without the rest
        }
        stored = {key: size for key, size in shapes.items() if not key.is_passing and (not key.is_rest or key in live)}
        if stored.keys() != live.keys():
            odd = sorted(map(str, stored.keys() ^ live.keys()))
            what = "another scope" if saved_scope != self.scope else "another model"
            raise AnchorFileError(
                f"The anchor file {str(path)!r} belongs to {what}: it was written for scope {saved_scope!r}, this "
                f"one is {self.scope!r}, and {len(odd)} tensors are on one side only, such as {odd[0]!r}. Use the "
                "model and the scope it was written with."
            )
        for key, shape in stored.items():
            if shape != live[key]:
                raise AnchorFileError(
                    f"The anchor file {str(path)!r} belongs to another model: {str(key)!r} has shape "
                    f"{tuple(shape)} in the file and {tuple(live[key])} in this model."
                )
        if self.optimizer_state == "restore" and header["optimizer_state"] != "restore":
            raise AnchorFileError(
                f"The anchor file {str(path)!r} holds no optimizer state: it was written with `optimizer_state="
                f'"{header["optimizer_state"]}"`, this one is "restore". Use the value it was written with.'
            )

    def _require_set(self, verb: str) -> None:
        if not self._copy:
            raise AnchorError(f"`{verb}` came before any `snapshot`: there is no anchor yet. Call `snapshot()` first.")

    def _refuse_swapped(self, verb: str) -> None:
        if self._swapped:
            raise AnchorError(
                f"`{verb}` came inside `swapped()`, where the anchor's memory holds the live weights. "
                "Leave the `with` block first."
            )


def _keyed(kind: str, look: Look) -> dict[Key, Tensor]:
    return {Key(kind, place.entry, place.name): tensor for place, tensor in look.tensors.items()}
