"""Sums, products, matrix products, normalisation by fixed statistics, sums and maxima over axes, comparisons of constants."""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.onnx.operators.table import Unread, operator


def _div(a: Tensor, b: Tensor) -> Tensor:
    """A quotient; of whole numbers, as sizes are, cut towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _register_binary(name: str, function: Callable[[Tensor, Tensor], Tensor], laid: bool = True) -> None:
    """An operator of two operands.

    Args:
        laid: before opset 7 the second operand was laid along the axes from `axis` on.
    """

    @operator(name, since=7)
    def binary(a: Tensor, b: Tensor) -> Tensor:
        return function(a, b)

    if not laid:
        operator(name)(binary)
        return

    @operator(name)
    def along(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0, consumed_inputs: object = None) -> Tensor:
        if broadcast and axis is not None:
            b = b.reshape(*b.shape, *(1 for _ in range(a.ndim - axis % a.ndim - b.ndim)))
        return function(a, b)


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": python.add, "And": torch.logical_and, "Div": _div, "Equal": torch.eq, "Greater": torch.gt, "Less": torch.lt,
    "Mul": python.mul, "Or": torch.logical_or, "Pow": torch.pow, "Sub": python.sub,
}  # fmt: skip
for _name, _function in _BINARY.items():
    _register_binary(_name, _function)
for _name, _function in {"GreaterOrEqual": torch.ge, "LessOrEqual": torch.le, "MatMul": torch.matmul}.items():
    _register_binary(_name, _function, laid=False)


@operator("Where")
def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Entries of one or the other."""
    return torch.where(condition, a, b)


@operator("Sum")
def total(*terms: Tensor, consumed_inputs: object = None) -> Tensor:
    """The sum of all inputs."""
    return reduce(python.add, terms)


@operator("Mean")
def average(*terms: Tensor, consumed_inputs: object = None) -> Tensor:
    """The mean of all inputs."""
    return reduce(python.add, terms) / len(terms)


@operator("Max")
def largest(*terms: Tensor, consumed_inputs: object = None) -> Tensor:
    """The largest of all inputs, entry by entry."""
    return reduce(torch.maximum, terms)


@operator("Min")
def smallest(*terms: Tensor, consumed_inputs: object = None) -> Tensor:
    """The smallest of all inputs, entry by entry."""
    return reduce(torch.minimum, terms)


@operator("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 1,
) -> Tensor:
    """alpha a b + beta c, either factor transposed where that is asked for."""
    a, b = (m.transpose(0, 1) if turned else m for m, turned in ((a, transA), (b, transB)))
    product = torch.matmul(a, b)
    product = product if alpha == 1 else alpha * product
    if c is None or beta == 0:
        return product
    return product + (c if beta == 1 else beta * c)


@operator("BatchNormalization", since=14)
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    """The affine map of the statistics given, channel by channel (axis 1)."""
    if training_mode:
        raise Unread("normalises by the statistics of the batch (training_mode is 1). Export the model in evaluation mode.")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


@operator("BatchNormalization", since=7)
def batch_normalization_7(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
) -> Tensor:
    """The same; whether it trains is told by the number of its outputs, of which the others are then used."""
    if not spatial:
        raise Unread("has statistics for every entry (spatial is 0), which has no reading. Export with opset 9 or later.")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


@operator("BatchNormalization")
def batch_normalization_1(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    is_test: int = 0,
    consumed_inputs: object = None,
) -> Tensor:
    """The same where is_test says so."""
    if not is_test:
        raise Unread("normalises by the statistics of the batch (is_test is 0). Export the model in evaluation mode.")
    return batch_normalization_7(x, scale, bias, mean, variance, epsilon=epsilon, spatial=spatial)


_REDUCTIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "ReduceMax": (torch.amax, 18),
    "ReduceMean": (torch.mean, 18),
    "ReduceMin": (torch.amin, 18),
    "ReduceSum": (torch.sum, 13),
}
"""The function, and the opset from which the axes are an input."""


def _reduced(function: Callable[..., Tensor], x: Tensor, axes: list[int], keepdims: int) -> Tensor:
    chosen = {axis % x.ndim for axis in axes}
    # Over an axis of one entry there is nothing to do: so is the batch of a graph for one sample.
    long = [axis for axis in sorted(chosen) if x.shape[axis] > 1]
    result = function(x, dim=long, keepdim=True) if long else x
    if keepdims:
        return result
    return result.reshape([n for axis, n in enumerate(result.shape) if axis not in chosen])


def _register_reduction(name: str, function: Callable[..., Tensor], since: int) -> None:
    @operator(name, since=since)
    def by_input(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        chosen = [] if axes is None else [int(axis) for axis in axes]
        if not chosen and noop_with_empty_axes:
            return x
        return _reduced(function, x, chosen or list(range(x.ndim)), keepdims)

    @operator(name)
    def by_attribute(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
        return _reduced(function, x, axes or list(range(x.ndim)), keepdims)


for _name, (_reduction, _since) in _REDUCTIONS.items():
    _register_reduction(_name, _reduction, _since)
