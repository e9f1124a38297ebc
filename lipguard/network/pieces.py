"""A network as a composition of consecutive networks, cut where one value separates all that lies before from all behind."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lipguard.network import Input, Network


def separators(network: Network) -> tuple[int, ...]:
    """Nodes through which everything behind them sees everything before them, the input and the output left out."""
    earliest = [min(node.sources, default=0) for node in network.nodes]
    found, least = [], len(network.nodes)
    for i in range(len(network.nodes) - 2, 0, -1):
        least = min(least, earliest[i + 1])
        if least >= i:
            found.append(i)
    return tuple(reversed(found))


def pieces(network: Network, cuts: Sequence[int]) -> tuple[Network, ...]:
    """The networks between the cuts: their composition is the network.

    Raises:
        ValueError: the cuts do not ascend, or one of them separates nothing.
    """
    allowed = set(separators(network))
    if list(cuts) != sorted(set(cuts)) or not allowed.issuperset(cuts):
        raise ValueError(f"the nodes {tuple(cuts)} do not cut this network: {tuple(sorted(allowed))} do.")
    ends = [0, *cuts, len(network.nodes) - 1]
    found = []
    for start, stop in itertools.pairwise(ends):
        first = network.nodes[0] if start == 0 else Input(network.sizes[start])
        found.append(
            Network((first, *(node.moved(lambda s, start=start: s - start) for node in network.nodes[start + 1 : stop + 1])))
        )
    return tuple(found)
