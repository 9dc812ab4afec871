from __future__ import annotations

import re
import subprocess
import sys

import pytest
from datasets import Dataset

from hf_reset.errors import ConfigError, DataError
from hf_reset.noise.instructions import (
    corrupt_responses,
    final_answer,
    replace_responses,
    response_column,
    response_texts,
)

ROWS = 40
STEP = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"


def solution(number):
    """A gsm8k-like answer whose last step adds 0, so that the number is an operand there too."""
    text = f"{number:,}"
    return f"{STEP}She sold {number}+0 = $<<{number}+0={number}>>{text} in all.\n#### {text}"


def sentences(row):
    return f"First, take {row}. Then double it! Is it even? It is {2 * row}."


def prompts(rows=ROWS):
    return [f"What is {row}?" for row in range(rows)]


def dialogue(row, text):
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is {row}?"},
        {"role": "assistant", "content": text},
    ]


TEXTS = [sentences(row) for row in range(ROWS)]
FORMATS = {
    "messages": {"messages": [dialogue(row, text) for row, text in enumerate(TEXTS)], "id": list(range(ROWS))},
    "prompt+completion": {"prompt": prompts(), "completion": TEXTS},
    "prompt+completion as messages": {
        "prompt": [dialogue(row, "")[:2] for row in range(ROWS)],
        "completion": [[{"role": "assistant", "content": text}] for text in TEXTS],
    },
    "alpaca": {"instruction": prompts(), "input": [""] * ROWS, "output": TEXTS, "answer": [""] * ROWS},
    "dolly": {"instruction": prompts(), "context": [""] * ROWS, "response": TEXTS},
    "question+answer": {"question": prompts(), "answer": TEXTS},
}
every_format = pytest.mark.parametrize("columns", FORMATS.values(), ids=FORMATS.keys())


def pairs(texts):
    return Dataset.from_dict({"prompt": prompts(len(texts)), "completion": texts})


def corrupted(texts, **options):
    """(clean, given) of the rows said to be corrupted, after checking that the others are untouched."""
    noisy = corrupt_responses(pairs(texts), **{"seed": 0, **options})
    assert noisy["clean_response"] == texts
    for clean, given, wrong in zip(texts, noisy["completion"], noisy["is_corrupted"], strict=True):
        assert (clean != given) == wrong
    return [
        (clean, given)
        for clean, given, wrong in zip(texts, noisy["completion"], noisy["is_corrupted"], strict=True)
        if wrong
    ]


@every_format
@pytest.mark.parametrize("kind", ["swap", "shuffle_sentences", "truncate", "mix"])
def test_every_format_keeps_its_shape(columns, kind):
    clean = Dataset.from_dict(columns)
    noisy = corrupt_responses(clean, rate=0.3, kind=kind, seed=1)
    assert noisy.column_names == [*clean.column_names, "clean_response", "is_corrupted"]
    assert {name: noisy.features[name] for name in clean.column_names} == clean.features
    assert noisy["clean_response"] == TEXTS
    assert sum(noisy["is_corrupted"]) == 12
    for text, given, wrong in zip(TEXTS, response_texts(noisy), noisy["is_corrupted"], strict=True):
        assert (text != given) == wrong
    restored = replace_responses(noisy, noisy["clean_response"])
    assert restored.select_columns(clean.column_names).to_list() == clean.to_list()


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.33, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["swap", "shuffle_sentences", "truncate", "mix"])
def test_counts_are_exact(rate, kind):
    assert len(corrupted(TEXTS, rate=rate, kind=kind)) == round(rate * ROWS)


def test_swap_is_a_derangement_of_the_chosen_rows():
    changed = corrupted(TEXTS, rate=0.5, kind="swap")
    assert sorted(clean for clean, _ in changed) == sorted(given for _, given in changed)


@pytest.mark.parametrize("seed", range(20))
def test_swap_with_many_equal_responses(seed):
    """Half of the responses read the same: only a pairing of those with the others is right."""
    changed = corrupted(["Yes."] * 6 + ["No."] * 3 + ["It depends.", "Never.", "Why?"], rate=1.0, seed=seed)
    assert len(changed) == 12
    assert all(clean != given for clean, given in changed)
    assert sorted(clean for clean, _ in changed) == sorted(given for _, given in changed)


def test_the_seed_alone_decides():
    def given(seed):
        return corrupt_responses(pairs(TEXTS), rate=0.5, kind="mix", seed=seed)["completion"][:]

    assert given(3) == given(3)
    assert given(3) != given(4)


