"""Low-rank dual method for deep and wide networks: it climbs by matrix products, and factorises to look at the multipliers.

L-BFGS on the dual's spheres (`spheres`) reaches a gap of a thousandth in one to two hundred steps, through eighty layers as
through ten. Multipliers of a point short of the optimum lie outside the cone, by little: they are raised by a factor that
grows by 1 + eps from layer to layer, and the elimination gives the rho of the best eps. The dual value bounds rho from
below, so that the gap is known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lipguard.errors import SolverFailed
from lipguard.programs.slope_program import Proposal, SlopeProgram
from lipguard.solvers.lbfgs import lbfgs
from lipguard.solvers.spheres import Passes, Response, Spheres

_ALIGNED, _AGAIN = 10, 3
"""Steps to the aligned point before curvatures are measured, from random vectors, of which they say nothing, and from the end
of a neighbouring ascent."""

_FLOOR = 1e-3
"""Part of the mean curvature that is added to each: neurons of little energy must turn as fast as others, since their
multipliers are no less needed."""

_FIRST = 75
"""Steps from random vectors before the first look at the multipliers."""

_SPARE = 15
"""Rank beyond the channels, which bound the optimum's: at a rank-deficient point a local optimum is the global one. With six
more, networks of one output still end in local optima."""

_STALLED, _ROUNDS = 0.01, 8
"""Part of the gap that ten steps must close: less is the end of this rank, or of this point; and how many are tried."""

_RISE, _HIGHEST, _LOWER = 0.03, 1.0, 10**-0.5
"""The eps that is tried first, the largest, and the factor from one to the next lower."""


@dataclass(frozen=True)
class LowRank:
    """Options of the method.

    Attributes:
        tol: gap (rho - dual value) / rho at which it ends.
        enough: gap at which it ends, after `min_steps`, where the last steps did not halve it: in deep networks, whose gaps
            close slowly. A number of steps that hardly depends on depth keeps the cost linear.
        rank: entries of a vector at first.
        min_steps, max_steps: steps of the ascent.
        every: steps between two looks at the multipliers; a look costs about five.
        visible: gap beyond which it goes on after the deadline, until the limit.
        memory: pairs kept by L-BFGS.

    Source: Burer, Monteiro, Math. Program. 95 (2003) and 103 (2005), for the factorisation and its optima.
    """

    tol: float = 1e-6
    enough: float = 8e-3
    rank: int = 32
    min_steps: int = 125
    max_steps: int = 400
    every: int = 25
    visible: float = math.inf
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
        if program.scaling:
            raise SolverFailed("low-rank knows no implicit layers. Use interior-point.")
        with torch.no_grad():
            t, rho = program.interior() if start is None else program.interior(start, margin=0.05)
            if rho == 0:
                return Proposal(t, rho, math.nan, 0, "the output does not feel the input.")
            found = self.climb(Spheres(program), t, rho * (program.channels if program.free else 1), deadline)
            weights = found.weights
            if program.free and weights is None:
                weights = torch.ones_like(found.t[:1]).expand(program.channels)
            return Proposal(found.t, found.rho, found.gap, found.steps, inside=True, weights=weights)

    def climb(
        self,
        dual: Dual,
        t: Tensor,
        rho: float,
        deadline: float = math.inf,
        start: Start | None = None,
        limit: float = math.inf,
    ) -> Climb:
        """Climb, and keep the best multipliers.

        Args:
            dual: the points.
            t, rho: any multipliers inside the cone and the rho they prove; inf if they are not to be kept.
            deadline: `time.perf_counter()` value after which no further step is begun.
            start: the end of a neighbouring program's ascent, or None.
            limit: `time.perf_counter()` value after which none is begun even while the gap is visible.
        """
        found = Climb(self, dual, t, rho, deadline, limit)
        found.run(start)
        return found


class Start(NamedTuple):
    """Where an ascent ended: the point, the eps of its multipliers, and the seconds that the last look at them took."""

    point: Tensor
    rise: float
    look: float


class Dual(Protocol):
    """The points of a program's dual, and the way to multipliers: `Spheres`, `FrequencySpheres`."""

    channels: int

    def random(self, rank: int) -> Tensor:
        """A point of so many entries a vector."""
        ...

    def rank(self, x: Tensor) -> int:
        """Entries of its vectors."""
        ...

    def renewed(self, x: Tensor) -> Tensor:
        """A point beside this one that has lost no direction."""
        ...

    def widened(self, x: Tensor, more: int) -> Tensor:
        """A point with more entries."""
        ...

    def passes(self, x: Tensor) -> Passes:
        """The value and its derivatives."""
        ...

    def response(self, x: Tensor) -> Response:
        """What multipliers are found from."""
        ...

    def multipliers(self, response: Response, rise: float) -> tuple[Tensor, float]:
        """Multipliers raised by 1 + rise a layer, and the rho they prove."""
        ...


