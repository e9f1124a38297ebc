"""Gurobi behind `MixedIntegerProgram`. Its bounds are solver-trusted: nothing here is a proof."""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np

from lipguard.errors import SolverFailed, SolverUnavailable
from lipguard.programs.mixed_integer import MixedIntegerProgram, MixedIntegerResult, ResultStatus

NAME = "gurobi"
_LOGGER = logging.getLogger("lipguard.solvers.gurobi")

# What the licence that comes with the package from PyPI allows; refused with error 10010 beyond.
_VARIABLES, _ROWS, _QUADRATIC_VARIABLES = 2000, 2000, 200
_TOO_LARGE = 10010


@functools.lru_cache(maxsize=1)
def _environment() -> Any:
    """One silent environment per process: starting it takes the licence.

    Raises:
        SolverUnavailable: gurobipy is missing, or there is no valid licence.
    """
    try:
        import gurobipy
    except ImportError as error:
        raise SolverUnavailable("gurobipy is not installed. pip install gurobipy, or solver='scip'.") from error
    try:
        environment = gurobipy.Env(empty=True)
        environment.setParam("OutputFlag", 0)
        environment.start()
    except gurobipy.GurobiError as error:
        raise SolverUnavailable(f"Gurobi has no valid licence ({error}). Renew it, or use solver='scip'.") from error
    return environment


@functools.lru_cache(maxsize=1)
def size_limited() -> bool:
    """Whether the licence is the size-limited one, found by a trivial model just past its limit."""
    import gurobipy

    model = gurobipy.Model(env=_environment())
    try:
        model.addMVar(_VARIABLES + 1, ub=0.0)
        model.optimize()
    except gurobipy.GurobiError as error:
        if error.errno == _TOO_LARGE:
            return True
        raise SolverUnavailable(f"Gurobi refuses a trivial model: {error}.") from error
    finally:
        model.dispose()
    return False


def refusal(program: MixedIntegerProgram) -> str | None:
    """Why Gurobi cannot take the program: not installed, no licence, or beyond the size-limited licence; else None."""
    try:
        _environment()
        limited = size_limited()
    except SolverUnavailable as error:
        return str(error)
    if not limited:
        return None
    limit = _QUADRATIC_VARIABLES if program.quadratic else _VARIABLES
    if program.variables > limit:
        return f"Gurobi's size-limited licence refuses this model ({program.variables} > {limit} variables)."
    if len(program.rows) > _ROWS:
        return f"Gurobi's size-limited licence refuses this model ({len(program.rows)} > {_ROWS} constraints)."
    return None


def solve(
    program: MixedIntegerProgram, *, time_limit: float | None = None, gap: float = 1e-6, threads: int = 1
) -> MixedIntegerResult:
    """Solve the program with the tightest tolerances Gurobi offers.

    Raises:
        SolverUnavailable: not installed or no licence.
        SolverFailed: Gurobi stopped with an error or a status without meaning.
    """
    environment = _environment()
    import gurobipy

    try:
        with gurobipy.Model(env=environment) as model:
            return _solve(model, program, time_limit, gap, threads)
    except gurobipy.GurobiError as error:
        raise SolverFailed(f"Gurobi stopped: {error}.") from error


def _solve(model: Any, program: MixedIntegerProgram, time_limit: float | None, gap: float, threads: int) -> MixedIntegerResult:
    from gurobipy import GRB, Model

    model.Params.LogToConsole = 0
    model.Params.OutputFlag = 1  # else the message callback, which feeds the logger, stays silent
    model.Params.Threads = threads
    model.Params.MIPGap = gap
    model.Params.FeasibilityTol = 1e-9
    model.Params.IntFeasTol = 1e-9
    model.Params.OptimalityTol = 1e-9
    model.Params.BarQCPConvTol = 1e-9
    if time_limit is not None:
        model.Params.TimeLimit = max(time_limit, 0.01)
    kinds = np.where(program.binary, GRB.BINARY, GRB.CONTINUOUS)
    x = model.addMVar(program.variables, lb=program.lower, ub=program.upper, vtype=kinds)
    for bound, sense in ((program.row_upper, "<"), (program.row_lower, ">")):
        finite = np.isfinite(bound)
        if finite.any():
            model.addMConstr(program.rows[finite], x, sense, bound[finite])
    for ball in program.balls:
        part = x[ball.indices]
        model.addConstr(part @ part - 2 * ball.center @ part <= ball.radius**2 - ball.center @ ball.center)
    objective = program.objective @ x
    if len(program.squares):
        part = x[program.squares]
        objective = objective + part @ part
        if program.cutoff is not None and not program.objective.any():
            model.addConstr(part @ part <= program.cutoff)
    elif program.cutoff is not None:
        model.addConstr(objective <= program.cutoff)
    model.setObjective(objective, GRB.MAXIMIZE)
    if program.start is not None:
        x.Start = program.start

    def listen(inner: Model, where: int) -> None:
        if where == GRB.Callback.MESSAGE:
            _LOGGER.debug("%s", inner.cbGet(GRB.Callback.MSG_STRING).rstrip())

    model.optimize(listen)
    statuses: dict[int, ResultStatus] = {
        GRB.OPTIMAL: "optimal",
        GRB.SUBOPTIMAL: "time limit",
        GRB.INFEASIBLE: "infeasible",
        GRB.TIME_LIMIT: "time limit",
        GRB.MEM_LIMIT: "memory limit",
        GRB.INTERRUPTED: "interrupted",
    }
    if model.Status not in statuses:
        raise SolverFailed(f"Gurobi ended with status {model.Status}, which says nothing about the maximum.")
    status = statuses[model.Status]
    message = f"Gurobi {'.'.join(str(v) for v in _version())}: {status}"
    if status == "infeasible":
        return MixedIntegerResult(status, -np.inf, None, message)
    solution = np.asarray(x.X) if model.SolCount else None
    return MixedIntegerResult(status, float(model.ObjBound), solution, message)


def _version() -> tuple[int, int, int]:
    import gurobipy

    return gurobipy.gurobi.version()
