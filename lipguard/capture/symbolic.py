"""Elementwise expressions that are no node yet: x * (x > 0), 1 / (1 + exp(-x)), where(x > 0, x, a * x).

No part of these has a bound of its slope by itself, but the whole has. A rule that meets such a part keeps an `Expression`,
which further elementwise rules extend. Where anything else reads the value it is *settled*: made into nodes, or refused for the
reason that its first unbounded part gave. It is settled in one of three ways:

    one variable    every leaf is a function of one node, entry by entry. The line is cut where a compared quantity, which must be
                    piecewise linear, changes its sign; on each piece the expression is a `Total`. Piecewise linear ones become a
                    `PiecewiseLinear`, others a `Formula`, whose slopes are enclosed
    two sides       linear in several nodes, with one compared quantity s: F on s < 0 and F + c s on s > 0 are F + c max(s, 0)
    part by part    what it is a function of is settled before

All prove that the sides of every cut meet: a function that jumps is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lipguard.capture.expressions import JUMPS, Algebra, Expression, combined, leaf, moved, of_function, uniform
from lipguard.capture.one_variable import Jump, Unsettled, one_variable
from lipguard.capture.two_sides import two_sides
from lipguard.errors import InvalidModel, UnsupportedLayer
from lipguard.network.activations import Elementwise
from lipguard.network.operators import Index

if TYPE_CHECKING:
    from lipguard.capture.trace import Trace


def extend(expression: Expression, function: Elementwise) -> Expression | None:
    """A function of an expression; None where the function is not made of known ones."""
    run = of_function(function)
    return None if run is None else combined(run, [expression])


def settle(trace: Trace, expression: Expression) -> int:
    """The node of an expression's value: as a whole, or after its parts have been settled one by one.

    Raises:
        UnsupportedLayer: no bound is proved.
    """
    if expression.node is not None:
        return expression.node
    key = id(expression)
    if key not in trace.made:
        trace.made[key] = expression, _settled(trace, expression)
    return trace.made[key][1]


def _settled(trace: Trace, expression: Expression) -> int:
    try:
        return _whole(trace, expression)
    except (Unsettled, InvalidModel) as error:
        why = (expression.jump if isinstance(error, Jump) else "") or expression.reason or expression.jump
        why = why or f"{trace.place} {JUMPS.format(origin=expression.mask) if expression.mask else error}"
        if all(part.node is not None or not part.leaves for part in expression.parts):
            raise UnsupportedLayer(why) from error
        try:
            parts = [leaf(settle(trace, part)) if part.leaves else part for part in expression.parts]
            apart = combined(expression.function, parts)
            way = one_variable if len(apart.leaves) == 1 else two_sides
            return way(trace, {-1: apart}, apart.leaves)
        except (Unsettled, InvalidModel, UnsupportedLayer) as second:
            raise UnsupportedLayer(why) from second


def _whole(trace: Trace, expression: Expression) -> int:
    made, leaves = _expanded(trace, expression)
    if len(leaves) > 1:
        return two_sides(trace, made, leaves)
    (base,) = leaves
    while True:
        try:
            return one_variable(trace, made, frozenset({base}))
        except (Unsettled, InvalidModel):
            # What has no bound as a function of a value may have one as a function of what that is made of: e^min(x, 1).
            found = _taken_apart(trace, base)
            if found is None or len(found.leaves) > 1:
                raise
            made[base] = found
            (base,) = found.leaves


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


def chosen(trace: Trace, i: int, index: Tensor) -> int:
    """The node of another one's entries at the places of an index, none of them -1; a choice among a choice is one."""
    before = trace.nodes[i].selection
    if before is not None and bool((before[index] >= 0).all()):
        return chosen(trace, trace.nodes[i].sources[0], before[index])
    if torch.equal(index, torch.arange(trace.sizes[i], device=index.device)):
        return i
    return trace.affine(trace.at(i), Index(index, trace.sizes[i]))


def _taken_apart(trace: Trace, i: int) -> Expression | None:
    """A node as an expression of what it reads, entry by entry; None where it is more than that."""
    node = trace.nodes[i]
    if node.selection is not None and bool((node.selection >= 0).all()):
        # Of entries that are chosen: what is done to each is done to fewer of them.
        whole = _taken_apart(trace, node.sources[0])
        index = node.selection
        return None if whole is None else moved(whole, index, lambda s: chosen(trace, s, index))
    if node.loop is not None or not node.in_place or not node.sources:
        return None
    parts = [leaf(source) for source in node.sources]
    if node.map is not None:
        ones = torch.ones(trace.sizes[i], dtype=torch.float64, device=node.map.device)
        number = node.map.scalar()
        scale = node.map(ones) if number is None else torch.tensor(number, dtype=torch.float64, device=ones.device)
        bias = torch.zeros((), dtype=torch.float64) if node.bias is None else uniform(node.bias)
        return combined(lambda a, u: a.plus(a.times(a.constant(uniform(scale)), u), a.constant(bias)), parts)
    if node.elementwise is not None:
        function = of_function(node.elementwise)
        return None if function is None else combined(function, parts)

    def total(a: Algebra, first: Any, *others: Any) -> Any:
        for other in others:
            first = a.plus(first, other)
        return first

    return combined(total, parts)
