"""Local bounds: LipSDP with the slopes that the neurons have on a domain, many domains at a time.

The checker's own maps (`verify.localized`) are the programs' data: a neuron that is off or linear on the whole domain is
no variable of them, which leaves small programs on small domains. The batched interior point method solves those of
similar size together; few large ones, a chosen solver, or one multiplier a layer go one by one through `lipsdp`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from lipguard.bounds.measuring import Settings
from lipguard.bounds.slopes import timed, unproved, without_ranges
from lipguard.bounds.solving import solved
from lipguard.certificate import Certificate, Domain, LocalMultipliers, Query, Slopes
from lipguard.errors import SolverFailed
from lipguard.network import Network
from lipguard.outward import show_upper
from lipguard.programs.feedback import Feedback
from lipguard.programs.lipsdp import LipSDP, lipsdp
from lipguard.programs.rewriting import elementwise, slope_restricted
from lipguard.solvers import batched
from lipguard.verify import verify_local
from lipguard.verify.domain.localized import Localized, chunk_size, localize

BATCHED = 400
"""Order of a program up to which the batched method is used: beyond, the structured one is faster, one by one."""

_ENTRIES = 500_000
"""Entries of the matrix inequalities that are solved at once: 4 MB for each of some twenty arrays, measured fastest."""

_LARGEST = 50_000_000
"""Entries of Q up to which a network is localised: 0.4 GB, for each of some six arrays."""

_MOSTLY_FREE = 0.5
"""Share of the slopes' widths from which the local program is about the global one, which is then solved as well."""


class SlopeRestricted(Settings, Protocol):
    """What is read of a semidefinite method here: its options, and the bound on all of R^d."""

    @property
    def time_limit(self) -> float | None: ...  # noqa: D102
    def __call__(self, network: Network, query: Query) -> tuple[Certificate, object]: ...  # noqa: D102


def local_bounds(network: Network, query: Query, domains: Sequence[Domain], method: SlopeRestricted) -> list[Certificate]:
    """Upper bounds by LipSDP with the slopes on each domain: one verified certificate for each, in their order.

    Args:
        network: the network.
        query: the norms, (2, 2).
        domains: what the slopes are known on.
        method: the options, and the bound on all of R^d, which none of the local ones exceeds.
    Raises:
        InvalidDomain: a domain does not fit.
    """
    if without_ranges(network):
        overall, _ = method(network, replace(query, domain=None))
        return [replace(overall, domain=domain) for domain in domains]
    began = time.perf_counter()
    deadline = math.inf if method.time_limit is None else began + method.time_limit
    proposed, share = _proposals(network, unproved(network, query, domains, method.name), method, deadline)
    found = _completed(network, query, proposed, verify_local(network, proposed), share, method)
    return timed(found, began)


def _proposals(
    network: Network, bare: list[Certificate], method: SlopeRestricted, deadline: float
) -> tuple[list[Certificate], float]:
    """Certificates with multipliers where a solver found some, and the widest slopes as a share of those on R^d."""
    network = elementwise(network)
    n = slope_restricted(network).neurons
    result, share = list(bare), 0.0
    if n * (n + network.inputs) > _LARGEST:
        note = f"{n} neurons and {network.inputs} inputs are too many for the local program"
        return [replace(one, note=note) for one in bare], 1.0
    step = chunk_size(network)
    alpha, beta = slope_restricted(network).slopes()
    everywhere = float((beta - alpha).sum())
    for start in range(0, len(bare), step):
        maps = localize(network, [c.domain for c in bare[start : start + step] if c.domain is not None])
        share = max(share, float(maps.width.sum(1).max()) / everywhere if everywhere > 0 else 0.0)
        t, rho, notes = _solve(maps, network, method, deadline)
        full = torch.ones(len(t), n, dtype=torch.float64, device=t.device)
        full.scatter_(1, torch.where(maps.present, maps.index, maps.index[:, :1]), torch.where(maps.present, t, t[:, :1]))
        for i, value in enumerate(rho.tolist()):
            evidence = LocalMultipliers(full[i].clone(), value)
            result[start + i] = replace(bare[start + i], evidence=evidence, value=math.sqrt(max(value, 0.0)), note=notes[i])
    return result, share


def _solve(maps: Localized, network: Network, method: SlopeRestricted, deadline: float) -> tuple[Tensor, Tensor, list[str]]:
    order = maps.index.shape[1] + min(maps.y.shape[1], network.inputs)
    if method.solver == "auto" and not method.tied and order <= BATCHED:
        t, rho = solve(maps, tol=method.tol, deadline=deadline)
        return t, rho, [""] * len(t)
    t, rho = torch.ones_like(maps.index, dtype=torch.float64), maps.y.new_zeros(len(maps.y))
    notes = []
    for i in range(len(t)):
        one = maps.pick(torch.tensor([i], device=t.device))
        here, note = _one(one, method, deadline)
        notes.append(note)
        t[i, : here[0].numel()], rho[i] = here
    return t, rho, notes


def _one(maps: Localized, method: SlopeRestricted, deadline: float) -> tuple[tuple[Tensor, float], str]:
    """Multipliers and squared bound of a single map by a registered solver."""
    problem = _program(maps, method.tied)
    program = problem.program
    if not program.sizes or not program.channels:
        return (maps.y.new_zeros(0), float(torch.linalg.matrix_norm(maps.y[0], 2)) ** 2), ""
    limit = None if deadline == math.inf else max(0.0, deadline - time.perf_counter())
    try:
        name, proposal = solved(method.solver, program, None, method.tol, limit)
    except SolverFailed as failure:
        return (maps.y.new_ones(maps.index.shape[1]), 0.0), f"{method.solver}: {failure}"
    t = proposal.t.to(maps.y).clamp_min(torch.finfo(torch.float64).tiny)
    s = program.eliminate(lambda k, _: t[program.slices[k]]).schur
    rho = proposal.rho if proposal.inside or s is None else float(torch.linalg.eigvalsh(s)[-1])
    note = "" if proposal.message in ("", "optimal") else f"{name}: {proposal.message}"
    # From the multipliers of (beta - alpha) u to those of u.
    return (problem.to_network(t, rho) * maps.width[0].square(), rho), note


