"""Check of `PairBound`: constants of differences of two outputs on all of R^d, many of one network at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from lipguard.certificate import Factors, LocalMultipliers, Multipliers, PairBound
from lipguard.errors import NotCertified
from lipguard.network import Network
from lipguard.rounding import norm_up, sqrt_up
from lipguard.verify.domain.local import least_bounds
from lipguard.verify.domain.localized import Localized, localized
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.multipliers import check_multipliers
from lipguard.verify.norms.factors import check_factors
from lipguard.verify.norms.matrix_norm import times
from lipguard.verify.rewriting import neurons_only

TWO = (2.0, 2.0)


def check_pairs(network: Network, bounds: Sequence[PairBound]) -> list[float]:
    """Upper bounds of the constants, at or just above what the evidence proposes; nan where it proves nothing.

    Args:
        network: as it was read.
        bounds: evidence; pieces that are the same object are proved once.
    """
    known: dict[int, float] = {}
    neurons = neurons_only(network)
    programs = {id(b): b for b in bounds if _is_program(neurons, b)}
    if programs:
        known |= zip(programs, _by_slopes(neurons, list(programs.values())), strict=True)
    norms: dict[int, float] = {}
    for bound in bounds:
        if id(bound) not in known:
            try:
                known[id(bound)] = _one(network, neurons, bound, norms)
            except NotCertified:
                known[id(bound)] = math.nan
    return [known[id(bound)] for bound in bounds]


def _is_program(neurons: Network, bound: PairBound) -> bool:
    return (
        isinstance(bound.evidence, LocalMultipliers)
        and _is_pair(bound.pair, neurons.outputs)
        and (bound.evidence.t.numel() == neurons.neurons)
    )


def _is_pair(pair: tuple[int, int] | None, outputs: int) -> TypeGuard[tuple[int, int]]:
    return pair is not None and len({*pair}) == 2 and {*pair} <= {*range(outputs)}


def _one(network: Network, neurons: Network, bound: PairBound, norms: dict[int, float]) -> float:
    """The constant by `Multipliers` or `Factors`; `norms` holds products that were proved already, by their evidence."""
    evidence, pair = bound.evidence, bound.pair
    if pair is None and isinstance(evidence, Multipliers):
        return times(check_multipliers(neurons, evidence, TWO), sqrt_up(2.0))  # ||e_i - e_j|| = sqrt 2
    if not (isinstance(evidence, Multipliers | Factors) and _is_pair(pair, network.outputs)):
        raise NotCertified(f"{type(evidence).__name__} is not evidence of the outputs {pair}.")
    if isinstance(evidence, Multipliers):
        row = rows_of(torch.tensor([pair], device=network.device), network)
        return check_multipliers(neurons.with_outputs(row), evidence, TWO)
    before, row = _behind(network, pair)
    if id(evidence) not in norms:
        norms[id(evidence)] = check_factors(before, evidence, TWO)
    return times(norms[id(evidence)], row)


def _behind(network: Network, pair: tuple[int, int]) -> tuple[Network, float]:
    """The network before its last affine node, and a bound of the norm of w_i - w_j, the difference of that node's rows."""
    last = network.nodes[-1]
    row = rows_of(torch.tensor([pair], device=network.device), network)
    size = row.abs()
    if last.map is not None:
        network = Network(network.nodes[: last.sources[0] + 1])
        size = Enclosed(row).through(last.map.transpose()).magnitude()
    return network, norm_up(size.flatten(), 2)


def _by_slopes(neurons: Network, bounds: list[PairBound]) -> list[float]:
    evidence = [bound.evidence for bound in bounds if isinstance(bound.evidence, LocalMultipliers)]
    maps = pair_maps(neurons, torch.tensor([bound.pair for bound in bounds], device=neurons.device))
    t = torch.stack([item.t.detach().to(neurons.device, torch.float64).flatten() for item in evidence])
    rho = torch.tensor([item.rho for item in evidence], dtype=torch.float64, device=neurons.device)
    return least_bounds(maps, t.gather(1, maps.index), rho)


def pair_maps(neurons: Network, pairs: Tensor) -> Localized:
    """The maps of the differences (P, 2) with the slopes that the neurons have on all of R^d."""
    one = torch.zeros(len(pairs), dtype=torch.long, device=neurons.device)
    return localized(neurons, None).pick(one).functionals(rows_of(pairs, neurons)[:, None])


def rows_of(pairs: Tensor, network: Network) -> Tensor:
    """The rows e_i - e_j of pairs (P, 2), (P, m)."""
    rows = torch.zeros(len(pairs), network.outputs, dtype=torch.float64, device=pairs.device)
    return rows.scatter_add(1, pairs, rows.new_tensor([1.0, -1.0]).expand(len(pairs), -1))
