"""Check of `Factors`: a norm bound of every affine node, and their product along the graph, rounded outward."""

from __future__ import annotations

import math

import torch

from lipguard.certificate import Factors
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Coupled, Implicit, Input, Network, Operator, Sum
from lipguard.network.walk import Walk, fold
from lipguard.rounding import up
from lipguard.verify.norms.convolution import convolution_bound
from lipguard.verify.norms.implicit import prove_gain
from lipguard.verify.norms.matrix_norm import enclosing, largest_row_sum, prove_matrix_norm, times
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
    factors = dict(enumerate(fold(network.nodes, _Own(evidence, p))))
    bound = product_bound(network, factors, p)
    exponent = max(0.0, 1 / q - 1 / p)
    # pow is accurate to an ulp or two in every libm; four are granted.
    return bound if exponent == 0 else times(bound, up(math.pow(network.outputs, exponent), 4))


class _Own(Walk[float]):
    """Every node's own constant from p to p, whatever it reads; input and sums have none."""

    lacks = "no norm is known"

    def __init__(self, evidence: Factors, p: float) -> None:
        self.evidence, self.p = evidence, p

    def input(self, i: int, node: Input) -> float:
        """None."""
        return 1.0

    def affine(self, i: int, node: Affine, read: float) -> float:
        """The proposed norm, proved."""
        if i not in self.evidence.norms:
            raise NotCertified(f"no factor is given for {node.name or f'node {i}'}.")
        return prove_norm(node.operator, self.evidence.norms[i], self.p, node.name, self.evidence.derivation == "toeplitz")

    def activation(self, i: int, node: Activation, read: float) -> float:
        """The steepest slope."""
        alpha, beta = node.function.slopes
        return float(torch.maximum(alpha.abs(), beta.abs()).max())

    def implicit(self, i: int, node: Implicit, read: float) -> float:
        """Its gain."""
        return prove_gain(node, self.p)

    def coupled(self, i: int, node: Coupled, read: float) -> float:
        """The function's norm."""
        return node.function.norm(self.p)

    def total(self, i: int, node: Sum, *read: float) -> float:
        """None: see `product`."""
        return 1.0


def prove_norm(operator: Operator, proposed: float, p: float, name: str = "", toeplitz: bool = False) -> float:
    """The smallest provable bound of ||operator||_{p -> p} at or just above the proposed one.

    A proposal is needed for p = 2 and matrices alone: an index and a large convolution have bounds of their own. With
    `toeplitz`, every convolution has the one of the Toeplitz bound.

    Raises:
        NotCertified: the proposal is below the norm by more than 1e-6 relative.
    """
    if (closed := operator.norm(p)) is not None:
        return closed
    if p != 2:
        magnitude = operator.abs()
        # Row sums of |W| for inf, column sums for 1: one application to the vector of ones.
        if p == 1:
            magnitude = magnitude.transpose()
        return largest_row_sum(magnitude)
    if (conv := operator.convolution) is not None and toeplitz:
        bound = toeplitz_bound(conv)
        if not proposed * (1 + 1e-6) >= bound:
            raise NotCertified(f"{name or 'a layer'}: its Toeplitz bound is {bound:g}, not {proposed:g}.")
        return enclosing(operator, bound)
    if conv is not None and math.prod(operator.shape) > LARGEST_UNROLLED:
        return enclosing(operator, convolution_bound(conv))
    if not proposed >= 0:
        raise NotCertified(f"{name or 'a layer'}: a norm of {proposed:g} is proposed.")
    return enclosing(operator, prove_matrix_norm(operator.dense(), proposed, name))
