"""Rigorous ranges of every value in a network over many domains at once, by intervals and by linear propagation.

Linear propagation (Zhang et al. 2018, CROWN; Singh et al. 2019, DeepPoly) bounds a row c of a node's values by going
back through the graph: an affine map is transposed, an activation replaced by the line above or below it, and at the
input the largest value over the domain is known. The bounds it finds for one layer give the lines of the next.

Rounding. c' = fl(c W) is off by at most gamma |c| |W|, entry by entry, and from c W~ of the true W~ by rho |c| |W| more. What
multiplies c' are the network's values on the domain, whose magnitudes are known: |c| (|W| |v|max + |b|) times gamma + rho bounds
the effect of a whole step.

A domain inside another with the same centre has ranges inside the other's: each line set is (`relaxation`), and so are
intervals; therefore lines are built on the ranges of linear propagation alone, and the two are intersected afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lipguard.certificate import Ball, Box, Domain
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Network, Operator, Sum
from lipguard.rounding import TINY, UNIT, gamma
from lipguard.verify.domain.relaxation import Intervals, Lines
from lipguard.verify.enclosed import Enclosed, relative_error

_LARGEST = 8192
"""Neurons of a layer up to which linear propagation is used; beyond, intervals alone."""

_ENTRIES = 16_000_000
"""Coefficients held at once: 128 MB."""

Ends = tuple[Tensor, Tensor]
"""Lower and upper ends, (K, size) each."""

Value = tuple[Tensor, Tensor, Tensor]
"""Lower and upper ends, and the value at the centres in floating point."""

_DUAL = {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}


@dataclass(frozen=True, eq=False)
class Regions:
    """K domains.

    Attributes:
        lower, upper: boxes, (K, d).
        center: of the balls, or middle of the boxes, (K, d).
        radius: of the balls that the inputs lie in as well, inf without one, (K,).
        norms: of the balls, (K,).
    """

    lower: Tensor
    upper: Tensor
    center: Tensor
    radius: Tensor
    norms: Tensor

    @staticmethod
    def of(domains: Sequence[Domain], size: int, device: torch.device) -> Regions:
        """The domains' tensors.

        Raises:
            InvalidDomain: one is empty, reversed or of another dimension.
        """
        ends = [domain.bounds(size) for domain in domains]
        lower, upper = (torch.stack(side).to(device) for side in zip(*ends, strict=True))
        balls = [domain if isinstance(domain, Ball) else None for domain in domains]
        middles = [
            (low + high) / 2 if ball is None else ball.checked_center(size) for ball, (low, high) in zip(balls, ends, strict=True)
        ]
        radius = torch.tensor([math.inf if ball is None else float(ball.radius) for ball in balls], dtype=torch.float64)
        norms = torch.tensor([math.inf if ball is None else float(ball.norm) for ball in balls], dtype=torch.float64)
        return Regions(lower, upper, torch.stack(middles).to(device), radius.to(device), norms.to(device))

    @staticmethod
    def around(center: Tensor, radius: Tensor, box: Box | None = None) -> Regions:
        """2-balls around points (K, d) with radii (K,), within a box that holds the points."""
        end = torch.full_like(center, math.inf)
        moved = radius[:, None] > 0
        lower = torch.where(moved, torch.nextafter(center - radius[:, None], -end), center)
        upper = torch.where(moved, torch.nextafter(center + radius[:, None], end), center)
        if box is not None:
            low, high = (side.to(center) for side in box.bounds(center.shape[1]))
            lower, upper = torch.maximum(lower, low), torch.minimum(upper, high)
        return Regions(lower, upper, center, radius, torch.full_like(radius, 2.0))

    def largest(self, rows: Tensor) -> Tensor:
        """Upper bounds of rows x over each domain, rows (K or 1, r, d), rounding included: (K, r)."""
        middle, half = (self.lower + self.upper) / 2, (self.upper - self.lower) / 2
        size = torch.maximum(self.lower.abs(), self.upper.abs())
        magnitude = rows.abs()
        value = _dot(rows, middle) + _dot(magnitude, half)
        mass = _dot(magnitude, size)
        if bool(self.radius.isfinite().any()):
            length = torch.full_like(value, math.inf)
            for norm in self.norms.unique().tolist():
                here = torch.linalg.vector_norm(rows, _DUAL[norm], dim=2)
                length = torch.where((self.norms == norm)[:, None], here, length)
            radius = self.radius.nan_to_num(0.0, 0.0)[:, None]
            around = _dot(rows, self.center) + length * radius
            value = torch.where(self.radius.isfinite()[:, None], torch.minimum(value, around), value)
            mass = mass + _dot(magnitude, self.center.abs() + radius)
        return value + gamma(2 * rows.shape[2] + 16) * mass


def _dot(rows: Tensor, vectors: Tensor) -> Tensor:
    """rows (K or 1, r, s) times vectors (K, s): (K, r)."""
    return (vectors @ rows[0].mT) if len(rows) == 1 else (rows @ vectors[:, :, None])[:, :, 0]


@dataclass(frozen=True, eq=False)
class Propagation:
    """A network on K domains.

    Attributes:
        lower, upper: range of every node's value, (K, size) each.
        center: every node's value at the centres in floating point, (K, size): a choice, no proof.
        masses: |W| |v|max + |b| of each affine node, (K, size).
        lines: of each activation node.
    """

    network: Network
    regions: Regions
    lower: list[Tensor] = field(default_factory=list)
    upper: list[Tensor] = field(default_factory=list)
    center: list[Tensor] = field(default_factory=list)
    masses: dict[int, Tensor] = field(default_factory=dict)
    lines: dict[int, Lines] = field(default_factory=dict)

    def largest(self, node: int, rows: Tensor) -> Tensor:
        """Upper bounds of rows v, v the value of `node`, on each domain: rows (K or 1, r, size) to (K, r)."""
        width = max(self.network.sizes) * len(self.regions.lower)
        step = max(1, _ENTRIES // width)
        return torch.cat([self.largest_sum([(node, rows[:, k : k + step])]) for k in range(0, rows.shape[1], step)], 1)

    def largest_sum(self, parts: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Upper bounds of a sum over (node, rows) of rows v, v the value of the node: rows (K or 1, r, size) to (K, r)."""
        felt: dict[int, Tensor] = {}
        shape, device = (len(self.regions.lower), parts[0][1].shape[1]), self.regions.lower.device
        total, slack = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))

        def add(i: int, c: Tensor) -> None:
            nonlocal slack
            if i in felt:
                felt[i] = felt[i] + c
                slack = slack + 2 * UNIT * _dot(felt[i].abs(), self.magnitude(i))
            else:
                felt[i] = c

        def gather(part: Tensor) -> None:
            nonlocal total, slack
            total = total + part
            # One rounding of the total, and one of what `largest` or a product with a bias left.
            slack = slack + 4 * UNIT * (total.abs() + part.abs())

        def through(source: int, operator: Operator, bias: Tensor | None) -> int:
            nonlocal slack
            add(source, operator.transpose()(c))
            # c' = fl(c W) is off by at most (gamma + rho) |c| |W|, and the sum that multiplies the bias by gamma of its terms.
            slack = slack + relative_error(operator, operator.shape[0] + 8) * _dot(c.abs(), self.masses[i])
            if bias is not None:
                gather(_dot(c, bias.expand(shape[0], -1)))
            if here.bias_radius is not None:
                slack = slack + _dot(c.abs(), here.bias_radius.expand(shape[0], -1)) * (1 + 2 * gamma(operator.shape[0] + 8))
            return source

        def branch(sources: Sequence[int]) -> int:
            for source in sources:
                add(source, c)
            return i

        def neurons(source: int, lines: Lines) -> None:
            nonlocal slack
            up, down = c.clamp_min(0), c.clamp_max(0)
            add(source, up * lines.high_slope[:, None] + down * lines.low_slope[:, None])
            steep = torch.maximum(lines.high_slope.abs(), lines.low_slope.abs())
            tall = torch.maximum(lines.high_height.abs(), lines.low_height.abs())
            # The products with the slopes round, and so do the sums over the heights.
            slack = slack + gamma(steep.shape[1] + 8) * _dot(c.abs(), tall + steep * self.magnitude(source))
            gather(_dot(up, lines.high_height) + _dot(down, lines.low_height))

        for node, rows in parts:
            add(node, rows)
        for i in range(max(felt), -1, -1):
            if i not in felt:
                continue
            c, here = felt.pop(i), self.network.nodes[i]
            if i == 0:
                gather(self.regions.largest(c))
            elif i in self.lines:
                neurons(here.sources[0], self.lines[i])
            else:
                here.linear(here.sources, through, branch)
        # The slack is a sum of nonnegative numbers, each step of which rounds by 2^-53 of itself.
        return total + slack * (1 + 2.0**-10) + len(self.network.nodes) * TINY

    def magnitude(self, i: int) -> Tensor:
        """Bound of the absolute values of node i."""
        return torch.maximum(self.lower[i].abs(), self.upper[i].abs())

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest slope of every neuron on each domain, (K, n), in the order of the activation nodes."""
        ends = [(self.lower[0][:, :0],) * 2]
        for i in self.network.activations:
            node = self.network.nodes[i]
            if node.elementwise is None:
                raise NotCertified(f"the slopes of {node.name or f'node {i}'} on a domain are not known.")
            ends.append(node.elementwise.slope_range(self.lower[node.sources[0]], self.upper[node.sources[0]]))
        (alpha, beta), (low, high) = self.network.slopes(), (torch.cat(side, 1) for side in zip(*ends, strict=True))
        return torch.maximum(low, alpha), torch.minimum(high, beta)


class Assumed:
    """What is known of the neurons beforehand: here nothing, in `lipguard.verify.phases` the pieces that some of them are in.

    Attributes:
        searched: whether linear propagation is to look for ranges, or they are known.
    """

    searched = True

    def cut(self, k: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range of the k-th activation node's pre-activations, (K, size), cut to what is known."""
        del k
        return low, high

    def lines(self, k: int, wide: Ends, tight: Intervals, center: Tensor) -> Lines:
        """Lines around the k-th activation on its range: `wide` by linear propagation alone, `tight` by all that is known."""
        del k
        return Intervals(tight.function, *wide).lines(center)


