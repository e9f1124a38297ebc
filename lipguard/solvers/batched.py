"""Many small LipSDPs at once: the interior point method of `solvers.interior_point` on batches, stopped by a cut-off.

Branch and bound does not want each optimum, nor does the proof of a radius: a program is done as soon as its multipliers
prove a value below the cut-off, or its dual value exceeds it. Batches of equal size keep the work in few calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """K programs over (u, channels), f neurons and r channels each; rows and columns of absent neurons are zero.

    Attributes:
        q: (K, f, f + r), p in terms of (u, channels).
        c0: (K, f + r, f + r), the constant part.
        present: (K, f).
    """

    q: Tensor
    c0: Tensor
    present: Tensor

    @property
    def neurons(self) -> int:
        """f."""
        return self.q.shape[1]

    def pick(self, which: Tensor) -> Batch:
        """The chosen programs."""
        return Batch(self.q[which], self.c0[which], self.present[which])

    def linear(self, rho: Tensor, t: Tensor) -> Tensor:
        """rho E + sum_j t_j S_j, (K, N, N)."""
        f, order = self.neurons, self.q.shape[2]
        z = self.q.new_zeros(len(t), order, order)
        coupling = t[:, :, None] * self.q
        z[:, :f] -= coupling
        z[:, :, :f] -= coupling.mT
        diagonal = z.diagonal(dim1=-2, dim2=-1)
        diagonal[:, :f] += 2 * t
        diagonal[:, f:] += rho[:, None]
        return z

    def adjoint(self, y: Tensor) -> Tensor:
        """(<S_j, Y>, <E, Y>), (K, f + 1)."""
        f = self.neurons
        diagonal = y.diagonal(dim1=-2, dim2=-1)
        s = 2 * (diagonal[:, :f] - (self.q * y[:, :f]).sum(2)) * self.present
        return torch.cat([s, diagonal[:, f:].sum(1, keepdim=True)], 1)

    def normal(self, m: Tensor, y: Tensor) -> Tensor:
        """The Schur complement matrix of the HKM direction, (K, f + 1, f + 1); absent neurons are decoupled."""
        f = self.neurons

        def parts(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            v = self.q @ g
            u = self.q @ v.mT
            aa = g[:, :f, :f]
            ab = aa - v[:, :, :f].mT
            return aa, ab, ab - v[:, :, :f] + u, g[:, :f, f:], g[:, :f, f:] - v[:, :, f:]

        aa, ab, bb, ax, bx = parts(m)
        caa, cab, cbb, cax, cbx = parts(y)
        mixed = ab.mT * cab
        k = mixed + mixed.mT + bb * caa + aa * cbb
        side = (ax * cbx).sum(2) + (bx * cax).sum(2)
        corner = (m[:, f:, f:] * y[:, f:, f:]).sum((1, 2))
        full = k.new_zeros(len(k), f + 1, f + 1)
        mask = self.present.to(k.dtype)
        full[:, :f, :f] = k * mask[:, :, None] * mask[:, None, :]
        full[:, f, :f] = full[:, :f, f] = side * mask
        full[:, f, f] = corner
        full.diagonal(dim1=-2, dim2=-1)[:, :f] += 1 - mask
        return full


@dataclass(frozen=True, eq=False)
class Solved:
    """Where each program ended.

    Attributes:
        t: strictly feasible multipliers, (K, f).
        rho: value they prove, (K,).
        dual: lower bound of the program's optimum, -inf where none is known, (K,).
        ratio: estimated slope u_j / p_j of each neuron at the worst direction, and its weight there, (K, f) each.
    """

    t: Tensor
    rho: Tensor
    dual: Tensor
    ratio: Tensor
    weight: Tensor


def _definite(x: Tensor) -> Tensor:
    return torch.linalg.cholesky_ex(x).info == 0


def _steps(x: Tensor, d: Tensor, tries: int) -> Tensor:
    """For each pair a step s <= 1 with x + s d > 0; 1 only if 1.02 is possible."""
    low, high = x.new_zeros(len(x)), x.new_full((len(x),), 1.02)
    whole = _definite(x + 1.02 * d)
    rest = (~whole).nonzero()[:, 0]
    for _ in range(tries):
        if not len(rest):
            break
        middle = (low[rest] + high[rest]) / 2
        ok = _definite(x[rest] + middle[:, None, None] * d[rest])
        low[rest] = torch.where(ok, middle, low[rest])
        high[rest] = torch.where(ok, high[rest], middle)
    return torch.where(whole, torch.ones_like(low), low)


def start(batch: Batch, t: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Strictly feasible (t, rho) from a parent's, which lost nothing by the fixing of neurons; cold where it did."""
    t, rho = torch.where(batch.present, t, torch.ones_like(t)), rho * 1.05
    left = _repair(batch, t, rho, 3)
    if len(left):
        t[left], rho[left] = cold(batch.pick(left))
    return t, rho


