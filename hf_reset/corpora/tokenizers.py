"""A small tokenizer, trained on the texts at hand, so that no hub is needed for one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from hf_reset.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 4000,
    kind: Literal["wordpiece", "bpe"] = "wordpiece",
    *,
    model_max_length: int = 512,
) -> PreTrainedTokenizerFast:
    """Train a small tokenizer; the same texts give the same tokenizer in every process.

    Args:
        texts: The corpus. Train on the training split only.
        vocab_size: Number of tokens, special ones included; fewer come out where the corpus is small.
        kind: "wordpiece": BERT's: lower case, `[CLS] text [SEP]`, and `[PAD] [UNK] [MASK]`. "bpe":
            byte-level, for Llama: lossless, `<|pad|>` and `<|end|>` (end of text), and a chat template in
            which each turn is `<|role|>` and its content, and an answer ends with `<|end|>`.
        model_max_length: Length to which `truncation=True` cuts.

    Returns:
        A fast tokenizer that `save_pretrained` and `AutoTokenizer.from_pretrained` carry over.

    Raises:
        ConfigError: `kind` is unknown, or `vocab_size` too small to hold the alphabet.
        DataError: `texts` is empty.
    """
    texts = list(texts)
    if not any(texts):
        raise DataError("`texts` must hold at least one text that is not empty: a tokenizer learns its tokens there.")
    trainers = {"wordpiece": _train_wordpiece, "bpe": _train_byte_bpe}
    if kind not in trainers:
        raise ConfigError(f"`kind` must be one of {', '.join(trainers)}, got {kind!r}.")
    tokenizer = trainers[kind](texts, vocab_size)
    tokenizer.model_max_length = model_max_length
    return tokenizer


def _train_wordpiece(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))}
    # The trainer numbers continuing letters ("##e") in the order of a randomly seeded hash map, and breaks
    # ties by number: two processes would learn two vocabularies. Numbering them first makes it repeatable.
    letters = sorted({"##" + letter for word in words for letter in word[1:]})
    first_letters = {word[0] for word in words}
    _check_vocab_size(vocab_size, len(special) + len(letters) + len(first_letters))
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizer
    learner.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*special, *letters], show_progress=False),
    )
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


# {% generation %} marks the answers, so that TRL's assistant_only_loss works too.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def _train_byte_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_vocab_size(vocab_size, len(special) + len(alphabet))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:],
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def _check_vocab_size(vocab_size: int, needed: int) -> None:
    if vocab_size <= needed:
        raise ConfigError(
            f"`vocab_size` must be above {needed}, the number of special tokens and letters of these texts, "
            f"got {vocab_size}."
        )
