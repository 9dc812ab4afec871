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

from hf_reset.study.runs import RecipeArguments, option

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from hf_reset.report.results import Results
    from hf_reset.study.instructions import InstructionData


@dataclass
class InstructionTuningArguments(RecipeArguments):
    """Options of this recipe; those of the trainer's arguments come on top."""

    # data
    prompt_column: str | None = option(None, "Column of the prompt, text or messages. Default: found by format.")
    response_column: str | None = option(None, "Column of the response. Default: found by format.")
    validation_fraction: float = option(0.1, "Share of training rows taken for validation where none is given.")
    test_fraction: float = option(0.1, "Share of training rows taken for the test where none is given.")
    max_seq_length: int = option(128, "Tokens of prompt and response; longer responses are cut, and counted.")
    # noise
    noise_rate: float = option(0.0, "Share of training and validation responses to make wrong.")
    noise_kind: Literal["swap", "shuffle_sentences", "truncate", "wrong_answer", "mix"] = option(
        "swap", "How responses go wrong."
    )
    # model
    model_name_or_path: str | None = option(
        None, "Causal model on the hub or local directory. Default: a small Llama, trained a little on plain text."
    )
    tokenizer_name: str | None = option(None, "Its tokenizer, where it is another.")
    chat_template: str | None = option(None, "File with a chat template, for tokenizers without.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Type in which a named model is loaded.")
    load_in_4bit: bool = option(False, "Base weights in 4 bits (bitsandbytes, CUDA only).")
    hidden_size: int = option(128, "Width of the small Llama.")
    num_hidden_layers: int = option(4, "Its layers.")
    vocab_size: int = option(4000, "Tokens of the tokenizer trained on the plain text for it.")
    base_steps: int = option(400, "Steps of 16 x 128 tokens that it is first trained on the plain text.")
    base_learning_rate: float = option(2e-3, "Highest learning rate of these steps.")
    # adapters
    full_finetuning: bool = option(False, "Train all weights instead of adapters.")
    lora_rank: int = option(16, "Rank of the LoRA adapters.")
    lora_alpha: int = option(32, "LoRA's alpha; updates are scaled by alpha / rank.")
    lora_dropout: float = option(0.0, "LoRA's dropout.")
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
    memory_samples: int = option(150, "Corrupted training rows on which memory is followed during the run.")
    generation_samples: int = option(32, "Test prompts to generate responses to at the end; 0 for none.")
    max_new_tokens: int = option(48, "Most tokens of a generated response.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe; what it refuses ends in one line and exit status 1."""
    from hf_reset.study.runs import run_command

    run_command(run, InstructionTuningArguments, description=__doc__ or "", argv=argv)


def run(argv: Sequence[str]) -> dict[str, Any]:
    """The whole study: parse, train each arm from each seed, report.

    Returns:
        What ``results.json`` holds.
    """
    from functools import lru_cache

    from hf_reset.corpora import docstring_summaries
    from hf_reset.study.instructions import prepare_instructions
    from hf_reset.study.runs import load_splits, open_study, parse_recipe, quiet_unless_terminal, run_arms

    options, training, configuration = parse_recipe([InstructionTuningArguments, arguments_class(argv)], argv)
    check(options, training)
    results, runs, say = open_study("instruction_tuning", options, training, configuration)
    callbacks = quiet_unless_terminal(training)
    raw = load_splits(options, docstring_summaries)

    @lru_cache(maxsize=1)
    def prepared(seed: int) -> InstructionData:
        return prepare_instructions(
            raw,
            prompt_column=options.prompt_column,
            response_column=options.response_column,
            noise_rate=options.noise_rate,
            noise_kind=options.noise_kind,
            seed=seed,
            validation_fraction=options.validation_fraction,
            test_fraction=options.test_fraction,
            max_train_samples=options.max_train_samples,
            max_eval_samples=options.max_eval_samples,
            max_predict_samples=options.max_predict_samples,
        )

    def run_one(arm: str, seed: int) -> dict[str, Any]:
        data = prepared(seed)  # data and noise first: what is wrong with them shows before any training
        base = base_model(options, training, raw, say)
        return train_and_measure(options, training, data, base, arm, seed, results, callbacks)

    run_arms(results, runs, run_one, say=say)
    if training.should_save:
        write_report(options, results)
    return results.as_dict()


def arguments_class(argv: Sequence[str]) -> type:
    """The class of the trainer's arguments, `reset_*` fields in front, for the trainer that was asked for."""
    from hf_reset import ResetTrainingArguments
    from hf_reset.errors import ConfigError
    from hf_reset.study.runs import given_option

    if given_option(argv, "trainer", default="plain") != "sft":
        return ResetTrainingArguments
    try:
        from hf_reset.training.sft import ResetSFTConfig
    except ImportError as error:
        raise ConfigError("`trainer` sft needs TRL, which is not installed: pip install 'hf-reset[trl]'.") from error
    return ResetSFTConfig


def check(options: InstructionTuningArguments, training: Any) -> None:
    """Refuse what can be seen from the options alone.

    Raises:
        ConfigError: two options contradict each other, or one asks for what this machine does not have.
    """
    import torch

    from hf_reset.errors import ConfigError

    if options.loss is not None:
        training.reset_loss, training.reset_loss_options = options.loss, options.loss_options
    training.loss_func(torch.nn.Identity())  # what it refuses is to be refused before anything is trained
    if not options.load_in_4bit:
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            "`load_in_4bit` is True, and there is no CUDA device here, without which bitsandbytes holds no weights in "
            "4 bits. Leave it False; --dtype bfloat16 halves the memory anywhere."
        )
    if options.model_name_or_path is None or options.full_finetuning:
        raise ConfigError(
            "`load_in_4bit` is for adapters on a model named with --model_name_or_path: 4-bit weights cannot be "
            "trained themselves. Leave it False."
        )


