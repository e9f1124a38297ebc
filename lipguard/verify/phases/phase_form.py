"""A piecewise-linear network as the phases' checks read it, and the inputs they search.

All of R^d is searched through its directions: with biases multiplied by a further input in [0, 1] the network is
homogeneous and every region with an interior is a cone. Such a cone meets one of the 2d + 1 facets of the box
[-1, 1]^d x [0, 1] that do not contain the origin, so that these facets are searched, and nothing is lost. It needs
break points at 0. Without biases the network is homogeneous by itself: the 2d facets of [-1, 1]^d are enough, on R^d
and on every domain around 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from lipguard.certificate import Ball, Domain
from lipguard.errors import UnsupportedQuery
from lipguard.network import Activation, Affine, Dense, Index, Input, Network, Node, Sum
from lipguard.network.activations import PiecewiseLinear
from lipguard.network.operators.base import LARGEST_RADIUS
from lipguard.verify.domain.ranges import Regions
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.form import Form, feedback_form, places
from lipguard.verify.rewriting import neurons_only

_DIRECTIONS = 32
"""Inputs up to which a network without biases is searched by its directions on a bounded domain: 2d facets are many."""


@dataclass(frozen=True, eq=False)
class PhaseForm:
    """A piecewise-linear network over (w, x), with its domain.

    Attributes:
        network: of neurons alone, on the CPU; where directions need it with a further input, that the biases multiply.
        form: pre-activations p = Q (w, x) + bias and outputs Y (w, x), without their constant, enclosed.
        bias: (n,), enclosed.
        functions: of each activation node.
        breaks: (K - 1, n), pieces beyond a neuron's last repeat it behind an infinite break.
        pieces, heights: slope and offset of each piece, (K, n): phi(p) = slope p + height, the height in floating point.
        lower, upper: boxes that together cover the inputs, (P, d); one, or the facets of the box of directions.
        center, radius, ball_norm: the ball they lie in as well; radius inf if none.
        tangent: the inputs a direction may have, those of the network itself: (d,) of 0 and 1.
        values: phi at the first break, (n,).
        directions: whether the inputs are directions and not points of the domain.
        conic: of which neurons the pre-activation is a row of the inputs, up to its radius, without any constant, (n,).
        exact: of which neurons the rows of q, bias, breaks, pieces and values are what is meant, without any radius, (n,).
    """

    network: Network
    form: Form
    enclosed_bias: Enclosed
    functions: tuple[PiecewiseLinear, ...]
    breaks: Tensor
    pieces: Tensor
    heights: Tensor
    values: Tensor
    lower: Tensor
    upper: Tensor
    center: Tensor
    radius: float
    ball_norm: float
    tangent: Tensor
    directions: bool

    @property
    def layers(self) -> tuple[slice, ...]:
        """Neurons of each activation node."""
        return self.form.layers

    @property
    def neurons(self) -> int:
        """n."""
        return self.form.neurons

    @cached_property
    def q(self) -> Tensor:
        """Q in floating point, (n, n + d)."""
        return self.form.q.center

    @cached_property
    def y(self) -> Tensor:
        """Y in floating point, (m, n + d)."""
        return self.form.y.center

    @property
    def bias(self) -> Tensor:
        """The bias in floating point, (n,)."""
        return self.enclosed_bias.center

    @cached_property
    def hidden(self) -> Network:
        """The network up to its last neurons: all that has a part in the phases."""
        return Network(self.network.nodes[: self.network.activations[-1] + 1] if self.layers else self.network.nodes[:1])

    @cached_property
    def inputs(self) -> Tensor | None:
        """The inputs that a direction may have; None for all."""
        return None if bool(self.tangent.all()) else self.tangent.nonzero()[:, 0]

    @cached_property
    def exact(self) -> Tensor:
        """Where nothing was computed: q, bias, breaks, pieces and values are the network's numbers."""
        return ~self._rounded & ~self.form.q.spread.any(1) & (self.enclosed_bias.spread == 0)

    @cached_property
    def conic(self) -> Tensor:
        """Of which neurons the pre-activation is a row of the inputs, up to its radius, without any constant, (n,)."""
        return ~self._rounded & ~self.form.q[:, : self.neurons].magnitude().any(1) & (self.enclosed_bias.magnitude() == 0)

    @cached_property
    def _rounded(self) -> Tensor:
        """Of which neurons the function's own numbers are rounded, (n,)."""
        none = torch.zeros(0, dtype=torch.bool)
        parts = (none.new_full((here.stop - here.start,), f.rounded) for f, here in zip(self.functions, self.layers, strict=True))
        return torch.cat([none, *parts])

    def regions(self, lower: Tensor, upper: Tensor) -> Regions:
        """Boxes (K, d) within the form's ball."""
        around = math.isfinite(self.radius)
        center = self.center.expand_as(lower) if around else (lower + upper) / 2
        radius = torch.full_like(lower[:, 0], self.radius)
        return Regions(lower, upper, center, radius, torch.full_like(radius, self.ball_norm))


