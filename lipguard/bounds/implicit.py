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
from lipguard.network import Activation, Affine, Coupled, Implicit, Input, Network, Sum
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
    vectors: dict[int, Tensor] = {}
    options = {"dtype": torch.float64, "device": network.device}
    last = len(network.nodes) - 1
    found: dict[int, Tensor] = {}
    if transposed:
        found[last] = torch.ones(network.outputs, **options)  # type: ignore[arg-type]

    def hand(target: int, value: Tensor) -> None:
        found[target] = found[target] + value if target in found else value

    for i in reversed(range(last + 1)) if transposed else range(last + 1):
        node = network.nodes[i]
        if transposed and i not in found:
            continue
        match node:
            case Input():
                if not transposed:
                    found[i] = torch.ones(node.size, **options)  # type: ignore[arg-type]
            case Affine():
                magnitude = node.operator.abs()
                if transposed:
                    hand(node.source, magnitude.transpose()(found[i]))
                else:
                    found[i] = magnitude(found[node.source])
            case Activation():
                alpha, beta = node.function.slopes
                steepest = torch.maximum(alpha.abs(), beta.abs())
                if transposed:
                    hand(node.source, steepest * found[i])
                else:
                    found[i] = steepest * found[node.source]
            case Implicit():
                given = found[i if transposed else node.source]
                vectors[i] = propose_magnitude(node, given, transposed) * _MARGIN
                hand(node.source if transposed else i, vectors[i])
            case Coupled():
                if transposed:
                    hand(node.source, node.function.magnitude(found[i], network.sizes[node.source]))
                else:
                    found[i] = node.function.magnitude(found[node.source])
            case Sum():
                if transposed:
                    for source in node.sources:
                        hand(source, found[i])
                else:
                    found[i] = torch.stack([found[s] for s in node.sources]).sum(0)
    return vectors
