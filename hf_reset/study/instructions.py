"""Instruction data as a study of wrong responses needs it: one form, split, corrupted, tokenized, accounted for.

Every row left out, and every response cut, is counted in words, for the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_reset.diagnostics.responses import IGNORED, prompt_text
from hf_reset.errors import ConfigError, DataError
from hf_reset.noise.instructions import Kind, corrupt_responses, response_column, response_texts
from hf_reset.study.models import load_tokenizer
from hf_reset.study.splits import at_most, refuse_same_rows, take_split

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# What a row's prompt is made of, by the column its response is in: the question, then what it is about.
_PROMPT_COLUMNS = {
    "completion": ("prompt", None),
    "output": ("instruction", "input"),
    "response": ("instruction", "context"),
    "answer": ("question", None),
}


@dataclass(frozen=True)
class InstructionData:
    """Splits with columns `prompt` (messages), `response`, `clean_response` and `is_corrupted`.

    Attributes:
        train: some responses wrong.
        validation: wrong at the same rate; it chooses anchors.
        test: clean; measured on, it chooses nothing.
        notes: what was left out, cut or carved out, in sentences.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    notes: list[str] = field(default_factory=list)

    @property
    def corrupted(self) -> Dataset:
        """The training rows whose response is wrong."""
        return self.train.select([row for row, wrong in enumerate(self.train["is_corrupted"]) if wrong])

    def refuse_same_rows(self) -> None:
        """Refuse splits that share most of their rows, prompt and response; note a few.

        Raises:
            DataError: more than half of a held-out split's rows are in another split.
        """
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        rows = {
            name: list(map(repr, zip(part["prompt"], part["clean_response"], strict=True)))
            for name, part in parts.items()
        }
        refuse_same_rows(rows, self.notes)

    def tokens(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[dict[str, Dataset], list[str]]:
        """Tokens of the splits, see `encode`, and what was left out or cut, in sentences.

        Where responses are corrupted, also the corrupted training rows as training sees them, `given`, and as they
        were, `clean`.

        Args:
            tokenizer: with a chat template.
            max_length: tokens kept of prompt and response together.
        """
        splits: dict[str, Dataset] = {}
        notes = []
        for name, rows in {"train": self.train, "validation": self.validation, "test": self.test}.items():
            splits[name], counts = encode(rows, tokenizer, max_length)
            for count, what in [
                (counts["prompt_too_long"], "prompts leave no room for a response and were left out"),
                (counts["response_cut"], "responses were cut"),
            ]:
                if count:
                    notes.append(f"{count} of {len(rows)} {name} {what} (`max_seq_length` {max_length}).")
        wrong = list(self.train["is_corrupted"])
        corrupted = [place for place, row in enumerate(splits["train"]["row"]) if wrong[row]]
        if corrupted:  # prompts alone decide what is left out, so the rows are the same in both
            clean, _ = encode(self.train, tokenizer, max_length, column="clean_response")
            splits["given"], splits["clean"] = splits["train"].select(corrupted), clean.select(corrupted)
        return splits, notes


def prepare_instructions(
    splits: Mapping[str, Dataset],
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
    noise_rate: float = 0.0,
    noise_kind: Kind = "swap",
    seed: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    max_predict_samples: int | None = None,
) -> InstructionData:
    """Bring to one form, split, and corrupt.

    Rows without a response or with an empty prompt are left out and counted. A validation or test split that is
    not given is taken from the training rows. Training and validation responses are corrupted at the same rate,
    each split within itself, so that no wrong response was seen in the other.

    Args:
        splits: `train`, and optionally `validation` and `test`, in any format that `corrupt_responses`
            knows.
        prompt_column: text or messages; None finds it by format.
        response_column: text or messages; None finds it by format.
        noise_rate: share of training and of validation responses to make wrong.
        noise_kind: see `corrupt_responses`.
        seed: of the order of rows, the splits and the noise.
        validation_fraction: share of training rows taken for validation where none is given.
        test_fraction: likewise for the test.
        max_train_samples: at most so many training rows.
        max_eval_samples: at most (where taken from training, exactly) so many validation rows.
        max_predict_samples: likewise for the test.

    Raises:
        DataError: a split without rows, or with none that has both a prompt and a response; no prompt or
            response column; too few rows for the splits or for the noise.
    """
    notes: list[str] = []
    form = {name: _one_form(rows, name, prompt_column, response_column, notes) for name, rows in splits.items()}
    train = form["train"].shuffle(seed=seed)
    taken: dict[str, Dataset] = {}
    for name, fraction, most in [
        ("test", test_fraction, max_predict_samples),
        ("validation", validation_fraction, max_eval_samples),
    ]:
        if name in form:
            taken[name] = at_most(form[name].shuffle(seed=seed), most)
        else:
            taken[name], train = take_split(train, name, fraction, most, notes)
    train = at_most(train, max_train_samples)
    return InstructionData(
        train=corrupt_responses(train, rate=noise_rate, kind=noise_kind, seed=seed, column="response"),
        validation=corrupt_responses(
            taken["validation"], rate=noise_rate, kind=noise_kind, seed=seed, column="response"
        ),
        test=corrupt_responses(taken["test"], rate=0.0, seed=seed, column="response"),
        notes=notes,
    )


def encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, column: str = "response"
) -> tuple[Dataset, dict[str, int]]:
    """Tokens of prompt and response by the tokenizer's chat template, with labels on the response alone.

    Prompt and response are tokenized apart, as they are when a response is generated.

    Args:
        rows: with a column `prompt` of messages, and `column` of text.
        tokenizer: with a chat template.
        max_length: tokens kept of prompt and response together; responses are cut to it.
        column: `"response"`, or `"clean_response"`.

    Returns:
        A data set with `input_ids`, `labels` (−100 on the prompt) and `row`, the row's number in `rows`;
        and how many rows were left out because their prompt leaves no room for a response
        (`prompt_too_long`), and how many responses were cut (`response_cut`).

    Raises:
        ConfigError: the tokenizer has no chat template, or one that does not put the response after the prompt.
        DataError: no row is left.
    """
    from datasets import Dataset

    check_chat_template(tokenizer)
    made: dict[str, list[Any]] = {"input_ids": [], "labels": [], "row": []}
    counts = {"prompt_too_long": 0, "response_cut": 0}
    for number, (prompt, response) in enumerate(zip(rows["prompt"], rows[column], strict=True)):
        before, after = _rendered(tokenizer, prompt, response)
        prompt_ids = tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"]
        room = max_length - len(prompt_ids)
        if room < 1:
            counts["prompt_too_long"] += 1
            continue
        response_ids = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"]
        counts["response_cut"] += len(response_ids) > room
        made["input_ids"].append(prompt_ids + response_ids[:room])
        made["labels"].append([IGNORED] * len(prompt_ids) + response_ids[:room])
        made["row"].append(number)
    if not made["row"]:
        raise DataError(
            f"all {len(rows)} prompts have at least `max_seq_length` {max_length} tokens, which leaves no room for a "
            "response. Give a larger --max_seq_length."
        )
    return Dataset.from_dict(made), counts


