"""Coupled nodes as the checks read them: affine maps and neurons, derived here anew, exact in real arithmetic.

What a neuron is, and their order, is a convention with the provers, whose multipliers and phases come in it:

    a pair a, b of a sort, or of the tree of a maximum:  w = |(a - b)/2|,  max = (a + b)/2 + w,  min = (a + b)/2 - w
    a reflection along v:                                w = max(-v'z, 0),  result = z + 2 v w
    a tied group of g > 2:                               v = sort(u), all of u at once (see `with_tied_neurons`)
    a softmax, a log-sum-exp, a length:                  tied neurons as they stand (`lipguard.network.contraction`)

Every coefficient below is a floating-point number that stands for itself, so that the rewritten network is the same
function, without rounding; what rounds when its maps are composed is bounded by those who compose them.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import torch
from torch import Tensor

from lipguard.errors import NotCertified, UnsupportedQuery
from lipguard.network import Activation, Affine, Coupled, Diagonal, Index, Network, Node, Operator, Sum
from lipguard.network.activations import PiecewiseLinear
from lipguard.network.contraction import Contraction
from lipguard.network.coupled import Maxima, Reflection, Sort, comparators

_LARGEST_SORTED = 16
"""Entries up to which comparators are proved to sort: by all inputs of zeros and ones."""


def with_tied_neurons(network: Network) -> Network:
    """The network of `Multipliers`: neurons of slope intervals, and sorts of more than two entries as tied neurons.

    With c the number nearest to 1/g and d = 1 - g c, let m = c 1'x, u = x - 1 m, v = sort(u) = sort(x) - 1 m. Then
    c 1'v = c 1'u = m - c g m = d m, so that sort(x) = v + 1 m = (v - 1 c 1'v) + 1 m + 1 d m. Sorting does not lengthen
    any difference of two vectors: sum_j (u_j^2 - v_j^2) >= 0 along increments, for slopes [-1, 1] and one multiplier.
    """
    return _rewritten(network, tied=True)


def neurons_only(network: Network) -> Network:
    """The network of phases and patterns: piecewise-linear neurons, sorts made of comparators.

    Raises:
        UnsupportedQuery: a sort of more than 16 entries.
    """
    return _rewritten(network, tied=False)


def tie(network: Network, t: Tensor) -> Tensor:
    """One multiplier for each tied group: the mean of those given, which any non-negative number may replace.

    Args:
        network: the outcome of `with_tied_neurons`.
        t: multipliers of all neurons, (n,).
    """
    start, out = 0, t.clone()
    for i in network.activations:
        if (function := network.nodes[i].tied) is not None:
            places = start + function.index
            out[places] = t[places].mean(1, keepdim=True).expand(-1, places.shape[1])
        start += network.sizes[i]
    return out


class _Nodes:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.device = torch.device("cpu")

    def add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def read(self, source: int, places: list[int] | Tensor, size: int) -> int:
        """Entries at places, -1 for zero."""
        return self.apply(source, Index(torch.as_tensor(places, dtype=torch.int64, device=self.device), size))

    def apply(self, source: int, operator: Operator) -> int:
        return self.add(Affine(source, operator))

    def times(self, source: int, factor: float | Tensor, size: int) -> int:
        return self.apply(source, Diagonal(torch.as_tensor(factor, dtype=torch.float64, device=self.device), size))

    def neuron(self, source: int, left: float, right: float) -> int:
        """Slope `left` below 0, `right` above."""
        breaks, pieces, value = (torch.tensor(v, dtype=torch.float64, device=self.device) for v in ([0.0], [left, right], 0.0))
        return self.add(Activation(source, PiecewiseLinear("neuron", breaks, pieces, value)))


def _rewritten(network: Network, tied: bool) -> Network:
    if not any(isinstance(node, Coupled) for node in network.nodes):
        return network
    out, place = _Nodes(), list[int]()
    out.device = network.device
    for node in network.nodes:
        if not isinstance(node, Coupled):
            place.append(out.add(node.moved(place.__getitem__)))
            continue
        source, size = place[node.source], network.sizes[node.source]
        match node.function:
            case Maxima(index=index):
                place.append(_windows(out, source, size, index.tolist()))
            case Contraction() if tied:
                # Tied neurons as it stands: no group's sum of squares grows along increments.
                place.append(out.add(Coupled(source, node.function, node.name)))
            case Contraction():
                raise UnsupportedQuery(
                    f"{node.name or 'a node'} is a smooth function of groups ({type(node.function).__name__}): it has no phases "
                    "and no range on a domain here. The methods 'lipsdp-neuron', 'lipsdp-layer', 'spectral' and 'sampling' know "
                    "it; or bound what is before it with submodule=...."
                )
            case Reflection():
                place.append(_reflection(out, source, size, node.function))
            case Sort(index=index) if tied and index.shape[1] > 2:
                place.append(_tied(out, source, size, index))
            case Sort(index=index):
                place.append(_sorted(out, source, size, index.tolist()))
            case _:
                raise NotCertified(f"no check knows the function {type(node.function).__name__}.")
    return Network(tuple(out.nodes))


def _sorted(out: _Nodes, source: int, size: int, groups: list[list[int]]) -> int:
    for layer in _proved_comparators(len(groups[0])):
        pairs = [(group[i], group[j]) for group in groups for i, j in layer]
        source = _exchange(out, source, size, pairs)
    return source


def _exchange(out: _Nodes, source: int, size: int, pairs: list[tuple[int, int]]) -> int:
    """The larger of every pair to its first place, the smaller to its second."""
    upper, lower = (out.read(source, [pair[side] for pair in pairs], size) for side in (0, 1))
    n = len(pairs)
    w = out.neuron(out.times(out.add(Sum((upper, out.times(lower, -1.0, n)))), 0.5, n), -1.0, 1.0)
    # y = x + (x_partner - x)/2 +- w for members of pairs; x itself for others.
    partner, own, first, second = list(range(size)), [0.0] * size, [-1] * size, [-1] * size
    for k, (i, j) in enumerate(pairs):
        partner[i], partner[j], own[i], own[j], first[i], second[j] = j, i, 0.5, 0.5, k, k
    half = torch.tensor(own, dtype=torch.float64)
    kept = out.times(source, 1 - half, size)
    other = out.times(out.read(source, partner, size), half, size)
    return out.add(Sum((kept, other, out.read(w, first, n), out.times(out.read(w, second, n), -1.0, size))))


def _proved_comparators(size: int) -> list[tuple[tuple[int, int], ...]]:
    """Comparators that sort: as proposed, and proved by the 0-1 principle (Knuth, volume 3, 5.3.4, theorem Z)."""
    if size > _LARGEST_SORTED:
        raise UnsupportedQuery(
            f"a sort of {size} entries is followed piece by piece up to {_LARGEST_SORTED}. "
            "Use method='lipsdp-neuron' or 'spectral', which need no pieces."
        )
    layers = list(comparators(size))
    numbers = torch.arange(2**size)
    bits = torch.stack([(numbers >> k) & 1 for k in range(size)])
    for layer in layers:
        if len(set(itertools.chain(*layer))) != 2 * len(layer):
            raise NotCertified("comparators of one layer overlap.")
        for i, j in layer:
            bits[i], bits[j] = torch.maximum(bits[i], bits[j]), torch.minimum(bits[i], bits[j])
    if bool((bits[1:] > bits[:-1]).any()):
        raise NotCertified(f"the comparators do not sort {size} entries.")
    return layers


def _windows(out: _Nodes, source: int, size: int, table: list[list[int]]) -> int:
    """Maxima of windows by a tree: columns 0 and 1, 2 and 3, ... of each are joined, then the same with what comes out.

    Equal pairs of a level are one entry; entries stand in the order of their pairs, a lone entry a as (a, a).
    """
    while len(table[0]) > 1:
        merged = [[_join(row[k : k + 2]) for k in range(0, len(row), 2)] for row in table]
        entries = sorted({pair for row in merged for pair in row if pair is not None})
        rank = {pair: k for k, pair in enumerate(entries)}
        table = [[-1 if pair is None else rank[pair] for pair in row] for row in merged]
        a, b = (out.read(source, [pair[side] for pair in entries], size) for side in (0, 1))
        count = len(entries)
        double = out.add(Sum((a, b)))
        proper = [k for k, pair in enumerate(entries) if pair[0] != pair[1]]
        if proper:
            apart = out.add(Sum((a, out.times(b, -1.0, count))))
            w = out.neuron(out.times(out.read(apart, proper, count), 0.5, len(proper)), -1.0, 1.0)
            number = {k: j for j, k in enumerate(proper)}
            spread = out.read(w, [number.get(k, -1) for k in range(count)], len(proper))
            source = out.add(Sum((out.times(double, 0.5, count), spread)))
        else:
            source = out.times(double, 0.5, count)
        size = count
    return out.read(source, [row[0] for row in table], size)


def _join(places: list[int]) -> tuple[int, int] | None:
    present = sorted(place for place in places if place >= 0)
    return (present[0], present[-1]) if present else None


def _reflection(out: _Nodes, source: int, size: int, function: Reflection) -> int:
    """z + 2 v w, w = max(-v'z, 0): z where v'z >= 0, z - 2 v (v'z) elsewhere."""
    owner, v = torch.empty(size, dtype=torch.int64), torch.empty(size, dtype=torch.float64)
    for k, (places, direction) in enumerate(zip(function.index.tolist(), function.directions.tolist(), strict=True)):
        owner[places], v[places] = k, torch.tensor(direction, dtype=torch.float64)
    own = Index(owner.to(out.device), len(function.index))
    w = out.neuron(out.apply(out.times(source, -v, size), own.transpose()), 0.0, 1.0)
    return out.add(Sum((source, out.times(out.apply(w, own), 2 * v, size))))


def _tied(out: _Nodes, source: int, size: int, index: Tensor) -> int:
    groups, g = index.shape
    c = 1 / g
    d = 1 - g * Fraction(c)
    assert Fraction(float(d)) == d  # a small multiple of 2^-52 / g
    owner = torch.empty(size, dtype=torch.int64, device=out.device)
    owner[index.flatten()] = torch.arange(groups, device=out.device).repeat_interleave(g)
    own = Index(owner, groups)

    def total(node: int) -> int:
        return out.times(out.apply(node, own.transpose()), c, groups)

    m = total(source)
    u = out.add(Sum((source, out.apply(out.times(m, -1.0, groups), own))))
    v = out.add(Coupled(u, Sort(index, centred=True)))
    terms = [v, out.apply(out.times(total(v), -1.0, groups), own), out.apply(m, own)]
    if d:
        terms.append(out.apply(out.times(m, float(d), groups), own))
    return out.add(Sum(tuple(terms)))
