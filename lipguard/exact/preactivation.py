"""Bounds of pre-activations and tangents on the domain: intervals rounded outward, tightened by linear programs.

The variables are x, a multiplier `one` and the outputs w of neurons in doubt; everything else is substituted. On a
bounded domain `one` is 1. On R^d the network is homogenised, p = A x + B w + b one, phi(p) = s_k p + c_k one on the
piece beta_{k-1} one <= p <= beta_k one, and (x, one) ranges over [-1, 1]^d x [0, 1]: every region with an interior is
a cone there, so that it meets this bounded set, and no constant is lost.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import numpy as np

from lipguard.exact.operator_norm import dual
from lipguard.exact.piecewise import Matrix, Neuron, PiecewiseForm
from lipguard.exact.regions import DomainForm
from lipguard.solvers import highs

_EPS = 2.0**-52


@dataclass(frozen=True, eq=False)
class Bounds:
    """What is known of every neuron before the search.

    Attributes:
        lower, upper: l <= p <= u on the domain, (n,).
        pieces: the pieces that [l, u] touches, for each neuron.
        doubtful: neurons with more than one, in order.
        rows: p as a combination of (x, one, w of the doubtful), (n, d + 1 + len(doubtful)).
        values: w as such a combination, likewise.
        w_lower, w_upper: bounds of w, (n,).
        tangent: bound of |t|, t the derivative of p along any v with ||v||_p <= 1, (n,).
        slope: largest |slope| in reach, (n,).
        output: y - c as such a combination, (m, ...); bound of each |derivative of y|, (m,).
        norm: an upper bound of the constant from products of norms.
        homogeneous: whether `one` varies.
    """

    lower: Matrix
    upper: Matrix
    pieces: tuple[tuple[int, ...], ...]
    doubtful: tuple[int, ...]
    rows: Matrix
    values: Matrix
    w_lower: Matrix
    w_upper: Matrix
    tangent: Matrix
    slope: Matrix
    output: Matrix
    output_bound: Matrix
    norm: float
    homogeneous: bool


def reachable(neuron: Neuron, lower: float, upper: float, homogeneous: bool) -> tuple[int, ...]:
    """Pieces whose closed interval meets [lower, upper] (scaled by some factor in [0, 1], if homogeneous).

    A neuron that is constant on the domain has one piece, any that contains it.
    """
    if lower == upper and not homogeneous:
        return (neuron.pieces(lower, upper)[0],)
    found = []
    for k in range(len(neuron.slopes)):
        low, high = neuron.interval(k)
        if homogeneous:
            low, high = min(low, 0.0), max(high, 0.0)
        if low <= upper and high >= lower:
            found.append(k)
    return tuple(found)


def corners(neuron: Neuron, lower: float, upper: float, homogeneous: bool) -> list[tuple[float, float]]:
    """Points (p, one) among which every function linear on each piece has its extremes on [lower, upper] (x [0, 1])."""
    points = [(p, 1.0) for p in (lower, upper, *(b for b in neuron.breaks if lower < b < upper))]
    if homogeneous:
        points += [(lower, 0.0), (upper, 0.0)]
        # The lines p = beta one leave the rectangle through its other sides at one = p / beta.
        points += [(p, p / b) for p in (lower, upper) for b in neuron.breaks if b != 0 and 0 <= p / b <= 1]
    return points


def value(neuron: Neuron, p: float, one: float) -> float:
    """phi homogenised: one phi(p / one), at one = 0 its limit."""
    k = sum(p > b * one for b in neuron.breaks) if one > 0 else (0 if p <= 0 else len(neuron.breaks))
    return neuron.slopes[k] * p + neuron.offsets[k] * one


def bounds(
    form: PiecewiseForm, domain: DomainForm, norm: tuple[float, float], *, tighten: bool = True, deadline: float | None = None
) -> Bounds:
    """Bounds of every neuron, layer by layer.

    Args:
        form: the network.
        domain: where x ranges; R^d is homogenised.
        norm: (input, output) norms of the tangents.
        tighten: whether linear programs tighten the intervals, and products of norms those of the tangents; without it
            both are plain interval propagation.
        deadline: `time.monotonic()` after which no further linear program is started.
    """
    return _Propagation(form, domain, norm, tighten, deadline).run()


class _Propagation:
    def __init__(
        self, form: PiecewiseForm, domain: DomainForm, norm: tuple[float, float], tighten: bool, deadline: float | None
    ) -> None:
        self.form, self.domain, self.norm, self.deadline = form, domain, norm, deadline
        self.tighten = tighten
        self.homogeneous = domain.domain is None
        d, n = form.inputs, form.size
        self.lower, self.upper = np.zeros(n), np.zeros(n)
        self.w_lower, self.w_upper = np.zeros(n), np.zeros(n)
        self.tangent, self.slope = np.zeros(n), np.zeros(n)
        self.pieces: list[tuple[int, ...]] = []
        self.doubtful: list[int] = []
        # Columns: x, one, and one for every neuron; trimmed to the doubtful ones at the end.
        self.rows, self.values = np.zeros((n, d + 1 + n)), np.zeros((n, d + 1 + n))
        if self.homogeneous:
            x_low, x_high = -np.ones(d), np.ones(d)
        else:
            # Where x is exactly: the domain's own bounds, not the scaled form's.
            assert domain.domain is not None
            x_low, x_high = (v.numpy() for v in domain.domain.bounds(d))
        self.low = np.r_[x_low, 0.0 if self.homogeneous else 1.0, np.zeros(n)]
        self.high = np.r_[x_high, 1.0, np.zeros(n)]
        self.hull_rows: list[Matrix] = []
        self.hull_right: list[float] = []

    def run(self) -> Bounds:
        form, d = self.form, self.form.inputs
        p, q = self.norm
        # Bounds of the p-norm of each layer's slice of the tangent; the first entry is v itself.
        spectral: list[float] = []
        widths: list[Matrix] = []
        for layer in form.layers:
            self._layer(layer)
            blocks = [(form.a[layer], np.ones(d), 1.0)]
            blocks += [(form.b_matrix[layer, s], widths[k], spectral[k]) for k, s in enumerate(form.layers[: len(widths)])]
            rows, whole = _tangents(blocks, p, self.tighten)
            self.tangent[layer] = rows
            factor = self.slope[layer]
            widths.append(rows * factor * (1 + 4 * _EPS))
            spectral.append(min(_outward(np.linalg.norm(widths[-1], p)), _outward(whole * factor.max(initial=0.0))))
        last = [(form.d, np.ones(d), 1.0)]
        last += [(form.c[:, s], widths[k], spectral[k]) for k, s in enumerate(form.layers)]
        each, whole = _tangents(last, p, self.tighten)
        total = _outward(np.linalg.norm(each, q))
        if p == q or (q > p):
            total = min(total, whole)  # ||y||_q <= ||y||_p for q >= p
        keep = np.r_[np.arange(d + 1), d + 1 + np.array(self.doubtful, dtype=np.intp)].astype(np.intp)
        output = np.zeros((form.outputs, self.rows.shape[1]))
        output[:, :d] = form.d
        output += form.c @ self.values
        return Bounds(
            self.lower, self.upper, tuple(self.pieces), tuple(self.doubtful), self.rows[:, keep], self.values[:, keep],
            self.w_lower, self.w_upper, self.tangent, self.slope, output[:, keep], each, total, self.homogeneous,
        )  # fmt: skip

    def _layer(self, layer: slice) -> None:
        form, d = self.form, self.form.inputs
        before = slice(0, layer.start)
        rows = form.b_matrix[layer, before] @ self.values[before]
        rows[:, :d] += form.a[layer]
        rows[:, d] += form.bias[layer]
        self.rows[layer] = rows
        low, high = self._interval(layer)
        programs = self.tighten and not self._only_box(layer)
        for i in range(layer.start, layer.stop):
            l, u = float(low[i - layer.start]), float(high[i - layer.start])
            if programs and len(reachable(form.neurons[i], l, u, self.homogeneous)) > 1:
                l, u = self._program(self.rows[i], l, u)
            self.lower[i], self.upper[i] = l, u
        for i in range(layer.start, layer.stop):
            self._neuron(i, float(self.lower[i]), float(self.upper[i]))

    def _only_box(self, layer: slice) -> bool:
        """Whether intervals are exact already: p depends on x alone, and x ranges over a box or a 2-ball."""
        return not self.rows[layer, self.form.inputs + 1 :].any() and not len(self.domain.rows)

    def _interval(self, layer: slice) -> tuple[Matrix, Matrix]:
        rows = self.rows[layer]
        # x = center + r u with ||u|| <= 1 on a ball: the dual norm of the row; else the intervals of all variables.
        middle, half = self.low / 2 + self.high / 2, self.high / 2 - self.low / 2
        reach = np.abs(rows) @ half
        d = self.form.inputs
        ball = self.domain.domain
        if ball is not None and hasattr(ball, "radius") and len(rows):
            own = np.linalg.norm(rows[:, :d], dual(ball.norm), axis=1) * ball.radius  # type: ignore[union-attr]
            reach = np.minimum(reach, own * (1 + 1e-14 * d) + np.abs(rows[:, d:]) @ half[d:])
        center = rows @ middle
        # The substituted rows carry rounding of their own: each is a sum of products along at most n neurons.
        slack = 8 * (len(middle) + 2) * _EPS * (np.abs(rows) @ (np.abs(middle) + half) + self._cancelled(layer))
        return center - reach - slack, center + reach + slack

    def _cancelled(self, layer: slice) -> Matrix:
        """Size of the terms summed in the rows of a layer; zero where a row is zero without any cancellation."""
        form, before = self.form, slice(0, layer.start)
        x_size = np.maximum(np.abs(self.low), np.abs(self.high))[: form.inputs]
        w_size = np.maximum(np.abs(self.w_lower), np.abs(self.w_upper))[before]
        return np.abs(form.a[layer]) @ x_size + np.abs(form.b_matrix[layer, before]) @ w_size + np.abs(form.bias[layer])

    def _program(self, row: Matrix, low: float, high: float) -> tuple[float, float]:
        if self.deadline is not None and time.monotonic() > self.deadline:
            return low, high
        used = np.r_[np.arange(self.form.inputs + 1), self.form.inputs + 1 + np.array(self.doubtful, dtype=np.intp)]
        used = used.astype(np.intp)
        d = self.form.inputs
        rows = np.array(self.hull_rows)[:, used] if self.hull_rows else np.zeros((0, len(used)))
        right = np.array(self.hull_right)
        lows, highs_ = self.low[used], self.high[used]
        ball = self.domain.rows
        if len(ball):
            # |u_j| <= s_j, sum s <= 1 in the scaled coordinates u = (x - center) / scale.
            extra = np.zeros((len(ball), len(used) + self.domain.auxiliary))
            extra[:, :d] = ball[:, :d] / self.domain.scale
            extra[:, len(used) :] = ball[:, d:]
            shift = ball[:, :d] @ (self.domain.center / self.domain.scale)
            rows = np.concatenate([np.pad(rows, ((0, 0), (0, self.domain.auxiliary))), extra])
            right = np.r_[right, self.domain.right + shift]
            lows, highs_ = np.r_[lows, np.zeros(self.domain.auxiliary)], np.r_[highs_, np.ones(self.domain.auxiliary)]
        ends = []
        for sign, known in ((1.0, high), (-1.0, -low)):
            objective = np.zeros(rows.shape[1])
            objective[: len(used)] = sign * row[used]
            result = highs.maximise(objective, rows, right, lows, highs_)
            ends.append(min(known, _dual_bound(objective, rows, right, lows, highs_, result.duals)))
        return -ends[1], ends[0]

    def _neuron(self, i: int, low: float, high: float) -> None:
        neuron, d = self.form.neurons[i], self.form.inputs
        pieces = reachable(neuron, low, high, self.homogeneous)
        self.pieces.append(pieces)
        self.slope[i] = max(abs(neuron.slopes[k]) for k in pieces)
        at = corners(neuron, low, high, self.homogeneous)
        found = [value(neuron, p, one) for p, one in at]
        size = max(abs(s) * max(abs(low), abs(high)) + abs(c) for s, c in zip(neuron.slopes, neuron.offsets, strict=True))
        self.w_lower[i], self.w_upper[i] = min(found) - 8 * _EPS * size, max(found) + 8 * _EPS * size
        column = d + 1 + i
        if len(pieces) == 1:
            self.values[i] = neuron.slopes[pieces[0]] * self.rows[i]
            self.values[i, d] += neuron.offsets[pieces[0]]
            return
        self.doubtful.append(i)
        self.values[i, column] = 1.0
        self.low[column], self.high[column] = self.w_lower[i], self.w_upper[i]
        if self.homogeneous and any(neuron.offsets):
            return  # the hull of a homogenised function of two variables is not drawn
        for slope, height in _hull([(p, value(neuron, p, 1.0)) for p, one in at if one == 1.0]):
            # w <= slope p + height (upper hull, first) or w >= slope p + height, as rows of the form <=.
            for sign, s, c in ((1.0, *slope), (-1.0, *height)):
                row = -sign * s * self.rows[i]
                row[column] += sign
                self.hull_rows.append(row)
                self.hull_right.append(sign * c + 16 * _EPS * (size + abs(c)))


def _hull(points: list[tuple[float, float]]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Lines above and below a piecewise-linear graph given by its vertices: pairs of (slope, height)."""
    points = sorted(set(points))
    upper, lower = _chain(points, 1.0), _chain(points, -1.0)
    count = max(len(upper), len(lower))
    return [(upper[min(k, len(upper) - 1)], lower[min(k, len(lower) - 1)]) for k in range(count)]