def _repair(batch: Batch, t: Tensor, rho: Tensor, tries: int) -> Tensor:
    """Raise rho in place until (t, rho) is strictly feasible; returns the programs where it is not yet."""
    left = torch.arange(len(rho), device=rho.device)
    for _ in range(tries):
        some = batch if len(left) == len(rho) else batch.pick(left)
        left = left[~_definite(some.linear(rho[left], t[left]) - some.c0)]
        if not len(left):
            break
        rho[left] *= 1.5
    return left


def cold(batch: Batch) -> tuple[Tensor, Tensor]:
    """Strictly feasible (t, rho) without a parent.

    The neurons in reverse order: with S what remains of C0 and the Schur complements behind, t_j = S_jj makes the
    pivot 2 t_j - S_jj equal to t_j. One neuron at a time, exact for strictly triangular couplings.
    """
    f = batch.neurons
    s = batch.c0.clone()
    t = s.new_ones(len(s), f)
    largest = s.diagonal(dim1=-2, dim2=-1).amax(1).clamp_min(1e-30)
    for j in reversed(range(f)):
        own = torch.maximum(s[:, j, j], 1e-8 * largest)
        t[:, j] = torch.where(batch.present[:, j], own, t[:, j])
        cross = s[:, j] + t[:, j, None] * batch.q[:, j]
        pivot = 2 * t[:, j] - s[:, j, j]
        cross[:, j] = 0
        s = s + cross[:, :, None] * cross[:, None, :] / pivot[:, None, None]
        largest = torch.maximum(largest, own)
    rho = torch.linalg.eigvalsh(s[:, f:, f:])[:, -1].clamp_min(1e-30) * 4.2
    _repair(batch, t, rho, 60)
    return t, rho


def layered(batch: Batch, layers: Tensor) -> tuple[Tensor, Tensor]:
    """Strictly feasible (t, rho) without a parent, layer by layer: as `SlopeProgram.interior`.

    With S what remains of C0 and the Schur complements behind, T_k = lambda_max(S_kk) I makes the pivot 2 T_k - S_kk at
    least T_k: rho grows as the product of the layers' norms does, where one neuron at a time it can grow much faster.

    Args:
        batch: the programs.
        layers: layer of each neuron, (K, f), not decreasing along the couplings' order.
    """
    f = batch.neurons
    s = batch.c0.clone()
    t = s.new_ones(len(s), f)
    largest = s.diagonal(dim1=-2, dim2=-1).amax(1).clamp_min(1e-30)
    for k in range(int(layers.max()), -1, -1):
        here = (layers == k) & batch.present
        if not bool(here.any()):
            continue
        mask = here.to(s.dtype)
        own = s[:, :f, :f] * mask[:, :, None] * mask[:, None, :]
        top = torch.maximum(torch.linalg.eigvalsh(own)[:, -1], 1e-8 * largest)
        largest = torch.maximum(largest, top)
        t = torch.where(here, top[:, None], t)
        pivot = torch.diag_embed(torch.where(here, 2 * top[:, None], torch.ones_like(t))) - own
        cross = (s[:, :f] + t[:, :, None] * batch.q) * mask[:, :, None]
        columns = torch.cat([~here, torch.ones_like(s[:, 0, f:], dtype=torch.bool)], 1)
        cross = cross * columns[:, None, :]
        s = s + cross.mT @ torch.cholesky_solve(cross, torch.linalg.cholesky_ex(pivot).L)
    rho = torch.linalg.eigvalsh(s[:, f:, f:])[:, -1].clamp_min(1e-30) * 4
    _repair(batch, t, rho, 60)
    return t, rho


