"""Which LipSDP a network gets where none is asked for: one multiplier a neuron, one a channel, or none, by cost."""

from __future__ import annotations

import math

from lipguard.bounds.channel import check_memory
from lipguard.bounds.semidefinite import MEMORY, footprint
from lipguard.bounds.weighted import cubes
from lipguard.errors import UnsupportedQuery
from lipguard.network import Affine, Conv, Network
from lipguard.programs.torus import Torus
from lipguard.verify.rewriting import neurons_only

_QUICK = 5e10
"""Sum of the cubes of a program's fronts up to which one multiplier a neuron is affordable beside channels: 2352 convolutional
neurons, 2.6e10, take 4 s."""

_QUICK_WEIGHTED = 1e10
"""Likewise the cubes of weighted programs: some seconds."""


def default_method(network: Network, norm: tuple[float, float]) -> str:
    """The tightest method whose cost is reasonable.

    For the 2-norm LipSDP with one multiplier a neuron; where that takes too long, and the network is convolutional, with
    one a channel. In other norms the weighted programs where they take seconds, else the product of the layers' norms.
    """
    if norm != (2.0, 2.0):
        return "lipsdp-neuron" if cubes(network, norm) <= _QUICK_WEIGHTED else "spectral"
    size = footprint(network)
    if size.needed <= MEMORY and size.cubes <= _QUICK:
        return "lipsdp-neuron"
    if elimination(network) < math.inf:
        return "lipsdp-channel"
    return "lipsdp-neuron" if size.needed <= MEMORY else "spectral"


def elimination(network: Network) -> float:
    """Real multiplications of one elimination over the frequencies of a convolutional network's torus.

    Infinite where it has none, or one beyond the memory allowed.
    """
    if not any(isinstance(node, Affine) and isinstance(node.operator, Conv) for node in network.nodes):
        return math.inf
    try:
        torus = Torus(neurons_only(network))
        check_memory(torus)
    except UnsupportedQuery:
        return math.inf
    return sum(4.0 * len(torus.levels[layer.level].counts) * (2 * layer.size) ** 3 for layer in torus.layers)
