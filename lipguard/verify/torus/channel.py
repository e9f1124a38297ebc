"""Check of `ChannelMultipliers`: the LipSDP matrix of a network on tori is positive semidefinite, proved block by block.

Over the input x, the layers u (slopes [0, 1] after w = alpha p + width u) and the output y, the inequality is

    |x|^2 rho + sum_k t_k (2 |u_k|^2 - 2 Re u_k* p_k) + |y|^2 - 2 Re y* f(x, u) >= 0,

the largest |f|^2 being what y = f leaves. Multiplied by 1 / rho it has |x|^2 at one end and rho |y|^2 at the other. From the end
that is an image, one variable after another is replaced: with P its block and X its coupling to others z,

    [[P, X], [X*, U]] >= 0   proved, so that the form is at least what is left of it, less z* U z.

All frequencies of a variable that fold onto one of a coarser z are added up there. At the last end rho I - S >= 0 is left,
and the least rho is found there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lipguard.certificate import ChannelMultipliers
from lipguard.errors import NotCertified
from lipguard.network import Implicit, Network
from lipguard.rounding import TINY, UNIT, gamma, prove_positive_definite, sqrt_up, sum_up, up
from lipguard.verify.rewriting import neurons_only
from lipguard.verify.torus.torus_form import TorusForm, Variable, finer

_CHUNK = 2**19
"""Numbers in a batch of fronts: a few megabytes, so that it stays in the cache."""

_SLACKS = (1.0, 1e3, 1e6)
"""Multiples of the rounding of the test by which the blocks left over are enlarged until it passes."""


@dataclass
class _Block:
    """A block of the inequality: center (F, rows, columns) and radius (rows, columns), for all frequencies alike."""

    center: Tensor
    radius: Tensor

    def subtract(self, center: Tensor, radius: Tensor) -> None:
        self.center = self.center - center
        self.radius = (self.radius + radius) * (1 + 4 * UNIT) + self.center.abs().amax(0) * (2 * UNIT)


def check_channels(network: Network, evidence: ChannelMultipliers, norm: tuple[float, float]) -> float:
    """The least bound sqrt(rho) that the multipliers provably give.

    Negative and non-finite multipliers are set to zero first.

    Raises:
        NotCertified: the norm is not (2, 2), the multipliers or the tori do not fit the network, or they prove nothing.
    """
    if norm != (2.0, 2.0):
        raise NotCertified(f"multipliers prove bounds from 2-norm to 2-norm, not {norm}.")
    if not (0 < evidence.rho < math.inf):
        raise NotCertified(f"rho = {evidence.rho:g} scales nothing.")
    if any(isinstance(node, Implicit) for node in network.nodes):
        raise NotCertified("an implicit layer on a torus is not known.")
    network = neurons_only(network)
    activations = set(network.activations)
    if not activations <= set(evidence.t) <= set(range(len(network.nodes))) or not set(evidence.sides) <= set(
        range(len(network.nodes))
    ):
        raise NotCertified("the multipliers are not those of the network's activations.")
    form = TorusForm(network, frozenset(set(evidence.t) - activations), evidence.sides)
    multipliers: dict[int, Tensor] = {}
    for i, layer in form.layers.items():
        t = evidence.t[i].detach().to(network.device, torch.float64).flatten()
        if t.numel() != form.widths[i].numel():
            raise NotCertified(f"node {i}: {t.numel()} multipliers are given for {form.widths[i].numel()} channels.")
        t = torch.where(t.isfinite(), t, torch.zeros_like(t)).clamp_min(0) * form.widths[i] ** 2
        # Any positive number is a multiplier: nothing rounds here.
        multipliers[i] = (t / evidence.rho if form.forward else t).repeat(layer.components // t.numel())
    return sqrt_up(_Elimination(form, multipliers, evidence.rho).rho())


class _Elimination:
    """The inequality's blocks (i, j), i eliminated no later than j, at the frequencies of i."""

    def __init__(self, form: TorusForm, t: dict[int, Tensor], rho: float) -> None:
        self.form = form
        variables = [form.input, *form.layers.values(), form.output]
        order = variables if form.forward else variables[::-1]
        # Vectors last, but for the end.
        middle = sorted(order[1:-1], key=lambda v: not v.blocks)
        self.order: list[Variable] = [order[0], *middle, order[-1]]
        self.place = {v.node: k for k, v in enumerate(self.order)}
        options = {"dtype": torch.float64, "device": form.network.device}
        self.diagonal: list[Tensor] = []
        self.blocks: dict[tuple[int, int], _Block] = {}
        for k, v in enumerate(self.order):
            last = k == len(self.order) - 1
            scale = 2 * t[v.node] if v.node in t else torch.full((v.components,), rho if last else 1.0, **options)  # type: ignore[arg-type]
            self.diagonal.append(scale)
        for k, v in enumerate(self.order):
            weight = t[v.node] if v.node in t else torch.ones(v.components, **options)  # type: ignore[arg-type]
            for source, known in v.reads.items():
                there = self.place[source]
                center = -(weight[:, None] * known.center)
                radius = weight[:, None] * known.size * (known.error * (1 + 8 * UNIT) + 4 * UNIT) + 4 * TINY
                if there < k:
                    center, radius = center.mH, radius.T
                self._add(min(k, there), max(k, there), center, radius, finer(v.blocks, self.order[there].blocks))

    def _add(self, i: int, j: int, center: Tensor, radius: Tensor, blocks: tuple[int, ...]) -> None:
        if blocks != self.order[i].blocks:
            raise NotCertified("a layer on a finer torus would be eliminated after a coarser one that it meets.")
        if (i, j) in self.blocks:
            self.blocks[i, j].subtract(-center, radius)
        else:
            self.blocks[i, j] = _Block(center, radius)

    def rho(self) -> float:
        """The least rho for which what is left at the last end is provably positive semidefinite."""
        last = len(self.order) - 1
        for k in range(last):
            self._eliminate(k)
        left = self.blocks.get((last, last))
        if left is None:
            return 0.0
        s = -(left.center + left.center.mH) / 2
        radius = (left.radius + left.radius.T) / 2 * (1 + 4 * UNIT) + s.abs().amax(0) * 4 * UNIT
        top = max(float(torch.linalg.eigvalsh(s).max()), 0.0)
        for inflation in (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
            rho = up(top * (1 + inflation)) + TINY
            matrix = -s
            matrix.diagonal(dim1=1, dim2=2).add_(rho)
            # The difference rounds by u of what comes out, at most of rho + |s|.
            own = radius + torch.diag(torch.full_like(radius[0], 2 * UNIT * rho) + s.abs().amax(0).diagonal() * 2 * UNIT)
            if _proved(matrix, own):
                return rho
        raise NotCertified("what is left at the end is not provably bounded.")

    def _eliminate(self, k: int) -> None:
        """Replace variable k by what it does to those it meets."""
        met = sorted(j for (i, j) in self.blocks if i == k and j > k)
        own = self.blocks.pop((k, k), None)
        crosses = [self.blocks.pop((k, j)) for j in met]
        if not met:
            if own is not None or bool((self.diagonal[k] < 0).any()):
                raise NotCertified("a variable that meets no other one is not provably harmless.")
            return
        n = self.order[k].components
        sizes = [self.order[j].components for j in met]
        ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        spans = [slice(a, b) for a, b in pairwise(ends)]
        floor = torch.cat([self.diagonal[j] for j in met])
        # Signals are real: at -f everything is the conjugate of what it is at f, and one proof holds for both.
        mirror = self.form.mirror(self.order[k].blocks)
        index = torch.arange(len(mirror), device=mirror.device)
        alone = index <= mirror
        position = alone.to(torch.int64).cumsum(0) - 1
        radius = torch.zeros(n + ends[-1], n + ends[-1], dtype=torch.float64, device=floor.device)
        if own is not None:
            radius[:n, :n] = own.radius + torch.diag(2 * UNIT * (self.diagonal[k] + own.center.abs().amax(0).diagonal()))
        radius[:n, n:] = torch.cat([c.radius for c in crosses], 1)
        radius[n:, :n] = radius[:n, n:].T
        center = torch.cat([c.center for c in crosses], 2)
        parts: list[Tensor] = []
        for chosen in index[alone].split(max(1, _CHUNK // (4 * (n + ends[-1]) ** 2))):
            pivot = torch.diag(self.diagonal[k]).to(center.dtype)
            pivot = pivot.expand(len(chosen), -1, -1) if own is None else pivot + own.center[chosen]
            parts.append(front(pivot, center[chosen], radius, floor))
        left = torch.cat(parts)[position[torch.minimum(index, mirror)]]
        left[~alone] = left[~alone].conj()
        for a, i in enumerate(met):
            for b, j in enumerate(met):
                if j >= i:
                    self._subtract(i, j, left[:, spans[a], spans[b]], self.order[k].blocks)

    def _subtract(self, i: int, j: int, u: Tensor, blocks: tuple[int, ...]) -> None:
        """Less u, all of whose frequencies that fold onto one of variable i are added up."""
        coarse = self.order[i].blocks
        if coarse != blocks:
            index = self.form.fold(blocks, coarse)
            count = math.prod(coarse)
            terms = len(u) // count
            mass = torch.zeros(count, *u.shape[1:], dtype=torch.float64, device=u.device).index_add_(0, index, u.abs())
            u = u.new_zeros(count, *u.shape[1:]).index_add_(0, index, u)
            # Between real vectors the imaginary part, antisymmetric, does nothing.
            u = u if coarse else u.real
            radius = mass.amax(0) * (2 * gamma(terms + 4))
        else:
            radius = torch.zeros_like(u[0].real)
        if not coarse and u.is_complex():
            u = u.real
        if (i, j) not in self.blocks:
            zero = torch.zeros_like(u)
            self.blocks[i, j] = _Block(zero, torch.zeros_like(radius))
        self.blocks[i, j].subtract(u, radius)


def front(pivot: Tensor, cross: Tensor, radius: Tensor, floor: Tensor) -> Tensor:
    """U with [[pivot, cross], [cross*, U]] >= 0, proved, for all matrices within the radius.

    Args:
        pivot: (F, n, n), Hermitian.
        cross: (F, n, m).
        radius: (n + m, n + m), entrywise for all frequencies; that of U is zero.
        floor: (m,), the size of the diagonal that U will be subtracted from.
    Raises:
        NotCertified: the pivot is not provably positive definite.
    """
    n, m = cross.shape[1:]
    order = (2 if pivot.is_complex() else 1) * (n + m)
    diagonal = pivot.diagonal(dim1=1, dim2=2).real
    if bool((diagonal <= 0).any()):
        raise NotCertified("the matrix inequality does not hold: a diagonal entry is not positive.")
    for slack in _SLACKS:
        # What the test of a matrix of this order takes for rounding, relative to the diagonal, and the radius of the pivot.
        share = slack * (16 * order * gamma(order + 4) + 1e-14)
        root = diagonal.rsqrt()
        share += 4 * float((radius[:n, :n] * root[:, :, None] * root[:, None, :]).sum(2).max()) if n else 0.0
        shifted = pivot.clone()
        shifted.diagonal(dim1=1, dim2=2).sub_(share * diagonal)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if bool((info != 0).any()):
            break
        solved = torch.linalg.solve_triangular(factor, cross, upper=False)
        u = solved.mH @ solved
        # |x| |R| |z| of the crossing radii is at most what both diagonals gain.
        loss = (radius[:n, n:] * root.amax(0)[:, None]).sum(0) ** 2 / share
        u = (u + u.mH) / 2
        u.diagonal(dim1=1, dim2=2).add_(4 * share * (u.diagonal(dim1=1, dim2=2).real + floor) + loss)
        whole = torch.cat([torch.cat([pivot, cross], 2), torch.cat([cross.mH, u], 2)], 1)
        if _proved(whole, radius):
            return u
    raise NotCertified("the matrix inequality does not provably hold.")


def _proved(matrix: Tensor, radius: Tensor) -> bool:
    """Whether all Hermitian matrices within the radius of a batch are provably positive semidefinite."""
    if matrix.is_complex():
        # [[Re, -Im], [Im, Re]] has the eigenvalues of the complex matrix, twice.
        real, imaginary = matrix.real, matrix.imag
        matrix = torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1)
        radius = radius.repeat(2, 2)

    def spread(v: Tensor) -> Tensor:
        return (v @ radius.T) * (1 + 2 * gamma(len(radius) + 2)) + sum_up(v, dim=1)[:, None] * TINY

    return bool(prove_positive_definite(matrix, spread).all())
