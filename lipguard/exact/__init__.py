"""Exact Lipschitz constants of piecewise-linear networks, and enclosures where the time ends first."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, Literal

from lipguard import registry
from lipguard.bounds.method import check_options, refuse_untaken
from lipguard.bounds.spectral import Spectral
from lipguard.capture import Model, network_of
from lipguard.certificate import Domain, Enclosure, Query
from lipguard.errors import UnsupportedQuery
from lipguard.exact.enumeration import region_estimate
from lipguard.exact.methods import BranchAndBound, ExactMethod
from lipguard.exact.mixed_integer import kind_of
from lipguard.exact.preactivation import bounds
from lipguard.exact.problem import problem
from lipguard.network import Network
from lipguard.outward import show_upper
from lipguard.programs.rewriting import elementwise
from lipguard.query import Inputs, Norm, Outputs

__all__ = ["METHODS", "exact"]

METHODS = tuple(registry.EXACT)
"""What `method` may be, besides "auto"."""

_ENTRIES = 2e8
"""Size of the matrices of all parts of R^d up to which `auto` takes branch and bound."""

_REGIONS = 1e5
"""Where branch and bound cannot answer `auto` enumerates up to this estimated number of regions: on boxes and balls
a hundredth of them exist as a rule, a few seconds of linear programs (2-20-20-2 on [-1, 1]^2: estimate 45000, regions
268, 3 s)."""

_BOUNDS_SECONDS = 5.0
"""How long `auto` may tighten the bounds of neurons to learn which are in doubt."""


def exact(
    model: Model,
    example: Any = None,
    *,
    domain: Domain | None = None,
    norm: Norm = 2,
    method: str | ExactMethod = "auto",
    solver: str = "auto",
    region: Literal["both", "closed", "strict"] | None = None,
    time_limit: float | None = None,
    gap: float = 1e-6,
    threads: int | None = None,
    formulation: Literal["tightened", "published"] | None = None,
    outputs: Outputs | None = None,
    inputs: Inputs | None = None,
    submodule: str | None = None,
) -> Enclosure:
    """Lipschitz constant of a piecewise-linear network: exact, or the enclosure that the time allows.

    Args:
        model: a module, with an `example` input of shape (1, ...), or a captured `Network`.
        example: an input to trace the module with.
        domain: Box, Ball, or None for all of R^d.
        norm: 1, 2 or inf, or a pair (input, output).
        method: "enumeration", "miqcqp", "milp", "branch-and-bound", or "auto"; or a method object, which states its options.
        solver: "gurobi", "scip", "highs", or one registered by another package, for the mixed-integer methods; or "auto".
        region: for the mixed-integer methods: "closed" (upper bounds), "strict" (lower bounds), or "both", which
            repairs the cases where they differ.
        time_limit: seconds; None for no limit. Ctrl-C returns the enclosure known by then.
        gap: relative gap (upper - lower) / upper at which to stop.
        threads: of the solver.
        formulation: of the mixed-integer methods: with lipguard's bounds ("tightened"), or the program as "published",
            with interval propagation alone, to compare solvers by.
        outputs: a matrix (k, m) applied to the outputs, or a pair of classes (i, j) for the margin y_i - y_j.
        inputs: with respect to what: a matrix (d, k), or which of several input tensors, by its place or name, or a tuple of
            several. None: all of them of floating point, jointly; the `choice` says which.
        submodule: name of the submodule to bound instead of the whole.
    Returns:
        lower <= constant <= upper. The lower end is verified; `upper_certificate.rigor` says whether the upper is.
    Raises:
        UnsupportedQuery: an activation is not piecewise linear, or the method cannot answer for this norm or domain, or has no
            use for an option that is given.
        InvalidDomain: the domain is empty, reversed, or of another dimension.
        SolverUnavailable: no installed solver takes the program.
        UnknownName: no such method, solver or region.
        InvalidExample: a module is given without an example.
    """
    query = Query(norm, domain, outputs, inputs, submodule, example)
    given = {"region": region, "threads": threads, "formulation": formulation, "solver": None if solver == "auto" else solver}
    given = {name: value for name, value in given.items() if value is not None}
    common = {"gap": gap, "time_limit": time_limit}
    check_options(given | common, "exact")
    chosen = None if method == "auto" else _built(method, given, common)
    network, query = network_of(model, query), query.of_network()
    problem(network, query)  # bad input is refused here, before any method starts
    if chosen is not None:
        enclosure = _not_above_product(network, query, chosen(network, query), chosen.gap)
        return dataclasses.replace(enclosure, choice=" ".join(filter(None, (enclosure.choice, _stated(network)))))
    started = time.monotonic()
    name, choice = choose(network, query)
    enclosure = _run(name, network, query, given, common)
    unused = [f"{option}={value!r}" for option, value in given.items() if option not in registry.exact_method(name).takes()]
    choice = f"{choice} It has no use for {', '.join(unused)}." if unused else choice
    unsettled = enclosure.closed_region is not None or enclosure.status == "solver failed"
    if name == "branch-and-bound" and unsettled and enclosure.gap > gap:
        left = None if time_limit is None else max(time_limit - (time.monotonic() - started), 1.0)
        name, why = without_interior(network, query)
        choice = f"{choice} {why}"
        enclosure = _narrower(enclosure, _run(name, network, query, given | {"region": "both"}, common | {"time_limit": left}))
    enclosure = _not_above_product(network, query, enclosure, gap)
    return dataclasses.replace(enclosure, choice=" ".join(filter(None, (choice, enclosure.choice, _stated(network)))))


def _stated(network: Network) -> str:
    """With respect to what, where that was chosen among several inputs."""
    return f"{network.respect[0].upper()}{network.respect[1:]}." if network.respect else ""


def _built(method: str | ExactMethod, given: dict[str, Any], common: dict[str, Any]) -> ExactMethod:
    """The method of this name with the options given; a method object as it is."""
    if isinstance(method, str):
        entry = registry.exact_method(method)
        refuse_untaken(f"method={method!r}", given, entry.takes())
        return entry.build(**given, **common)
    if not isinstance(method, ExactMethod):
        raise UnsupportedQuery(f"method is {type(method).__name__}: give a name, such as 'branch-and-bound', or a method object.")
    if given or common != {"gap": 1e-6, "time_limit": None}:
        raise UnsupportedQuery(f"a method object states its own options: give them to {type(method).__name__}(...).")
    return method


def _run(name: str, network: Network, query: Query, given: dict[str, Any], common: dict[str, Any]) -> Enclosure:
    """The method that was chosen, with the options that it takes."""
    entry = registry.exact_method(name)
    taken = entry.takes()
    return entry.build(**{option: v for option, v in given.items() if option in taken}, **common)(network, query)


def _not_above_product(network: Network, query: Query, enclosure: Enclosure, gap: float) -> Enclosure:
    """The enclosure of an unfinished search, its upper end no more than the product of the layers' norms."""
    if enclosure.gap <= gap:
        return enclosure
    product, _ = Spectral()(network, query)
    if product.value >= enclosure.upper:
        return enclosure
    text = f"The product of the layers' norms, {show_upper(product.value)}, is less than what {enclosure.method} proves by then."
    return dataclasses.replace(enclosure, upper_certificate=product, choice=f"{enclosure.choice} {text}".strip())


