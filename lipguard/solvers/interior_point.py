"""Structured primal-dual interior point method for LipSDP.

Primal-dual pair, with b the unit vector of rho and A_i the matrices of Z = sum_i y_i A_i - C0, y = (tau, rho):

    minimise b'y  s.t.  Z >= 0        and        maximise <C0, Y>  s.t.  <A_i, Y> = b_i, Y >= 0.

With free channels rho is a vector, b has ones for all of its entries, and E splits into e_k e_k'.

Mehrotra predictor-corrector with the HKM direction: Y Z = sigma mu I linearised as
dY = sigma mu M - Y - sym(M dZ Y), M = Z^-1, which gives K dy = r with K_ij = <A_i, M A_j Y>. Each A_j has rank two,
A_j = a b' + b a' with a = e_j, b = e_j - q_j, so K costs two products with Q a matrix and Hadamard products:

    K_jk = (b_j'M a_k)(b_k'Y a_j) + (b_j'M b_k)(a_k'Y a_j) + (a_j'M a_k)(b_k'Y b_j) + (a_j'M b_k)(a_k'Y b_j).

Sources: Helmberg et al. 1996 and Kojima et al. 1997 (HKM direction); Mehrotra 1992; Fazlyab et al. 2019 (LipSDP).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lipguard.errors import SolverFailed
from lipguard.programs.slope_program import Proposal, SlopeProgram


@dataclass(frozen=True)
class InteriorPoint:
    """Options of the method.

    Attributes:
        tol: relative duality gap (rho - dual value) / rho at which it stops.
        max_iterations: predictor-corrector steps at most.
    """

    tol: float = 1e-7
    max_iterations: int = 60

    def __call__(self, program: SlopeProgram, start: Tensor | None = None, deadline: float = math.inf) -> Proposal:
        """Solve the program.

        Args:
            program: the program, float64 or float32.
            start: multipliers (n,) of a neighbouring program, pulled inside the cone; None starts cold.
            deadline: `time.perf_counter()` value after which no further step is begun.
        Raises:
            SolverFailed: no interior point exists in floating point.
        """
        with torch.no_grad():
            if start is not None:
                found = _solve(program, start, self.tol, self.max_iterations, deadline)
                # From a point too near to the boundary of its cone the first steps are too short.
                if found.gap <= self.tol or not found.message:
                    return found
            return _solve(program, None, self.tol, self.max_iterations, deadline)


class _Parts(NamedTuple):
    """The products of a symmetric G that K needs: a'Ga, a'Gb, b'Gb over neurons, and G's channel columns behind a and b."""

    aa: Tensor
    ab: Tensor
    bb: Tensor
    ax: Tensor
    bx: Tensor


def _parts(program: SlopeProgram, g: Tensor) -> _Parts:
    n = program.neurons
    v = program.q(g)
    u = program.q(v.T)
    aa = g[:n, :n]
    if program.slopes is not None:
        alpha, beta = (slope[:, None] for slope in program.slopes)
        mixed, ax = aa - alpha * v[:, :n], g[:n, n:]
        bb = aa - beta * v[:, :n] - v[:, :n].T * beta.T + beta * u * beta.T
        ab = mixed - v[:, :n].T * beta.T + alpha * u * beta.T
        aa = mixed - v[:, :n].T * alpha.T + alpha * u * alpha.T
        return _Parts(aa, ab, bb, ax - alpha * v[:, n:], ax - beta * v[:, n:])
    ab = aa - v[:, :n].T
    ax = g[:n, n:]
    return _Parts(aa, ab, ab - v[:, :n] + u, ax, ax - v[:, n:])


def normal_matrix(program: SlopeProgram, m: Tensor, y: Tensor) -> Tensor:
    """K over (tau, rho); with y = m it is the Hessian of -log det Z."""
    n = program.neurons
    p = _parts(program, m)
    s = p if y is m else _parts(program, y)
    mixed = p.ab.T * s.ab
    k = mixed + mixed.T
    k.addcmul_(p.bb, s.aa).addcmul_(p.aa, s.bb)
    side = p.ax * s.bx + p.bx * s.ax
    corner = m[n:, n:] * y[n:, n:]
    if not program.free:
        side, corner = side.sum(1, keepdim=True), corner.sum()[None, None]
    if program.groups is not None or program.weights is not None:
        k = program.gather(program.gather(k).T)
        side = program.gather(side)
    return torch.cat([torch.cat([k, side], 1), torch.cat([side.T, corner], 1)])


def _cholesky(matrix: Tensor) -> Tensor | None:
    factor, info = torch.linalg.cholesky_ex(matrix)
    return factor if int(info) == 0 else None


class _Factored:
    """K = D^-1 L L' D^-1, D the inverse roots of the diagonal, so that badly scaled layers do no harm."""

    def __init__(self, k: Tensor) -> None:
        self.scale = k.diagonal().clamp_min(torch.finfo(k.dtype).tiny).rsqrt()
        k = k * self.scale * self.scale[:, None]
        jitter = 4 * torch.finfo(k.dtype).eps
        for _ in range(8):
            k.diagonal().add_(jitter)
            factor = _cholesky(k)
            if factor is not None:
                self.factor = factor
                return
            jitter *= 10
        raise SolverFailed("the normal matrix is numerically singular.")

    def solve(self, r: Tensor) -> Tensor:
        return torch.cholesky_solve((r * self.scale)[:, None], self.factor)[:, 0] * self.scale


