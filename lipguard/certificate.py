"""What is asked (Domain, Query), what is offered as proof (Evidence) and what was proved (Certificate)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lipguard.domain import Ball, Box, Domain, domain_from_json
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
from lipguard.query import Norm, Query, norm_pair

__all__ = [
    "Ball", "Box", "Certificate", "ChannelMultipliers", "Domain", "Enclosure", "Evidence", "Factors", "Leaf", "LocalMultipliers",
    "Magnitudes", "Multipliers", "Norm", "Part", "Partition", "Product", "Query", "Rigor", "Side", "Slopes", "SolverReport",
    "Status", "WeightedMultipliers", "Witness", "domain_from_json", "norm_pair",
]  # fmt: skip

Side = Literal["upper", "lower"]
Rigor = Literal["approximate", "verified"]


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
