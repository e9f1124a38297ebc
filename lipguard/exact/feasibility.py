"""Does any input have given phases? A linear program over the input and relaxed free neurons answers, with evidence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from lipguard.solvers import highs
from lipguard.verify.domain.localized import Reduced
from lipguard.verify.phases.phase_form import PhaseForm
from lipguard.verify.phases.phases import Implied, lines, piece_ends

MARGIN = 1e-9
"""Distance by which demands must fail before they count as refuted."""

_CUTS = 6
"""Half-spaces around a ball at most; the checker knows the ball itself."""


@dataclass(frozen=True, eq=False)
class Feasibility:
    """Outcome of the program.

    Attributes:
        point: the input of its solution, (d,).
        margin: the largest margin by which all demands can be met together, as a distance; negative if they cannot.
        farkas: multipliers that refute the phases, as `lipguard.verify.phases.phases.refutes` reads them; None if feasible.
    """

    point: np.ndarray
    margin: float
    farkas: Tensor | None


def feasibility(form: PhaseForm, ranges: Implied, reduced: Reduced, which: list[int]) -> list[Feasibility]:
    """Maximise the margin of the demands of each chosen assignment over its relaxation.

    Variables: the input x in the box around the region, u of the free neurons between the lines of their ranges, and
    the margin. A status other than optimal counts as feasible.
    """
    if not which:
        return []
    relaxed = _Relaxation(form, ranges, reduced, torch.tensor(which))
    return [relaxed.solve(k) for k in range(len(which))]


class _Relaxation:
    """What the programs of one batch share, as NumPy arrays."""

    def __init__(self, form: PhaseForm, ranges: Implied, reduced: Reduced, which: Tensor) -> None:
        self.form = form
        some, own = ranges.pick(which), reduced.pick(which)
        cut_low, cut_high = piece_ends(form, some.phases, slice(0, form.neurons))
        self.low, self.high, self.cut_low, self.cut_high = (e.numpy() for e in (some.lower, some.upper, cut_low, cut_high))
        self.p, self.height, self.free = own.p.numpy(), own.height.numpy(), own.free.numpy()
        self.alpha, self.width = own.alpha.numpy(), own.width.numpy()
        self.x_low, self.x_high = some.x_lower.numpy(), some.x_upper.numpy()
        # Each free u lies below and above lines of four slopes: chord, default and both end pieces.
        default, everywhere = lines(form, some), own.alpha.shape
        self.lines: list[tuple[float, np.ndarray, np.ndarray]] = []
        seen: list[Tensor] = []
        for slope in (default.high_slope, default.low_slope, *(form.pieces[j].expand(everywhere) for j in (0, -1))):
            if any(bool((slope == other).all()) for other in seen):
                continue
            seen.append(slope)
            own_lines = lines(form, some, slope)
            heights = (1.0, own_lines.high_height), (-1.0, own_lines.low_height)
            self.lines += [(sign, slope.numpy(), height.numpy()) for sign, height in heights]

    def solve(self, k: int) -> Feasibility:
        form, n = self.form, self.form.neurons
        d, f = form.q.shape[1] - n, self.p.shape[2] - (form.q.shape[1] - n)
        height = self.height[k]
        cut_low, cut_high, low, high = self.cut_low[k], self.cut_high[k], self.low[k], self.high[k]
        # Demands that the ranges meet already by themselves are left out.
        below = np.flatnonzero(np.isfinite(cut_low) & (low <= cut_low))
        above = np.flatnonzero(np.isfinite(cut_high) & (high >= cut_high))
        asked = np.concatenate([below, above])
        free = np.flatnonzero(self.free[k])
        # The first places are those of the free neurons, in their order.
        if not self.p[k][asked, : len(free)].any():
            free = free[:0]  # the demands are affine in the input alone: nothing is relaxed
        p = np.concatenate([self.p[k][:, f:], self.p[k][:, : len(free)]], 1)
        size = d + len(free) + 1
        matrix = np.empty((len(asked), size))
        matrix[: len(below), :-1], matrix[len(below) :, :-1] = -p[below], p[above]
        matrix[:, -1] = np.linalg.norm(matrix[:, :d], axis=1)
        rows = [matrix]
        right = [height[below] - cut_low[below], cut_high[above] - height[above]]
        if len(free):
            for sign, slope, line_height in self.lines:
                # w <= s p + c reads u <= ((s - alpha) p + c) / width.
                factor = (slope[k, free] - self.alpha[k, free]) / self.width[k, free]
                row = np.zeros((len(free), size))
                row[:, :-1] = -sign * factor[:, None] * p[free]
                row[np.arange(len(free)), d + np.arange(len(free))] += sign
                rows.append(row)
                right.append(sign * (factor * height[free] + line_height[k, free] / self.width[k, free]))
        matrix, bound = np.concatenate(rows), np.concatenate(right)
        demands = len(bound)
        objective = np.zeros(size)
        objective[-1] = 1.0
        span = 1e6 + np.abs(high[free]) + np.abs(low[free])
        x_low, x_high = self.x_low[k], self.x_high[k]
        point, margin, duals = (x_low + x_high) / 2, 1.0, np.zeros(0)
        for _ in range(_CUTS):
            result = highs.maximise(objective, matrix, bound, np.r_[x_low, -span, -np.inf], np.r_[x_high, span, 1.0])
            if not result.optimal:
                return Feasibility(point, 1.0, None)
            point, margin, duals = result.x[:d], float(result.x[-1]), np.maximum(result.duals, 0)
            cut = _cut(form, point)
            if margin <= -MARGIN or cut is None:
                break
            if not len(free) and form.ball_norm == 2.0 and len(asked):
                nearest, weights = _nearest(form, matrix[:, :d], bound)
                if weights is not None:
                    margin, duals = -1.0, weights
                elif nearest is not None:
                    point = _towards(form, nearest, point)
                    margin = float(((bound - matrix[:, :d] @ point) / matrix[:, -1].clip(1e-300)).min())
                break
            matrix = np.concatenate([matrix, np.r_[cut[0], np.zeros(size - d)][None]])
            bound = np.r_[bound, cut[1]]
        if margin > -MARGIN:
            return Feasibility(point, margin, None)
        farkas = np.zeros(n)
        a, b = len(below), len(below) + len(above)
        np.add.at(farkas, below, duals[:a])
        np.add.at(farkas, above, -duals[a:b])
        if len(free):
            weights = duals[b:demands].reshape(-1, len(free))
            slopes = np.stack([slope[k, free] for _, slope, _ in self.lines])
            total = weights.sum(0)
            farkas[free] = np.where(total > 0, (weights * slopes).sum(0) / np.where(total > 0, total, 1.0), slopes[0])
        return Feasibility(point, margin, torch.from_numpy(farkas))


def _nearest(form: PhaseForm, rows: np.ndarray, right: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The point of the polytope rows x <= right nearest to the 2-ball's centre, if it lies in the ball; else multipliers.

    That point is a combination of the rows with nonnegative multipliers, which separate the polytope from the ball:
    Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23. Neither is known if the computation fails.
    """
    center = form.center.numpy()
    system = np.concatenate([-rows.T * form.radius, -(right - rows @ center)[None]])
    target = np.r_[np.zeros(rows.shape[1]), 1.0]
    try:
        multipliers, _ = nnls(system, target)
    except RuntimeError:  # too many iterations
        return None, None
    residual = system @ multipliers - target
    if residual[-1] >= 0:
        return None, multipliers  # no point at all, if rounding does not deceive
    step = -residual[:-1] / residual[-1]
    if np.linalg.norm(step) > 1 + MARGIN:
        return None, multipliers
    return center + form.radius * step, None


def _towards(form: PhaseForm, near: np.ndarray, far: np.ndarray) -> np.ndarray:
    """Half-way to where the way from a point of the 2-ball to one outside leaves it."""
    start, way = near - form.center.numpy(), far - near
    a, b, c = way @ way, start @ way, start @ start - form.radius**2
    return near + way * max(0.0, (-b + np.sqrt(max(b * b - a * c, 0.0))) / a) / 2


def pattern_at(form: PhaseForm, x: np.ndarray) -> np.ndarray:
    """The piece each neuron is in at the input x of the phase form, (n,)."""
    n = form.neurons
    q, breaks, pieces, heights = form.q.numpy(), form.breaks.numpy(), form.pieces.numpy(), form.heights.numpy()
    w, pattern = np.zeros(n), np.zeros(n, dtype=np.intp)
    direct = q[:, n:] @ x + form.bias.numpy()
    for here in form.layers:
        value = direct[here] + q[here, : here.start] @ w[: here.start]
        piece = (value > breaks[:, here]).sum(0)
        columns = np.arange(here.start, here.stop)
        pattern[here] = piece
        w[here] = pieces[piece, columns] * value + heights[piece, columns]
    return pattern


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
