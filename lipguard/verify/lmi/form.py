"""The feedback form of a network, which every inequality is of, rebuilt from its nodes with a bound on every rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lipguard.network import Network, Operator
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.composed import Composed

_THINNEST = 1e-6
"""A slope interval thinner than this is widened to it: a superset, and a multiplier can stay finite."""


class Block(NamedTuple):
    """A block of [Q; Y] at its place: outputs come behind neurons in its rows, inputs behind neurons in its columns."""

    rows: slice
    columns: slice
    matrix: Enclosed


@dataclass(frozen=True, eq=False)
class Form:
    """The feedback form with rounding radii: Q = [B A] is (n, n + d), Y = [C D] is (m, n + d), both in blocks.

    Attributes:
        blocks: of [Q; Y], without those that are exactly zero.
        layers: neurons of each activation node; a layer's blocks have all its rows, or all its columns.
        neurons, inputs, outputs: n, d and m.
        alpha, beta: slopes, (n,).
    """

    blocks: tuple[Block, ...]
    layers: tuple[slice, ...]
    neurons: int
    inputs: int
    outputs: int
    alpha: Tensor
    beta: Tensor

    @cached_property
    def q(self) -> Enclosed:
        """Q as one matrix."""
        return self._dense[: self.neurons]

    @cached_property
    def y(self) -> Enclosed:
        """Y as one matrix."""
        return self._dense[self.neurons :]

    @cached_property
    def _dense(self) -> Enclosed:
        n = self.neurons
        center = torch.zeros(n + self.outputs, n + self.inputs, dtype=torch.float64, device=self.alpha.device)
        radius = None if all(block.matrix.radius is None for block in self.blocks) else torch.zeros_like(center)
        for rows, columns, matrix in self.blocks:
            center[rows, columns] = matrix.center
            if radius is not None and matrix.radius is not None:
                radius[rows, columns] = matrix.radius
        return Enclosed(center, radius)

    @cached_property
    def rows(self) -> dict[int, list[Block]]:
        """Blocks by the first of their rows."""
        found: dict[int, list[Block]] = {}
        for block in self.blocks:
            found.setdefault(block.rows.start, []).append(block)
        return found

    def transposed(self) -> Form:
        """The form of J', J the Jacobian for any slopes: the last layer comes first, inputs and outputs change places."""
        blocks = tuple(Block(columns, rows, matrix.mT) for rows, columns, matrix in self.blocks)
        return replace(self, blocks=blocks, layers=self.layers[::-1], inputs=self.outputs, outputs=self.inputs)


def widened(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Slope intervals, thin ones widened: rounding of the ends is far below the width."""
    thin = (beta - alpha) < _THINNEST
    return torch.where(thin, alpha - _THINNEST / 2, alpha), torch.where(thin, beta + _THINNEST / 2, beta)


_Matrix = Enclosed | Composed
_Combination = dict[int, _Matrix | None]
"""A value by source, x (-1) or an activation's outputs (0, 1, ...), as the transposed matrix; None for the identity."""


def feedback_form(network: Network, precise: bool = False) -> Form:
    """The feedback form of the network's nodes, every product enclosed.

    A value is a linear combination of the input (-1) and of activations' outputs (0, 1, ...); None stands for the
    identity. Affine nodes directly behind an input or an activation are as exact as they are; compositions round. Coupled nodes
    stand for tied neurons: the network is one that `rewriting` made.

    Args:
        network: without coupled nodes but those.
        precise: compose in twice the working precision: for networks whose linear paths go through many layers.
    """
    kind = Composed if precise else Enclosed
    position = {node: k for k, node in enumerate(network.activations)}
    size = {-1: network.inputs} | {k: network.sizes[i] for i, k in position.items()}
    offset, n = {}, 0
    for k in range(len(position)):
        offset[k], n = n, n + size[k]
    offset[-1] = n

    def explicit(matrix: _Matrix | None, source: int) -> _Matrix:
        return kind.of(torch.eye(size[source], dtype=torch.float64, device=network.device)) if matrix is None else matrix

    def through(value: _Combination, operator: Operator, bias: Tensor | None) -> _Combination:
        del bias
        return {s: kind.of(operator.dense().T, operator.rho) if e is None else e.through(operator) for s, e in value.items()}

    def total(parts: Sequence[_Combination]) -> _Combination:
        """Where only one part has a source, its block is taken over unchanged."""
        found: _Combination = {}
        for s in {s: None for part in parts for s in part}:
            terms = [part[s] for part in parts if s in part]
            found[s] = terms[0] if len(terms) == 1 else kind.sum([explicit(e, s) for e in terms])  # type: ignore[arg-type]
        return found

    combos: list[_Combination] = [{-1: None}]
    for i, node in enumerate(network.nodes[1:], 1):
        neurons: _Combination = {position[i]: None} if i in position else {}
        combos.append(neurons or node.linear([combos[s] for s in node.sources], through, total))

    def place(start: int, combo: _Combination) -> Iterator[Block]:
        for s, e in combo.items():
            matrix = explicit(e, s).rounded().mT
            yield Block(slice(start, start + len(matrix.center)), slice(offset[s], offset[s] + size[s]), matrix)

    layers = tuple(slice(offset[k], offset[k] + size[k]) for k in position.values())
    blocks = [*place(n, combos[-1])]
    for i, here in zip(position, layers, strict=True):
        node = network.nodes[i]
        blocks += place(here.start, combos[node.sources[0]])
        if node.loop is not None:
            blocks.append(Block(here, here, Enclosed(node.loop.dense())))
    present = tuple(block for block in blocks if not block.matrix.zero)
    return Form(present, layers, n, network.inputs, network.outputs, *widened(*network.slopes()))
