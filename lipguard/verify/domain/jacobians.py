"""Bounds of Jacobian norms on K domains from the neurons' slope intervals alone.

Two ways, the smaller of which counts: the interval matrix of all Jacobians, by reverse accumulation in midpoints and
radii; and, from 2-norm to 2-norm, the product of the norms of D^(1/2) W D^(1/2), D the largest slopes in absolute value
(Huang et al. 2021, arXiv:2111.01395, where D is 0 or 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.network import Activation, Affine, Operator, Sum
from lipguard.network.walk import Walk
from lipguard.rounding import TINY, UNIT, gamma
from lipguard.verify.domain.localized import ENTRIES
from lipguard.verify.domain.ranges import Propagation
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.norms.convolution import convolution_bound
from lipguard.verify.norms.factors import LARGEST_UNROLLED
from lipguard.verify.norms.matrix_norm import enclosing, matrix_norms, sums_bound
from lipguard.verify.norms.product import product_bound


def jacobian_bounds(propagation: Propagation, norm: tuple[float, float]) -> Tensor:
    """Upper bounds of ||J|| from norm[0] to norm[1] on each domain, (K,)."""
    magnitude = jacobian_magnitude(propagation)
    result = magnitude_norms(magnitude, norm)
    return torch.minimum(result, _products(propagation)) if norm == (2.0, 2.0) else result


def jacobian_magnitude(propagation: Propagation, rows: Tensor | None = None) -> Tensor:
    """Entrywise upper bound of |J| over each domain.

    Args:
        propagation: a network on K domains.
        rows: functionals of the outputs, (K or 1, k, m); None for the outputs themselves.
    Returns:
        (K, k, d).
    """
    network, device = propagation.network, propagation.regions.lower.device
    start = torch.eye(network.outputs, dtype=torch.float64, device=device)[None] if rows is None else rows
    arrived = network.pull(_Backwards(_slopes(propagation)), Enclosed(start))
    found = arrived[0].magnitude() if 0 in arrived else start.new_zeros(1, start.shape[1], network.inputs)
    return found.expand(len(propagation.regions.lower), -1, -1)


class _Backwards(Walk[Enclosed]):
    """Functionals of the output as functionals of each node, (K or 1, k, size), for all slopes in their intervals."""

    lacks = "no slopes on a domain are known"

    def __init__(self, slopes: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.slopes = slopes

    def affine(self, i: int, node: Affine, read: Enclosed) -> Enclosed:
        """c W."""
        return read.through(node.operator.transpose())

    def activation(self, i: int, node: Activation, read: Enclosed) -> Enclosed:
        """c D."""
        return read * Enclosed.between(*self.slopes[i])[:, None]

    def total(self, i: int, node: Sum, *read: Enclosed) -> Enclosed:
        """Every term is handed the same."""
        return read[0]


def magnitude_norms(magnitude: Tensor, norm: tuple[float, float]) -> Tensor:
    """Upper bounds of ||M||_{p -> q} over all M with |M| <= magnitude, (K, k, d) to (K,).

    The largest value belongs to M = magnitude and a vector without negative entries: of all ones for p = inf, one unit
    vector for p = 1; for p = 2 the dual vector where q = 1 or inf, and for q = 2 the norm of a matrix.
    """
    p, q = norm
    grow = 1 + 8 * gamma(magnitude.shape[1] + magnitude.shape[2] + 8)
    if p == 1:
        value = torch.linalg.vector_norm(magnitude, q, dim=1).amax(1)
    elif p == math.inf:
        value = torch.linalg.vector_norm(magnitude.sum(2), q, dim=1)
    elif q == 1:
        value = torch.linalg.vector_norm(magnitude.sum(1), 2, dim=1)
    elif q == math.inf or magnitude.shape[1] == 1:
        value = torch.linalg.vector_norm(magnitude, 2, dim=2).amax(1)
    else:
        return matrix_norms(magnitude)
    # Sums of products and their root, each rounded; below the normal range a square loses less than TINY, where there is any.
    return (value * grow + TINY) * magnitude.flatten(1).any(1)


def _products(propagation: Propagation) -> Tensor:
    """Products along the graph (see `norms.product`) of the norms of D^(1/2) W D^(1/2), (K,).

    An activation gives D^(1/2) to the affine map before it, if that feeds nothing else, and to those behind it, if there
    are only affine maps; to a side that cannot take it, its largest entry. What is scaled keeps its places.
    """
    network = propagation.network
    nodes, count = network.nodes, len(propagation.regions.lower)
    consumers: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        for source in node.sources:
            consumers[source].append(i)
    roots = {i: torch.maximum(low.abs(), high.abs()).sqrt() * (1 + 4 * UNIT) for i, (low, high) in _slopes(propagation).items()}

    def scalable(i: int) -> bool:
        operator = nodes[i].map
        return operator is not None and math.prod(operator.shape) <= LARGEST_UNROLLED

    read = {i: nodes[i].sources[0] for i in roots}
    before = {i: scalable(read[i]) and consumers[read[i]] == [i] for i in roots}
    behind = {i: bool(consumers[i]) and all(scalable(c) for c in consumers[i]) for i in roots}
    factors = {i: root.amax(1) ** (2 - before[i] - behind[i]) * (1 + 4 * UNIT) for i, root in roots.items()}
    for i, node in enumerate(nodes):
        if (operator := node.map) is not None:
            left = next((roots[c] for c in consumers[i] if before.get(c, False)), None)
            right = roots[node.sources[0]] if behind.get(node.sources[0], False) else None
            factors[i] = _norms(operator, left, right)
    table = {i: factor.expand(count).tolist() for i, factor in factors.items()}
    bounds = [product_bound(network, {i: row[k] for i, row in table.items()}, 2.0) for k in range(count)]
    return torch.tensor(bounds, dtype=torch.float64, device=propagation.regions.lower.device) + TINY


def _norms(operator: Operator, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Bounds of the norms from 2 to 2 of diag(left) W diag(right), (K,), or (1,) without factors."""
    if math.prod(operator.shape) > LARGEST_UNROLLED:
        convolution = operator.convolution
        value = sums_bound(operator) if convolution is None else enclosing(operator, convolution_bound(convolution))
        return torch.tensor([value], dtype=torch.float64, device=operator.device)
    weight = operator.dense()[None]
    # Off by rho |W| entry by entry: the norm by rho times that of the magnitudes, or a little more as it is computed.
    own = operator.rho * (1 + 2.0**-20)
    if left is None and right is None:
        return (matrix_norms(weight) + own * torch.linalg.vector_norm(weight, dim=(1, 2))) * (1 + 2 * UNIT)
    count = len(left) if left is not None else len(right) if right is not None else 1
    step = max(1, ENTRIES // max(1, weight.numel()))
    found = []
    for start in range(0, count, step):
        scaled = weight
        for side, axis in ((left, 2), (right, 1)):
            if side is not None:
                # Each product rounds once, by u of itself: the norm by no more than u times that of the magnitudes.
                scaled = scaled * side[start : start + step].unsqueeze(axis)
        rounding = (4 * UNIT + own) * torch.linalg.vector_norm(scaled, dim=(1, 2))
        found.append(matrix_norms(scaled) + rounding)
    return torch.cat(found)


def _slopes(propagation: Propagation) -> dict[int, tuple[Tensor, Tensor]]:
    network = propagation.network
    sizes = [network.sizes[i] for i in network.activations]
    low, high = (s.split(sizes, 1) for s in propagation.slopes())
    return {i: (a, b) for i, a, b in zip(network.activations, low, high, strict=True)}
