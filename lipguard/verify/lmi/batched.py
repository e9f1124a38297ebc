"""The one inequality, Z(rho, t; slopes) >= 0, in one matrix, many at a time: of all of R^d, of domains, of leaves.

With p = Q (w, x), Q = [B A], y = Y (w, x), Y = [C D], slopes [alpha, beta], cross = t (alpha + beta), curve = 2 t alpha beta,

    Z = rho E_x + 2T - [cross Q]_w - [cross Q]_w' + Q' curve Q - Y'Y.

Three matrices of different order say the same thing, by Schur complements of the positive blocks rho I and I:

    inputs kept          order n + d:  Z itself;
    inputs eliminated    order n + m:  [[2T - cross B - (cross B)', C'], [C, I]] - a a' / rho,  a = [cross A; -D],  curve = 0;
    both, if D = 0       order n:      2T - cross B - (cross B)' - C'C - (cross A)(cross A)' / rho,  curve = 0.

Each is a diagonal, plus s M and its transpose for the rows M of Q (s = -cross) and of Y (s = 1), plus squares a diag(weights) a',
added up block by block: neither Q nor Y is formed. Nor is what rounding may have moved: it is applied to the one vector that
the test of definiteness asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipguard.rounding import TINY, gamma, prove_positive_definite, proves_positive_definite, sqrt_up
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.form import Block, Form


class _Square:
    """a diag(weights) a', a in blocks of rows at their places; weights (K or 1, k), None for ones."""

    def __init__(self, parts: Sequence[tuple[slice, Enclosed]], weights: Tensor | None = None) -> None:
        self.parts, self.weights = parts, weights
        # Without weights and radii Cauchy and Schwarz bound |a| |a'| by the rows' lengths.
        self.short = weights is None and all(a.radius is None for _, a in parts)
        self.sizes = [_lengths(a.center) if self.short else a.magnitude() for _, a in parts]
        self.top = max((float(size.max()) for size in self.sizes if not self.short), default=0.0)

    def add_to(self, matrix: Tensor, sign: float) -> None:
        """Add it to a matrix, or take it away."""
        for here, a in self.parts:
            left = a.center if self.weights is None else a.center * self.weights[..., None, :]
            for there, b in self.parts:
                matrix[..., here, there].add_(left @ b.center.mT, alpha=sign)

    def error(self, v: Tensor, relative: float) -> Tensor:
        """A bound of |computed - true| v for v >= 0, (K, N).

        |a a' - true| <= m r' + r m', with m above |a| and r its radius; `relative` m m' is for the roundings.
        """
        out, parts = torch.zeros_like(v), [(here, size, a.radius) for (here, a), size in zip(self.parts, self.sizes, strict=True)]
        if self.short:
            mass = sum((size * v[..., here]).sum(-1, keepdim=True) for here, size, _ in parts)
            for here, size, _ in parts:
                out[..., here] = relative * size * mass
            return out
        none = v.new_zeros(())
        mass = sum((_times(size.mT, v[..., here]) for here, size, _ in parts), none)
        off = relative * mass + sum((_times(r.mT, v[..., here]) for here, _, r in parts if r is not None), none)
        if self.weights is not None:
            mass, off = self.weights.abs() * mass, self.weights.abs() * off
        for here, size, r in parts:
            out[..., here] = _times(size, off) + (0.0 if r is None else _times(r, mass))
        return out


