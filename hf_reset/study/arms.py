"""Arms: the ways of training that a study sets beside one another, and the arguments of one run of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from hf_reset.errors import ConfigError
from hf_reset.report.results import run_folder


@dataclass(frozen=True)
class Arm:
    """One way of training in a comparison. What it does is in its overrides alone; the name is for people.

    Args:
        name: what tables, figures and folders call it.
        overrides: training arguments that differ from the study's, name to value.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)


PLAIN = Arm("plain", {"reset_probability": 0.0, "reset_refine": "off", "reset_ema_decay": None})
"""Nothing of this package: what a study asks for beside resets is off too, but for a loss that both arms share."""
RESET = Arm("reset")
RESET_ALONE = Arm("reset", {"reset_refine": "off"})
"""Of a study that refines: its resets without that."""
REFINE = Arm("reset + refine")


def planned_runs(seeds: Sequence[int], *, compare: bool, resets: bool, refines: bool = False) -> list[tuple[Arm, int]]:
    """The (arm, seed) pairs of a recipe's study: under `compare` what was asked for beside less, else that alone.

    Args:
        seeds: one run an arm each; at least one, none twice.
        compare: run `PLAIN` and `RESET`; with `refines`, `PLAIN`, `RESET_ALONE` and `REFINE`.
        resets: without `compare`, whether there are resets (the probability is above 0); else the arm is `PLAIN`.
        refines: whether `reset_refine` is on.

    Raises:
        ConfigError: no seed, or one twice; `compare` without resets.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"`seeds` must name at least one seed and none twice, got {list(seeds)}.")
    if compare and not resets:
        raise ConfigError("`compare` with `reset_probability` 0 sets plain beside plain. Give a reset_probability.")
    asked = REFINE if refines else RESET
    beside = (PLAIN, RESET_ALONE) if refines else (PLAIN,)
    arms = (*beside, asked) if compare else (asked,) if resets else (PLAIN,)
    return [(arm, seed) for seed in seeds for arm in arms]


def arguments_of(training: Any, arm: Arm, seed: int) -> Any:
    """The arguments of one run: its own folder and seed, and what the arm overrides.

    Training ends with the last step's weights in every arm, to measure them; what `reset_finish` asks for is what
    gets saved.

    Args:
        training: `ResetTrainingArguments`, or others with `ResetArguments` in front.
        arm: the way of training.
        seed: of the run.

    Raises:
        ConfigError: the arm overrides something that is no training argument, or with a value it cannot have.
    """
    args = copy(training)
    args.output_dir = f"{training.output_dir}/{run_folder(arm.name, seed)}"
    args.seed = seed
    args.reset_finish = "last"
    for name, value in arm.overrides.items():
        if not hasattr(args, name):
            raise ConfigError(f"the arm {arm.name!r} overrides `{name}`, which is no training argument.")
        setattr(args, name, value)
    args.reset_config()
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # torch warns of it, each time, where there is no accelerator
    return args