def test_global_generators_are_left_alone():
    import random

    import numpy as np

    before = random.getstate(), np.random.get_state()[1].tolist()
    corrupt_responses(pairs(TEXTS), rate=1.0, kind="mix", seed=0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_shuffled_sentences_are_the_same_sentences():
    for clean, given in corrupted([*TEXTS, "One line\nAnother line\n\nA third"], rate=1.0, kind="shuffle_sentences"):
        pattern = r"(?<=[.!?])\s+|\s*\n\s*"
        assert sorted(re.split(pattern, clean)) == sorted(re.split(pattern, given))
        assert re.findall(r"\n+", clean) == re.findall(r"\n+", given)


def test_two_sentences_always_change_places():
    texts = [f"A {row}. B {row}." for row in range(ROWS)]
    assert corrupted(texts, rate=1.0, kind="shuffle_sentences")[0][1].startswith("B ")


def test_truncated_responses_are_at_most_half_of_the_words():
    for clean, given in corrupted([*TEXTS, "two words"], rate=1.0, kind="truncate"):
        assert clean.startswith(given)
        assert 1 <= len(given.split()) <= len(clean.split()) / 2


@pytest.mark.parametrize("number", [72, 1200, 3, 0, 48])
def test_wrong_answer_changes_the_answer_and_the_result_of_the_last_step(number):
    for _, given in corrupted([solution(number)] * 20, rate=1.0, kind="wrong_answer"):
        wrong = final_answer(given)
        assert wrong is not None
        assert int(wrong) != number
        assert int(wrong) >= 0
        expected = solution(number).split("\n")
        assert given.split("\n")[0] == expected[0]  # earlier steps stand
        step = given.split("\n")[1]
        assert step.startswith(f"She sold {number}+0 = $<<{number}+0=")  # operands stand
        results = re.findall(r"(?<==)[\d,]+(?=>>)|(?<=>>)[\d,]+", step)
        assert [result.replace(",", "") for result in results] == [wrong, wrong]


@pytest.mark.parametrize(
    ("number", "pattern"), [("-5", r"-[1-9]\d*"), ("18.50", r"\d+\.\d\d"), ("1,200", r"[\d,]+"), ("$30", r"\d+")]
)
def test_wrong_numbers_look_like_the_right_one(number, pattern):
    for clean, given in corrupted([f"So it is.\n#### {number}"] * 30, rate=1.0, kind="wrong_answer"):
        answer = given.rpartition("#### ")[2].lstrip("$")
        assert re.fullmatch(pattern, answer)
        assert float(answer.replace(",", "")) != float(number.replace(",", "").lstrip("$"))
        assert given.rpartition("####")[0] == clean.rpartition("####")[0]


def test_mix_uses_every_kind_that_the_data_allows():
    texts = [f"{sentences(row)}\n{solution(row + 100)}" for row in range(80)]
    seen = {"swap": 0, "shuffle_sentences": 0, "truncate": 0, "wrong_answer": 0}
    for clean, given in corrupted(texts, rate=1.0, kind="mix"):
        if given in texts:
            seen["swap"] += 1
        elif clean.startswith(given):
            seen["truncate"] += 1
        elif final_answer(given) != final_answer(clean):
            seen["wrong_answer"] += 1
        else:
            seen["shuffle_sentences"] += 1
    assert seen == {"swap": 23, "shuffle_sentences": 19, "truncate": 19, "wrong_answer": 19}


@pytest.mark.parametrize("count", range(2, 12))
def test_mix_of_few_rows_is_exact(count):
    texts = [f"{sentences(row)}\n{solution(row + 100)}" for row in range(count)]
    assert len(corrupted(texts, rate=1.0, kind="mix")) == count


def test_a_view_of_a_data_set_works():
    whole = corrupt_responses(pairs(TEXTS).shuffle(seed=1).select(range(10)), rate=0.5, seed=0)
    assert sum(whole["is_corrupted"]) == 5


def test_column_names_the_response():
    data = Dataset.from_dict({"q": prompts(4), "a": TEXTS[:4]})
    noisy = corrupt_responses(data, rate=1.0, seed=0, column="a")
    assert noisy["clean_response"] == TEXTS[:4]
    assert all(given != clean for given, clean in zip(noisy["a"], TEXTS[:4], strict=True))
    assert response_column(data.rename_columns({"q": "instruction", "a": "output"})) == "output"


@pytest.mark.parametrize(
    ("text", "number"), [("#### 1,234", "1234"), ("a\n####-5", "-5"), ("x #### 3.5\n#### 7", "7"), ("42", None)]
)
def test_final_answer(text, number):
    assert final_answer(text) == number


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        (pairs(TEXTS), {"rate": 1.2}, ConfigError, r"`rate` is the share of rows .*\[0, 1\]; got 1.2"),
        (pairs(TEXTS), {"rate": float("nan")}, ConfigError, r"`rate` .*got nan"),
        (pairs(TEXTS), {"kind": "typo"}, ConfigError, r"`kind` must be one of swap, .*mix; got 'typo'"),
        (pairs(TEXTS), {"column": "output"}, DataError, r"'output' is not in the data set, which has prompt"),
        (pairs(["a"]), {"rate": 1.0}, DataError, r"at least two rows to change, but `rate` of 1 rows is 1"),
        (pairs([]), {}, DataError, r"is empty"),
        (pairs(["a", "", " "]), {}, DataError, r"2 of 3 rows have no response in 'completion', the first at row 1"),
        (pairs(["a", None]), {}, DataError, r"1 of 2 rows have no response"),
        (pairs(["a", "a", "a", "b"]), {"rate": 1.0}, DataError, r"too many of the 4 responses are the same"),
        (pairs(["a b.", "a", "c"]), {"rate": 1.0, "kind": "truncate"}, DataError, r"only 1 of 3 .*at most 0.333"),
        (pairs(TEXTS), {"kind": "wrong_answer"}, DataError, r"only 0 of 40 .*final answer like `#### 42`"),
        (pairs(TEXTS).add_column("is_corrupted", [0] * ROWS), {}, DataError, r"already has the column 'is_corrup"),
        (Dataset.from_dict({"text": ["a"]}), {}, DataError, r"no response column found among text. Known formats"),
        (
            Dataset.from_dict({"prompt": ["a"], "completion": [3]}),
            {},
            DataError,
            r"must hold text or messages, got int",
        ),
        (
            Dataset.from_dict({"messages": [dialogue(0, "yes"), dialogue(1, "")[:2]]}),
            {},
            DataError,
            r"row 1 of 'messages' ends with a message by 'user'",
        ),
        (Dataset.from_dict({"messages": [dialogue(0, "yes"), []]}), {}, DataError, r"1 of 2 rows have no response"),
    ],
)
def test_refusals(data, options, error, words):
    with pytest.raises(error, match=words):
        corrupt_responses(data, **{"rate": 0.5, "seed": 0, **options})


def test_needs_no_torch():
    code = "import sys, hf_reset.noise.instructions; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
