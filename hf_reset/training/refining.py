"""Losses of rows in a Trainer: robust ones by name, ones that remember rows, weights, and refined targets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_reset.anchor.ranks import gathered, world_size
from hf_reset.errors import ConfigError, DataError, UnsupportedError
from hf_reset.losses.by_name import LOSSES, Outputs, logits_of, shifts_labels
from hf_reset.losses.memory import EarlyLearningRegularization, named_remembering_loss
from hf_reset.losses.reduce import IGNORE_INDEX, ScoredRows, per_example, reduce, scored_rows
from hf_reset.losses.robust import cross_entropy_rows, expected_rows, soft_target_rows
from hf_reset.metrics.calibrated import CalibratedLoss
from hf_reset.policy import ResetState
from hf_reset.rows.memory import RowMemory
from hf_reset.rows.refinement import Refinement, RefinementConfig, refine, refine_responses
from hf_reset.rows.responses import ResponseMemory
from hf_reset.training.arguments import ResetArguments
from hf_reset.training.memory import RowMemoryMixin
from hf_reset.training.responses import losses_before_training

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

STALLED = 2  # evaluations without a new best, after which refinement may begin


class RefiningMixin(RowMemoryMixin):
    """Trains on corrected targets instead of suspects' given labels, and with losses that know rows.

    Args:
        refinement: how suspects are treated; None: `reset_refine` of the arguments, with the defaults of
            `RefinementConfig`.
        row_weights: (N,), at least 0: what the loss of each training row counts for. The divisor stays the number
            of rows, so that a row's pull does not depend on its neighbours.
        args, kwargs: what the Trainer behind takes.

    Attributes:
        refinement_config: what was asked for.
        refinement: what is done with each row now; None before anything was judged.

    Raises:
        ConfigError: arguments that contradict one another.
        UnsupportedError: a loss of the user's own, or label smoothing, beside one that is made here.
    """

    refinement: Refinement | None = None

    def __init__(
        self,
        *args: Any,
        refinement: RefinementConfig | None = None,
        row_weights: Sequence[float] | Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        self._asked_refinement = refinement
        self._row_weights = None if row_weights is None else torch.as_tensor(row_weights, dtype=torch.float32)
        self._remembering: EarlyLearningRegularization | None = None
        super().__init__(*args, **kwargs)
        self.follow_loss_arguments()

    def follow_loss_arguments(self) -> None:
        """Take over what the arguments say of the loss now: they may be set, or searched over, after construction.

        Raises:
            ConfigError: arguments that contradict one another.
            UnsupportedError: a loss of the user's own, or label smoothing, beside one that is made here.
        """
        self.refinement_config = self._configured(self.args)
        self._loss_options = self.args.loss_options() if isinstance(self.args, ResetArguments) else {}
        self._shift = shifts_labels(self.model) if self.model is not None and self._makes_loss() else None
        if self._makes_loss():
            self._refuse_other_losses()
            self._feeds_from_outputs = False
            # Set here, since SFTTrainer deprecates the constructor's argument.
            self.compute_loss_func = self._loss_of_rows
        elif self.compute_loss_func == self._loss_of_rows:
            self.compute_loss_func = None

    def rows_needed_by(self, args: TrainingArguments) -> str | None:
        """As `RowMemoryMixin`'s: refinement, weights and losses that remember need rows."""
        mode, loss = self._configured(args).mode, getattr(args, "reset_loss", None)
        if mode != "off":
            return f'`reset_refine="{mode}"`'
        if self._row_weights is not None:
            return "`row_weights`"
        if loss is not None and loss not in LOSSES:
            return f'`reset_loss="{loss}"`'
        return super().rows_needed_by(args)

    def share_rows(self) -> None:
        """As `RowMemoryMixin`'s, with what the loss remembers."""
        super().share_rows()
        if self._remembering is not None:
            self._remembering.share(gathered)

    def rows_state(self) -> dict[str, Tensor]:
        """As `RowMemoryMixin`'s, with what the loss remembers and what is done with each row."""
        state = super().rows_state()
        if self._remembering is not None:
            remembered = self._remembering.state_dict()
            state |= {f"loss.{name}": tensor.cpu().contiguous() for name, tensor in remembered.items()}
        if self.refinement is not None:
            refined = {"is_suspect": self.refinement.is_suspect, "weights": self.refinement.weights}
            if self.refinement.targets is not None:
                refined["targets"] = self.refinement.targets
            state |= {f"refinement.{name}": tensor.cpu().contiguous() for name, tensor in refined.items()}
        return state

    def load_rows_state(self, state: dict[str, Tensor]) -> None:
        """As `RowMemoryMixin`'s."""
        super().load_rows_state(state)
        if self._remembering is not None:
            if "loss.targets" not in state:
                raise DataError(
                    f"The run being resumed had no loss that remembers rows, and {self.rows_needed_by(self.args)} "
                    "is one. Resume with the settings that the run began with."
                )
            self._remembering.load_state_dict({"targets": state["loss.targets"]})
        if "refinement.is_suspect" in state and self.refinement_config.mode != "off":
            self.refinement = self._on_device(
                Refinement(
                    is_suspect=state["refinement.is_suspect"],
                    weights=state["refinement.weights"],
                    targets=state.get("refinement.targets"),
                    reason="taken up from a checkpoint",
                )
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with the number of suspects beside the training loss once any were judged."""
        if self.refinement is not None and "loss" in logs:
            logs["reset/suspects"] = int(self.refinement.is_suspect.sum())
        super().log(logs, *args, **kwargs)

    # What was asked for.

    def _configured(self, args: TrainingArguments) -> RefinementConfig:
        mode, asked = getattr(args, "reset_refine", "off"), self._asked_refinement
        if asked is None:
            return RefinementConfig(mode=mode)
        if mode not in ("off", asked.mode):
            raise ConfigError(
                f"`reset_refine` {mode!r} and `refinement` of mode {asked.mode!r} contradict each other. Give one."
            )
        return asked

    def _makes_loss(self) -> bool:
        """Whether the loss is made here, out of rows, and not by the model."""
        asked = getattr(self.args, "reset_loss", None) is not None
        return asked or self._row_weights is not None or self.refinement_config.mode != "off"

    def _refuse_other_losses(self) -> None:
        what = self.rows_needed_by(self.args) or "`reset_loss`"
        if self.compute_loss_func not in (None, self._loss_of_rows):
            raise UnsupportedError(
                f"`compute_loss_func` and {what} would both make the loss. Name a loss of hf_reset.losses by "
                "`reset_loss`, or leave the other out."
            )
        if self.args.label_smoothing_factor > 0:
            raise UnsupportedError(
                f"`label_smoothing_factor` {self.args.label_smoothing_factor} has no effect with {what}, which makes "
                "the loss itself. Set it to 0."
            )

    # The loss.

    def _loss_of_rows(
        self, outputs: Outputs, labels: Tensor | None, num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        """Trainer's `compute_loss_func`. In training it knows the rows of the batch, `batch_rows`."""
        if labels is None:
            raise ConfigError("A loss of rows needs `labels` in every batch, and this one has none.")
        logits = logits_of(outputs)
        options = dict(self._loss_options)
        ignored = int(options.pop("ignore_index", IGNORE_INDEX)) if self._remembering is None else IGNORE_INDEX
        rows = self.batch_rows if self.model is not None and self.model.training else None
        if rows is not None and isinstance(self.row_memory, RowMemory):
            self._remember(outputs, labels)
        scored = scored_rows(logits, labels, ignore_index=ignored, shift=self._shift)
        if rows is not None and isinstance(self.row_memory, ResponseMemory):
            self._remember_responses(scored, rows)
        rows = None if rows is None else rows.to(logits.device)
        values = self._given_values(scored, rows, options)
        if rows is None:
            return reduce(values, scored, num_items_in_batch=num_items_in_batch)
        values = self._refined_values(values, scored, rows, options)
        return reduce(values, scored, weights=self._weights_of(rows), num_items_in_batch=num_items_in_batch)

    def _remember_responses(self, scored: ScoredRows, rows: Tensor) -> None:
        memory = self.row_memory
        assert isinstance(memory, ResponseMemory)
        if scored.examples != len(rows):
            raise UnsupportedError(
                f"{self.rows_needed_by(self.args)} needs one sequence a row, and the batch has {scored.examples} of "
                f"{len(rows)} rows."
            )
        self._mark_resets()
        with torch.no_grad():
            memory.update(rows, per_example(cross_entropy_rows(scored.logits.detach(), scored.labels), scored))

    def _given_values(self, scored: ScoredRows, rows: Tensor | None, options: dict[str, float]) -> Tensor:
        if self._remembering is not None:
            return self._remembering(scored.logits, scored.labels, rows)
        name = getattr(self.args, "reset_loss", None)
        if name is None or name not in LOSSES:
            return cross_entropy_rows(scored.logits, scored.labels)
        return LOSSES[name].rows(scored.logits, scored.labels, **options)

    def _refined_values(self, values: Tensor, scored: ScoredRows, rows: Tensor, options: dict[str, float]) -> Tensor:
        """The loss against refined targets where there are any. A remembering loss keeps its second term."""
        if self.refinement is None or self.refinement.targets is None:
            return values
        targets = self.refinement.targets[rows]
        name = getattr(self.args, "reset_loss", None)
        if self._remembering is not None:
            soft = values - cross_entropy_rows(scored.logits, scored.labels) + soft_target_rows(scored.logits, targets)
        else:
            base = cross_entropy_rows if name is None else LOSSES[name].rows
            soft = expected_rows(base, scored.logits, targets, **options)
        return torch.where(self.refinement.is_suspect[rows], soft, values)

    def _weights_of(self, rows: Tensor) -> Tensor | None:
        weights = None if self.refinement is None else self.refinement.weights[rows]
        if self._row_weights is None:
            return weights
        self._row_weights = self._row_weights.to(rows.device)
        return self._row_weights[rows] if weights is None else self._row_weights[rows] * weights

    # What is made when training begins, and judged at evaluations.

    def _begin_rows(self, checkpoint: str | None, loader: DataLoader) -> None:
        self.refinement = self._remembering = None
        self._refuse_wrong_weights()
        super()._begin_rows(checkpoint, loader)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if isinstance(self.row_memory, ResponseMemory) and self.row_memory.reference.isnan().all():
            model, loader = prepared
            for looked_at in losses_before_training(model, loader, self.args):
                self.row_memory.set_reference(*looked_at)
            if self.refinement_config.begin == "stall":
                self.refinement = self._on_device(self._refined(None))
        return prepared

    def _make_memory(self) -> str | None:
        if self.refinement_config.mode != "off" and self._shift:
            self.row_memory = ResponseMemory(self.num_train_rows, decay=self._memory_decay())
            return None
        reason = super()._make_memory()
        name, memory = getattr(self.args, "reset_loss", None), self.row_memory
        if isinstance(memory, RowMemory) and name is not None and name not in LOSSES:
            self._remembering = named_remembering_loss(
                name, memory.num_rows, memory.num_classes, shared=world_size() > 1, **self._loss_options
            )
        return reason

    def _memory_decay(self) -> float:
        return self.refinement_config.decay if self.refinement_config.mode != "off" else 1.0

    def _refuse_wrong_weights(self) -> None:
        weights = self._row_weights
        if weights is None:
            return
        if weights.shape != (self.num_train_rows,) or not (weights.isfinite() & (weights >= 0)).all():
            raise DataError(
                f"`row_weights` must be one number at least 0 for each of {self.num_train_rows} training rows, got "
                f"shape {tuple(weights.shape)} and {int((~(weights >= 0)).sum())} that are not."
            )

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super()._evaluate(*args, **kwargs)
        self._judge()
        return metrics

    def _judge(self) -> None:
        """Look at every row again, once that can begin."""
        callback, memory = getattr(self, "reset_callback", None), self.row_memory
        if self.refinement_config.mode == "off" or memory is None or callback is None:
            return
        fit = None if callback.rows is None else callback.rows.latest
        if not (callback.reset_state.armed or self._has_begun(callback.reset_state, fit)):
            return
        found = self._refined(fit)
        if self.refinement is None or found.is_active or self.refinement.is_active:
            callback.record(self.state, "refinement", suspects=int(found.is_suspect.sum()), reason=found.reason)
        self.refinement = self._on_device(found)

    def _refined(self, fit: CalibratedLoss | None) -> Refinement:
        memory = self.row_memory
        assert memory is not None
        if isinstance(memory, ResponseMemory):
            return refine_responses(memory, self.refinement_config)
        return refine(
            memory,
            self.refinement_config,
            fitted_noise=0.0 if fit is None else fit.wrong_labels,
            estimated_accuracy=None if fit is None else fit.estimated_accuracy,
            in_training=self._rows_in_training(),
        )

    def _has_begun(self, state: ResetState, fit: CalibratedLoss | None) -> bool:
        """Whether rows are refined already, or are to be from here on though resets have not begun."""
        if self.refinement is not None and self.refinement.is_active:
            return True
        stalls = self.refinement_config.begin == "stall" and fit is not None
        return stalls and state.evaluations_since_best >= STALLED

    def _rows_in_training(self) -> Tensor | None:
        """Which of the given rows are trained on, (N,); None for all."""
        if self._given_numbers is None:
            return None
        trained = torch.zeros(self.num_train_rows, dtype=torch.bool)
        trained[torch.as_tensor(self._given_numbers)] = True
        return trained

    def _on_device(self, found: Refinement) -> Refinement:
        device = self.args.device
        targets = None if found.targets is None else found.targets.to(device)
        return replace(found, is_suspect=found.is_suspect.to(device), weights=found.weights.to(device), targets=targets)
