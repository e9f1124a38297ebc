"""The inequality proved front by front: variables are eliminated one after another, at a cost linear in their number.

Over variables v_0, ..., v_L, of which all but the last have positive numbers on a diagonal and the last has rho,

    sum_k v_k* diag_k v_k + rho |v_L|^2 + sum_{i <= j} (v_i* B_ij v_j and its adjoint) >= 0

is split into fronts: with P and X the blocks of v_0, and z what it meets, [[P, X], [X*, U]] >= 0 is proved, so that the form
is at least what is left of it, less z* U z. In the end rho I - S >= 0 is left, and the least rho is found there.

Variables may be signals on tori, with a block for each frequency: all frequencies of a variable that fold onto one of a
coarser one are added up there. A vector, or a layer of a network without tori, has one frequency.

For a network layer by layer (`by_layers`): between two inputs its increments are those of the linear network J with some
slope of [alpha, beta] for every neuron, and J' is such a network as well, with the same norm: the inequality may be proved of
either. Elimination runs from the outputs to the inputs, that of J' from the inputs to the outputs. Roundoff may grow along the
one and not along the other, and the smaller end makes the cheaper last front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lipguard.rounding import TINY, UNIT, gamma
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.form import Form
from lipguard.verify.lmi.fronts import front, hermitian, largest_eigenvalue
from lipguard.verify.torus.frequencies import Counts, fold, mirror

Pair = tuple[int, int]

_CHUNK = 2**19
"""Numbers in a batch of fronts: a few megabytes, so that it stays in the cache."""


class Elimination:
    """The form above, by what there is of it: variables in the order of their elimination, the one with rho last."""

    def __init__(self, diagonal: Sequence[Tensor], counts: Sequence[Counts] | None = None) -> None:
        """Without blocks.

        Args:
            diagonal: of every variable but the last, at one frequency; of the last only the length counts.
            counts: the number of frequencies of every variable along each axis; None for one of each.
        """
        self.diagonal = list(diagonal)
        self.counts = [()] * len(self.diagonal) if counts is None else list(counts)
        self.blocks: dict[Pair, Enclosed] = {}

    def add(self, i: int, j: int, block: Enclosed) -> None:
        """Add a block (F, n_i, n_j), i <= j, at the frequencies of variable i."""
        self.blocks[i, j] = self.blocks[i, j] + block if (i, j) in self.blocks else block

    def least_rho(self) -> float:
        """A rho for which the form is proved positive semidefinite, a little above the least there is.

        Raises:
            NotCertified: a front's pivot is not provably positive definite.
        """
        last = len(self.diagonal) - 1
        for k in range(last):
            met = sorted(j for i, j in self.blocks if i == k and j > k)
            own, pivot = self.blocks.pop((k, k), None), Enclosed(torch.diag(self.diagonal[k])[None])
            if own is not None:
                pivot = hermitian(pivot + own)
            alone = k == last - 1 and (last, last) not in self.blocks and not any(self.counts)
            if alone and met and len(self.diagonal[last]) >= len(self.diagonal[k]):
                # [[P, X], [X*, rho I]] >= 0 iff rho P - X X* >= 0: the last variable, which is the longer one, goes first.
                cross = self.blocks[k, last]
                return largest_eigenvalue(hermitian(cross @ cross.mH), pivot)
            if met:
                self._eliminate(k, pivot, met)
            elif own is not None or bool((self.diagonal[k] < 0).any()):
                front(pivot, Enclosed(pivot.center.new_zeros(len(pivot.center), len(self.diagonal[k]), 0)))
        left = self.blocks.get((last, last))
        return 0.0 if left is None else largest_eigenvalue(hermitian(-left))

    def _eliminate(self, k: int, pivot: Enclosed, met: list[int]) -> None:
        """Replace variable k by what it does to those it meets."""
        cross = Enclosed.cat([self.blocks.pop((k, j)) for j in met], -1)
        # Signals are real: at -f everything is the conjugate of what it is at f, and one proof holds for both.
        opposite = mirror(self.counts[k], cross.center.device)
        index = torch.arange(len(opposite), device=opposite.device)
        first = index <= opposite
        position = first.to(torch.int64).cumsum(0) - 1
        # One of the two may be real where the other is not.
        kind = torch.promote_types(pivot.center.dtype, cross.center.dtype)
        pivot, cross = (Enclosed(e.center.to(kind).expand(len(index), -1, -1), e.radius) for e in (pivot, cross))
        step = max(1, _CHUNK // (4 * sum(cross.center.shape[1:]) ** 2))
        parts = [front(pivot.at(chosen), cross.at(chosen)) for chosen in index[first].split(step)]
        u = torch.cat(parts)[position[torch.minimum(index, opposite)]]
        u[~first] = u[~first].conj()
        spans = [slice(a, b) for a, b in pairwise([0, *accumulate(len(self.diagonal[j]) for j in met)])]
        for (i, rows), (j, columns) in ((a, b) for a in zip(met, spans, strict=True) for b in zip(met, spans, strict=True)):
            if j >= i:
                self.add(i, j, -self._folded(u[:, rows, columns], self.counts[k], self.counts[i]))

    def _folded(self, u: Tensor, fine: Counts, coarse: Counts) -> Enclosed:
        """All frequencies that fold onto one of coarser ones added up."""
        if fine == coarse:
            return Enclosed(u if coarse else u.real)
        index, count = fold(fine, coarse, u.device), math.prod(coarse)
        mass = torch.zeros(count, *u.shape[1:], dtype=torch.float64, device=u.device).index_add_(0, index, u.abs())
        total = u.new_zeros(count, *u.shape[1:]).index_add_(0, index, u)
        # A sum of that many terms, and the absolute values' own roundings; between real vectors the imaginary part,
        # antisymmetric, does nothing.
        radius = mass.amax(0) * (2 * gamma(len(u) // count + 4))
        return Enclosed(total if coarse else total.real, radius)


def flops(form: Form) -> float:
    """Floating-point operations of the proof of `by_layers`."""
    place, size = _places(form), [here.stop - here.start for here in _order(form)]
    reads = {start: [place[block.columns.start] for block in row] for start, row in form.rows.items()}
    outputs = reads.pop(form.neurons, [])
    met: set[Pair] = {(place[start], j) for start, row in reads.items() for j in row} | {(i, j) for i in outputs for j in outputs}
    total = form.inputs**3 * 2 / 3
    for k, n in enumerate(size[:-1]):
        sources = {j for i, j in met if i == k and j > k}
        met |= {(i, j) for i in sources for j in sources}
        m = sum(size[j] for j in sources)
        total += (n + m) ** 3 / 3 + n**3 / 3 + n * m * (n + 2 * m)
    return total


def by_layers(form: Form, t: Tensor) -> Elimination:
    """Z(rho, t) of the form's slopes, from the last layer to the inputs; t (n,), finite and not negative."""
    place = _places(form)
    z = Elimination([*(2 * t[here] for here in _order(form)[:-1]), t.new_zeros(form.inputs)])  # 2 t is exact
    # Two roundings each, and what products may lose below the normal range.
    coupling, curve = t * (form.alpha + form.beta), 2 * t * form.alpha * form.beta
    factor = Enclosed(-coupling[:, None], (3 * UNIT * coupling.abs() + TINY)[:, None])
    bend = Enclosed(curve[:, None], (3 * UNIT * curve.abs() + 2 * TINY)[:, None])
    for start, row in form.rows.items():
        outputs, here = start >= form.neurons, row[0].rows
        for _, columns, matrix in row if not outputs else ():
            z.add(place[start], place[columns.start], (matrix * factor[here])[None])
        for _, first, left in row if outputs or bool(curve[here].any()) else ():
            scaled = -left if outputs else left * bend[here]
            for _, second, right in row:
                if place[first.start] <= place[second.start]:
                    z.add(place[first.start], place[second.start], (scaled.mT @ right)[None])
    return z


def _order(form: Form) -> list[slice]:
    """The variables in the order of their elimination: layers from the last to the first, then the inputs."""
    return [*reversed(form.layers), slice(form.neurons, form.neurons + form.inputs)]


def _places(form: Form) -> dict[int, int]:
    """The place of every variable in this order, by its first column."""
    return {here.start: k for k, here in enumerate(_order(form))}
