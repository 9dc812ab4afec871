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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_reset.study.options import RecipeArguments, option, run_command

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_reset import ResetTrainer, ResetTrainingArguments
    from hf_reset.study.arms import Arm
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
    max_seq_length: int = option(64, "Tokens to which texts are cut.", at_least=1)
    # noise
    noise_rate: float = option(0.0, "Share of training and validation labels to make wrong.", at_least=0)
    noise_kind: Literal["symmetric", "pair", "matrix", "instance"] = option("symmetric", "How labels go wrong.")
    noise_matrix: str | None = option(None, "For kind matrix: T[i][j] = P(noisy j | clean i), as JSON.")
    # model
    model_name_or_path: str | None = option(
        None, "Model on the hub or local directory. Default: a small ModernBERT, untrained."
    )
    hidden_size: int = option(128, "Width of the small ModernBERT.", at_least=1)
    num_hidden_layers: int = option(2, "Its layers.", at_least=1)
    vocab_size: int = option(4000, "Tokens of the tokenizer trained on the training texts for it.", at_least=1)
    freeze_embeddings: bool = option(False, "Leave the word embeddings as they are.")
    lora_rank: int = option(0, "Rank of LoRA adapters; 0 trains all weights.", at_least=0)
    lora_alpha: int = option(16, "LoRA's alpha; updates are scaled by alpha / rank.")
    lora_dropout: float = option(0.0, "LoRA's dropout.", at_least=0)
    lora_target_modules: str = option("all-linear", "Modules that get adapters: a regular expression or all-linear.")
    # measuring
    memory_samples: int = option(256, "Mislabelled training rows on which memory is followed.", at_least=0)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe; what it refuses ends in one line and exit status 1."""
    run_command(run, TextClassificationArguments, description=__doc__ or "", argv=argv)


def run(argv: Sequence[str]) -> dict[str, Any]:
    """The whole study: parse, train each arm from each seed, report; returns what `results.json` holds."""
    from functools import lru_cache

    from hf_reset import ResetTrainingArguments
    from hf_reset.corpora import docstring_topics
    from hf_reset.report.classification import write_report
    from hf_reset.study.classification import settle_metric
    from hf_reset.study.options import parse_recipe
    from hf_reset.study.runs import open_study, run_arms, study_callbacks
    from hf_reset.study.splits import load_splits

    options, training, configuration = parse_recipe([TextClassificationArguments, ResetTrainingArguments], argv)
    settle_metric(training)
    results, runs, say = open_study("text_classification", options, training, configuration)
    callbacks = study_callbacks(training, results)
    raw = load_splits(docstring_topics, **options.sources())
    prepared = lru_cache(maxsize=1)(lambda seed: prepare(options, raw, seed))

    def run_one(arm: Arm, seed: int) -> dict[str, Any]:
        data = prepared(seed)
        results.note(*data.notes)
        return train_and_measure(options, training, data, arm, seed, callbacks)

    run_arms(results, runs, run_one, say=say)
    if training.should_save:
        write_report(results)
    return results.as_dict()


def prepare(options: TextClassificationArguments, raw: dict[str, Dataset], seed: int) -> ClassificationData:
    """Splits of one seed, with its noise."""
    from hf_reset.study.classification import parse_matrix, prepare_classification
    from hf_reset.study.columns import Columns

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
        noise_matrix=parse_matrix(options.noise_matrix),
        seed=seed,
        **options.sizes(),
    )


def build_tokenizer(options: TextClassificationArguments, texts: list[str]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or one trained on the training texts."""
    from hf_reset.corpora import train_tokenizer
    from hf_reset.study.models import load_tokenizer

    if options.model_name_or_path is None:
        return train_tokenizer(texts, options.vocab_size)
    return load_tokenizer(options.model_name_or_path)


