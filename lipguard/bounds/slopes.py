"""Local bounds by nothing but the slopes of the neurons on each domain."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from lipguard.certificate import Certificate, Domain, Query, Slopes
from lipguard.network import Network
from lipguard.verify import verify_local


def slope_bounds(network: Network, query: Query, domains: Sequence[Domain]) -> list[Certificate]:
    """Upper bounds by nothing but the slopes on each domain, in any norm, of a network whose values all have ranges."""
    began = time.perf_counter()
    return timed(verify_local(network, unproved(network, query, domains, "spectral")), began)


def without_ranges(network: Network) -> bool:
    """Whether there is a layer of whose values no ranges are known: the bound on all of R^d stands on every domain then."""
    groups = (node.coupling for node in network.nodes)
    return any(node.loop is not None for node in network.nodes) or any(g is not None and not g.pieces for g in groups)


def unproved(network: Network, query: Query, domains: Sequence[Domain], name: str) -> list[Certificate]:
    """Certificates whose slopes alone are to be proved, one for each domain."""
    return [Certificate(math.nan, "upper", query.norm, domain, network.digest, name, Slopes()) for domain in domains]


def timed(found: Sequence[Certificate | None], began: float) -> list[Certificate]:
    """Those that were proved, the time divided among them."""
    seconds = (time.perf_counter() - began) / max(1, len(found))
    return [replace(certificate, seconds=seconds) for certificate in found if certificate is not None]
