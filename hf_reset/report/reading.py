"""What a study's numbers say, in words: how the arms compare, and whether validation could choose at all.

Nothing here recommends what lost. A difference counts where all seeds that both arms have agree on its sign and it is
more than a tie; with one seed, where it is beyond two standard errors of the test as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hf_reset.report.tables import Record, arms_of

Verdict = Literal["better", "worse", "alike"]


@dataclass(frozen=True)
class Measure:
    """What the arms are compared by.

    Args:
        key: of a record, without `_last` and `_best`.
        name: in a sentence.
        unit: of the difference as shown.
        scale: from the record's unit to the one shown.
        higher_is_better: its direction.
        tie: differences up to this, in the record's unit, are none.
        is_share: whether it is a share of the record's `test_rows`, whose sampling error is then known.
    """

    key: str
    name: str
    unit: str
    scale: float = 1.0
    higher_is_better: bool = True
    tie: float = 0.0
    is_share: bool = False


def compare_arms(records: Sequence[Record], measure: Measure) -> tuple[list[str], set[Verdict]]:
    """How each arm with resets did against the first arm without, at the last step and at the best evaluation.

    Args:
        records: of the study.
        measure: what they are compared by.

    Returns:
        A paragraph for each arm with resets, and the verdicts in them; both empty where there is nothing to compare.
    """
    resets = {record["arm"]: record["can_reset"] for record in records}
    without = [arm for arm in arms_of(records) if not resets[arm]]
    lines, verdicts = [], set()
    for arm in (arm for arm in arms_of(records) if resets[arm] and without):
        found = {weights: _verdict(records, arm, without[0], measure, weights) for weights in ("last", "best")}
        known = {weights: one for weights, one in found.items() if one is not None}
        if not known:
            continue
        said = " and ".join(f"{one[1]} {_WHEN[weights]}" for weights, one in known.items())
        lines.append(f"{measure.name}, {arm} against {without[0]}: {said}. {_conclusion(arm, known)}")
        verdicts |= {one[0] for one in known.values()}
    return lines, verdicts


_WHEN = {"last": "at the last step", "best": "at the best evaluation"}


def _conclusion(arm: str, known: dict[str, tuple[Verdict, str]]) -> str:
    worse = [_WHEN[weights] for weights, one in known.items() if one[0] == "worse"]
    better = [_WHEN[weights] for weights, one in known.items() if one[0] == "better"]
    if worse:
        return f"{arm} lost {' and '.join(worse)}: with these settings, on these data, do without it."
    if better:
        return f"{arm} gained {' and '.join(better)}."
    return "No difference between them can be told."


def _verdict(
    records: Sequence[Record], arm: str, other: str, measure: Measure, weights: str
) -> tuple[Verdict, str] | None:
    key = f"{measure.key}_{weights}"
    mine, others = (
        {record["seed"]: record for record in records if record["arm"] == one and record.get(key) is not None}
        for one in (arm, other)
    )
    seeds = sorted(mine.keys() & others.keys())
    if not seeds:
        return None
    differences = [mine[seed][key] - others[seed][key] for seed in seeds]
    mean = statistics.fmean(differences)
    gains = [value if measure.higher_is_better else -value for value in differences]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    bound = measure.tie
    if len(seeds) == 1 and measure.is_share:
        bound = max(bound, 2 * _error_of_shares(mine[seeds[0]], others[seeds[0]], key))
    digits = 1 if measure.scale > 1 else 3
    counts = f"better in {better}, worse in {worse} of {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    said = f"{measure.scale * mean:+.{digits}f} {measure.unit} ({counts})"
    if abs(mean) <= bound or max(better, worse) < len(seeds):
        return "alike", said
    return ("better" if better else "worse"), said


def _error_of_shares(one: Record, other: Record, key: str) -> float:
    """Standard error of the difference of two shares of the same test, as if its rows were drawn twice: a bound."""
    count = one.get("test_rows")
    return math.sqrt(sum(p * (1 - p) for p in (one[key], other[key])) / count) if count else 0.0


def choice_caveats(records: Sequence[Record]) -> list[str]:
    """What kept validation from choosing: one evaluation, the best at the end, no resets, too few rows."""
    total, lines = len(records), []
    evaluations = [len(record.get("history", {}).get("validation_loss", [])) for record in records]
    if single := sum(count == 1 for count in evaluations):
        lines.append(
            f"In {single} of {total} runs one evaluation was all there was, so nothing was chosen. Evaluate more often "
            "(`--eval_steps`)."
        )
    at_end = sum(
        record.get("steps") is not None and record.get("best_step") == record["steps"] and count > 1
        for record, count in zip(records, evaluations, strict=True)
    )
    if at_end:
        lines.append(
            f"In {at_end} of {total} runs the best evaluation was the last step: validation was still improving. Train "
            "longer before judging by the best."
        )
    unsure = [record for record in records if _cannot_choose(record)]
    if 2 * len(unsure) > total:
        rows, gain, error = (
            unsure[0].get(key) for key in ("validation_rows", "validation_gain", "validation_gain_error")
        )
        lines.append(
            f"Validation is too small to choose: in {len(unsure)} of {total} runs its {rows} rows cannot tell the best "
            f"evaluation from the last step (for example {gain:.3f} nats with a paired standard error of {error:.3f}). "
            "What was chosen is chance; give more validation rows."
        )
    return lines


def _cannot_choose(record: Record) -> bool:
    gain, error = record.get("validation_gain"), record.get("validation_gain_error")
    return gain is not None and error is not None and error > 0 and abs(gain) < 2 * error


def armed_on_evidence(records: Sequence[Record]) -> str | None:
    """When resets began in each run, and by which margin of the paired test; None where no run's began on evidence."""
    known = [record for record in records if record.get("armed_margin") is not None]
    if not known:
        return None
    said = ", ".join(
        f"{record['arm']} seed {record['seed']} after step {record['armed_step']} ({record['armed_margin']:.1f})"
        for record in known
    )
    return (
        f"Resets began when validation had turned: {said}. In brackets: how many standard errors of their paired "
        "difference the rows of two evaluations lay above the anchor's."
    )


def never_reset(records: Sequence[Record]) -> str | None:
    """Why no run that could reset did, where none did: patience was never reached, or no draw came."""
    able = [record for record in records if record["can_reset"]]
    if not able or any(record["resets"] for record in able):
        return None
    if any(record.get("armed_step") is not None for record in able):
        return (
            "Resets were on, and none was drawn: the probability is too small for the steps that were left. Give a "
            "larger --reset_probability."
        )
    return (
        "Resets never began, since patience was never reached: validation went on improving to the end. The run was "
        "too short to overfit, or the noise is of a kind that validation shares."
    )
