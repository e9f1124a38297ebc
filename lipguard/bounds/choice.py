"""The method that is taken where none is asked for: for one bound, and for measurements within a training."""

from __future__ import annotations

import math

from lipguard.bounds.cost import MEMORY, convolutions, elimination_work, footprint, norm_work, weighted_cubes
from lipguard.network import Network
from lipguard.programs.rewriting import slope_restricted

_QUICK = 5e10
"""Sum of the cubes of a program's fronts up to which one multiplier a neuron is affordable beside channels: 2352 convolutional
neurons, 2.6e10, take 4 s."""

_QUICK_WEIGHTED = 1e10
"""Likewise the cubes of weighted programs: some seconds."""

_LARGEST_CONVOLUTIONAL, _LARGEST_MEASURED = 1000, 4000
"""Neurons up to which the dense semidefinite program is refined within a second or so: of convolutions, whose matrices are
large beside their weights, and of matrices."""

_LARGEST_WEIGHTED = 3e8
"""Cubes of weighted programs up to which other norms are measured by them: a second or so."""

_LARGEST_ELIMINATION = 4e9
"""Multiplications of one elimination over all frequencies up to which channels are measured: some tenths of a second, and
as much again for the proof."""

_NORM_WORK = 2e11
"""Multiplications for norms of convolutions beyond which the Toeplitz bound is taken: about ten seconds."""


def default_method(network: Network, norm: tuple[float, float]) -> str:
    """The tightest method whose cost is reasonable.

    For the 2-norm LipSDP with one multiplier a neuron; where that takes too long, and the network is convolutional, with
    one a channel. In other norms the weighted programs where they take seconds, else the product of the layers' norms.
    """
    if norm != (2.0, 2.0):
        return "lipsdp-neuron" if weighted_cubes(network, norm) <= _QUICK_WEIGHTED else "spectral"
    size = footprint(network)
    if size.needed <= MEMORY and size.cubes <= _QUICK:
        return "lipsdp-neuron"
    if elimination_work(network) < math.inf:
        return "lipsdp-channel"
    return "lipsdp-neuron" if size.needed <= MEMORY else "spectral"


def affordable(network: Network, norm: tuple[float, float] = (2.0, 2.0)) -> str:
    """The method that measures a network between two epochs: the tightest of its cost.

    The same for all networks of one structure, so that a training is measured by one method.
    """
    if norm != (2.0, 2.0):
        return "lipsdp-neuron" if weighted_cubes(network, norm) <= _LARGEST_WEIGHTED else "spectral"
    found = convolutions(network)
    if slope_restricted(network).neurons <= (_LARGEST_CONVOLUTIONAL if found else _LARGEST_MEASURED):
        return "lipsdp-neuron"
    if found and elimination_work(network) <= _LARGEST_ELIMINATION:
        return "lipsdp-channel"
    return "spectral" if sum(map(norm_work, found)) <= _NORM_WORK else "toeplitz"
