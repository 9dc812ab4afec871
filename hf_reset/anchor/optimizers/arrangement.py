"""A state that stands as it stood when it was last walked, told without another walk.

A walk through the state of a small model takes longer than the copy. Nearly every optimizer's is a dictionary of plain
tensors for each parameter, and stands so from the first step to the last.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_reset.anchor.optimizers.reach import Form, Place, Reach


class Arrangement:
    """How a state stood at its last walk: whose entries, which keys, and where in memory its tensors lay.

    It holds no tensor, so that the optimizer can let go of its own. See `of`.

    Attributes:
        form: what the walk saw.
        places: of the tensors, in order.
    """

    def __init__(self, form: Form, state: dict[Any, dict[str, Tensor]], at: Place, reach: Reach) -> None:
        self.form = form
        self._owners = [reach.key(token, at) for token in form[1]]
        entries = [state[owner] for owner in self._owners]
        mine = set(map(id, self._owners))
        self._others = [p for p in reach.parameters.values() if id(p) not in mine]
        self._length = len(state)
        self._keys = [tuple(entry) for entry in entries]
        self._stood = _standing([tensor for entry in entries for tensor in entry.values()])
        places = [(reach.step(token, at), seen[1]) for token, seen in form[1].items()]
        self.places = [reach.step(token, place) for place, tokens in places for token in tokens]

    @classmethod
    def of(cls, form: Form, state: object, at: Place, reach: Reach) -> Arrangement | None:
        """How a state stands that was walked just now.

        Args:
            form: what the walk saw.
            state: what was walked.
            at: its place.
            reach: the scope's.

        Returns:
            None for a state of another kind than a dictionary of plain tensors for each parameter.
        """
        if form[0] != "dict" or not isinstance(state, dict) or any(token[:1] != "@" for token in form[1]):
            return None
        for token, (kind, *seen) in form[1].items():
            entry = state[reach.key(token, at)]
            if kind != "dict" or type(entry) is not dict or len(entry) != len(seen[0]):
                return None
            if any(one[0] != "tensor" for one in seen[0].values()) or not all(isinstance(key, str) for key in entry):
                return None
            if not all(type(tensor) is Tensor and tensor.is_contiguous() for tensor in entry.values()):
                return None
        return cls(form, state, at, reach)

    def tensors(self, state: object) -> list[Tensor] | None:
        """The live tensors in the order of `places`; None where anything stands otherwise than it did."""
        if not isinstance(state, dict) or len(state) != self._length:
            return None
        entries: list[Any] = [state.get(owner) for owner in self._owners]
        if any(type(entry) is not dict for entry in entries) or any(other in state for other in self._others):
            return None
        if list(map(tuple, entries)) != self._keys:
            return None
        found = [tensor for entry in entries for tensor in entry.values()]
        return found if all(type(one) is Tensor for one in found) and _standing(found) == self._stood else None


def _standing(tensors: list[Tensor]) -> list[tuple[object, ...]]:
    """Where tensors lie, and of what kind they are."""
    return [(one.data_ptr(), one.dtype, one.shape, one.is_contiguous()) for one in tensors]
