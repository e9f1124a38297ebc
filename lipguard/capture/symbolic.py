"""Elementwise expressions that are no node yet: x * (x > 0), 1 / (1 + exp(-x)), where(x > 0, x, a * x).

No part of these has a bound of its slope by itself, but the whole has. A rule that meets such a part keeps an `Expression`,
which further elementwise rules extend. Where anything else reads the value it is *settled*: made into nodes, or refused for the
reason that its first unbounded part gave. It is settled by one of three ways:

    one variable    every leaf is a function of one node, entry by entry. The line is cut where a compared quantity, which must be
                    piecewise linear, changes its sign; on each piece the expression is a `Total`. Piecewise linear ones become a
                    `PiecewiseLinear`, others a `Formula`, whose slopes are enclosed
    two sides       linear in several nodes, with one compared quantity s: F on s < 0 and F + c s on s > 0 are F + c max(s, 0)
    a sum           settled term by term

All three prove that the sides of every cut meet: a function that jumps is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lipguard.capture.expressions import Algebra, Expression, combined, leaf, of_function, uniform
from lipguard.capture.one_variable import OneVariable, Unsettled, affine_node, one_variable
from lipguard.capture.two_sides import two_sides
from lipguard.errors import InvalidModel, UnsupportedLayer
from lipguard.network.activations import Elementwise

if TYPE_CHECKING:
    from collections.abc import Callable

    from lipguard.capture.trace import Trace


def extend(expression: Expression, function: Elementwise) -> Expression | None:
    """A function of an expression; None where the function is not made of known ones."""
    run = of_function(function)
    return None if run is None else combined(run, [expression], "")


def settle(trace: Trace, expression: Expression) -> int:
    """The node of an expression's value.

    Raises:
        UnsupportedLayer: none of the three ways proves a bound.
    """
    if not expression.terms and len(expression.leaves) == 1 and (node := _itself(expression)) is not None:
        return node
    try:
        whole, leaves = _expanded(trace, expression)
        if len(leaves) == 1:
            return one_variable(trace, whole, *leaves)
        return two_sides(trace, whole, leaves)
    except (Unsettled, InvalidModel) as error:
        if len(expression.terms) > 1 and len(expression.leaves) > 1:
            return _settled_sum(trace, expression)
        raise UnsupportedLayer(expression.reason or f"{trace.place} {error}") from error


def _itself(expression: Expression) -> int | None:
    found = expression.run(_Names())
    return found if isinstance(found, int) else None


class _Names:
    """An algebra in which a leaf is its node, and everything else None."""

    def leaf(self, node: int) -> int:
        return node

    def sign(self, a: object) -> Tensor:
        return torch.zeros((), dtype=torch.float64)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def _settled_sum(trace: Trace, expression: Expression) -> int:
    values = [term for term in expression.terms if term.leaves]
    nodes = [settle(trace, replace(term, reason=term.reason or expression.reason)) for term in values]
    total = trace.sum(*(trace.at(node) for node in nodes))
    for term in expression.terms:
        if not term.leaves:
            shift = term.run(OneVariable(total, torch.zeros(0, 1, dtype=torch.float64), {})).terms
            total = affine_node(trace, total, torch.ones((), dtype=torch.float64), shift[0][1] if shift else torch.zeros(()))
    return total


def _expanded(trace: Trace, expression: Expression) -> tuple[dict[int, Expression], frozenset[int]]:
    """How leaves are made of others, the latest first, until one is left or none can be taken apart; the root has the key -1."""
    made: dict[int, Expression] = {-1: expression}
    leaves = expression.leaves
    closed: set[int] = set()
    while len(leaves) > 1 and (todo := leaves - closed):
        node = max(todo)
        found = _taken_apart(trace, node)
        if found is None or node == min(leaves):
            closed.add(node)
            continue
        made[node] = found
        leaves = (leaves - {node}) | found.leaves
    return made, leaves


def _taken_apart(trace: Trace, i: int) -> Expression | None:
    """A node as an expression of what it reads, entry by entry; None where it is more than that."""
    node = trace.nodes[i]
    if node.loop is not None or not node.in_place or not node.sources:
        return None
    parts = [leaf(source) for source in node.sources]
    if node.map is not None:
        ones = torch.ones(trace.sizes[i], dtype=torch.float64, device=node.map.device)
        number = node.map.scalar()
        scale = node.map(ones) if number is None else torch.tensor(number, dtype=torch.float64, device=ones.device)
        bias = torch.zeros((), dtype=torch.float64) if node.bias is None else uniform(node.bias)
        return combined(lambda a, u: a.plus(a.times(a.constant(uniform(scale)), u), a.constant(bias)), parts, "")
    if node.elementwise is not None:
        function = of_function(node.elementwise)
        return None if function is None else combined(function, parts, "")

    def total(a: Algebra, first: Any, *others: Any) -> Any:
        for other in others:
            first = a.plus(first, other)
        return first

    return combined(total, parts, "")
