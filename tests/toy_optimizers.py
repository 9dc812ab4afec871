"""Optimizers of a few lines, each of which keeps what it remembers somewhere else."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import torch
from torch.optim import Optimizer


class Toy(Optimizer):
    """p ← p − lr · direction(gradient, memory)."""

    def __init__(self, params, lr=0.05, **more):
        super().__init__(params, {"lr": lr, **more})
        self.prepare()

    def prepare(self):
        """Make what it remembers from the start."""

    def before(self, group):
        """Once a step and group."""

    def direction(self, p, group):
        raise AssertionError

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self.before(group)
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.direction(p, group))


class NumbersInGroups(Toy):
    """A step count and a distance estimate that all parameters of a group share; the latter is a tensor."""

    def before(self, group):
        group["step"] = group.get("step", 0) + 1
        norm = sum(p.grad.norm() for p in group["params"] if p.grad is not None)
        group["d"] = group.get("d", torch.tensor(1.0)) * (1 + norm / 100)
        group["warm"] = group["step"] > 4

    def direction(self, p, group):
        return p.grad * group["d"] / group["step"] * (2 if group["warm"] else 1)


class Basis:
    """Changes now and then, and is a new tensor each time."""

    __slots__ = ("age", "matrix")

    def __init__(self):
        self.age, self.matrix = 0, None


class Projector:
    def __init__(self):
        self.basis = Basis()
        self.history = deque(maxlen=3)


class ObjectsInState(Toy):
    def direction(self, p, group):
        projector = self.state[p].setdefault("projector", Projector())
        if projector.basis.age % 3 == 0:
            projector.basis.matrix = p.grad.sign()
        projector.basis.age += 1
        projector.history.append(float(p.grad.norm()))
        return p.grad * projector.basis.matrix * sum(projector.history)


class NestedState(Toy):
    """Lists and dictionaries of tensors, some of them replaced, one of them a tuple, and None where there is none."""

    def direction(self, p, group):
        state = self.state[p]
        if not state:
            state.update(factors=[torch.zeros_like(p), None], by={"sum": torch.zeros_like(p)}, pair=(0, p.grad.clone()))
        state["factors"][0] = 0.9 * state["factors"][0] + p.grad
        state["factors"][1] = state["factors"][0].norm() if state["pair"][0] > 2 else None
        state["by"]["sum"].add_(p.grad)
        state["pair"] = (state["pair"][0] + 1, 0.5 * (state["pair"][1] + p.grad))
        return state["factors"][0] + state["by"]["sum"] + state["pair"][1] / (1 + (state["factors"][1] or 0))


class StateInGroups(Toy):
    """A state of its own in the group, keyed by parameter."""

    def direction(self, p, group):
        state = group.setdefault("moments", {}).setdefault(p, {"sum": torch.zeros_like(p), "step": 0})
        state["step"] += 1
        state["sum"] = state["sum"] + p.grad
        return state["sum"] / state["step"]


class Attributes(Toy):
    """Everything on the optimizer itself: by name, by id, counters, arrays, sets, and random generators."""

    def prepare(self):
        self.sums, self.by_id, self.count, self.seen = {}, {}, 0, set()
        self.array, self.words = np.zeros(3), {"phase": "warm"}
        self.generator = torch.Generator().manual_seed(1)
        self.python, self.numpy, self.old = random.Random(2), np.random.default_rng(3), np.random.RandomState(4)
        self.names = {id(p): f"weight {i}" for i, p in enumerate(self.param_groups[0]["params"])}

    def before(self, group):
        self.count += 1
        self.seen.add(self.count % 4)
        self.array += self.count
        self.words["phase"] = "cold" if self.count > 9 else "warm"
        self.draw = (
            torch.rand((), generator=self.generator) + self.python.random() + self.numpy.random() + self.old.rand()
        )

    def direction(self, p, group):
        name = self.names[id(p)]
        self.sums[name] = self.sums.get(name, 0) + p.grad
        self.by_id[id(p)] = self.by_id.get(id(p), torch.zeros_like(p)) + p.grad.sign()
        scale = len(self.seen) + float(self.array[0]) / 100 + (self.words["phase"] == "cold")
        return (self.sums[name] + self.by_id[id(p)] / 10) * self.draw * scale / self.count


class OwnTheta(Toy):
    """A constructor argument that its own step moves."""

    def __init__(self, params, lr=0.05, theta=1.0):
        super().__init__(params, lr, theta=theta)

    def before(self, group):
        group["theta"] = group["theta"] * 1.1

    def direction(self, p, group):
        return p.grad * group["theta"]


class FromTheStart(Toy):
    """State made in the constructor, and not zero."""

    def prepare(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.full_like(p, 0.25)

    def direction(self, p, group):
        return p.grad / self.state[p]["sum"].add_(p.grad.square()).sqrt()


class SlowWeights(Optimizer):
    """A wrapper, whose slow weights begin as the weights (Lookahead)."""

    def __init__(self, inner, every=3):
        self.inner, self.every = inner, every
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups
        for group in self.param_groups:
            group["counter"] = 0
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        for group in self.param_groups:
            group["counter"] = (group["counter"] + 1) % self.every
            for p in group["params"] if group["counter"] == 0 else []:
                p.copy_(self.state[p]["slow"].lerp_(p, 0.5))


class OnePerParameter(Optimizer):
    """Steps in the backward, with an optimizer for each parameter; its own step does nothing."""

    def __init__(self, params, cls, lr=0.05):
        params = list(params)
        self.each = {p: cls([p], lr=lr) for p in params}
        super().__init__([torch.zeros(1)], {"lr": lr})
        for p in params:
            p.register_post_accumulate_grad_hook(self.update)

    def update(self, p):
        self.each[p].step()
        p.grad = None

    def step(self, closure=None):
        pass


class Halves(torch.Tensor):
    """A tensor made of two, which no fused copy understands: what it stands for is their sum."""

    @staticmethod
    def __new__(cls, high, low):
        return torch.Tensor._make_wrapper_subclass(cls, high.shape, dtype=high.dtype, device=high.device)

    def __init__(self, high, low):
        self.high, self.low = high, low

    def __tensor_flatten__(self):
        return ["high", "low"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, outer_size, outer_stride):
        return cls(inner["high"], inner["low"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].high.detach(), args[0].low.detach())
        raise TypeError(f"{func} is not for Halves")


class TensorsOfTensors(Toy):
    def direction(self, p, group):
        state = self.state[p]
        if not state:
            state["sum"] = Halves(torch.zeros_like(p), torch.zeros_like(p))
        state["sum"].high.add_(p.grad)
        state["sum"].low.mul_(0.5).add_(p.grad)
        return state["sum"].high + state["sum"].low


class NeedsGradients(Toy):
    """Fails where there are none, as a mean over them does."""

    def before(self, group):
        grads = [p.grad.norm() for p in group["params"] if p.grad is not None]
        group["mean"] = float(sum(grads)) / len(grads)

    def direction(self, p, group):
        return p.grad / group["mean"]


# Those that cannot be made exact.


def _counter():
    count = 0

    def next_one():
        nonlocal count
        count += 1
        return count

    return next_one


class HiddenInAClosure(Toy):
    count = staticmethod(_counter())  # of the class: nothing on the optimizer shows it

    def direction(self, p, group):
        return p.grad / type(self).count()


_GLOBAL: dict[torch.Size, int] = {}


class HiddenInAModule(Toy):
    def direction(self, p, group):
        _GLOBAL[p.shape] = _GLOBAL.get(p.shape, 0) + 1
        return p.grad / _GLOBAL[p.shape]


class HoldsAnIterator(Toy):
    def prepare(self):
        self.rates = iter([1.0] * 10_000)

    def direction(self, p, group):
        return p.grad * next(self.rates)


class SetsItsRate(Toy):
    def before(self, group):
        group["lr"] = group["lr"] * 0.9

    def direction(self, p, group):
        return p.grad
