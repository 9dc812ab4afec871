"""Excursions: what a run's log says about the way from the anchor to the next better validation.

An excursion starts at the anchor (taken, or gone back to) and ends with the next better validation, or is censored by
a reset or by the end. `plan` says what follows from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from hf_reset.errors import DataError

EVENTS = "StochasticResetCallback.events"  # among the `stateful_callbacks` of a `trainer_state.json`; no class's name

LOST = "eval_race_lost"
"""Among the results of an evaluation that was a race against the anchor (`hf_reset.training.racing`): 1 where it was
lost, and then there are no figures of all rows; 0 where it went to the end."""

Entry: TypeAlias = Mapping[str, Any]
"""One record of a Trainer's log history."""

Event: TypeAlias = dict[str, Any]
"""One record that can be written to: of the audit trail, or of a log."""


@dataclass(frozen=True)
class Excursion:
    """One excursion, in optimizer steps.

    Attributes:
        start: steps done when it started at the anchor.
        ages: steps from the start to each evaluation in it, ascending.
        improved: whether the last of these was a new best; else it is censored there.
    """

    start: int
    ages: tuple[int, ...]
    improved: bool


def excursions_of(
    log_history: Sequence[Entry],
    *,
    metric: str = "eval_loss",
    greater_is_better: bool = False,
    min_delta: float = 0.0,
) -> list[Excursion]:
    """The excursions in a Trainer's log history, with or without resets in it, oldest first.

    Args:
        log_history: what `read_log` gives: Trainer's log history, and this package's records with a `kind`.
        metric: the evaluation result that says what is better, with its prefix.
        greater_is_better: its direction.
        min_delta: how much better a new best must be, in its units.

    Returns:
        Excursions with at least one evaluation, from the first best on.

    Raises:
        DataError: no record has the metric.
    """
    values: dict[int, float] = {}
    for record in log_history:
        if isinstance(record.get(metric), (int, float)) and isinstance(record.get("step"), int):
            values.setdefault(record["step"], float(record[metric]))
        elif record.get(LOST) and values:
            values.setdefault(record["step"], math.nan)  # no better than the best, by how much is not known
    if not values:
        seen = sorted({name for record in log_history for name in record if str(name).startswith("eval_")})
        remedy = f"It has {', '.join(seen)}: name one as `metric`." if seen else "Train with `eval_strategy` set."
        raise DataError(f"The log has no evaluation with {metric!r}, so it has no excursions to plan from. {remedy}")
    resets = {record["step"] + 1 for record in log_history if record.get("kind") == "reset"}
    found: list[Excursion] = []
    best, start, ages = math.inf, 0, []
    for step in sorted(values.keys() | resets):
        value = values.get(step, math.nan) * (-1 if greater_is_better else 1)
        # An evaluation after `step` steps sees the reset that ended the last of them.
        if step in resets:
            found += [Excursion(start, tuple(ages), False)] if ages else []
            start, ages = step, []
        if step not in values:
            continue
        improved = value < best - (min_delta if math.isfinite(best) else 0)
        if math.isfinite(best) and step > start:
            ages.append(step - start)
        if improved:
            found += [Excursion(start, tuple(ages), True)] if ages else []
            best, start, ages = value, step, []
    return found + ([Excursion(start, tuple(ages), False)] if ages else [])


def metric_of(log_history: Sequence[Entry]) -> str:
    """The evaluation result that chose the run's anchors, by their values; "eval_loss" where there are none."""
    anchors = {record.get("step"): record.get("metric") for record in log_history if record.get("kind") == "anchor"}
    evaluations = [record for record in log_history if record.get("step") in anchors]
    names = {name for record in evaluations for name in record if str(name).startswith("eval_")}
    for name in sorted(names, key=lambda name: (name != "eval_loss", name)):
        values = {record["step"]: record[name] for record in reversed(evaluations) if name in record}
        if values == anchors:
            return name
    return "eval_loss"


def evaluation_interval(log_history: Sequence[Entry], metric: str = "eval_loss") -> int:
    """The usual number of steps between two evaluations in a log history: their median, at least 1."""
    evaluations = [record for record in log_history if metric in record or record.get(LOST)]
    steps = sorted({int(record["step"]) for record in evaluations if "step" in record})
    gaps = np.diff([0, *steps]) if len(steps) < 2 else np.diff(steps)
    return max(1, int(np.median(gaps))) if len(gaps) else 1


def read_log(output_dir: str | Path) -> list[Event]:
    """The log history of a run and its resets: of `trainer_state.json` in the directory, or of its newest checkpoint.

    Raises:
        DataError: there is none, it cannot be read, or another program wrote it.
    """
    directory = Path(output_dir)
    checkpoints = [path for path in directory.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    newest = sorted(checkpoints, key=lambda path: int(path.name.split("-")[-1]), reverse=True)
    file = next((f for d in [directory, *newest] if (f := d / "trainer_state.json").is_file()), None)
    if file is None:
        raise DataError(
            f"`OUTPUT_DIR` {str(output_dir)!r} has no trainer_state.json, nor has a checkpoint in it. Name the "
            "`output_dir` of a Trainer that saved a checkpoint, or call `trainer.save_state()` at the end."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{str(file)!r} cannot be read as JSON ({error}). Was the run killed while writing?") from None
    history = content.get("log_history") if isinstance(content, dict) else None
    if not isinstance(history, list) or not all(isinstance(record, dict) for record in history):
        raise DataError(f"{str(file)!r} has no `log_history`: another program than Trainer wrote it.")
    return with_events(history, recorded_events(content.get("stateful_callbacks")))


def recorded_events(stateful_callbacks: Any) -> list[Event]:
    """The audit trail among what Trainer saved of its callbacks."""
    return list((stateful_callbacks or {}).get(EVENTS, []))


def with_events(log_history: Sequence[Event], events: Sequence[Event]) -> list[Event]:
    """Trainer's records and this package's events in the order in which they came about.

    An anchor moves after the evaluation at its step was logged; a reset ends the step with its index, which comes
    after all that is logged when so many steps are done.
    """

    def when(record: dict[str, Any]) -> tuple[int, int]:
        kind = record.get("kind")
        return record.get("step", 0), 2 if kind == "reset" else 1 if kind else 0

    return sorted([*log_history, *events], key=when)
