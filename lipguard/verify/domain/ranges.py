"""Rigorous ranges of every value in a network over many domains at once, by intervals and by linear propagation.

Linear propagation (Zhang et al. 2018, CROWN; Singh et al. 2019, DeepPoly) bounds a row c of a node's values by going
back through the graph: an affine map is transposed, an activation replaced by the line above or below it, and at the
input the largest value over the domain is known. The bounds it finds for one layer give the lines of the next.

Rounding. c' = fl(c W) is off by at most gamma |c| |W|, entry by entry. What multiplies c' are the network's values on the
domain, whose magnitudes are known: |c| (|W| |v|max + |b|) times gamma bounds the effect of a whole step.

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
from lipguard.network import Activation, Affine, Input, Network, Operator, Sum
from lipguard.rounding import TINY, UNIT, gamma
from lipguard.verify.domain.relaxation import Lines, deviation, relax

_LARGEST = 8192
"""Neurons of a layer up to which linear propagation is used; beyond, intervals alone."""

_ENTRIES = 16_000_000
"""Coefficients held at once: 128 MB."""

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
        return torch.cat([self._largest(node, rows[:, k : k + step]) for k in range(0, rows.shape[1], step)], 1)

    def _largest(self, node: int, rows: Tensor) -> Tensor:
        nodes = self.network.nodes
        felt: dict[int, Tensor] = {node: rows}
        count = len(self.regions.lower)
        total, slack = (torch.zeros(count, rows.shape[1], dtype=torch.float64, device=rows.device) for _ in range(2))

        def add(i: int, c: Tensor) -> None:
            nonlocal slack
            if i in felt:
                felt[i] = felt[i] + c
                slack = slack + 2 * UNIT * _dot(felt[i].abs(), self.magnitude(i))
            else:
                felt[i] = c

        for i in range(node, -1, -1):
            if i not in felt:
                continue
            c, here = felt.pop(i), nodes[i]
            match here:
                case Input():
                    part = self.regions.largest(c)
                case Affine():
                    add(here.source, here.operator.transpose()(c))
                    slack = slack + gamma(here.operator.shape[0] + 8) * _dot(c.abs(), self.masses[i])
                    part = None if here.bias is None else _dot(c, here.bias.expand(count, -1))
                case Activation():
                    lines = self.lines[i]
                    up, down = c.clamp_min(0), c.clamp_max(0)
                    add(here.source, up * lines.high_slope[:, None] + down * lines.low_slope[:, None])
                    steep = torch.maximum(lines.high_slope.abs(), lines.low_slope.abs())
                    tall = torch.maximum(lines.high_height.abs(), lines.low_height.abs())
                    part = _dot(up, lines.high_height) + _dot(down, lines.low_height)
                    size = tall + steep * self.magnitude(here.source)
                    slack = slack + gamma(self.network.sizes[i] + 8) * _dot(c.abs(), size)
                case Sum():
                    part = None
                    for source in here.sources:
                        add(source, c)
                case _:
                    raise NotCertified(f"the range of {here.name or f'node {i}'} on a domain is not known.")
            if part is not None:
                total = total + part
                slack = slack + 4 * UNIT * (total.abs() + part.abs())
        return total + slack * (1 + 2.0**-10) + len(nodes) * TINY

    def magnitude(self, i: int) -> Tensor:
        """Bound of the absolute values of node i."""
        return torch.maximum(self.lower[i].abs(), self.upper[i].abs())

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest slope of every neuron on each domain, (K, n), in the order of the activation nodes."""
        count = len(self.regions.lower)
        empty = torch.zeros(count, 0, dtype=torch.float64, device=self.regions.lower.device)
        alphas, betas = [empty], [empty]
        for i in self.network.activations:
            node = self.network.nodes[i]
            assert isinstance(node, Activation)
            low, high = node.function.slope_range(self.lower[node.source], self.upper[node.source])
            alpha, beta = (s.to(low) for s in node.function.slopes)
            alphas.append(torch.maximum(low, alpha).expand(count, -1))
            betas.append(torch.minimum(high, beta).expand(count, -1))
        return torch.cat(alphas, 1), torch.cat(betas, 1)


def propagate(network: Network, regions: Regions) -> Propagation:
    """Ranges of every node on each domain."""
    result = Propagation(network, regions)
    linear: dict[int, tuple[Tensor, Tensor]] = {}
    lower, upper, center = result.lower, result.upper, result.center
    for i, node in enumerate(network.nodes):
        match node:
            case Input():
                low, high, middle = regions.lower, regions.upper, regions.center
            case Affine():
                source = node.source
                low, high = _affine(node.operator, lower[source], upper[source], node.bias)
                middle = node.operator(center[source])
                mass = node.operator.abs()(result.magnitude(source))
                if node.bias is not None:
                    middle, mass = middle + node.bias, mass + node.bias.abs()
                result.masses[i] = mass
            case Activation():
                source = node.source
                if source not in linear:
                    linear[source] = _linear(result, source)
                    low, high = linear[source]
                    lower[source] = torch.maximum(lower[source], low)
                    # Two enclosures of one value meet, but for a domain that is empty.
                    upper[source] = torch.maximum(torch.minimum(upper[source], high), lower[source])
                ends = linear[source]
                result.lines[i] = relax(node.function, *ends, center[source])
                low, high = deviation(node.function, torch.zeros_like(lower[source]), lower[source], upper[source])
                middle = node.function(center[source])
            case Sum():
                parts = node.sources
                low, high = torch.stack([lower[s] for s in parts]).sum(0), torch.stack([upper[s] for s in parts]).sum(0)
                slack = gamma(len(parts) + 2) * torch.stack([result.magnitude(s) for s in parts]).sum(0)
                low, high = low - slack, high + slack
                middle = torch.stack([center[s] for s in parts]).sum(0)
            case _:
                raise NotCertified(f"the range of {node.name or f'node {i}'} on a domain is not known.")
        lower.append(low)
        upper.append(high)
        center.append(middle)
    return result


def _linear(partial: Propagation, node: int) -> tuple[Tensor, Tensor]:
    """Range of a node's values by linear propagation alone."""
    size = partial.network.sizes[node]
    if size > _LARGEST or isinstance(partial.network.nodes[node], Input):
        return partial.lower[node], partial.upper[node]
    eye = torch.eye(size, dtype=torch.float64, device=partial.regions.lower.device)
    both = partial.largest(node, torch.cat([eye, -eye])[None])
    low, high = -both[:, size:], both[:, :size]
    return low, torch.maximum(low, high)


def _affine(operator: Operator, lower: Tensor, upper: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Range of operator v + bias for lower <= v <= upper."""
    middle = (lower + upper) / 2
    half = torch.maximum(upper - middle, middle - lower) * (1 + 4 * UNIT)
    magnitude = operator.abs()
    value, mass = operator(middle), magnitude(middle.abs())
    if bias is not None:
        value, mass = value + bias, mass + bias.abs()
    k = gamma(operator.shape[1] + 8)
    reach = magnitude(half)
    radius = reach + 2 * k * (reach + mass) + operator.shape[1] * TINY
    return value - radius, value + radius
