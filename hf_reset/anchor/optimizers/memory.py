"""The optimizer's side of an anchor, wherever the layout lets it lie."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_reset.anchor.optimizers.arrangement import Arrangement
from hf_reset.anchor.optimizers.look import Look, look
from hf_reset.anchor.optimizers.put_back import Held, put_back
from hf_reset.anchor.optimizers.reach import Form, Place, Reach
from hf_reset.anchor.optimizers.rehearsal import is_known, rehearse
from hf_reset.anchor.shards import Shards, Zero12Shards, local_part, unwrapped_optimizer
from hf_reset.errors import AnchorFileError, UnsupportedError

_FRESH = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "RMSprop", "Rprop", "ASGD", "SGD", "Adafactor")


class OptimizerMemory:
    """What an optimizer remembers of a scope, to look at and to put back.

    Under ZeRO its state lies in flat pieces, one for many parameters; `shards` reads and writes a parameter's part.
    Everything else about it is walked, as anywhere.

    Args:
        optimizer: with or without the wrappers of accelerate and DeepSpeed; None: there is nothing to remember.
        shards: the views of the model.
        model: the model, without wrappers around the whole of it.
        parameters: the parameters of the scope, by name.
        full: whether the scope covers all that is trained.

    Attributes:
        optimizer: without those wrappers.
        needs_gradients: whether its step may fail where no parameter has a gradient, as far as is known.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        shards: Shards,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        full: bool,
    ) -> None:
        self.optimizer = unwrapped_optimizer(optimizer)
        self._shards = shards
        self._flat = shards if isinstance(shards, Zero12Shards) else None
        self._model = model
        self._arrangements: Mapping[Place, Arrangement] = {}  # of the last look
        self.needs_gradients = self.optimizer is not None and not is_known(self.optimizer)
        self._reach = Reach(
            parameters,
            dict(model.named_parameters()),
            full=full,
            local=local_part,
            whole=lambda at, share: shards.whole(at.name, share, at.entry),
        )

    def rehearse(self) -> None:
        """Before training: find out, on a twin, whether all of the memory can be reached.

        Raises:
            UnsupportedError: it cannot.
        """
        if self.optimizer is not None and self._shards.layout == "whole":
            learned = rehearse(self.optimizer, self._model)
            self._reach.own = learned.own
            self.needs_gradients = learned.needs_gradients

    def look(self) -> Look:
        """What the optimizer remembers now, with its tensors live.

        Raises:
            UnsupportedError: it keeps something that cannot be copied, or not in shares.
        """
        if self.optimizer is None:
            return Look(["keep"], {}, {})
        seen = look(self.optimizer, self._reach, with_state=self._flat is None, known=self._arrangements)
        self._arrangements = seen.arrangements
        if self._shards.layout != "whole":
            self._refuse_unshared(seen)
        if self._flat is None:
            return seen
        numbers: dict[str, dict[str, float]] = {}
        for name in self._reach.parameters:
            for entry, value in self._flat.optimizer_state(name).items():
                if isinstance(value, Tensor):
                    seen.tensors[Place(entry, name)] = value
                else:
                    numbers.setdefault(name, {})[entry] = value
        return Look(["flat", seen.form, numbers], seen.tensors, seen.objects)

    @torch.no_grad()
    def put_back(self, look: Look, held: Held) -> list[tuple[Tensor, Tensor]]:
        """Give the optimizer the form it had; see `put_back.put_back` for arguments and errors."""
        if self.optimizer is None:
            return []
        if self._flat is None:
            return put_back(self.optimizer, self._reach, look, held)
        _, form, numbers = look.form
        pairs = put_back(self.optimizer, self._reach, look._replace(form=form), held)
        for name in self._reach.parameters:
            entries = {place.entry: tensor for place, tensor in held.values.items() if place.name == name}
            pairs += _put_back_flat(self._flat, name, entries, numbers.get(name, {}))
        return pairs

    def fresh(self) -> Look:
        """What the optimizer remembers before its first step: what it remembers now, at the start of training.

        Raises:
            UnsupportedError: that depends on the weights, so there is no being fresh at other weights.
        """
        seen = self.look()
        if self._forgets_all:
            return _emptied(seen)
        for place, tensor in seen.tensors.items():
            weight = self._shards.weights(place.name)["parameter"] if place.name else tensor.new_empty(0)
            if tensor.shape == weight.shape and tensor.numel() > 1 and torch.equal(tensor.to(weight), weight):
                if (tensor != tensor.flatten()[0]).any():
                    raise UnsupportedError(
                        f'`optimizer_state="zero"` cannot be done for {type(self.optimizer).__name__}, whose `{place}` '
                        'begins as a copy of the weights. Choose `optimizer_state="restore"` or "keep".'
                    )
        return seen

    def refuse_unknown_fresh(self) -> None:
        """Where the first step is past and no file says what was remembered before it.

        Raises:
            UnsupportedError: the optimizer is not known to have remembered nothing.
        """
        if self.optimizer is not None and not self._forgets_all:
            raise UnsupportedError(
                f'`optimizer_state="zero"` cannot go on from a checkpoint without an anchor of that kind: what '
                f"{type(self.optimizer).__name__} was when fresh is not known. Resume from a later one, or start anew."
            )

    @property
    def _forgets_all(self) -> bool:
        """Whether a fresh optimizer of this kind is known to have no state, which it makes as it needs it."""
        kind = type(self.optimizer)
        return kind.__module__.startswith("torch.optim.") and kind.__name__ in _FRESH

    def _refuse_unshared(self, seen: Look) -> None:
        """Ranks' shares are known for the tensors of `state[parameter]` alone."""
        for place in seen.tensors:
            if ":" in place.entry and place.name:
                raise UnsupportedError(
                    f"Optimizer {type(self.optimizer).__name__} keeps `{place}`, whose shares are not known under "
                    'FSDP and DeepSpeed. Launch with DDP, choose another `optim`, or `optimizer_state="keep"`.'
                )


