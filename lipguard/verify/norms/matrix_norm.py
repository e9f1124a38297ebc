"""Proved upper bounds of matrix norms, and their products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.errors import NotCertified
from lipguard.network import Operator
from lipguard.rounding import TINY, gamma, proves_positive_definite, sqrt_up, sum_up, up

_INFLATIONS = (0.0, 1e-13, 1e-12, 1e-11, 1e-10, 1e-8, 1e-6)


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


def prove_matrix_norm(weight: Tensor, proposed: float, name: str) -> float:
    """The smallest provable bound of a matrix's norm from 2 to 2 at or just above the proposed one.

    Raises:
        NotCertified: the proposal is below the norm by more than 1e-6 relative.
    """
    weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
    if not bool(weight.any()):
        return 0.0
    # A power of two brings the largest entry near 1: exact, but for entries that vanish beside it, by less than TINY.
    exponent = max(-1000, min(1000, math.frexp(float(weight.abs().max()))[1]))
    weight, proposed = weight * 2.0**-exponent, proposed * 2.0**-exponent
    k = weight.shape[1]
    gram = weight @ weight.T
    magnitude = weight.abs()
    for inflation in _INFLATIONS:
        bound = up(proposed * (1 + inflation))
        # Every rounding of s^2 - WW' : the product gamma_k |W||W'|, the square and the difference one u each.
        error = gamma(k + 4)

        def radius(v: Tensor, square: float = bound * bound, error: float = error) -> Tensor:
            mass = magnitude @ (magnitude.T @ v) + square * v
            # Products below the normal range lose less than TINY each.
            return mass * (error * (1 + 4 * gamma(k + v.numel() + 4))) + 2 * (k + 4) * TINY * v.sum()

        matrix = -gram
        matrix.diagonal().add_(bound * bound)
        if math.isfinite(bound) and proves_positive_definite(matrix, radius):
            value = bound * 2.0**exponent
            return value if value >= TINY else up(value)
    raise NotCertified(f"{name or 'a layer'}: its norm is not provably at most {proposed:g}.")


def frobenius_bound(weight: Tensor) -> float:
    """Upper bound of the spectral norm that needs no factorisation: the Frobenius norm, rounded up."""
    return sqrt_up(up(float(sum_up(weight * weight)) * (1 + 2.0**-50)))
