"""Many small linear programs at once, solved only until the sign of their maximum is known.

Maximise g y + c over a y <= b, |y| <= 1, for many g over few polytopes: Mehrotra's predictor-corrector method (SIAM J.
Optim. 2, 1992), started from the polytope's analytic center. A point with a positive value decides a program one way;
multipliers z >= 0 decide it the other way as soon as b z + ||g - a' z||_1 + c < 0, whatever else is wrong with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 1e-9
"""Distance by which a maximum must stay below zero before it counts as negative."""
INSIDE = 1e-7
"""Distance from every constraint at which a point counts as an interior point."""
_ITERATIONS = 12
_CENTERING = 10
_ROOM = 0.1


@dataclass(frozen=True, eq=False)
class Signs:
    """What is known of the maxima of P programs.

    Attributes:
        negative: whether the multipliers prove a negative maximum, up to rounding, (P,).
        multipliers: of the rows of a, (P, M).
        positive: whether `point`, inside all constraints, has a positive value, (P,).
        point: (P, d).
    """

    negative: Tensor
    multipliers: Tensor
    positive: Tensor
    point: Tensor


def signs(a: Tensor, b: Tensor, g: Tensor, c: Tensor, owner: Tensor) -> Signs:
    """Signs of max g y + c over the polytope of each program.

    Args:
        a, b: K polytopes, (K, M, d) and (K, M); rows of length one, or zero with a positive b. Programs over a polytope
            in which no interior point is found stay undecided.
        g, c: the objectives, (P, d) and (P,).
        owner: the polytope of each program, (P,).
    """
    count, d = g.shape
    m = a.shape[1]
    eye = torch.eye(d, dtype=g.dtype, device=g.device).expand(len(a), -1, -1)
    rows, right = torch.cat([a, eye, -eye], 1), torch.cat([b, b.new_ones(len(b), 2 * d)], 1)
    size = torch.linalg.vector_norm(g, dim=1).clamp_min(1e-300)
    start, inside = _center(rows, right)
    live = inside[owner].nonzero()[:, 0]
    negative, positive = (torch.zeros(count, dtype=torch.bool, device=g.device) for _ in range(2))
    multipliers, points = g.new_zeros(count, m), torch.zeros_like(g)
    g, c = (g / size[:, None])[live], (c / size)[live]
    a, b, y = rows[owner[live]], right[owner[live]], start[owner[live]]
    s = b - (a @ y[:, :, None])[:, :, 0]
    z = 0.3 / s
    for _ in range(_ITERATIONS):
        if not len(live):
            break
        up = ((g * y).sum(1) + c > INSIDE) & (s.amin(1) > INSIDE)
        rest = g - (z[:, None, :m] @ a[:, :m])[:, 0]
        down = (b[:, :m] * z[:, :m]).sum(1) + rest.abs().sum(1) + c < -MARGIN
        done = up | down
        if bool(done.any()):
            positive[live[up]], negative[live[down]] = True, True
            points[live[up]] = y[up]
            multipliers[live[down]] = z[down, :m] * size[live[down], None]
            keep = (~done).nonzero()[:, 0]
            live, a, b, g, c, y, s, z, rest = (v[keep] for v in (live, a, b, g, c, y, s, z, rest))
        dual = rest - (z[:, m : m + d] - z[:, m + d :])
        weight = z / s
        factor, info = torch.linalg.cholesky_ex(a.mT @ (weight[:, :, None] * a))
        good = (info == 0) & factor.diagonal(dim1=1, dim2=2).isfinite().all(1)
        if not bool(good.all()):
            keep = good.nonzero()[:, 0]
            live, a, b, g, c, y, s, z = (v[keep] for v in (live, a, b, g, c, y, s, z))
            dual, weight, factor = dual[keep], weight[keep], factor[keep]
        gap = (s * z).mean(1, keepdim=True)
        _, ds, dz = _direction(-z, a, dual, weight, factor)
        ahead = ((s + _longest(s, ds) * ds) * (z + _longest(z, dz) * dz)).mean(1, keepdim=True)
        dy, ds, dz = _direction(((ahead / gap) ** 3 * gap - ds * dz) / s - z, a, dual, weight, factor)
        along, across = 0.95 * _longest(s, ds), 0.95 * _longest(z, dz)
        y, z = y + along * dy, z + across * dz
        s = b - (a @ y[:, :, None])[:, :, 0]
    return Signs(negative, multipliers, positive, points)


def _center(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Points near the analytic centers, (K, d), and whether they are inside, (K,).

    Newton's method for a y + s = b, a' z = 0, s z = 1 with s, z > 0, from s that need not satisfy the first.
    """
    y = a.new_zeros(len(a), a.shape[2])
    s = b.clamp_min(_ROOM)
    z = 1 / s
    for _ in range(_CENTERING):
        primal, dual = b - (a @ y[:, :, None])[:, :, 0] - s, -(z[:, None] @ a)[:, 0]
        weight = z / s
        factor, _ = torch.linalg.cholesky_ex(a.mT @ (weight[:, :, None] * a))
        dy, ds, dz = _direction(1 / s - z - weight * primal, a, dual, weight, factor)
        ds = ds + primal
        along, across = (0.9 * _longest(v, step) for v, step in ((s, ds), (z, dz)))
        along, across = along.nan_to_num(0.0), across.nan_to_num(0.0)
        y, s, z = y + along * dy, s + along * ds, z + across * dz
    return y, (b - (a @ y[:, :, None])[:, :, 0]).amin(1) > 0


def _direction(part: Tensor, a: Tensor, dual: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's direction (y, s, z) that changes z by `part` minus weight times the change of s, and a' z by `dual`."""
    step = torch.cholesky_solve(dual[:, :, None] - a.mT @ part[:, :, None], factor)
    moved = (a @ step)[:, :, 0]
    return step[:, :, 0], -moved, part + weight * moved


def _longest(x: Tensor, step: Tensor) -> Tensor:
    """The largest t <= 1 with x + t step >= 0, (P, 1)."""
    return (1 / (-step / x).amax(1, keepdim=True).clamp_min(1.0)).clamp_max(1.0)
