from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_reset.corpora import train_tokenizer
from hf_reset.diagnostics.responses import prompt_text
from hf_reset.errors import ConfigError, DataError
from hf_reset.study.instructions import encode, prepare_instructions, prompt_texts

QUESTIONS = [f"What is {row} plus one?" for row in range(60)]
ANSWERS = [f"Take {row}. It is {row + 1}." for row in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*QUESTIONS, *ANSWERS], 400, "bpe")


def pairs(questions=QUESTIONS, answers=ANSWERS):
    return Dataset.from_dict({"prompt": questions, "completion": answers})


def user(text):
    return [{"role": "user", "content": text}]


def test_splits_are_apart_noisy_alike_and_the_test_is_clean():
    data = prepare_instructions({"train": pairs()}, noise_rate=0.4, seed=3, max_eval_samples=10, max_predict_samples=20)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 20)
    assert sum(data.train["is_corrupted"]) == 12
    assert sum(data.validation["is_corrupted"]) == 4
    assert not any(data.test["is_corrupted"])
    clean = [set(part["clean_response"]) for part in (data.train, data.validation, data.test)]
    assert len(set.union(*clean)) == 60
    assert set(data.validation["response"]).isdisjoint(data.train["response"])
    assert data.notes == [
        "No test split was given: 20 of 60 training rows were taken for it.",
        "No validation split was given: 10 of 40 training rows were taken for it.",
    ]
    for prompt, response, clean_response, wrong in zip(
        *(data.train[name] for name in ("prompt", "response", "clean_response", "is_corrupted")), strict=True
    ):
        right = ANSWERS[QUESTIONS.index(prompt[0]["content"])]
        assert clean_response == right
        assert (response != right) == wrong


def test_the_seed_decides_rows_and_noise():
    def responses(seed):
        return list(prepare_instructions({"train": pairs()}, noise_rate=0.5, seed=seed).train["response"])

    assert responses(1) == responses(1) != responses(2)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"instruction": ["Add"], "input": ["1, 2"], "output": ["3"]}, user("Add\n\n1, 2")),
        ({"instruction": ["Add"], "input": [""], "output": ["3"]}, user("Add")),
        ({"instruction": ["Add"], "context": [None], "response": ["3"]}, user("Add")),
        ({"question": ["Add"], "answer": ["3"]}, user("Add")),
        ({"prompt": ["Add"], "response": ["3"]}, user("Add")),
        ({"prompt": [user("Add")], "completion": [[{"role": "assistant", "content": "3"}]]}, user("Add")),
        (
            {
                "messages": [
                    [
                        {"role": "system", "content": "Be brief."},
                        *user("Add"),
                        {"role": "assistant", "content": "3"},
                    ]
                ]
            },
            [{"role": "system", "content": "Be brief."}, *user("Add")],
        ),
    ],
)
def test_every_format_becomes_one(columns, expected):
    rows = Dataset.from_dict(columns)
    data = prepare_instructions({"train": rows, "validation": rows, "test": rows})
    assert list(data.train["prompt"]) == [expected]
    assert list(data.train["response"]) == ["3"]


def test_columns_by_name_and_prompts_as_text():
    rows = Dataset.from_dict({"q": ["one", "two"], "a": ["1", "2"], "prompt": ["x", "y"]})
    data = prepare_instructions(
        {"train": rows, "validation": rows, "test": rows}, prompt_column="q", response_column="a"
    )
    assert sorted(turns[0]["content"] for turns in data.train["prompt"]) == ["one", "two"]
    assert prompt_texts(rows, "q", "a") == ["one", "two"]


def test_rows_without_response_or_prompt_are_left_out_and_counted():
    rows = pairs(["a", "", "  ", "d", "e", None], ["A", "B", "C", "", None, None])
    data = prepare_instructions({"train": rows, "validation": pairs(), "test": pairs()})
    assert list(data.train["response"]) == ["A"]
    assert data.notes == [
        "3 of 6 train rows have no response in 'completion' and were left out.",
        "2 of 6 train rows have an empty prompt and were left out.",
    ]


@pytest.mark.parametrize(
    ("splits", "options", "error", "words"),
    [
        ({"train": pairs([], [])}, {}, DataError, r"the train split is empty \(0 rows\)"),
        ({"train": pairs(["a"], [""])}, {}, DataError, r"none of the 1 train rows has both a prompt and a response"),
        ({"train": pairs().remove_columns("prompt")}, {"response_column": "completion"}, DataError, r"`prompt_column`"),
        (
            {"train": pairs()},
            {"max_eval_samples": 60},
            DataError,
            r"`max_eval_samples` 60 would leave no row to train on",
        ),
        ({"train": pairs()}, {"test_fraction": 1.5}, ConfigError, r"`test_fraction` must be in \(0, 1\), got 1.5"),
        (
            {"train": pairs(["a"], ["A"]), "validation": pairs(), "test": pairs()},
            {"noise_rate": 1.0},
            DataError,
            r"needs at least two rows to change, but `rate` of 1 rows is 1",
        ),
    ],
)
def test_refusals(splits, options, error, words):
    with pytest.raises(error, match=words):
        prepare_instructions(splits, **options)


