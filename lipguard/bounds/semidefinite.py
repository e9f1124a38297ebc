"""`lipsdp-neuron` and `lipsdp-layer`: a solver proposes multipliers, the checker proves the bound they give."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lipguard import registry
from lipguard.bounds.spectral import Spectral
from lipguard.certificate import Certificate, Multipliers, Query
from lipguard.errors import NotCertified, SolverFailed, UnsupportedQuery
from lipguard.network import Affine, Coupled, Network, Sum
from lipguard.programs.elimination import fill
from lipguard.programs.feedback import feedback_of
from lipguard.programs.lipsdp import LipSDP, lipsdp
from lipguard.programs.rewriting import slope_restricted
from lipguard.programs.slope_program import Proposal, SlopeProgram
from lipguard.verify import verify

Solver = Callable[[SlopeProgram, Tensor | None, float], Proposal]

_SMALL, LARGEST_DENSE = 300, 1500
"""Orders of the matrix inequality up to which the interior point method is chosen at once, in a tenth of a second, and after
`low-rank` left a gap, in half a minute."""

_CLOSED = 1e-5
"""Gap of rho up to which `low-rank` has the optimum."""

_DEEP = 8.0
"""A program whose dense cost is this many times that of its elimination is left to `low-rank`."""

MEMORY = 8e9
"""Bytes that the blocks of a program and of its proof may take."""

_SOLVED = 1e-3
"""Relative gap from which a program counts as solved: its value is then compared with no other."""

_EQUAL = 1e-6
"""Relative distance of a bound above the product within which both count as one value, and nothing is noted."""

_PULLS = (1e-9, 1e-7, 1e-5, 1e-3, 1e-2, 0.1, 1.0)
"""Margins by which multipliers outside the cone, or too near to its boundary, are pulled inside."""


@dataclass(frozen=True, eq=False)
class Warm:
    """What a later call can start from: the network's multipliers (n,) and the rho they proved."""

    t: Tensor
    rho: float


@dataclass(frozen=True)
class Semidefinite:
    """LipSDP for slope-restricted networks, 2-norm to 2-norm; other norms by `lipguard.bounds.weighted`.

    Attributes:
        tied: one multiplier a layer instead of one a neuron.
        solver: a registered name, or "auto": interior-point for small networks, low-rank for others.
        tol: relative gap of the squared bound that the solver is asked for.
        time_limit: seconds for the solver; the best multipliers found by then are proved.
        chordal: give a conic solver one small matrix a layer instead of one of all neurons.

    Source: Fazlyab et al. 2019, arXiv:1906.04893.
    """

    tied: bool = False
    solver: str = "auto"
    tol: float = 1e-7
    time_limit: float | None = None
    chordal: bool = False

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "lipsdp-layer" if self.tied else "lipsdp-neuron"

    def __call__(self, network: Network, query: Query, state: Warm | None = None) -> tuple[Certificate, Warm | None]:
        """The verified bound, and the state from which a neighbouring network's bound can be found sooner.

        Where the solver fails, or its proposal proves nothing, the spectral product stands in and the note says why.

        Raises:
            UnsupportedQuery: norms without a constraint, or a network beyond the memory of the check.
        """
        began = time.perf_counter()
        if query.norm != (2.0, 2.0):
            from lipguard.bounds.weighted import Options, weighted

            options = Options(self.tied, self.solver, self.tol, self.time_limit)
            return weighted(network, query, options, self.name), None
        check_query(network, query, self.name)
        problem = lipsdp(feedback_of(network), self.tied)
        program = problem.program
        if not program.sizes or not any(-1 in row for row in (*program.rows, program.out)):
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
        certificate = certify(network, query, problem, proposal, self.name, notes)
        if proposal is not None:
            certificate = not_above_product(network, query, certificate, proposal, notes)
        evidence = certificate.evidence
        warm = Warm(evidence.t, evidence.rho) if isinstance(evidence, Multipliers) else None
        return replace(certificate, seconds=time.perf_counter() - began), warm


