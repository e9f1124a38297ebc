"""A piecewise-linear network as data of the exact methods: patterns, their linear maps and their regions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipguard.errors import UnsupportedQuery
from lipguard.network import Activation, Affine, Input, Linear, Network
from lipguard.network.activations import PiecewiseLinear
from lipguard.programs.feedback import feedback_of
from lipguard.programs.rewriting import elementwise

Matrix = NDArray[np.float64]
Pattern = NDArray[np.intp]
"""The index of the linear piece each neuron is in, shape (n,)."""


@dataclass(frozen=True, eq=False)
class Neuron:
    """phi(p) = slopes[k] p + offsets[k] for breaks[k - 1] <= p <= breaks[k]; neighbouring slopes differ."""

    breaks: tuple[float, ...]
    slopes: tuple[float, ...]
    offsets: tuple[float, ...]

    def interval(self, piece: int) -> tuple[float, float]:
        """The pre-activations of a piece; ends may be infinite."""
        low = self.breaks[piece - 1] if piece > 0 else -np.inf
        high = self.breaks[piece] if piece < len(self.breaks) else np.inf
        return low, high

    def pieces(self, lower: float, upper: float) -> list[int]:
        """Pieces that meet the interior of [lower, upper]; exactly one if the interval is a point."""
        if lower >= upper:
            return [int(np.searchsorted(self.breaks, lower))]
        return [k for k in range(len(self.slopes)) if self.interval(k)[0] < upper and self.interval(k)[1] > lower]

    def __call__(self, p: float) -> float:
        """phi(p)."""
        k = int(np.searchsorted(self.breaks, p))
        return self.slopes[k] * p + self.offsets[k]


@dataclass(frozen=True, eq=False)
class PiecewiseForm:
    """p = A x + B w + b, w_i = neuron_i(p_i), y = C w + D x + c; B strictly block-lower-triangular.

    Attributes:
        a, b_matrix, bias, c, d: A (n, d), B (n, n), b (n,), C (m, n), D (m, d), float64.
        layers: each activation node's neurons.
        neurons: the functions, one per neuron.
    """

    a: Matrix
    b_matrix: Matrix
    bias: Matrix
    c: Matrix
    d: Matrix
    layers: tuple[slice, ...]
    neurons: tuple[Neuron, ...]

    @property
    def inputs(self) -> int:
        """d."""
        return self.a.shape[1]

    @property
    def outputs(self) -> int:
        """m."""
        return self.c.shape[0]

    @property
    def size(self) -> int:
        """Number of neurons n."""
        return len(self.neurons)

    @cached_property
    def _tables(self) -> tuple[Matrix, Matrix, Matrix, Matrix]:
        """Padded slopes, offsets (n, K), and ends of every piece (n, K) twice."""
        width = max((len(neuron.slopes) for neuron in self.neurons), default=1)
        slopes, offsets = np.zeros((self.size, width)), np.zeros((self.size, width))
        low, high = np.full((self.size, width), -np.inf), np.full((self.size, width), np.inf)
        for i, neuron in enumerate(self.neurons):
            for k in range(len(neuron.slopes)):
                slopes[i, k], offsets[i, k] = neuron.slopes[k], neuron.offsets[k]
                low[i, k], high[i, k] = neuron.interval(k)
        return slopes, offsets, low, high

    def slopes_of(self, pattern: Pattern) -> Matrix:
        """Slope of every neuron in its piece, (n,)."""
        return self._tables[0][np.arange(self.size), pattern]

    def intervals_of(self, pattern: Pattern) -> tuple[Matrix, Matrix]:
        """Ends of every neuron's piece, each (n,)."""
        place = (np.arange(self.size), pattern)
        return self._tables[2][place], self._tables[3][place]

    def preactivations(self, pattern: Pattern, until: int | None = None) -> tuple[Matrix, Matrix]:
        """(G, h) with p = G x + h wherever the network has this pattern; the first `until` layers only, if given.

        Returns:
            G (k, d) and h (k,), k the number of neurons in those layers.
        """
        layers = self.layers if until is None else self.layers[:until]
        count = layers[-1].stop if layers else 0
        slopes, offsets = self.slopes_of(pattern), self._tables[1][np.arange(self.size), pattern]
        g, h = self.a[:count].copy(), self.bias[:count].copy()
        for layer in layers[1:]:
            s = slice(0, layer.start)
            g[layer] += self.b_matrix[layer, s] @ (slopes[s, None] * g[s])
            h[layer] += self.b_matrix[layer, s] @ (slopes[s] * h[s] + offsets[s])
        return g, h

    def jacobian(self, pattern: Pattern) -> Matrix:
        """The Jacobian (m, d) on the region of the pattern."""
        g, _ = self.preactivations(pattern)
        return self.d + self.c @ (self.slopes_of(pattern)[:, None] * g)

    def pattern_at(self, x: Matrix) -> Pattern:
        """The pattern of the point x; at a break point, the piece left of it."""
        slopes, offsets, _, high = self._tables
        pattern = np.zeros(self.size, dtype=np.intp)
        w = np.zeros(self.size)
        for layer in self.layers:
            s = slice(0, layer.start)
            p = self.a[layer] @ x + self.b_matrix[layer, s] @ w[s] + self.bias[layer]
            pattern[layer] = piece = (p[:, None] > high[layer]).sum(1)
            place = (np.arange(layer.start, layer.stop), piece)
            w[layer] = slopes[place] * p + offsets[place]
        return pattern


