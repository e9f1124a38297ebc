"""What is asked (Domain, Query), what is offered as proof (Evidence) and what was proved (Certificate)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lipguard.domain import NORMS, Ball, Box, Domain, domain_from_json
from lipguard.errors import UnsupportedQuery
from lipguard.evidence import (
    ChannelMultipliers,
    Evidence,
    Factors,
    Leaf,
    LocalMultipliers,
    Magnitudes,
    Multipliers,
    Part,
    Partition,
    Product,
    Slopes,
    SolverReport,
    WeightedMultipliers,
    Witness,
)

__all__ = [
    "Ball", "Box", "Certificate", "ChannelMultipliers", "Domain", "Enclosure", "Evidence", "Factors", "Leaf", "LocalMultipliers",
    "Magnitudes", "Multipliers", "Norm", "Part", "Partition", "Product", "Query", "Rigor", "Side", "Slopes", "SolverReport",
    "Status", "WeightedMultipliers", "Witness", "domain_from_json", "norm_pair",
]  # fmt: skip

Side = Literal["upper", "lower"]
Rigor = Literal["approximate", "verified"]
Norm = float | tuple[float, float]


def norm_pair(norm: Norm | str) -> tuple[float, float]:
    """The (input, output) norms meant by `norm`, each 1, 2 or inf.

    Raises:
        UnsupportedQuery: a norm other than 1, 2 or inf.
    """
    pair = tuple(norm) if isinstance(norm, (tuple, list)) else (norm, norm)
    try:
        values = tuple(float(p) for p in pair)
    except (TypeError, ValueError):
        values = ()
    if len(values) != 2 or any(p not in NORMS for p in values):
        raise UnsupportedQuery(f"norm={norm!r}: a norm is 1, 2 or inf, or a pair (input, output) of them.")
    return values[0], values[1]


@dataclass(frozen=True, eq=False)
class Query:
    """The constant that is asked for: sup over the domain of the Jacobian's norm from `norm[0]` to `norm[1]`."""

    norm: tuple[float, float] = (2.0, 2.0)
    domain: Domain | None = None


@dataclass(frozen=True, eq=False)
class Certificate:
    """One bound of one network's Lipschitz constant, with what proves it.

    `value` is rounded outward when `rigor` is "verified". `note` says what went wrong on the way, if anything.
    """

    value: float
    side: Side
    norm: tuple[float, float]
    domain: Domain | None
    digest: str
    method: str
    evidence: Evidence
    rigor: Rigor = "approximate"
    seconds: float = 0.0
    note: str = ""
    details: dict[str, float | int | str] = field(default_factory=dict)

    def __float__(self) -> float:
        return self.value


Status = Literal["closed", "gap reached", "time limit", "memory limit", "interrupted", "solver failed"]


@dataclass(frozen=True, eq=False)
class Enclosure:
    """lower <= constant <= upper, as narrow as the time allowed.

    Attributes:
        lower, upper: the two bounds, certificates of their own.
        status: "closed" when the gap asked for was reached, else what ended the search.
        witness: an input near which the Jacobian attains `lower`, shape (d,), or None.
        closed_region: the maximum over closed regions, where it is known to exceed the true constant; else None.
        choice: what was chosen by "auto" or fallen back to, and why.
    """

    lower_certificate: Certificate
    upper_certificate: Certificate
    status: Status
    method: str
    seconds: float
    solver: str = ""
    witness: Tensor | None = None
    closed_region: float | None = None
    choice: str = ""
    details: dict[str, float | int | str] = field(default_factory=dict)

    @property
    def lower(self) -> float:
        """The lower bound."""
        return self.lower_certificate.value

    @property
    def upper(self) -> float:
        """The upper bound."""
        return self.upper_certificate.value

    @property
    def gap(self) -> float:
        """Relative gap (upper - lower) / upper; 0 where both are 0."""
        return 0.0 if self.upper == self.lower else (self.upper - self.lower) / self.upper

    @property
    def rigor(self) -> Rigor:
        """Whether both bounds are "verified"."""
        both = {self.lower_certificate.rigor, self.upper_certificate.rigor}
        return "verified" if both == {"verified"} else "approximate"
