"""The images behind the vectors: which nodes hold channels of pixels, and linear maps seen as convolutions of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from lipguard.network import Activation, Affine, Conv, Diagonal, Index, Network, Operator, Sum

Shape = tuple[int, ...]
"""(channels, *window): the entries of a value in row-major order."""


def shapes(network: Network) -> tuple[Shape | None, ...]:
    """The image that every node's value is, None where no convolution says: a vector.

    Convolutions of the network's largest number of dimensions name their two sides; what does not change places takes them
    further, forwards and backwards, until nothing more is learnt. Where two disagree, the earlier node's word stands.
    """
    found: list[Shape | None] = [None] * len(network.nodes)
    sizes = network.sizes
    dims = max(
        (len(n.operator.large) for n in network.nodes if isinstance(n, Affine) and isinstance(n.operator, Conv)), default=0
    )

    def learn(i: int, shape: Shape | None) -> bool:
        if shape is None or found[i] is not None or math.prod(shape) != sizes[i]:
            return False
        found[i] = shape
        return True

    def settle() -> None:
        changed = True
        while changed:
            changed = sweep()

    def sweep() -> bool:
        changed = False
        for i, node in enumerate(network.nodes):
            match node:
                case Affine(source=source, operator=Conv() as conv) if len(conv.large) == dims:
                    before, after = sides(conv)
                    if found[source] in (None, before):
                        changed |= learn(source, before) | learn(i, after)
                case Affine(source=source, operator=Index() as index):
                    for known, other in ((source, i), (i, source)):
                        shape = found[known]
                        if shape is not None and found[other] is None and sizes[other] % math.prod(shape[1:]) == 0:
                            guess = (sizes[other] // math.prod(shape[1:]), *shape[1:])
                            pair = (shape, guess) if known == source else (guess, shape)
                            if as_convolution(index, *pair) is not None:
                                changed |= learn(other, guess)
                case Affine(source=source, operator=Diagonal()) | Activation(source=source):
                    changed |= learn(i, found[source]) | learn(source, found[i])
                case Sum(sources=sources):
                    for s in sources:
                        changed |= learn(i, found[s]) | learn(s, found[i])
                    for s in sources:
                        changed |= learn(s, found[i])
                case _:
                    pass
        return changed

    settle()
    # What is left: every second or third place of an image, as the windows of a pool are.
    for i, node in enumerate(network.nodes):
        if found[i] is None and isinstance(node, Affine) and isinstance(node.operator, Index):
            shape = found[node.source]
            for guess in () if shape is None else _thinned(shape, sizes[i]):
                if as_convolution(node.operator, shape or (), guess) is not None:
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


def sides(conv: Conv) -> tuple[Shape, Shape]:
    """Shapes of what a convolution reads and of what it gives."""
    few, many = conv.channels
    small, large = (few, *conv.small), (many, *conv.large)
    return (small, large) if conv.transposed else (large, small)


def as_convolution(operator: Operator, before: Shape, after: Shape) -> Conv | None:
    """The operator as a convolution of images of these shapes, or None; exact.

    A diagonal map with one factor a channel, and an index that moves all places alike (whole channels chosen, joined or
    padded; every second place; a zero border; nearest upsampling; pixel shuffle), are convolutions too.
    """
    match operator:
        case Conv():
            return operator if sides(operator) == (before, after) else None
        case Diagonal():
            table = operator.scale.expand(operator.size).reshape(before[0], -1)
            if before != after or not bool((table == table[:, :1]).all()):
                return None
            one = (1,) * (len(before) - 1)
            return Conv(table[:, :1].reshape(-1, 1, *one), before[1:], before[1:], one, (0,) * len(one), one, before[0])
        case Index(transposed=True):
            conv = as_convolution(operator.transpose(), after, before)
            return None if conv is None else conv.transpose()
        case Index():
            return _gathering(operator, before, after) or _spreading(operator, before, after)
    return None


def _gathering(index: Index, before: Shape, after: Shape) -> Conv | None:
    """out[c', i] = in[c, s i + o], with c and o for each c'."""
    table = index.index.reshape(after)
    valid = table >= 0
    if len(before) != len(after) or not bool(valid.any()):
        return None
    places = _places(table.clamp_min(0), before)
    stride, first = [], []
    for axis in range(1, len(after)):
        there = places[axis]
        pairs = valid.narrow(axis, 1, after[axis] - 1) & valid.narrow(axis, 0, after[axis] - 1)
        steps = there.narrow(axis, 1, after[axis] - 1) - there.narrow(axis, 0, after[axis] - 1)
        step = int(steps[pairs][0]) if bool(pairs.any()) else max(1, before[axis] // after[axis])
        if step < 1:
            return None
        own = torch.arange(after[axis], device=table.device).reshape([-1 if a == axis else 1 for a in range(len(after))])
        stride.append(step)
        first.append((there - step * own).expand(after))
    chosen = valid.flatten(1).to(torch.int64).argmax(1)
    some = valid.flatten(1).any(1)
    channel = places[0].flatten(1).gather(1, chosen[:, None])[:, 0]
    offsets = [o.flatten(1).gather(1, chosen[:, None])[:, 0] for o in first]
    padding = [max(0, -int(o[some].min())) for o in offsets]
    kernel = [int(o[some].max()) + p + 1 for o, p in zip(offsets, padding, strict=True)]
    if math.prod(kernel) * before[0] * after[0] > 10_000_000:
        return None
    weight = torch.zeros(after[0], before[0], *kernel, dtype=torch.float64, device=table.device)
    taps = [(o + p)[some] for o, p in zip(offsets, padding, strict=True)]
    weight[(torch.arange(after[0], device=table.device)[some], channel[some], *taps)] = 1.0
    conv = Conv(weight, before[1:], after[1:], tuple(stride), tuple(padding), (1,) * len(stride))
    return conv if _fits(conv) and _same(conv, index) else None


def _spreading(index: Index, before: Shape, after: Shape) -> Conv | None:
    """out[c', s i + b] = in[c, i], with c for each c' and b: the adjoint of a convolution with kernel and stride s."""
    if len(before) != len(after) or any(m % n for n, m in zip(before[1:], after[1:], strict=True)):
        return None
    factor = tuple(m // n for n, m in zip(before[1:], after[1:], strict=True))
    table = index.index.reshape(after)[(slice(None), *(slice(f) for f in factor))]
    weight = torch.zeros(before[0], after[0], *factor, dtype=torch.float64, device=table.device)
    if bool((table < 0).any()) or weight.numel() > 10_000_000:
        return None
    place = torch.meshgrid(*(torch.arange(n, device=table.device) for n in table.shape), indexing="ij")
    weight[(_places(table, before)[0], *place)] = 1.0
    one = (1,) * len(factor)
    conv = Conv(weight, after[1:], before[1:], factor, (0,) * len(factor), one, transposed=True)
    return conv if _same(conv, index) else None


def _places(index: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Channel and place along every axis of the entries with these numbers."""
    parts = []
    for size in reversed(shape):
        parts.append(index % size)
        index = index // size
    return parts[::-1]


def _fits(conv: Conv) -> bool:
    sizes = zip(conv.large, conv.small, conv.stride, conv.padding, conv.weight.shape[2:], strict=True)
    return all((n + 2 * p - k) // s + 1 >= m for n, m, s, p, k in sizes)


def _same(conv: Conv, index: Index) -> bool:
    """Whether the two maps are one: on the numbers 1, 2, ... and on ones, so that sums of several entries show."""
    codes = torch.arange(1, index.size + 1, dtype=torch.float64, device=index.device)
    return all(torch.equal(conv(x), index(x)) for x in (codes, torch.ones_like(codes)))
