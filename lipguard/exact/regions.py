"""Linear regions as polytopes: has a region of the domain an interior, and where is a point of it?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls

from lipguard.certificate import Ball, Domain
from lipguard.exact.piecewise import Matrix, Pattern, PiecewiseForm
from lipguard.solvers import highs

RADIUS = 1e-9
"""A region whose inscribed ball is smaller than this, relative to the domain, is taken to have no interior: the
linear programs are solved to 1e-10. It can only lose a maximiser, never raise a lower bound."""

_ZERO = 1e-12
"""A row this small against the terms it was summed from is zero: cancellation in float64 leaves about 1e-16."""


@dataclass(frozen=True, eq=False)
class DomainForm:
    """The domain in scaled coordinates u = (x - center) / scale.

    Attributes:
        center, scale: of the change of coordinates.
        lower, upper: bounds of u, infinite for R^d, shape (d,).
        rows, right: rows [u, s] <= right with auxiliary s >= 0: an l1 ball, exactly. Shape (r, d + auxiliary).
        auxiliary: number of s.
        round: whether ||u||_2 <= 1 is meant as well.
        domain: what the form was made from.
    """

    center: Matrix
    scale: float
    lower: Matrix
    upper: Matrix
    rows: Matrix
    right: Matrix
    auxiliary: int
    round: bool
    domain: Domain | None


def domain_form(domain: Domain | None, inputs: int) -> DomainForm:
    """The domain of the given number of inputs.

    Raises:
        InvalidDomain: empty, reversed, or of another dimension.
    """
    none, nothing = np.zeros((0, inputs)), np.zeros(0)
    if domain is None:
        free = np.full(inputs, np.inf)
        return DomainForm(np.zeros(inputs), 1.0, -free, free, none, nothing, 0, False, None)
    if isinstance(domain, Ball):
        center = domain.checked_center(inputs).numpy()
        ones = np.ones(inputs) if domain.radius > 0 else np.zeros(inputs)
        scale = float(domain.radius) or 1.0
        low, high = -ones, ones
        if domain.box is not None:
            low, high = (np.clip((v.numpy() - center) / scale, -ones, ones) for v in domain.box.bounds(inputs))
        if domain.norm != 1.0 or domain.radius == 0:
            round_ball = domain.norm == 2.0 and domain.radius > 0 and inputs > 1
            return DomainForm(center, scale, low, high, none, nothing, 0, round_ball, domain)
        eye = np.eye(inputs)
        rows = np.block([[eye, -eye], [-eye, -eye], [np.zeros((1, inputs)), np.ones((1, inputs))]])
        return DomainForm(center, scale, low, high, rows, np.r_[np.zeros(2 * inputs), 1.0], inputs, False, domain)
    low, high = (v.numpy() for v in domain.bounds(inputs))
    center = low / 2 + high / 2
    scale = float((high / 2 - low / 2).max(initial=0.0)) or 1.0
    return DomainForm(center, scale, (low - center) / scale, (high - center) / scale, none, nothing, 0, False, domain)


@dataclass(frozen=True, eq=False)
class Cell:
    """rows x <= right for the neurons in `owners`, in the coordinates of x.

    `violated` lists neurons that are constant on the region and contradict their piece: it has no point then.
    """

    rows: Matrix
    right: Matrix
    owners: Pattern
    violated: tuple[int, ...] = ()


def cell(form: PiecewiseForm, pattern: Pattern, until: int | None = None) -> Cell:
    """The inequalities of a pattern, of its first `until` layers if given.

    A neuron that is constant on the region asks nothing of x: it is dropped where its constant allows its piece
    (on a break point both sides are allowed, the Jacobian does not see the difference).
    """
    g, h = form.preactivations(pattern, until)
    count = len(h)
    low, high = form.intervals_of(pattern)
    slopes = np.abs(form.slopes_of(pattern))
    # Size of the terms that cancelled in each row.
    weights = np.abs(form.b_matrix[:count, :count]) * slopes[:count]
    terms = np.abs(form.a[:count]).sum(1) + weights @ np.abs(g).sum(1)
    heights = np.abs(form.bias[:count]) + weights @ np.abs(h)
    constant = np.abs(g).sum(1) <= _ZERO * terms
    slack = _ZERO * (heights + np.abs(h))
    violated = np.flatnonzero(constant & ((h < low[:count] - slack) | (h > high[:count] + slack)))
    below = np.flatnonzero(~constant & np.isfinite(low[:count]))
    above = np.flatnonzero(~constant & np.isfinite(high[:count]))
    rows = np.concatenate([-g[below], g[above]])
    right = np.concatenate([h[below] - low[below], high[above] - h[above]])
    return Cell(rows, right, np.concatenate([below, above]), tuple(violated.tolist()))


@dataclass(frozen=True, eq=False)
class Interior:
    """The largest ball inscribed in a cell within the domain.

    Attributes:
        radius: in scaled coordinates, at most 1; nonpositive if the interior is empty; nan if undecided.
        point: its centre, moved into the domain; shape (d,).
        support: owners of the inequalities that limit the radius, first those that do so most.
    """

    radius: float
    point: Matrix
    support: Pattern

    @property
    def exists(self) -> bool:
        """Whether there is an interior; an undecided one counts as existing."""
        return not self.radius <= RADIUS


def interior(domain: DomainForm, region: Cell) -> Interior:
    """Solve the Chebyshev-radius linear program of a cell within the domain.

    Only the cell's own inequalities get a margin: what counts is that an open region meets the domain.
    """
    inputs = len(domain.center)
    if region.violated:
        return Interior(-np.inf, domain.center, np.array(region.violated[:1], dtype=np.intp))
    rows = region.rows * domain.scale
    right = region.right - region.rows @ domain.center
    length = np.linalg.norm(rows, axis=1)
    rows, right = rows / length[:, None], right / length
    extra = len(domain.right)
    matrix = np.zeros((len(rows) + extra, inputs + domain.auxiliary + 1))
    matrix[: len(rows), :inputs], matrix[: len(rows), -1] = rows, 1.0
    matrix[len(rows) :, :-1] = domain.rows
    objective = np.zeros(matrix.shape[1])
    objective[-1] = 1.0
    low = np.r_[domain.lower, np.zeros(domain.auxiliary), -np.inf]
    high = np.r_[domain.upper, np.full(domain.auxiliary, np.inf), 1.0]
    # The radius may be negative, so that the program always has a solution: any other status is a failure.
    result = highs.maximise(objective, matrix, np.r_[right, domain.right], low, high)
    if not result.optimal:
        return Interior(np.nan, domain.center.copy(), region.owners)
    weight = result.duals[: len(rows)]
    order = np.argsort(-weight)
    support = region.owners[order[weight[order] > 1e-9]]
    u, radius = result.x[:inputs], float(result.x[-1])
    if domain.round and radius > RADIUS:
        u, radius = _within_unit_ball(rows, right, u)
    x = domain.center + domain.scale * u
    if domain.domain is not None:
        x = domain.domain.project(torch.from_numpy(x)).numpy()
    return Interior(radius, x, support)


def _within_unit_ball(rows: Matrix, right: Matrix, inner: Matrix) -> tuple[Matrix, float]:
    """A point strictly inside both {rows u <= right} and the unit ball, with the smaller of its two margins.

    The polytope has an interior (`inner` lies in it), so the two interiors meet exactly if the polytope's point
    nearest to 0 is nearer than 1. That point: Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23.
    """
    nearest = np.zeros(len(inner))
    if (right < 0).any():
        system = np.concatenate([-rows.T, -right[None]])
        target = np.r_[np.zeros(len(inner)), 1.0]
        multipliers, _ = nnls(system, target)
        residual = system @ multipliers - target
        if residual[-1] == 0:
            return nearest, np.nan
        nearest = -residual[:-1] / residual[-1]
    distance = np.linalg.norm(nearest)
    if distance >= 1 - RADIUS:
        return nearest, 1 - float(distance) - RADIUS
    # Along the way from the nearest point to the inner one the margin to the rows grows, that to the sphere may fall.
    best, margin = nearest, -np.inf
    for t in (1.0, *np.geomspace(0.9, 1e-6, 60)):
        u = nearest + t * (inner - nearest)
        both = min(float((right - rows @ u).min(initial=np.inf)), 1 - float(np.linalg.norm(u)))
        if both > margin:
            best, margin = u, both
    return best, margin
