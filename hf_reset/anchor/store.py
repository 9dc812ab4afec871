"""The anchor: a copy of the parameters of a scope, and putting it back in place."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_reset.anchor.dtensor_file import read_shared_header, read_shares, write_shares
from hf_reset.anchor.ranks import together
from hf_reset.anchor.scopes import batch_norm_buffers, covers_all, select_parameters, unwrapped
from hf_reset.anchor.shards import copy_all, refuse_part_of_flat, refuse_zeroing, settle, shards_of
from hf_reset.errors import AnchorError, AnchorFileError
from hf_reset.policy import Scope

FORMAT = "hf_reset-anchor-1"
_PASSING = ("optimizer/", "gathered/")  # what may not be there at a given moment
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
        optimizer: Any = None,
        scope: Scope = "all",
        optimizer_state: Literal["restore", "zero", "keep"] = "restore",
        storage: Literal["device", "cpu"] = "device",
    ) -> None:
        self.scope = scope
        self.optimizer_state = optimizer_state
        self.storage = storage
        self._model = unwrapped(model)
        settle(model)
        refuse_part_of_flat(model, scope)
        self._parameters = select_parameters(self._model, scope)
        self.is_full = covers_all(self._model, self._parameters)
        self._shards = shards_of(model, self._parameters, optimizer, full=self.is_full)
        if optimizer_state == "zero" and optimizer is not None:
            refuse_zeroing(optimizer)
        self._buffers = batch_norm_buffers(self._model) if self.is_full else []
        self._held: dict[str, Tensor] = {}
        self._swapped = False

    @property
    def names(self) -> list[str]:
        """Names of the parameters in the scope, in model order."""
        return list(self._parameters)

    @property
    def is_set(self) -> bool:
        """Whether there is an anchor to restore."""
        return bool(self._held)

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds only a share of the parameters."""
        return self._shards.sharded

    @property
    def is_distributed(self) -> bool:
        """Whether `save` and `load` are for all ranks at once, and the path is one directory for all (FSDP2)."""
        return self._shards.distributed

    @property
    def is_flat(self) -> bool:
        """Whether the shares are pieces of flat tensors (DeepSpeed, FSDP1): a file a rank, for one world size."""
        return self.is_sharded and not self.is_distributed

    @property
    def nbytes(self) -> int:
        """Bytes the anchor holds on this rank; before the first snapshot, those it would hold."""
        held = self._held or {key: value for key, value in self._live().items() if isinstance(value, Tensor)}
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def tensors(self) -> dict[str, Tensor]:
        """The anchored value of each parameter by name, this rank's share; to read, not to write."""
        self._require_set("tensors")
        return {name: self._held[f"parameter/{name}"] for name in self._parameters}

    @torch.no_grad()
    def snapshot(self) -> None:
        """Take the live parameters as the anchor, into the memory of the last one."""
        self._refuse_swapped("snapshot")
        live = self._live()
        self._held = {key: self._room(self._held.get(key), value) for key, value in live.items()}
        pairs = [(self._held[key], value) for key, value in live.items() if isinstance(value, Tensor)]
        copy_all(pairs, non_blocking=True)
        self._synchronize(pairs)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the anchor back into the live parameters, in place.

        Raises:
            AnchorError: there is no anchor yet, or it is swapped in.
        """
        self._refuse_swapped("restore")
        self._require_set("restore")
        self._shards.settle({_split(key)[2] for key in self._held if key.startswith("gathered/")})
        live = self._live()
        copy_all(self._pairs(live), non_blocking=True)
        self._restore_optimizer(live)

    def distance(self) -> float:
        """Euclidean distance ‖θ − θ_c‖ of the live parameters from the anchor (this rank's share of it)."""
        return math.sqrt(self.squared_distance())

    @torch.no_grad()
    def squared_distance(self) -> float:
        """‖θ − θ_c‖² over this rank's share; shares of all ranks add up. It holds no second copy."""
        self._require_set("distance")
        totals: dict[torch.device, Tensor] = {}
        for name in self._parameters:
            parts = self._shards.weights(name)
            part = "master" if "master" in parts else "parameter"
            live, held = parts[part].reshape(-1), self._held[f"{part}/{name}"].reshape(-1)
            for start in range(0, live.numel(), _CHUNK):
                gap = live[start : start + _CHUNK].float()
                gap = gap - held[start : start + _CHUNK].to(gap.device, non_blocking=True)
                square = torch.dot(gap, gap).double()
                totals[gap.device] = totals[gap.device] + square if gap.device in totals else square
        return sum(float(total) for total in totals.values())

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """For a moment, the live parameters are the anchor's; they come back on leaving.

        Optimizer state stays where it is. One tensor at a time is held twice.
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

    def save(self, path: str | os.PathLike[str], metadata: dict[str, Any] | None = None) -> None:
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
        if self.is_distributed:
            write_shares(Path(path), {key: self._whole(key, held) for key, held in self._held.items()}, header)
        else:
            write_anchor_file(path, self._held, header)

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
        if self.is_distributed:
            return self._load_sharded(Path(path))
        header, tensors = read_anchor_file(path)
        self._check_fit(path, header, {key: value.shape for key, value in tensors.items()})
        live = self._live()
        held = {}
        for key, tensor in tensors.items():
            if self._is_wanted(key):
                held[key] = self._room_for(key, live, tensor)
                held[key].copy_(tensor)
        self._held = held
        return json.loads(header["metadata"])

    def _load_sharded(self, path: Path) -> dict[str, Any]:
        with together():
            header, known = read_shared_header(path)
            self._check_fit(path, header, {key: value.size for key, value in known.items()})
        live = self._live()
        held = {}
        for key, value in known.items():
            if self._is_wanted(key):
                _, entry, name = _split(key)
                share = self._shards.weights(name)["parameter"] if entry else None
                is_share = share is not None and self._shards.whole(name, share).shape == value.size
                size = share.shape if share is not None and is_share else value.size
                held[key] = self._room_for(key, live, torch.empty(size, dtype=value.properties.dtype))
        read_shares(path, {key: self._whole(key, tensor) for key, tensor in held.items()})
        self._held = held
        return json.loads(header["metadata"])

    def _is_wanted(self, key: str) -> bool:
        return self.optimizer_state == "restore" or not key.startswith("optimizer/")

    def _room_for(self, key: str, live: dict[str, Any], tensor: Tensor) -> Tensor:
        """Memory for a value read from a file: as the live one, where there is one, else as it was written."""
        like = live.get(key)
        if isinstance(like, Tensor):
            return self._room(None, like)
        return self._room(None, torch.empty_like(tensor, device=self._device_of(key)))

    def _whole(self, key: str, share: Tensor) -> Tensor:
        """The DTensor that a held tensor is this rank's share of."""
        kind, entry, name = _split(key)
        return share if kind == "buffer" else self._shards.whole(name, share, entry)

    def _live(self) -> dict[str, Any]:
        """Every live value that an anchor copies: tensors to write in place, and optimizer numbers."""
        live: dict[str, Any] = {}
        for name in self._parameters:
            for part, tensor in self._shards.weights(name).items():
                live[f"{part}/{name}"] = tensor
        for name in self._buffers:
            live[f"buffer/{name}"] = self._model.get_buffer(name)
        if self.optimizer_state == "restore":
            live.update(self._live_optimizer())
        return live

    def _live_optimizer(self) -> dict[str, Any]:
        return {
            f"optimizer/{key}/{name}": value
            for name in self._parameters
            for key, value in self._shards.optimizer_state(name).items()
        }

    def _pairs(self, live: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        return [(live[key], held) for key, held in self._held.items() if isinstance(live.get(key), Tensor)]

    def _restore_optimizer(self, live: dict[str, Any]) -> None:
        """What one fused copy cannot do: numbers, entries not made yet, and entries the anchor lacks."""
        if self.optimizer_state == "keep":
            return
        if self.optimizer_state == "zero":
            live = self._live_optimizer()
        for key, held in self._held.items():
            if key.startswith("optimizer/") and not isinstance(live.get(key), Tensor):
                _, entry, name = _split(key)
                assert entry is not None
                value = live[key].__class__(held.item()) if key in live else self._unheld(held, name)
                self._shards.put_optimizer_state(name, entry, value)
        fresh = {key: value for key, value in live.items() if key.startswith("optimizer/") and key not in self._held}
        tensors = [value for value in fresh.values() if isinstance(value, Tensor)]
        if tensors:
            torch._foreach_zero_(tensors)  # pyright: ignore[reportPrivateImportUsage]
        for key in fresh.keys() - {k for k, v in fresh.items() if isinstance(v, Tensor)}:
            _, entry, name = _split(key)
            assert entry is not None
            self._shards.put_optimizer_state(name, entry, type(fresh[key])(0))

    def _unheld(self, held: Tensor, name: str) -> Tensor:
        """A copy of an anchored optimizer entry where the optimizer has made none yet."""
        device = self._shards.weights(name)["parameter"].device if held.dim() else held.device
        return held.to(device, copy=True)

    def _room(self, held: Tensor | None, value: Any) -> Tensor:
        """Memory for one value: that of the last snapshot where it still fits."""
        if not isinstance(value, Tensor):
            return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        if held is not None and held.shape == value.shape and held.dtype == value.dtype:
            return held
        device = torch.device("cpu") if self.storage == "cpu" else value.device
        pinned = self.storage == "cpu" and value.device.type == "cuda"
        return torch.empty(value.shape, dtype=value.dtype, device=device, pin_memory=pinned)

    def _device_of(self, key: str) -> torch.device:
        kind, entry, name = _split(key)
        if kind == "buffer":
            return self._model.get_buffer(name).device
        if entry is not None:
            state = self._shards.optimizer_state(name).get(entry)
            if isinstance(state, Tensor):
                return state.device
            if entry == "step":  # torch keeps it on the CPU unless it is fused or capturable
                return torch.device("cpu")
        return self._shards.weights(name)["parameter"].device

    @torch.no_grad()
    def _exchange(self) -> None:
        self._shards.settle()
        live = self._live()
        for key, held in self._held.items():
            if key in live and not key.startswith("optimizer/"):
                kept = live[key].clone()
                live[key].copy_(held)
                held.copy_(kept)

    def _check_fit(
        self, path: str | os.PathLike[str], header: dict[str, str], shapes: Mapping[str, torch.Size]
    ) -> None:
        saved_scope = json.loads(header["scope"])
        live = {
            key: self._whole(key, value).shape for key, value in self._live().items() if not key.startswith(_PASSING)
        }
        stored = {key: value for key, value in shapes.items() if not key.startswith(_PASSING)}
        if stored.keys() != live.keys():
            odd = sorted(stored.keys() ^ live.keys())
            what = "another scope" if saved_scope != self.scope else "another model"
            raise AnchorFileError(
                f"The anchor file {str(path)!r} belongs to {what}: it was written for scope {saved_scope!r}, this "
                f"one is {self.scope!r}, and {len(odd)} tensors are on one side only, such as {odd[0]!r}. Use the "
                "model and the scope it was written with."
            )
        for key, value in stored.items():
            if value != live[key]:
                raise AnchorFileError(
                    f"The anchor file {str(path)!r} belongs to another model: {key!r} has shape "
                    f"{tuple(value)} in the file and {tuple(live[key])} in this model."
                )
        if self.optimizer_state == "restore" and header["optimizer_state"] != "restore":
            raise AnchorFileError(
                f"The anchor file {str(path)!r} holds no optimizer state: it was written with `optimizer_state="
                f'"{header["optimizer_state"]}"`, this one is "restore". Use the value it was written with.'
            )

    def _synchronize(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """A copy from CUDA to pinned memory has landed only once the device has caught up."""
        if self.storage == "cpu":
            for device in {source.device for _, source in pairs if source.device.type == "cuda"}:
                torch.cuda.synchronize(device)

    def _require_set(self, verb: str) -> None:
        if not self._held:
            raise AnchorError(f"`{verb}` came before any `snapshot`: there is no anchor yet. Call `snapshot()` first.")

    def _refuse_swapped(self, verb: str) -> None:
        if self._swapped:
            raise AnchorError(
                f"`{verb}` came inside `swapped()`, where the anchor's memory holds the live weights. "
                "Leave the `with` block first."
            )


def _split(key: str) -> tuple[str, str | None, str]:
    """Kind, entry of the optimizer's state (None for weights and buffers), and name, of a held value."""
    kind, rest = key.split("/", 1)
    entry, name = rest.split("/", 1) if kind == "optimizer" else (None, rest)
    return kind, entry, name


def write_anchor_file(path: str | os.PathLike[str], tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all: under a temporary name, flushed to disk, then renamed.

    Raises:
        AnchorFileError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        save_file(contiguous, temporary, metadata={"format": FORMAT, **header})
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise AnchorFileError(
            f"The anchor file {str(path)!r} could not be written: {error}. Free the disk or choose another "
            "`output_dir`; the last whole checkpoint is untouched."
        ) from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What was saved beside an anchor, without loading it."""
    return json.loads(read_anchor_file(path)[0]["metadata"])


def read_anchor_file(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the tensors (on the CPU) of a file that `AnchorStore.save` wrote.

    Raises:
        AnchorFileError: it is missing, truncated, or not an anchor file.
    """
    try:
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportPrivateImportUsage]
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise AnchorFileError(
            f"There is no anchor file {str(path)!r}. Resume from a checkpoint that has one, or start without "
            "`resume_from_checkpoint`."
        ) from None
    except (SafetensorError, OSError) as error:
        raise AnchorFileError(
            f"The anchor file {str(path)!r} is truncated or not a safetensors file ({error}). Resume from an "
            "earlier, whole checkpoint."
        ) from None
    if header.get("format") != FORMAT:
        raise AnchorFileError(
            f"The file {str(path)!r} is not an anchor written by hf_reset (format {header.get('format')!r}, "
            f"expected {FORMAT!r}). Name the `reset_anchor.safetensors` of a checkpoint."
        )
    return header, tensors


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
