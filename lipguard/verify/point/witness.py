"""Check of `Witness`: a rigorous lower bound of the Jacobian's norm at a point, in one direction.

Values and tangents are carried forward as `Enclosed` vectors that hold the exact real numbers. Where rounding
leaves the slope of a neuron undecided, its whole slope range enters: every differentiable point nearby is covered, so
the bound stays valid beside a kink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.certificate import Domain, Witness
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Coupled, Implicit, Input, Network, Operator, Sum
from lipguard.network.walk import Walk, fold
from lipguard.rounding import TINY, UNIT, down, gamma, norm_up, up
from lipguard.verify.enclosed import Enclosed, image, slopes_at
from lipguard.verify.norms.convolution import kernel_bound
from lipguard.verify.norms.implicit import enclose
from lipguard.verify.norms.matrix_norm import enclosing, frobenius_bound, matrix_norms, sums_bound
from lipguard.verify.point.coupled_tangent import Beside

_LARGEST_PROVED = 1024
"""Rows or columns up to which a matrix's norm is proved; beyond, row and column sums and the Frobenius norm bound it."""

_KEPT = 1 - 1e-6
"""Share of the floating-point value that entrywise radii must leave; else the lengths of the errors are followed as well."""


@dataclass(frozen=True, eq=False)
class Followed:
    """A vector known up to radii, and a bound of its error's length in the 2-norm (inf: not followed)."""

    value: Enclosed
    length: float

    @classmethod
    def of(cls, value: Enclosed, length: float) -> Followed:
        """Each entry's error is at most the length: both are kept."""
        if math.isfinite(length) and value.radius is not None:
            value = Enclosed(value.center, value.radius.clamp_max(up(length)))
        return cls(value, length)


_Pair = tuple[Followed, Followed]
"""A node's value and its tangent."""


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
    tangent = _tangent(network, point, direction, None).value
    found = _from_below(tangent, q)
    if (p, q) == (2.0, 2.0) and found < _KEPT * _norm_down(tangent.center.abs(), 2.0):
        # Through many layers the entrywise radii grow like products of |W|: lengths of the errors grow like norms only.
        norms = {i: _norm_bound(node.map) for i, node in enumerate(network.nodes) if node.map is not None}
        followed = _tangent(network, point, direction, norms)
        around = down(_norm_down(followed.value.center.abs(), 2.0) - followed.length, 2)
        found = max(found, _from_below(followed.value, q), around)
    return max(0.0, down(found / norm_up(direction.abs(), p), 2))


def _from_below(e: Enclosed, q: float) -> float:
    return _norm_down((e.center.abs() * (1 - 2 * UNIT) - e.spread).clamp_min(0), q)


def _tangent(network: Network, point: Tensor, direction: Tensor, norms: dict[int, float] | None) -> Followed:
    """Enclosure of J(point) direction; with bounds of the affine nodes' norms, lengths of errors are followed as well."""
    return fold(network.nodes, _Tangents(point, direction, norms))[-1][1]


class _Tangents(Walk[_Pair]):
    """Values and tangents, node by node."""

    lacks = "no derivative at a point is known"

    def __init__(self, point: Tensor, direction: Tensor, norms: dict[int, float] | None) -> None:
        self.start = Followed(Enclosed(point), 0.0), Followed(Enclosed(direction), 0.0)
        self.norms = norms

    def input(self, i: int, node: Input) -> _Pair:
        """The point and the direction, exactly."""
        return self.start

    def affine(self, i: int, node: Affine, read: _Pair) -> _Pair:
        """The errors that come in grow by the norm; `own` is what the map itself rounds, and how far it is known."""
        made = []
        for followed, *bias in zip(read, (node.bias, None), (node.bias_radius, None), strict=True):
            length = math.inf
            if self.norms is not None:
                own = Enclosed(followed.value.center).through(node.operator, *bias).spread
                length = _length(followed.length, self.norms[i], own)
            made.append(Followed.of(followed.value.through(node.operator, *bias), length))
        return made[0], made[1]

    def activation(self, i: int, node: Activation, read: _Pair) -> _Pair:
        """The value's error grows by the steepest slope, the tangent's by the slopes throughout the radius."""
        (z, length), (t, along) = ((part.value, part.length) for part in read)
        alpha, beta = node.function.slopes
        rounding = node.function.rounding(z.center) * (1 + 8 * UNIT)
        length = _length(length, float(torch.maximum(alpha.abs(), beta.abs()).max()), rounding)
        slopes = slopes_at(node.function, z)
        along = _length(along, float(slopes.magnitude().max()), (Enclosed(t.center) * slopes).spread)
        return Followed.of(image(node.function, z), length), Followed.of(t * slopes, along)

    def implicit(self, i: int, node: Implicit, read: _Pair) -> _Pair:
        """A point with a small residual, and how far the solution is from it."""
        return self._entrywise(enclose(node, read[0].value, read[1].value))

    def coupled(self, i: int, node: Coupled, read: _Pair) -> _Pair:
        """The hull of all possibilities beside the point."""
        return self._entrywise(node.function.meet(Beside(read[0].value, read[1].value)))

    def total(self, i: int, node: Sum, *read: _Pair) -> _Pair:
        """The errors' lengths add up, and what the sum rounds."""
        made = []
        for parts in zip(*read, strict=True):
            own, length = Enclosed.sum([Enclosed(part.value.center) for part in parts]).spread, 0.0
            for part in parts:
                length = up(length + part.length)
            made.append(Followed.of(Enclosed.sum([part.value for part in parts]), _length(length, 1.0, own)))
        return made[0], made[1]

    def _entrywise(self, pair: tuple[Enclosed, Enclosed]) -> _Pair:
        """An error is no longer than its radii."""
        value, tangent = (
            Followed(e, math.inf if self.norms is None else 0.0 if e.exact else norm_up(e.spread, 2.0)) for e in pair
        )
        return value, tangent


def _length(length: float, norm: float, own: Tensor) -> float:
    """Upper bound of norm * length + ||own||_2: the error that comes in, and the rounding that is added; inf if not followed."""
    if not (math.isfinite(length) and math.isfinite(norm)):
        return math.inf
    return up(up(norm * length) + (norm_up(own, 2.0) if bool(own.any()) else 0.0), 2) if norm or length else norm_up(own, 2.0)


def _norm_bound(operator: Operator) -> float:
    """An upper bound of a norm from 2 to 2, as tight as a second or so allows."""
    if (closed := operator.norm(2.0)) is not None:
        return closed
    if (conv := operator.convolution) is not None:
        return enclosing(operator, kernel_bound(conv))
    if min(operator.shape) <= _LARGEST_PROVED:
        return enclosing(operator, float(matrix_norms(operator.dense()[None])[0]))
    return min(sums_bound(operator), enclosing(operator, frobenius_bound(operator.dense())))


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
