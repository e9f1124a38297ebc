"""The methods of `lipguard.exact` as objects that state their options, the norms they answer, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from lipguard.bounds.method import PAIRS, Pair, check_options
from lipguard.certificate import Enclosure, Query
from lipguard.errors import UnknownName
from lipguard.exact.branch_and_bound import branch_and_bound
from lipguard.exact.enumeration import enumeration
from lipguard.exact.mixed_integer import FORMULATIONS, Formulation, kind_of, mixed_integer
from lipguard.network import Network

_EITHER = tuple((p, q) for p, q in PAIRS if 2.0 not in (p, q))
"""Pairs of norms without a 2-norm of vectors."""


@dataclass(frozen=True)
class ExactMethod:
    """Base of the exact methods: a frozen dataclass whose fields are its options, called as `method(network, query)`.

    Attributes:
        norms: pairs (input, output) that it answers.
        verified: whether its upper end is proved, not only a solver's word.
        gap: relative gap (upper - lower) / upper at which the search ends.
        time_limit: seconds; None for no limit.
    """

    norms: ClassVar[tuple[Pair, ...]] = PAIRS
    verified: ClassVar[bool] = False

    gap: float = 1e-6
    time_limit: float | None = None

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        check_options({f.name: getattr(self, f.name) for f in fields(self)}, type(self).__name__)

    def __call__(self, network: Network, query: Query) -> Enclosure:
        """The enclosure that the time allows.

        Raises:
            UnsupportedQuery: an activation is not piecewise linear, or norms or a domain that it does not answer.
            InvalidDomain: the domain is empty, reversed, or of another dimension.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Enumeration(ExactMethod):
    """Every linear region with an interior; exact, so that `gap` decides nothing but the status."""

    def __call__(self, network: Network, query: Query) -> Enclosure:
        """See `lipguard.exact.enumeration.enumeration`."""
        return enumeration(network, query, time_limit=self.time_limit, gap=self.gap)


@dataclass(frozen=True)
class BranchAndBound(ExactMethod):
    """A search over activation phases whose leaves are evidence."""

    norms: ClassVar[tuple[Pair, ...]] = tuple((p, q) for p, q in PAIRS if (p, q) == (2.0, 2.0) or p == 1 or q == math.inf)
    verified: ClassVar[bool] = True

    def __call__(self, network: Network, query: Query) -> Enclosure:
        """See `lipguard.exact.branch_and_bound.branch_and_bound`."""
        return branch_and_bound(network, query, time_limit=self.time_limit, gap=self.gap)


@dataclass(frozen=True)
class MixedInteger(ExactMethod):
    """A mixed-integer program, quadratic where a 2-norm enters.

    Attributes:
        kind: "miqcqp" or "milp".
        solver: a registered solver of this kind, or "auto".
        region: "closed" (upper bounds), "strict" (lower bounds), or "both", which repairs the cases where they differ.
        threads: of the solver.
        formulation: with lipguard's bounds ("tightened"), or the program as "published".
    """

    kind: Literal["miqcqp", "milp"] = "miqcqp"
    solver: str = "auto"
    region: Literal["both", "closed", "strict"] = "both"
    threads: int = 1
    formulation: Formulation = "tightened"

    def __post_init__(self) -> None:
        """Refuse options out of range and names that nothing has."""
        super().__post_init__()
        for name, value, known in (
            ("kind", self.kind, ("miqcqp", "milp")),
            ("region", self.region, ("both", "closed", "strict")),
            ("formulation", self.formulation, FORMULATIONS),
        ):
            if value not in known:
                raise UnknownName(f"{name}={value!r}: there are {', '.join(map(repr, known))}.")

    @staticmethod
    def kind_of(query: Query, network: Network) -> Literal["miqcqp", "milp"]:
        """Which kind of program answers a query."""
        return kind_of(query, network.inputs, network.outputs)

    def __call__(self, network: Network, query: Query) -> Enclosure:
        """See `lipguard.exact.mixed_integer.mixed_integer`."""
        return mixed_integer(
            network, query, method=self.kind, solver=self.solver, region=self.region, time_limit=self.time_limit, gap=self.gap,
            threads=self.threads, formulation=self.formulation,
        )  # fmt: skip
