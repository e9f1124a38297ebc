"""What a bound costs and whether it fits, from the layers' sizes alone; and the method chosen by it where none is asked for."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

from lipguard.errors import UnsupportedQuery
from lipguard.network import Conv, Network
from lipguard.programs.elimination import fill
from lipguard.programs.rewriting import slope_restricted
from lipguard.programs.torus import Torus
from lipguard.verify.lmi.weighted import NORMS, parts_of
from lipguard.verify.norms.factors import LARGEST_UNROLLED
from lipguard.verify.rewriting import neurons_only

MEMORY = 8e9
"""Bytes that the blocks of a program and of its proof may take."""

MEMORY_SEARCH = 6e9
"""Bytes that a search over frequencies may hold."""


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
        own = position.get(i, -1 if not node.sources else None)
        reached = frozenset[int]().union(*(sources[s] for s in node.sources))
        sources.append(reached if own is None else frozenset({own}))
    rows = [frozenset[int]().union(*(sources[s] for s in network.nodes[i].sources)) for i in network.activations]
    # An input of more entries than the neurons that see it is reduced to as many.
    size[-1] = min(size[-1], sum(size[k] for k, row in enumerate(rows) if -1 in row) + network.outputs)
    shapes, pairs = fill(rows, sources[-1])
    weights = sum(size[k] * size[j] for k, row in enumerate(rows) for j in row)
    fronts = [size[k] + sum(size[j] for j in front) for k, front in shapes]
    widest = max(fronts, default=0)
    # Blocks as captured, as program, with radii; the factors and adjoints of the fronts; four copies of the widest.
    needed = 8.0 * (3 * weights + 2 * sum(size[i] * size[j] for i, j in pairs) + 4 * widest**2)
    return Footprint(needed, widest, float(sum(n**3 for n in fronts)))


def check_footprint(network: Network, what: str) -> None:
    """Refuse one multiplier a neuron where the check would take too much memory.

    Raises:
        UnsupportedQuery: it would; the message says by how much.
    """
    size = footprint(network)
    if size.needed > MEMORY:
        raise UnsupportedQuery(
            f"{what}: one multiplier a neuron takes about {size.needed / 1e9:.0f} GB for {slope_restricted(network).neurons} "
            f"neurons, {size.widest} of them and of the inputs in one front; {MEMORY / 1e9:.0f} GB are allowed. Use "
            "method='lipsdp-channel', or bound a submodule."
        )


def weighted_order(network: Network, norm: tuple[float, float]) -> int:
    """Order of the matrix inequality of one weighted program."""
    channels = network.inputs if norm[0] == math.inf else network.outputs if norm[1] == 1 else 1
    return slope_restricted(network).neurons + channels


def weighted_cubes(network: Network, norm: tuple[float, float]) -> float:
    """Cubes of the order, times the programs: 784-100-10 from inf to inf, 7e9, takes 4 s. Infinite where none are known."""
    return parts_of(network, norm) * float(weighted_order(network, norm)) ** 3 if norm in NORMS else math.inf


def elimination_work(network: Network) -> float:
    """Real multiplications of one elimination over the frequencies of a convolutional network's torus.

    Infinite where it has none, or one beyond the memory allowed.
    """
    if not convolutions(network):
        return math.inf
    try:
        torus = Torus(neurons_only(network))
        check_search_memory(torus)
    except UnsupportedQuery:
        return math.inf
    return sum(4.0 * len(torus.levels[layer.level].counts) * (2 * layer.size) ** 3 for layer in torus.layers)


def check_search_memory(torus: Torus) -> None:
    """Refuse a search over frequencies that would hold too much.

    Raises:
        UnsupportedQuery: it would; the message names the widest layer.
    """
    # Pivot and factor, and the blocks to the next layer or two, of 16 bytes a number.
    cells = 0.0
    for layer, following in pairwise((*torus.layers, torus.layers[-1])):
        finest = min(layer.level, following.level)
        cells += 3 * len(torus.levels[layer.level].counts) * layer.size**2
        cells += 4 * len(torus.levels[finest].counts) * layer.size * following.size
    needed = 16 * cells
    if needed > MEMORY_SEARCH:
        worst = max(torus.layers, key=lambda layer: layer.size)
        name = torus.network.nodes[worst.node].name or f"node {worst.node}"
        raise UnsupportedQuery(
            f"lipsdp-channel would hold about {needed / 1e9:.0f} GB: {name} has {worst.size} components at one frequency. Bound "
            "submodules (the product of their bounds bounds the whole), or use method='spectral'."
        )


def convolutions(network: Network) -> list[Conv]:
    """The convolutions of a network."""
    return [kernel for node in network.nodes if node.map is not None and (kernel := node.map.convolution) is not None]


def pass_work(network: Network) -> int:
    """Multiplications of the affine maps of one sample's pass."""
    return sum(node.map.multiplications for node in network.nodes if node.map is not None)


def norm_work(conv: Conv) -> float:
    """Multiplications to find and prove a convolution's norm, roughly: of its matrix, or of its frequencies' symbols."""
    few, many = sorted(conv.shape)
    if few * many <= LARGEST_UNROLLED:
        return 4.0 * few * few * many
    few, many = sorted(n // conv.groups for n in conv.channels)
    return (
        32.0 * math.prod(n + k for n, k in zip(conv.large, conv.weight.shape[2:], strict=True)) * few * few * many * conv.groups
    )
