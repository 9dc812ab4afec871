"""Wrong labels in a file of texts: a classifier is fine-tuned with resets on the file's own labels, and judges them.

A row that was trained on is judged by what was predicted for it before each visit's own update, a row held out for
validation by what was predicted for it at each evaluation: either way by the mean over its visits. The first learns
from its own label between visits, which resets take back, and the second never does; `in_training` tells them apart.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_reset.errors import ConfigError, DataError, WeakEvidenceWarning
from hf_reset.metrics.evaluation import MINIMUM_ROWS
from hf_reset.study.columns import Label, label_values
from hf_reset.study.splits import load_file

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

    from hf_reset.rows.confident import NoiseEstimate
    from hf_reset.rows.memory import RowMemory
    from hf_reset.training.trainer import ResetTrainer

_NONE = -100  # a row without a label, in all of `hf_reset.rows`
_VISITS = 10  # of each row, where no number of steps is given
_EVALUATIONS = 40  # of a run; an excursion is two of them long on average
_HELD_OUT = 0.15  # of each class


@dataclass(frozen=True)
class Search:
    """How wrong labels are looked for.

    Args:
        text_column: of the file.
        label_column: of the file: class names, or integers.
        model: name on the hub or local directory; None: a small ModernBERT, untrained, with a tokenizer trained on the
            texts.
        noise_rate: at most this share of the rows is flagged, in [0, 1]; None: the share is estimated class by class.
        budget: at most this many rows are flagged; None: no limit.
        steps: optimizer steps; None: about ten visits of each row, and at least 100 steps.
        learning_rate: constant; None: 1e-3 for the small model, 5e-5 for a named one.
        batch_size: rows a step.
        max_length: tokens to which texts are cut.
        vocab_size: tokens of the tokenizer that is trained.
        seed: of the rows held out, new weights, the order of rows, and resets.
    """

    text_column: str = "text"
    label_column: str = "label"
    model: str | None = None
    noise_rate: float | None = None
    budget: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 16
    max_length: int = 128
    vocab_size: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_length", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` must be at least 1, got {value}.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"`learning_rate` must be above 0, got {self.learning_rate}.")
        if self.noise_rate is not None and not 0 <= self.noise_rate <= 1:
            raise ConfigError(f"`noise_rate` must be in [0, 1], the share of wrong labels, got {self.noise_rate}.")
        if self.budget is not None and self.budget < 0:
            raise ConfigError(f"`budget` must be a number of rows to review, 0 or more, got {self.budget}.")


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """The N rows of a file.

    Attributes:
        texts: (N,), None where there is none.
        labels: (N,), class numbers; −100 where there is no label or no text: that row is left out.
        names: of the K classes.
        notes: what was left out, in sentences.
    """

    texts: list[str | None]
    labels: NDArray[np.int64]
    names: list[str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Findings:
    """What a run says of a file's labels.

    Attributes:
        table: that of `hf_reset.rows.find_suspects`, indexed by the file's row (0 is the first), with `text`,
            `given_class` and `predicted_class` besides.
        names: of the K classes.
        noise: estimated rates, and what is taken for what.
        notes: what was left out, in sentences.
        run: what was run: model, steps, resets, the best step, and rows held out.
    """

    table: pd.DataFrame
    names: list[str]
    noise: NoiseEstimate
    notes: list[str]
    run: Mapping[str, object]


def find_errors(data: str | Path, search: Search | None = None) -> Findings:
    """Fine-tune a classifier with resets on a file's own labels, and rank its rows by how wrong their label looks.

    15 % of each class are held out to choose the anchors by, by their calibrated loss, and are judged too. One run.

    Args:
        data: a csv, tsv, json, jsonl or parquet file, or one of these gzipped.
        search: how to look; None: as its defaults say.

    Raises:
        DataError: no such file or column, labels that are no classes, one class, fewer than two rows a class, or too
            few rows to hold some out.
        ConfigError: the model cannot be loaded, or does not fit.
    """
    search = search or Search()
    rows = read_texts(load_file(data, argument="DATA"), search)
    return judge(rows, search)


def read_texts(raw: Dataset, search: Search) -> LabelledTexts:
    """Texts and class numbers by the names of their columns; rows without a text or a label are noted.

    Raises:
        DataError: see `find_errors`.
    """
    for argument, column in (("text_column", search.text_column), ("label_column", search.label_column)):
        if column not in raw.column_names:
            known = ", ".join(map(repr, raw.column_names))
            raise DataError(f"`{argument}` is {column!r}, which the file does not have. Name one of {known}.")
    texts = [_text_of(value, row, search.text_column) for row, value in enumerate(raw[search.text_column])]
    given = label_values(raw, search.label_column, "label_column", "train")
    notes = _notes({"text": (search.text_column, texts), "label": (search.label_column, given)})
    kept = [row for row in range(len(raw)) if texts[row] is not None and given[row] is not None]
    classes: list[Label] = sorted({label for row in kept if (label := given[row]) is not None})  # pyright: ignore[reportAssignmentType]
    _check_classes(classes, len(kept), search.label_column)
    number = {name: index for index, name in enumerate(classes)}
    labels = np.full(len(raw), _NONE, dtype=np.int64)
    labels[kept] = [number[label] for row in kept if (label := given[row]) is not None]
    return LabelledTexts(texts, labels, [str(name) for name in classes], notes)


def hold_out(labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Which rows are held out: 15 % of each class, rounded, so that none is without rows to learn from. Shape (N,).

    Raises:
        DataError: that is no row, or fewer than there are classes.
    """
    draw, held = np.random.default_rng(seed), np.zeros(len(labels), dtype=bool)
    for one in np.unique(labels[labels != _NONE]):
        rows = draw.permutation(np.flatnonzero(labels == one))
        held[rows[: round(_HELD_OUT * len(rows))]] = True
    classes = len(np.unique(labels[labels != _NONE]))
    if held.sum() < classes:
        raise DataError(
            f"{held.sum()} rows could be held out of {(labels != _NONE).sum()} in {classes} classes, fewer than "
            "classes: too few to tell when a model begins to memorise. Bring more rows, or join small classes."
        )
    return held