def _completed(
    network: Network,
    query: Query,
    proposed: list[Certificate],
    found: list[Certificate | None],
    share: float,
    method: SlopeRestricted,
) -> list[Certificate | None]:
    """The bounds, with another in the place of those that are not proved or exceed the one on all of R^d."""
    missing = [i for i, certificate in enumerate(found) if certificate is None]
    for i, certificate in enumerate(found):
        if certificate is not None and isinstance(certificate.evidence, Slopes):
            found[i] = replace(certificate, method="spectral")
    others = verify_local(network, [replace(proposed[i], evidence=Slopes(), method="spectral") for i in missing])
    for i, other in zip(missing, others, strict=True):
        if other is not None:
            reason = proposed[i].note or "the multipliers are not provable"
            found[i] = replace(other, note=f"{reason}; the bound by slopes alone, {show_upper(other.value)}, stands")
    if share >= _MOSTLY_FREE or any(certificate is None for certificate in found):
        overall, _ = method(network, replace(query, domain=None))
        for i, certificate in enumerate(found):
            if certificate is None or certificate.value > overall.value:
                found[i] = replace(overall, domain=proposed[i].domain)
    return found


def solve(
    maps: Localized,
    tol: float = 1e-7,
    cutoff: Tensor | None = None,
    iterations: int = 60,
    deadline: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Multipliers (K, f) of the maps' programs, in the order of their places, and the squared bounds (K,) they give.

    Args:
        maps: K maps.
        tol: relative gap of the squared bounds.
        cutoff: squared bounds at which each program is done, (K,): also when it cannot reach it.
        iterations: at most.
        deadline: `time.perf_counter()` from which programs keep their starting multipliers.
    """
    count, f = maps.index.shape
    t = torch.ones(count, f, dtype=torch.float64, device=maps.y.device)
    rho = torch.zeros(count, dtype=torch.float64, device=maps.y.device)
    sizes = maps.present.sum(1)
    direct = (sizes == 0).nonzero()[:, 0]
    if len(direct):
        rho[direct] = torch.linalg.matrix_norm(maps.y[direct][:, :, f:], 2).square()
    queue = sizes.argsort()[len(direct) :]
    while len(queue):
        # As many as fit with the largest of them, so that little is padded.
        order = int(sizes[queue[-1]]) + min(maps.y.shape[1], maps.y.shape[2] - f)
        some = queue[-max(1, min(64, _ENTRIES // order**2)) :]
        queue = queue[: -len(some)]
        late = time.perf_counter() > deadline
        own = maps.pick(some)
        limit = None if cutoff is None else cutoff[some]
        t[some, : own.index.shape[1]], rho[some] = _batch(own, tol, limit, 0 if late else iterations)
    return t, rho


def _batch(maps: Localized, tol: float, cutoff: Tensor | None, iterations: int) -> tuple[Tensor, Tensor]:
    f = maps.index.shape[1]
    m, d = maps.y.shape[1], maps.y.shape[2] - f
    transposed = m < d
    if transposed:
        # Layer k of the network is layer L - 1 - k of the transposed one, whose multipliers are rho / t.
        q_t = torch.cat([maps.q[:, :, :f].mT, maps.y[:, :, :f].mT], 2)
        out = torch.cat([maps.q[:, :, f:].mT, maps.y[:, :, f:].mT], 2)
        flip = torch.arange(f - 1, -1, -1, device=out.device)
        order = torch.cat([flip, torch.arange(f, f + m, device=out.device)])
        out = out[:, :, order]
        batch = batched.Batch(q_t[:, flip][:, :, order], out.mT @ out, maps.present[:, flip])
        layers = (maps.layers.max() - maps.layers)[:, flip]
    else:
        batch, layers = batched.Batch(maps.q, maps.y.mT @ maps.y, maps.present), maps.layers
    t, rho = batched.layered(batch, layers)
    solved = batched.solve(batch, t, rho, math.nan if cutoff is None else cutoff, iterations, tol)
    t = (solved.rho[:, None] / solved.t).flip(1) if transposed else solved.t
    return torch.where(maps.present, t, torch.ones_like(t)), solved.rho


def _program(maps: Localized, tied: bool) -> LipSDP:
    """LipSDP of one map by layers; `tied`: one multiplier a layer, of the network's own neurons (beta - alpha) u."""
    layers = [int(k) for k in maps.layers[0].unique()]
    sizes = [int((maps.layers[0] == k).sum()) for k in layers]
    f = sum(sizes)
    width = maps.width[0]
    columns = torch.cat([width, width.new_ones(maps.q.shape[2] - f)])
    q, y = maps.q[0] / columns, maps.y[0] / columns
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    places = [slice(a, b) for a, b in itertools.pairwise(ends)]

    def blocks(rows: Tensor, until: int) -> dict[int, Tensor]:
        found = {-1: rows[:, f:]} if bool(rows[:, f:].any()) else {}
        return found | {k: rows[:, here] for k, here in enumerate(places[:until]) if bool(rows[:, here].any())}

    rows = tuple(blocks(q[here], k) for k, here in enumerate(places))
    feedback = Feedback(q.shape[1] - f, len(y), tuple(sizes), rows, blocks(y, len(places)), torch.zeros_like(width), width)
    return lipsdp(feedback, tied)
