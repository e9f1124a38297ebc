"""The torus form of a convolutional network, rebuilt for the checker: which grids are exact, and all blocks with errors.

Nothing is taken from the prover but the lengths of the tori and the places of masks, and both are checked place by place:
a position that an entry of a window reads must lie in the window it is read from, or fall on a position of the torus that
is known to hold zero. Blocks are the unitary transforms of the matrices of the torus, written out by their definition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Conv, Input, Network, Operator, Sum
from lipguard.network.images import Shape, as_convolution, shapes
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.form import widened
from lipguard.verify.torus.frequencies import Counts, finer, fold
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


class TorusForm:
    """A network on tori of given lengths.

    Attributes:
        input, output: the ends; `output` reads layers and input, as a variable of its own.
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
        self.images = frozenset(sides)
        last = len(network.nodes) - 1
        ends = [i for i in (0, last) if self.shapes[i] is not None]
        if not ends or not self.images.issuperset(ends):
            raise NotCertified("neither the input nor the output is given a torus.")
        self.convs = self._edges()
        self.needed = self._zeros()
        if len(ends) == 2:
            self.forward = math.prod(sides[0]) >= math.prod(sides[last])
        else:
            self.forward = ends == [0]
        self.counts = self._find_counts()
        self.widths: dict[int, Tensor] = {}
        self._values: dict[int, _Value] = {}
        self.layers: dict[int, Variable] = {}
        self.input = Variable(0, self._counts(0), self._components(0), {})
        self._build()
        self.output = Variable(len(network.nodes), self._counts(last), self._components(last), self._value(last))

    def _counts(self, i: int) -> Counts:
        return self.counts.get(i, ())

    def _components(self, i: int) -> int:
        shape = self.shapes[i]
        if i not in self.images or shape is None:
            return self.network.sizes[i]
        return shape[0] * math.prod(self.sides[i]) // math.prod(self.counts[i])

    def _edges(self) -> dict[int, Conv | None]:
        """Every affine node that leads to an image; None from a vector. Lengths of the tori are checked along all of them."""
        convs: dict[int, Conv | None] = {}
        for i in self.images:
            shape, side = self.shapes[i], self.sides[i]
            if shape is None or len(side) != len(shape) - 1 or any(m < n for m, n in zip(side, shape[1:], strict=True)):
                raise NotCertified(f"node {i}: a torus of sides {side} does not hold an image of shape {shape}.")
            node = self.network.nodes[i]
            match node:
                case Affine(source=source) if self.shapes[source] is None:
                    convs[i] = None
                case Affine(source=source, operator=operator):
                    before = self.shapes[source]
                    conv = as_convolution(operator, before, shape) if source in self.images and before else None
                    if conv is None:
                        raise NotCertified(f"node {i} is no convolution of an image on a torus.")
                    small, large = (source, i) if conv.transposed else (i, source)
                    if any(a != s * b for a, b, s in zip(self.sides[large], self.sides[small], conv.stride, strict=True)):
                        raise NotCertified(f"node {i}: the sides of its two tori do not differ by the stride.")
                    convs[i] = conv
                case Activation() | Sum():
                    for s in node.sources:
                        if s not in self.images or self.sides[s] != side or self.shapes[s] != shape:
                            raise NotCertified(f"node {i}: images on different tori meet.")
                case Input():
                    pass
                case _:
                    raise NotCertified(f"node {i}: a {type(node).__name__.lower()} layer on a torus is not known.")
        return convs

    def _zeros(self) -> frozenset[int]:
        """The activations whose value must be zero outside the window.

        Raises:
            NotCertified: a value must be zero there that need not be.
        """
        needed: set[int] = set()
        for i in sorted(self.images, reverse=True):
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
        for i in sorted(self.images, reverse=not self.forward):
            side = self.sides[i]
            divisor = side if divisor is None else tuple(math.gcd(a, b) for a, b in zip(divisor, side, strict=True))
            counts[i] = divisor
        return counts

    def _build(self) -> None:
        """All layers, in the order of their nodes."""
        for i, node in enumerate(self.network.nodes):
            shape = self.shapes[i] if i in self.images else None
            if isinstance(node, Activation):
                alpha, beta = self._slopes(i, node)
                value = self._value(node.source)
                applied = value if shape is None else self._moved(value, node.source, i)
            elif i not in self.masked:
                continue
            elif shape is None or isinstance(node, Input):
                raise NotCertified(f"node {i} is masked, but no image on a torus.")
            else:
                alpha = torch.zeros(shape[0], dtype=torch.float64, device=self.network.device)
                beta, applied = alpha + 1, self._linear(i)
            # Upwards: [alpha, alpha + width] contains [alpha, beta].
            width = torch.nextafter(beta - alpha, torch.full_like(alpha, math.inf))
            self.widths[i] = width
            components = self._components(i)
            self.layers[i] = Variable(i, self._counts(i), components, applied)
            places = components // len(alpha)
            # w = alpha p + width u
            self._values[i] = {i: self._all(torch.diag(width.repeat(places)), i)}
            if bool(alpha.any()):
                self._values[i] |= {s: known * alpha.repeat(places)[:, None] for s, known in applied.items()}

    def _slopes(self, i: int, node: Activation) -> tuple[Tensor, Tensor]:
        alpha, beta = (s.to(self.network.device, torch.float64).expand(self.network.sizes[i]) for s in node.function.slopes)
        shape = self.shapes[i]
        if i in self.images and shape is not None:
            alpha, beta = alpha.reshape(shape[0], -1).amin(1), beta.reshape(shape[0], -1).amax(1)
            if i in self.needed:
                # zero outside the window, and the function inside it
                alpha, beta = alpha.clamp_max(0), beta.clamp_min(0)
        return widened(alpha, beta)

    def _all(self, matrix: Tensor, i: int) -> Enclosed:
        """One exact matrix at all frequencies of node i."""
        return Enclosed(matrix.expand(math.prod(self._counts(i)), -1, -1)).shared

    def _value(self, i: int) -> _Value:
        """A node's value in terms of input and layers."""
        if i not in self._values:
            eye = torch.eye(self._components(i), dtype=torch.float64, device=self.network.device)
            if i == 0:
                self._values[i] = {0: self._all(eye, 0)}
            else:
                self._values[i] = self._linear(i) if i in self.images else self._vector(i, Enclosed(eye))
        return self._values[i]

    def _linear(self, i: int) -> _Value:
        """The value of an affine node or sum that is an image, before any mask."""

        def through(source: int, operator: Operator, bias: Tensor | None) -> _Value:
            del bias
            conv = self.convs[i]
            if conv is None:
                parts = self._vector(source, Enclosed.of(operator.dense(), operator.rho), images=False)
                return {s: spectrum(known.at(0).mT, self._image(i), self._torus(i)).mH for s, known in parts.items()}
            small, large = (source, i) if conv.transposed else (i, source)
            matrix = transform(conv, self._torus(small), self._torus(large))
            return self._product(matrix.mH if conv.transposed else matrix, source, i, self._value(source))

        def total(sources: Sequence[int]) -> _Value:
            found: _Value = {}
            for source in sources:
                _add(found, self._moved(self._value(source), source, i))
            return found

        try:
            node = self.network.nodes[i]
            return node.linear(node.sources, through, total)
        except TypeError as error:
            raise NotCertified(f"node {i} is an image that no layer computes.") from error

    def _moved(self, value: _Value, source: int, i: int) -> _Value:
        """The same value by the components of another node on the same torus."""
        if source not in self.images or self.counts[source] == self.counts[i]:
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
            left, right = (m.at(fold(finest, own, self.network.device)) for m, own in ((matrix, first), (known, second)))
            result[s] = left @ right.to(left.center.dtype)
        return result

    def _vector(self, i: int, rows: Enclosed, images: bool = True) -> _Value:
        """rows times the value of node i, a vector: the layers in front of it are followed back through linear maps."""
        waiting: _Value = {i: Enclosed(rows.center[None], rows.spread)}
        result: _Value = {}
        for j in range(i, -1, -1):
            if j not in waiting:
                continue
            node, known = self.network.nodes[j], waiting.pop(j)
            if isinstance(node, Affine):
                _add(waiting, {node.source: known.through(node.operator.transpose())})
            elif isinstance(node, Sum):
                for source in node.sources:
                    _add(waiting, {source: known})
            elif j not in self.images:
                _add(result, {s: known.to(part.center.dtype) @ part for s, part in self._value(j).items()})
            elif images:
                _add(result, self._product(spectrum(known.at(0), self._image(j), self._torus(j)), j, i, self._value(j)))
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
