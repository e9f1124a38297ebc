"""Calls that move, drop, repeat or join entries: slices, permutations, padding, nearest upsampling, concatenation.

Such a call is run once more, on codes: numbers that say which entry of which sample stands where. What comes out is the
index, and whether a sample's entries ever reach another sample is seen, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import Trace, Value
from lipguard.network.operators import Index

_MOVES: dict[str, Callable[..., Any]] = {
    "__getitem__": Tensor.__getitem__,
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "channel_shuffle": torch.channel_shuffle,
    "native_channel_shuffle": torch.channel_shuffle,
    "pixel_shuffle": torch.pixel_shuffle,
    "pixel_unshuffle": torch.pixel_unshuffle,
    "im2col": F.unfold,
} | {
    name: getattr(Tensor, name)
    for name in (
        "adjoint", "broadcast_to", "chunk", "diagonal", "expand", "flip", "fliplr", "flipud", "gather", "hsplit", "index_select",
        "moveaxis", "movedim", "narrow", "permute", "repeat", "repeat_interleave", "roll", "rot90", "select", "split",
        "split_with_sizes", "swapaxes", "swapdims", "t", "take_along_dim", "tensor_split", "tile", "transpose", "tril", "triu",
        "unbind", "unfold", "unsafe_chunk", "unsafe_split", "vsplit",
    )
}  # fmt: skip
_JOINS = {
    name: getattr(torch, name)
    for name in ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack")
}  # fmt: skip


def rearranged(trace: Trace, x: Value, move: Callable[[Tensor], Any], fill: float = 0.0) -> int | tuple[int, ...]:
    """The value after a function that only moves entries, and leaves `fill` where it put the code 0; a node for each result."""
    rows, size = len(x.tensor), x.size
    code = torch.arange(1, rows * size + 1, dtype=torch.float64, device=x.tensor.device)
    moved = move(code.reshape(x.tensor.shape))
    if isinstance(moved, Tensor):
        return _emit(trace, x, _index(trace, moved, rows, size), fill)
    return tuple(_emit(trace, x, _index(trace, part, rows, size), fill) for part in moved)


def broadcast(trace: Trace, x: Value, shape: torch.Size) -> Value:
    """x expanded to a shape."""
    node = rearranged(trace, x, lambda code: code.expand(shape))
    assert isinstance(node, int)
    return trace.value(node, x.tensor.expand(shape))


def _index(trace: Trace, moved: Tensor, rows: int, size: int) -> Tensor:
    """The index that the codes show, the same for every sample."""
    if moved.ndim == 0 or len(moved) != rows:
        trace.refuse(f"gives shape {tuple(moved.shape)}: it mixes the samples of a batch, which must stay the first dimension.")
    place = moved.reshape(rows, -1).to(torch.int64) - 1
    if not bool((moved == moved.round()).all()):
        trace.refuse("computes with its entries, where it should only move them.")
    start = size * torch.arange(rows, device=place.device)[:, None]
    index = torch.where(place < 0, place, place - start)
    if index.numel() == 0:
        trace.refuse("selects nothing.")
    if not bool(((index >= -1) & (index < size) & (index == index[:1]) & ((place < 0) | (place >= start))).all()):
        trace.refuse("mixes the samples of a batch, or treats them differently.")
    return index[0].clone()


def _emit(trace: Trace, x: Value, index: Tensor, fill: float = 0.0) -> int:
    shift = torch.where(index < 0, fill, 0.0).to(torch.float64) if fill and bool((index < 0).any()) else None
    source, place, size = _read(trace, x)
    return select(trace, source, torch.where(index < 0, -1, place[index]), size, shift)


def select(trace: Trace, node: int, index: Tensor, size: int, shift: Tensor | None = None) -> int:
    """The node's entries at the places of the index, a zero where it is -1; no node if these are all of them in order."""
    if torch.equal(index, torch.arange(size, device=index.device)):
        return node
    return trace.affine(Value(node, index), Index(index, size), shift)


def _read(trace: Trace, x: Value) -> tuple[int, Tensor, int]:
    """The node that a value's entries are read from, their places there, and its size: one selection is looked through."""
    node = trace.nodes[x.node]
    if node.selection is not None:
        source = node.sources[0]
        return source, node.selection, trace.sizes[source]
    return x.node, torch.arange(x.size, device=x.tensor.device), x.size


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


