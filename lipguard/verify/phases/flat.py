"""Proof in rational arithmetic that a region has no interior: it then has no part in the constant.

Every fixed phase demands g x + h >= 0 of its piece, with g and h exact sums of products of the network's own numbers.
If a nonnegative combination of demands is at most 0 on the whole domain, each of them is 0 wherever all of them hold:
the region lies in the hyperplane g x + h = 0 of any demand with positive weight and g != 0. Almost every point of a
domain with an interior lies in no such region, and the constant is the supremum over almost all points.

The weights are proposed as floating-point numbers. Cancellation must be exact, so that some of them are computed from
the others as fractions; whether what results proves anything is then decided without any rounding.

Numbers that are known up to a radius do not cancel. But demands g x >= 0 through 0 whose rows g positively span all directions
hold at x = 0 alone, and still do where every g is a little off: see `_pointed`.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import torch
from torch import Tensor

from lipguard.verify.phases.phase_form import PhaseForm

_NONE = 1e-7
"""Below this share of its terms a sum is meant to be 0: a guess that decides what is tried, not what is proved."""

_Row = tuple[list[Fraction], Fraction]


def is_flat(form: PhaseForm, phases: Tensor, weights: Tensor, part: int) -> bool:
    """Whether the weights (n,) prove that the region of the phases (n,) has no interior.

    Args:
        form: the network and its domain.
        phases: with every phase that follows, -1 where free.
        weights: positive for the demand of the lower end of a neuron's piece, negative for that of the upper end.
        part: the box the region lies in.
    """
    if not bool(weights.isfinite().all()) or not _solid(form):
        return False
    try:
        return _proves(form, phases, weights, part) or _pointed(form, phases, weights)
    except OverflowError:  # numbers too large to be guessed in float64
        return False


def _proves(form: PhaseForm, phases: Tensor, weights: Tensor, part: int) -> bool:
    affine = _Affine(form, phases.tolist())
    rows, guess = [], []
    for i in weights.nonzero()[:, 0].tolist():
        weight, row = float(weights[i]), affine.row(i)
        place = affine.phases[i] - (weight > 0)
        if row is None or affine.phases[i] < 0 or not 0 <= place < len(form.breaks):
            return False
        end = float(form.breaks[place, i])
        if math.isinf(end):
            return False
        sign = 1 if weight > 0 else -1
        gradient, height = row
        if any(gradient):
            rows.append(([sign * g for g in gradient], sign * (height - Fraction(end))))
            guess.append(abs(weight))
    if not rows:
        return False
    domain = _Domain(form, part)
    for equations in domain.systems(rows, guess):
        weighting = _solve(equations, guess)
        if min(weighting) >= 0 and max(weighting) > 0:
            pairs = list(zip(weighting, rows, strict=True))
            total = [sum((w * g[j] for w, (g, _) in pairs), Fraction(0)) for j in range(len(domain.center))]
            if domain.nowhere_positive(total, sum((w * h for w, (_, h) in pairs), Fraction(0))):
                return True
    return False


def _pointed(form: PhaseForm, phases: Tensor, weights: Tensor) -> bool:
    """Whether demands through 0 are met at x = 0 alone, for all rows within their radii.

    Let w >= 0 and sum_i w_i g_i = -s e_k + e for a sign s, a coordinate k and a rest e. Where g~_i x >= 0 for all i,
    |g~_i - g_i| <= r_i,

        0 <= sum_i w_i g~_i x <= -s x_k + eta max|x|,    eta = sum_j (|e_j| + sum_i w_i r_ij).

    If eta < 1 for both signs of every coordinate that any g~_i reads, these coordinates of x are 0. The given weights hold for a
    sum of rows that is 0, up to rounding: added to any that give e_k they make nonnegative ones, whose fractions decide.
    """
    n, which = form.neurons, weights.nonzero()[:, 0]
    place = phases[which] - (weights[which] > 0).long()
    inside = (phases[which] >= 0) & (place >= 0) & (place < len(form.breaks))
    if not len(which) or not bool((form.conic[which] & inside).all()) or bool(form.breaks[place, which].any()):
        return False
    rows, radii = form.q[which, n:] * weights[which].sign()[:, None], form.form.q.spread[which, n:]
    read = ((rows != 0) | (radii != 0)).any(0)
    if not bool(read.any()):
        return False
    rows, radii, given = rows[:, read], radii[:, read].sum(1), weights[which].abs()
    off = radii.mul(1 + 2.0**-20).tolist()
    exact = [([Fraction(g) for g in row], Fraction(r)) for row, r in zip(rows.tolist(), off, strict=True)]
    for k, sign in itertools.product(range(rows.shape[1]), (1, -1)):
        made = torch.linalg.pinv(rows.mT)[:, k] * -sign
        # A hair more than what makes them nonnegative: what is cut off would be missing in the sum.
        made = (made + (-made / given).amax().clamp_min(0) * given).clamp_min(0)
        factors = [Fraction(w) for w in made.tolist()]
        rest = [Fraction(sign * (j == k)) for j in range(rows.shape[1])]
        for w, (row, _) in zip(factors, exact, strict=True):
            rest = [e + w * g for e, g in zip(rest, row, strict=True)]
        if sum(map(abs, rest)) + sum((w * r for w, (_, r) in zip(factors, exact, strict=True)), Fraction(0)) >= 1:
            return False
    return True


class _Affine:
    """Pre-activations as exact affine functions of the input, where only fixed neurons enter."""

    def __init__(self, form: PhaseForm, phases: list[int]) -> None:
        self.form, self.phases, self.exact = form, phases, form.exact.tolist()
        self.known: dict[int, _Row | None] = {}

    def row(self, i: int) -> _Row | None:
        """Gradient and constant of neuron i; None if a free neuron enters, or a number that is known up to a radius only."""
        if i not in self.known:
            self.known[i] = self._row(i)
        return self.known[i]

    def _row(self, i: int) -> _Row | None:
        if not self.exact[i]:
            return None
        n = self.form.neurons
        numbers = self.form.q[i].tolist()
        gradient, constant = [Fraction(v) for v in numbers[n:]], Fraction(float(self.form.bias[i]))
        for j, weight in enumerate(numbers[:n]):
            if weight == 0:
                continue
            below = self.row(j) if self.phases[j] >= 0 else None
            if below is None:
                return None
            slope, height = self._piece(j)
            factor = Fraction(weight) * slope
            if factor:
                gradient = [g + factor * b for g, b in zip(gradient, below[0], strict=True)]
            constant += factor * below[1] + Fraction(weight) * height
        return gradient, constant

    def _piece(self, j: int) -> tuple[Fraction, Fraction]:
        """phi(p) = slope p + height on the neuron's piece."""
        form = self.form
        slopes = [Fraction(v) for v in form.pieces[:, j].tolist()]
        breaks = form.breaks[:, j].tolist()
        if not breaks:
            return slopes[0], Fraction(float(form.values[j]))
        height = Fraction(float(form.values[j])) - slopes[0] * Fraction(breaks[0])
        for k in range(self.phases[j]):
            if math.isfinite(breaks[k]):
                height += (slopes[k] - slopes[k + 1]) * Fraction(breaks[k])
        return slopes[self.phases[j]], height


