"""The LipSDP inequality proved front by front: the neurons are eliminated layer by layer, at a cost linear in depth.

Between two inputs the network's increments are those of the linear network J with some slope of [alpha, beta] for every
neuron, and J' is such a network as well, with the same norm: the inequality may be proved of either. Elimination runs
from the outputs to the inputs, that of J' from the inputs to the outputs. Roundoff may grow along the one and not along
the other, and the smaller end makes the cheaper last front.

With S the blocks that are subtracted so far (first Y'Y), layer k's part of Z is the front

    P = 2 T_k - S_kk,   X_j = -T_k (alpha + beta) Q_kj - S_kj,   and the rest   S_ij + U_ij - 2 Q_ki' T_k alpha beta Q_kj

goes on to the sources i, j of the layer. What remains is rho I - S over the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lipguard.rounding import TINY, UNIT, gamma
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.fronts import front, largest_eigenvalue

if TYPE_CHECKING:
    from lipguard.verify.lmi.form import Form

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Blocks:
    """A form's blocks by layer: -1 the inputs, then the activation nodes.

    Attributes:
        sizes: length of every source.
        places: neurons of each layer in the network's order.
        rows: Q by layer and source.
        out: Y by source.
        outputs: number of outputs.
    """

    sizes: dict[int, int]
    places: tuple[slice, ...]
    rows: tuple[dict[int, Enclosed], ...]
    out: dict[int, Enclosed]
    outputs: int

    def transposed(self) -> Blocks:
        """The blocks of J': the last layer becomes the first, inputs become outputs."""
        last = len(self.places) - 1
        rows: tuple[dict[int, Enclosed], ...] = tuple({} for _ in self.places)
        out: dict[int, Enclosed] = {}
        for k, row in [*enumerate(self.rows), (last + 1, self.out)]:
            for source, matrix in row.items():
                # What k reads from `source`, `source` reads from k: the inputs and the outputs, -1 and L, change places.
                (out if source < 0 else rows[last - source])[last - k] = matrix.mT
        sizes = {last - k: size for k, size in self.sizes.items() if k >= 0} | {-1: self.outputs}
        return Blocks(sizes, tuple(reversed(self.places)), rows, out, self.sizes[-1])


def blocks(form: Form) -> Blocks:
    """The blocks of a form; those that are zero and exact are left out."""
    starts = sorted({block.rows.start for block in form.q_blocks})
    index = {start: k for k, start in enumerate(starts)} | {form.neurons: -1}
    places = tuple(slice(a, b) for a, b in zip(starts, [*starts[1:], form.neurons], strict=True))
    rows: tuple[dict[int, Enclosed], ...] = tuple({} for _ in places)
    for block in form.q_blocks:
        if bool(block.matrix.magnitude().any()):
            rows[index[block.rows.start]][index[block.columns.start]] = block.matrix
    out = {index[b.columns.start]: b.matrix for b in form.y_blocks if bool(b.matrix.magnitude().any())}
    sizes = {-1: form.inputs} | {k: place.stop - place.start for k, place in enumerate(places)}
    return Blocks(sizes, places, rows, out, form.outputs)


def fronts(b: Blocks) -> list[tuple[int, int]]:
    """(n, m) of every front of the elimination, from the last layer to the first; the input's is the last, with m = 0."""
    felt: set[Pair] = {(i, j) for i in b.out for j in b.out}
    shapes = []
    for k in reversed(range(len(b.places))):
        sources = sorted(set(b.rows[k]) | {j for i, j in felt if i == k and j < k})
        felt |= {(i, j) for i in sources for j in sources}
        shapes.append((b.sizes[k], sum(b.sizes[j] for j in sources)))
    return [*shapes, (b.sizes[-1], 0)]


def flops(b: Blocks) -> float:
    """Floating-point operations of the proof by fronts."""
    return sum((n + m) ** 3 / 3 + n**3 / 3 + n * m * (n + 2 * m) for n, m in fronts(b))


