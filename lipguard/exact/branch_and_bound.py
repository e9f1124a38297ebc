"""Branch and bound on activation phases: exact constants for any norm, with leaves that the checker accepts.

A node fixes the phases of some neurons. Ranges and phases that follow are derived by the checker's own rigorous
propagation; linear programs refute assignments that no input has, with multipliers as evidence, or yield an input. Those
of all neurons of all new nodes are solved as one batch, so that only neurons that divide their node are branched on.
For the 2-norm LipSDP over the neurons still free bounds every region below the node, from the parent's multipliers,
and only until it falls under the incumbent; for other norms interval Jacobians do (Bhowmick et al., LipBaB,
arXiv:2105.05495). The search takes the largest bounds first and can be stopped at any time: the nodes left are leaves.

Source: the combination is ours; the patterns' program is that of Sbihi, Jan, Couellan, arXiv:2402.01199.
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lipguard.certificate import Certificate, Enclosure, Leaf, Partition, Query, Status
from lipguard.errors import NotCertified
from lipguard.exact.feasibility import Feasibility, feasibility, pattern_at
from lipguard.exact.flatness import THIN, flat_weights
from lipguard.exact.memory import memory_share
from lipguard.exact.node_bounds import node_bounds
from lipguard.exact.problem import problem
from lipguard.exact.search import BATCH, FINE, Child, Known, Node, Search
from lipguard.exact.sides import Decided, decide
from lipguard.network import Network
from lipguard.outward import show_upper
from lipguard.solvers.threads import one_thread
from lipguard.verify import verify
from lipguard.verify.domain.localized import Reduced
from lipguard.verify.phases.partition import semidefinite
from lipguard.verify.phases.phase_form import PhaseForm, phase_form
from lipguard.verify.phases.phases import Implied, imply, reduce, refutes

_LOGGER = logging.getLogger("lipguard.exact")
_BATCH_SECONDS = 0.5
"""A batch is made smaller where it would take more processor time: the time limit is looked at in between."""
_SOON = 0.25
_FINE_SECONDS = 1.0
"""A search that took no more processor time than this goes on to a gap of `FINE`, for as long as this may take."""
_CLIMB_SECONDS = 0.2
"""How long the regions around a new incumbent are tried."""
_CLIMBS_FROM, _CLIMBS_SHARE = 0.4, 0.05
"""Processor time after which incumbents are looked for from elsewhere as well, and the share of it that this may take."""
_SMALLEST = 1e-100
"""Least value that is claimed: its square must be a number."""
_MEMORY = 0.8
"""Share of the machine's memory at which the search ends."""


def branch_and_bound(network: Network, query: Query, *, time_limit: float | None = None, gap: float = 1e-6) -> Enclosure:
    """The enclosure of the constant that the time allows, both ends verified.

    Args:
        network: piecewise linear.
        query: norms and domain.
        time_limit: seconds for the search; the check of what it found comes on top.
        gap: relative gap (upper - lower) / upper at which the search ends.
    Raises:
        UnsupportedQuery, InvalidDomain: see `lipguard.exact.exact`; on R^d break points must be at 0.
    """
    with one_thread():
        task = problem(network, query, time_limit)
        form = phase_form(network, query.domain)
        deadline = math.inf if time_limit is None else time.monotonic() + time_limit
        search = Search(form, task, gap, deadline)
        try:
            task.sample()
            task.improve(seconds=2.0)
            _roots(search)
            status = _run(search)
        except KeyboardInterrupt:
            status = "interrupted"
        if not search.evidence:
            _roots(search)  # a bound there must be
        value, evidence = search.upper, search.evidence
        if status == "closed" and gap > FINE and time.thread_time() - search.began < _SOON:
            value, evidence = _refine(search)
        return _conclude(search, status, value, evidence, gap)