def propagate(network: Network, regions: Regions, assumed: Assumed | None = None) -> Propagation:
    """Ranges of every node on each domain, or where in addition what is assumed holds.

    Raises:
        NotCertified: a node is neither affine, nor a sum, nor an activation.
    """
    assumed = Assumed() if assumed is None else assumed
    found = Propagation(network, regions, [regions.lower], [regions.upper], [regions.center])
    linear: dict[int, Ends] = {}
    for i, node in enumerate(network.nodes[1:], 1):
        if not isinstance(node, Affine | Sum | Activation):
            raise NotCertified(f"the range of {node.name or f'node {i}'} on a domain is not known.")
        if isinstance(node, Activation):
            low, high, middle = _neurons(found, node, i, linear, assumed)
        else:
            read = [(found.lower[s], found.upper[s], found.center[s]) for s in node.sources]
            low, high, middle = node.linear(
                read, lambda v, op, b, i=i, r=node.bias_radius: _affine(v, op, b, r, found.masses, i), _total
            )
        found.lower.append(low)
        found.upper.append(high)
        found.center.append(middle)
    return found


def _neurons(found: Propagation, node: Activation, i: int, linear: dict[int, Ends], assumed: Assumed) -> Value:
    """Values of the activation node i, whose lines are kept; its source's range is made as small as is known."""
    source, k = node.source, len(found.lines)
    low, high, center = found.lower[source], found.upper[source], found.center[source]
    if source not in linear:
        linear[source] = _linear(found, source) if assumed.searched else (low, high)
        # Two enclosures of one value meet, but for a domain that is empty.
        low = torch.maximum(low, linear[source][0])
        high = torch.maximum(torch.minimum(high, linear[source][1]), low)
    low, high = found.lower[source], found.upper[source] = assumed.cut(k, low, high)
    tight = Intervals(node.function, low, high)
    found.lines[i] = assumed.lines(k, linear[source], tight, center)
    return *tight.deviation(torch.zeros_like(low)), node.function(center)


