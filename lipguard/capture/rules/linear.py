"""Matrix products with one constant factor; a weight repeated over positions is a convolution with a kernel of one tap."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipguard.capture.rules.arithmetic import PRODUCT
from lipguard.capture.rules.rearrange import assembled, broadcast, moved
from lipguard.capture.rules.registry import COLUMNS, lowers
from lipguard.capture.trace import Trace, Value
from lipguard.errors import InvalidExample
from lipguard.network.operators import Conv, Dense

_LETTERS = string.ascii_lowercase.replace("i", "").replace("j", "").replace("k", "")[:-3]
_CAPITALS = string.ascii_uppercase


@lowers("linear", COLUMNS)
def linear(trace: Trace, input: Value, weight: Tensor, bias: Tensor | None = None) -> int:
    """weight x + bias on the last dimension, weight (out, in)."""
    if not isinstance(input, Value) or isinstance(weight, Value) or isinstance(bias, Value):
        return _product_of_values(trace)
    return _right(trace, input, trace.constant(weight, "weight"), bias)


@lowers("matmul", "mm", "bmm")
def matmul(trace: Trace, input: Value | Tensor, other: Value | Tensor) -> int:
    """x @ M with a constant matrix or vector, M @ x inside every sample, and stacks of them."""
    if isinstance(input, Value) and isinstance(other, Tensor):
        if other.ndim <= 2:
            matrix = trace.constant(other, "matrix")
            return _right(trace, input, matrix[None] if matrix.ndim == 1 else matrix.T, None)
        input = _stretched(trace, input, other)
        lead, stack, other = _stacked(trace, input.tensor.shape[:-2], other)
        return einsum(trace, f"{lead}ik,{stack}kj->{lead}ij", input, other)
    if isinstance(input, Tensor) and isinstance(other, Value):
        if other.tensor.ndim < 3:
            trace.refuse("mixes the samples of a batch: its right factor holds one sample in each row.")
        if input.ndim == 1:
            names = _LETTERS[: other.tensor.ndim - 2]
            return einsum(trace, f"k,{names}kj->{names}j", input, other)
        other = _stretched(trace, other, input)
        lead, stack, input = _stacked(trace, other.tensor.shape[:-2], input)
        return einsum(trace, f"{stack}ik,{lead}kj->{lead}ij", input, other)
    return _product_of_values(trace)


@lowers("rmatmul")
def rmatmul(trace: Trace, input: Value | Tensor, other: Value | Tensor) -> int:
    """other @ input."""
    return matmul(trace, other, input)


def _right(trace: Trace, x: Value, weight: Tensor, bias: Tensor | None) -> int:
    features = x.tensor.shape[-1] if x.tensor.ndim > 1 else 0
    if weight.ndim != 2 or weight.shape[1] != features:
        expected = weight.shape[-1]
        raise InvalidExample(
            f"{trace.place} expects {expected} features in the last dimension, the example gives {features} "
            f"(a batch of shape {tuple(x.tensor.shape)} arrives there)."
        )
    shift = None if bias is None else trace.constant(bias, "bias")
    positions = x.size // features
    if positions == 1:
        return trace.affine(x, Dense(weight), shift)
    # The same weight at every position: a kernel of one tap on (features, positions), as convolutions hold their channels.
    columns = moved(trace, x, lambda code: code.reshape(len(code), positions, features).transpose(1, 2))
    node = _pointwise(trace, columns, weight, positions, 1, None if shift is None else shift.repeat_interleave(positions))
    result = trace.value(node, x.tensor.new_empty(len(x.tensor), len(weight), positions))
    return moved(trace, result, lambda code: code.transpose(1, 2)).node


@lowers("einsum")
def einsum(trace: Trace, equation: object, *operands: Any) -> int:
    """A product of one value with constants, summed over indices: a convolution with a kernel of one tap and groups.

    Indices of the value and a constant that stay are groups, those that are summed over are channels of the input, those
    of the constant alone are channels of the output, those of the value alone are positions.
    """
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str):
        trace.refuse("is called with lists of indices, which has no rule. Write the equation as text.")
    shapes = [(o.tensor if isinstance(o, Value) else o).shape for o in operands]
    terms, out = _letters(trace, equation, [len(shape) for shape in shapes])
    values = [i for i, o in enumerate(operands) if isinstance(o, Value)]
    if len(values) != 1:
        return _product_of_values(trace)
    x, own = operands[values[0]], terms[values[0]]
    if any(len(set(term)) < len(term) for term in (*terms, out)):
        trace.refuse("reads a diagonal by naming an index twice, which has no rule. Use torch.diagonal.")
    constants = [(terms[i], o) for i, o in enumerate(operands) if i != values[0]]
    if len(constants) > 1:
        return _in_turn(trace, x, own, constants, out)
    factor, names = torch.ones((), dtype=torch.float64, device=x.tensor.device), ""
    for names, operand in constants:
        factor = trace.constant(operand, "operand")
        if own[0] in names:
            first = factor.select(names.index(own[0]), 0)
            if not bool((factor == first.unsqueeze(names.index(own[0]))).all()):
                trace.refuse("treats the samples of a batch differently.")
            factor, names = first, names.replace(own[0], "")
    alone = "".join(c for c in names if c not in own and c not in out)
    if alone:  # what is summed over the constant alone is summed behind it: by ones, exactly
        ones = torch.ones([factor.shape[names.index(c)] for c in alone], dtype=torch.float64, device=factor.device)
        return _in_turn(trace, x, own, [(names, factor), (alone, ones)], out)
    if out[:1] != own[0]:
        trace.refuse("mixes the samples of a batch, which must stay the first dimension.")
    sizes = dict(zip(own, x.tensor.shape, strict=True)) | dict(zip(names, factor.shape, strict=True))
    if any(sizes[c] != n for c, n in zip(own, x.tensor.shape, strict=True)):
        trace.refuse("stretches a dimension of size 1. Expand it first.")
    groups = [c for c in own if c in names and c in out]
    summed = [c for c in own if c not in out]
    places = [c for c in own[1:] if c in out and c not in names]
    fresh = [c for c in names if c in out and c not in own]
    met = [c for c in summed if c in names]
    weight = torch.einsum(f"{names}->{''.join([*groups, *fresh, *met])}", factor)
    for c in (c for c in summed if c not in names):
        weight, met = weight.unsqueeze(-1).expand(*weight.shape, sizes[c]), [*met, c]
    count, before, after = (math.prod(sizes[c] for c in part) for part in (groups, met, fresh))
    positions = math.prod(sizes[c] for c in places)
    order = [own.index(c) for c in (own[0], *groups, *met, *places)]
    columns = moved(trace, x, lambda code: code.permute(order).reshape(len(code), count * before, positions))
    node = _pointwise(trace, columns, weight.reshape(count * after, before), positions, count)
    held = (own[0], *groups, *fresh, *places)
    result = trace.value(node, x.tensor.new_empty([sizes[c] for c in held]))
    return moved(trace, result, lambda code: code.permute([held.index(c) for c in out])).node


def _in_turn(trace: Trace, x: Value, own: str, constants: list[tuple[str, Tensor]], out: str) -> int:
    """The constants one after the other: what is computed of two would round, behind each other they stay as they are."""
    (term, constant), *rest = constants
    later = out + "".join(names for names, _ in rest)
    middle = "".join(c for c in dict.fromkeys(own + term) if c in later)
    sizes = dict(zip(term, constant.shape, strict=True)) | dict(zip(own, x.tensor.shape, strict=True))
    node = einsum(trace, f"{own},{term}->{middle}", x, constant)
    value = trace.value(node, x.tensor.new_empty([sizes[c] for c in middle]))
    return einsum(trace, f"{','.join([middle, *(names for names, _ in rest)])}->{out}", value, *(c for _, c in rest))


@lowers("cumsum")
def cumsum(trace: Trace, input: Value, dim: int, *, dtype: torch.dtype | None = None) -> int:
    """Sums of the first entries of a dimension."""
    return _along(trace, input, dim, lambda eye: eye.cumsum(0))


@lowers("diff")
def diff(
    trace: Trace,
    input: Value,
    n: int = 1,
    dim: int = -1,
    prepend: Value | Tensor | None = None,
    append: Value | Tensor | None = None,
) -> int:
    """Differences of neighbours along a dimension, after what is set before and behind it."""
    parts = [part for part in (prepend, input, append) if part is not None]
    if len(parts) > 1:
        plain = torch.cat([part.tensor if isinstance(part, Value) else part for part in parts], dim)
        input = trace.value(assembled(trace, parts, lambda codes: torch.cat(codes, dim)), plain)
    return _along(trace, input, dim, lambda eye: eye.diff(n, dim=0))


def _along(trace: Trace, x: Value, dim: int, function: Callable[[Tensor], Tensor]) -> int:
    """A linear function along one dimension, given by what it makes of the identity matrix's rows."""
    rank = x.tensor.ndim
    dim %= rank
    if dim == 0:
        trace.refuse("mixes the samples of a batch.")
    names = _LETTERS[:rank]
    matrix = function(torch.eye(x.tensor.shape[dim], dtype=torch.float64, device=x.tensor.device))
    return einsum(trace, f"yz,{names.replace(names[dim], 'z')}->{names.replace(names[dim], 'y')}", matrix, x)