def _roots(search: Search) -> None:
    count, n = len(search.form.lower), search.form.neurons
    roots, ones = torch.full((count, n), -1, dtype=torch.long), torch.ones(count, n, dtype=torch.float64)
    _evaluate(search, roots, torch.arange(count), ones, torch.full((count,), math.nan, dtype=torch.float64), [None] * count)


def _run(search: Search) -> Status:
    try:
        while search.heap:
            if search.upper <= search.target:
                return "closed"
            if time.monotonic() > search.deadline:
                return "time limit"
            if memory_share() > _MEMORY:
                return "memory limit"
            _climb(search)
            _expand(search)
    except KeyboardInterrupt:
        return "interrupted"
    return "closed"


def _climb(search: Search) -> None:
    """Look for incumbents from other inputs now and then: on many inputs the relaxations' points are poor ones."""
    spent = time.thread_time() - search.began
    if spent > _CLIMBS_FROM and search.climbed < _CLIMBS_SHARE * spent:
        search.starts += 1
        search.task.restart(search.starts)
        search.climbed += time.thread_time() - search.began - spent


def _refine(search: Search) -> tuple[float, tuple[Leaf, ...]]:
    """Go on to a gap of `FINE` for a moment: the bound then, or the one before, with its leaves."""
    value, evidence, closed = search.upper, search.evidence, search.closed
    search.gap, search.deadline = FINE, min(search.deadline, time.monotonic() + _FINE_SECONDS)
    reopened = [node for node in search.done if node.bound > search.target and node.branch >= 0]
    again = [*reopened, *(node for _, _, node in search.heap)]
    search.done = [node for node in search.done if node.bound <= search.target or node.branch < 0]
    search.proved, search.heap = max((node.bound for node in search.done), default=0.0), []
    if again:
        try:
            _evaluate(search, *_columns([(node, node.decisions, node.points[0]) for node in again]))
        except KeyboardInterrupt:
            return value, evidence
    finished = _run(search) == "closed" and search.closed == closed
    search.closed = closed
    return (search.upper, search.evidence) if finished else (value, evidence)


def _expand(search: Search) -> None:
    """Branch the nodes of largest bounds and evaluate their children as one batch."""
    started = time.thread_time()
    parents: list[Node] = []
    children: list[Child] = []
    try:
        # Interrupted anywhere, a node may be kept twice but is never lost.
        while search.heap and len(parents) < search.batch:
            node = search.heap[0][2]
            if node.bound <= search.target or node.branch < 0:
                search.finish(node)
            else:
                parents.append(node)
            heapq.heappop(search.heap)
        for node in parents:
            for piece in range(len(search.form.pieces)):
                child = node.decisions.clone()
                child[node.branch] = piece
                children.append((node, child, next((known for known in node.points if _within(known, child)), None)))
        if parents:
            _evaluate(search, *_columns(children))
            each = max(time.thread_time() - started, 1e-6) / len(parents)
            search.batch = max(1, min(BATCH, int(_BATCH_SECONDS / each)))
    except KeyboardInterrupt:
        for node in parents:
            search.push(node)
        raise


def _columns(children: list[Child]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Known]]:
    """Decisions, parts, multipliers, squared bounds and points of (parent, decisions, point)."""
    parents, decisions, points = zip(*children, strict=True)
    bounds = torch.tensor([node.bound for node in parents], dtype=torch.float64)
    parts, t = torch.tensor([node.part for node in parents]), torch.stack([node.t for node in parents])
    return torch.stack(decisions), parts, t, bounds**2, list(points)


