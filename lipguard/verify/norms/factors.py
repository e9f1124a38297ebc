"""Check of `Factors`: a norm bound of every affine node, and their product along the graph, rounded outward."""

from __future__ import annotations

import math

import torch

from lipguard.certificate import Factors
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Conv, Coupled, Diagonal, Implicit, Index, Network, Operator
from lipguard.rounding import sqrt_up, up
from lipguard.verify.norms.convolution import convolution_bound
from lipguard.verify.norms.implicit import prove_gain
from lipguard.verify.norms.matrix_norm import largest_row_sum, prove_matrix_norm, times
from lipguard.verify.norms.product import product_bound
from lipguard.verify.norms.toeplitz import toeplitz_bound

LARGEST_UNROLLED = 4_000_000
"""Entries up to which a convolution's norm is proved by its unrolled matrix; beyond, by its kernel."""


def check_factors(network: Network, evidence: Factors, norm: tuple[float, float]) -> float:
    """Upper bound of the constant by the product of the layers' norms, put together where branches meet (see `product`).

    Layer norms are taken in the input norm p; for mixed norms (p, q) the embedding of the output costs
    m^(1/q - 1/p) if q < p, and nothing otherwise.

    Raises:
        NotCertified: a factor is missing or too small beyond rounding.
    """
    p, q = norm
    factors: dict[int, float] = {}
    for i, node in enumerate(network.nodes):
        match node:
            case Affine():
                if i not in evidence.norms:
                    raise NotCertified(f"no factor is given for {node.name or f'node {i}'}.")
                factors[i] = prove_norm(node.operator, evidence.norms[i], p, node.name, evidence.derivation == "toeplitz")
            case Activation():
                alpha, beta = node.function.slopes
                factors[i] = float(torch.maximum(alpha.abs(), beta.abs()).max())
            case Implicit():
                factors[i] = prove_gain(node, p)
            case Coupled():
                factors[i] = node.function.norm(p)
            case _:
                pass
    bound = product_bound(network, factors, p)
    exponent = max(0.0, 1 / q - 1 / p)
    # pow is accurate to an ulp or two in every libm; four are granted.
    return bound if exponent == 0 else times(bound, up(math.pow(network.outputs, exponent), 4))


def prove_norm(operator: Operator, proposed: float, p: float, name: str = "", toeplitz: bool = False) -> float:
    """The smallest provable bound of ||operator||_{p -> p} at or just above the proposed one.

    A proposal is needed for p = 2 and matrices alone: an index and a large convolution have bounds of their own. With
    `toeplitz`, every convolution has the one of the Toeplitz bound.

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
    if toeplitz and isinstance(operator, Conv):
        bound = toeplitz_bound(operator)
        if not proposed * (1 + 1e-6) >= bound:
            raise NotCertified(f"{name or 'a layer'}: its Toeplitz bound is {bound:g}, not {proposed:g}.")
        return bound
    if isinstance(operator, Conv) and math.prod(operator.shape) > LARGEST_UNROLLED:
        return convolution_bound(operator)
    if not proposed >= 0:
        raise NotCertified(f"{name or 'a layer'}: a norm of {proposed:g} is proposed.")
    return prove_matrix_norm(operator.dense(), proposed, name)
