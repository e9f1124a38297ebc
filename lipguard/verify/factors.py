"""Check of `Factors`: a norm bound of every affine node, and their product along the graph, rounded outward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.certificate import Factors
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Conv, Diagonal, Index, Input, Network, Operator, Sum
from lipguard.rounding import TINY, gamma, proves_positive_definite, sqrt_up, sum_up, up

LARGEST_UNROLLED = 4_000_000
"""Entries up to which a convolution's norm is proved by its unrolled matrix; beyond, by its kernel."""

_INFLATIONS = (0.0, 1e-13, 1e-12, 1e-11, 1e-10, 1e-8, 1e-6)


def check_factors(network: Network, evidence: Factors, norm: tuple[float, float]) -> float:
    """Upper bound of the constant by the product of the layers' norms, summed where branches meet.

    Layer norms are taken in the input norm p; for mixed norms (p, q) the embedding of the output costs
    m^(1/q - 1/p) if q < p, and nothing otherwise.

    Raises:
        NotCertified: a factor is missing or too small beyond rounding.
    """
    p, q = norm
    bounds: list[float] = []
    for i, node in enumerate(network.nodes):
        match node:
            case Input():
                bounds.append(1.0)
            case Affine():
                if i not in evidence.norms:
                    raise NotCertified(f"no factor is given for {node.name or f'node {i}'}.")
                bounds.append(_times(bounds[node.source], prove_norm(node.operator, evidence.norms[i], p, node.name)))
            case Activation():
                alpha, beta = node.function.slopes
                bounds.append(_times(bounds[node.source], float(torch.maximum(alpha.abs(), beta.abs()).max())))
            case Sum():
                total = 0.0
                for source in node.sources:
                    total = up(total + bounds[source]) if total and bounds[source] else total + bounds[source]
                bounds.append(total)
    exponent = max(0.0, 1 / q - 1 / p)
    # pow is accurate to an ulp or two in every libm; four are granted.
    return bounds[-1] if exponent == 0 else _times(bounds[-1], up(math.pow(network.outputs, exponent), 4))


def _times(a: float, b: float) -> float:
    """Upper bound of a b; nothing rounds where a factor is 0."""
    return 0.0 if a == 0 or b == 0 else up(a * b)


def prove_norm(operator: Operator, proposed: float, p: float, name: str = "") -> float:
    """The smallest provable bound of ||operator||_{p -> p} at or just above the proposed one.

    A proposal is needed for p = 2 and matrices alone: an index and a large convolution have bounds of their own.

    Raises:
        NotCertified: the proposal is below the norm by more than 1e-6 relative.
    """
    if isinstance(operator, Diagonal):
        return float(operator.scale.abs().max())
    if p != 2:
        magnitude = operator.abs()
        # Row sums of |W| for inf, column sums for 1: one application to the vector of ones.
        if p == 1:
            magnitude = magnitude.transpose()
        return _largest_row_sum(magnitude)
    if isinstance(operator, Index):
        # A'A is diagonal and counts how often each entry is read.
        return 1.0 if operator.repeats() == 1 else sqrt_up(operator.repeats())
    if isinstance(operator, Conv) and math.prod(operator.shape) > LARGEST_UNROLLED:
        return _kernel_bound(operator)
    if not proposed >= 0:
        raise NotCertified(f"{name or 'a layer'}: a norm of {proposed:g} is proposed.")
    return _prove_matrix_norm(operator.dense(), proposed, name)


def _largest_row_sum(magnitude: Operator) -> float:
    count = magnitude.shape[1]
    ones = torch.ones(count, dtype=torch.float64, device=magnitude.device)
    return float((magnitude(ones) * (1 + 2 * gamma(count + 2))).max())


def _kernel_bound(conv: Conv) -> float:
    """Upper bound of a convolution's norm from 2 to 2 without its unrolled matrix: the least of three.

    ||W||^2 <= ||W||_1 ||W||_inf, row and column sums of |W|. Let K be the kernel as a matrix from one patch (channels times
    taps) to one place, and let every entry lie in at most m patches: ||W x||^2 = sum over patches ||K x_patch||^2
    <= ||K||^2 m ||x||^2. And the same for the adjoint, where every entry meets at most as many places as there are taps.
    Groups make the matrix block-diagonal: the largest of theirs counts.
    """
    magnitude = conv.abs()
    best = sqrt_up(_times(_largest_row_sum(magnitude), _largest_row_sum(magnitude.transpose())))
    kernel = conv.weight.shape[2:]
    # Places i with s i + d t = x for taps t: t runs through multiples of s / gcd(d, s), and i follows from t.
    patches = math.prod(
        min(m, -(-k * math.gcd(d, s) // s)) for m, k, d, s in zip(conv.small, kernel, conv.dilation, conv.stride, strict=True)
    )
    taps = math.prod(min(n, k) for n, k in zip(conv.large, kernel, strict=True))
    parts = conv.weight.detach().reshape(conv.groups, -1, *conv.weight.shape[1:])
    for matrices, count in ((parts.flatten(2), patches), (parts.transpose(1, 2).flatten(2), taps)):
        norms = []
        for matrix in matrices:
            proposed = float(torch.linalg.matrix_norm(matrix, 2))
            norms.append(_prove_matrix_norm(matrix, proposed, "a kernel") if math.isfinite(proposed) else math.inf)
        best = min(best, _times(max(norms), sqrt_up(count)))
    return best


def _prove_matrix_norm(weight: Tensor, proposed: float, name: str) -> float:
    weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
    if not bool(weight.any()):
        return 0.0
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
            return bound
    raise NotCertified(f"{name or 'a layer'}: its norm is not provably at most {proposed:g}.")


def frobenius_bound(weight: Tensor) -> float:
    """Upper bound of the spectral norm that needs no factorisation: the Frobenius norm, rounded up."""
    return sqrt_up(up(float(sum_up(weight * weight)) * (1 + 2.0**-50)))
