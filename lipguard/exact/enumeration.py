"""Enumeration of every linear region that has an interior: for few inputs, or few neurons."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lipguard.certificate import Enclosure, Query, Status
from lipguard.exact.operator_norm import vector_norm
from lipguard.exact.piecewise import Matrix, Pattern, PiecewiseForm
from lipguard.exact.preactivation import Bounds
from lipguard.exact.problem import Incumbent, Problem, problem
from lipguard.exact.regions import RADIUS, Cell, interior
from lipguard.network import Network

_CLEAR = 1e-3
"""A point this far from a new hyperplane (against the radius it had) stays on its side without a linear program."""

_ZERO = 1e-12


def region_estimate(form: PiecewiseForm, known: Bounds) -> float:
    """At most how many regions there are: hyperplanes in general position in each layer, multiplied.

    Only kinks within reach of the pre-activation bounds count. Zaslavsky's count, sum of C(k, j) for j <= d, for the k
    kinks of each layer; infinite past 1e12. An overestimate by a large factor as a rule.
    """
    total = 1.0
    for layer in form.layers:
        kinks = sum(len(known.pieces[i]) - 1 for i in range(layer.start, layer.stop))
        total *= sum(math.comb(kinks, j) for j in range(min(form.inputs, kinks) + 1))
        if total > 1e12:
            return math.inf
    return total


@dataclass(frozen=True, eq=False)
class _Layer:
    """Pre-activations G x + h of a layer under its predecessors' pattern, and which are constant."""

    stop: int
    g: Matrix
    h: Matrix
    constant: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Node:
    """A region of the first `decided` neurons, with a point inside it and its radius (nan: not known to exist)."""

    pattern: Pattern
    decided: int
    rows: Matrix
    right: Matrix
    point: Matrix
    radius: float
    layer: _Layer | None = None


def enumeration(network: Network, query: Query, *, time_limit: float | None = None, gap: float = 1e-6) -> Enclosure:
    """The exact constant by splitting the domain neuron by neuron, each part kept only if it has an interior.

    Args:
        network: piecewise linear.
        query: norms and domain.
        time_limit: seconds; past it, the bounds known by then are returned.
        gap: unused; the result is exact or the time was over.
    Returns:
        An enclosure whose lower end is verified, and whose upper end rests on the linear programs' word.
    Raises:
        UnsupportedQuery, InvalidDomain: see `problem`.
    """
    del gap
    return enumerate_regions(problem(network, query, time_limit))


def enumerate_regions(task: Problem) -> Enclosure:
    """`enumeration` of a problem already set up."""
    search = _Enumeration(task)
    status: Status = "closed"
    try:
        if task.deadline is not None:
            task.sample()  # a good incumbent, should the time end first
            task.improve(seconds=1.0)
        if not search.run():
            status = "time limit"
    except KeyboardInterrupt:
        status = "interrupted"
    if task.incumbent is not None:
        task.consider(task.incumbent.pattern)
    details: dict[str, float | int | str] = {"regions": search.regions, "undecided": search.undecided}
    if status != "closed":
        if task.incumbent is None:
            task.sample()
        known = task.upper_certificate() or task.claim(math.inf, "enumeration", "enumeration", "no bound is known")
        return task.enclosure(known, status, "enumeration", details=details)
    report = f"{search.regions} regions with an interior, linear programs at tolerance 1e-10, {search.undecided} undecided"
    value = max(task.lower, search.highest) * (1 + 1e-12)
    upper = task.claim(value, "enumeration", "enumeration", report)
    return task.enclosure(upper, status, "enumeration", details=details)


class _Enumeration:
    def __init__(self, task: Problem) -> None:
        self.task, self.form = task, task.form
        self.regions = self.undecided = 0
        self.highest = 0.0
        self.layer_of = {i: k for k, layer in enumerate(self.form.layers) for i in range(layer.start, layer.stop)}

    def run(self) -> bool:
        """Visit every region; False if the time was over first."""
        d = self.form.inputs
        empty = Cell(np.zeros((0, d)), np.zeros(0), np.zeros(0, dtype=np.intp))
        whole = interior(self.task.domain, empty)
        start = np.zeros(self.form.size, dtype=np.intp)
        stack = [_Node(start, 0, empty.rows, empty.right, whole.point, whole.radius)]
        while stack:
            if self.task.expired:
                return False
            node = stack.pop()
            if node.decided == self.form.size:
                self._leaf(node)
                continue
            if node.layer is None or node.decided == node.layer.stop:
                node = dataclasses.replace(node, layer=self._layer(node))
            stack += self._split(node)
        return True

    def _leaf(self, node: _Node) -> None:
        value, direction = self.task.norm(node.pattern)
        self.regions += 1
        self.highest = max(self.highest, value)
        if math.isnan(node.radius):
            self.undecided += 1
            return
        best = self.task.incumbent
        if best is None or value > best.value:
            self.task.incumbent = Incumbent(value, node.pattern, node.point, direction)

    def _layer(self, node: _Node) -> _Layer:
        number = self.layer_of[node.decided]
        layer = self.form.layers[number]
        g, h = self.form.preactivations(node.pattern, number + 1)
        before = slice(0, layer.start)
        weights = np.abs(self.form.b_matrix[layer, before]) * np.abs(self.form.slopes_of(node.pattern)[before])
        terms = np.abs(self.form.a[layer]).sum(1) + weights @ np.abs(g[before]).sum(1)
        constant = np.zeros(len(h), dtype=bool)
        constant[layer] = np.abs(g[layer]).sum(1) <= _ZERO * terms
        return _Layer(layer.stop, g, h, constant)

    def _split(self, node: _Node) -> list[_Node]:
        """The parts of a node by the pieces of its next neuron."""
        assert node.layer is not None
        i = node.decided
        row, height, constant = node.layer.g[i], float(node.layer.h[i]), bool(node.layer.constant[i])
        neuron = self.form.neurons[i]
        if constant or len(neuron.slopes) == 1:
            return [self._child(node, i, int(np.searchsorted(neuron.breaks, height)) if constant else 0, [], [])]
        at = float(row @ node.point) + height
        length = vector_norm(row, 2) * self.task.domain.scale
        parts = []
        for piece in range(len(neuron.slopes)):
            low, high = neuron.interval(piece)
            rows, right = [], []
            if np.isfinite(low):
                rows.append(-row)
                right.append(height - low)
            if np.isfinite(high):
                rows.append(row)
                right.append(high - height)
            # Distance, in scaled coordinates, of the node's point from the faces of this piece.
            margin = min(at - low, high - at) / length
            if margin > max(_CLEAR * node.radius, 1e3 * RADIUS):
                parts.append(self._child(node, i, piece, rows, right, min(margin, node.radius)))
                continue
            child = self._child(node, i, piece, rows, right)
            owners = np.zeros(len(child.right), dtype=np.intp)
            found = interior(self.task.domain, Cell(child.rows, child.right, owners))
            if found.exists:
                parts.append(dataclasses.replace(child, point=found.point, radius=found.radius))
        return parts

    def _child(
        self, node: _Node, i: int, piece: int, rows: list[Matrix], right: list[float], radius: float | None = None
    ) -> _Node:
        pattern = node.pattern.copy()
        pattern[i] = piece
        all_rows = np.concatenate([node.rows, np.array(rows).reshape(len(rows), -1)]) if rows else node.rows
        all_right = np.concatenate([node.right, right]) if rows else node.right
        known = node.radius if radius is None else radius
        return _Node(pattern, i + 1, all_rows, all_right, node.point, known, node.layer)