def check_query(network: Network, query: Query, name: str) -> None:
    """Refuse what LipSDP cannot answer.

    Raises:
        UnsupportedQuery: a norm other than 2, or a network beyond the memory of the check.
    """
    if query.norm != (2.0, 2.0):
        raise UnsupportedQuery(f"{name} bounds the constant from 2-norm to 2-norm, not {query.norm}. Use method='spectral'.")
    size = footprint(network)
    if size.needed > MEMORY:
        count = slope_restricted(network).neurons
        other = next(m for m in ("lipsdp-channel", "spectral") if m in registry.METHODS and m != name)
        raise UnsupportedQuery(
            f"{name}: one multiplier a neuron takes about {size.needed / 1e9:.0f} GB for {count} neurons, "
            f"{size.widest} of them and of the inputs in one front; {MEMORY / 1e9:.0f} GB are allowed. Use method={other!r}, "
            "or bound a submodule."
        )


def solved(
    name: str, program: SlopeProgram, start: Tensor | None, tol: float, time_limit: float | None, chordal: bool = False
) -> tuple[str, Proposal]:
    """What a solver proposes, and its name where it was chosen by "auto".

    Raises:
        SolverFailed, UnsupportedQuery: as `propose`.
    """
    # Low-rank points know no layers that respond to themselves.
    if name == "auto" and (program.order <= _SMALL or program.scaling or chordal):
        name = "interior-point"
    if name != "auto":
        return name, propose(name, program, start, tol, time_limit, chordal)
    began = time.perf_counter()
    proposal = propose("low-rank", program, start, tol, time_limit)
    left = None if time_limit is None else time_limit - (time.perf_counter() - began)
    if not proposal.gap > max(tol, _CLOSED) or deep(program) or program.order > LARGEST_DENSE or (left is not None and left <= 0):
        return "low-rank", proposal
    try:
        exact = propose("interior-point", program, None, tol, left)
    except SolverFailed:
        return "low-rank", proposal
    return ("interior-point", exact) if exact.rho <= proposal.rho else ("low-rank", proposal)


def deep(program: SlopeProgram) -> bool:
    """Whether eliminating layer by layer costs far less than the whole matrix: from about eight layers on."""
    return program.order**3 > _DEEP * sum((n + m) ** 3 for n, m in program.fronts)


class Footprint(NamedTuple):
    """Size of a program of one multiplier a neuron.

    Attributes:
        needed: bytes of the blocks that it is made of and proved by.
        widest: coordinates of the widest front.
        cubes: sum of the cubes of the fronts' coordinates.
    """

    needed: float
    widest: int
    cubes: float


def footprint(network: Network) -> Footprint:
    """The size of a network's program, from the layers' sizes alone: nothing is allocated."""
    network = slope_restricted(network)
    position = {node: k for k, node in enumerate(network.activations)}
    size = {-1: network.inputs} | {k: network.sizes[i] for k, i in enumerate(network.activations)}
    sources: list[frozenset[int]] = []
    for i, node in enumerate(network.nodes):
        match node:
            case _ if i in position:
                sources.append(frozenset({position[i]}))
            case Affine():
                sources.append(sources[node.source])
            case Sum():
                sources.append(frozenset().union(*(sources[s] for s in node.sources)))
            case _:
                sources.append(frozenset({-1}))
    rows = [sources[network.nodes[i].source] for i in network.activations]  # type: ignore[union-attr]
    # An input of more entries than the neurons that see it is reduced to as many.
    size[-1] = min(size[-1], sum(size[k] for k, row in enumerate(rows) if -1 in row) + network.outputs)
    shapes, pairs = fill(rows, sources[-1])
    weights = sum(size[k] * size[j] for k, row in enumerate(rows) for j in row)
    fronts = [size[k] + sum(size[j] for j in front) for k, front in shapes]
    widest = max(fronts, default=0)
    # Blocks as captured, as program, with radii; the factors and adjoints of the fronts; four copies of the widest.
    needed = 8.0 * (3 * weights + 2 * sum(size[i] * size[j] for i, j in pairs) + 4 * widest**2)
    return Footprint(needed, widest, float(sum(n**3 for n in fronts)))


