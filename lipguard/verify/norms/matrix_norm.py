"""Proved upper bounds of matrix norms, and their products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lipguard.errors import NotCertified
from lipguard.network import Operator
from lipguard.rounding import TINY, UNIT, gamma, prove_positive_definite, proves_positive_definite, sqrt_up, sum_up, up

_INFLATIONS = (0.0, 1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-6)


def times(a: float, b: float) -> float:
    """Upper bound of a b; nothing rounds where a factor is 0 or 1."""
    if a == 1 or b == 1:
        return b if a == 1 else a
    return 0.0 if a == 0 or b == 0 else up(a * b)


def largest_row_sum(magnitude: Operator) -> float:
    """Upper bound of the largest row sum of an operator without negative coefficients."""
    count = magnitude.shape[1]
    ones = torch.ones(count, dtype=torch.float64, device=magnitude.device)
    return float((magnitude(ones) * (1 + 2 * gamma(count + 2))).max())


def sums_bound(operator: Operator) -> float:
    """||W~||_2^2 <= ||W~||_1 ||W~||_inf: the column and row sums of |W|, for what an operator means."""
    magnitude = operator.abs()
    return sqrt_up(times(largest_row_sum(magnitude), largest_row_sum(magnitude.transpose())))


def enclosing(operator: Operator, bound: float) -> float:
    """Upper bound of ||W~||_2 for what an operator means, from one of ||W||_2 for the coefficients W that it holds.

    ||W~|| <= ||W|| + ||W~ - W|| <= ||W|| + rho || |W| ||.
    """
    return up(bound + times(operator.rho, sums_bound(operator))) if operator.rho else bound


def norm_test(matrices: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The test (which, bounds) -> whether each of these real matrices, (K, a, b), provably has at most that norm from 2 to 2."""
    k = matrices.shape[2]
    gram, magnitude = matrices @ matrices.mT, matrices.abs()
    # Every rounding of s^2 - WW': the product gamma_k |W||W'|, the square and the difference one u each.
    error = gamma(k + 4) * (1 + 4 * gamma(k + matrices.shape[1] + 4))

    def proves(which: Tensor, bounds: Tensor) -> Tensor:
        some, square = magnitude[which], (bounds * bounds)[:, None]

        def radius(v: Tensor) -> Tensor:
            mass = (some @ (some.mT @ v[:, :, None]))[:, :, 0] + square * v
            # Products below the normal range lose less than TINY each.
            return mass * error + 2 * (k + 4) * TINY * v.sum(1, keepdim=True)

        gap = -gram[which]
        gap.diagonal(dim1=1, dim2=2).add_(square)
        if len(gap) == 1:
            return bounds.isfinite() & proves_positive_definite(gap[0], lambda v: radius(v[None])[0])
        return bounds.isfinite() & prove_positive_definite(gap, radius)

    return proves


def _least(matrices: Tensor, proposed: Tensor, inflations: Sequence[float]) -> Tensor:
    """The first of proposed (1 + inflation) that is proved for each matrix, (K,); inf where none is."""
    proves, found = norm_test(matrices), torch.full_like(proposed, math.inf)
    left = torch.arange(len(matrices), device=matrices.device)
    for inflation in inflations:
        bounds = torch.nextafter(proposed[left] * (1 + inflation) + inflation * 2.0**-20, found[left])
        proved = proves(left, bounds)
        found[left[proved]], left = bounds[proved], left[~proved]
        if not len(left):
            break
    return found


def matrix_norms(matrices: Tensor) -> Tensor:
    """Proved upper bounds of the norms from 2 to 2, (K, a, b) to (K,)."""
    matrices = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    # A power of two brings each largest entry near 1: exact, but for entries that vanish beside it, by less than TINY.
    exponent = torch.frexp(matrices.abs().amax((1, 2))).exponent.clamp(-1000, 1000)
    matrices = torch.ldexp(matrices, -exponent[:, None, None])
    found = _least(matrices, torch.linalg.eigvalsh(matrices @ matrices.mT)[:, -1].clamp_min(0).sqrt(), _INFLATIONS[1:])
    # The Frobenius norm needs no proof.
    size = matrices.shape[1] * matrices.shape[2]
    frobenius = matrices.square().sum((1, 2)).sqrt() * (1 + 4 * gamma(size + 8)) + size * TINY
    return torch.ldexp(torch.minimum(found, frobenius), exponent) * (1 + 2 * UNIT) + TINY


def unscaled(bound: Callable[[float], float], largest: float) -> float:
    """A bound of matrices with this largest entry, from bound(2^-e) of those scaled by a power of two, largest entry near 1.

    Scaling is exact, but for entries that vanish beside the largest one, by less than TINY each, as the products below the
    normal range that every bound here counts. Scaling back is exact in the normal range.
    """
    exponent = max(-1000, min(1000, math.frexp(largest)[1]))
    value = bound(2.0**-exponent) * 2.0**exponent
    return value if value >= TINY else up(value)


def prove_matrix_norm(weight: Tensor, proposed: float, name: str) -> float:
    """The smallest provable bound of a matrix's norm from 2 to 2 at or just above the proposed one.

    Raises:
        NotCertified: the proposal is below the norm by more than 1e-6 relative.
    """
    weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
    if not bool(weight.any()):
        return 0.0

    def least(scale: float) -> float:
        bound = float(_least((weight * scale)[None], weight.new_tensor([proposed * scale]), _INFLATIONS))
        if math.isinf(bound):
            raise NotCertified(f"{name or 'a layer'}: its norm is not provably at most {proposed:g}.")
        return bound

    return unscaled(least, float(weight.abs().max()))


def frobenius_bound(weight: Tensor) -> float:
    """Upper bound of the spectral norm that needs no factorisation: the Frobenius norm, rounded up."""
    return sqrt_up(up(float(sum_up(weight * weight)) * (1 + 2.0**-50)))
