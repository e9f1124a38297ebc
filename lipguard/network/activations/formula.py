"""`Formula`: a continuous function put together of sums of products, whose slopes are enclosed and not known by heart.

On each piece between two breaks the derivative is enclosed in interval arithmetic (`terms`), on cells that are halved where the
enclosure is wide. The tails, [T, inf) and its mirror image, are cells as any other. The largest upper and the least lower end
over all cells bound every slope, whatever cells were chosen; cells that were not halved far enough cost sharpness only.

Coefficients that were computed, such as the logarithm of a constant, are rounded to float64 once, as other constants are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from lipguard.errors import InvalidModel
from lipguard.network.activations.base import Elementwise
from lipguard.network.activations.interval import Interval
from lipguard.network.activations.terms import Total

_ROUNDS = 60
"""Times that cells are halved."""

_CELLS = 40_000
"""Cells from which on none is halved."""

_SHARP = 1e-7
"""Distance, relative to the steepest slope, up to which the bounds of the slopes are brought to slopes that are attained."""

NEAR = 2.0**-48
"""Relative distance of a break from the zero that it stands for, at most."""

_PARTS = 16
"""Cells of an interval on which slopes are asked for."""


class Formula(Elementwise):
    """The total k between the breaks k - 1 and k, moved by a constant so that it continues the one before.

    Both sides of a break must agree as far as arithmetic can tell: the constants are then below what rounding makes of the
    values, and are counted as rounding.

    Args:
        breaks: (k, 1) or (k, size), not decreasing.
        totals: k + 1 functions of z.

    Raises:
        InvalidModel: the sides of a break differ, or no bound of the slopes is found.
    """

    kind: ClassVar[str] = "Formula"

    def __init__(self, breaks: Tensor, totals: Sequence[Total]) -> None:
        self.breaks, self.totals = breaks, tuple(totals)
        if breaks.ndim != 2 or len(totals) != len(breaks) + 1 or not bool((breaks[1:] >= breaks[:-1]).all()):
            raise InvalidModel("an activation's breaks do not ascend, or are not one fewer than its pieces.")
        self.name = "formula " + " | ".join(total.text() for total in self.totals)
        for left, right in self._sides:
            if not bool((torch.maximum(left.low, right.low) <= torch.minimum(left.high, right.high)).all()):
                raise InvalidModel("jumps where it passes from one piece to the next: it has no Lipschitz constant.")
        if not all(bool(end.isfinite().all()) for end in self.slopes):
            raise InvalidModel("has slopes of which no bound is known.")

    @cached_property
    def _sides(self) -> list[tuple[Interval, Interval]]:
        """Values on the left and on the right of every break."""
        # A break is the rounded zero of what is compared there: both sides are looked at next to it as well.
        at = [Interval(b - NEAR * b.abs(), b + NEAR * b.abs()) for b in self.breaks]
        return [
            (left.enclosed(z)[0], right.enclosed(z)[0]) for z, left, right in zip(at, self.totals, self.totals[1:], strict=False)
        ]

    @cached_property
    def moved(self) -> Tensor:
        """Bound of the constants by which pieces are moved to continue each other, (size,) or (1,)."""
        total = self.breaks.new_zeros(1)
        for left, right in self._sides:
            total = total + torch.maximum(left.high - right.low, right.high - left.low).clamp_min(0) * (1 + 2.0**-40)
        return total

    def __call__(self, z: Tensor) -> Tensor:
        """phi(z), by the piece that z lies on."""
        result = self.totals[0](z if not len(self.breaks) else torch.minimum(z, self.breaks[0].expand_as(z)))
        for b, total in zip(self.breaks, self.totals[1:], strict=True):
            # A piece is not evaluated where it may overflow, so that its derivative is no nan either.
            result = torch.where(z > b, total(torch.maximum(z, b.expand_as(z))), result)
        return result

    def rounding(self, z: Tensor) -> Tensor:
        """The width of the enclosure at z, and what pieces are moved by."""
        point, value = Interval.of(z), self(z)
        error = torch.full_like(z, 0.0)
        for k, total in enumerate(self.totals):
            there = self._within(k, z, z)
            found = total.enclosed(point)[0]
            error = torch.where(there, torch.maximum(error, torch.maximum(found.high - value, value - found.low)), error)
        return (error + self.moved) * (1 + 2.0**-40)

    def _within(self, k: int, low: Tensor, high: Tensor) -> Tensor:
        """Whether [low, high] meets the domain of piece k, its ends included."""
        there = torch.ones_like(low, dtype=torch.bool)
        if k > 0:
            there = there & (high >= self.breaks[k - 1])
        if k < len(self.breaks):
            there = there & (low <= self.breaks[k])
        return there

    @property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """The slopes of all pieces, 0-d or (size,)."""
        return self._slopes

    @cached_property
    def _slopes(self) -> tuple[Tensor, Tensor]:
        rows = [row.detach().cpu() for row in self._rows()]
        size = max([1, *map(len, rows)])
        table = torch.stack([torch.zeros(size, dtype=torch.float64), *(row.expand(size) for row in rows)])
        distinct, inverse = table.unique(dim=1, return_inverse=True)
        first = torch.stack([(inverse == i).nonzero()[0, 0] for i in range(distinct.shape[1])])
        ends = [_swept(*self._piece(k, first)) for k in range(len(self.totals))]
        low, high = (torch.stack(side) for side in zip(*ends, strict=True))
        low, high = (end.to(self.breaks.device)[inverse.to(self.breaks.device)] for end in (low.amin(0), high.amax(0)))
        return (low[0], high[0]) if size == 1 else (low, high)

    def _rows(self) -> Iterator[Tensor]:
        """Every row of numbers that the entries' functions are made of, (size,) or (1,)."""
        for numbers in self.tensors():
            yield from numbers.reshape(1, -1) if numbers.ndim < 2 else numbers

    def _piece(self, k: int, columns: Tensor) -> tuple[Total, Tensor, Tensor]:
        """A total for some entries, on the CPU, and the ends of its domain."""
        breaks = self.breaks.detach().cpu()
        breaks = breaks.expand(-1, max(breaks.shape[1], int(columns.max()) + 1))[:, columns]
        infinity = torch.full((len(columns),), torch.inf, dtype=torch.float64)
        total = self.totals[k].mapped(lambda c: c.detach().cpu())
        return (
            total.columns(columns),
            breaks[k - 1] if k > 0 else -infinity,
            breaks[k] if k < len(breaks) else infinity,
        )

    def slope_range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Enclosures on equal parts of the interval, piece by piece, and never beyond the slopes on all of R."""
        alpha, beta = self.slopes
        low, high = torch.full_like(lower, torch.inf), torch.full_like(upper, -torch.inf)
        bounded = lower.isfinite() & upper.isfinite()
        one = not bool((lower < upper).any())
        for k, total in enumerate(self.totals):
            start = lower if k == 0 else torch.maximum(lower, self.breaks[k - 1])
            stop = upper if k == len(self.breaks) else torch.minimum(upper, self.breaks[k])
            here = start <= stop
            stop = torch.maximum(start, stop)
            step = torch.where(bounded, (stop - start) / _PARTS, 0.0)
            edges = [start, stop] if one else [*(torch.minimum(start + step * j, stop) for j in range(_PARTS)), stop]
            for a, b in pairwise(edges):
                slope = total.enclosed(Interval(a, torch.maximum(a, b)))[1]
                low = torch.where(here, torch.minimum(low, slope.low), low)
                high = torch.where(here, torch.maximum(high, slope.high), high)
        return torch.minimum(torch.maximum(low, alpha), beta), torch.maximum(torch.minimum(high, beta), alpha)

    @property
    def formula(self) -> Formula:
        """Itself."""
        return self

    def tensors(self) -> tuple[Tensor, ...]:
        """Breaks and coefficients."""
        return (self.breaks, *(c for total in self.totals for c in total.tensors()))

    def to(self, device: torch.device) -> Formula:
        """The function with its numbers on a device."""
        if self.breaks.device == device:
            return self
        return Formula(self.breaks.to(device), [total.mapped(lambda c: c.to(device)) for total in self.totals])

    def to_record(self) -> dict[str, Any]:
        """Breaks and totals."""
        return {"kind": self.kind, "name": self.name, "breaks": self.breaks, "totals": [t.to_record() for t in self.totals]}


def _swept(total: Total, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the derivative between start and stop, (n,) each, for n functions at once; ends may be infinite.

    Cells are halved while an end of their enclosure lies beyond a slope that is attained; a tail is cut at twice its end.
    """
    count = len(start)
    grid = torch.cat([-(2.0 ** torch.arange(8, -9, -1)), torch.zeros(1), 2.0 ** torch.arange(-8, 9)]).to(torch.float64)
    inner = torch.minimum(torch.maximum(grid[:, None], start), stop)
    edges = torch.cat([start[None], inner, stop[None]])
    a, b = edges[:-1].flatten(), edges[1:].flatten()
    column = torch.arange(count).repeat(len(edges) - 1)
    a, b, column = (t[a < b] for t in (a, b, column)) if bool((a < b).any()) else (a, b, column)
    low, high = torch.full((count,), torch.inf, dtype=torch.float64), torch.full((count,), -torch.inf, dtype=torch.float64)
    least, most = low.clone(), high.clone()  # of slopes that are attained
    for halved in range(_ROUNDS + 1):
        middle = _middle(a, b)
        at = total.columns(column)
        slope = at.enclosed(Interval(a, b))[1]
        point = at.enclosed(Interval.of(middle))[1]
        least.scatter_reduce_(0, column, point.high, "amin")
        most.scatter_reduce_(0, column, point.low, "amax")
        room = _SHARP * torch.maximum(least.abs(), most.abs()).nan_to_num(0.0, 0.0, 0.0)[column]
        wide = (slope.high > most[column] + room) | (slope.low < least[column] - room)
        wide &= (a < middle) & (middle < b)
        if halved == _ROUNDS or len(a) > _CELLS:
            wide[:] = False
        low.scatter_reduce_(0, column[~wide], slope.low[~wide], "amin")
        high.scatter_reduce_(0, column[~wide], slope.high[~wide], "amax")
        if not bool(wide.any()):
            break
        a, b, column = torch.cat([a[wide], middle[wide]]), torch.cat([middle[wide], b[wide]]), column[wide].repeat(2)
    return low, high


def _middle(a: Tensor, b: Tensor) -> Tensor:
    """A number between the ends: in a tail at twice its end, and 1 at least."""
    finite = torch.where(a.isfinite() & b.isfinite(), a + (b - a) / 2, 0.0)
    right = torch.where(a.isfinite() & b.isinf(), (2 * a.abs()).clamp_min(1.0), finite)
    left = torch.where(a.isinf() & b.isfinite(), -(2 * b.abs()).clamp_min(1.0), right)
    return torch.where(a.isinf() & b.isinf(), 0.0, left)
