"""The objective of the first-order method in coordinates that do not stiffen with depth.

In a chain the multipliers of layer k must follow S_kk, what the layers behind it ask for: lowering those alone by a
factor changes nothing until all that lie before them are lowered as well, layer by layer. Multipliers relative to S,

    t_j = exp(y_j) s_j(S_kk),   s_j = S_jj + a small part of their mean,

follow by themselves. The gradient in y is that in log t of a function that sees t through s as well: in the backward
sweep over the blocks of dphi/dS each layer's block receives what s_j passes on,

    dphi/dS_kk += diag(c),   c_j = g_j / s_j + (small part),   g = dphi / d log t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipguard.errors import SolverFailed
from lipguard.programs.elimination import Elimination
from lipguard.programs.slope_program import SlopeProgram

_MEAN = 1e-3
"""Part of the mean in s_j: a neuron that nothing feels keeps a positive multiplier."""


class Relative(NamedTuple):
    """The smoothed objective at y.

    Attributes:
        value: log of the Schatten-p norm of S.
        gradient: its gradient in y.
        curvature: the size of its second derivatives along single coordinates.
        largest: lambda_max(S), the least rho that the multipliers prove.
        t: the multipliers.
    """

    value: float
    gradient: Tensor
    curvature: Tensor
    largest: float
    t: Tensor


def to_relative(program: SlopeProgram, t: Tensor) -> Tensor:
    """y of multipliers inside the cone.

    Raises:
        SolverFailed: they lie outside.
    """
    scales = torch.ones_like(t)

    def record(k: int, s: Tensor | None) -> Tensor:
        here = program.slices[k]
        scales[here] = _scales(program, k, s)
        return t[here]

    program.eliminate(record)
    return program.group(t / scales).log()


def relative(program: SlopeProgram, y: Tensor, p: float) -> Relative | None:
    """The Schatten-p norm of S and its gradient in y; None outside the cone."""
    scales = program.spread(y.exp())
    factors = torch.ones_like(scales)

    def multipliers(k: int, s: Tensor | None) -> Tensor:
        here = program.slices[k]
        factors[here] = _scales(program, k, s)
        return scales[here] * factors[here]

    try:
        eliminated = program.eliminate(multipliers)
    except SolverFailed:
        return None
    if eliminated.schur is None:
        return None
    values, vectors = torch.linalg.eigh(eliminated.schur)
    top = values[-1]
    if not bool(top > 0) or not bool(top.isfinite()):
        return None
    t = scales * factors
    ratios = (values / top).clamp_min(0)
    total = (ratios**p).sum()
    weights = ratios ** (p - 1) / (total * top)
    slope, energy = _sweep(program, eliminated, (vectors * weights) @ vectors.T, t, factors)
    gradient, curvature = (program.gather(v * factors) * y.exp() for v in (slope, energy))
    value = float(top.log() + total.log() / p)
    return Relative(value, gradient, curvature, float(top), t) if bool(gradient.isfinite().all()) else None


def _scales(program: SlopeProgram, k: int, s: Tensor | None) -> Tensor:
    size = program.sizes[k]
    if s is None:
        return torch.ones(size, **program.options)  # type: ignore[arg-type]
    diagonal = s.diagonal().clamp_min(torch.finfo(s.dtype).tiny ** 0.5)
    mean = diagonal.mean()
    return mean.expand(size) if program.groups is not None else diagonal + _MEAN * mean


def _sweep(program: SlopeProgram, eliminated: Elimination, top: Tensor, t: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """dphi/dt of every neuron, and 2 w^2 (the energy of its response) in its place.

    `adjoint[i, j]` is dphi/dS_ij, on the filled pattern: V_k adjoint_JJ V_k' for layer k with the sources J it responds
    to by V_k = P^-1 X, from the channels on.
    """
    adjoint = {(-1, -1): top}
    read = set(program.out).union(*program.rows)
    slopes, energies = [], []
    for k in range(len(program.sizes)):
        solved = eliminated.solved[k]
        here = program.slices[k]
        sources = sorted(solved)
        if not sources:
            adjoint[k, k] = torch.zeros_like(eliminated.factors[k])
            slopes.append(torch.zeros_like(t[here]))
            energies.append(torch.zeros_like(t[here]))
            continue
        half = solved[sources[0]] if len(sources) == 1 else torch.cat([solved[j] for j in sources], 1)
        response = torch.linalg.solve_triangular(eliminated.factors[k].mT, half, upper=True)
        beside = response @ assembled(adjoint, sources)
        own = beside @ response.T
        start = 0
        for j in sources:
            size = solved[j].shape[1]
            adjoint[k, j] = beside[:, start : start + size]
            start += size
        adjoint[k, k] = own
        aa, ab = products(program, adjoint, k)
        slopes.append(-2 * ab)
        energies.append(2 * aa)
        # log t follows log s: what t passes to s, s passes to the diagonal of S_kk.
        passed = -2 * ab * t[here] / factors[here]
        passed = passed.mean().expand(len(passed)) if program.groups is not None else passed + _MEAN * passed.mean()
        if k in read:
            adjoint[k, k] = own + torch.diag(passed)
    return torch.cat(slopes), torch.cat(energies)


def products(program: SlopeProgram, blocks: dict[tuple[int, int], Tensor], k: int) -> tuple[Tensor, Tensor]:
    """a_j'Ga_j and a_j'Gb_j of layer k's neurons, from the blocks of a symmetric G."""
    own = blocks[k, k].diagonal()
    row = program.rows[k]
    if not row:
        return own, own
    sources = sorted(row)
    q = row[sources[0]] if len(sources) == 1 else torch.cat([row[j] for j in sources], 1)
    beside = blocks[k, sources[0]] if len(sources) == 1 else torch.cat([blocks[k, j] for j in sources], 1)
    mixed = (q * beside).sum(1)
    if program.slopes is None:
        return own, own - mixed
    square = ((q @ assembled(blocks, sources)) * q).sum(1)
    alpha, beta = (slope[program.slices[k]] for slope in program.slopes)
    return own - 2 * alpha * mixed + alpha**2 * square, own - (alpha + beta) * mixed + alpha * beta * square


def assembled(blocks: dict[tuple[int, int], Tensor], sources: Sequence[int]) -> Tensor:
    """The symmetric matrix over the sources, of blocks (i, j), j <= i."""
    if len(sources) == 1:
        return blocks[sources[0], sources[0]]
    return torch.cat([torch.cat([blocks[i, j] if j <= i else blocks[j, i].T for j in sources], 1) for i in sources])