def prove_rho(form: Form, b: Blocks, t: Tensor) -> float:
    """A rho for which Z(rho, t) >= 0 is proved, a little above the least there is.

    Args:
        form: the feedback form.
        b: its blocks.
        t: multipliers, (n,), finite and not negative.
    Raises:
        NotCertified: a front's pivot is not provably positive definite.
    """
    s: dict[Pair, Enclosed] = {}
    for i, left in b.out.items():
        for j, right in b.out.items():
            if j <= i:
                s[i, j] = _product(left, None, right)
    for k in reversed(range(len(b.places))):
        here = b.places[k]
        alpha, beta, tk = form.alpha[here], form.beta[here], t[here]
        pivot = _pivot(tk, s.get((k, k)))
        sources = sorted({*b.rows[k], *(j for i, j in s if i == k and j < k)})
        bends = bool((tk * alpha * beta).any())
        if sources == [-1] and not bends and (k, -1) not in s and (-1, -1) not in s and b.sizes[-1] >= b.sizes[k] and k == 0:
            return _behind_inputs(pivot, tk * (alpha + beta), b.rows[k][-1])
        coupling = tk * (alpha + beta)
        crosses = [_cross(coupling, b.rows[k].get(j), s.get((k, j))) for j in sources]
        if not sources:
            none = Enclosed(pivot.center.new_zeros(b.sizes[k], 0))
            front(pivot[None], none[None])
            continue
        u = front(pivot[None], _beside(crosses)[None])[0]
        ends = [0, *accumulate(b.sizes[j] for j in sources)]
        for column, j in enumerate(sources):
            for row, i in enumerate(sources):
                if j > i:
                    continue
                part = Enclosed(u[ends[row] : ends[row + 1], ends[column] : ends[column + 1]])
                s[i, j] = _plus(s.get((i, j)), part)
                if bends and i in b.rows[k] and j in b.rows[k]:
                    curve = 2 * tk * alpha * beta
                    s[i, j] = _plus(s[i, j], _product(b.rows[k][i], -curve, b.rows[k][j]))
    return largest_eigenvalue(s[-1, -1]) if (-1, -1) in s else 0.0


def _pivot(t: Tensor, s: Enclosed | None) -> Enclosed:
    # 2 t is exact; the difference rounds once.
    if s is None:
        return Enclosed(torch.diag(2 * t))
    center = torch.diag(2 * t) - s.center
    radius = 2 * UNIT * torch.diag(center.diagonal().abs())
    return Enclosed(center, radius if s.radius is None else (radius + s.radius) * (1 + 4 * UNIT))


def _cross(coupling: Tensor, q: Enclosed | None, s: Enclosed | None) -> Enclosed:
    """-(coupling Q + S): alpha + beta, its product with t, that with Q, and the sum: four roundings."""
    if q is None:
        assert s is not None
        return Enclosed(-s.center, s.radius)
    product = coupling[:, None] * q.center
    radius = gamma(4) * product.abs() + 2 * TINY * (1 + float(q.center.abs().max()))
    if q.radius is not None:
        radius += coupling.abs()[:, None] * q.radius * (1 + 8 * UNIT)
    if s is not None:
        product = product + s.center
        radius += 2 * UNIT * product.abs()
        if s.radius is not None:
            radius += s.radius
    return Enclosed(-product, radius * (1 + 8 * UNIT))


def _product(left: Enclosed, weights: Tensor | None, right: Enclosed) -> Enclosed:
    """left' diag(weights) right; the weights, 2 t alpha beta, carry two roundings."""
    height = left.center.shape[0]
    a, b = left.magnitude(), right.magnitude()
    if weights is None:
        center, scaled = left.center.T @ right.center, b
    else:
        center, scaled = left.center.T @ (weights[:, None] * right.center), weights.abs()[:, None] * b
    radius = gamma(height + 6) * (a.T @ scaled)
    if left.radius is not None:
        radius += left.radius.T @ scaled
    if right.radius is not None:
        radius += a.T @ (right.radius if weights is None else weights.abs()[:, None] * right.radius)
    # A product below the normal range loses less than TINY before it is multiplied by an entry of `left`.
    lost = 8 * height * TINY * (1 + float(a.max())) * (1 + float(b.max()))
    return Enclosed(center, radius * (1 + 4 * gamma(height + 8)) + lost)


def _plus(a: Enclosed | None, b: Enclosed) -> Enclosed:
    if a is None:
        return b
    center = a.center + b.center
    radius = 2 * UNIT * center.abs()
    for part in (a.radius, b.radius):
        if part is not None:
            radius += part
    return Enclosed(center, radius * (1 + 4 * UNIT))


def _beside(parts: list[Enclosed]) -> Enclosed:
    center = torch.cat([p.center for p in parts], 1)
    if all(p.radius is None for p in parts):
        return Enclosed(center)
    return Enclosed(center, torch.cat([torch.zeros_like(p.center) if p.radius is None else p.radius for p in parts], 1))


def _behind_inputs(pivot: Enclosed, coupling: Tensor, a: Enclosed) -> float:
    """The least provable rho with P - G / rho >= 0, G = (T A)(T A)': the inputs, whose block is rho I, go first."""
    gram = _product(a.mT, None, a.mT)
    assert gram.radius is not None
    scale = coupling.abs()
    center = coupling[:, None] * gram.center * coupling
    center = torch.tril(center) + torch.tril(center, -1).T
    # coupling carries two roundings, and enters twice.
    radius = scale[:, None] * (gram.radius + gamma(8) * gram.center.abs()) * scale * (1 + 16 * UNIT)
    return largest_eigenvalue(Enclosed(center, radius + 4 * TINY * (1 + float(scale.max())) ** 2), pivot)
