"""The blocks of a network on a torus: what every layer is applied to, at every frequency."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from lipguard.network import Conv
from lipguard.programs.torus import Layer, Torus, axis_of

Blocks = dict[int, Tensor]


def blocks(torus: Torus) -> tuple[list[Blocks], Blocks]:
    """Pre-activations of every layer, and the output, in terms of the input (-1) and the layers.

    Returns:
        By layer and source, (F, components, components of the source) at the frequencies of the finer of the two levels:
        complex, or real between vectors, whose F is 1. An image's components are orthonormal discrete Fourier transforms.
    """
    walk = _Walk(torus)
    last = len(torus.shapes) - 1
    return [walk.pre(layer) for layer in torus.layers], walk.value(last)


class _Walk:
    """Values in terms of the input and the layers."""

    def __init__(self, torus: Torus) -> None:
        self.torus = torus
        self._known: dict[int, Blocks] = {}

    def pre(self, layer: Layer) -> Blocks:
        """What the layer is applied to."""
        if layer.source == layer.node:
            return self._linear(layer.node)
        value = self.value(layer.source)
        return self._moved(value, layer.source, layer.node) if self.torus.shapes[layer.node] else value

    def value(self, i: int) -> Blocks:
        """A node's value."""
        torus = self.torus
        if torus.shapes[i] is None:
            return self._vector(i, torch.eye(torus.network.sizes[i], dtype=torch.float64, device=torus.network.device))
        if i == 0 or i in torus.place:
            kind = torch.complex128
            eye = torch.eye(torus.size(i), dtype=kind, device=torus.network.device)
            return {torus.place.get(i, -1): eye.expand(len(torus.levels[torus.level(i)].counts), -1, -1)}
        return self._linear(i)

    def _linear(self, i: int) -> Blocks:
        if i in self._known:
            return self._known[i]
        torus, node = self.torus, self.torus.network.nodes[i]
        result: Blocks = {}
        if node.map is None:
            for source in node.sources:
                for s, block in self._moved(self.value(source), source, i).items():
                    result[s] = result[s] + block if s in result else block
        elif (conv := torus.edges[i]) is not None:
            result = self._after(conv, node.sources[0], i)
        else:
            for s, block in self._vector(node.sources[0], node.map.dense()).items():
                result[s] = self._spectrum(block[0].T, i).mH
        self._known[i] = result
        return result

    def _after(self, conv: Conv, source: int, i: int) -> Blocks:
        """The convolution of a value."""
        torus = self.torus
        small, large = (source, i) if conv.transposed else (i, source)
        level = torus.levels[min(torus.level(source), torus.level(i))]
        matrix = symbol(conv, level.frequencies, *((torus.side(j), torus.blocks[j]) for j in (small, large)))
        matrix = matrix.mH if conv.transposed else matrix
        if source == 0 or source in torus.place:
            return {torus.place.get(source, -1): matrix}
        return self._product(matrix, source, i, self.value(source))

    def _moved(self, value: Blocks, source: int, i: int) -> Blocks:
        """A value with the components of another node's blocks."""
        torus = self.torus
        shape = torus.shapes[source]
        if shape is None or torus.blocks[source] == torus.blocks[i]:
            return value
        one = (1,) * torus.dims
        weight = torch.ones(shape[0], 1, *one, dtype=torch.float64, device=torus.network.device)
        identity = Conv(weight, shape[1:], shape[1:], one, (0,) * torus.dims, one, shape[0])
        level = torus.levels[min(torus.level(source), torus.level(i))]
        matrix = symbol(identity, level.frequencies, *((torus.side(j), torus.blocks[j]) for j in (i, source)))
        return self._product(matrix, source, i, value)

    def _product(self, matrix: Tensor, middle: int, i: int, value: Blocks) -> Blocks:
        """matrix (from `middle` to i) times a value of `middle`, each at the finer frequencies of its two ends."""
        torus = self.torus
        first = min(torus.level(middle), torus.level(i))
        result: Blocks = {}
        for s, block in value.items():
            second = min(torus.layers[s].level if s >= 0 else torus.level(0), torus.level(middle))
            finest = min(first, second)
            result[s] = matrix[torus.descent(finest, first)] @ block[torus.descent(finest, second)]
        return result

    def _vector(self, i: int, rows: Tensor) -> Blocks:
        """rows times the value of node i, a vector."""
        torus, nodes = self.torus, self.torus.network.nodes
        waiting: dict[int, Tensor] = {i: rows}
        result: Blocks = {}
        for j in range(i, -1, -1):
            if j not in waiting:
                continue
            node, matrix = nodes[j], waiting.pop(j)
            if node.variable:
                result[torus.place.get(j, -1)] = matrix[None] if torus.shapes[j] is None else self._spectrum(matrix, j)
                continue
            # What a mask would take away lies outside the window: only the window is read here.
            matrix = matrix if node.map is None else node.map.transpose()(matrix)
            for s in node.sources:
                waiting[s] = waiting[s] + matrix if s in waiting else matrix
        return result

    def _spectrum(self, rows: Tensor, i: int) -> Tensor:
        """Rows over the pixels of a node's window, as rows over its components at every frequency, (F, rows, components)."""
        torus = self.torus
        count, shape, blocks, side = len(rows), torus.shapes[i], torus.blocks[i], torus.side(i)
        assert shape is not None
        full = rows.new_zeros(count, shape[0], *side)
        full[(slice(None), slice(None), *(slice(n) for n in shape[1:]))] = rows.reshape(count, *shape)
        parts = [n for b, m in zip(blocks, side, strict=True) for n in (b, m // b)]
        steps = [2 + 2 * axis for axis in range(torus.dims)]
        waves = torch.fft.ifftn(full.reshape(count, shape[0], *parts), dim=steps, norm="ortho")
        waves = waves.permute(*steps, 0, *(s + 1 for s in steps), 1)
        frequencies = torus.levels[torus.level(i)].frequencies
        return waves[tuple(frequencies.T)].reshape(len(frequencies), count, -1)


Grid = tuple[tuple[int, ...], tuple[int, ...]]
"""Length of a torus along each axis, and its number of blocks."""


def symbol(conv: Conv, frequencies: Tensor, small: Grid, large: Grid) -> Tensor:
    """What a convolution does at the frequencies (F, dims) of the finer blocks: (F, components of small, of large), complex.

    With T = length / blocks, place T q + b of the small side reads place s (T q + b) + d t - p = T' q' + c of the large side.
    A wave exp(2 pi i f q' / blocks') of component c gives component b the factor exp(2 pi i f (a / blocks' - q0 / blocks)), a
    being q' at q = q0, summed over the q0 < blocks / blocks' where the small side has the finer blocks; transforms are
    orthonormal, so that the root of the ratio of the numbers of blocks divides it. Components are ordered (place, channel).
    """
    weight = conv.weight.detach().to(torch.complex128)
    few, many = conv.channels
    width, rows = weight.shape[1], few // conv.groups
    axes, scale = [], 1.0
    for axis in range(len(conv.large)):
        _, _, stride, padding, dilation, kernel = axis_of(conv, axis)
        (step, blocks), (other, others) = ((side[axis] // b[axis], b[axis]) for side, b in (small, large))
        finest = max(blocks, others)
        scale *= min(blocks, others) / finest
        terms = []
        for start, b, t in product(range(max(1, blocks // others)), range(step), range(kernel)):
            a, c = divmod(stride * (step * start + b) + dilation * t - padding, other)
            turns = (frequencies[:, axis] * (a * (finest // others) - start * (finest // blocks))).remainder(finest)
            angle = turns.to(torch.float64) * (2 * math.pi / finest)
            terms.append((b, t, c, torch.polar(torch.ones_like(angle), angle)))
        axes.append((terms, step, other))
    shape = [math.prod(step for _, step, _ in axes), few, math.prod(other for _, _, other in axes), many]
    result = weight.new_zeros(len(frequencies), *shape)
    for taps in product(*(terms for terms, _, _ in axes)):
        b = c = 0
        turn = torch.full_like(result[:, 0, 0, 0, 0], math.sqrt(scale))
        for (place, _, there, factor), (_, step, other) in zip(taps, axes, strict=True):
            b, c, turn = b * step + place, c * other + there, turn * factor
        kernel = weight[(slice(None), slice(None), *(t for _, t, _, _ in taps))]
        for g in range(conv.groups):
            own = slice(g * rows, (g + 1) * rows)
            result[:, b, own, c, g * width : (g + 1) * width] += turn[:, None, None] * kernel[own]
    return result.flatten(3).flatten(1, 2)
