"""HiGHS: the mixed-integer linear programs, and the small linear programs of the exact methods."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lipguard.errors import SolverFailed, SolverUnavailable
from lipguard.programs.mixed_integer import MixedIntegerProgram, MixedIntegerResult, ResultStatus, Vector

NAME = "highs"
_LOGGER = logging.getLogger("lipguard.solvers.highs")
_LOCAL = threading.local()


def refusal(program: MixedIntegerProgram) -> str | None:
    """Why HiGHS cannot take the program: quadratic terms, or not installed."""
    if importlib.util.find_spec("highspy") is None:
        return 'highspy is not installed. pip install "lipguard[highs]".'
    if program.quadratic:
        return "HiGHS solves mixed-integer programs without quadratic terms only."
    return None


@dataclass(frozen=True, eq=False)
class LinearResult:
    """Outcome of a linear program; `x` and `duals` are meaningful only if `optimal`."""

    optimal: bool
    value: float
    x: Vector
    duals: Vector


def maximise(objective: Vector, rows: Vector, right: Vector, lower: Vector, upper: Vector) -> LinearResult:
    """Maximise objective' x subject to rows x <= right and lower <= x <= upper, at tolerance 1e-10.

    Args:
        objective, lower, upper: (N,).
        rows, right: (M, N) and (M,).
    Returns:
        The solver's answer; `duals` (M,) are nonnegative up to rounding. A status other than optimal says nothing,
        not even that the program is infeasible.
    """
    try:
        import highspy
    except ImportError:
        return _maximise_by_scipy(objective, rows, right, lower, upper)
    highs = _linear()
    highs.passModel(_model(objective, rows, np.full(len(right), -np.inf), right, lower, upper))
    return _run(highs, highspy.HighsModelStatus.kOptimal)


def _linear() -> Any:
    """This thread's instance for linear programs."""
    highs = getattr(_LOCAL, "highs", None)
    if highs is None:
        highs = _LOCAL.highs = _silent()
        highs.setOptionValue("presolve", "off")
        highs.setOptionValue("primal_feasibility_tolerance", 1e-10)
        highs.setOptionValue("dual_feasibility_tolerance", 1e-10)
    return highs


def _run(highs: Any, wanted: Any) -> LinearResult:
    highs.run()
    optimal = highs.getModelStatus() == wanted
    solution = highs.getSolution()
    return LinearResult(optimal, highs.getObjectiveValue(), np.array(solution.col_value), np.array(solution.row_dual))


