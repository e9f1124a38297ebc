"""Network and module on the same inputs, entry by entry, against what rounding can explain.

The module computes in its own precision, of unit roundoff u; the network's values are taken for exact. Errors are followed
through the network as independent random ones of standard deviation s, entry by entry (Higham, Mary 2019, A new approach to
probabilistic rounding error analysis: with probability close to 1 an inner product of n terms is off by at most a small
multiple of sqrt(n) u |w|'|x|). So each output is measured by the numbers it is made of, not by the largest one in the network.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.network import Activation, Affine, Input, Network, Operator, Sum, Walk
from lipguard.network.vertex import Vertex

_SIGMAS = 40
"""Allowed difference in standard deviations: functions of few entries and fused kernels are not quite the model."""

_ULPS = 8
"""Units of roundoff to which an elementwise function is computed: of its value, and of its argument times its slope."""

_SWITCH = math.exp(-20)
"""torch's softplus is z above its threshold of 20, which is off by so much."""

_SOLVED = 1e-9
"""Relative accuracy to which modules solve for an equilibrium."""


class Comparison:
    """A network, whose values are compared with a module's results.

    Args:
        network: whose values are right.
        steps: the same network with every step that the module takes: what a fold cancels still rounds in the module.
    """

    def __init__(self, network: Network, steps: Network) -> None:
        self.network, self.steps = network, steps
        self._maps: dict[int, tuple[Operator, Operator]] = {}

    def disagreement(self, x: Tensor, y: Tensor, dtype: torch.dtype) -> float | None:
        """The largest difference of a module's results from the network's values, where rounding cannot explain it; else None.

        Args:
            x: inputs, (rows, d).
            y: what the module computed of them in `dtype`, (rows, m); rows with entries that are not finite are left out.
            dtype: floating point.
        """
        rows = y.isfinite().all(1)
        if not bool(rows.any()):
            return None
        x, y = x[rows].double(), y[rows].double()
        with torch.no_grad():
            value, unit = self.network(x), torch.finfo(dtype).eps / 2
            deviation = self.steps.fold(_Rounding(x, unit, self._maps))[-1][1]
        difference = (y - value).abs()
        wrong = difference > _SIGMAS * deviation + torch.finfo(dtype).tiny  # what is smaller may have been flushed to 0
        return float(difference[wrong].max()) if bool(wrong.any()) else None


class _Rounding(Walk[tuple[Tensor, Tensor]]):
    """Values, and the standard deviations of their errors, (rows, size) each."""

    def __init__(self, x: Tensor, unit: float, maps: dict[int, tuple[Operator, Operator]]) -> None:
        self.x, self.unit, self.maps = x, unit, maps

    def input(self, i: int, node: Input) -> tuple[Tensor, Tensor]:
        # Rounded once where the module runs in less than the precision of x.
        return self.x, self.unit * self.x.abs()

    def affine(self, i: int, node: Affine, read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, s = read
        value = node.value(x)
        if i not in self.maps:
            self.maps[i] = node.operator.abs(), node.operator.mapped(torch.square)
        absolute, squared = self.maps[i]
        through, size = squared(s.square()), absolute(x.abs())
        if node.bias is not None:
            size = size + node.bias.abs()
        return value, (through + (self.unit * math.sqrt(node.operator.terms + 1) * size).square()).sqrt()

    def activation(self, i: int, node: Activation, read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, s = read
        value = node.value(x)
        steepest = torch.stack([end.abs().expand(x.shape[1]) for end in node.slopes]).amax(0)
        own = _ULPS * self.unit * (value.abs() + steepest * x.abs().clamp(min=1)) + _SWITCH
        return value, steepest * s + own

    def total(self, i: int, node: Sum, *read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        value = node.value(*(x for x, _ in read))
        through = torch.stack([s for _, s in read]).square().sum(0)
        return value, (through + (self.unit * torch.stack([x.abs() for x, _ in read]).sum(0)).square()).sqrt()

    def other(self, i: int, node: Vertex, *read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Any other function of a few entries: how far errors of both signs move it."""
        (x, s) = read[0]
        value = node.value(x)
        generator = torch.Generator("cpu").manual_seed(0)
        moved = torch.zeros_like(value)
        for _ in range(4):
            sign = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
            moved = torch.maximum(moved, (node.value(x + sign * s) - value).abs())
        solved = _SOLVED * value.abs().amax() if node.loop is not None else 0.0
        return value, 2 * moved + _ULPS * self.unit * value.abs() + solved
