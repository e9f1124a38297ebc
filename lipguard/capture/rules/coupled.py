"""Maxima over windows and dimensions, sorting, and the activations made of them: MaxMin, GroupSort, Householder, Maxout.

Modules of other packages that mean one of these are registered in one line:

    lg.lowers(TheirMaxMin)(lambda trace, module, x: maxmin(trace, x))
    lg.lowers(TheirGroupSort)(lambda trace, module, x: group_sort(trace, x, module.group_size, descending=True))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.capture.rules.activation import clipped
from lipguard.capture.rules.arithmetic import scaled
from lipguard.capture.rules.convolution import per_dimension
from lipguard.capture.rules.rearrange import broadcast, joined, rearranged, select
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import UNKNOWN, Trace, Value
from lipguard.errors import InvalidExample
from lipguard.network.coupled import Maxima, Reflection, Sort

_POOLS: tuple[Callable[..., Tensor], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


def group_sort(trace: Trace, x: Value, size: int, dim: int = 1, descending: bool = False) -> int:
    """Entries sorted within groups of `size` neighbours along a dimension, at every position of the others.

    Raises:
        InvalidExample: the size does not divide the dimension.
    """
    index = _adjacent(trace, x, size, dim)
    if size == 1:
        return x.node
    return trace.coupled(x, Sort(index if descending else index.flip(1)))


def maxmin(trace: Trace, x: Value, dim: int = 1) -> int:
    """(max(a, b), min(a, b)) of the halves a, b of a dimension.

    Raises:
        InvalidExample: the dimension is odd.
    """
    return trace.coupled(x, Sort(_halves(trace, x, dim)))


def householder(trace: Trace, x: Value, directions: Tensor, dim: int = 1) -> int:
    """z where v'z > 0, z - 2 v v'z elsewhere, for every pair z of entries of the halves of a dimension.

    Args:
        directions: v of each pair, (pairs along the dimension, 2), float64; of any length, 1 for a Householder activation.

    Raises:
        InvalidExample: the dimension is odd, or there are not as many directions as pairs.
    """
    index = _halves(trace, x, dim)
    pairs = x.tensor.shape[dim] // 2
    if directions.shape != (pairs, 2):
        raise InvalidExample(f"{trace.place} has directions of shape {tuple(directions.shape)}, the example gives {pairs} pairs.")
    along = torch.arange(pairs, device=index.device).reshape([-1 if d == dim - 1 else 1 for d in range(x.tensor.ndim - 1)])
    along = along.expand(_codes(x).chunk(2, dim - 1)[0].shape).flatten()
    return trace.coupled(x, Reflection(index, directions.to(index.device)[along]))


def _codes(x: Value) -> Tensor:
    """The place of every entry of one sample, in its shape."""
    return torch.arange(x.size, device=x.tensor.device).reshape(x.tensor.shape[1:])


def _adjacent(trace: Trace, x: Value, size: int, dim: int) -> Tensor:
    """Groups of `size` neighbours along a dimension; their places, (groups, size), groups in the order of the entries."""
    width = x.tensor.shape[dim] if 0 < dim < x.tensor.ndim else 0
    if width == 0 or size < 1 or width % size:
        raise InvalidExample(
            f"{trace.place} sorts groups of {size}, the example gives {width} entries along dimension {dim}: "
            "the group size must divide them."
        )
    return _codes(x).unflatten(dim - 1, (-1, size)).movedim(dim, -1).reshape(-1, size)


def _halves(trace: Trace, x: Value, dim: int) -> Tensor:
    """Pairs of entries of the two halves of a dimension; their places, (pairs, 2), in the order of the first half."""
    width = x.tensor.shape[dim] if 0 < dim < x.tensor.ndim else 0
    if width == 0 or width % 2:
        raise InvalidExample(
            f"{trace.place} takes pairs, the example gives {width} entries along dimension {dim}: give an even number."
        )
    first, second = _codes(x).chunk(2, dim - 1)
    return torch.stack([first.flatten(), second.flatten()], 1)


def _register_pools(dims: int) -> None:
    def max_pool(
        trace: Trace,
        input: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> int:
        kernel, pad, step = (per_dimension(n, dims) for n in (kernel_size, padding, dilation))
        strides = kernel if stride is None or stride == [] or stride == () else per_dimension(stride, dims)
        space = _space(trace, input, dims)
        # How many windows there are, and which cross the border, is torch's own answer.
        small = _POOLS[dims - 1](input.tensor, kernel, strides, pad, step, ceil_mode).shape[-dims:]
        windows = []
        for n, m, k, s, p, d in zip(space, small, kernel, strides, pad, step, strict=True):
            place = torch.arange(m)[:, None] * s - p + torch.arange(k) * d
            windows.append(torch.where((place >= 0) & (place < n), place, -1))
        return _pooled(trace, input, space, windows)

    def adaptive(trace: Trace, input: Value, output_size: Any, return_indices: bool = False) -> int:
        space = _space(trace, input, dims)
        wanted = tuple(output_size) if isinstance(output_size, list | tuple) else (output_size,) * dims
        windows = []
        for n, m in zip(space, wanted, strict=True):
            m = n if m is None else int(m)
            ends = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
            width = max(stop - start for start, stop in ends)
            windows.append(torch.tensor([[i if i < stop else -1 for i in range(start, start + width)] for start, stop in ends]))
        return _pooled(trace, input, space, windows)

    for name, rule in ((f"max_pool{dims}d", max_pool), (f"adaptive_max_pool{dims}d", adaptive)):
        lowers(name)(rule)
        lowers(f"{name}_with_indices")(_with_indices(rule))


def _with_indices(rule: Callable[..., int]) -> Callable[..., tuple[int, int]]:
    return lambda trace, *args, **kwargs: (rule(trace, *args, **kwargs), UNKNOWN)


for _dims in (1, 2, 3):
    _register_pools(_dims)


def _space(trace: Trace, x: Value, dims: int) -> tuple[int, ...]:
    if x.tensor.ndim not in (dims + 1, dims + 2):
        trace.refuse(f"is given a value of shape {tuple(x.tensor.shape)}: a batch of {dims}-dimensional images is needed.")
    return tuple(x.tensor.shape[-dims:])


def _pooled(trace: Trace, x: Value, space: tuple[int, ...], windows: list[Tensor]) -> int:
    """Maxima over products of windows, one dimension after the other: max over rows of the maxima over columns."""
    device = x.tensor.device
    places = torch.arange(x.size, device=device).reshape(-1, *space)
    for axis, window in enumerate(windows):
        if bool((window < 0).all(1).any()):
            trace.refuse("has a window without entries, whose maximum is -inf.")
        used, inverse = window.to(device).unique(return_inverse=True)
        # Rows that no window reads are left out at once.
        start = int(used[0] < 0)
        windows[axis] = inverse.reshape(window.shape) - start
        places = places.index_select(axis + 1, used[start:])
    node, size = select(trace, x.node, places.flatten(), x.size), places.numel()
    for axis in reversed(range(len(windows))):
        window = windows[axis]
        codes = torch.arange(size, device=device).reshape(places.shape).movedim(axis + 1, -1)
        index = torch.where(window < 0, -1, codes[..., window]).movedim(-2, axis + 1)
        places = index[..., 0]
        size = places.numel()
        index = index.reshape(-1, index.shape[-1])
        if index.shape[1] > 1:
            node = trace.coupled(Value(node, x.tensor), Maxima(index))
        else:
            node = select(trace, node, index[:, 0], codes.numel())
    return node


@lowers("maximum", "fmax")
def maximum(trace: Trace, input: Value | Tensor, other: Value | Tensor) -> int:
    """The larger of two values, or of a value and a constant, entry by entry."""
    if isinstance(input, Value) and isinstance(other, Value):
        return _pair(trace, input, other, 0)
    value, constant = (input, other) if isinstance(input, Value) else (other, input)
    assert isinstance(value, Value) and not isinstance(constant, Value)
    return clipped(trace, value, constant, None, "clip")


@lowers("minimum", "fmin")
def minimum(trace: Trace, input: Value | Tensor, other: Value | Tensor) -> int:
    """The smaller of two values, or of a value and a constant, entry by entry."""
    if isinstance(input, Value) and isinstance(other, Value):
        return _pair(trace, input, other, 1)
    value, constant = (input, other) if isinstance(input, Value) else (other, input)
    assert isinstance(value, Value) and not isinstance(constant, Value)
    return clipped(trace, value, None, constant, "clip")


def _pair(trace: Trace, a: Value, b: Value, side: int) -> int:
    """One side of two values sorted entry by entry: a maximum and a minimum of the same two values share the sort."""
    shape = torch.broadcast_shapes(a.tensor.shape, b.tensor.shape)
    a, b = sorted((broadcast(trace, a, shape), broadcast(trace, b, shape)), key=lambda value: value.node)
    if a.node == b.node:
        return a.node
    size = a.size
    both = trace.value(joined(trace, [a, b]), torch.cat([a.tensor, b.tensor], 1))
    place = torch.arange(2 * size, device=a.tensor.device).reshape(2, size)
    node = trace.coupled(both, Sort(place.T.contiguous()))
    return select(trace, node, place[side], 2 * size)


@lowers("amax")
def amax(trace: Trace, input: Value, dim: Any = None, keepdim: bool = False) -> int:
    """Maxima over dimensions of one sample; over the batch a question to the values."""
    return _reduced(trace, input, dim, 0)


@lowers("amin")
def amin(trace: Trace, input: Value, dim: Any = None, keepdim: bool = False) -> int:
    """Minima over dimensions of one sample."""
    return _reduced(trace, input, dim, 1)


@lowers("max")
def largest(trace: Trace, input: Value | Tensor, *args: Any, **kwargs: Any) -> int | tuple[int, int]:
    """max(a, b), max over one dimension with the places, or over everything: a question to the values."""
    return _extreme(trace, input, maximum, 0, *args, **kwargs)


@lowers("min")
def smallest(trace: Trace, input: Value | Tensor, *args: Any, **kwargs: Any) -> int | tuple[int, int]:
    """min(a, b), min over one dimension with the places, or over everything."""
    return _extreme(trace, input, minimum, 1, *args, **kwargs)


def _extreme(
    trace: Trace,
    x: Value | Tensor,
    binary: Callable[..., int],
    side: int,
    dim: Any = None,
    keepdim: bool = False,
    other: Any = None,
) -> int | tuple[int, int]:
    other = dim if isinstance(dim, Value | Tensor) else other
    if other is not None:
        return binary(trace, x, other)
    assert isinstance(x, Value)
    node = _reduced(trace, x, dim, side)
    return UNKNOWN if node == UNKNOWN and dim is None else (node, UNKNOWN)


def _reduced(trace: Trace, x: Value, dim: Any, side: int) -> int:
    dims = sorted({int(d) % x.tensor.ndim for d in (dim if isinstance(dim, list | tuple) else () if dim is None else (dim,))})
    if not dims or dims[0] == 0:
        return UNKNOWN
    kept = [d for d in range(1, x.tensor.ndim) if d not in dims]
    count = math.prod(x.tensor.shape[d] for d in dims)
    index = _codes(x).permute([d - 1 for d in (*kept, *dims)]).reshape(-1, count)
    if count == 1:
        return select(trace, x.node, index[:, 0], x.size)
    if count == 2:
        # The maximum and the minimum of a pair, where both are asked for, share a neuron.
        return select(trace, trace.coupled(x, Sort(index)), index[:, side], x.size)
    if side == 0:
        return trace.coupled(x, Maxima(index))
    negative = trace.value(scaled(trace, x, -1), x.tensor)
    least = trace.value(trace.coupled(negative, Maxima(index)), x.tensor.amin(dims))
    return scaled(trace, least, -1)


@lowers("sort")
def sort(trace: Trace, input: Value, dim: int = -1, descending: bool = False, *, stable: bool = False) -> tuple[int, int]:
    """Values sorted along a dimension of one sample, and their places."""
    dim = int(dim) % input.tensor.ndim
    if dim == 0:
        trace.refuse("sorts the samples of a batch.")
    return group_sort(trace, input, input.tensor.shape[dim], dim, descending), UNKNOWN


@lowers("topk")
def topk(trace: Trace, input: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[int, int]:
    """The k largest or smallest entries along a dimension, in order."""
    dim = int(dim) % input.tensor.ndim
    if dim == 0 or not sorted:
        trace.refuse("takes the largest of the samples, or leaves their order open: it is not a function of one sample.")
    node = trace.value(group_sort(trace, input, input.tensor.shape[dim], dim, largest), input.tensor)
    first = rearranged(trace, node, lambda code: code.narrow(dim, 0, k))
    assert isinstance(first, int)
    return first, UNKNOWN
