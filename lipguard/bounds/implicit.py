"""`contraction`: absolute values carried through the network, in the maximum norm and, transposed, in the sum norm.

Cheap, and the bound of NEMON (Jafarpour et al. 2021, arXiv:2106.03194) for implicit layers: |C| (I - M)^-1 |U| with M the
Metzler majorant of W, which their theorem bounds by weights eta. In feed-forward networks it is |W_L| ... |W_1|.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lipguard.bounds.method import PAIRS, Method, Pair
from lipguard.certificate import Certificate, Magnitudes, Query
from lipguard.network import Activation, Affine, Coupled, Implicit, Input, Network, Sum, Walk
from lipguard.verify import verify
from lipguard.verify.norms.implicit import propose_magnitude


@dataclass(frozen=True)
class Contraction(Method):
    """Bound by absolute values, from the inf-norm to any, or from any norm to the 1-norm."""

    norms: ClassVar[tuple[Pair, ...]] = tuple((p, q) for p, q in PAIRS if p == math.inf or q == 1)

    def __call__(self, network: Network, query: Query, state: object = None) -> tuple[Certificate, None]:
        """The verified bound; valid on every domain.

        Raises:
            UnsupportedQuery: neither is the input norm inf, nor the output norm 1.
            NotCertified: an implicit layer does not contract in a maximum norm.
        """
        del state
        began = time.perf_counter()
        if query.norm not in self.norms:
            raise self.unsupported(query)
        vectors = _vectors(network, transposed=query.norm[0] != math.inf)
        proposed = Certificate(math.nan, "upper", query.norm, query.domain, network.digest, "contraction", Magnitudes(vectors))
        return replace(verify(network, proposed), seconds=time.perf_counter() - began), None


_MARGIN = 1 + 1e-10
"""Room between the vectors proposed and the checker's own, which are rounded up on the way."""


def _vectors(network: Network, transposed: bool) -> dict[int, Tensor]:
    """The responses of the implicit layers to magnitudes, in floating point."""
    if transposed:
        back = _Backwards(network)
        network.pull(back, torch.ones(network.outputs, dtype=torch.float64, device=network.device))
        return back.vectors
    forth = _Forwards(network)
    network.fold(forth)
    return forth.vectors


class _Forwards(Walk[Tensor]):
    """Bounds of the absolute values of increments; `vectors` collects those of implicit layers."""

    lacks = "no bound of absolute values is known"

    def __init__(self, network: Network) -> None:
        self.network = network
        self.vectors: dict[int, Tensor] = {}

    def input(self, i: int, node: Input) -> Tensor:
        return torch.ones(node.size, dtype=torch.float64, device=self.network.device)

    def affine(self, i: int, node: Affine, read: Tensor) -> Tensor:
        return node.operator.abs()(read)

    def activation(self, i: int, node: Activation, read: Tensor) -> Tensor:
        return node.function.steepest * read

    def implicit(self, i: int, node: Implicit, read: Tensor) -> Tensor:
        self.vectors[i] = propose_magnitude(node, read, False) * _MARGIN
        return self.vectors[i]

    def coupled(self, i: int, node: Coupled, read: Tensor) -> Tensor:
        return node.function.magnitude(read)

    def total(self, i: int, node: Sum, *read: Tensor) -> Tensor:
        return torch.stack(read).sum(0)


class _Backwards(_Forwards):
    """The same from the output: bounds of the absolute values of its derivative."""

    def affine(self, i: int, node: Affine, read: Tensor) -> Tensor:
        return node.operator.abs().transpose()(read)

    def implicit(self, i: int, node: Implicit, read: Tensor) -> Tensor:
        self.vectors[i] = propose_magnitude(node, read, True) * _MARGIN
        return self.vectors[i]

    def coupled(self, i: int, node: Coupled, read: Tensor) -> Tensor:
        return node.function.magnitude(read, self.network.sizes[node.source])

    def total(self, i: int, node: Sum, *read: Tensor) -> Tensor:
        return read[0]