def phase_form(network: Network, domain: Domain | None) -> PhaseForm:
    """The network's phases on a domain.

    Raises:
        UnsupportedQuery: an activation is not piecewise linear, the domain is R^d and a break point is not 0, or a sort
            has too many entries.
    """
    if any(node.loop is not None for node in network.nodes):
        raise UnsupportedQuery("an implicit layer has no phases that its input alone decides.")
    precise = any(node.coupling is not None for node in network.nodes)
    network = _on_cpu(neurons_only(network))
    d = network.inputs
    functions = tuple(_function(network, i) for i in network.activations)
    breaks, pieces, heights, values = _tables(functions, places(network))
    bias = _offsets(network)
    conic = not bool(((breaks != 0) & breaks.isfinite()).any()) and not bool(heights.any())
    homogeneous = conic and not bool(bias.magnitude().any())
    directions = domain is None or (homogeneous and d <= _DIRECTIONS and _around_zero(domain, d))
    if domain is None and not conic:
        raise UnsupportedQuery("on all of R^d the branching needs break points at 0 (ReLU, LeakyReLU, PReLU). Give a domain.")
    tangent, center = torch.ones(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    radius, ball_norm = math.inf, math.inf
    if directions and homogeneous:
        lower, upper = _facets(d)
    elif domain is None:
        network, bias = _homogeneous(network), Enclosed(torch.zeros_like(bias.center))
        lower, upper = _facets(d + 1)
        # The bias input lies in [0, 1]: of its two facets only the one at 1 is left.
        lower, upper = lower[:-1], upper[:-1]
        lower[:-1, -1] = 0.0
        center, tangent = torch.zeros(d + 1, dtype=torch.float64), torch.cat([tangent, torch.zeros(1, dtype=torch.float64)])
    else:
        lower, upper = (end[None] for end in domain.bounds(d))
        if isinstance(domain, Ball):
            center, radius, ball_norm = domain.checked_center(d), float(domain.radius), float(domain.norm)
    return PhaseForm(
        network, feedback_form(network, precise), bias, functions, breaks, pieces, heights, values, lower, upper,
        center, radius, ball_norm, tangent, directions,
    )  # fmt: skip


def _function(network: Network, i: int) -> PiecewiseLinear:
    node = network.nodes[i]
    assert isinstance(node, Activation)
    if not isinstance(node.function, PiecewiseLinear):
        raise UnsupportedQuery(f"{node.name or f'node {i}'} ({node.function.name}) is not piecewise linear: it has no phases.")
    return node.function


def _tables(functions: Sequence[PiecewiseLinear], layers: Sequence[slice]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Breaks, slopes and heights of the pieces of every neuron, and phi at its first break."""
    n, count = max((here.stop for here in layers), default=0), max((len(f.pieces) for f in functions), default=1)
    breaks = torch.full((count - 1, n), math.inf, dtype=torch.float64)
    pieces, heights = torch.zeros(count, n, dtype=torch.float64), torch.zeros(count, n, dtype=torch.float64)
    values = torch.zeros(n, dtype=torch.float64)
    for function, here in zip(functions, layers, strict=True):
        k, size = len(function.pieces), here.stop - here.start
        breaks[: k - 1, here] = function.breaks.reshape(k - 1, -1).expand(-1, size)
        pieces[:, here] = function.pieces[-1].expand(size)
        pieces[:k, here] = function.pieces.reshape(k, -1).expand(-1, size)
        values[here] = function.value.expand(size)
        heights[0, here] = values[here] - pieces[0, here] * breaks[0, here]
        for j in range(1, count):
            at = breaks[j - 1, here]
            step = torch.where(at.isfinite(), (pieces[j - 1, here] - pieces[j, here]) * at, torch.zeros_like(at))
            heights[j, here] = heights[j - 1, here] + step
    return breaks, pieces, heights, values


def _facets(d: int) -> tuple[Tensor, Tensor]:
    """Lower and upper ends of the facets of [-1, 1]^d: x_i = 1 at 2i, x_i = -1 at 2i + 1."""
    lower, upper = (sign * torch.ones(2 * d, d, dtype=torch.float64) for sign in (-1.0, 1.0))
    for i in range(d):
        lower[2 * i, i], upper[2 * i + 1, i] = 1.0, -1.0
    return lower, upper


def _around_zero(domain: Domain, d: int) -> bool:
    """Whether 0 lies in the interior of the domain, exactly."""
    if not isinstance(domain, Ball):
        lower, upper = domain.bounds(d)
        return bool(((lower < 0) & (upper > 0)).all())
    center, radius = [abs(Fraction(c)) for c in domain.checked_center(d).tolist()], Fraction(float(domain.radius))
    if domain.norm == 2:
        return radius > 0 and sum(c * c for c in center) < radius * radius
    return radius > (sum(center) if domain.norm == 1 else max(center))


def _offsets(network: Network) -> Enclosed:
    """Pre-activations at x = 0, w = 0."""
    zeros = [Enclosed(torch.zeros(size, dtype=torch.float64)) for size in network.sizes]
    values, found = zeros[:1], [Enclosed(torch.zeros(0, dtype=torch.float64))]
    for i, node in enumerate(network.nodes[1:], 1):
        read = [values[s] for s in node.sources]
        if i in network.activations:
            found.append(read[0])
            values.append(zeros[i])
        else:
            values.append(node.linear(read, lambda v, op, bias, r=node.bias_radius: v.through(op, bias, r), Enclosed.sum))
    return Enclosed.cat(found, -1)


def _homogeneous(network: Network) -> Network:
    """The network with a further input, the last, by which every bias is multiplied: the same numbers, nothing rounds.

    The radius r of a bias becomes a coefficient r of relative radius 2, which encloses [-r, r].
    """
    d = network.inputs
    nodes: list[Node] = [Input(d + 1), Affine(0, Index(torch.arange(d), d + 1))]
    place = [1]

    def add(node: Node) -> int:
        nodes.append(node)
        return len(nodes) - 1

    for node in network.nodes[1:]:
        if not isinstance(node, Affine) or (node.bias is None and node.source):
            place.append(add(node.moved(lambda i: place[i])))
            continue
        size = node.operator.shape[0]
        zeros = torch.zeros(size, d, dtype=torch.float64)
        bias = zeros[:, 0] if node.bias is None else node.bias
        if node.source:
            terms = [add(Affine(place[node.source], node.operator)), add(Affine(0, Dense(torch.cat([zeros, bias[:, None]], 1))))]
        else:  # in one matrix, whose relative radius is then the bias's as well
            joined = torch.cat([node.operator.dense(), bias[:, None]], 1)
            terms = [add(Affine(0, Dense(joined, node.operator.rho)))]
        if node.bias_radius is not None:
            around = torch.cat([zeros, node.bias_radius[:, None]], 1)
            terms.append(add(Affine(0, Dense(around, LARGEST_RADIUS))))
        place.append(terms[0] if len(terms) == 1 else add(Sum(tuple(terms))))
    return Network(tuple(nodes))


def _on_cpu(network: Network) -> Network:
    """The network of affine maps, sums and piecewise-linear functions with its numbers on the CPU."""
    if network.device.type == "cpu":
        return network
    nodes: list[Node] = []
    for node in network.nodes:
        if isinstance(node, Affine):
            own = {f.name: getattr(node.operator, f.name) for f in fields(node.operator)}  # type: ignore[arg-type]
            operator = replace(node.operator, **{k: v.cpu() for k, v in own.items() if isinstance(v, Tensor)})  # type: ignore[type-var]
            bias, radius = (None if t is None else t.cpu() for t in (node.bias, node.bias_radius))
            node = replace(node, operator=operator, bias=bias, bias_radius=radius)
        elif isinstance(node, Activation) and isinstance(node.function, PiecewiseLinear):
            f = node.function
            node = replace(node, function=PiecewiseLinear(f.name, f.breaks.cpu(), f.pieces.cpu(), f.value.cpu(), f.rounded))
        nodes.append(node)
    return Network(tuple(nodes))
