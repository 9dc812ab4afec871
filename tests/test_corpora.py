"""The embedded corpus: what is in it, that nothing leaks between splits, that it is the same everywhere."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from datasets import ClassLabel, Value
from transformers import AutoTokenizer

from hf_reset import corpora
from hf_reset.corpora import docstrings
from hf_reset.errors import ConfigError, DataError

STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="session")
def topics():
    return corpora.docstring_topics()


@pytest.fixture(scope="session")
def summaries():
    return corpora.docstring_summaries()


@pytest.fixture(scope="session")
def texts():
    return corpora.docstring_text()


@pytest.fixture(params=["topics", "summaries", "texts"])
def view(request):
    return request.getfixturevalue(request.param)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


# ----------------------------------------------------------------------------------------------- topics


def test_topics_are_eight_areas_in_three_splits(topics):
    assert list(topics) == ["train", "validation", "test"]
    for split in topics.values():
        assert split.column_names == ["text", "label", "file"]
        label = split.features["label"]
        assert isinstance(label, ClassLabel)
        assert label.names == sorted(corpora.AREAS)
        assert label.num_classes == 8
        assert set(split["label"]) == set(range(8))
        assert split.features["text"] == Value("string")
        assert all(len(text.split()) >= 4 for text in split["text"])
    sizes = {name: len(split) for name, split in topics.items()}
    total = sum(sizes.values())
    assert total > 4000
    assert 0.6 < sizes["train"] / total < 0.8
    assert 0.1 < sizes["validation"] / total < 0.2


def test_a_text_is_a_docstring_of_its_file_and_its_label_the_files_area(topics):
    areas = {module: area for area, modules in corpora.AREAS.items() for module in modules}
    names = topics["test"].features["label"].names
    documented: dict[str, set[str]] = {}
    for row in topics["test"].select(range(150)):
        file = row["file"]
        assert names[row["label"]] == areas[file.split("/")[0].removesuffix(".py")]
        if file not in documented:
            tree = ast.parse((STDLIB / file).read_bytes())
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
            documented[file] = {" ".join((ast.get_docstring(node) or "").split()) for node in nodes}
        assert row["text"] in documented[file]


def test_areas_are_of_comparable_size(topics):
    counts = [topics["train"]["label"][:].count(i) for i in range(8)]
    assert max(counts) < 8 * min(counts)


# ----------------------------------------------------------------------------------------------- leakage


def test_no_file_is_in_two_splits(view):
    files = [set(split["file"]) for split in view.values()]
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]


def test_a_file_is_in_the_same_split_of_each_view(topics, summaries, texts):
    split_of: dict[str, str] = {}
    for view in (topics, summaries, texts):
        for name, split in view.items():
            for file in split["file"]:
                assert split_of.setdefault(file, name) == name


@pytest.mark.parametrize("name", ["topics", "summaries", "texts"])
def test_no_text_is_twice_nor_nearly(name, request):
    """By comparing all pairs, which the package does not."""
    column = {"topics": "text", "summaries": "completion", "texts": "text"}[name]
    view = request.getfixturevalue(name)
    sets = [set(words(text)) for split in view.values() for text in split[column]]
    vocabulary = {word: i for i, word in enumerate(sorted(set().union(*sets)))}
    import numpy as np

    matrix = np.zeros((len(sets), len(vocabulary)), dtype=np.float32)
    for row, found in enumerate(sets):
        matrix[row, [vocabulary[word] for word in found]] = 1
    sizes = matrix.sum(axis=1)
    for start in range(0, len(sets), 500):
        shared = matrix[start : start + 500] @ matrix.T
        similarity = shared / (sizes[start : start + 500, None] + sizes - shared)
        for offset, row in enumerate(similarity):
            row[start + offset] = 0
        assert similarity.max() < 0.8


def test_text_gives_no_answer_away(summaries, texts):
    """The summary of a function of the training files, in the functions' own docstrings, is what is asked for."""
    whole = {" ".join(text.split()) for split in texts.values() for text in split["text"]}
    asked = [completion for split in summaries.values() for completion in split["completion"]]
    given_away = sum(completion in whole for completion in asked)
    assert given_away / len(asked) < 0.002  # a class may be documented in a function's words


