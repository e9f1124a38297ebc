"""Branch and bound on activation phases: exact constants for any norm, with leaves that the checker accepts.

A node fixes the phases of some neurons. Ranges and phases that follow are derived by the checker's own rigorous
propagation; a linear program refutes assignments that no input has, with multipliers as evidence, or yields an input.
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
from lipguard.exact.settling import Refuted, settle
from lipguard.network import Network
from lipguard.solvers.threads import one_thread
from lipguard.verify import verify
from lipguard.verify.partition import semidefinite
from lipguard.verify.phase_form import PhaseForm, phase_form
from lipguard.verify.phases import Ranges, propagate, refutes
from lipguard.verify.substitution import Reduced, reduce

_LOGGER = logging.getLogger("lipguard.exact")
_BATCH_SECONDS = 0.5
"""A batch is made smaller where it would take longer: the time limit is looked at in between."""
_SOON = 0.5
_FINE_SECONDS = 1.0
"""A search that ended as soon as this goes on to a gap of `FINE`, for as long as this may take."""
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
        if status == "closed" and gap > FINE and time.monotonic() - task.started < _SOON:
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
            _expand(search)
    except KeyboardInterrupt:
        return "interrupted"
    return "closed"


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
            _evaluate(search, *_columns([(node, node.decisions, node.known) for node in again]))
        except KeyboardInterrupt:
            return value, evidence
    finished = _run(search) == "closed" and search.closed == closed
    search.closed = closed
    return (search.upper, search.evidence) if finished else (value, evidence)


def _expand(search: Search) -> None:
    """Branch the nodes of largest bounds and evaluate their children as one batch."""
    started = time.monotonic()
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
        divided, leaves = _settle(search, parents, children)
        for node in divided:
            for piece in range(len(search.form.pieces)):
                child = node.decisions.clone()
                child[node.branch] = piece
                own = node.known is not None and int(node.known[1][node.branch]) == piece
                children.append((node, child, node.known if own else None))
        if parents:
            _evaluate(search, *_columns(children), leaves)
            each = (time.monotonic() - started) / len(parents)
            search.batch = max(1, min(BATCH, int(_BATCH_SECONDS / each)))
    except KeyboardInterrupt:
        for node in parents:
            search.push(node)
        raise


def _settle(search: Search, parents: list[Node], children: list[Child]) -> tuple[list[Node], list[Leaf]]:
    """Decide neurons that do not divide their node: those nodes become children with more decisions.

    Returns:
        The nodes still to be divided, and leaves for what was refuted.
    """
    form = search.form
    first = form.layers[0].stop if form.layers else 0
    divided = [node for node in parents if node.known is None or node.branch < first]
    asked = [(node, node.known[1]) for node in parents if node.known is not None and node.branch >= first]
    leaves: list[Leaf] = []
    if not asked:
        return divided, leaves
    ranges = propagate(form, torch.stack([node.decisions for node, _ in asked]), torch.tensor([node.part for node, _ in asked]))
    reduced = reduce(form, ranges)
    found = [(k, item) for k, (_, pattern) in enumerate(asked) for item in settle(form, ranges, reduced, k, pattern)]
    sure: list[list[Refuted]] = [[] for _ in asked]
    if found:
        rows = ranges.pick(torch.tensor([k for k, _ in found]))
        for row, (_, (neuron, piece, _)) in enumerate(found):
            rows.phases[row, neuron] = piece
        proved = refutes(form, rows, torch.stack([farkas for _, (_, _, farkas) in found])).tolist()
        doubtful = {(k, neuron) for (k, (neuron, _, _)), ok in zip(found, proved, strict=True) if not ok}
        for k, item in found:
            if (k, item[0]) not in doubtful:
                sure[k].append(item)
    for (node, pattern), items in zip(asked, sure, strict=True):
        decisions = node.decisions.clone()
        for neuron in dict.fromkeys(neuron for neuron, _, _ in items):
            for _, piece, farkas in (item for item in items if item[0] == neuron):
                leaf = decisions.clone()
                leaf[neuron] = piece
                leaves.append(Leaf(leaf.to(torch.int8), empty=True, farkas=farkas, part=node.part))
            decisions[neuron] = int(pattern[neuron])
        if items:
            children.append((node, decisions, node.known))
        else:
            divided.append(node)
    search.refuted += len(leaves)
    return divided, leaves


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
    settled: list[Leaf] | None = None,
) -> None:
    """Bound new nodes; nothing is added to the search before all of it succeeded."""
    form, task = search.form, search.task
    ranges = propagate(form, decisions, parts)
    empty = ranges.empty.tolist()
    search.nodes += len(decisions)
    leaves = list(settled or [])
    leaves += [Leaf(decisions[i].to(torch.int8), empty=True, part=int(parts[i])) for i in range(len(decisions)) if empty[i]]
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
                points[i] = _try_point(search, outcome, ranges.phases[i])
                if outcome.margin <= THIN:
                    points[i] = None  # a child's own program must find out whether it is flat
                    refuted[i] = _flat(search, leaves, decisions[i], ranges, reduced, i, int(parts[i]))
        kept = (~refuted).nonzero()[:, 0]
        if len(kept):
            chosen = ranges.pick(kept)
            norm = task.query.norm
            bounds, multipliers, branches = node_bounds(form, norm, chosen, reduced.pick(kept), t[kept], rho[kept], search.effort)
            if search.fine and norm == (2.0, 2.0):
                # So near the optimum the checker's rounding counts: what it refuses must be branched.
                proved = semidefinite(form, reduced.pick(kept), multipliers, search.target)
                bounds = torch.where(proved | (branches < 0), bounds, bounds.clamp_min(search.target * (1 + 1e-9)))
            for row, i in enumerate(kept.tolist()):
                node = Node(decisions[i], ranges.phases[i], float(bounds[row]), multipliers[row], int(branches[row]))
                node.part, node.known = int(parts[i]), points[i]
                if node.branch < 0 and node.bound > search.target:
                    # A single region: its norm is attained if it has an interior, and else only on the closed side.
                    found_interior = task.consider(search.own(node.phases.numpy().astype(np.intp)))
                    if not found_interior.exists and _flat(search, leaves, decisions[i], ranges, reduced, i, node.part):
                        continue
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


def _flat(search: Search, leaves: list[Leaf], decisions: Tensor, ranges: Ranges, reduced: Reduced, i: int, part: int) -> bool:
    """Whether region i is proved to have no interior; it is a leaf then."""
    weights = flat_weights(search.form, ranges, reduced, i, part)
    if weights is not None:
        search.flat += 1
        leaves.append(Leaf(decisions.to(torch.int8), part=part, flat=weights))
    return weights is not None


def _try_point(search: Search, outcome: Feasibility, phases: Tensor) -> Known:
    """Use a point of the relaxation: its true region may improve the incumbent, and may lie in the node."""
    task = search.task
    x: np.ndarray = outcome.point
    if search.form.directions:
        if len(x) > task.form.inputs:
            if x[-1] <= 1e-12:
                return None
            x = x[:-1] / x[-1]
    elif task.query.domain is not None:
        x = task.query.domain.project(torch.from_numpy(x)).numpy()
        outcome = replace(outcome, point=x)
    pattern = pattern_at(search.form, outcome.point)
    key = pattern.astype(np.int8).tobytes()
    if key not in search.seen:
        search.seen.add(key)
        own = search.own(pattern)
        if task.norm(own)[0] > task.lower:
            task.consider(own)
    fixed = phases.numpy() >= 0
    return (x, pattern) if bool((pattern[fixed] == phases.numpy()[fixed]).all()) else None


def _refuted(form: PhaseForm, ranges: Ranges, found: list[Feasibility | None]) -> Tensor:
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
        upper, status = known, "solver failed"
    upper = replace(upper, seconds=searched)
    details: dict[str, float | int | str] = {
        "nodes": search.nodes, "leaves": len(leaves), "refuted": search.refuted, "flat": search.flat, "search_seconds": searched
    }  # fmt: skip
    degenerate = search.closed if search.closed > task.lower * (1 + gap / 2) else None
    if status == "closed" and degenerate is not None:
        task.notes.append(f"A region without interior attains {degenerate:.9g}: the bound is that of closed regions.")
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
