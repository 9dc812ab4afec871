"""The callback: takes evaluations in, and puts the anchor back. Works in Trainer and in any subclass of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_reset.anchor.ranks import together
from hf_reset.anchor.shards import refuse_lost_state
from hf_reset.anchor.store import AnchorStore
from hf_reset.config import ResetConfig, configured
from hf_reset.errors import ConfigError, NoEffectWarning, UnsupportedError
from hf_reset.planner.excursions import Event
from hf_reset.policy import ResetState, decide, finishes_with_anchor, observe, probability_now
from hf_reset.training import narration, resume
from hf_reset.training.ema import Average
from hf_reset.training.evidence import LossRows, Margins, RowSource
from hf_reset.training.hooks import HookKeywords, introduce_resets, resets_of
from hf_reset.training.parameters import TrainedParameters
from hf_reset.training.run import Run, pass_over_once
from hf_reset.training.scheduled import is_scheduled

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Among Trainer's own, so that `transformers.logging.set_verbosity` and `log_level` are for it as well.
logger = logging.get_logger("transformers.hf_reset")


class StochasticResetCallback(TrainerCallback):
    """Stochastic resetting for `Trainer`, `SFTTrainer`, and any subclass (Bae, Song, Jeong 2025).

    At each evaluation the best weights so far become the anchor (θ_c). At the end of each optimizer step,
    with probability r, they are put back in place of the update. Everything that is decided is a function of
    the seed, the step and the evaluations, so that ranks agree without talking and a resumed run repeats it.

    The audit trail is in `events`, and in checkpoints with the Trainer's state: one record a reset, an anchor move, or
    a choice of `probability="auto"`, with

        kind: "reset", "anchor" or "plan".
        step: `state.global_step` as the hook saw it: the index of the step for a reset, the number of steps
            done for an anchor.
        metric: the metric of the anchor gone back to, or moved to.
        distance: Euclidean distance that the live weights (a reset) or the anchor (a move) went; None for
            the first anchor. Where weights are sharded, over this rank's share.
        anchor_step: optimizer steps done when that anchor was taken.
        margin: of an anchor move whose rows are known, how much better they are than the anchor's before, in standard
            errors of the paired difference, below 0 (with `smooth`, mostly).
        judged: of an anchor move with `smooth`, the mean by which it was better.
        probability: in a plan, the r chosen; with the `excursions` and `improvements` behind it, older ones
            counting less.

    Only evaluations that the Trainer runs by its schedule, on its own `eval_dataset`, choose an anchor. One line when
    resets begin and one at the end say what came of them, through the logger of `transformers`.

    A run resumed from a checkpoint in `output_dir` goes on exactly. With `ResetTrainer`, from anywhere.

    Args:
        config: what to reset, when, and to what; None takes `ResetConfig`'s fields as keywords.
        resume_from_checkpoint: the checkpoint directory given to `train()`, where it does not lie in
            `output_dir`: a plain callback is not told. Not needed with `ResetTrainer`.
        rows: where evaluations leave the losses of their rows for resets to begin on evidence: the
            `with_calibrated_loss(...)` that the Trainer has as `compute_metrics`. `ResetTrainer` sees to it by
            itself; without rows, the sequence of the metric's values stands in.
        **fields: fields of `ResetConfig`.

    Raises:
        ConfigError: a field is unknown or has a value it cannot have.

    Example:
        >>> trainer.add_callback(StochasticResetCallback(probability=0.02, scope="all"))
    """

    def __init__(
        self,
        config: ResetConfig | None = None,
        *,
        resume_from_checkpoint: str | Path | None = None,
        rows: RowSource | None = None,
        **fields: object,
    ) -> None:
        self.config = configured(config, fields)
        if resume_from_checkpoint is not None and not isinstance(resume_from_checkpoint, (str, Path)):
            raise ConfigError(f"`resume_from_checkpoint` must be a directory or None, got {resume_from_checkpoint!r}.")
        self.rows = rows
        self.listener: Callable[[dict[str, float]], None] | None = None  # ResetTrainer's, for its reporters
        self.resume_from_checkpoint = resume_from_checkpoint
        self.default_metric = "loss"  # ResetTrainer knows of several evaluation sets, see `default_metric`
        self.events: list[Event] = []
        self.store: AnchorStore | None = None
        self.average: Average | None = None  # in training, under `ema_decay`
        self.can_average = False  # whether the Trainer swaps it in where it evaluates and saves: ResetTrainer does
        self.reset_state = ResetState()
        self.run: Run | None = None  # the call of `train()`, also when it has ended

    # What the Trainer calls.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """Check the set-up, make room for the anchor, and take up where a checkpoint left off."""
        self._refuse_second_callback(state)
        run = Run(self.config, args, self.default_metric)
        if (opening := narration.opening(self.config, run.watch, run.chooses)) is not None:
            self._say(state, opening)
        self.events, self.reset_state, self.store, self.average = [], ResetState(), None, None
        with together():
            if run.chooses:
                run.watch.refuse_no_evaluation(args)
                self.store = self._new_store(kwargs)
                run.trained = TrainedParameters(kwargs["model"])
            if self.config.ema_decay is not None:
                self.average = self._new_average(self.config.decay_in(state.max_steps), kwargs)
            if state.global_step > 0:
                refuse_lost_state(kwargs["model"], kwargs["optimizer"])
        if state.global_step > 0:
            # An evaluation before the first step (`eval_on_start`) would not have been there without the stop.
            run.observed_step = state.global_step
            directory, self.resume_from_checkpoint = self.resume_from_checkpoint, None
            progress = resume.take_up(directory, self.store, self._progress(run, args), args, state)
            self.reset_state, self.events, run.evidence = progress.state, progress.events, progress.evidence
            resume.take_up_average(directory, self.average, args, state)
        self.run = run

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Unpack[HookKeywords],
    ) -> None:
        """Take one evaluation in, if it is one by which weights may be chosen."""
        run = self.run
        rows = None if self.rows is None else self.rows.take_rows()  # also from an evaluation of the user's
        if run is None or run.ended or metrics is None:
            return
        if not is_scheduled():
            # It has ended the Trainer's own evaluation that is due after this event; that one still takes place.
            control.should_evaluate = control.should_evaluate or run.is_due
            return
        value = run.value_in(metrics, args)
        if value is None or state.global_step == run.observed_step:
            return
        run.observed_step = state.global_step
        if self.is_at_anchor(state.global_step):
            pass_over_once(kwargs.get("lr_scheduler"))
        was_armed = self.reset_state.armed
        moved, margin = self._observe(value, rows, run, state.global_step)
        if moved:
            self._move_anchor(run, state, kwargs, margin)
        self._record_plan(state)
        if self.config.can_reset and self.reset_state.armed and not was_armed:
            self._say(state, narration.beginning(self.config, self.reset_state, run.watch))
            self._tell({"reset/armed": 1.0})

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """Remember whether the Trainer's own evaluation is due, while somebody evaluates."""
        if self.run is not None:
            self.run.is_due = control.should_evaluate and self.run.chooses

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Say it if the evaluations before this step all lacked the metric."""
        if self.run is not None:
            self.run.refuse_unseen_metric()
            self.run.begin_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Put the anchor back, if this is a step that ends in a reset, and take the weights into the average."""
        if self.resets_at(state.global_step):
            assert self.store is not None  # resets need an anchor, see ResetConfig.needs_anchor
            distance = self.store.distance()
            self.store.restore()
            self.reset_state = self.reset_state.after_reset(state.global_step)
            self.record(state, "reset", distance)
            if self.run is not None:
                self.run.evidence = self.run.evidence.left()
            if self.average is not None:
                self.average.follow()
        elif self.average is not None:
            self.average.update()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Write the anchor into the checkpoint, unless `ResetTrainer` has done so already."""
        if args.save_only_model or self.run is None or self.run.saved_step == state.global_step:
            return
        if (directory := resume.saved_into(args, state, self.store)) is not None:
            self.save_anchor(directory, args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Leave the anchor's weights in the model, unless Trainer has loaded its best checkpoint, and sum up."""
        run = self.run
        if run is None:
            return
        run.refuse_unseen_metric()
        run.ended = True
        if self.store is not None and not self.store.is_set:
            warnings.warn(
                f"No evaluation gave a finite {run.watch.key!r}, so there was no anchor and nothing was reset. "
                "Evaluate more often (`eval_steps`), or look at why the metric is not finite. Only the Trainer's own "
                "evaluations count, those of `eval_strategy`.",
                NoEffectWarning,
                stacklevel=2,
            )
        weights = self._finish(args, state)
        self.average = None
        if self.store is not None and self.store.is_set:
            done = state.global_step
            self._say(state, narration.ending(self.config, self.reset_state, run.watch, self.events, done, weights))

    # What ResetTrainer and the curious call.

    def resets_at(self, step: int) -> bool:
        """Whether optimizer step `step` (`state.global_step` inside the step) ends in a reset, as things stand."""
        if self.run is None or self.run.ended or self.store is None or not self.store.is_set:
            return False
        return decide(self.config, self.reset_state, step, seed=self.run.seed)

    def is_at_anchor(self, step: int) -> bool:
        """Whether the weights after `step` steps are the anchor's: the last one ended in a reset of all of them."""
        is_full = self.store is not None and self.store.is_full
        return is_full and self.reset_state.last_reset_step == step - 1

    def report(self, step: int) -> dict[str, float]:
        """What to log after `step` steps: how many resets, and where the anchor is."""
        resets = [event for event in self.events if event["kind"] == "reset"]
        report: dict[str, float] = {"reset/count": self.reset_state.resets}
        if self.reset_state.plan is not None:
            report["reset/probability"] = probability_now(self.config, self.reset_state)
        if self.reset_state.anchor_step is not None and self.reset_state.anchor_metric is not None:
            report["reset/anchor_step"] = self.reset_state.anchor_step
            report["reset/anchor_metric"] = self.reset_state.anchor_metric
        if self.reset_state.worse is not None:
            report["reset/margin"] = self.reset_state.worse
        if self.run is not None:
            gain = narration.gain(self.reset_state, self.run.watch, self.events)
            report |= {} if gain is None else {"reset/gain": gain}
        if resets:
            report["reset/distance"] = resets[-1]["distance"]
            report["reset/steps_since"] = step - 1 - resets[-1]["step"]
        return report

    def save_anchor(self, directory: str | Path, args: TrainingArguments, state: TrainerState) -> None:
        """Write the anchor and what has happened so far into a checkpoint directory, whole or not at all."""
        if self.run is not None:
            self.run.saved_step = state.global_step
            if self.events:
                resume.save_progress(directory, self.store, self._progress(self.run, args), args)
            if self.average is not None and not self.run.ended:
                resume.save_average(directory, self.average, args)

    def averaged(self) -> AbstractContextManager[None]:
        """For a moment, the live weights are the average's, in training under `ema_decay`; else nothing happens."""
        return nullcontext() if self.average is None else self.average.swapped()

    # Steps of the above.

    def _new_average(self, decay: float, live: HookKeywords) -> Average:
        if not self.can_average:
            raise UnsupportedError(
                "`ema_decay` needs ResetTrainer, or `ResetTrainerMixin` in front of your own Trainer: a callback is "
                "not told before an evaluation or a save, so the average could not be what is evaluated and saved."
            )
        return Average(live["model"], live["optimizer"], self.config.scope, decay=decay, storage=self.config.storage)

    def _new_store(self, live: HookKeywords) -> AnchorStore:
        return AnchorStore(
            live["model"],
            live["optimizer"],
            scope=self.config.scope,
            optimizer_state=self.config.optimizer_state,
            storage=self.config.storage,
            keep_rest=self.config.finish == "anchor",
        )

    def _progress(self, run: Run, args: TrainingArguments) -> resume.Progress:
        return resume.Progress(
            self.reset_state, self.events, self.config, run.watch, run.seed, args.world_size, run.evidence
        )

    def _observe(self, value: float, rows: LossRows | None, run: Run, step: int) -> tuple[bool, float | None]:
        """Take a value in, and what its rows say: whether the anchor moves here, and how far its rows lie above."""
        margins = Margins() if rows is None else run.evidence.margins(rows[0])
        fit = None if self.rows is None or rows is None else self.rows.latest
        self.reset_state, moved = observe(
            self.config,
            self.reset_state,
            value,
            step,
            greater_is_better=run.watch.greater_is_better,
            worse=margins.worse,
            learned=margins.learned,
            loss=None if fit is None else fit.loss,
        )
        if rows is not None:
            run.evidence = run.evidence.moved(*rows) if moved else run.evidence.seen(rows[0])
            self.reset_state = replace(self.reset_state, learned=run.evidence.learned)
        return moved, margins.worse

    def _move_anchor(self, run: Run, state: TrainerState, live: HookKeywords, margin: float | None) -> None:
        distance = None
        if self.store is not None:
            changes = run.trained.changes(live["model"]) if run.trained is not None else []
            if changes:
                self._take_in(changes, live)
            distance = self.store.distance() if self.store.is_set else None
            self.store.snapshot()
        known = {"margin": margin, "judged": self.reset_state.best if self.config.smooth else None}
        self.record(state, "anchor", distance, **{name: value for name, value in known.items() if value is not None})

    def _take_in(self, changes: list[str], live: HookKeywords) -> None:
        """Parameters were unfrozen, frozen, added or replaced since the last anchor: the next is of those there are."""
        if self.average is not None:
            raise UnsupportedError(
                f"`ema_decay` averages parameters of which {len(changes)} were unfrozen, frozen, added or replaced "
                f"amid training, such as {changes[0]!r}. Do that before training, or set `ema_decay` to None."
            )
        logger.warning(
            "Stochastic resetting: %s parameters were unfrozen, frozen, added or replaced since the last anchor, such "
            "as %s. The anchor holds those of scope %r anew from here on.",
            len(changes),
            changes[0],
            self.config.scope,
        )
        self.store = None  # give its memory back, before the next takes some
        self.store = self._new_store(live)

    def _finish(self, args: TrainingArguments, state: TrainerState) -> str:
        """Put the weights of the end in place, and say whose they are."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            return f"The model ends as `load_best_model_at_end` loaded it, from {state.best_model_checkpoint}."
        has_anchor = self.store is not None and self.store.is_set
        if self.store is not None and has_anchor and finishes_with_anchor(self.config, self.reset_state):
            return narration.WITH_ANCHOR if self.store.finish() else narration.WITH_MIXTURE
        if self.average is not None:
            self.average.put_in()
            return narration.WITH_AVERAGE
        return narration.WITH_UNTOLD if has_anchor and self.config.finish == "anchor" else narration.WITH_LAST

    def _say(self, state: TrainerState, text: str) -> None:
        """One line on one process, at the level that is heard by default."""
        if state.is_world_process_zero:
            logger.warning("Stochastic resetting: %s", text)

    def _tell(self, scalars: dict[str, float]) -> None:
        if self.listener is not None:
            self.listener(scalars)

    def _record_plan(self, state: TrainerState) -> None:
        """A choice of `probability="auto"`, where it is another than the last."""
        plan = self.reset_state.plan
        last = next((event["probability"] for event in reversed(self.events) if event["kind"] == "plan"), None)
        if plan is None or plan.probability == last or self.reset_state.anchor_step is None:
            return
        known = {"excursions": plan.counts.excursions, "improvements": sum(plan.counts.hits)}
        self.record(state, "plan", None, probability=plan.probability, **known)

    def record(self, state: TrainerState, kind: str, distance: float | None = None, **more: object) -> None:
        """Add to the audit trail, here and where Trainer saves it."""
        record = {
            "kind": kind,
            "step": state.global_step,
            "epoch": state.epoch,
            "metric": self.reset_state.anchor_metric,
            "distance": distance,
            "anchor_step": self.reset_state.anchor_step,
            **more,
        }
        self.events.append(record)
        resume.record_event(state, record)
        if kind == "reset" and distance is not None:
            self._tell({"reset/jump": distance})
        elif kind == "anchor" and self.reset_state.anchor_metric is not None:
            self._tell({"reset/anchor": self.reset_state.anchor_metric})

    def _refuse_second_callback(self, state: TrainerState) -> None:
        other = resets_of(state)
        if other not in (None, self):
            raise ConfigError(
                "Two reset callbacks are in one Trainer, and would undo each other's anchors. Pass one: either "
                "`callbacks=[StochasticResetCallback(...)]`, or the `reset_*` fields of ResetTrainingArguments."
            )
        introduce_resets(state, self)