class Inequality:
    """Z(rho, t) of K networks, for any rho."""

    def __init__(self, form: Form, t: Tensor, present: Tensor | None = None) -> None:
        """All that does not depend on rho.

        Args:
            form: of one network, or of K alike, whose matrices and slopes are batches.
            t: multipliers, (K, n); negative and non-finite ones count as 0.
            present: which places hold a neuron, (K, n); rows and columns of the others are 0. None for all.
        """
        n, inputs, outputs = form.neurons, form.inputs, form.outputs
        t = torch.where(t.isfinite() if present is None else present & t.isfinite(), t, torch.zeros_like(t)).clamp_min(0)
        cross, curve = t * (form.alpha + form.beta), 2 * t * form.alpha * form.beta
        blocks = form.blocks
        direct, bends = any(rows.start >= n and columns.start >= n for rows, columns, _ in blocks), bool(curve.any())
        self.keeps = bends or inputs <= (outputs if direct else 0)
        self.n, behind = n, inputs if self.keeps else outputs if direct else 0
        # Each entry is a sum of at most 7 parts, each of at most max(n, d, m) products of at most 6 roundings.
        self.count = max(n, inputs, outputs) + 32
        self.relative = gamma(self.count)
        self.factor = torch.cat([-cross, cross.new_ones(len(t), behind)], 1)
        # A place without a neuron gets a one: it is decoupled. Kept inputs get rho when it is known.
        unit = 2 * t if present is None else torch.where(present, 2 * t, torch.ones_like(t))
        self.diagonal = torch.cat([unit, unit.new_full((len(t), behind), 0.0 if self.keeps else 1.0)], 1)
        self.matrix = torch.diag_embed(self.diagonal)
        self.squares: list[_Square] = []
        for start, row in form.rows.items():
            a, here = [(columns, matrix.mT) for _, columns, matrix in row], row[0].rows
            if start >= n and (self.keeps or not direct):
                self._add(_Square(a), -1)
            elif start < n and bends:
                self._add(_Square(a, curve[:, here]), 1)
        coupled = [block for block in blocks if block.rows.start < n + behind * (not self.keeps)]
        self.kept = self.matrix.diagonal(dim1=-2, dim2=-1)[:, n:].clone()
        self.couplings = [self._couple(block) for block in coupled if self.keeps or block.columns.start < n]
        self._eliminate([] if self.keeps else [block for block in coupled if block.columns.start >= n])
        # Products below the normal range lose less than TINY each, before they are multiplied by t, by an entry, or by 1 / rho.
        tops = [square.top for square in (*self.squares, self.inward)]
        self.top = 1 + unit.sum(-1) + cross.abs().sum(-1) + curve.abs().sum(-1) + sum(tops)

    def _add(self, square: _Square, sign: float) -> None:
        square.add_to(self.matrix, sign)
        self.squares.append(square)

    def _couple(self, block: Block) -> tuple[slice, slice, Tensor]:
        """Add s M and its transpose; where it stands, and a bound of what it is off by: the radius, and roundings."""
        rows, columns, (center, radius) = block.rows, block.columns, (block.matrix.center, block.matrix.radius)
        scaled, size = center * self.factor[:, rows, None], self.factor[:, rows, None].abs()
        self.matrix[..., rows, columns] += scaled
        self.matrix[..., columns, rows] += scaled.mT
        off = scaled.abs_().mul_(self.relative)
        return rows, columns, off if radius is None else off.add_(radius * size)

    def _eliminate(self, seeing: Sequence[Block]) -> None:
        """a a' of the rows that see the eliminated inputs, from the first to the last of these; s on both sides, then 1 / rho."""
        first, last = min((b.rows.start for b in seeing), default=0), max((b.rows.stop for b in seeing), default=0)
        self.span = slice(first, last)
        self.inward = _Square([(slice(b.rows.start - first, b.rows.stop - first), b.matrix) for b in seeing])
        self.rest, s = self.matrix[:, self.span, self.span].clone(), self.factor[:, self.span]
        self.gram = torch.zeros_like(self.rest)
        self.inward.add_to(self.gram, 1)
        self.gram.mul_(s[:, :, None]).mul_(s[:, None, :])

    def proves(self, rho: Tensor) -> Tensor:
        """Whether sqrt(rho) is proved to bound each network's constant from 2-norm to 2-norm: rho (K,), to (K,) of bool."""
        good = rho.isfinite() & (rho > 0)
        rho = torch.where(good, rho, torch.ones_like(rho))[:, None]
        diagonal, s = self.diagonal.clone(), self.factor[:, self.span].abs()
        if self.keeps:
            diagonal[:, self.n :] = rho
            self.matrix.diagonal(dim1=-2, dim2=-1)[:, self.n :] = self.kept + rho
        torch.addcdiv(self.rest, self.gram, rho[:, :, None], value=-1, out=self.matrix[:, self.span, self.span])

        def radius(v: Tensor) -> Tensor:
            out = self.relative * diagonal * v
            for rows, columns, off in self.couplings:
                out[:, rows] += _times(off, v[:, columns])
                out[:, columns] += _times(off.mT, v[:, rows])
            for square in self.squares:
                out += square.error(v, self.relative)
            out[:, self.span] += s * self.inward.error(s * v[:, self.span], self.relative) / rho
            lost = 16 * self.count * TINY * (self.top * self.top)[:, None] * (1 + 1 / rho)
            return out * (1 + 8 * gamma(v.shape[-1] + self.count)) + lost * v.sum(-1, keepdim=True)

        if len(self.matrix) == 1:
            return good & proves_positive_definite(self.matrix[0], lambda v: radius(v[None])[0])
        return good & prove_positive_definite(self.matrix, radius)


def _lengths(rows: Tensor) -> Tensor:
    """Upper bounds of the rows' 2-norms; squares that underflow lose less than TINY each."""
    count = rows.shape[-1]
    return torch.linalg.vector_norm(rows, dim=-1) * (1 + 2 * gamma(count + 8)) + sqrt_up(count * TINY)


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v[..., None])[..., 0]
