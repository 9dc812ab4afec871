"""ResetTrainer: the callback's behaviour with exact resume from anywhere, its figures in the logs, and no
forward and backward for a step whose outcome a reset discards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_reset.anchor.ranks import gathered, together
from hf_reset.errors import AnchorFileError, ConfigError
from hf_reset.training.arguments import ResetArguments
from hf_reset.training.callback import StochasticResetCallback
from hf_reset.training.resume import last_whole_checkpoint, refuse_other_world_size


class ResetTrainerMixin:
    """Put in front of any Trainer: `class ResetSFTTrainer(ResetTrainerMixin, SFTTrainer): pass`.

    The configuration comes from the `reset_*` fields of the arguments (`ResetTrainingArguments`, or
    `ResetArguments` in front of another arguments class), or from a `StochasticResetCallback` among
    `callbacks`; with neither, from `ResetConfig()`. `reset_loss` names a loss of `hf_reset.losses` to train and
    evaluate with.

    Adds to what the callback does:
        - Exact resume from a checkpoint anywhere. `train(resume_from_checkpoint=True)` takes the newest whole
          one, passing over a directory that a killed run left half written.
        - `reset/count`, `reset/anchor_step`, `reset/anchor_metric`, `reset/distance` (that the last reset
          moved) and `reset/steps_since` in the logs, and so in TensorBoard, W&B and the rest.
        - Forward and backward are skipped in a step that a full reset discards whole, unless a gradient
          scaler is active, DeepSpeed or FSDP1 runs the step, or the optimizer state is kept. The batch is consumed and
          the learning rate goes on, the logged loss repeats the running mean, and dropout draws nothing.

    Raises:
        ConfigError: both a callback and `reset_*` fields were given.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.args, ResetArguments):  # pyright: ignore[reportAttributeAccessIssue]
            if self.reset_callback is not None:
                raise ConfigError(
                    "`callbacks` has a StochasticResetCallback and `args` has `reset_*` fields, so two would reset. "
                    "Pass one: plain TrainingArguments with the callback, or ResetTrainingArguments without."
                )
            self.add_callback(StochasticResetCallback(self.args.reset_config()))  # pyright: ignore
            loss = self.args.loss_func(self.model)  # pyright: ignore[reportAttributeAccessIssue]
            if loss is not None:
                # Set here, since SFTTrainer deprecates the constructor's argument.
                self.compute_loss_func = loss

    @property
    def reset_callback(self) -> StochasticResetCallback | None:
        """The callback at work in this Trainer."""
        callbacks = self.callback_handler.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        return next((callback for callback in callbacks if isinstance(callback, StochasticResetCallback)), None)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; True resumes from the newest whole checkpoint in `output_dir`."""
        if self.reset_callback is None:
            self.add_callback(StochasticResetCallback())  # pyright: ignore[reportAttributeAccessIssue]
        own: Any = self.args  # pyright: ignore[reportAttributeAccessIssue]
        if resume_from_checkpoint is True:
            found = gathered(last_whole_checkpoint(own.output_dir, world_size=own.world_size))
            # Disks of several machines may hold different ones: the oldest is whole wherever it still is.
            resume_from_checkpoint = None if None in found else min(found, key=lambda path: int(path.split("-")[-1]))
            if resume_from_checkpoint is None:
                raise AnchorFileError(
                    f"`resume_from_checkpoint=True`, and there is no whole checkpoint in `output_dir` "
                    f"{own.output_dir!r}. Name a checkpoint directory, or start without it."
                )
        if isinstance(resume_from_checkpoint, (str, Path)):
            with together():  # before DeepSpeed meets its own shares of another world size
                refuse_other_world_size(resume_from_checkpoint, own.world_size)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # pyright: ignore

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do for a run resumed from its last step; Trainer would take one step more."""
        own: Any = self
        if own.state.global_step >= own.state.max_steps:
            own.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch, or neither where a reset discards the whole step."""
        if self._discards_step():
            return self._running_loss()
        return super().training_step(model, inputs, *args, **kwargs)  # pyright: ignore

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with the reset figures beside the training loss."""
        callback = self.reset_callback
        if callback is not None and ("loss" in logs or "train_loss" in logs):
            logs.update(callback.report(self.state.global_step))  # pyright: ignore
        super().log(logs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _discards_step(self) -> bool:
        callback, accelerator = self.reset_callback, self.accelerator  # pyright: ignore
        return (
            callback is not None
            and callback.resets_at(self.state.global_step)  # pyright: ignore[reportAttributeAccessIssue]
            and callback.store is not None
            and callback.store.is_full
            and callback.config.optimizer_state != "keep"
            and accelerator.scaler is None
            and not self.is_deepspeed_enabled  # pyright: ignore[reportAttributeAccessIssue]
            and callback.store.layout != "flat"  # FSDP1 wants its backward
        )

    def _running_loss(self) -> Tensor:
        """What to add to the logged loss for a skipped micro-batch: the mean of the steps since the last log.

        Right after a log, the loss logged then. Both are the same after a resume.
        """
        own: Any = self
        step = own.state.global_step
        if getattr(self, "_discarded_step", None) != step:  # once a step, whatever the accumulation
            since = step - own._globalstep_last_logged
            logged = (record["loss"] for record in reversed(own.state.log_history) if "loss" in record)
            mean = own._tr_loss / since if since > 0 else torch.tensor(next(logged, 0.0), device=own._tr_loss.device)
            self._discarded_step, self._discarded_loss = step, mean.detach().clone()
        return self._discarded_loss / max(1, own.current_gradient_accumulation_steps)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        """A directory written before is not whole while it is being written again."""
        own: Any = self
        directory = Path(own._get_output_dir(trial)) / f"checkpoint-{own.state.global_step}"
        if own.args.should_save:
            (directory / "trainer_state.json").unlink(missing_ok=True)
        super()._save_checkpoint(model, trial, *args, **kwargs)  # pyright: ignore

    def _save_rng_state(self, output_dir: str) -> None:
        """The anchor goes in with the random states: on every rank, before `trainer_state.json` seals it."""
        super()._save_rng_state(output_dir)  # pyright: ignore[reportAttributeAccessIssue]
        if self.reset_callback is not None:
            self.reset_callback.save_anchor(output_dir, self.args, self.state)  # pyright: ignore

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
        if self.reset_callback is not None and checkpoint is not None:
            self.reset_callback.resume_from_checkpoint = checkpoint


class ResetTrainer(ResetTrainerMixin, Trainer):
    """`Trainer` with stochastic resetting; takes what `Trainer` takes. See `ResetTrainerMixin`."""
