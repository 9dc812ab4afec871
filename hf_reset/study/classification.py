"""Text-classification data as a study of wrong labels needs it: checked, split, corrupted, and accounted for.

Every row dropped and every row added to a split is counted in words, for the report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import ClassLabel, Dataset, concatenate_datasets
from scipy.special import log_softmax

from hf_reset.errors import ConfigError, DataError
from hf_reset.noise.labels import NoiseKind, corrupt_labels
from hf_reset.study.columns import Columns, Label, read_rows
from hf_reset.study.splits import refuse_same_rows, take_split

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from hf_reset.training.arguments import ResetTrainingArguments
    from hf_reset.training.best_weights import BestWeightsCallback

_MISSING = -1  # a clean label that nobody gave


@dataclass(frozen=True)
class ClassificationData:
    """Splits with columns `text`, `text_pair` (if asked for), `label`, `clean_label`, `is_mislabelled`.

    Attributes:
        train: rows with noisy labels, numbered 0 … K − 1; `clean_label` is −1 where it is not known.
        validation: rows whose `label` chooses anchors: noisy like training's, or trusted.
        test: rows with true labels (as true as the data says).
        names: the K classes' names.
        notes: what was dropped, carved out or added, in sentences.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    names: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def mislabelled(self) -> np.ndarray:
        """Indices of the training rows whose label is known to be wrong, shape (M,)."""
        return np.flatnonzero(np.asarray(self.train["is_mislabelled"], dtype=bool))

    def counts(self) -> dict[str, int | float | None]:
        """What a record tells of the data."""
        sizes = {"train_rows": len(self.train), "test_rows": len(self.test), "train_mislabelled": len(self.mislabelled)}
        return {"validation_labels_right": self.validation_labels_right, **sizes}

    def tokens(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Dataset]:
        """Token columns in place of the texts, by split; the Trainer leaves out those that the model does not take.

        Args:
            tokenizer: the model's.
            max_length: tokens to which texts are cut.
        """
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: _tokenized(rows, tokenizer, max_length) for name, rows in splits.items()}

    @property
    def validation_labels_right(self) -> float | None:
        """Share of the validation labels that are right, of those whose clean label is known; None for none."""
        known = [label for label in self.validation["clean_label"] if label != _MISSING]
        return 1 - sum(self.validation["is_mislabelled"]) / len(known) if known else None


def parse_matrix(text: str | None) -> Sequence[Sequence[float]] | None:
    """The rows of a noise matrix that was given as JSON.

    Raises:
        ConfigError: it is no JSON.
    """
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"`noise_matrix` {text!r} must be rows as JSON: {error}.") from error


def settle_metric(training: ResetTrainingArguments) -> None:
    """Name what chooses anchors and the best weights, in all arms alike: of a study that refines, the calibrated loss.

    Args:
        training: the study's arguments; `reset_metric` is set where nobody named a metric and `reset_refine` is on.

    Raises:
        ConfigError: it is a figure on clean labels, which is only there to be looked at.
    """
    if training.reset_metric is None and training.metric_for_best_model is None and training.reset_refine != "off":
        training.reset_metric = "eval_calibrated_loss"
    if "clean" in (training.reset_metric or training.metric_for_best_model or ""):
        raise ConfigError(
            "`reset_metric` would choose anchors by clean labels. If there are some to trust, name their column with "
            "--validation_label_column; the report then says so."
        )


def watch_memory(train: Dataset, args: TrainingArguments, samples: int) -> list[TrainerCallback]:
    """Follow label memory as often as validation is evaluated, on a fixed sample of mislabelled rows, if there are any.

    Args:
        train: tokens of the training rows.
        args: of the run.
        samples: most rows to follow; 0 for none.
    """
    from hf_reset.diagnostics.label_memory import LabelMemoryCallback

    if samples < 1 or not any(train["is_mislabelled"]):
        return []
    every = int(args.eval_steps or 0) if args.eval_strategy == "steps" else 0
    return [LabelMemoryCallback(train, every=every or 50, sample=samples, batch_size=args.per_device_eval_batch_size)]


