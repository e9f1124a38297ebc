"""What fixed phases imply: rigorous ranges of pre-activations, empty regions, slopes; for many assignments at once.

A phase is the index of the linear piece a neuron stays in, -1 where it is free. Under an assignment every neuron's
output lies between two lines in its pre-activation: the same line for a fixed neuron, a relaxation over its range for
a free one. Substituting backwards, layer by layer, gives linear functions of the input, whose extremes over the domain
are known in closed form (Zhang et al. 2018, CROWN; Singh et al. 2019, DeepPoly). Each extreme is widened by the
rounding of the whole substitution: `PhaseForm.error` times the same expression in absolute values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.rounding import UNIT
from lipguard.verify.phases.phase_form import PhaseForm

_SWEEPS = 2


@dataclass(frozen=True, eq=False)
class Ranges:
    """What K assignments imply.

    Attributes:
        lower, upper: pre-activations of every neuron in its region, (K, n); fixed neurons' cut to their piece.
        empty: whether the region is proved to have no point, (K,).
        phases: the assignment with every phase that follows from it, (K, n).
        x_lower, x_upper: box around each region, (K, d).
    """

    lower: Tensor
    upper: Tensor
    empty: Tensor
    phases: Tensor
    x_lower: Tensor
    x_upper: Tensor

    def pick(self, which: Tensor) -> Ranges:
        """Those of the chosen assignments."""
        fields = (self.lower, self.upper, self.empty, self.phases, self.x_lower, self.x_upper)
        return Ranges(*(f[which] for f in fields))


def propagate(form: PhaseForm, phases: Tensor, parts: Tensor) -> Ranges:
    """Ranges of all pre-activations under K assignments (K, n).

    Args:
        form: the network and its domain.
        phases: (K, n), -1 where free.
        parts: the box each assignment lies in, (K,).
    """
    phases = phases.clone()
    count, n = phases.shape
    x_lower, x_upper = form.lower[parts], form.upper[parts]
    lower, upper = (torch.zeros(count, n, dtype=torch.float64) for _ in range(2))
    empty = torch.zeros(count, dtype=torch.bool)
    lines = Lines.blank(count, n)
    for index, here in enumerate(form.layers):
        if index == 0:
            _contract(form, phases, here, x_lower, x_upper, empty)
        low, high = _extremes(form, form.q[here], form.bias[here], lines, index, x_lower, x_upper)
        cut_low, cut_high = piece_ends(form, phases[:, here], here)
        low, high = torch.maximum(low, cut_low), torch.minimum(high, cut_high)
        empty |= (low > high).any(1)
        high = torch.maximum(low, high)
        # A range inside one piece implies its phase.
        inside = _piece_of(form, low, high, here)
        phases[:, here] = torch.where(phases[:, here] < 0, inside, phases[:, here])
        lower[:, here], upper[:, here] = low, high
        lines.fill(form, phases, here, low, high)
    return Ranges(lower, upper, empty, phases, x_lower, x_upper)


def refutes(form: PhaseForm, ranges: Ranges, farkas: Tensor) -> Tensor:
    """Whether multipliers prove that no input has the phases: (K,) of bool.

    Every fixed phase demands p - low >= 0 or high - p >= 0 of its piece. A nonnegative combination whose largest value
    over the relaxed region is negative refutes them all (Farkas). `farkas` (K, n) holds the combination's signed
    weights for fixed neurons (positive: the lower end's demand, negative: the upper end's), and the slope of the
    relaxing line for free ones.
    """
    fixed = ranges.phases >= 0
    count, n = farkas.shape
    lines = Lines.blank(count, n)
    for here in form.layers:
        lines.fill(form, ranges.phases, here, ranges.lower[:, here], ranges.upper[:, here], farkas[:, here])
    cut_low, cut_high = piece_ends(form, ranges.phases, slice(0, n))
    weight = torch.where(fixed & farkas.isfinite(), farkas, torch.zeros_like(farkas))
    end = torch.where(weight > 0, cut_low, cut_high)
    weight = torch.where(end.isfinite(), weight, torch.zeros_like(weight))
    constant = -(weight * torch.where(end.isfinite(), end, torch.zeros_like(end))).sum(1)
    mass = (weight * torch.where(end.isfinite(), end, torch.zeros_like(end))).abs().sum(1) + weight.abs() @ form.bias.abs()
    rows = (weight @ form.q)[:, None, :]
    absolute = (weight.abs() @ form.q.abs())[:, None, :]
    top = _extreme(form, rows, absolute, lines, len(form.layers), ranges.x_lower, ranges.x_upper)[:, 0]
    return top + weight @ form.bias + constant + 4 * form.error * mass < 0


@dataclass
class Lines:
    """Two lines around each neuron's output: low_slope p + low_height <= w <= high_slope p + high_height, (K, n) each."""

    low_slope: Tensor
    low_height: Tensor
    high_slope: Tensor
    high_height: Tensor

    @staticmethod
    def blank(count: int, n: int) -> Lines:
        """Lines to be filled layer by layer."""
        return Lines(*(torch.zeros(count, n, dtype=torch.float64) for _ in range(4)))

    def fill(self, form: PhaseForm, phases: Tensor, here: slice, low: Tensor, high: Tensor, slopes: Tensor | None = None) -> None:
        """Lines of one layer over the ranges [low, high]; `slopes` are the free neurons' slopes on both sides, if given.

        For any slope s, phi(p) - s p is piecewise linear: its extremes over a range are at the ends and the breaks.
        """
        phase = phases[:, here]
        fixed = phase >= 0
        slope, height = (pick(table[:, here], phase.clamp_min(0)) for table in (form.pieces, form.heights))
        at = [low, high, *(torch.minimum(torch.maximum(b, low), high) for b in form.breaks[:, here])]
        values = [_value(form, p, here) for p in at]
        if slopes is None:
            width = high - low
            chord = torch.where(width > 0, (values[1] - values[0]) / width.clamp_min(1e-300), slope)
            first, last = (
                pick(form.pieces[:, here], _piece_index(form, low, here)),
                pick(form.pieces[:, here], _piece_index(form, high, here)),
            )
            # The flatter error of the two end pieces; chord where the function bends the other way.
            end = torch.where(high > -low, last, first)
            up_slope, down_slope = torch.where(last >= first, chord, end), torch.where(last >= first, end, chord)
        else:
            up_slope = down_slope = slopes
        up_slope, down_slope = (torch.nan_to_num(s, 0.0, 0.0, 0.0) for s in (up_slope, down_slope))
        up = torch.stack([v - up_slope * p for v, p in zip(values, at, strict=True)]).amax(0)
        down = torch.stack([v - down_slope * p for v, p in zip(values, at, strict=True)]).amin(0)
        size = torch.stack(
            [v.abs() + torch.maximum(up_slope.abs(), down_slope.abs()) * p.abs() for v, p in zip(values, at, strict=True)]
        )
        slack = 16 * UNIT * size.amax(0) + 8 * UNIT * form.heights[:, here].abs().amax(0)
        self.high_slope[:, here] = torch.where(fixed, slope, up_slope)
        self.high_height[:, here] = torch.where(fixed, height, up + slack)
        self.low_slope[:, here] = torch.where(fixed, slope, down_slope)
        self.low_height[:, here] = torch.where(fixed, height, down - slack)


