"""Second-order method for deep networks, at a cost linear in depth: truncated Newton steps along the central path.

The first-order method in relative coordinates comes within a few per cent and then slows down. From there Newton's steps
on the barrier (`barrier`), by conjugate gradients preconditioned with the Hessian's diagonal, need ten to sixty products
each. On the path of q the relative gap is N / q, yet rho lies only about r / q above the optimum, r the number of
channels: of a deep network a small part of N.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.errors import SolverFailed
from lipguard.solvers.barrier import Barrier, barrier, hessian_product
from lipguard.solvers.first_order import FirstOrder
from lipguard.solvers.slope_program import Proposal, SlopeProgram

_PATH = (0.25, 0.06, 0.015, 4e-3, 1e-3, 2e-4, 5e-5)
"""Relative gaps N / q that the path visits."""

_OFF = 1e-4
"""Relative distance by which the first-order method's best point is moved off the boundary of its cone."""

_AT_ONCE = 40
"""Products in one step at most: far from the path the direction need not be exact."""

_CENTRED = 1.0
"""Newton decrement, squared, below which a point counts as on the path."""


@dataclass(frozen=True)
class Newton:
    """Options of the method.

    Attributes:
        tol: relative distance of rho to the optimum that is aimed at, estimated as r / q.
        warm_steps: steps of the first-order method before the path.
        max_products: products with the Hessian in all; each costs about two evaluations. A bound of the work that does not
            depend on depth keeps the cost linear.
    """

    tol: float = 4e-3
    warm_steps: int = 250
    max_products: int = 250

    def __call__(self, program: SlopeProgram, start: Tensor | None = None, deadline: float = math.inf) -> Proposal:
        """Solve the program.

        Args:
            program: the program.
            start: multipliers (n,) of a neighbouring program, or None.
            deadline: `time.perf_counter()` value after which no further step is begun.
        Raises:
            SolverFailed: no interior point exists in floating point.
        """
        if program.free or program.scaling:
            raise SolverFailed("newton knows no implicit layers and no norms other than 2. Use interior-point.")
        with torch.no_grad():
            return self._solve(program, start, deadline)

    def _solve(self, program: SlopeProgram, start: Tensor | None, deadline: float) -> Proposal:
        first = FirstOrder(max_iterations=self.warm_steps)(program, start, deadline)
        best, gap, steps, left = (first.t, first.rho), math.nan, 0, self.max_products
        tau = program.group(first.t) * (1 + _OFF)
        if first.rho == 0:
            return first
        for target in _PATH:
            at = barrier(program, tau, program.order / target)
            while at is not None:
                if at.largest < best[1]:
                    best = program.spread(at.tau), at.largest
                if left <= 0 or time.perf_counter() > deadline:
                    return Proposal(best[0], best[1], gap, first.iterations + steps)
                steps += 1
                at, decrement, products = _step(at, min(_AT_ONCE, left))
                left -= products
                if decrement <= _CENTRED:
                    gap = target
                    break
            if at is None:
                break
            tau = at.tau
            if at.largest < best[1]:
                best = program.spread(at.tau), at.largest
            if program.channels * target <= self.tol * program.order:
                break
        return Proposal(best[0], best[1], gap, first.iterations + steps)


def _step(at: Barrier, limit: int) -> tuple[Barrier | None, float, int]:
    """A Newton step in log tau by preconditioned conjugate gradients (None where none lowers phi), its decrement, products."""
    scale = at.curvature.clamp_min(torch.finfo(at.tau.dtype).tiny)
    direction, residual = torch.zeros_like(at.tau), -at.gradient
    z = residual / scale
    p, size = z, float(residual @ z)
    enough = 0.01 * size
    count = 0
    while count < limit:
        count += 1
        product = hessian_product(at, p)
        curvature = float(p @ product)
        if not curvature > 0:
            break
        direction = direction + size / curvature * p
        residual = residual - size / curvature * product
        z = residual / scale
        after = float(residual @ z)
        if after <= enough:
            break
        p, size = z + after / size * p, after
    decrement = -float(at.gradient @ direction)
    length = min(1.0, 2.0 / max(float(direction.abs().max()), 1e-30))
    for _ in range(20):
        found = barrier(at.program, at.tau * (length * direction).exp(), at.q)
        if found is not None and found.value <= at.value - 1e-4 * length * decrement:
            return found, decrement, count
        length *= 0.6
    return None, decrement, count
