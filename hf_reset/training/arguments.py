"""The fields of `ResetConfig`, and a robust loss, as training arguments for the command line and for YAML."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

from hf_reset.errors import ConfigError, refuse_below_one
from hf_reset.losses.by_name import LOSSES, named_loss
from hf_reset.losses.memory import REMEMBERING_LOSSES, named_remembering_loss
from hf_reset.policy import ResetConfig
from hf_reset.rows.refinement import MODES

_PREFIX = "reset_"


@dataclass
class ResetArguments:
    """The `reset_*` fields alone, to put in front of any other arguments class.

    `@dataclass class Arguments(ResetArguments, SFTConfig): pass` gives TRL's defaults and these fields;
    `ResetTrainingArguments` is the same with `TrainingArguments`. What each means stands at `ResetConfig`.
    """

    # With None among the types, HfArgumentParser hands on a string, which may be a number; None itself is refused.
    reset_probability: float | str | None = field(
        default=0.01,
        metadata={"help": "r, the chance that an optimizer step ends in a reset, in [0, 1]; auto: chosen in the run."},
    )
    reset_scope: str = field(
        default="all",
        metadata={
            "help": "What goes back: all, head, adapters, peft, last:K, a regular expression, or a JSON list of names."
        },
    )
    reset_policy: Literal["bernoulli", "periodic", "luby"] = field(
        default="bernoulli",
        metadata={"help": "Draw at each step, or reset every round(1/r) steps, or 1, 1, 2, 1, 1, 2, 4, … times that."},
    )
    reset_patience: int | None = field(
        default=None,
        metadata={
            "help": "Evaluations without a new best before resets begin; 0: from the first anchor on. Default: they "
            "begin on evidence, when validation has turned by two standard errors of its rows' paired difference."
        },
    )
    reset_metric: str | None = field(
        default=None,
        metadata={"help": "Evaluation result that chooses anchors. Default: metric_for_best_model, else eval_loss."},
    )
    reset_greater_is_better: bool | None = field(
        default=None, metadata={"help": "Direction of the metric. Default: by its name, as Trainer does."}
    )
    reset_min_delta: float = field(
        default=0.0, metadata={"help": "How much better than the best counts as a new best, in the metric's units."}
    )
    reset_smooth: bool = field(
        default=False,
        metadata={"help": "Judge weights by the mean of their evaluation and the one before it on the way there."},
    )
    reset_anchor: Literal["best", "fixed"] = field(
        default="best", metadata={"help": "Move the anchor to each new best, or fix it once resets have begun."}
    )
    reset_optimizer_state: Literal["restore", "zero", "keep"] = field(
        default="restore", metadata={"help": "What a reset does with the optimizer's state of the scope."}
    )
    reset_storage: Literal["device", "cpu"] = field(
        default="device", metadata={"help": "Where the anchor lies: beside the weights, or in (pinned) CPU memory."}
    )
    reset_finish: Literal["anchor", "last"] = field(
        default="anchor", metadata={"help": "Weights at the end of training: the anchor's, or the last step's."}
    )
    reset_max_resets: int | None = field(
        default=None, metadata={"help": "Resets after which no more happen. Default: no limit."}
    )
    reset_seed: int | None = field(default=None, metadata={"help": "Seed of the draws. Default: seed."})
    reset_advice: bool = field(
        default=True, metadata={"help": "Say in the log, once each, what goes wrong with resets, and the remedy."}
    )
    reset_ema_decay: float | str | None = field(
        default=None,
        metadata={
            "help": "Decay per optimizer step, in [0, 1), of a moving average of the weights that is evaluated, "
            "anchored, saved and finished with; 0: none; auto: by the length of the run, 0.98 from 800 steps on. "
            "Default: auto with reset_refine, else none."
        },
    )
    reset_loss: str | None = field(
        default=None,
        metadata={
            "help": "A loss to train with, by its name in hf_reset.losses (gce, sce, elr, …). Default: the model's."
        },
    )
    reset_loss_options: str | None = field(
        default=None, metadata={"help": 'Options of that loss as JSON, such as {"q": 0.7}.'}
    )

    reset_refine: Literal["off", "soft", "drop", "mix"] = field(
        default="off",
        metadata={
            "help": "What becomes of rows whose label the run believes wrong, once validation stalls and its "
            "memory of them seems better than the labels: trained towards what was predicted for them (soft), left out "
            "(drop), or a mixture (mix)."
        },
    )
    reset_evaluation: Literal["full", "paired"] = field(
        default="full",
        metadata={
            "help": "What a scheduled evaluation is: of all rows (full), or a race against the anchor's rows that ends "
            "once it is clearly lost (paired). Then weights that a reset has just put back are not evaluated again."
        },
    )
    reset_full_evaluation_every: int = field(
        default=20,
        metadata={"help": "Of so many evaluations in a row one at least is of all rows, under paired evaluation."},
    )
    reset_evaluation_at: Literal["schedule", "excursion"] = field(
        default="schedule",
        metadata={"help": "Once resets have begun: evaluate as eval_strategy says, or where excursions end."},
    )
    reset_row_memory: bool | None = field(
        default=None,
        metadata={
            "help": "Remember what was predicted for each training row, for suspects(). Default: for classifiers with "
            "one label a row."
        },
    )

    def __post_init__(self) -> None:
        # A plain dataclass in front of TrainingArguments: pass the call on where there is one to pass it to.
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()
        for name in ("reset_probability", "reset_ema_decay"):
            with contextlib.suppress(ValueError):  # what is no number is for ResetConfig to judge
                if isinstance(value := getattr(self, name), str):
                    setattr(self, name, float(value))
        self.reset_config()
        self._check_loss()
        if self.reset_refine not in MODES:
            raise ConfigError(f"`reset_refine` must be one of {', '.join(MODES)}, got {self.reset_refine!r}.")
        for name, known in (
            ("reset_evaluation", ("full", "paired")),
            ("reset_evaluation_at", ("schedule", "excursion")),
        ):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        refuse_below_one(reset_full_evaluation_every=self.reset_full_evaluation_every)

    def reset_config(self) -> ResetConfig:
        """The configuration that these fields describe.

        Raises:
            ConfigError: a field has a value it cannot have.
        """
        values: dict[str, Any] = {f.name: getattr(self, _PREFIX + f.name) for f in fields(ResetConfig)}
        if values["ema_decay"] is None and self.reset_refine != "off":
            # Refinement moves what a run learns, and few noisy rows choose among its weights: averaged ones scatter
            # less, and the choice costs less (recipes/studies/README.md, "The comparison").
            values["ema_decay"] = "auto"
        elif values["ema_decay"] == 0:
            values["ema_decay"] = None
        scope = values["scope"]
        if isinstance(scope, str) and scope.startswith("["):
            with contextlib.suppress(json.JSONDecodeError):  # a regular expression may begin with a bracket
                values["scope"] = json.loads(scope)
        return ResetConfig(**values)

    def loss_options(self) -> dict[str, Any]:
        """The options of `reset_loss`, once the loss has been seen to take them.

        Raises:
            ConfigError: the loss has no such option, or an option has a value it cannot have.
        """
        self._check_loss()
        options = self._loss_options()
        if self.reset_loss in REMEMBERING_LOSSES:
            named_remembering_loss(self.reset_loss, 1, 2, **options)
        elif self.reset_loss is not None:
            named_loss(self.reset_loss, **options)
        return options

    def _check_loss(self) -> None:
        self._loss_options()
        if self.reset_loss is not None and self.reset_loss not in (known := [*LOSSES, *REMEMBERING_LOSSES]):
            raise ConfigError(f"`reset_loss` must be one of {', '.join(known)}, got {self.reset_loss!r}.")

    def _loss_options(self) -> dict[str, Any]:
        options: Any = self.reset_loss_options or {}
        if isinstance(options, str):
            try:
                options = json.loads(options)
            except json.JSONDecodeError:
                options = None
        if not isinstance(options, dict):
            raise ConfigError(
                f'`reset_loss_options` must be a JSON object such as {{"q": 0.7}}, got {self.reset_loss_options!r}.'
            )
        if options and self.reset_loss is None:
            raise ConfigError(f"`reset_loss_options` {self.reset_loss_options!r} needs a `reset_loss` to apply to.")
        return options


@dataclass
class ResetTrainingArguments(ResetArguments, TrainingArguments):
    """`TrainingArguments` with the fields of `ResetConfig` as `reset_probability`, `reset_scope`, …"""
