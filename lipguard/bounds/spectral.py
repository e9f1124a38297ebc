"""The product of the layers' norms: cheap, valid for every norm and network, and the bound that always stands."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lipguard.bounds.method import PAIRS, Method, Pair
from lipguard.bounds.slopes import slope_bounds, without_ranges
from lipguard.certificate import Certificate, Domain, Factors, Query
from lipguard.errors import UnsupportedQuery
from lipguard.network import Network, Operator
from lipguard.verify import verify
from lipguard.verify.norms.factors import LARGEST_UNROLLED


@dataclass(frozen=True)
class Spectral(Method):
    """Product of operator norms along the graph, summed where branches meet (Szegedy et al. 2014, section 4.3)."""

    local: ClassVar[tuple[Pair, ...]] = PAIRS

    def __call__(self, network: Network, query: Query, state: object = None) -> tuple[Certificate, None]:
        """The verified product bound; valid on every domain.

        Raises:
            UnsupportedQuery: a weight is so large or small that its square leaves the range of float64.
        """
        del state
        began = time.perf_counter()
        factors = Factors({i: layer_norm(n.map, query.norm[0]) for i, n in enumerate(network.nodes) if n.map is not None})
        proposed = Certificate(math.nan, "upper", query.norm, query.domain, network.digest, "spectral", factors)
        verified = verify(network, proposed)
        return replace(verified, seconds=time.perf_counter() - began), None

    def on(self, network: Network, query: Query, domains: Sequence[Domain]) -> list[Certificate]:
        """The bounds by the slopes on the domains, one for each."""
        if not without_ranges(network):
            return slope_bounds(network, query, domains)
        overall, _ = self(network, replace(query, domain=None))
        return [replace(overall, domain=domain) for domain in domains]


def layer_norm(operator: Operator, p: float) -> float:
    """The norm of one layer in floating point: a proposal that the checker proves (exact for p of 1 and inf)."""
    if p != 2:
        magnitude = operator.abs() if p == math.inf else operator.abs().transpose()
        return float(magnitude(torch.ones(magnitude.shape[1], dtype=torch.float64, device=operator.device)).max())
    known = operator.norm(p)
    if known is not None:
        return known
    if operator.convolution is not None and math.prod(operator.shape) > LARGEST_UNROLLED:
        return math.sqrt(layer_norm(operator, 1) * layer_norm(operator, math.inf))  # the checker finds a better one itself
    weight = operator.dense()
    weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
    # A power of two keeps the squares within the range of float64.
    scale = 2.0 ** max(-1000, min(1000, math.frexp(float(weight.abs().max()))[1])) if weight.numel() else 1.0
    square = float(torch.linalg.eigvalsh((weight / scale) @ (weight / scale).T)[-1])
    if not math.isfinite(square):
        raise UnsupportedQuery("a weight is so large that its square overflows. Rescale the layer.")
    return scale * math.sqrt(max(square, 0.0))
