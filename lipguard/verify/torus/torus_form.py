"""The torus form of a convolutional network, rebuilt for the checker: which grids are exact, and all blocks with errors.

Nothing is taken from the prover but the lengths of the tori and the places of masks, and both are checked place by place:
a position that an entry of a window reads must lie in the window it is read from, or fall on a position of the torus that
is known to hold zero. Blocks are the unitary transforms of the matrices of the torus, written out by their definition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Conv, Input, Network, Operator, Sum
from lipguard.network.images import Shape, as_convolution, shapes
from lipguard.network.walk import Walk, fold
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.form import widened
from lipguard.verify.torus.frequencies import Counts, finer
from lipguard.verify.torus.frequencies import fold as folded
from lipguard.verify.torus.transforms import Grid, exact, spectrum, transform

_Value = dict[int, Enclosed]
"""A value as a linear map of variables: by the node of each, (F, components, components of it), one radius for all F."""


@dataclass(frozen=True)
class Variable:
    """A variable of the matrix inequality: the input, a layer, or the output.

    Attributes:
        node: the node whose value it is.
        counts: its number of blocks, hence of frequencies, along each axis.
        components: at one frequency.
        reads: for a layer what it is applied to, for the output its value, by the node of each variable that is read, at
            the frequencies of the finer of the two.
    """

    node: int
    counts: Counts
    components: int
    reads: Mapping[int, Enclosed]


class TorusForm(Walk[_Value]):
    """A network on tori of given lengths; as a walk it makes of images, layers and the input their values.

    Attributes:
        ends: input and output; the latter reads layers and input, as a variable of its own.
        layers: by node, in topological order, with slopes [0, 1].
        widths: by node of a layer, beta - alpha of each channel.
        forward: whether blocks become fewer from the input to the output, or backwards.
    """

    def __init__(self, network: Network, masked: frozenset[int], sides: Mapping[int, tuple[int, ...]]) -> None:
        """Check the lengths, and build all blocks.

        Args:
            network: the network.
            masked: affine nodes and sums whose value is set to zero outside its window.
            sides: length of the torus of every image along each axis.
        Raises:
            NotCertified: the lengths do not fit, something is read that is not known to be zero, or the network is no
                network on a torus.
        """
        self.network, self.masked, self.sides = network, masked, sides
        self.shapes = tuple(s if s is not None and math.prod(s[1:]) > 1 else None for s in shapes(network))
        for i, side in sides.items():
            shape = self.shapes[i]
            if shape is None or len(side) != len(shape) - 1 or any(m < n for m, n in zip(side, shape[1:], strict=True)):
                raise NotCertified(f"node {i}: a torus of sides {side} does not hold an image of shape {shape}.")
        last = len(network.nodes) - 1
        ends = [i for i in (0, last) if self.shapes[i] is not None]
        if not ends or not set(ends) <= set(sides):
            raise NotCertified("neither the input nor the output is given a torus.")
        self.convs = {i: self._conv(i, node.sources[0], node.map) for i in sides if (node := network.nodes[i]).map is not None}
        self.needed = self._zeros()
        self.forward = math.prod(sides[0]) >= math.prod(sides[last]) if len(ends) == 2 else ends == [0]
        self.counts = self._find_counts()
        self.widths: dict[int, Tensor] = {}
        self.layers: dict[int, Variable] = {}
        self.values: dict[int, _Value] = {}
        fold(network.nodes, self)
        first = Variable(0, self._counts(0), self._components(0), {})
        self.ends = first, Variable(len(network.nodes), self._counts(last), self._components(last), self._value(last))

    def _counts(self, i: int) -> Counts:
        return self.counts.get(i, ())

    def _components(self, i: int) -> int:
        if i not in self.sides:
            return self.network.sizes[i]
        return self._image(i)[0] * math.prod(self.sides[i]) // math.prod(self.counts[i])

    def _conv(self, i: int, source: int, operator: Operator) -> Conv | None:
        """The convolution that an affine node is, whose tori differ by its strides; None from a vector."""
        before = self.shapes[source]
        if before is None:
            return None
        conv = as_convolution(operator, before, self._image(i)) if source in self.sides else None
        if conv is None:
            raise NotCertified(f"node {i} is no convolution of an image on a torus.")
        small, large = (source, i) if conv.transposed else (i, source)
        if any(a != s * b for a, b, s in zip(self.sides[large], self.sides[small], conv.stride, strict=True)):
            raise NotCertified(f"node {i}: the sides of its two tori do not differ by the stride.")
        return conv

    def _zeros(self) -> frozenset[int]:
        """The activations whose value must be zero outside the window.

        Raises:
            NotCertified: a value must be zero there that need not be.
        """
        needed: set[int] = set()
        for i in sorted(self.sides, reverse=True):
            node, conv = self.network.nodes[i], self.convs.get(i)
            own = i in needed and i not in self.masked
            if isinstance(node, Sum) and own:
                needed.update(node.sources)
            if not isinstance(node, Affine) or conv is None:
                continue
            if not exact(conv, self.sides[node.source], self.sides[i], zeros=False):
                if not exact(conv, self.sides[node.source], self.sides[i], zeros=True):
                    raise NotCertified(f"node {i}: on a torus of sides {self.sides[node.source]} the window is read twice.")
                needed.add(node.source)
            if own:
                ones = (*conv.weight.shape[2:], *conv.stride)
                if any(n != 1 for n in ones) or any(conv.padding) or conv.large != conv.small:
                    raise NotCertified(f"node {i} is read outside its window, where it is not known to be zero.")
                needed.add(node.source)
        return frozenset(needed)

    def _find_counts(self) -> dict[int, Counts]:
        divisor: Counts | None = None
        counts = {}
        for i in sorted(self.sides, reverse=not self.forward):
            side = self.sides[i]
            divisor = side if divisor is None else tuple(math.gcd(a, b) for a, b in zip(divisor, side, strict=True))
            counts[i] = divisor
        return counts

    def input(self, i: int, node: Input) -> _Value:
        """The first variable."""
        if i in self.masked:
            raise NotCertified("the input is masked, but it is no layer.")
        self.values[0] = {0: self._all(torch.eye(self._components(0), dtype=torch.float64, device=self.network.device), 0)}
        return self.values[0]

    def affine(self, i: int, node: Affine, read: _Value) -> _Value:
        """An image: of the map's rows, whatever a vector behind them is made of, or of the convolution."""
        if i not in self.sides:
            return self._unless_masked(i, {})
        conv = self.convs[i]
        if conv is None:
            parts = self._vector(node.source, Enclosed.of(node.operator.dense(), node.operator.rho), images=False)
            return self._unless_masked(
                i, {s: spectrum(known.at(0).mT, self._image(i), self._torus(i)).mH for s, known in parts.items()}
            )
        small, large = (node.source, i) if conv.transposed else (i, node.source)
        matrix = transform(conv, self._torus(small), self._torus(large))
        return self._unless_masked(i, self._product(matrix.mH if conv.transposed else matrix, node.source, i, read))

    def activation(self, i: int, node: Activation, read: _Value) -> _Value:
        """A layer."""
        return self._layer(i, self._moved(node.source, i), *self._slopes(i, node))

    def total(self, i: int, node: Sum, *read: _Value) -> _Value:
        """The terms of an image added, on one torus."""
        found: _Value = {}
        for source in node.sources if i in self.sides else ():
            _add(found, self._moved(source, i))
        return self._unless_masked(i, found)

    def _unless_masked(self, i: int, value: _Value) -> _Value:
        """A mask is a layer: it keeps what is in the window, slope 1, and sets the rest to zero, slope 0."""
        if i not in self.masked:
            if i in self.sides:
                self.values[i] = value
            return value
        if i not in self.sides:
            raise NotCertified(f"node {i} is masked, but no image on a torus.")
        zero = torch.zeros(self._image(i)[0], dtype=torch.float64, device=self.network.device)
        return self._layer(i, value, zero, zero + 1)

    def _layer(self, i: int, applied: _Value, alpha: Tensor, beta: Tensor) -> _Value:
        """A layer of slopes in [alpha, beta] for each channel: w = alpha p + width u."""
        # Upwards: [alpha, alpha + width] contains [alpha, beta].
        self.widths[i] = width = torch.nextafter(beta - alpha, torch.full_like(alpha, math.inf))
        self.layers[i] = Variable(i, self._counts(i), self._components(i), applied)
        places = self.layers[i].components // len(alpha)
        value = {i: self._all(torch.diag(width.repeat(places)), i)}
        if bool(alpha.any()):
            value |= {s: known * alpha.repeat(places)[:, None] for s, known in applied.items()}
        self.values[i] = value
        return value

    def _slopes(self, i: int, node: Activation) -> tuple[Tensor, Tensor]:
        alpha, beta = (s.to(self.network.device, torch.float64).expand(self.network.sizes[i]) for s in node.function.slopes)
        if i in self.sides:
            alpha, beta = (end.reshape(self._image(i)[0], -1) for end in (alpha, beta))
            alpha, beta = alpha.amin(1), beta.amax(1)
            if i in self.needed:
                # zero outside the window, and the function inside it
                alpha, beta = alpha.clamp_max(0), beta.clamp_min(0)
        return widened(alpha, beta)

    def _all(self, matrix: Tensor, i: int) -> Enclosed:
        """One exact matrix at all frequencies of node i."""
        return Enclosed(matrix.expand(math.prod(self._counts(i)), -1, -1)).shared

    def _moved(self, source: int, i: int) -> _Value:
        """A node's value by the components of another node on the same torus, or of the vector that it is."""
        if self.sides.get(source) != self.sides.get(i) or self.shapes[source] != self.shapes[i]:
            raise NotCertified(f"node {i}: images on different tori meet.")
        value = self._value(source)
        if self._counts(source) == self._counts(i):
            return value
        shape = self._image(i)
        one, zero = (1,) * len(shape[1:]), (0,) * len(shape[1:])
        weight = torch.ones(shape[0], 1, *one, dtype=torch.float64, device=self.network.device)
        identity = Conv(weight, shape[1:], shape[1:], one, zero, one, shape[0])
        return self._product(transform(identity, self._torus(i), self._torus(source)), source, i, value)

    def _product(self, matrix: Enclosed, middle: int, i: int, value: _Value) -> _Value:
        """matrix, of node i by node `middle`, times the latter's value, at the frequencies of the finest of the three."""
        first = finer(self._counts(middle), self._counts(i))
        result = {}
        for s, known in value.items():
            second = finer(self._counts(middle), self._counts(s))
            finest = finer(first, second)
            left, right = (m.at(folded(finest, own, self.network.device)) for m, own in ((matrix, first), (known, second)))
            kind = torch.promote_types(left.center.dtype, right.center.dtype)
            result[s] = left.to(kind) @ right.to(kind)
        return result

    def _value(self, i: int) -> _Value:
        if i not in self.values:
            return self._vector(i, Enclosed(torch.eye(self.network.sizes[i], dtype=torch.float64, device=self.network.device)))
        return self.values[i]

    def _vector(self, i: int, rows: Enclosed, images: bool = True) -> _Value:
        """rows times the value of node i, a vector: followed back through linear maps to vectors or windows of images."""
        waiting: _Value = {i: Enclosed(rows.center[None], rows.spread)}
        result: _Value = {}
        for j in range(i, -1, -1):
            if j not in waiting:
                continue
            node, known = self.network.nodes[j], waiting.pop(j)
            if not node.variable:
                passed = known if node.map is None else known.through(node.map.transpose())
                for source in node.sources:
                    _add(waiting, {source: passed})
            elif j not in self.sides:
                _add(result, {s: known.to(part.center.dtype) @ part for s, part in self.values[j].items()})
            elif images:
                _add(result, self._product(spectrum(known.at(0), self._image(j), self._torus(j)), j, i, self.values[j]))
            else:
                raise NotCertified(f"node {i}: an image is computed from a vector that was computed from images.")
        return result

    def _torus(self, i: int) -> Grid:
        return self.sides[i], self.counts[i]

    def _image(self, i: int) -> Shape:
        shape = self.shapes[i]
        assert shape is not None
        return shape


def _add(total: _Value, more: _Value) -> None:
    for s, known in more.items():
        total[s] = total[s] + known if s in total else known
