"""The log-det barrier of a program, its gradient and its Hessian's products, at a cost linear in the depth of a chain.

    phi(t) = min over rho of  q log rho - log det Z(rho, t),      M = Z^-1,      q > N,
    d phi / d t_j = -2 a_j' M b_j,     d^2 phi / d t_j d t_k = 2 [(a_j' M a_k)(b_j' M b_k) + (a_j' M b_k)(b_j' M a_k)] - ...

The minimiser lies on the central path of mu = rho / q, where the relative gap is N / q. Block elimination gives the
determinant and, run backwards, the blocks of M on the filled pattern of Z (the selected inverse; Takahashi, Fagan, Chen
1973), which are all that the gradient reads. A product with the Hessian is the derivative of both sweeps along a
direction. With lambda_i the eigenvalues of the last Schur complement, rho solves sum rho / (rho - lambda_i) = q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.errors import SolverFailed
from lipguard.solvers.relative import assembled
from lipguard.solvers.slope_program import SlopeProgram

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Front:
    """One layer's part of the elimination: P = pivot, J the sources it is coupled to.

    Attributes:
        sources: J, ascending.
        inverse: P^-1.
        response: V = P^-1 X, X the coupling to J.
    """

    sources: tuple[int, ...]
    inverse: Tensor
    response: Tensor


@dataclass(frozen=True, eq=False)
class Barrier:
    """phi at group multipliers tau inside the cone.

    Attributes:
        q: weight of log rho.
        rho: the rho that attains the minimum.
        largest: lambda_max of the last Schur complement: the least rho that t proves.
        value: phi.
        gradient: in log tau, the logarithms of the group multipliers.
        curvature: diagonal of the Hessian in log tau, without the gradient's term.
        fronts: the elimination, by layer.
        inverse: the blocks (i, j), j <= i, of M.
    """

    program: SlopeProgram
    tau: Tensor
    q: float
    rho: float
    largest: float
    value: float
    gradient: Tensor
    curvature: Tensor
    fronts: dict[int, Front]
    inverse: dict[Pair, Tensor]


def barrier(program: SlopeProgram, tau: Tensor, q: float) -> Barrier | None:
    """The barrier at group multipliers tau; None outside the cone."""
    t = program.spread(tau)
    try:
        eliminated = program.eliminate(lambda k, _: t[program.slices[k]])
    except SolverFailed:
        return None
    if eliminated.schur is None:
        return None
    eigenvalues, vectors = torch.linalg.eigh(eliminated.schur)
    rho = _level(eigenvalues, q)
    distance = rho - eigenvalues
    determinant = distance.log().sum()
    fronts: dict[int, Front] = {}
    for k, factor in eliminated.factors.items():
        determinant = determinant + 2 * factor.diagonal().log().sum()
        solved = eliminated.solved[k]
        sources = tuple(sorted(solved))
        half = torch.cat([solved[j] for j in sources], 1) if sources else factor.new_zeros(len(factor), 0)
        response = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        fronts[k] = Front(sources, torch.cholesky_inverse(factor), response)
    inverse: dict[Pair, Tensor] = {(-1, -1): (vectors / distance) @ vectors.T}
    for k in sorted(fronts):
        f = fronts[k]
        inverse[k, k] = f.inverse
        if f.sources:
            beside = f.response @ assembled(inverse, f.sources)
            inverse[k, k] = f.inverse + beside @ f.response.T
            _scatter(program, inverse, k, f.sources, beside)
    aa, ab, bb = _products(program, inverse)
    weights = 1 if program.weights is None else program.weights
    gradient = -2 * program.gather(ab) * tau
    curvature = 2 * program.gather((aa * bb + ab * ab) * weights) * tau * tau
    value = q * math.log(rho) - float(determinant)
    return Barrier(program, tau, q, rho, float(eigenvalues[-1]), value, gradient, curvature, fronts, inverse)


def hessian_product(at: Barrier, direction: Tensor) -> Tensor:
    """The Hessian of phi in log tau, without the gradient's term, times a direction."""
    program, tau = at.program, at.tau
    dt = program.spread(tau * direction)
    ds: dict[Pair, Tensor] = {}

    def add(i: int, j: int, block: Tensor) -> None:
        ds[i, j] = ds[i, j] + block if (i, j) in ds else block

    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for k in sorted(at.fronts, reverse=True):
        f = at.fronts[k]
        here = dt[program.slices[k]]
        pivot = torch.diag(2 * here)
        if (k, k) in ds:
            pivot -= ds[k, k]
        if not f.sources:
            continue
        parts = []
        coupled = program.coupled(here, k)[:, None]
        for j in f.sources:
            part = coupled * program.rows[k][j] if j in program.rows[k] else None
            if (k, j) in ds:
                part = ds[k, j] if part is None else part + ds[k, j]
            parts.append(f.response.new_zeros(len(here), _size(program, j)) if part is None else part)
        cross = torch.cat(parts, 1)
        bent = pivot @ f.response
        moved[k] = (pivot, cross - bent)
        half = (cross - bent / 2).T @ f.response
        schur = half + half.T
        for i, j, block in _split(program, f.sources, schur):
            add(i, j, block)
        for (i, j), block in program.bent(here, k).items():
            add(i, j, -block)
    top = at.inverse[-1, -1]
    first = top @ ds[-1, -1] @ top if (-1, -1) in ds else torch.zeros_like(top)
    change: dict[Pair, Tensor] = {(-1, -1): first - top @ top * (first.trace() / (top * top).sum())}
    for k in sorted(at.fronts):
        f = at.fronts[k]
        pivot, residual = moved[k]
        own = -f.inverse @ pivot @ f.inverse
        response = f.inverse @ residual
        beside = response @ assembled(at.inverse, f.sources) + f.response @ assembled(change, f.sources)
        half = _beside(at.inverse, k, f.sources) @ response.T
        change[k, k] = own + beside @ f.response.T + half
        _scatter(program, change, k, f.sources, beside)
    _, ab, _ = _products(program, change)
    return -2 * program.gather(ab) * tau