def prompt_texts(rows: Dataset, prompt_column: str | None = None, response: str | None = None) -> list[str]:
    """The text of each prompt that has any, turns joined by line breaks.

    Args:
        rows: in any format that `corrupt_responses` knows.
        prompt_column: text or messages; None finds it by format.
        response: the response column; None finds it by format.
    """
    prompts = _prompts(rows, prompt_column, response_column(rows, response))
    texts = ("\n".join(turn["content"] for turn in prompt).strip() for prompt in prompts)
    return [text for text in texts if text]


def chat_tokenizer(base: str, options: Any) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template and something to pad with.

    Args:
        base: the model's name on the hub, or a local directory.
        options: of the recipe; `tokenizer_name`, or else the `gguf_file` in `base`, and `chat_template`, a file with
            another template than its own.

    Raises:
        ConfigError: it, or the file, cannot be loaded, or it has no chat template.
    """
    own = {"gguf_file": options.gguf_file} if options.gguf_file and not options.tokenizer_name else {}
    tokenizer = load_tokenizer(options.tokenizer_name or base, argument="tokenizer_name", **own)
    if (chat_template := options.chat_template) is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"`chat_template` {chat_template!r} cannot be read ({error}).") from error
    check_chat_template(tokenizer)
    return tokenizer


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ConfigError: it has none.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so it does not say how a prompt and "
            "its response are set apart. Give one with --chat_template FILE.jinja, or an instruction model's "
            "tokenizer with --tokenizer_name."
        )


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]], response: str) -> tuple[str, str]:
    before = prompt_text(tokenizer, prompt)
    turns = [*prompt, {"role": "assistant", "content": response}]
    whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    if not whole.startswith(before):
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path!r} does not render a conversation as its prompt followed "
            f"by the response ({before[-40:]!r} is not where the response begins in {whole[:200]!r}). Give another "
            "with --chat_template FILE.jinja."
        )
    return before, whole[len(before) :]


def _one_form(rows: Dataset, split: str, prompt_column: str | None, response: str | None, notes: list[str]) -> Dataset:
    """Rows as `prompt` (messages) and `response` (text), those with both."""
    from datasets import Dataset

    if len(rows) == 0:
        raise DataError(f"the {split} split is empty (0 rows). Give a file or data set with rows.")
    response = response_column(rows, response)
    texts = response_texts(rows, response)
    prompts = _prompts(rows, prompt_column, response)
    empty = [not text.strip() for text in texts]
    speechless = [not any(turn["role"] == "user" and turn["content"].strip() for turn in prompt) for prompt in prompts]
    kept = [row for row in range(len(rows)) if not empty[row] and not speechless[row]]
    if count := sum(empty):
        notes.append(f"{count} of {len(rows)} {split} rows have no response in {response!r} and were left out.")
    if count := sum(bare and not none for bare, none in zip(speechless, empty, strict=True)):
        notes.append(f"{count} of {len(rows)} {split} rows have an empty prompt and were left out.")
    if not kept:
        raise DataError(
            f"none of the {len(rows)} {split} rows has both a prompt and a response (in {response!r}). Name the "
            "columns with --prompt_column and --response_column."
        )
    return Dataset.from_dict({"prompt": [prompts[row] for row in kept], "response": [texts[row] for row in kept]})


def _prompts(rows: Dataset, column: str | None, response: str) -> list[list[dict[str, str]]]:
    present = rows.column_names
    if column is None and response == "messages":
        return [[_turn(turn) for turn in turns[:-1]] for turns in rows["messages"]]
    context = None
    if column is None:
        column, context = _PROMPT_COLUMNS.get(response, ("prompt", None))
        column = column if column in present else "prompt"
    if column not in present:
        raise DataError(
            f"`prompt_column` is {column!r}, which the data set does not have. It has {', '.join(present)}; name one "
            "of them with --prompt_column."
        )
    contexts = rows[context] if context in present else [None] * len(rows)
    return [_as_turns(prompt, extra) for prompt, extra in zip(rows[column], contexts, strict=True)]


def _as_turns(prompt: Any, extra: str | None) -> list[dict[str, str]]:
    if isinstance(prompt, list):
        return [_turn(turn) for turn in prompt]
    text = "\n\n".join(part for part in (prompt, extra) if part and part.strip())
    return [{"role": "user", "content": text}]


def _turn(turn: Mapping[str, Any]) -> dict[str, str]:
    return {"role": str(turn["role"]), "content": turn["content"] or ""}
