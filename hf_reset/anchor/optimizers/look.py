"""The walk through an optimizer: its form, and the live tensors in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_reset.anchor.optimizers.arrangement import Arrangement
from hf_reset.anchor.optimizers.objects import (
    PLAIN,
    attributes_of,
    constructor_arguments,
    fields_of,
    is_code,
    is_plain_object,
    is_users,
    random_state,
)
from hf_reset.anchor.optimizers.reach import Form, Place, Reach, escaped
from hf_reset.errors import UnsupportedError

KEEP: Form = ["keep"]  # not ours, or nothing to remember: on the way back it stays as it is


class Look(NamedTuple):
    """What an optimizer remembers at a moment.

    Attributes:
        form: everything that is no tensor, and where tensors stand.
        tensors: the live tensors by place.
        objects: the containers and objects that hold them; empty for a look read from a file.
        arrangements: how states stood that are dictionaries of plain tensors for each parameter, by place; empty for a
            look read from a file.
    """

    form: Form
    tensors: dict[Place, Tensor]
    objects: dict[Place, Any]
    arrangements: Mapping[Place, Arrangement] = MappingProxyType({})


def look(
    optimizer: Optimizer,
    reach: Reach,
    *,
    with_state: bool = True,
    known: Mapping[Place, Arrangement] = MappingProxyType({}),
) -> Look:
    """What an optimizer remembers now, as far as a scope reaches.

    Args:
        optimizer: without the wrappers of accelerate and DeepSpeed, see `unwrapped_optimizer`.
        reach: the scope's.
        with_state: whether its `state` is walked; under ZeRO that lies in flat pieces, and `shards` reads it.
        known: the arrangements of an earlier look with the same reach; a state that still stands so is not walked.

    Raises:
        UnsupportedError: it keeps something that cannot be copied.
    """
    walk = _Walk(optimizer, reach, known)
    form = walk.optimizer(optimizer, Place("", ""), with_state=with_state)
    return Look(form, walk.tensors, walk.objects, walk.arrangements)


class _Walk:
    """One walk. Everything is seen once, at the first place where it is met."""

    def __init__(self, optimizer: Optimizer, reach: Reach, known: Mapping[Place, Arrangement]) -> None:
        self._name = type(optimizer).__name__
        self._reach = reach
        self._known = known
        self._seen: dict[int, object] = {}
        self.tensors: dict[Place, Tensor] = {}
        self.objects: dict[Place, Any] = {}
        self.arrangements: dict[Place, Arrangement] = {}

    def optimizer(self, optimizer: Optimizer, at: Place, *, with_state: bool = True) -> Form:
        """An optimizer: inner ones first, whose constructor arguments say what in a common group is the user's."""
        self._seen[id(optimizer)] = optimizer
        here = at.into("self")
        parts = {name: self.see(value, here.into(escaped(name))) for name, value in list(attributes_of(optimizer))}
        if with_state:
            parts["state"] = self._state(getattr(optimizer, "state", {}), at.into("state") if at.entry else at)
        users = constructor_arguments(type(optimizer)) - self._reach.own
        for index, group in enumerate(optimizer.param_groups):
            if id(group) not in self._seen:
                self._seen[id(group)] = group
                parts[f"param_groups:{index}"] = self._mapping(group, at.into("param_groups").into(str(index)), users)
        return ["optimizer", parts]

    def _state(self, state: object, at: Place) -> Form:
        """An optimizer's state, which is walked where it stands otherwise than is known."""
        stands = self._known.get(at)
        found = None if stands is None else stands.tensors(state)
        if stands is None or found is None:
            form = self.see(state, at)
            stands = Arrangement.of(form, state, at, self._reach)
        else:
            form = stands.form
            self.objects[at] = state
            self.tensors.update(zip(stands.places, found, strict=True))
        if stands is not None:
            self.arrangements[at] = stands
        return form

    def see(self, value: object, at: Place) -> Form:
        """Whatever stands at a place."""
        if isinstance(value, Tensor):
            return self._tensor(value, at)
        if isinstance(value, PLAIN):
            return ["value", value] if self._reach.holds(at) else KEEP
        if id(value) in self._seen or is_code(value, self._reach.names):
            return KEEP
        self._seen[id(value)] = value
        if not isinstance(value, (tuple, np.ndarray)):  # which would keep alive what the optimizer lets go of
            self.objects[at] = value
        if isinstance(value, Optimizer):
            return self.optimizer(value, at)
        if isinstance(value, MutableMapping):
            return self._mapping(value, at)
        if isinstance(value, (list, tuple, deque)):
            return ["list", [self.see(item, at.into(str(index))) for index, item in enumerate(value)]]
        if is_plain_object(value):
            return ["object", {name: self.see(part, at.into(escaped(name))) for name, part in fields_of(value)}]
        return self._leaf(value, at) if self._reach.holds(at) else KEEP

    def _leaf(self, value: object, at: Place) -> Form:
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            self.tensors[at] = torch.from_numpy(value) if value.flags.writeable else torch.tensor(value)
            return ["array"]
        if isinstance(value, (set, frozenset)) and all(isinstance(item, PLAIN) for item in value):
            return ["set", list(value)]
        if isinstance(value, torch.Generator):
            self.tensors[at] = value.get_state()
            return ["generator"]
        if (state := random_state(value)) is not None:
            return ["random", state]
        raise UnsupportedError(
            f"Optimizer {self._name} keeps a {type(value).__module__}.{type(value).__qualname__} in `{at}`, which "
            'cannot be copied, so a reset could not be exact. Choose another `optim`, or `optimizer_state="keep"`.'
        )

    def _tensor(self, value: Tensor, at: Place) -> Form:
        if not self._reach.holds(at) or id(value) in self._reach.names:
            return KEEP
        local = self._reach.local(value)
        if is_traceable_wrapper_subclass(local):
            self.objects[at] = local
            inner, _ = local.__tensor_flatten__()
            return ["wrapped", {name: self._tensor(getattr(local, name), at.into(escaped(name))) for name in inner}]
        if self._reach.is_weight(local):
            return KEEP
        self.tensors[at] = local
        return ["tensor", local.device.type]

    def _mapping(self, mapping: Mapping[Any, object], at: Place, users: frozenset[str] | None = None) -> Form:
        nodes = {}
        for index, (key, value) in enumerate(mapping.items()):
            token = None if is_users(key, users) else self._reach.token(key, index, at)
            if token is not None:
                nodes[token] = self.see(value, self._reach.step(token, at))
        return ["dict", nodes]
