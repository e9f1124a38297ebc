"""Selections of entries seen as convolutions of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lipguard.network.operators.base import Shape
from lipguard.network.operators.conv import Conv


def moved_alike(index: Tensor, size: int, before: Shape, after: Shape) -> Conv | None:
    """x -> x[index], a zero where it is -1, as a convolution of images of these shapes; None where places move differently."""
    return _gathering(index, size, before, after) or _spreading(index, size, before, after)


def _gathering(index: Tensor, size: int, before: Shape, after: Shape) -> Conv | None:
    """out[c', i] = in[c, s i + o], with c and o for each c'."""
    table = index.reshape(after)
    valid = table >= 0
    if len(before) != len(after) or not bool(valid.any()):
        return None
    places = _places(table.clamp_min(0), before)
    stride, first = [], []
    for axis in range(1, len(after)):
        there = places[axis]
        pairs = valid.narrow(axis, 1, after[axis] - 1) & valid.narrow(axis, 0, after[axis] - 1)
        steps = there.narrow(axis, 1, after[axis] - 1) - there.narrow(axis, 0, after[axis] - 1)
        step = int(steps[pairs][0]) if bool(pairs.any()) else max(1, before[axis] // after[axis])
        if step < 1:
            return None
        own = torch.arange(after[axis], device=table.device).reshape([-1 if a == axis else 1 for a in range(len(after))])
        stride.append(step)
        first.append((there - step * own).expand(after))
    chosen = valid.flatten(1).to(torch.int64).argmax(1)
    some = valid.flatten(1).any(1)
    channel = places[0].flatten(1).gather(1, chosen[:, None])[:, 0]
    offsets = [o.flatten(1).gather(1, chosen[:, None])[:, 0] for o in first]
    padding = [max(0, -int(o[some].min())) for o in offsets]
    kernel = [int(o[some].max()) + p + 1 for o, p in zip(offsets, padding, strict=True)]
    if math.prod(kernel) * before[0] * after[0] > 10_000_000:
        return None
    weight = torch.zeros(after[0], before[0], *kernel, dtype=torch.float64, device=table.device)
    taps = [(o + p)[some] for o, p in zip(offsets, padding, strict=True)]
    weight[(torch.arange(after[0], device=table.device)[some], channel[some], *taps)] = 1.0
    conv = Conv(weight, before[1:], after[1:], tuple(stride), tuple(padding), (1,) * len(stride))
    return conv if _fits(conv) and _same(conv, index, size) else None


def _spreading(index: Tensor, size: int, before: Shape, after: Shape) -> Conv | None:
    """out[c', s i + b] = in[c, i], with c for each c' and b: the adjoint of a convolution with kernel and stride s."""
    if len(before) != len(after) or any(m % n for n, m in zip(before[1:], after[1:], strict=True)):
        return None
    factor = tuple(m // n for n, m in zip(before[1:], after[1:], strict=True))
    table = index.reshape(after)[(slice(None), *(slice(f) for f in factor))]
    weight = torch.zeros(before[0], after[0], *factor, dtype=torch.float64, device=table.device)
    if bool((table < 0).any()) or weight.numel() > 10_000_000:
        return None
    place = torch.meshgrid(*(torch.arange(n, device=table.device) for n in table.shape), indexing="ij")
    weight[(_places(table, before)[0], *place)] = 1.0
    one = (1,) * len(factor)
    conv = Conv(weight, after[1:], before[1:], factor, (0,) * len(factor), one, transposed=True)
    return conv if _same(conv, index, size) else None


def _places(index: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Channel and place along every axis of the entries with these numbers."""
    parts = []
    for size in reversed(shape):
        parts.append(index % size)
        index = index // size
    return parts[::-1]


def _fits(conv: Conv) -> bool:
    sizes = zip(conv.large, conv.small, conv.stride, conv.padding, conv.weight.shape[2:], strict=True)
    return all((n + 2 * p - k) // s + 1 >= m for n, m, s, p, k in sizes)


def _same(conv: Conv, index: Tensor, size: int) -> bool:
    """Whether the two maps are one: on the numbers 1, 2, ... and on ones, so that sums of several entries show."""
    codes = torch.arange(1, size + 1, dtype=torch.float64, device=index.device)
    return all(torch.equal(conv(x), functional.pad(x, (0, 1))[index]) for x in (codes, torch.ones_like(codes)))