def validation_metrics(data: ClassificationData) -> Callable[[EvalPrediction], dict[str, float]]:
    """Accuracy on the validation labels, and, to be looked at only, on the clean ones behind them.

    Validation rows come in order, so the clean labels need not pass through the model. They choose nothing.
    """
    clean = np.asarray(data.validation["clean_label"])

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        classes = predicted_classes(prediction.predictions)
        metrics = {"accuracy": float((classes == prediction.label_ids).mean())}
        if len(classes) == len(clean) and (clean >= 0).all():  # not the test or training rows
            metrics["clean_accuracy"] = float((classes == clean).mean())
        return metrics

    return compute


def paired_gain(last: np.ndarray, best: np.ndarray, labels: Sequence[int]) -> dict[str, float | int | None]:
    """What the best evaluation gained over the last step on the same validation rows, and its paired standard error.

    Args:
        last: logits of the last step's weights, shape (N, K).
        best: of the best evaluated, shape (N, K).
        labels: those of validation, shape (N,).

    Returns:
        `validation_rows`; `validation_gain`, mean cross-entropy of the last less that of the best, in nats; its
        standard error `validation_gain_error`, None for one row.
    """
    at_labels = (np.arange(len(labels)), np.asarray(labels))
    losses = [-log_softmax(np.asarray(logits, dtype=np.float64), axis=-1)[at_labels] for logits in (last, best)]
    gains = losses[0] - losses[1]
    error = float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else None
    return {
        "validation_rows": len(gains),
        "validation_gain": float(gains.mean()),
        "validation_gain_error": error,
    }


def validation_gain(trainer: Any, best: BestWeightsCallback, rows: Dataset) -> dict[str, float | int | None]:
    """`paired_gain` of a run's best evaluated weights.

    Args:
        trainer: after training, with the last step's weights.
        best: a `BestWeightsCallback`.
        rows: tokens of the validation rows.
    """
    last = logits_of(trainer.predict(rows).predictions)
    with best.swapped():
        chosen = logits_of(trainer.predict(rows).predictions)
    return paired_gain(last, chosen, list(rows["label"]))