def propose(
    name: str, program: SlopeProgram, start: Tensor | None, tol: float, time_limit: float | None, chordal: bool = False
) -> Proposal:
    """Run one solver; `tol` and `chordal` are handed to those that have the option.

    Raises:
        UnsupportedQuery: the solver is not for semidefinite programs, or has no chordal form.
    """
    entry = registry.solver(name)
    if entry.solves and "sdp" not in entry.solves:
        raise UnsupportedQuery(f"solver {name!r} solves {', '.join(entry.solves)} problems, not semidefinite programs.")
    conic = entry.path.endswith(":Conic")
    if chordal and not conic:
        raise UnsupportedQuery(f"solver {name!r} has no chordal form; scs, clarabel, cvxopt and mosek have.")
    # Below 1e-6 the low-rank method's last steps cost more than they give.
    own = {"interior-point": {"tol": tol}, "low-rank": {"tol": max(tol, 1e-6)}}
    options = {"chordal": True} if chordal else own.get(name, {})
    solver: Solver = entry.build(**options)
    deadline = math.inf if time_limit is None else time.perf_counter() + time_limit
    return solver(program, start, deadline)


def certify(
    network: Network, query: Query, problem: LipSDP, proposal: Proposal | None, name: str, notes: list[str] | None = None
) -> Certificate:
    """The best bound the checker proves from a proposal, repaired where it must be; else the spectral product.

    A solver's rho is never used: the least rho of its multipliers is found anew. Multipliers outside the cone are
    pulled inside, by as little as it takes.
    """
    notes = [] if notes is None else notes
    program = problem.program
    if proposal is not None:
        smallest = torch.finfo(torch.float64).tiny
        t = torch.where(proposal.t.isfinite(), proposal.t.to(torch.float64), smallest).clamp_min(smallest)
        reason: Exception | None = None
        for pull in (*((math.nan,) if proposal.inside else ()), None, *_PULLS):
            try:
                inside, rho = (t, proposal.rho) if pull is not None and math.isnan(pull) else _inside(program, t, pull)
                # The transposed network's multipliers are rho / t: they need the rho that will be proved.
                evidence = Multipliers(problem.to_network(inside, rho), rho)
                proposed = Certificate(math.sqrt(rho), "upper", query.norm, query.domain, network.digest, name, evidence)
                certificate = verify(network, proposed)
            except (NotCertified, SolverFailed) as failure:
                reason = failure
                continue
            if pull is not None and not math.isnan(pull):
                notes.append(f"multipliers pulled inside the cone by {pull:g}")
            details = {"gap": proposal.gap, "iterations": proposal.iterations}
            return replace(certificate, details=details, note="; ".join(notes))
        notes.append(f"NotCertified: {reason}")
    fallback, _ = Spectral()(network, query)
    if fallback.value == 0:
        return fallback  # a constant network: no multipliers were needed
    return replace(fallback, note="; ".join([*notes, f"the spectral product {fallback.value:.6g} stands"]))


def not_above_product(
    network: Network, query: Query, certificate: Certificate, proposal: Proposal, notes: list[str]
) -> Certificate:
    """The certificate, or the spectral product where that is smaller: after an unfinished solve.

    Also for a network whose constant is 0, whose program has no interior optimum, and for coupled nodes: they often stand
    between orthogonal layers, where the product is the optimum, and their linear paths through many layers cost the check
    of the multipliers some accuracy.
    """
    coupled = any(isinstance(node, Coupled) for node in network.nodes)
    if proposal.gap <= _SOLVED and not coupled:
        return certificate
    product, _ = Spectral()(network, query)
    if product.value >= certificate.value:
        return certificate
    if certificate.value <= product.value * (1 + _EQUAL):
        return replace(product, note=certificate.note)
    return replace(product, note="; ".join([*notes, f"{certificate.method} proves {certificate.value:.6g} only"]))


def _inside(program: SlopeProgram, t: Tensor, pull: float | None) -> tuple[Tensor, float]:
    if pull is None:
        s = program.eliminate(lambda k, _: t[program.slices[k]]).schur
        rho = 0.0 if s is None else float(torch.linalg.eigvalsh(s)[-1])
    else:
        t, rho = program.interior(t, margin=pull)
    if not (math.isfinite(rho) and rho > 0):
        raise SolverFailed(f"the multipliers give rho = {rho:g}.")
    return t, rho
