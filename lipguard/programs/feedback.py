"""The feedback form of a network, from which the semidefinite programs are made: a proposal's view, never trusted.

The checker has its own (`lipguard.verify.lmi.form`), with a bound on every rounding error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lipguard.network import Network, Operator
from lipguard.programs.rewriting import slope_restricted


@dataclass(frozen=True, eq=False)
class Feedback:
    """p = A x + B w + b, w = phi(p), y = C w + D x + c, in blocks, one row of blocks per activation node.

    Attributes:
        inputs: d, the number of inputs.
        sizes: neurons of each activation node.
        rows: for activation k, the blocks by source: -1 is x (a block of A), l >= 0 is w_l (a block of B, l < k, and l = k
            where the activation is that of an implicit layer).
        out: the blocks of y by source, likewise (D under -1, C under l).
        alpha, beta: slope interval of every neuron, concatenated, shape (sum of sizes,).
        outputs: m, the number of outputs.
        groups: index of the multiplier of each neuron, (sum of sizes,), where some must share one: the neurons of a sort,
            of which only the sum of squares is known not to grow. None for one each.
        scaling: for an implicit layer k, multipliers (n_k,) under which it alone is well posed.
    """

    inputs: int
    outputs: int
    sizes: tuple[int, ...]
    rows: tuple[Mapping[int, Tensor], ...]
    out: Mapping[int, Tensor]
    alpha: Tensor
    beta: Tensor
    groups: Tensor | None = None
    scaling: Mapping[int, Tensor] = field(default_factory=dict)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Place of each activation node's neurons among all neurons."""
        ends = (0, *accumulate(self.sizes))
        return tuple(slice(a, b) for a, b in pairwise(ends))

    def dense(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A (n, d), B (n, n), C (m, n), D (m, d) as dense float64 matrices."""
        n = sum(self.sizes)
        options = {"dtype": torch.float64, "device": self.alpha.device}
        q, y = torch.zeros(n, n + self.inputs, **options), torch.zeros(self.outputs, n + self.inputs, **options)
        for row, blocks in zip(self.slices, self.rows, strict=True):
            for source, block in blocks.items():
                q[row, self._columns(source)] = block
        for source, block in self.out.items():
            y[:, self._columns(source)] = block
        return q[:, n:], q[:, :n], y[:, :n], y[:, n:]

    def _columns(self, source: int) -> slice:
        n = sum(self.sizes)
        return slice(n, n + self.inputs) if source < 0 else self.slices[source]


def feedback_of(network: Network, narrowed: tuple[Tensor, Tensor] | None = None) -> Feedback:
    """The network's feedback form, coupled nodes rewritten.

    Args:
        network: the network.
        narrowed: slopes (alpha, beta), each (n,), in place of the activations' global ones; tied neurons keep [-1, 1].
    """
    network = slope_restricted(network)
    # Every value is a linear combination of x (-1) and of activations' outputs; a float stands for that
    # multiple of the identity, so that no identity matrix of the input's size is ever formed.
    position = {node: k for k, node in enumerate(network.activations)}
    linear: list[_Combination] = []
    for i, node in enumerate(network.nodes):
        if i in position:
            linear.append({position[i]: 1.0})
        elif not node.sources:
            linear.append({-1: 1.0})
        else:
            total: _Combination = {}
            for source in node.sources:
                for s, m in linear[source].items():
                    own = m if node.map is None else _after(node.map, m)
                    total[s] = _plus(total[s], own) if s in total else own
            linear.append(total)
    alpha, beta = network.slopes()
    groups = _groups(network)
    if narrowed is not None:
        # What is known of a tied neuron is known of its group only: it has no slope interval of its own.
        own = torch.ones_like(alpha, dtype=torch.bool) if groups is None else torch.bincount(groups)[groups] == 1
        alpha, beta = (torch.where(own, given, known) for given, known in zip(narrowed, (alpha, beta), strict=True))
    rows = tuple(_matrices(network, linear[network.nodes[i].sources[0]]) for i in network.activations)
    scaling: dict[int, Tensor] = {}
    for k, i in enumerate(network.activations):
        node = network.nodes[i]
        if node.loop is not None and node.posed is not None:
            rows[k][k], scaling[k] = node.loop.dense(), node.posed
    sizes = tuple(network.sizes[i] for i in network.activations)
    out = _matrices(network, linear[-1])
    return Feedback(network.inputs, network.outputs, sizes, rows, out, alpha, beta, groups, scaling)


_Combination = dict[int, Tensor | float]


def _groups(network: Network) -> Tensor | None:
    if not any(node.tied for node in network.nodes):
        return None
    parts, count = [], 0
    for i in network.activations:
        tied, size = network.nodes[i].tied, network.sizes[i]
        label = torch.arange(size, device=network.device) if tied is None else tied.groups(size).to(network.device)
        parts.append(count + label)
        count += int(label.max()) + 1 if size else 0
    return torch.cat(parts)


def _matrices(network: Network, combination: _Combination) -> dict[int, Tensor]:
    size = {-1: network.inputs} | {k: network.sizes[i] for k, i in enumerate(network.activations)}
    return {
        s: m if isinstance(m, Tensor) else m * torch.eye(size[s], dtype=torch.float64, device=network.device)
        for s, m in combination.items()
    }


def _after(operator: Operator, matrix: Tensor | float) -> Tensor | float:
    if isinstance(matrix, Tensor):
        return operator(matrix.T).T
    scalar = operator.scalar()
    return matrix * scalar if scalar is not None else matrix * operator.dense()


def _plus(a: Tensor | float, b: Tensor | float) -> Tensor | float:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a + b
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        matrix, number = (a, b) if isinstance(a, Tensor) else (b, a)
        assert isinstance(matrix, Tensor) and isinstance(number, float)
        return matrix + number * torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return a + b