def build_model(
    options: TextClassificationArguments, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> PreTrainedModel:
    """The classifier: pretrained, or a small ModernBERT from its config; with adapters if asked for."""
    from transformers import AutoModelForSequenceClassification

    from hf_reset.corpora.small_modernbert import small_modernbert
    from hf_reset.study.models import load_pretrained, with_lora

    labels: dict[str, Any] = {"num_labels": len(names), "id2label": dict(enumerate(names))}
    labels["label2id"] = {name: index for index, name in enumerate(names)}
    if options.model_name_or_path is not None:
        load = AutoModelForSequenceClassification.from_pretrained
        model = load_pretrained(load, options.model_name_or_path, **labels)
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        size = {"hidden_size": options.hidden_size, "num_hidden_layers": options.num_hidden_layers}
        model = small_modernbert(tokenizer, labels, **size, positions=options.max_seq_length)
    if options.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    return with_lora(model, "SEQ_CLS", options) if options.lora_rank > 0 else model


def train_and_measure(
    options: TextClassificationArguments,
    training: ResetTrainingArguments,
    data: ClassificationData,
    arm: Arm,
    seed: int,
    callbacks: list[Any],
) -> dict[str, Any]:
    """Train one arm from one seed; the test is read at the very end, by the last weights and by the best."""
    from transformers import DataCollatorWithPadding, set_seed

    from hf_reset import ResetTrainer
    from hf_reset.metrics import with_calibrated_loss
    from hf_reset.study.arms import arguments_of
    from hf_reset.study.classification import validation_gain, validation_metrics, watch_memory
    from hf_reset.study.runs import best_weights, fresh_engine, save_final_model, train_run, without_metrics

    fresh_engine()
    args = arguments_of(training, arm, seed)
    set_seed(seed)
    tokenizer = build_tokenizer(options, list(data.train["text"]))
    model = build_model(options, tokenizer, data.names)
    splits = data.tokens(tokenizer, options.max_seq_length)
    best = best_weights(args)
    trainer = ResetTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=with_calibrated_loss(validation_metrics(data)),
        callbacks=[best, *watch_memory(splits["train"], args, options.memory_samples), *callbacks],
    )
    record = train_run(trainer, training)
    without_metrics(trainer)  # those of validation: what is predicted from here on is measured by itself
    record |= measure(trainer, data, splits, "last")
    with best.swapped():
        record |= measure(trainer, data, splits, "best")
    record |= validation_gain(trainer, best, splits["validation"])
    record |= trajectory(trainer, data, best)
    if options.save_model:
        save_final_model(trainer, training.reset_finish, best, f"{args.output_dir}/model", record, options)
    return record


def measure(
    trainer: ResetTrainer, data: ClassificationData, splits: dict[str, Dataset], weights: Literal["last", "best"]
) -> dict[str, float | None]:
    """The live weights on the clean test, and on all training rows that are mislabelled."""
    from hf_reset.metrics import accuracy, label_memory, macro_f1
    from hf_reset.study.classification import predicted_classes

    def classes_of(rows: Any) -> Any:
        return predicted_classes(trainer.predict(rows).predictions)

    test, truth, memory = classes_of(splits["test"]), list(data.test["clean_label"]), None
    if len(data.mislabelled):
        rows = data.train.select(data.mislabelled)
        classes = classes_of(splits["train"].select(data.mislabelled))
        memory = label_memory(classes, list(rows["label"]), list(rows["clean_label"]))["memory/wrong"]
    return {
        f"test_accuracy_{weights}": accuracy(test, truth),
        f"test_macro_f1_{weights}": macro_f1(test, truth),
        f"label_memory_{weights}": memory,
    }


def trajectory(trainer: ResetTrainer, data: ClassificationData, best: Any) -> dict[str, Any]:
    """What happened on the way: resets, the best evaluation, and the curves of the figure."""
    from hf_reset.report.classification import CURVES
    from hf_reset.report.results import value_at
    from hf_reset.study.runs import outcome
    from hf_reset.study.suspects import suspects_found

    record = outcome(trainer, best, CURVES)
    record |= {
        f"{name}_best": value_at(record["history"].get(name, []), best.step)
        for name in ("validation_accuracy", "label_noise")
    }
    return record | suspects_found(trainer, data) | data.counts()


if __name__ == "__main__":
    main()