def predicted_classes(predictions: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    """Class numbers, shape (N,), from logits of shape (N, K), or from a tuple that begins with them."""
    return np.asarray(logits_of(predictions)).argmax(axis=-1)


def logits_of(predictions: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    """Logits (N, K), or what a tuple of predictions begins with."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def prepare_classification(
    splits: Mapping[str, Dataset],
    columns: Columns,
    *,
    noise_rate: float = 0.0,
    noise_kind: NoiseKind = "symmetric",
    noise_matrix: Sequence[Sequence[float]] | None = None,
    seed: int = 0,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    max_predict_samples: int | None = None,
) -> ClassificationData:
    """Check, split and corrupt.

    Rows without a label are dropped and counted. A validation or test split that is not given is taken from the
    training rows; noise is added to training and validation rows together, unless validation's labels are trusted.

    Args:
        splits: `train`, and optionally `validation` and `test`, as they were loaded.
        columns: which columns hold what.
        noise_rate: share of training (and validation) rows given a wrong label; 0 adds none.
        noise_kind: see `hf_reset.noise.labels.corrupt_labels`.
        noise_matrix: T[i, j] = P(noisy = j | clean = i), shape (K, K), for `noise_kind="matrix"`; it sets the rate.
        seed: of the order of rows, the splits and the noise.
        validation_fraction: share of the training rows taken for validation where none is given.
        test_fraction: share of the training rows taken for the test where none is given.
        max_train_samples: use at most so many training rows.
        max_eval_samples: likewise for validation; with none given, how many are taken.
        max_predict_samples: likewise for the test.

    Returns:
        The splits, ready to be tokenized.

    Raises:
        ConfigError: noise is asked for on top of real noise.
        DataError: a split is empty, a column missing, a label neither integer nor string, a text no string,
            there is but one class, validation has fewer rows than there are classes or (given by the user) a class
            that training lacks, or two splits share most of their rows.
    """
    added = noise_rate > 0 or noise_kind == "matrix"
    if added:
        _refuse_real_noise(columns, noise_rate, noise_kind)
    shares = {"test": (test_fraction, max_predict_samples), "validation": (validation_fraction, max_eval_samples)}
    parts, notes = _cut(splits, columns, shares, max_train_samples, seed, added=added)
    names = _class_names(parts, splits["train"].features.get(columns.label), columns)
    train, validation, test = (_numbered(rows, names) for rows in parts)
    if added:
        noise = {"kind": noise_kind, "seed": seed, "matrix": noise_matrix}
        noise["rate"] = None if noise_kind == "matrix" else noise_rate
        train, validation = _corrupt(train, validation, noise, names, columns.trusted)
    data = ClassificationData(
        _finish(train, "train"), _finish(validation, "validation"), _finish(test, "test"), list(map(str, names)), notes
    )
    _check_splits(data, columns, validation_given="validation" in splits)
    return data


def _refuse_real_noise(columns: Columns, noise_rate: float, noise_kind: NoiseKind) -> None:
    if columns.clean_label is not None:
        raise ConfigError(
            f"`noise_rate` {noise_rate} (`noise_kind` {noise_kind!r}) would add noise to the real noise of "
            f"`clean_label_column` {columns.clean_label!r}. Give one of the two."
        )


def _cut(
    splits: Mapping[str, Dataset],
    columns: Columns,
    shares: Mapping[str, tuple[float, int | None]],
    max_train_samples: int | None,
    seed: int,
    *,
    added: bool,
) -> tuple[list[Dataset], list[str]]:
    """Training, validation and test rows, and notes on what was dropped; `shares`: what to take where none is given."""
    notes: list[str] = []
    # One draw orders the rows; test, validation and training are cut from it in this order.
    train = read_rows(splits["train"], "train", columns, notes, added=added).shuffle(seed=seed)
    parts: dict[str, Dataset] = {}
    for split in ("test", "validation"):
        fraction, at_most = shares[split]
        if split in splits:
            parts[split] = _sample(read_rows(splits[split], split, columns, notes, added=added), at_most, seed)
        else:
            parts[split], train = _taken(train, split, fraction, at_most, notes)
    train = train.select(range(min(len(train), max_train_samples or len(train))))
    return [train, parts["validation"], parts["test"]], notes


def _tokenized(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    pairs = list(rows["text_pair"]) if "text_pair" in rows.column_names else None
    tokens = tokenizer(list(rows["text"]), pairs, truncation=True, max_length=max_length)
    labels = {name: list(rows[name]) for name in ("label", "clean_label", "is_mislabelled")}
    return Dataset.from_dict({**tokens, **labels})


def _taken(
    rows: Dataset, split: str, fraction: float, at_most: int | None, notes: list[str]
) -> tuple[Dataset, Dataset]:
    taken, rest = take_split(rows, split, fraction, at_most, notes)
    count = len(taken)
    labels = taken["true" if split == "test" else "chooser"]
    labelled = [index for index, label in enumerate(labels) if label is not None]
    if len(labelled) < count:
        notes.append(f"{count - len(labelled)} of these {split} rows have no label to be read by and were dropped.")
    return taken.select(labelled), rest


def _sample(rows: Dataset, count: int | None, seed: int) -> Dataset:
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=seed).select(range(count))


def _class_names(splits: Sequence[Dataset], feature: object, columns: Columns) -> list[Label]:
    """All classes that occur, sorted; those of the data set's own ClassLabel in its order."""
    train = {label for name in ("given", "true") for label in splits[0][name] if label is not None}
    found = train | {
        label for rows in splits[1:] for name in ("true", "chooser") for label in rows[name] if label is not None
    }
    if len({type(label) for label in found}) > 1:
        raise DataError(
            f"`label_column` {columns.label!r}: one column or split has integers, another strings as labels. "
            "Give the same kind everywhere."
        )
    given = {label for label in splits[0]["given"] if label is not None}
    if len(given) < 2:
        raise DataError(
            f"`label_column` {columns.label!r} has the one class {next(iter(given))!r} in training. "
            "Classification needs at least two; name another column with --label_column."
        )
    if isinstance(feature, ClassLabel) and found <= set(feature.names):
        return list(feature.names)
    return sorted(found)


def _numbered(rows: Dataset, names: Sequence[Label]) -> Dataset:
    number = {name: index for index, name in enumerate(names)}
    numbered = {
        ours: [_MISSING if value is None else number[value] for value in rows[raw]]
        for ours, raw in (("label", "given"), ("clean_label", "true"), ("chooser", "chooser"))
    }
    texts = {name: list(rows[name]) for name in ("text", "text_pair") if name in rows.column_names}
    return Dataset.from_dict({**texts, **numbered})


def _corrupt(
    train: Dataset, validation: Dataset, noise: Mapping[str, Any], names: Sequence[Label], trusted: bool
) -> tuple[Dataset, Dataset]:
    """Training and validation rows corrupted as one set, so that one noise process made both."""
    pool = concatenate_datasets([train, validation]).remove_columns(["clean_label", "chooser"])
    pool = pool.cast_column("label", ClassLabel(names=list(map(str, names))))
    if noise["kind"] == "instance":
        noise = {**noise, "text_column": [name for name in ("text", "text_pair") if name in pool.column_names]}
    labels = list(corrupt_labels(pool, **noise)["label"])
    train = _replaced(train, "label", labels[: len(train)])
    return train, validation if trusted else _replaced(validation, "chooser", labels[len(train) :])


def _replaced(rows: Dataset, column: str, values: list[int]) -> Dataset:
    return Dataset.from_dict({name: values if name == column else list(rows[name]) for name in rows.column_names})


def _finish(rows: Dataset, split: str) -> Dataset:
    """The chooser becomes the label of validation; what is known to be wrong is marked."""
    labels = list(rows["chooser"] if split == "validation" else rows["label"])
    clean = list(rows["clean_label"])
    texts = {name: list(rows[name]) for name in ("text", "text_pair") if name in rows.column_names}
    wrong = [true != _MISSING and given != true for given, true in zip(labels, clean, strict=True)]
    return Dataset.from_dict({**texts, "label": labels, "clean_label": clean, "is_mislabelled": wrong})


def _texts_of(rows: Dataset) -> list[tuple[str, ...]]:
    return list(zip(*(rows[name] for name in ("text", "text_pair") if name in rows.column_names), strict=True))


def _check_splits(data: ClassificationData, columns: Columns, *, validation_given: bool) -> None:
    if len(data.validation) < len(data.names):
        raise DataError(
            f"validation has {len(data.validation)} rows, fewer than the {len(data.names)} classes of "
            f"`label_column` {columns.label!r}: its loss cannot choose an anchor. Give more with --validation_file, "
            "--validation_fraction or --max_eval_samples."
        )
    for split, rows in (("test", data.test), ("validation", data.validation)):
        unseen = set(rows["label"]) - set(data.train["label"])
        names = ", ".join(data.names[index] for index in sorted(unseen))
        if unseen and split == "validation" and validation_given:
            raise DataError(
                f"validation has classes that no training row is labelled with: {names}. No model can learn them, and "
                "each would decide which anchor is best. Leave these rows out of --validation_file."
            )
        if unseen:
            data.notes.append(f"The {split} has classes that no training row is labelled with: {names}.")
    texts = {name: _texts_of(getattr(data, name)) for name in ("train", "validation", "test")}
    refuse_same_rows(texts, data.notes)
    unknown = sum(label == _MISSING for label in data.train["clean_label"])
    if unknown:
        data.notes.append(f"{unknown} training rows have no clean label; they count as neither right nor wrong.")