def judge(rows: LabelledTexts, search: Search) -> Findings:
    """Train, and gather what was predicted for every row of the file."""
    from hf_reset.rows.confident import estimate_noise
    from hf_reset.rows.memory import RowMemory
    from hf_reset.rows.suspects import find_suspects

    held = hold_out(rows.labels, search.seed)
    held_rows, train_rows = np.flatnonzero(held), np.flatnonzero(~held & (rows.labels != _NONE))
    evaluated = RowMemory(len(held_rows), len(rows.names))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", WeakEvidenceWarning)  # said in the notes
        trainer = _trainer(rows, train_rows, held_rows, evaluated, search, folder)
        trainer.train()
    trained: Any = trainer.row_memory
    if trained is None or not trained.keeps_probabilities:
        raise DataError(
            f"{len(train_rows)} rows of {len(rows.names)} classes are too many to keep what was predicted for each. "
            "Split the file, or join classes."
        )
    parts = [(train_rows, trained), (held_rows, evaluated)]
    kept = {name: _in_file(len(rows.labels), parts, name) for name in ("probabilities", "margins", "mean_loss")}
    counts = {name: _in_file(len(rows.labels), parts, name).astype(int) for name in ("visits", "wrong_events")}
    table = find_suspects(
        kept["probabilities"],
        rows.labels,
        noise_rate=search.noise_rate,
        budget=search.budget,
        margins=kept["margins"],
        mean_loss=kept["mean_loss"],
        **counts,
        in_training=np.isin(np.arange(len(held)), train_rows),
    )
    noise = estimate_noise(kept["probabilities"], rows.labels)
    notes = [*rows.notes, *_weak_evidence(len(held_rows))]
    return Findings(_named(table, rows), rows.names, noise, notes, _account(trainer, search, len(held_rows)))


def _weak_evidence(held_out: int) -> list[str]:
    if held_out >= MINIMUM_ROWS:
        return []
    return [f"The anchors rest on {held_out} rows held out, fewer than {MINIMUM_ROWS}: weak evidence."]


