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

from lipguard.network import Activation, Affine, Input, Network, Operator, Sum, Walk
from lipguard.network.vertex import Vertex

_SIGMAS = 40
"""Allowed difference in standard deviations: functions of few entries and fused kernels are not quite the model."""

_ULPS = 8
"""Units of roundoff to which an elementwise function is computed: of its value, and of its argument times its slope."""

_FLAT = 8.0
"""Arguments beyond which torch's functions that end flat are flat in every precision."""

_SWITCH = math.exp(-20)
"""torch's softplus is z above its threshold of 20, which is off by so much."""

_ENTRIES = 2**20
"""Entries of one node's value that are computed at once: larger values leave the cache, and fresh memory is slow."""

Maps = dict[int, tuple[Operator, Operator]]
"""By a node's index: its operator with the absolute values of the coefficients, and with their squares."""


class Comparison:
    """A network's values at some inputs, to be compared with a module's results there.

    Args:
        network: whose values are right.
        steps: the same network with every step that the module takes: what a fold cancels still rounds in the module.
        x: inputs, (rows, d), float64.
        dtypes: the precisions that the module computes in.
        maps: of the steps: kept for further inputs.
    """

    def __init__(self, network: Network, steps: Network, x: Tensor, dtypes: Sequence[torch.dtype], maps: Maps) -> None:
        kinds = [torch.finfo(dtype) for dtype in dtypes]
        units, least = (
            torch.tensor(numbers, dtype=torch.float64, device=x.device)[:, None, None]
            for numbers in ([kind.eps / 2 for kind in kinds], [kind.smallest_normal * kind.eps for kind in kinds])
        )
        parts = x.split(max(1, _ENTRIES // max(steps.sizes)))
        with torch.no_grad():
            self.values = torch.cat([network(part) for part in parts])
            deviations = torch.cat([steps.conclude(_Rounding(part, units, least, maps))[1] for part in parts], dim=1)
        self._deviation = dict(zip(dtypes, deviations, strict=True))

    def disagreement(self, y: Tensor, dtype: torch.dtype) -> float | None:
        """The largest difference of a module's results from the network's values, where rounding cannot explain it; else None.

        Args:
            y: what the module computed of the first rows in `dtype`, (rows, m); rows that are not finite are left out.
            dtype: one of `dtypes`.
        """
        value, deviation = self.values[: len(y)], self._deviation[dtype][: len(y)]
        difference = (y.double() - value).abs()
        wrong = (difference > _SIGMAS * deviation + torch.finfo(dtype).tiny) & y.isfinite().all(1, keepdim=True)
        return float(difference[wrong].max()) if bool(wrong.any()) else None


class _Rounding(Walk[tuple[Tensor, Tensor]]):
    """Values, (rows, size), and the standard deviations of their errors for every precision, (precisions, rows, size).

    Args:
        x: inputs.
        units, least: unit of roundoff and least positive number of each precision, (precisions, 1, 1).
        maps: of the nodes.
    """

    def __init__(self, x: Tensor, units: Tensor, least: Tensor, maps: Maps) -> None:
        self.x, self.units, self.least, self.maps = x, units, least, maps

    def input(self, i: int, node: Input) -> tuple[Tensor, Tensor]:
        # Rounded once where the module runs in less than the precision of x.
        return self.x, self.units * self.x.abs()

    def affine(self, i: int, node: Affine, read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, s = read
        terms = node.operator.terms
        if i not in self.maps:
            self.maps[i] = node.operator.abs(), node.operator.mapped(torch.square) if terms > 1 else node.operator
        absolute, squared = self.maps[i]
        # Errors of one term go through as they are, however small; those of several add up as independent ones do.
        through = absolute(s) if terms <= 1 else squared(s.square()).sqrt_()
        size = absolute(x.abs())
        if node.bias is not None:
            size = size + node.bias.abs()
        factor = math.sqrt(terms + 1)
        # The larger of the two, not their sum: additions of subnormal numbers take a hundred times as long as others.
        own = (size * (factor * self.units)).clamp_(min=factor * self.least)
        return node.value(x), own.hypot_(through)

    def activation(self, i: int, node: Activation, read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, s = read
        value = node.value(x)
        # The error of the argument, with that of computing the function as it were there; and that of the value.
        spread = s + _ULPS * self.units * x.abs().clamp(min=1)
        steepest = torch.maximum(*(end.abs() for end in node.slopes))
        through = steepest * spread
        if bool((_SIGMAS * through > value.abs().amax(1, keepdim=True)).any()):
            # Errors of very large numbers, as of a mask of -1e9, end where the function is flat.
            through = torch.minimum(through, torch.stack([_moved(node, x, value, each) for each in spread]))
        # Of the value, in the module and here. Where a function is nearly flat it may be a difference of numbers of the size of
        # its argument, which are equal in the end: z (1 + erf(z)).
        size = value.abs() + steepest * x.abs().clamp(max=_FLAT)
        own = _ULPS * self.units * size + node.function.rounding(x) + _SWITCH
        return value, through + own

    def total(self, i: int, node: Sum, *read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        value = node.value(*(x for x, _ in read))
        size = sum(x.abs() for x, _ in read)
        return value, sum(s for _, s in read) + self.units * size

    def other(self, i: int, node: Vertex, *read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Any other function of a few entries: how far errors of both signs move it."""
        (x, deviation) = read[0]
        value = node.value(x)
        generator = torch.Generator("cpu").manual_seed(0)
        moved = torch.zeros(len(deviation), *value.shape, dtype=value.dtype, device=value.device)
        for _ in range(4):
            sign = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
            moved = torch.maximum(moved, torch.stack([node.value(x + sign * s) - value for s in deviation]).abs())
        # An iteration for an equilibrium may end where half of the digits are right, of the largest numbers of its batch.
        solved = self.units.sqrt() * torch.maximum(value.abs().amax(), x.abs().amax()) if node.loop is not None else 0.0
        return value, 2 * moved + _ULPS * self.units * value.abs() + solved


def _moved(node: Activation, x: Tensor, value: Tensor, s: Tensor) -> Tensor:
    """How far a function is moved by errors of one standard deviation s, and of the allowed multiple of it, in units of s."""
    steps = [(node.value(x + k * sign * s) - value).abs() / k for k in (1, _SIGMAS) for sign in (-1, 1)]
    return torch.stack(steps).amax(0)
