# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-reset[recipes]"]
# ///
"""Fine-tune a text classifier on labels that cannot all be trusted, with and without stochastic resetting.

The embedded example, a plain and a reset arm, about three minutes on two CPU cores:

    accelerate launch recipes/text_classification/train.py \\
        --config recipes/text_classification/configs/quickstart.yaml --compare --output_dir runs/quickstart

Data of your own (csv, tsv, json, jsonl or parquet; validation is taken from training where none is given):

    accelerate launch recipes/text_classification/train.py --config recipes/text_classification/configs/finetune.yaml \\
        --train_file train.csv --test_file test.csv --text_column text --label_column label \\
        --model_name_or_path google/bert_uncased_L-4_H-512_A-8 --output_dir runs/mine

Several processes: `accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/text_classification/train.py …`

OUTPUT_DIR receives results.json (one record an arm and seed), report.md, curves.png, and ARM-seedN/model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_reset.study.runs import RecipeArguments, option

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

    from hf_reset import ResetTrainer, ResetTrainingArguments
    from hf_reset.report.results import Results
    from hf_reset.study.classification import ClassificationData


@dataclass
class TextClassificationArguments(RecipeArguments):
    """Options of this recipe; those of `ResetTrainingArguments` come on top."""

    # data
    text_column: str = option("text", "Column of the text.")
    text_pair_column: str | None = option(None, "Column of a second text, for pairs.")
    label_column: str = option("label", "Column of the label that training sees.")
    clean_label_column: str | None = option(
        None, "For real noise: column of the true label, which the test is read by."
    )
    validation_label_column: str | None = option(
        None, "Column of validation labels. Default: label_column. 'clean_label': the true ones behind added noise."
    )
    max_seq_length: int = option(64, "Tokens to which texts are cut.")
    # noise
    noise_rate: float = option(0.0, "Share of training and validation labels to make wrong.")
    noise_kind: Literal["symmetric", "pair", "matrix", "instance"] = option("symmetric", "How labels go wrong.")
    noise_matrix: str | None = option(None, "For kind matrix: T[i][j] = P(noisy j | clean i), as JSON.")
    # model
    model_name_or_path: str | None = option(
        None, "Model on the hub or local directory. Default: a small ModernBERT, untrained."
    )
    hidden_size: int = option(128, "Width of the small ModernBERT.")
    num_hidden_layers: int = option(2, "Its layers.")
    vocab_size: int = option(4000, "Tokens of the tokenizer trained on the training texts for it.")
    freeze_embeddings: bool = option(False, "Leave the word embeddings as they are.")
    lora_rank: int = option(0, "Rank of LoRA adapters; 0 trains all weights.")
    lora_alpha: int = option(16, "LoRA's alpha; updates are scaled by alpha / rank.")
    lora_dropout: float = option(0.0, "LoRA's dropout.")
    lora_target_modules: str = option("all-linear", "Modules that get adapters: a regular expression or all-linear.")
    # measuring
    memory_samples: int = option(256, "Mislabelled training rows on which memory is followed during the run.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe; what it refuses ends in one line and exit status 1."""
    from hf_reset.study.runs import run_command

    run_command(run, TextClassificationArguments, description=__doc__ or "", argv=argv)


def run(argv: Sequence[str]) -> dict[str, Any]:
    """The whole study: parse, train each arm from each seed, report.

    Returns:
        What ``results.json`` holds.
    """
    from functools import lru_cache

    from hf_reset import ResetTrainingArguments
    from hf_reset.corpora import docstring_topics
    from hf_reset.errors import ConfigError
    from hf_reset.study.runs import (
        load_splits,
        open_study,
        parse_recipe,
        quiet_unless_terminal,
        run_arms,
    )

    options, training, configuration = parse_recipe([TextClassificationArguments, ResetTrainingArguments], argv)
    if "clean" in (training.reset_metric or training.metric_for_best_model or ""):
        raise ConfigError(
            "`reset_metric` would choose anchors by clean labels. If there are some to trust, name their column with "
            "--validation_label_column; the report then says so."
        )
    results, runs, say = open_study("text_classification", options, training, configuration)
    callbacks = quiet_unless_terminal(training)
    raw = load_splits(options, docstring_topics)
    prepared = lru_cache(maxsize=1)(lambda seed: prepare(options, raw, seed))

    def run_one(arm: str, seed: int) -> dict[str, Any]:
        data = prepared(seed)
        for note in data.notes:
            results.note(note)
        return train_and_measure(options, training, data, arm, seed, callbacks)

    run_arms(results, runs, run_one, say=say)
    if training.should_save:
        write_report(options, results)
    return results.as_dict()


