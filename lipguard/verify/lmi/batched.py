"""The one inequality, Z(rho, t; slopes) >= 0, in dense matrices, many at a time: of all of R^d, of domains, of leaves.

With p = Q (w, x), Q = [B A], y = Y (w, x), Y = [C D], slopes [alpha, beta], cross = t (alpha + beta), curve = 2 t alpha beta,

    Z = rho E_x + 2T - [cross Q]_w - [cross Q]_w' + Q' curve Q - Y'Y.

Three matrices of different order say the same thing, by Schur complements of the positive blocks rho I and I:

    inputs kept          order n + d:  Z itself;
    inputs eliminated    order n + m:  [[2T - cross B - (cross B)', C'], [C, I]] - a a' / rho,  a = [cross A; -D],  curve = 0;
    both, if D = 0       order n:      2T - cross B - (cross B)' - C'C - (cross A)(cross A)' / rho,  curve = 0.

Each is a matrix K of few terms, less (or plus) squares a diag(weights) a'. What rounding may have moved is never formed as a
matrix for the squares: it is applied to the one vector that the test of definiteness asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.rounding import TINY, gamma, prove_positive_definite, proves_positive_definite
from lipguard.verify.enclosed import Enclosed

_Slopes = tuple[Tensor, Tensor]


class _Square:
    """a diag(weights) a' and a bound of its error on nonnegative vectors."""

    def __init__(self, a: Enclosed, weights: Tensor) -> None:
        self.a, self.weights, self.size = a, weights, a.magnitude()
        self.center = (a.center * weights[..., None, :]) @ a.center.mT

    def error(self, v: Tensor, relative: float) -> Tensor:
        """|computed - true| v for v (K, N): |a a' - true| <= m r' + r m', m above |a|; and `relative` for the roundings."""
        weights, mass = self.weights.abs(), _times(self.size.mT, v)
        if self.a.radius is None:
            return relative * _times(self.size, weights * mass)
        off = relative * mass + _times(self.a.radius.mT, v)
        return _times(self.size, weights * off) + _times(self.a.radius, weights * mass)


