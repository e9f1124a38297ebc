"""LipSDP through CVXPY: SCS, Clarabel, CVXOPT and MOSEK propose multipliers; nothing they return is a bound by itself."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lipguard.errors import SolverFailed, SolverUnavailable
from lipguard.solvers.slope_program import Proposal, SlopeProgram
from lipguard.solvers.threads import limited_threads


@dataclass(frozen=True)
class Conic:
    """A conic solver behind CVXPY.

    Attributes:
        solver: CVXPY's name of the solver, in any case.
        options: passed on to it; its defaults stand otherwise.
    """

    solver: str
    options: dict[str, float | int | bool] = field(default_factory=dict)

    def __call__(self, program: SlopeProgram, start: Tensor | None = None, deadline: float = math.inf) -> Proposal:
        """Solve the program; `start` is not used, a deadline becomes the solver's time limit where it has one.

        Raises:
            SolverUnavailable: the solver is not installed, or has no licence.
            SolverFailed: it returned no multipliers.
        """
        import cvxpy as cp

        name = self.solver.upper()
        if name not in cp.installed_solvers():
            raise SolverUnavailable(f"{self.solver} is not installed for CVXPY. pip install {self.solver.lower()}.")
        n, order = program.neurons, program.order
        groups = n if program.groups is None else int(program.groups.max()) + 1
        tau, rho = cp.Variable(groups), cp.Variable()
        columns = torch.eye(groups, dtype=torch.float64, device=program.constant.device)
        plain = program.groups is None and program.weights is None
        t = tau if plain else torch.stack([program.spread(column) for column in columns], 1).cpu().numpy() @ tau
        units = torch.eye(order, dtype=torch.float64)
        e, q = units[:n].numpy(), program.q(units.to(program.constant)).cpu().numpy()
        channels = torch.diag((torch.arange(order) >= n).to(torch.float64)).numpy()
        low, high = (e, e - q) if program.slopes is None else (e - slope[:, None].cpu().numpy() * q for slope in program.slopes)
        # low'T high + high'T low is symmetric by construction; CVXPY needs to see it.
        half = low.T @ cp.diag(t) @ high
        z = rho * channels + half + half.T - program.constant.cpu().numpy()
        problem = cp.Problem(cp.Minimize(rho), [z >> 0])
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
        return Proposal(program.spread(values), float(rho.value), math.nan, iterations, str(problem.status))


_TIME_LIMITS = {"SCS": "time_limit_secs", "CLARABEL": "time_limit"}
