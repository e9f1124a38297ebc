"""Entries by their rank: median, kthvalue, quantile, and running maxima: sorts and selections."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lipguard.capture.rules.arithmetic import scaled
from lipguard.capture.rules.coupled import amax, amin, group_sort
from lipguard.capture.rules.linear import einsum
from lipguard.capture.rules.rearrange import moved
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import UNKNOWN, Trace, Value
from lipguard.network.coupled import Maxima


@lowers("median", "nanmedian")
def median(trace: Trace, input: Value, dim: int | None = None, keepdim: bool = False) -> int | tuple[int, int]:
    """The middle entry along a dimension, of an even number the lower one of two; over everything a question to the values."""
    if dim is None:
        return UNKNOWN
    return kthvalue(trace, input, (input.tensor.shape[dim] - 1) // 2 + 1, dim, keepdim)


@lowers("kthvalue")
def kthvalue(trace: Trace, input: Value, k: int, dim: int = -1, keepdim: bool = False) -> tuple[int, int]:
    """The k-th smallest entry along a dimension."""
    dim = _inside(trace, input, dim)
    return moved(trace, _ascending(trace, input, dim), lambda code: code.select(dim, k - 1)).node, UNKNOWN


@lowers("msort")
def msort(trace: Trace, input: Value) -> int:
    """Sorts along the first dimension, which is the batch."""
    trace.refuse("sorts the samples of a batch.")


@lowers("quantile", "nanquantile")
def quantile(
    trace: Trace, input: Value, q: float | Tensor, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> int:
    """A combination of two neighbours in the order along a dimension."""
    if dim is None:
        return UNKNOWN
    if isinstance(q, Value) or (isinstance(q, Tensor) and q.ndim):
        trace.refuse("takes several quantiles, or one that depends on the input. Give one number q.")
    dim = _inside(trace, input, dim)
    size = input.tensor.shape[dim]
    # torch computes the rank in the input's own precision.
    rank = float(torch.as_tensor(q, dtype=input.tensor.dtype) * (size - 1))
    low, high = math.floor(rank), math.ceil(rank)
    shares = {"linear": rank - low, "lower": 0.0, "higher": 1.0, "midpoint": 0.5, "nearest": float(round(rank) - low)}
    if interpolation not in shares:
        trace.refuse(f"interpolates by {interpolation!r}, which is not known.")
    weight = torch.zeros(size, dtype=torch.float64, device=input.tensor.device)
    weight[low] += 1 - shares[interpolation]
    weight[high] += shares[interpolation]
    names = "abcdefgh"[: input.tensor.ndim]
    ordered = _ascending(trace, input, dim)
    return einsum(trace, f"{names},{names[dim]}->{names.replace(names[dim], '')}", ordered, weight)


@lowers("aminmax")
def aminmax(trace: Trace, input: Value, *, dim: int | None = None, keepdim: bool = False) -> tuple[int, int]:
    """Smallest and largest entries along a dimension."""
    return amin(trace, input, dim, keepdim), amax(trace, input, dim, keepdim)


@lowers("cummax")
def cummax(trace: Trace, input: Value, dim: int) -> tuple[int, int]:
    """The largest of the first entries along a dimension."""
    dim = _inside(trace, input, dim)
    size = input.tensor.shape[dim]
    if size == 1:
        return input.node, UNKNOWN
    codes = torch.arange(input.size, device=input.tensor.device).reshape(input.tensor.shape[1:]).movedim(dim - 1, -1)
    first = torch.ones(size, size, dtype=torch.bool, device=codes.device).tril()
    index = torch.where(first, codes.unsqueeze(-2), -1).movedim(-2, dim - 1)  # (..., step, ..., place)
    return trace.coupled(input, Maxima(index.reshape(-1, size))), UNKNOWN


@lowers("cummin")
def cummin(trace: Trace, input: Value, dim: int) -> tuple[int, int]:
    """The smallest of the first entries along a dimension."""
    negative = trace.value(scaled(trace, input, -1), input.tensor)
    return scaled(trace, trace.value(cummax(trace, negative, dim)[0], input.tensor), -1), UNKNOWN


def _inside(trace: Trace, x: Value, dim: Any) -> int:
    dim = int(dim) % x.tensor.ndim
    if dim == 0:
        trace.refuse("mixes the samples of a batch.")
    return dim


def _ascending(trace: Trace, x: Value, dim: int) -> Value:
    return trace.value(group_sort(trace, x, x.tensor.shape[dim], dim), x.tensor)
