"""A network on K domains as K linear maps of the neurons that are still variable there, rounding bounded.

A neuron whose slopes on the domain are [alpha, beta] is w = alpha p + (beta - alpha) u, where the slope of u lies in
[0, 1] along every increment inside the (convex) domain. Where alpha = beta the neuron vanishes into its predecessors:
what remains is p = Q (u, x), y = Y (u, x) over the f free neurons, up to constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipguard.certificate import Domain
from lipguard.network import Network
from lipguard.rounding import TINY, UNIT, gamma, prove_positive_definite
from lipguard.verify.domain.ranges import Propagation, Regions, propagate
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.form import Form, feedback_form

ENTRIES = 30_000_000
"""Entries of Q over all neurons that are held at once: 240 MB."""


@dataclass(frozen=True, eq=False)
class Localized:
    """K maps over (u, x), their free neurons first, padded to the largest number f of them.

    Attributes:
        index: (K, f), the neuron in each place; present: (K, f), whether there is one. Absent rows and columns are 0.
        q, y: (K, f, f + d) and (K, m, f + d).
        q_mass, y_mass: the same sums in absolute values; `error` times them bounds every rounding in q and y.
        width: beta - alpha of each place, (K, f).
        layers: the activation node's position of each place, (K, f).
        error: relative.
    """

    index: Tensor
    present: Tensor
    q: Tensor
    q_mass: Tensor
    y: Tensor
    y_mass: Tensor
    width: Tensor
    layers: Tensor
    error: float

    def pick(self, which: Tensor) -> Localized:
        """The chosen maps, with repetitions where wanted."""
        width = int(self.present[which].sum(1).max()) if len(which) and self.index.shape[1] else 0
        f = self.index.shape[1]
        device = self.q.device
        columns = torch.cat([torch.arange(width, device=device), torch.arange(f, self.y.shape[2], device=device)])
        rows = [v[which][:, :width] for v in (self.index, self.present)]
        q, q_mass = (v[which][:, :width][:, :, columns] for v in (self.q, self.q_mass))
        y, y_mass = (v[which][:, :, columns] for v in (self.y, self.y_mass))
        more = [v[which][:, :width] for v in (self.width, self.layers)]
        return Localized(rows[0], rows[1], q, q_mass, y, y_mass, more[0], more[1], self.error)

    def functionals(self, rows: Tensor) -> Localized:
        """The maps followed by rows (K, k, m) of their outputs."""
        y, mass = rows @ self.y, rows.abs() @ self.y_mass
        error = self.error + gamma(rows.shape[2] + 8)
        return replace(self, y=y, y_mass=mass, error=error)


def localized(network: Network, propagation: Propagation | None) -> Localized:
    """The network's maps with the slopes of a propagation; with None, one map with the slopes on all of R^d."""
    if propagation is None:
        alpha, beta = (s[None] for s in network.slopes())
    else:
        alpha, beta = propagation.slopes()
    form = feedback_form(network)
    terms = form.neurons + network.inputs + form.outputs + 16
    return _eliminate(form, [network.sizes[i] for i in network.activations], alpha, beta, terms)


def localize(network: Network, domains: Sequence[Domain]) -> Localized:
    """The same from the domains."""
    return localized(network, propagate(network, Regions.of(domains, network.inputs, network.device)))


