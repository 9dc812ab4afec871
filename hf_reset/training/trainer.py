"""ResetTrainer: the callback's behaviour with exact resume from anywhere, its figures in the logs, and no
forward and backward for a step whose outcome a reset discards."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import AdafactorSchedule
from transformers.trainer_utils import PredictionOutput, TrainOutput

from hf_reset.anchor.ranks import gathered, together
from hf_reset.errors import AnchorFileError, ConfigError
from hf_reset.rows.identity import Batch
from hf_reset.training.advisor import ResetAdvisorCallback
from hf_reset.training.arguments import ResetArguments
from hf_reset.training.callback import StochasticResetCallback
from hf_reset.training.checkpoints import last_whole_checkpoint, refuse_other_world_size
from hf_reset.training.metric import default_metric
from hf_reset.training.racing import RacingMixin
from hf_reset.training.validation import judged_by, row_source

_LAST_LOSS = "StochasticResetLastLoss"  # beside the events in `trainer_state.json`

# What is overridden beyond Trainer's documented methods, and why nothing public would do.
PRIVATE_HOOKS = {
    "_hp_search_setup": "the first call after a search has set `reset_*` fields for a trial",
    "_run_epoch": "a run resumed from its very last step would take one step more; rows are shared after an epoch",
    "_get_dataloader": "all loaders come through it, and only there is the sampler made apart from the data set",
    "_prepare_for_training": "the last call before the first step that is told the checkpoint, where rows are refused",
    "_evaluate": "rows are shared after an evaluation amid training, when callbacks have judged it; and only what the "
    "schedule asks for comes through it, which alone may be a race",
    "_get_eval_sampler": "a race meets the rows in an order of its own",
    "_determine_best_metric": "a lost race has no metric, and is no best",
    "_save_checkpoint": "a directory written before must not pass for whole while it is written again; and FSDP and "
    "DeepSpeed save weights outside `save_model`, which must be the average's too",
    "_save_rng_state": "the last call on every rank before `trainer_state.json`, which seals a checkpoint",
    "_load_optimizer_and_scheduler": "the only call that is told the checkpoint's directory",
}


class ResetTrainerMixin(RacingMixin):
    """Put in front of any Trainer: `class ResetSFTTrainer(ResetTrainerMixin, SFTTrainer): pass`.

    The configuration comes from the `reset_*` fields of the arguments (`ResetTrainingArguments`, or
    `ResetArguments` in front of another arguments class), or from a `StochasticResetCallback` among
    `callbacks`; with neither, from `ResetConfig()`. `reset_loss` names a loss of `hf_reset.losses` to train and
    evaluate with.

    Adds to what the callback does:
        - Exact resume from a checkpoint anywhere. `train(resume_from_checkpoint=True)` takes the newest whole
          one, passing over a directory that a killed run left half written.
        - `reset/count`, `reset/anchor_step`, `reset/anchor_metric`, `reset/distance` (that the last reset
          moved), `reset/steps_since` and `reset/margin` (of validation above the anchor, in standard errors) in
          the logs, and so in TensorBoard, W&B and the rest.
        - With a dict of evaluation sets and no metric named, the first one's loss chooses, and a line says so.
        - `reset_metric="eval_calibrated_loss"` needs no `compute_metrics`, and resets of single-label
          classifiers and of causal language models begin on the evidence of validation rows.
        - `ema_decay`: the average is swapped in where the Trainer evaluates, predicts and saves. A checkpoint's model
          is the average; the live weights lie beside the anchor, for the resume.
        - One scalar for each reset (`reset/jump`, how far the weights went) and each move of the anchor
          (`reset/anchor`, its metric), sent to the reporters in `report_to` when it happens.
        - Forward and backward are skipped in a step that a full reset discards whole, unless a gradient
          scaler is active, DeepSpeed or FSDP1 runs the step, or the optimizer state is kept. The batch is consumed and
          the learning rate goes on, the logged loss repeats the last one computed, and dropout draws nothing.
        - A row memory of single-label classifiers, from the training forward's own logits, and `suspects()`: see
          `RowMemoryMixin`.
        - `reset_evaluation="paired"`: scheduled evaluations are races against the anchor, which end as soon as they are
          clearly lost; see `hf_reset.training.racing`. `reset_evaluation_at="excursion"`: once resets have begun,
          they take place where excursions end.
        - `reset_refine` trains suspects towards what was predicted for them; `reset_loss="elr"` and `row_weights`
          know rows too: see `RefiningMixin`.

    `reset_*` fields may also be set, or searched over, after construction, or `reset_callback.config` in their place.

    Raises:
        ConfigError: both a callback and `reset_*` fields were given, or, when training begins, both the callback's
            configuration and the fields were changed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._discarded_step: int | None = None
        self._last_loss: Tensor | None = None  # of the last step that was computed, on this rank
        self._last_loss_step = -1
        self._from_arguments: StochasticResetCallback | None = None  # whose configuration follows the arguments
        self._is_removed = False  # whether the user took the callback away
        if isinstance(self.args, ResetArguments):
            if self.reset_callback is not None:
                raise ConfigError(
                    "`callbacks` has a StochasticResetCallback and `args` has `reset_*` fields, so two would reset. "
                    "Pass one: plain TrainingArguments with the callback, or ResetTrainingArguments without."
                )
            self._followed = self.args.reset_config()
            self._from_arguments = StochasticResetCallback(self._followed)
            self.add_callback(self._from_arguments)

    @property
    def reset_callback(self) -> StochasticResetCallback | None:
        """The callback at work in this Trainer."""
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, StochasticResetCallback)), None)

    def _has(self, kind: type[TrainerCallback]) -> bool:
        return any(isinstance(callback, kind) for callback in self.callback_handler.callbacks)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`; True resumes from the newest whole checkpoint in `output_dir`."""
        if self.reset_callback is None and not self._is_removed:
            self.add_callback(StochasticResetCallback())
        if getattr(self.args, "reset_advice", True) and not self._has(ResetAdvisorCallback):
            self.add_callback(ResetAdvisorCallback())
        self._make_ready()
        self._last_loss = None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_whole_checkpoint()
        if isinstance(resume_from_checkpoint, (str, Path)):
            with together():  # before DeepSpeed meets its own shares of another world size
                refuse_other_world_size(resume_from_checkpoint, self.args.world_size)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def remove_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """As `Trainer.remove_callback`; without a reset callback this is the plain Trainer."""
        super().remove_callback(callback)
        self._note_removed(callback)

    def pop_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> TrainerCallback | None:
        """As `Trainer.pop_callback`; without a reset callback this is the plain Trainer."""
        self._note_removed(callback)
        return super().pop_callback(callback)

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch, or neither where a reset discards the whole step."""
        if self._discards_step():
            model.train()  # as any step does after an evaluation; TRL logs by it
            return self._repeated_loss()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._note_loss(loss)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; in training with `ema_decay`, of the average."""
        with self._averaged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As `Trainer.predict`; in training with `ema_decay`, by the average."""
        with self._averaged():
            return super().predict(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.save_model`; in training with `ema_decay`, of the average."""
        with self._averaged():
            super().save_model(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with the reset figures beside the training loss where an anchor is kept."""
        callback = self.reset_callback
        if callback is not None and callback.store is not None and ("loss" in logs or "train_loss" in logs):
            logs.update(callback.report(self.state.global_step))
        if self._discarded_step == self.state.global_step - 1:
            logs.pop("grad_norm", None)  # there was no gradient: 0 would be a lie
        super().log(logs, *args, **kwargs)

    # Of Trainer's own, see `PRIVATE_HOOKS`.

    def _hp_search_setup(self, trial: object) -> None:
        super()._hp_search_setup(trial)
        self._make_ready()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: object, *args: Any, **kwargs: Any) -> None:
        directory = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (directory / "trainer_state.json").unlink(missing_ok=True)
        with self._averaged():
            super()._save_checkpoint(model, trial, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.reset_callback is not None and self.reset_callback.store is not None and self._last_loss is not None:
            saved: Any = self.state.stateful_callbacks
            saved[_LAST_LOSS] = fmean(gathered(float(self._last_loss)))
        if self.reset_callback is not None:
            self.reset_callback.save_anchor(output_dir, self.args, self.state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.reset_callback is not None and checkpoint is not None:
            self.reset_callback.resume_from_checkpoint = checkpoint

    # Steps of the above.

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.reset_callback is None else self.reset_callback.averaged()

    def _follow_arguments(self) -> None:
        """Take over `reset_*` fields as they are now: they may be set, or searched over, after construction.

        A configuration that the user has given the callback instead stands.
        """
        callback = self._from_arguments
        if isinstance(self.args, ResetArguments) and callback is not None:
            config = self.args.reset_config()
            if callback.config == self._followed:
                callback.config = self._followed = config
            elif config != self._followed:
                raise ConfigError(
                    "`reset_callback.config` was set after construction, and so were `reset_*` fields of `args`, so it "
                    "is not clear which are meant. Set one of them, the fields if they are searched over."
                )
        self.follow_loss_arguments()

    def _make_ready(self) -> None:
        """What the callback cannot see to by itself."""
        self._follow_arguments()
        callback = self.reset_callback
        if callback is None:
            return
        if callback is self._from_arguments and self.refinement_config.mode != "off":
            callback.config = judged_by(self, callback.config)
        races = getattr(self.args, "reset_evaluation", "full") == "paired"
        if callback.rows is None or races:
            judges = self.refinement_config.mode != "off"
            callback.rows = row_source(self, callback.config, judges_rows=judges, races=races) or callback.rows
        callback.default_metric = default_metric(self.eval_dataset)
        callback.can_average = True
        callback.listener = self._report

    def _report(self, scalars: dict[str, float]) -> None:
        """Send what has just happened to the reporters, and to nobody who would take it for one of Trainer's logs."""
        reporters = tuple(INTEGRATION_TO_CALLBACK.values())
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, reporters):
                callback.on_log(self.args, self.state, self.control, logs=dict(scalars), model=self.model)

    def _note_removed(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        kind = callback if isinstance(callback, type) else type(callback)
        self._is_removed = self._is_removed or issubclass(kind, StochasticResetCallback)

    def _newest_whole_checkpoint(self) -> str:
        newest = gathered(last_whole_checkpoint(self.args.output_dir or "", world_size=self.args.world_size))
        found = [path for path in newest if path is not None]
        if len(found) < len(newest):
            raise AnchorFileError(
                f"No valid checkpoint found in output directory ({self.args.output_dir}): none there is whole. Name a "
                "checkpoint directory, or start without `resume_from_checkpoint`."
            )
        # Disks of several machines may hold different ones: the oldest is whole wherever it still is.
        return min(found, key=lambda path: int(path.split("-")[-1]))

    def _discards_step(self) -> bool:
        callback = self.reset_callback
        return (
            callback is not None
            and callback.resets_at(self.state.global_step)
            and callback.store is not None
            and callback.store.is_full
            and callback.config.optimizer_state != "keep"
            and self.accelerator.scaler is None
            and not self.is_deepspeed_enabled
            and callback.store.layout != "flat"  # FSDP1 wants its backward
            and not callback.store.needs_gradients
            and not isinstance(self.lr_scheduler, AdafactorSchedule)  # without a gradient it would say a rate of 0
        )

    def _note_loss(self, loss: Tensor) -> None:
        """Add up what a step's micro-batches count for in the logged loss."""
        step = self.state.global_step
        so_far = self._last_loss if self._last_loss_step == step else None
        self._last_loss_step = step
        self._last_loss = loss.detach().clone() if so_far is None else so_far + loss.detach()

    def _repeated_loss(self) -> Tensor:
        """What to add to the logged loss for a skipped micro-batch: the last step's that was computed.

        So it does not matter how often the loss is logged, nor where a run was resumed.
        """
        if self._last_loss is None:
            logged = (record["loss"] for record in reversed(self.state.log_history) if "loss" in record)
            saved: Any = self.state.stateful_callbacks
            kept = (saved or {}).get(_LAST_LOSS)
            self._last_loss = torch.tensor(next(logged, 0.0) if kept is None else kept, device=self._tr_loss.device)
        self._discarded_step = self.state.global_step
        return self._last_loss / max(1, self.current_gradient_accumulation_steps)


class ResetTrainer(ResetTrainerMixin, Trainer):
    """`Trainer` with stochastic resetting; takes what `Trainer` takes. See `ResetTrainerMixin`."""
