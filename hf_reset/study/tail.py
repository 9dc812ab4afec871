"""The upper layers of a BERT, trained on the outputs of its lower ones, which are computed once.

What is frozen gives the same numbers at every step (but for its dropout, which is off here), so a study of many
runs need not compute it again: with the upper two of six layers trained, a step costs about a third.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from hf_reset.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Passthrough(nn.Module):
    """In place of the embeddings: what comes in has been through the lower layers already."""

    def forward(self, input_ids: Any = None, inputs_embeds: Tensor | None = None, **rest: object) -> Tensor:
        assert inputs_embeds is not None
        return inputs_embeds


class LowerLayers:
    """The frozen part of a BERT: texts in, hidden states out.

    Args:
        folder: a transformers directory of a BERT.
        trained: how many of its upper layers are trained, and so not computed here.

    Raises:
        ConfigError: the model is no BERT, or has no layer left below the trained ones.
    """

    def __init__(self, folder: str | Path, trained: int = 2) -> None:
        self.folder, self.trained = str(folder), trained
        config = BertConfig.from_pretrained(self.folder)
        if config.model_type != "bert" or not 1 <= trained < config.num_hidden_layers:
            raise ConfigError(
                f"`model` {self.folder!r} is a {config.model_type} of {config.num_hidden_layers} layers; a BERT with "
                f"more than the {trained} trained ones is needed."
            )
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder)
        whole = BertModel.from_pretrained(self.folder)
        self._upper = list(whole.encoder.layer[-trained:])
        self._pooler = whole.pooler
        whole.encoder.layer = whole.encoder.layer[:-trained]
        self._lower = whole.eval()

    @torch.no_grad()
    def states(self, texts: Sequence[str], *, max_length: int = 64, batch_size: int = 64) -> list[Tensor]:
        """Hidden states (L, D) of each text, float32, L its own number of tokens."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            tokens = self.tokenizer(
                [texts[place] for place in places],
                truncation=True,
                max_length=max_length,
                padding=True,
                return_tensors="pt",
            )
            hidden = self._lower(**tokens).last_hidden_state
            for place, states, mask in zip(places, hidden, tokens["attention_mask"], strict=True):
                found[place] = states[mask.bool()].clone()
        return found

    def classifier(self, num_labels: int) -> BertForSequenceClassification:
        """The upper layers and the pooler as pretrained, under a new classification head; takes `inputs_embeds`."""
        config = BertConfig.from_pretrained(self.folder, num_hidden_layers=self.trained, num_labels=num_labels)
        model = BertForSequenceClassification(config)
        for mine, pretrained in zip(model.bert.encoder.layer, self._upper, strict=True):
            mine.load_state_dict(pretrained.state_dict())
        if model.bert.pooler is not None and self._pooler is not None:
            model.bert.pooler.load_state_dict(self._pooler.state_dict())
        model.bert.add_module("embeddings", _Passthrough())
        return model


class HiddenRows(Dataset[dict[str, Any]]):
    """Hidden states and labels as a data set for `Trainer`.

    Args:
        states: (L, D) a row.
        labels: one a row.
    """

    def __init__(self, states: Sequence[Tensor], labels: Sequence[int]) -> None:
        self.states, self.labels = states, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"inputs_embeds": self.states[row], "labels": self.labels[row]}


def pad_states(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: `inputs_embeds` (B, T, D), `attention_mask` (B, T), `labels` (B,)."""
    states = [row["inputs_embeds"] for row in rows]
    width = max(len(one) for one in states)
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in states])
    batch = {"inputs_embeds": nn.utils.rnn.pad_sequence(states, batch_first=True), "attention_mask": mask}
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}
