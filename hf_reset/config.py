"""What a user wants of resets: `ResetConfig` and its checks, on plain values, without torch."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

from hf_reset.errors import ConfigError

Scope: TypeAlias = str | Sequence[str]

_CHOICES = {
    "policy": ("bernoulli", "periodic", "luby"),
    "anchor": ("best", "fixed"),
    "optimizer_state": ("restore", "zero", "keep"),
    "storage": ("device", "cpu"),
    "finish": ("anchor", "last"),
}

_LOOKS_BACK, _SHARE_LOOKED_BACK = 50, 1 / 16  # steps of an `ema_decay` "auto" at most, and of the whole run


@dataclass(frozen=True)
class ResetConfig:
    """What to reset, when, and to what. Frozen, JSON-plain, validated when made.

    Args:
        probability: r of the paper, the chance that an optimizer step ends in a reset, in [0, 1]. The mean
            excursion is 1/r steps, and a run of S steps after resets have begun expects r·S resets. The
            paper's r is per mini-batch iteration, which is an optimizer step here. "auto" chooses it anew at
            each evaluation, from how long this run's excursions take to a new best: between 1/32 and 1 resets an
            evaluation interval, 1/2 until that is known. See `hf_reset.planner`.
        scope: which trainable parameters go back: "all", "head", "adapters", "peft" (all that PEFT trains, which
            is the one to take where a head is trained beside adapters), "last:K" (the last K transformer blocks
            and the head), a regular expression (`re.search` on parameter names), or a
            list of names and suffixes. See `hf_reset.select_parameters`.
        policy: "bernoulli" draws at each step with `probability`; "periodic" resets every round(1/r) steps,
            the sharp restart of first-passage theory; "luby" makes excursions of 1, 1, 2, 1, 1, 2, 4, … times
            round(1/r) steps, for when nothing is known about the best.
        patience: evaluations without a new best before resets begin; they then stay on. 0: from the first
            anchor on. None, the default: they begin on evidence that validation has turned (`observe` says what
            counts as such), and an anchor that excursions keep equalling is left alone for longer.
        metric: the evaluation result that chooses anchors, with or without its "eval_" prefix. None:
            `args.metric_for_best_model`, else "eval_loss". Noisy validation is enough.
        greater_is_better: direction of `metric`. None: `args.greater_is_better` where `metric` is the
            Trainer's own, else by its name; an error asks where that does not tell.
        min_delta: how much better than the best a metric must be to count as a new best, in its units.
        smooth: judge weights by the mean of their evaluation and the one before it on the way there (after a reset, the
            anchor's), so that one lucky evaluation on a few noisy rows chooses less often. For evaluations that lie
            close together: where validation turns within two of them, weights past the best are chosen. Not under
            paired evaluation.
        anchor: "best" moves θ_c to each new best (the paper's adaptive checkpoint); "fixed" leaves it where
            it is once resets have begun.
        optimizer_state: what a reset does with the optimizer's state of the scope: "restore" what it was at
            the anchor, "zero" it as if fresh, or "keep" it. The learning-rate schedule always goes on.
        storage: where the anchor lies: "device", beside the weights, or "cpu" (pinned where there is CUDA).
        finish: weights at the end of training: "anchor", or "last" for those of the last step. Under `patience`
            None the last ones stay where validation cannot tell them apart, see `finishes_with_anchor`. Where
            `load_best_model_at_end` loads a checkpoint, that one stands. "anchor" is all that was evaluated then:
            under a partial scope the other trainable weights are kept too, for their bytes, without optimizer state.
        max_resets: resets after which no more happen; None: no limit. 0 keeps the best weights in memory,
            without a single reset.
        seed: of the draws; None: `args.seed`.
        ema_decay: d in [0, 1) of an exponential moving average of the scope, θ̄ ← d·θ̄ + (1 − d)·θ after each
            optimizer step; it looks back about 1/(1 − d) steps. The average is then what is evaluated, anchored,
            saved and finished with, and a reset sets both it and the live weights to the anchor. None: no average.
            With `probability=0` it is averaging alone. "auto" looks back over a sixteenth of the run, and over 50
            steps at most: 0.98 from 800 steps on. Needs `ResetTrainer`.

    With `probability=0` (or `max_resets=0`), no average, and `finish="last"` or no evaluations, the run is the plain
    Trainer's, bit for bit, and no anchor is stored.

    Raises:
        ConfigError: a field has a value it cannot have; the message names it, the value, and the remedy.
    """

    probability: float | Literal["auto"] = 0.01
    scope: Scope = "all"
    policy: Literal["bernoulli", "periodic", "luby"] = "bernoulli"
    patience: int | None = None
    metric: str | None = None
    greater_is_better: bool | None = None
    min_delta: float = 0.0
    smooth: bool = False
    anchor: Literal["best", "fixed"] = "best"
    optimizer_state: Literal["restore", "zero", "keep"] = "restore"
    storage: Literal["device", "cpu"] = "device"
    finish: Literal["anchor", "last"] = "anchor"
    max_resets: int | None = None
    seed: int | None = None
    ema_decay: float | Literal["auto"] | None = None

    def __post_init__(self) -> None:
        for f in fields(self):  # numbers of numpy are numbers, and JSON-plain ones from here on
            object.__setattr__(self, f.name, _plain_number(getattr(self, f.name)))
        if self.probability != "auto" and not (_is_real(self.probability) and 0 <= self.probability <= 1):
            raise ConfigError(
                f"`probability` must be in [0, 1], got {self.probability!r}. It is per optimizer step: "
                '0.01 resets every 100 steps on average. "auto" chooses it during the run.'
            )
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
        if self.policy == "luby" and self.probability == "auto":
            raise ConfigError(
                '`policy` "luby" needs no estimate, so `probability` "auto" would have no effect. Give a probability '
                "p: round(1/p) steps are the shortest excursion."
            )
        for name in ("patience", "max_resets", "seed"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or (value < 0 and name != "seed"):
                wanted = "an integer" if name == "seed" else "an integer of at least 0"
                raise ConfigError(f"`{name}` must be {wanted}, got {value!r}.")
        if not _is_real(self.min_delta) or self.min_delta < 0 or math.isinf(self.min_delta):
            raise ConfigError(
                f"`min_delta` must be a finite number of at least 0, got {self.min_delta!r}. "
                "It is a distance in the metric's units, whatever the direction."
            )
        if self.ema_decay not in (None, "auto") and not (_is_real(self.ema_decay) and 0 <= self.ema_decay < 1):
            raise ConfigError(
                f"`ema_decay` must be in [0, 1) or None, got {self.ema_decay!r}. It is per optimizer step: 0.98 looks "
                'back about 50 steps. "auto" goes by the length of the run.'
            )
        if self.metric is not None and (not isinstance(self.metric, str) or not self.metric):
            raise ConfigError(f"`metric` must be the name of an evaluation result or None, got {self.metric!r}.")
        if self.greater_is_better is not None and not isinstance(self.greater_is_better, bool):
            raise ConfigError(f"`greater_is_better` must be True, False or None, got {self.greater_is_better!r}.")
        if not isinstance(self.smooth, bool):
            raise ConfigError(f"`smooth` must be True or False, got {self.smooth!r}.")
        object.__setattr__(self, "scope", _checked_scope(self.scope))

    def decay_in(self, steps: int) -> float:
        """`ema_decay` in a run of so many optimizer steps; 0, the weights as they are, for None."""
        if self.ema_decay == "auto":
            return 1 - 1 / max(1.0, min(_LOOKS_BACK, _SHARE_LOOKED_BACK * steps))
        return self.ema_decay or 0.0

    @property
    def can_reset(self) -> bool:
        """Whether any step can end in a reset."""
        return (self.probability == "auto" or self.probability > 0) and self.max_resets != 0

    @property
    def needs_anchor(self) -> bool:
        """Whether an anchor is ever read, by a reset or at the end of training."""
        return self.can_reset or self.finish == "anchor"

    @property
    def period(self) -> int:
        """Steps between two resets of the periodic policy, and the unit of the Luby one: round(1/r)."""
        if self.probability == "auto":
            raise ConfigError('`period` is not known for `probability` "auto": it is chosen during the run.')
        return period_of(self.probability)


def configured(config: ResetConfig | None, given: Mapping[str, Any]) -> ResetConfig:
    """The configuration, given whole or by its fields.

    Raises:
        ConfigError: both were given, or a field is unknown or has a value it cannot have.
    """
    names = [f.name for f in fields(ResetConfig)]
    unknown = sorted(given.keys() - set(names))
    if unknown:
        close = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"Did you mean `{close[0]}`?" if close else f"The fields are {', '.join(names)}."
        raise ConfigError(f"`{unknown[0]}` is not a field of ResetConfig. {hint}")
    if config is None:
        return ResetConfig(**given)
    if not isinstance(config, ResetConfig):
        raise ConfigError(f"`config` must be a ResetConfig, got {config!r}. Its fields can also be given as keywords.")
    if given:
        raise ConfigError(
            f"`config` and the field `{next(iter(given))}` were both given. Put the field into the ResetConfig."
        )
    return config


def period_of(probability: float) -> int:
    """Whole steps nearest to the mean excursion 1/r, at least 1; r > 0."""
    return max(1, round(1 / probability))


def _plain_number(value: Any) -> Any:
    is_numpys = type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_numpys else value


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _checked_scope(scope: object) -> str | list[str]:
    """The scope as a string or a list of strings, once its form is right; names are checked on the model."""
    if isinstance(scope, str) and scope:
        if scope.startswith("last:"):
            if not re.fullmatch(r"last:[1-9]\d*", scope):
                raise ConfigError(f'`scope` "last:K" needs a whole K of at least 1, got {scope!r}.')
        elif scope not in ("all", "head", "adapters", "peft"):
            try:
                re.compile(scope)
            except re.error as error:
                raise ConfigError(
                    f'`scope` {scope!r} is not a valid regular expression: {error}. A scope is "all", '
                    '"head", "adapters", "peft", "last:K", a regular expression, or a list of names.'
                ) from None
        return scope
    if isinstance(scope, Sequence) and not isinstance(scope, str) and scope:
        if all(isinstance(item, str) and item for item in scope):
            return list(scope)
    raise ConfigError(
        f'`scope` must be "all", "head", "adapters", "peft", "last:K", a regular expression, or a non-empty list of '
        f"parameter names or suffixes, got {scope!r}."
    )
