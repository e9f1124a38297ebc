"""Check of `Witness`: a rigorous lower bound of the Jacobian's norm at a point, in one direction.

Values and tangents are carried forward as (centre, radius) pairs that enclose the exact real numbers. Where rounding
leaves the slope of a neuron undecided, its whole slope range enters: every differentiable point nearby is covered, so
the bound stays valid beside a kink.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from lipguard.certificate import Domain, Witness
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Conv, Coupled, Diagonal, Implicit, Index, Input, Network, Operator, Sum
from lipguard.rounding import TINY, UNIT, down, gamma, norm_up, sqrt_up, up
from lipguard.verify.norms.convolution import kernel_bound
from lipguard.verify.norms.implicit import enclose
from lipguard.verify.norms.matrix_norm import frobenius_bound, largest_row_sum, prove_matrix_norm, times
from lipguard.verify.point.coupled_tangent import coupled_tangent

_Ball = tuple[Tensor, Tensor, float]
"""Centre, entrywise radius of its error, and a bound of the error's length in the 2-norm (inf: not followed)."""


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
    center, radius, _ = _tangent(network, point, direction, None)
    found = _from_below(center, radius, q)
    if (p, q) == (2.0, 2.0) and found < _KEPT * _norm_down(center.abs(), 2.0):
        # Through many layers the entrywise radii grow like products of |W|: lengths of the errors grow like norms only.
        norms = {i: _norm_bound(n.operator) for i, n in enumerate(network.nodes) if isinstance(n, Affine)}
        center, radius, length = _tangent(network, point, direction, norms)
        found = max(found, _from_below(center, radius, q), down(_norm_down(center.abs(), 2.0) - length, 2))
    return max(0.0, down(found / norm_up(direction.abs(), p), 2))


_LARGEST_PROVED = 1024
"""Rows or columns up to which a matrix's norm is proved; beyond, row and column sums and the Frobenius norm bound it."""

_KEPT = 1 - 1e-6
"""Share of the floating-point value that entrywise radii must leave; else the lengths of the errors are followed as well."""


def _from_below(center: Tensor, radius: Tensor, q: float) -> float:
    return _norm_down((center.abs() * (1 - 2 * UNIT) - radius).clamp_min(0), q)


def _tangent(network: Network, point: Tensor, direction: Tensor, norms: dict[int, float] | None) -> _Ball:
    """Enclosure of J(point) direction; with bounds of the affine nodes' norms, lengths of errors are followed as well."""
    zero = torch.zeros_like(point)
    values: list[_Ball] = []
    tangents: list[_Ball] = []
    for i, node in enumerate(network.nodes):
        match node:
            case Input():
                values.append((point, zero, 0.0))
                tangents.append((direction, zero, 0.0))
            case Affine():
                norm = None if norms is None else norms[i]
                values.append(_affine(node.operator, values[node.source], node.bias, norm))
                tangents.append(_affine(node.operator, tangents[node.source], None, norm))
            case Activation():
                (z, e, length), (v, d, along) = values[node.source], tangents[node.source]
                # z +- e rounds; one more unit on e covers it.
                e = e * (1 + 4 * UNIT) + z.abs() * (2 * UNIT) + TINY * (e > 0).to(z)
                low, high = node.function.slope_range(z - e, z + e)
                alpha, beta = node.function.slopes
                steepest = torch.maximum(alpha.abs(), beta.abs())
                y, rounding = node.function(z), node.function.rounding(z)
                length = _length(length, float(steepest.max()), rounding * (1 + 8 * UNIT))
                values.append(_shorter(y, (steepest * e + rounding) * (1 + 8 * UNIT), length))
                mid = (low + high) / 2
                spread = (high - mid).maximum(mid - low) * (1 + 2 * UNIT)
                exact = low == high
                spread = torch.where(exact, torch.zeros_like(spread), spread)
                mid = torch.where(exact, low, mid)
                own = spread * v.abs() + 2 * UNIT * (mid * v).abs() + TINY * (v != 0).to(v)
                along = _length(along, float(((mid.abs() + spread) * (1 + 4 * UNIT)).max()), own * (1 + 8 * UNIT))
                tangents.append(_shorter(mid * v, (mid.abs() * d + spread * d + own) * (1 + 8 * UNIT), along))
            case Implicit():
                pair = enclose(node, values[node.source][:2], tangents[node.source][:2])
                for kept, ball in zip((values, tangents), pair, strict=True):
                    kept.append(_entrywise(*ball, norms is not None))
            case Sum():
                values.append(_sum([values[s] for s in node.sources]))
                tangents.append(_sum([tangents[s] for s in node.sources]))
            case Coupled():
                pair = coupled_tangent(node.function, values[node.source][:2], tangents[node.source][:2])
                for kept, ball in zip((values, tangents), pair, strict=True):
                    kept.append(_entrywise(*ball, norms is not None))
    return tangents[-1]


