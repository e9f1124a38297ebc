"""Exact constants by mixed-integer programming: MIQCQP where a 2-norm enters, MILP between l1 and linf."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

from lipguard import registry
from lipguard.certificate import Certificate, Enclosure, Query, Status
from lipguard.errors import SolverFailed, SolverUnavailable, UnknownName, UnsupportedQuery
from lipguard.exact.degenerate import degenerate_subset
from lipguard.exact.encoding import Encoding
from lipguard.exact.preactivation import Bounds, bounds
from lipguard.exact.problem import Problem, problem
from lipguard.network import Network
from lipguard.outward import show_lower, show_upper
from lipguard.programs.mixed_integer import MixedIntegerProgram, MixedIntegerResult

_LOGGER = logging.getLogger("lipguard.exact")

FORMULATIONS = ("tightened", "published")
"""What may be known to a program besides the network: see `mixed_integer`."""

Formulation = Literal["tightened", "published"]

_DISAGREES = 1e-5
"""A solver's bound this far below a verified lower bound, relatively, is wrong and not used."""


def kind_of(query: Query, inputs: int, outputs: int) -> Literal["miqcqp", "milp"]:
    """Which kind of program answers the query: "milp" without any quadratic term, else "miqcqp"."""
    p, q = query.norm
    ball = query.domain is not None and getattr(query.domain, "norm", None) == 2.0 and inputs > 1
    return "miqcqp" if ball or (p == 2.0 and inputs > 1) or (q == 2.0 and outputs > 1) else "milp"


def mixed_integer(
    network: Network,
    query: Query,
    *,
    method: str = "miqcqp",
    solver: str = "auto",
    region: Literal["both", "closed", "strict"] = "both",
    time_limit: float | None = None,
    gap: float = 1e-6,
    threads: int = 1,
    formulation: Formulation = "tightened",
) -> Enclosure:
    """Lipschitz constant of a piecewise-linear network by a mixed-integer program.

    Args:
        network: piecewise linear.
        query: norms and domain; R^d is homogenised.
        method: "miqcqp" (any norms) or "milp" (no 2-norm of vectors or of the domain).
        solver: "gurobi", "scip", "highs", or "auto".
        region: "closed" bounds the constant from above; "strict", with a margin, from below; "both" starts with closed
            and, where its maximum belongs to no open region, adds strict and the exact repair until they meet.
        time_limit: seconds for everything; None for no limit.
        gap: relative gap at which to stop.
        threads: of the solver.
        formulation: "tightened" gives the program linear programs' ranges of pre-activations, products of norms as bounds
            of tangents, the best verified bound as a cut-off and the best sampled region as a start. "published" is the
            program of the paper with plain interval propagation and nothing else, for comparisons; its upper end is the
            solver's alone.
    Returns:
        The lower end is verified at a witness; the upper end is the solver's word, or a verified bound if that is better
        (and the formulation knows one).
    Raises:
        UnsupportedQuery: the method cannot state the query, or an activation is not piecewise linear.
        SolverUnavailable: no solver can take the program; the message says why, each.
    Source: Sbihi, Jan, Couellan 2024, arXiv:2402.01199; Jordan, Dimakis 2020, arXiv:2003.01219 for l1 and linf.
    """
    if region not in ("both", "closed", "strict"):
        raise UnknownName(f"region={region!r}: there are 'both', 'closed' and 'strict'.")
    if solver != "auto":
        registry.solver(solver, method)
    if formulation not in FORMULATIONS:
        raise UnknownName(f"formulation={formulation!r}: there are 'tightened' and 'published'.")
    task = problem(network, query, time_limit)
    return _Run(task, method, solver, region, gap, threads, formulation == "tightened").run()