def solve(batch: Batch, t: Tensor, rho: Tensor, cutoff: Tensor | float, iterations: int, tol: float = 1e-7) -> Solved:
    """Improve strictly feasible (t, rho) until rho <= cutoff, the dual value exceeds it, or the iterations end.

    Args:
        batch: the programs.
        t, rho: strictly feasible, (K, f) and (K,).
        cutoff: value of rho at which a program is done; nan where only the gap counts.
        iterations: predictor-corrector steps at most.
        tol: relative gap at which a program is done.
    """
    count, f = t.shape
    order = batch.q.shape[2]
    cut = torch.as_tensor(cutoff, dtype=rho.dtype, device=rho.device).expand(count)
    best_t, best_rho = t.clone(), rho.clone()
    dual_value = rho.new_full((count,), -torch.inf)
    ratio, weight = torch.full_like(t, 0.5), torch.zeros_like(t)
    live = torch.arange(count, device=rho.device)
    z = batch.linear(rho, t) - batch.c0
    m = torch.cholesky_inverse(torch.linalg.cholesky_ex(z).L)
    y = m / m.diagonal(dim1=-2, dim2=-1)[:, f:].sum(1)[:, None, None]
    b = rho.new_zeros(f + 1)
    b[f] = 1.0
    for iteration in range(iterations + 1):
        mu = (y * z).sum((1, 2)) / order
        residual = b - batch.adjoint(y)
        slack = ((residual[:, :f] * t).sum(1) + residual[:, f] * rho).abs()
        value = (y * batch.c0).sum((1, 2))
        feasible = slack <= 1e-9 * rho
        dual_value[live] = torch.where(feasible, torch.maximum(dual_value[live], value), dual_value[live])
        best_t[live], best_rho[live] = t, rho
        ratio[live], weight[live] = _scores(batch, y)
        gap = rho - value
        # The dual value exceeds the cut-off even if its residual is held against it: the program cannot end below.
        hopeless = (value - 2 * slack > cut[live]) | (feasible & (value > cut[live]))
        over = (rho <= cut[live]) | hopeless | (feasible & (gap <= tol * rho))
        if iteration == iterations or bool(over.all()):
            break
        keep = (~over).nonzero()[:, 0]
        live, batch, t, rho, z, m, y, mu = live[keep], batch.pick(keep), t[keep], rho[keep], z[keep], m[keep], y[keep], mu[keep]
        k = batch.normal(m, y)
        scale = k.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()
        k = k * scale[:, :, None] * scale[:, None, :]
        k.diagonal(dim1=-2, dim2=-1).add_(1e-13)
        factor, info = torch.linalg.cholesky_ex(k)
        good = info == 0
        if not bool(good.all()):
            keep = good.nonzero()[:, 0]
            live, batch, t, rho, z, m, y, mu = (
                live[keep],
                batch.pick(keep),
                t[keep],
                rho[keep],
                z[keep],
                m[keep],
                y[keep],
                mu[keep],
            )
            factor, scale = factor[keep], scale[keep]
            if not len(live):
                break

        dy = _newton(factor, scale, -b.expand(len(t), -1))
        dz = batch.linear(dy[:, f], dy[:, :f] * batch.present)
        w = m @ dz
        wy = w @ y
        dual = -y - (wy + wy.mT) / 2
        primal_step, dual_step = _steps(y, dual, 1), _steps(z, dz, 1)
        ahead = ((y + primal_step[:, None, None] * dual) * (z + dual_step[:, None, None] * dz)).sum((1, 2)) / order
        sigma = ((ahead / mu) ** 2).clamp(1e-4, 1.0)
        sigma = torch.where(torch.minimum(primal_step, dual_step) > 0.1, sigma, torch.ones_like(sigma))
        second = w @ dual
        centre = (sigma * mu)[:, None, None] * m - (second + second.mT) / 2
        dy = _newton(factor, scale, batch.adjoint(centre) - b)
        step = dy[:, :f] * batch.present
        dz = batch.linear(dy[:, f], step)
        wy = m @ dz @ y
        dual = centre - y - (wy + wy.mT) / 2
        primal_step, dual_step = _steps(y, dual, 4), _steps(z, dz, 4)
        primal_step = torch.where(primal_step == 1, primal_step, 0.93 * primal_step)
        dual_step = torch.where(dual_step == 1, dual_step, 0.93 * dual_step)
        y = y + primal_step[:, None, None] * dual
        t = t + dual_step[:, None] * step
        rho = rho + dual_step * dy[:, f]
        z = batch.linear(rho, t) - batch.c0
        factors, info = torch.linalg.cholesky_ex(z)
        good = (info == 0) & (torch.maximum(primal_step, dual_step) > 1e-6) & rho.isfinite()
        if not bool(good.all()):
            keep = good.nonzero()[:, 0]
            live, batch, t, rho, z, y, factors = live[keep], batch.pick(keep), t[keep], rho[keep], z[keep], y[keep], factors[keep]
            if not len(live):
                break
        m = torch.cholesky_inverse(factors)
    return Solved(best_t, best_rho, dual_value, ratio, weight)


def _newton(factor: Tensor, scale: Tensor, r: Tensor) -> Tensor:
    return torch.cholesky_solve((r * scale)[:, :, None], factor)[:, :, 0] * scale


def _scores(batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """Slope <u p> / <p p> of each neuron under Y, and <p p>."""
    f = batch.neurons
    qy = batch.q @ y
    pp = (qy * batch.q).sum(2).clamp_min(1e-300)
    up = qy.diagonal(dim1=-2, dim2=-1)[:, :f]
    return (up / pp).clamp(0, 1), pp * batch.present
