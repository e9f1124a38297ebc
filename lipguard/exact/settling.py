"""Which neurons do not divide a region? One polytope, many objectives: far cheaper than branching on each.

Once the layers before are decided, a neuron is affine on the region, and its least and largest value there are linear
programs that differ in their objective alone. Where a value excludes the other pieces, the program's multipliers
refute them one by one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lipguard.exact.feasibility import MARGIN
from lipguard.solvers import highs
from lipguard.verify.phase_form import PhaseForm
from lipguard.verify.phases import Ranges, piece_ends
from lipguard.verify.substitution import Reduced

Refuted = tuple[int, int, Tensor]
"""A neuron, a piece it is in nowhere on the region, and the multipliers that refute it."""


def settle(form: PhaseForm, ranges: Ranges, reduced: Reduced, k: int, pattern: np.ndarray) -> list[Refuted]:
    """Pieces that free neurons, affine on region k, are not in; `pattern` is that of a point of the region.

    Every piece but the pattern's is listed for the neurons concerned, or none.
    """
    n = form.neurons
    phases = ranges.phases[k]
    p, height, free = reduced.p[k].numpy(), reduced.height[k].numpy(), reduced.free[k].numpy()
    affine = ~(p[:, :n] != 0).any(1)
    cut_low, cut_high = (e[0].numpy() for e in piece_ends(form, phases[None], slice(0, n)))
    low, high = ranges.lower[k].numpy(), ranges.upper[k].numpy()
    # Demands that the ranges meet already by themselves are left out.
    below = np.flatnonzero(affine & np.isfinite(cut_low) & (low <= cut_low))
    above = np.flatnonzero(affine & np.isfinite(cut_high) & (high >= cut_high))
    x = p[:, n:]
    rows = np.concatenate([-x[below], x[above]])
    right = np.r_[height[below] - cut_low[below], cut_high[above] - height[above]]
    asked: list[tuple[int, int, float]] = []
    for j in np.flatnonzero(affine & free):
        own = int(pattern[j])
        breaks = form.breaks[:, j].tolist()
        if own > 0:
            asked.append((int(j), -1, breaks[own - 1]))
        if own < len(breaks) and np.isfinite(breaks[own]):
            asked.append((int(j), 1, breaks[own]))
    objectives = np.array([sign * x[j] for j, sign, _ in asked])
    results = highs.maximise_each(objectives, rows, right, ranges.x_lower[k].numpy(), ranges.x_upper[k].numpy())
    excluded: dict[int, list[Refuted]] = {}
    possible: set[int] = set()
    for (j, sign, end), result in zip(asked, results, strict=True):
        # The largest sign * p must stay below sign * end.
        if not result.optimal or result.value + sign * (height[j] - end) > -MARGIN * np.linalg.norm(x[j]):
            possible.add(j)
            continue
        farkas = torch.zeros(n, dtype=torch.float64)
        duals = np.maximum(result.duals, 0)
        farkas[below] = torch.from_numpy(duals[: len(below)])
        farkas[above] -= torch.from_numpy(duals[len(below) :])
        farkas[j] = float(sign)
        own, count = int(pattern[j]), len(form.pieces)
        others = range(own) if sign < 0 else range(own + 1, count)
        excluded.setdefault(j, []).extend((j, piece, farkas) for piece in others)
    return [item for j, items in excluded.items() if j not in possible for item in items]