def piece_ends(form: PhaseForm, phases: Tensor, here: slice) -> tuple[Tensor, Tensor]:
    """Ends of the pieces that fixed neurons are in; infinite for free ones."""
    infinite = torch.full((1, here.stop - here.start), math.inf, dtype=torch.float64)
    breaks = form.breaks[:, here]
    low = pick(torch.cat([-infinite, breaks]), phases.clamp_min(0))
    high = pick(torch.cat([breaks, infinite]), phases.clamp_min(0))
    free = phases < 0
    return torch.where(free, -infinite, low), torch.where(free, infinite, high)


def slope_ends(form: PhaseForm, ranges: Ranges) -> tuple[Tensor, Tensor]:
    """Smallest and largest slope of every neuron among the pieces its range meets, (K, n)."""
    low, high = torch.full_like(ranges.lower, math.inf), torch.full_like(ranges.lower, -math.inf)
    k = len(form.pieces)
    for j in range(k):
        meets = torch.ones_like(ranges.empty)[:, None].expand_as(low).clone()
        if j > 0:
            meets &= ranges.upper >= form.breaks[j - 1]
        if j < k - 1:
            meets &= ranges.lower <= form.breaks[j]
        meets = torch.where(ranges.phases >= 0, ranges.phases == j, meets)
        slope = form.pieces[j].expand_as(low)
        low, high = torch.where(meets, torch.minimum(low, slope), low), torch.where(meets, torch.maximum(high, slope), high)
    return low, high


def _contract(form: PhaseForm, phases: Tensor, here: slice, x_lower: Tensor, x_upper: Tensor, empty: Tensor) -> None:
    """Shrink the input boxes by the demands of the first layer's fixed phases, one demand and one input at a time."""
    n = form.neurons
    cut_low, cut_high = piece_ends(form, phases[:, here], here)
    rows, bias = form.q[here, n:], form.bias[here]
    for sign, cut in ((1.0, cut_low), (-1.0, -cut_high)):
        demanded = cut.isfinite()
        if not bool(demanded.any()):
            continue
        a = sign * rows
        # a x + b >= cut: a_i x_i >= cut - b - sum_{k != i} max a_k x_k.
        for _ in range(_SWEEPS):
            best = torch.maximum(a * x_lower[:, None], a * x_upper[:, None])
            total = best.sum(2, keepdim=True)
            size = best.abs().sum(2, keepdim=True) + bias.abs()[:, None] + cut.nan_to_num(0.0, 0.0, 0.0).abs()[:, :, None]
            need = (cut - sign * bias)[:, :, None] - (total - best) - 4 * form.error * size
            bound = need / a
            ok = demanded[:, :, None] & (a.abs() > 0) & bound.isfinite()
            bound = bound - torch.sign(a) * 4 * UNIT * bound.abs()
            x_lower.copy_(torch.maximum(x_lower, torch.where(ok & (a > 0), bound, -torch.inf).amax(1)))
            x_upper.copy_(torch.minimum(x_upper, torch.where(ok & (a < 0), bound, torch.inf).amin(1)))
            crossed = (x_lower > x_upper).any(1)
            empty |= crossed
            # An empty box is left as a point so that later arithmetic stays finite.
            x_lower.copy_(torch.where(crossed[:, None], torch.minimum(x_lower, x_upper), x_lower))
            x_upper.copy_(torch.where(crossed[:, None], x_lower, x_upper))


