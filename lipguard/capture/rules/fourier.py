"""Fourier transforms, and complex values: each complex number is held as the pair of its real and imaginary parts.

A transform along one dimension is real-linear: its matrix is what torch makes of a basis in float64. One over several
dimensions is one after the other. The entries of a complex value are those of `torch.view_as_real`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lipguard.capture.rules import arithmetic, pooling, rearrange, writes
from lipguard.capture.rules.lengths import of_pairs
from lipguard.capture.rules.linear import einsum
from lipguard.capture.rules.registry import lowers, lowers_complex
from lipguard.capture.trace import Placed, Trace, Value
from lipguard.network.contraction import Length
from lipguard.network.operators import Conv, Diagonal

Operand = Value | Tensor | float | int | complex

_ANGLE = "has an angle, which jumps where the number crosses the negative axis."


def pairs(trace: Trace, x: Operand) -> Any:
    """A value or a constant, real or complex, with its real and imaginary parts along a last dimension of 2."""
    if not isinstance(x, Value):
        number = torch.as_tensor(x).to(torch.complex128).resolve_conj()
        return trace.constant(torch.view_as_real(number), "constant")
    if x.tensor.is_complex():
        return trace.value(x.node, torch.view_as_real(x.tensor.detach().resolve_conj()))
    # A real number has the imaginary part 0.
    place = torch.arange(x.size, device=x.tensor.device)
    index = torch.stack([place, torch.full_like(place, -1)], 1).flatten()
    return trace.value(rearrange.select(trace, x.node, index, x.size), torch.stack([x.tensor, torch.zeros_like(x.tensor)], -1))


def _numbers(pair: Tensor) -> Tensor:
    return torch.view_as_complex(pair.contiguous())


def _shown(result: Any) -> Any:
    return torch.view_as_real(result) if isinstance(result, Tensor) else tuple(torch.view_as_real(part) for part in result)


# Transforms.

_FORWARD = {name: getattr(torch.fft, name) for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")}


def _transform(trace: Trace, x: Value, function: Callable[..., Tensor], n: int | None, dim: int, norm: str | None) -> Value:
    """A transform along one dimension, by what it makes of a basis: the unit vectors, and i times each for complex values."""
    rank, dim = x.tensor.ndim, dim % x.tensor.ndim
    if dim == 0:
        trace.refuse("mixes the samples of a batch.")
    size, inner = x.tensor.shape[dim], x.tensor.is_complex()
    count = size * (2 if inner else 1)
    basis = torch.eye(count, dtype=torch.float64, device=x.tensor.device)
    image = function(_numbers(basis.reshape(count, size, 2)) if inner else basis, n=n, norm=norm)
    outer = image.is_complex()
    matrix = torch.view_as_real(image) if outer else image
    matrix = matrix.reshape(*((size, 2) if inner else (size,)), *matrix.shape[1:])
    names = "abcdefgh"[:rank]
    reads, gives = ("z" if inner else ""), ("y" if outer else "")
    equation = f"{names}{reads},{names[dim]}{reads}w{gives}->{names.replace(names[dim], 'w')}{gives}"
    source = pairs(trace, x) if inner else x
    return trace.value(einsum(trace, equation, source, matrix), function(x.tensor.detach(), n=n, dim=dim, norm=norm))


def _register_transform(name: str, function: Callable[..., Tensor]) -> None:
    @lowers(f"fft_{name}")
    @lowers_complex(f"fft_{name}")
    def rule(trace: Trace, input: Value, n: int | None = None, dim: int = -1, norm: str | None = None) -> int:
        return _transform(trace, input, function, n, dim, norm).node


def _register_multiple(name: str, before: str, last: str, after: str, default: tuple[int, ...] | None) -> None:
    """Several dimensions: the last by a transform of its own, which is the first step of rfftn and the last one of irfftn."""

    @lowers(f"fft_{name}")
    @lowers_complex(f"fft_{name}")
    def rule(trace: Trace, input: Value, s: Any = None, dim: Any = default, norm: str | None = None) -> int:
        if dim is None:
            dim = tuple(range(input.tensor.ndim)) if s is None else tuple(range(-len(s), 0))
        dims = [int(d) for d in (dim if isinstance(dim, list | tuple) else (dim,))]
        sizes = [None if s is None or n == -1 else int(n) for n in (s if s is not None else dims)]
        *others, final = zip(dims, sizes, strict=True)
        steps = [(before, d, n) for d, n in others if before] + [(last, *final)] + [(after, d, n) for d, n in others if after]
        for step, d, n in steps:
            input = _transform(trace, input, _FORWARD[step], n, d, norm)
        return input.node


for _name, _function in _FORWARD.items():
    _register_transform(_name, _function)
for _suffix, _default in (("2", (-2, -1)), ("n", None)):
    _register_multiple(f"fft{_suffix}", "", "fft", "fft", _default)
    _register_multiple(f"ifft{_suffix}", "", "ifft", "ifft", _default)
    _register_multiple(f"rfft{_suffix}", "", "rfft", "fft", _default)
    _register_multiple(f"irfft{_suffix}", "ifft", "irfft", "", _default)


# Moves and joins of complex numbers: of pairs.


def _register_move(name: str, move: Callable[..., Any]) -> None:
    def rule(trace: Trace, input: Value, *args: Any, **kwargs: Any) -> Placed | tuple[Placed, ...]:
        if not isinstance(input, Value) or rearrange.depends((args, kwargs)):
            trace.refuse("reads entries at places that depend on the input.")
        whole = replace(pairs(trace, input), axis=input.axis)
        return rearrange.placed(trace, whole, lambda code: _shown(move(_numbers(code), *args, **kwargs)))

    lowers_complex(name, whole=True)(rule)


def _register_join(name: str, join: Callable[..., Tensor]) -> None:
    def rule(trace: Trace, tensors: Any, *args: Any, **kwargs: Any) -> int:
        parts = [pairs(trace, part) for part in tensors]
        return rearrange.assembled(trace, parts, lambda codes: _shown(join([*map(_numbers, codes)], *args, **kwargs)))

    lowers_complex(name)(rule)


for _name, _move in rearrange.MOVES.items():
    if _name != "adjoint":  # it conjugates
        _register_move(_name, _move)
for _name, _join in rearrange.JOINS.items():
    _register_join(_name, _join)


@lowers_complex("setitem", "__setitem__")
def setitem(trace: Trace, input: Operand, place: Any, value: Operand) -> int:
    """The tensor after writing into it."""
    if rearrange.depends(place):
        trace.refuse(writes.PLACES)

    def write(parts: list[Tensor]) -> Tensor:
        written = _numbers(parts[0].clone())
        written[place] = _numbers(parts[1])
        return _shown(written)

    return rearrange.assembled(trace, [pairs(trace, input), pairs(trace, value)], write)


@lowers_complex("pad", "constant_pad_nd")
def pad(trace: Trace, input: Value, pad: Any, mode: Any = "constant", value: Any = None) -> Any:
    """Padding by zeros."""
    if mode != "constant" or value:
        trace.refuse("pads complex values by other numbers than 0, which has no rule.")
    # The last dimension of the pairs stays as it is.
    return rearrange.rearranged(trace, pairs(trace, input), lambda code: torch.nn.functional.pad(code, (0, 0, *pad)))


@lowers_complex(
    "flatten", "reshape", "view", "view_as", "reshape_as", "unflatten", "ravel", "squeeze", "unsqueeze", "contiguous", "clone",
    "positive", "alias", "detach", "resolve_conj", "resolve_neg", "cpu", "cuda", "view_as_real",
)  # fmt: skip
def same(trace: Trace, input: Value | Tensor, *args: Any, **kwargs: Any) -> int | None:
    """The same numbers in the same order."""
    if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        trace.refuse("reads the bits of its input as another type: it is not a function of numbers.")
    return input.node if isinstance(input, Value) else None


@lowers_complex("to", "type_as", "cfloat", "cdouble")
def convert(trace: Trace, input: Value | Tensor, *args: Any, **kwargs: Any) -> int | None:
    """A change of device or of precision; a real value becomes complex with the first operation that needs it."""
    if not isinstance(input, Value):
        return None
    types = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    types += [(a.tensor if isinstance(a, Value) else a).dtype for a in args if isinstance(a, Value | Tensor)]
    if not any(t.is_complex for t in types) and not (input.tensor.is_complex() and not types):
        trace.refuse("casts complex numbers to real ones, which drops their imaginary parts. Use .real.")
    return pairs(trace, input).node


@lowers("view_as_complex", "real")
def view_as_complex(trace: Trace, input: Value) -> int:
    """Pairs read as complex numbers; the real part of a real number is itself."""
    return input.node


@lowers("complex")
def from_parts(trace: Trace, real: Operand, imag: Operand) -> int:
    """Complex numbers of their real and imaginary parts."""
    return rearrange.assembled(trace, [real, imag], lambda parts: torch.stack(torch.broadcast_tensors(*parts), -1))


@lowers_complex("real")
def real(trace: Trace, input: Value) -> int | tuple[int, ...]:
    """Real parts."""
    return rearrange.rearranged(trace, pairs(trace, input), lambda code: code[..., 0])


@lowers_complex("imag")
def imag(trace: Trace, input: Value) -> int | tuple[int, ...]:
    """Imaginary parts."""
    return rearrange.rearranged(trace, pairs(trace, input), lambda code: code[..., 1])


@lowers_complex("conj", "conj_physical")
def conj(trace: Trace, input: Value) -> int:
    """Imaginary parts with the other sign."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64, device=input.tensor.device)
    return trace.affine(input, Diagonal(signs.repeat(input.size // 2), input.size))


@lowers_complex("abs")
def length(trace: Trace, input: Value) -> int:
    """|z|: the length of the pair, of constant 1."""
    both = pairs(trace, input)
    first, second = (rearrange.moved(trace, both, lambda code, k=k: code[..., k]) for k in (0, 1))
    return of_pairs(trace, first, second, Length)


@lowers_complex("angle")
def angle(trace: Trace, input: Value) -> int:
    """No continuous function."""
    trace.refuse(_ANGLE)


# Arithmetic.


@lowers_complex("add")
def add(trace: Trace, input: Operand, other: Operand, *, alpha: float = 1) -> int:
    """input + alpha other."""
    shape = torch.broadcast_shapes(_shape(input), _shape(other))
    left, right = (_spread(trace, pairs(trace, x), (*shape, 2)) for x in (input, other))
    return arithmetic.add(trace, left, right, alpha=alpha)


@lowers_complex("sub")
def sub(trace: Trace, input: Operand, other: Operand, *, alpha: float = 1) -> int:
    """input - alpha other."""
    return add(trace, input, other, alpha=-alpha)


@lowers_complex("rsub")
def rsub(trace: Trace, input: Operand, other: Operand, *, alpha: float = 1) -> int:
    """other - alpha input."""
    return add(trace, other, input, alpha=-alpha)


@lowers_complex("neg")
def neg(trace: Trace, input: Value) -> int:
    """-input."""
    return arithmetic.scaled(trace, pairs(trace, input), -1)


@lowers_complex("mul")
def mul(trace: Trace, input: Operand, other: Operand) -> int:
    """A product with a constant: on each pair the matrix (re, -im; im, re), whose norm is its absolute value."""
    if isinstance(input, Value) and isinstance(other, Value):
        trace.refuse(arithmetic.PRODUCT)
    value, constant = (input, other) if isinstance(input, Value) else (other, input)
    assert isinstance(value, Value)
    factor = pairs(trace, constant)
    both = pairs(trace, value)
    both = _spread(trace, both, (*torch.broadcast_shapes(both.tensor.shape[:-1], factor.shape[:-1]), 2))
    one = trace.value(both.node, both.tensor[..., 0])
    re, im = (trace.per_feature(factor[..., k], one).expand(one.tensor[0].numel()) for k in (0, 1))
    if not bool(im.any()):
        return trace.affine(both, Diagonal(re.repeat_interleave(2), both.size))
    kernel = torch.stack([re, -im, im, re], 1).reshape(-1, 2, 1)
    return trace.affine(both, Conv(kernel, (1,), (1,), (1,), (0,), (1,), len(re)))


@lowers_complex("div")
def div(trace: Trace, input: Operand, other: Operand) -> int:
    """A quotient by a constant."""
    if isinstance(other, Value):
        trace.refuse(arithmetic.QUOTIENT)
    divisor = torch.as_tensor(other)
    return mul(trace, input, 1 / divisor.to(torch.complex128 if divisor.is_complex() else torch.float64))


@lowers_complex("einsum")
def product(trace: Trace, equation: str, *operands: Any) -> int:
    """A product of a value and a constant, summed over indices; those of the pairs are two more."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or len(operands) != 2 or "Y" in equation or "Z" in equation:
        trace.refuse("is a product of complex values with other than two operands, or without '->', which has no rule.")
    if all(isinstance(o, Value) for o in operands):
        trace.refuse(arithmetic.PRODUCT)
    parts: list[Any] = []
    for i, operand in enumerate(operands):
        both = pairs(trace, operand)
        if isinstance(operand, Value):
            terms[i] += "Z"
        else:
            re, im = both.unbind(-1)
            both = torch.stack([torch.stack([re, -im], -1), torch.stack([im, re], -1)], -2)
            terms[i] += "YZ"
        parts.append(both)
    return einsum(trace, f"{terms[0]},{terms[1]}->{out}Y", *parts)


@lowers_complex("matmul", "mm", "bmm")
def matmul(trace: Trace, input: Operand, other: Operand) -> int:
    """Products of matrices, and of stacks of them."""
    if min(len(_shape(input)), len(_shape(other))) < 2:
        trace.refuse("is a product of a complex matrix and a vector, which has no rule. Use torch.einsum.")
    right = "...kj" if len(_shape(other)) > 2 else "kj"
    return product(trace, f"...ik,{right}->...ij", input, other)


@lowers_complex("sum")
def total(trace: Trace, input: Value, dim: Any = None, keepdim: bool = False) -> int:
    """Sums over dimensions of one sample."""
    return pooling.total(trace, pairs(trace, input), _positive(input, dim), keepdim)


@lowers_complex("mean")
def mean(trace: Trace, input: Value, dim: Any = None, keepdim: bool = False) -> int:
    """Means over dimensions of one sample."""
    return pooling.mean(trace, pairs(trace, input), _positive(input, dim), keepdim)


def _positive(x: Value, dim: Any) -> Any:
    if dim is None:
        return None
    return tuple(int(d) % x.tensor.ndim for d in (dim if isinstance(dim, list | tuple) else (dim,)))


def _shape(x: Operand) -> Sequence[int]:
    return x.tensor.shape if isinstance(x, Value) else torch.as_tensor(x).shape


def _spread(trace: Trace, x: Value | Tensor, shape: Sequence[int]) -> Any:
    if isinstance(x, Value):
        lead = len(shape) - x.tensor.ndim
        wide = trace.value(x.node, x.tensor[(None,) * lead]) if lead else x
        return rearrange.broadcast(trace, wide, shape)
    return x.expand(shape) if math.prod(x.shape) else x