def _evaluate(
    search: Search,
    decisions: Tensor,
    parts: Tensor,
    t: Tensor,
    rho: Tensor,
    points: list[Known],
) -> None:
    """Bound new nodes; nothing is added to the search before all of it succeeded."""
    form, task = search.form, search.task
    before = task.lower
    ranges = imply(form, decisions, parts)
    empty = ranges.empty.tolist()
    search.nodes += len(decisions)
    leaves = [Leaf(decisions[i].to(torch.int8), empty=True, part=int(parts[i])) for i in range(len(decisions)) if empty[i]]
    alive = (~ranges.empty).nonzero()[:, 0]
    nodes: list[Node] = []
    if len(alive):
        ranges, decisions, parts, t, rho = ranges.pick(alive), decisions[alive], parts[alive], t[alive], rho[alive]
        points = [points[i] for i in alive.tolist()]
        reduced = reduce(form, ranges)
        open_ = [i for i, point in enumerate(points) if point is None]
        found: list[Feasibility | None] = [None] * len(points)
        for i, outcome in zip(open_, feasibility(form, ranges, reduced, open_), strict=True):
            found[i] = outcome
        refuted = _refuted(form, ranges, found)
        for i in refuted.nonzero()[:, 0].tolist():
            outcome = found[i]
            assert outcome is not None
            leaves.append(Leaf(decisions[i].to(torch.int8), empty=True, farkas=outcome.farkas, part=int(parts[i])))
        search.refuted += int(refuted.sum())
        for i, outcome in enumerate(found):
            if outcome is not None and not refuted[i]:
                point = _try_point(search, outcome.point)
                points[i] = point if _within(point, ranges.phases[i]) else None
                if outcome.margin <= THIN:
                    points[i] = None  # a child's own program must find out whether it is flat
                    refuted[i] = _flat(search, leaves, decisions[i], ranges, reduced, i, int(parts[i]))
        kept = (~refuted).nonzero()[:, 0]
        if len(kept):
            norm = task.query.norm
            points = [points[i] for i in kept.tolist()]
            settled = _decide(search, decisions[kept], parts[kept], ranges.pick(kept), reduced.pick(kept), points)
            leaves += settled.leaves
            decisions, parts, ranges, reduced = settled.decisions, parts[kept], settled.ranges, settled.reduced
            bounds, multipliers, branches = node_bounds(form, norm, ranges, reduced, t[kept], rho[kept], search.effort)
            if search.fine and norm == (2.0, 2.0):
                # So near the optimum the checker's rounding counts: what it refuses must be branched.
                proved = semidefinite(form, reduced, multipliers, search.target)
                bounds = torch.where(proved | (branches < 0), bounds, bounds.clamp_min(search.target * (1 + 1e-9)))
            for i, bound in enumerate(bounds.tolist()):
                node = Node(decisions[i], ranges.phases[i], bound, multipliers[i], int(branches[i]), part=int(parts[i]))
                if bound > search.target and node.branch < 0:
                    # A single region: its norm is attained if it has an interior, and else only on the closed side.
                    found_interior = task.consider(search.own(node.phases.numpy().astype(np.intp)))
                    if not found_interior.exists and _flat(search, leaves, decisions[i], ranges, reduced, i, node.part):
                        continue
                elif bound > search.target:
                    other = settled.beyond[i].get(node.branch)
                    node.points = (points[i], None if other is None else _try_point(search, other))
                nodes.append(node)
    search.leaves += leaves
    for node in nodes:
        if node.bound <= search.target:
            search.finish(node)
        elif node.branch < 0:
            search.closed = max(search.closed, node.bound)
            search.finish(node)
        else:
            search.push(node)
    if task.lower > before:
        task.improve(seconds=_CLIMB_SECONDS)


def _flat(search: Search, leaves: list[Leaf], decisions: Tensor, ranges: Implied, reduced: Reduced, i: int, part: int) -> bool:
    """Whether region i is proved to have no interior; it is a leaf then."""
    weights = flat_weights(search.form, ranges, reduced, i, part)
    if weights is not None:
        search.flat += 1
        leaves.append(Leaf(decisions.to(torch.int8), part=part, flat=weights))
    return weights is not None


