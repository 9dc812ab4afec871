"""A callback that watches what a run memorises, and changes nothing of it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from hf_reset.anchor.scopes import unwrapped
from hf_reset.diagnostics.modes import evaluation_mode, generators_kept
from hf_reset.errors import DataError, refuse_below_one
from hf_reset.metrics.functions import label_memory

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Unpack

    from hf_reset.rows.identity import Collator
    from hf_reset.training.hooks import HookKeywords

_LABEL_COLUMNS = ("labels", "label")
_NEEDED = ("clean_label", "is_mislabelled")


class LabelMemoryCallback(TrainerCallback):
    """Every k optimizer steps, see what the model predicts for training rows whose label is wrong.

    Writes to `state.log_history` a record with `step`, `epoch` and the shares of `label_memory`:
    "memory/wrong" (the wrong label given in training), "memory/clean" (the true one), "memory/other". A callback cannot
    reach `Trainer.log`, so reporters such as TensorBoard do not get them; the history is saved with checkpoints.

    The training goes on bit for bit as without it: predictions are made in evaluation mode without gradients, each
    module's mode is put back, and random generators are left as they were. Under a distributed run each rank
    predicts the same sample, so the histories agree, and sharded models can gather their weights together.

    Args:
        dataset: The tokenized training rows, mislabelled or not, with `labels` or `label` as given in training,
            `clean_label` and `is_mislabelled` (as `corrupt_labels` adds them). Columns that the model does not
            take are left out.
        every: k, in optimizer steps.
        sample: Number of mislabelled rows to watch; all of them where there are fewer.
        seed: Selects the sample, which stays the same for the run and after a resume.
        data_collator: Makes a batch of rows; called once for each batch, when training begins. Default: pads with the
            Trainer's tokenizer, or stacks where it has none.
        batch_size: Rows predicted at once.

    Raises:
        ConfigError: `every`, `sample` or `batch_size` is below 1.
        DataError: A column is missing, or no row is mislabelled.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        every: int = 50,
        sample: int = 256,
        seed: int = 0,
        data_collator: Collator | None = None,
        batch_size: int = 64,
    ) -> None:
        refuse_below_one(every=every, sample=sample, batch_size=batch_size)
        self.every = every
        self.batch_size = batch_size
        self.data_collator = data_collator
        self.rows = _sample_mislabelled(dataset, sample, seed)
        label = next(name for name in _LABEL_COLUMNS if name in self.rows.column_names)
        plain = self.rows.select_columns([label, "clean_label"]).with_format(None)[:]
        self._given, self._clean = plain[label], plain["clean_label"]
        self._batches: list[dict[str, Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """Make the batches once."""
        collate = self.data_collator or default_collator_of(kwargs.get("processing_class"))
        accepted = accepted_columns(kwargs["model"], self.rows.column_names)
        whole = self.rows.select_columns(accepted).with_format(None).to_list()
        starts = range(0, len(whole), self.batch_size)
        with generators_kept(args.device):
            batches = [collate(whole[start : start + self.batch_size]) for start in starts]
        self._batches = [{k: v for k, v in batch.items() if isinstance(v, Tensor)} for batch in batches]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """Predict and record, where the step is one of every k."""
        if state.global_step % self.every == 0:
            predictions = self._predict(kwargs["model"], args.device)
            record = label_memory(predictions, self._given, self._clean)
            state.log_history.append({**record, "epoch": state.epoch, "step": state.global_step})

    def _predict(self, model: nn.Module, device: torch.device) -> list[int]:
        predictions: list[int] = []
        with evaluation_mode(model), generators_kept(device):
            for batch in self._batches:
                outputs = model(**{name: tensor.to(device) for name, tensor in batch.items()})
                logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
                predictions += logits.argmax(dim=-1).tolist()
        return predictions


def _sample_mislabelled(dataset: Dataset, sample: int, seed: int) -> Dataset:
    """A fixed sample of the mislabelled rows, in their order."""
    absent = [name for name in _NEEDED if name not in dataset.column_names]
    if not any(name in dataset.column_names for name in _LABEL_COLUMNS):
        absent.append("labels")
    if absent:
        raise DataError(
            f"`dataset` lacks the column {', '.join(absent)}; it has {', '.join(dataset.column_names)}. Corrupt the "
            "labels with `noise.corrupt_labels`, or give the true ones as `clean_label`, before tokenizing."
        )
    flags = dataset.select_columns("is_mislabelled").with_format("numpy")[:]["is_mislabelled"]
    mislabelled = np.flatnonzero(flags)
    if not mislabelled.size:
        raise DataError(
            f"None of the {len(dataset)} rows of `dataset` is mislabelled: there is no memory of wrong labels to "
            "watch. Pass training rows with noise, or leave the callback out."
        )
    chosen = np.random.default_rng(seed).permutation(mislabelled)[:sample]
    return dataset.select(np.sort(chosen))


def default_collator_of(processing_class: Any) -> Collator:
    """Pads with the Trainer's tokenizer, or stacks where it has none."""
    has_padding = hasattr(processing_class, "pad")
    return DataCollatorWithPadding(processing_class) if has_padding else default_data_collator


def accepted_columns(model: nn.Module, columns: Sequence[str]) -> list[str]:
    """The columns that the model's forward names, without labels (no loss is wanted)."""
    inner: Any = unwrapped(model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    named = inspect.signature(base.forward).parameters
    accepted = [name for name in columns if name in named and name not in (*_LABEL_COLUMNS, "label_ids")]
    if not accepted:
        raise DataError(
            f"`dataset` has no column that the model takes: it has {', '.join(columns)}, the model takes "
            f"{', '.join(named)}. Tokenize it as the training set is."
        )
    return accepted
