# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-reset[recipes]"]
# ///
"""Tune a language model on instruction data with wrong responses, with and without stochastic resetting.

The embedded example, LoRA on a small Llama, a plain and a reset arm, a few minutes on two CPU cores:

    accelerate launch --num_cpu_threads_per_process 2 recipes/instruction_tuning/train.py \\
        --config recipes/instruction_tuning/configs/quickstart.yaml --compare --output_dir runs/instructions

A model and data of your own (messages, prompt and completion, instruction and output, question and answer):

    accelerate launch recipes/instruction_tuning/train.py --config recipes/instruction_tuning/configs/lora.yaml \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --train_file train.jsonl --output_dir runs/mine

The same through TRL's SFTTrainer, with packing: --trainer sft --packing true. All weights: --full_finetuning true.

OUTPUT_DIR receives results.json (one record an arm and seed), report.md, curves.png, and ARM-seedN/model: an
ordinary PEFT adapter, or with --full_finetuning a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hf_reset.study.options import RecipeArguments, option, run_command

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from hf_reset.report.results import Results
    from hf_reset.study.arms import Arm
    from hf_reset.study.instructions import InstructionData


@dataclass
class InstructionTuningArguments(RecipeArguments):
    """Options of this recipe; those of the trainer's arguments come on top."""

    # data
    prompt_column: str | None = option(None, "Column of the prompt, text or messages. Default: found by format.")
    response_column: str | None = option(None, "Column of the response. Default: found by format.")
    validation_fraction: float = option(0.1, "Share of training rows taken for validation where none is given.")
    test_fraction: float = option(0.1, "Share of training rows taken for the test where none is given.")
    max_seq_length: int = option(128, "Tokens of prompt and response; longer ones are cut, and counted.", at_least=1)
    # noise
    noise_rate: float = option(0.0, "Share of training and validation responses to make wrong.", at_least=0)
    noise_kind: Literal["swap", "shuffle_sentences", "truncate", "wrong_answer", "mix"] = option(
        "swap", "How responses go wrong."
    )
    # model
    model_name_or_path: str | None = option(
        None, "Causal model on the hub or local directory. Default: a small Llama, trained a little on plain text."
    )
    gguf_file: str | None = option(None, "A GGUF file in it, loaded as full weights (needs the package gguf).")
    tokenizer_name: str | None = option(None, "Its tokenizer, where it is another.")
    chat_template: str | None = option(None, "File with a chat template, for tokenizers without.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Type in which a named model is loaded.")
    load_in_4bit: bool = option(False, "Base weights in 4 bits (bitsandbytes, CUDA only).")
    hidden_size: int = option(128, "Width of the small Llama.", at_least=1)
    num_hidden_layers: int = option(4, "Its layers.", at_least=1)
    vocab_size: int = option(4000, "Tokens of the tokenizer trained on the plain text for it.", at_least=1)
    base_steps: int = option(400, "Steps of 16 x 128 tokens that it is first trained on the plain text.", at_least=1)
    base_learning_rate: float = option(2e-3, "Highest learning rate of these steps.", at_least=0)
    # adapters
    full_finetuning: bool = option(False, "Train all weights instead of adapters.")
    lora_rank: int = option(16, "Rank of the LoRA adapters.", at_least=0)
    lora_alpha: int = option(32, "LoRA's alpha; updates are scaled by alpha / rank.")
    lora_dropout: float = option(0.0, "LoRA's dropout.", at_least=0)
    lora_target_modules: str = option("all-linear", "Modules that get adapters: a regular expression or all-linear.")
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole beside the adapters, such as lm_head."}
    )
    use_dora: bool = option(False, "Weight-decomposed adapters (DoRA).")
    use_rslora: bool = option(False, "Rank-stabilised scaling, alpha / sqrt(rank).")
    # training
    trainer: Literal["plain", "sft"] = option("plain", "transformers' Trainer, or TRL's SFTTrainer (packing).")
    loss: str | None = option(None, "The same as reset_loss: gce, sce or another of hf_reset.losses.")
    loss_options: str | None = option(None, 'The same as reset_loss_options, as JSON: {"q": 0.5}.')
    # measuring
    memory_samples: int = option(150, "Corrupted training rows on which memory is followed during the run.", at_least=0)
    generation_samples: int = option(32, "Test prompts to generate responses to at the end; 0 for none.", at_least=0)
    max_new_tokens: int = option(48, "Most tokens of a generated response.", at_least=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe; what it refuses ends in one line and exit status 1."""
    run_command(run, InstructionTuningArguments, description=__doc__ or "", argv=argv)


def run(argv: Sequence[str]) -> dict[str, Any]:
    """The whole study: parse, train each arm from each seed, report; returns what `results.json` holds."""
    from functools import lru_cache

    from hf_reset.corpora import docstring_summaries
    from hf_reset.report.instructions import write_report
    from hf_reset.study.options import parse_recipe
    from hf_reset.study.runs import open_study, run_arms, study_callbacks
    from hf_reset.study.splits import load_splits

    options, training, configuration = parse_recipe([InstructionTuningArguments, arguments_class(argv)], argv)
    check(options, training)
    results, runs, say = open_study("instruction_tuning", options, training, configuration)
    callbacks = study_callbacks(training, results)
    raw = load_splits(docstring_summaries, **options.sources())
    prepared = lru_cache(maxsize=1)(lambda seed: prepare(options, raw, seed))

    def run_one(arm: Arm, seed: int) -> dict[str, Any]:
        data = prepared(seed)  # data and noise first: what is wrong with them shows before any training
        base = base_model(options, training, raw, say)
        return train_and_measure(options, training, data, base, arm, seed, results, callbacks)

    run_arms(results, runs, run_one, say=say)
    if training.should_save:
        write_report(results)
    return results.as_dict()


def prepare(options: InstructionTuningArguments, raw: dict[str, Dataset], seed: int) -> InstructionData:
    """Splits of one seed, with its noise."""
    from hf_reset.study.instructions import prepare_instructions

    data = prepare_instructions(
        raw,
        prompt_column=options.prompt_column,
        response_column=options.response_column,
        noise_rate=options.noise_rate,
        noise_kind=options.noise_kind,
        seed=seed,
        **options.sizes(),
    )
    data.refuse_same_rows()
    return data


def arguments_class(argv: Sequence[str]) -> type:
    """The class of the trainer's arguments, `reset_*` fields in front, for the trainer that was asked for."""
    from hf_reset import ResetTrainingArguments
    from hf_reset.errors import ConfigError
    from hf_reset.study.options import given_option

    if given_option(argv, "trainer", default="plain") != "sft":
        return ResetTrainingArguments
    try:
        from hf_reset.training.sft import ResetSFTConfig
    except ImportError as error:
        raise ConfigError("`trainer` sft needs TRL, which is not installed: pip install 'hf-reset[trl]'.") from error
    return ResetSFTConfig


def check(options: InstructionTuningArguments, training: Any) -> None:
    """Refuse what can be seen from the options alone, before anything is trained.

    Raises:
        ConfigError: two options contradict each other, or one asks for what this machine does not have.
    """
    from hf_reset.losses.by_name import named_loss
    from hf_reset.study.models import refuse_4bit, refuse_gguf

    if options.loss is not None:
        named_loss(options.loss)  # refused by the name of the option that was given
        training.reset_loss, training.reset_loss_options = options.loss, options.loss_options
    training.loss_options()
    if options.load_in_4bit:
        refuse_4bit(options.model_name_or_path is None or options.full_finetuning)
    refuse_gguf(options)


def base_model(
    options: InstructionTuningArguments, training: Any, raw: dict[str, Dataset], say: Callable[[str], None]
) -> str:
    """What the adapters go on: the named model, or the small Llama, trained once and kept under the output folder.

    Its plain text is the embedded docstrings without what `docstring_summaries` asks for and, with data of one's
    own, the prompts of the training split; no response of any data is in it.
    """
    from hf_reset.corpora import docstring_text
    from hf_reset.corpora.small_llama import kept_llama
    from hf_reset.study.instructions import prompt_texts

    if options.model_name_or_path is not None:
        return options.model_name_or_path
    texts = list(docstring_text()["train"]["text"])
    if options.train_file or options.dataset_name:
        texts += prompt_texts(raw["train"], options.prompt_column, options.response_column)
    settings = {
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_hidden_layers,
        "vocab_size": options.vocab_size,
        "steps": options.base_steps,
        "learning_rate": options.base_learning_rate,
        "positions": options.max_seq_length + options.max_new_tokens,
    }
    return str(kept_llama(training.output_dir, texts, use_cpu=training.use_cpu, say=say, **settings))


def build_model(
    options: InstructionTuningArguments, training: Any, tokenizer: PreTrainedTokenizerBase, base: str
) -> PreTrainedModel:
    """The base model, with adapters (LoRA or DoRA) unless all weights are to be trained."""
    from transformers import AutoModelForCausalLM

    from hf_reset.study.models import load_pretrained, loading_options, refuse_encoder, refuse_misfit, with_lora

    model = load_pretrained(AutoModelForCausalLM.from_pretrained, base, **loading_options(options))
    refuse_encoder(model, base)
    refuse_misfit(model, base, tokenizer, options.tokenizer_name or base, options.max_seq_length)
    if options.full_finetuning:
        return model
    if options.load_in_4bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=training.activation_checkpointing)
    elif training.activation_checkpointing:
        model.enable_input_require_grads()  # a checkpointed block whose input needs no gradient would pass none on
    more = {"modules_to_save": options.lora_modules_to_save, "use_dora": options.use_dora}
    return with_lora(model, "CAUSAL_LM", options, use_rslora=options.use_rslora, **more)


