"""LipSDP through CVXPY: SCS, Clarabel, CVXOPT and MOSEK propose multipliers; nothing they return is a bound by itself."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipguard.errors import SolverFailed, SolverUnavailable
from lipguard.programs.elimination import fill
from lipguard.programs.slope_program import Proposal, SlopeProgram
from lipguard.solvers.threads import limited_threads


@dataclass(frozen=True)
class Conic:
    """A conic solver behind CVXPY.

    Attributes:
        solver: CVXPY's name of the solver, in any case.
        options: passed on to it; its defaults stand otherwise.
        chordal: one matrix for each front of the elimination instead of one of all coordinates; the optimum is the same.
    """

    solver: str
    options: dict[str, float | int | bool] = field(default_factory=dict)
    chordal: bool = False

    def __call__(self, program: SlopeProgram, start: Tensor | None = None, deadline: float = math.inf) -> Proposal:
        """Solve the program; `start` is not used, a deadline becomes the solver's time limit where it has one.

        Raises:
            SolverUnavailable: the solver is not installed, or has no licence.
            SolverFailed: it returned no multipliers.
        """
        import cvxpy as cp

        name = self.solver.upper()
        if name not in cp.installed_solvers():
            raise SolverUnavailable(f'{self.solver} is not installed for CVXPY. pip install "lipguard[{self.solver.lower()}]".')
        n = program.neurons
        groups = n if program.groups is None else int(program.groups.max()) + 1
        tau, rho = cp.Variable(groups), cp.Variable(program.channels if program.free else 1)
        columns = torch.eye(groups, dtype=torch.float64, device=program.constant.device)
        plain = program.groups is None and program.weights is None
        t = tau if plain else torch.stack([program.spread(column) for column in columns], 1).cpu().numpy() @ tau
        constraints = (
            _fronts(program, t, rho[0])
            if self.chordal and not (program.free or program.scaling)
            else [_dense(program, t, rho) >> 0]
        )
        problem = cp.Problem(cp.Minimize(cp.sum(rho)), constraints)
        options = dict(self.options)
        seconds = deadline - time.perf_counter()
        if math.isfinite(seconds) and name in _TIME_LIMITS:
            options[_TIME_LIMITS[name]] = max(seconds, 0.01)
        try:
            with limited_threads(1):
                problem.solve(solver=name, **options)
        except Exception as error:  # each solver raises errors of its own kind: MOSEK for a missing licence, say
            text = str(error).strip().splitlines()
            if "licen" in str(error).lower():
                raise SolverUnavailable(f"{self.solver} has no valid licence: {text[0] if text else error!r}") from error
            raise SolverFailed(f"{self.solver} failed: {text[0] if text else 'no message'}") from error
        if tau.value is None or rho.value is None:
            raise SolverFailed(f"{self.solver} returned no multipliers (status {problem.status}).")
        values = torch.as_tensor(tau.value, dtype=torch.float64, device=program.constant.device)
        stats = problem.solver_stats
        iterations = int(stats.num_iters or 0) if stats is not None else 0
        weights = torch.as_tensor(rho.value, dtype=torch.float64, device=program.constant.device)
        found = Proposal(program.spread(values), float(weights.sum()), math.nan, iterations, str(problem.status))
        return replace(found, weights=weights) if program.free else found


_TIME_LIMITS = {"SCS": "time_limit_secs", "CLARABEL": "time_limit"}


def _dense(program: SlopeProgram, t: Any, rho: Any) -> Any:
    """Z(rho, t) as one CVXPY expression."""
    import cvxpy as cp

    n, order = program.neurons, program.order
    units = torch.eye(order, dtype=torch.float64)
    e, q = units[:n].numpy(), program.q(units.to(program.constant)).cpu().numpy()
    channels = units[:, n:] if program.free else units[:, n:].sum(1, keepdim=True)
    low, high = (e, e - q) if program.slopes is None else (e - slope[:, None].cpu().numpy() * q for slope in program.slopes)
    # low'T high + high'T low is symmetric by construction; CVXPY needs to see it.
    half = low.T @ cp.diag(t) @ high
    return cp.diag(channels.numpy() @ rho) + half + half.T - program.constant.cpu().numpy()


def _fronts(program: SlopeProgram, t: Any, rho: Any) -> list[Any]:
    """Z(rho, t) >= 0 as a sum of positive semidefinite matrices on the cliques of its pattern.

    The elimination with a free symmetric U in place of every Schur complement X' P^-1 X: [[P, X], [X', U]] >= 0.
    Source: Xue et al., arXiv:2204.00846, Theorem 2.
    """
    import cvxpy as cp

    size = dict(enumerate(program.sizes)) | {-1: program.channels}
    rows = [{j: block.cpu().numpy() for j, block in row.items()} for row in program.rows]
    s: dict[tuple[int, int], Any] = {pair: block.cpu().numpy() for pair, block in program.gram.items()}

    def add(i: int, j: int, block: Any) -> None:
        s[i, j] = s[i, j] + block if (i, j) in s else block

    found = []
    for k, sources in fill(program.rows, program.out)[0]:
        here, row = program.slices[k], rows[k]
        own = t[here.start : here.stop]
        middle = own if program.middle is None else cp.multiply(program.middle[here].cpu().numpy(), own)
        pivot = cp.diag(own) - (s[k, k] / 2 if (k, k) in s else 0)
        if not sources:
            found.append(pivot + pivot.T >> 0)
            continue
        cross = []
        for j in sources:
            block = s.get((k, j), 0)
            cross.append(block + cp.diag(middle) @ row[j] if j in row else block)
        width = sum(size[j] for j in sources)
        u = cp.Variable((width, width), symmetric=True)
        half = cp.bmat([[pivot, -cp.hstack(cross)], [np.zeros((width, size[k])), u / 2]])
        found.append(half + half.T >> 0)
        ends = np.cumsum([0, *(size[j] for j in sources)])
        for a, i in enumerate(sources):
            for b, j in enumerate(sources[: a + 1]):
                add(i, j, u[ends[a] : ends[a + 1], ends[b] : ends[b + 1]])
        if program.bends is not None:
            bend = cp.diag(cp.multiply(program.bends[here].cpu().numpy(), own))
            for i in row:
                for j in row:
                    if j <= i:
                        add(i, j, -(row[i].T @ bend @ row[j]))
    last = rho * np.eye(program.channels) / 2 - s[-1, -1] / 2
    return [*found, last + last.T >> 0]
