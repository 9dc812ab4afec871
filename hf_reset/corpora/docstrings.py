"""Text that every machine has: the documentation strings inside Python's own standard library.

Three views of it let everything in this package run with neither a model hub nor a data hub:
`docstring_topics` (text classification), `docstring_summaries` (instruction tuning) and
`docstring_text` (plain text for language modelling). Files are parsed with `ast`, never imported or run.

The views share one assignment of files to splits: what is held out in one is held out in all. Packages that
distributions leave out or ship apart (`test`, `idlelib`, `tkinter`, …) are not read, so that one Python
version gives one corpus wherever it was installed.
"""

from __future__ import annotations

import ast
import hashlib
import math
import os
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hf_reset.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import DatasetDict

SPLITS = ("train", "validation", "test")

# The areas follow the chapters of the Library Reference, merged to eight of comparable size. A module that a
# Python version lacks is simply not found.
_MODULES = {
    "concurrency": """_threading_local asyncio concurrent contextvars multiprocessing queue sched selectors signal
        subprocess threading""",
    "formats": """_markupbase base64 configparser csv dbm email html json mailbox mailcap mimetypes netrc pickle
        pickletools plistlib quopri shelve sqlite3 tomllib uu xdrlib xml""",
    "io": """_compression _pyio aifc bz2 chunk codecs compression encodings filecmp fileinput fnmatch genericpath
        glob gzip imghdr io linecache lzma ntpath os pathlib pipes posixpath pty shutil sndhdr stat sunau tarfile
        tempfile tty wave zipfile""",
    "language": """__future__ _ast_unparse _collections_abc _py_abc _weakrefset abc annotationlib ast code codeop
        contextlib copy copyreg dataclasses dis enum functools inspect keyword opcode pprint pyclbr pydoc reprlib
        rlcompleter string symtable tabnanny token tokenize types typing warnings weakref""",
    "net": """asynchat asyncore cgi cgitb ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket
        socketserver ssl telnetlib urllib uuid webbrowser wsgiref xmlrpc""",
    "numeric": """_pydatetime _pydecimal _pylong _strptime bisect calendar collections colorsys datetime decimal
        fractions graphlib heapq hashlib hmac numbers operator random secrets statistics zoneinfo""",
    "packaging": """compileall imp importlib modulefinder pkgutil platform py_compile runpy site sysconfig venv
        zipapp zipimport""",
    "testing": """bdb cProfile doctest faulthandler pdb profile pstats timeit trace traceback tracemalloc
        unittest""",
}
AREAS: dict[str, tuple[str, ...]] = {area: tuple(modules.split()) for area, modules in _MODULES.items()}
_AREA_OF = {module: area for area, modules in AREAS.items() for module in modules}

# Left out by Debian, by container images or by later Python versions; or tables rather than prose.
_LEFT_OUT = """__pycache__ dist-packages distutils ensurepip idlelib lib2to3 pydoc_data site-packages test tests
    tkinter turtle turtledemo"""
_NOT_READ = frozenset(_LEFT_OUT.split())

_NEAR_COPY = 0.8  # Jaccard similarity of two docstrings' word sets from which one of them is dropped
_FunctionNode = (ast.FunctionDef, ast.AsyncFunctionDef)


class _Docstring(NamedTuple):
    file: str  # relative to the standard library, with "/"
    name: str  # dotted, from the top-level module on
    signature: str  # "(self, key)" of a function, "" of a module or class
    body: str  # the function's statements without its docstring, "" of a module or class
    text: str  # cleaned of indentation

    @property
    def area(self) -> str | None:
        return _AREA_OF.get(self.name.split(".", 1)[0])

    @property
    def summary(self) -> str:
        """The first paragraph: PEP 257's summary line, and what it was wrapped to."""
        return " ".join(self.text.split("\n\n", 1)[0].split())


def docstring_topics(
    seed: int = 0, *, validation_fraction: float = 0.15, test_fraction: float = 0.15, min_words: int = 4
) -> DatasetDict:
    """Text classification: which area of the standard library does a docstring document?

    Eight classes (`AREAS`), about 5 000 rows, the same on every call with one Python version and seed.
    Copies and near-copies (word sets with Jaccard similarity of at least 0.8) are kept once. Each file lies
    wholly in one split.

    Args:
        seed: Chooses which files go to which split, and the order of the rows.
        validation_fraction: Share of each area's docstrings that goes to "validation".
        test_fraction: Share that goes to "test". What remains is "train".
        min_words: Shorter docstrings are left out.

    Returns:
        Splits "train", "validation" and "test" with columns `text` (str, white space collapsed),
        `label` (`ClassLabel` of eight areas) and `file` (relative to the standard library).

    Raises:
        ConfigError: The two fractions are negative or leave nothing for training.
        DataError: There are no Python sources where the standard library should be.
    """
    from datasets import ClassLabel, Features, Value

    names = sorted(AREAS)
    documents = _distinct([d for d in _documents() if d.area and len(d.text.split()) >= min_words])
    rows = {
        d: {"text": " ".join(d.text.split()), "label": names.index(d.area or ""), "file": d.file} for d in documents
    }
    features = Features({"text": Value("string"), "label": ClassLabel(names=names), "file": Value("string")})
    return _split_rows(rows, features, seed, validation_fraction, test_fraction)