def build_trainer(
    options: InstructionTuningArguments,
    args: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, Dataset],
    callbacks: list[Any],
) -> Trainer:
    """transformers' Trainer or TRL's SFTTrainer, resetting; both get the same tokens and labels."""
    from transformers import DataCollatorForSeq2Seq

    from hf_reset import ResetTrainer

    given: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": splits["train"].select_columns(["input_ids", "labels"]),
        "eval_dataset": splits["validation"].select_columns(["input_ids", "labels"]),
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }
    if options.trainer == "sft":
        from hf_reset.training.sft import ResetSFTTrainer

        args.max_length = options.max_seq_length
        return ResetSFTTrainer(**given)
    return ResetTrainer(**given, data_collator=DataCollatorForSeq2Seq(tokenizer))


def train_and_measure(
    options: InstructionTuningArguments,
    training: Any,
    data: InstructionData,
    base: str,
    arm: Arm,
    seed: int,
    results: Results,
    callbacks: list[Any],
) -> dict[str, Any]:
    """Train one arm from one seed; then measure the last weights and the best evaluated ones."""
    from transformers import set_seed
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from hf_reset import select_parameters
    from hf_reset.diagnostics.responses import ResponseCurvesCallback, response_memory
    from hf_reset.study.arms import arguments_of
    from hf_reset.study.instructions import chat_tokenizer
    from hf_reset.study.runs import best_weights, fresh_engine, save_final_model, train_run
    from hf_reset.study.splits import at_most
    from hf_reset.study.suspects import responses_found

    fresh_engine()
    args = arguments_of(training, arm, seed)
    set_seed(seed)
    tokenizer = chat_tokenizer(base, options)
    splits, notes = data.tokens(tokenizer, options.max_seq_length)
    results.note(*data.notes, *notes)
    model = build_model(options, training, tokenizer, base)
    if training.reset_config().can_reset:
        select_parameters(model, training.reset_config().scope)  # refused before the plain arm, not after it
    memory = (splits["given"], splits["clean"]) if "given" in splits else None
    best = best_weights(args)
    curves = ResponseCurvesCallback(splits["test"], *(at_most(part, options.memory_samples) for part in memory or ()))
    trainer: Any = build_trainer(options, args, model, tokenizer, splits, [best, curves, *callbacks])
    size = args.per_device_eval_batch_size
    # Under ZeRO-3 the weights are shares from the moment they are loaded, and nothing gathers them before training.
    at_start = None if is_deepspeed_zero3_enabled() else memory
    record: dict[str, Any] = {"response_memory_start": at_start and response_memory(model, *at_start, batch_size=size)}
    record |= train_run(trainer, training)
    record |= measure(options, trainer, data, splits, tokenizer, "last")
    with best.swapped():
        record |= measure(options, trainer, data, splits, tokenizer, "best")
    record |= trajectory(trainer, data, best) | responses_found(trainer, data, splits["train"]["row"])
    if options.save_model:
        save_final_model(trainer, training.reset_finish, best, f"{args.output_dir}/model")
    return record


