"""What is asked (Domain, Query), what is offered as proof (Evidence) and what was proved (Certificate)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from lipguard.domain import Ball, Box, Domain, domain_from_json
from lipguard.errors import InvalidDomain, NotCertified
from lipguard.evidence import (
    ChannelMultipliers,
    Evidence,
    Factors,
    Leaf,
    LocalMultipliers,
    Magnitudes,
    Multipliers,
    PairBound,
    Part,
    Partition,
    Product,
    Radius,
    Side,
    Slopes,
    SolverReport,
    WeightedMultipliers,
    Witness,
    evidence_from_record,
)
from lipguard.plain import COUNT, NUMBER, TEXT, Form, finite, one_of, optional, read_fields, tensor
from lipguard.query import Norm, Query, norm_pair

__all__ = [
    "Ball", "Box", "Certificate", "ChannelMultipliers", "Domain", "Enclosure", "Evidence", "Factors", "Leaf", "LocalMultipliers",
    "Magnitudes", "Multipliers", "Norm", "PairBound", "Part", "Partition", "Product", "Query", "Radius", "RadiusCertificate",
    "Rigor", "Side", "Slopes", "SolverReport", "Status", "WeightedMultipliers", "Witness", "domain_from_json", "norm_pair",
]  # fmt: skip

Rigor = Literal["approximate", "verified"]
Status = Literal["closed", "gap reached", "time limit", "memory limit", "interrupted", "solver failed"]


def _read_value(value: object) -> float:
    """A number; a solver that found no bound claims inf, which JSON has as text."""
    return math.inf if value == "inf" else NUMBER.read(value)


def _read_norm(value: object) -> tuple[float, float]:
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(p in ("1.0", "2.0", "inf") for p in value)):
        raise ValueError(f"{value!r} is no pair of norms, each '1.0', '2.0' or 'inf'")
    return float(value[0]), float(value[1])


def _read_domain(value: Any) -> Domain | None:
    try:
        return domain_from_json(value)
    except InvalidDomain as error:
        raise ValueError(str(error)) from error


def _read_details(value: object) -> dict[str, float | int | str]:
    if not isinstance(value, Mapping) or not all(isinstance(item, float | int | str) for item in value.values()):
        raise ValueError("details are numbers and texts by name")
    return {str(name): item for name, item in value.items()}


_VALUE = Form(finite, _read_value)
_NORM = Form(lambda norm: [str(float(p)) for p in norm], _read_norm)
_DOMAIN = Form(lambda domain: None if domain is None else finite(domain.json()), _read_domain)
_DETAILS = Form(finite, _read_details)


class _Plain:
    """A result that states the form of its fields."""

    forms: ClassVar[Mapping[str, Form]]

    def to_dict(self) -> dict[str, Any]:
        """Every field as a JSON value, the evidence with all of its numbers."""
        return {name: form.write(getattr(self, name)) for name, form in self.forms.items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; a field that has a default may be missing.

        The rigor is the one stated, which anyone may write: `lipguard.verify` tells.

        Raises:
            NotCertified: a field is missing or unknown, or has no meaning.
        """
        stated = [f for f in fields(cls) if f.name in cls.forms]  # type: ignore[arg-type] - every subclass is a dataclass
        needed = {f.name for f in stated if f.default is MISSING and f.default_factory is MISSING}
        return cls(**read_fields(value, cls.forms, needed, f"the record of the {cls.__name__.lower()}"))


@dataclass(frozen=True, eq=False)
class Certificate(_Plain):
    """One bound of one network's Lipschitz constant, with what proves it.

    `value` is rounded outward when `rigor` is "verified". `note` says what went wrong on the way, if anything.
    """

    forms: ClassVar[Mapping[str, Form]] = {
        "value": _VALUE,
        "side": one_of(*get_args(Side)),
        "norm": _NORM,
        "domain": _DOMAIN,
        "digest": TEXT,
        "method": TEXT,
        "rigor": one_of(*get_args(Rigor)),
        "seconds": NUMBER,
        "note": TEXT,
        "details": _DETAILS,
        "evidence": Form(lambda evidence: evidence.to_record(), evidence_from_record),
    }

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

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Certificate:
        """As for every result; and only a solver's word may be infinite."""
        found = super().from_dict(value)
        if found.rigor == "verified" and not math.isfinite(found.value):
            raise NotCertified("the record of the certificate is damaged: a verified value is infinite.")
        return found

    def __float__(self) -> float:
        return self.value


_CERTIFICATE = Form(Certificate.to_dict, Certificate.from_dict)


def _read_ball(value: Any) -> Ball:
    ball = _read_domain(value)
    if not isinstance(ball, Ball):
        raise ValueError("a radius is stated of a ball")
    return ball


@dataclass(frozen=True, eq=False)
class RadiusCertificate(_Plain):
    """Every input of a 2-ball (and of its box) has the class `label`: that output exceeds all others there.

    The statement is whole: `lipguard.verify.verify_radius` proves it from the evidence and the network, or refuses.
    """

    forms: ClassVar[Mapping[str, Form]] = {
        "ball": Form(_DOMAIN.write, _read_ball),
        "label": COUNT,
        "digest": TEXT,
        "evidence": Form(Radius.to_record, Radius.from_record),
        "rigor": one_of(*get_args(Rigor)),
    }

    ball: Ball
    label: int
    digest: str
    evidence: Radius
    rigor: Rigor = "approximate"

    @property
    def radius(self) -> float:
        """The ball's radius."""
        return float(self.ball.radius)


@dataclass(frozen=True, eq=False)
class Enclosure(_Plain):
    """lower <= constant <= upper, as narrow as the time allowed.

    Attributes:
        lower, upper: the two bounds, certificates of their own.
        status: "closed" when the gap asked for was reached, else what ended the search.
        witness: an input near which the Jacobian attains `lower`, shape (d,), or None.
        closed_region: the maximum over closed regions, where it is known to exceed the true constant; else None.
        choice: what was chosen by "auto" or fallen back to, and why.
    """

    forms: ClassVar[Mapping[str, Form]] = {
        "lower_certificate": _CERTIFICATE,
        "upper_certificate": _CERTIFICATE,
        "status": one_of(*get_args(Status)),
        "method": TEXT,
        "seconds": NUMBER,
        "solver": TEXT,
        "witness": optional(tensor(torch.float64)),
        "closed_region": optional(NUMBER),
        "choice": TEXT,
        "details": _DETAILS,
    }

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