def base_model(
    options: InstructionTuningArguments, training: Any, raw: dict[str, Dataset], say: Callable[[str], None]
) -> str:
    """What the adapters go on: the named model, or the small Llama, trained once and kept under the output folder.

    Its plain text is the embedded docstrings without what `docstring_summaries` asks for and, with data of one's
    own, the prompts of the training split; no response of any data is in it.
    """
    import hashlib
    from pathlib import Path

    from hf_reset.corpora import docstring_text
    from hf_reset.corpora.small_llama import small_llama
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
    key = hashlib.blake2b(repr((settings, texts)).encode(), digest_size=4).hexdigest()
    folder = Path(training.output_dir) / f"base-{key}"
    if not folder.is_dir():
        say(f"training the small Llama for {options.base_steps} steps on plain text, kept in {folder}")
    return str(small_llama(folder, texts, use_cpu=training.use_cpu, **settings))


def build_tokenizer(options: InstructionTuningArguments, base: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a chat template and something to pad with.

    Raises:
        ConfigError: it cannot be loaded, or has no chat template.
    """
    from pathlib import Path

    from transformers import AutoTokenizer

    from hf_reset.errors import ConfigError
    from hf_reset.study.instructions import check_chat_template
    from hf_reset.study.runs import load_pretrained

    tokenizer = load_pretrained(
        AutoTokenizer.from_pretrained, options.tokenizer_name or base, argument="tokenizer_name"
    )
    if options.chat_template is not None:
        try:
            tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"`chat_template` {options.chat_template!r} cannot be read ({error}).") from error
    check_chat_template(tokenizer)
    if tokenizer.pad_token is None:  # decoders often have none; padding is masked everywhere
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(
    options: InstructionTuningArguments, training: Any, tokenizer: PreTrainedTokenizerBase, base: str
) -> PreTrainedModel:
    """The base model, with adapters unless all weights are to be trained.

    Raises:
        ConfigError: it cannot be loaded, or its vocabulary or positions do not fit the tokenizer or the data.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from hf_reset.errors import ConfigError
    from hf_reset.study.runs import load_pretrained

    loading: dict[str, Any] = {"dtype": getattr(torch, options.dtype)}
    if options.load_in_4bit:
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = load_pretrained(AutoModelForCausalLM.from_pretrained, base, **loading)
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise ConfigError(
            f"the tokenizer {options.tokenizer_name or base!r} has {len(tokenizer)} tokens, and the model {base!r} "
            f"embeds {embeddings}: they do not belong together. Give the model's own with --tokenizer_name."
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and options.max_seq_length > positions:
        raise ConfigError(
            f"`max_seq_length` is {options.max_seq_length}, and the model {base!r} has {positions} positions. Give at "
            "most that many."
        )
    if options.full_finetuning:
        return model
    return with_adapters(options, training, model)


def with_adapters(options: InstructionTuningArguments, training: Any, model: PreTrainedModel) -> PreTrainedModel:
    """LoRA (or DoRA) adapters on a model whose own weights are frozen.

    Raises:
        ConfigError: peft refuses the options; its words are passed on.
    """
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

    from hf_reset.errors import ConfigError

    if options.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=training.activation_checkpointing)
    elif training.activation_checkpointing:
        model.enable_input_require_grads()  # a checkpointed block whose input needs no gradient would pass none on
    try:
        lora = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=options.lora_target_modules,
            modules_to_save=options.lora_modules_to_save,
            use_dora=options.use_dora,
            use_rslora=options.use_rslora,
        )
        return get_peft_model(model, lora)  # type: ignore[return-value]
    except ValueError as error:
        raise ConfigError(f"`lora_*` options refused by peft: {error}") from error


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
        trainer: Any = ResetSFTTrainer(**given)
    else:
        trainer = ResetTrainer(**given, data_collator=DataCollatorForSeq2Seq(tokenizer))
    return trainer


