"""Calls that move, drop, repeat or join entries: slices, permutations, padding, nearest upsampling, concatenation.

Such a call is run once more, on codes: numbers that say which entry of which sample stands where. What comes out is the
index, and along which dimension the samples lie. Whether a sample's entries ever reach another sample is seen, not assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.capture.expressions import JUMPS
from lipguard.capture.expressions import moved as moved_expression
from lipguard.capture.rules.registry import lowers
from lipguard.capture.symbolic import chosen
from lipguard.capture.trace import BatchMoved, Placed, Trace, Value
from lipguard.network.operators import Index

MOVES: dict[str, Callable[..., Any]] = {
    "__getitem__": Tensor.__getitem__,
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "channel_shuffle": torch.channel_shuffle,
    "native_channel_shuffle": torch.channel_shuffle,
    "pixel_shuffle": torch.pixel_shuffle,
    "pixel_unshuffle": torch.pixel_unshuffle,
    "im2col": F.unfold,
    "fft_fftshift": torch.fft.fftshift,
    "fft_ifftshift": torch.fft.ifftshift,
} | {
    name: getattr(Tensor, name)
    for name in (
        "adjoint", "broadcast_to", "chunk", "diagonal", "diag_embed", "expand", "flip", "fliplr", "flipud", "gather", "hsplit",
        "index_select",
        "moveaxis", "movedim", "narrow", "permute", "repeat", "repeat_interleave", "roll", "rot90", "select", "split",
        "split_with_sizes", "swapaxes", "swapdims", "t", "take_along_dim", "tensor_split", "tile", "transpose", "tril", "triu",
        "unbind", "unfold", "unsafe_chunk", "unsafe_split", "vsplit", "flatten", "reshape", "unflatten", "ravel", "squeeze",
        "unsqueeze", "view_as", "reshape_as", "expand_as",
    )
} | {"view": Tensor.reshape}  # fmt: skip
JOINS = {
    name: getattr(torch, name)
    for name in ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack")
}  # fmt: skip


def rearranged(trace: Trace, x: Value, move: Callable[[Tensor], Any], fill: float = 0.0) -> int | tuple[int, ...]:
    """The value after a function that only moves entries, and leaves `fill` where it put the code 0; a node for each result.

    The samples of x and of each result lie along the first dimension.
    """
    results = placed(trace, x, move, fill)
    for result in results if isinstance(results, tuple) else (results,):
        if result.axis != 0 and x.rows > 1:
            raise BatchMoved(f"{trace.place} moves the samples of a batch to dimension {result.axis}. Keep them the first.")
    return tuple(result.node for result in results) if isinstance(results, tuple) else results.node


def placed(trace: Trace, x: Value, move: Callable[[Tensor], Any], fill: float = 0.0) -> Placed | tuple[Placed, ...]:
    """The same of a value whose samples lie along any dimension, with that of each result."""
    moved = move(_codes(x, x.size))
    if isinstance(moved, Tensor):
        index, axis = _index(trace, moved, x.rows, x.size)
        return Placed(_emit(trace, x, index, fill), axis)
    return tuple(Placed(_emit(trace, x, index, fill), axis) for index, axis in (_index(trace, m, x.rows, x.size) for m in moved))


def _codes(x: Value, step: int, first: int = 1) -> Tensor:
    """Numbers in the places of x's entries: `first` and on for those of the first sample, `step` more for each further one."""
    rows, shape = x.rows, list(x.tensor.shape)
    axis = 0 if x.axis is None else x.axis
    rest = shape if x.axis is None else shape[:axis] + shape[axis + 1 :]
    each = torch.arange(first, first + x.size, dtype=torch.float64, device=x.tensor.device)
    begin = step * torch.arange(rows, dtype=torch.float64, device=x.tensor.device)[:, None]
    codes = (begin + each).reshape(rows, *rest)
    return codes[0] if x.axis is None else codes.movedim(0, axis)


def moved(trace: Trace, x: Value, move: Callable[[Tensor], Tensor]) -> Value:
    """The value after a function that moves, drops or repeats entries and gives one tensor."""
    node = rearranged(trace, x, move)
    assert isinstance(node, int)
    return trace.value(node, move(x.tensor))


def broadcast(trace: Trace, x: Value, shape: Sequence[int]) -> Value:
    """x expanded to a shape."""
    return x if tuple(x.tensor.shape) == tuple(shape) else moved(trace, x, lambda code: code.expand(shape))


def widened(trace: Trace, x: Value, *constants: object) -> Value:
    """x expanded to the shape that torch gives to it and constants together: where it is of size 1, its entries repeat."""
    shapes = [constant.shape for constant in constants if isinstance(constant, Tensor)]
    try:
        return broadcast(trace, x, torch.broadcast_shapes(x.tensor.shape, *shapes))
    except RuntimeError:
        met = " and ".join(str(tuple(shape)) for shape in shapes)
        trace.refuse(f"meets a constant of shape {met} with a value of shape {tuple(x.tensor.shape)}.")


