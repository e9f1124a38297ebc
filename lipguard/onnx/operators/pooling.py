"""Maxima and averages over windows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.onnx.operators.table import Unread, operator
from lipguard.onnx.operators.windows import around, each, paddings

_MAXIMA: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGES: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@operator("MaxPool")
def max_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
) -> Tensor:
    """Maxima over windows; what is outside the image counts as -inf."""
    dims = _dims(x)
    steps, spread = each(strides, dims), each(dilations, dims)
    before, behind = paddings(x, kernel_shape, steps, spread, pads, auto_pad)
    if before == behind and all(2 * p <= k for p, k in zip(before, kernel_shape, strict=True)):
        return _MAXIMA[dims](x, kernel_shape, steps, before, spread, bool(ceil_mode))
    if max(spread) > 1 or any(p >= k for side in (before, behind) for p, k in zip(side, kernel_shape, strict=True)):
        raise Unread("has paddings that differ between the sides together with dilations, or reach beyond a window.")
    # A window that reaches over the border holds the entry at the border: repeated there, it changes no maximum.
    return _MAXIMA[dims](F.pad(x, around(before, behind), mode="replicate"), kernel_shape, steps, 0, 1, bool(ceil_mode))


@operator("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Averages over windows: over the entries inside the image, or with zeros outside where `count_include_pad` says so."""
    dims = _dims(x)
    steps, spread = each(strides, dims), each(dilations, dims)
    if max(spread) > 1:
        raise Unread("has dilations, which have no reading.")
    before, behind = paddings(x, kernel_shape, steps, spread, pads, auto_pad)
    average = _AVERAGES[dims]
    if before == behind and all(2 * p <= k for p, k in zip(before, kernel_shape, strict=True)):
        return average(x, kernel_shape, steps, before, bool(ceil_mode), bool(count_include_pad))
    if ceil_mode:
        raise Unread("has paddings that differ between the sides together with ceil_mode, which has no reading.")
    sides = around(before, behind)
    means = average(F.pad(x, sides), kernel_shape, steps)
    if count_include_pad:
        return means
    # The mean over k entries, times k over the entries inside the image.
    inside = average(F.pad(torch.ones(1, 1, *x.shape[2:], dtype=x.dtype), sides), kernel_shape, steps)
    return means * (1 / inside)


@operator("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    """The mean of every channel."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    """The maximum of every channel."""
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@operator("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels become blocks of the image; the block's place is the first of the channel's parts (DCR) or the last (CRD)."""
    n, c, h, w = x.shape
    b, deep = blocksize, c // blocksize**2
    if mode == "CRD":
        return x.reshape(n, deep, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, deep, h * b, w * b)
    return x.reshape(n, b, b, deep, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, deep, h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    """Blocks of the image become channels."""
    n, c, h, w = x.shape
    b = blocksize
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


def _dims(x: Tensor) -> int:
    if x.ndim - 2 not in _MAXIMA:
        raise Unread(f"is of a value of {x.ndim} dimensions; images (N, C, ...) of one to three dimensions are read.")
    return x.ndim - 2