class Climb:
    """One ascent: the best multipliers, the best dual value, and the last point.

    Attributes:
        t, rho: multipliers inside the cone and the least rho they prove; with free channels the sum of their weights.
        weights: of free channels, (r,), up to a factor; None where none were found, or all channels have one.
        dual: the largest value of a point.
        point: the last one.
        steps: made so far.
    """

    def __init__(self, options: LowRank, spheres: Dual, t: Tensor, rho: float, deadline: float, limit: float) -> None:
        """Before the first step, from any multipliers inside the cone."""
        self.options, self.spheres, self.deadline, self.limit = options, spheres, deadline, limit
        self.t, self.rho, self.dual, self.steps = t, rho, 0.0, 0
        self.weights: Tensor | None = None
        self._first, self._looked, self._rise, self._seconds = _FIRST, -1, _RISE, 0.0

    @property
    def gap(self) -> float:
        """(rho - dual) / rho."""
        return max(0.0, 1 - self.dual / self.rho)

    @property
    def end(self) -> Start:
        """What a neighbouring program's ascent can start from."""
        return Start(self.point, self._rise, self._seconds)

    def run(self, start: Start | None = None) -> None:
        """Climb until the gap is small, the steps are used up or the deadline has passed."""
        full = self.spheres.channels + _SPARE
        rank = min(self.options.rank, full)
        if start is None:
            x = self.spheres.random(rank)
            for _ in range(_ALIGNED):
                x = self.spheres.passes(x).aligned
        else:
            (x, self._rise, self._seconds), self._first = start, self.options.every
            x = self._renewed(x)
        for _ in range(_ROUNDS):
            x, _ = lbfgs(self._value, x, self.options.memory, self._ends, floor=_FLOOR)
            self._look()
            if self._over() or self.gap <= self.options.enough:
                return
            rank = self.spheres.rank(x)
            x = self.spheres.widened(x, min(rank, full - rank)) if rank < full else self._renewed(x)

    def _renewed(self, x: Tensor) -> Tensor:
        x = self.spheres.renewed(x)
        for _ in range(_AGAIN):
            x = self.spheres.passes(x).aligned
        return x

    def _value(self, x: Tensor) -> Passes | None:
        found, self.point = self.spheres.passes(x), x
        if not (math.isfinite(found.value) and bool(found.gradient.isfinite().all())):
            return None
        self.dual = max(self.dual, math.exp(-found.value))
        return found

    def _over(self) -> bool:
        if self.steps >= self.options.max_steps:
            return True
        end = time.perf_counter() + self._seconds
        return end > self.limit or (end > self.deadline and self.gap <= self.options.visible)

    def _ends(self, values: list[float]) -> bool:
        if len(values) > 1:
            self.steps += 1
        if self._over():
            return True
        if self.steps < self._first or self.steps % self.options.every:
            return False
        before = self.gap
        self._look()
        stalled = len(values) > 10 and values[-11] - values[-1] < _STALLED * self.gap
        slow = self.gap > 0.5 * before and self.steps >= self.options.min_steps
        return self._over() or self.gap <= self.options.tol or (slow and (stalled or self.gap <= self.options.enough))

    def _look(self) -> None:
        """Keep the best multipliers near those of the last point."""
        if self._looked == self.steps:
            return
        self._looked, began = self.steps, time.perf_counter()
        response = self.spheres.response(self.point)

        def least(rise: float) -> float:
            try:
                t, rho = self.spheres.multipliers(response, rise)
            except SolverFailed:
                return math.inf
            if rho < self.rho:
                self.t, self.rho, self.weights = t, rho, response.weights
            return rho

        self._rise = self._search(least)
        self._seconds = time.perf_counter() - began

    def _search(self, least: Callable[[float], float]) -> float:
        """An eps near the best: downwards by growing factors while rho falls, upwards where it is far off, then between."""
        rise, best, factor = self._rise, least(self._rise), _LOWER
        while math.isfinite(best) and (found := least(rise * factor)) < best * (1 - self.options.tol / 10):
            rise, best, factor = rise * factor, found, factor**2
        while 1 - self.dual / best > self.options.enough and rise < _HIGHEST:
            found = least(rise / _LOWER)
            if best < math.inf and found >= best:
                break
            rise, best = rise / _LOWER, found
        if best == math.inf:
            return _RISE
        for power in (0.25, 0.125):
            for candidate in (rise * factor**power, rise / factor**power):
                if self.gap > self.options.tol and not self._over() and (found := least(candidate)) < best:
                    rise, best = candidate, found
                    break
        return rise