def _linear(partial: Propagation, node: int) -> tuple[Tensor, Tensor]:
    """Range of a node's values by linear propagation alone."""
    size, known = partial.network.sizes[node], partial.network.nodes[node]
    # An affine map of a box has the same range either way.
    boxes = not bool(partial.regions.radius.isfinite().any())
    if size > _LARGEST or not known.sources or (known.map is not None and known.sources == (0,) and boxes):
        return partial.lower[node], partial.upper[node]
    eye = torch.eye(size, dtype=torch.float64, device=partial.regions.lower.device)
    both = partial.largest(node, torch.cat([eye, -eye])[None])
    low, high = -both[:, size:], both[:, :size]
    return low, torch.maximum(low, high)


def _affine(
    v: Value, operator: Operator, bias: Tensor | None, bias_radius: Tensor | None, masses: dict[int, Tensor], i: int
) -> Value:
    """Values of operator v + bias, the affine node i, whose mass is kept."""
    lower, upper, center = v
    center, masses[i] = operator(center), operator.abs()(torch.maximum(lower.abs(), upper.abs()))
    if bias is not None:
        center, masses[i] = center + bias, masses[i] + bias.abs()
    return *Enclosed.between(lower, upper).through(operator, bias, bias_radius).ends(), center


def _total(parts: Sequence[Value]) -> Value:
    """Values of a sum of nodes."""
    low, high = Enclosed.sum([Enclosed.between(lower, upper) for lower, upper, _ in parts]).ends()
    return low, high, torch.stack([center for _, _, center in parts]).sum(0)
