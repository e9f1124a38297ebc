"""A few steps of the first-order method within a time: the refinement between two measurements of a large network."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from lipguard.solvers.first_order import lbfgs, least_rho, smoothed
from lipguard.solvers.slope_program import Proposal, SlopeProgram

_SMOOTHING = 16.0
_SETTLED = 0.004
"""Decrease of log rho a step below which further steps are not worth more than their share: 0.2 % of the bound."""


def refine(program: SlopeProgram, start: Tensor | None, target: float, limit: float) -> Proposal:
    """Improve multipliers until `target`, and on until `limit` while a step still lowers the bound visibly.

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
        t, _ = single.interior(None if start is None else start.to(torch.float32), margin=0.5)

        def ends(values: list[float]) -> bool:
            now = time.perf_counter()
            if now > limit or (len(values) > 20 and values[-11] - values[-1] < 1e-4):
                return True
            settled = len(values) > 3 and values[-3] - values[-1] < 2 * _SETTLED
            return now > target and settled

        x, steps = lbfgs(lambda x: smoothed(single, x, _SMOOTHING), single.group(t).log(), 30, ends)
        t = single.spread(x.exp())
        # Single precision finds rho to a few units of 1e-6; a margin above that spares the checker a second try.
        return Proposal(t.double(), least_rho(single, t) * (1 + 3e-5), math.nan, steps, inside=True)
