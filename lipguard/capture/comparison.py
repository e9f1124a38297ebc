"""Network and module on the same inputs, entry by entry, against what rounding can explain.

The module computes in its own precision, of unit roundoff u; the network's values are taken for exact. Errors are followed
through the network as independent random ones of standard deviation s, entry by entry (Higham, Mary 2019, A new approach to
probabilistic rounding error analysis: with probability close to 1 an inner product of n terms is off by at most a small
multiple of sqrt(n) u |w|'|x|). So each output is measured by the numbers it is made of, not by the largest one in the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipguard.network import Activation, Affine, Input, Network, Sum, Walk
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
    """A network's values at some inputs, to be compared with a module's results there.

    Args:
        network: whose values are right.
        steps: the same network with every step that the module takes: what a fold cancels still rounds in the module.
        x: inputs, (rows, d), float64.
        dtypes: the precisions that the module computes in.
    """

    def __init__(self, network: Network, steps: Network, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
        units = torch.tensor([torch.finfo(dtype).eps / 2 for dtype in dtypes], dtype=torch.float64, device=x.device)
        with torch.no_grad():
            self.values = network(x)
            _, variances = steps.conclude(_Rounding(x, units[:, None, None]))
        self._deviation = dict(zip(dtypes, variances.sqrt(), strict=True))

    def disagreement(self, y: Tensor, dtype: torch.dtype) -> float | None:
        """The largest difference of a module's results from the network's values, where rounding cannot explain it; else None.

        Args:
            y: what the module computed in `dtype`, (rows, m); rows with entries that are not finite are left out.
            dtype: one of `dtypes`.
        """
        rows = y.isfinite().all(1)
        difference = (y.double() - self.values).abs()
        wrong = (difference > _SIGMAS * self._deviation[dtype] + torch.finfo(dtype).tiny) & rows[:, None]
        return float(difference[wrong].max()) if bool(wrong.any()) else None


class _Rounding(Walk[tuple[Tensor, Tensor]]):
    """Values, (rows, size), and the variances of their errors for every unit of roundoff, (units, rows, size)."""

    def __init__(self, x: Tensor, units: Tensor) -> None:
        self.x, self.units = x, units

    def input(self, i: int, node: Input) -> tuple[Tensor, Tensor]:
        # Rounded once where the module runs in less than the precision of x.
        return self.x, (self.units * self.x).square()

    def affine(self, i: int, node: Affine, read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, variance = read
        through, size = node.operator.mapped(torch.square)(variance), node.operator.abs()(x.abs())
        if node.bias is not None:
            size = size + node.bias.abs()
        return node.value(x), through + (node.operator.terms + 1) * self.units.square() * size.square()

    def activation(self, i: int, node: Activation, read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, variance = read
        value = node.value(x)
        steepest = torch.maximum(*(end.abs() for end in node.slopes))
        own = value.abs() + steepest * x.abs().clamp(min=1)
        own = _ULPS * self.units * own + node.function.rounding(x) + _SWITCH  # the module's rounding, and that of the value here
        return value, (steepest * variance.sqrt() + own).square_()

    def total(self, i: int, node: Sum, *read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        value = node.value(*(x for x, _ in read))
        through, size = sum(variance for _, variance in read), sum(x.abs() for x, _ in read)
        return value, through + (self.units * size).square()

    def other(self, i: int, node: Vertex, *read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Any other function of a few entries: how far errors of both signs move it."""
        (x, variance) = read[0]
        value = node.value(x)
        generator = torch.Generator("cpu").manual_seed(0)
        moved = torch.zeros(len(variance), *value.shape, dtype=value.dtype, device=value.device)
        for _ in range(4):
            sign = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
            moved = torch.maximum(moved, torch.stack([node.value(x + sign * s.sqrt()) - value for s in variance]).abs())
        solved = _SOLVED * value.abs().amax() if node.loop is not None else 0.0
        return value, (2 * moved + _ULPS * self.units * value.abs() + solved).square()
