"""The callback: takes evaluations in, and puts the anchor back. Works in Trainer and in any subclass of it."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import numbers
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_reset.anchor.file import read_metadata, write_copy
from hf_reset.anchor.ranks import from_first, gathered, together, world_size
from hf_reset.anchor.shards import refuse_lost_state
from hf_reset.anchor.store import AnchorStore
from hf_reset.errors import AnchorFileError, ConfigError, MetricError, NoEffectWarning
from hf_reset.policy import ResetConfig, ResetState, decide, observe, probability_now
from hf_reset.training.resume import anchor_file, refuse_other_world_size, reset_records

logger = logging.getLogger(__name__)


class StochasticResetCallback(TrainerCallback):
    """Stochastic resetting for `Trainer`, `SFTTrainer`, and any subclass (Bae, Song, Jeong 2025).

    At each evaluation the best weights so far become the anchor (θ_c). At the end of each optimizer step,
    with probability r, they are put back in place of the update. Everything that is decided is a function of
    the seed, the step and the evaluations, so that ranks agree without talking and a resumed run repeats it.

    The audit trail is in `events`, and in the Trainer's log history: one record a reset, an anchor move, or a choice
    of `probability="auto"`, with

        kind: "reset", "anchor" or "plan".
        step: `state.global_step` as the hook saw it: the index of the step for a reset, the number of steps
            done for an anchor.
        metric: the metric of the anchor gone back to, or moved to.
        distance: Euclidean distance that the live weights (a reset) or the anchor (a move) went; None for
            the first anchor. Where weights are sharded, over this rank's share.
        anchor_step: optimizer steps done when that anchor was taken.
        probability: in a plan, r from here on; with the `excursions` and `improvements` behind it, older ones
            counting less.

    A run resumed from a checkpoint in `output_dir` goes on exactly. With `ResetTrainer`, from anywhere.

    Args:
        config: what to reset, when, and to what; None takes `ResetConfig`'s fields as keywords.
        resume_from_checkpoint: the checkpoint directory given to `train()`, where it does not lie in
            `output_dir`: a plain callback is not told. Not needed with `ResetTrainer`.
        **fields: fields of `ResetConfig`.

    Raises:
        ConfigError: a field is unknown or has a value it cannot have.

    Example:
        >>> trainer.add_callback(StochasticResetCallback(probability=0.02, scope="all"))
    """

    def __init__(
        self, config: ResetConfig | None = None, *, resume_from_checkpoint: str | None = None, **fields: Any
    ) -> None:
        self.config = _configured(config, fields)
        self.resume_from_checkpoint = resume_from_checkpoint
        self.events: list[dict[str, Any]] = []
        self.store: AnchorStore | None = None
        self.reset_state = ResetState()
        self._is_training = False

    # What the Trainer calls.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the set-up, make room for the anchor, and take up where a checkpoint left off."""
        self._refuse_second_callback(state)
        self._metric_key = metric_key(self.config, args)
        self._greater_is_better = greater_is_better(self.config, args)
        self._seed = args.seed if self.config.seed is None else self.config.seed
        self._unseen: set[str] = set()  # results of evaluations since the last step, none with the metric
        self._seen = False
        self._observed_step = -1
        self._saved_step = -1
        self.events = []
        self.reset_state = ResetState()
        self.store = None
        with together():
            if self.config.needs_anchor:
                self._refuse_no_evaluation(args)
                self.store = AnchorStore(
                    kwargs["model"],
                    kwargs["optimizer"],
                    scope=self.config.scope,
                    optimizer_state=self.config.optimizer_state,
                    storage=self.config.storage,
                )
            if state.global_step > 0:
                refuse_lost_state(kwargs["model"], kwargs["optimizer"])
        if state.global_step > 0:
            # An evaluation before the first step (`eval_on_start`) would not have been there without the stop.
            self._observed_step = state.global_step
            self._resume(args, state)
        self._is_training = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take one evaluation in; the weights just evaluated become the anchor if they are a new best."""
        if not self._is_training or metrics is None:
            return
        self._agree_on_metric(args, metrics)
        if self._metric_key not in metrics:
            self._note_absence(metrics)
            return
        self._seen = True
        if state.global_step == self._observed_step:
            return
        self._observed_step = state.global_step
        value = _number(self._metric_key, metrics[self._metric_key])
        self.reset_state, moved = observe(
            self.config, self.reset_state, value, state.global_step, greater_is_better=self._greater_is_better
        )
        if moved:
            self._move_anchor(state)
        self._record_plan(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say it if the evaluations before this step all lacked the metric."""
        self._refuse_unseen_metric()
        self._unseen, self._seen = set(), False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the anchor back, if this is a step that ends in a reset."""
        if self.resets_at(state.global_step):
            assert self.store is not None  # resets need an anchor, see ResetConfig.needs_anchor
            distance = self.store.distance()
            self.store.restore()
            self.reset_state = self.reset_state.after_reset(state.global_step)
            self._record(state, "reset", distance)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the anchor into the checkpoint, unless `ResetTrainer` has done so already."""
        if args.save_only_model or self._saved_step == state.global_step:
            return
        directory = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if not all(gathered(directory.is_dir() or not self._writes(args))):
            logger.warning(
                "The anchor was not saved: there is no %s. A hyperparameter search writes elsewhere; use ResetTrainer "
                "there to be able to resume.",
                directory,
            )
            return
        self.save_anchor(directory, args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the anchor's weights in the model, unless Trainer has loaded its best checkpoint."""
        self._refuse_unseen_metric()
        self._is_training = False
        if self.store is not None and not self.store.is_set:
            warnings.warn(
                f"No evaluation gave a finite {self._metric_key!r}, so there was no anchor and nothing was reset. "
                "Evaluate more often (`eval_steps`), or look at why the metric is not finite.",
                NoEffectWarning,
                stacklevel=2,
            )
        if self.config.finish != "anchor" or self.store is None or not self.store.is_set:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            logger.info("`load_best_model_at_end` loaded %s; the anchor is left aside.", state.best_model_checkpoint)
            return
        self.store.restore()

    # What ResetTrainer and the curious call.

    def resets_at(self, step: int) -> bool:
        """Whether optimizer step `step` (`state.global_step` inside the step) ends in a reset, as things stand."""
        if not self._is_training or self.store is None or not self.store.is_set:
            return False
        return decide(self.config, self.reset_state, step, seed=self._seed)

    def report(self, step: int) -> dict[str, float]:
        """What to log after `step` steps: how many resets, and where the anchor is."""
        resets = [event for event in self.events if event["kind"] == "reset"]
        report: dict[str, float] = {"reset/count": self.reset_state.resets}
        if self.reset_state.plan is not None:
            report["reset/probability"] = probability_now(self.config, self.reset_state)
        if self.reset_state.anchor_step is not None and self.reset_state.anchor_metric is not None:
            report["reset/anchor_step"] = self.reset_state.anchor_step
            report["reset/anchor_metric"] = self.reset_state.anchor_metric
        if resets:
            report["reset/distance"] = resets[-1]["distance"]
            report["reset/steps_since"] = step - 1 - resets[-1]["step"]
        return report

    def save_anchor(self, directory: str | Path, args: TrainingArguments, state: TrainerState) -> None:
        """Write the anchor and what has happened so far into a checkpoint directory, whole or not at all."""
        self._saved_step = state.global_step
        if not self.events:
            return
        if self.store is not None and self.store.layout == "rows":  # a collective, whose errors are common already
            self._write_anchor(directory, args)
            return
        with together():
            if self._writes(args):
                self._write_anchor(directory, args)

    # Steps of the above.

    def _writes(self, args: TrainingArguments) -> bool:
        """Whether this rank writes an anchor file, or its part of one."""
        return args.should_save or (self.store is not None and self.store.layout != "whole")

    def _write_anchor(self, directory: str | Path, args: TrainingArguments) -> None:
        metadata = {
            "state": asdict(self.reset_state),
            "trail": _trail_digest(self.events),
            "seed": self._seed,
            "world_size": args.world_size,
            "config": asdict(self.config),
        }
        file = self._file_in(directory, args)
        if self.store is not None:
            self.store.save(file, metadata)
        else:  # nothing is kept, but the audit trail goes on after a resume
            write_copy(file, {}, {"metadata": json.dumps(metadata)})

    def _agree_on_metric(self, args: TrainingArguments, metrics: dict[str, Any]) -> None:
        """Everyone decides by rank 0's value, and writes it where Trainer looks for its own best.

        Results are equal on all ranks unless `compute_metrics` makes them differ; anchors that moved apart would
        never be noticed.
        """
        if world_size() == 1:
            return
        own: Any = metrics.get(self._metric_key)
        number = float(own) if isinstance(own, numbers.Real) or getattr(own, "ndim", None) == 0 else None
        agreed = from_first(number, args.device)
        if agreed == number or (
            agreed is not None and number is not None and math.isnan(agreed) and math.isnan(number)
        ):
            return
        logger.warning(
            "`metric` %r differs between ranks: rank 0 has %s, rank %s has %s. Rank 0's value decides on all of them; "
            "have `compute_metrics` return the same on every rank.",
            self._metric_key,
            agreed,
            args.process_index,
            own,
        )
        if agreed is None:
            metrics.pop(self._metric_key, None)
        else:
            metrics[self._metric_key] = agreed

    def _move_anchor(self, state: TrainerState) -> None:
        distance = None
        if self.store is not None:
            distance = self.store.distance() if self.store.is_set else None
            self.store.snapshot()
        self._record(state, "anchor", distance)

    def _record_plan(self, state: TrainerState) -> None:
        """A choice of `probability="auto"`, where it is another than the last."""
        plan, probability = self.reset_state.plan, probability_now(self.config, self.reset_state)
        known = next((event["probability"] for event in reversed(self.events) if event["kind"] == "plan"), 0.0)
        if plan is None or probability == known or self.reset_state.anchor_step is None:
            return
        excursions, improvements = plan.counts.excursions, sum(plan.counts.hits)
        self._record(state, "plan", None)
        for record in (self.events[-1], state.log_history[-1]):
            record.update(probability=probability, excursions=excursions, improvements=improvements)

    def _record(self, state: TrainerState, kind: str, distance: float | None) -> None:
        record = {
            "kind": kind,
            "step": state.global_step,
            "epoch": state.epoch,
            "metric": self.reset_state.anchor_metric,
            "distance": distance,
            "anchor_step": self.reset_state.anchor_step,
        }
        self.events.append(record)
        state.log_history.append(dict(record))

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        trail = reset_records(state.log_history)
        directory, self.resume_from_checkpoint = self.resume_from_checkpoint, None
        directory = directory or Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        self.events = trail
        if not trail:
            return  # no anchor yet, or a run that began without this callback
        file = self._file_in(directory, args)
        with together():
            refuse_other_world_size(directory, args.world_size)
            self._refuse_no_file(file)
        if self.store is not None and self.store.layout == "rows":
            metadata = self.store.load(file)  # a collective, whose errors are common already
        else:
            with together():
                metadata = read_metadata(file) if self.store is None else self.store.load(file)
        with together():
            self._take_up(file, metadata, args)  # pyright: ignore[reportPossiblyUnboundVariable]

    def _refuse_no_file(self, file: Path) -> None:
        if not file.exists():
            raise AnchorFileError(
                f"The run being resumed had an anchor, and there is no {str(file)!r}. If the checkpoint lies "
                "elsewhere, name it: `StochasticResetCallback(..., resume_from_checkpoint=...)`, or use "
                "`ResetTrainer`, which knows. If the run was killed between the checkpoint and its anchor, resume "
                "from the one before: `hf_reset.last_whole_checkpoint(output_dir)`."
            )

    def _take_up(self, file: Path, metadata: dict[str, Any], args: TrainingArguments) -> None:
        if metadata.get("trail") != _trail_digest(self.events):
            raise AnchorFileError(
                f"The anchor file {str(file)!r} belongs to another run than the checkpoint being resumed: their "
                "records of resets differ. If the checkpoint lies elsewhere, name it: "
                "`StochasticResetCallback(..., resume_from_checkpoint=...)`, or use `ResetTrainer`, which knows."
            )
        if metadata["seed"] != self._seed:
            logger.warning(
                "Resuming with reset seed %s; the checkpoint was written with %s. Set `seed` to that to repeat it.",
                self._seed,
                metadata["seed"],
            )
        before = metadata["world_size"]
        if before != args.world_size and self._metric_key.endswith("loss"):
            logger.warning(
                "Resuming with %s processes a run of %s. Where a model's loss ignores `num_items_in_batch`, Trainer "
                "scales it by their number, so that %r and its best value may not be comparable. Choose another "
                "`metric`, such as an accuracy, or start from the weights alone.",
                args.world_size,
                before,
                self._metric_key,
            )
        self.reset_state = ResetState.from_plain(metadata["state"])

    def _file_in(self, directory: str | Path, args: TrainingArguments) -> Path:
        return anchor_file(
            directory,
            "whole" if self.store is None else self.store.layout,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def _note_absence(self, metrics: dict[str, Any]) -> None:
        """One data set's results lack the metric: an error, unless another of a dict of them may have it."""
        present = {name for name, value in metrics.items() if isinstance(value, (int, float)) and name != "epoch"}
        self._unseen |= present
        if "eval_runtime" in metrics:  # the results of the one and only evaluation set
            self._refuse_unseen_metric()

    def _refuse_unseen_metric(self) -> None:
        if self._seen or not self._is_training or not self._unseen:
            return
        raise MetricError(
            f"`metric` {self._metric_key!r} is not among the evaluation's results, which are "
            f"{', '.join(sorted(self._unseen))}. Set `metric` to one of them, or have `compute_metrics` return it."
        )

    def _refuse_no_evaluation(self, args: TrainingArguments) -> None:
        if args.eval_strategy == "no":
            raise MetricError(
                f'`eval_strategy` is "no", so no evaluation can choose an anchor by {self._metric_key!r}. Set '
                '`eval_strategy="steps"` with `eval_steps`, and pass an `eval_dataset` (its labels may be noisy).'
            )

    def _refuse_second_callback(self, state: TrainerState) -> None:
        other = getattr(state, "_stochastic_reset_callback", self)
        if other is not self:
            raise ConfigError(
                "Two reset callbacks are in one Trainer, and would undo each other's anchors. Pass one: either "
                "`callbacks=[StochasticResetCallback(...)]`, or the `reset_*` fields of ResetTrainingArguments."
            )
        state._stochastic_reset_callback = self  # pyright: ignore[reportAttributeAccessIssue]


def metric_key(config: ResetConfig, args: TrainingArguments) -> str:
    """The evaluation result that chooses anchors, with its "eval_" prefix."""
    name = config.metric or args.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def greater_is_better(config: ResetConfig, args: TrainingArguments) -> bool:
    """The metric's direction: as configured, else the Trainer's where it is its metric, else by name."""
    if config.greater_is_better is not None:
        return config.greater_is_better
    key = metric_key(config, args)
    if args.greater_is_better is not None and key == metric_key(ResetConfig(), args):
        return args.greater_is_better
    return not key.endswith("loss")


def _configured(config: ResetConfig | None, given: dict[str, Any]) -> ResetConfig:
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


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise MetricError(
            f"`metric` {name!r} must be a number, and the evaluation gave {value!r}. Return a float from "
            "`compute_metrics`."
        ) from None


def _trail_digest(events: list[dict[str, Any]]) -> str:
    """A fingerprint of a run's audit trail, equal on all ranks (distances of shards are not)."""
    trail = json.dumps([[event["kind"], event["step"], event["metric"]] for event in events])
    return hashlib.blake2b(trail.encode(), digest_size=16).hexdigest()
