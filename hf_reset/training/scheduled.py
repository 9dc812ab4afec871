"""Which evaluations are the Trainer's own: those that it runs by its schedule, on its own `eval_dataset`."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from transformers import Trainer

_LOOP = ("_run_epoch", "_inner_training_loop")


def is_scheduled() -> bool:
    """Whether the evaluation that a callback is just being told of is one by which weights may be chosen.

    To be called in `on_evaluate`. A callback is told neither who asked for an evaluation nor what was evaluated: a test
    set under the default prefix looks like validation. So the call stack is read. Trainer evaluates by its schedule in
    `Trainer._evaluate` and nowhere else; a `trainer.evaluate(...)` of the user's during training comes from inside an
    event of another callback, or from a method overridden amid the loop. Where no Trainer is at work at all, whoever
    tells callbacks of evaluations is taken at their word.
    """
    events, others = 0, False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        events += name == "call_event"
        others = others or _is_of_another_set(frame)
        if name == "_evaluate" and isinstance(frame.f_locals.get("self"), Trainer):
            return events <= 1 and not others
        if events > 1 or name in _LOOP:
            return False
        frame = frame.f_back
    return True


def _is_of_another_set(frame: FrameType) -> bool:
    """Whether the frame is a `Trainer.evaluate` that was given another data set than the Trainer's own."""
    if frame.f_code is not Trainer.evaluate.__code__:
        return False
    known: dict[str, Any] = frame.f_locals
    given, own = known.get("eval_dataset"), known["self"].eval_dataset
    if isinstance(given, str) or given is None or given is own:  # a name among the Trainer's own, in a dict of them
        return False
    return not (isinstance(own, dict) and any(given is one for one in own.values()))
