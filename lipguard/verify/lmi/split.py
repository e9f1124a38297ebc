"""Check of `Product`: the constants of consecutive pieces multiply, each proved by its own evidence."""

from __future__ import annotations

from lipguard.certificate import Factors, Multipliers, Product
from lipguard.errors import NotCertified
from lipguard.network import Network
from lipguard.network.pieces import pieces
from lipguard.verify.lmi.multipliers import check_multipliers
from lipguard.verify.norms.factors import check_factors
from lipguard.verify.norms.matrix_norm import times


def check_product(network: Network, evidence: Product, norm: tuple[float, float]) -> float:
    """The product of the pieces' proved bounds, rounded up.

    Raises:
        NotCertified: the norm is not (2, 2), the cuts are not the network's, or a piece's evidence proves nothing.
    """
    if norm != (2.0, 2.0):
        raise NotCertified(f"a product of pieces proves bounds from 2-norm to 2-norm, not {norm}.")
    try:
        parts = pieces(network, evidence.cuts)
    except (ValueError, TypeError) as error:
        raise NotCertified(f"the pieces are not the network's: {error}") from error
    if len(parts) != len(evidence.factors):
        raise NotCertified(f"{len(evidence.factors)} pieces of evidence are given for {len(parts)} pieces.")
    value = 1.0
    for part, factor in zip(parts, evidence.factors, strict=True):
        match factor:
            case Multipliers():
                value = times(value, check_multipliers(part, factor, norm))
            case Factors():
                value = times(value, check_factors(part, factor, norm))
            case _:
                raise NotCertified(f"{type(factor).__name__} is not evidence of a piece.")
    return value
