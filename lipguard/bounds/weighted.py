"""LipSDP between 1-, 2- and inf-norms: one program for each output (to inf) or input (from 1), its best weights proposed.

||y||^2 <= sum_k mu_k x_k^2 <= (sum_k mu_k) ||x||_inf^2: the least sum of weights instead of the least rho. Bounds to the
1-norm are those of the transposed network from the inf-norm.

Sources: Pauli et al. 2024, arXiv:2401.14033; for one hidden layer the natural program of Wang et al. 2022, arXiv:2203.01212.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lipguard.bounds.cost import weighted_order
from lipguard.bounds.implicit import Contraction
from lipguard.bounds.solving import solved
from lipguard.bounds.spectral import Spectral
from lipguard.certificate import Certificate, Part, Query, WeightedMultipliers
from lipguard.errors import NotCertified, SolverFailed, UnsupportedQuery
from lipguard.network import Network
from lipguard.outward import show_upper
from lipguard.programs.feedback import Feedback, feedback_of
from lipguard.programs.lipsdp import LipSDP, lipsdp
from lipguard.programs.slope_program import Proposal
from lipguard.verify import verify
from lipguard.verify.lmi.weighted import NORMS, check_part, parts_of

_LARGEST = 3000
"""Order of the matrix inequality beyond which no weighted program is tried: minutes for every output."""

_LEAST = 1e-12
"""Smallest weight relative to the mean: what is given to inputs that nothing feels."""

_PULLS = (None, 1e-9, 1e-7, 1e-5, 1e-3, 1e-2, 0.1)

_SLACKS = (1e-12, 1e-11, 1e-10, 1e-9, 1e-7, 1e-5)
"""Relative increases of the weights: the checker's own increase of rho, one number for the inputs, does not reach directions
that the weights of several outputs leave without room."""


def weighted(
    network: Network, query: Query, tied: bool, solver: str, tol: float, time_limit: float | None, name: str
) -> Certificate:
    """The verified bound; where a program fails, or proves no less, the product of magnitudes or norms stands.

    Args:
        network, query: what is bounded, in which norms.
        tied, solver, tol, time_limit: as `Semidefinite` has them.
        name: of the method, for messages and the certificate.
    Raises:
        UnsupportedQuery: norms without a constraint, or matrices too large.
    """
    began = time.perf_counter()
    norm = query.norm
    if norm not in NORMS:
        raise UnsupportedQuery(
            f"{name}: no quadratic constraint is known that bounds the constant from norm {norm[0]:g} to norm {norm[1]:g}. "
            "Use method='spectral'."
        )
    if solver == "first-order":
        raise UnsupportedQuery(f"{name}: solver 'first-order' bounds the constant in the 2-norm only. Use 'auto'.")
    order = weighted_order(network, norm)
    if order > _LARGEST:
        raise UnsupportedQuery(
            f"{name}: a matrix of order {order} for each of {parts_of(network, norm)} programs is too large. "
            "Use method='spectral', or outputs=... and a smaller submodule."
        )
    product = _product(network, query)
    fb, count = feedback_of(network), parts_of(network, norm)
    if product.value == 0 or not fb.sizes:
        return product
    free: Literal["inputs", "outputs"] | None = "inputs" if norm[0] == math.inf else "outputs" if norm[1] == 1 else None
    found: dict[int, tuple[float, Part]] = {}
    gaps, iterations, notes = [0.0], 0, []
    try:
        for i in range(count):
            view = _view(fb, i, norm)
            if view is None:
                continue  # an output or input that does nothing: any other part's evidence covers it
            problem = lipsdp(view, tied, free)
            left = None
            if time_limit is not None:
                left = max(time_limit - (time.perf_counter() - began), 0.0) / (count - i)
            used, proposal = solved(solver, problem.program, None, tol, left)
            if proposal.message not in ("", "optimal"):
                notes.append(f"part {i}: {used}: {proposal.message}")
            gaps.append(proposal.gap)
            iterations += proposal.iterations
            found[i] = _best(network, problem, proposal, i, norm)
        evidence = _complete(found, count)
        proposed = Certificate(math.nan, "upper", norm, query.domain, network.digest, name, evidence)
        certificate = verify(network, proposed)
    except (NotCertified, SolverFailed) as failure:
        text = f"{type(failure).__name__}: {failure}; {product.method} {show_upper(product.value)} stands"
        return replace(product, note="; ".join([*notes, text]), seconds=time.perf_counter() - began)
    certificate = replace(
        certificate, details={"gap": max(gaps), "iterations": iterations, "programs": len(found)}, note="; ".join(notes)
    )
    if product.value < certificate.value:
        notes.append(f"{name} proves {show_upper(certificate.value)} only")
        certificate = replace(product, note="; ".join(notes))
    return replace(certificate, seconds=time.perf_counter() - began)


def _product(network: Network, query: Query) -> Certificate:
    """The least of the cheap bounds."""
    product = Spectral()(network, query)[0]
    try:
        magnitudes = Contraction()(network, query)[0]
    except (NotCertified, UnsupportedQuery):
        return product
    return min(magnitudes, product, key=lambda certificate: certificate.value)


def _view(fb: Feedback, i: int, norm: tuple[float, float]) -> Feedback | None:
    """The feedback form with one output or one input; None if that is connected to nothing."""
    rows, out, inputs, outputs = fb.rows, dict(fb.out), fb.inputs, fb.outputs
    if norm[1] == math.inf:
        out, outputs = {s: block[i : i + 1] for s, block in out.items()}, 1
        if not any(bool(block.any()) for block in out.values()):
            return None
    if norm[0] == 1:
        rows = tuple({s: block[:, i : i + 1] if s < 0 else block for s, block in row.items()} for row in rows)
        out = {s: block[:, i : i + 1] if s < 0 else block for s, block in out.items()}
        inputs = 1
        if not any(bool(row[-1].any()) for row in (*rows, out) if -1 in row):
            return None
    return replace(fb, rows=rows, out=out, inputs=inputs, outputs=outputs)


def _best(network: Network, problem: LipSDP, proposal: Proposal, i: int, norm: tuple[float, float]) -> tuple[float, Part]:
    """The part's evidence with the least value that the checker proves: the multipliers as they are, or pulled inside.

    Raises:
        NotCertified: none proves anything.
    """
    program = problem.program
    smallest = torch.finfo(torch.float64).tiny
    t = torch.where(proposal.t.isfinite(), proposal.t.to(torch.float64), smallest).clamp_min(smallest)
    reason: Exception | None = None
    for pull in _PULLS:
        try:
            inside = t if pull is None else program.interior(t, margin=pull)[0]
            schur = program.eliminate(lambda k, _, inside=inside: inside[program.slices[k]]).schur
            if schur is None:
                raise SolverFailed("the output does not feel the input.")
        except SolverFailed as failure:
            reason = failure
            continue
        for slack in _SLACKS:
            try:
                part = _part(problem, inside, schur, proposal.weights, slack)
                return check_part(network, part, i, norm), part
            except (NotCertified, SolverFailed) as failure:
                reason = failure
    raise NotCertified(f"part {i}: {reason}")


def _part(problem: LipSDP, t: Tensor, schur: Tensor, weights: Tensor | None, slack: float) -> Part:
    """Evidence from multipliers inside the cone: the least rho, or the given weights times the least factor; and the slack."""
    if weights is None:
        rho = float(torch.linalg.eigvalsh(schur)[-1])
        if not (math.isfinite(rho) and rho > 0):
            raise SolverFailed(f"the multipliers give rho = {rho:g}.")
        rho *= 1 + slack
        return Part(problem.to_network(t, rho), rho)
    own = torch.where(weights.isfinite(), weights, torch.zeros_like(weights))
    own = own.clamp_min(_LEAST * float(own.clamp_min(0).mean()) + torch.finfo(torch.float64).tiny)
    root = own.rsqrt()
    factor = float(torch.linalg.eigvalsh(root[:, None] * schur * root)[-1])
    if not (math.isfinite(factor) and factor > 0):
        raise SolverFailed(f"the weights need a factor {factor:g}.")
    return Part(problem.to_network(t, 1.0), 1.0, (1 + slack) * factor * own)


def _complete(found: dict[int, tuple[float, Part]], count: int) -> WeightedMultipliers:
    """All parts; one that does nothing takes the evidence of the smallest other one."""
    if not found:
        raise SolverFailed("no output feels any input.")
    spare = min(found.values(), key=lambda pair: pair[0])[1]
    return WeightedMultipliers(tuple(found[i][1] if i in found else spare for i in range(count)))
