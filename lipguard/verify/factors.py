"""Check of `Factors`: a norm bound of every affine node, and their product along the graph, rounded outward."""

from __future__ import annotations

import math

import torch

from lipguard.certificate import Factors
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Conv, Coupled, Diagonal, Implicit, Index, Input, Network, Operator, Sum
from lipguard.rounding import sqrt_up, up
from lipguard.verify.convolution import convolution_bound
from lipguard.verify.implicit import prove_gain
from lipguard.verify.matrix_norm import largest_row_sum, prove_matrix_norm, times

LARGEST_UNROLLED = 4_000_000
"""Entries up to which a convolution's norm is proved by its unrolled matrix; beyond, by its kernel."""


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
                bounds.append(times(bounds[node.source], prove_norm(node.operator, evidence.norms[i], p, node.name)))
            case Activation():
                alpha, beta = node.function.slopes
                bounds.append(times(bounds[node.source], float(torch.maximum(alpha.abs(), beta.abs()).max())))
            case Implicit():
                bounds.append(times(bounds[node.source], prove_gain(node, p)))
            case Sum():
                total = 0.0
                for source in node.sources:
                    total = up(total + bounds[source]) if total and bounds[source] else total + bounds[source]
                bounds.append(total)
            case Coupled():
                bounds.append(times(bounds[node.source], node.function.norm(p)))
    exponent = max(0.0, 1 / q - 1 / p)
    # pow is accurate to an ulp or two in every libm; four are granted.
    return bounds[-1] if exponent == 0 else times(bounds[-1], up(math.pow(network.outputs, exponent), 4))


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
        return largest_row_sum(magnitude)
    if isinstance(operator, Index):
        # A'A is diagonal and counts how often each entry is read.
        return float(operator.repeats()) if operator.repeats() < 2 else sqrt_up(operator.repeats())
    if isinstance(operator, Conv) and math.prod(operator.shape) > LARGEST_UNROLLED:
        return convolution_bound(operator)
    if not proposed >= 0:
        raise NotCertified(f"{name or 'a layer'}: a norm of {proposed:g} is proposed.")
    return prove_matrix_norm(operator.dense(), proposed, name)
