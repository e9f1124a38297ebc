"""A convolutional network as a network on a torus, and its blocks at the torus's frequencies.

A zero-padded convolution is the circular one on a torus long enough that nothing that is read wraps around into the window,
as long as what it reads is zero outside its window. Activations see to that: a 0/1 mask times a function with slopes in
[alpha, beta] has slopes in [min(0, alpha), max(0, beta)]. Where no activation stands between, a mask is a layer of its own,
with slopes in [0, 1].

A stride s makes the grid of the result s times coarser, and folds s frequencies of what is read into one of the result. So
layers are eliminated from the finest grid to the coarsest, each on *blocks* of its grid: the common divisor of all grids that
came before it. Relative to its blocks a layer of c channels has c components for each place within a block (polyphase; one
for a network that only becomes coarser), and at every frequency of the blocks it is a block of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import torch
from torch import Tensor

from lipguard.errors import UnsupportedQuery
from lipguard.network import Conv, Network
from lipguard.network.images import shapes

_REMEDY = "Use method='lipsdp-neuron' or 'spectral', or bound a submodule."


@dataclass(frozen=True, eq=False)
class Layer:
    """Neurons with one multiplier a channel, or, of a vector, one each.

    Attributes:
        node: the activation; or the affine map or sum whose value is masked before it is read.
        source: the node whose value is the pre-activation.
        channels: channels, or neurons of a vector.
        alpha, beta: slope interval of each channel, masks included, (channels,).
        level: index of its frequencies among `Torus.levels`, for the direction asked.
        places: components of each channel at one frequency.
    """

    node: int
    source: int
    channels: int
    alpha: Tensor
    beta: Tensor
    level: int = 0
    places: int = 1

    @property
    def size(self) -> int:
        """Components at one frequency."""
        return self.channels * self.places


@dataclass(frozen=True, eq=False)
class Level:
    """The frequencies of blocks: one of each pair f, -f.

    Attributes:
        blocks: number of blocks along each axis; () for vectors, whose one frequency is 0.
        frequencies: (F, dims) int64.
        counts: how many each stands for, (F,) float64.
        down: index of each one's remainder among the next coarser level's, (F,); empty for the last level.
    """

    blocks: tuple[int, ...]
    frequencies: Tensor
    counts: Tensor
    down: Tensor


class Torus:
    """The torus form of a network.

    Attributes:
        network: the network.
        grid: length of the torus along each axis, in common shifts of all grids.
        spread: whether (the input, the output) is an image.
        forward: whether layers are eliminated from the input to the output, or backwards.
        levels: from the finest to the coarsest.
        layers: activations and masks in topological order.
        ends: levels and components of the input and of the output.
        edges: the affine nodes between images, as convolutions; None for those from a vector to an image.
        blocks: by image, number of blocks of its grid along each axis.
        place: index of a node's layer.
    """

    def __init__(self, network: Network) -> None:
        """Find grids, masks and the length of the torus.

        Raises:
            UnsupportedQuery: a part of the network does not treat all places alike.
        """
        if any(node.loop is not None for node in network.nodes):
            raise UnsupportedQuery(f"an implicit layer has no torus form. {_REMEDY}")
        self.network = network
        self.shapes = tuple(s if s is not None and math.prod(s[1:]) > 1 else None for s in shapes(network))
        if not any(self.shapes[i] for i in network.activations):
            raise UnsupportedQuery("no activation works on an image, so that there are no channels. Use method='lipsdp-neuron'.")
        self.dims = max(len(s) for s in self.shapes if s) - 1
        self.spread = (self.shapes[0] is not None, self.shapes[-1] is not None)
        self._check_order()
        self.edges = self._wanted()
        self._phases = self._find_phases()
        self._needed = self._supports()
        self.grid = self._grid()
        self.forward = self.spread[0] and (not self.spread[1] or self._cost(True) <= self._cost(False))
        self.blocks = self._find_blocks(self.forward)
        self.levels = self._levels()
        self.layers = tuple(self._layers())
        self.place = {layer.node: k for k, layer in enumerate(self.layers)}
        last = len(self.shapes) - 1
        self.ends = tuple((self.level(i), self.size(i)) for i in (0, last))

    def side(self, i: int) -> tuple[int, ...]:
        """Length of a node's torus along each axis; () for a vector."""
        return tuple(m * p for m, p in zip(self.grid, self._phases[i], strict=True)) if self.shapes[i] else ()

    @property
    def sides(self) -> dict[int, tuple[int, ...]]:
        """Length of the torus of every image along each axis."""
        return {i: self.side(i) for i in self._phases}

    def size(self, i: int) -> int:
        """Components of a node's value at one frequency of its blocks."""
        shape = self.shapes[i]
        return self.network.sizes[i] if shape is None else shape[0] * math.prod(self.side(i)) // math.prod(self.blocks[i])

    def level(self, i: int) -> int:
        """Index of the level on which a node's value lives."""
        blocks = self.blocks[i] if self.shapes[i] else ()
        return next(k for k, level in enumerate(self.levels) if level.blocks == blocks)

    def _find_blocks(self, forward: bool) -> dict[int, tuple[int, ...]]:
        """Number of blocks of every image along each axis: the common divisor of its grid and all that were met before."""
        order = sorted(self._phases, reverse=not forward)
        blocks: dict[int, tuple[int, ...]] = {}
        divisor = self.side(order[0])
        for i in order:
            divisor = tuple(math.gcd(a, b) for a, b in zip(divisor, self.side(i), strict=True))
            blocks[i] = divisor
        return blocks

    def _cost(self, forward: bool) -> float:
        total = 0.0
        for i, blocks in self._find_blocks(forward).items():
            shape = self.shapes[i]
            assert shape is not None
            if self.network.nodes[i].elementwise is not None:
                total += math.prod(blocks) * (shape[0] * math.prod(self.side(i)) / math.prod(blocks)) ** 3
        return total

    def _levels(self) -> tuple[Level, ...]:
        chain = sorted(set(self.blocks.values()), reverse=True)
        device = self.network.device
        levels: list[Level] = []
        if not all(self.spread) or not all(self.shapes[i] for i in self.network.activations):
            none = torch.zeros(1, 0, dtype=torch.int64, device=device)
            levels.append(Level((), none, torch.ones(1, dtype=torch.float64, device=device), none[0]))
        index: dict[tuple[int, ...], int] = {(): 0}
        for k in reversed(range(len(chain))):

            def key(f: tuple[int, ...], k: int = k) -> list[tuple[int, ...]]:
                # By the coarsest remainder first: what is chosen here is chosen on every coarser level.
                return [tuple(a % m for a, m in zip(f, blocks, strict=True)) for blocks in reversed(chain[k:])]

            chosen, counts, down = [], [], []
            for f in product(*(range(m) for m in chain[k])):
                mirror = tuple(-a % m for a, m in zip(f, chain[k], strict=True))
                if key(f) > key(mirror):
                    continue
                chosen.append(f)
                counts.append(1.0 if f == mirror else 2.0)
                if levels:
                    down.append(index[tuple(a % m for a, m in zip(f, levels[-1].blocks, strict=False))])
            index = {f: i for i, f in enumerate(chosen)}
            tensors = (torch.tensor(chosen, device=device), torch.tensor(counts, dtype=torch.float64, device=device))
            levels.append(Level(chain[k], *tensors, torch.tensor(down, dtype=torch.int64, device=device)))
        return tuple(reversed(levels))

    def _check_order(self) -> None:
        """Raise unless vectors stand only behind the images, or only before them."""
        passed = [False] * len(self.shapes)
        first = self.spread[0]
        for i, node in enumerate(self.network.nodes):
            kind = self.shapes[i] is not None
            passed[i] = any(passed[s] or ((self.shapes[s] is not None) == first != kind) for s in node.sources)
            if passed[i] and kind == first:
                raise UnsupportedQuery(
                    f"{node.name or f'node {i}'}: {'an image' if kind else 'a vector'} is computed from "
                    f"{'vectors behind images' if kind else 'images behind vectors'}, so that frequencies mix. {_REMEDY}"
                )
        if not any(self.spread):
            reader = next(n for n in self.network.nodes if 0 in n.sources)
            raise UnsupportedQuery(
                f"{reader.name or 'the first node'} reads the input as a vector, and the output is one: an image is "
                f"needed at one end. {_REMEDY}"
            )

    def _wanted(self) -> dict[int, Conv | None]:
        """The affine nodes that lead from image to image, as convolutions; None for those from vector to image."""
        network, edges = self.network, {}
        todo = [self.network.nodes[i].sources[0] for i in network.activations if self.shapes[i]]
        todo += [len(network.nodes) - 1] if self.spread[1] else []
        seen: set[int] = set()
        while todo:
            i = todo.pop()
            if i in seen or network.nodes[i].variable:
                continue
            seen.add(i)
            node, shape = network.nodes[i], self.shapes[i]
            assert shape is not None
            if node.map is not None:
                before = self.shapes[node.sources[0]]
                edges[i] = None if before is None else node.map.as_convolution(before, shape)
                if before is None:
                    continue
                if edges[i] is None:
                    raise UnsupportedQuery(
                        f"{node.name or f'node {i}'}: {type(node.map).__name__} from {before} to {shape} does not treat all "
                        f"places of the image alike, so that frequencies mix. {_REMEDY}"
                    )
            todo += node.sources
        self._seen = seen
        return edges

    def _find_phases(self) -> dict[int, tuple[int, ...]]:
        """Places of every image's grid to each common step, by node and axis."""
        nodes = self.network.nodes
        images = [i for i, s in enumerate(self.shapes) if s and (i in self._seen or nodes[i].variable)]
        links: dict[int, list[tuple[int, tuple[Fraction, ...]]]] = {i: [] for i in images}

        def link(a: int, b: int, ratio: tuple[Fraction, ...]) -> None:
            links[a].append((b, ratio))
            links[b].append((a, tuple(1 / r for r in ratio)))

        same = (Fraction(1),) * self.dims
        for i in images:
            node = nodes[i]
            if node.map is not None:
                conv = self.edges[i]
                if conv is not None:
                    link(node.sources[0], i, tuple(Fraction(1, s) if conv.transposed else Fraction(s) for s in conv.stride))
            else:
                for s in node.sources:
                    if self.shapes[s] != self.shapes[i]:
                        raise UnsupportedQuery(
                            f"{node.name or f'node {i}'}: an image of shape {self.shapes[i]} is made from one of shape "
                            f"{self.shapes[s]}. {_REMEDY}"
                        )
                    link(s, i, same)
        strides: dict[int, tuple[Fraction, ...]] = {}
        for root in images:
            if root in strides:
                continue
            strides[root], todo = same, [root]
            while todo:
                i = todo.pop()
                for j, ratio in links[i]:
                    stride = tuple(a * r for a, r in zip(strides[i], ratio, strict=True))
                    if j not in strides:
                        strides[j] = stride
                        todo.append(j)
                    elif strides[j] != stride:
                        raise UnsupportedQuery(
                            f"{nodes[j].name or f'node {j}'}: images of different strides are added. {_REMEDY}"
                        )
        result: dict[int, tuple[int, ...]] = dict.fromkeys(images, ())
        for axis in range(self.dims):
            finest = min(s[axis] for s in strides.values())
            ratios = {i: s[axis] / finest for i, s in strides.items()}
            scale = math.lcm(*(r.denominator for r in ratios.values()))
            whole = {i: int(r * scale) for i, r in ratios.items()}
            common = math.lcm(*whole.values())
            for i in images:
                result[i] += (common // whole[i],)
        return result

    def _supports(self) -> set[int]:
        """The layers and inputs whose value must vanish outside its window, as a convolution reads there."""
        needed: set[int] = set()
        for i in reversed(range(len(self.network.nodes))):
            node = self.network.nodes[i]
            conv = self.edges.get(i)
            if conv is not None and (_reads_outside(conv) or (i in needed and _pointwise(conv))):
                needed.update(node.sources)
            if not node.variable and node.map is None and i in needed:
                needed.update(node.sources)
        return needed

    def _masked(self, i: int) -> bool:
        """Whether the value of this affine node needs a mask of its own."""
        conv = self.edges.get(i)
        return i in self._needed and conv is not None and not _pointwise(conv)

    def _grid(self) -> tuple[int, ...]:
        """Smallest length of the common torus on which no position that is read falls on another one of its window."""
        grid = []
        for axis in range(self.dims):
            least = max(-(-self.shapes[i][1 + axis] // p[axis]) for i, p in self._phases.items())  # type: ignore[index]
            for i, conv in self.edges.items():
                if conv is None:
                    continue
                node = self.network.nodes[i]
                n, m, s, p, d, k = axis_of(conv, axis)
                large = self._phases[i if conv.transposed else node.sources[0]][axis]
                longest = max(n + p, s * (m - 1) + d * (k - 1) - p + 1)
                least = max(least, -(-longest // large))
            grid.append(least)
        return tuple(grid)

    def _layers(self) -> list[Layer]:
        network, layers = self.network, []
        for i, node in enumerate(network.nodes):
            shape = self.shapes[i]
            if node.slopes is not None:
                alpha, beta = (s.to(network.device, torch.float64).expand(network.sizes[i]) for s in node.slopes)
                if shape is None:
                    layers.append(Layer(i, node.sources[0], network.sizes[i], alpha, beta, self.level(i)))
                    continue
                alpha, beta = alpha.reshape(shape[0], -1).amin(1), beta.reshape(shape[0], -1).amax(1)
                if i in self._needed:
                    alpha, beta = alpha.clamp_max(0), beta.clamp_min(0)
                source = node.sources[0]
            elif self._masked(i) and shape is not None:
                alpha = torch.zeros(shape[0], dtype=torch.float64, device=network.device)
                beta, source = alpha + 1, i
            else:
                continue
            layers.append(Layer(i, source, shape[0], alpha, beta, self.level(i), self.size(i) // shape[0]))
        return layers

    def descent(self, fine: int, coarse: int) -> Tensor:
        """Index of the remainder of each frequency of a level among those of a coarser one."""
        index = torch.arange(len(self.levels[fine].counts), device=self.network.device)
        for level in self.levels[fine:coarse]:
            index = level.down[index]
        return index


def axis_of(conv: Conv, axis: int) -> tuple[int, int, int, int, int, int]:
    """Large and small size, stride, padding, dilation and kernel along an axis."""
    return (
        conv.large[axis], conv.small[axis], conv.stride[axis], conv.padding[axis], conv.dilation[axis],
        conv.weight.shape[2 + axis],
    )  # fmt: skip


def _reads_outside(conv: Conv) -> bool:
    """Whether an entry of the result's window reads a place outside the window of what is read."""
    for axis in range(len(conv.large)):
        n, m, s, p, d, k = axis_of(conv, axis)
        if not conv.transposed:
            if p > 0 or s * (m - 1) + d * (k - 1) - p >= n:
                return True
            continue
        for t in range(k):
            # places i with 0 <= s i + d t - p < n
            if (p - d * t + s - 1) // s < 0 or (n - 1 + p - d * t) // s >= m:
                return True
    return False


def _pointwise(conv: Conv) -> bool:
    """Whether every pixel of the result depends on the pixel at its place alone."""
    ones = (*conv.weight.shape[2:], *conv.stride)
    return all(n == 1 for n in ones) and not any(conv.padding) and conv.large == conv.small
