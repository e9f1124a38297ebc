"""`Method`: a way to bound the constant, which states its options, side, norms, domains, cost and what it carries on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from lipguard import registry
from lipguard.certificate import Certificate, Domain, Query, Side
from lipguard.errors import UnsupportedQuery
from lipguard.network import Network

__all__ = ["Method", "build", "check_options", "refuse_lower"]

Pair = tuple[float, float]

PAIRS: tuple[Pair, ...] = tuple((p, q) for p in (1.0, 2.0, math.inf) for q in (1.0, 2.0, math.inf))
"""The nine pairs of norms."""


@dataclass(frozen=True)
class Method:
    """Base of the bound methods: a frozen dataclass whose fields are its options, checked when it is made.

    Called as `method(network, query, state)`, it gives a verified certificate and what a later call on a neighbouring network
    may start from, or None. Other packages may derive from it, or write any frozen dataclass that is called likewise.

    Attributes:
        side: which side of the constant it bounds.
        norms: pairs (input, output) that it answers.
        local: norms for which the domain narrows its bound; else its bound is that of all inputs, which holds on every domain.
    """

    side: ClassVar[Side] = "upper"
    norms: ClassVar[tuple[Pair, ...]] = PAIRS
    local: ClassVar[tuple[Pair, ...]] = ()

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        check_options({f.name: getattr(self, f.name) for f in fields(self)}, type(self).__name__)

    @property
    def name(self) -> str:
        """Name in the registry, which certificates carry."""
        return type(self).__name__.lower()

    def __call__(self, network: Network, query: Query, state: Any = None) -> tuple[Certificate, Any]:
        """The verified bound, and what a later call may start from.

        Raises:
            UnsupportedQuery: it has no answer for this norm or network; the message says which has.
        """
        raise NotImplementedError

    def on(self, network: Network, query: Query, domains: Sequence[Domain]) -> list[Certificate]:
        """One certificate for each domain; methods that bound many together override it."""
        if query.norm in self.local:
            return [self(network, replace(query, domain=domain))[0] for domain in domains]
        overall, _ = self(network, replace(query, domain=None))
        return [replace(overall, domain=domain) for domain in domains]

    def cost(self, network: Network, query: Query) -> float:
        """Multiplications of the search, roughly; infinite where it has no answer."""
        return 0.0 if query.norm in self.norms else math.inf

    def measure(self, network: Network, query: Query, state: Any, seconds: float, floor: float) -> tuple[Certificate, Any]:
        """A bound within a training: from the last measurement's state, in about `seconds`, or `floor` while it still improves.

        Here: the search with the time as its limit, where the method has one.
        """
        limited = self
        if math.isfinite(seconds) and any(f.name == "time_limit" for f in fields(self)):
            limited = replace(self, time_limit=max(seconds, floor / 4))
        return limited(network, query, state)

    def pack(self, state: Any) -> dict[str, Any] | None:
        """The state as tensors and numbers for a training's checkpoint; None starts a resumed training afresh."""
        del state

    def unpack(self, packed: Mapping[str, Any]) -> Any:
        """Inverse of `pack`."""
        del packed

    def unsupported(self, query: Query, instead: str = "spectral") -> UnsupportedQuery:
        """The error for norms that it does not answer."""
        known = ", ".join(f"({p:g}, {q:g})" for p, q in self.norms)
        p, q = query.norm
        return UnsupportedQuery(
            f"{self.name} has no bound for the norms ({p:g}, {q:g}) of input and output; it has one for {known}. "
            f"Use method={instead!r}."
        )


def build(method: str | Method, given: Mapping[str, object]) -> Any:
    """The method of this name with the options given; a method object as it is.

    Raises:
        UnknownName: no such method.
        UnsupportedQuery: an option that the method does not take, or a value out of range.
    """
    if not isinstance(method, str):
        if not callable(method):
            raise UnsupportedQuery(f"method is {type(method).__name__}: give a name, such as 'spectral', or a method object.")
        if given:
            options = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise UnsupportedQuery(f"{options}: a method object states its own options. Give {type(method).__name__}({options}).")
        return method
    entry = registry.method(method)
    refuse_untaken(f"method={method!r}", given, entry.takes())
    return entry.build(**given)


def refuse_untaken(what: str, given: Mapping[str, object], taken: Sequence[str]) -> None:
    """Refuse options that nothing would read.

    Raises:
        UnsupportedQuery: one of them is not taken; the message says which are.
    """
    for name, value in given.items():
        if name not in taken:
            known = f"it takes {', '.join(taken)}" if taken else "it takes no options"
            raise UnsupportedQuery(f"{name}={value!r} has no use: {what} does not take it; {known}. Leave {name} out.")


def refuse_lower(method: Any, place: str) -> None:
    """Refuse a method of lower bounds where an upper one is wanted.

    Raises:
        UnsupportedQuery: it bounds from below.
    """
    if getattr(method, "side", "upper") != "upper":
        raise UnsupportedQuery(
            f"{place} wants an upper bound; {getattr(method, 'name', method)} bounds the constant from below. Give an upper "
            "method, such as method='spectral', or none: the lower bound is measured beside it in any case."
        )


def _positive(value: object) -> bool:
    return _number(value) and 0 < value < math.inf  # type: ignore[operator]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_RANGES: dict[str, tuple[Callable[[object], bool], str]] = {
    "tol": (lambda v: _positive(v) and v < 1, "a relative gap above 0 and below 1, such as 1e-4"),  # type: ignore[operator]
    "gap": (lambda v: _number(v) and 0 <= v < 1, "a relative gap from 0 and below 1, such as 1e-6"),  # type: ignore[operator]
    "time_limit": (lambda v: v is None or (_number(v) and v >= 0), "seconds, 0 or more, or None for no limit"),  # type: ignore[operator]
    "chordal": (lambda v: isinstance(v, bool), "True or False"),
    "tied": (lambda v: isinstance(v, bool), "True or False"),
    **dict.fromkeys(("pieces", "jobs", "starts", "steps", "threads"), (_count, "a whole number, 1 or more")),
}
"""What the options that several methods have may be."""


def check_options(given: Mapping[str, object], place: str) -> None:
    """Refuse values out of range, whichever method reads them.

    Raises:
        UnsupportedQuery: a value out of range.
        UnknownName: no solver has the name given.
    """
    for name, value in given.items():
        if name in _RANGES:
            holds, meaning = _RANGES[name]
            if not holds(value):
                raise UnsupportedQuery(f"{place}: {name}={value!r} must be {meaning}.")
        elif name == "solver" and value != "auto":
            if not isinstance(value, str):
                text = "must be the name of a solver, such as 'interior-point', or 'auto'"
                raise UnsupportedQuery(f"{place}: solver={value!r} {text}.")
            if value not in registry.SOLVERS and value not in registry.solvers():
                raise registry.unknown("solver", value, (*registry.solvers(), "auto"))
