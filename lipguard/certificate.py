"""What is asked (Domain, Query), what is offered as proof (Evidence) and what was proved (Certificate)."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from lipguard import __version__
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
from lipguard.files import read_document, write_atomically
from lipguard.outward import show, show_interval, show_lower, show_upper
from lipguard.plain import COUNT, NUMBER, TEXT, Form, finite, one_of, optional, read_fields, tensor
from lipguard.query import Norm, Query, norm_pair
from lipguard.rendering import clipped, line, norm_text, table

__all__ = [
    "Ball", "Box", "Certificate", "ChannelMultipliers", "Domain", "Enclosure", "Evidence", "Factors", "Leaf", "LocalMultipliers",
    "Magnitudes", "Multipliers", "Norm", "PairBound", "Part", "Partition", "Product", "Query", "Radius", "RadiusCertificate",
    "Rigor", "Side", "Slopes", "SolverReport", "Status", "WeightedMultipliers", "Witness", "domain_from_json", "load",
    "norm_pair",
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

_DOCUMENT, _FORMAT = "lipguard result", 1


def _subject(certificate: Certificate) -> str:
    p, q = certificate.norm
    where = "on all inputs" if certificate.domain is None else f"on {certificate.domain!r}"
    return f"the Lipschitz constant of network {certificate.digest[:12]}, from norm {p:g} to norm {q:g}, {where}"


def _about(certificate: Certificate) -> list[str]:
    """Norm and domain, for a repr."""
    domain = "all inputs" if certificate.domain is None else clipped(repr(certificate.domain), 60)
    return [f"norm {norm_text(certificate.norm)}", domain]


class _Plain:
    """A result that states the form of its fields."""

    forms: ClassVar[Mapping[str, Form]]

    def statement(self) -> str:
        """What is claimed, in words."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result, its evidence, its statement in words and the package's version as one JSON document.

        At any moment `path` holds the whole document or what it held before. `lipguard.load` reads it.
        """
        head = {"document": _DOCUMENT, "format": _FORMAT, "lipguard": __version__, "kind": type(self).__name__.lower()}
        document = head | {"statement": self.statement(), "result": self.to_dict()}
        write_atomically(Path(path), json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n")

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


@dataclass(frozen=True, eq=False, repr=False)
class Certificate(_Plain):
    """One bound of one network's Lipschitz constant, with what proves it.

    `value` is rounded outward when `rigor` is "verified". `note` says what went wrong on the way, if anything. `network` is
    the one that the checker proved it for, in this process: neither pickled nor saved.
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
    network: Any = field(default=None, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without the network, which is no part of the claim and may be large."""
        return {**self.__dict__, "network": None}

    def explain(self, network: Any = None) -> Any:
        """Each layer's share of the bound: see `lipguard.bounds.explain.explain`."""
        # By name: certificates lie below the methods, and an explanation asks them; the shares are no part of what is trusted.
        return importlib.import_module("lipguard.bounds.explain").explain(self, network)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Certificate:
        """As for every result; and only a solver's word may be infinite."""
        found = super().from_dict(value)
        if found.rigor == "verified" and not math.isfinite(found.value):
            raise NotCertified("the record of the certificate is damaged: a verified value is infinite.")
        return found

    def __float__(self) -> float:
        return self.value

    def statement(self) -> str:
        """What is claimed, in words."""
        kind = "proved" if self.rigor == "verified" else "an estimate, not proved"
        most = "at least" if self.side == "lower" else "at most"
        return f"{_subject(self)[:1].upper()}{_subject(self)[1:]}, is {most} {show(self.value, self.side, 17)} ({kind})."

    def __repr__(self) -> str:
        value = f"{self.side} {show(self.value, self.side)}"
        return line("Certificate", [value, self.rigor, *_about(self), clipped(self.method, 32), clipped(repr(self.evidence), 48)])

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = [
            (f"{self.side} bound", f"{show(self.value, self.side)}, {self.rigor}"),
            ("norm", norm_text(self.norm)),
            ("domain", "all inputs" if self.domain is None else repr(self.domain)),
            ("method", self.method),
            ("evidence", repr(self.evidence)),
            ("network", self.digest[:12]),
            ("seconds", show_upper(self.seconds, 3)),
            *([("note", self.note)] if self.note else []),
        ]
        return table("Lipschitz certificate", rows)


_CERTIFICATE = Form(Certificate.to_dict, Certificate.from_dict)


def _read_ball(value: Any) -> Ball:
    ball = _read_domain(value)
    if not isinstance(ball, Ball):
        raise ValueError("a radius is stated of a ball")
    return ball


@dataclass(frozen=True, eq=False, repr=False)
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

    def statement(self) -> str:
        """What is claimed, in words."""
        kind = "proved" if self.rigor == "verified" else "an estimate, not proved"
        return f"Every input in {self.ball!r} has class {self.label} of network {self.digest[:12]} ({kind})."

    def __repr__(self) -> str:
        parts = [f"class {self.label}", f"radius {show_lower(self.radius)}", self.rigor, clipped(repr(self.ball), 60)]
        return line("RadiusCertificate", [*parts, clipped(repr(self.evidence), 48)])


@dataclass(frozen=True, eq=False, repr=False)
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

    def statement(self) -> str:
        """What is claimed, in words."""
        kind = "proved" if self.rigor == "verified" else "not both ends are proved"
        subject = _subject(self.upper_certificate)
        return f"{subject[:1].upper()}{subject[1:]}, lies in {show_interval(self.lower, self.upper, 17)} ({kind})."

    def __repr__(self) -> str:
        ends = f"{show_interval(self.lower, self.upper)}, gap {show_upper(self.gap, 3)}"
        evidence = clipped(repr(self.upper_certificate.evidence), 48)
        return line(
            "Enclosure", [ends, self.status, self.rigor, *_about(self.upper_certificate), clipped(self.method, 32), evidence]
        )

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        above, below = self.upper_certificate, self.lower_certificate
        rows = [
            ("lower bound", f"{show(below.value, 'lower')}, {below.rigor}, {below.method}, {below.evidence!r}"),
            ("upper bound", f"{show(above.value, 'upper')}, {above.rigor}, {above.method}, {above.evidence!r}"),
            ("gap", show_upper(self.gap, 3)),
            ("status", self.status),
            ("norm", norm_text(above.norm)),
            ("domain", "all inputs" if above.domain is None else repr(above.domain)),
            ("method", f"{self.method}{f' by {self.solver}' if self.solver else ''}"),
            ("network", above.digest[:12]),
            ("seconds", show_upper(self.seconds, 3)),
            *([("choice", self.choice)] if self.choice else []),
        ]
        return table("Enclosure of a Lipschitz constant", rows)


_KINDS: Mapping[str, type[Certificate | Enclosure | RadiusCertificate]] = {
    "certificate": Certificate,
    "enclosure": Enclosure,
    "radiuscertificate": RadiusCertificate,
}


def load(path: str | os.PathLike[str]) -> Certificate | Enclosure | RadiusCertificate:
    """Read a result that `save` wrote.

    A file proves nothing: the rigor is "approximate" until `lipguard.verify(network, result)` has proved the bound anew, and
    the note says what the file states.

    Raises:
        UnreadableCheckpoint: there is no such file.
        NotCertified: it is damaged, of another format, or no saved result.
    """
    file = Path(path)
    document = read_document(file)
    if "certificates" in document:
        raise NotCertified(f"{file} is an audit record: check it with lipguard.audit.verify_record, or `lipguard verify {file}`.")
    if document.get("document") != _DOCUMENT or document.get("format") != _FORMAT:
        raise NotCertified(f"{file} is no result of format {_FORMAT} that lipguard saved.")
    head = {"document": TEXT, "format": NUMBER, "lipguard": TEXT, "kind": one_of(*_KINDS), "statement": TEXT}
    found = read_fields(document, head | {"result": Form(dict, lambda value: value)}, {*head, "result"}, f"{file}")
    result = _KINDS[found["kind"]].from_dict(found["result"])
    if isinstance(result, RadiusCertificate):
        return replace(result, rigor="approximate")
    if isinstance(result, Certificate):
        return _unproved(result, file)
    ends = (_unproved(one, file) for one in (result.lower_certificate, result.upper_certificate))
    return replace(result, **dict(zip(("lower_certificate", "upper_certificate"), ends, strict=True)))


def _unproved(certificate: Certificate, file: Path) -> Certificate:
    if certificate.rigor != "verified":
        return certificate
    note = f"read from {file.name}, which calls it verified: lipguard.verify(network, result) proves it anew"
    return replace(certificate, rigor="approximate", note="; ".join(filter(None, [certificate.note, note])))
