"""Matrix products with one constant factor."""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.errors import InvalidExample
from lipguard.network.operators import Dense
from lipguard.network.rules import lowers
from lipguard.network.rules.arithmetic import add, scaled
from lipguard.network.trace import Trace, Value

_LIMIT = 2**26
"""Largest number of entries of a matrix that repeats a weight over positions: 512 MiB."""


@lowers("linear")
def linear(trace: Trace, input: Value, weight: Tensor, bias: Tensor | None = None) -> int:
    """weight x + bias on the last dimension, weight (out, in)."""
    if not isinstance(input, Value) or isinstance(weight, Value) or isinstance(bias, Value):
        return _product_of_values(trace)
    return _right(trace, input, trace.constant(weight, "weight"), bias)


@lowers("matmul", "mm")
def matmul(trace: Trace, input: Value | Tensor, other: Value | Tensor) -> int:
    """x @ M with a constant matrix or vector, or M @ x inside every sample."""
    if isinstance(input, Value) and isinstance(other, Tensor):
        if other.ndim > 2:
            trace.refuse("multiplies by a stack of matrices, which has no rule.")
        matrix = trace.constant(other, "matrix")
        return _right(trace, input, matrix[None] if matrix.ndim == 1 else matrix.T, None)
    if isinstance(input, Tensor) and isinstance(other, Value):
        if other.tensor.ndim < 3 or input.ndim > 2:
            trace.refuse("mixes the samples of a batch, or multiplies by a stack of matrices, which has no rule.")
        matrix = trace.constant(input, "matrix")
        matrix = matrix[None] if matrix.ndim == 1 else matrix
        if other.tensor.ndim > 3:
            trace.refuse("multiplies a stack of matrices inside every sample, which has no rule.")
        rows, columns = other.tensor.shape[1:]
        if matrix.shape[1] != rows:
            raise InvalidExample(f"{trace.place} expects {matrix.shape[1]} rows, the example gives {rows}.")
        check_size(trace, matrix.numel() * columns * columns)
        # (M X) read row by row is (M kron I) x.
        eye = torch.eye(columns, dtype=torch.float64, device=matrix.device)
        return trace.affine(other, Dense(torch.kron(matrix, eye)))
    return _product_of_values(trace)


@lowers("rmatmul")
def rmatmul(trace: Trace, input: Value | Tensor, other: Value | Tensor) -> int:
    """other @ input."""
    return matmul(trace, other, input)


@lowers("addmm")
def addmm(
    trace: Trace, input: Value | Tensor, mat1: Value | Tensor, mat2: Value | Tensor, *, beta: float = 1, alpha: float = 1
) -> int:
    """beta input + alpha mat1 @ mat2."""
    if not isinstance(mat1, Value):
        trace.refuse("mixes the samples of a batch: the rows of its right factor depend on the input.")
    node = trace.value(matmul(trace, mat1, mat2), torch.matmul(mat1.tensor, mat2) if isinstance(mat2, Tensor) else mat1.tensor)
    node = trace.value(scaled(trace, node, alpha), node.tensor)
    if beta == 0:
        return node.node
    if isinstance(input, Value):
        return add(trace, node, trace.value(scaled(trace, input, beta), input.tensor))
    return add(trace, node, input * beta)


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
    if positions > 1:
        check_size(trace, weight.numel() * positions * positions)
        # The same weight at every position: block-diagonal.
        weight = torch.kron(torch.eye(positions, dtype=torch.float64, device=weight.device), weight)
        shift = None if shift is None else shift.repeat(positions)
    return trace.affine(x, Dense(weight), shift)


def check_size(trace: Trace, entries: int) -> None:
    """Refuse a matrix of more entries than memory should hold."""
    if entries > _LIMIT:
        trace.refuse(f"repeats its weight over so many positions that the matrix would have {entries} entries (limit {_LIMIT}).")


def _product_of_values(trace: Trace) -> int:
    trace.refuse("multiplies two values that both depend on the input: a quadratic map has no global Lipschitz constant.")
