"""Expressions in one variable: the line cut where compared quantities change their sign, a `Total` on each piece."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lipguard.capture.expressions import Expression, evaluated, piecewise
from lipguard.network.activations import Formula, PiecewiseLinear, absolute, relu
from lipguard.network.activations import canonical as c
from lipguard.network.activations.formula import NEAR
from lipguard.network.activations.interval import Interval
from lipguard.network.activations.terms import Total
from lipguard.network.operators import Diagonal

if TYPE_CHECKING:
    from lipguard.capture.trace import Trace

_CUTS = 48
"""Cuts of the line beyond which an expression is refused."""


class Unsettled(Exception):
    """An expression cannot be settled in this way."""


class Jump(Unsettled):
    """Two sides of a cut do not meet."""


@dataclass
class OneVariable:
    """Totals of one node's entries, on a cell: between two cuts, or at one.

    Attributes:
        base: the node.
        at: of an interval its ends (2, size or 1), of a cut its place (1, size or 1), without cuts (0, 1).
        made: how other leaves are made.
        roots: where compared quantities change their sign inside an interval, nan where one does not.
    """

    base: int
    at: Tensor
    made: dict[int, Expression]
    roots: list[Tensor] = field(default_factory=list)
    memo: dict[int, Total] = field(default_factory=dict)

    def leaf(self, node: int) -> Total:
        """z, or what the node is made of."""
        return c.variable(self.at) if node == self.base else evaluated(self, self.made[node])

    def constant(self, value: Tensor) -> Total:
        """A number for each entry."""
        return c.constant(value)

    mask = constant

    def plus(self, a: Total, b: Total) -> Total:
        """a + b."""
        return c.plus(a, b)

    def times(self, a: Total, b: Total) -> Total:
        """a b."""
        return c.times(a, b)

    def applied(self, name: str, a: Total) -> Total:
        """A function; the root of a square is an absolute value, and its sign that of the number inside."""
        found = c.coefficients(a) if name == "sqrt" else None
        if found is not None and 2 in found:
            e, d, rest = found.get(1, torch.zeros(())), found[2], found.get(0, torch.zeros(()))
            if bool((d > 0).all()) and bool((4 * d * rest == e * e).all()):  # d z^2 + e z + e^2 / (4 d)
                inner = c.plus(c.scaled(c.variable(d), d.sqrt()), c.constant(e / (2 * d.sqrt())))
                return piecewise(self, inner, absolute())
        return c.applied(name, a)

    def sign(self, a: Total) -> Tensor:
        """The sign throughout an interval, or at a cut: 0 there where the number is no more than its rounding.

        Raises:
            Unsettled: the quantity is not affine on the cell.
        """
        line = c.affine(a)
        if line is None:
            raise Jump("compares a quantity that is not piecewise linear.")
        slope, shift = line
        if len(self.at) == 1:
            value, size = slope * self.at[0] + shift, slope.abs() * self.at[0].abs() + shift.abs()
            return torch.where(value.abs() <= 2 * NEAR * size, 0.0, value.sign())
        low, high = self.at if len(self.at) else (torch.tensor([-torch.inf]), torch.tensor([torch.inf]))
        root = -shift / torch.where(slope == 0, torch.nan, slope)
        near = 2.0**-51 * root.abs()  # two units: the root of the same quantity as computed in the neighbouring cell
        inside = (root > low + near) & (root < high - near)
        if bool(inside.any()):
            self.roots.append(torch.where(inside, root, torch.nan))
        middle = _between(low.to(torch.float64), high.to(torch.float64))
        return (slope * middle + shift).sign()


def _between(low: Tensor, high: Tensor) -> Tensor:
    both = torch.where(low.isfinite() & high.isfinite(), low + (high - low) / 2, 0.0)
    left = torch.where(low.isinf() & high.isfinite(), high - 1 - high.abs(), both)
    return torch.where(low.isfinite() & high.isinf(), low + 1 + low.abs(), left)


def one_variable(trace: Trace, made: dict[int, Expression], leaves: frozenset[int]) -> int:
    """A node of neurons, or an affine one, on the one leaf.

    Raises:
        Unsettled, InvalidModel: it jumps, or no bound of its slopes is found.
    """
    (base,) = leaves
    device = trace.device
    cuts = torch.zeros(0, 1, dtype=torch.float64, device=device)
    while True:
        totals, roots = _on_intervals(made, base, cuts)
        if not roots:
            break
        cuts = _cut(cuts, roots)
        if len(cuts) > _CUTS:
            raise Unsettled("has more pieces than are followed.")
    points = [evaluated(OneVariable(base, cut[None], made), made[-1]) for cut in cuts]
    for k in reversed(range(1, len(cuts))):
        # An interval without length is left to what follows it.
        empty = cuts[k - 1] == cuts[k]
        if bool(empty.any()):
            kept = c.scaled(totals[k], (~empty).to(torch.float64))
            totals[k] = c.plus(kept, c.scaled(totals[k + 1], empty.to(torch.float64)))
    for k, point in enumerate(points):
        z = Interval(cuts[k] - NEAR * cuts[k].abs(), cuts[k] + NEAR * cuts[k].abs())
        values = [total.enclosed(z)[0] for total in (totals[k], point, totals[k + 1])]
        low, high = (torch.stack(torch.broadcast_tensors(*side)) for side in zip(*values, strict=True))
        if not bool((low.amax(0) <= high.amin(0)).all()):
            raise Jump("jumps.")
    kept = [k for k in range(len(cuts)) if totals[k].key != totals[k + 1].key]
    totals = [totals[k] for k in kept] + totals[-1:]
    return _neurons(trace, base, cuts[kept], totals)


def _on_intervals(made: dict[int, Expression], base: int, cuts: Tensor) -> tuple[list[Total], list[Tensor]]:
    """The totals between the cuts, and the roots that ask for further ones."""
    infinity = torch.full((1, cuts.shape[1]), torch.inf, dtype=torch.float64, device=cuts.device)
    ends = torch.cat([-infinity, cuts, infinity])
    totals, roots = [], list[Tensor]()
    for k in range(len(ends) - 1):
        cell = OneVariable(base, ends[k : k + 2], made)
        totals.append(evaluated(cell, made[-1]))
        low, high = ends[k], ends[k + 1]
        for root in cell.roots:
            some = root[~root.isnan()][0]
            edge = torch.where(low.isfinite(), low, torch.where(high.isfinite(), high, some))
            roots.append(torch.where(root.isnan(), edge, root))
    return totals, roots


def _cut(cuts: Tensor, roots: list[Tensor]) -> Tensor:
    size = max([cuts.shape[1], *(root.numel() for root in roots)])
    rows = torch.cat([cuts.expand(-1, size), *(root.reshape(1, -1).expand(1, size) for root in roots)])
    rows = rows.detach().sort(0).values.unique(dim=0).sort(0).values
    return rows[:, :1] if bool((rows == rows[:, :1]).all()) else rows


def _neurons(trace: Trace, base: int, cuts: Tensor, totals: list[Total]) -> int:
    lines = [c.affine(total) for total in totals]
    straight = [line for line in lines if line is not None]
    if len(straight) < len(lines):
        return trace.activation(trace.at(base), Formula(cuts, totals).to(trace.device))
    if not len(cuts):
        return affine_node(trace, base, *straight[0])
    size = max([cuts.shape[1], *(part.numel() for line in straight for part in line)])
    pieces = torch.stack([slope.to(cuts).expand(size) for slope, _ in straight])
    value = straight[0][0] * cuts[0] + straight[0][1]
    if bool((pieces == pieces[:, :1]).all()) and cuts.shape[1] == 1 and not pieces.requires_grad:
        pieces, cuts, value = pieces[:, 0], cuts[:, 0], value.flatten()[0]
        for plain in (relu().to(trace.device), absolute().to(trace.device)):
            if torch.equal(pieces, plain.pieces) and torch.equal(cuts, plain.breaks) and float(value) == 0:
                return trace.activation(trace.at(base), plain)
    return trace.activation(trace.at(base), PiecewiseLinear("piecewise", cuts, pieces, value))


def affine_node(trace: Trace, source: int, slope: Tensor, shift: Tensor) -> int:
    """slope z + shift, z the node's value; no node for z itself."""
    size = trace.sizes[source]
    slope, shift = slope.to(trace.device, torch.float64), shift.to(trace.device, torch.float64)
    if slope.ndim == 0 and float(slope.detach()) == 1 and not slope.requires_grad and not bool(shift.any()):
        return source
    bias = shift.expand(size).contiguous() if bool(shift.any()) else None
    return trace.affine(trace.at(source), Diagonal(slope if slope.numel() > 1 else slope.reshape(()), size), bias)
