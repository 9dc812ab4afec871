"""The recipes' scripts as modules: they lie in no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).parents[1] / "recipes"


def load_script(path: str) -> ModuleType:
    """A script of the recipes, by its path in their folder; among the loaded modules, where dataclasses look for it."""
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), RECIPES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
