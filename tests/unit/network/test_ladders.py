"""How many functions still ask what kind a node, an operator or an activation is; each kind added must be taught to every one."""

from __future__ import annotations

import ast
from pathlib import Path

import lipguard

KINDS = frozenset({
    "Activation", "Affine", "Coupled", "Implicit", "Input", "Sum",
    "Conv", "Dense", "Diagonal", "Index",
    "Maxima", "Reflection", "Sort",
    "PiecewiseLinear", "Smooth", "Wave",
})  # fmt: skip

CEILING_ELSEWHERE = 0
"""Ladders outside verify/ and bounds/: none is the algorithm itself."""

CEILING = 14
"""Ladders in the whole package; lower it whenever one goes."""


def _names(node: ast.expr) -> set[str]:
    parts = list(ast.walk(node))
    return {n.id for n in parts if isinstance(n, ast.Name)} | {n.attr for n in parts if isinstance(n, ast.Attribute)}


def _asks(node: ast.AST) -> bool:
    """Whether this is an `isinstance` against a kind, or a pattern of one in a `match`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
        return bool(_names(node.args[1]) & KINDS)
    return isinstance(node, ast.MatchClass) and bool(_names(node.cls) & KINDS)


def _own(function: ast.AST) -> list[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    found, todo = [], list(ast.iter_child_nodes(function))
    while todo:
        node = todo.pop()
        found.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += ast.iter_child_nodes(node)
    return found


def ladders(root: Path) -> list[str]:
    """path:function of every function that asks for a kind."""
    found = []
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        scopes = [("module", tree), *((f.name, f) for f in functions)]
        found += [f"{path.relative_to(root)}:{name}" for name, scope in scopes if any(map(_asks, _own(scope)))]
    return found


def test_the_number_of_ladders_only_falls() -> None:
    root = Path(next(iter(lipguard.__path__)))
    found = ladders(root)
    print(f"\n{len(found)} ladders:", *found, sep="\n  ")
    elsewhere = [place for place in found if not place.startswith(("verify/", "bounds/"))]
    assert len(elsewhere) <= CEILING_ELSEWHERE, elsewhere
    assert len(found) <= CEILING, found


def test_a_ladder_is_found(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "def a(n):\n    match n:\n        case Affine(): return 1\n"
        "def b(n):\n    return isinstance(n, operators.Dense | Conv)\n"
        "def c(n):\n    def d(m): return isinstance(m, (int, Sum))\n    return isinstance(n, int)\n"
    )
    assert ladders(tmp_path) == ["one.py:a", "one.py:b", "one.py:d"]