def choose(network: Network, query: Query) -> tuple[str, str]:
    """The method `auto` takes for a query, and a sentence that says why: branch and bound wherever it answers."""
    size = f"{network.inputs} inputs, {elementwise(network).neurons} neurons"
    p, q = query.norm
    if query.norm not in BranchAndBound.norms:
        refusal = f"branch and bound has no bound for norm ({p:g}, {q:g})"
    elif (refusal := _refusal(network, query)) is None:
        return "branch-and-bound", f"Branch and bound: {size}; both its bounds are verified."
    method, why = without_interior(network, query)
    return method, f"{why} ({refusal}.)"


def without_interior(network: Network, query: Query) -> tuple[str, str]:
    """The best method for the true constant besides branch and bound, and a sentence that says why."""
    task = problem(network, query)
    known = bounds(task.form, task.domain, query.norm, deadline=time.monotonic() + _BOUNDS_SECONDS)
    regions = region_estimate(task.form, known)
    count = "more than 1e12" if math.isinf(regions) else f"at most {regions:.0f}"
    size = f"{network.inputs} inputs, {task.form.size} neurons, {len(known.doubtful)} of them in doubt, {count} regions"
    kind = kind_of(query, network.inputs, network.outputs)
    installed = [solver for solver in registry.solvers(kind) if registry.available(solver)]
    if regions <= _REGIONS or not installed:
        return "enumeration", f"Enumeration: {size}."
    return kind, f"{kind.upper()}: {size}; installed: {', '.join(installed)}."


def _refusal(network: Network, query: Query) -> str | None:
    """Why branch and bound does not take the query; None if it does."""
    if query.domain is not None:
        return None
    functions = [node.elementwise.piecewise for node in network.nodes if node.elementwise is not None]
    if any(bool((function.breaks != 0).any()) for function in functions if function is not None):
        return "on all of R^d branch and bound needs break points at 0"
    n, d = elementwise(network).neurons, network.inputs
    if (2 * d + 1) * n * (n + d) > _ENTRIES:
        return f"on all of R^d branch and bound would start with {2 * d + 1} parts of {n} neurons each"
    return None


def _narrower(first: Enclosure, second: Enclosure) -> Enclosure:
    """The better bounds of both; the second counts regions with an interior only, and its upper bound is approximate."""
    lower = max(first, second, key=lambda enclosure: enclosure.lower)
    if second.status != "closed" or not lower.lower <= second.upper < first.upper:
        return dataclasses.replace(
            first,
            lower_certificate=lower.lower_certificate,
            witness=lower.witness,
            choice=f"{first.choice} {second.method} did not improve on it.",
        )
    closed = f"The verified bound of closed regions is {show_upper(first.upper, 9)}"
    choice = f"{first.choice} {closed}; {second.method} says that the true "
    return dataclasses.replace(
        second,
        lower_certificate=lower.lower_certificate,
        witness=lower.witness,
        seconds=first.seconds + second.seconds,
        closed_region=first.closed_region,
        choice=f"{choice}constant is {show_upper(second.upper, 9)}. {second.choice}".strip(),
        details={**second.details, "verified_upper": first.upper},
    )
