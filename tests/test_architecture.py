"""Which module imports which: no circle, and a core that knows nothing of what is built on it."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import kdpo_editor

ROOT = Path(kdpo_editor.__file__).parent
CORE = (
    "hparams", "requests", "kdpo", "ablation", "editing", "derived", "objectives", "models", "cache", "whole_files",
    "errors", "tracking", "engine", "lifelong",
)  # fmt: skip
BUILT_ON_IT = ("easyedit", "compare", "edits", "cli", "testbed")
# Modules, from the package itself down to its errors, each importing the next.
LONGEST_CHAIN = 17


def imported(tree: ast.AST, package: list[str], modules: Collection[str]) -> set[str]:
    """What of ``modules`` a module of ``package`` imports anywhere, in functions and for type checkers too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            of_source = {f"{source}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else source for name in of_source}
    return names & set(modules)


@cache
def imports() -> dict[str, set[str]]:
    """The modules of the package by their full names, each with those that it imports."""
    modules = {}
    for file in ROOT.rglob("*.py"):
        parts = [ROOT.name, *file.relative_to(ROOT).with_suffix("").parts]
        package = parts[:-1]
        modules[".".join(package if parts[-1] == "__init__" else parts)] = (file, package)
    return {
        name: imported(ast.parse(file.read_text("utf-8")), package, modules) - {name}
        for name, (file, package) in modules.items()
    }


def folder_of(name: str) -> str:
    """The folder or file directly in the package that a module belongs to."""
    return [*name.split("."), ""][1]


def test_the_graph_has_imports_of_every_kind() -> None:
    """Relative ones of several levels, in functions and for type checkers."""
    graph = imports()
    assert "kdpo_editor.engine.patches" in graph["kdpo_editor.engine.upper_part"]
    assert "kdpo_editor.errors" in graph["kdpo_editor.compare.run.results"]
    assert "kdpo_editor.edits.ledger" in graph["kdpo_editor.easyedit.ledgers"]
    assert "kdpo_editor.edits.delta" in graph["kdpo_editor"]
    assert "kdpo_editor.compare.run.statistics" in graph["kdpo_editor.compare.run.cell"]


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(imports()).prepare()  # CycleError names the modules of the circle


def test_the_core_imports_nothing_that_is_built_on_it() -> None:
    forbidden = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if folder_of(name) in CORE and folder_of(other) in (*BUILT_ON_IT, "")
    ]
    assert not forbidden


def test_every_module_is_of_the_core_or_built_on_it() -> None:
    assert {folder_of(name) for name in imports()} <= {*CORE, *BUILT_ON_IT, "version", ""}


def test_a_contributor_is_told_where_each_thing_is() -> None:
    page = (ROOT.parent / "CONTRIBUTING.md").read_text("utf-8")
    table = page.partition("## Where things are")[2].partition("\n## ")[0]
    named = {name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([a-z_]+(?:/|\.py))`", table)}
    assert named >= {*CORE, *BUILT_ON_IT, "version"}


def test_no_chain_of_imports_is_longer_than_it_was() -> None:
    graph = imports()
    length: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        length[name] = 1 + max((length[other] for other in graph[name]), default=0)
    assert max(length.values()) <= LONGEST_CHAIN
