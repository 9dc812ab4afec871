"""The functions of `hf_reset.metrics.functions` as `evaluate.Metric` modules.

They need no network: `evaluate.load("accuracy")` fetches a script from the hub, `Accuracy()` is the script.
Nor, unlike modules in general, any file: predictions are kept in memory, so that processes cannot meet in
the cache directory, and a home directory that is read-only does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, Value

from hf_reset.metrics.functions import accuracy, label_memory, macro_f1

_INPUTS = """
Args:
    predictions: class numbers, one a row.
    references: class numbers, one a row.
"""


class _InMemory(evaluate.Metric):
    """Keeps what is added in memory, unless several processes are to be gathered through files."""

    def __init__(self, config_name: str | None = None, **options: Any) -> None:
        options.setdefault("keep_in_memory", options.get("num_process", 1) == 1)
        super().__init__(config_name, **options)

    def _build_data_dir(self) -> str:
        return "" if self.keep_in_memory else super()._build_data_dir()


def _describe(description: str, inputs: str, *columns: str) -> evaluate.MetricInfo:
    features = Features({column: Value("int64") for column in columns})
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=inputs, features=features, format="numpy"
    )


class Accuracy(_InMemory):
    """`accuracy`: the share of predictions equal to the reference.

    Example:
        >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])
        {'accuracy': 0.6666666666666666}
    """

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Share of correct predictions.", _INPUTS, "predictions", "references")

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, predictions: Sequence[int], references: Sequence[int]
    ) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, references)}


class MacroF1(_InMemory):
    """`macro_f1`: the mean of the classes' F1.

    Example:
        >>> MacroF1().compute(predictions=[0, 1, 1], references=[0, 1, 0])
        {'macro_f1': 0.6666666666666666}
    """

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Mean of the classes' F1.", _INPUTS, "predictions", "references")

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, predictions: Sequence[int], references: Sequence[int]
    ) -> dict[str, float]:
        return {"macro_f1": macro_f1(predictions, references)}


class LabelMemory(_InMemory):
    """`memory/wrong`, `memory/clean`, `memory/other`: what is predicted for the mislabelled rows.

    Example:
        >>> LabelMemory().compute(predictions=[0, 1, 1], references=[0, 1, 2], clean_labels=[0, 0, 1])
        {'memory/wrong': 0.5, 'memory/clean': 0.5, 'memory/other': 0.0}
    """

    def _info(self) -> evaluate.MetricInfo:
        inputs = _INPUTS + "    clean_labels: the true class numbers, where `references` are those given.\n"
        columns = ("predictions", "references", "clean_labels")
        return _describe("Shares of mislabelled rows by what is predicted for them.", inputs, *columns)

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, predictions: Sequence[int], references: Sequence[int], clean_labels: Sequence[int]
    ) -> dict[str, float]:
        return label_memory(predictions, references, clean_labels)
