"""Fine-tuning that survives wrong labels, by stochastic resetting (Bae, Song, Jeong 2025, arXiv 2406.00396).

The map, in reading order:

* `config`, `policy`: what a user wants, and when to reset and what becomes of the anchor: pure, on plain values;
* `anchor`: what is copied, and how back: scopes, shards, the store and its file;
* `training`: the Trainer's side: the callback, its resume, arguments and `ResetTrainer`;
* `rows`: what a run knows of each training example: row memory, suspects, refinement;
* `losses`: from logits and labels to one value a row, and the one reducer;
* `noise`, `metrics`, `corpora`: wrong labels made on purpose, measures under them, text that every machine has;
* `diagnostics`: label memory, responses, gradients and diffusion of a run;
* `theory`, `planner`: first-passage theory, and how often to reset from what a run has shown;
* `study`, `report`, `cli`: what comparisons share, their tables and figures, and the command line;
* `errors`, `files`: every error and warning, and the one atomic write.

The public names are imported from here. They load on first use, so that the parts which need no torch (`policy`,
`noise`, `corpora`, …) and `--help` stay quick. No module of the package imports this file from inside.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_reset.anchor.scopes import select_parameters
    from hf_reset.anchor.store import AnchorStore
    from hf_reset.config import ResetConfig
    from hf_reset.rows.refinement import RefinementConfig
    from hf_reset.training.advisor import ResetAdvisorCallback
    from hf_reset.training.arguments import ResetArguments, ResetTrainingArguments
    from hf_reset.training.callback import StochasticResetCallback
    from hf_reset.training.checkpoints import last_whole_checkpoint
    from hf_reset.training.trainer import ResetTrainer, ResetTrainerMixin

__version__ = "0.1.0"

_HOME = {
    "AnchorStore": "hf_reset.anchor.store",
    "RefinementConfig": "hf_reset.rows.refinement",
    "ResetAdvisorCallback": "hf_reset.training.advisor",
    "ResetArguments": "hf_reset.training.arguments",
    "ResetConfig": "hf_reset.config",
    "ResetTrainer": "hf_reset.training.trainer",
    "ResetTrainerMixin": "hf_reset.training.trainer",
    "ResetTrainingArguments": "hf_reset.training.arguments",
    "StochasticResetCallback": "hf_reset.training.callback",
    "last_whole_checkpoint": "hf_reset.training.checkpoints",
    "select_parameters": "hf_reset.anchor.scopes",
}

# Modules that are read as attributes: `import hf_reset; hf_reset.noise.corrupt_labels(...)`.
_MODULES = (
    "corpora",
    "diagnostics",
    "errors",
    "losses",
    "metrics",
    "noise",
    "planner",
    "policy",
    "report",
    "rows",
    "theory",
)

__all__ = [
    "AnchorStore",
    "RefinementConfig",
    "ResetAdvisorCallback",
    "ResetArguments",
    "ResetConfig",
    "ResetTrainer",
    "ResetTrainerMixin",
    "ResetTrainingArguments",
    "StochasticResetCallback",
    "__version__",
    "last_whole_checkpoint",
    "select_parameters",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"hf_reset.{name}")
    raise AttributeError(f"module 'hf_reset' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