def _extremes(
    form: PhaseForm, rows: Tensor, bias: Tensor, lines: Lines, index: int, x_lower: Tensor, x_upper: Tensor
) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of rows (w, x) + bias under each assignment, (K, len(rows)) each."""
    batch = rows.expand(len(x_lower), -1, -1)
    absolute = batch.abs()
    slack = 4 * form.error * bias.abs()
    high = _extreme(form, batch, absolute, lines, index, x_lower, x_upper) + bias + slack
    low = -_extreme(form, -batch, absolute, lines, index, x_lower, x_upper) + bias - slack
    return low, high


def _extreme(
    form: PhaseForm, rows: Tensor, absolute: Tensor, lines: Lines, index: int, x_lower: Tensor, x_upper: Tensor
) -> Tensor:
    """Upper bound of rows (w, x), rows (K, r, n + d), by substituting the layers index - 1, ..., 0; rounding included."""
    n = form.neurons
    constant = torch.zeros(rows.shape[:2], dtype=torch.float64)
    mass = torch.zeros_like(constant)
    for here in reversed(form.layers[:index]):
        c, a = rows[:, :, here], absolute[:, :, here]
        if not bool(c.any()):
            continue
        up, down = c.clamp_min(0), c.clamp_max(0)
        p = up * lines.high_slope[:, None, here] + down * lines.low_slope[:, None, here]
        steep = torch.maximum(lines.high_slope[:, here].abs(), lines.low_slope[:, here].abs())[:, None]
        tall = torch.maximum(lines.high_height[:, here].abs(), lines.low_height[:, here].abs())[:, None]
        bias = form.bias[here]
        constant = constant + (up * lines.high_height[:, None, here] + down * lines.low_height[:, None, here] + p * bias).sum(2)
        mass = mass + (a * (tall + steep * bias.abs())).sum(2)
        rows = rows + p @ form.q[here]
        absolute = absolute + (a * steep) @ form.q[here].abs()
    x, ax = rows[:, :, n:], absolute[:, :, n:]
    middle, half = (x_lower + x_upper) / 2, (x_upper - x_lower) / 2 * (1 + 4 * UNIT)
    reach = (x.abs() * half[:, None]).sum(2)
    if math.isfinite(form.radius):
        dual = {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[form.ball_norm]
        around = (x * form.center).sum(2) + torch.linalg.vector_norm(x, dual, dim=2) * form.radius
        value = torch.minimum((x * middle[:, None]).sum(2) + reach, around)
    else:
        value = (x * middle[:, None]).sum(2) + reach
    size = torch.maximum(x_lower.abs(), x_upper.abs())[:, None]
    mass = mass + (ax * size).sum(2)
    if math.isfinite(form.radius):
        mass = mass + (ax * (form.center.abs() + form.radius)).sum(2)
    return value + constant + 4 * form.error * mass


def _value(form: PhaseForm, p: Tensor, here: slice) -> Tensor:
    """phi(p), entry by entry."""
    index = _piece_index(form, p, here)
    return pick(form.pieces[:, here], index) * p + pick(form.heights[:, here], index)


def _piece_index(form: PhaseForm, p: Tensor, here: slice) -> Tensor:
    index = torch.zeros_like(p, dtype=torch.long)
    for row in form.breaks[:, here]:
        index += p > row
    return index


def _piece_of(form: PhaseForm, low: Tensor, high: Tensor, here: slice) -> Tensor:
    """The piece whose closed interval holds [low, high], or -1."""
    first = torch.zeros_like(low, dtype=torch.long)
    last = torch.zeros_like(low, dtype=torch.long)
    for row in form.breaks[:, here]:
        first += low >= row
        last += high > row
    return torch.where(first >= last, last, torch.full_like(last, -1))


def pick(table: Tensor, index: Tensor) -> Tensor:
    """table[index] column by column: table (K, n), index (B, n)."""
    return table.gather(0, index.clamp_max(len(table) - 1)) if len(table) > 1 else table[0].expand(index.shape)
