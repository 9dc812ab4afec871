"""Wrong responses in instruction data, in exact number, with the clean ones kept beside them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hf_reset.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["swap", "shuffle_sentences", "truncate", "wrong_answer", "mix"]

# Where the response stands, by the columns that a format has; the first whose columns are all there counts.
_FORMATS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("messages",), "messages"),
    (("prompt", "completion"), "completion"),
    (("instruction", "output"), "output"),
    (("instruction", "response"), "response"),
    (("question", "answer"), "answer"),
    (("prompt", "response"), "response"),
)
_ADDED = ("clean_response", "is_corrupted")
_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
_FINAL_ANSWER = re.compile(rf"(####\s*)[$€£]?(?P<number>{_NUMBER})")


def corrupt_responses(
    dataset: Dataset,
    *,
    rate: float,
    kind: Kind = "swap",
    seed: int,
    column: str | None = None,
) -> Dataset:
    """Make exactly `round(rate * len(dataset))` of the responses wrong.

    Which rows, and how, depends on the seed and the rows' positions alone.

    Args:
        dataset: in one of the usual formats: `messages` (the response is the last message, by the
            assistant), `prompt` and `completion` (text or messages), `instruction` (and `input`) with
            `output` or `response`, or `question` and `answer`. Every row needs a response.
        rate: share of the rows, in [0, 1].
        kind: "swap" gives the chosen rows each other's responses, none its own nor one that reads the same;
            "shuffle_sentences" puts a response's sentences (lines too) in another order; "truncate" keeps
            between one word and half of them; "wrong_answer" changes the number of a gsm8k-like final answer
            `#### 42`, there and as the result of the step before it; "mix" splits the chosen rows evenly
            among those of the four that the data allows (what cannot be split is swapped).
        seed: of this noise; the global generators are not touched.
        column: where the response is, a column of text or of messages; None finds it by format.

    Returns:
        The data set with wrong responses in place, in the same order and with the same columns, and with
        `clean_response` (the text of the response before) and `is_corrupted` (whether it was changed).

    Raises:
        ConfigError: `rate` or `kind` is not one that exists.
        DataError: no response column, or not the one named; a row without a response; a column that would be
            overwritten; fewer rows that `kind` can make wrong than `rate` asks for.

    Example:
        >>> from datasets import Dataset
        >>> clean = Dataset.from_dict({"prompt": ["1+1?", "2+2?"], "completion": ["It is 2.", "It is 4."]})
        >>> corrupt_responses(clean, rate=1.0, kind="swap", seed=0)["completion"][0]
        'It is 4.'
    """
    _check_arguments(dataset, rate, kind)
    column = response_column(dataset, column)
    clean = response_texts(dataset, column)
    if missing := [row for row, text in enumerate(clean) if not text.strip()]:
        raise DataError(
            f"{len(missing)} of {len(clean)} rows have no response in {column!r}, the first at row {missing[0]}. "
            "Drop them first."
        )
    wrong = _KINDS[kind](clean, round(rate * len(clean)), seed)
    given = [wrong.get(row, text) for row, text in enumerate(clean)]
    return (
        replace_responses(dataset, given, column)
        .add_column("clean_response", clean)
        .add_column("is_corrupted", [row in wrong for row in range(len(clean))])
    )


def _check_arguments(dataset: Dataset, rate: float, kind: str) -> None:
    if not 0.0 <= rate <= 1.0:
        raise ConfigError(f"`rate` is the share of rows to make wrong, in [0, 1]; got {rate}.")
    if kind not in _KINDS:
        raise ConfigError(f"`kind` must be one of {', '.join(_KINDS)}; got {kind!r}.")
    if len(dataset) == 0:
        raise DataError("the data set is empty: there is no response to make wrong.")
    if taken := [name for name in _ADDED if name in dataset.column_names]:
        raise DataError(
            f"the data set already has the column {taken[0]!r}, which corrupt_responses adds. Corrupt the clean "
            "data, or rename that column."
        )


def response_column(dataset: Dataset, column: str | None = None) -> str:
    """The column that holds the responses: `column` where it exists, else found by the formats above.

    Raises:
        DataError: `column` is not in the data set, or no known format fits (its columns are listed).
    """
    present = dataset.column_names
    if column is not None:
        if column not in present:
            raise DataError(f"`column` {column!r} is not in the data set, which has {', '.join(present)}.")
        return column
    for needed, response in _FORMATS:
        if set(needed) <= set(present):
            return response
    raise DataError(
        f"no response column found among {', '.join(present)}. Known formats are "
        f"{'; '.join(' + '.join(needed) for needed, _ in _FORMATS)}. Name it with `column`."
    )


def response_texts(dataset: Dataset, column: str | None = None) -> list[str]:
    """The text of each response, "" where there is none.

    Raises:
        DataError: as `response_column`; or the column holds neither text nor messages, or messages that do
            not end with the assistant's.
    """
    column = response_column(dataset, column)
    return [_text_of(value, column, row) for row, value in enumerate(dataset.with_format(None)[column])]


def replace_responses(dataset: Dataset, texts: Sequence[str], column: str | None = None) -> Dataset:
    """The data set with other response texts, the same in every other way (columns, their order and types).

    Args:
        dataset: see `corrupt_responses`.
        texts: one a row.
        column: where the response is; None finds it by format.
    """
    column = response_column(dataset, column)
    old = dataset.with_format(None)[column]
    new = [_with_text(value, text) for value, text in zip(old, texts, strict=True)]
    features, order = dataset.features, dataset.column_names
    replaced = dataset.remove_columns(column).add_column(column, new, feature=features[column])
    return replaced.select_columns(order)


def final_answer(text: str) -> str | None:
    """The number of a gsm8k-like final answer `#### 1,234`, without commas; None where there is none."""
    found = _FINAL_ANSWER.findall(text)
    return found[-1][1].replace(",", "") if found else None


def _text_of(value: Any, column: str, row: int) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        if not value:
            return ""
        if value[-1].get("role") != "assistant":
            raise DataError(
                f"row {row} of {column!r} ends with a message by {value[-1].get('role')!r}, not by 'assistant', so "
                "it has no response. Drop such rows first."
            )
        return value[-1].get("content") or ""
    raise DataError(
        f"column {column!r} must hold text or messages, got {type(value).__name__} at row {row}. Name the response "
        "column with `column`."
    )


def _with_text(value: Any, text: str) -> Any:
    return [*value[:-1], {**value[-1], "content": text}] if isinstance(value, list) else text


# Each kind takes the clean texts, how many to change, and the seed, and gives the wrong text of each row changed.
_Wrong = dict[int, str]


def _swap(texts: Sequence[str], count: int, seed: int, free: Sequence[int] | None = None) -> _Wrong:
    """Random rows, `count` of them and from `free` alone, on a cycle that never meets the same text twice."""
    if count == 0:
        return {}
    rows = range(len(texts)) if free is None else free
    order: list[int] = np.random.default_rng([seed, 0]).permutation(rows).tolist()
    if count == 1:
        raise DataError(
            f"'swap' exchanges responses and needs at least two rows to change, but `rate` of {len(texts)} rows is 1. "
            "Use a higher rate, more rows or another kind."
        )
    chosen: list[int] = []
    times: Counter[str] = Counter()
    for row in order:  # a text in more than half of the chosen rows would have to meet itself
        if len(chosen) < count and times[texts[row]] < count // 2:
            times[texts[row]] += 1
            chosen.append(row)
    if len(chosen) < count:
        raise DataError(
            f"'swap' cannot give {count} rows a response that reads differently: too many of the {len(order)} "
            "responses are the same. Use a lower rate or remove duplicates."
        )
    # Equal texts side by side; going on by the length of the longest such run always leaves it.
    first = {text: place for place, text in reversed(list(enumerate(texts[row] for row in chosen)))}
    chosen.sort(key=lambda row: first[texts[row]])
    step = max(times.values())
    donors = chosen[step:] + chosen[:step]
    return {row: texts[donor] for row, donor in zip(chosen, donors, strict=True)}


def _one_by_one(
    change: Callable[[str, np.random.Generator], str | None], needs: str
) -> Callable[[Sequence[str], int, int], _Wrong]:
    """A kind that changes each response by itself; `change` gives None where it cannot."""

    def corrupt(texts: Sequence[str], count: int, seed: int) -> _Wrong:
        order = np.random.default_rng([seed, 0]).permutation(len(texts)).tolist()
        wrong = _first_changed(change, texts, order, count, seed)
        if len(wrong) < count:
            raise DataError(
                f"only {len(wrong)} of {len(texts)} responses have {needs}, and `rate` asks for {count} wrong ones. "
                f"Use a rate of at most {math.floor(1000 * len(wrong) / len(texts)) / 1000} or another kind."
            )
        return wrong

    return corrupt


def _first_changed(
    change: Callable[[str, np.random.Generator], str | None],
    texts: Sequence[str],
    order: Sequence[int],
    count: int,
    seed: int,
) -> _Wrong:
    wrong: _Wrong = {}
    for row in order:
        if len(wrong) == count:
            break
        # A generator a row, so that what becomes of it does not depend on the rows drawn before.
        text = change(texts[row], np.random.default_rng([seed, 1, row]))
        if text is not None:
            wrong[row] = text
    return wrong


def _shuffle_sentences(text: str, rng: np.random.Generator) -> str | None:
    pieces = re.split(r"((?<=[.!?])\s+|\s*\n\s*)", text.strip())
    sentences, gaps = pieces[::2], [*pieces[1::2], ""]
    different = [place for place, sentence in enumerate(sentences) if sentence != sentences[0]]
    if not different:
        return None
    shuffled = [sentences[place] for place in rng.permutation(len(sentences))]
    if shuffled == sentences:
        other = different[int(rng.integers(len(different)))]
        shuffled[0], shuffled[other] = shuffled[other], shuffled[0]
    return "".join(sentence + gap for sentence, gap in zip(shuffled, gaps, strict=True))


def _truncate(text: str, rng: np.random.Generator) -> str | None:
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    if len(ends) < 2:
        return None
    return text[: ends[int(rng.integers(len(ends) // 2))]]


def _wrong_answer(text: str, rng: np.random.Generator) -> str | None:
    found = list(_FINAL_ANSWER.finditer(text))
    if not found:
        return None
    start, end = found[-1].span("number")
    right = text[start:end]
    wrong = _other_number(right, rng)
    steps, step, rest = _last_step(text[: found[-1].start()])
    step = re.sub(
        rf"((?:=|>>)\s*[$€£]?\s*)({_NUMBER})",
        lambda match: match[1] + (wrong if _plain(match[2]) == _plain(right) else match[2]),
        step,
    )
    return steps + step + rest + text[found[-1].start() : start] + wrong + text[end:]


def _last_step(steps: str) -> tuple[str, str, str]:
    """What comes before the last line that is not blank, that line, and the blanks after it."""
    body = steps.rstrip()
    line = body.rfind("\n") + 1
    return body[:line], body[line:], steps[len(body) :]


def _other_number(number: str, rng: np.random.Generator) -> str:
    """Another number near this one, with as many decimals, of the same sign, and with commas where it has them."""
    decimals = len(number.partition(".")[2])
    value = round(abs(float(_plain(number))) * 10**decimals)
    span = max(9, value // 2)
    low = max(int(number.startswith("-")), value - span)  # no "-0"
    other = int(rng.integers(low, value + span))
    other += other >= value  # leaves out the value itself
    text = f"{other / 10**decimals:,.{decimals}f}" if decimals else f"{other:,}"
    return ("-" if number.startswith("-") else "") + (text if "," in number else text.replace(",", ""))


def _plain(number: str) -> str:
    return number.replace(",", "")


_CHANGES: dict[str, Callable[[str, np.random.Generator], str | None]] = {
    "shuffle_sentences": _shuffle_sentences,
    "truncate": _truncate,
    "wrong_answer": _wrong_answer,
}


def _mix(texts: Sequence[str], count: int, seed: int) -> _Wrong:
    order = np.random.default_rng([seed, 2]).permutation(len(texts)).tolist()
    usable = [
        change
        for change in _CHANGES.values()
        if any(change(text, np.random.default_rng(0)) is not None for text in texts)
    ]
    share = max(0, count - 1) // (len(usable) + 1)  # leaves no fewer than two rows to swap
    wrong: _Wrong = {}
    for change in usable:
        free = [row for row in order if row not in wrong]
        wrong |= _first_changed(change, texts, free, share, seed)
    free = [row for row in order if row not in wrong]
    return wrong | _swap(texts, count - len(wrong), seed, free)


_KINDS: dict[str, Callable[[Sequence[str], int, int], _Wrong]] = {
    "swap": _swap,
    "shuffle_sentences": _one_by_one(_shuffle_sentences, "two different sentences"),
    "truncate": _one_by_one(_truncate, "two words"),
    "wrong_answer": _one_by_one(_wrong_answer, "a final answer like `#### 42`"),
    "mix": _mix,
}
