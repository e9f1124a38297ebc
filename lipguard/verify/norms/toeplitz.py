"""The Toeplitz bound of a convolution, proved: cheap, since no matrix of channels is factorised.

With K(w), channels by channels, the convolution's symbol (see `convolution`; strides by polyphase), each row of blocks i of
the block-circulant matrix satisfies ||row_i||^2 <= max_w g_i(w), g_i(w) = sum_j |K_ij(w)|^2, and rows below each other add up:

    ||W||^2 <= sum_i max_w g_i(w),     or the same with rows and columns exchanged (Araujo et al. 2021, arXiv:2006.08391).

g_i is a trigonometric polynomial, g_i(w) = sum_m c_m cos(m w), whose coefficients are correlations of the kernel with itself.
On a torus that holds the image the maximum is over the torus's own frequencies. Where there are too many of them a coarser
grid of S points an axis is taken: at a maximum w* of a trigonometric polynomial g of degree n, g(w) >= g(w*) cos(n (w - w*))
for |w - w*| <= pi / n (M. Riesz 1914), and a grid point is within pi / S of w*, so that max g is at most the maximum over the
grid divided by cos(n pi / S), axis after axis.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from lipguard.network import Conv
from lipguard.rounding import TINY, down, gamma, sqrt_up, sum_up, up
from lipguard.verify.norms.convolution import kernel_bound, polyphase
from lipguard.verify.norms.matrix_norm import unscaled
from lipguard.verify.torus.frequencies import PHASE, waves

_POINTS = 2**16
"""Frequencies up to which the torus's own are gone through."""

_SHIFTS = 4096
"""Correlations up to which they are formed; kernels as large as their image have another bound."""


def toeplitz_bound(conv: Conv) -> float:
    """Upper bound of a convolution's norm from 2 to 2 by the smaller of the two Toeplitz sums; its norm if it is one matrix."""
    largest = float(conv.weight.abs().max())
    if largest == 0:
        return 0.0
    # A kernel of one tap, or with one place, is a matrix.
    matrix = 1 in (math.prod(conv.weight.shape[2:]), math.prod(conv.small))

    def bound(scale: float) -> float:
        scaled = replace(conv, weight=conv.weight.detach() * scale)
        return up(kernel_bound(scaled) if matrix else _bound(scaled)) + conv.weight.numel() * TINY

    return unscaled(lambda scale: up(bound(scale)), largest)


def _bound(conv: Conv) -> float:
    spread, lengths = polyphase(conv)
    degrees = [n - 1 for n in spread.shape[4:]]
    if math.prod(2 * n + 1 for n in degrees) > _SHIFTS:
        return kernel_bound(conv)
    grid = list(lengths)
    while math.prod(grid) > _POINTS:
        axis = max(range(len(grid)), key=lambda a: grid[a])
        coarse = max(16 * degrees[axis] + 1, 16)
        if grid[axis] <= coarse:
            break
        grid[axis] = max(coarse, grid[axis] // 2)
    loss = 1.0
    for n, size, length in zip(degrees, grid, lengths, strict=True):
        if size < length:
            loss = down(loss * down(math.cos(math.pi * n / size), 8))
    by_row, by_column = _correlations(spread, degrees)
    mass = spread.abs().flatten(4).sum(-1) ** 2  # |g| is at most the sum of squares of sums of |K|
    sums = [
        _largest(by_row, mass.sum((2, 3)), degrees, grid, spread[0, 0].numel()),
        _largest(by_column, mass.sum(1).flatten(1), degrees, grid, spread[0, :, 0, 0].numel()),
    ]
    square = min(float(total.max()) for total in sums)
    return sqrt_up(up(square / loss))


def _correlations(spread: Tensor, degrees: list[int]) -> tuple[Tensor, Tensor]:
    """c_m = sum over places a of K(a) K(a + m), summed over inputs (groups, out, *shifts), over outputs (groups, in, *shifts)."""
    rows, columns = [], []
    for shift in product(*(range(-n, n + 1) for n in degrees)):
        here = tuple(slice(max(0, -m), n + 1 - max(0, m)) for m, n in zip(shift, degrees, strict=True))
        there = tuple(slice(max(0, m), n + 1 - max(0, -m)) for m, n in zip(shift, degrees, strict=True))
        each = (spread[(..., *here)] * spread[(..., *there)]).flatten(4).sum(-1)
        rows.append(each.sum((2, 3)))
        columns.append(each.sum(1).flatten(1))
    sizes = [2 * n + 1 for n in degrees]
    return tuple(torch.stack(part, -1).unflatten(-1, sizes) for part in (rows, columns))  # type: ignore[return-value]


def _largest(coefficients: Tensor, mass: Tensor, degrees: list[int], grid: list[int], terms: int) -> Tensor:
    """Upper bound of sum_i max_w g_i(w) for every group, over the grid's frequencies."""
    value = coefficients.to(torch.complex128).flatten(0, 1)
    for n, size in zip(degrees, grid, strict=True):
        turns = torch.arange(-n, n + 1, device=value.device)[:, None] * torch.arange(size, device=value.device)
        # The shifts contracted are always the first that are left; their frequencies come last.
        value = torch.einsum("im...,mw->i...w", value, waves(turns, size))
    top = value.real.flatten(1).amax(1).reshape(mass.shape)
    # sum |c_m| <= mass: one relative error for the correlations, one for the phases and sums of every axis; all counted twice
    count = terms + coefficients[0, 0].numel() + 16
    error = mass * (2 * len(degrees) * (PHASE + 4 * gamma(count)) + 4 * gamma(count)) * 2 + count * count * TINY
    return sum_up((top + error).clamp_min(0), dim=1)
