"""Networks whose neurons are fixed or free, many at a time, as linear maps of the free ones.

A neuron with slopes in [alpha, beta] is w = alpha p + (beta - alpha) u with 0 <= u <= p or p <= u <= 0, slope [0, 1]. A
fixed neuron has beta = alpha: it vanishes into its predecessors. What remains is p = P (u, x) + p0 and y = Y (u, x).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.verify.phases.phase_form import PhaseForm
from lipguard.verify.phases.phases import Ranges, pick, slope_ends


@dataclass(frozen=True, eq=False)
class Reduced:
    """K networks over (u, x), rounding bounded.

    Attributes:
        p, y: (K, n, n + d) and (K, m, n + d); columns of fixed neurons are zero.
        p_mass, y_mass: the same sums in absolute values; times `error` they bound the rounding of p and y.
        height: p0, (K, n).
        free: which neurons are free, (K, n).
        alpha, width: slopes alpha and beta - alpha, (K, n).
        error: relative.
    """

    p: Tensor
    y: Tensor
    p_mass: Tensor
    y_mass: Tensor
    height: Tensor
    free: Tensor
    alpha: Tensor
    width: Tensor
    error: float

    def pick(self, which: Tensor) -> Reduced:
        """The chosen networks."""
        fields = (self.p, self.y, self.p_mass, self.y_mass, self.height, self.free, self.alpha, self.width)
        return Reduced(*(f[which] for f in fields), error=self.error)


def reduce(form: PhaseForm, ranges: Ranges) -> Reduced:
    """Substitute the fixed neurons."""
    count, n = ranges.phases.shape
    alpha, beta = slope_ends(form, ranges)
    # An empty region has no slopes; any will do for what is never used.
    alpha, beta = (torch.where(s.isfinite(), s, torch.zeros_like(s)) for s in (alpha, beta))
    fixed = (ranges.phases >= 0) | (alpha == beta)
    width = torch.where(fixed, torch.zeros_like(alpha), beta - alpha)
    offset = torch.where(ranges.phases >= 0, pick(form.heights, ranges.phases.clamp_min(0)), torch.zeros_like(alpha))
    total = form.q.shape[1]
    p = torch.zeros(count, n, total, dtype=torch.float64)
    mass = torch.zeros_like(p)
    height = torch.zeros(count, n, dtype=torch.float64)

    def rows(q: Tensor, until: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows q over (w, x) in terms of (u, x), for neurons of the first `until` layers."""
        out = q.expand(count, -1, -1).clone()
        absolute = out.abs()
        out[:, :, :n] = 0
        absolute[:, :, :n] = 0
        constant = torch.zeros(count, len(q), dtype=torch.float64)
        for here in form.layers[:until]:
            block = q[:, here]
            if not bool(block.any()):
                continue
            out[:, :, here] += block * width[:, None, here]
            absolute[:, :, here] += block.abs() * width[:, None, here]
            scaled = block * alpha[:, None, here]
            if bool(scaled.any()):
                out += scaled @ p[:, here]
                absolute += scaled.abs() @ mass[:, here]
            constant += (scaled @ height[:, here, None])[:, :, 0] + (block * offset[:, None, here]).sum(2)
        return out, absolute, constant

    for index, here in enumerate(form.layers):
        p[:, here], mass[:, here], constant = rows(form.q[here], index)
        height[:, here] = constant + form.bias[here]
    y, y_mass, _ = rows(form.y, len(form.layers))
    # beta - alpha and alpha carry one rounding each; `error` counts far more than the layers do.
    return Reduced(p, y, mass, y_mass, height, ~fixed, alpha, width, 4 * form.error)


def compact(reduced: Reduced, tangent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Only the free neurons' rows and columns, padded to the largest number of them, and only tangent inputs.

    Returns:
        index (K, f): the neuron in each place; present (K, f): whether there is one; then Q (K, f, f + d), its mass,
        Y (K, m, f + d) and its mass. Rows and columns of absent neurons are zero.
    """
    count, n = reduced.free.shape
    f = int(reduced.free.sum(1).max()) if count else 0
    index = reduced.free.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :f]
    present = reduced.free.gather(1, index)
    inputs = n + tangent.nonzero()[:, 0]
    columns = torch.cat([index, inputs.expand(count, -1)], 1)
    keep = torch.cat([present, torch.ones(count, len(inputs), dtype=torch.bool)], 1).to(torch.float64)

    def rows_of(matrix: Tensor) -> Tensor:
        picked = matrix.gather(1, index[:, :, None].expand(-1, -1, matrix.shape[2]))
        return columns_of(picked) * present[:, :, None]

    def columns_of(matrix: Tensor) -> Tensor:
        return matrix.gather(2, columns[:, None, :].expand(-1, matrix.shape[1], -1)) * keep[:, None]

    return index, present, rows_of(reduced.p), rows_of(reduced.p_mass), columns_of(reduced.y), columns_of(reduced.y_mass)