def chunk_size(network: Network) -> int:
    """Domains to treat at once."""
    n, largest = network.neurons, max(network.sizes)
    entries = max(1, n * (n + network.inputs), 2 * network.outputs * largest, 2 * largest * min(largest, 1024))
    return max(1, min(256, ENTRIES // entries))


def _eliminate(form: Form, sizes: list[int], alpha: Tensor, beta: Tensor, terms: int) -> Localized:
    count, n = alpha.shape
    d, device = form.inputs, alpha.device
    # Composed affine maps carry a radius: as a multiple of this error it joins the magnitudes.
    single = gamma(terms)
    free = alpha < beta
    # One rounding upward: a superset of the slopes.
    width = torch.where(free, (beta - alpha) * (1 + 4 * UNIT), torch.zeros_like(alpha))
    f = int(free.sum(1).max()) if count and n else 0
    index = free.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :f]
    present = free.gather(1, index)
    options = {"dtype": torch.float64, "device": device}
    # p and its mass over (x, places of the free neurons): only columns that can differ from zero.
    p, p_mass = torch.zeros(count, n, d + f, **options), torch.zeros(count, n, d + f, **options)
    place = torch.zeros(count, n, dtype=torch.long, device=device).scatter(
        1, index, torch.arange(f, device=device).expand(count, -1)
    )

    def rows(matrix: Enclosed, until: int) -> tuple[Tensor, Tensor]:
        """Rows over (w, x) in terms of (x, u), for neurons of the first `until` layers."""
        center = matrix.center
        mass = center.abs() if matrix.radius is None else torch.maximum(center.abs(), matrix.radius / single)
        out, absolute = (torch.zeros(count, len(center), d + f, **options) for _ in range(2))
        out[:, :, :d], absolute[:, :, :d] = center[:, n:], mass[:, n:]
        start = 0
        for size in sizes[:until]:
            here = slice(start, start + size)
            start += size
            block, block_mass = center[:, here], mass[:, here]
            if not bool(block_mass.any()):
                continue
            if f:
                places = (d + place[:, None, here]).expand(-1, len(center), -1)
                # Fixed neurons have width 0: adding to place 0 what is nothing.
                out.scatter_add_(2, places, block * width[:, None, here])
                absolute.scatter_add_(2, places, block_mass * width[:, None, here])
            slopes = alpha[:, None, here]
            if bool(slopes.any()):
                out += (block * slopes) @ p[:, here]
                absolute += (block_mass * slopes.abs()) @ p_mass[:, here]
        return out, absolute

    start = 0
    for k, size in enumerate(sizes):
        here = slice(start, start + size)
        start += size
        part = Enclosed(form.q.center[here], None if form.q.radius is None else form.q.radius[here])
        p[:, here], p_mass[:, here] = rows(part, k)
    y, y_mass = rows(form.y, len(sizes))
    order = torch.cat([torch.arange(d, d + f, device=device), torch.arange(d, device=device)])
    picked = index[:, :, None].expand(-1, -1, d + f)
    keep = present[:, :, None].to(torch.float64)
    q, q_mass = ((v.gather(1, picked) * keep)[:, :, order] for v in (p, p_mass))
    layer = torch.cat([index.new_zeros(0), *(index.new_full((size,), k) for k, size in enumerate(sizes))])
    # A layer adds the errors of its block, of the slopes and of the sum to that of the layers before.
    error = gamma(16 * (len(sizes) + 2) * terms)
    return Localized(index, present, q, q_mass, y[:, :, order], y_mass[:, :, order], width.gather(1, index), layer[index], error)


def proves(maps: Localized, t: Tensor, rho: Tensor) -> Tensor:
    """Whether sqrt(rho) is proved to bound each map's constant from 2-norm to 2-norm, (K,).

    With Q = [Qu Qx], Y = [Yu Yx] the inequality is Z = [[2T - T Qu - Qu'T, -T Qx], [-Qx'T, rho I]] - Y'Y >= 0. By two
    Schur complements, of the identity in [[Z + Y'Y, Y'], [Y, I]] and of rho I in it, Z >= 0 if and only if

        [[2T - T Qu - Qu'T, Yu'], [Yu, I]] - a a' / rho >= 0,    a = [T Qx; -Yx],

    of order f + m, however many inputs there are.

    Args:
        maps: K maps.
        t: (K, f), multipliers in the order of the places; negative and non-finite ones count as 0.
        rho: (K,).
    """
    f, m = maps.index.shape[1], maps.y.shape[1]
    t = torch.where(maps.present & t.isfinite(), t, torch.zeros_like(t)).clamp_min(0)
    unit = torch.where(maps.present, 2 * t, torch.ones_like(t))
    a = torch.cat([t[:, :, None] * maps.q[:, :, f:], -maps.y[:, :, f:]], 1)
    a_mass = torch.cat([t[:, :, None] * maps.q_mass[:, :, f:], maps.y_mass[:, :, f:]], 1)
    matrix = (a @ a.mT) / -rho[:, None, None]
    coupling = t[:, :, None] * maps.q[:, :, :f]
    matrix[:, :f, :f] -= coupling + coupling.mT
    matrix[:, f:, :f] += maps.y[:, :, :f]
    matrix[:, :f, f:] += maps.y[:, :, :f].mT
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    diagonal[:, :f] += unit
    diagonal[:, f:] += 1
    qu, yu = maps.q_mass[:, :, :f], maps.y_mass[:, :, :f]
    # a carries the error of Q and Y twice in a a'; every entry is a sum of at most d + 4 terms.
    error = 4 * maps.error + gamma(maps.q.shape[2] + maps.y.shape[2] + 64)
    top = 1 + t.sum(1) + t.square().sum(1) / rho

    def radius(v: Tensor) -> Tensor:
        u, z = v[:, :f, None], v[:, f:, None]
        tu = t[:, :, None] * u
        upper = unit[:, :, None] * u + t[:, :, None] * (qu @ u) + qu.mT @ tu + yu.mT @ z
        out = torch.cat([upper, yu @ u + z], 1) + a_mass @ (a_mass.mT @ v[:, :, None]) / rho[:, None, None]
        lost = 64 * maps.q.shape[2] * TINY * top * v.sum(1)
        return error * out[:, :, 0] * (1 + gamma(4 * (f + m) + 64)) + lost[:, None]

    good = rho.isfinite() & (rho > 0)
    return prove_positive_definite(matrix, radius) & good