class _Domain:
    """The domain in exact numbers."""

    def __init__(self, form: PhaseForm, part: int) -> None:
        self.lower, self.upper = ([Fraction(v) for v in end[part].tolist()] for end in (form.lower, form.upper))
        self.center = [Fraction(v) for v in form.center.tolist()]
        self.norm = form.ball_norm if math.isfinite(form.radius) else math.inf
        if math.isfinite(form.radius):
            self.radius = Fraction(form.radius)
            if self.norm == math.inf:  # the box of the form is rounded outward
                self.lower, self.upper = [c - self.radius for c in self.center], [c + self.radius for c in self.center]

    def systems(self, rows: list[_Row], guess: list[float]) -> list[list[list[Fraction]]]:
        """Homogeneous equations of the weights that a combination at most 0 on the domain is meant to satisfy.

        Its gradient vanishes, or is largest where the guess says (a vertex, an edge, ... of the domain), and its value
        there is 0. A single demand that only touches the domain needs none.
        """
        if len(rows) == 1:
            return [[]]
        terms = [[w * float(g[j]) for w, (g, _) in zip(guess, rows, strict=True)] for j in range(len(self.center))]
        sums, masses = [sum(t) for t in terms], [sum(abs(v) for v in t) for t in terms]
        here = [s != 0 and abs(s) > _NONE * m for s, m in zip(sums, masses, strict=True)]
        columns = [[g[j] for g, _ in rows] for j in range(len(self.center))]
        heights = [h for _, h in rows]
        if self.norm == math.inf:
            ends = [high if s > 0 else low for s, low, high in zip(sums, self.lower, self.upper, strict=True)]
            here = [h or low == high for h, low, high in zip(here, self.lower, self.upper, strict=True)]
        else:
            ends = self.center
        level = [h + sum((c[i] * e for c, e in zip(columns, ends, strict=True)), Fraction(0)) for i, h in enumerate(heights)]
        if self.norm == 1 and any(here):
            top = max(abs(s) for s in sums)
            signed = [[v if s > 0 else -v for v in c] for c, s in zip(columns, sums, strict=True) if abs(s) > (1 - _NONE) * top]
            equations = [[a - b for a, b in zip(signed[0], other, strict=True)] for other in signed[1:]]
            level = [v + self.radius * c for v, c in zip(level, signed[0], strict=True)]
        else:
            equations = [c for c, h in zip(columns, here, strict=True) if not h]
        return [equations, [*equations, level]]

    def nowhere_positive(self, gradient: list[Fraction], constant: Fraction) -> bool:
        """Whether gradient x + constant <= 0 on the whole domain."""
        if self.norm == math.inf:
            ends = zip(gradient, self.lower, self.upper, strict=True)
            return constant + sum(max(g * low, g * high) for g, low, high in ends) <= 0
        room = -constant - sum(g * c for g, c in zip(gradient, self.center, strict=True))
        if self.norm == 1:
            return room >= self.radius * max(abs(g) for g in gradient)
        return room >= 0 and room * room >= self.radius * self.radius * sum(g * g for g in gradient)


