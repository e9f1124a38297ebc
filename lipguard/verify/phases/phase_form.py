"""A piecewise-linear network as the phases' checks read it, and the inputs they search.

All of R^d is searched through its directions: with biases multiplied by a further input in [0, 1] the network is
homogeneous and every region with an interior is a cone. Such a cone meets one of the 2d + 1 facets of the box
[-1, 1]^d x [0, 1] that do not contain the origin, so that these facets are searched, and nothing is lost. It needs
break points at 0. Without biases the network is homogeneous by itself: the 2d facets of [-1, 1]^d are enough, on R^d
and on every domain around 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lipguard.certificate import Ball, Domain
from lipguard.errors import UnsupportedQuery
from lipguard.network import Activation, Affine, Implicit, Input, Network, Sum
from lipguard.network.activations import PiecewiseLinear
from lipguard.rounding import gamma
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.form import feedback_form
from lipguard.verify.rewriting import neurons_only

_DIRECTIONS = 32
"""Inputs up to which a network without biases is searched by its directions on a bounded domain: 2d facets are many."""


@dataclass(frozen=True, eq=False)
class PhaseForm:
    """A piecewise-linear network over (w, x), with its domain, all entries enclosed.

    Attributes:
        q: pre-activations p = q (w, x) + bias, (n, n + d).
        y: outputs, (m, n + d), without their constant.
        bias: (n,).
        error: relative rounding error of q, y and bias and of any sum over them.
        layers: neurons of each activation node.
        breaks: (K - 1, n), pieces beyond a neuron's last repeat it behind an infinite break.
        pieces, heights: slope and offset of each piece, (K, n): phi(p) = slope p + height.
        lower, upper: boxes that together cover the inputs, (P, d); one, or the facets of the box of directions.
        center, radius, ball_norm: the ball they lie in as well; radius inf if none.
        tangent: the inputs a direction may have, those of the network itself: (d,) of 0 and 1.
        values: phi at the first break, (n,).
        directions: whether the inputs are directions and not points of the domain.
        exact: whether q, bias, breaks, pieces and values are the network's own numbers, without any rounding.
    """

    q: Tensor
    y: Tensor
    bias: Tensor
    error: float
    layers: tuple[slice, ...]
    breaks: Tensor
    pieces: Tensor
    heights: Tensor
    lower: Tensor
    upper: Tensor
    center: Tensor
    radius: float
    ball_norm: float
    tangent: Tensor
    values: Tensor
    directions: bool
    exact: bool

    @property
    def neurons(self) -> int:
        """n."""
        return self.q.shape[0]


def phase_form(network: Network, domain: Domain | None) -> PhaseForm:
    """The network's phases on a domain.

    Raises:
        UnsupportedQuery: an activation is not piecewise linear, the domain is R^d and a break point is not 0, or a sort
            has too many entries.
    """
    if any(isinstance(node, Implicit) for node in network.nodes):
        raise UnsupportedQuery("an implicit layer has no phases that its input alone decides.")
    given, network = network, neurons_only(network)
    form = feedback_form(network, precise=network is not given)
    n, d = form.neurons, network.inputs
    bias, spread = _offsets(network)
    functions, sizes = [], []
    for i in network.activations:
        node = network.nodes[i]
        assert isinstance(node, Activation)
        if not isinstance(node.function, PiecewiseLinear):
            raise UnsupportedQuery(
                f"{node.name or f'node {i}'} ({node.function.name}) is not piecewise linear: it has no phases."
            )
        functions.append(node.function)
        sizes.append(network.sizes[i])
    count = max((len(f.pieces) for f in functions), default=1)
    breaks = torch.full((count - 1, n), math.inf, dtype=torch.float64)
    pieces, heights = torch.zeros(count, n, dtype=torch.float64), torch.zeros(count, n, dtype=torch.float64)
    values = torch.zeros(n, dtype=torch.float64)
    start, layers = 0, []
    for function, size in zip(functions, sizes, strict=True):
        here = slice(start, start + size)
        layers.append(here)
        start += size
        k = len(function.pieces)
        breaks[: k - 1, here] = function.breaks.cpu().reshape(k - 1, -1).expand(-1, size)
        pieces[:, here] = function.pieces[-1].cpu().expand(size)
        pieces[:k, here] = function.pieces.cpu().reshape(k, -1).expand(-1, size)
        # The constant of each piece from the value at the first break; the loop's few roundings are in `error`.
        values[here] = value = function.value.cpu().expand(size)
        height = value - pieces[0, here] * breaks[0, here]
        heights[0, here] = height
        for j in range(1, count):
            at = breaks[j - 1, here]
            step = torch.where(at.isfinite(), (pieces[j - 1, here] - pieces[j, here]) * at, torch.zeros_like(at))
            height = height + step
            heights[j, here] = height
    q, y, bias = form.q.center.cpu(), form.y.center.cpu(), bias.cpu()
    exact = (form.q.radius is None or not bool(form.q.radius.any())) and spread is None and not any(f.rounded for f in functions)
    conic = not bool(((breaks != 0) & breaks.isfinite()).any()) and not bool(heights.any())
    homogeneous = conic and spread is None and not bool(bias.any())
    center, radius, ball_norm = torch.zeros(d, dtype=torch.float64), math.inf, math.inf
    tangent = torch.ones(d, dtype=torch.float64)
    directions = domain is None or (homogeneous and d <= _DIRECTIONS and _around_zero(domain, d))
    if domain is None and not conic:
        raise UnsupportedQuery("on all of R^d the branching needs break points at 0 (ReLU, LeakyReLU, PReLU). Give a domain.")
    if directions and homogeneous:
        lower, upper = _facets(d)
    elif domain is None:
        q = torch.cat([q, bias[:, None]], 1)
        y = torch.cat([y, torch.zeros(len(y), 1, dtype=torch.float64)], 1)
        lower, upper = _facets(d + 1)
        # The bias input lies in [0, 1]: of its two facets only the one at 1 is left.
        lower, upper = lower[:-1], upper[:-1]
        lower[:-1, -1] = 0.0
        bias, spread = torch.zeros(n, dtype=torch.float64), None if spread is None else torch.zeros_like(spread)
        center = torch.zeros(d + 1, dtype=torch.float64)
        tangent = torch.cat([tangent, torch.zeros(1, dtype=torch.float64)])
    else:
        assert domain is not None
        lower, upper = (end[None] for end in domain.bounds(d))
        if isinstance(domain, Ball):
            center, radius, ball_norm = domain.checked_center(d), float(domain.radius), float(domain.norm)
    # Entries that were themselves computed (composed affine maps) carry a radius: as a relative error it joins the
    # rounding of the sums. A heavy cancellation makes it large, which is sound and shows in the result.
    relative = max(
        (_relative(e) for e in (form.q, form.y, Enclosed(bias, None if spread is None else spread.cpu()))), default=0.0
    )
    error = gamma(4 * (len(layers) + 2) * (n + q.shape[1] + 16)) + 2 * relative * (len(layers) + 2)
    return PhaseForm(
        q, y, bias, error, tuple(layers), breaks, pieces, heights, lower, upper, center, radius, ball_norm, tangent, values,
        directions, exact,
    )  # fmt: skip


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


def _relative(e: Enclosed) -> float:
    if e.radius is None or not bool(e.radius.any()):
        return 0.0
    present = e.radius > 0
    return float((e.radius[present] / e.center.abs()[present].clamp_min(1e-300)).max())


def _offsets(network: Network) -> tuple[Tensor, Tensor | None]:
    """Pre-activations at x = 0, w = 0, and a bound of their rounding (None: exact)."""
    values: list[tuple[Tensor, Tensor, bool]] = []
    found: list[tuple[Tensor, Tensor]] = []
    options = {"dtype": torch.float64, "device": network.device}
    for i, node in enumerate(network.nodes):
        match node:
            case Input():
                zero = torch.zeros(node.size, **options)
                values.append((zero, zero, True))
            case Affine():
                value, spread, exact = values[node.source]
                bias = torch.zeros(node.operator.shape[0], **options) if node.bias is None else node.bias
                if exact:
                    values.append((bias, torch.zeros_like(bias), not bool(bias.any())))
                    continue
                k = gamma(node.operator.shape[1] + 4)
                magnitude = node.operator.abs()
                error = (magnitude(spread) + k * (magnitude(value.abs()) + bias.abs())) * (1 + 8 * k)
                values.append((node.operator(value) + bias, error, False))
            case Activation():
                found.append(values[node.source][:2])
                zero = torch.zeros(network.sizes[i], **options)
                values.append((zero, zero, True))
            case Sum():
                parts = [values[s] for s in node.sources]
                mass = torch.stack([v.abs() for v, _, _ in parts]).sum(0)
                # A sum with at most one term that is not zero is exact.
                several = torch.stack([v != 0 for v, _, _ in parts]).sum(0) > 1
                error = torch.stack([e for _, e, _ in parts]).sum(0) + gamma(len(parts) + 2) * mass * several
                values.append((torch.stack([v for v, _, _ in parts]).sum(0), error, all(e for _, _, e in parts)))
    empty = torch.zeros(0, **options)
    bias, spread = torch.cat([empty, *(v for v, _ in found)]), torch.cat([empty, *(e for _, e in found)])
    return bias, spread if bool(spread.any()) else None
