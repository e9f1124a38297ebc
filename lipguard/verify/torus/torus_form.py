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
from lipguard.network import Activation, Affine, Conv, Input, Network, Sum
from lipguard.network.images import Shape, as_convolution, shapes
from lipguard.rounding import UNIT, gamma
from lipguard.verify.torus.transforms import Blocks, Known, Torus, add, exact, finer, grid, spectrum, transform

_THINNEST = 1e-6
"""A slope interval thinner than this is widened to it: a superset."""


@dataclass(frozen=True)
class Variable:
    """A variable of the matrix inequality: the input, a layer, or the output.

    Attributes:
        node: the node whose value it is.
        blocks: its number of blocks.
        components: at one frequency.
        reads: for a layer what it is applied to, for the output its value, by the node of each variable that is read, at
            the frequencies of the finer of the two.
    """

    node: int
    blocks: Blocks
    components: int
    reads: Mapping[int, Known]


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
        self.blocks = self._find_blocks()
        self.widths: dict[int, Tensor] = {}
        self._values: dict[int, dict[int, Known]] = {}
        self.layers: dict[int, Variable] = {}
        self.input = Variable(0, self._blocks(0), self._components(0), {})
        self._build()
        self.output = Variable(len(network.nodes), self._blocks(last), self._components(last), self._value(last))

    def _blocks(self, i: int) -> Blocks:
        return self.blocks.get(i, ())

    def _components(self, i: int) -> int:
        shape = self.shapes[i]
        if i not in self.images or shape is None:
            return self.network.sizes[i]
        return shape[0] * math.prod(self.sides[i]) // math.prod(self.blocks[i])

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

    def _find_blocks(self) -> dict[int, Blocks]:
        divisor: Blocks | None = None
        blocks = {}
        for i in sorted(self.images, reverse=not self.forward):
            side = self.sides[i]
            divisor = side if divisor is None else tuple(math.gcd(a, b) for a, b in zip(divisor, side, strict=True))
            blocks[i] = divisor
        return blocks

    def _build(self) -> None:
        for i, node in enumerate(self.network.nodes):
            if not isinstance(node, Activation) and i not in self.masked:
                continue
            if isinstance(node, Activation):
                alpha, beta = self._slopes(i, node)
                applied = self._moved(self._value(node.source), node.source, i) if i in self.images else self._value(node.source)
            else:
                if i not in self.images or isinstance(node, Input):
                    raise NotCertified(f"node {i} is masked, but no image on a torus.")
                shape = self.shapes[i]
                assert shape is not None
                alpha = torch.zeros(shape[0], dtype=torch.float64, device=self.network.device)
                beta, applied = alpha + 1, self._linear(i)
            # Upwards: [alpha, alpha + width] contains [alpha, beta].
            width = torch.nextafter(beta - alpha, torch.full_like(alpha, math.inf))
            self.widths[i] = width
            components = self._components(i)
            self.layers[i] = Variable(i, self._blocks(i), components, applied)
            places = components // len(alpha)
            # w = alpha p + width u
            own = torch.diag(width.repeat(places))[None]
            value = {i: Known(own.expand(math.prod(self._blocks(i)), -1, -1), own[0], 0.0)}
            if bool(alpha.any()):
                factor = alpha.repeat(places)[:, None]
                for s, known in applied.items():
                    value[s] = Known(factor * known.center, factor.abs() * known.size * (1 + 4 * UNIT), known.error + 8 * UNIT)
            self._values[i] = value

    def _slopes(self, i: int, node: Activation) -> tuple[Tensor, Tensor]:
        alpha, beta = (s.to(self.network.device, torch.float64).expand(self.network.sizes[i]) for s in node.function.slopes)
        shape = self.shapes[i]
        if i in self.images and shape is not None:
            alpha, beta = alpha.reshape(shape[0], -1).amin(1), beta.reshape(shape[0], -1).amax(1)
            if i in self.needed:
                # zero outside the window, and the function inside it
                alpha, beta = alpha.clamp_max(0), beta.clamp_min(0)
        thin = (beta - alpha) < _THINNEST
        return torch.where(thin, alpha - _THINNEST / 2, alpha), torch.where(thin, beta + _THINNEST / 2, beta)

    def _value(self, i: int) -> dict[int, Known]:
        """A node's value in terms of input and layers."""
        if i in self._values:
            return self._values[i]
        if i == 0:
            eye = torch.eye(self._components(0), dtype=torch.float64, device=self.network.device)
            value = {0: Known(eye.expand(math.prod(self._blocks(0)), -1, -1), eye, 0.0)}
        elif i not in self.images:
            value = self._vector(i, torch.eye(self.network.sizes[i], dtype=torch.float64, device=self.network.device))
        else:
            value = self._linear(i)
        self._values[i] = value
        return value

    def _linear(self, i: int) -> dict[int, Known]:
        """The value of an affine node or sum that is an image, before any mask."""
        node = self.network.nodes[i]
        if isinstance(node, Sum):
            total: dict[int, Known] = {}
            for source in node.sources:
                for s, known in self._moved(self._value(source), source, i).items():
                    total[s] = add(total[s], known) if s in total else known
            return total
        if not isinstance(node, Affine):
            raise NotCertified(f"node {i} is an image that no layer computes.")
        conv = self.convs[i]
        if conv is None:
            parts = self._vector(node.source, node.operator.dense(), images=False)
            turned = {
                s: spectrum(known.center[0].T, known.size.T, known.error, self._image(i), self._torus(i))
                for s, known in parts.items()
            }
            return {s: Known(known.center.mH, known.size.T, known.error) for s, known in turned.items()}
        small, large = (node.source, i) if conv.transposed else (i, node.source)
        matrix = transform(conv, self._torus(small), self._torus(large))
        if conv.transposed:
            matrix = Known(matrix.center.mH, matrix.size.T, matrix.error)
        return self._product(matrix, node.source, i, self._value(node.source))

    def _moved(self, value: dict[int, Known], source: int, i: int) -> dict[int, Known]:
        """The same value by the components of another node on the same torus."""
        if source not in self.images or self.blocks[source] == self.blocks[i]:
            return value
        shape = self.shapes[i]
        assert shape is not None
        one, zero = (1,) * len(shape[1:]), (0,) * len(shape[1:])
        weight = torch.ones(shape[0], 1, *one, dtype=torch.float64, device=self.network.device)
        identity = Conv(weight, shape[1:], shape[1:], one, zero, one, shape[0])
        return self._product(transform(identity, self._torus(i), self._torus(source)), source, i, value)

    def _product(self, matrix: Known, middle: int, i: int, value: dict[int, Known]) -> dict[int, Known]:
        result = {}
        first = finer(self._blocks(middle), self._blocks(i))
        for s, known in value.items():
            second = finer(self._blocks(middle), self._blocks(s))
            finest = finer(first, second)
            left, right = matrix.center[self.fold(finest, first)], known.center[self.fold(finest, second)]
            count = left.shape[2]
            error = (matrix.error + known.error + matrix.error * known.error) * (1 + 8 * UNIT) + 4 * gamma(count + 8)
            size = (matrix.size @ known.size) * (1 + 2 * gamma(count + 8))
            result[s] = Known(left @ right.to(left.dtype), size, error)
        return result

    def _vector(self, i: int, rows: Tensor, images: bool = True) -> dict[int, Known]:
        """rows times the value of node i, a vector: the layers in front of it are followed back through linear maps."""
        waiting = {i: Known(rows[None], rows.abs(), 0.0)}
        result: dict[int, Known] = {}
        for j in range(i, -1, -1):
            if j not in waiting:
                continue
            node, known = self.network.nodes[j], waiting.pop(j)
            if isinstance(node, Input | Activation):
                if j not in self.images:
                    result.update(self._through(known, self._value(j), result))
                    continue
                if not images:
                    raise NotCertified(f"node {i}: an image is computed from a vector that was computed from images.")
                part = spectrum(known.center[0], known.size, known.error, self._image(j), self._torus(j))
                for s, one in self._product(part, j, i, self._value(j)).items():
                    result[s] = add(result[s], one) if s in result else one
                continue
            if isinstance(node, Affine):
                count = node.operator.shape[0] + 2
                size = node.operator.abs().transpose()(known.size) * (1 + 2 * gamma(count))
                center = node.operator.transpose()(known.center)
                known = Known(center, size, known.error * (1 + 8 * UNIT) + 2 * gamma(count))
            for s in node.sources:
                waiting[s] = add(waiting[s], known) if s in waiting else known
        return result

    def _through(self, known: Known, value: dict[int, Known], result: dict[int, Known]) -> dict[int, Known]:
        """rows times a vector activation's value, added to what there is."""
        found = {}
        for s, part in value.items():
            count = known.center.shape[2] + 4
            error = (known.error + part.error + known.error * part.error) * (1 + 8 * UNIT) + 4 * gamma(count)
            center = known.center.to(part.center.dtype) @ part.center
            one = Known(center, (known.size @ part.size) * (1 + 2 * gamma(count)), error)
            found[s] = add(result[s], one) if s in result else one
        return found

    def fold(self, fine: Blocks, coarse: Blocks) -> Tensor:
        """The index of every frequency's remainder on coarser blocks, both in row-major order of all frequencies."""
        index = torch.zeros(math.prod(fine), dtype=torch.int64, device=self.network.device)
        if not coarse:
            return index
        for numbers, m in zip(grid(fine, index.device).T, coarse, strict=True):
            index = index * m + numbers % m
        return index

    def mirror(self, blocks: Blocks) -> Tensor:
        """The index of -f for every frequency f."""
        index = torch.zeros(math.prod(blocks), dtype=torch.int64, device=self.network.device)
        for numbers, m in zip(grid(blocks, index.device).T, blocks, strict=True):
            index = index * m + (-numbers) % m
        return index

    def _torus(self, i: int) -> Torus:
        return self.sides[i], self.blocks[i]

    def _image(self, i: int) -> Shape:
        shape = self.shapes[i]
        assert shape is not None
        return shape
