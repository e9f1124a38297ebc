"""A program of LipSDP solved and proved: a solver proposes multipliers, the checker proves the bound they give."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lipguard import registry
from lipguard.bounds.spectral import Spectral
from lipguard.certificate import Certificate, Multipliers, Query
from lipguard.errors import NotCertified, SolverFailed, UnsupportedQuery
from lipguard.network import Network
from lipguard.outward import show_upper
from lipguard.programs.lipsdp import LipSDP
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

_SOLVED = 1e-3
"""Relative gap from which a program counts as solved: its value is then compared with no other."""

_EQUAL = 1e-6
"""Relative distance of a bound above the product within which both count as one value, and nothing is noted."""

_PULLS = (1e-9, 1e-7, 1e-5, 1e-3, 1e-2, 0.1, 1.0)
"""Margins by which multipliers outside the cone, or too near to its boundary, are pulled inside."""


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


def propose(
    name: str, program: SlopeProgram, start: Tensor | None, tol: float, time_limit: float | None, chordal: bool = False
) -> Proposal:
    """Run one solver; `tol` and `chordal` are handed to those that have the option.

    Raises:
        UnsupportedQuery: the solver is not for semidefinite programs, or has no chordal form.
    """
    entry = registry.solver(name, "sdp")
    taken, options = entry.takes(), {}
    if chordal:
        if "chordal" not in taken:
            able = [n for n, other in registry.solvers("sdp").items() if registry.available(n) and "chordal" in other.takes()]
            raise UnsupportedQuery(f"solver {name!r} has no chordal form; {', '.join(able) or 'no installed one'} has.")
        options["chordal"] = True
    if "tol" in taken:
        options["tol"] = max(tol, entry.least_tol)
    solver: Solver = entry.build(**options)
    deadline = math.inf if time_limit is None else time.perf_counter() + time_limit
    return solver(program, start, deadline)


def proved(
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
    return replace(fallback, note="; ".join([*notes, f"the spectral product {show_upper(fallback.value)} stands"]))


def not_above_product(
    network: Network, query: Query, certificate: Certificate, proposal: Proposal, notes: list[str]
) -> Certificate:
    """The certificate, or the spectral product where that is smaller: after an unfinished solve.

    Also for a network whose constant is 0, whose program has no interior optimum, and for coupled nodes: they often stand
    between orthogonal layers, where the product is the optimum, and their linear paths through many layers cost the check
    of the multipliers some accuracy.
    """
    coupled = any(node.coupling is not None for node in network.nodes)
    if proposal.gap <= _SOLVED and not coupled:
        return certificate
    product, _ = Spectral()(network, query)
    if product.value >= certificate.value:
        return certificate
    if certificate.value <= product.value * (1 + _EQUAL):
        return replace(product, note=certificate.note)
    return replace(product, note="; ".join([*notes, f"{certificate.method} proves {show_upper(certificate.value)} only"]))


def _inside(program: SlopeProgram, t: Tensor, pull: float | None) -> tuple[Tensor, float]:
    if pull is None:
        s = program.eliminate(lambda k, _: t[program.slices[k]]).schur
        rho = 0.0 if s is None else float(torch.linalg.eigvalsh(s)[-1])
    else:
        t, rho = program.interior(t, margin=pull)
    if not (math.isfinite(rho) and rho > 0):
        raise SolverFailed(f"the multipliers give rho = {rho:g}.")
    return t, rho
