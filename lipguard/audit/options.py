"""What an audit is asked for: a query, and how far to go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lipguard import registry
from lipguard.audit.encoding import finite
from lipguard.bounds.method import check_options
from lipguard.certificate import Domain, Norm, domain_from_json
from lipguard.errors import UnsupportedQuery
from lipguard.query import Inputs, Outputs, Query

__all__ = ["Options"]


@dataclass(frozen=True, eq=False, init=False)
class Options:
    """What an audit is asked for.

    Args:
        norm: 1, 2 or inf, or a pair (input, output).
        domain: Box, Ball or None for all inputs.
        method: "auto" or an exact method of `lipguard.exact`; "bounds" for `lipguard.bound` and sampling alone.
        solver: as for `lipguard.exact`.
        time_limit: seconds for one audit.
        gap: relative gap at which to stop.
        query: where the other fields of the query start from; its example is left out.
        submodule, outputs, inputs: as for `lipguard.bound`.
    Attributes:
        query: all of that but method, solver, time_limit and gap.
    Raises:
        LipguardError: a field of the query has no meaning for any model.
    """

    query: Query
    method: str
    solver: str
    time_limit: float
    gap: float

    def __init__(
        self,
        norm: Norm | None = None,
        domain: Domain | str | Mapping[str, Any] | None = None,
        method: str = "auto",
        solver: str = "auto",
        time_limit: float = 60.0,
        gap: float = 1e-6,
        *,
        query: Query | None = None,
        submodule: str | None = None,
        outputs: Outputs | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        fields = {"norm": norm, "domain": domain, "submodule": submodule, "outputs": outputs, "inputs": inputs}
        given = {name: value for name, value in fields.items() if value is not None}
        whole = replace(query or Query(), **given, example=None)
        values = {"query": whole, "method": method, "solver": solver, "time_limit": time_limit, "gap": gap}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def norm(self) -> tuple[float, float]:
        """The (input, output) norms."""
        return self.query.norm

    @property
    def domain(self) -> Domain | None:
        """The domain, None for all inputs."""
        return self.query.domain

    def check(self) -> None:
        """Refuse what no network could make valid.

        Raises:
            LipguardError: an unknown method or solver, an empty or reversed domain, a time limit that is not positive.
        """
        if self.method not in ("auto", "bounds"):
            registry.exact_method(self.method)
        check_options({"solver": self.solver, "gap": self.gap}, "an audit")
        number = isinstance(self.time_limit, int | float) and not isinstance(self.time_limit, bool)
        if not number or not 0 < self.time_limit < float("inf"):
            raise UnsupportedQuery(f"time_limit={self.time_limit!r} must be positive and finite, in seconds, such as 60.")
        if self.domain is not None:
            ends = (value for name in ("lower", "upper", "center") if (value := getattr(self.domain, name, None)) is not None)
            self.domain.bounds(max(_length(end) for end in ends))

    def asking(self, **fields: Any) -> Options:
        """The same with fields of the query where they are given.

        Raises:
            UnsupportedQuery: one of them is there already with another value.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        changed = replace(self, query=replace(self.query, **given))
        before, after = self.query.json(), changed.query.json()
        for name in given:
            if before[name] is not None and before[name] != after[name]:
                twice = f"{name} is given twice, {before[name]!r} and {after[name]!r}"
                raise UnsupportedQuery(f"{twice}. Leave it out of the options, or give it there alone.")
        return changed

    def json(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(query, options) as JSON values of a record."""
        query = {name: finite(value) if name == "domain" else value for name, value in self.query.json().items()}
        return query, {"method": self.method, "solver": self.solver, "time_limit": float(self.time_limit), "gap": float(self.gap)}

    @staticmethod
    def of(query: Mapping[str, Any], options: Mapping[str, Any]) -> Options:
        """Inverse of `json`."""
        asked = Query.of_json(query, domain_from_json(query["domain"]))
        return Options(query=asked, **options)


def _length(value: float | Sequence[float] | Tensor) -> int:
    return value.numel() if isinstance(value, Tensor) else len(value) if isinstance(value, Sequence) else 1