def _solid(form: PhaseForm) -> bool:
    """Whether the domain has an interior."""
    if form.directions:
        return True
    return form.radius > 0 and bool((form.lower < form.upper).all())


def _solve(equations: list[list[Fraction]], guess: list[float]) -> list[Fraction]:
    """A solution of the homogeneous equations near the guess: Gauss-Jordan, unknowns without a pivot as guessed."""
    system, pivots = [row[:] for row in equations], []
    size = len(guess)
    free = set(range(size))
    for row in system:
        for pivot, other in pivots:
            if row[pivot]:
                factor = row[pivot]
                row[:] = [a - factor * b for a, b in zip(row, other, strict=True)]
        candidates = [j for j in free if row[j]]
        if not candidates:
            continue
        pivot = max(candidates, key=lambda j, row=row: abs(float(row[j]) * guess[j]))
        head = row[pivot]
        row[:] = [a / head for a in row]
        for _, other in pivots:
            if other[pivot]:
                factor = other[pivot]
                other[:] = [a - factor * b for a, b in zip(other, row, strict=True)]
        pivots.append((pivot, row))
        free.remove(pivot)
    result = [Fraction(g) for g in guess]
    for pivot, row in pivots:
        result[pivot] = -sum((row[j] * result[j] for j in free), Fraction(0))
    return result