def index_of(trace: Trace, moved: Tensor, rows: int, size: int) -> Tensor:
    """The index that codes show, the same for every sample; the samples lie along the first dimension."""
    index, axis = _index(trace, moved, rows, size)
    if axis != 0 and rows > 1:
        raise BatchMoved(f"{trace.place} moves the samples of a batch to dimension {axis}. Keep them the first.")
    return index


def _index(trace: Trace, moved: Tensor, rows: int, size: int) -> tuple[Tensor, int | None]:
    """The index that the codes show, the same for every sample, and the dimension along which the samples lie."""
    if moved.numel() == 0:
        trace.refuse("selects nothing.")
    if not bool((moved == moved.round()).all()):
        trace.refuse("computes with its entries, where it should only move them.")
    place = moved.to(torch.int64) - 1
    if rows == 1:
        return place.reshape(-1), 0 if place.ndim and len(place) == 1 else None
    for axis in range(place.ndim):
        if place.shape[axis] != rows:
            continue
        each = place.movedim(axis, 0).reshape(rows, -1)
        start = size * torch.arange(rows, device=place.device)[:, None]
        index = torch.where(each < 0, each, each - start)
        if bool(((index >= -1) & (index < size) & (index == index[:1]) & ((each < 0) | (each >= start))).all()):
            return index[0].clone(), axis
    flat = place.reshape(-1)
    parts = [flat[flat // size == r] - size * r for r in range(rows)]
    begins = [int((flat // size == r).to(torch.int8).argmax()) for r in range(rows)]
    if begins == sorted(set(begins)) and all(torch.equal(part, parts[0]) for part in parts):
        raise BatchMoved(
            f"{trace.place} gives shape {tuple(moved.shape)}, which joins the samples of a batch with another dimension. Keep "
            "them apart, as in x.flatten(1) or x.view(x.shape[0], -1)."
        )
    return trace.refuse(f"gives shape {tuple(moved.shape)}: it mixes the samples of a batch, or treats them differently.")


def _emit(trace: Trace, x: Value, index: Tensor, fill: float = 0.0) -> int:
    # A number times a float64 mask: of two Python numbers torch would make float32, which rounds the fill.
    shift = fill * (index < 0).to(torch.float64) if fill and bool((index < 0).any()) else None
    if x.node in trace.pending and not bool((index < 0).any()):
        pending = trace.pending[x.node]
        return trace.put(moved_expression(pending, index, lambda node: chosen(trace, node, index)), len(index))
    source, place, size = _read(trace, x)
    return select(trace, source, torch.where(index < 0, -1, place[index]), size, shift)


def select(trace: Trace, node: int, index: Tensor, size: int, shift: Tensor | None = None) -> int:
    """The node's entries at the places of the index, a zero where it is -1; no node if these are all of them in order."""
    if torch.equal(index, torch.arange(size, device=index.device)):
        return node
    return trace.affine(Value(node, index), Index(index, size), shift)


def _read(trace: Trace, x: Value) -> tuple[int, Tensor, int]:
    """The node that a value's entries are read from, their places there, and its size: one selection is looked through."""
    read = trace.settled(x.node)
    node = trace.nodes[read]
    if node.selection is not None:
        source = node.sources[0]
        return source, node.selection, trace.sizes[source]
    return read, torch.arange(x.size, device=x.tensor.device), x.size


def joined(trace: Trace, parts: list[Value]) -> int:
    """The entries of several values, one after the other."""
    offsets = torch.tensor([0, *(part.size for part in parts)]).cumsum(0).tolist()
    index = torch.arange(offsets[-1], device=parts[0].tensor.device)
    return _gathered(trace, parts, offsets[:-1], index, None)


def _gathered(trace: Trace, values: list[Value], begins: list[int], index: Tensor, shift: Tensor | None) -> int:
    """One value whose entries are those of several at the places of the index, counted through, -1 for zero; plus a shift."""
    reads = [_read(trace, value) for value in values]
    if len({node for node, _, _ in reads}) == 1:
        # Parts of one value: one selection of its entries, not a sum, whose norm would count them apart.
        node, _, size = reads[0]
        places = torch.cat([place for _, place, _ in reads])
        return select(trace, node, torch.where(index < 0, -1, places[index]), size, shift)
    embedded: list[Value] = []
    for begin, value in zip(begins, values, strict=True):
        own = torch.where((index >= begin) & (index < begin + value.size), index - begin, -1)
        embedded.append(trace.value(trace.affine(value, Index(own, value.size), shift), value.tensor))
        shift = None
    return embedded[0].node if len(embedded) == 1 else trace.sum(*embedded)


def depends(tree: object) -> bool:
    """Whether a value is among arguments."""
    if isinstance(tree, list | tuple):
        return any(depends(part) for part in tree)
    return isinstance(tree, Value) or (isinstance(tree, dict) and depends(tuple(tree.values())))


def misplaced(trace: Trace, tree: object, verb: str) -> str:
    """Why entries are not read or written at places that depend on the input: by a mask, or by numbers."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, list | tuple):
        return next((misplaced(trace, part, verb) for part in tree if depends(part)), "")
    masked = isinstance(tree, Value) and tree.node in trace.pending and trace.pending[tree.node].mask
    return JUMPS.format(origin=masked) if masked else f"{verb} entries at places that depend on the input."


def _register(name: str, move: Callable[..., Any]) -> None:
    def rule(trace: Trace, input: Value, *args: Any, **kwargs: Any) -> Placed | tuple[Placed, ...] | None:
        if name.endswith("_as") and len(args) == 1 and isinstance(args[0], Value):
            args = (args[0].tensor,)  # only its shape matters
        if name.endswith("_as") and not isinstance(input, Value):
            return None  # a constant that takes the shape of a value
        if not isinstance(input, Value) or depends((args, kwargs)):
            trace.refuse(misplaced(trace, (args, kwargs), "reads"))
        if name == "view" and isinstance((*args, *kwargs.values())[0], torch.dtype):
            trace.refuse("reads the bits of its input as another type: it is not a function of real numbers.")
        return placed(trace, input, lambda code: move(code, *args, **kwargs))

    lowers(name, whole=True)(rule)


for _name, _move in MOVES.items():
    _register(_name, _move)


@lowers("pad", "constant_pad_nd")
def pad(
    trace: Trace, input: Value, pad: Any, mode: str | float = "constant", value: float | None = None
) -> int | tuple[int, ...]:
    """Padding by a constant, or by entries of the value (reflect, replicate, circular)."""
    if not isinstance(mode, str):  # constant_pad_nd(input, pad, value)
        mode, value = "constant", mode
    if mode == "constant":
        return rearranged(trace, input, lambda code: F.pad(code, pad), float(value or 0.0))
    return rearranged(trace, input, lambda code: F.pad(code, pad, mode=mode))


@lowers("fold", "col2im")
def fold(trace: Trace, input: Value, output_size: Any, *args: Any, **kwargs: Any) -> int:
    """Overlapping blocks added up: the adjoint of unfold, by the places that unfold reads."""
    pair = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    one = F.fold(input.tensor[:1].detach(), pair, *args, **kwargs)
    code = torch.arange(1, one.numel() + 1, dtype=torch.float64, device=one.device).reshape(1, *one.shape[-3:])
    place = F.unfold(code, *args, **kwargs).flatten().to(torch.int64) - 1
    return trace.affine(input, Index(place, one.numel(), transposed=True))


def _register_join(name: str, join: Callable[..., Tensor]) -> None:
    def rule(trace: Trace, tensors: Any, *args: Any, **kwargs: Any) -> Placed:
        return assembled_anywhere(trace, list(tensors), lambda parts: join(parts, *args, **kwargs))

    lowers(name, whole=True)(rule)


for _name, _join in JOINS.items():
    _register_join(_name, _join)


def assembled(trace: Trace, parts: list[Any], join: Callable[[list[Tensor]], Tensor]) -> int:
    """Values and constants put together by a function that only moves entries: each value at its places, constants as a bias.

    The samples of the values and of the result lie along the first dimension.
    """
    result = assembled_anywhere(trace, parts, join)
    if result.axis != 0 and any(part.rows > 1 for part in parts if isinstance(part, Value)):
        raise BatchMoved(f"{trace.place} moves the samples of a batch to dimension {result.axis}. Keep them the first.")
    return result.node


def assembled_anywhere(trace: Trace, parts: list[Any], join: Callable[[list[Tensor]], Tensor]) -> Placed:
    """The same of values whose samples lie along any dimension."""
    values = [part for part in parts if isinstance(part, Value)]
    rows, total = max(value.rows for value in values), sum(value.size for value in values)
    device = values[0].tensor.device
    codes: list[Tensor] = []
    constants: list[Tensor] = []
    begins: list[int] = []
    offset = 0
    for part in parts:
        if isinstance(part, Value):
            codes.append(_codes(part, total, offset + 1))
            constants.append(torch.zeros(part.tensor.shape, dtype=torch.float64, device=device))
            begins.append(offset)
            offset += part.size
        else:
            if not isinstance(part, Tensor):
                if math.isinf(part):  # as a mask puts before a softmax
                    trace.refuse(
                        "puts infinite numbers beside values: the result is no vector of real numbers. Select the entries that "
                        "are left, x[..., kept], or bound the part before it with submodule=...."
                    )
                part = torch.tensor(part, dtype=torch.float64, device=device)
            constants.append(trace.constant(part, "constant").to(device))
            codes.append(torch.zeros_like(constants[-1]))
    index, axis = _index(trace, join(codes), rows, total)
    shift = None
    if len(values) < len(parts):
        whole = join(constants)
        whole = whole.reshape(1, -1) if axis is None else whole.movedim(axis, 0).reshape(rows, -1)
        if not bool((whole == whole[:1]).all()):
            trace.refuse("joins a constant that treats the samples of a batch differently.")
        shift = whole[0]
    return Placed(_gathered(trace, values, begins, index, shift), axis)
