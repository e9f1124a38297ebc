"""Checks of local evidence: `LocalMultipliers` and `Slopes`, many domains of one network at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lipguard.certificate import Domain, LocalMultipliers, Slopes
from lipguard.errors import NotCertified
from lipguard.network import Network
from lipguard.rounding import sqrt_up, up
from lipguard.verify.domain.jacobians import jacobian_bounds
from lipguard.verify.domain.localized import Localized, chunk_size, localize, proves
from lipguard.verify.domain.ranges import Regions, propagate
from lipguard.verify.rewriting import neurons_only

_LARGEST_INFLATION = 1e-2
"""Multipliers that prove nothing within this of the proposed squared bound are refused."""

_MASS = 2.0**40
"""Magnitudes that cancelled are of this order beside the radius that they leave."""


def check_local_multipliers(
    network: Network, evidence: Sequence[LocalMultipliers], domains: Sequence[Domain], norm: tuple[float, float]
) -> list[float]:
    """The smallest provable bounds at or just above the proposed ones, one for each domain; nan where nothing is proved.

    Raises:
        NotCertified: the norm is not (2, 2), or the number of multipliers is not the number of neurons.
    """
    if norm != (2.0, 2.0):
        raise NotCertified(f"local multipliers prove bounds from 2-norm to 2-norm, not {norm}.")
    network = of_neurons(network)
    for item in evidence:
        if item.t.numel() != network.neurons:
            raise NotCertified(f"{item.t.numel()} local multipliers are given for {network.neurons} neurons.")
    t = torch.stack([item.t.detach().to(network.device, torch.float64).flatten() for item in evidence])
    rho = torch.tensor([item.rho for item in evidence], dtype=torch.float64, device=network.device)

    def check(chunk: slice) -> list[float]:
        maps = localize(network, domains[chunk])
        return least_bounds(maps, t[chunk].gather(1, maps.index), rho[chunk])

    return _chunks(network, len(domains), check)


def check_slopes(
    network: Network, evidence: Sequence[Slopes], domains: Sequence[Domain], norm: tuple[float, float]
) -> list[float]:
    """Upper bounds of the constants by the slope intervals alone, one for each domain; the evidence says nothing more.

    Raises:
        NotCertified: the network has an implicit layer.
    """
    del evidence
    network = of_neurons(network)

    def check(chunk: slice) -> list[float]:
        propagation = propagate(network, Regions.of(domains[chunk], network.inputs, network.device))
        return jacobian_bounds(propagation, norm).tolist()

    return _chunks(network, len(domains), check)


def of_neurons(network: Network) -> Network:
    """The network with every coupled node made of neurons, whose pre-activations have ranges on a domain."""
    if any(node.loop is not None for node in network.nodes):
        raise NotCertified("the ranges of an implicit layer on a domain are not known: its bounds are global ones.")
    return neurons_only(network)


def least_bounds(maps: Localized, t: Tensor, rho: Tensor) -> list[float]:
    """sqrt of the smallest squared bound at or just above each rho that is proved; nan where there is none."""
    # A constant map is 0; where everything cancels, rounding leaves a bound in proportion to what it may have left.
    floor = (maps.y.abs() + _MASS * maps.outer.spread).square().sum((1, 2))
    values = [0.0 if zero else math.nan for zero in (floor == 0).tolist()]
    left = (floor > 0).nonzero()[:, 0]
    rho = torch.where(rho.isfinite(), rho, torch.zeros_like(rho)).clamp_min(0)
    inflation = 1e-13
    while len(left) and inflation < _LARGEST_INFLATION:
        trial = rho[left] + inflation * (rho[left] + floor[left])
        proved = proves(maps.pick(left), t[left][:, : _width(maps, left)], trial)
        for i, value in zip(left[proved].tolist(), trial[proved].tolist(), strict=True):
            values[i] = sqrt_up(up(value))
        left = left[~proved]
        inflation *= 8
    return values


def _width(maps: Localized, which: Tensor) -> int:
    return int(maps.present[which].sum(1).max()) if maps.index.shape[1] else 0


def _chunks(network: Network, count: int, check: Callable[[slice], list[float]]) -> list[float]:
    step = chunk_size(network)
    return [value for start in range(0, count, step) for value in check(slice(start, min(start + step, count)))]
