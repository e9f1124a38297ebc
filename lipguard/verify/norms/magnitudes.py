"""Check of `Magnitudes`: absolute values carried through the network, implicit layers by positive vectors.

For p = inf: |dx| <= 1 entry by entry implies |d value| <= r for every node, r computed forwards, and ||dy||_q <= ||r||_q.
For q = 1: sum_i |dy_i| <= g'|dx| with g computed backwards from ones, and g'|dx| <= ||g||_{p*} ||dx||_p.
Both are at most the product of the layers' norms, and for one implicit layer at most the bound of Jafarpour et al. 2021,
arXiv:2106.03194, Theorem 6, for every choice of its weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.certificate import Magnitudes
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Coupled, Implicit, Input, Network, Sum
from lipguard.network.walk import Walk, fold, pull
from lipguard.rounding import TINY, UNIT, gamma, norm_up, sum_up
from lipguard.verify.norms.implicit import prove_magnitude


def check_magnitudes(network: Network, evidence: Magnitudes, norm: tuple[float, float]) -> float:
    """Upper bound of the constant, rounded up.

    Raises:
        NotCertified: neither p = inf nor q = 1, or a vector of the evidence does not prove its implicit layer's response.
    """
    p, q = norm
    vectors = {i: y.detach().to(network.device, torch.float64).flatten() for i, y in evidence.vectors.items()}
    if p == math.inf:
        return norm_up(fold(network.nodes, _Carried(network, vectors, False))[-1], q)
    if q == 1:
        last = torch.ones(network.outputs, dtype=torch.float64, device=network.device)
        arrived = pull(network.nodes, _Carried(network, vectors, True), last, lambda a, b: sum_up(torch.stack([a, b]), 0))
        return norm_up(arrived.get(0, last.new_zeros(network.inputs)), math.inf if p == 1 else 2.0)
    raise NotCertified(f"magnitudes prove bounds from the inf-norm or to the 1-norm, not {norm}.")


class _Carried(Walk[Tensor]):
    """Absolute values: of increments forwards, of functionals backwards; each is rounded up."""

    lacks = "no bound of absolute values is known"

    def __init__(self, network: Network, vectors: dict[int, Tensor], back: bool) -> None:
        self.network, self.vectors, self.back = network, vectors, back

    def input(self, i: int, node: Input) -> Tensor:
        """All increments of at most 1."""
        return torch.ones(node.size, dtype=torch.float64, device=self.network.device)

    def affine(self, i: int, node: Affine, read: Tensor) -> Tensor:
        """|W| r or |W'| r."""
        magnitude = node.operator.abs().transpose() if self.back else node.operator.abs()
        # Sums of products without cancellation; below the normal range each loses less than TINY.
        return magnitude(read) * (1 + 2 * gamma(magnitude.terms + 2)) + magnitude.terms * TINY

    def activation(self, i: int, node: Activation, read: Tensor) -> Tensor:
        """The steepest slope times r: one rounding."""
        alpha, beta = node.function.slopes
        return torch.maximum(alpha.abs(), beta.abs()) * read * (1 + 2 * UNIT) + TINY

    def implicit(self, i: int, node: Implicit, read: Tensor) -> Tensor:
        """The vector that the evidence gives, where it is proved to be above the response."""
        if i not in self.vectors:
            raise NotCertified(f"no vector is given for the implicit layer {node.name or f'node {i}'}.")
        prove_magnitude(node, read, self.vectors[i], self.back)
        return self.vectors[i]

    def coupled(self, i: int, node: Coupled, read: Tensor) -> Tensor:
        """What the function says of itself."""
        return node.function.magnitude(read, self.network.sizes[node.source] if self.back else None)

    def total(self, i: int, node: Sum, *read: Tensor) -> Tensor:
        """The sum; backwards each term is handed the same."""
        return read[0] if self.back else sum_up(torch.stack(read), 0)
