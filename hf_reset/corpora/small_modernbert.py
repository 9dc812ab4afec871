"""A small ModernBERT classifier, built from its config: untrained, so that no hub is needed for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import ModernBertForSequenceClassification, PreTrainedTokenizerBase


def small_modernbert(
    tokenizer: PreTrainedTokenizerBase,
    labels: Mapping[str, Any],
    *,
    hidden_size: int = 128,
    num_hidden_layers: int = 2,
    positions: int = 64,
) -> ModernBertForSequenceClassification:
    """A sequence classifier with new weights from torch's random generator.

    It averages over tokens: from the first token alone, a few thousand texts teach little before they are memorised.

    Args:
        tokenizer: with the special tokens that `train_tokenizer` gives.
        labels: `num_labels`, `id2label` and `label2id`, as a config takes them.
        hidden_size: width; a head takes 64 of it.
        num_hidden_layers: layers.
        positions: longest sequence.
    """
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    names = ("pad", "cls", "sep", "bos", "eos")
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=max(1, hidden_size // 64),
        intermediate_size=2 * hidden_size,
        max_position_embeddings=positions,
        layer_types=["full_attention"] * num_hidden_layers,
        classifier_pooling="mean",
        embedding_dropout=0.1,
        mlp_dropout=0.1,
        classifier_dropout=0.1,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names},
        **labels,
    )
    model = ModernBertForSequenceClassification(config)
    # accelerate 1.15 makes an FSDP2 unit of the input embeddings by itself, and fails if they are in one already.
    model._no_split_modules = ["ModernBertEncoderLayer"]
    return model