def _pointwise(trace: Trace, x: Value, weight: Tensor, positions: int, groups: int, shift: Tensor | None = None) -> int:
    kernel = weight[:, :, None].contiguous()
    return trace.affine(x, Conv(kernel, (positions,), (positions,), (1,), (0,), (1,), groups), shift)


def _stretched(trace: Trace, x: Value, matrices: Tensor) -> Value:
    """A stack of values repeated where it is of size 1 and that of the matrices is not."""
    return broadcast(trace, x, (*torch.broadcast_shapes(x.tensor.shape[:-2], matrices.shape[:-2]), *x.tensor.shape[-2:]))


def _stacked(trace: Trace, value: Sequence[int], matrices: Tensor) -> tuple[str, str, Tensor]:
    """Names of a value's leading dimensions and of those of a stack of matrices, which is left without those of size 1."""
    names, stack = _LETTERS[: len(value)], matrices.shape[:-2]
    if len(stack) > len(value) or any(n not in (1, m) for n, m in zip(reversed(stack), reversed(value), strict=False)):
        trace.refuse("multiplies by a stack of matrices that is larger than its value's. Expand the value first.")
    kept = "".join(name for name, n in zip(names[len(value) - len(stack) :], stack, strict=True) if n > 1)
    return names, kept, matrices.reshape(*(n for n in stack if n > 1), *matrices.shape[-2:])


def _letters(trace: Trace, equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The indices of every operand and of the result, dots written out."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        trace.refuse(f"has {len(ranks)} operands for the equation {equation!r}.")
    spare = [c for c in _CAPITALS if c not in equation]
    longest = max(rank - len(term.replace("...", "")) if "..." in term else 0 for rank, term in zip(ranks, terms, strict=True))
    dots = "".join(spare[:longest])
    lengths = [rank - len(term.replace("...", "")) for rank, term in zip(ranks, terms, strict=True)]
    terms = [term.replace("...", dots[len(dots) - max(n, 0) :]) for term, n in zip(terms, lengths, strict=True)]
    if not arrow:
        joined = "".join(terms)
        out = dots + "".join(sorted({c for c in joined if joined.count(c) == 1 and c not in dots}))
    return terms, out.replace("...", dots)


def _product_of_values(trace: Trace) -> int:
    trace.refuse(PRODUCT)
