"""A small Llama, trained a little on plain text, so that adapters have something to adapt."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_reset.corpora.tokenizers import train_tokenizer
from hf_reset.files import written_whole

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase, Trainer

BLOCK = 128  # tokens a row


def small_llama(
    folder: str | Path,
    texts: Sequence[str],
    *,
    hidden_size: int = 128,
    num_hidden_layers: int = 4,
    vocab_size: int = 4000,
    steps: int = 400,
    learning_rate: float = 2e-3,
    positions: int = 256,
    use_cpu: bool = False,
    seed: int = 0,
) -> Path:
    """Train a Llama and its tokenizer on `texts`, unless `folder` holds them already.

    AdamW, 16 rows of 128 tokens a step, cosine schedule after 5 % warm-up. Under several processes all train, one
    writes; the folder appears whole or not at all.

    Args:
        folder: where model and tokenizer go, as `from_pretrained` reads them.
        texts: plain text.
        hidden_size: width, a multiple of 32.
        num_hidden_layers: layers.
        vocab_size: most tokens of the byte-level tokenizer.
        steps: optimizer steps.
        learning_rate: its highest value.
        positions: longest sequence that the model shall ever see.
        use_cpu: train on the CPU even where there is an accelerator.
        seed: of weights and data order.

    Returns:
        The folder.
    """
    import torch
    from transformers import set_seed

    from hf_reset.anchor.shards import whole_state

    folder = Path(folder)
    if folder.is_dir():
        return folder
    tokenizer = train_tokenizer(texts, vocab_size, "bpe", model_max_length=positions)
    blocks = _blocks(tokenizer, texts)
    set_seed(seed)
    config = _config(tokenizer, hidden_size, num_hidden_layers, positions)
    trainer = _trained(config, blocks, steps=steps, learning_rate=learning_rate, use_cpu=use_cpu, seed=seed)
    # Gathered on every rank: under FSDP and ZeRO-3 no rank has the whole.
    state = whole_state(trainer.accelerator, trainer.model_wrapped)
    model: Any = trainer.model
    if trainer.args.should_save:
        _save_whole(folder, partial(model.save_pretrained, state_dict=state), tokenizer.save_pretrained)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return folder


def kept_llama(
    output_dir: str | Path,
    texts: Sequence[str],
    *,
    use_cpu: bool = False,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> Path:
    """`small_llama` in a folder named by texts and settings, so that a study trains it once and other settings anew.

    Args:
        output_dir: the folder goes into it.
        texts: plain text.
        use_cpu: see `small_llama`.
        say: told when there is something to train.
        settings: the other keywords of `small_llama`, but for its seed.
    """
    key = hashlib.blake2b(repr((settings, texts)).encode(), digest_size=4).hexdigest()
    folder = Path(output_dir) / f"base-{key}"
    if not folder.is_dir():
        say(f"training the small Llama for {settings['steps']} steps on plain text, kept in {folder}")
    return small_llama(folder, texts, use_cpu=use_cpu, **settings)


def _blocks(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The texts' tokens one after another, each text with its end, in rows of `BLOCK`."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, verbose=False)["input_ids"], _number(tokenizer, tokenizer.eos_token)]
    rows = max(1, len(ids) // BLOCK)
    return [ids[BLOCK * row : BLOCK * (row + 1)] for row in range(rows)]


def _config(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, num_hidden_layers: int, positions: int
) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=max(1, hidden_size // 32),
        max_position_embeddings=max(BLOCK, positions),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=_number(tokenizer, tokenizer.eos_token),
        pad_token_id=_number(tokenizer, tokenizer.pad_token),
    )


def _trained(
    config: LlamaConfig, blocks: list[list[int]], *, steps: int, learning_rate: float, use_cpu: bool, seed: int
) -> Trainer:
    """The Trainer after training on the blocks."""
    from datasets import Dataset
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as scratch:  # Trainer wants a folder, and writes nothing there
        args = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.01,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=use_cpu,
            seed=seed,
        )
        data = Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch")
        trainer = Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=data)
        trainer.train()
    return trainer


def _number(tokenizer: PreTrainedTokenizerBase, token: object) -> int:
    return tokenizer.get_vocab()[str(token)]


def _save_whole(folder: Path, *saves: Callable[[Path], object]) -> None:
    """All parts into one folder, which is there whole or not at all."""
    with written_whole(folder) as temporary:
        for save in saves:
            save(temporary)