# --------------------------------------------------------------------------------------------- summaries


def test_summaries_ask_for_the_first_paragraph(summaries):
    row = next(
        row for row in summaries[_split_of("textwrap.py", summaries)] if row["prompt"].startswith("textwrap.fill")
    )
    assert row["prompt"] == "textwrap.fill(text, width=70, **kwargs)"
    assert row["completion"] == "Fill a single paragraph of text, returning a new string."
    assert summaries["train"].column_names == ["prompt", "completion", "file"]


def _split_of(file, view):
    return next(name for name, split in view.items() if file in split["file"][:])


def test_summaries_can_show_the_source():
    view = corpora.docstring_summaries(form="source", max_body_lines=5)
    prompts = [row["prompt"] for row in view[_split_of("textwrap.py", view)] if row["file"] == "textwrap.py"]
    fill = next(prompt for prompt in prompts if "def fill(text," in prompt)
    assert fill == (
        "# textwrap\ndef fill(text, width=70, **kwargs):\n"
        "    w = TextWrapper(width=width, **kwargs)\n    return w.fill(text)"
    )
    assert all(len(prompt.split("\n")) <= 7 for split in view.values() for prompt in split["prompt"])
    with pytest.raises(ConfigError, match='`form` must be "signature" or "source", got \'body\''):
        corpora.docstring_summaries(form="body")


# ------------------------------------------------------------------------------------------- repeatable


def fingerprint() -> str:
    rows = [[split["text"][:], split["label"][:]] for split in corpora.docstring_topics(3).values()]
    tokenizer = corpora.train_tokenizer(rows[0][0][:500], 800)
    rows.append(sorted(tokenizer.get_vocab().items()))
    rows.append(sorted(corpora.train_tokenizer(rows[0][0][:500], 800, "bpe").get_vocab().items()))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def test_another_process_makes_the_same_corpus_and_tokenizers():
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import test_corpora as t; print(t.fingerprint())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == fingerprint()


def test_seeds_split_differently_but_hold_the_same_texts(topics):
    other = corpora.docstring_topics(1)
    assert set(other["test"]["file"]) != set(topics["test"]["file"])
    one, two = (sorted(t for split in view.values() for t in split["text"]) for view in (topics, other))
    assert one == two


def test_fractions():
    view = corpora.docstring_topics(validation_fraction=0.3, test_fraction=0)
    assert len(view["test"]) == 0
    assert 0.2 < len(view["validation"]) / (len(view["train"]) + len(view["validation"])) < 0.4
    for wrong in ({"validation_fraction": 0.5, "test_fraction": 0.5}, {"test_fraction": -0.1}):
        with pytest.raises(ConfigError, match="`validation_fraction` and `test_fraction` must not be negative"):
            corpora.docstring_topics(**wrong)


# ---------------------------------------------------------------------------- other installations of Python


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A standard library of one's own making."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    (tmp_path / "lib").mkdir()
    docstrings._documents.cache_clear()
    docstrings._split_of_files.cache_clear()
    yield tmp_path / "lib"
    docstrings._documents.cache_clear()
    docstrings._split_of_files.cache_clear()


def test_nothing_read_is_run_or_imported_and_bad_files_are_passed_over(elsewhere):
    (elsewhere / "json.py").write_text('"""Reads and writes one kind of text."""\nraise SystemExit("was run")\n')
    (elsewhere / "csv.py").write_text("def broken(:\n")
    (elsewhere / "html.py").write_bytes(b"# coding: no-such-coding\n'''Some words in a docstring.'''\n")
    (elsewhere / "xml").mkdir()
    (elsewhere / "xml" / "__init__.py").write_bytes(
        "# coding: latin-1\n'''Für mancherlei Bäume und Äste.'''".encode("latin-1")
    )
    (elsewhere / "site-packages").mkdir()
    (elsewhere / "site-packages" / "io.py").write_text('"""Not of the standard library at all."""')
    view = corpora.docstring_topics(validation_fraction=0, test_fraction=0)
    assert sorted(view["train"]["text"]) == ["Für mancherlei Bäume und Äste.", "Reads and writes one kind of text."]


