"""The nodes a trace emitted, without those that do not reach the output; diagonal maps and moves are folded where they can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from lipguard.network import Affine, Network, Node
from lipguard.network.operators import Conv, Dense, Diagonal, Index


def simplify(nodes: Sequence[Node], output: int) -> Network:
    """The network of the nodes that `output` needs.

    A diagonal map (BatchNorm, a scaling, an added constant) whose source is an affine map that nothing else reads is
    folded into it, if that is a matrix, another diagonal, or a convolution and the diagonal has one factor a channel. Two
    moves of entries behind each other become one.
    """
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
        if isinstance(node, Affine) and readers[node.source] == 1:
            source = nodes[node.source]
            before = kept[place[node.source]]
            if isinstance(source, Affine) and isinstance(before, Affine):
                folded = _folded(before, node, node.operator) if isinstance(node.operator, Diagonal) else _joined(before, node)
                if folded is not None:
                    kept[place[node.source]] = folded
                    place[i] = place[node.source]
                    continue
        place[i] = len(kept)
        kept.append(node.moved(place.__getitem__))
    return Network(tuple(kept))


def _folded(first: Affine, second: Affine, diagonal: Diagonal) -> Affine | None:
    # s (W x + b) + c = (s W) x + (s b + c)
    operator = first.operator
    if isinstance(operator, Diagonal):
        operator = Diagonal(diagonal.scale * operator.scale, operator.size)
    elif diagonal.scalar() != 1.0:
        if isinstance(operator, Dense):
            scale = diagonal.scale if diagonal.scale.ndim == 0 else diagonal.scale[:, None]
            operator = Dense(scale * operator.weight)
        else:
            operator = operator.scaled(diagonal.scale) if isinstance(operator, Conv) else None
    if operator is None:
        return None
    bias = second.bias
    if first.bias is not None:
        bias = diagonal.scale * first.bias if bias is None else diagonal.scale * first.bias + bias
    return Affine(first.source, operator, bias, first.name)


def _joined(first: Affine, second: Affine) -> Affine | None:
    inner, outer = first.operator, second.operator
    if not (isinstance(inner, Index) and isinstance(outer, Index)) or inner.transposed or outer.transposed:
        return None
    # (x[i] + b)[j] + c = x[i[j]] + (b[j] + c), where the index -1 reads a zero
    index = torch.cat([inner.index, inner.index.new_full((1,), -1)])[outer.index]
    bias = second.bias
    if first.bias is not None:
        moved = outer(first.bias)
        bias = moved if bias is None else moved + bias
    if len(index) == inner.size and torch.equal(index, torch.arange(inner.size, device=index.device)):
        one = torch.ones((), dtype=torch.float64, device=index.device)
        return Affine(first.source, Diagonal(one, inner.size), bias, first.name)
    return Affine(first.source, Index(index, inner.size), bias, first.name)
