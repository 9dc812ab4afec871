"""Row numbers through a Trainer's own data path: into its data loaders, and out of each batch before the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hf_reset.rows.identity import ROW_KEY, Batch, NumberedRows, NumberingCollator, pop_rows, why_unnumbered

_Base = Trainer if TYPE_CHECKING else object


class NumberedBatchesMixin(_Base):
    """Numbers the rows of the training set, and of evaluation sets where asked, in front of any Trainer.

    Overrides these of Trainer's private hooks: `_get_dataloader`, the one place through which all its loaders
    come, and TRL's `_prepare_dataset`, which may shuffle the rows and drop some.

    Attributes:
        batch_rows: (B,) of int64, which rows of its set the batch at work is; None where they are not numbered.
        numbers_eval_rows: whether to number the rows of evaluation sets as well.
    """

    batch_rows: Tensor | None = None
    numbers_eval_rows: bool = False
    _given_numbers: NDArray[np.int64] | None = None  # of each row of the training set that TRL prepared
    _given_rows: int | None = None  # how many there were

    def wants_rows(self, args: TrainingArguments) -> bool:
        """Whether a run with these arguments has a use for the rows of its training set."""
        return False

    def why_unnumbered(self) -> str | None:
        """Why the rows of the training set cannot be numbered, in words; None where they can."""
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if getattr(parallel, "sp_enabled", False) or getattr(parallel, "cp_enabled", False):
            return "sequences are dealt out to several processes, so that none has a row's whole output"
        return why_unnumbered(self.train_dataset, self.data_collator, self.args)

    @property
    def num_train_rows(self) -> int:
        """N, the rows of the training set as given."""
        return self._given_rows if self._given_rows is not None else len(self.train_dataset)  # pyright: ignore[reportArgumentType]

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's, with the batch's row numbers in `batch_rows`."""
        self.batch_rows = pop_rows(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As Trainer's, with the batch's row numbers in `batch_rows`."""
        self.batch_rows = pop_rows(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        """As Trainer's, of numbered rows where they are wanted. The sampler is made for the data set itself."""
        wanted = self.wants_rows(self.args) and self.why_unnumbered() is None if is_training else self.numbers_eval_rows
        if not wanted or why_unnumbered(dataset, self.data_collator, self.args) is not None:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        own = self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset, collator = self._remove_unused_columns(dataset, description=description), own
        else:
            collator = self._get_collator_with_removed_columns(own, description=description)
        view = NumberedRows(dataset, self._given_numbers if is_training else None)

        def sampler_of_dataset(numbered: Any) -> Any:
            return None if sampler_fn is None else sampler_fn(numbered.dataset)

        self.data_collator = NumberingCollator(collator)
        try:
            return super()._get_dataloader(
                view, description, batch_size, sampler_of_dataset, is_training, dataloader_key
            )
        finally:
            self.data_collator = own

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As SFTTrainer's; afterwards it is known which of the given rows each row of the training set is."""
        prepare: Any = super()._prepare_dataset  # pyright: ignore[reportAttributeAccessIssue]
        given = dict(
            zip(("processing_class", "args", "packing", "formatting_func", "dataset_name"), args, strict=False)
        )
        given |= kwargs
        wanted = given["dataset_name"] == "train" and self.wants_rows(given["args"])
        if not wanted or not isinstance(dataset, datasets.Dataset):
            return prepare(dataset, *args, **kwargs)
        rows = len(dataset)
        prepared = prepare(dataset.add_column(ROW_KEY, np.arange(rows)), *args, **kwargs)
        if ROW_KEY not in prepared.column_names:  # packing kept no columns of single rows
            return prepared
        self._given_rows, self._given_numbers = rows, np.asarray(prepared[ROW_KEY])
        return prepared.remove_columns(ROW_KEY)