def train_and_measure(
    options: InstructionTuningArguments,
    training: Any,
    data: InstructionData,
    base: str,
    arm: str,
    seed: int,
    results: Results,
    callbacks: list[Any],
) -> dict[str, Any]:
    """Train one arm from one seed; then measure the last weights and the best evaluated ones."""
    from transformers import set_seed
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from hf_reset import select_parameters
    from hf_reset.diagnostics.responses import ResponseCurvesCallback, response_memory
    from hf_reset.study.runs import arguments_of, best_weights, fresh_engine, save_final_model, train_run

    fresh_engine()
    args = arguments_of(training, arm, seed)
    set_seed(seed)
    tokenizer = build_tokenizer(options, base)
    splits = tokens_of(options, data, tokenizer, results)
    model = build_model(options, training, tokenizer, base)
    if training.reset_config().can_reset:
        select_parameters(model, training.reset_config().scope)  # refused before the plain arm, not after it
    memory = (splits["given"], splits["clean"]) if "given" in splits else None
    best = best_weights(args)
    curves = ResponseCurvesCallback(splits["test"], *(few(part, options.memory_samples) for part in memory or ()))
    trainer: Any = build_trainer(options, args, model, tokenizer, splits, [best, curves, *callbacks])
    size = args.per_device_eval_batch_size
    # Under ZeRO-3 the weights are shares from the moment they are loaded, and nothing gathers them before training.
    at_start = None if is_deepspeed_zero3_enabled() else memory
    record: dict[str, Any] = {"response_memory_start": at_start and response_memory(model, *at_start, batch_size=size)}
    record |= train_run(trainer, training)
    record |= measure(options, trainer, data, splits, tokenizer, "last")
    with best.swapped():
        record |= measure(options, trainer, data, splits, tokenizer, "best")
    record |= trajectory(trainer, data, best)
    if options.save_model:
        save_final_model(trainer, training.reset_finish, best, f"{args.output_dir}/model")
    return record


def tokens_of(
    options: InstructionTuningArguments,
    data: InstructionData,
    tokenizer: PreTrainedTokenizerBase,
    results: Results,
) -> dict[str, Dataset]:
    """Tokens of the splits, and of the corrupted training rows as ``given`` and as they were, ``clean``."""
    from hf_reset.study.instructions import encode

    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    notes = [*data.notes]
    splits: dict[str, Dataset] = {}
    for name, rows in parts.items():
        splits[name], counts = encode(rows, tokenizer, options.max_seq_length)
        for count, what in [
            (counts["prompt_too_long"], "prompts leave no room for a response and were left out"),
            (counts["response_cut"], "responses were cut"),
        ]:
            if count:
                notes.append(f"{count} of {len(rows)} {name} {what} (`max_seq_length` {options.max_seq_length}).")
    wrong = list(data.train["is_corrupted"])
    corrupted = [place for place, row in enumerate(splits["train"]["row"]) if wrong[row]]
    if corrupted:  # prompts alone decide what is left out, so the rows are the same in both
        clean, _ = encode(data.train, tokenizer, options.max_seq_length, column="clean_response")
        splits["given"], splits["clean"] = splits["train"].select(corrupted), clean.select(corrupted)
    for note in notes:
        results.note(note)
    return splits


def few(rows: Dataset, count: int) -> Dataset:
    """The first rows, which come in random order."""
    return rows.select(range(min(count, len(rows))))


def measure(
    options: InstructionTuningArguments,
    trainer: Any,
    data: InstructionData,
    splits: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    weights: str,
) -> dict[str, Any]:
    """The live weights on the clean test and on all corrupted training rows.

    Args:
        options: of the recipe.
        trainer: after training.
        data: the texts.
        splits: their tokens.
        tokenizer: theirs.
        weights: ``"last"`` or ``"best"``, what the keys of the record end in.
    """
    from hf_reset.diagnostics.responses import generate_responses, generation_scores, response_memory, response_scores

    model, size = trainer.model, trainer.args.per_device_eval_batch_size
    scores = response_scores(model, splits["test"], batch_size=size)
    record: dict[str, Any] = {f"test_{name}_{weights}": value for name, value in scores.items()}
    record[f"response_memory_{weights}"] = (
        response_memory(model, splits["given"], splits["clean"], batch_size=size) if "given" in splits else None
    )
    sample = data.test.select(few(splits["test"], options.generation_samples)["row"])
    if len(sample):
        prompts, references = list(sample["prompt"]), list(sample["clean_response"])
        made = generate_responses(model, tokenizer, prompts, max_new_tokens=options.max_new_tokens, batch_size=size)
        scored = generation_scores(made, references)
        record |= {f"{name}_{weights}": value for name, value in scored.items()}
        if weights == "last":
            record["samples"] = [
                {"prompt": prompt[-1]["content"], "clean": clean, "generated": text}
                for prompt, clean, text in list(zip(prompts, references, made, strict=True))[:8]
            ]
    return record


