"""The images behind the vectors: which nodes hold channels of pixels, and linear maps seen as convolutions of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from lipguard.network import Conv, Network, Operator
from lipguard.network.operators import Shape


def shapes(network: Network) -> tuple[Shape | None, ...]:
    """The image that every node's value is, None where no convolution says: a vector.

    Convolutions of the network's largest number of dimensions name their two sides; what does not change places takes them
    further, forwards and backwards, until nothing more is learnt. Where two disagree, the earlier node's word stands.
    """
    found: list[Shape | None] = [None] * len(network.nodes)
    sizes = network.sizes
    kernels = [conv for node in network.nodes if node.map is not None and (conv := node.map.convolution) is not None]
    dims = max((len(conv.large) for conv in kernels), default=0)

    def learn(i: int, shape: Shape | None) -> bool:
        if shape is None or found[i] is not None or math.prod(shape) != sizes[i]:
            return False
        found[i] = shape
        return True

    def settle() -> None:
        changed = True
        while changed:
            changed = sweep()

    def moved(i: int, source: int, operator: Operator) -> bool:
        """What one side of a map that moves places says of the other: the same window, with other channels."""
        changed = False
        for known, other in ((source, i), (i, source)):
            shape = found[known]
            if shape is not None and found[other] is None and sizes[other] % math.prod(shape[1:]) == 0:
                guess = (sizes[other] // math.prod(shape[1:]), *shape[1:])
                pair = (shape, guess) if known == source else (guess, shape)
                if operator.as_convolution(*pair) is not None:
                    changed |= learn(other, guess)
        return changed

    def sweep() -> bool:
        changed = False
        for i, node in enumerate(network.nodes):
            conv = None if node.map is None else node.map.convolution
            if conv is not None:
                before, after = conv.sides
                source = node.sources[0]
                if len(conv.large) == dims and found[source] in (None, before):
                    changed |= learn(source, before) | learn(i, after)
            elif node.in_place:
                for s in node.sources:
                    changed |= learn(i, found[s]) | learn(s, found[i])
                for s in node.sources:
                    changed |= learn(s, found[i])
            elif node.map is not None:
                changed |= moved(i, node.sources[0], node.map)
        return changed

    settle()
    # What is left: every second or third place of an image, as the windows of a pool are.
    for i, node in enumerate(network.nodes):
        if found[i] is None and node.map is not None and (shape := found[node.sources[0]]) is not None:
            for guess in _thinned(shape, sizes[i]):
                if node.map.as_convolution(shape, guess) is not None:
                    learn(i, guess)
                    settle()
                    break
    return tuple(found)


def _thinned(shape: Shape, size: int) -> Iterator[Shape]:
    """Images of a size with every second or third place along some axes of an image."""
    for steps in product((1, 2, 3), repeat=len(shape) - 1):
        window = tuple(n // s for n, s in zip(shape[1:], steps, strict=True))
        if all(window) and size % math.prod(window) == 0:
            yield (size // math.prod(window), *window)


def as_convolution(operator: Operator, before: Shape, after: Shape) -> Conv | None:
    """The operator as a convolution of images of these shapes, or None; exact.

    A diagonal map with one factor a channel, and an index that moves all places alike (whole channels chosen, joined or
    padded; every second place; a zero border; nearest upsampling; pixel shuffle), are convolutions too.
    """
    return operator.as_convolution(before, after)