def _maximise_by_scipy(objective: Vector, rows: Vector, right: Vector, lower: Vector, upper: Vector) -> LinearResult:
    """The same through the HiGHS inside SciPy: about eight times slower per program, all of it overhead."""
    from scipy.optimize import linprog

    options = {"presolve": False, "primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    bounds = np.stack([lower, upper], axis=1)
    answer = linprog(-objective, A_ub=rows, b_ub=right, bounds=bounds, method="highs-ds", options=options)
    if answer.x is None or answer.status != 0:
        return LinearResult(False, np.nan, np.zeros(len(objective)), np.zeros(len(right)))
    return LinearResult(True, -float(answer.fun), answer.x, -answer.ineqlin.marginals)


@contextlib.contextmanager
def _scheduler(threads: int) -> Iterator[None]:
    """The process's scheduler for this number of threads: it keeps that of its first use, and refuses any other afterwards."""
    if threads == 1:
        yield
        return
    import highspy

    highspy.Highs.resetGlobalScheduler(True)
    try:
        yield
    finally:
        highspy.Highs.resetGlobalScheduler(True)  # the linear programs run in one thread


def solve(
    program: MixedIntegerProgram, *, time_limit: float | None = None, gap: float = 1e-6, threads: int = 1
) -> MixedIntegerResult:
    """Solve a program without quadratic terms.

    Raises:
        SolverUnavailable: not installed, or the program is quadratic.
        SolverFailed: HiGHS stopped with a status without meaning.
    """
    reason = refusal(program)
    if reason is not None:
        raise SolverUnavailable(reason)
    import highspy

    highs = _silent()
    highs.setOptionValue("threads", threads)
    highs.setOptionValue("mip_rel_gap", gap)
    highs.setOptionValue("mip_feasibility_tolerance", 1e-9)
    highs.setOptionValue("primal_feasibility_tolerance", 1e-9)
    if time_limit is not None:
        highs.setOptionValue("time_limit", max(time_limit, 0.01))
    model = _model(program.objective, program.rows, program.row_lower, program.row_upper, program.lower, program.upper)
    kinds = highspy.HighsVarType
    model.integrality_ = [kinds.kInteger if b else kinds.kContinuous for b in program.binary]
    highs.passModel(model)
    if program.cutoff is not None:
        used = np.flatnonzero(program.objective)
        highs.addRow(-highspy.kHighsInf, program.cutoff, len(used), used.astype(np.int32), program.objective[used])
    if program.start is not None:
        start = highspy.HighsSolution()
        start.col_value = program.start.tolist()
        highs.setSolution(start)
    highs.HandleKeyboardInterrupt = True
    interrupted = False
    try:
        with _scheduler(threads):
            highs.run()
    except KeyboardInterrupt:
        interrupted = True
    kinds_of_end: dict[Any, ResultStatus] = {
        highspy.HighsModelStatus.kOptimal: "optimal",
        highspy.HighsModelStatus.kInfeasible: "infeasible",
        highspy.HighsModelStatus.kTimeLimit: "time limit",
        highspy.HighsModelStatus.kMemoryLimit: "memory limit",
        highspy.HighsModelStatus.kInterrupt: "interrupted",
    }
    end = highspy.HighsModelStatus.kInterrupt if interrupted else highs.getModelStatus()
    if end not in kinds_of_end:
        raise SolverFailed(f"HiGHS ended with {highs.modelStatusToString(end)!r}, which says nothing about the maximum.")
    status = kinds_of_end[end]
    message = f"HiGHS {highs.version()}: {status}"
    if status == "infeasible":
        return MixedIntegerResult(status, -np.inf, None, message)
    if interrupted:
        return MixedIntegerResult(status, np.inf, None, message)  # HiGHS publishes no bound on this way out
    info = highs.getInfo()
    feasible = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    solution = np.array(highs.getSolution().col_value) if feasible else None
    return MixedIntegerResult(status, float(info.mip_dual_bound), solution, message)


def _silent() -> Any:
    """An instance that has printed nothing, its banner included, and prints nothing."""
    try:
        import highspy
    except ImportError as error:
        raise SolverUnavailable('highspy is not installed. pip install "lipguard[highs]".') from error

    class Silent(highspy.Highs):
        """HiGHS logs its banner while its constructor enables callbacks (seen in 1.16): the output goes off just before."""

        def enableCallbacks(self) -> None:  # noqa: N802 - the name is HiGHS's
            self.setOptionValue("output_flag", False)
            super().enableCallbacks()

    highs = Silent()
    highs.setOptionValue("output_flag", False)  # older releases do not call enableCallbacks
    highs.setOptionValue("threads", 1)
    return highs


def _model(objective: Vector, rows: Vector, row_lower: Vector, row_upper: Vector, lower: Vector, upper: Vector) -> Any:
    import highspy

    model = highspy.HighsLp()
    count, size = rows.shape
    model.num_col_, model.num_row_ = size, count
    model.sense_ = highspy.ObjSense.kMaximize
    model.col_cost_, model.col_lower_, model.col_upper_ = objective, lower, upper
    model.row_lower_, model.row_upper_ = row_lower, row_upper
    matrix = rows != 0
    place = np.nonzero(matrix)
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.concatenate(([0], matrix.sum(axis=1).cumsum()))
    model.a_matrix_.index_ = place[1]
    model.a_matrix_.value_ = rows[place]
    return model
