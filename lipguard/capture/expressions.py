"""Elementwise expressions that are no node yet, evaluated in whatever algebra is asked for; see `lipguard.capture.symbolic`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lipguard.network.activations import Elementwise, Formula, PiecewiseLinear, absolute
from lipguard.network.activations.terms import Total


class Algebra(Protocol):
    """What an expression is evaluated in; its values are of one kind, masks being numbers 0 and 1.

    Attributes:
        memo: values of expressions by their identity.
    """

    memo: dict[int, Any]

    def leaf(self, node: int) -> Any: ...  # noqa: D102
    def constant(self, value: Tensor) -> Any: ...  # noqa: D102
    def mask(self, value: Tensor) -> Any: ...  # noqa: D102 - made of signs: its entries are those that are asked for
    def plus(self, a: Any, b: Any) -> Any: ...  # noqa: D102
    def times(self, a: Any, b: Any) -> Any: ...  # noqa: D102
    def applied(self, name: str, a: Any) -> Any: ...  # noqa: D102

    def sign(self, a: Any) -> Tensor:
        """-1, 0 or 1 for each entry."""
        ...


JUMPS = (
    "chooses by {origin} of a value that depends on the input: the result jumps unless both choices agree where the choice "
    "changes. Write it with relu, clamp or abs, or bound the part before it with submodule=...."
)
"""What is wrong with the result of a comparison."""


@dataclass(frozen=True, eq=False)
class Expression:
    """A function of the values of some nodes, entry by entry.

    Attributes:
        function: called with an algebra and the values of the parts in it.
        parts: what it is a function of.
        node: of a leaf, the node whose value it is.
        leaves: the nodes that it is made of.
        reason: why it is refused where it has no bound.
        jump: why it is refused where it jumps: what chooses in it.
        mask: of a mask, the call that compared.
    """

    function: Callable[..., Any]
    parts: tuple[Expression, ...] = ()
    node: int | None = None
    leaves: frozenset[int] = frozenset()
    reason: str = ""
    jump: str = ""
    mask: str = ""


def evaluated(a: Algebra, expression: Expression) -> Any:
    """The expression's value in an algebra; of a part that occurs more than once, once."""
    key = id(expression)
    if key not in a.memo:
        a.memo[key] = expression.function(a, *(evaluated(a, part) for part in expression.parts))
    return a.memo[key]


def leaf(node: int) -> Expression:
    """The value of a node."""
    return Expression(lambda a: a.leaf(node), (), node, frozenset({node}))


def constant(value: Tensor) -> Expression:
    """A number, or one for each entry, float64."""
    return Expression(lambda a: a.constant(value))


def combined(function: Callable[..., Any], parts: Sequence[Expression], reason: str = "", jump: str = "") -> Expression:
    """function(algebra, values of the parts); the reasons are those of the first parts that have them."""
    reason = next((part.reason for part in parts if part.reason), reason)
    jump = next((part.jump for part in parts if part.jump), jump)
    leaves = frozenset[int]().union(*(part.leaves for part in parts))
    return Expression(function, tuple(parts), None, leaves, reason, jump)


def choose(a: Algebra, mask: Any, first: Any, second: Any) -> Any:
    """first where the mask is 1, second where it is 0."""
    other = a.plus(a.constant(torch.ones((), dtype=torch.float64)), negative(a, mask))
    return a.plus(a.times(mask, first), a.times(other, second))


def negative(a: Algebra, value: Any) -> Any:
    """-value."""
    return a.times(a.constant(torch.tensor(-1.0, dtype=torch.float64)), value)


def moved(expression: Expression, index: Tensor, place: Callable[[int], int]) -> Expression:
    """The expression's entries at the places of an index, none of them -1; `place` gives each leaf's node of these entries."""
    nodes = {node: place(node) for node in expression.leaves}
    made = Expression(lambda a: evaluated(_Moved(a, index, nodes, {}), expression), (), None, frozenset(nodes.values()))
    return replace(made, reason=expression.reason, jump=expression.jump, mask=expression.mask)


