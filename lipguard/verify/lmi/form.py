"""The feedback form of a network, which every inequality is of, rebuilt from its nodes with a bound on every rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lipguard.network import Network, Operator
from lipguard.network.walk import combinations
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


def places(network: Network) -> tuple[slice, ...]:
    """The neurons of each activation node."""
    sizes = [network.sizes[i] for i in network.activations]
    return tuple(slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True))


_Coefficient = Enclosed | Composed | int
"""A value's coefficient of a variable, as the transposed matrix; an identity by its size."""


def feedback_form(network: Network, precise: bool = False) -> Form:
    """The feedback form of the network's nodes, every product enclosed.

    A value is a linear combination of the input and of activations' outputs. Affine nodes directly behind these are as exact
    as they are; compositions round. Coupled nodes stand for tied neurons: the network is one that `rewriting` made.

    Args:
        network: without coupled nodes but those.
        precise: compose in twice the working precision: for networks whose linear paths go through many layers.
    """
    kind = Composed if precise else Enclosed
    n, layers = network.neurons, places(network)
    place = dict(zip(network.activations, layers, strict=True)) | {0: slice(n, n + network.inputs)}

    def explicit(e: _Coefficient) -> Enclosed | Composed:
        return kind.of(torch.eye(e, dtype=torch.float64, device=network.device)) if isinstance(e, int) else e

    def through(operator: Operator, e: _Coefficient) -> _Coefficient:
        return kind.of(operator.dense().T, operator.rho) if isinstance(e, int) else e.through(operator)

    def plus(a: _Coefficient, b: _Coefficient) -> _Coefficient:
        return kind.sum([explicit(a), explicit(b)])  # type: ignore[list-item]

    values = combinations(network.nodes, network.sizes.__getitem__, through, plus)
    reads = [(here, values[network.nodes[i].sources[0]]) for i, here in place.items() if i]
    reads.append((slice(n, n + network.outputs), values[-1]))
    blocks = [Block(here, place[s], explicit(e).rounded().mT) for here, value in reads for s, e in value.items()]
    loops = [(place[i], loop) for i in network.activations if (loop := network.nodes[i].loop) is not None]
    blocks += [Block(here, here, Enclosed.of(loop.dense(), loop.rho)) for here, loop in loops]
    present = tuple(block for block in blocks if not block.matrix.zero)
    return Form(present, layers, n, network.inputs, network.outputs, *widened(*network.slopes()))
