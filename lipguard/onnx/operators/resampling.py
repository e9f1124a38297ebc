"""Resampling of images: nearest as a choice of entries, linear as a matrix along each axis.

Source: the operator specification of Resize; the place in the input of output i, for a scale s of an axis of n entries and m
results, by `coordinate_transformation_mode`. Places are computed in float32, as onnxruntime computes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lipguard.onnx.operators.table import Unread, operator


@operator("Resize", since=11)
def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    antialias: int = 0,
    axes: list[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resampling along every axis, or those given, by scales or to sizes."""
    if antialias or exclude_outside or keep_aspect_ratio_policy != "stretch":
        raise Unread("has antialias, exclude_outside or a keep_aspect_ratio_policy, which have no reading.")
    along = [axis % x.ndim for axis in axes] if axes else list(range(x.ndim))
    if sizes is not None and sizes.numel():
        wanted = [int(m) for m in sizes]
        factors = [m / x.shape[axis] for axis, m in zip(along, wanted, strict=True)]
    elif scales is not None and scales.numel():
        factors = [float(s) for s in scales]
        wanted = [math.floor(x.shape[axis] * s) for axis, s in zip(along, factors, strict=True)]
    else:
        raise Unread("has neither scales nor sizes.")
    for axis, m, s in zip(along, wanted, factors, strict=True):
        x = _along(x, axis, m, s, mode, coordinate_transformation_mode, nearest_mode)
    return x


@operator("Resize", since=10)
@operator("Upsample", since=9)
def resize_10(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    """Places are i / s; the nearest is the entry before, where fewer entries are left the one behind."""
    for axis, s in enumerate(float(one) for one in scales):
        nearest = "ceil" if s < 1 else "floor"
        x = _along(x, axis, math.floor(x.shape[axis] * s), s, mode, "asymmetric", nearest)
    return x


@operator("Upsample", since=7)
def upsample_7(x: Tensor, *, scales: Sequence[float], mode: str = "nearest") -> Tensor:
    """The scales as an attribute."""
    return resize_10(x, torch.tensor(scales), mode=mode)


def _along(x: Tensor, axis: int, m: int, s: float, mode: str, transformation: str, nearest: str) -> Tensor:
    n = x.shape[axis]
    if m == n and s == 1:
        return x
    places = _places(n, m, np.float32(s), transformation)
    if mode == "nearest":
        if nearest not in _NEAREST:
            raise Unread(f"has nearest_mode={nearest!r}. {', '.join(_NEAREST)} are read.")
        chosen = _NEAREST[nearest](places).clip(0, n - 1).astype(np.int64)
        return x.index_select(axis, torch.from_numpy(chosen))
    if mode != "linear":
        raise Unread(f"has mode={mode!r}. nearest and linear are read.")
    # Entry i is (1 - t) x[k] + t x[k + 1] at the place k + t, which is moved into the axis.
    places = places.clip(0, n - 1)
    low = np.floor(places).astype(np.int64).clip(0, max(n - 2, 0))
    share = torch.from_numpy((places - low).astype(np.float64))
    matrix = torch.zeros(n, m, dtype=torch.float64)
    matrix[torch.from_numpy(low), torch.arange(m)] += 1 - share
    matrix[torch.from_numpy(np.minimum(low + 1, n - 1)), torch.arange(m)] += share
    return torch.matmul(x.transpose(axis, -1), matrix.to(x.dtype)).transpose(axis, -1)


_NEAREST = {
    "ceil": np.ceil,
    "floor": np.floor,
    "round_prefer_ceil": lambda places: np.floor(places + np.float32(0.5)),
    "round_prefer_floor": lambda places: np.ceil(places - np.float32(0.5)),
}


def _places(n: int, m: int, s: np.float32, transformation: str) -> np.ndarray:
    i, half = np.arange(m, dtype=np.float32), np.float32(0.5)
    if transformation == "half_pixel" or (transformation == "pytorch_half_pixel" and m > 1):
        return (i + half) / s - half
    if transformation == "asymmetric":
        return i / s
    if transformation == "align_corners" and m > 1:
        return i * np.float32(n - 1) / np.float32(m - 1)
    if transformation in ("align_corners", "pytorch_half_pixel"):
        return np.zeros(m, dtype=np.float32)
    if transformation == "half_pixel_symmetric":
        # The middle stays in the middle where the size was rounded.
        shift = np.float32(n / 2 * (1 - m / (float(s) * n)))
        return shift + (i + half) / s - half
    raise Unread(f"has coordinate_transformation_mode={transformation!r}, which has no reading.")