def _affine(operator: Operator, ball: _Ball, bias: Tensor | None, norm: float | None) -> _Ball:
    center, radius, length = ball
    y = operator(center)
    magnitude = operator.abs()
    mass = magnitude(center.abs())
    if bias is not None:
        y, mass = y + bias, mass + bias.abs()
    k = _longest_sum(operator) + 4
    own = (gamma(k) * mass) * (1 + 4 * gamma(k)) + k * TINY * (mass > 0).to(mass)
    length = math.inf if norm is None else _length(length, norm, own)
    return _shorter(y, magnitude(radius) * (1 + 4 * gamma(k)) + own, length)


def _length(length: float, norm: float, own: Tensor) -> float:
    """Upper bound of norm * length + ||own||_2: the error that comes in, and the rounding that is added; inf if not followed."""
    if not (math.isfinite(length) and math.isfinite(norm)):
        return math.inf
    return up(up(norm * length) + (norm_up(own, 2.0) if bool(own.any()) else 0.0), 2) if norm or length else norm_up(own, 2.0)


def _shorter(center: Tensor, radius: Tensor, length: float) -> _Ball:
    """The ball of these entrywise radii and this length of the error: each entry is at most the length, both are kept."""
    if math.isfinite(length):
        radius = radius.clamp_max(up(length))
    return center, radius, length


def _entrywise(center: Tensor, radius: Tensor, followed: bool) -> _Ball:
    """The ball of these entrywise radii: its error is no longer than they are."""
    return center, radius, norm_up(radius, 2.0) if followed and bool(radius.any()) else 0.0 if followed else math.inf


def _norm_bound(operator: Operator) -> float:
    """An upper bound of a norm from 2 to 2, as tight as a second or so allows."""
    if isinstance(operator, Conv):
        return kernel_bound(operator)
    if isinstance(operator, Index):
        return sqrt_up(float(operator.repeats()))
    if isinstance(operator, Diagonal):
        return float(operator.scale.abs().max())
    if min(operator.shape) <= _LARGEST_PROVED:
        matrix = operator.dense()
        with contextlib.suppress(NotCertified):
            return prove_matrix_norm(matrix, float(torch.linalg.matrix_norm(matrix, 2)), "a layer")
    magnitude = operator.abs()
    sums = sqrt_up(times(largest_row_sum(magnitude), largest_row_sum(magnitude.transpose())))
    return min(sums, frobenius_bound(operator.dense()))


def _longest_sum(operator: Operator) -> int:
    """Products that are summed in one entry, at most."""
    if not isinstance(operator, Conv):
        return operator.shape[1]
    weight = operator.weight
    return weight.numel() // (weight.shape[1] * operator.groups if operator.transposed else weight.shape[0])


def _sum(balls: list[_Ball]) -> _Ball:
    center = torch.stack([c for c, _, _ in balls]).sum(0)
    mass = torch.stack([c.abs() for c, _, _ in balls]).sum(0)
    radius = torch.stack([r for _, r, _ in balls]).sum(0)
    error = gamma(len(balls) + 2)
    own = error * mass * (1 + 4 * error)
    length = 0.0
    for _, _, part in balls:
        length = up(length + part)
    return _shorter(center, radius * (1 + 4 * error) + own, _length(length, 1.0, own))


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
