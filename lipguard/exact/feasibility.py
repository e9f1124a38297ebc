"""Does any input have given phases? A linear program over the input and relaxed free neurons answers, with evidence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lipguard.solvers import highs
from lipguard.verify.phases import Lines, PhaseForm, Ranges, piece_ends
from lipguard.verify.substitution import Reduced

_MARGIN = 1e-9
_CUTS = 20
"""Half-spaces around a ball at most; the checker knows the ball itself."""


@dataclass(frozen=True, eq=False)
class Feasibility:
    """Outcome of the program.

    Attributes:
        point: the input of its solution, (d,).
        margin: the largest margin by which all demands can be met together, as a distance; negative if they cannot.
        farkas: multipliers that refute the phases, as `lipguard.verify.phases.refutes` reads them; None if feasible.
    """

    point: np.ndarray
    margin: float
    farkas: Tensor | None


def feasibility(form: PhaseForm, ranges: Ranges, reduced: Reduced, i: int) -> Feasibility:
    """Maximise the margin of the demands of assignment i over the relaxation.

    Variables: the input x in the box around the region, u of the free neurons between the lines of their ranges, and
    the margin. A status other than optimal counts as feasible.
    """
    n = form.neurons
    d = form.q.shape[1] - n
    phases, lower, upper = ranges.phases[i], ranges.lower[i], ranges.upper[i]
    free = reduced.free[i].nonzero()[:, 0]
    columns = torch.cat([n + torch.arange(d), free])
    p, height = reduced.p[i][:, columns].numpy(), reduced.height[i].numpy()
    cut_low, cut_high = (e[0].numpy() for e in piece_ends(form, phases[None], slice(0, n)))
    low, high = lower.numpy(), upper.numpy()
    size = len(columns) + 1
    length = np.linalg.norm(p[:, :d], axis=1) + 1e-300
    # Demands that the ranges meet already by themselves are left out.
    below = np.flatnonzero(np.isfinite(cut_low) & (low <= cut_low))
    above = np.flatnonzero(np.isfinite(cut_high) & (high >= cut_high))
    rows = [np.c_[-p[below], length[below]], np.c_[p[above], length[above]]]
    right = [height[below] - cut_low[below], cut_high[above] - height[above]]
    slopes: list[np.ndarray] = []
    if len(free):
        lines_rows, lines_right, slopes = _lines(form, ranges, reduced, i, free, p, height, d)
        rows += lines_rows
        right += lines_right
    matrix, bound = np.concatenate(rows), np.concatenate(right)
    objective = np.zeros(size)
    objective[-1] = 1.0
    demands = len(bound)
    span = 1e6 + np.abs(high[free]) + np.abs(low[free])
    x_low, x_high = ranges.x_lower[i].numpy(), ranges.x_upper[i].numpy()
    for _ in range(_CUTS):
        result = highs.maximise(objective, matrix, bound, np.r_[x_low, -span, -np.inf], np.r_[x_high, span, 1.0])
        if not result.optimal:
            return Feasibility((x_low + x_high) / 2, 1.0, None)
        point, margin = result.x[:d], float(result.x[-1])
        cut = _cut(form, point)
        if margin <= -_MARGIN or cut is None:
            break
        matrix = np.concatenate([matrix, np.r_[cut[0], np.zeros(size - d)][None]])
        bound = np.r_[bound, cut[1]]
    if margin > -_MARGIN:
        return Feasibility(point, margin, None)
    farkas = np.zeros(n)
    a, b = len(below), len(below) + len(above)
    np.add.at(farkas, below, np.maximum(result.duals[:a], 0))
    np.add.at(farkas, above, -np.maximum(result.duals[a:b], 0))
    if len(free):
        weights = np.maximum(result.duals[b:demands], 0).reshape(-1, len(free))
        total = weights.sum(0)
        mean = (weights * np.stack(slopes)).sum(0) / np.where(total > 0, total, 1.0)
        farkas[free.numpy()] = np.where(total > 0, mean, slopes[0])
    return Feasibility(point, margin, torch.from_numpy(farkas))


def _cut(form: PhaseForm, point: np.ndarray) -> tuple[np.ndarray, float] | None:
    """A supporting half-space of the ball that cuts the point off; None if it lies in the ball, or there is none."""
    if not np.isfinite(form.radius) or form.ball_norm == np.inf:
        return None
    center = form.center.numpy()
    step = point - center
    length = float(np.linalg.norm(step, form.ball_norm))
    if length <= form.radius * (1 + 1e-7):
        return None
    normal = step / length if form.ball_norm == 2 else np.sign(step)
    return normal, float(normal @ center + form.radius)


def _lines(
    form: PhaseForm, ranges: Ranges, reduced: Reduced, i: int, free: Tensor, p: np.ndarray, height: np.ndarray, d: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Rows that keep each free u between lines of its range: chord on one side, the end pieces on the other.

    w <= s p + c reads u <= ((s - alpha) p + c) / width; likewise from below.
    """
    n = form.neurons
    everything = slice(0, n)
    phases, low, high = ranges.phases[i : i + 1], ranges.lower[i : i + 1], ranges.upper[i : i + 1]
    default = Lines.blank(1, n)
    default.fill(form, phases, everything, low, high)
    f = free.numpy()
    alpha, width = reduced.alpha[i].numpy()[f], reduced.width[i].numpy()[f]
    ends = [form.pieces[0].expand(1, n), form.pieces[-1].expand(1, n)]
    rows, right, slopes = [], [], []
    for slope in (default.high_slope, default.low_slope, *ends):
        lines = Lines.blank(1, n)
        lines.fill(form, phases, everything, low, high, slope)
        s = slope[0].numpy()[f]
        for sign, c in ((1.0, lines.high_height[0].numpy()[f]), (-1.0, lines.low_height[0].numpy()[f])):
            # sign (u - ((s - alpha)(P v + p0) + c) / width) <= 0
            factor = (s - alpha) / width
            row = np.zeros((len(f), p.shape[1] + 1))
            row[:, :-1] = -sign * factor[:, None] * p[f]
            row[np.arange(len(f)), d + np.arange(len(f))] += sign
            rows.append(row)
            right.append(sign * (factor * height[f] + c / width))
            slopes.append(s)
    return rows, right, slopes