def _trainer(
    rows: LabelledTexts,
    train_rows: NDArray[np.int64],
    held_rows: NDArray[np.int64],
    evaluated: RowMemory,
    search: Search,
    folder: str,
) -> ResetTrainer:
    """A `ResetTrainer` whose evaluations go into a memory of the held-out rows."""
    import torch
    from transformers import DataCollatorWithPadding, PrinterCallback, set_seed

    from hf_reset.study.runs import quiet_unless_terminal
    from hf_reset.training.arguments import ResetTrainingArguments
    from hf_reset.training.trainer import ResetTrainer

    set_seed(search.seed)
    pin = torch.accelerator.is_available()  # torch warns of pinning without one
    args = ResetTrainingArguments(output_dir=folder, dataloader_pin_memory=pin, **_training(len(train_rows), search))
    callbacks = quiet_unless_terminal(args)
    model, tokenizer = _model_and_tokenizer([rows.texts[row] or "" for row in train_rows], rows.names, search)

    def remember(prediction: EvalPrediction) -> dict[str, float]:
        first: Any = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        logits, labels = torch.as_tensor(first), torch.as_tensor(prediction.label_ids)
        evaluated.update(torch.arange(len(logits)), logits, labels)
        evaluated.share()
        return {"accuracy": float((logits.argmax(dim=1) == labels).float().mean())}

    trainer = ResetTrainer(
        model=model,
        args=args,
        train_dataset=_tokens(rows, train_rows, tokenizer, search.max_length),
        eval_dataset=_tokens(rows, held_rows, tokenizer, search.max_length),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=remember,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training(train_rows: int, search: Search) -> dict[str, Any]:
    steps = search.steps or max(100, math.ceil(_VISITS * train_rows / search.batch_size))
    interval = max(1, steps // _EVALUATIONS)
    return {
        "max_steps": steps,
        "per_device_train_batch_size": search.batch_size,
        "per_device_eval_batch_size": 64,
        "learning_rate": search.learning_rate or (1e-3 if search.model is None else 5e-5),
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "eval_steps": interval,
        "logging_steps": interval,
        "save_strategy": "no",
        "report_to": "none",
        "seed": search.seed,
        "reset_metric": "eval_calibrated_loss",
        "reset_probability": 1 / (2 * interval),
    }


def _model_and_tokenizer(
    texts: list[str], names: list[str], search: Search
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForSequenceClassification

    from hf_reset.corpora.small_modernbert import small_modernbert
    from hf_reset.corpora.tokenizers import train_tokenizer
    from hf_reset.study.models import load_pretrained, load_tokenizer

    labels: dict[str, Any] = {"num_labels": len(names), "id2label": dict(enumerate(names))}
    labels["label2id"] = {name: index for index, name in enumerate(names)}
    if search.model is None:
        tokenizer = train_tokenizer(texts, search.vocab_size)
        return small_modernbert(tokenizer, labels, positions=search.max_length), tokenizer
    tokenizer = load_tokenizer(search.model, argument="model")
    load = AutoModelForSequenceClassification.from_pretrained
    # A head of other classes is replaced.
    model = load_pretrained(load, search.model, argument="model", ignore_mismatched_sizes=True, **labels)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.problem_type = None
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and search.max_length > positions:
        raise ConfigError(f"`max_length` is {search.max_length}, and the model has {positions} positions. Give less.")
    return model, tokenizer


def _tokens(
    rows: LabelledTexts, chosen: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    from datasets import Dataset

    tokens = tokenizer([rows.texts[row] or "" for row in chosen], truncation=True, max_length=max_length)
    return Dataset.from_dict({**tokens, "label": rows.labels[chosen].tolist()})


def _in_file(count: int, parts: list[tuple[NDArray[np.int64], RowMemory]], name: str) -> np.ndarray:
    """What memories keep of their rows, at the file's rows: NaN in rows that none has (visits: 0)."""
    made: np.ndarray | None = None
    for rows, memory in parts:
        values = (memory.total.mean("loss") if name == "mean_loss" else getattr(memory, name)).numpy()
        if made is None:
            made = np.full((count, *values.shape[1:]), np.nan if values.dtype.kind == "f" else 0, dtype=values.dtype)
        made[rows] = values
    assert made is not None
    return made


def _named(table: pd.DataFrame, rows: LabelledTexts) -> pd.DataFrame:
    """The table with class names and texts in front of what is measured."""
    named = table.copy()
    for place, column in enumerate(("given", "predicted"), start=4):
        classes = [None if label == _NONE else rows.names[label] for label in table[f"{column}_label"]]
        named.insert(place, f"{column}_class", classes)
    named.insert(0, "text", rows.texts)
    return named


def _account(trainer: ResetTrainer, search: Search, held_out: int) -> dict[str, object]:
    callback = trainer.reset_callback
    assert callback is not None
    moves = [event["step"] for event in callback.events if event["kind"] == "anchor"]
    return {
        "model": search.model or "a small ModernBERT, untrained",
        "steps": trainer.state.global_step,
        "resets": callback.reset_state.resets,
        "best_step": moves[-1] if moves else None,
        "held_out": held_out,
    }


def _text_of(value: object, row: int, column: str) -> str | None:
    """The text, None where it is missing or blank."""
    if value is not None and not isinstance(value, str):
        if value != value:  # NaN is how readers write a gap
            return None
        raise DataError(
            f"`text_column` {column!r} must hold strings, got {value!r} ({type(value).__name__}) in row {row}. Name "
            "the column that holds the text."
        )
    return value if value and value.strip() else None


def _notes(columns: Mapping[str, tuple[str, Sequence[object]]]) -> list[str]:
    notes = []
    for kind, (column, values) in columns.items():
        gaps = [row for row, value in enumerate(values) if value is None]
        if gaps:
            shown = ", ".join(map(str, gaps[:10])) + (", …" if len(gaps) > 10 else "")
            notes.append(f"{len(gaps)} rows have no {kind} in {column!r} and were left out: {shown}.")
    return notes


def _check_classes(classes: list[Label], rows: int, column: str) -> None:
    if rows == 0:
        raise DataError(f"no row has both a text and a label in {column!r}. Name other columns.")
    if len(classes) < 2:
        raise DataError(f"`label_column` {column!r} has the one class {classes[0]!r}. Name a column with at least two.")
    if 2 * len(classes) > rows:
        raise DataError(
            f"`label_column` {column!r} has {len(classes)} classes in {rows} rows, and at least two rows a class are "
            "needed to hold a label against others. Name the column of the classes, or join small ones."
        )
