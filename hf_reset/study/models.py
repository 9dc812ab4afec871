"""Models and tokenizers of a study: loaded by name with what can go wrong said in a line, and given adapters."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_reset.errors import ConfigError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_pretrained(
    load: Callable[..., Any], name: str, *, argument: str = "model_name_or_path", **options: Any
) -> Any:
    """`load(name, **options)` of a `from_pretrained`, with what can go wrong said in a line.

    Args:
        load: the `from_pretrained`.
        name: on the hub, or a local directory.
        argument: name of the option it came by, for messages.
        options: passed on.

    Raises:
        ConfigError: there is no such model or tokenizer, or it cannot be loaded.
    """
    try:
        return load(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"`{argument}` {name!r} cannot be loaded ({str(error).splitlines()[0]}). Check the name and the "
            "network, or give a local directory; without it a small model is built from its config."
        ) from error


def load_tokenizer(name: str, *, argument: str = "model_name_or_path", **options: Any) -> Any:
    """A tokenizer that can pad: decoders often have no padding token, and padding is masked everywhere.

    Args:
        name: on the hub, or a local directory.
        argument: name of the option it came by, for messages.
        options: of `from_pretrained`, such as `gguf_file`.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, name, argument=argument, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_lora(model: Any, task_type: str, options: Any, **more: Any) -> Any:
    """LoRA adapters on a model whose own weights are frozen.

    Args:
        model: as loaded.
        task_type: of PEFT, `"SEQ_CLS"` or `"CAUSAL_LM"`.
        options: with `lora_rank`, `lora_alpha`, `lora_dropout` and `lora_target_modules`.
        more: further fields of `LoraConfig`.

    Raises:
        ConfigError: PEFT refuses the options; its words are passed on.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    try:
        lora = LoraConfig(
            task_type=TaskType(task_type),
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=options.lora_target_modules,
            **more,
        )
        return get_peft_model(model, lora)
    except (ValueError, re.error) as error:
        raise ConfigError(f"`lora_*` options refused by peft: {error}") from error


def refuse_4bit(trains_all: bool) -> None:
    """Refuse weights in 4 bits where they cannot be had, or where they would have to be trained themselves.

    Args:
        trains_all: whether the run trains weights that are not adapters.

    Raises:
        ConfigError: there is no CUDA device, or all weights are to be trained.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "`load_in_4bit` is True, and there is no CUDA device here, without which bitsandbytes holds no weights in "
            "4 bits. Leave it False; --dtype bfloat16 halves the memory anywhere."
        )
    if trains_all:
        raise ConfigError(
            "`load_in_4bit` is for adapters on a model named with --model_name_or_path: 4-bit weights cannot be "
            "trained themselves. Leave it False."
        )


def refuse_gguf(options: Any) -> None:
    """Refuse a GGUF file that there is no folder for, or that is to be quantized anew.

    Args:
        options: with `gguf_file`, `model_name_or_path` and `load_in_4bit`.

    Raises:
        ConfigError: `gguf_file` without `model_name_or_path`, or with `load_in_4bit`.
    """
    if options.gguf_file is None:
        return
    if options.model_name_or_path is None:
        raise ConfigError(
            f"`gguf_file` {options.gguf_file!r} is a file of a model, and none is named. Give its folder, or its name "
            "on the hub, with --model_name_or_path."
        )
    if options.load_in_4bit:
        raise ConfigError("`load_in_4bit` and `gguf_file` are two quantizations of the same weights. Leave one out.")


def loading_options(options: Any) -> dict[str, Any]:
    """What a recipe passes to a model's `from_pretrained`: `dtype`, 4 bits, a GGUF file."""
    import torch

    loading: dict[str, Any] = {"dtype": getattr(torch, options.dtype)}
    if options.load_in_4bit:
        loading["quantization_config"] = in_4bit()
    if options.gguf_file is not None:
        loading["gguf_file"] = options.gguf_file
        loading |= _unpacked()
    return loading


def _unpacked() -> dict[str, Any]:
    """Full weights of a GGUF file: recent transformers leave them packed otherwise, and refuse to train them."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def in_4bit() -> BitsAndBytesConfig:
    """How QLoRA (Dettmers et al. 2023, arXiv 2305.14314) holds base weights: NF4, quantized twice, bfloat16 sums."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def refuse_encoder(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that reads a text in both directions, and so would see each response that it is to give.

    transformers loads encoders as causal models too, with no more than a warning.

    Raises:
        ConfigError: it is an encoder.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(model.config, "is_decoder", False):
        raise ConfigError(
            f"`model_name_or_path` {name!r} is an encoder ({model.config.model_type}), which reads in both directions "
            "and cannot be tuned to respond. Name a causal language model; recipes/text_classification/ takes encoders."
        )


def refuse_misfit(
    model: Any, name: str, tokenizer: PreTrainedTokenizerBase, tokenizer_name: str, max_length: int
) -> None:
    """Refuse a model that cannot embed what the tokenizer gives, or has no positions for rows of that length.

    Raises:
        ConfigError: its vocabulary or positions do not fit.
    """
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise ConfigError(
            f"the tokenizer {tokenizer_name!r} has {len(tokenizer)} tokens, and the model {name!r} embeds "
            f"{embeddings}: they do not belong together. Give the model's own with --tokenizer_name."
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"`max_seq_length` is {max_length}, and the model {name!r} has {positions} positions. Give at most that "
            "many."
        )
