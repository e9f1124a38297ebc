"""A few steps of the first-order method within a time: the refinement between two measurements of a large network."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from lipguard.solvers.first_order import Smoothed, smoothed
from lipguard.solvers.lbfgs import lbfgs
from lipguard.solvers.slope_program import Proposal, SlopeProgram

_SMOOTHING = 16.0
_INSIDE = 1.05
"""Factor that moves a neighbouring program's multipliers off the boundary of the cone."""

_WORTH_A_STEP, _WORTH_OVERTIME = 0.005, 0.02
"""Decrease of log rho in a step below which another one is not worth its time, within the time and beyond it: 0.25 % and
1 % of the bound. Steps gain less and less, so that about as much again is left."""


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
            _, steps = lbfgs(value, single.group(_INSIDE * start.to(torch.float32)).log(), 30, ends, preconditioned=True)
        if best is None:
            t, rho = single.interior(None if start is None else start.to(torch.float32), margin=0.5)
            best = rho, single.group(t).log()
            _, steps = lbfgs(value, best[1], 30, ends, preconditioned=True)
        # Single precision finds rho to a few units of 1e-6; a margin above that spares the checker a second try.
        return Proposal(single.spread(best[1].exp()).double(), best[0] * (1 + 3e-5), math.nan, steps, inside=True)
