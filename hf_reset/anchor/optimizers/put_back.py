"""The way back: an optimizer is given the form it had, in place wherever that can be."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_reset.anchor.optimizers.look import Look
from hf_reset.anchor.optimizers.objects import (
    attributes_of,
    constructor_arguments,
    fields_of,
    is_plain_object,
    is_users,
    random_state,
    set_random_state,
)
from hf_reset.anchor.optimizers.reach import Form, Place, Reach, escaped
from hf_reset.errors import AnchorError

_Kind = TypeVar("_Kind")
_MISSING = object()


class Held:
    """Copies of an optimizer's tensors, and what ways back have learnt of them, as long as they and their form last.

    Args:
        values: the copies, by place.

    Attributes:
        states: those of a state that stood as an `Arrangement` says, in its order, by the state's place.
    """

    def __init__(self, values: Mapping[Place, Tensor]) -> None:
        self.values = values
        self.states: dict[Place, list[Tensor]] = {}


def put_back(optimizer: Optimizer, reach: Reach, look: Look, held: Held) -> list[tuple[Tensor, Tensor]]:
    """Give an optimizer the form it had. What was not there then is taken out, what is gone is put in.

    Args:
        optimizer: the one that was looked at, or another that is made alike.
        reach: the scope's.
        look: what `look` saw.
        held: copies of its tensors; always the same for one look, and for others in which states stood alike.

    Returns:
        What is left to do: pairs of a live tensor to write, and the held one to write into it.

    Raises:
        AnchorError: the look is from a file, and the optimizer has not yet made an object that it needs.
    """
    way = _WayBack(type(optimizer).__name__, reach, look, held)
    way.put(optimizer, look.form, Place("", ""))
    return way.pairs


class _WayBack:
    """One way back. Each `_put_…` gives the value for its place: the live one, if it could be written in place."""

    def __init__(self, name: str, reach: Reach, look: Look, held: Held) -> None:
        self._name = name
        self._reach = reach
        self._objects = look.objects
        self._arrangements = look.arrangements
        self._held = held.values
        self._states = held.states
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self._by_kind: dict[str, Callable[[object, Any, Place], object]] = {
            "keep": lambda live, _, at: live,
            "value": _value,
            "tensor": self._tensor,
            "wrapped": self._wrapped,
            "array": self._array,
            "generator": self._generator,
            "random": self._random,
            "set": _set,
            "list": self._list,
            "dict": self._mapping,
            "object": self._object,
            "optimizer": self._optimizer,
        }

    def put(self, live: object, form: Form, at: Place) -> object:
        """The value that belongs at a place, where `live` stands now."""
        return self._by_kind[form[0]](live, form[1] if len(form) > 1 else None, at)

    def _tensor(self, live: object, device: str, at: Place) -> Tensor:
        held = self._held[at]
        if isinstance(live, Tensor):
            # The usual kind, one of thousands, has nothing to unwrap.
            local = live if type(live) is Tensor else self._reach.local(live)
            is_whole = local is live or not is_traceable_wrapper_subclass(local)
            if is_whole and self._is_own_place(local, held):
                self.pairs.append((local, held))
                return live
        weight = self._reach.parameters.get(at.name)
        kind = torch.device(device) if weight is None or weight.device.type != device else weight.device
        return self._reach.whole(at, held.to(kind, copy=True))

    def _is_own_place(self, local: Tensor, held: Tensor) -> bool:
        """Whether a held value can be written into a tensor that is the optimizer's own, and no view of a weight."""
        return _can_take(local, held) and not self._reach.is_weight(local)

    def _wrapped(self, live: object, parts: dict[str, Form], at: Place) -> object:
        """A tensor made of tensors, such as a quantised one."""
        if not isinstance(live, Tensor) or not is_traceable_wrapper_subclass(self._reach.local(live)):
            live = self._original(at, Tensor)
        local: Any = self._reach.local(live)
        inner, context = local.__tensor_flatten__()
        old = {name: getattr(local, name) for name in inner}
        new = {name: self.put(old[name], parts[name], at.into(escaped(name))) for name in inner}
        if all(new[name] is old[name] for name in inner):
            return live
        return type(local).__tensor_unflatten__(new, context, local.shape, local.stride())

    def _array(self, live: object, _: object, at: Place) -> np.ndarray:
        held = self._held[at]
        if isinstance(live, np.ndarray) and live.flags.writeable and _can_take(torch.from_numpy(live), held):
            self.pairs.append((torch.from_numpy(live), held))
            return live
        return held.numpy().copy()

    def _generator(self, live: object, _: object, at: Place) -> torch.Generator:
        generator = live if isinstance(live, torch.Generator) else self._original(at, torch.Generator)
        generator.set_state(self._held[at].cpu())
        return generator

    def _random(self, live: object, state: object, at: Place) -> object:
        generator = live if random_state(live) is not None else self._original(at, object)
        set_random_state(generator, state)
        return generator

    def _list(self, live: object, forms: list[Form], at: Place) -> object:
        items: list[object] | tuple[object, ...] | deque[object]
        items = live if isinstance(live, (list, tuple, deque)) else self._objects.get(at, [])
        old = [*items, *[_MISSING] * (len(forms) - len(items))]
        new = [self.put(old[index], form, at.into(str(index))) for index, form in enumerate(forms)]
        same = len(new) == len(items) and all(one is other for one, other in zip(new, items, strict=True))
        if same or not self._reach.holds(at):
            return items
        if isinstance(items, tuple):
            named: Any = type(items)
            return named(*new) if hasattr(items, "_fields") else tuple(new)
        items.clear()
        items.extend(new)
        return items

    def _mapping(self, live: object, nodes: dict[str, Form], at: Place, users: frozenset[str] | None = None) -> object:
        entries: MutableMapping[object, object]
        entries = live if isinstance(live, MutableMapping) else self._objects.get(at, {})
        keys = [self._reach.key(token, at) for token in nodes]
        if len(entries) > sum(key in entries for key in keys):  # else none is there that was not there then
            for index, key in enumerate(list(entries)):
                token = None if is_users(key, users) else self._reach.token(key, index, at)
                if token is not None and token not in nodes and self._reach.holds(self._reach.step(token, at)):
                    del entries[key]
        for key, (token, form) in zip(keys, nodes.items(), strict=True):
            old = entries.get(key, _MISSING)
            new = self.put(old, form, self._reach.step(token, at))
            if new is not old:
                entries[key] = new
        return entries

    def _state(self, state: object, form: Form, at: Place) -> None:
        """An optimizer's state; one that stands as it did when it was looked at is taken at once."""
        stood = self._arrangements.get(at)
        found = None if stood is None else stood.tensors(state)
        if stood is None or found is None:
            self.put(state, form, at)
            return
        if at not in self._states:
            self._states[at] = [self._held[place] for place in stood.places]
        self.pairs += zip(found, self._states[at], strict=True)

    def _object(self, live: object, nodes: dict[str, Form], at: Place) -> object:
        original = self._objects.get(at, live)
        if live is _MISSING or not is_plain_object(live) or type(live) is not type(original):
            live = self._original(at, object)
        self._fields(live, dict(fields_of(live)), nodes, at)
        return live

    def _optimizer(self, live: Any, parts: dict[str, Form], at: Place) -> object:
        if not hasattr(live, "param_groups"):
            live = self._original(at, Optimizer)
        own = {name: form for name, form in parts.items() if name != "state" and not name.startswith("param_groups:")}
        self._fields(live, dict(attributes_of(live)), own, at.into("self"))
        if "state" in parts:
            self._state(live.state, parts["state"], at.into("state") if at.entry else at)
        users = constructor_arguments(type(live)) - self._reach.own
        for index, group in enumerate(live.param_groups):
            if f"param_groups:{index}" in parts:
                here = at.into("param_groups").into(str(index))
                self._mapping(group, parts[f"param_groups:{index}"][1], here, users)
        return live

    def _fields(self, live: object, old: Mapping[str, object], nodes: dict[str, Form], at: Place) -> None:
        """The attributes of an object."""
        for name in old.keys() - nodes.keys():
            if self._reach.holds(at):
                object.__delattr__(live, name)
        for name, form in nodes.items():
            before = old.get(name, _MISSING)
            new = self.put(before, form, at.into(escaped(name)))
            if new is not before:
                object.__setattr__(live, name, new)

    def _original(self, at: Place, kind: type[_Kind]) -> _Kind:
        """The object that stood at a place when it was looked at, for one that is there no more."""
        found = self._objects.get(at)
        if found is not None and isinstance(found, kind):
            return found
        raise AnchorError(
            f"The anchor was read from a file, and optimizer {self._name} has not made its `{at}` yet, which holds "
            "part of its state. Load the optimizer's own state first, or take a step."
        )


def _value(live: object, value: object, at: Place) -> object:
    if isinstance(live, np.generic):
        value = type(live)(value)
    return live if type(live) is type(value) and live == value else value


def _set(live: object, items: list[object], at: Place) -> object:
    if not isinstance(live, set):
        return frozenset(items) if isinstance(live, frozenset) else set(items)
    live.clear()
    live.update(items)
    return live


def _can_take(live: Tensor, held: Tensor) -> bool:
    """Whether a held value can be written into a live tensor: they are alike, and none of its elements is many."""
    alike = live.shape == held.shape and live.dtype == held.dtype and live.layout == held.layout
    if not alike or live.layout is not torch.strided or live.is_contiguous():
        return alike
    return not any(size > 1 and stride == 0 for size, stride in zip(live.shape, live.stride(), strict=True))
