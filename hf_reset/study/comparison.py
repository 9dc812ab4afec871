"""A comparison of many methods on many data sets: what is to be run, what has been, and who takes which run.

One run is a cell of the plan: a data set with its noise, a method, a seed. Its record is one JSON file, so that a
study runs in pieces, in one process or several, here or elsewhere, and what is there is skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_reset.errors import ConfigError
from hf_reset.study.arms import Arm


@dataclass(frozen=True)
class Setting:
    """A data set, what is done to its labels, and how long one trains on it.

    Args:
        dataset: its folder's name, or "docstrings" for the embedded corpus.
        noise_kind: "symmetric", "pair", "instance"; "real" for the labels that annotators or rules gave.
        noise_rate: share of training and validation labels made wrong; 0 for none, and for "real".
        options: what differs from the plan's `defaults`, such as `max_steps`.
        variant: tells apart settings of one data set and noise; it stands in the name behind the data set.
    """

    dataset: str
    noise_kind: str = "symmetric"
    noise_rate: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    variant: str = ""

    @property
    def name(self) -> str:
        """Such as "trec-symmetric40", for files and tables."""
        rate = "" if self.noise_kind == "real" else f"{round(100 * self.noise_rate)}"
        data = f"{self.dataset}_{self.variant}" if self.variant else self.dataset
        return f"{data}-{self.noise_kind}{rate}" if rate != "0" else f"{data}-clean"


@dataclass(frozen=True)
class Run:
    """One run of a plan."""

    setting: Setting
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """The record's file name without its suffix."""
        return f"{self.setting.name}--{self.arm.name}--seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """All runs of a study, in the order in which a prefix of them is a usable table.

    Args:
        defaults: options of every run, by name.
        settings: the columns of the table.
        arms: its rows.
        seeds: one run each.
        stages: which settings, arms (both by name) and seeds come one after another; none: all at once.
    """

    defaults: Mapping[str, Any]
    settings: Sequence[Setting]
    arms: Sequence[Arm]
    seeds: Sequence[int]
    stages: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """A plan from YAML.

        Raises:
            ConfigError: the file cannot be read, lacks a part, or a stage names something it does not have.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            plan = cls(
                defaults=content["defaults"],
                settings=[Setting(**one) for one in content["settings"]],
                arms=[Arm(name, overrides or {}) for name, overrides in content["arms"].items()],
                seeds=content["seeds"],
                stages=content.get("stages") or (),
            )
        except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"the plan {str(path)!r} cannot be read ({type(error).__name__}: {error}). It needs `defaults`, "
                "`settings`, `arms` and `seeds`; see recipes/studies/plans."
            ) from error
        plan._check_stages(path)
        return plan

    def runs(self) -> Iterator[Run]:
        """Every run once, stage by stage; within a stage the runs of one setting and seed together."""
        met: set[str] = set()
        for stage in self.stages or ({},):
            arms = [arm for arm in self.arms if arm.name in stage.get("arms", [arm.name])]
            for setting in self.settings:
                if setting.name not in stage.get("settings", [setting.name]):
                    continue
                for seed in stage.get("seeds", self.seeds):
                    for run in (Run(setting, arm, seed) for arm in arms):
                        if run.name not in met:
                            met.add(run.name)
                            yield run

    def _check_stages(self, path: str | Path) -> None:
        known: dict[str, set[Any]] = {"settings": {one.name for one in self.settings}, "seeds": set(self.seeds)}
        known["arms"] = {arm.name for arm in self.arms}
        for stage in self.stages:
            for part, names in stage.items():
                if odd := sorted(set(names) - known.get(part, set())):
                    raise ConfigError(f"the plan {str(path)!r} has a stage with {part} {odd[0]!r}, which it has not.")


def record_path(folder: str | Path, run: Run) -> Path:
    """Where a run's record lies."""
    return Path(folder) / f"{run.name}.json"


def pending(plan: Plan, folder: str | Path) -> list[Run]:
    """The runs without a record yet, in order."""
    return [run for run in plan.runs() if not record_path(folder, run).is_file()]


def claim(folder: str | Path, run: Run) -> Path | None:
    """Take a run for this process, unless another has it or its record is there.

    Returns:
        The claim's file, to be removed when the record is written; None where the run is taken. A claim whose process
        has died is taken over.
    """
    if record_path(folder, run).is_file():
        return None
    mark = Path(folder) / f".{run.name}.claim"
    mine = Path(folder) / f".{run.name}.{os.getpid()}.tmp"
    mine.write_text(str(os.getpid()), encoding="utf-8")
    try:
        for _ in range(2):
            try:
                os.link(mine, mark)  # appears with its content, or not at all
                return mark
            except FileExistsError:
                if _is_alive(mark):
                    return None
                mark.unlink(missing_ok=True)
        return None
    finally:
        mine.unlink()


def described(run: Run, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of the run itself: `setting`, `arm`, `overrides`, `seed` and all options."""
    setting = {**asdict(run.setting), "name": run.setting.name}
    return {
        "setting": setting,
        "arm": run.arm.name,
        "overrides": dict(run.arm.overrides),
        "seed": run.seed,
        "options": dict(options),
    }


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """Every record of a study, by setting, arm and seed.

    Raises:
        ConfigError: the folder has none.
    """
    files = sorted(Path(folder).glob("*--*--seed*.json"))
    if not files:
        raise ConfigError(f"there is no record of a study in {str(folder)!r}. Run `recipes/studies/run.py` first.")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _is_alive(mark: Path) -> bool:
    try:
        os.kill(int(mark.read_text(encoding="utf-8")), 0)
    except (OSError, ValueError):
        return False
    return True
