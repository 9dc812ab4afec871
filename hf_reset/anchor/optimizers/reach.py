"""What of an optimizer's memory belongs to a scope.

Everything found in an optimizer belongs either to one parameter, whose key stood on the way to it, or is shared. One
rule for what is shared (a group's step count, Prodigy's d): a scope that covers all that is trained takes it along; a
partial scope leaves it alone. What the user sets is nobody's memory: `lr` and its kin, and in `param_groups` every
argument of the optimizer's constructor (betas, momentum, weight decay), whatever schedule moves it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

# What stood at a place, plain enough for JSON: a kind, and what the kind needs (see `put_back`).
Form: TypeAlias = list[Any]

_ATTRIBUTE = re.compile(r"self:(?!.*param_groups:\d+$).*")  # of an optimizer, and no parameter group


class Place(NamedTuple):
    """Where something was found.

    Attributes:
        entry: the way to it, steps apart by ":"; "exp_avg" for an entry of `state[parameter]`.
        name: the parameter it belongs to; "" where it is shared.
    """

    entry: str
    name: str

    def into(self, step: str) -> Place:
        """One step further on the way."""
        return Place(f"{self.entry}:{step}" if self.entry else step, self.name)

    def __str__(self) -> str:
        """In words, for messages."""
        return unescaped(self.entry.replace(":", ".")) + (f" of {self.name}" if self.name else "")


class Reach:
    """How far a scope reaches into an optimizer, and how keys of its dictionaries are written.

    Args:
        parameters: the parameters of the scope, by name.
        everything: all the model's parameters by name; those outside the scope are left alone.
        full: whether the scope covers all that is trained, and so what parameters share.
        local: this rank's part of a tensor, as a view without autograd.
        whole: the tensor that a rank's part of it, for a place, is a part of.
        own: constructor arguments that the optimizer moves in its own step, and that are memory for all that.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        everything: Mapping[str, nn.Parameter],
        *,
        full: bool,
        local: Callable[[Tensor], Tensor] = Tensor.detach,
        whole: Callable[[Place, Tensor], Tensor] = lambda at, share: share,
        own: frozenset[str] = frozenset(),
    ) -> None:
        self.parameters = dict(parameters)
        self.local = local
        self.whole = whole
        self.own = own
        self._full = full
        self._everything = {**everything, **parameters}
        self.names = {id(p): name for name, p in (*everything.items(), *parameters.items())}
        self._addresses = frozenset(local(p).data_ptr() for p in self._everything.values() if p.numel())
        self._odd_keys: dict[str, object] = {}  # keys that are no parameters and have no plain form, by index

    def holds(self, at: Place) -> bool:
        """Whether what stands at a place is in reach."""
        return bool(at.name) or self._full

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view of a weight, which an anchor has already."""
        return tensor.numel() > 0 and tensor.data_ptr() in self._addresses

    def token(self, key: object, index: int, at: Place) -> str | None:
        """How the `index`-th key of the dictionary at `at` is written; None where it is not in reach.

        A parameter, or its name or id where nothing else could be meant, is written after a mark: @, $, or &.
        """
        if isinstance(key, Tensor):
            name = self.names.get(id(key))
            return f"@{name}" if name in self.parameters else None
        name = key if isinstance(key, str) else self.names.get(key, "") if isinstance(key, int) else ""
        if name in self._everything and not at.name and _ATTRIBUTE.fullmatch(at.entry):
            return ("$" if isinstance(key, str) else "&") + name if name in self.parameters else None
        if isinstance(key, str):
            return escaped(key)
        if isinstance(key, (bool, int, float, type(None))):
            return f"#{key!r}"
        self._odd_keys[f"{at.entry}!{index}"] = key
        return f"!{index}"

    def key(self, token: str, at: Place) -> object:
        """The key that a token stands for."""
        mark, rest = token[:1], token[1:]
        if mark == "@":
            return self.parameters[rest]
        if mark == "$":
            return rest
        if mark == "&":
            return id(self.parameters[rest])
        if mark == "!":
            return self._odd_keys[f"{at.entry}{token}"]
        if mark == "#":
            words = {"True": True, "False": False, "None": None}
            return words[rest] if rest in words else float(rest) if re.search(r"[.naie]", rest) else int(rest)
        return unescaped(token)

    @staticmethod
    def step(token: str, at: Place) -> Place:
        """The place one goes to with a token: to a parameter's own, or one further on the way."""
        return Place(at.entry, token[1:]) if token[:1] in ("@", "$", "&") else at.into(token)


@lru_cache(maxsize=4096)  # a reset asks for the same few names of every parameter
def escaped(text: str) -> str:
    """A name as a step of a place: without separators, and without a mark at its beginning."""
    text = re.sub(r"[%:/]", lambda match: f"%{ord(match.group()):02X}", text)
    return re.sub(r"^[@$&#!]", lambda match: f"%{ord(match.group()):02X}", text)


@lru_cache(maxsize=4096)
def unescaped(text: str) -> str:
    """The name that `escaped` was given."""
    return re.sub(r"%([0-9A-F]{2})", lambda match: chr(int(match.group(1), 16)), text)