def trajectory(trainer: Any, data: InstructionData, best: Any) -> dict[str, Any]:
    """What happened on the way: resets, the best evaluation, the size of the anchor, and the curves of the figure."""
    from hf_reset.study.runs import outcome

    store = trainer.reset_callback.store
    curves = {"validation_loss": "eval_loss", "clean_loss": "clean_loss", "response_memory": "response_memory"}
    return {
        **outcome(trainer, best, curves),
        "train_rows": len(data.train),
        "train_corrupted": len(data.corrupted),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "anchor_bytes": store.nbytes if store is not None else 0,
    }


def write_report(options: InstructionTuningArguments, results: Results) -> None:
    """report.md and curves.png beside results.json; the table goes to the screen."""
    from rich.console import Console
    from rich.markdown import Markdown

    from hf_reset.files import write_atomic
    from hf_reset.report.plots import Panel, plot_runs
    from hf_reset.report.tables import COST_COLUMNS, Column, markdown_report, summary_table

    columns = [
        Column("test_loss_last", "clean test loss, last step"),
        Column("test_loss_best", "clean test loss, best validation"),
        Column("test_token_accuracy_last", "token accuracy, last step"),
        Column("response_memory_last", "memory of wrong responses", digits=4),
        Column("rouge_l_last", "ROUGE-L, last step"),
    ]
    if any(record.get("exact_match_last") is not None for record in results.records):
        columns.append(Column("exact_match_last", "exact match, last step"))
    noisy = "noisy" if options.noise_rate else "responses as given"
    panels = [
        Panel("validation_loss", f"Validation loss ({noisy})", "nats a token", marks_resets=True),
        Panel("response_memory", "Memory of wrong responses", "loss on clean - loss on given, nats a token"),
        Panel(
            "clean_loss",
            "Loss on clean held-out responses\n(a diagnostic, chose nothing)",
            "nats a token",
            final="test_loss_last",
        ),
    ]
    folder, title = results.path.parent, title_of(options)
    figure = plot_runs(results.records, panels, folder / "curves.png", title=title)
    sections = {"Reading": reading(results.records)}
    if samples := samples_table(results.records):
        sections["Generated at the last step"] = samples
    report = markdown_report(
        results.as_dict(),
        columns,
        title=title,
        chosen_by=f"the {results.configuration.get('reset_metric') or 'eval_loss'} of validation responses"
        + (", wrong at the same rate as in training. No clean response chose anything." if options.noise_rate else "."),
        figure=figure.name,
        sections=sections,
    )
    path = write_atomic(folder / "report.md", report)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log has no edge
    console.print(Markdown(summary_table(results.records, [*columns, *COST_COLUMNS])))
    print(f"{path}, {figure}, {results.path}")


def title_of(options: InstructionTuningArguments) -> str:
    """Data and noise, in a line."""
    data = options.dataset_name or options.train_file or "standard-library docstrings"
    noise = f"{options.noise_rate:.0%} of responses wrong ({options.noise_kind})" if options.noise_rate else "as given"
    return f"Instruction tuning, {data}, {noise}"


def reading(records: list[dict[str, Any]]) -> str:
    """What the numbers say about the regime, in plain words."""
    plain = [record for record in records if record["arm"] == "plain"]
    resets = [record["resets"] for record in records if record["arm"] == "reset"]
    lines = []
    if plain and all(record["test_loss_last"] <= record["test_loss_best"] + 0.02 for record in plain):
        lines.append(
            "The plain arm did not overfit: its last weights are as good as its best. Train longer, with a larger "
            "learning rate or rank, to see what resets are for."
        )
    if resets and max(resets) == 0:
        lines.append("Resets never began: validation kept improving to the end.")
    return " ".join(lines) or "Validation turned while training went on: the regime in which resets can help."


def samples_table(records: list[dict[str, Any]]) -> str:
    """Prompts and clean responses, with what each arm generates, from the first seed."""
    from hf_reset.report.tables import arms_of, markdown_table

    first = [record for record in records if record["seed"] == records[0]["seed"] and record.get("samples")]
    if not first:
        return ""
    arms = {arm: next(r["samples"] for r in first if r["arm"] == arm) for arm in arms_of(first)}
    rows = []
    for place, sample in enumerate(first[0]["samples"]):
        texts = [sample["prompt"], sample["clean"], *(arms[arm][place]["generated"] for arm in arms)]
        rows.append([" ".join(text.split())[:160] for text in texts])
    return markdown_table(["prompt", "clean response", *arms], rows)


if __name__ == "__main__":
    main()