def prepare(options: TextClassificationArguments, raw: dict[str, Dataset], seed: int) -> ClassificationData:
    """Splits of one seed, with its noise."""
    import json

    from hf_reset.errors import ConfigError
    from hf_reset.study.classification import Columns, prepare_classification

    try:
        matrix = None if options.noise_matrix is None else json.loads(options.noise_matrix)
    except json.JSONDecodeError as error:
        raise ConfigError(f"`noise_matrix` {options.noise_matrix!r} must be rows as JSON: {error}.") from error
    columns = Columns(
        text=options.text_column,
        text_pair=options.text_pair_column,
        label=options.label_column,
        clean_label=options.clean_label_column,
        validation_label=options.validation_label_column,
    )
    return prepare_classification(
        raw,
        columns,
        noise_rate=options.noise_rate,
        noise_kind=options.noise_kind,
        noise_matrix=matrix,
        seed=seed,
        validation_fraction=options.validation_fraction,
        test_fraction=options.test_fraction,
        max_train_samples=options.max_train_samples,
        max_eval_samples=options.max_eval_samples,
        max_predict_samples=options.max_predict_samples,
    )


def build_tokenizer(options: TextClassificationArguments, texts: list[str]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or one trained on the training texts."""
    from transformers import AutoTokenizer

    from hf_reset.corpora import train_tokenizer
    from hf_reset.study.runs import load_pretrained

    if options.model_name_or_path is None:
        return train_tokenizer(texts, options.vocab_size)
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, options.model_name_or_path)
    if tokenizer.pad_token is None:  # decoders often have none
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(
    options: TextClassificationArguments, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> PreTrainedModel:
    """The classifier: pretrained, or a small ModernBERT from its config; with adapters if asked for."""
    from transformers import AutoModelForSequenceClassification, ModernBertConfig, ModernBertForSequenceClassification

    from hf_reset.study.runs import load_pretrained

    labels = {"num_labels": len(names), "id2label": dict(enumerate(names))}
    labels["label2id"] = {name: index for index, name in enumerate(names)}
    if options.model_name_or_path is not None:
        load = AutoModelForSequenceClassification.from_pretrained
        model = load_pretrained(load, options.model_name_or_path, **labels)
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        # Averaging over tokens: from the first token alone, a few thousand texts teach little before they are
        # memorised.
        config = ModernBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden_size,
            num_hidden_layers=options.num_hidden_layers,
            num_attention_heads=max(1, options.hidden_size // 64),
            intermediate_size=2 * options.hidden_size,
            max_position_embeddings=options.max_seq_length,
            layer_types=["full_attention"] * options.num_hidden_layers,
            classifier_pooling="mean",
            embedding_dropout=0.1,
            mlp_dropout=0.1,
            classifier_dropout=0.1,
            **{
                f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
                for name in ("pad", "cls", "sep", "bos", "eos")
            },
            **labels,
        )
        model = ModernBertForSequenceClassification(config)
        # accelerate 1.15 makes an FSDP2 unit of the input embeddings by itself, and fails if they are in one already.
        model._no_split_modules = ["ModernBertEncoderLayer"]
    if options.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    if options.lora_rank > 0:
        from peft import LoraConfig, TaskType, get_peft_model

        lora = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=options.lora_target_modules,
        )
        model = get_peft_model(model, lora)
    return model  # type: ignore[return-value]


def train_and_measure(
    options: TextClassificationArguments,
    training: ResetTrainingArguments,
    data: ClassificationData,
    arm: str,
    seed: int,
    callbacks: list[Any],
) -> dict[str, Any]:
    """Train one arm from one seed; the test is read at the very end, by the last weights and by the best."""
    from transformers import DataCollatorWithPadding, set_seed

    from hf_reset import ResetTrainer
    from hf_reset.study.runs import arguments_of, best_weights, fresh_engine, save_final_model, train_run

    fresh_engine()
    args = arguments_of(training, arm, seed)
    set_seed(seed)
    tokenizer = build_tokenizer(options, list(data.train["text"]))
    model = build_model(options, tokenizer, data.names)
    splits = {name: tokenize(getattr(data, name), tokenizer, options) for name in ("train", "validation", "test")}
    best = best_weights(args)
    watch = memory_callbacks(splits["train"], args, options.memory_samples) if len(data.mislabelled) else []
    trainer = ResetTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=validation_metrics(data),
        callbacks=[best, *watch, *callbacks],
    )
    record = train_run(trainer, training)
    record |= measure(trainer, data, splits, "last")
    with best.swapped():
        record |= measure(trainer, data, splits, "best")
    record |= trajectory(trainer, data, best)
    if options.save_model:
        save_final_model(trainer, training.reset_finish, best, f"{args.output_dir}/model")
    return record


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, options: TextClassificationArguments) -> Dataset:
    """Token columns in place of the texts; the Trainer leaves out those that the model does not take."""
    from datasets import Dataset

    pairs = list(rows["text_pair"]) if "text_pair" in rows.column_names else None
    tokens = tokenizer(list(rows["text"]), pairs, truncation=True, max_length=options.max_seq_length)
    labels = {name: list(rows[name]) for name in ("label", "clean_label", "is_mislabelled")}
    return Dataset.from_dict({**tokens, **labels})


def memory_callbacks(train: Dataset, args: ResetTrainingArguments, samples: int) -> list[Any]:
    """Follow label memory as often as validation is evaluated, on a fixed sample."""
    from hf_reset.diagnostics.label_memory import LabelMemoryCallback

    if samples < 1:
        return []
    every = int(args.eval_steps or 0) if args.eval_strategy == "steps" else 0
    return [LabelMemoryCallback(train, every=every or 50, sample=samples, batch_size=args.per_device_eval_batch_size)]


def validation_metrics(data: ClassificationData) -> Callable[[EvalPrediction], dict[str, float]]:
    """Accuracy on the validation labels, and, to be looked at only, on the clean ones behind them.

    Validation rows come in order, so the clean labels need not pass through the model. They choose nothing.
    """
    import numpy as np

    clean = np.asarray(data.validation["clean_label"])

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        classes = predicted_classes(prediction.predictions)
        metrics = {"accuracy": float((classes == prediction.label_ids).mean())}
        if len(classes) == len(clean) and (clean >= 0).all():  # not the test or training rows
            metrics["clean_accuracy"] = float((classes == clean).mean())
        return metrics

    return compute


def predicted_classes(predictions: Any) -> np.ndarray:
    """Class numbers, shape (N,), from logits of shape (N, K), or from a tuple that begins with them."""
    import numpy as np

    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return np.asarray(logits).argmax(axis=-1)


def measure(
    trainer: ResetTrainer, data: ClassificationData, splits: dict[str, Dataset], weights: str
) -> dict[str, float | None]:
    """The live weights on the clean test, and on all training rows that are mislabelled.

    Args:
        trainer: after training.
        data: labels of the splits.
        splits: tokens of the splits.
        weights: ``"last"`` or ``"best"``, what the keys of the record end in.
    """
    from hf_reset.metrics import accuracy, label_memory, macro_f1

    test = predicted_classes(trainer.predict(splits["test"]).predictions)  # type: ignore[arg-type]
    truth = list(data.test["clean_label"])
    record: dict[str, float | None] = {
        f"test_accuracy_{weights}": accuracy(test, truth),
        f"test_macro_f1_{weights}": macro_f1(test, truth),
    }
    name = "label_memory" if weights == "last" else "label_memory_best"
    record[name] = None
    if len(data.mislabelled):
        rows = data.train.select(data.mislabelled)
        tokens = splits["train"].select(data.mislabelled)
        classes = predicted_classes(trainer.predict(tokens).predictions)  # type: ignore[arg-type]
        memory = label_memory(classes, list(rows["label"]), list(rows["clean_label"]))
        record[name] = memory["memory/wrong"]
    return record


def trajectory(trainer: ResetTrainer, data: ClassificationData, best: Any) -> dict[str, Any]:
    """What happened on the way: resets, the best evaluation, and the curves of the figure."""
    from hf_reset.study.runs import outcome

    curves = {
        "validation_loss": "eval_loss",
        "validation_accuracy": "eval_accuracy",
        "clean_accuracy": "eval_clean_accuracy",
        "label_memory": "memory/wrong",
    }
    record = outcome(trainer, best, curves)
    at_best = [value for step, value in record["history"].get("validation_accuracy", []) if step == best.step]
    clean = [label for label in data.validation["clean_label"] if label >= 0]
    return {
        **record,
        "validation_accuracy_best": at_best[0] if at_best else None,
        "validation_labels_right": 1 - sum(data.validation["is_mislabelled"]) / len(clean) if clean else None,
        "train_rows": len(data.train),
        "train_mislabelled": len(data.mislabelled),
    }


def write_report(options: TextClassificationArguments, results: Results) -> None:
    """report.md and curves.png beside results.json; the table goes to the screen."""
    from pathlib import Path

    from rich.console import Console
    from rich.markdown import Markdown

    from hf_reset.report.classification import COLUMNS, write_classification_report
    from hf_reset.report.tables import COST_COLUMNS, summary_table

    added = options.noise_rate > 0 or options.noise_kind == "matrix"
    noise = "labels as given"
    if added:
        noise = (
            f"{options.noise_rate:.0%} {options.noise_kind} label noise" if options.noise_rate else "noise by matrix"
        )
    elif options.clean_label_column is not None:
        noise = f"real noise in {options.label_column}"
    report = write_classification_report(
        results,
        title=f"{options.dataset_name or Path(options.train_file or 'Standard-library docstrings').name}: {noise}",
        label=options.label_column,
        validation_label=options.validation_label_column,
        clean_known=added or options.clean_label_column is not None,
    )
    Console(width=None if sys.stdout.isatty() else 120).print(
        Markdown(summary_table(results.records, [*COLUMNS, *COST_COLUMNS]))
    )
    print(f"{report} has the report, {results.path} every number.")


if __name__ == "__main__":
    main()