def piecewise_form(network: Network) -> PiecewiseForm:
    """The exact methods' view of a network.

    Raises:
        UnsupportedQuery: an activation is not piecewise linear.
    """
    network = elementwise(network)
    neurons: list[Neuron] = []
    for i in network.activations:
        node = network.nodes[i]
        if node.loop is not None:
            raise UnsupportedQuery(
                f"{node.name or f'node {i}'} is an implicit layer: the exact methods take feed-forward networks only. "
                "lipguard.bound gives verified bounds for it: methods 'lipsdp-neuron', 'contraction', 'sampling'."
            )
        function = node.elementwise
        if function is None or function.piecewise is None:
            kind = function.name if function is not None else type(node.coupling).__name__
            raise UnsupportedQuery(
                f"{node.name or f'node {i}'} ({kind}) is not piecewise linear: there is no finite set of "
                f"regions to search. lipguard.bound gives verified upper bounds for it: methods 'lipsdp-neuron', 'spectral'."
            )
        neurons += _neurons(function.piecewise, network.sizes[i])
    feedback = feedback_of(network)
    a, b, c, d = (m.detach().to("cpu", torch.float64).numpy() for m in feedback.dense())
    return PiecewiseForm(a, b, _offsets(network), c, d, feedback.slices, tuple(neurons))


def _neurons(function: PiecewiseLinear, size: int) -> list[Neuron]:
    breaks, pieces = (t.detach().to("cpu", torch.float64).reshape(t.shape[0], -1) for t in (function.breaks, function.pieces))
    breaks, pieces = breaks.expand(-1, size), pieces.expand(-1, size)
    values = function.value.detach().to("cpu", torch.float64).flatten().expand(size)
    result = []
    for i in range(size):
        at, slope, value = breaks[:, i].tolist(), pieces[:, i].tolist(), float(values[i])
        kept_breaks: list[float] = []
        slopes, offsets = [slope[0]], [value - slope[0] * at[0] if at else value]
        height = value
        for k, point in enumerate(at):
            height += slope[k] * (point - at[k - 1]) if k > 0 else 0.0
            if slope[k + 1] == slopes[-1]:
                continue  # no kink here: PReLU with slope 1, say
            kept_breaks.append(point)
            slopes.append(slope[k + 1])
            offsets.append(height - slope[k + 1] * point)
        result.append(Neuron(tuple(kept_breaks), tuple(slopes), tuple(offsets)))
    return result


def _offsets(network: Network) -> Matrix:
    """b: the pre-activations when x and every activation's output are zero."""
    walk = _Offsets()
    network.fold(walk)
    return torch.cat([torch.zeros(0, dtype=torch.float64), *walk.found]).numpy()


class _Offsets(Linear):
    """Values on the CPU where the input and every neuron are zero; `found` collects what activations read."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def input(self, i: int, node: Input) -> Tensor:
        return torch.zeros(node.size, dtype=torch.float64)

    def affine(self, i: int, node: Affine, read: Tensor) -> Tensor:
        return node.value(read.to(node.operator.device)).detach().cpu()

    def activation(self, i: int, node: Activation, read: Tensor) -> Tensor:
        self.found.append(read)
        return torch.zeros_like(read)
