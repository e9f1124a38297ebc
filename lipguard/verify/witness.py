"""Check of `Witness`: a rigorous lower bound of the Jacobian's norm at a point, in one direction.

Values and tangents are carried forward as (centre, radius) pairs that enclose the exact real numbers. Where rounding
leaves the slope of a neuron undecided, its whole slope range enters: every differentiable point nearby is covered, so
the bound stays valid beside a kink.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.certificate import Domain, Witness
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Conv, Input, Network, Operator, Sum
from lipguard.rounding import TINY, UNIT, down, gamma, sum_up, up

_Ball = tuple[Tensor, Tensor]


def check_witness(network: Network, evidence: Witness, norm: tuple[float, float], domain: Domain | None) -> float:
    """Lower bound of ||J(point) u||_q / ||u||_p, rounded down.

    Raises:
        NotCertified: the point lies outside the domain, a size does not fit, or the direction is zero.
    """
    p, q = norm
    point, direction = (v.detach().to(network.device, torch.float64).flatten() for v in (evidence.point, evidence.direction))
    if point.numel() != network.inputs or direction.numel() != network.inputs:
        raise NotCertified(f"the witness has {point.numel()} entries, the network has {network.inputs} inputs.")
    if not bool(point.isfinite().all() and direction.isfinite().all()) or not bool(direction.any()):
        raise NotCertified("the witness is not finite, or its direction is zero.")
    if domain is not None and not domain.contains(point.cpu()):
        raise NotCertified("the witness lies outside the domain.")
    center, radius = _tangent(network, point, direction)
    magnitude = (center.abs() * (1 - 2 * UNIT) - radius).clamp_min(0)
    return max(0.0, down(_norm_down(magnitude, q) / _norm_up(direction.abs(), p), 2))


def _tangent(network: Network, point: Tensor, direction: Tensor) -> _Ball:
    """Enclosure of J(point) direction."""
    zero = torch.zeros_like(point)
    values: list[_Ball] = []
    tangents: list[_Ball] = []
    for node in network.nodes:
        match node:
            case Input():
                values.append((point, zero))
                tangents.append((direction, zero))
            case Affine():
                values.append(_affine(node.operator, values[node.source], node.bias))
                tangents.append(_affine(node.operator, tangents[node.source], None))
            case Activation():
                (z, e), (v, d) = values[node.source], tangents[node.source]
                # z +- e rounds; one more unit on e covers it.
                e = e * (1 + 4 * UNIT) + z.abs() * (2 * UNIT) + TINY * (e > 0).to(z)
                low, high = node.function.slope_range(z - e, z + e)
                alpha, beta = node.function.slopes
                steepest = torch.maximum(alpha.abs(), beta.abs())
                y = node.function(z)
                values.append((y, (steepest * e + node.function.rounding(z)) * (1 + 8 * UNIT)))
                mid = (low + high) / 2
                spread = (high - mid).maximum(mid - low) * (1 + 2 * UNIT)
                exact = low == high
                spread = torch.where(exact, torch.zeros_like(spread), spread)
                mid = torch.where(exact, low, mid)
                error = mid.abs() * d + spread * (v.abs() + d) + 2 * UNIT * (mid * v).abs() + TINY * (v != 0).to(v)
                tangents.append((mid * v, error * (1 + 8 * UNIT)))
            case Sum():
                values.append(_sum([values[s] for s in node.sources]))
                tangents.append(_sum([tangents[s] for s in node.sources]))
    return tangents[-1]


def _affine(operator: Operator, ball: _Ball, bias: Tensor | None) -> _Ball:
    center, radius = ball
    y = operator(center)
    magnitude = operator.abs()
    mass = magnitude(center.abs())
    if bias is not None:
        y, mass = y + bias, mass + bias.abs()
    k = _longest_sum(operator) + 4
    return y, (magnitude(radius) + gamma(k) * mass) * (1 + 4 * gamma(k)) + k * TINY * (mass > 0).to(mass)


def _longest_sum(operator: Operator) -> int:
    """Products that are summed in one entry, at most."""
    if not isinstance(operator, Conv):
        return operator.shape[1]
    weight = operator.weight
    return weight.numel() // (weight.shape[1] * operator.groups if operator.transposed else weight.shape[0])


def _sum(balls: list[_Ball]) -> _Ball:
    center = torch.stack([c for c, _ in balls]).sum(0)
    mass = torch.stack([c.abs() for c, _ in balls]).sum(0)
    radius = torch.stack([r for _, r in balls]).sum(0)
    error = gamma(len(balls) + 2)
    return center, (radius + error * mass) * (1 + 4 * error)


def _norm_up(x: Tensor, p: float) -> float:
    if p == math.inf:
        return float(x.max())
    if p == 1:
        return up(float(sum_up(x)))
    # Scaling by a power of two keeps the squares away from under- and overflow.
    scale = 2.0 ** math.frexp(float(x.max()))[1]
    return up(scale * up(math.sqrt(up(float(sum_up((x / scale) ** 2)), 2)), 2))


def _norm_down(x: Tensor, q: float) -> float:
    if q == math.inf or not bool(x.any()):
        return float(x.max())
    shrink = 1 - 4 * gamma(x.numel() + 4)
    if q == 1:
        return float(x.sum()) * shrink
    scale = 2.0 ** math.frexp(float(x.max()))[1]
    # Squares below the normal range are dropped to zero or rounded up by less than TINY each.
    total = float(((x / scale) ** 2).sum()) * shrink - x.numel() * TINY
    return down(scale * down(math.sqrt(max(total, 0.0)), 2), 2)
