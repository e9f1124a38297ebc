"""A network on K domains as K linear maps of the neurons that are still variable there, rounding bounded.

A neuron whose slopes on the domain are [alpha, beta] is w = alpha p + (beta - alpha) u, where the slope of u lies in
[0, 1] along every increment inside the (convex) domain. Where alpha = beta the neuron vanishes into its predecessors:
what remains is p = P (u, x), y = Y (u, x) over the f free neurons, up to constants. Domains, balls around samples and the
regions of fixed phases are all of this form; they differ in where the slopes are from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipguard.certificate import Domain
from lipguard.network import Network
from lipguard.rounding import UNIT, gamma
from lipguard.verify.domain.ranges import Propagation, Regions, propagate
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.batched import Inequality
from lipguard.verify.lmi.form import Block, Form, feedback_form

ENTRIES = 30_000_000
"""Entries of Q over all neurons that are held at once: 240 MB."""


_HALF = torch.tensor(0.5, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Localized:
    """K maps over (u, x), their free neurons first, padded to the largest number f of them.

    Attributes:
        index: (K, f), the neuron in each place; present: (K, f), whether there is one. Absent rows and columns are 0.
        inner, outer: Q (K, f, f + d) and Y (K, m, f + d), enclosed; `q` and `y` are their centers.
        width: beta - alpha of each place, (K, f).
        layers: the activation node's position of each place, (K, f).
    """

    index: Tensor
    present: Tensor
    inner: Enclosed
    outer: Enclosed
    width: Tensor
    layers: Tensor

    @property
    def q(self) -> Tensor:
        """Q in floating point."""
        return self.inner.center

    @property
    def y(self) -> Tensor:
        """Y in floating point."""
        return self.outer.center

    def pick(self, which: Tensor) -> Localized:
        """The chosen maps, with repetitions where wanted."""
        width = int(self.present[which].sum(1).max()) if len(which) and self.index.shape[1] else 0
        columns = [*range(width), *range(self.index.shape[1], self.y.shape[2])]
        index, present, more, layers = (v[which, :width] for v in (self.index, self.present, self.width, self.layers))
        inner, outer = self.inner[which, :width][:, :, columns], self.outer[which][:, :, columns]
        return Localized(index, present, inner, outer, more, layers)

    @property
    def form(self) -> Form:
        """As feedback forms with slopes in [0, 1]."""
        n, width, outputs = self.index.shape[1], self.y.shape[2], self.y.shape[1]
        neurons, inputs, behind = slice(0, n), slice(n, width), slice(n, n + outputs)
        rows = ((neurons, self.inner), (behind, self.outer))
        blocks = (Block(here, columns, e[..., columns]) for here, e in rows for columns in (neurons, inputs))
        present = tuple(block for block in blocks if not block.matrix.zero)
        return Form(present, (neurons,), n, width - n, outputs, self.width.new_zeros(1), self.width.new_ones(1))

    @property
    def jacobian(self) -> Tensor:
        """Y over x alone, (K, m, d): the Jacobian where no neuron is free."""
        return self.y[:, :, self.index.shape[1] :]

    def jacobian_magnitude(self) -> Tensor:
        """Entrywise upper bound of |J| over all slopes of u in [0, 1], (K, m, d)."""
        f, half = self.index.shape[1], Enclosed(_HALF.to(self.q), _HALF.to(self.q))

        def rows(e: Enclosed, found: Enclosed) -> Enclosed:
            """J of rows over (u, x) from J of p: u_j = s p_j with s = 1/2 +- 1/2."""
            return e[:, :, f:] + e[:, :, :f] @ (found * half)

        found = Enclosed(torch.zeros_like(self.q[:, :, f:]))
        # Q is nilpotent: after as many turns as there are layers all rows are final.
        for _ in range(int(self.layers.max()) + 1 if self.layers.numel() else 0):
            found = rows(self.inner, found)
        return rows(self.outer, found).magnitude()

    def functionals(self, rows: Tensor) -> Localized:
        """The maps followed by rows (K, k, m) of their outputs."""
        return replace(self, outer=Enclosed(rows) @ self.outer)


@dataclass(frozen=True, eq=False)
class Reduced:
    """K maps over (u, x) of all neurons, those that vanished included.

    Attributes:
        index, present: as in `Localized`.
        inner, outer: pre-activations and outputs, (K, n, f + d) and (K, m, f + d), enclosed; `p` is the former's center.
        height: p at (u, x) = 0 in floating point, (K, n): a help for proposals, no proof.
        alpha, width: slopes alpha and beta - alpha, (K, n); the free neurons are those of positive width.
        layers: the activation node's position of each neuron, (n,).
    """

    index: Tensor
    present: Tensor
    inner: Enclosed
    outer: Enclosed
    height: Tensor
    alpha: Tensor
    width: Tensor
    layers: Tensor

    @property
    def p(self) -> Tensor:
        """Pre-activations in floating point."""
        return self.inner.center

    @property
    def free(self) -> Tensor:
        """Which neurons are free, (K, n)."""
        return self.width > 0

    def pick(self, which: Tensor) -> Reduced:
        """The chosen maps."""
        names = ("index", "present", "inner", "outer", "height", "alpha", "width")
        return replace(self, **{name: getattr(self, name)[which] for name in names})

    def maps(self, inputs: Tensor | None = None) -> Localized:
        """The free neurons' rows; columns of the chosen inputs, of all for None."""
        index, present, outer = self.index, self.present, self.outer
        rows = torch.arange(len(index), device=index.device)[:, None], index
        inner = self.inner[rows] * present[:, :, None].to(self.p)
        if inputs is not None:
            columns = torch.cat([torch.arange(index.shape[1], device=inputs.device), index.shape[1] + inputs])
            inner, outer = inner[:, :, columns], outer[:, :, columns]
        return Localized(index, present, inner, outer, self.width.gather(1, index), self.layers[index])