def _chain(points: list[tuple[float, float]], sign: float) -> list[tuple[float, float]]:
    chain: list[tuple[float, float]] = []
    for point in points:
        while len(chain) > 1:
            (x0, y0), (x1, y1) = chain[-2:]
            if sign * ((x1 - x0) * (point[1] - y0) - (y1 - y0) * (point[0] - x0)) < 0:
                break
            chain.pop()
        chain.append(point)
    lines = []
    for (x0, y0), (x1, y1) in itertools.pairwise(chain):
        slope = (y1 - y0) / (x1 - x0)
        # Whatever the slope rounds to, the height is the one that leaves every vertex on the right side.
        height = sign * max(sign * (y - slope * x) for x, y in points)
        lines.append((slope, height))
    return lines


def _dual_bound(objective: Matrix, rows: Matrix, right: Matrix, low: Matrix, high: Matrix, duals: Matrix) -> float:
    """An upper bound of max objective'z, rows z <= right, low <= z <= high, from any multipliers, optimal or not.

    For y >= 0: objective'z <= y'right + (objective - rows'y)'z, and the last term is at most its maximum over the
    box, which is bounded. Rounding: every sum is widened by its length times the sum of its absolute terms.
    """
    y = np.maximum(duals, 0.0) if duals.shape == right.shape and np.isfinite(duals).all() else np.zeros(len(right))
    reduced = objective - rows.T @ y
    size = np.maximum(np.abs(low), np.abs(high))
    total = y @ right + np.maximum(reduced * low, reduced * high).sum()
    mass = y @ np.abs(right) + (np.abs(objective) + np.abs(rows).T @ y) @ size
    return float(total + 8 * (len(objective) + len(right) + 4) * _EPS * mass)


def _tangents(blocks: list[tuple[Matrix, Matrix, float]], p: float, products: bool) -> tuple[Matrix, float]:
    """Bounds of |t_i| and of ||t||_p for t = sum of block times part, |part| <= width entrywise, ||part||_p <= length.

    Those of |t_i| use the lengths only if `products`.
    """
    count = blocks[0][0].shape[0]
    each, whole = np.zeros(count), 0.0
    for block, width, length in blocks:
        if not block.any():
            continue
        rows = np.abs(block) @ width
        each += np.minimum(rows, np.linalg.norm(block, dual(p), axis=1) * length) if products else rows
        whole += np.linalg.norm(block, p) * length
    grow = 1 + 1e-12
    each = each * grow
    return each, _outward(min(whole, float(np.linalg.norm(each, p))))


def _outward(x: float | np.floating) -> float:
    return float(x) * (1 + 1e-12)