def _level(eigenvalues: Tensor, q: float) -> float:
    """The root above lambda_max of sum rho / (rho - lambda_i) = q > r."""
    top = float(eigenvalues[-1])
    ratios = eigenvalues / top
    # One term alone gives rho - 1 = 1 / (q - 1), all r of them rho - 1 = r / (q - r); the sum falls from q at least to q at most.
    low, high = 1 / (q - 1), len(ratios) / (q - len(ratios))
    for _ in range(80):
        middle = math.sqrt(low * high)
        if float(((1 + middle) / (1 - ratios + middle)).sum()) > q:
            low = middle
        else:
            high = middle
        if high - low <= 1e-12 * low:
            break
    return top * (1 + high)


def _products(program: SlopeProgram, inverse: dict[Pair, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """a_j'Ma_j, a_j'Mb_j and b_j'Mb_j of every neuron."""
    ee, qe, qq = [], [], []
    for k, row in enumerate(program.rows):
        sources = tuple(sorted(row))
        own = inverse[k, k].diagonal()
        ee.append(own)
        if not sources:
            qe.append(torch.zeros_like(own))
            qq.append(torch.zeros_like(own))
            continue
        blocks = torch.cat([row[j] for j in sources], 1)
        qe.append((blocks * _beside(inverse, k, sources)).sum(1))
        qq.append(((blocks @ assembled(inverse, sources)) * blocks).sum(1))
    e, m, q = torch.cat(ee), torch.cat(qe), torch.cat(qq)
    if program.slopes is None:
        return e, e - m, e - 2 * m + q
    alpha, beta = program.slopes
    return e - 2 * alpha * m + alpha**2 * q, e - (alpha + beta) * m + alpha * beta * q, e - 2 * beta * m + beta**2 * q


def _size(program: SlopeProgram, source: int) -> int:
    return program.channels if source < 0 else program.sizes[source]


def _beside(inverse: dict[Pair, Tensor], k: int, sources: tuple[int, ...]) -> Tensor:
    return inverse[k, sources[0]] if len(sources) == 1 else torch.cat([inverse[k, j] for j in sources], 1)


def _scatter(program: SlopeProgram, inverse: dict[Pair, Tensor], k: int, sources: tuple[int, ...], beside: Tensor) -> None:
    for j, block in zip(sources, beside.split([_size(program, j) for j in sources], 1), strict=True):
        inverse[k, j] = block


def _split(program: SlopeProgram, sources: tuple[int, ...], matrix: Tensor) -> list[tuple[int, int, Tensor]]:
    sizes = [_size(program, j) for j in sources]
    return [
        (i, j, block)
        for i, strip in zip(sources, matrix.split(sizes), strict=True)
        for j, block in zip(sources, strip.split(sizes, 1), strict=True)
        if j <= i
    ]