def test_definitions_are_found_wherever_they_stand(elsewhere):
    source = '''
if True:
    try:
        class Outer:
            """A class under if and try."""
            def method(self):
                """A method of that class here."""
                def inner():
                    """A function in a method there."""
    except ImportError:
        async def fallback(a, *, b=1):
            """A coroutine under an except clause."""
match x:
    case 1:
        def matched(): """A function in one line below.""" ; return 1
'''
    (elsewhere / "textwrap.py").write_text(source)
    names = {document.name: document for document in docstrings._documents()}
    assert list(names) == [
        "textwrap.Outer",
        "textwrap.Outer.method",
        "textwrap.Outer.method.inner",
        "textwrap.fallback",
        "textwrap.matched",
    ]
    assert names["textwrap.fallback"].signature == "(a, *, b=1)"
    assert names["textwrap.Outer"].signature == names["textwrap.matched"].body == ""


def test_packages_that_installations_lack_are_not_needed(elsewhere):
    """Debian has no test and no idlelib, 3.12 no distutils, and many have no tkinter."""
    lacking = "test idlelib tkinter turtledemo turtle.py lib2to3 distutils ensurepip curses site-packages dist-packages"
    shutil.rmtree(elsewhere)
    ignored = shutil.ignore_patterns(*lacking.split(), "__pycache__", "lib-dynload", "config-*", "*.so", "*.a")
    shutil.copytree(STDLIB, elsewhere, ignore=ignored)
    view = corpora.docstring_topics()
    assert sum(map(len, view.values())) > 3000
    assert set(view["train"]["label"]) == set(view["test"]["label"])


def test_an_installation_without_sources_is_said(elsewhere):
    shutil.rmtree(elsewhere)
    with pytest.raises(DataError, match=r"No docstrings under .*lib'.*installed without its sources"):
        corpora.docstring_topics()


def test_importing_the_module_is_quick():
    heavy = ("torch", "datasets", "transformers", "tokenizers", "numpy")
    code = f"import sys; import hf_reset.corpora; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --------------------------------------------------------------------------------------------- tokenizers


def test_wordpiece_is_berts(topics, tmp_path):
    tokenizer = corpora.train_tokenizer(topics["train"]["text"], vocab_size=1500, model_max_length=16)
    assert len(tokenizer) == 1500
    encoded = tokenizer("Return the", "socket")
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert pieces == ["[CLS]", "return", "the", "[SEP]", "socket", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.mask_token == "[MASK]"
    text = "Return the number of unbelievably long things."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text.lower()
    assert len(tokenizer("word " * 50, truncation=True)["input_ids"]) == 16
    padded = tokenizer(["a", "a b c"], padding=True)
    assert [len(ids) for ids in padded["input_ids"]] == [5, 5]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text, "more").data == tokenizer(text, "more").data


def test_byte_level_bpe_is_lossless_and_has_a_chat_template(texts, tmp_path):
    tokenizer = corpora.train_tokenizer(texts["train"]["text"], vocab_size=1500, kind="bpe")
    assert len(tokenizer) == 1500
    for text in ("def f(x):\n    return  x  # naïve ☃\n", " leading and trailing "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    chat = [{"role": "user", "content": "sum(a)"}, {"role": "assistant", "content": "Add up."}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False)
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert shown == "<|user|>\nsum(a)\n<|assistant|>\nAdd up.<|end|>\n"
    assert shown.startswith(prompt)
    tokens = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    answer = [token for token, mine in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if mine]
    assert tokenizer.decode(answer) == "Add up.<|end|>"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat, tokenize=False) == shown


def test_tokenizers_that_are_refused():
    with pytest.raises(DataError, match="`texts` must hold at least one text"):
        corpora.train_tokenizer(["", ""])
    with pytest.raises(ConfigError, match="`kind` must be one of wordpiece, bpe, got 'unigram'"):
        corpora.train_tokenizer(["a"], kind="unigram")
    for kind in ("wordpiece", "bpe"):
        with pytest.raises(ConfigError, match=r"`vocab_size` must be above \d+.* got 5"):
            corpora.train_tokenizer(["abc def"], 5, kind)
