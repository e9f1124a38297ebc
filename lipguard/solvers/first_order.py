"""First-order method for deep and very wide networks: L-BFGS on the logarithms of relative multipliers.

Eliminating the neurons makes the least rho for given multipliers explicit, rho(t) = lambda_max(S(t)), at a cost linear in
the depth of a chain, and any t whose pivots are positive gives a valid bound. The maximum is smoothed by Schatten norms
(trace S^p)^(1/p) with p growing in stages: on the plain maximum quasi-Newton steps stall. Multipliers relative to what
lies behind them (`relative`) make as much progress in a hundred steps through 80 layers as through 10; in log t alone
the steps needed grow with the depth.

Source: the recursion is the backward form of ECLipsE (Xu, Sivaranjani, arXiv:2404.04375); the smoothing is ours.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lipguard.errors import SolverFailed
from lipguard.programs.elimination import Elimination
from lipguard.programs.slope_program import Proposal, SlopeProgram
from lipguard.solvers.lbfgs import inverse, lbfgs
from lipguard.solvers.relative import Relative, relative, to_relative

_STAGES = (64.0, 256.0, 1024.0)

_CHANGE = 0.05
"""Largest change of a relative multiplier's logarithm in a step. Through many layers small changes add up: with 0.3 eighty
layers of 40 take twice the evaluations."""


@dataclass(frozen=True)
class FirstOrder:
    """Options of the method.

    Attributes:
        progress: a stage ends when ten steps lower log rho by less than this.
        max_iterations: steps at most, over all stages.
        memory: pairs kept by L-BFGS.
    """

    progress: float = 2e-5
    max_iterations: int = 400
    memory: int = 60

    def __call__(self, program: SlopeProgram, start: Tensor | None = None, deadline: float = math.inf) -> Proposal:
        """Improve the multipliers until progress ends; the gap is not known (nan).

        Args:
            program: the program.
            start: multipliers (n,) of a neighbouring program, or None.
            deadline: `time.perf_counter()` value after which no further step is begun.
        Raises:
            SolverFailed: no interior point exists in floating point.
        """
        if program.free:
            raise SolverFailed(
                "first-order minimises one rho for all channels; norms other than 2 need low-rank or interior-point."
            )
        with torch.no_grad():
            return self._solve(program, start, deadline)

    def _solve(self, program: SlopeProgram, start: Tensor | None, deadline: float) -> Proposal:
        t, rho = program.interior() if start is None else program.interior(start, margin=0.05)
        if rho == 0:
            return Proposal(t, rho, math.nan, 0, "the output does not feel the input.")
        best = t, rho
        y, used = to_relative(program, t), 0

        def value(y: Tensor, p: float) -> Relative | None:
            nonlocal best
            found = relative(program, y, p)
            if found is not None and found.largest < best[1]:
                best = found.t, found.largest
            return found

        for p in _STAGES:
            limit = min(self.max_iterations - used, self.max_iterations // 2)

            def ends(values: list[float], limit: int = limit) -> bool:
                slow = len(values) > 10 and values[-11] - values[-1] < self.progress
                return slow or len(values) > limit or time.perf_counter() > deadline

            y, steps = lbfgs(lambda y, p=p: value(y, p), y, self.memory, ends, change=_CHANGE)
            used += steps
            if used >= self.max_iterations or time.perf_counter() > deadline:
                break
        return Proposal(best[0], best[1], math.nan, used)


def least_rho(program: SlopeProgram, t: Tensor) -> float:
    """The least rho the multipliers t prove, in floating point; inf outside the cone."""
    try:
        s = program.eliminate(lambda k, _: t[program.slices[k]]).schur
    except SolverFailed:
        return math.inf
    return 0.0 if s is None else max(float(torch.linalg.eigvalsh(s)[-1]), 0.0)


class Smoothed(NamedTuple):
    """The smoothed objective at a point x, the logarithms of the group multipliers.

    Attributes:
        value: log of the Schatten-p norm of S.
        gradient: its gradient in x.
        curvature: the size of its second derivatives along single coordinates, >= 0: a neuron's share of the energy.
        largest: lambda_max(S), the least rho that the multipliers prove.
        responses: (w, x) for each eigenvector x of S, (N, r), times the square root of its share in the derivative of the value
            in S: value changes by half the sum of the quadratic form's changes at these.
        eigenvalues: of S, ascending, (r,).
    """

    value: float
    gradient: Tensor
    curvature: Tensor
    largest: float
    responses: Tensor
    eigenvalues: Tensor

    def step(self) -> Tensor:
        """The step of x to the minimum along single coordinates, by gradient and curvature."""
        return -self.gradient * inverse(self.curvature)


def smoothed(program: SlopeProgram, x: Tensor, p: float) -> Smoothed | None:
    """The Schatten-p norm of S at the group multipliers exp(x); None outside the cone.

    S = sum_i lambda_i v_i v_i'. By the envelope theorem the derivative of v'Sv in t_j is -(x, w)'S_j(x, w) =
    2 w_j (p_j - w_j) at the responses w of v: one back substitution for all eigenvectors, no second factorisation.
    In log t_j that is 2 t_j w_j p_j - 2 t_j w_j^2, two terms that balance at the optimum and react to log t_j in
    opposite ways: their size, 2 t_j w_j^2, is that of the second derivative.
    """
    t = program.spread(x.exp())
    try:
        eliminated = program.eliminate(lambda k, _: t[program.slices[k]])
    except SolverFailed:
        return None
    return derivatives(program, x.exp(), eliminated, p)


def derivatives(program: SlopeProgram, tau: Tensor, eliminated: Elimination, p: float) -> Smoothed | None:
    """`smoothed` from an elimination at the group multipliers tau; None where it has no finite value."""
    if eliminated.schur is None:
        return None
    values, vectors = torch.linalg.eigh(eliminated.schur)
    top = values[-1]
    if not bool(top > 0) or not bool(top.isfinite()):
        return None
    ratios = (values / top).clamp_min(0)
    powers = ratios**p
    total = powers.sum()
    weights = ratios ** (p - 1) / (total * top)
    xw = eliminated.responses(vectors)
    w, pre = xw[: program.neurons], program.q(xw)
    if program.slopes is not None:
        alpha, beta = (slope[:, None] for slope in program.slopes)
        w, pre = w - alpha * pre, (beta - alpha) * pre
    gradient, curvature = (2 * program.gather((w * v) @ weights) * tau for v in (pre - w, w))
    value = float(top.log() + total.log() / p)
    return (
        Smoothed(value, gradient, curvature, float(top), xw * weights.sqrt(), values) if bool(gradient.isfinite().all()) else None
    )
