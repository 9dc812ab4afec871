"""The callback: takes evaluations in, and puts the anchor back. Works in Trainer and in any subclass of it."""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_reset.anchor.ranks import together
from hf_reset.anchor.shards import refuse_lost_state
from hf_reset.anchor.store import AnchorStore
from hf_reset.config import ResetConfig, configured
from hf_reset.errors import ConfigError, NoEffectWarning, UnsupportedError
from hf_reset.planner.excursions import Event
from hf_reset.policy import ResetState, decide, finishes_with_anchor, observe, probability_now
from hf_reset.training.ema import Average
from hf_reset.training.evidence import Margins, RowSource
from hf_reset.training.metric import MetricWatch
from hf_reset.training.resume import (
    Progress,
    record_event,
    save_average,
    save_progress,
    saved_into,
    take_up,
    take_up_average,
)
from hf_reset.training.run import Run, refuse_no_evaluation

logger = logging.getLogger(__name__)


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
            errors of the paired difference, below 0.
        probability: in a plan, the r chosen; with the `excursions` and `improvements` behind it, older ones
            counting less.

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
        resume_from_checkpoint: str | None = None,
        rows: RowSource | None = None,
        **fields: Any,
    ) -> None:
        self.config = configured(config, fields)
        self.rows = rows
        self.resume_from_checkpoint = resume_from_checkpoint
        self.events: list[Event] = []
        self.store: AnchorStore | None = None
        self.average: Average | None = None  # in training, under `ema_decay`
        self.can_average = False  # whether the Trainer swaps it in where it evaluates and saves: ResetTrainer does
        self.reset_state = ResetState()
        self._run: Run | None = None  # the last one, also when it has ended

    # What the Trainer calls.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the set-up, make room for the anchor, and take up where a checkpoint left off."""
        self._refuse_second_callback(state)
        seed = args.seed if self.config.seed is None else self.config.seed
        run = Run(MetricWatch.of(self.config, args), seed)
        self.events, self.reset_state, self.store, self.average = [], ResetState(), None, None
        with together():
            if self.config.needs_anchor:
                refuse_no_evaluation(run.watch, args)
                self.store = self._new_store(kwargs["model"], kwargs["optimizer"])
            if self.config.ema_decay is not None:
                self.average = self._new_average(self.config.ema_decay, kwargs["model"], kwargs["optimizer"])
            if state.global_step > 0:
                refuse_lost_state(kwargs["model"], kwargs["optimizer"])
        if state.global_step > 0:
            # An evaluation before the first step (`eval_on_start`) would not have been there without the stop.
            run.observed_step = state.global_step
            directory, self.resume_from_checkpoint = self.resume_from_checkpoint, None
            progress = take_up(directory, self.store, self._progress(run, args), args, state)
            self.reset_state, self.events, run.evidence = progress.state, progress.events, progress.evidence
            take_up_average(directory, self.average, args, state)
        self._run = run

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Take one evaluation in; the weights just evaluated become the anchor if they are a new best."""
        run = self._run
        if run is None or run.ended or metrics is None:
            return
        rows = None if self.rows is None else self.rows.take_rows()
        run.watch.agree(metrics, args)
        value = run.watch.value_in(metrics)
        if value is None:
            run.note_absence(metrics)
            return
        run.seen = True
        if state.global_step == run.observed_step:
            return
        run.observed_step = state.global_step
        margins = Margins() if rows is None else run.evidence.margins(rows[0])
        self.reset_state, moved = observe(
            self.config,
            self.reset_state,
            value,
            state.global_step,
            greater_is_better=run.watch.greater_is_better,
            worse=margins.worse,
            learned=margins.learned,
        )
        if rows is not None:
            run.evidence = run.evidence.moved(*rows) if moved else run.evidence.seen(rows[0])
            self.reset_state = replace(self.reset_state, learned=run.evidence.learned)
        if moved:
            self._move_anchor(state, margins.worse)
        self._record_plan(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Say it if the evaluations before this step all lacked the metric."""
        if self._run is not None:
            self._run.refuse_unseen_metric()
            self._run.begin_step()

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
            if self._run is not None:
                self._run.evidence = self._run.evidence.left()
            if self.average is not None:
                self.average.follow()
        elif self.average is not None:
            self.average.update()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Write the anchor into the checkpoint, unless `ResetTrainer` has done so already."""
        if args.save_only_model or self._run is None or self._run.saved_step == state.global_step:
            return
        directory = saved_into(args, state, self.store)
        if directory is not None:
            self.save_anchor(directory, args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Leave the anchor's weights in the model, unless Trainer has loaded its best checkpoint."""
        run = self._run
        if run is None:
            return
        run.refuse_unseen_metric()
        run.ended = True
        if self.store is not None and not self.store.is_set:
            warnings.warn(
                f"No evaluation gave a finite {run.watch.key!r}, so there was no anchor and nothing was reset. "
                "Evaluate more often (`eval_steps`), or look at why the metric is not finite.",
                NoEffectWarning,
                stacklevel=2,
            )
        self._finish(args, state)
        self.average = None

    # What ResetTrainer and the curious call.

    def resets_at(self, step: int) -> bool:
        """Whether optimizer step `step` (`state.global_step` inside the step) ends in a reset, as things stand."""
        if self._run is None or self._run.ended or self.store is None or not self.store.is_set:
            return False
        return decide(self.config, self.reset_state, step, seed=self._run.seed)

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
        if resets:
            report["reset/distance"] = resets[-1]["distance"]
            report["reset/steps_since"] = step - 1 - resets[-1]["step"]
        return report

    def save_anchor(self, directory: str | Path, args: TrainingArguments, state: TrainerState) -> None:
        """Write the anchor and what has happened so far into a checkpoint directory, whole or not at all."""
        if self._run is not None:
            self._run.saved_step = state.global_step
            if self.events:
                save_progress(directory, self.store, self._progress(self._run, args), args)

            if self.average is not None and not self._run.ended:
                save_average(directory, self.average, args)

    def averaged(self) -> AbstractContextManager[None]:
        """For a moment, the live weights are the average's, in training under `ema_decay`; else nothing happens."""
        return nullcontext() if self.average is None else self.average.swapped()

    # Steps of the above.

    def _finish(self, args: TrainingArguments, state: TrainerState) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            logger.info("`load_best_model_at_end` loaded %s; the anchor is left aside.", state.best_model_checkpoint)
        elif self.store is not None and self.store.is_set and self._finishes_with_anchor():
            if not self.store.finish():
                logger.warning(
                    "The anchor was written without the weights outside the scope %r, so the model now holds the "
                    "anchor's beside the last step's, which were not evaluated together. Evaluate it, or start anew.",
                    self.config.scope,
                )
        elif self.average is not None:
            self.average.put_in()

    def _finishes_with_anchor(self) -> bool:
        finishes = finishes_with_anchor(self.config, self.reset_state)
        if self.config.finish == "anchor" and not finishes:
            logger.info(
                "Validation cannot tell the anchor of step %s from the last weights, which stay. More validation rows "
                "would tell; a number for `patience` ends with the anchor all the same.",
                self.reset_state.anchor_step,
            )
        return finishes

    def _new_average(self, decay: float, model: Any, optimizer: Any) -> Average:
        if not self.can_average:
            raise UnsupportedError(
                "`ema_decay` needs ResetTrainer, or `ResetTrainerMixin` in front of your own Trainer: a callback is "
                "not told before an evaluation or a save, so the average could not be what is evaluated and saved."
            )
        return Average(model, optimizer, self.config.scope, decay=decay, storage=self.config.storage)

    def _new_store(self, model: Any, optimizer: Any) -> AnchorStore:
        return AnchorStore(
            model,
            optimizer,
            scope=self.config.scope,
            optimizer_state=self.config.optimizer_state,
            storage=self.config.storage,
            keep_rest=self.config.finish == "anchor",
        )

    def _progress(self, run: Run, args: TrainingArguments) -> Progress:
        return Progress(self.reset_state, self.events, self.config, run.watch, run.seed, args.world_size, run.evidence)

    def _move_anchor(self, state: TrainerState, margin: float | None) -> None:
        distance = None
        if self.store is not None:
            distance = self.store.distance() if self.store.is_set else None
            self.store.snapshot()
        self.record(state, "anchor", distance, **({} if margin is None else {"margin": margin}))

    def _record_plan(self, state: TrainerState) -> None:
        """A choice of `probability="auto"`, where it is another than the last."""
        plan = self.reset_state.plan
        last = next((event["probability"] for event in reversed(self.events) if event["kind"] == "plan"), None)
        if plan is None or plan.probability == last or self.reset_state.anchor_step is None:
            return
        known = {"excursions": plan.counts.excursions, "improvements": sum(plan.counts.hits)}
        self.record(state, "plan", None, probability=plan.probability, **known)

    def record(self, state: TrainerState, kind: str, distance: float | None = None, **more: Any) -> None:
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
        record_event(state, record)

    def _refuse_second_callback(self, state: TrainerState) -> None:
        other = getattr(state, "_stochastic_reset_callback", self)
        if other is not self:
            raise ConfigError(
                "Two reset callbacks are in one Trainer, and would undo each other's anchors. Pass one: either "
                "`callbacks=[StochasticResetCallback(...)]`, or the `reset_*` fields of ResetTrainingArguments."
            )
        state._stochastic_reset_callback = self  # pyright: ignore[reportAttributeAccessIssue]
