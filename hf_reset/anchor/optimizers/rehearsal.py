"""Before training, a reset is rehearsed on a twin of the optimizer that holds a few parameters of its own.

Memory in a closure, in a module, or behind a C extension cannot be seen by looking; that the steps after a return
differ from those before it can. The model, the optimizer and all random generators stay as they were.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_reset.anchor.optimizers.look import Look, look
from hf_reset.anchor.optimizers.objects import constructor_arguments, is_rate, is_users
from hf_reset.anchor.optimizers.put_back import Held, put_back
from hf_reset.anchor.optimizers.reach import Reach
from hf_reset.errors import ResetError, UnsupportedError

_LARGEST = 1 << 20  # elements of a parameter that stands in for those like it
_KNOWN = ("torch.optim.", "torchao.", "bitsandbytes.", "lomo_optim.", "deepspeed.")  # proved, and slow or bound to CUDA
_BEFORE, _AFTER = range(3), range(10, 15)  # seeds of the gradients before the anchor and after it
_DROPPED: Any = object()


class Learned(NamedTuple):
    """What a rehearsal tells of an optimizer.

    Attributes:
        own: the user's numbers in `param_groups` that it moves in its own step.
        needs_gradients: whether its step may fail where no parameter has a gradient.
    """

    own: frozenset[str]
    needs_gradients: bool


_UNKNOWN = Learned(frozenset(), needs_gradients=True)


def rehearse(optimizer: Optimizer, model: nn.Module) -> Learned:
    """Rehearse resets.

    An optimizer that cannot be rehearsed (its step wants a closure, or graphs of gradients) tells nothing.

    Args:
        optimizer: without the wrappers of accelerate and DeepSpeed.
        model: the model it trains.

    Raises:
        UnsupportedError: the steps after a reset were not those after the anchor, or it sets its own learning rate.
    """
    learned = [_learned(one, model) for one in _distinct(optimizer, model)]
    own = frozenset[str]().union(*(one.own for one in learned))
    return Learned(own, needs_gradients=any(one.needs_gradients for one in learned))


def is_known(optimizer: Optimizer) -> bool:
    """Whether an optimizer is of a package that needs no rehearsal."""
    return f"{type(optimizer).__module__}.".startswith(_KNOWN)


def _learned(optimizer: Optimizer, model: nn.Module) -> Learned:
    with _unmoved_generators():
        twin, parameters = _twin(optimizer, model)
        if twin is None or not parameters:
            return _UNKNOWN
        try:
            own = _rehearse(type(optimizer).__name__, twin, parameters)
        except ResetError:
            raise
        except Exception:
            return _UNKNOWN
        return Learned(own, needs_gradients=_fails_without_gradients(twin, parameters))


def _fails_without_gradients(twin: Optimizer, parameters: dict[str, nn.Parameter]) -> bool:
    for p in parameters.values():
        p.grad = None
    try:
        type(twin).step(twin)
    except Exception:
        return True
    return False


def _rehearse(name: str, twin: Optimizer, parameters: dict[str, nn.Parameter]) -> frozenset[str]:
    _take_steps(twin, parameters, _BEFORE)
    moved = _moved(twin, parameters)
    rates = sorted(filter(is_rate, moved))
    if rates:
        raise UnsupportedError(
            f"Optimizer {name} sets `{rates[0]}` in its own step, so that a reset cannot tell its doing from the "
            'schedule\'s. Choose another `optim`, or `optimizer_state="keep"`.'
        )
    reach = Reach(parameters, {}, full=True, own=moved)
    anchor = look(twin, reach)
    held = Held({place: tensor.clone() for place, tensor in anchor.tensors.items()})
    weights = [p.detach().clone() for p in parameters.values()]
    first: list[Tensor] | None = None
    for _ in range(3):  # the first time from the anchor itself, then after excursions of two lengths
        seen = _take_steps(twin, parameters, _AFTER)
        first = seen if first is None else first
        if not all(_same(one, other) for one, other in zip(first, seen, strict=True)):
            raise UnsupportedError(
                f"Optimizer {name} remembers something that a reset cannot put back: rehearsed on a twin of it, "
                "the steps after a reset were not those after the anchor. Choose another `optim`, or "
                '`optimizer_state="keep"`.'
            )
        _restore(twin, reach, anchor, held, list(zip(parameters.values(), weights, strict=True)))
    return moved


@torch.no_grad()
def _restore(
    twin: Optimizer,
    reach: Reach,
    anchor: Look,
    held: Held,
    weights: list[tuple[nn.Parameter, Tensor]],
) -> None:
    for live, value in [*weights, *put_back(twin, reach, anchor, held)]:
        live.copy_(value)


def _take_steps(twin: Optimizer, parameters: dict[str, nn.Parameter], seeds: range) -> list[Tensor]:
    """Steps on random gradients; the weights after each."""
    weights = []
    for seed in seeds:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        generator = torch.Generator().manual_seed(seed)
        for p in parameters.values():
            p.grad = (0.01 * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)
        type(twin).step(twin)
        weights += [p.detach().clone() for p in parameters.values()]
    return weights


def _moved(twin: Optimizer, parameters: dict[str, nn.Parameter]) -> frozenset[str]:
    """The user's numbers in the groups that a step changes."""
    users = constructor_arguments(type(twin))

    def numbers() -> dict[tuple[int, str], object]:
        return {
            (index, key): copy.deepcopy(value)
            for index, group in enumerate(twin.param_groups)
            for key, value in group.items()
            if key != "params" and is_users(key, users) and isinstance(value, (int, float, tuple, list, Tensor))
        }

    before = numbers()
    _take_steps(twin, parameters, range(5, 7))
    after = numbers()
    return frozenset(key for (index, key), value in before.items() if not _equal(value, after.get((index, key))))


