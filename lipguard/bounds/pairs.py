"""Constants of f_i - f_j on all of R^d, for many pairs of classes at once: solvers propose, `verify.domain.pairs` proves."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from lipguard.bounds.local import BATCHED, solve
from lipguard.bounds.semidefinite import Semidefinite
from lipguard.bounds.spectral import layer_norm
from lipguard.certificate import Factors, LocalMultipliers, Multipliers, PairBound, Query
from lipguard.network import Network
from lipguard.programs.rewriting import slope_restricted
from lipguard.verify.domain.pairs import check_pairs, pair_maps, rows_of
from lipguard.verify.rewriting import neurons_only

_MOST = 256
"""Pairs up to which each has its own semidefinite program; beyond, sqrt(2) times the constant of all outputs bounds each."""


def pair_bounds(network: Network, pairs: Tensor, method: str, deadline: float = math.inf) -> tuple[list[PairBound], Tensor]:
    """Evidence of the 2-norm constants of f_i - f_j, and the bounds that it proves, (P,).

    Args:
        network: a network with m outputs.
        pairs: (P, 2), pairs (i, j) of classes.
        method: "global" for LipSDP, "spectral" for the product of the norms.
        deadline: `time.perf_counter()` value from which programs are left as far as they came.
    """
    if method == "spectral":
        evidence = _products(network, pairs)
    elif len(pairs) > _MOST:
        evidence = _whole(network, pairs, deadline)
    else:
        evidence = _programs(network, pairs, deadline)
    values = check_pairs(network, evidence)
    for k, value in enumerate(values):
        if math.isnan(value):  # too large for the batch, or not provable as it came out
            evidence[k] = _program(network, pairs[k : k + 1], deadline)
            values[k] = check_pairs(network, evidence[k : k + 1])[0]
    return evidence, torch.tensor(values, dtype=torch.float64, device=network.device)


def _products(network: Network, pairs: Tensor) -> list[PairBound]:
    """The product of the norms before the last affine map, times the norm of the difference of its rows."""
    last = network.nodes[-1]
    before = network.nodes if last.map is None else network.nodes[: last.sources[0] + 1]
    evidence = Factors({i: layer_norm(node.map, 2.0) for i, node in enumerate(before) if node.map is not None})
    return [PairBound((i, j), evidence) for i, j in pairs.tolist()]


def _programs(network: Network, pairs: Tensor, deadline: float) -> list[PairBound]:
    """All pairs' programs as one batch, where the network is small enough for it."""
    neurons = neurons_only(network)
    if slope_restricted(neurons).neurons > BATCHED:
        return [_program(network, pair[None], deadline) for pair in pairs]
    maps = pair_maps(neurons, pairs)
    t, rho = solve(maps, tol=1e-4, deadline=deadline)
    full = torch.ones(len(pairs), neurons.neurons, dtype=torch.float64, device=t.device).scatter(1, maps.index, t)
    own = zip(pairs.tolist(), full, rho.tolist(), strict=True)
    return [PairBound((i, j), LocalMultipliers(multipliers, value)) for (i, j), multipliers, value in own]


def _program(network: Network, pair: Tensor, deadline: float) -> PairBound:
    """The program of one pair; the product of the norms where it proves no less."""
    own = neurons_only(network).with_outputs(rows_of(pair, network))
    certificate, _ = Semidefinite(tol=1e-4, time_limit=_left(deadline))(own, Query())
    if not isinstance(certificate.evidence, Multipliers):
        return _products(network, pair)[0]
    return PairBound((int(pair[0, 0]), int(pair[0, 1])), certificate.evidence)


def _whole(network: Network, pairs: Tensor, deadline: float) -> list[PairBound]:
    """One program of all outputs for many pairs."""
    certificate, _ = Semidefinite(tol=1e-4, time_limit=_left(deadline))(neurons_only(network), Query())
    if not isinstance(certificate.evidence, Multipliers):
        return _products(network, pairs)
    return [PairBound(None, certificate.evidence)] * len(pairs)


def _left(deadline: float) -> float | None:
    return None if deadline == math.inf else max(0.0, deadline - time.perf_counter())