def _depends(tree: object) -> bool:
    if isinstance(tree, list | tuple):
        return any(_depends(part) for part in tree)
    return isinstance(tree, Value) or (isinstance(tree, dict) and _depends(tuple(tree.values())))


def _register(name: str, move: Callable[..., Any]) -> None:
    def rule(trace: Trace, input: Value, *args: Any, **kwargs: Any) -> int | tuple[int, ...]:
        if not isinstance(input, Value) or _depends((args, kwargs)):
            trace.refuse("reads entries at places that depend on the input.")
        return rearranged(trace, input, lambda code: move(code, *args, **kwargs))

    lowers(name)(rule)


for _name, _move in _MOVES.items():
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


@lowers("where")
def where(trace: Trace, condition: Any, input: Any = None, other: Any = None) -> int:
    """Entries of one or the other, by a constant condition."""
    if isinstance(condition, Value) or input is None:
        trace.refuse("chooses by the values it is given: it jumps unless both choices agree where the choice changes.")
    return _joined(trace, [input, other], lambda parts: torch.where(condition, *parts))


@lowers("masked_fill")
def masked_fill(trace: Trace, input: Any, mask: Any, value: Any) -> int:
    """A number in place of the entries under a constant mask."""
    return where(trace, mask, value, input)


@lowers("setitem", "__setitem__")
def setitem(trace: Trace, input: Any, place: Any, value: Any) -> int:
    """The tensor after writing into it; `Tracer` gives it this node."""
    if _depends(place):
        trace.refuse("writes entries at places that depend on the input.")

    def write(parts: list[Tensor]) -> Tensor:
        written = parts[0].clone()
        written[place] = parts[1]
        return written

    return _joined(trace, [input, value], write)


@lowers("fold", "col2im")
def fold(trace: Trace, input: Value, output_size: Any, *args: Any, **kwargs: Any) -> int:
    """Overlapping blocks added up: the adjoint of unfold, by the places that unfold reads."""
    pair = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    one = F.fold(input.tensor[:1].detach(), pair, *args, **kwargs)
    code = torch.arange(1, one.numel() + 1, dtype=torch.float64, device=one.device).reshape(1, *one.shape[-3:])
    place = F.unfold(code, *args, **kwargs).flatten().to(torch.int64) - 1
    return trace.affine(input, Index(place, one.numel(), transposed=True))


def _register_join(name: str, join: Callable[..., Tensor]) -> None:
    def rule(trace: Trace, tensors: Any, *args: Any, **kwargs: Any) -> int:
        return _joined(trace, list(tensors), lambda parts: join(parts, *args, **kwargs))

    lowers(name)(rule)


for _name, _join in _JOINS.items():
    _register_join(_name, _join)


def _joined(trace: Trace, parts: list[Any], join: Callable[[list[Tensor]], Tensor]) -> int:
    """The sum of the values, each embedded at its places; constants become a bias."""
    values = [part for part in parts if isinstance(part, Value)]
    rows, total = len(values[0].tensor), sum(value.size for value in values)
    device = values[0].tensor.device
    codes: list[Tensor] = []
    constants: list[Tensor] = []
    begins: list[int] = []
    offset = 0
    for part in parts:
        if isinstance(part, Value):
            row = total * torch.arange(rows, dtype=torch.float64, device=device)[:, None]
            code = row + torch.arange(offset + 1, offset + part.size + 1, dtype=torch.float64, device=device)
            codes.append(code.reshape(part.tensor.shape))
            constants.append(torch.zeros(part.tensor.shape, dtype=torch.float64, device=device))
            begins.append(offset)
            offset += part.size
        else:
            part = part if isinstance(part, Tensor) else torch.tensor(part, dtype=torch.float64, device=device)
            constants.append(trace.constant(part, "constant").to(device))
            codes.append(torch.zeros_like(constants[-1]))
    index = _index(trace, join(codes), rows, total)
    shift = None
    if len(values) < len(parts):
        whole = join(constants).reshape(rows, -1)
        if not bool((whole == whole[:1]).all()):
            trace.refuse("joins a constant that treats the samples of a batch differently.")
        shift = whole[0]
    return _gathered(trace, values, begins, index, shift)
