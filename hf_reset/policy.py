"""When to reset, and what becomes of the anchor: pure decisions on plain values, without torch.

A run is described by a `ResetConfig` (what the user wants) and a `ResetState` (what has happened so far).
`observe` takes an evaluation in, `decide` says whether an optimizer step ends in a reset, and both are
functions of their arguments alone. The randomness is `uniform(seed, step)`, a keyed hash: nothing to save,
every rank draws the same number without talking, and any run can be audited afterwards.

Reference: Y. Bae, Y. Song, H. Jeong, "Stochastic resetting mitigates latent gradient bias of SGD from label
noise", Mach. Learn.: Sci. Technol. 6 (2025) 015062, arXiv 2406.00396. In its symbols, `probability` is r and
the anchor is the checkpoint θ_c.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_reset.config import ResetConfig, Scope, period_of
from hf_reset.planner.plan import Plan, luby, plan_after_evaluation, plan_after_reset

__all__ = [
    "FRUITLESS",
    "HARMED",
    "TURNED",
    "ResetConfig",
    "ResetState",
    "Scope",
    "decide",
    "finishes_with_anchor",
    "is_better",
    "observe",
    "period_of",
    "probability_now",
    "sequence_margin",
    "turned_at",
    "uniform",
]

# Resets that begin on evidence. Measured in `recipes/studies/never_locked_in.py`: they begin soon after validation
# turns, and hold no run back that still learns.
TURNED = 2.0  # standard errors of the paired difference: one-sided level 2.3 % an evaluation, see `turned_at`
HARMED = 1.0  # an excursion that ends less than this above its anchor was not seen to go wrong
FRUITLESS = 2  # such excursions, after which the next are twice as long
_SINCE_BEST = 2  # evaluations without a new best that it takes at least,
_SHARE_SINCE_BEST = 0.1  # and this share of all so far: a run's weights swing for a while, rows or no rows
_TESTS = 10  # evaluations that `TURNED` is meant for; each further one is another chance of a false alarm
_LAG, _FEWEST_VALUES = 3, 8  # of a metric without rows, before its own noise can be told


@dataclass(frozen=True)
class ResetState:
    """What has happened so far, in plain values. Steps are counted as `state.global_step`.

    Attributes:
        best: the best value of the metric so far, None before the first finite one.
        anchor_step: optimizer steps done when the anchor was taken, None before the first anchor.
        anchor_metric: the metric at the anchor.
        evaluations_since_best: evaluations since the last new best.
        armed_step: optimizer steps done when resets first began; None: they have not.
        armed_margin: `worse` at that evaluation; None where resets did not begin on evidence.
        resets: how many resets there have been.
        last_reset_step: index of the last step that ended in a reset.
        plan: what `probability="auto"` knows and has chosen; None with a probability of the user's.
        worse: the last evaluation's margin above the anchor, in standard errors; None where it is not known.
        learned: how far the anchor lies below what the labels' frequencies alone give, likewise.
        values: the metric at each evaluation, in order; it stands in for rows where an evaluation has none.
        harmed: whether the excursion now under way has been seen to go wrong, by `HARMED`.
        fruitless: excursions in a row from this anchor that were not.
        stretch: how often excursions from this anchor have been doubled, where resets begin on evidence.
        evaluated_step: optimizer steps done at the last evaluation.
        waiting: whether resets pause, since the anchor is new and no harm (`HARMED`) has been seen since.
        anchor_before: the metric at the evaluation before the anchor's, with `smooth`.
    """

    best: float | None = None
    anchor_step: int | None = None
    anchor_metric: float | None = None
    evaluations_since_best: int = 0
    armed_step: int | None = None
    resets: int = 0
    last_reset_step: int | None = None
    plan: Plan | None = None
    worse: float | None = None
    learned: float | None = None
    values: tuple[float, ...] = ()
    harmed: bool = False
    fruitless: int = 0
    stretch: int = 0
    armed_margin: float | None = None
    evaluated_step: int | None = None
    waiting: bool = False
    anchor_before: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))  # JSON makes a list of it

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> ResetState:
        """A state from what `asdict` and JSON made of it."""
        plan = values.get("plan")
        return cls(**{**values, "plan": None if plan is None else Plan.from_plain(plan)})

    @property
    def armed(self) -> bool:
        """Whether resets have begun."""
        return self.armed_step is not None

    def before(self, step: int) -> float | None:
        """The metric at the evaluation before one after `step` steps, on the way that led there.

        After a reset that way begins at the anchor; weights that a reset has just put back have come the anchor's own.
        None at the first evaluation.
        """
        if self.evaluated_step is None:
            return None
        if self.last_reset_step is None or self.last_reset_step < self.evaluated_step:
            return self.values[-1]
        return self.anchor_before if self.last_reset_step == step - 1 else self.anchor_metric

    def after_reset(self, step: int) -> ResetState:
        """The state once step `step` has ended in a reset.

        An excursion that was seen to go wrong was long enough; after `FRUITLESS` that were not, they double, so
        that resets cannot hold a run where it is while there is more to learn.
        """
        plan = None if self.plan is None else plan_after_reset(self.plan, step + 1)
        state = replace(self, resets=self.resets + 1, last_reset_step=step, plan=plan, harmed=False, worse=None)
        if self.harmed:
            return replace(state, fruitless=0, stretch=max(0, self.stretch - 1))
        if self.fruitless + 1 < FRUITLESS:
            return replace(state, fruitless=self.fruitless + 1)
        return replace(state, fruitless=0, stretch=self.stretch + 1)


def observe(
    config: ResetConfig,
    state: ResetState,
    metric: float,
    step: int,
    *,
    greater_is_better: bool,
    worse: float | None = None,
    learned: float | None = None,
    loss: float | None = None,
) -> tuple[ResetState, bool]:
    """Take in one evaluation.

    With `patience` a number, resets begin after so many evaluations without a new best. With None they begin
    when all of this holds:

    - two evaluations in a row brought no new best, nor did a tenth of all so far;
    - the mean of the rows' losses over the last two lies two standard errors of the *paired* difference above the
      anchor's (`worse` >= `turned_at`: a little more the more evaluations there have been);
    - the anchor itself lies `TURNED` below what the labels' frequencies alone give, where that is known: a run
      near chance is not held there.

    A run that finds a better anchor after that is learning: resets pause until an evaluation lies one standard error
    above it (`HARMED`), and take no progress away.

    Where an evaluation has no rows to compare, the sequence of its values stands in, see `sequence_margin`.

    Args:
        config: the configuration; `patience`, `min_delta`, `smooth`, `anchor`, and for "auto" `probability` and
            `policy`.
        state: what has happened so far.
        metric: the value of the metric; one that is not finite is never a best.
        step: optimizer steps done.
        greater_is_better: the metric's direction.
        worse: how far validation lies above the anchor's, in standard errors of the rows' paired difference
            (`hf_reset.training.evidence`); None where there are no rows.
        learned: how far the anchor lies below the labels' frequencies, likewise.
        loss: the calibrated loss of the validation labels in nats, for "auto"; None: not known.

    Returns:
        The new state, and whether the anchor moves to the weights just evaluated.
    """
    before = state.before(step) if config.smooth else None
    judged = metric if before is None else (metric + before) / 2
    state = replace(state, values=(*state.values, metric), evaluated_step=step)
    improved = is_better(judged, state.best, greater_is_better=greater_is_better, min_delta=config.min_delta)
    if config.probability == "auto":
        state = replace(state, plan=_planned(config, state, step, improved, loss))
    moved = improved and (config.anchor == "best" or not state.armed)
    if improved:
        state = replace(state, best=judged, evaluations_since_best=0, worse=None)
    else:
        state = _without_new_best(state, worse, greater_is_better)
    if moved:
        waiting = state.armed and config.patience is None
        state = replace(state, anchor_step=step, anchor_metric=metric, anchor_before=before)
        state = replace(state, harmed=False, fruitless=0, stretch=0, waiting=waiting)
    if not state.armed and state.anchor_step is not None and _begins(config, state, learned):
        state = replace(state, armed_step=step, armed_margin=state.worse if config.patience is None else None)
    return state, moved


def _without_new_best(state: ResetState, worse: float | None, greater_is_better: bool) -> ResetState:
    worse = sequence_margin(state.values, greater_is_better=greater_is_better) if worse is None else worse
    harmed = state.harmed or (worse is not None and worse >= HARMED)
    since, waiting = state.evaluations_since_best + 1, state.waiting and not harmed
    return replace(state, evaluations_since_best=since, worse=worse, harmed=harmed, waiting=waiting)


def _planned(config: ResetConfig, state: ResetState, step: int, improved: bool, loss: float | None) -> Plan:
    return plan_after_evaluation(
        state.plan or Plan(),
        step,
        improved=improved,
        first=improved and state.best is None,
        periodic=config.policy == "periodic",
        counted=state.armed,
        loss=loss,
    )


def _begins(config: ResetConfig, state: ResetState, learned: float | None) -> bool:
    if config.patience is not None:
        return state.evaluations_since_best >= config.patience
    evaluations = len(state.values)
    has_turned = state.worse is not None and state.worse >= turned_at(evaluations)
    has_paused = state.evaluations_since_best >= max(_SINCE_BEST, math.ceil(_SHARE_SINCE_BEST * evaluations))
    return has_turned and has_paused and (learned is None or learned >= TURNED)


def turned_at(evaluations: int) -> float:
    """Standard errors above the anchor at which validation has turned, √(`TURNED`² + 2 ln (n / 10)).

    Each evaluation is one more test. The normal tail falls as exp(−z²/2), so the chance of a false alarm at the n-th
    evaluation falls as 1/n, and that of a whole run grows with the logarithm of its evaluations: of runs that only
    fluctuate around the anchor, 18 in 100 are alarmed within ten evaluations and 40 within sixty, where two standard
    errors throughout would alarm 69.

    Args:
        evaluations: n, so far; `TURNED` up to ten.
    """
    return math.sqrt(TURNED**2 + 2 * math.log(max(1.0, evaluations / _TESTS)))


def sequence_margin(values: Sequence[float], *, greater_is_better: bool) -> float | None:
    """How far the last two values lie above (with `greater_is_better`, below) the best, in standard errors.

    For a metric that comes without rows. The noise σ of one value is taken from differences three evaluations
    apart, σ² = mean (v_i − v_{i−3})² / 2: successive ones are too alike, and a trend makes it larger, not smaller.
    A steep and steady rise would so pass for noise; it has no second differences, hence σ is at most twice what these
    give, mean (v_i − 2 v_{i−3} + v_{i−6})² / 6. From the margin comes off √(2 ln n) σ, what the best of n such values
    owes to having been picked, and one standard error more. Over 60 evaluations that only fluctuate it passes `TURNED`
    in 10 % of runs, in 19 % where neighbours correlate by one half.

    Args:
        values: the metric at each evaluation so far, in order; those that are not finite are passed over.
        greater_is_better: its direction.

    Returns:
        None for fewer than eight values, and where they do not differ.
    """
    known = [-value if greater_is_better else value for value in values if math.isfinite(value)]
    if len(known) < _FEWEST_VALUES:
        return None
    differences = [later - earlier for earlier, later in zip(known, known[_LAG:], strict=False)]
    bends = [later - earlier for earlier, later in zip(differences, differences[_LAG:], strict=False)]
    noise = min(_spread(differences) / math.sqrt(2), 2 * _spread(bends) / math.sqrt(6))
    if noise == 0:
        return None
    above = (known[-1] + known[-2]) / 2 - min(known)
    return (above / noise - math.sqrt(2 * math.log(len(known)))) / math.sqrt(1 / 2) - 1


def _spread(differences: Sequence[float]) -> float:
    return math.sqrt(sum(difference**2 for difference in differences) / len(differences))


def finishes_with_anchor(config: ResetConfig, state: ResetState) -> bool:
    """Whether training ends with the anchor's weights: as `finish` says, but for one case.

    Where resets were to begin on evidence and never did, validation rows may not be able to tell the anchor from the
    last weights: it lies less than one standard error below them (`HARMED`), or not `TURNED` below what the labels'
    frequencies alone give. It was then picked from fluctuations, and the last weights stay.
    """
    if config.finish != "anchor":
        return False
    if config.patience is not None or not config.can_reset or state.armed or state.learned is None:
        return True
    return state.learned >= TURNED and (state.worse is None or state.worse >= HARMED)


def is_better(metric: float, best: float | None, *, greater_is_better: bool, min_delta: float = 0.0) -> bool:
    """Whether `metric` is a new best: finite, and better than `best` by more than `min_delta`."""
    if not math.isfinite(metric):
        return False
    if best is None:
        return True
    return metric > best + min_delta if greater_is_better else metric < best - min_delta


def decide(config: ResetConfig, state: ResetState, step: int, *, seed: int) -> bool:
    """Whether optimizer step `step` (its index, `state.global_step` before it is counted) ends in a reset.

    Bernoulli: `uniform(seed, step) < probability`. Periodic: `round(1/probability)` steps after the last reset, or
    after resets began; Luby: that many times the next term of its sequence. Where resets begin
    on evidence (`patience` None), each doubling of the excursions (`stretch`) halves the probability and doubles
    the period; Luby's own are long now and then by themselves.
    """
    if not config.can_reset or state.armed_step is None or state.waiting:
        return False
    if config.max_resets is not None and state.resets >= config.max_resets:
        return False
    probability = probability_now(config, state)
    if config.policy == "bernoulli":
        return uniform(seed, step) < probability
    last = state.armed_step - 1 if state.last_reset_step is None else state.last_reset_step
    units = luby(state.resets + 1) if config.policy == "luby" else 1
    return probability > 0 and step - last >= units * period_of(probability)


def probability_now(config: ResetConfig, state: ResetState) -> float:
    """r of the next step: the user's, or the plan's ("auto"; 0 until an evaluation has told its interval).

    Halved for each doubling of the excursions, where resets begin on evidence.
    """
    if config.probability == "auto":
        probability = (state.plan.probability if state.plan else None) or 0.0
    else:
        probability = config.probability
    return probability / 2**state.stretch if config.patience is None and config.policy != "luby" else probability


def uniform(seed: int, step: int) -> float:
    """The draw that decides step `step`: uniform on [0, 1), 53 bits, a keyed hash of its two arguments.

    It reads and moves no generator, and does not depend on a library's version.
    """
    digest = hashlib.blake2b(f"reset:{seed}:{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53
