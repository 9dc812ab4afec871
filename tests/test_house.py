"""The rooms of the package: imports go one way, lazy ones too, and the engine knows nothing of studies."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_reset"
ENGINE = {"policy", "anchor", "training"}
NOT_FOR_THE_ENGINE = {"study", "report", "corpora", "noise"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
# The map of the package and of each folder: names to modules, loaded on first use, so that nothing climbs through them.
MAPS = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def imports_of(source: str, module: str) -> set[str]:
    """The modules of the package that a source imports anywhere: at its top, in functions, or for types only."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import, which this walk does not follow"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # importlib, and the maps of names
            found |= {node.value} & MODULES.keys()
    return {name for name in found if name in MODULES and name != module}


IMPORTS = {name: imports_of(path.read_text(encoding="utf-8"), name) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def rooms() -> dict[str, set[str]]:
    """Each folder (or module at the root) to those it imports."""
    graph: dict[str, set[str]] = {}
    for module, imported in IMPORTS.items():
        if module != "hf_reset":
            graph.setdefault(room(module), set()).update(room(name) for name in imported if name != "hf_reset")
    return {name: others - {name} for name, others in graph.items()}


def test_the_walk_sees_lazy_imports_too():
    source = (
        "from typing import TYPE_CHECKING\n"
        "import hf_reset.errors as e\n"
        "if TYPE_CHECKING:\n    from hf_reset.study import runs\n"
        "def f():\n    from hf_reset.noise.labels import corrupt_labels\n"
        "HOME = {'x': 'hf_reset.corpora.docstrings'}\n"
    )
    assert imports_of(source, "hf_reset.policy") == {
        *("hf_reset.errors", "hf_reset.study.runs", "hf_reset.noise.labels", "hf_reset.corpora.docstrings"),
    }
    assert "hf_reset.report.results" in IMPORTS["hf_reset.study.runs"]


def test_the_engine_knows_nothing_of_studies():
    """Nor through anything it imports."""
    graph, reached = rooms(), set()
    waiting = list(ENGINE)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += graph[name]
    assert not reached & NOT_FOR_THE_ENGINE


def test_imports_between_folders_go_one_way():
    try:
        order = list(TopologicalSorter(rooms()).static_order())
    except CycleError as error:
        pytest.fail(f"folders import each other: {' -> '.join(error.args[1])}")
    assert order.index("errors") < order.index("anchor") < order.index("training") < order.index("study")


def test_no_module_imports_itself_by_way_of_another():
    graph = {name: imported - MAPS for name, imported in IMPORTS.items() if name not in MAPS}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_no_module_imports_the_package_from_inside():
    assert not [name for name, imported in IMPORTS.items() if "hf_reset" in imported]


def test_data_is_prepared_without_the_command_line():
    for name in ("hf_reset.study.classification", "hf_reset.study.instructions"):
        waiting, reached = [name], set()
        while waiting:
            module = waiting.pop()
            if module not in reached:
                reached.add(module)
                waiting += IMPORTS[module] - MAPS
        assert "hf_reset.study.options" not in reached, name
