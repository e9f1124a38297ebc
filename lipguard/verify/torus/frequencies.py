"""Frequencies of signals on tori by blocks: which there are, which fold together, which are opposite; and their waves."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from lipguard.rounding import UNIT

PHASE = 64 * UNIT
"""Error of a computed wave: the angle, below 2 pi, is wrong by 4 units of it, its sine and cosine by a few more each."""

Counts = tuple[int, ...]
"""Number of blocks, hence of frequencies, along each axis; () for a vector, which has one."""


def grid(counts: Counts, device: torch.device) -> Tensor:
    """All frequencies in row-major order, (F, dims)."""
    return torch.tensor(list(product(*(range(m) for m in counts))), dtype=torch.int64, device=device)


def finer(a: Counts, b: Counts) -> Counts:
    """The larger of two numbers of blocks, one of which divides the other."""
    return a if math.prod(a) >= math.prod(b) and a else b


def waves(turns: Tensor, length: int) -> Tensor:
    """exp(2 pi i turns / length) of integers, each off by at most PHASE: what is left of the turns is exact."""
    angle = turns.remainder(length).to(torch.float64) * (2 * math.pi / length)
    return torch.complex(angle.cos(), angle.sin())


def fold(fine: Counts, coarse: Counts, device: torch.device) -> Tensor:
    """The index of every frequency's remainder on coarser blocks, both in row-major order of all frequencies."""
    return _index(fine, coarse, device, 1)


def mirror(counts: Counts, device: torch.device) -> Tensor:
    """The index of -f for every frequency f."""
    return _index(counts, counts, device, -1)


def _index(fine: Counts, coarse: Counts, device: torch.device, sign: int) -> Tensor:
    index = torch.zeros(math.prod(fine), dtype=torch.int64, device=device)
    if coarse:
        for numbers, m in zip(grid(fine, device).T, coarse, strict=True):
            index = index * m + (sign * numbers) % m
    return index
