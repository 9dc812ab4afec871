"""How a causal model does on responses: loss, token accuracy, memory of wrong ones, generations and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_reset.diagnostics.modes import evaluation_mode
from hf_reset.losses.robust import label_log_probability
from hf_reset.noise.instructions import final_answer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_reset.training.hooks import HookKeywords

IGNORED = -100  # the label of a token that is no part of the response


def response_scores(model: nn.Module, rows: Dataset, *, batch_size: int = 32) -> dict[str, float]:
    """Loss and accuracy on the labelled tokens, means over all of them.

    Args:
        model: a causal language model; left in the mode (training or not) it is in.
        rows: with `input_ids` (prompt and response) and `labels` (the response's tokens, −100 elsewhere).
        batch_size: rows a forward pass; rows of like length go together.

    Returns:
        `loss`, in nats a token, and `token_accuracy`, the share of tokens that are the likeliest.
    """
    loss, right, tokens = 0.0, 0, 0
    ids, labels = list(rows["input_ids"]), list(rows["labels"])
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs, mask = _padded([ids[row] for row in chosen], 0, device)
            targets, _ = _padded([labels[row] for row in chosen], IGNORED, device)
            logits = model(input_ids=inputs, attention_mask=mask).logits[:, :-1]
            scored = targets[:, 1:] != IGNORED
            logits, targets = logits[scored], targets[:, 1:][scored]
            loss -= float(label_log_probability(logits, targets).sum())
            right += int((logits.argmax(dim=-1) == targets).sum())
            tokens += len(targets)
    return {"loss": loss / tokens, "token_accuracy": right / tokens}


def response_memory(model: nn.Module, given: Dataset, clean: Dataset, *, batch_size: int = 32) -> float:
    """How much likelier the model finds wrong responses than the clean ones in their place, in nats a token.

    Loss on the clean minus loss on the given response of the same rows. Before training it is about 0 or below
    (the clean response fits its prompt better); it rises as wrong responses are learnt by heart.

    Args:
        model: a causal language model.
        given: tokens of the corrupted rows with the response that training sees.
        clean: of the same rows with the response that it replaced.
        batch_size: rows a forward pass.
    """
    losses = [response_scores(model, rows, batch_size=batch_size)["loss"] for rows in (clean, given)]
    return losses[0] - losses[1]


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]]) -> str:
    """The prompt as the model sees it by the tokenizer's chat template, up to where its response begins."""
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


def generate_responses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> list[str]:
    """The likeliest token at a time (greedy) after each prompt, up to the end of text.

    Args:
        model: a causal language model that generates.
        tokenizer: with a chat template.
        prompts: messages.
        max_new_tokens: most tokens of a response.
        batch_size: prompts at a time.

    Returns:
        One text a prompt, special tokens left out.
    """
    responses: list[str] = []
    device = next(model.parameters()).device
    for start in range(0, len(prompts), batch_size):
        texts = [prompt_text(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        inputs, mask = _padded(ids, 0, device, left=True)  # what stands under the mask is not looked at
        with evaluation_mode(model):
            made = model.generate(
                input_ids=inputs,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        responses += tokenizer.batch_decode(made[:, inputs.shape[1] :], skip_special_tokens=True)
    return [response.strip() for response in responses]


def generation_scores(responses: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """Generated responses against clean ones.

    Args:
        responses: one text a prompt.
        references: the clean responses, in the same order.

    Returns:
        `rouge_l`: mean F-measure of the longest common subsequence of words (Lin 2004), in [0, 1].
        `exact_match`: share with the reference's final number (`#### 42`), of the references that have
        one; None where none has.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = list(zip(references, responses, strict=True))
    overlaps = [scorer.score(reference, response)["rougeL"].fmeasure for reference, response in pairs]
    checkable = [(final_answer(reference), final_answer(response)) for reference, response in pairs]
    matches = [_same_number(right, answer) for right, answer in checkable if right is not None]
    return {
        "rouge_l": sum(overlaps) / len(overlaps),
        "exact_match": sum(matches) / len(matches) if matches else None,
    }


class ResponseCurvesCallback(TrainerCallback):
    """At each evaluation, loss on clean responses and memory of wrong ones, into the log history.

    Neither chooses anything. The entries' keys are `clean_loss` and `response_memory`.

    Args:
        test: tokens of clean held-out responses.
        given: tokens of corrupted training rows as training sees them; None where there are none.
        clean: of the same rows with their clean responses.
    """

    def __init__(self, test: Dataset, given: Dataset | None = None, clean: Dataset | None = None) -> None:
        self.test = test
        self.given = given
        self.clean = clean
        self._is_training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """The first point of each curve, before anything is learnt."""
        self._is_training = True
        if state.global_step == 0:
            self._measure(kwargs["model"], args, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """One point of each curve, once a step."""
        measured = any("clean_loss" in entry for entry in state.log_history if entry.get("step") == state.global_step)
        if self._is_training and not measured:
            self._measure(kwargs["model"], args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Evaluations after training are no points of the curves."""
        self._is_training = False

    def _measure(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        size = args.per_device_eval_batch_size
        entry = {"clean_loss": response_scores(model, self.test, batch_size=size)["loss"]}
        if self.given is not None and self.clean is not None:
            entry["response_memory"] = response_memory(model, self.given, self.clean, batch_size=size)
        state.log_history.append({**entry, "step": state.global_step})


def _padded(
    rows: Sequence[Sequence[int]], filler: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows as one tensor (B, T), and the mask of what is not filler."""
    width = max(map(len, rows))
    fill = [[filler] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * (width - len(row)) for row in rows]
    both = [(fill, rows), (zeros, ones)] if left else [(rows, fill), (ones, zeros)]
    filled, mask = (torch.tensor([[*a, *b] for a, b in zip(*pair, strict=True)], device=device) for pair in both)
    return filled, mask


def _same_number(right: str | None, answer: str | None) -> bool:
    return right is not None and answer is not None and float(right) == float(answer)
