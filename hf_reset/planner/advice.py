"""What went wrong with a run's resets, in words and with the remedy: one pure function a failure signature.

Each takes plain values and returns a message, or None where it sees nothing. `training.advisor` asks them while a run
goes; they can as well be asked after it. They are made to be silent on a healthy run: each wants several evaluations,
and a difference that is larger than their scatter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hf_reset.planner.excursions import Entry

ENOUGH = 8  # evaluations without a new best, before one says that nothing moves
_NEAR_CHANCE = 0.02  # of the loss of guessing. (Two classes at 40 % noise leave a perfect model 3 % to gain.)


@dataclass(frozen=True)
class Seen:
    """One evaluation against the anchor of its time.

    Attributes:
        step: optimizer steps done.
        age: steps since the anchor was taken or gone back to.
        worse_by: how much worse than the anchor's the metric was, in its units; negative for a new best.
        resets: how many there had been.
    """

    step: int
    age: int
    worse_by: float
    resets: int


def seen_since(log_history: Sequence[Entry], metric: str, *, greater_is_better: bool, since: int) -> list[Seen]:
    """The evaluations after step `since`, each against the anchor before it, from a log history with our records."""
    sign = -1 if greater_is_better else 1
    anchor, start, resets, found = math.nan, 0, 0, []
    for record in log_history:
        kind, step = record.get("kind"), record.get("step", 0)
        if kind == "anchor":
            anchor, start = float(record["metric"]), step
        elif kind == "reset":
            start, resets = step + 1, resets + 1
        elif isinstance(record.get(metric), (int, float)) and step > since and step > start:
            found.append(Seen(step, step - start, sign * (float(record[metric]) - anchor), resets))
    return [seen for seen in found if math.isfinite(seen.worse_by)]


def too_frequent(mean_excursion: float, interval: int, evaluations_since_best: int) -> str | None:
    """Resets so frequent that progress stops.

    Args:
        mean_excursion: steps between two resets, on average.
        interval: steps between two evaluations.
        evaluations_since_best: evaluations since the last new best.
    """
    if mean_excursion >= interval / 2 or evaluations_since_best < ENOUGH:
        return None
    return (
        f"Resets come every {mean_excursion:.0f} steps, {interval / mean_excursion:.0f} of them between two "
        f"evaluations, and the last {evaluations_since_best} evaluations brought no new best: an excursion is over "
        f"before it gets anywhere. Lower `probability` to about {1 / (2 * interval):.2g}, or evaluate more often."
    )


def too_rare(mean_excursion: float, interval: int, seen: Sequence[Seen]) -> str | None:
    """Resets so rare that overfitting comes between them: old excursions are worse than the anchor, young ones less.

    Args:
        mean_excursion: steps between two resets, on average, as configured.
        interval: steps between two evaluations.
        seen: evaluations since resets began.
    """
    old = [s.worse_by for s in seen if s.age > 4 * interval]
    young = [s.worse_by for s in seen if s.age <= 2 * interval]
    if mean_excursion <= 4 * interval or len(old) < 4:
        return None
    worse = np.array(old)
    typical = float(np.median(np.abs(young))) if young else 0.0
    if (worse > 0).mean() < 0.9 or np.median(worse) < 3 * typical:
        return None
    return (
        f"Overfitting comes between resets: more than {4 * interval} steps after the anchor validation is worse than "
        f"there, by {np.median(worse):.3g} in the middle of {len(old)} evaluations, and a reset comes only every "
        f"{mean_excursion:.0f} steps. Raise `probability` to about {1 / (2 * interval):.2g}."
    )


def late_anchor(
    anchor_step: int,
    *,
    memory: float | None = None,
    training_loss: float | None = None,
    validation_loss: float | None = None,
    chance: float | None = None,
) -> str | None:
    """An anchor taken after memorisation began: resets go back to weights that know the wrong labels already.

    Args:
        anchor_step: optimizer steps done when it was taken.
        memory: share of mislabelled training rows answered with their wrong label at that time, where it is known
            (`diagnostics.LabelMemoryCallback`).
        training_loss: where it is not: the training loss logged nearest to that time,
        validation_loss: the anchor's,
        chance: and the loss of guessing, log K.
    """
    if memory is not None:
        if memory < 0.4:
            return None
        sign = f"{100 * memory:.0f} % of the wrong labels were memorised"
    else:
        if training_loss is None or validation_loss is None or chance is None:
            return None
        if validation_loss < chance / 2 or training_loss > 0.4 * validation_loss:
            return None
        sign = f"the training loss was {training_loss:.2g} against {validation_loss:.2g} in validation"
    return (
        f"The anchor of step {anchor_step} was taken late: {sign} by then, and resets go back to that. Evaluate more "
        "often from the start, choose anchors by a (calibrated) loss rather than an accuracy, or lower the learning "
        "rate."
    )


def near_chance(anchor_metric: float, chance: float, evaluations_since_best: int, *, is_loss: bool) -> str | None:
    """An anchor so early that resets hold the run near chance.

    Args:
        anchor_metric: the anchor's loss or accuracy.
        chance: what guessing has: log K, or the share of the commonest class.
        evaluations_since_best: evaluations since the last new best.
        is_loss: whether the metric is a cross-entropy; else an accuracy.
    """
    gained = 1 - anchor_metric / chance if is_loss else (anchor_metric - chance) / max(1 - chance, 1e-9)
    if gained > (_NEAR_CHANCE if is_loss else 2 * _NEAR_CHANCE) or evaluations_since_best < ENOUGH // 2:
        return None
    return (
        f"The anchor is hardly better than guessing ({anchor_metric:.3g}, guessing has {chance:.3g}), and resets hold "
        "the run there. Raise `patience`, so that resets begin when the run has learnt something, or lower "
        "`probability`; a larger validation set tells a first step of learning from noise."
    )


def scope_without_effect(scope: str, distances: Sequence[float], seen: Sequence[Seen]) -> str | None:
    """A scope whose reset changes nothing at validation.

    Args:
        scope: as configured.
        distances: how far each reset moved the weights, as in the audit trail.
        seen: evaluations since resets began.
    """
    if len(distances) >= 4 and not any(distances):
        return (
            f"The last {len(distances)} resets of scope {scope!r} moved nothing: its parameters do not change in "
            "training. Choose a scope that trains, see `hf-reset scopes`."
        )
    pairs = [(one.worse_by, other.worse_by) for one, other in pairwise(seen) if other.resets > one.resets]
    if scope == "all" or len(pairs) < 4:
        return None
    before, after = np.array(pairs).T
    error = before.std(ddof=1) / math.sqrt(len(pairs))
    if before.mean() < 2 * error or before.mean() <= 0 or after.mean() < 0.9 * before.mean():
        return None
    return (
        f"Resets of scope {scope!r} change nothing at validation: it is worse than at the anchor by "
        f"{before.mean():.3g} before a reset and by {after.mean():.3g} after, over {len(pairs)} resets. What was "
        'memorised lies elsewhere: take a wider scope, such as "all".'
    )


def within_noise(improvements: Sequence[float], rows: int, *, standard_error: float | None = None) -> str | None:
    """A validation set too small for its improvements to be more than noise.

    Args:
        improvements: by how much each of the last new bests was better than the one before, positive.
        rows: of the validation set.
        standard_error: of such a difference, paired row by row. None for an accuracy: then the least it can be is
            taken, √(improvement/rows), as if no row had changed for the worse.
    """
    if len(improvements) < 3:
        return None
    typical = float(np.median(improvements))
    error = math.sqrt(typical / rows) if standard_error is None else standard_error
    if typical >= 2 * error:
        return None
    return (
        f"The last {len(improvements)} new bests were better by {typical:.2g} in the middle, with a paired standard "
        f"error of {'at least ' if standard_error is None else ''}{error:.2g} on {rows} validation rows: they may be "
        "noise, and so may the anchors. Take more validation rows (their labels may be noisy), or set `min_delta`."
    )


def blind_validation(
    noisy: Sequence[float],
    trusted: Sequence[float] | None = None,
    *,
    trusted_error: float = 0.0,
    memory: float | None = None,
    armed: bool = False,
) -> str | None:
    """Noise that validation cannot see, since it follows the same wrong labels.

    Args:
        noisy: the validation metric over time, larger better (a loss with its sign turned).
        trusted: the metric on trusted labels at the same times, where there are any.
        trusted_error: standard error of a difference of two of these.
        memory: share of mislabelled training rows answered with their wrong label now, where it is known.
        armed: whether resets have begun.
    """
    if len(noisy) < ENOUGH:
        return None
    at = int(np.argmax(noisy))
    if trusted is not None:
        lost = max(trusted) - trusted[at]
        if at <= int(np.argmax(trusted)) or lost <= 2 * trusted_error:
            return None
        sign = f"the validation that chooses anchors went on improving while trusted labels lost {lost:.3g}"
    else:
        if memory is None or memory < 0.5 or armed or at < len(noisy) - 2:
            return None
        sign = f"it still improves with {100 * memory:.0f} % of the wrong labels memorised"
    return (
        f"The validation set follows the wrong labels: {sign}. The noise is systematic, and resets cannot begin in "
        "time. Choose anchors by a metric on some trusted labels; a few hundred are enough."
    )
