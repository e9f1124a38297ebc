"""Unitary transforms of convolutions on tori and of rows over a window, by their definition, with bounds of all errors."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from lipguard.network import Conv
from lipguard.network.images import Shape
from lipguard.rounding import UNIT, gamma
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.torus.frequencies import PHASE, Counts, finer, grid, waves

Grid = tuple[tuple[int, ...], Counts]
"""A torus: its length along each axis, and its number of blocks."""


def transform(conv: Conv, small: Grid, large: Grid) -> Enclosed:
    """The matrix of a convolution on its tori, large to small, between unitary transforms by blocks.

    Along each axis and for each tap the matrix has a one where the small side's place i reads the large side's place r; its
    transform is (1 / sqrt(b b')) sum over (i, r) of exp(2 pi i (f q' - f q)), i = T q + c, r = T' q' + c'.
    """
    finest = finer(small[1], large[1])
    numbers = grid(finest, conv.device)
    centers, sizes, longest = [], [], 1
    for axis, (stride, padding, dilation) in enumerate(zip(conv.stride, conv.padding, conv.dilation, strict=True)):
        (near, far), (b, b_far) = ((a[axis], c[axis]) for a, c in zip(small, large, strict=True))
        step, step_far = near // b, far // b_far
        f = torch.arange(finest[axis], device=numbers.device)
        taps, masses = [], []
        for tap in range(conv.weight.shape[2 + axis]):
            i = torch.arange(near, device=numbers.device)
            r = (stride * i + dilation * tap - padding) % far
            q, q_far = i // step, r // step_far
            # f q' / b' - f q / b as a multiple of 1 / (b b'), exact
            wave = waves(f[:, None] * (q_far * b - q * b_far), b * b_far) / math.sqrt(b * b_far)
            cell = (i % step) * step_far + r % step_far
            center = wave.new_zeros(len(f), step * step_far).index_add_(1, cell, wave)
            counts = torch.bincount(cell, minlength=step * step_far).to(torch.float64) / math.sqrt(b * b_far)
            taps.append(center.reshape(len(f), step, step_far)[numbers[:, axis]])
            masses.append(counts.reshape(step, step_far) * (1 + 4 * UNIT))
            longest = max(longest, near)
        centers.append(taps)
        sizes.append(masses)
    return _with_kernel(conv, centers, sizes, 2 * PHASE + 4 * gamma(longest + 8))


def _with_kernel(conv: Conv, centers: list[list[Tensor]], sizes: list[list[Tensor]], error: float) -> Enclosed:
    """sum over taps of the product of the axes' transforms and the kernel's matrix."""
    weight = conv.weight.detach().to(torch.float64)
    few, many = conv.channels
    groups = torch.arange(few, device=weight.device) // (few // conv.groups)
    columns = groups[:, None] * weight.shape[1] + torch.arange(weight.shape[1], device=weight.device)
    center = size = None
    for taps in product(*(range(k) for k in weight.shape[2:])):
        own = weight[(slice(None), slice(None), *taps)]
        kernel = weight.new_zeros(few, many).scatter_(1, columns, own)
        wave, mass = centers[0][taps[0]], sizes[0][taps[0]]
        for part, other, t in zip(centers[1:], sizes[1:], taps[1:], strict=True):
            wave = (wave[:, :, None, :, None] * part[t][:, None, :, None, :]).flatten(1, 2).flatten(2, 3)
            mass = torch.kron(mass, other[t])
        term = wave[:, :, None, :, None] * kernel[None, None, :, None, :]
        bound = mass[:, None, :, None] * kernel.abs()[None, :, None, :]
        center = term if center is None else center.add_(term)
        size = bound if size is None else size.add_(bound)
    assert center is not None and size is not None
    dims = len(centers)
    count = math.prod(weight.shape[2:]) + 4 * dims + 8
    # The kernel is off by rho of itself, times waves that are off by 1e-6 at most.
    total = dims * error * (1 + 1e-6) + 4 * gamma(count) + conv.rho * (1 + 1e-5)
    # `size` bounds the sum of absolute values, of which each transform and the sum lose their share.
    bound = size.flatten(2).flatten(0, 1) * (1 + 2 * gamma(count) + dims * error)
    return Enclosed(center.flatten(3).flatten(1, 2), bound * total)


def spectrum(rows: Enclosed, shape: Shape, torus: Grid) -> Enclosed:
    """Rows over the window of an image, as rows over its components: (1 / sqrt(blocks)) sum over q of exp(2 pi i f q / b)."""
    side, blocks = torus
    count, dims, device = len(rows.center), len(side), rows.center.device

    def spread(values: Tensor) -> Tensor:
        full = values.new_zeros(count, shape[0], *side)
        full[(slice(None), slice(None), *(slice(n) for n in shape[1:]))] = values.reshape(count, *shape)
        parts = [n for b, m in zip(blocks, side, strict=True) for n in (b, m // b)]
        return full.reshape(count, shape[0], *parts)

    center, mass, moved = spread(rows.center).to(torch.complex128), spread(rows.center.abs()), spread(rows.spread)
    for axis, b in enumerate(blocks):
        f = torch.arange(b, device=device)
        turn = waves(f[:, None] * f, b) / math.sqrt(b)
        center = (center.movedim(2 + 2 * axis, -1) @ turn.T).movedim(-1, 2 + 2 * axis)
        mass, moved = (m.sum(2 + 2 * axis, keepdim=True) / math.sqrt(b) for m in (mass, moved))
    steps = [2 + 2 * axis for axis in range(dims)]
    order = (*steps, 0, *(s + 1 for s in steps), 1)
    center = center.permute(order).reshape(math.prod(blocks), count, -1)
    terms = sum(blocks) + 8 * dims
    # Of each axis: the phases, their scaling, and the sum; relative to the sum of absolute values.
    own = dims * (PHASE + 4 * UNIT) * (1 + 1e-6) + 4 * gamma(terms)
    radius = (mass * own + moved * (1 + own)).permute(order).reshape(count, -1) * (1 + 2 * gamma(terms))
    return Enclosed(center, radius)


def exact(conv: Conv, before: tuple[int, ...], after: tuple[int, ...], zeros: bool) -> bool:
    """Whether the convolution on the tori agrees with the zero-padded one on the window of its result.

    Place by place: where the small side's place i meets place r of the large side, r must be what it falls on; or one of the
    two is outside its window, and then either the one that is computed is, or (`zeros`) the one that is read.
    """
    small, large = (before, after) if conv.transposed else (after, before)
    for axis in range(len(conv.large)):
        n, m, length, far = conv.large[axis], conv.small[axis], small[axis], large[axis]
        for i, tap in product(range(length), range(conv.weight.shape[2 + axis])):
            r = conv.stride[axis] * i + conv.dilation[axis] * tap - conv.padding[axis]
            falls = r % far
            near_in, far_in, true = i < m, falls < n, i < m and 0 <= r < n
            if near_in and far_in and not (true and falls == r):
                return False
            read_in, computed_in = (near_in, far_in) if conv.transposed else (far_in, near_in)
            if computed_in and not read_in and not zeros:
                return False
    return True