def _step_length(x: Tensor, d: Tensor, tries: int) -> float:
    """A step s <= 1 with x + s d > 0, within about 2^-tries of the largest; 1 only if x + 1.02 d > 0 as well."""
    if _cholesky(x + 1.02 * d) is not None:
        return 1.0
    low, high = 0.0, 1.02
    for _ in range(tries):
        middle = (low + high) / 2
        if _cholesky(x + middle * d) is not None:
            low = middle
        else:
            high = middle
    return low


def _solve(program: SlopeProgram, start: Tensor | None, tol: float, max_iterations: int, deadline: float) -> Proposal:
    n, order = program.neurons, program.order
    t, rho = program.interior() if start is None else program.interior(start, margin=0.05)
    least = max(rho, torch.finfo(t.dtype).tiny ** 0.5) * (4.0 if start is None else 1.2)
    rho = t.new_full((program.channels if program.free else 1,), least)
    z = program.z(rho, t)
    factor = _cholesky(z)
    if factor is None:
        raise SolverFailed("the starting point is not interior.")
    m = torch.cholesky_inverse(factor)
    y = m / (m.diagonal()[n:].sum() / len(rho))
    tau = program.group(t)
    best = Proposal(t, float(rho.sum()), math.nan, 0, "started", weights=rho if program.free else None)
    size = tau.numel()
    b = torch.cat([torch.zeros_like(tau), torch.ones_like(rho)])

    def adjoint(g: Tensor) -> Tensor:
        s, e = program.adjoint(g)
        return torch.cat([program.gather(s), e])

    for iteration in range(max_iterations + 1):
        mu = float((y * z).sum()) / order
        residual = b - adjoint(y)
        value = float(rho.sum())
        infeasibility = abs(float(residual[:size] @ tau) + float(residual[size:] @ rho))
        gap = mu * order / value
        done = gap <= tol and infeasibility <= tol * value
        known = infeasibility <= max(tol, 1e-3 * gap) * value
        weights = rho if program.free else None
        best = Proposal(program.spread(tau), value, gap if known else math.nan, iteration, weights=weights)
        if done or iteration == max_iterations or time.perf_counter() > deadline:
            break
        try:
            k = _Factored(normal_matrix(program, m, y))
        except SolverFailed as failure:
            return replace(best, message=str(failure))
        # Predictor: sigma = 0.
        dy = k.solve(-b)
        dz = program.linear(dy[size:], program.spread(dy[:size]))
        w = m @ dz
        wy = w @ y
        dual = -y - (wy + wy.T) / 2
        primal_step, dual_step = _step_length(y, dual, 3), _step_length(z, dz, 3)
        predicted = float(((y + primal_step * dual) * (z + dual_step * dz)).sum()) / order
        sigma = min(1.0, max(1e-6, (predicted / mu) ** 2)) if min(primal_step, dual_step) > 0.1 else 1.0
        # Corrector: centring and the second-order term M dZ dY of the predictor.
        second = w @ dual
        centre = sigma * mu * m - (second + second.T) / 2
        dy = k.solve(adjoint(centre) - b)
        dz = program.linear(dy[size:], program.spread(dy[:size]))
        wy = m @ dz @ y
        dual = centre - y - (wy + wy.T) / 2
        primal_step, dual_step = _step_length(y, dual, 7), _step_length(z, dz, 7)
        if not (math.isfinite(primal_step) and bool(dy.isfinite().all())) or max(primal_step, dual_step) < 1e-6:
            return replace(best, message="the steps became too short.")
        shrink = 0.9 if min(primal_step, dual_step) < 0.5 else 0.96
        primal_step, dual_step = (1.0 if s == 1.0 else s * shrink for s in (primal_step, dual_step))
        y = y + primal_step * dual
        tau = tau + dual_step * dy[:size]
        rho = rho + dual_step * dy[size:]
        z = program.z(rho, program.spread(tau))
        factor = _cholesky(z)
        if factor is None:
            return replace(best, message="the iterate left the cone by rounding.")
        m = torch.cholesky_inverse(factor)
    return best
