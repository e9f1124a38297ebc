"""What a measurement does within a time: multipliers refined from the last one's, or the dual climbed from its end.

A few steps on the multipliers cost less where a factorisation is cheap; in deep and wide networks the dual gets further.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from lipguard.programs.slope_program import Proposal, SlopeProgram
from lipguard.solvers.first_order import Smoothed, smoothed
from lipguard.solvers.lbfgs import lbfgs
from lipguard.solvers.low_rank import LowRank, Start
from lipguard.solvers.spheres import Spheres

_SMOOTHING = 16.0
_INSIDE = 1.05
"""Factor that moves a neighbouring program's multipliers off the boundary of the cone."""

_WORTH_A_STEP, _WORTH_OVERTIME = 0.005, 0.02
"""Decrease of log rho in a step below which another one is not worth its time, within the time and beyond it: 0.25 % and
1 % of the bound. Steps gain less and less, so that about as much again is left."""

_CLOSE, _VISIBLE = 2e-3, 0.02
"""Gaps of rho at which an ascent ends, and beyond which it may take more than its time: 0.1 % and 1 % of the bound."""

_EVERY = 4
"""Steps between two looks at the multipliers: where the last measurement's point is near, few are needed."""

_RANGE = 30.0
"""Sum of the logarithms of the layers' norms, growing or shrinking, up to which values fit into single precision."""

_ROUNDED = 3e-5
"""Single precision finds rho to a few units of 1e-6; a margin above that spares the checker a second try."""


def refine(program: SlopeProgram, start: Tensor | None, target: float, limit: float) -> Proposal:
    """Improve multipliers while a step lowers the bound visibly; beyond `target` only for more, and never beyond `limit`.

    In single precision: what comes out is proved in double precision anyway, and costs half.

    Args:
        program: the program, float64.
        start: multipliers (n,) of a neighbouring program, or None.
        target, limit: `time.perf_counter()` values.
    Returns:
        Multipliers inside the cone and a rho slightly above their least.
    Raises:
        SolverFailed: no interior point exists in floating point.
    """
    with torch.no_grad():
        single = program.to(torch.float32)

        def ends(values: list[float]) -> bool:
            now = time.perf_counter()
            if now > limit or (len(values) > 20 and values[-11] - values[-1] < 1e-4):
                return True
            return len(values) > 2 and values[-2] - values[-1] < (_WORTH_OVERTIME if now > target else _WORTH_A_STEP)

        best: tuple[float, Tensor] | None = None

        def value(x: Tensor) -> Smoothed | None:
            nonlocal best
            found = smoothed(single, x, _SMOOTHING)
            if found is not None and (best is None or found.largest < best[0]):
                best = found.largest, x
            return found

        steps = 0
        if start is not None:
            _, steps = lbfgs(value, single.group(_INSIDE * start.to(torch.float32)).log(), 30, ends, floor=0.1)
        if best is None:
            t, rho = single.interior(None if start is None else start.to(torch.float32), margin=0.5)
            best = rho, single.group(t).log()
            _, steps = lbfgs(value, best[1], 30, ends, floor=0.1)
        return Proposal(single.spread(best[1].exp()).double(), best[0] * (1 + _ROUNDED), math.nan, steps, inside=True)


def climb(program: SlopeProgram, start: Start | None, target: float, limit: float) -> tuple[Proposal, Start]:
    """Climb the dual until the gap is small; beyond `target` only while it is visible, and never beyond `limit`.

    In single precision, as `refine`, unless the program's values may leave its range.

    Args:
        program: the program, float64.
        start: the end of a neighbouring program's ascent, or None.
        target, limit: `time.perf_counter()` values.
    Returns:
        Multipliers inside the cone and a rho slightly above their least, and where the ascent ended.
    Raises:
        SolverFailed: no interior point exists in floating point.
    """
    with torch.no_grad():
        # Layers' norms at most: their squares, and those of what a part of them does, are to stay well within 1e38.
        rows = (*program.rows, program.out)
        size = sum(abs(math.log(sum(float(torch.linalg.matrix_norm(b)) for b in row.values()) or 1.0)) for row in rows)
        dual = Spheres(program.to(torch.float32) if size < _RANGE else program)
        options = LowRank(tol=_CLOSE, enough=_CLOSE, min_steps=2 * _EVERY, every=_EVERY, visible=_VISIBLE)
        found = options.climb(dual, dual.root, math.inf, target, start, limit)
        t, rho = (found.t.double(), found.rho * (1 + _ROUNDED)) if found.rho < math.inf else program.interior()
        return Proposal(t, rho, found.gap, found.steps, inside=True), found.end
