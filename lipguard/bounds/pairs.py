"""Upper bounds of |f_i - f_j|'s constant on all of R^d, for many pairs of classes at once."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from lipguard.bounds.local import BATCHED, solve
from lipguard.bounds.semidefinite import Semidefinite
from lipguard.bounds.spectral import Spectral
from lipguard.certificate import Query
from lipguard.network import Affine, Network
from lipguard.programs.rewriting import slope_restricted
from lipguard.rounding import gamma
from lipguard.verify.domain.local import least_bounds
from lipguard.verify.domain.localized import localized

_MOST = 256
"""Pairs up to which each has its own semidefinite program; beyond, sqrt(2) times the constant of all outputs bounds each."""


def pair_bounds(network: Network, pairs: Tensor, method: str, deadline: float = math.inf) -> Tensor:
    """Verified 2-norm bounds of the functionals f_i - f_j, each at most sqrt(2) times that of all outputs.

    Args:
        network: a network with m outputs.
        pairs: (P, 2), pairs (i, j) of classes.
        method: "global" for LipSDP, "spectral" for the product of the norms.
        deadline: `time.perf_counter()` value from which programs are left as far as they came.
    Returns:
        (P,) float64.
    """
    if not len(pairs):
        return torch.zeros(0, dtype=torch.float64, device=network.device)
    if method == "spectral":
        return _products(network, pairs)
    if len(pairs) > _MOST:
        whole, _ = Semidefinite(tol=1e-4, time_limit=_left(deadline))(network, Query())
        return torch.full((len(pairs),), whole.value * math.sqrt(2) * (1 + 1e-15), dtype=torch.float64, device=network.device)
    rows = functionals(pairs, network.outputs)
    if slope_restricted(network).neurons <= BATCHED:
        maps = localized(network, None)
        maps = maps.pick(torch.zeros(len(pairs), dtype=torch.long, device=network.device)).functionals(rows[:, None])
        values = least_bounds(maps, *solve(maps, tol=1e-4, deadline=deadline))
    else:
        values = [math.nan] * len(pairs)
    for k, value in enumerate(values):
        if not math.isfinite(value):  # too large for the batch, or not provable as it came out
            certificate, _ = Semidefinite(tol=1e-4, time_limit=_left(deadline))(network.with_outputs(rows[k : k + 1]), Query())
            values[k] = certificate.value
    return torch.tensor(values, dtype=torch.float64, device=network.device)


def functionals(pairs: Tensor, outputs: int) -> Tensor:
    """The rows e_i - e_j, (P, m)."""
    rows = torch.zeros(len(pairs), outputs, dtype=torch.float64, device=pairs.device)
    return rows.scatter_add(1, pairs, rows.new_tensor([1.0, -1.0]).expand(len(pairs), -1))


def _products(network: Network, pairs: Tensor) -> Tensor:
    """The product of the norms before the last affine map, times the norm of w_i - w_j, its rows' difference."""
    last = network.nodes[-1]
    rows = functionals(pairs, network.outputs)
    before = network
    if isinstance(last, Affine):
        before = Network(network.nodes[: last.source + 1])
        rows = last.operator.transpose()(rows)
    certificate, _ = Spectral()(before, Query())
    # Each difference rounds once; the norm's sums are counted with it.
    return certificate.value * torch.linalg.vector_norm(rows, dim=1) * (1 + 4 * gamma(rows.shape[1] + network.outputs + 16))


def _left(deadline: float) -> float | None:
    return None if deadline == math.inf else max(0.0, deadline - time.perf_counter())
