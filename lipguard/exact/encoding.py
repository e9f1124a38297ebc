"""A query as a mixed-integer program: regions by binaries, the Jacobian's norm by a tangent that runs along.

Per neuron in doubt and piece k, with delta_k = 1 in that piece (big-M form):

    M-(1 - delta) <= w - s_k p - c_k <= M+(1 - delta),     |r - s_k t| <= T max_j |s_j - s_k| (1 - delta),

x the point, p and w the neuron's pre-activation and value, t and r the derivatives of p and w along v, ||v||_p <= 1.
The strict region asks for a margin besides: p at least e inside its piece. For ReLU these are the constraints of
Sbihi, Jan, Couellan (arXiv:2402.01199) and, with a linear objective, those of LipMIP (arXiv:2003.01219).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lipguard.certificate import Ball
from lipguard.exact.piecewise import Matrix, Pattern
from lipguard.exact.preactivation import Bounds, corners, value
from lipguard.exact.problem import Incumbent, Problem
from lipguard.programs.mixed_integer import EuclideanBall, Indices, MixedIntegerProgram

Region = Literal["closed", "strict"]

MARGIN = 1e-6
"""Margin of the strict region, relative to u - l of each neuron; the solvers are asked for feasibility 1e-9."""


@dataclass(eq=False)
class _Rows:
    """Variables and linear constraints as they are collected."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    binary: list[bool] = field(default_factory=list)
    rows: list[list[tuple[Indices, Matrix]]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def variables(self, lower: Matrix, upper: Matrix, binary: bool = False) -> Indices:
        start = len(self.lower)
        self.lower += lower.tolist()
        self.upper += upper.tolist()
        self.binary += [binary] * len(lower)
        return np.arange(start, len(self.lower))

    def binaries(self, count: int) -> Indices:
        return self.variables(np.zeros(count), np.ones(count), True)

    def add(self, terms: Sequence[tuple[Indices, Matrix]], low: float, high: float) -> None:
        self.rows.append(list(terms))
        self.low.append(low)
        self.high.append(high)

    def matrix(self) -> Matrix:
        result = np.zeros((len(self.rows), len(self.lower)))
        for row, terms in zip(result, self.rows, strict=True):
            for indices, coefficients in terms:
                np.add.at(row, indices, coefficients)
        return result


@dataclass(frozen=True)
class _Indicator:
    """delta = constant + coefficient * (a binary variable)."""

    index: int
    coefficient: float
    constant: float

    def term(self, factor: float) -> tuple[Indices, Matrix]:
        return np.array([self.index]), np.array([factor * self.coefficient])


class Encoding:
    """The program of a problem, and the way between its variables and patterns.

    Args:
        task: the problem.
        known: bounds of its neurons.
        region: "closed" bounds the constant from above, "strict" from below.
    """

    def __init__(self, task: Problem, known: Bounds, region: Region) -> None:
        self.task, self.known, self.region = task, known, region
        self._rows = _Rows()
        self.choices: dict[tuple[int, int], _Indicator] = {}
        self._balls: list[EuclideanBall] = []
        self._squares = np.zeros(0, dtype=np.intp)
        self._domain()
        doubtful = np.array(known.doubtful, dtype=np.intp)
        self._w = self._rows.variables(known.w_lower[doubtful], known.w_upper[doubtful])
        self._tangent_ball()
        reach = (known.tangent * known.slope)[doubtful]
        self._r = self._rows.variables(-reach, reach)
        for place, i in enumerate(known.doubtful):
            self._neuron(place, i)
        self._objective()

    @property
    def squared(self) -> bool:
        """Whether the program's objective is the squared norm."""
        return len(self._squares) > 0

    def to_norm(self, objective: float) -> float:
        """The norm that an objective of the program means."""
        return math.sqrt(max(objective, 0.0)) if self.squared else objective

    def program(self, cutoff: float | None = None, start: Incumbent | None = None) -> MixedIntegerProgram:
        """The program as the solvers take it.

        Args:
            cutoff: a known upper bound of the norm.
            start: a region to begin from.
        """
        rows = self._rows
        objective = np.zeros(len(rows.lower))
        objective[self._linear] = 1.0
        if cutoff is not None and math.isfinite(cutoff):
            cutoff = (cutoff**2 if self.squared else cutoff) * (1 + 1e-9) + 1e-12
        else:
            cutoff = None
        return MixedIntegerProgram(
            np.array(rows.lower), np.array(rows.upper), np.array(rows.binary), rows.matrix(), np.array(rows.low),
            np.array(rows.high), objective, tuple(self._balls), self._squares, cutoff,
            None if start is None else self._start(start),
        )  # fmt: skip

    def pattern(self, solution: Matrix) -> Pattern:
        """The pattern a solution's binaries mean."""
        pattern = np.array([pieces[0] for pieces in self.known.pieces], dtype=np.intp)
        for i in self.known.doubtful:
            pattern[i] = max(self.known.pieces[i], key=lambda k: self._delta(i, k, solution))
        return pattern

    def forbid(self, neurons: Sequence[int], pattern: Pattern) -> bool:
        """No-good cut: not all of these neurons in their pieces of the pattern. False if none of them has a choice."""
        members = [self.choices[i, int(pattern[i])] for i in neurons if (i, int(pattern[i])) in self.choices]
        if not members:
            return False
        self._rows.add([m.term(1.0) for m in members], -np.inf, len(members) - 1 - sum(m.constant for m in members))
        return True

    def _delta(self, i: int, piece: int, solution: Matrix) -> float:
        choice = self.choices[i, piece]
        return choice.constant + choice.coefficient * float(solution[choice.index])

    def _domain(self) -> None:
        rows, d, form = self._rows, self.task.form.inputs, self.task.domain
        query = self.task.query
        one = np.ones(1)
        if query.domain is None:
            self._x, self._one = rows.variables(-np.ones(d), np.ones(d)), rows.variables(np.zeros(1), one)
            if self.region == "closed":
                # Every ray has a point with max(|x_j|, one) = 1; without this the origin would allow every pattern.
                facets = rows.binaries(2 * d + 1)
                rows.add([(facets, np.ones(2 * d + 1))], 1.0, np.inf)
                for j in range(d):
                    rows.add([(self._x[[j]], one), (facets[[j]], -2 * one)], -1.0, np.inf)
                    rows.add([(self._x[[j]], one), (facets[[d + j]], 2 * one)], -np.inf, 1.0)
                rows.add([(self._one, one), (facets[[2 * d]], -one)], 0.0, np.inf)
                self._facets = facets
            return
        low, high = (v.numpy() for v in query.domain.bounds(d))
        self._x, self._one = rows.variables(low, high), rows.variables(one, one)
        if form.round:
            assert isinstance(query.domain, Ball)
            self._balls.append(EuclideanBall(self._x, form.center, float(query.domain.radius)))
        if form.auxiliary:
            self._s = rows.variables(np.zeros(form.auxiliary), np.ones(form.auxiliary))
            for row, right in zip(form.rows, form.right, strict=True):
                shifted = right + float(row[:d] @ form.center) / form.scale
                rows.add([(self._x, row[:d] / form.scale), (self._s, row[d:])], -np.inf, shifted)

    def _tangent_ball(self) -> None:
        rows, d = self._rows, self.task.form.inputs
        p = self.task.query.norm[0]
        if p == 1.0:
            # v = v+ - v-, sum of both at most 1: the l1 ball without absolute values.
            self._v = rows.variables(np.zeros(2 * d), np.ones(2 * d))
            self._lift = np.hstack([np.eye(d), -np.eye(d)])
            rows.add([(self._v, np.ones(2 * d))], -np.inf, 1.0)
            return
        self._v = rows.variables(-np.ones(d), np.ones(d))
        self._lift = np.eye(d)
        if p == 2.0 and d > 1:
            self._balls.append(EuclideanBall(self._v, np.zeros(d), 1.0))

    def _affine(self, row: Matrix, factor: float) -> list[tuple[Indices, Matrix]]:
        """factor * row (x, one, w)."""
        d = self.task.form.inputs
        return [(self._x, factor * row[:d]), (self._one, factor * row[d : d + 1]), (self._w, factor * row[d + 1 :])]

    def _tangent(self, row: Matrix, factor: float) -> list[tuple[Indices, Matrix]]:
        """factor * row applied to (v, r): the derivative of row (x, one, w) along v."""
        d = self.task.form.inputs
        return [(self._v, factor * (row[:d] @ self._lift)), (self._r, factor * row[d + 1 :])]

    def _neuron(self, place: int, i: int) -> None:
        rows, known = self._rows, self.known
        neuron, pieces, row = self.task.form.neurons[i], known.pieces[i], known.rows[i]
        first, last = pieces[0], pieces[-1]
        if len(pieces) == 2:
            index = int(rows.binaries(1)[0])
            self.choices[i, pieces[0]] = _Indicator(index, -1.0, 1.0)
            self.choices[i, pieces[1]] = _Indicator(index, 1.0, 0.0)
        else:
            indices = rows.binaries(len(pieces))
            rows.add([(indices, np.ones(len(pieces)))], 1.0, 1.0)
            for k, index in zip(pieces, indices, strict=True):
                self.choices[i, k] = _Indicator(int(index), 1.0, 0.0)
        low, high = float(known.lower[i]), float(known.upper[i])
        at = [(p, one, value(neuron, p, one)) for p, one in corners(neuron, low, high, known.homogeneous)]
        own, slope_own = self._w[[place]], self._r[[place]]
        margin = MARGIN * (high - low) if self.region == "strict" else 0.0
        for k in pieces:
            choice, s, c = self.choices[i, k], neuron.slopes[k], neuron.offsets[k]
            apart = [w - s * p - c * one for p, one, w in at]
            above, below = max(0.0, *apart), min(0.0, *apart)
            line = [(own, np.ones(1)), *self._affine(row, -s), (self._one, np.array([-c]))]
            self._imply(choice, line, -np.inf, 0.0, above)
            self._imply(choice, line, 0.0, np.inf, -below)
            spread = known.tangent[i] * max(abs(neuron.slopes[j] - s) for j in pieces)
            both = [(slope_own, np.ones(1)), *self._tangent(row, -s)]
            self._imply(choice, both, -np.inf, 0.0, spread)
            self._imply(choice, both, 0.0, np.inf, spread)
            if len(pieces) > 2 or margin:
                # With two pieces and no margin the two lines above already put p on its side of the break.
                a, b = neuron.interval(k)
                if math.isfinite(a) and k != first:
                    short = max(a * one - p for p, one, _ in at) + margin
                    self._imply(choice, [*self._affine(row, 1.0), (self._one, np.array([-a]))], margin, np.inf, max(short, 0.0))
                if math.isfinite(b) and k != last:
                    over = max(p - b * one for p, one, _ in at) + margin
                    self._imply(choice, [*self._affine(row, 1.0), (self._one, np.array([-b]))], -np.inf, -margin, max(over, 0.0))

    def _imply(self, choice: _Indicator, terms: list[tuple[Indices, Matrix]], low: float, high: float, slack: float) -> None:
        """delta = 1 implies low <= terms <= high (one of them finite); otherwise it may be violated by `slack`."""
        if math.isfinite(high):
            self._rows.add([*terms, choice.term(slack)], -np.inf, high + slack * (1 - choice.constant))
        else:
            self._rows.add([*terms, choice.term(-slack)], low - slack * (1 - choice.constant), np.inf)

    def _objective(self) -> None:
        rows, known = self._rows, self.known
        m, q = self.task.form.outputs, self.task.query.norm[1]
        # v and -v are both allowed, so that y_1 >= 0 loses nothing (and |y| = y for a single output).
        below = -known.output_bound
        if q != math.inf or m == 1:
            below[:1] = 0.0
        self._y = rows.variables(below, known.output_bound)
        for i in range(m):
            rows.add([(self._y[[i]], np.ones(1)), *self._tangent(known.output[i], -1.0)], 0.0, 0.0)
        one = np.ones(1)
        if m == 1:
            self._linear = self._y
        elif q == 2.0:
            self._linear, self._squares = np.zeros(0, dtype=np.intp), self._y
        elif q == math.inf:
            # tau <= y_i for the chosen i.
            top = float(known.output_bound.max())
            self._linear = rows.variables(np.zeros(1), np.array([top]))
            self._pick = rows.binaries(m)
            rows.add([(self._pick, np.ones(m))], 1.0, 1.0)
            for i in range(m):
                slack = top + float(known.output_bound[i])
                rows.add([(self._linear, one), (self._y[[i]], -one), (self._pick[[i]], slack * one)], -np.inf, slack)
        else:
            # tau_i <= |y_i| by the sign g_i; y_1 >= 0 already.
            self._linear = rows.variables(np.zeros(m), known.output_bound)
            self._sign = rows.binaries(m)
            for i in range(m):
                slack = 2 * float(known.output_bound[i])
                tau, y, g = (self._linear[[i]], one), self._y[[i]], self._sign[[i]]
                rows.add([tau, (y, -one), (g, slack * one)], -np.inf, slack)
                rows.add([tau, (y, one), (g, -slack * one)], -np.inf, 0.0)

    def _start(self, best: Incumbent) -> Matrix | None:
        """The incumbent as a feasible point, or None where its pattern is out of reach."""
        form, known = self.task.form, self.known
        if any(int(k) not in pieces for k, pieces in zip(best.pattern, known.pieces, strict=True)):
            return None
        point, one = best.point, 1.0
        if known.homogeneous:
            one = 1.0 / max(1.0, float(np.abs(point).max(initial=0.0)))
        solution = np.zeros(len(self._rows.lower))
        slopes = form.slopes_of(best.pattern)
        g, h = form.preactivations(best.pattern)
        doubtful = np.array(known.doubtful, dtype=np.intp)
        offsets = np.array([form.neurons[i].offsets[int(k)] for i, k in enumerate(best.pattern)])
        w = slopes * (g @ point + h) + offsets
        direction = best.direction / np.linalg.norm(best.direction, self.task.query.norm[0]) * (1 - 1e-12)
        y = form.jacobian(best.pattern) @ direction
        if (known.output_bound > 0).any() and (y[0] < 0 or (self.task.query.norm[1] == math.inf and y[np.abs(y).argmax()] < 0)):
            direction, y = -direction, -y
        solution[self._x], solution[self._one] = one * point, one
        solution[self._w] = one * w[doubtful]
        p_one = self.task.query.norm[0] == 1.0
        solution[self._v] = np.r_[np.maximum(direction, 0), np.maximum(-direction, 0)] if p_one else direction
        solution[self._r] = (slopes * (g @ direction))[doubtful]
        solution[self._y] = y
        for i in known.doubtful:
            for k in known.pieces[i]:
                choice = self.choices[i, k]
                on = float(k == best.pattern[i])
                solution[choice.index] = on if choice.coefficient > 0 else 1.0 - on
        if known.homogeneous and self.region == "closed":
            scaled = np.r_[one * point, -one * point, one]
            solution[self._facets[int(scaled.argmax())]] = 1.0
        if self.task.domain.auxiliary:
            solution[self._s] = np.abs(point - self.task.domain.center) / self.task.domain.scale
        if len(y) > 1 and self.task.query.norm[1] == math.inf:
            solution[self._linear], solution[self._pick[int(y.argmax())]] = y.max(), 1.0
        elif len(y) > 1 and self.task.query.norm[1] == 1.0:
            solution[self._linear], solution[self._sign] = np.abs(y), y >= 0
        return solution
