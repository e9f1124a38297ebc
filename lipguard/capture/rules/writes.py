"""Writing into a tensor: item assignment, scatter, index_copy; and adding at places: index_add, scatter_add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipguard.capture.rules.arithmetic import elementwise
from lipguard.capture.rules.operands import Operand, applied, node_of
from lipguard.capture.rules.rearrange import assembled, assembled_anywhere, depends, index_of, misplaced, moved
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import Placed, Trace, Value
from lipguard.network.operators import Index

PLACES = "writes entries at places that depend on the input."


@lowers("setitem", "__setitem__", whole=True)
def setitem(trace: Trace, input: Any, place: Any, value: Any) -> Placed:
    """The tensor after writing into it; `Tracer` gives it this node."""
    masked = isinstance(place, Value) and place.axis in (0, None) and place.tensor.shape == _plain(input).shape
    if masked and not _plain(value).ndim:
        first = input.batched() if isinstance(input, Value) else input[None] if place.axis is None else input
        return Placed(elementwise().where(trace, place.batched(), value, first), place.axis)
    if depends(place):
        trace.refuse(misplaced(trace, place, "writes"))

    def write(parts: list[Tensor]) -> Tensor:
        written = parts[0].clone()
        written[place] = parts[1]  # type: ignore[index]
        return written

    return assembled_anywhere(trace, [input, value], write)


def _register_write(name: str, write: Callable[..., Tensor]) -> None:
    """A call that puts the second tensor's entries into the first; `write` gets both, and the call's other arguments."""

    def rule(trace: Trace, input: Operand, source: Operand, *where: Any, **options: Any) -> int:
        if depends((where, options)):
            trace.refuse(PLACES)
        return assembled(trace, [input, source], lambda parts: write(parts[0], parts[1], *where, **options))

    lowers(name)(rule)


_register_write("slice_scatter", torch.slice_scatter)
_register_write("select_scatter", torch.select_scatter)
_register_write("diagonal_scatter", torch.diagonal_scatter)


@lowers("index_copy")
def index_copy(trace: Trace, input: Operand, dim: int, index: Any, source: Operand) -> int:
    """Slices replaced by those of a source."""
    if depends(index):
        trace.refuse(PLACES)
    return assembled(trace, [input, source], lambda parts: parts[0].index_copy(dim, index, parts[1]))


@lowers("index_fill")
def index_fill(trace: Trace, input: Operand, dim: int, index: Any, value: Operand) -> int:
    """Slices replaced by a number."""
    if depends((index, value)):
        trace.refuse(PLACES if depends(index) else "fills entries with a number that depends on the input.")
    return assembled(trace, [input, value], lambda parts: _filled(parts, dim, index))


@lowers("scatter")
def scatter(
    trace: Trace,
    input: Operand,
    dim: int,
    index: Any,
    src: Operand | None = None,
    *,
    reduce: str | None = None,
    value: Operand | None = None,
) -> int:
    """Entries put, added or multiplied in at places."""
    source = src if src is not None else value
    if source is None or depends(index):
        trace.refuse(PLACES)
    if reduce == "add":
        return scatter_add(trace, input, dim, index, source)
    if reduce is not None:
        trace.refuse(f"reduces by {reduce!r}, which has no rule. Use reduce='add', or none.")
    if isinstance(source, Value):
        source = _part(trace, source, index)
    elif isinstance(source, Tensor) and source.ndim:
        source = source[tuple(slice(n) for n in index.shape)]
    return assembled(trace, [input, source], lambda parts: parts[0].scatter(dim, index, parts[1].expand(index.shape)))


@lowers("scatter_add")
def scatter_add(trace: Trace, input: Operand, dim: int, index: Any, src: Operand) -> int:
    """Entries of a source added at places along one dimension."""
    if depends(index):
        trace.refuse(PLACES)
    if isinstance(src, Value):
        src = _part(trace, src, index)
    elif not isinstance(src, Tensor) or not src.ndim:
        src = torch.as_tensor(src, dtype=torch.float64, device=index.device).expand(index.shape)
    return _added(trace, input, src, lambda code: code.gather(dim, index), lambda zero, s: zero.scatter_add(dim, index, s))


@lowers("scatter_reduce")
def scatter_reduce(
    trace: Trace, input: Operand, dim: int, index: Any, src: Operand, reduce: str, *, include_self: bool = True
) -> int:
    """Sums at places."""
    if reduce != "sum" or not include_self:
        trace.refuse(f"reduces by {reduce!r}, include_self={include_self}, which has no rule. Use scatter_add.")
    return scatter_add(trace, input, dim, index, src)


@lowers("index_add")
def index_add(trace: Trace, input: Operand, dim: int, index: Any, source: Operand, *, alpha: float = 1) -> int:
    """Slices of a source added at places along one dimension."""
    if depends(index):
        trace.refuse(PLACES)
    source = source if alpha == 1 else applied(trace, torch.mul, source, alpha)
    return _added(trace, input, source, lambda code: code.index_select(dim, index), lambda zero, s: zero.index_add(dim, index, s))


@lowers("index_put", "_index_put_impl")
def index_put(trace: Trace, input: Operand, indices: Any, values: Operand, accumulate: bool = False) -> int:
    """Entries written or added at places."""
    if depends(indices):
        trace.refuse(PLACES)
    place = tuple(indices)
    if not accumulate:
        return setitem(trace, input, place, values).node
    shape = _plain(input)[place].shape
    source = applied(trace, torch.broadcast_to, values, size=shape)
    return _added(
        trace, input, source, lambda code: code[place], lambda zero, s: zero.index_put(place, s.expand(shape), accumulate=True)
    )


def _added(
    trace: Trace,
    base: Operand,
    source: Operand,
    reads: Callable[[Tensor], Tensor],
    adds: Callable[[Tensor, Tensor], Tensor],
) -> int:
    """base plus the adjoint of `reads` on the source, which is `adds` on zeros."""
    zero = torch.zeros_like(_plain(base), dtype=torch.float64)
    if not isinstance(source, Value):
        return node_of(trace, applied(trace, torch.add, base, adds(zero, trace.constant(_plain(source), "source"))))
    rows = len(zero)
    size = zero.numel() // max(rows, 1)
    code = torch.arange(1, rows * size + 1, dtype=torch.float64, device=zero.device).reshape(zero.shape)
    index = index_of(trace, reads(code), rows, size)
    total = trace.value(trace.affine(source, Index(index, size, transposed=True)), zero)
    if not isinstance(base, Value) and not bool(_plain(base).any()):
        return total.node
    return node_of(trace, applied(trace, torch.add, base, total))


def _part(trace: Trace, source: Value, index: Tensor) -> Value:
    """The part of a source that an index of its own shape reads: the first entries along every dimension."""
    return moved(trace, source, lambda code: code[tuple(slice(n) for n in index.shape)])


def _filled(parts: list[Tensor], dim: int, index: Tensor) -> Tensor:
    filled = parts[0].clone()
    filled[(slice(None),) * (dim % filled.ndim) + (index,)] = parts[1]
    return filled


def _plain(operand: Operand) -> Tensor:
    return operand.tensor if isinstance(operand, Value) else torch.as_tensor(operand)
