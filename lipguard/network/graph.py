"""The edges of a network: what a node reads, and a node that reads elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lipguard.network import Input, Node, Sum


def sources(node: Node) -> tuple[int, ...]:
    """The nodes that a node reads."""
    if isinstance(node, Input):
        return ()
    return node.sources if isinstance(node, Sum) else (node.source,)


def moved(node: Node, place: Callable[[int], int]) -> Node:
    """The node with every source i replaced by place(i)."""
    if isinstance(node, Input):
        return node
    if isinstance(node, Sum):
        return replace(node, sources=tuple(map(place, node.sources)))
    target = place(node.source)
    return node if target == node.source else replace(node, source=target)
