"""Expressions that are linear in several nodes, on the two sides of one compared quantity: a reflection, the larger of two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lipguard.capture.expressions import Expression, evaluated, uniform
from lipguard.capture.one_variable import Jump, Unsettled, affine_node
from lipguard.network.activations import canonical as c
from lipguard.network.activations import relu

if TYPE_CHECKING:
    from lipguard.capture.trace import Trace

_SIDE_BY_SIDE = 32
"""Units of roundoff of the module's type up to which two linear functions count as proportional."""


@dataclass(frozen=True, eq=False)
class _Form:
    """shift + the sum of coefficients times the values of nodes, entry by entry."""

    coefficients: dict[int, Tensor]
    shift: Tensor

    @property
    def number(self) -> bool:
        return not self.coefficients

    def table(self, leaves: list[int]) -> Tensor:
        """Coefficients and the shift, (leaves + 1, size or 1)."""
        rows = [self.coefficients.get(node, torch.zeros_like(self.shift)) for node in leaves] + [self.shift]
        device = next((row.device for row in rows if row.device.type != "cpu"), self.shift.device)
        return torch.stack(torch.broadcast_tensors(*(row.to(device, torch.float64).reshape(-1) for row in rows)))


@dataclass
class _Sides:
    """Forms where the compared quantity, the first that is met, has a sign."""

    side: float
    made: dict[int, Expression]
    closed: frozenset[int]
    unit: float
    compared: list[_Form]
    memo: dict[int, Any] = field(default_factory=dict)

    def leaf(self, node: int) -> _Form:
        if node in self.closed:
            return _Form({node: torch.ones((), dtype=torch.float64)}, torch.zeros((), dtype=torch.float64))
        return evaluated(self, self.made[node])

    def constant(self, value: Tensor) -> _Form:
        return _Form({}, value)

    mask = constant

    def plus(self, a: _Form, b: _Form) -> _Form:
        both = {n: a.coefficients.get(n, 0.0) + b.coefficients.get(n, 0.0) for n in {**a.coefficients, **b.coefficients}}
        return _Form(both, a.shift + b.shift)  # type: ignore[arg-type]

    def times(self, a: _Form, b: _Form) -> _Form:
        if not b.number:
            a, b = b, a
        if not b.number:
            raise Unsettled("multiplies two values.")
        return _Form({n: x * b.shift for n, x in a.coefficients.items() if bool((b.shift != 0).any())}, a.shift * b.shift)

    def applied(self, name: str, a: _Form) -> _Form:
        if not a.number:
            raise Unsettled(f"applies {name} to a function of several values.")
        total = c.applied(name, c.constant(a.shift)).terms
        return _Form({}, total[0][1] if total else torch.zeros((), dtype=torch.float64))

    def sign(self, a: _Form) -> Tensor:
        if a.number:
            return a.shift.sign()
        if not self.compared:
            self.compared.append(a)
        x, y = torch.broadcast_tensors(*(form.table(sorted(self.closed)) for form in (a, self.compared[0])))
        factor = _proportion(x, y, x.abs(), self.unit)
        return factor.sign() * self.side


def _proportion(x: Tensor, y: Tensor, size: Tensor, unit: float) -> Tensor:
    """The number k, one for each entry, with x = k y in every row, up to rounding of rows of that size.

    Args:
        x, y, size: (rows, entries).

    Raises:
        Unsettled: there is none.
    """
    place = y.abs().argmax(0, keepdim=True)
    most = y.gather(0, place)
    k = torch.where(most != 0, x.gather(0, place) / torch.where(most == 0, 1.0, most), 0.0)
    # Coefficients that the module computed in its own type are off by some units of their size, and k by as much: what is
    # left over is a jump of as much as the module's own values have.
    carried = size.gather(0, place) * y.abs() / torch.where(most == 0, 1.0, most).abs()
    if not bool(((x - k * y).abs() <= _SIDE_BY_SIDE * unit * (size + carried)).all()):
        raise Jump("jumps.")
    return k[0]


def two_sides(trace: Trace, made: dict[int, Expression], leaves: frozenset[int]) -> int:
    """F + k max(s, 0): F where s < 0, F + k s where s > 0, s = 0 agreeing with both."""
    compared: list[_Form] = []
    nodes = sorted(leaves)
    forms = [evaluated(_Sides(side, made, leaves, trace.unit, compared), made[-1]) for side in (-1.0, 1.0, 0.0)]
    total = _linear(trace, forms[0])
    if not compared:
        return total
    s = compared[0]

    tables = torch.stack(torch.broadcast_tensors(*(form.table(nodes).to(trace.device) for form in (*forms, s))))
    size = tables[:3].abs().amax(0)
    at, k = (_proportion(tables[i] - tables[0], tables[3], size, trace.unit) for i in (2, 1))
    del at  # on s = 0 itself: any multiple of s is 0 there
    if not bool(k.any()):
        return total
    return trace.sum(trace.at(total), trace.at(affine_node(trace, _rectified(trace, s), uniform(k), torch.zeros(()))))


def _linear(trace: Trace, form: _Form) -> int:
    some = [(node, x) for node, x in form.coefficients.items() if bool((x != 0).any())]
    parts = [affine_node(trace, node, uniform(x), torch.zeros(())) for node, x in some]
    if not parts:
        node = next(iter(form.coefficients), 0)
        return affine_node(trace, node, torch.zeros(()), form.shift)
    return affine_node(trace, trace.sum(*map(trace.at, parts)), torch.ones((), dtype=torch.float64), form.shift)


def _rectified(trace: Trace, s: _Form) -> int:
    """max(s, 0), once for every form: what two results share is one neuron."""
    rows = (*sorted(s.coefficients.items(), key=lambda pair: pair[0]), (-1, s.shift))
    key = tuple((node, tuple(x.shape), x.detach().cpu().numpy().tobytes()) for node, x in rows)
    if key not in trace.rectified:
        trace.rectified[key] = trace.activation(trace.at(_linear(trace, s)), relu().to(trace.device))
    return trace.rectified[key]
