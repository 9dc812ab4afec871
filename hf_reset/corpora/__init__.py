"""Text that every machine has, so that everything in this package runs with neither a model hub nor a data hub.

In reading order:

* `docstrings`: the documentation inside Python's standard library as text classification, instructions, plain text;
* `tokenizers`: a small tokenizer trained on any texts;
* `small_llama`: a small Llama, trained a little on plain text, so that adapters have something to adapt;
* `small_modernbert`: a small, untrained classifier, built from its config.

Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_reset.corpora.docstrings import AREAS, docstring_summaries, docstring_text, docstring_topics
    from hf_reset.corpora.tokenizers import train_tokenizer

_HOME = {
    "AREAS": "hf_reset.corpora.docstrings",
    "docstring_summaries": "hf_reset.corpora.docstrings",
    "docstring_text": "hf_reset.corpora.docstrings",
    "docstring_topics": "hf_reset.corpora.docstrings",
    "train_tokenizer": "hf_reset.corpora.tokenizers",
}

__all__ = ["AREAS", "docstring_summaries", "docstring_text", "docstring_topics", "train_tokenizer"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hf_reset.corpora' has no attribute {name!r}")
