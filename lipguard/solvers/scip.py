"""SCIP behind `MixedIntegerProgram`: free, and it takes nonconvex quadratics. Its bounds are solver-trusted."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from lipguard.errors import SolverFailed, SolverUnavailable
from lipguard.programs.mixed_integer import MixedIntegerProgram, MixedIntegerResult, ResultStatus

NAME = "scip"
_LOGGER = logging.getLogger("lipguard.solvers.scip")


def refusal(program: MixedIntegerProgram) -> str | None:
    """Why SCIP cannot take the program: only when it is not installed."""
    del program
    if importlib.util.find_spec("pyscipopt") is None:
        return 'pyscipopt is not installed. pip install "lipguard[scip]".'
    return None


def solve(
    program: MixedIntegerProgram, *, time_limit: float | None = None, gap: float = 1e-6, threads: int = 1
) -> MixedIntegerResult:
    """Solve the program; SCIP runs on one thread, whatever `threads` says.

    Raises:
        SolverUnavailable: not installed.
        SolverFailed: SCIP stopped with an error or a status without meaning.
    """
    del threads
    try:
        import pyscipopt
    except ImportError as error:
        raise SolverUnavailable('pyscipopt is not installed. pip install "lipguard[scip]".') from error
    model = pyscipopt.Model()
    model.hideOutput()
    with tempfile.TemporaryDirectory(prefix="lipguard-scip-") as folder:
        log = Path(folder) / "scip.log"
        if _LOGGER.isEnabledFor(logging.DEBUG):
            model.setLogfile(str(log))
        try:
            return _solve(model, program, time_limit, gap)
        except Exception as error:  # PySCIPOpt raises plain Exception for SCIP's own return codes
            if isinstance(error, SolverFailed):
                raise
            raise SolverFailed(f"SCIP stopped: {error}.") from error
        finally:
            if _LOGGER.isEnabledFor(logging.DEBUG):
                model.setLogfile(None)
                _LOGGER.debug("%s", log.read_text(errors="replace") if log.exists() else "no log")


def _solve(model: Any, program: MixedIntegerProgram, time_limit: float | None, gap: float) -> MixedIntegerResult:
    from pyscipopt import quicksum

    # SCIP asks its linear programs for a thousandth of this; below 1e-10 SoPlex complains on the terminal.
    model.setParam("numerics/feastol", 1e-7)
    model.setParam("limits/gap", gap)
    model.setParam("timing/clocktype", 2)  # wall time
    model.setParam("misc/catchctrlc", False)  # its handler prints to the terminal; _optimise has its own
    if time_limit is not None:
        model.setParam("limits/time", max(time_limit, 0.01))
    variables = [
        model.addVar(
            vtype="B" if program.binary[j] else "C",
            lb=_finite(program.lower[j]),
            ub=_finite(program.upper[j]),
        )
        for j in range(program.variables)
    ]
    for row, low, high in zip(program.rows, program.row_lower, program.row_upper, strict=True):
        terms = quicksum(float(row[j]) * variables[j] for j in np.flatnonzero(row))
        if low == high:
            model.addCons(terms == float(high))
            continue
        if np.isfinite(high):
            model.addCons(terms <= float(high))
        if np.isfinite(low):
            model.addCons(terms >= float(low))
    for ball in program.balls:
        pairs = zip(ball.indices, ball.center, strict=True)
        model.addCons(quicksum((variables[j] - float(c)) * (variables[j] - float(c)) for j, c in pairs) <= ball.radius**2)
    linear = quicksum(float(program.objective[j]) * variables[j] for j in np.flatnonzero(program.objective))
    total = None
    if len(program.squares):
        # SCIP wants a linear objective: maximise s subject to s <= sum of squares.
        total = model.addVar(lb=None, ub=_finite(np.inf if program.cutoff is None else program.cutoff))
        model.addCons(total - linear <= quicksum(variables[j] * variables[j] for j in program.squares))
        model.setObjective(total, "maximize")
    else:
        if program.cutoff is not None:
            model.addCons(linear <= program.cutoff)
        model.setObjective(linear, "maximize")
    if program.start is not None:
        start = model.createSol()
        for variable, value in zip(variables, program.start, strict=True):
            model.setSolVal(start, variable, float(value))
        if total is not None:
            model.setSolVal(start, total, program.value(program.start) * (1 - 1e-12))
        model.addSol(start)
    interrupted = _optimise(model)
    statuses: dict[str, ResultStatus] = {
        "optimal": "optimal",
        "gaplimit": "optimal",
        "infeasible": "infeasible",
        "timelimit": "time limit",
        "memlimit": "memory limit",
        "userinterrupt": "interrupted",
        "terminate": "interrupted",
    }
    if interrupted:
        statuses = {model.getStatus(): "interrupted"}
    if model.getStatus() not in statuses:
        raise SolverFailed(f"SCIP ended with status {model.getStatus()!r}, which says nothing about the maximum.")
    status = statuses[model.getStatus()]
    message = f"SCIP {model.version()}: {status}"
    if status == "infeasible":
        return MixedIntegerResult(status, -np.inf, None, message)
    best = model.getBestSol() if model.getNSols() else None
    solution = None if best is None else np.array([model.getSolVal(best, variable) for variable in variables])
    return MixedIntegerResult(status, float(model.getDualbound()), solution, message)


def _optimise(model: Any) -> bool:
    """Solve in a thread that does not hold the interpreter, so that Ctrl-C arrives; True if it ended the solve."""
    interrupted = False
    failures: list[BaseException] = []

    def work() -> None:
        try:
            model.optimizeNogil()
        except BaseException as error:  # carried over to the caller's thread below
            failures.append(error)

    thread = threading.Thread(target=work, name="lipguard-scip", daemon=True)
    thread.start()
    while thread.is_alive():
        try:
            thread.join(0.05)
        except KeyboardInterrupt:
            interrupted = True
            model.interruptSolve()
    if failures:
        raise failures[0]
    return interrupted


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
