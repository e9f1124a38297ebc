"""On which sides of its breaks can each neuron be, in many regions at once?

Where phases are decided the demands of their pieces are linear in the input, and the region lies in a polytope. A free
neuron's pre-activation lies below and above linear functions of the input, from the checker's own relaxations of the
free neurons before it; their extremes over the polytope, not over the box around it, say whether the neuron's phase is
decided as well. Layer by layer, so that every refutation rests on decisions made before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lipguard.certificate import Leaf
from lipguard.exact.linear import signs
from lipguard.verify.domain.localized import Reduced
from lipguard.verify.phases.phase_form import PhaseForm
from lipguard.verify.phases.phases import Implied, imply, lines, piece_ends, reduce, refutes

_ENTRIES = 4e6
"""Entries of the programs' matrices that are held at once."""
_WORK = 5e5
"""Entries of all programs of one region up to which they pay: beyond, bounding the region is the cheaper way."""


@dataclass(frozen=True, eq=False)
class Decided:
    """K regions after the neurons that do not divide them were decided.

    Attributes:
        decisions: (K, n), with those neurons' phases.
        ranges, reduced: what the decisions imply.
        leaves: what was refuted on the way.
        beyond: for each region inputs found beyond a break, by neuron: its point is on one side, this one on the other.
    """

    decisions: Tensor
    ranges: Implied
    reduced: Reduced
    leaves: list[Leaf]
    beyond: list[dict[int, np.ndarray]]


@dataclass(frozen=True, eq=False)
class _Asked:
    """P questions: can neuron j of region k be beyond an end of its own piece?

    Attributes:
        region, neuron: (P,).
        sign: 1 for the upper end, -1 for the lower, (P,).
        rows, constant: sign * (p - end) <= rows x + constant on the region, (P, d) and (P,).
        slopes: of the relaxing lines used, (P, n).
    """

    region: Tensor
    neuron: Tensor
    sign: Tensor
    rows: Tensor
    constant: Tensor
    slopes: Tensor


def decide(form: PhaseForm, decisions: Tensor, parts: Tensor, ranges: Implied, reduced: Reduced, patterns: Tensor) -> Decided:
    """Decide the neurons that are in a single piece everywhere in their region.

    Args:
        form: the network and its domain.
        decisions, parts: the regions, (K, n) and (K,).
        ranges, reduced: what they imply.
        patterns: the piece each neuron is supposed to stay in: that of some input of the region, (K, n).
    """
    decisions = decisions.clone()
    leaves: list[Leaf] = []
    beyond: list[dict[int, np.ndarray]] = [{} for _ in decisions]
    n, d = form.neurons, form.q.shape[1] - form.neurons
    for layer in range(len(form.layers) if n * (n + 2 * d) * d <= _WORK else 0):
        asked = _questions(form, ranges, reduced, patterns, layer)
        if not len(asked.region):
            continue
        excluded, farkas, reached, found = _answer(form, ranges, reduced, asked)
        for i in reached.nonzero()[:, 0].tolist():
            beyond[int(asked.region[i])][int(asked.neuron[i])] = found[i].numpy()
        if _record(form, decisions, parts, ranges, patterns, asked, excluded, farkas, leaves):
            ranges = imply(form, decisions, parts)
            reduced = reduce(form, ranges)
    return Decided(decisions, ranges, reduced, leaves, beyond)


def _questions(form: PhaseForm, ranges: Implied, reduced: Reduced, patterns: Tensor, layer: int) -> _Asked:
    """Both ends of the piece that each free neuron of a layer has at the region's point."""
    n, here = form.neurons, form.layers[layer]
    around = lines(form, ranges)
    low, high = piece_ends(form, patterns[:, here], here)
    parts: list[_Asked] = []
    for sign, end in ((1.0, high), (-1.0, low)):
        region, place = (reduced.free[:, here] & end.isfinite()).nonzero(as_tuple=True)
        neuron = place + here.start
        rows = sign * form.q[neuron]
        constant = sign * (form.bias[neuron] - end[region, place])
        slopes = torch.zeros(len(region), n, dtype=torch.float64)
        for before in reversed(form.layers[:layer]):
            own = rows[:, before]
            up = own > 0
            slope = torch.where(up, around.high_slope[region, before], around.low_slope[region, before])
            height = torch.where(up, around.high_height[region, before], around.low_height[region, before])
            slopes[:, before] = slope
            through = own * slope
            constant = constant + (own * height).sum(1) + through @ form.bias[before]
            rows = rows + through @ form.q[before]
        parts.append(_Asked(region, neuron, torch.full((len(region),), sign, dtype=torch.float64), rows[:, n:], constant, slopes))
    return _Asked(*(torch.cat([getattr(part, name) for part in parts]) for name in _Asked.__dataclass_fields__))


