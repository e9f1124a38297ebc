"""Names of methods and solvers: where each lives, what it needs, and how another package adds one.

A method is `method(network, query, state) -> (Certificate, state)`; a LipSDP solver is
`solver(program, start, deadline) -> Proposal`. Entries are import paths, so that a name costs nothing until it is used.
Other packages add entries through the entry points `lipguard.bounds` and `lipguard.solvers`.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from lipguard.errors import SolverUnavailable, UnknownName


@dataclass(frozen=True)
class Entry:
    """A registered name.

    Attributes:
        path: "module:attribute" of the class to build.
        options: keyword arguments of the class.
        requires: modules that must be importable.
        hint: what to do when one is missing.
        solves: the kinds of problem a solver takes: "sdp", "milp", "miqcqp".
    """

    name: str
    path: str
    options: dict[str, Any] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    hint: str = ""
    solves: tuple[str, ...] = ()

    def build(self, **options: object) -> Any:
        """Import the class and call it with the entry's options, then the given ones."""
        module, attribute = self.path.split(":")
        return getattr(importlib.import_module(module), attribute)(**{**self.options, **options})


METHODS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("spectral", "lipguard.bounds.spectral:Spectral"),
        Entry("toeplitz", "lipguard.bounds.toeplitz:Toeplitz"),
        Entry("lipsdp-neuron", "lipguard.bounds.semidefinite:Semidefinite", {"tied": False}),
        Entry("lipsdp-layer", "lipguard.bounds.semidefinite:Semidefinite", {"tied": True}),
        Entry("contraction", "lipguard.bounds.implicit:Contraction"),
        Entry("lipsdp-split", "lipguard.bounds.split:Split"),
        Entry("lipsdp-channel", "lipguard.bounds.channel:Channel"),
        Entry("sampling", "lipguard.bounds.sampling:Sampling"),
    )
}


def _conic(name: str, hint: str) -> Entry:
    return Entry(name, "lipguard.solvers.conic:Conic", {"solver": name}, ("cvxpy", name), hint, ("sdp",))


def _mixed_integer(name: str, package: str, hint: str, solves: tuple[str, ...]) -> Entry:
    return Entry(name, f"lipguard.solvers.{name}:solve", {}, (package,), hint, solves)


SOLVERS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("interior-point", "lipguard.solvers.interior_point:InteriorPoint", solves=("sdp",)),
        Entry("low-rank", "lipguard.solvers.low_rank:LowRank", solves=("sdp",)),
        Entry("first-order", "lipguard.solvers.first_order:FirstOrder", solves=("sdp",)),
        _conic("scs", "pip install cvxpy scs"),
        _conic("clarabel", "pip install cvxpy clarabel"),
        _conic("cvxopt", "pip install cvxopt"),
        _conic("mosek", "pip install mosek, and a MOSEK licence file"),
        _mixed_integer("gurobi", "gurobipy", "pip install gurobipy; beyond 2000 variables a Gurobi licence", ("milp", "miqcqp")),
        _mixed_integer("scip", "pyscipopt", "pip install pyscipopt", ("milp", "miqcqp")),
        _mixed_integer("highs", "highspy", "pip install highspy", ("milp",)),
    )
}


def method(name: str) -> Entry:
    """The entry of a bound method.

    Raises:
        UnknownName: no such method; the message lists those there are.
    """
    return _find(name, METHODS, "lipguard.bounds", "method")


def solver(name: str) -> Entry:
    """The entry of a solver whose requirements are installed.

    Raises:
        UnknownName: no such solver; the message lists those there are.
        SolverUnavailable: a requirement is missing; the message says what to install.
    """
    entry = _find(name, SOLVERS, "lipguard.solvers", "solver")
    if not available(name):
        raise SolverUnavailable(f"solver {name!r} is not installed. {entry.hint}.")
    return entry


def solvers() -> dict[str, Entry]:
    """Every known solver, installed or not."""
    return {**SOLVERS, **_plugins("lipguard.solvers")}


def available(name: str) -> bool:
    """Whether all that the solver needs can be imported (a licence may still be missing)."""
    entry = _find(name, SOLVERS, "lipguard.solvers", "solver")
    return all(importlib.util.find_spec(module) is not None for module in entry.requires)


def _find(name: str, table: dict[str, Entry], group: str, what: str) -> Entry:
    if name in table:
        return table[name]
    known = {**table, **_plugins(group)}
    if name in known:
        return known[name]
    raise UnknownName(f"no {what} is called {name!r}. There are: {', '.join(known)}.")


def _plugins(group: str) -> dict[str, Entry]:
    return {point.name: Entry(point.name, point.value) for point in entry_points(group=group)}