@dataclass
class _Moved:
    inner: Algebra
    index: Tensor
    nodes: dict[int, int]
    memo: dict[int, Any]

    def leaf(self, node: int) -> Any:
        return self.inner.leaf(self.nodes[node])

    def constant(self, value: Tensor) -> Any:
        return self.inner.constant(value[self.index] if value.ndim else value)

    def mask(self, value: Tensor) -> Any:
        return self.inner.mask(value)

    def plus(self, a: Any, b: Any) -> Any:
        return self.inner.plus(a, b)

    def times(self, a: Any, b: Any) -> Any:
        return self.inner.times(a, b)

    def applied(self, name: str, a: Any) -> Any:
        return self.inner.applied(name, a)

    def sign(self, a: Any) -> Tensor:
        return self.inner.sign(a)


def uniform(numbers: Tensor) -> Tensor:
    """One number, where all are the same and none is in a graph."""
    if numbers.ndim and not numbers.requires_grad and bool((numbers == numbers[:1]).all()):
        return numbers[0]
    return numbers


# Functions of the network's own as expressions.


def of_function(function: Elementwise) -> Callable[[Algebra, Any], Any] | None:
    """An elementwise function on a value of an algebra; None where it is not made of known ones."""
    if function.piecewise is not None:
        pieces = function.piecewise
        return lambda a, u: piecewise(a, u, pieces)
    if function.formula is not None:
        formula = function.formula
        return lambda a, u: _formula(a, u, formula)
    parameters = [torch.as_tensor(p, dtype=torch.float64) for p in getattr(function, "parameters", ())]
    make = _SMOOTH.get(function.name)
    return None if make is None else lambda a, u: make(a, u, *parameters)


def piecewise(a: Algebra, u: Any, f: PiecewiseLinear) -> Any:
    """value + s_0 (u - b_0) + sum_j (s_(j+1) - s_j) max(u - b_j, 0)."""
    first = a.plus(u, a.constant(-f.breaks[0]))
    result = a.plus(a.constant(f.value), a.times(a.constant(f.pieces[0]), first))
    for j, b in enumerate(f.breaks):
        beyond = a.plus(u, a.constant(-b))
        step = a.mask((a.sign(beyond) > 0).to(torch.float64))
        result = a.plus(result, a.times(a.times(a.constant(f.pieces[j + 1] - f.pieces[j]), step), beyond))
    return result


def _formula(a: Algebra, u: Any, f: Formula) -> Any:
    """The total of the piece that u lies on."""
    result = _total(a, u, f.totals[0])
    for b, total in zip(f.breaks, f.totals[1:], strict=True):
        result = _above(a, a.plus(u, a.constant(-b)), result, _total(a, u, total))
    return result


def _total(a: Algebra, u: Any, total: Total) -> Any:
    result = a.constant(torch.zeros((), dtype=torch.float64))
    for product, coefficient in total.terms:
        part = a.constant(coefficient)
        for factor in product:
            part = a.times(part, u if factor.inner is None else a.applied(factor.name, _total(a, u, factor.inner)))
        result = a.plus(result, part)
    return result


def _scaled(a: Algebra, factor: Tensor | float, u: Any) -> Any:
    return a.times(a.constant(torch.as_tensor(factor, dtype=torch.float64)), u)


def _above(a: Algebra, u: Any, below: Any, above: Any) -> Any:
    return choose(a, a.mask((a.sign(u) > 0).to(torch.float64)), above, below)


def _elu(a: Algebra, u: Any, alpha: Tensor) -> Any:
    return _above(a, u, _scaled(a, alpha, a.applied("expm1", u)), u)


def _selu(a: Algebra, u: Any) -> Any:
    return _scaled(a, 1.0507009873554804934, _elu(a, u, torch.tensor(1.6732632423543772848, dtype=torch.float64)))


def _softsign(a: Algebra, u: Any) -> Any:
    size = a.plus(piecewise(a, u, absolute()), a.constant(torch.ones((), dtype=torch.float64)))
    return a.times(u, a.applied("inverse", size))


def _plain(name: str) -> Callable[..., Any]:
    return lambda a, u: a.applied(name, u)


_SMOOTH: dict[str, Callable[..., Any]] = {
    **{
        name: _plain(name)
        for name in ("sigmoid", "tanh", "silu", "gelu", "mish", "logsigmoid", "sin", "cos", "erf", "atan", "asinh")
    },
    "softplus": lambda a, u, beta: _scaled(a, 1 / beta, a.applied("softplus", _scaled(a, beta, u))),
    "elu": _elu,
    "celu": lambda a, u, alpha: _above(a, u, _scaled(a, alpha, a.applied("expm1", _scaled(a, 1 / alpha, u))), u),
    "selu": _selu,
    "softsign": _softsign,
}
