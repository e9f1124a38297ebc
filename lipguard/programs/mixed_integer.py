"""A mixed-integer program and what came of it: the one language spoken to Gurobi, SCIP and HiGHS."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class EuclideanBall:
    """||x[indices] - center||_2 <= radius."""

    indices: Indices
    center: Vector
    radius: float


@dataclass(frozen=True, eq=False)
class MixedIntegerProgram:
    """Maximise objective' x + sum of x_j^2 over j in `squares`.

    Attributes:
        lower, upper: bounds of the N variables; entries may be infinite.
        binary: which variables are 0 or 1, shape (N,), bool.
        rows: the linear constraints row_lower <= rows x <= row_upper, shape (M, N).
        balls: convex quadratic constraints.
        objective: linear part, shape (N,).
        squares: variables whose squares are added to the objective: a nonconvex program.
        cutoff: a known upper bound of the objective, or None.
        start: a feasible point to begin from, shape (N,), or None.
    """

    lower: Vector
    upper: Vector
    binary: NDArray[np.bool_]
    rows: Vector
    row_lower: Vector
    row_upper: Vector
    objective: Vector
    balls: tuple[EuclideanBall, ...] = ()
    squares: Indices = field(default_factory=lambda: np.zeros(0, dtype=np.intp))
    cutoff: float | None = None
    start: Vector | None = None

    @property
    def variables(self) -> int:
        """Number of variables N."""
        return len(self.objective)

    @property
    def quadratic(self) -> bool:
        """Whether there is any quadratic term."""
        return bool(self.balls) or len(self.squares) > 0

    def value(self, x: Vector) -> float:
        """The objective at x."""
        return float(self.objective @ x + np.square(x[self.squares]).sum())


ResultStatus = Literal["optimal", "infeasible", "time limit", "memory limit", "interrupted"]


@dataclass(frozen=True, eq=False)
class MixedIntegerResult:
    """What a solver says: every maximiser has an objective of at most `bound`, as far as the solver can be trusted."""

    status: ResultStatus
    bound: float
    solution: Vector | None
    message: str


class MixedIntegerSolver(Protocol):
    """A module that solves such programs: `gurobi`, `scip` and `highs` of this package."""

    NAME: str

    def refusal(self, program: MixedIntegerProgram) -> str | None:
        """Why the solver cannot take the program (not installed, licence, no quadratics), or None."""
        ...

    def solve(
        self, program: MixedIntegerProgram, *, time_limit: float | None = None, gap: float = 1e-6, threads: int = 1
    ) -> MixedIntegerResult:
        """Solve it; output goes to the logger "lipguard.solvers"."""
        ...
