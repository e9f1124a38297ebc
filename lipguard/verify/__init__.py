"""The checker: evidence + network -> verified certificate, independent of every solver and prover.

Each kind of evidence has one check, in a file of its own and in one of the tables below. Nothing here is imported from
`bounds`, `exact` or `solvers`: the matrices are rebuilt from the network's nodes by code that the provers do not use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lipguard.certificate import (
    Certificate,
    ChannelMultipliers,
    Domain,
    Enclosure,
    Factors,
    LocalMultipliers,
    Magnitudes,
    Multipliers,
    Partition,
    Product,
    RadiusCertificate,
    Slopes,
    SolverReport,
    WeightedMultipliers,
    Witness,
)
from lipguard.errors import Contradiction, NotCertified
from lipguard.network import Network
from lipguard.outward import show_upper
from lipguard.rounding import FLUSHED, flushes_denormals
from lipguard.verify.domain.local import check_local_multipliers, check_slopes
from lipguard.verify.domain.radii import verify_radii, verify_radius
from lipguard.verify.lmi.multipliers import check_multipliers
from lipguard.verify.lmi.split import check_product
from lipguard.verify.lmi.weighted import check_weighted
from lipguard.verify.norms.factors import check_factors
from lipguard.verify.norms.magnitudes import check_magnitudes
from lipguard.verify.phases.partition import check_partition
from lipguard.verify.point.witness import check_witness
from lipguard.verify.torus.channel import check_channels

__all__ = ["EVERYWHERE", "ON_DOMAIN", "ON_DOMAINS", "verify", "verify_local", "verify_radii", "verify_radius"]

_Norm = tuple[float, float]
C = TypeVar("C", Certificate, Enclosure, RadiusCertificate)

EVERYWHERE: dict[type[Any], Callable[[Network, Any, _Norm], float]] = {
    Factors: check_factors,
    Multipliers: check_multipliers,
    Magnitudes: check_magnitudes,
    WeightedMultipliers: check_weighted,
    ChannelMultipliers: check_channels,
    Product: check_product,
}
"""Evidence of bounds on all of R^d, which hold on every domain: check(network, evidence, norm), rounded outward."""

ON_DOMAIN: dict[type[Any], Callable[[Network, Any, _Norm, Domain | None], float]] = {
    Witness: check_witness,
    Partition: check_partition,
}
"""Evidence of bounds on one domain, None for R^d: check(network, evidence, norm, domain)."""

ON_DOMAINS: dict[type[Any], Callable[[Network, Sequence[Any], Sequence[Domain], _Norm], list[float]]] = {
    LocalMultipliers: check_local_multipliers,
    Slopes: check_slopes,
}
"""Evidence that is checked on many domains at a time: check(network, evidence, domains, norm), nan where nothing is proved."""


def verify(network: Network, certificate: C) -> C:
    """Prove the bound that the certificate's evidence supports for this network.

    The value is computed anew from the evidence, rounded outward; the certificate's own value is not trusted. It may
    come out weaker than what was proposed (an SDP value that was not quite feasible), never unproved. Of an enclosure both
    ends are proved.

    Raises:
        NotCertified: the digest is another network's, or the evidence proves nothing.
        Contradiction: the lower end of an enclosure exceeds its upper end.
    """
    if isinstance(certificate, RadiusCertificate):
        return verify_radius(network, certificate)
    if isinstance(certificate, Enclosure):
        lower, upper = (verify(network, end) for end in (certificate.lower_certificate, certificate.upper_certificate))
        if lower.side != "lower" or upper.side != "upper" or lower.norm != upper.norm or not _same(lower.domain, upper.domain):
            raise NotCertified("the ends of the enclosure are not a lower and an upper bound of one constant.")
        if lower.value > upper.value:
            raise Contradiction(
                f"verified lower bound {lower.value!r} > verified upper bound {upper.value!r}. Please report this."
            )
        return dataclasses.replace(certificate, lower_certificate=lower, upper_certificate=upper)
    evidence = certificate.evidence
    kind = type(evidence)
    if kind in ON_DOMAINS:
        verified = verify_local(network, [certificate])[0]
        if verified is None:
            raise NotCertified(f"no squared bound within 1 % of {show_upper(certificate.value**2)} is provable on the domain.")
        return verified
    _check_digest(network, certificate)
    if isinstance(evidence, SolverReport):
        raise NotCertified(
            f"the value {show_upper(certificate.value)} rests on {evidence.solver}'s word alone: it stays approximate."
        )
    if evidence.side != certificate.side:
        raise NotCertified(f"{kind.__name__} proves {evidence.side} bounds, the certificate claims an {certificate.side} bound.")
    if kind in EVERYWHERE:
        value = EVERYWHERE[kind](network, evidence, certificate.norm)
    elif kind in ON_DOMAIN:
        value = ON_DOMAIN[kind](network, evidence, certificate.norm, certificate.domain)
    else:
        raise NotCertified(f"no check knows {kind.__name__}.")
    if math.isnan(value) or math.isinf(value):
        raise NotCertified(f"{kind.__name__} proves no finite bound.")
    return dataclasses.replace(certificate, value=value, rigor="verified", network=network)


def _same(lower: Domain | None, upper: Domain | None) -> bool:
    """Whether an upper bound on the one domain holds on the other: on the same, or where it holds on all of R^d."""
    return upper is None or (lower is not None and lower.json() == upper.json())


def verify_local(network: Network, certificates: Sequence[Certificate]) -> list[Certificate | None]:
    """Prove bounds on many domains at once; None for each whose evidence proves nothing.

    Args:
        network: the network of all of them.
        certificates: upper bounds with `LocalMultipliers` or `Slopes` for evidence, all with the same norm.
    Raises:
        NotCertified: a digest is another network's, a domain is missing, or multipliers are of another number.
    """
    for certificate in certificates:
        _check_digest(network, certificate)
        if certificate.side != "upper":
            raise NotCertified(f"slopes on a domain prove upper bounds, the certificate claims a {certificate.side} bound.")
        if certificate.domain is None or certificate.norm != certificates[0].norm:
            raise NotCertified("local evidence needs a domain, and one norm for all certificates.")
    proved: list[Certificate | None] = [None] * len(certificates)
    for kind, check in ON_DOMAINS.items():
        which = [i for i, certificate in enumerate(certificates) if isinstance(certificate.evidence, kind)]
        if not which:
            continue
        domains = [domain for i in which if (domain := certificates[i].domain) is not None]
        values = check(network, [certificates[i].evidence for i in which], domains, certificates[0].norm)
        for i, value in zip(which, values, strict=True):
            if math.isfinite(value):
                proved[i] = dataclasses.replace(certificates[i], value=value, rigor="verified", network=network)
    return proved


def _check_digest(network: Network, certificate: Certificate) -> None:
    if flushes_denormals():
        raise NotCertified(FLUSHED)
    if certificate.digest != network.digest:
        raise NotCertified(
            f"the certificate is of network {certificate.digest[:12]}, this one is {network.digest[:12]}: "
            "a weight or the structure differs."
        )
