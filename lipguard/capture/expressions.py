"""Elementwise expressions that are no node yet, evaluated in whatever algebra is asked for; see `lipguard.capture.symbolic`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lipguard.network.activations import Elementwise, PiecewiseLinear, absolute


class Algebra(Protocol):
    """What an expression is evaluated in; its values are of one kind, masks being numbers 0 and 1."""

    def leaf(self, node: int) -> Any: ...  # noqa: D102
    def constant(self, value: Tensor) -> Any: ...  # noqa: D102
    def plus(self, a: Any, b: Any) -> Any: ...  # noqa: D102
    def times(self, a: Any, b: Any) -> Any: ...  # noqa: D102
    def applied(self, name: str, a: Any) -> Any: ...  # noqa: D102

    def sign(self, a: Any) -> Tensor:
        """-1, 0 or 1 for each entry."""
        ...


@dataclass(frozen=True, eq=False)
class Expression:
    """A function of the values of some nodes, entry by entry.

    Attributes:
        run: evaluates it in an algebra.
        leaves: the nodes.
        reason: why it is refused where it cannot be settled.
        mask: whether it is a mask, and from what: the call that compared.
        terms: what it is a sum of, if it is one.
    """

    run: Callable[[Algebra], Any]
    leaves: frozenset[int]
    reason: str = ""
    mask: str = ""
    terms: tuple[Expression, ...] = ()


def leaf(node: int) -> Expression:
    """The value of a node."""
    return Expression(lambda a: a.leaf(node), frozenset({node}))


def constant(value: Tensor) -> Expression:
    """A number, or one for each entry, float64."""
    return Expression(lambda a: a.constant(value), frozenset())


def combined(function: Callable[..., Any], parts: list[Expression], reason: str) -> Expression:
    """function(algebra, values of the parts); the reason is that of the first part that has one."""
    reasons = [part.reason for part in parts if part.reason]
    return Expression(
        lambda a: function(a, *(part.run(a) for part in parts)),
        frozenset[int]().union(*(part.leaves for part in parts)),
        reasons[0] if reasons else reason,
    )


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
    return replace(
        expression,
        run=lambda a: expression.run(_Moved(a, index, nodes)),
        leaves=frozenset(nodes.values()),
        terms=tuple(moved(term, index, place) for term in expression.terms),
    )


@dataclass(frozen=True)
class _Moved:
    inner: Algebra
    index: Tensor
    nodes: dict[int, int]

    def leaf(self, node: int) -> Any:
        return self.inner.leaf(self.nodes[node])

    def constant(self, value: Tensor) -> Any:
        return self.inner.constant(value[self.index] if value.ndim else value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


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
    parameters = [torch.as_tensor(p, dtype=torch.float64) for p in getattr(function, "parameters", ())]
    make = _SMOOTH.get(function.name)
    return None if make is None else lambda a, u: make(a, u, *parameters)


def piecewise(a: Algebra, u: Any, f: PiecewiseLinear) -> Any:
    """value + s_0 (u - b_0) + sum_j (s_(j+1) - s_j) max(u - b_j, 0)."""
    first = a.plus(u, a.constant(-f.breaks[0]))
    result = a.plus(a.constant(f.value), a.times(a.constant(f.pieces[0]), first))
    for j, b in enumerate(f.breaks):
        beyond = a.plus(u, a.constant(-b))
        step = a.constant((a.sign(beyond) > 0).to(torch.float64))
        result = a.plus(result, a.times(a.times(a.constant(f.pieces[j + 1] - f.pieces[j]), step), beyond))
    return result


def _scaled(a: Algebra, factor: Tensor | float, u: Any) -> Any:
    return a.times(a.constant(torch.as_tensor(factor, dtype=torch.float64)), u)


def _above(a: Algebra, u: Any, below: Any, above: Any) -> Any:
    return choose(a, a.constant((a.sign(u) > 0).to(torch.float64)), above, below)


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