def measure(
    options: InstructionTuningArguments,
    trainer: Any,
    data: InstructionData,
    splits: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    weights: Literal["last", "best"],
) -> dict[str, Any]:
    """The live weights on the clean test and on all corrupted training rows."""
    from hf_reset.diagnostics.responses import generate_responses, generation_scores, response_memory, response_scores
    from hf_reset.study.splits import at_most

    model, size = trainer.model, trainer.args.per_device_eval_batch_size
    scores = response_scores(model, splits["test"], batch_size=size)
    record: dict[str, Any] = {f"test_{name}_{weights}": value for name, value in scores.items()}
    record[f"response_memory_{weights}"] = (
        response_memory(model, splits["given"], splits["clean"], batch_size=size) if "given" in splits else None
    )
    sample = data.test.select(at_most(splits["test"], options.generation_samples)["row"])
    if len(sample):
        prompts, references = list(sample["prompt"]), list(sample["clean_response"])
        made = generate_responses(model, tokenizer, prompts, max_new_tokens=options.max_new_tokens, batch_size=size)
        record |= {f"{name}_{weights}": value for name, value in generation_scores(made, references).items()}
        if weights == "last":
            record["samples"] = [
                {"prompt": prompt[-1]["content"], "clean": clean, "generated": text}
                for prompt, clean, text in list(zip(prompts, references, made, strict=True))[:8]
            ]
    return record


def trajectory(trainer: Any, data: InstructionData, best: Any) -> dict[str, Any]:
    """What happened on the way: resets, the best evaluation, the size of the anchor, and the curves of the figure."""
    from hf_reset.report.instructions import CURVES
    from hf_reset.study.runs import outcome

    store = trainer.reset_callback.store
    return {
        **outcome(trainer, best, CURVES),
        "train_rows": len(data.train),
        "train_corrupted": len(data.corrupted),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "anchor_bytes": store.nbytes if store is not None else 0,
    }


if __name__ == "__main__":
    main()
