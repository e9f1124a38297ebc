"""Low-rank dual method for deep and wide networks: it climbs by matrix products, and factorises to look at the multipliers.

L-BFGS on the dual's spheres (`spheres`) reaches a gap of a thousandth in one to two hundred steps, through eighty layers as
through ten. Multipliers of a point short of the optimum lie outside the cone, by little: they are raised by a factor that
grows by 1 + eps from layer to layer, and the elimination gives the rho of the best eps. The dual value bounds rho from
below, so that the gap is known.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.errors import SolverFailed
from lipguard.solvers.lbfgs import lbfgs
from lipguard.solvers.slope_program import Proposal, SlopeProgram
from lipguard.solvers.spheres import Passes, Spheres

_ALIGNED = 10
"""Steps to the aligned point before curvatures are measured: from random vectors they say nothing."""

_FIRST, _EVERY = 75, 25
"""Steps before the first look at the multipliers, and between two; a look costs about five."""

_SPARE = 6
"""Rank beyond the channels, which bound the optimum's: at a rank-deficient point a local optimum is the global one."""

_STALLED = 0.01
"""Part of the gap that ten steps must close: less is the end of this rank."""

_RISE, _LOWER = 0.03, 10**-0.5
"""The largest eps that is tried, and the factor from one to the next."""


@dataclass(frozen=True)
class LowRank:
    """Options of the method.

    Attributes:
        tol: gap (rho - dual value) / rho at which it ends.
        enough: gap at which it ends, after `min_steps`, where the last steps did not halve it: in deep networks, whose gaps
            close slowly. A number of steps that hardly depends on depth keeps the cost linear.
        rank: entries of a vector at first.
        min_steps, max_steps: steps of the ascent.
        memory: pairs kept by L-BFGS.

    Source: Burer, Monteiro, Math. Program. 95 (2003) and 103 (2005), for the factorisation and its optima.
    """

    tol: float = 1e-6
    enough: float = 8e-3
    rank: int = 32
    min_steps: int = 125
    max_steps: int = 400
    memory: int = 10

    def __call__(self, program: SlopeProgram, start: Tensor | None = None, deadline: float = math.inf) -> Proposal:
        """Climb until the gap is small, and propose the best multipliers seen.

        Args:
            program: the program.
            start: multipliers (n,) of a neighbouring program, or None.
            deadline: `time.perf_counter()` value after which no further step is begun.
        Raises:
            SolverFailed: no interior point exists in floating point.
        """
        if program.free or program.scaling:
            raise SolverFailed("low-rank knows no implicit layers and no norms other than 2. Use interior-point.")
        with torch.no_grad():
            t, rho = program.interior() if start is None else program.interior(start, margin=0.05)
            if rho == 0:
                return Proposal(t, rho, math.nan, 0, "the output does not feel the input.")
            return _Climb(self, Spheres(program), deadline, t, rho).run()


class _Climb:
    """One run: the best multipliers, the best dual value, and the last point."""

    def __init__(self, options: LowRank, spheres: Spheres, deadline: float, t: Tensor, rho: float) -> None:
        self.options, self.spheres, self.deadline = options, spheres, deadline
        self.t, self.rho, self.dual = t, rho, 0.0
        self.steps, self.rise = 0, _RISE

    @property
    def gap(self) -> float:
        return max(0.0, 1 - self.dual / self.rho)

    @property
    def over(self) -> bool:
        return self.steps >= self.options.max_steps or time.perf_counter() > self.deadline

    def run(self) -> Proposal:
        channels = self.spheres.program.channels
        rank = min(self.options.rank, channels + _SPARE)
        x = self.spheres.random(rank)
        for _ in range(_ALIGNED):
            x = self.spheres.passes(x).aligned
        while True:
            x, _ = lbfgs(self.value, x, self.options.memory, self.ends, preconditioned=True)
            self.look()
            if self.over or self.gap <= self.options.enough or rank == channels + _SPARE:
                return Proposal(self.t, self.rho, self.gap, self.steps)
            wider = min(2 * rank, channels + _SPARE)
            x, rank = self.spheres.widened(x, wider - rank), wider

    def value(self, x: Tensor) -> Passes:
        found = self.spheres.passes(x)
        self.dual, self.x = max(self.dual, math.exp(-found.value)), x
        return found

    def ends(self, values: list[float]) -> bool:
        if len(values) > 1:
            self.steps += 1
        if self.over:
            return True
        if self.steps < _FIRST or self.steps % _EVERY:
            return False
        before = self.gap
        self.look()
        stalled = len(values) > 10 and values[-11] - values[-1] < _STALLED * self.gap
        slow = self.gap > 0.5 * before and self.steps >= self.options.min_steps
        return self.gap <= self.options.tol or (slow and (stalled or self.gap <= self.options.enough))

    def look(self) -> None:
        """Find the best multipliers near those of the last point: eps downwards while rho falls, then between."""
        response = self.spheres.response(self.x)

        def least(rise: float) -> float:
            try:
                t, eliminated = self.spheres.multipliers(response, rise)
            except SolverFailed:
                return math.inf
            rho = math.inf if eliminated.schur is None else float(torch.linalg.eigvalsh(eliminated.schur)[-1])
            if rho < self.rho:
                self.t, self.rho = t, rho
            return rho

        # Later points need smaller ones than earlier.
        rise, best = self.rise, least(self.rise)
        while math.isfinite(best) and (found := least(rise * _LOWER)) < best:
            rise, best = rise * _LOWER, found
        for factor in (_LOWER**0.5, _LOWER**-0.5):
            if (found := least(rise * factor)) < best:
                rise, best = rise * factor, found
                break
        self.rise = min(_RISE, rise / _LOWER)
