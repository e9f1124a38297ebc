"""The checker: evidence + network -> verified certificate, independent of every solver and prover.

Each kind of evidence has one check, in a file of its own. Nothing here is imported from `bounds`, `exact` or
`solvers`: the matrices are rebuilt from the network's nodes by code that the provers do not use.
"""

from __future__ import annotations

import dataclasses
import math

from lipguard.certificate import Certificate, ChannelMultipliers, Factors, Multipliers, Partition, SolverReport, Witness
from lipguard.errors import NotCertified
from lipguard.network import Network
from lipguard.verify.channel import check_channels
from lipguard.verify.factors import check_factors
from lipguard.verify.multipliers import check_multipliers
from lipguard.verify.partition import check_partition
from lipguard.verify.witness import check_witness

__all__ = ["verify"]


def verify(network: Network, certificate: Certificate) -> Certificate:
    """Prove the bound that the certificate's evidence supports for this network.

    The value is computed anew from the evidence, rounded outward; the certificate's own value is not trusted. It may
    come out weaker than what was proposed (an SDP value that was not quite feasible), never unproved.

    Raises:
        NotCertified: the digest is another network's, or the evidence proves nothing.
    """
    if certificate.digest != network.digest:
        raise NotCertified(
            f"the certificate is of network {certificate.digest[:12]}, this one is {network.digest[:12]}: "
            "a weight or the structure differs."
        )
    evidence = certificate.evidence
    match evidence:
        case Factors():
            value = check_factors(network, evidence, certificate.norm)
        case Multipliers():
            value = check_multipliers(network, evidence, certificate.norm)
        case ChannelMultipliers():
            value = check_channels(network, evidence, certificate.norm)
        case Witness():
            value = check_witness(network, evidence, certificate.norm, certificate.domain)
        case Partition():
            value = check_partition(network, evidence, certificate.norm, certificate.domain)
        case SolverReport():
            raise NotCertified(f"the value {certificate.value:g} rests on {evidence.solver}'s word alone: it stays approximate.")
    side = "lower" if isinstance(evidence, Witness) else "upper"
    if side != certificate.side:
        raise NotCertified(f"{type(evidence).__name__} proves {side} bounds, the certificate claims an {certificate.side} bound.")
    if math.isnan(value) or math.isinf(value):
        raise NotCertified(f"{type(evidence).__name__} proves no finite bound.")
    return dataclasses.replace(certificate, value=value, rigor="verified")