def localized(network: Network, propagation: Propagation | None) -> Localized:
    """The network's maps with the slopes of a propagation; with None, one map with the slopes on all of R^d."""
    if propagation is None:
        alpha, beta = (s[None] for s in network.slopes())
    else:
        alpha, beta = propagation.slopes()
    return reduced(feedback_form(network), alpha, beta).maps()


def localize(network: Network, domains: Sequence[Domain]) -> Localized:
    """The same from the domains."""
    return localized(network, propagate(network, Regions.of(domains, network.inputs, network.device)))


def chunk_size(network: Network) -> int:
    """Domains to treat at once."""
    n, largest = network.neurons, max(network.sizes)
    entries = max(1, n * (n + network.inputs), 2 * network.outputs * largest, 2 * largest * min(largest, 1024))
    return max(1, min(256, ENTRIES // entries))


def reduced(form: Form, alpha: Tensor, beta: Tensor, bias: Tensor | None = None, offset: Tensor | None = None) -> Reduced:
    """Substitute the neurons whose slopes are known.

    Args:
        form: p = Q (w, x) + bias, y = Y (w, x).
        alpha, beta: slopes, (K, n).
        bias, offset: (n,), and of neurons that vanish what they add to alpha p, (K, n); for the heights.
    """
    count, n = alpha.shape
    terms = form.neurons + form.inputs + form.outputs + 16
    # Composed affine maps carry an absolute radius: as a multiple of this error it joins the magnitudes.
    single = gamma(terms)
    free = alpha < beta
    # The difference rounds once, upward: a superset of the slopes.
    width = torch.where(free, (beta - alpha) * (1 + 4 * UNIT), torch.zeros_like(alpha))
    f = int(free.sum(1).max()) if count and n else 0
    index = free.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :f]
    present = free.gather(1, index)
    scale = (width.gather(1, index) * present)[:, None]
    layers = form.layers
    p, p_mass = (alpha.new_zeros(count, n, f + form.inputs) for _ in range(2))
    height = torch.zeros_like(alpha)

    def rows(matrix: Enclosed, until: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows over (w, x) in terms of (u, x), for neurons of the first `until` layers; and their heights."""
        center = matrix.center
        mass = center.abs() if matrix.radius is None else torch.maximum(center.abs(), matrix.radius / single)
        # Rows are zero at all neurons of later layers.
        out, absolute = (
            torch.cat([v[:, index].movedim(1, 0) * scale, v[:, n:].expand(count, -1, -1)], 2) for v in (center, mass)
        )
        constant = alpha.new_zeros(count, len(center))
        for here in layers[:until]:
            block, block_mass, slopes = center[:, here], mass[:, here], alpha[:, None, here]
            if offset is not None:
                constant += offset[:, here] @ block.T
            if bool(slopes.any()) and bool(block_mass.any()):
                scaled = block * slopes
                out += scaled @ p[:, here]
                absolute += (block_mass * slopes.abs()) @ p_mass[:, here]
                constant += (scaled @ height[:, here, None])[:, :, 0]
        return out, absolute, constant

    for k, here in enumerate(layers):
        p[:, here], p_mass[:, here], height[:, here] = rows(form.q[here], k)
        if bias is not None:
            height[:, here] += bias[here]
    y, y_mass, _ = rows(form.y, len(layers))
    number = torch.cat([index.new_zeros(0), *(index.new_full((here.stop - here.start,), k) for k, here in enumerate(layers))])
    # An entry of p is a sum of products along paths. A layer adds to their relative error: the radius of its block (`single`),
    # one rounding each of alpha, of beta - alpha and of their products with the block, and gamma of a sum of at most `terms`
    # entries, each in p and again in the mass: below 16 gamma_terms a layer, two of which are for Y and for the use of it.
    error = gamma(16 * (len(layers) + 2) * terms)
    inner, outer = (Enclosed(v, mass * (error * (1 + 4 * UNIT))) for v, mass in ((p, p_mass), (y, y_mass)))  # one rounding
    return Reduced(index, present, inner, outer, height, alpha, width, number)


def proves(maps: Localized, t: Tensor, rho: Tensor) -> Tensor:
    """Whether sqrt(rho) is proved to bound each map's constant from 2-norm to 2-norm, (K,).

    Args:
        maps: K maps.
        t: (K, f), multipliers in the order of the places; negative and non-finite ones count as 0.
        rho: (K,).
    """
    return Inequality(maps.form, t, maps.present).proves(rho)
