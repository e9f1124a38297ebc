"""A solver of semidefinite programs, and one of mixed-integer programs by SciPy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.optimize import Bounds, LinearConstraint, milp

from lipguard.programs.mixed_integer import MixedIntegerResult
from lipguard.programs.slope_program import Proposal
from lipguard.registry import Entry


@dataclass(frozen=True)
class Interior:
    tol: float = 1e-2

    def __call__(self, program, start=None, deadline=math.inf):
        t, rho = program.interior(margin=0.1)
        return Proposal(t, rho, math.nan, iterations=1, message="plugin")


def solve(program, *, time_limit=None, gap=1e-6, threads=1):
    found = milp(
        -program.objective,
        integrality=program.binary.astype(int),
        bounds=Bounds(program.lower, program.upper),
        constraints=LinearConstraint(program.rows, program.row_lower, program.row_upper),
        options={"mip_rel_gap": gap},
    )
    if found.status == 2:
        return MixedIntegerResult("infeasible", -math.inf, None, found.message)
    bound = math.inf if found.mip_dual_bound is None else -found.mip_dual_bound
    return MixedIntegerResult("optimal" if found.status == 0 else "time limit", bound, found.x, found.message)


MIP = Entry("plugin-mip", "lipguard_plugin.solvers:solve", solves=("milp",))
