"""Values and tangents through coupled nodes, enclosed: what a maximum, a sort or a reflection does beside a point.

Where rounding leaves open which entry is the largest, or on which side of the mirror a point lies, every possibility
enters: the tangent is enclosed by the hull of theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.errors import NotCertified
from lipguard.network import Coupling
from lipguard.network.coupled import Maxima, Reflection, Sort
from lipguard.rounding import TINY, UNIT, gamma

_Ball = tuple[Tensor, Tensor]


def coupled_tangent(function: Coupling, value: _Ball, tangent: _Ball) -> tuple[_Ball, _Ball]:
    """Enclosures (centre, radius) of the function's value and of its derivative along the tangent.

    Raises:
        NotCertified: the function is of no known kind.
    """
    match function:
        case Maxima():
            return _maxima(function, value, tangent)
        case Sort():
            return _sort(function, value, tangent)
        case Reflection():
            return _reflection(function, value, tangent)
        case _:
            raise NotCertified(f"no check knows the function {type(function).__name__}.")


def _maxima(function: Maxima, value: _Ball, tangent: _Ball) -> tuple[_Ball, _Ball]:
    # An absent entry (index -1) reads the appended -inf, and is never the largest.
    z, low, high = (torch.cat([t, t.new_full((1,), -math.inf)])[function.index] for t in (value[0], *_ends(value)))
    e = torch.cat([value[1], value[1].new_zeros(1)])[function.index]
    largest = high >= low.amax(1, keepdim=True)
    # A maximum changes by no more than the largest change of an entry.
    return (z.amax(1), e.amax(1)), _hull(tangent, function.index.clamp_min(0), largest)


def _sort(function: Sort, value: _Ball, tangent: _Ball) -> tuple[_Ball, _Ball]:
    index = function.index
    g = index.shape[1]
    low, high = (end[index] for end in _ends(value))
    # Entry j is the k-th largest (k from 0) only if at most k others surely exceed it and at most g - 1 - k are surely below.
    above = (low[:, None, :] > high[:, :, None]).sum(2)
    below = (high[:, None, :] < low[:, :, None]).sum(2)
    k = torch.arange(g, device=index.device)[:, None]
    possible = (above[:, None, :] <= k) & (below[:, None, :] <= g - 1 - k)
    center, radius = _hull(tangent, index[:, None, :].expand(-1, g, -1), possible)
    order = index.flatten().argsort()
    # The k-th largest entry changes by no more than the largest change of an entry.
    e = value[1][index].amax(1, keepdim=True).expand(-1, g)
    return (function(value[0]), e.flatten()[order]), (center.flatten()[order], radius.flatten()[order])


def _reflection(function: Reflection, value: _Ball, tangent: _Ball) -> tuple[_Ball, _Ball]:
    """z + 2 v relu(-p), p = v'z; its derivative t - 2 v s q, q = v't, s the slope: 0 for p > 0, 1 for p < 0."""
    index, v = function.index, function.directions
    order, weight = index.flatten().argsort(), 2 * v.abs()
    (z, e), (t, d) = ((c[index], r[index]) for c, r in (value, tangent))
    (p, p_error), (q, q_error) = _inner(v, z, e), _inner(v, t, d)
    beyond = p.neg().clamp_min(0)
    y = z + 2 * v * beyond
    error = gamma(8)
    y_error = e + weight * p_error + error * (z.abs() + weight * beyond) + 8 * TINY
    middle = torch.where(p > p_error, 0.0, torch.where(p < -p_error, 1.0, 0.5)).to(p)
    spread = torch.where(p.abs() > p_error, 0.0, 0.5).to(p)
    turned = t - 2 * v * (middle * q)
    moved = weight * (middle * q_error + spread * (q.abs() + q_error))
    rounded = torch.where((middle == 0) & (spread == 0), 0.0, error * (t.abs() + weight * middle * q.abs()) + 8 * TINY)
    grown = 1 + 2 * error
    flat = [x.flatten()[order] for x in (y, y_error * grown, turned, (d + moved + rounded) * grown)]
    return (flat[0], flat[1]), (flat[2], flat[3])


def _inner(v: Tensor, z: Tensor, e: Tensor) -> _Ball:
    """v'z in every group, (groups, 1), for z known up to e."""
    k = v.shape[1] + 2
    mass = (v.abs() * z.abs()).sum(1, keepdim=True)
    reach = (v.abs() * e).sum(1, keepdim=True)
    return (v * z).sum(1, keepdim=True), (reach + gamma(k) * mass) * (1 + 4 * gamma(k)) + k * TINY


def _ends(ball: _Ball) -> tuple[Tensor, Tensor]:
    center, radius = ball
    # center -+ radius rounds; one more unit covers it.
    # A Python number times a mask would be rounded to float32, where TINY is 0.
    moved = (radius > 0).to(radius)
    radius = radius * (1 + 4 * UNIT) + (center.abs() * (2 * UNIT) + TINY) * moved
    return center - radius, center + radius


def _hull(ball: _Ball, index: Tensor, possible: Tensor) -> _Ball:
    """The smallest interval, along the last dimension of the index, that holds the possible entries."""
    center, radius = (part[index] for part in ball)
    low, high = _ends((center, radius))
    infinity = torch.full_like(center, math.inf)
    low, high = torch.where(possible, low, infinity).amin(-1), torch.where(possible, high, -infinity).amax(-1)
    middle = low + (high - low) / 2
    around = torch.maximum(high - middle, middle - low) * (1 + 4 * UNIT) + 2 * TINY
    # One possibility is known as well as its entry.
    single = possible.sum(-1) == 1
    only = possible.to(torch.int8).argmax(-1, keepdim=True)
    own, own_radius = (part.gather(-1, only)[..., 0] for part in (center, radius))
    return torch.where(single, own, middle), torch.where(single, own_radius, around)