def _decide(search: Search, decisions: Tensor, parts: Tensor, ranges: Implied, reduced: Reduced, points: list[Known]) -> Decided:
    """Decide the neurons that do not divide their regions."""
    patterns = ranges.phases.clamp_min(0)
    for i, point in enumerate(points):
        if point is not None:
            patterns[i] = torch.from_numpy(point[1])
    settled = decide(search.form, decisions, parts, ranges, reduced, patterns)
    search.refuted += len(settled.leaves)
    return settled


def _try_point(search: Search, point: np.ndarray) -> Known:
    """An input of the phase form with its pattern, whose region may improve the incumbent; None if it is no input at all."""
    task = search.task
    if search.form.directions:
        if len(point) > task.form.inputs and point[-1] <= 1e-12:
            return None
    elif task.query.domain is not None:
        point = task.query.domain.project(torch.from_numpy(point)).numpy()
    pattern = pattern_at(search.form, point)
    key = pattern.astype(np.int8).tobytes()
    if key not in search.seen:
        search.seen.add(key)
        own = search.own(pattern)
        if task.norm(own)[0] > task.lower:
            task.consider(own)
    return point, pattern


def _within(known: Known, phases: Tensor) -> bool:
    """Whether a known input has the phases that are not free."""
    if known is None:
        return False
    fixed = phases.numpy() >= 0
    return bool((known[1][fixed] == phases.numpy()[fixed]).all())


def _refuted(form: PhaseForm, ranges: Implied, found: list[Feasibility | None]) -> Tensor:
    """Which infeasible relaxations the checker's test refutes as well."""
    asked = [i for i, outcome in enumerate(found) if outcome is not None and outcome.farkas is not None]
    result = torch.zeros(len(found), dtype=torch.bool)
    if asked:
        which = torch.tensor(asked)
        farkas = torch.stack([found[i].farkas for i in asked])  # type: ignore[union-attr,misc]
        result[which] = refutes(form, ranges.pick(which), farkas)
    return result


def _conclude(search: Search, status: Status, value: float, leaves: tuple[Leaf, ...], gap: float) -> Enclosure:
    task = search.task
    searched = time.monotonic() - task.started
    try:
        upper = _certified(search, max(value, task.lower, _SMALLEST), leaves)
    except NotCertified as error:
        known = task.upper_certificate()
        if known is None:
            raise
        task.notes.append(f"The checker refused the leaves ({error}); the bound is that of {known.method}.")
        upper, status = known, "closed" if known.value - task.lower <= gap * known.value else "solver failed"
    upper = replace(upper, seconds=searched)
    details: dict[str, float | int | str] = {
        "nodes": search.nodes, "leaves": len(leaves), "refuted": search.refuted, "flat": search.flat, "search_seconds": searched
    }  # fmt: skip
    degenerate = search.closed if search.closed > task.lower * (1 + gap / 2) else None
    if status == "closed" and degenerate is not None:
        task.notes.append(f"A region without interior attains {show_upper(degenerate, 9)}: the bound is that of closed regions.")
        status = "gap reached" if upper.value > task.lower * (1 + 2 * gap) else status
    return task.enclosure(upper, status, "branch-and-bound", closed_region=degenerate, details=details)


def _certified(search: Search, value: float, leaves: tuple[Leaf, ...]) -> Certificate:
    """The leaves' certificate; where their bound drowns in rounding, as for a constant function, at a larger value."""
    task, query, form = search.task, search.task.query, search.form
    scale = float((form.y.abs().sum() + 1) * (torch.linalg.matrix_norm(form.q) + 1) ** len(form.layers))
    *claims, last = value, value * (1 + 1e-6) + 1e-14 * scale, value * (1 + 1e-3) + 1e-9 * scale
    certificate = Certificate(
        last, "upper", query.norm, query.domain, task.network.digest, "branch-and-bound", Partition(leaves, last)
    )
    for claim in claims:
        try:
            return verify(task.network, replace(certificate, value=claim, evidence=Partition(leaves, claim)))
        except NotCertified as error:
            _LOGGER.info("%s", error)
    return verify(task.network, certificate)
