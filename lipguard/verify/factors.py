"""Check of `Factors`: a norm bound of every affine node, and their product along the graph, rounded outward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.certificate import Factors
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Diagonal, Input, Network, Operator, Sum
from lipguard.rounding import TINY, gamma, proves_positive_definite, sqrt_up, sum_up, up

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
        count, ones = magnitude.shape[1], torch.ones(magnitude.shape[1], dtype=torch.float64, device=operator.device)
        return float((magnitude(ones) * (1 + 2 * gamma(count + 2))).max())
    if not proposed >= 0:
        raise NotCertified(f"{name or 'a layer'}: a norm of {proposed:g} is proposed.")
    weight = operator.dense()
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
