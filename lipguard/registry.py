"""Names of methods and solvers: where each lives, what it solves, takes and needs, and how another package adds one.

A method is a frozen dataclass whose fields are its options, called as `method(network, query, state) -> (Certificate, state)`
(`lipguard.bounds.method.Method`). A solver of semidefinite programs is called as `solver(program, start, deadline) -> Proposal`;
one of mixed-integer programs is a function `solve(program, *, time_limit, gap, threads) -> MixedIntegerResult`, beside which
its module may have `refusal(program) -> str | None`. Entries are import paths, so that a name costs nothing until it is used.

Other packages add entries through the entry points `lipguard.bounds` and `lipguard.solvers`, whose objects are what is built,
or an `Entry` that says more; or in a session by `METHODS["name"] = Entry(...)`, `SOLVERS["name"] = Entry(...)`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lipguard.errors import SolverUnavailable, UnknownName, UnsupportedQuery

KINDS = ("sdp", "milp", "miqcqp")
"""What a solver may solve: semidefinite, mixed-integer linear, mixed-integer quadratically constrained programs."""


@dataclass(frozen=True)
class Entry:
    """A registered name.

    Attributes:
        path: "module:attribute" of the class to build, or of the function.
        options: keyword arguments of the class that the name stands for.
        requires: modules that must be importable.
        hint: what to do when one is missing.
        solves: the kinds of problem a solver takes: "sdp", "milp", "miqcqp".
        least_tol: the least tolerance that a solver is asked for: its last steps cost more than they give.
    """

    name: str
    path: str
    options: dict[str, Any] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    hint: str = ""
    solves: tuple[str, ...] = ()
    least_tol: float = 0.0

    def load(self) -> Any:
        """What the path names, imported."""
        module, attribute = self.path.split(":")
        return getattr(importlib.import_module(module), attribute)

    def build(self, **options: object) -> Any:
        """Import the class and call it with the entry's options, then the given ones."""
        return self.load()(**{**self.options, **options})

    def takes(self) -> tuple[str, ...]:
        """Names of the options that a caller may give: the parameters of what is built, less those that the name fixes."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(self.load()).parameters.values()
        return tuple(p.name for p in parameters if p.kind in kinds and p.name not in self.options)


def _table(*entries: Entry) -> dict[str, Entry]:
    return {entry.name: entry for entry in entries}


METHODS: dict[str, Entry] = _table(
    Entry("spectral", "lipguard.bounds.spectral:Spectral"),
    Entry("toeplitz", "lipguard.bounds.toeplitz:Toeplitz"),
    Entry("lipsdp-neuron", "lipguard.bounds.semidefinite:Semidefinite", {"tied": False}),
    Entry("lipsdp-layer", "lipguard.bounds.semidefinite:Semidefinite", {"tied": True}),
    Entry("contraction", "lipguard.bounds.implicit:Contraction"),
    Entry("lipsdp-split", "lipguard.bounds.split:Split"),
    Entry("lipsdp-channel", "lipguard.bounds.channel:Channel"),
    Entry("sampling", "lipguard.bounds.sampling:Sampling"),
)

EXACT: dict[str, Entry] = _table(
    Entry("enumeration", "lipguard.exact.methods:Enumeration"),
    Entry("miqcqp", "lipguard.exact.methods:MixedInteger", {"kind": "miqcqp"}),
    Entry("milp", "lipguard.exact.methods:MixedInteger", {"kind": "milp"}),
    Entry("branch-and-bound", "lipguard.exact.methods:BranchAndBound"),
)
"""Methods of `lipguard.exact`."""


def _conic(name: str, hint: str) -> Entry:
    return Entry(name, "lipguard.solvers.conic:Conic", {"solver": name}, ("cvxpy", name), hint, ("sdp",))


def _mixed_integer(name: str, package: str, hint: str, solves: tuple[str, ...]) -> Entry:
    return Entry(name, f"lipguard.solvers.{name}:solve", {}, (package,), hint, solves)


SOLVERS: dict[str, Entry] = _table(
    Entry("interior-point", "lipguard.solvers.interior_point:InteriorPoint", solves=("sdp",)),
    Entry("low-rank", "lipguard.solvers.low_rank:LowRank", solves=("sdp",), least_tol=1e-6),
    Entry("first-order", "lipguard.solvers.first_order:FirstOrder", solves=("sdp",)),
    _conic("scs", "pip install cvxpy scs"),
    _conic("clarabel", 'pip install "lipguard[clarabel]"'),
    _conic("cvxopt", 'pip install "lipguard[cvxopt]"'),
    _conic("mosek", 'pip install "lipguard[mosek]", and a MOSEK licence file'),
    _mixed_integer("gurobi", "gurobipy", "pip install gurobipy; beyond 2000 variables a Gurobi licence", ("milp", "miqcqp")),
    _mixed_integer("highs", "highspy", 'pip install "lipguard[highs]"', ("milp",)),
    _mixed_integer("scip", "pyscipopt", 'pip install "lipguard[scip]"', ("milp", "miqcqp")),
)
"""In the order in which "auto" tries mixed-integer solvers."""


def methods() -> dict[str, Entry]:
    """Every known bound method, those of other packages last."""
    return {**_plugins("lipguard.bounds"), **METHODS}


def solvers(kind: str | None = None) -> dict[str, Entry]:
    """Every known solver, installed or not; of one kind of problem where that is given."""
    known = {**SOLVERS, **{k: v for k, v in _plugins("lipguard.solvers").items() if k not in SOLVERS}}
    return {name: entry for name, entry in known.items() if kind is None or kind in entry.solves}


def method(name: str) -> Entry:
    """The entry of a bound method.

    Raises:
        UnknownName: no such method; the message lists those there are.
    """
    return METHODS[name] if name in METHODS else _find(name, methods(), "method")


def exact_method(name: str) -> Entry:
    """The entry of a method of `lipguard.exact`.

    Raises:
        UnknownName: no such method; the message lists those there are.
    """
    return _find(name, EXACT, "exact method", ("auto",))


def solver(name: str, kind: str | None = None) -> Entry:
    """The entry of a solver whose requirements are installed.

    Args:
        name: of the solver.
        kind: what it is to solve, "sdp", "milp" or "miqcqp"; None for anything.
    Raises:
        UnknownName: no such solver; the message lists those there are.
        UnsupportedQuery: it does not solve this kind of problem.
        SolverUnavailable: a requirement is missing; the message says what to install.
    """
    entry = SOLVERS[name] if name in SOLVERS else _find(name, solvers(), "solver", ("auto",))
    if kind is not None and kind not in entry.solves:
        solved = " and ".join(one.upper() for one in entry.solves) or "nothing that it states"
        raise UnsupportedQuery(
            f"solver {name!r} solves {solved}, not {kind.upper()}. "
            f"Use {_listed(name for name in solvers(kind) if available(name))} or 'auto'."
        )
    missing = [module for module in entry.requires if importlib.util.find_spec(module) is None]
    if missing:
        raise SolverUnavailable(f"solver {name!r} is not installed: {', '.join(missing)} is missing. {entry.hint}.")
    return entry


def available(name: str) -> bool:
    """Whether all that the solver needs can be imported (a licence may still be missing)."""
    entry = _find(name, solvers(), "solver")
    return all(importlib.util.find_spec(module) is not None for module in entry.requires)


def unknown(what: str, name: object, known: Iterable[str]) -> UnknownName:
    """The error of a name that nothing has, with the nearest one that exists."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, 1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownName(f"no {what} is called {name!r}.{meant} There are: {', '.join(known)}.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _find(name: str, known: Mapping[str, Entry], what: str, besides: tuple[str, ...] = ()) -> Entry:
    if name in known:
        return known[name]
    raise unknown(what, name, (*known, *besides))


@cache
def _plugins(group: str) -> dict[str, Entry]:
    """Entries of other packages; one that cannot be imported is reported once and left out."""
    found: dict[str, Entry] = {}
    for point in entry_points(group=group):
        try:
            found[point.name] = _entry(point)
        except Exception as error:  # whatever a foreign package raises while it is imported, lipguard's own names work
            text = f"{type(error).__name__}: {error}"
            warnings.warn(f"the entry point {point.name!r} of {group} cannot be loaded and is left out: {text}", stacklevel=3)
    return found


def _entry(point: EntryPoint) -> Entry:
    made = point.load()
    if isinstance(made, Entry):
        return replace(made, name=point.name)
    path = point.value.split(" ")[0]
    solves = tuple(getattr(made, "solves", ("sdp",) if point.group == "lipguard.solvers" else ()))
    return Entry(point.name, path, solves=solves, hint=f"see the documentation of {point.value.split('.')[0]}")
