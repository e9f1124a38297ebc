"""Moves of entries, and the constants that say where: shapes, slices, gathers, casts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.onnx.operators.table import Unread, operator

TYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""torch's types by the numbers of TensorProto.DataType."""


@operator("Identity")
def identity(x: Tensor) -> Tensor:
    """x."""
    return x


@operator("Cast", since=6)
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Another type; between types of floating point the same real number."""
    if to not in TYPES:
        raise Unread(f"casts to type {to} of TensorProto, which torch does not have. Use a type of floating point.")
    return x.to(TYPES[to])


@operator("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Two dimensions: those before the axis, and those from it on."""
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Reshape", since=5)
def reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    """The same entries in another shape; a 0 keeps the size that stands there."""
    sizes = [int(n) for n in shape]
    return x.reshape([x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(sizes)])


@operator("Reshape")
def reshape_1(x: Tensor, *, shape: list[int], consumed_inputs: object = None) -> Tensor:
    """The shape as an attribute."""
    return reshape(x, torch.tensor(shape))


@operator("Transpose")
def transpose(x: Tensor, *, perm: list[int] | None = None) -> Tensor:
    """Axes in another order, by default reversed."""
    return x.permute(perm if perm else list(reversed(range(x.ndim))))


@operator("Squeeze", since=13)
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Without axes of one entry."""
    return squeeze_1(x, axes=None if axes is None else [int(axis) for axis in axes])


@operator("Squeeze")
def squeeze_1(x: Tensor, *, axes: list[int] | None = None) -> Tensor:
    """The axes as an attribute."""
    left_out = [i for i, n in enumerate(x.shape) if n == 1] if axes is None else [axis % x.ndim for axis in axes]
    return x.reshape([n for i, n in enumerate(x.shape) if i not in left_out])


@operator("Unsqueeze", since=13)
def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    """With axes of one entry, counted in the result."""
    return unsqueeze_1(x, axes=[int(axis) for axis in axes])


@operator("Unsqueeze")
def unsqueeze_1(x: Tensor, *, axes: list[int]) -> Tensor:
    """The axes as an attribute."""
    rank, sizes = x.ndim + len(axes), iter(x.shape)
    new = {axis % rank for axis in axes}
    return x.reshape([1 if i in new else next(sizes) for i in range(rank)])


@operator("Concat", since=4)
def concat(*parts: Tensor, axis: int) -> Tensor:
    """Values one behind the other along an axis."""
    return torch.cat(parts, axis)


@operator("Concat")
def concat_1(*parts: Tensor, axis: int = 1) -> Tensor:
    """The axis is 1 by default."""
    return torch.cat(parts, axis)


@operator("Split", several=True)
def split(
    x: Tensor,
    sizes: Tensor | None = None,
    *,
    outputs: int,
    axis: int = 0,
    split: list[int] | None = None,
    num_outputs: int | None = None,
) -> Sequence[Tensor]:
    """Parts along an axis: of the sizes given, an input since opset 13, or as many as there are outputs, of one size.

    Where they do not divide the axis, the last one is shorter.
    """
    given = split if sizes is None else [int(n) for n in sizes]
    return x.split(given or -(-x.shape[axis] // outputs), axis)


@operator("Slice", since=10)
def slice_10(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    """Entries from start to end along axes, in steps, which may go backwards."""
    count = len(starts)
    where = range(count) if axes is None else [int(axis) for axis in axes]
    by = [1] * count if steps is None else [int(step) for step in steps]
    for axis, start, end, step in zip(where, starts.tolist(), ends.tolist(), by, strict=True):
        places = range(*slice(start, end, step).indices(x.shape[axis]))
        if len(places) == x.shape[axis] and step == 1:
            continue
        x = x.index_select(axis % x.ndim, torch.tensor(list(places), dtype=torch.int64))
    return x


@operator("Slice")
def slice_1(x: Tensor, *, starts: list[int], ends: list[int], axes: list[int] | None = None) -> Tensor:
    """The ends as attributes."""
    return slice_10(x, torch.tensor(starts), torch.tensor(ends), None if axes is None else torch.tensor(axes))


@operator("Gather")
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Entries at places along an axis, which the axes of the places take the place of."""
    axis %= x.ndim
    if indices.ndim == 0:
        return x.select(axis, int(indices))
    places = torch.where(indices < 0, indices + x.shape[axis], indices).to(torch.int64)
    return x.index_select(axis, places.flatten()).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@operator("Expand")
def expand(x: Tensor, shape: Tensor) -> Tensor:
    """Entries repeated along axes of one entry."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(int(n) for n in shape)))


@operator("Tile", since=6)
def tile(x: Tensor, repeats: Tensor) -> Tensor:
    """The whole, repeated along every axis."""
    return x.repeat([int(n) for n in repeats])


@operator("Shape")
def shape_of(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """The sizes, a constant."""
    return torch.tensor(tuple(x.shape)[start:end], dtype=torch.int64)


@operator("Size")
def size(x: Tensor) -> Tensor:
    """The number of entries, a constant."""
    return torch.tensor(x.numel())


@operator("ConstantOfShape")
def constant_of_shape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    """One number everywhere, by default the float 0."""
    return (torch.zeros(1) if value is None else value).reshape(()).expand([int(n) for n in shape]).clone()


@operator("Range")
def numbers(start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    """Numbers from start, below the limit."""
    return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


@operator("Pad", since=11)
def pad(x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, *, mode: str = "constant") -> Tensor:
    """Entries before and behind, along all axes or those given; negative numbers cut entries away."""
    held = [int(n) for n in pads]
    count = len(held) // 2
    before, behind = [0] * x.ndim, [0] * x.ndim
    for i, axis in enumerate(range(count) if axes is None else [int(one) for one in axes]):
        before[axis], behind[axis] = held[i], held[count + i]
    if mode == "constant":
        sides = [n for pair in reversed(list(zip(before, behind, strict=True))) for n in pair]
        return F.pad(x, sides, value=0.0 if value is None else float(value))
    for axis, (first, last) in enumerate(zip(before, behind, strict=True)):
        if first or last:
            x = x.index_select(axis, _places(x.shape[axis], first, last, mode))
    return x


@operator("Pad")
def pad_2(
    x: Tensor, *, pads: list[int] | None = None, paddings: list[int] | None = None, mode: str = "constant", value: float = 0.0
) -> Tensor:
    """The sides as an attribute, called paddings in opset 1."""
    return pad(x, torch.tensor(pads or paddings), torch.tensor(value), mode=mode)


def _places(n: int, before: int, behind: int, mode: str) -> Tensor:
    """The entries that stand in a padded axis of n entries."""
    i = torch.arange(-before, n + behind)
    if mode == "edge":
        return i.clamp(0, n - 1)
    if mode == "wrap":
        return i % n
    if mode != "reflect":
        raise Unread(f"has mode={mode!r}. constant, edge, reflect and wrap are read.")
    period = max(2 * (n - 1), 1)
    return torch.minimum(i % period, period - i % period) if n > 1 else torch.zeros_like(i)