class Inequality:
    """Z(rho, t) of K networks, for any rho."""

    def __init__(self, q: Enclosed, y: Enclosed, t: Tensor, slopes: _Slopes | None = None, present: Tensor | None = None) -> None:
        """All that does not depend on rho.

        Args:
            q, y: (K, n, n + d) and (K, m, n + d).
            t: multipliers, (K, n); negative and non-finite ones count as 0.
            slopes: alpha and beta, (K or 1, n) each; None for [0, 1].
            present: which places hold a neuron, (K, n); rows and columns of the others are 0. None for all.
        """
        n, width = q.center.shape[-2:]
        inputs, outputs = width - n, y.center.shape[-2]
        t = torch.where(t.isfinite() if present is None else present & t.isfinite(), t, torch.zeros_like(t)).clamp_min(0)
        alpha, beta = (torch.zeros_like(t), torch.ones_like(t)) if slopes is None else slopes
        cross, curve = t * (alpha + beta), 2 * t * alpha * beta
        # A place without a neuron gets a one: it is decoupled.
        unit = 2 * t if present is None else torch.where(present, 2 * t, torch.ones_like(t))
        direct = bool(y.magnitude()[..., n:].any())
        bends = bool(curve.any())
        self.keeps = bends or inputs <= (outputs if direct else 0)
        squares: list[_Square] = []
        minus = -torch.ones(1, outputs, dtype=t.dtype, device=t.device)
        border: Enclosed | None = None
        if self.keeps:
            border, end = _weighted(q[..., n:], -cross), 0.0
            squares.append(_Square(y.mT, minus))
            if bends:
                squares.append(_Square(q.mT, curve))
        elif direct:
            border, end = y[..., :n].mT, 1.0
        else:
            end = 0.0
            squares.append(_Square(y[..., :n].mT, minus))
        # Each entry is a sum of at most 7 parts, each of at most max(n, d, m) products of at most 6 roundings.
        self.count = max(n, inputs, outputs) + 32
        self.relative = gamma(self.count)
        self.n, self.squares = n, squares
        self._assemble(q[..., :n], cross, unit, border, end)
        self.inward: _Square | None = None
        if not self.keeps:
            self._eliminate(q[..., n:], cross, None if border is None else -y[..., n:])
        # Products below the normal range lose less than TINY each, before they are multiplied by t, by an entry, or by 1 / rho.
        every = squares if self.inward is None else [*squares, self.inward]
        self.top = 1 + unit.sum(-1) + cross.abs().sum(-1) + curve.abs().sum(-1) + sum(s.size.sum((-2, -1)) for s in every)

    def _assemble(self, b: Enclosed, cross: Tensor, unit: Tensor, border: Enclosed | None, end: float) -> None:
        """K = [[2T - cross B - (cross B)', border], [border', end]] and squares; K is off by spread + spread'."""
        coupling = _weighted(b, -cross)
        matrix, spread = coupling.center + coupling.center.mT, self.relative * coupling.center.abs()
        if coupling.radius is not None:
            spread += coupling.radius
        matrix.diagonal(dim1=-2, dim2=-1).add_(unit)
        spread.diagonal(dim1=-2, dim2=-1).add_(self.relative / 2 * unit)
        if border is not None:
            size = border.center.shape[-1]
            last = torch.eye(size, dtype=matrix.dtype, device=matrix.device).expand(len(matrix), -1, -1) * end
            below = (border.spread + self.relative * border.magnitude()).mT.expand_as(border.center.mT)
            matrix = torch.cat([torch.cat([matrix, border.center], -1), torch.cat([border.center.mT, last], -1)], -2)
            spread = torch.cat(
                [torch.cat([spread, torch.zeros_like(border.center)], -1), torch.cat([below, last * self.relative], -1)], -2
            )
        for square in self.squares:
            matrix += square.center
            del square.center
        self.matrix, self.spread = matrix, spread
        self.diagonal = matrix.diagonal(dim1=-2, dim2=-1).clone()

    def _eliminate(self, inward: Enclosed, cross: Tensor, direct: Enclosed | None) -> None:
        """The square over rho of what the inputs reach: of the rows from the first to the last of these."""
        reached = torch.atleast_2d(inward.magnitude().any(-1)).any(0).nonzero()[:, 0].tolist()
        self.span = slice(reached[0], reached[-1] + 1) if reached else slice(0, 0)
        if direct is not None:  # its rows come behind the neurons'
            self.span = slice(self.span.start, None)
        a = _weighted(inward[..., self.span, :], cross[..., self.span])
        a = a if direct is None else Enclosed.cat([a, direct], -2)
        self.inward = _Square(a, a.center.new_ones(1, a.center.shape[-1]))
        self.rest = self.matrix[..., self.span, self.span].clone()

    def proves(self, rho: Tensor) -> Tensor:
        """Whether sqrt(rho) is proved to bound each network's constant from 2-norm to 2-norm: rho (K,), to (K,) of bool."""
        good = rho.isfinite() & (rho > 0)
        rho = torch.where(good, rho, torch.ones_like(rho))
        if self.inward is None:
            self.matrix.diagonal(dim1=-2, dim2=-1)[..., self.n :] = self.diagonal[..., self.n :] + rho[:, None]
        else:
            torch.addcdiv(self.rest, self.inward.center, rho[:, None, None], value=-1, out=self.matrix[..., self.span, self.span])

        def radius(v: Tensor) -> Tensor:
            out = _times(self.spread, v) + _times(self.spread.mT, v)
            for square in self.squares:
                out = out + square.error(v, self.relative)
            if self.inward is None:
                out[..., self.n :] += self.relative * rho[:, None] * v[..., self.n :]
            else:
                out[..., self.span] += self.inward.error(v[..., self.span], self.relative) / rho[:, None]
            lost = 16 * self.count * TINY * self.top * self.top * (1 + 1 / rho)
            return out * (1 + 8 * gamma(v.shape[-1] + self.count)) + (lost * v.sum(-1))[:, None]

        if len(self.matrix) == 1:
            proved = proves_positive_definite(self.matrix[0], lambda v: radius(v[None])[0])
            return good & proved
        return good & prove_positive_definite(self.matrix, radius)


def proves(q: Enclosed, y: Enclosed, t: Tensor, rho: Tensor, present: Tensor | None = None) -> Tensor:
    """Whether sqrt(rho) is proved to bound the constants of K maps of neurons with slopes [0, 1]: see `Inequality`, (K,)."""
    return Inequality(q, y, t, None, present).proves(rho)


def _weighted(matrix: Enclosed, cross: Tensor) -> Enclosed:
    """cross matrix, row by row; the three roundings of each entry are left to the relative error of the sums it goes into."""
    radius = None if matrix.radius is None else matrix.radius * cross.abs()[..., None]
    return Enclosed(matrix.center * cross[..., None], radius)


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v[..., None])[..., 0]
