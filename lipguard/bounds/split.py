"""`lipsdp-split`: LipSDP of consecutive pieces, whose bounds multiply; the pieces are solved side by side.

Source: Fazlyab et al. 2019, arXiv:1906.04893, section 4 ("splitting a deep network").
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from lipguard.bounds.method import Method, Pair
from lipguard.bounds.semidefinite import Semidefinite
from lipguard.certificate import Certificate, Factors, Multipliers, Product, Query
from lipguard.network import Network
from lipguard.network.pieces import pieces, separators
from lipguard.solvers.threads import one_thread
from lipguard.verify import verify


@dataclass(frozen=True)
class Split(Method):
    """LipSDP piece by piece.

    Attributes:
        pieces: number of pieces; fewer where the network cannot be cut as often.
        jobs: processes that solve them; more than one needs joblib (the extra "parallel"), else they run one by one.
        solver, tol, time_limit, chordal: as for `Semidefinite`; the time is each piece's.
    """

    norms: ClassVar[tuple[Pair, ...]] = ((2.0, 2.0),)

    pieces: int = 4
    jobs: int = 1
    solver: str = "auto"
    tol: float = 1e-7
    time_limit: float | None = None
    chordal: bool = False

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "lipsdp-split"

    def __call__(self, network: Network, query: Query, state: None = None) -> tuple[Certificate, None]:
        """The verified product of the pieces' bounds.

        Raises:
            UnsupportedQuery: a norm other than 2, or a piece beyond the memory allowed.
        """
        began = time.perf_counter()
        if query.norm not in self.norms:
            raise self.unsupported(query)
        cuts = balanced(network, self.pieces)
        # A piece's domain is not the network's: its bound is for all of its inputs.
        method = Semidefinite(False, self.solver, self.tol, self.time_limit, self.chordal)
        tasks = [_Task(method, part, Query(query.norm)) for part in pieces(network, cuts)]
        found, note = _solved(tasks, self.jobs)
        notes = [note, *(f"piece {i + 1}: {c.note}" for i, c in enumerate(found) if c.note)]
        factors = tuple(c.evidence for c in found if isinstance(c.evidence, Multipliers | Factors))
        evidence = Product(cuts, factors)
        value = math.prod(c.value for c in found)
        proposed = Certificate(value, "upper", query.norm, query.domain, network.digest, self.name, evidence)
        details: dict[str, float | int | str] = {f"piece {i + 1}": c.value for i, c in enumerate(found)}
        certificate = replace(verify(network, proposed), details=details, note="; ".join(n for n in notes if n))
        return replace(certificate, seconds=time.perf_counter() - began), None


def balanced(network: Network, count: int) -> tuple[int, ...]:
    """Cuts behind activations that divide the neurons as evenly as the separating ones allow; at most count - 1."""
    size = {i: network.sizes[i] for i in network.activations}
    before, total = {}, 0
    for i in network.activations:
        total += size[i]
        before[i] = total
    nodes = network.nodes
    candidates = [i for i in separators(network) if nodes[i].elementwise and not nodes[i].loop and before[i] < total]
    chosen: set[int] = set()
    for part in range(1, count):
        if candidates:
            chosen.add(min(candidates, key=lambda i: abs(before[i] - total * part / count)))
    return tuple(sorted(chosen))


@dataclass(frozen=True, eq=False)
class _Task:
    method: Semidefinite
    network: Network
    query: Query

    def __call__(self) -> Certificate:
        with one_thread():
            return self.method(self.network, self.query)[0]


def _solved(tasks: list[_Task], jobs: int) -> tuple[list[Certificate], str]:
    jobs = min(jobs, len(tasks))
    if jobs > 1:
        try:
            import joblib
        except ImportError:
            return [task() for task in tasks], "joblib is not installed: the pieces were solved one by one"
        return _in_parallel(joblib, tasks, jobs), ""
    return [task() for task in tasks], ""


def _in_parallel(joblib: object, tasks: list[_Task], jobs: int) -> list[Certificate]:
    run: Callable[..., object] = joblib.Parallel(n_jobs=jobs, inner_max_num_threads=1, backend="loky")  # type: ignore[attr-defined]
    try:
        return list(run(joblib.delayed(_Task.__call__)(task) for task in tasks))  # type: ignore[attr-defined,call-overload]
    finally:
        from joblib.externals.loky import get_reusable_executor

        # loky keeps its processes for a next call; a library leaves none behind.
        get_reusable_executor().shutdown(wait=True)
