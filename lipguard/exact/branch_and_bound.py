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
import itertools
import logging
import math
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lipguard.certificate import Certificate, Enclosure, Leaf, Partition, Query, Status
from lipguard.errors import NotCertified
from lipguard.exact.feasibility import Feasibility, feasibility, pattern_at
from lipguard.exact.flatness import THIN, flat_weights
from lipguard.exact.memory import memory_share
from lipguard.exact.node_bounds import Effort, node_bounds
from lipguard.exact.problem import Problem, problem
from lipguard.exact.settling import Refuted, settle
from lipguard.network import Network
from lipguard.solvers.threads import one_thread
from lipguard.verify import verify
from lipguard.verify.partition import semidefinite
from lipguard.verify.phase_form import PhaseForm, phase_form
from lipguard.verify.phases import Ranges, propagate, refutes
from lipguard.verify.substitution import Reduced, reduce

_LOGGER = logging.getLogger("lipguard.exact")
_BATCH = 64
_BATCH_SECONDS = 0.5
"""A batch is made smaller where it would take longer: the time limit is looked at in between."""
_ITERATIONS = 12
_FINE = 1e-9
"""Gap to which a search that ended soon goes on, for as long as this may take:"""
_FINE_SECONDS = 1.0
_SOON = 0.5
_SMALLEST = 1e-100
"""Least value that is claimed: its square must be a number."""
_MEMORY = 0.8
"""Share of the machine's memory at which the search ends."""


Known = tuple[np.ndarray, np.ndarray] | None
"""A point of a region with its pattern, if one is known."""


@dataclass(eq=False)
class Node:
    """An assignment with a bound of the constant over its regions.

    Attributes:
        decisions: phases that were branched on, -1 elsewhere, (n,).
        phases: those and the phases that follow.
        bound: upper bound of the norm over the node's regions.
        t: multipliers that prove it, (n,); only for the 2-norm.
        branch: the neuron to branch on next; -1 if none is free.
        point: an input with these phases, if one is known, with its pattern.
    """

    decisions: Tensor
    phases: Tensor
    bound: float
    t: Tensor
    branch: int
    point: np.ndarray | None = None
    pattern: np.ndarray | None = None
    part: int = 0

    @property
    def known(self) -> Known:
        """The point with its pattern."""
        return None if self.point is None or self.pattern is None else (self.point, self.pattern)

    @property
    def leaf(self) -> Leaf:
        """The node as evidence."""
        return Leaf(self.decisions.to(torch.int8), self.t, part=self.part)


Child = tuple[Node, Tensor, Known]
"""A parent, its child's decisions, and a point of the child if one is known."""


@dataclass(eq=False)
class Search:
    """State of one search."""

    form: PhaseForm
    task: Problem
    gap: float
    deadline: float
    heap: list[tuple[float, int, Node]] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    done: list[Node] = field(default_factory=list)
    proved: float = 0.0
    batch: int = _BATCH
    nodes: int = 0
    refuted: int = 0
    flat: int = 0
    closed: float = 0.0
    counter: itertools.count[int] = field(default_factory=itertools.count)
    seen: set[bytes] = field(default_factory=set)

    @property
    def target(self) -> float:
        """A node bounded by this is done."""
        return self.task.lower * (1 + self.gap / 2)

    @property
    def upper(self) -> float:
        """Upper bound of the constant over all leaves and open nodes."""
        return max(self.proved, -self.heap[0][0] if self.heap else 0.0)

    @property
    def fine(self) -> bool:
        """Whether the gap is near what float64 can prove."""
        return self.gap <= _FINE

    @property
    def effort(self) -> Effort:
        """How well the next semidefinite programs are to be solved: the roots with care, fine searches to the end."""
        return Effort(self.target, 40 if self.fine or not self.heap else _ITERATIONS, _FINE / 4 if self.fine else 1e-7)

    @property
    def evidence(self) -> tuple[Leaf, ...]:
        """Leaves that cover the domain, whenever the search is stopped."""
        return (*self.leaves, *(node.leaf for node in self.done), *(node.leaf for _, _, node in self.heap))

    def push(self, node: Node) -> None:
        """Keep an open node."""
        heapq.heappush(self.heap, (-node.bound, next(self.counter), node))

    def finish(self, node: Node) -> None:
        """Make a bounded node a leaf."""
        self.done.append(node)
        self.proved = max(self.proved, node.bound)


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
        if status == "closed" and gap > _FINE and time.monotonic() - task.started < _SOON:
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
    """Go on to a gap of `_FINE` for a moment: the bound then, or the one before, with its leaves."""
    value, evidence, closed = search.upper, search.evidence, search.closed
    search.gap, search.deadline = _FINE, min(search.deadline, time.monotonic() + _FINE_SECONDS)
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
                own = node.pattern is not None and int(node.pattern[node.branch]) == piece
                children.append((node, child, node.known if own else None))
        if parents:
            _evaluate(search, *_columns(children), leaves)
            each = (time.monotonic() - started) / len(parents)
            search.batch = max(1, min(_BATCH, int(_BATCH_SECONDS / each)))
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
    divided = [node for node in parents if node.pattern is None or node.branch < form.layers[0].stop]
    asked = [node for node in parents if node.pattern is not None and node.branch >= form.layers[0].stop]
    leaves: list[Leaf] = []
    if not asked:
        return divided, leaves
    ranges = propagate(form, torch.stack([node.decisions for node in asked]), torch.tensor([node.part for node in asked]))
    reduced = reduce(form, ranges)
    found = [(k, item) for k, node in enumerate(asked) for item in settle(form, ranges, reduced, k, node.known[1])]
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
    for node, items in zip(asked, sure, strict=True):
        decisions = node.decisions.clone()
        for neuron in dict.fromkeys(neuron for neuron, _, _ in items):
            for _, piece, farkas in (item for item in items if item[0] == neuron):
                leaf = decisions.clone()
                leaf[neuron] = piece
                leaves.append(Leaf(leaf.to(torch.int8), empty=True, farkas=farkas, part=node.part))
            decisions[neuron] = int(node.known[1][neuron])
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
                point = points[i]
                node = Node(decisions[i], ranges.phases[i], float(bounds[row]), multipliers[row], int(branches[row]))
                node.part = int(parts[i])
                if point is not None:
                    node.point, node.pattern = point
                if node.branch < 0 and node.bound > search.target:
                    # A single region: its norm is attained if it has an interior, and else only on the closed side.
                    found_interior = task.consider(node.phases.numpy().astype(np.intp))
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
        if task.norm(pattern)[0] > task.lower:
            task.consider(pattern)
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
    upper = replace(_certified(search, max(value, task.lower, _SMALLEST), leaves), seconds=searched)
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
