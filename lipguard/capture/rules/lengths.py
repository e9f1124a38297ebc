"""Lengths, softmax and log-sum-exp of groups of entries: smooth functions with known constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipguard.capture.rules.arithmetic import scaled
from lipguard.capture.rules.convolution import per_dimension
from lipguard.capture.rules.coupled import amax, amin
from lipguard.capture.rules.operands import Operand, applied
from lipguard.capture.rules.pooling import total
from lipguard.capture.rules.rearrange import broadcast, joined, select
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import UNKNOWN, Trace, Value
from lipguard.network import activations
from lipguard.network.contraction import Contraction, Length, LogSumExp, Softmax
from lipguard.network.operators import Diagonal

_POWERS = "raises its windows to a power other than 2: it has no rule. Use norm_type=2, or average pooling."


@lowers("softmax")
def softmax(trace: Trace, input: Value, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> int:
    """Probabilities along a dimension: the constant is 1/2."""
    index = _groups(trace, input, _one(trace, input, dim))
    if index.shape[1] == 1:  # the one probability is 1
        zero, one = (torch.full((), v, dtype=torch.float64, device=index.device) for v in (0.0, 1.0))
        return trace.affine(input, Diagonal(zero, input.size), one.expand(input.size).contiguous())
    return scaled(trace, trace.value(trace.coupled(input, Softmax(index)), input.tensor), 0.5)


@lowers("softmin")
def softmin(trace: Trace, input: Value, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> int:
    """softmax(-z)."""
    return softmax(trace, trace.value(scaled(trace, input, -1), input.tensor), dim)


@lowers("log_softmax")
def log_softmax(trace: Trace, input: Value, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> int:
    """z less the log-sum-exp of its group."""
    index = _groups(trace, input, _one(trace, input, dim))
    least = trace.value(_first(trace, input, index, LogSumExp), input.tensor.new_empty(len(input.tensor), len(index)))
    group = torch.empty(input.size, dtype=torch.int64, device=index.device)
    group[index.flatten()] = torch.arange(len(index), device=index.device).repeat_interleave(index.shape[1])
    negative = trace.value(scaled(trace, least, -1), least.tensor)
    return trace.sum(input, trace.value(select(trace, negative.node, group, len(index)), input.tensor))


@lowers("logsumexp")
def logsumexp(trace: Trace, input: Value, dim: Any, keepdim: bool = False) -> int:
    """log sum e^z over dimensions: the constant is 1."""
    dims = _dims(input, dim)
    return UNKNOWN if 0 in dims else _first(trace, input, _groups(trace, input, dims), LogSumExp)


@lowers("logcumsumexp")
def logcumsumexp(trace: Trace, *_: object, **__: object) -> int:
    """Log-sum-exps of the first entries: groups that overlap, each with the constant 1."""
    trace.refuse("takes log-sum-exps of groups that overlap, which has no rule. Use torch.logsumexp over the groups you need.")


@lowers("norm", "linalg_vector_norm")
def norm(
    trace: Trace,
    input: Value,
    p: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    ord: Any = None,
    dtype: Any = None,
    out: Any = None,
) -> int:
    """The p-norm over dimensions of one sample, p = 1, 2 or inf; over everything a question to the values."""
    order = ord if ord is not None else p
    order = 2.0 if order in (None, "fro") else order
    if dim is None or 0 in (dims := _dims(input, dim)):
        return UNKNOWN
    if isinstance(order, str):
        trace.refuse(f"is a norm of matrices, {order!r}, which has no rule.")
    if order == 2:
        return _first(trace, input, _groups(trace, input, dims), Length)
    size = trace.value(trace.activation(input, activations.absolute().to(input.tensor.device)), input.tensor)
    reduced = {1: total, math.inf: amax, -math.inf: amin}.get(order)
    if reduced is None:
        trace.refuse(f"is a norm of order {order}, which has no rule. Those of order 1, 2 and inf have.")
    return reduced(trace, size, dims, keepdim)


@lowers("linalg_norm")
def any_norm(trace: Trace, input: Value, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> int:
    """Of vectors over one dimension, or over several without an order; else of matrices over two."""
    if ord is not None and isinstance(dim, list | tuple) and len(dim) == 2:
        return matrix_norm(trace, input, ord, dim, keepdim)
    return norm(trace, input, ord, dim, keepdim)


@lowers("linalg_matrix_norm")
def matrix_norm(trace: Trace, input: Value, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False) -> int:
    """The Frobenius norm."""
    if ord != "fro":
        trace.refuse(f"is a norm of matrices, {ord!r}, which has no rule. The Frobenius norm has.")
    return norm(trace, input, 2.0, dim, keepdim)


@lowers("pairwise_distance")
def pairwise_distance(trace: Trace, x1: Operand, x2: Operand, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> int:
    """The norm of x1 - x2 + eps over the last dimension."""
    difference = applied(trace, torch.add, applied(trace, torch.sub, x1, x2), eps)
    return norm(trace, difference, p, -1, keepdim)


@lowers("cdist")
def cdist(trace: Trace, x1: Operand, x2: Operand, p: float = 2.0, compute_mode: Any = None) -> int:
    """The norms of all differences of rows of x1 and x2."""
    rows, columns = applied(trace, torch.unsqueeze, x1, dim=-2), applied(trace, torch.unsqueeze, x2, dim=-3)
    return norm(trace, applied(trace, torch.sub, rows, columns), p, -1)


def of_pairs(trace: Trace, a: Value, b: Value, kind: Callable[[Tensor], Contraction]) -> int:
    """The length, or the log-sum-exp, of every pair of entries of two values."""
    shape = torch.broadcast_shapes(a.tensor.shape, b.tensor.shape)
    a, b = broadcast(trace, a, shape), broadcast(trace, b, shape)
    both = trace.value(joined(trace, [a, b]), torch.cat([a.tensor, b.tensor], 1))
    return _first(trace, both, torch.arange(2 * a.size, device=a.tensor.device).reshape(2, -1).T.contiguous(), kind)


def _register_pool(dims: int) -> None:
    @lowers(f"lp_pool{dims}d")
    def lp_pool(
        trace: Trace, input: Value, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
    ) -> int:
        if norm_type != 2:
            trace.refuse(_POWERS)
        if input.tensor.ndim != dims + 2:
            trace.refuse(
                f"is given a value of shape {tuple(input.tensor.shape)}: a batch of {dims}-dimensional images is needed."
            )
        kernel = per_dimension(kernel_size, dims)
        steps = kernel if stride is None or stride == [] or stride == () else per_dimension(stride, dims)
        space = input.tensor.shape[2:]
        if ceil_mode and any((n - k) % s for n, k, s in zip(space, kernel, steps, strict=True)):
            trace.refuse("has windows that cross the border. Use ceil_mode=False.")
        windows = torch.arange(input.size, device=input.tensor.device).reshape(input.tensor.shape[1:])
        for axis, (k, s) in enumerate(zip(kernel, steps, strict=True)):
            windows = windows.unfold(axis + 1, k, s)
        index = windows.reshape(-1, math.prod(kernel))
        # Windows may overlap, or leave entries out: what they read is set side by side before.
        node = select(trace, input.node, index.flatten(), input.size)
        apart = torch.arange(index.numel(), device=index.device).reshape(index.shape)
        return _first(trace, trace.value(node, input.tensor.new_empty(len(input.tensor), index.numel())), apart, Length)


for _count in (1, 2, 3):
    _register_pool(_count)


def _first(trace: Trace, x: Value, index: Tensor, kind: Callable[[Tensor], Contraction]) -> int:
    """One number for each group: log-sum-exp or length; of one entry, that entry or its absolute value."""
    if index.shape[1] == 1:
        one = trace.value(select(trace, x.node, index[:, 0], x.size), x.tensor)
        return one.node if kind is LogSumExp else trace.activation(one, activations.absolute().to(index.device))
    return select(trace, trace.coupled(x, kind(index)), index[:, 0].contiguous(), x.size)


def _groups(trace: Trace, x: Value, dims: list[int]) -> Tensor:
    """Places of the entries along some dimensions of a sample, (groups, entries of each); groups in the order of the others."""
    if 0 in dims:
        trace.refuse("mixes the samples of a batch.")
    codes = torch.arange(x.size, device=x.tensor.device).reshape(x.tensor.shape[1:])
    kept = [d for d in range(1, x.tensor.ndim) if d not in dims]
    return codes.permute([d - 1 for d in (*kept, *dims)]).reshape(-1, math.prod(x.tensor.shape[d] for d in dims))


def _dims(x: Value, dim: Any) -> list[int]:
    return sorted({int(d) % x.tensor.ndim for d in (dim if isinstance(dim, list | tuple) else (dim,))})


def _one(trace: Trace, x: Value, dim: int | None) -> list[int]:
    if dim is None:
        trace.refuse("is given no dimension. Give dim=1.")
    return _dims(x, dim)