def docstring_summaries(
    seed: int = 0,
    *,
    form: Literal["signature", "source"] = "signature",
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    min_words: int = 4,
    max_words: int = 40,
    max_body_lines: int = 20,
) -> DatasetDict:
    """Instruction tuning: a function in, the summary line of its documentation out.

    Args:
        seed: As in `docstring_topics`, with the same files in each split for the same fractions.
        form: What the prompt shows. "signature" (default): `module.Class.function(arguments)`, a dozen or two
            of tokens, about as much as the small default model can use on a CPU. "source": the definition as
            Python, without its docstring, under a comment that names module and class; for models that read code.
        validation_fraction: Share of the docstrings that goes to "validation".
        test_fraction: Share that goes to "test".
        min_words: Functions with a shorter summary are left out.
        max_words: Those with a longer one too: it is no summary. (A summary is the first paragraph, since many
            wrap.)
        max_body_lines: With `form="source"`, statements are cut after this many lines.

    Returns:
        Splits "train", "validation" and "test" with columns `prompt`, `completion` and `file`.
        No completion occurs twice, nor nearly: swapping two of them always gives a wrong one.

    Raises:
        ConfigError: `form` is unknown, or the fractions leave nothing for training.
        DataError: There are no Python sources where the standard library should be.
    """
    from datasets import Features, Value

    if form not in ("signature", "source"):
        raise ConfigError(f'`form` must be "signature" or "source", got {form!r}.')
    functions = [d._replace(text=d.summary) for d in _documents() if d.signature]
    functions = _distinct([d for d in functions if min_words <= len(d.text.split()) <= max_words])
    prompt = {"signature": lambda d: d.name + d.signature, "source": lambda d: _source(d, max_body_lines)}[form]
    rows = {d: {"prompt": prompt(d), "completion": d.text, "file": d.file} for d in functions}
    features = Features({name: Value("string") for name in ("prompt", "completion", "file")})
    return _split_rows(rows, features, seed, validation_fraction, test_fraction)


def docstring_text(
    seed: int = 0, *, validation_fraction: float = 0.15, test_fraction: float = 0.15, min_words: int = 4
) -> DatasetDict:
    """Plain text for language modelling that gives away no answer of `docstring_summaries`.

    Modules' and classes' docstrings whole, functions' docstrings after their first paragraph, which is what
    the summaries ask for: a model trained on this has seen the language of the answers, but none of them.

    Args:
        seed: As in `docstring_topics`, with the same files in each split for the same fractions.
        validation_fraction: Share of the docstrings that goes to "validation".
        test_fraction: Share that goes to "test".
        min_words: Shorter texts are left out.

    Returns:
        Splits "train", "validation" and "test" with columns `text` (str, line breaks kept) and `file`.

    Raises:
        ConfigError: The fractions leave nothing for training.
        DataError: There are no Python sources where the standard library should be.
    """
    from datasets import Features, Value

    rest = {d: d.text.split("\n\n", 1)[-1] if "\n\n" in d.text else "" for d in _documents() if d.signature}
    texts = {d: rest.get(d, d.text).strip() for d in _documents()}
    long_enough = [d._replace(text=text) for d, text in texts.items() if len(text.split()) >= min_words]
    rows = {d: {"text": d.text, "file": d.file} for d in _distinct(long_enough)}
    features = Features({"text": Value("string"), "file": Value("string")})
    return _split_rows(rows, features, seed, validation_fraction, test_fraction)


# ------------------------------------------------------------------------------------------------- reading


