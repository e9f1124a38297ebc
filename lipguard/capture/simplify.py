"""The nodes a trace emitted, without those that do not reach the output; diagonal maps and moves are folded where they can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lipguard.capture.constants import Constant
from lipguard.network import Affine, Network, Node


def simplify(nodes: Sequence[Node], output: int, fold: bool = True) -> Network:
    """The network of the nodes that `output` needs.

    A diagonal map (BatchNorm, a scaling, an added constant) whose source is an affine map that nothing else reads is
    folded into it, if that is a matrix, another diagonal, or a convolution and the diagonal has one factor a channel. Two
    moves of entries behind each other become one. What folding rounds goes into the radii of operator and bias; maps whose
    product would leave the range of float64 stay apart, until a later map brings it back (x * 1e-200 * 1e-200 * 1e200).

    Args:
        fold: else every node stays.
    """
    found = _kept(nodes, output, fold)
    while fold and len(found) < len(nodes):
        nodes, found = found, _kept(found, len(found) - 1, fold)
    return Network(tuple(found))


def _kept(nodes: Sequence[Node], output: int, fold: bool) -> list[Node]:
    needed = {output}
    for i in range(output, -1, -1):
        if i in needed:
            needed.update(nodes[i].sources)
    needed.add(0)
    readers = Counter(s for i in needed for s in nodes[i].sources)
    kept: list[Node] = []
    place: dict[int, int] = {}
    for i in sorted(needed):
        node = nodes[i]
        if fold and node.map is not None and readers[node.sources[0]] == 1:
            before = place[node.sources[0]]
            folded = _folded(kept[before], node)
            if folded is not None:
                kept[before] = folded
                place[i] = before
                continue
        place[i] = len(kept)
        kept.append(node.moved(place.__getitem__))
    return kept


def _folded(first: Node, second: Node) -> Affine | None:
    """Two affine maps as one, where the operators' composition is one operator no larger than they are."""
    if first.map is None or second.map is None:
        return None
    operator = second.map.after(first.map)
    if operator is None:
        return None
    # A (W x + b) + c = A W x + (A b + c)
    added = None if second.bias is None else Constant(second.bias, second.bias_radius)
    if first.bias is not None:
        moved = Constant(first.bias, first.bias_radius).through(second.map)
        added = moved if added is None else moved + added
    center, radius = (None, None) if added is None else (added.center, added.radius)
    return Affine(first.sources[0], operator, center, first.name, radius)
