"""Activations that preserve gradient norms: each is orthogonal almost everywhere, so 1-Lipschitz in the 2-norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipguard.capture.capture import lowers
from lipguard.capture.rules.coupled import group_sort, householder, maxmin
from lipguard.capture.trace import Trace, Value

__all__ = ["GroupSort", "Householder", "MaxMin"]


class GroupSort(nn.Module):
    """Entries of neighbouring channels sorted in ascending order, group by group.

    Args:
        group_size: channels in a group; it must divide the number of channels. None sorts all of them (FullSort).

    Shape: (B, C, ...) to the same; channels are dimension 1, every position is sorted by itself.
    Raises:
        ValueError: the group size is not a positive whole number; when called, it does not divide the channels.
    Source: Anil, Lucas, Grosse 2019, arXiv:1811.05381, section 4.1.
    """

    def __init__(self, group_size: int | None = 2) -> None:
        super().__init__()
        if group_size is not None and (not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1):
            raise ValueError(
                f"GroupSort(group_size={group_size!r}): a group size is a whole number >= 1, or None for all channels."
            )
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """Sort every group."""
        size = self._size(x.shape)
        return x.unflatten(1, (-1, size)).sort(2).values.flatten(1, 2)

    def extra_repr(self) -> str:
        """The group size."""
        return f"group_size={self.group_size}"

    def _size(self, shape: torch.Size) -> int:
        channels = _channels(self, shape)
        size = channels if self.group_size is None else self.group_size
        if channels % size:
            raise ValueError(f"GroupSort(group_size={size}) is given {channels} channels, which groups of {size} do not divide.")
        return size


class MaxMin(nn.Module):
    """(max(a, b), min(a, b)) for the halves a, b of the channels.

    GroupSort of groups of two, with pairs c and c + C/2 instead of neighbours: no entry moves but to its partner's place.

    Shape: (B, C, ...) to the same, C even; channels are dimension 1.
    Raises:
        ValueError: when called, the number of channels is odd.
    Source: Anil, Lucas, Grosse 2019, arXiv:1811.05381; in this order Singla, Singla, Feizi 2022, arXiv:2108.04062.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maxima, then minima."""
        a, b = _pairs(self, x)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


class Householder(nn.Module):
    """Pairs z = (a, b) of the halves of the channels: z where v'z > 0, its reflection z - 2 v v'z elsewhere.

    v = (-sin(theta / 2), cos(theta / 2)) with one trainable angle for each pair. The start, theta = pi/2, is
    (min(a, b), max(a, b)).

    Args:
        channels: C, even.

    Shape: (B, C, ...) to the same; channels are dimension 1.
    Raises:
        ValueError: the number of channels is odd, or when called another one.
    Source: Singla, Singla, Feizi 2022, arXiv:2108.04062, equation 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"Householder(channels={channels}): pairs of channels need an even number of them.")
        self.channels = channels
        self.theta = nn.Parameter(torch.full((channels // 2,), math.pi / 2))

    @property
    def directions(self) -> Tensor:
        """v of each pair, (C/2, 2)."""
        return _directions(self.theta)

    def forward(self, x: Tensor) -> Tensor:
        """z + 2 v max(-v'z, 0)."""
        if _channels(self, x.shape) != self.channels:
            raise ValueError(f"Householder(channels={self.channels}) is given {x.shape[1]} channels.")
        a, b = x.chunk(2, 1)
        v = self.directions.reshape(-1, 2, *[1] * (x.ndim - 2))
        beyond = 2 * torch.relu(-(a * v[:, 0] + b * v[:, 1]))
        return torch.cat([a + v[:, 0] * beyond, b + v[:, 1] * beyond], 1)

    def extra_repr(self) -> str:
        """The number of channels."""
        return f"{self.channels}"


def _directions(theta: Tensor) -> Tensor:
    return torch.stack([-torch.sin(theta / 2), torch.cos(theta / 2)], 1)


def _channels(module: nn.Module, shape: torch.Size) -> int:
    if len(shape) < 2:
        raise ValueError(f"{type(module).__name__} is given shape {tuple(shape)}; (B, C, ...) is needed.")
    return shape[1]


def _pairs(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    if _channels(module, x.shape) % 2:
        raise ValueError(f"{type(module).__name__} is given {x.shape[1]} channels; pairs need an even number of them.")
    a, b = x.chunk(2, 1)
    return a, b


@lowers(GroupSort)
def _group_sort(trace: Trace, module: GroupSort, x: Value) -> int:
    return group_sort(trace, x, x.tensor.shape[1] if module.group_size is None else module.group_size)


@lowers(MaxMin)
def _maxmin(trace: Trace, module: MaxMin, x: Value) -> int:
    return maxmin(trace, x)


@lowers(Householder)
def _householder(trace: Trace, module: Householder, x: Value) -> int:
    return householder(trace, x, _directions(trace.constant(module.theta, "theta")))
