"""Which row of the training set each example of a batch is: numbers that travel beside the examples.

`NumberedRows` hands out each example with its number, `NumberingCollator` takes the numbers off before the
user's own collator sees the examples, and puts them into the batch as one tensor more, `ROW_KEY`; `pop_rows`
takes it out before the model sees the batch. Sampler, order, workers and random numbers are untouched, so the
batches are those of a run without numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from hf_reset.errors import DataError, UnsupportedError

ROW_KEY = "reset_row"
"""Where a batch holds the numbers of its rows, (B,) of int64."""

Batch: TypeAlias = dict[str, Any]
"""What a collator makes and a model takes: tensors by name, and whatever else the data brings along."""

Collator: TypeAlias = Callable[[list[Any]], Batch]
"""Makes a batch of examples, whatever these are."""


class NumberedExample(NamedTuple):
    """An example on its way to the collator. No mapping, so that whatever drops columns passes it by."""

    number: int
    example: object


class MapStyle(Protocol):
    """A data set with a length and integer indices: `datasets.Dataset`, a torch `Dataset`, a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


class NumberedRows(Dataset[NumberedExample]):
    """A view of a map-style data set whose items know their index.

    Args:
        dataset: anything with a length and integer indices: `datasets.Dataset`, a torch `Dataset`, a list.
        numbers: (len(dataset),), the number of each item, where it is not its index: preparation may have
            shuffled the rows or dropped some.

    Raises:
        DataError: `numbers` of another length than the data set.
    """

    def __init__(self, dataset: MapStyle, numbers: Sequence[int] | NDArray[np.int64] | None = None) -> None:
        if numbers is not None and len(numbers) != len(dataset):
            raise DataError(f"`numbers` must number each of {len(dataset)} rows, got {len(numbers)}.")
        self.dataset = dataset
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> NumberedExample:
        return NumberedExample(self._number(index), self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[NumberedExample]:
        """As torch's loader asks for a whole batch; in one go where the data set can."""
        fetch = getattr(self.dataset, "__getitems__", None)
        examples = fetch(indices) if fetch is not None else [self.dataset[index] for index in indices]
        return [NumberedExample(self._number(index), example) for index, example in zip(indices, examples, strict=True)]

    def __getattr__(self, name: str) -> Any:
        # `set_epoch`, `column_names` and whatever else a user's data set has. Not before there is one (unpickling).
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def _number(self, index: int) -> int:
        index = int(index) % len(self.dataset)  # negative indices too
        return index if self.numbers is None else int(self.numbers[index])


class NumberingCollator:
    """The user's collator on examples without their numbers, and the numbers into the batch.

    Args:
        collator: makes a mapping of a list of examples.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, items: list[NumberedExample]) -> Batch:
        """A batch with `ROW_KEY`.

        Raises:
            UnsupportedError: the collator makes no mapping.
            DataError: the batch has an entry of that name already.
        """
        batch = self.collator([item.example for item in items])
        if not isinstance(batch, Mapping):
            raise UnsupportedError(
                f"Rows are numbered in batches that are mappings, and the collator made a {type(batch).__name__}. "
                "Have it return a dict, or turn off what needs rows."
            )
        if ROW_KEY in batch:
            raise DataError(f"{ROW_KEY!r} is where a batch holds its row numbers. Rename that column of your data.")
        if not isinstance(batch, MutableMapping):
            batch = dict(batch)
        batch[ROW_KEY] = torch.tensor([item.number for item in items], dtype=torch.int64)
        return batch


def pop_rows(inputs: Batch) -> Tensor | None:
    """Take the row numbers (B,) out of a batch, in place; None where it has none."""
    return inputs.pop(ROW_KEY, None)


def why_unnumbered(dataset: object, collator: object, args: object) -> str | None:
    """Why the rows of a data set cannot be numbered, in words; None where they can.

    Args:
        dataset: the training set as the Trainer has it.
        collator: the Trainer's `data_collator`.
        args: the training arguments; `packing` and `padding_free` are TRL's.
    """
    if dataset is None:
        return "there is no training set"
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return f"the training set is a {type(dataset).__name__}, which is streamed: its rows have no index"
    if getattr(args, "packing", False):
        return "`packing` puts several rows into one sequence"
    flattens = type(collator).__name__ == "DataCollatorWithFlattening" or getattr(collator, "padding_free", False)
    if flattens or getattr(args, "padding_free", False):
        return "the collator is padding-free: it joins the rows of a batch into one sequence"
    return None


def refuse_unnumbered(what: str, reason: str) -> None:
    """Refuse what needs rows, for a reason of `why_unnumbered`.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        f"{what} needs to know the rows of the training set, and {reason}. Give a map-style data set (with a length "
        f"and indices) and a collator that keeps one row an example, or turn it off."
    )
