"""An exponential moving average of the weights of a scope, and its place as what is evaluated, kept and saved."""

from __future__ import annotations

import json
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
from hf_reset.anchor.shards import Layout
from hf_reset.config import Scope
from hf_reset.errors import AnchorError, AnchorFileError


class Average:
    """θ̄ ← d·θ̄ + (1 − d)·θ after each optimizer step, of this rank's share of the scope; it never communicates.

    It starts as the weights it is made beside (θ̄₀ = θ₀), with no correction for that. Weights in half precision are
    averaged in float32: steps of (1 − d) would be lost in rounding. Running statistics of BatchNorm layers are
    averaged with a full scope, and their counters copied, as in `torch.optim.swa_utils.AveragedModel` with
    `use_buffers=True`.

    Memory: the bytes of the scope's weights in float32 (DeepSpeed: and of their masters); of half-precision weights a
    second copy while the average is swapped in.

    Args:
        model: the model being trained, wrapped or not.
        optimizer: its optimizer; DeepSpeed's holds the float32 masters.
        scope: which trainable parameters, see `hf_reset.select_parameters`; the rest is never touched.
        decay: d in [0, 1). The average looks back about 1/(1 − d) steps.
        storage: "device", beside the weights, or "cpu": then each step moves the weights there.

    Raises:
        ScopeError: the scope selects nothing, everything by accident, or a tied head.
        UnsupportedError: the model's layout or the optimizer is one in which weights could not be put back exactly.

    Example:
        >>> average = Average(model, optimizer, decay=0.98)
        >>> average.update()  # after each optimizer step
        >>> with average.swapped():
        ...     evaluate(model)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        scope: Scope = "all",
        *,
        decay: float,
        storage: Literal["device", "cpu"] = "device",
    ) -> None:
        self.scope = scope
        self.decay = decay
        self._views = LiveViews(model, optimizer, scope)
        self._copy = Copy(storage, least=torch.float32)
        self._aside: Copy | None = None  # live weights of another precision than the average's, while it is swapped in
        self._depth = 0
        self.follow()

    @property
    def layout(self) -> Layout:
        """As `AnchorStore.layout`."""
        return self._views.layout

    @property
    def nbytes(self) -> int:
        """Bytes the average holds on this rank."""
        return self._copy.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """The average of each parameter by name, this rank's share; to read, not to write.

        Raises:
            AnchorError: it is swapped in, so that this memory holds the live weights.
        """
        self._refuse_swapped("tensors")
        return {name: self._copy.held[Key("parameter", None, name)] for name in self._views.parameters}

    def update(self) -> None:
        """Take in the live weights, once after each optimizer step."""
        self._refuse_swapped("update")
        self._copy.lerp(self._live(), 1 - self.decay)

    def follow(self) -> None:
        """Begin anew from the live weights, as after a reset."""
        self._refuse_swapped("follow")
        self._copy.take(self._live())

    def put_in(self) -> None:
        """Leave the average in the model for good."""
        self._refuse_swapped("put_in")
        self._views.give_up_gathered()
        self._copy.put_back(self._live())

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """For a moment, the live weights are the average's; they come back bit for bit on leaving.

        It may be entered again inside: the outermost decides.
        """
        if self._depth == 0:
            self._enter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._leave()

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, object] | None = None) -> None:
        """Write the live weights, inside `swapped`, beside a checkpoint whose model holds the average.

        The average itself is written only where its precision is more than the model's.

        Args:
            path: a file, a rank's own where `layout` is "flat"; a directory for all ranks where it is "rows".
            metadata: JSON-plain values to keep in the header.

        Raises:
            AnchorError: it is not swapped in.
            AnchorFileError: the disk is full or the place cannot be written.
        """
        if self._depth == 0:
            raise AnchorError("`save` came outside `swapped()`, where the model saved beside it is no average.")
        finer = self._aside.held if self._aside else {}
        held = {_averaged(key) if key in finer else key: value for key, value in self._copy.held.items()}
        header = {"scope": json.dumps(self.scope), "decay": repr(self.decay), "metadata": json.dumps(metadata or {})}
        write_copy(path, {**held, **finer}, header, self._views)

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """After Trainer has loaded a checkpoint: its model is the average, the file's weights become the live ones.

        Under FSDP2 all ranks call it.

        Returns:
            The metadata that was saved with it.

        Raises:
            AnchorFileError: the file is missing, truncated, or belongs to another model or scope.
        """
        self.follow()
        live = self._live()
        held = self._copy.held
        finer = {_averaged(key): held[key] for key, value in live.items() if value.dtype != held[key].dtype}
        read, targets = Copy(), {**live, **finer}
        header = read_copy(path, read, targets, self._views, check=partial(self._check_fit, path, targets))
        self._views.give_up_gathered()
        read.put_back({**self._live(), **finer})
        return json.loads(header["metadata"])

    def _live(self) -> dict[Key, Tensor]:
        """Live weights, without the gathered copies that ZeRO-3 makes of them: the next forward gathers anew."""
        return {key: value for key, value in self._views.weights().items() if not key.is_passing}

    def _enter(self) -> None:
        self._views.give_up_gathered()
        live = self._live()
        other = {key: value for key, value in live.items() if value.dtype != self._copy.held[key].dtype}
        self._aside = Copy()
        self._aside.take(other)
        self._copy.put_back(other)
        self._copy.exchange({key: value for key, value in live.items() if key not in other})

    def _leave(self) -> None:
        assert self._aside is not None  # made on entering
        self._views.give_up_gathered()
        live = self._live()
        self._aside.put_back(live)
        self._copy.exchange({key: value for key, value in live.items() if key not in self._aside.held})
        self._aside = None

    def _check_fit(
        self, path: str | os.PathLike[str], expected: dict[Key, Tensor], header: Header, shapes: Shapes
    ) -> None:
        wanted = {key: self._views.whole(key, value).shape for key, value in expected.items()}
        odd = sorted(str(key) for key in wanted.keys() | shapes.keys() if wanted.get(key) != shapes.get(key))
        if odd:
            raise AnchorFileError(
                f"The file {str(path)!r} belongs to another model, scope or precision: it was written for scope "
                f"{header.get('scope')}, this one is {json.dumps(self.scope)}, and {len(odd)} tensors differ, such as "
                f"{odd[0]!r}. Use the model, the scope and the precision it was written with."
            )

    def _refuse_swapped(self, verb: str) -> None:
        if self._depth:
            raise AnchorError(f"`{verb}` came inside `swapped()`, where the average's memory holds the live weights.")


def _averaged(key: Key) -> Key:
    """In a file: the average of a live value that is kept in more precision than the model's own."""
    return key._replace(kind=f"average-{key.kind}")
