"""What fixed phases imply: rigorous ranges of pre-activations, empty regions, slopes; for many assignments at once.

A phase is the index of the linear piece a neuron stays in, -1 where it is free. An assignment is assumed while the ranges are
propagated (`verify.domain.ranges`): every pre-activation's range is cut to the neuron's piece, and the neuron's two lines are
the piece itself. What is found holds at all inputs with these phases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipguard.rounding import UNIT, gamma
from lipguard.verify.domain.localized import Reduced, reduced
from lipguard.verify.domain.ranges import Assumed, Ends, propagate
from lipguard.verify.domain.relaxation import Intervals, Lines
from lipguard.verify.phases.phase_form import PhaseForm

_SWEEPS = 2


@dataclass(frozen=True, eq=False)
class Implied:
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

    def pick(self, which: Tensor) -> Implied:
        """Those of the chosen assignments."""
        fields = (self.lower, self.upper, self.empty, self.phases, self.x_lower, self.x_upper)
        return Implied(*(f[which] for f in fields))


class _Phases(Assumed):
    """Neurons that keep to their phases; where their ranges are known, these are not looked for again.

    Attributes:
        found: what the phases imply, layer by layer.
        slopes: of the lines of free neurons, (K, n); None for those that are chosen by the range.
    """

    def __init__(self, form: PhaseForm, found: Implied, slopes: Tensor | None = None) -> None:
        self.form, self.found, self.slopes, self.searched = form, found, slopes, slopes is None

    def cut(self, k: int, low: Tensor, high: Tensor) -> Ends:
        form, found, here = self.form, self.found, self.form.layers[k]
        cut_low, cut_high = piece_ends(form, found.phases[:, here], here)
        if not self.searched:
            low, high = torch.maximum(low, found.lower[:, here]), torch.minimum(high, found.upper[:, here])
        low, high = torch.maximum(low, cut_low), torch.minimum(high, cut_high)
        found.empty.logical_or_((low > high).any(1))
        high = torch.maximum(low, high)
        if self.searched:
            # A range inside one piece implies its phase.
            inside = _piece_of(form, low, high, here)
            found.phases[:, here] = torch.where(found.phases[:, here] < 0, inside, found.phases[:, here])
            found.lower[:, here], found.upper[:, here] = low, high
        return low, high

    def lines(self, k: int, wide: Ends, tight: Intervals, center: Tensor) -> Lines:
        del wide, center
        return _lines(self.form, k, tight, self.found.phases, self.slopes)


def imply(form: PhaseForm, phases: Tensor, parts: Tensor) -> Implied:
    """Ranges of all pre-activations under K assignments (K, n).

    Args:
        form: the network and its domain.
        phases: (K, n), -1 where free.
        parts: the box each assignment lies in, (K,).
    """
    phases = phases.clone()
    lower, upper = (torch.zeros(phases.shape, dtype=torch.float64) for _ in range(2))
    found = Implied(lower, upper, torch.zeros(len(phases), dtype=torch.bool), phases, form.lower[parts], form.upper[parts])
    if form.layers:
        _contract(form, phases, form.layers[0], found.x_lower, found.x_upper, found.empty)
    propagate(form.hidden, form.regions(found.x_lower, found.x_upper), _Phases(form, found))
    return found


def refutes(form: PhaseForm, implied: Implied, farkas: Tensor) -> Tensor:
    """Whether multipliers prove that no input has the phases: (K,) of bool.

    Every fixed phase demands p - low >= 0 or high - p >= 0 of its piece. A nonnegative combination whose largest value
    over the relaxed region is negative refutes them all (Farkas). `farkas` (K, n) holds the combination's signed
    weights for fixed neurons (positive: the lower end's demand, negative: the upper end's), and the slope of the
    relaxing line for free ones.
    """
    if not form.layers:
        return torch.zeros(len(farkas), dtype=torch.bool)
    fixed = implied.phases >= 0
    farkas = torch.where(farkas.isfinite(), farkas, torch.zeros_like(farkas))
    known = _Phases(form, replace(implied, empty=implied.empty.clone()), farkas)
    propagation = propagate(form.hidden, form.regions(implied.x_lower, implied.x_upper), known)
    cut_low, cut_high = piece_ends(form, implied.phases, slice(0, form.neurons))
    weight = torch.where(fixed, farkas, torch.zeros_like(farkas))
    end = torch.where(weight > 0, cut_low, cut_high)
    weight, end = (torch.where(end.isfinite(), v, torch.zeros_like(v)) for v in (weight, end))
    sources = [form.network.nodes[i].sources[0] for i in form.network.activations]
    top = propagation.largest_sum([(i, weight[:, None, here]) for i, here in zip(sources, form.layers, strict=True)])[:, 0]
    level, mass = (weight * end).sum(1), (weight * end).abs().sum(1)
    # The level is a sum of n products; the difference rounds once.
    return known.found.empty | (top - level + gamma(form.neurons + 8) * mass + 4 * UNIT * (top.abs() + mass) < 0)


def lines(form: PhaseForm, implied: Implied, slopes: Tensor | None = None) -> Lines:
    """Lines around every neuron's output on its range, (K, n) each; `slopes` are those of free neurons, if given."""
    parts = []
    for k, (function, here) in enumerate(zip(form.functions, form.layers, strict=True)):
        on = Intervals(function, implied.lower[:, here], implied.upper[:, here])
        parts.append(_lines(form, k, on, implied.phases, slopes))
    none = implied.lower[:, :0]
    sides = ([none, *(getattr(part, name) for part in parts)] for name in Lines.__dataclass_fields__)
    return Lines(*(torch.cat(side, 1) for side in sides))