@dataclass(eq=False)
class _Run:
    task: Problem
    method: str
    solver: str
    region: Literal["both", "closed", "strict"]
    gap: float
    threads: int
    tighten: bool
    used: str = ""
    status: Status = "closed"
    closed_region: float | None = None
    cuts: int = 0

    def run(self) -> Enclosure:
        task = self.task
        if self.method == "milp" and kind_of(task.query, task.form.inputs, task.form.outputs) == "miqcqp":
            p, q = task.query.norm
            raise UnsupportedQuery(
                f"method='milp' with norm=({p:g}, {q:g}) needs quadratic terms (or the domain is a 2-ball). "
                f"Use method='miqcqp' or 'branch-and-bound'."
            )
        # Verified if it can be had; the cut-off of the search and the result if the time is short.
        known = task.upper_certificate() if self.tighten else None
        upper = known or task.claim(math.inf, self.method, "lipguard", "no bound before the search")
        try:
            task.sample()
            task.improve()
            limits = bounds(task.form, task.domain, task.query.norm, tighten=self.tighten, deadline=self._half_way())
            if self.tighten and limits.norm < upper.value:
                upper = task.claim(limits.norm, self.method, "lipguard", "product of norms on the domain, in float64")
            upper = self._search(limits, upper)
        except KeyboardInterrupt:
            self.status = "interrupted"
        if self.status == "closed" and not self._done(upper.value):
            self.status = "gap reached"  # the solver's own: closed and true maximum differ, or one region alone was asked for
        if upper.value < task.lower:
            upper = dataclasses.replace(upper, value=task.lower)  # within the solver's tolerance, see _accept
        details: dict[str, float | int | str] = {"cuts": self.cuts}
        return task.enclosure(
            upper, self.status, self.method, solver=self.used, closed_region=self.closed_region, details=details
        )

    def _half_way(self) -> float | None:
        task = self.task
        return None if task.deadline is None else (task.started + task.deadline) / 2

    def _search(self, limits: Bounds, upper: Certificate) -> Certificate:
        if self.region == "strict":
            self._strict(Encoding(self.task, limits, "strict"), upper.value)
            return upper
        encoding = Encoding(self.task, limits, "closed")
        first = True
        tried_strict = False
        while True:
            result = self._solve(encoding, upper.value)
            if result is None:
                return upper
            value = encoding.to_norm(result.bound)
            if result.status == "infeasible":
                # The incumbent is a feasible point, which no cut removes and no cut-off excludes.
                self._say(f"{self.used} calls a program infeasible that has a solution; its word was not used.")
                self.status = "solver failed"
                return upper
            upper = self._accept(value, upper, result)
            if result.solution is None or result.status != "optimal":
                self._end(result)
                return upper
            pattern = encoding.pattern(result.solution)
            found = self.task.consider(pattern)
            reached, _ = self.task.norm(pattern)
            if first:
                self.closed_region = max(value, reached)
                first = False
            if self._done(upper.value):
                if self.closed_region is not None and self.closed_region <= self.task.lower * (1 + 10 * self.gap):
                    self._say("Closed and strict regions have the same maximum.")
                    self.closed_region = None
                elif self.closed_region is not None:
                    self._say(
                        f"The closed maximum {show_upper(self.closed_region, 9)} belongs to no open region: "
                        f"repaired by {self.cuts} cuts."
                    )
                return upper
            if self.region == "closed":
                self._say(f"The closed maximum {show_upper(value, 9)} belongs to no open region: region='both' repairs it.")
                return upper
            subset = degenerate_subset(self.task, pattern)
            if subset is None or not encoding.forbid(subset, pattern):
                self._say(f"The region of the maximiser is undecided (radius {found.radius:.1e}).")
                self.status = "gap reached" if self._done(upper.value) else "solver failed"
                return upper
            self.cuts += 1
            if not tried_strict:
                tried_strict = True
                self._strict(Encoding(self.task, limits, "strict"), upper.value)
                self.status = "closed"

    def _strict(self, encoding: Encoding, cutoff: float) -> None:
        """Improve the incumbent by the strict program, whose regions all have an interior."""
        result = self._solve(encoding, cutoff)
        if result is None:
            return
        if result.solution is not None:
            self.task.consider(encoding.pattern(result.solution))
        if result.status not in ("optimal", "infeasible"):
            self._end(result)
        if self.region == "strict" and result.status == "infeasible":
            self._say("No region has the margin asked for: a neuron is constant, or every region is thin.")

    def _solve(self, encoding: Encoding, cutoff: float) -> MixedIntegerResult | None:
        """The result of the first solver that takes the program; None if the time is over or all of them failed."""
        if self.task.expired:
            self.status = "time limit"
            return None
        program = encoding.program(cutoff, self.task.incumbent) if self.tighten else encoding.program()
        refused = []
        failed = False
        for name, entry in self._order(program).items():
            module = importlib.import_module(entry.path.partition(":")[0])
            refuses: Callable[[MixedIntegerProgram], str | None] = getattr(module, "refusal", lambda _: None)
            reason = refuses(program)
            if reason is not None:
                refused.append(reason)
                continue
            if refused:
                self._say(f"SolverUnavailable: {' '.join(refused)} Using {name}.")
            try:
                result = entry.load()(program, time_limit=self.task.remaining, gap=self.gap / 8, threads=self.threads)
            except SolverFailed as error:
                failed = True
                refused.append(f"SolverFailed: {error}")
                continue
            _LOGGER.info("%s, bound %.9g", result.message, encoding.to_norm(result.bound))
            self.used = name
            return result
        if not failed:
            raise SolverUnavailable(f"no solver can take this {self.method.upper()}: {' '.join(refused)}")
        self._say(" ".join(refused))
        self.status = "solver failed"
        return None

    def _order(self, program: MixedIntegerProgram) -> dict[str, registry.Entry]:
        """The solvers of this kind of program, the one that was asked for first."""
        order = registry.solvers("miqcqp" if program.quadratic else "milp")
        return order if self.solver == "auto" else {self.solver: registry.solvers()[self.solver]} | order

    def _accept(self, value: float, upper: Certificate, result: MixedIntegerResult) -> Certificate:
        """The solver's bound as the upper bound, if it is better and does not contradict what is known."""
        lower = self.task.lower
        if value < lower * (1 - _DISAGREES):
            self._say(
                f"{self.used}'s bound {show_upper(value, 9)} is below the lower bound {show_lower(lower, 9)} and was not used."
            )
            self.status = "solver failed"
            return upper
        value = max(value, lower)
        return self.task.claim(value, self.method, self.used, result.message) if value < upper.value else upper

    def _end(self, result: MixedIntegerResult) -> None:
        if result.status == "infeasible":
            return
        if result.status == "optimal":
            self.status = "solver failed"
        else:
            self.status = cast(Status, result.status)

    def _done(self, upper: float) -> bool:
        return upper - self.task.lower <= self.gap * max(upper, 1e-300)

    def _say(self, note: str) -> None:
        if note not in self.task.notes:
            self.task.notes.append(note)
            _LOGGER.info("%s", note)
