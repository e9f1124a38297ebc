"""Sums and products under other names: lerp, addcmul, baddbmm, tensordot, outer, cross, kron, chains of matrices."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipguard.capture.rules.arithmetic import PRODUCT, scaled
from lipguard.capture.rules.linear import einsum
from lipguard.capture.rules.operands import Operand, applied, by_basis, node_of
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import Trace, Value
from lipguard.rounding import UNIT


@lowers("lerp")
def lerp(trace: Trace, input: Operand, end: Operand, weight: Operand) -> int:
    """input + weight (end - input)."""
    if isinstance(weight, Value):
        step = applied(trace, torch.mul, weight, applied(trace, torch.sub, end, input))
        return node_of(trace, applied(trace, torch.add, input, step))
    # 1 - weight rounds once; as one factor of the input it leaves no cancellation behind.
    weight = trace.constant(weight, "weight") if isinstance(weight, Tensor) else weight
    rest = 1 - weight
    if isinstance(input, Value):
        start: Any = trace.value(scaled(trace, input, rest, UNIT), input.tensor * rest)
    else:
        start = _times(trace, input, rest)
    return node_of(trace, applied(trace, torch.add, start, _times(trace, end, weight)))


@lowers("addcmul")
def addcmul(trace: Trace, input: Operand, tensor1: Operand, tensor2: Operand, *, value: float = 1) -> int:
    """input + value tensor1 tensor2."""
    product = applied(trace, torch.mul, tensor1, tensor2)
    return node_of(trace, applied(trace, torch.add, input, _times(trace, product, value)))


@lowers("addcdiv")
def addcdiv(trace: Trace, input: Operand, tensor1: Operand, tensor2: Operand, *, value: float = 1) -> int:
    """input + value tensor1 / tensor2."""
    quotient = applied(trace, torch.div, tensor1, tensor2)
    return node_of(trace, applied(trace, torch.add, input, _times(trace, quotient, value)))


def _register_sum(name: str, product: Callable[..., Tensor]) -> None:
    def rule(trace: Trace, input: Operand, first: Operand, second: Operand, *, beta: float = 1, alpha: float = 1) -> int:
        scaled = _times(trace, applied(trace, product, first, second), alpha)
        # torch does not read an input whose factor is 0.
        return node_of(trace, scaled if beta == 0 else applied(trace, torch.add, _times(trace, input, beta), scaled))

    lowers(name)(rule)


_register_sum("addmm", torch.matmul)
_register_sum("addmv", torch.matmul)
_register_sum("baddbmm", torch.matmul)
_register_sum("addr", torch.outer)


@lowers("addbmm")
def addbmm(trace: Trace, input: Operand, batch1: Operand, batch2: Operand, *, beta: float = 1, alpha: float = 1) -> int:
    """beta input + alpha times the sum of the products of two stacks of matrices, over the stack."""
    if isinstance(batch1, Value) or isinstance(batch2, Value):
        trace.refuse("adds up the products of a stack, which is the batch: it mixes the samples.")
    product = _times(trace, torch.bmm(trace.constant(batch1, "matrix"), trace.constant(batch2, "matrix")).sum(0), alpha)  # type: ignore[arg-type]
    return node_of(trace, applied(trace, torch.add, _times(trace, input, beta), product))


@lowers("mv", "dot", "vdot", "inner")
def inner(trace: Trace, input: Operand, other: Operand) -> int:
    """Sums of products over the last dimension of each."""
    return _summed(trace, input, other, [-1], [-1])


@lowers("linalg_vecdot")
def vecdot(trace: Trace, x: Operand, y: Operand, *, dim: int = -1) -> int:
    """Sums of products over one dimension; the others broadcast."""
    return _with_constant(trace, lambda a, b: torch.linalg.vecdot(a, b, dim=dim), x, y)


@lowers("tensordot")
def tensordot(trace: Trace, a: Operand, b: Operand, dims: Any = 2, out: None = None) -> int:
    """Sums of products over pairs of dimensions."""
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    pairs = (list(range(-dims, 0)), list(range(dims))) if isinstance(dims, int) else tuple(map(list, dims))
    return _summed(trace, a, b, *pairs)


@lowers("outer", "ger")
def outer(trace: Trace, input: Operand, vec2: Operand) -> int:
    """Products of all pairs of entries."""
    return _summed(trace, input, vec2, [], [])


@lowers("linalg_multi_dot", "chain_matmul")
def chain(trace: Trace, *matrices: Any) -> int:
    """A product of several matrices."""
    parts = matrices[0] if len(matrices) == 1 and isinstance(matrices[0], list | tuple) else matrices
    product = parts[0]
    for part in parts[1:]:
        product = applied(trace, torch.matmul, product, part)
    return node_of(trace, product)


@lowers("linalg_cross")
def cross(trace: Trace, input: Operand, other: Operand, *, dim: int = -1) -> int:
    """a x b with one of them constant."""
    return _with_constant(trace, lambda a, b: torch.linalg.cross(a, b, dim=dim), input, other)


@lowers("cross")
def first_cross(trace: Trace, input: Operand, other: Operand, dim: int | None = None) -> int:
    """The same; without a dimension torch takes the first of size 3."""
    if dim is None and 3 in torch.broadcast_shapes(*(_plain(o).shape for o in (input, other)))[:-1]:
        trace.refuse("takes the first dimension of size 3, which may be the batch. Give dim=-1.")
    return cross(trace, input, other, dim=-1 if dim is None else dim)


@lowers("kron")
def kron(trace: Trace, input: Operand, other: Operand) -> int:
    """Every entry of one times the whole of the other, which is constant."""
    return _with_constant(trace, torch.kron, input, other)


def _register_trapezoid(function: Callable[..., Tensor], *names: str) -> None:
    def rule(trace: Trace, y: Operand, x: Operand | None = None, *, dx: float = 1.0, dim: int = -1) -> int:
        if isinstance(x, Value) or not isinstance(y, Value):
            trace.refuse(PRODUCT)
        places: dict[str, Any] = {"dx": dx} if x is None else {"x": trace.constant(_plain(x), "places")}
        return by_basis(trace, y, lambda basis: function(basis, dim=dim, **places))

    lowers(*names)(rule)


_register_trapezoid(torch.trapezoid, "trapezoid", "trapz")
_register_trapezoid(torch.cumulative_trapezoid, "cumulative_trapezoid")


def _times(trace: Trace, operand: Operand, factor: Operand) -> Any:
    return operand if isinstance(factor, int | float) and factor == 1 else applied(trace, torch.mul, operand, factor)


def _with_constant(trace: Trace, product: Callable[[Tensor, Tensor], Tensor], a: Operand, b: Operand) -> int:
    """A bilinear call with one constant operand, by its matrix."""
    if isinstance(a, Value) and isinstance(b, Value):
        trace.refuse(PRODUCT)
    constant = trace.constant(_plain(b if isinstance(a, Value) else a), "factor")
    if isinstance(a, Value):
        return by_basis(trace, a, lambda x: product(x, constant))
    assert isinstance(b, Value)
    return by_basis(trace, b, lambda x: product(constant, x))


def _plain(operand: Operand) -> Tensor:
    return operand.tensor if isinstance(operand, Value) else torch.as_tensor(operand)


def _summed(trace: Trace, a: Operand, b: Operand, first: list[int], second: list[int]) -> int:
    """Products of entries of a and b, summed over pairs of dimensions; what is left of a stands before what is left of b."""
    shapes = [_plain(operand).shape for operand in (a, b)]
    letters = iter(string.ascii_lowercase)
    names = [[next(letters) for _ in shape] for shape in shapes]
    for i, j in zip(first, second, strict=True):
        names[1][j] = names[0][i]
    met = {names[0][i] for i in first}
    out = "".join(c for c in (*names[0], *names[1]) if c not in met)
    equation = f"{''.join(names[0])},{''.join(names[1])}->{out}"
    return einsum(trace, equation, a, b)
