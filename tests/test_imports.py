"""Imports run one way: down the floors of `FLOORS`, without circles.

`python tests/test_imports.py` prints the counts of modules, arrows, circles and arrows upward.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vllm_pedro"

FLOORS = [
    "errors",
    "files",
    "architectures",
    "places",
    "backbone",
    "config",
    "rational",
    "generator",
    "adapter",
    "ops",
    "serving",
    "model",
    "peft",
    "training",
    "distill",
    "integration",
    "fetch",
    "bench",
    "demo",
    "cli",
]
"""From the ground up. A room is a module or a package of `vllm_pedro`; it imports only itself and
rooms below it."""


def modules() -> dict[str, ast.Module]:
    """Every module by its name, without `vllm_pedro` itself, which imports all lazily."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    found.pop("__init__")
    return found


def imports(name: str, tree: ast.Module, known: dict[str, ast.Module]) -> set[str]:
    """The modules of the package that a module imports, within functions too.

    Imports under `if TYPE_CHECKING` are never executed and do not count.
    """
    is_package = (PACKAGE / Path(*name.split(".")) / "__init__.py").is_file()
    inside = name.split(".") if is_package else name.split(".")[:-1]
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.ImportFrom | ast.Import):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name.removeprefix("vllm_pedro.") for alias in node.names]
            found.update(name for name in names if name in known)
            continue
        if node.level:
            start = inside[: len(inside) - node.level + 1]
            base = [*start, *(node.module.split(".") if node.module else [])]
        elif node.module is not None and node.module.split(".")[0] == "vllm_pedro":
            base = node.module.split(".")[1:]
        else:
            continue
        for alias in node.names:
            deeper = ".".join([*base, alias.name])
            target = deeper if deeper in known else ".".join(base)
            if target in known and target != name:
                found.add(target)
    return found


def graph() -> dict[str, set[str]]:
    """For each module the modules that it imports."""
    known = modules()
    return {name: imports(name, tree, known) for name, tree in known.items()}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(arrows.get(name, ())):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(arrows):
        if name not in index:
            visit(name)
    return found


def floor(name: str) -> int:
    """The floor of a module's room; ValueError for a room that `FLOORS` lacks."""
    return FLOORS.index(name.split(".")[0])


def upward(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports of a module on a higher floor."""
    return sorted((a, b) for a, found in arrows.items() for b in found if floor(b) > floor(a))


def test_there_are_no_circles():
    assert circles(graph()) == []


def test_no_arrow_goes_upward():
    assert upward(graph()) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from ..errors import PedroError", {"errors"}),
        ("from . import names", {"adapter.names"}),
        ("def f():\n    from ..serving.spec import RequestSpec", {"serving.spec"}),
        ("import vllm_pedro.demo", {"demo"}),
        ("from vllm_pedro import demo", {"demo"}),
        ("from vllm_pedro.adapter.names import DOWN", {"adapter.names"}),
        ("if TYPE_CHECKING:\n    from .. import demo\nelse:\n    from .. import cli", {"cli"}),
        ("import torch\nfrom torch import nn", set()),
    ],
)
def test_every_form_of_import_is_seen(text, found):
    assert imports("adapter.reading", ast.parse(text), modules()) == found


def test_a_circle_and_an_arrow_upward_would_be_seen():
    arrows = graph()
    arrows["errors"] = {"cli"}
    assert ("errors", "cli") in upward(arrows)
    assert any("errors" in group for group in circles(arrows))


if __name__ == "__main__":
    everything = graph()
    print(f"{len(everything)} modules, {sum(map(len, everything.values()))} arrows")
    print(f"circles: {len(circles(everything))}", *circles(everything), sep="\n  ")
    print(f"upward: {len(upward(everything))}", *upward(everything), sep="\n  ")
