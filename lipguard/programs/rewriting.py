"""Coupled nodes made of affine maps, absolute values and ReLUs, exactly.

    max(a, b) = (a + b)/2 + |a - b|/2        min(a, b) = (a + b)/2 - |a - b|/2

A pair (max, min) costs one neuron w = |d|, d = (a - b)/2, with slopes [-1, 1], and s = (a + b)/2 passes beside it:

  1. |y|^2 = 2 s^2 + 2 w^2 <= 2 s^2 + 2 d^2 = |x|^2 along increments, which is LipSDP's constraint d^2 - w^2 >= 0 with
     multiplier 2: the bound of MaxMin alone is 1, and that of orthogonal layers with MaxMin between them is 1.
  2. The constraints of Pauli et al. (arXiv:2401.14033, Theorem 2) for a pair are combinations of lambda (|x|^2 - |y|^2) =
     2 lambda (d^2 - w^2), lambda >= 0, and of products of (1'x - 1'y) with linear functions of 1'x and 1'y. Here
     1'x = 1'y = 2 s holds identically: the first is LipSDP's own constraint, the others vanish. Their program is a
     restriction of this one.

Smooth groups (`lipguard.network.contraction`) are tied neurons as they stand: nothing else is known of them.

A larger group is sorted in one of two ways.
  * By comparators (`elementwise`): each is such a pair, and piecewise linear methods need nothing more. With equal
    multipliers |x|^2 - |y|^2 telescopes over the comparators, so 1. and 2. hold for the group too.
  * Tied (`slope_restricted`): for any number m, sort(x) = sort(x - 1 m) + 1 m. With m the mean, u = x - 1 m and
    v = sort(u), the mean is preserved exactly and |v| changes by no more than |u|: t sum_j (u_j^2 - v_j^2) >= 0, the
    constraint of slopes [-1, 1] with one multiplier for the group. As 1'v = 0 the result is (I - 11'/g) v + 1 m; the
    projection keeps what LipSDP does not know of v, its mean, out of the result. In strength this is the paper's
    lambda again, its other terms vanish as in 2.: g neurons and one multiplier, where comparators take about
    g log(g)^2 / 4 neurons with a multiplier each.

A maximum over a window is a tree of pairs without their minima: max(a, b)^2 <= a^2 + b^2 follows from the same
constraint (multiplier 1: (s + w)^2 <= 2 s^2 + 2 w^2 <= 2 s^2 + 2 d^2), so that LipSDP of a pooling layer is at most the
root of the number of windows that an entry lies in.

A reflection is z + 2 v relu(-v'z). For |v| = 1 the constraint w (p - w) >= 0, p = -v'z, is |y|^2 <= |z|^2 itself:
|z|^2 - |y|^2 = 4 p w - 4 w^2.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lipguard.network import Activation, Affine, Coupled, Network, Node, Sum
from lipguard.network.activations import PiecewiseLinear, absolute, relu
from lipguard.network.coupled import Groups, Maxima, Reflection, Sort, comparators
from lipguard.network.operators import Diagonal, Index, Operator


def elementwise(network: Network) -> Network:
    """The same function without coupled nodes but smooth ones: every other neuron is a function of one pre-activation.

    Itself if there is nothing to rewrite.
    """
    return _once(network, tied=False)


def slope_restricted(network: Network) -> Network:
    """The same function for LipSDP: as `elementwise`, but groups of more than two are sorted by tied neurons."""
    return _once(network, tied=True)


_MADE: WeakKeyDictionary[Network, dict[bool, Network]] = WeakKeyDictionary()


def _once(network: Network, tied: bool) -> Network:
    # A network never changes: what was made of it once serves as long as it lives.
    if not any(_open(node, tied) for node in network.nodes):
        return network
    made = _MADE.setdefault(network, {})
    if tied not in made:
        made[tied] = _rewritten(network, tied)
    return made[tied]


class _Emitter:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.name = ""

    def put(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def affine(self, source: int, *operators: Operator) -> int:
        for operator in operators:
            source = self.put(Affine(source, operator, None, self.name))
        return source

    def sum(self, *sources: int) -> int:
        return self.put(Sum(sources, self.name))

    def neuron(self, source: int, function: PiecewiseLinear) -> int:
        return self.put(Activation(source, function.to(self._device), self.name))

    def half(self, a: int, b: int, size: int, sign: float = 1.0) -> int:
        """(a + sign b) / 2."""
        return self.affine(self.sum(a, b if sign > 0 else self.affine(b, self.scale(sign, size))), self.scale(0.5, size))

    def scale(self, factor: float | Tensor, size: int) -> Diagonal:
        return Diagonal(torch.as_tensor(factor, dtype=torch.float64, device=self._device), size)

    def begin(self, name: str, device: torch.device) -> None:
        self.name, self._device = name, device


def _rewritten(network: Network, tied: bool) -> Network:
    if not any(_open(node, tied) for node in network.nodes):
        return network
    emitter = _Emitter()
    place: dict[int, int] = {}
    for i, node in enumerate(network.nodes):
        if _open(node, tied):
            assert node.coupling is not None
            source = node.sources[0]
            emitter.begin(node.name, node.coupling.index.device)
            place[i] = node.coupling.meet(_Rewriter(emitter, place[source], network.sizes[source], tied))
        else:
            place[i] = emitter.put(node.moved(place.__getitem__))
    return Network(tuple(emitter.nodes))


def _open(node: Node, tied: bool) -> bool:
    """Whether a node is to be rewritten: not smooth groups, nor a sort of centred groups where it may stand for tied neurons."""
    return node.coupling is not None and node.coupling.pieces and not (tied and node.coupling.tied)


class _Rewriter(Groups[int]):
    """Emits a function of groups of the entries of `source`; each method returns the node of the result."""

    def __init__(self, emitter: _Emitter, source: int, size: int, tied: bool) -> None:
        self.emitter, self.source, self.size, self.tied = emitter, source, size, tied

    def maxima(self, function: Maxima) -> int:
        return _maxima(self.emitter, self.source, self.size, function.index)

    def reflection(self, function: Reflection) -> int:
        return _reflection(self.emitter, self.source, self.size, function)

    def sort(self, function: Sort) -> int:
        index, source = function.index, self.source
        if self.tied and index.shape[1] > 2:
            return _tied_sort(self.emitter, source, self.size, function)
        for layer in comparators(index.shape[1]):
            larger, smaller = (index[:, [pair[side] for pair in layer]].flatten() for side in (0, 1))
            source = _compare(self.emitter, source, self.size, larger, smaller)
        return source


def _compare(emitter: _Emitter, source: int, size: int, larger: Tensor, smaller: Tensor) -> int:
    """Every pair of places sorted, the larger entry to the first; other entries as they are."""
    count = len(larger)
    everyone = torch.arange(size, device=larger.device)
    partner, neuron, sign = everyone.clone(), torch.full_like(everyone, -1), torch.zeros(size, dtype=torch.float64)
    partner[larger], partner[smaller] = smaller, larger
    neuron[larger] = neuron[smaller] = everyone[:count]
    sign = sign.to(larger.device)
    sign[larger], sign[smaller] = 1.0, -1.0
    a, b = (emitter.affine(source, Index(places, size)) for places in (larger, smaller))
    w = emitter.neuron(emitter.half(a, b, count, -1.0), absolute())
    middle = emitter.half(source, emitter.affine(source, Index(partner, size)), size)
    return emitter.sum(middle, emitter.affine(w, Index(neuron, count), emitter.scale(sign, size)))


def _maxima(emitter: _Emitter, source: int, size: int, table: Tensor) -> int:
    """A tree of pairs over the columns of the table (-1: none), level by level; a pair that windows share has one neuron.

    The pairs of a level are ordered by their places, the smaller first.
    """
    while table.shape[1] > 1:
        if table.shape[1] % 2:
            table = torch.cat([table, table[:, -1:]], 1)
        pairs = table.reshape(len(table), -1, 2)
        # One entry alone is the maximum of itself with itself, and takes no neuron.
        a, b = (torch.where(pairs[..., j] < 0, pairs[..., 1 - j], pairs[..., j]) for j in (0, 1))
        ordered = torch.stack([torch.minimum(a, b), torch.maximum(a, b)], -1)
        distinct, inverse = ordered.reshape(-1, 2).unique(dim=0, return_inverse=True)
        present = distinct[:, 0] >= 0
        shift = int((~present).sum())  # at most the one pair (-1, -1), which sorts first
        distinct, table = distinct[present], inverse.reshape(ordered.shape[:-1]) - shift
        first, second = distinct.unbind(1)
        count = len(distinct)
        a, b = (emitter.affine(source, Index(places, size)) for places in (first, second))
        middle = emitter.half(a, b, count)
        differ = (first != second).nonzero()[:, 0]
        if len(differ):
            a, b = (emitter.affine(source, Index(places[differ], size)) for places in (first, second))
            w = emitter.neuron(emitter.half(a, b, len(differ), -1.0), absolute())
            neuron = torch.full_like(first, -1)
            neuron[differ] = torch.arange(len(differ), device=neuron.device)
            middle = emitter.sum(middle, emitter.affine(w, Index(neuron, len(differ))))
        source, size = middle, count
    return emitter.affine(source, Index(table[:, 0].contiguous(), size))


def _reflection(emitter: _Emitter, source: int, size: int, function: Reflection) -> int:
    """z + 2 v relu(-v'z)."""
    groups = len(function.index)
    spread = Index(function.groups(size), groups)
    direction = torch.zeros(size, dtype=torch.float64, device=spread.device)
    direction = direction.index_put((function.index.flatten(),), function.directions.flatten())
    w = emitter.neuron(emitter.affine(source, emitter.scale(-direction, size), spread.transpose()), relu())
    return emitter.sum(source, emitter.affine(w, spread, emitter.scale(2 * direction, size)))


def _tied_sort(emitter: _Emitter, source: int, size: int, function: Sort) -> int:
    """(I - 11'/g) sort(u) + 1 m, u = x - 1 m, m the mean."""
    groups, g = function.index.shape
    spread = Index(function.groups(size), groups)

    def mean(node: int, factor: float) -> int:
        return emitter.affine(node, spread.transpose(), emitter.scale(factor / g, groups), spread)

    u = emitter.sum(source, mean(source, -1.0))
    v = emitter.put(Coupled(u, replace(function, centred=True), emitter.name))
    return emitter.sum(v, mean(v, -1.0), mean(source, 1.0))
