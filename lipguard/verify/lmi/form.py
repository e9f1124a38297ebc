"""The feedback form of a network, rebuilt from its nodes with a bound on every rounding error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lipguard.network import Activation, Affine, Coupled, Implicit, Index, Input, Network, Operator, Sum
from lipguard.rounding import gamma
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.composed import Composed, add, compose
from lipguard.verify.rewriting import neuron_nodes, slope_ends

_THINNEST = 1e-6
"""A slope interval thinner than this is widened to it: a superset, and a multiplier can stay finite."""


class Block(NamedTuple):
    """A block of Q or Y at its place."""

    rows: slice
    columns: slice
    matrix: Enclosed


@dataclass(frozen=True, eq=False)
class Form:
    """The feedback form with rounding radii: Q = [B A] is (n, n + d), Y = [C D] is (m, n + d), both as blocks."""

    q_blocks: tuple[Block, ...]
    y_blocks: tuple[Block, ...]
    neurons: int
    inputs: int
    outputs: int
    alpha: Tensor
    beta: Tensor

    @cached_property
    def q(self) -> Enclosed:
        """Q as one matrix."""
        return self._dense(self.q_blocks, self.neurons)

    @cached_property
    def y(self) -> Enclosed:
        """Y as one matrix."""
        return self._dense(self.y_blocks, self.outputs)

    def _dense(self, blocks: tuple[Block, ...], height: int) -> Enclosed:
        center = torch.zeros(height, self.neurons + self.inputs, dtype=torch.float64, device=self.alpha.device)
        radius = None if all(block.matrix.radius is None for block in blocks) else torch.zeros_like(center)
        for rows, columns, matrix in blocks:
            center[rows, columns] = matrix.center
            if radius is not None and matrix.radius is not None:
                radius[rows, columns] = matrix.radius
        return Enclosed(center, radius)


_Combination = dict[int, Enclosed | Composed | None]
"""A value by source: x (-1) or an activation's outputs (0, 1, ...); None for the identity."""


def feedback_form(network: Network, precise: bool = False) -> Form:
    """The feedback form of the network's nodes, every product enclosed.

    A value is a linear combination of the input (-1) and of activations' outputs (0, 1, ...); None stands for the
    identity. Affine nodes directly behind an input or an activation are exact; compositions carry a radius. Coupled nodes
    stand for tied neurons: the network is one that `rewriting` made.

    Args:
        network: without coupled nodes but those.
        precise: compose in twice the working precision: for networks whose linear paths go through many layers.
    """
    position = {node: k for k, node in enumerate(neuron_nodes(network))}
    size = {-1: network.inputs} | {k: network.sizes[i] for i, k in position.items()}
    offset, n = {}, 0
    for k in range(len(position)):
        offset[k], n = n, n + size[k]
    offset[-1] = n
    combos: list[_Combination] = []
    for i, node in enumerate(network.nodes):
        match node:
            case Input():
                combos.append({-1: None})
            case Affine():
                combos.append({s: _compose(node.operator, e, precise) for s, e in combos[node.source].items()})
            case Activation() | Implicit() | Coupled():
                combos.append({position[i]: None})
            case Sum():
                combos.append(_add([combos[s] for s in node.sources], size, network.device))

    def place(start: int, combo: _Combination) -> Iterator[Block]:
        for s, e in combo.items():
            matrix = _explicit(e, size[s], network.device)
            yield Block(slice(start, start + matrix.center.shape[0]), slice(offset[s], offset[s] + size[s]), matrix)

    blocks: list[Block] = []
    alphas, betas = [], []
    for i, k in position.items():
        node = network.nodes[i]
        assert isinstance(node, Activation | Implicit | Coupled)
        blocks += place(offset[k], combos[node.source])
        if isinstance(node, Implicit):
            own = slice(offset[k], offset[k] + size[k])
            blocks.append(Block(own, own, Enclosed(node.operator.dense())))
        alpha, beta = (s.to(network.device, torch.float64).expand(size[k]) for s in slope_ends(node))
        thin = (beta - alpha) < _THINNEST
        alphas.append(torch.where(thin, alpha - _THINNEST / 2, alpha))
        betas.append(torch.where(thin, beta + _THINNEST / 2, beta))
    empty = torch.zeros(0, dtype=torch.float64, device=network.device)
    slopes = torch.cat([empty, *alphas]), torch.cat([empty, *betas])
    return Form(tuple(blocks), tuple(place(0, combos[-1])), n, network.inputs, network.outputs, *slopes)


def _compose(operator: Operator, e: Enclosed | Composed | None, precise: bool) -> Enclosed | Composed:
    if e is None:
        return Composed.exact(operator.dense()) if precise else Enclosed(operator.dense())
    if isinstance(e, Composed):
        return compose(operator, e)
    center = operator(e.center.T).T
    if isinstance(operator, Index) and not operator.transposed:  # rows are moved, nothing is added
        return Enclosed(center, None if e.radius is None else operator(e.radius.T).T)
    k = operator.shape[1] + 2
    magnitude = operator.abs()
    radius = gamma(k) * magnitude(e.center.abs().T).T
    if e.radius is not None:
        radius = radius + magnitude(e.radius.T).T
    return Enclosed(center, radius * (1 + 4 * gamma(k)))


def _explicit(e: Enclosed | Composed | None, size: int, device: torch.device) -> Enclosed:
    if isinstance(e, Composed):
        return Enclosed(*e.rounded())
    return Enclosed(torch.eye(size, dtype=torch.float64, device=device)) if e is None else e


def _add(parts: list[_Combination], size: dict[int, int], device: torch.device) -> _Combination:
    """Sum of linear combinations; where only one part has a source, its block is taken over unchanged."""
    result: _Combination = {}
    for source in {s: None for part in parts for s in part}:
        blocks = [part[source] for part in parts if source in part]
        if len(blocks) == 1:
            result[source] = blocks[0]
            continue
        if any(isinstance(e, Composed) for e in blocks):
            exact = (e if isinstance(e, Composed) else Composed.exact(_explicit(e, size[source], device).center) for e in blocks)
            result[source] = add(list(exact))
            continue
        explicit = [_explicit(e, size[source], device) for e in blocks]
        center = torch.stack([e.center for e in explicit]).sum(0)
        error = gamma(len(explicit) + 2)
        radius = error * torch.stack([e.center.abs() for e in explicit]).sum(0)
        for e in explicit:
            if e.radius is not None:
                radius = radius + e.radius
        result[source] = Enclosed(center, radius * (1 + 4 * error))
    return result