def _put_back_flat(
    shards: Zero12Shards, name: str, entries: dict[str, Tensor], numbers: dict[str, float]
) -> list[tuple[Tensor, Tensor]]:
    """Of a parameter's part of a flat state: the numbers are put back, what was not there yet becomes zero."""
    live = shards.optimizer_state(name)
    for entry, value in live.items():
        if not isinstance(value, Tensor):
            shards.put_optimizer_state(name, entry, type(value)(numbers.get(entry, 0)))
        elif entry not in entries:
            value.zero_()
    for entry, value in {**numbers, **entries}.items():
        if entry not in live:
            shards.put_optimizer_state(name, entry, value)
    return [(into, held) for entry, held in entries.items() if isinstance(into := live.get(entry), Tensor)]


def _emptied(seen: Look) -> Look:
    if seen.form[0] == "flat":
        return Look(["flat", seen.form[1], {}], {}, {})
    return Look(["optimizer", {**seen.form[1], "state": ["dict", {}]}], {}, {})


def to_header(form: Form) -> str:
    """A form as a file's header has it."""
    return json.dumps(form, default=_plain)


def from_header(path: str | os.PathLike[str], header: Mapping[str, str], name: str = "optimizer") -> Look:
    """The look whose form a file's header has under `name`.

    Raises:
        AnchorFileError: it has none that can be read.
    """
    try:
        return Look(json.loads(header[name], object_hook=_unplain), {}, {})
    except (KeyError, ValueError) as error:
        raise AnchorFileError(
            f"The anchor file {str(path)!r} is damaged: its header has no readable {name!r} ({error!r}). Resume "
            "from an earlier, whole checkpoint."
        ) from None


def _plain(value: Any) -> object:
    if isinstance(value, complex):
        return {"%complex": [value.real, value.imag]}
    return {"%bytes": value.hex()} if isinstance(value, bytes) else value.tolist()  # of numpy


def _unplain(value: dict[str, Any]) -> object:
    if value.keys() == {"%complex"}:
        return complex(*value["%complex"])
    return bytes.fromhex(value["%bytes"]) if value.keys() == {"%bytes"} else value
