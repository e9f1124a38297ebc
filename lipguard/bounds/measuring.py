"""LipSDP within a training: from the last measurement's multipliers or dual point, as far as the time goes.

Small networks are solved in full; large ones take as many steps as the time allows, in single precision, since the checker
settles the value in any case.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from lipguard.bounds.refine import climb, refine
from lipguard.bounds.solving import deep, not_above_product, propose, proved, solved
from lipguard.bounds.spectral import Spectral
from lipguard.certificate import Certificate, Multipliers, Query
from lipguard.errors import SolverFailed
from lipguard.network import Network
from lipguard.programs.feedback import feedback_of
from lipguard.programs.lipsdp import LipSDP, lipsdp
from lipguard.programs.slope_program import Proposal
from lipguard.solvers.low_rank import Start

_LARGEST_REFINED = 800
"""Order up to which a shallow program's multipliers are refined, at some milliseconds a factorisation."""

_LARGEST_FULL = 320
"""Order up to which the first measurement is a full solve: about a fifth of a second."""


@dataclass(frozen=True, eq=False)
class Warm:
    """What a later call can start from.

    Attributes:
        t, rho: the network's multipliers (n,) and the squared bound they proved.
        balance: of the network that they are of, (n,): how its neurons are scaled; None for that of the next network.
        end: of the last ascent.
        pace: seconds of a full solve, divided by the cube of its order; 0 before the first.
        reserve: seconds that proving the last value took.
    """

    t: Tensor
    rho: float
    balance: Tensor | None = None
    end: Start | None = None
    pace: float = 0.0
    reserve: float = 0.0


class Settings(Protocol):
    """What is read of a method here."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def tied(self) -> bool: ...  # noqa: D102
    @property
    def solver(self) -> str: ...  # noqa: D102
    @property
    def tol(self) -> float: ...  # noqa: D102


def measured(
    network: Network, query: Query, method: Settings, warm: Warm | None, seconds: float, floor: float
) -> tuple[Certificate, Warm | None]:
    """The proved bound of a network that has changed a little, and the state for the next measurement.

    Args:
        network, query, method: as for a full solve, from 2-norm to 2-norm.
        warm: the last measurement's state, or None.
        seconds: time for the search, inf for no limit: it is then solved in full.
        floor: time it may take all the same while the value is still visibly improving.
    """
    began = time.perf_counter()
    problem = lipsdp(feedback_of(network), method.tied)
    program = problem.program
    if not program.sizes or not any(-1 in row for row in (*program.rows, program.out)):
        return Spectral()(network, query)[0], warm
    if warm is not None and warm.t.numel() != program.neurons:
        warm = None
    notes: list[str] = []
    try:
        proposal, warm_end, pace = _proposal(problem, method, warm, seconds, floor, began)
    except SolverFailed as failure:
        notes.append(str(failure))
        proposal, warm_end, pace = None, None, 0.0 if warm is None else warm.pace
    proposed = time.perf_counter()
    certificate = proved(network, query, problem, proposal, method.name, notes)
    reserve = time.perf_counter() - proposed
    if isinstance(certificate.evidence, Multipliers):
        after = Warm(certificate.evidence.t, certificate.evidence.rho, problem.balance, warm_end, pace, reserve)
    else:
        after = None if warm is None else replace(warm, end=warm_end, pace=pace, reserve=reserve)
    if proposal is not None and not (proposal.inside and warm is not None):
        # What was refined from the last measurement's multipliers needs no comparison.
        certificate = not_above_product(network, query, certificate, proposal, notes)
    return replace(certificate, seconds=time.perf_counter() - began), after


def _proposal(
    problem: LipSDP, method: Settings, warm: Warm | None, seconds: float, floor: float, began: float
) -> tuple[Proposal, Start | None, float]:
    """Multipliers by the way that fits the program and the time; the end of an ascent, and the pace of a full solve."""
    program = problem.program
    pace, start = (0.0, None) if warm is None else (warm.pace, _start(problem, warm))
    if method.solver != "auto" or seconds == math.inf:
        limit = None if seconds == math.inf else seconds
        return solved(method.solver, program, start, method.tol, limit)[1], None if warm is None else warm.end, pace
    allowed = max(seconds, floor / 4)
    cubes = program.order**3
    if program.order <= _LARGEST_FULL if pace == 0 else pace * cubes <= allowed:
        proposal = propose("interior-point", program, None, method.tol, None)
        return proposal, None if warm is None else warm.end, (time.perf_counter() - began) / cubes
    if program.scaling:  # implicit layers
        return propose("first-order", program, start, method.tol, allowed), None, pace
    if program.order <= _LARGEST_REFINED and not deep(program):
        return refine(program, start, began + seconds, began + max(seconds, floor)), None, pace
    proposal, end = climb(program, None if warm is None else warm.end, began + seconds, began + max(seconds, floor))
    return proposal, end, pace


def _start(problem: LipSDP, warm: Warm) -> Tensor:
    """The program's multipliers from the last network's, whose neurons had another balance."""
    before = problem.balance if warm.balance is None else warm.balance.to(problem.balance)
    grown = problem.balance / before
    return problem.to_program(warm.t.to(grown) * grown, warm.rho)