def _answer(form: PhaseForm, ranges: Implied, reduced: Reduced, asked: _Asked) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which questions are denied, by which multipliers; which are affirmed, by which input."""
    rows, right, owner, side = _demands(form, ranges, reduced)
    middle, half = (ranges.x_lower + ranges.x_upper) / 2, (ranges.x_upper - ranges.x_lower) / 2
    right = right - (rows * middle[:, None]).sum(2)
    rows = rows * half[:, None]
    length = torch.linalg.vector_norm(rows, dim=2)
    there = length > 0
    safe = torch.where(there, length, torch.ones_like(length))
    rows = rows / safe[:, :, None]
    right = torch.where(there, right / safe, torch.ones_like(right))
    g = asked.rows * half[asked.region]
    c = asked.constant + (asked.rows * middle[asked.region]).sum(1)
    m, d = rows.shape[1], rows.shape[2]
    chunk = max(1, int(_ENTRIES / max(1, (m + 2 * d) * d)))
    answers = [
        signs(rows, right, g[i : i + chunk], c[i : i + chunk], asked.region[i : i + chunk]) for i in range(0, len(g), chunk)
    ]
    excluded, multipliers, reached, found = (
        torch.cat([getattr(answer, name) for answer in answers]) for name in ("negative", "multipliers", "positive", "point")
    )
    found = middle[asked.region] + half[asked.region] * found
    # Fixed neurons carry their demands' weights, free ones the slopes of their lines.
    farkas = torch.where(ranges.phases[asked.region] < 0, asked.slopes, torch.zeros_like(asked.slopes))
    weights = multipliers * (side / safe)[asked.region]
    farkas = farkas.scatter_add(1, owner[asked.region], weights)
    farkas = farkas.scatter(1, asked.neuron[:, None], asked.sign[:, None])
    return excluded, farkas, reached, found


def _demands(form: PhaseForm, ranges: Implied, reduced: Reduced) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Demands of decided neurons that are affine in the input and that the ranges do not meet by themselves.

    Returns:
        rows (K, M, d) and right (K, M) of rows x <= right, zero where a region has fewer; the neuron and the sign of
        each demand's weight, (K, M).
    """
    n = form.neurons
    low, high = piece_ends(form, ranges.phases, slice(0, n))
    f = reduced.index.shape[1]
    affine = ~(reduced.p[:, :, :f] != 0).any(2)
    asked = torch.cat([affine & low.isfinite() & (ranges.lower <= low), affine & high.isfinite() & (ranges.upper >= high)], 1)
    count = int(asked.sum(1).max()) if len(asked) else 0
    index = asked.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    present = asked.gather(1, index)
    neuron, side = index % n, torch.where(index < n, 1.0, -1.0).to(torch.float64)
    rows = reduced.p[:, :, f:].gather(1, neuron[:, :, None].expand(-1, -1, reduced.p.shape[2] - f))
    end = torch.where(index < n, low.gather(1, neuron), high.gather(1, neuron))
    right = side * (reduced.height.gather(1, neuron) - end)
    rows = -side[:, :, None] * rows * present[:, :, None]
    return rows, torch.where(present, right, torch.ones_like(right)), neuron, side


def _record(
    form: PhaseForm,
    decisions: Tensor,
    parts: Tensor,
    ranges: Implied,
    patterns: Tensor,
    asked: _Asked,
    excluded: Tensor,
    farkas: Tensor,
    leaves: list[Leaf],
) -> bool:
    """Write what the checker's test confirms into the decisions; a neuron is decided once all other pieces are refuted."""
    some = excluded.nonzero()[:, 0]
    if not len(some):
        return False
    region, neuron, sign = asked.region[some], asked.neuron[some], asked.sign[some]
    own = patterns[region, neuron]
    rows = ranges.pick(region)
    rows.phases.scatter_(1, neuron[:, None], (own + sign.long())[:, None])
    some = some[refutes(form, rows, farkas[some])]
    places: dict[tuple[int, int], list[int]] = {}
    for i in some.tolist():
        places.setdefault((int(asked.region[i]), int(asked.neuron[i])), []).append(i)
    sides = torch.zeros_like(patterns).index_put_((asked.region, asked.neuron), torch.ones_like(asked.region), accumulate=True)
    changed = False
    for (k, j), refuted in places.items():
        if len(refuted) < int(sides[k, j]):
            continue
        own = int(patterns[k, j])
        for i in refuted:
            for piece in range(own + 1, len(form.pieces)) if asked.sign[i] > 0 else range(own):
                leaf = decisions[k].clone()
                leaf[j] = piece
                leaves.append(Leaf(leaf.to(torch.int8), empty=True, farkas=farkas[i], part=int(parts[k])))
        decisions[k, j] = own
        changed = True
    return changed
