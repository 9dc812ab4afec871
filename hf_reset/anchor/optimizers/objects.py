"""What a Python object remembers: which parts of it are memory, and which are code or somebody else's."""

from __future__ import annotations

import enum
import functools
import inspect
import logging
import random
import re
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)  # values that nothing can change in place
_RATES = re.compile(r"(?:.*_)?lrs?|(?:base|max)_momentum")  # what schedulers write beside constructor arguments
_HOST = re.compile(r"_optimizer_.*_hooks|_zero_grad_profile_name|_warned_capturable.*|_opt_called|defaults|step")
_CODE = (
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, functools.partial,
    enum.Enum, weakref.ref, logging.Logger, re.Pattern, range, slice, LRScheduler, torch.Size,
)  # fmt: skip
_ELSEWHERE = ("torch", "accelerate", "transformers", "deepspeed", "logging", "threading", "_thread")


def attributes_of(optimizer: object) -> Iterator[tuple[str, object]]:
    """An optimizer's own attributes, less torch's and what the user gave its constructor as a number."""
    users = constructor_arguments(type(optimizer))
    for name, value in vars(optimizer).items():
        if _is_hosts(name) or is_rate(name):
            continue
        if name in users and isinstance(value, PLAIN):
            continue
        yield name, value


@functools.lru_cache(maxsize=4096)  # as of `is_rate`: a reset asks for the same few names
def _is_hosts(name: str) -> bool:
    """Whether an attribute is torch's own."""
    return name in ("state", "param_groups") or bool(_HOST.fullmatch(name))


@functools.cache
def constructor_arguments(cls: type) -> frozenset[str]:
    """The names of a class's constructor arguments: what the user, or the user's schedule, sets."""
    names: set[str] = set()
    for one in cls.__mro__:
        if "__init__" in vars(one) and one is not object:
            names |= inspect.signature(one.__init__).parameters.keys()
    return frozenset(names)


def is_users(key: object, users: frozenset[str] | None) -> bool:
    """Whether an entry of a parameter group is the user's: its parameters, a rate, a constructor argument."""
    return users is not None and isinstance(key, str) and (key == "params" or key in users or is_rate(key))


@functools.lru_cache(maxsize=4096)
def is_rate(name: str) -> bool:
    """Whether a schedule owns what is called so: a learning rate, or a bound of what it cycles."""
    return bool(_RATES.fullmatch(name))


def is_code(value: object, names: Mapping[int, str]) -> bool:
    """Whether a thing is not memory: code, types, the model, and the machinery of libraries around."""
    if isinstance(value, (Optimizer, torch.Generator)):
        return False
    if isinstance(value, nn.Module):
        return any(id(p) in names for p in value.parameters())
    if isinstance(value, _CODE):
        return True
    if isinstance(value, types.GeneratorType):
        return value.gi_frame is None  # run to its end
    return type(value).__module__.partition(".")[0] in _ELSEWHERE


def is_plain_object(value: object) -> bool:
    """Whether everything an object holds stands in its attributes."""
    if not hasattr(value, "__dict__") and not hasattr(type(value), "__slots__"):
        return False
    if isinstance(value, nn.Module):
        return True
    try:
        made, *_ = value.__reduce_ex__(2)
    except Exception:
        return False
    return getattr(made, "__name__", "") == "__newobj__" and not isinstance(
        value, (Mapping, list, tuple, set, frozenset)
    )


def fields_of(value: object) -> Iterator[tuple[str, object]]:
    """An object's attributes, in a dictionary or in slots."""
    yield from list(getattr(value, "__dict__", {}).items())
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def random_state(value: object) -> object:
    """The state of a random generator of Python's or numpy's; None for anything else."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return value.get_state(legacy=False) if isinstance(value, np.random.RandomState) else None


def set_random_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
