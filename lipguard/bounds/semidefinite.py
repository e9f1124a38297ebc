"""`lipsdp-neuron` and `lipsdp-layer`: LipSDP of slope-restricted networks, globally, on domains, and within a training."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from lipguard.bounds.cost import MEMORY, check_footprint, footprint, weighted_cubes
from lipguard.bounds.local import local_bounds
from lipguard.bounds.measuring import Warm, measured
from lipguard.bounds.method import Method, Pair
from lipguard.bounds.solving import not_above_product, proved, solved
from lipguard.bounds.spectral import Spectral
from lipguard.bounds.weighted import weighted
from lipguard.certificate import Certificate, Domain, Multipliers, Query
from lipguard.errors import NotCertified, SolverFailed, UnsupportedQuery
from lipguard.network import Network
from lipguard.programs.feedback import Feedback, feedback_of
from lipguard.programs.lipsdp import lipsdp
from lipguard.verify import verify
from lipguard.verify.lmi.weighted import NORMS

_EUCLIDEAN: Pair = (2.0, 2.0)


@dataclass(frozen=True)
class Semidefinite(Method):
    """LipSDP for slope-restricted networks, 2-norm to 2-norm; other norms by `lipguard.bounds.weighted`.

    Attributes:
        tied: one multiplier a layer instead of one a neuron.
        solver: a registered name, or "auto": interior-point for small networks, low-rank for others.
        tol: relative gap of the squared bound that the solver is asked for.
        time_limit: seconds for the solver; the best multipliers found by then are proved.
        chordal: give a conic solver one small matrix a layer instead of one of all neurons.

    Source: Fazlyab et al. 2019, arXiv:1906.04893.
    """

    norms: ClassVar[tuple[Pair, ...]] = (_EUCLIDEAN, *NORMS)
    local: ClassVar[tuple[Pair, ...]] = (_EUCLIDEAN,)

    tied: bool = False
    solver: str = "auto"
    tol: float = 1e-7
    time_limit: float | None = None
    chordal: bool = False

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "lipsdp-layer" if self.tied else "lipsdp-neuron"

    def cost(self, network: Network, query: Query) -> float:
        """Cubes of the fronts, or of the programs in other norms; infinite beyond the memory of the proof."""
        if query.norm != _EUCLIDEAN:
            return weighted_cubes(network, query.norm)
        size = footprint(network)
        return size.cubes if size.needed <= MEMORY else float("inf")

    def __call__(self, network: Network, query: Query, state: Warm | None = None) -> tuple[Certificate, Warm | None]:
        """The verified bound, and the state from which a neighbouring network's bound can be found sooner.

        Where the solver fails, or its proposal proves nothing, the spectral product stands in and the note says why.

        Raises:
            UnsupportedQuery: norms without a constraint, or a network beyond the memory of the check.
        """
        began = time.perf_counter()
        if query.norm != _EUCLIDEAN:
            if self.chordal:
                raise UnsupportedQuery(f"{self.name}: chordal=True is for the 2-norm, not {query.norm}. Leave chordal out.")
            return weighted(network, query, self.tied, self.solver, self.tol, self.time_limit, self.name), None
        check_footprint(network, self.name)
        feedback = feedback_of(network)
        if not feedback.sizes:
            return _linear(network, query, feedback, self.name), None
        problem = lipsdp(feedback, self.tied)
        program = problem.program
        if not any(-1 in row for row in (*program.rows, program.out)):
            return Spectral()(network, query)
        start = None if state is None or state.t.numel() != program.neurons else problem.to_program(state.t, state.rho)
        notes: list[str] = []
        try:
            name, proposal = solved(self.solver, program, start, self.tol, self.time_limit, self.chordal)
            if proposal.message not in ("", "optimal"):
                notes.append(f"{name}: {proposal.message}")
        except SolverFailed as failure:
            notes.append(f"{self.solver}: {failure}")
            proposal = None
        certificate = proved(network, query, problem, proposal, self.name, notes)
        if proposal is not None:
            certificate = not_above_product(network, query, certificate, proposal, notes)
        evidence = certificate.evidence
        warm = Warm(evidence.t, evidence.rho) if isinstance(evidence, Multipliers) else None
        return replace(certificate, seconds=time.perf_counter() - began), warm

    def on(self, network: Network, query: Query, domains: Sequence[Domain]) -> list[Certificate]:
        """The bounds on the domains: of the 2-norm by the slopes there, solved together; other norms' hold everywhere."""
        if query.norm not in self.local:
            return super().on(network, query, domains)
        if self.chordal:
            raise UnsupportedQuery(f"{self.name}: chordal=True has no form on a domain. Leave chordal out, or domain.")
        check_footprint(network, self.name)
        return local_bounds(network, query, domains, self)

    def measure(self, network: Network, query: Query, state: Any, seconds: float, floor: float) -> tuple[Certificate, Any]:
        """The bound from the last measurement's multipliers or dual point, improved as far as the time goes."""
        if query.norm != _EUCLIDEAN:
            return super().measure(network, query, state, seconds, floor)
        check_footprint(network, self.name)
        return measured(network, query, self, state if isinstance(state, Warm) else None, seconds, floor)

    def pack(self, state: Any) -> dict[str, Any] | None:
        """Multipliers, their rho, the balance of their network and the pace of a full solve."""
        if not isinstance(state, Warm):
            return None
        balance = None if state.balance is None else state.balance.cpu()
        return {"multipliers": state.t.cpu(), "rho": state.rho, "balance": balance, "pace": state.pace}

    def unpack(self, packed: Mapping[str, Any]) -> Warm | None:
        """The state, without the end of an ascent: the first measurement climbs anew."""
        if "multipliers" not in packed:
            return None
        t, balance = torch.as_tensor(packed["multipliers"]), packed.get("balance")
        return Warm(t, float(packed["rho"]), balance, pace=float(packed.get("pace", 0.0)))


def _linear(network: Network, query: Query, feedback: Feedback, name: str) -> Certificate:
    """A network without neurons: the norm of its one matrix, where that is below the product of its layers' norms."""
    began = time.perf_counter()
    product, _ = Spectral()(network, query)
    matrix = feedback.out.get(-1)
    if matrix is None or len(network.nodes) <= 2 or min(matrix.shape) > _LARGEST_MATRIX:
        return product
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    rho = float(torch.linalg.eigvalsh(gram)[-1])
    evidence = Multipliers(matrix.new_zeros(0), rho)
    proposed = Certificate(math.sqrt(max(rho, 0.0)), "upper", query.norm, query.domain, network.digest, name, evidence)
    try:
        found = verify(network, proposed)
    except NotCertified:
        return product
    return product if product.value <= found.value else replace(found, seconds=time.perf_counter() - began)


_LARGEST_MATRIX = 2048
"""Rows or columns up to which the matrix of a network without neurons is formed for its norm."""
