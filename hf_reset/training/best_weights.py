"""Keep the best evaluated weights of a run in memory, resets or none, to measure them beside the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_reset.anchor.store import AnchorStore
from hf_reset.errors import MetricError
from hf_reset.policy import ResetConfig, ResetState, observe
from hf_reset.training.hooks import HookKeywords, resets_of
from hf_reset.training.metric import MetricWatch
from hf_reset.training.parameters import TrainedParameters
from hf_reset.training.scheduled import is_scheduled

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from typing_extensions import Unpack


class BestWeightsCallback(TrainerCallback):
    """What early stopping would have kept: all trainable weights at the best evaluation.

    Apart from the anchor of a reset run, which may hold a part of the model, or stay fixed. It changes nothing
    of the training.

    Args:
        config: its `metric`, `greater_is_better`, `min_delta` and `smooth` say what is best.
        storage: where the copy lies, "cpu" or "device".
        path: a file to keep the copy in as well, written whole at each new best, so that a resumed run knows
            it; None: it is lost with the process. A sharded model gets one file a rank.

    Attributes:
        best: the metric at the best evaluation (with `smooth`, its mean with the one before), None before the first.
        step: optimizer steps done then.
    """

    def __init__(
        self, config: ResetConfig, *, storage: Literal["device", "cpu"] = "cpu", path: str | Path | None = None
    ) -> None:
        self.config = config
        # All evaluations compare, whatever resets do.
        self._rule = replace(config, probability=0.0, policy="bernoulli", patience=0, anchor="best")
        self.storage: Literal["device", "cpu"] = storage
        self.path = path
        self.store: AnchorStore | None = None
        self.best: float | None = None
        self.step: int | None = None
        self._seen = ResetState()  # of the evaluations, beside `best` and `step`
        self._file: Path | None = None
        self._watch: MetricWatch | None = None  # only while training
        self._trained: TrainedParameters | None = None

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """For a moment, the live weights are the best ones.

        Raises:
            MetricError: no evaluation gave a finite value of the metric.
        """
        if self.store is None or not self.store.is_set:
            raise MetricError(
                "No evaluation gave a finite metric, so there are no best weights. Evaluate at least once during "
                "training (`eval_strategy`, `eval_steps`)."
            )
        with self.store.swapped():
            yield

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """Make room, and take the file up again when a run is resumed."""
        self._watch = MetricWatch.of(self.config, args)
        self.store = self._new_store(kwargs["model"], kwargs["optimizer"])
        self._trained = TrainedParameters(kwargs["model"])
        self.best = self.step = self._file = file = None
        self._seen = ResetState()
        if self.path is not None:
            file = Path(f"{self.path}.rank{args.process_index}" if self.store.layout == "flat" else self.path)
            self._file = file if self.store.layout != "whole" or args.should_save else None
        # A best from after the checkpoint is met again by the resumed run, at the same step with the same value.
        if state.global_step > 0 and file is not None and file.exists():
            kept = self.store.load(file)
            self.best, self.step = kept["best"], kept["step"]
            self._seen = ResetState(anchor_metric=kept.get("value", self.best), anchor_before=kept.get("before"))
        logged = [record for record in state.log_history if self._watch.key in record]
        if state.global_step > 0 and logged:
            value, step = self._watch.value_in(logged[-1]), logged[-1]["step"]
            assert value is not None  # its key is there
            self._seen = replace(self._seen, values=(value,), evaluated_step=step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Unpack[HookKeywords],
    ) -> None:
        """Copy the weights if they are a new best."""
        if self._watch is None or self.store is None or metrics is None or not is_scheduled():
            return
        self._watch.agree(metrics, args)  # before a save that takes all ranks
        value = self._watch.value_in(metrics)
        if value is None:
            return
        resets = resets_of(state)
        last = None if resets is None else resets.reset_state.last_reset_step
        seen = replace(self._seen, best=self.best, values=self._seen.values[-1:], last_reset_step=last)
        greater = self._watch.greater_is_better
        self._seen, is_new = observe(self._rule, seen, value, state.global_step, greater_is_better=greater)
        if not is_new:
            return
        self.best, self.step = self._seen.best, state.global_step
        if self._trained is not None and self._trained.changes(kwargs["model"]):
            self.store = self._new_store(kwargs["model"], kwargs["optimizer"])
        self.store.snapshot()
        if self._file is not None:
            kept = {"value": self._seen.anchor_metric, "before": self._seen.anchor_before}
            self.store.save(self._file, {"best": self.best, "step": self.step, **kept})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Evaluations after training are not taken in."""
        self._watch = self._trained = None

    def _new_store(self, model: nn.Module, optimizer: Optimizer) -> AnchorStore:
        return AnchorStore(model, optimizer, scope="all", optimizer_state="keep", storage=self.storage)