def _twin(optimizer: Optimizer, model: nn.Module) -> tuple[Optimizer | None, dict[str, nn.Parameter]]:
    """An optimizer alike, with stand-ins of a few small parameters; (None, {}) where there can be none.

    Nothing of the model can be reached from it: what would lead there is dropped, and a step that needs it fails.
    """
    if any(isinstance(value, FunctionType) and value.__closure__ for value in _values(optimizer)):
        return None, {}  # which could lead anywhere
    chosen = {f"stand-in {index}": p for index, p in enumerate(_chosen(optimizer))}
    memo: dict[int, object] = {id(module): _DROPPED for module in model.modules()}
    memo.update({id(p): _DROPPED for p in model.parameters()})
    memo.update({id(p): _DROPPED for group in optimizer.param_groups for p in group["params"]})
    stand_ins = {name: nn.Parameter(p.detach().clone()) for name, p in chosen.items()}
    memo.update({id(p): stand_ins[name] for name, p in chosen.items()})
    reach = Reach(dict(model.named_parameters()) | chosen, {}, full=True)
    for place, value in look(optimizer, reach).objects.items():
        if place.name and place.name not in chosen:
            memo[id(value)] = {}  # not to copy the state of parameters that are not there
    twin = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    try:
        for name, value in vars(optimizer).items():
            if name != "step":
                vars(twin)[name] = OrderedDict() if name.endswith("_hooks") else copy.deepcopy(value, memo)
    except Exception:
        return None, {}
    for one in [twin, *(value for value in vars(twin).values() if isinstance(value, Optimizer))]:
        one.state.pop(_DROPPED, None)
        for group in one.param_groups:
            group["params"][:] = [p for p in group["params"] if p is not _DROPPED]
    return twin, stand_ins


def _values(optimizer: Optimizer) -> Iterator[object]:
    """What stands in attributes and groups, and one container further; not `step`, which schedulers wrap."""
    found = [value for name, value in vars(optimizer).items() if name != "step"]
    found += [value for group in optimizer.param_groups for value in group.values()]
    for value in found:
        yield value
        yield from value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()


def _chosen(optimizer: Optimizer) -> list[nn.Parameter]:
    """Of each group the smallest parameter of each number of dimensions and dtype."""
    chosen = []
    for group in optimizer.param_groups:
        smallest: dict[tuple[int, torch.dtype, torch.device], nn.Parameter] = {}
        for p in group["params"]:
            kind = (p.dim(), p.dtype, p.device)
            if p.requires_grad and 0 < p.numel() <= _LARGEST:
                smallest[kind] = min(smallest.get(kind, p), p, key=Tensor.numel)
        chosen += smallest.values()
    return chosen


def _distinct(optimizer: Optimizer, model: nn.Module) -> Iterator[Optimizer]:
    """The optimizer, and one of each kind of those inside it that hold parameters of their own."""
    kinds: set[type] = set()
    reach = Reach({}, dict(model.named_parameters()), full=True)
    shared = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for one in (optimizer, *(o for o in look(optimizer, reach).objects.values() if isinstance(o, Optimizer))):
        held = {id(p) for group in one.param_groups for p in group["params"]}
        if type(one) not in kinds and (one is optimizer or not held <= shared) and not is_known(one):
            kinds.add(type(one))
            yield one


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _equal(one: object, other: object) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


@contextmanager
def _unmoved_generators() -> Iterator[None]:
    """Python's, numpy's and torch's random states are afterwards what they were."""
    pythons, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)