@lru_cache(maxsize=1)
def _documents() -> tuple[_Docstring, ...]:
    """Every docstring of the standard library that is read, in the order of files and of lines."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [document for path in _sources(root) for document in _parse(path, root)]
    if not documents:
        raise DataError(
            f"No docstrings under the standard library's directory {str(root)!r}: this Python was installed "
            "without its sources. Use a Python installation that has them, or data of your own."
        )
    return tuple(documents)


def _sources(root: Path) -> list[Path]:
    """Python files relative to `root`, sorted by their names with "/"."""
    paths = []
    for folder, subfolders, files in os.walk(root):
        # What is no module name, as config-3.11-x86_64, holds no modules.
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in _NOT_READ]
        modules = [name for name in files if name.endswith(".py") and name.removesuffix(".py") not in _NOT_READ]
        paths += [Path(folder, name).relative_to(root) for name in modules]
    return sorted(paths, key=Path.as_posix)


def _parse(path: Path, root: Path) -> Iterator[_Docstring]:
    try:
        with tokenize.open(root / path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the sources are not our reader's concern
            source = file.read()
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    yield from _walk(tree, path.as_posix(), module, source.splitlines())


def _walk(node: ast.AST, file: str, name: str, lines: list[str]) -> Iterator[_Docstring]:
    """Docstrings of a node and of the classes and functions defined in it, however deep."""
    if isinstance(node, (ast.Module, ast.ClassDef, *_FunctionNode)):
        text = (ast.get_docstring(node) or "").encode("utf-8", "replace").decode()  # no lone surrogates
        if text:
            signature, body = "", ""
            if isinstance(node, _FunctionNode):
                signature = f"({ast.unparse(node.args)})"
                body = textwrap.dedent("\n".join(lines[node.body[0].end_lineno : node.end_lineno])).strip("\n")
            yield _Docstring(file, name, signature, body, text)
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):  # definitions may stand under if, try, …
        children = getattr(node, field, ())
        for child in children if isinstance(children, list) else ():
            is_definition = isinstance(child, (ast.ClassDef, *_FunctionNode))
            yield from _walk(child, file, f"{name}.{child.name}" if is_definition else name, lines)


def _source(function: _Docstring, max_body_lines: int) -> str:
    where, name = function.name.rsplit(".", 1)
    body = function.body.split("\n")[:max_body_lines]
    return "\n".join([f"# {where}", f"def {name}{function.signature}:", *(f"    {line}".rstrip() for line in body)])


# ------------------------------------------------------------------------------------ copies and splitting


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _distinct(documents: Sequence[_Docstring]) -> list[_Docstring]:
    """Keep each text once, and of near-copies the first.

    Similar pairs are found exactly, by prefix filtering: two sets with Jaccard similarity of at least t share
    one of their n − ⌈t n⌉ + 1 rarest words (Chaudhuri, Ganti & Kaushik 2006; Bayardo, Ma & Srikant 2007).
    """
    sets = [frozenset(_words(document.text)) for document in documents]
    frequency = Counter(word for words in sets for word in words)
    holders: defaultdict[str, list[int]] = defaultdict(list)
    kept = []
    for index, words in enumerate(sets):
        rarest = sorted(words, key=lambda word: (frequency[word], word))
        prefix = rarest[: len(words) - math.ceil(_NEAR_COPY * len(words)) + 1]
        candidates = {other for word in prefix for other in holders[word]}
        if words and not any(_similar(words, sets[other]) for other in candidates):
            kept.append(documents[index])
            for word in prefix:
                holders[word].append(index)
    return kept


def _similar(a: frozenset[str], b: frozenset[str]) -> bool:
    return len(a & b) >= _NEAR_COPY * len(a | b)


def _hash(*parts: object) -> str:
    """A key to shuffle by: the same in every process, unlike `hash`."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=8)
def _split_of_files(seed: int, validation: float, test: float) -> dict[str, str]:
    """Assign each file to a split, so that each area's docstrings are shared out as asked.

    Within an area the files come in an order drawn from the seed, and each goes to the split that is furthest
    from its share. Files too large for a held-out split are given to training first.
    """
    counts: defaultdict[str | None, Counter[str]] = defaultdict(Counter)
    for document in _documents():
        counts[document.area][document.file] += 1
    split_of: dict[str, str] = {}
    for files in counts.values():
        total = sum(files.values())
        quota = {
            "train": (1 - validation - test) * total,
            "validation": validation * total,
            "test": test * total,
        }
        missing = dict(quota)
        small = min((share for share in (quota["validation"], quota["test"]) if share), default=total) / 3
        for file in sorted(files, key=lambda name: (files[name] <= small, _hash(seed, name))):
            split = max((name for name in SPLITS if quota[name]), key=lambda name: missing[name] / quota[name])
            split_of[file] = "train" if files[file] > small else split
            missing[split_of[file]] -= files[file]
    return split_of


def _split_rows(
    rows: dict[_Docstring, dict[str, Any]], features: Any, seed: int, validation: float, test: float
) -> DatasetDict:
    from datasets import Dataset, DatasetDict

    if validation < 0 or test < 0 or validation + test >= 1:
        raise ConfigError(
            "`validation_fraction` and `test_fraction` must not be negative, and must leave something for "
            f"training, got {validation} and {test}."
        )
    split_of = _split_of_files(seed, validation, test)
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for document in sorted(rows, key=lambda d: _hash(seed, d.file, d.name, d.text)):
        splits[split_of[document.file]].append(rows[document])
    return DatasetDict(
        {
            split: Dataset.from_dict({name: [row[name] for row in chosen] for name in features}, features=features)
            for split, chosen in splits.items()
        }
    )