def test_labels_are_the_response_and_its_end(tokenizer):
    rows = Dataset.from_dict({"prompt": [user("What is 1?")], "response": ["It is 1."], "clean_response": ["No."]})
    tokens, counts = encode(rows, tokenizer, 64)
    labelled = [token for token in tokens[0]["labels"] if token != -100]
    assert tokenizer.decode(labelled) == "It is 1.<|end|>\n"
    assert tokens[0]["input_ids"][-len(labelled) :] == labelled
    assert tokenizer.decode(tokens[0]["input_ids"]) == "<|user|>\nWhat is 1?\n<|assistant|>\nIt is 1.<|end|>\n"
    assert counts == {"prompt_too_long": 0, "response_cut": 0}
    clean, _ = encode(rows, tokenizer, 64, column="clean_response")
    assert "No." in tokenizer.decode(clean[0]["input_ids"])


def test_what_does_not_fit_is_counted(tokenizer):
    rows = Dataset.from_dict(
        {"prompt": [user("What"), user("What is " * 40), user("is")], "response": ["It is 1."] * 3}
    )
    room = len(tokenizer(prompt_text(tokenizer, user("What")))["input_ids"]) + 2
    tokens, counts = encode(rows, tokenizer, room)
    assert counts == {"prompt_too_long": 1, "response_cut": 2}
    assert list(tokens["row"]) == [0, 2]
    assert max(map(len, tokens["input_ids"])) == room
    with pytest.raises(DataError, match=r"all 3 prompts have at least `max_seq_length` 2 tokens"):
        encode(rows, tokenizer, 2)


def test_chat_templates_that_do_not_serve_are_refused(tokenizer):
    from copy import copy

    rows = Dataset.from_dict({"prompt": [user("a")], "response": ["b"]})
    bare, odd = copy(tokenizer), copy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match=r"has no chat template.*--chat_template FILE.jinja"):
        encode(rows, bare, 16)
    odd.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    with pytest.raises(ConfigError, match=r"does not render a conversation as its prompt followed by the response"):
        encode(rows, odd, 16)


# What is measured on responses.


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def rows_of(count, wrong=0):
    prompts = [user(question) for question in QUESTIONS[:count]]
    given = [ANSWERS[-1 - row] if row < wrong else ANSWERS[row] for row in range(count)]
    return Dataset.from_dict({"prompt": prompts, "response": given, "clean_response": ANSWERS[:count]})


def test_scores_equal_the_models_own_loss_whatever_the_batch(model, tokenizer):
    from hf_reset.diagnostics.responses import response_scores

    tokens, _ = encode(rows_of(7), tokenizer, 64)
    total, right, count = 0.0, 0, 0
    for row in tokens:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        scored = int((labels[:, 1:] != -100).sum())
        output = model(input_ids=ids, labels=labels)
        total += float(output.loss.detach()) * scored
        right += int((output.logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100].sum())
        count += scored
    for batch_size in (1, 3, 32):
        scores = response_scores(model, tokens, batch_size=batch_size)
        assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
        assert scores["token_accuracy"] == pytest.approx(right / count)


def test_memory_rises_when_wrong_responses_are_learnt(tokenizer):
    from hf_reset.diagnostics.responses import response_memory

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    rows = rows_of(4, wrong=4)
    given, _ = encode(rows, tokenizer, 64)
    clean, _ = encode(rows, tokenizer, 64, column="clean_response")
    before = response_memory(model, given, clean)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        row = given[step % 4]
        model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert response_memory(model, given, clean) > before + 0.5
    assert response_memory(model, given, clean) == -response_memory(model, clean, given)


def test_generation_does_not_depend_on_the_batch(model, tokenizer):
    from hf_reset.diagnostics.responses import generate_responses

    prompts = [user("What?"), user("What is 3 plus one?"), user("What is 12 plus one? It is")]
    model.train()
    alone = generate_responses(model, tokenizer, prompts, max_new_tokens=6, batch_size=1)
    together = generate_responses(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    assert alone == together
    assert model.training  # left as it was


def test_generation_scores():
    from hf_reset.diagnostics.responses import generation_scores

    scores = generation_scores(["the cat sat", "#### 1,000"], ["the cat ran", "so\n#### 1000.0"])
    assert scores["rouge_l"] == pytest.approx((2 / 3 + 0) / 2)  # "the cat" in common; no word
    assert scores["exact_match"] == 1.0
    assert generation_scores(["#### 5"], ["five"])["exact_match"] is None
    assert generation_scores(["five"], ["#### 5"])["exact_match"] == 0.0