def _lines(form: PhaseForm, k: int, on: Intervals, phases: Tensor, slopes: Tensor | None) -> Lines:
    """Lines of layer k: of a fixed neuron the slope is its piece's."""
    low, high, here = on.points[0], on.points[-1], form.layers[k]
    phase = phases[:, here]
    free = torch.full_like(low, math.nan) if slopes is None else slopes[:, here]
    slope = torch.where(phase >= 0, pick(form.pieces[:, here], phase.clamp_min(0)), free)
    # A free neuron's lines are the chord and, on the other side, the end piece from which the function is less far.
    return on.lines(torch.where(high > -low, high, low), slope)


def piece_ends(form: PhaseForm, phases: Tensor, here: slice) -> tuple[Tensor, Tensor]:
    """Ends of the pieces that fixed neurons are in; infinite for free ones."""
    infinite = torch.full((1, here.stop - here.start), math.inf, dtype=torch.float64)
    breaks = form.breaks[:, here]
    low = pick(torch.cat([-infinite, breaks]), phases.clamp_min(0))
    high = pick(torch.cat([breaks, infinite]), phases.clamp_min(0))
    free = phases < 0
    return torch.where(free, -infinite, low), torch.where(free, infinite, high)


def slope_ends(form: PhaseForm, implied: Implied) -> tuple[Tensor, Tensor]:
    """Smallest and largest slope of every neuron among the pieces its range meets, (K, n)."""
    alphas, betas = [implied.lower[:, :0]], [implied.lower[:, :0]]
    for function, here in zip(form.functions, form.layers, strict=True):
        phase = implied.phases[:, here]
        own = pick(form.pieces[:, here], phase.clamp_min(0))
        for found, end in zip((alphas, betas), function.slope_range(implied.lower[:, here], implied.upper[:, here]), strict=True):
            # An empty region may have no slopes; any will do for what is never used.
            found.append(torch.where((phase >= 0) | ~end.isfinite(), own, end))
    return torch.cat(alphas, 1), torch.cat(betas, 1)


def reduce(form: PhaseForm, implied: Implied) -> Reduced:
    """The maps of the neurons that are still free; a neuron of a known phase has its piece's slope."""
    alpha, beta = slope_ends(form, implied)
    offset = torch.where(implied.phases >= 0, pick(form.heights, implied.phases.clamp_min(0)), torch.zeros_like(alpha))
    return reduced(form.form, alpha, beta, form.bias, offset)


def _contract(form: PhaseForm, phases: Tensor, here: slice, x_lower: Tensor, x_upper: Tensor, empty: Tensor) -> None:
    """Shrink the input boxes by the demands of the first layer's fixed phases, one demand and one input at a time."""
    n = form.neurons
    cut_low, cut_high = piece_ends(form, phases[:, here], here)
    rows, bias = form.form.q[here, n:], form.enclosed_bias[here]
    # What composed rows and biases are off by, over the boxes.
    off = torch.maximum(x_lower.abs(), x_upper.abs()) @ rows.spread.T * (1 + 2 * gamma(n + rows.center.shape[1])) + bias.spread
    error = gamma(rows.center.shape[1] + 16)
    for sign, cut in ((1.0, cut_low), (-1.0, -cut_high)):
        demanded = cut.isfinite()
        if not bool(demanded.any()):
            continue
        a = sign * rows.center
        # a x + b >= cut: a_i x_i >= cut - b - sum_{k != i} max a_k x_k.
        for _ in range(_SWEEPS):
            best = torch.maximum(a * x_lower[:, None], a * x_upper[:, None])
            total = best.sum(2, keepdim=True)
            size = best.abs().sum(2, keepdim=True) + bias.center.abs()[:, None] + cut.nan_to_num(0.0, 0.0, 0.0).abs()[:, :, None]
            # Sums of d + 3 terms, taken with their sizes; `off` is not rounded down by more than a share of itself.
            need = (cut - sign * bias.center)[:, :, None] - (total - best) - 4 * error * size - 2 * off[:, :, None]
            bound = need / a
            ok = demanded[:, :, None] & (a.abs() > 0) & bound.isfinite()
            # The quotient rounds once.
            bound = bound - torch.sign(a) * 4 * UNIT * bound.abs()
            x_lower.copy_(torch.maximum(x_lower, torch.where(ok & (a > 0), bound, -torch.inf).amax(1)))
            x_upper.copy_(torch.minimum(x_upper, torch.where(ok & (a < 0), bound, torch.inf).amin(1)))
            crossed = (x_lower > x_upper).any(1)
            empty |= crossed
            # An empty box is left as a point so that later arithmetic stays finite.
            x_lower.copy_(torch.where(crossed[:, None], torch.minimum(x_lower, x_upper), x_lower))
            x_upper.copy_(torch.where(crossed[:, None], x_lower, x_upper))


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
