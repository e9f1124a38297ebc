"""Averages over windows and dimensions, and resampling: linear maps, the same on every channel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.capture.rules.convolution import per_dimension
from lipguard.capture.rules.operands import by_basis, check_size
from lipguard.capture.rules.rearrange import rearranged
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import UNKNOWN, Trace, Value
from lipguard.network.operators import Conv
from lipguard.rounding import UNIT, gamma, powers_of_two

_AVERAGES: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_AVERAGED = gamma(4)
"""Relative radius of 1 / count as torch divides a sum of one 1 and zeros: by the count, or by its sides one after the other."""

_ADAPTIVE: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


def _register(dims: int) -> None:
    @lowers(f"avg_pool{dims}d")
    def avg_pool(
        trace: Trace,
        input: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> int:
        space = _space(trace, input, dims)
        kernel, padded = per_dimension(kernel_size, dims), per_dimension(padding, dims)
        steps = kernel if stride is None or stride == [] or stride == () else per_dimension(stride, dims)
        if ceil_mode or (any(padded) and not count_include_pad and divisor_override is None):
            # Windows at the border count fewer entries.
            options = () if dims == 1 else (divisor_override,)
            average = _AVERAGES[dims - 1]
            return _by_matrix(
                trace, input, dims, lambda x: average(x, kernel, steps, padded, ceil_mode, count_include_pad, *options), _AVERAGED
            )
        return _windows(trace, input, space, kernel, steps, padded, divisor_override or math.prod(kernel))

    @lowers(f"adaptive_avg_pool{dims}d")
    def adaptive_avg_pool(trace: Trace, input: Value, output_size: Any) -> int:
        space = _space(trace, input, dims)
        wanted = tuple(output_size) if isinstance(output_size, list | tuple) else (output_size,) * dims
        sizes = tuple(n if m is None else int(m) for n, m in zip(space, wanted, strict=True))
        if any(n % m for n, m in zip(space, sizes, strict=True)):
            return _by_matrix(trace, input, dims, lambda x: _ADAPTIVE[dims - 1](x, sizes), _AVERAGED)
        kernel = tuple(n // m for n, m in zip(space, sizes, strict=True))
        return _windows(trace, input, space, kernel, kernel, (0,) * dims, math.prod(kernel))


for _dims in (1, 2, 3):
    _register(_dims)


@lowers("mean")
def mean(trace: Trace, input: Value, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> int:
    """The mean over dimensions of one sample; over the batch it is a question to the values, as for a log."""
    return _reduced(trace, input, dim, average=True)


@lowers("sum")
def total(trace: Trace, input: Value, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> int:
    """The sum over dimensions of one sample."""
    return _reduced(trace, input, dim, average=False)


@lowers("interpolate", "upsample")
def interpolate(
    trace: Trace, input: Value, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *args: Any, **kwargs: Any
) -> int:
    """Nearest upsampling as an index; bilinear and the other linear modes by their matrix on one channel.

    The weights are those that torch's own kernel computes, in float64: they are deployed, and taken bit for bit.
    """

    def function(x: Tensor) -> Tensor:
        return F.interpolate(x, size, scale_factor, mode, *args, **kwargs)

    if mode.startswith("nearest"):
        node = rearranged(trace, input, lambda code: _in_digits(code, function, input.tensor.dtype))
        assert isinstance(node, int)
        return node
    return _by_matrix(trace, input, input.tensor.ndim - 2, function)


@lowers("affine_grid", "affine_grid_generator")
def affine_grid(trace: Trace, theta: Value, size: Any, align_corners: bool | None = None) -> int:
    """Places, linear in the coefficients of the affine maps."""
    return by_basis(trace, theta, lambda basis: F.affine_grid(basis, [len(basis), *size[1:]], bool(align_corners)))


@lowers("grid_sample", "grid_sampler")
def grid_sample(trace: Trace, input: Value, grid: Tensor, *args: Any, **kwargs: Any) -> int:
    """Interpolation at constant places, the same for every sample."""
    if isinstance(grid, Value) or not isinstance(input, Value):
        trace.refuse(
            "samples at places that depend on the input: a product of values and of weights that move with them, which has no "
            "global Lipschitz constant. Hold the places fixed, or bound what makes them with submodule=...."
        )
    places = trace.constant(grid, "grid")
    if not bool((places == places[:1]).all()):
        trace.refuse("treats the samples of a batch differently.")

    def function(x: Tensor) -> Tensor:
        return F.grid_sample(x, places[:1].expand(len(x), *places.shape[1:]), *args, **kwargs)

    if (args[0] if args else kwargs.get("mode", "bilinear")) == "nearest":
        dtype, exact = input.tensor.dtype, grid.to(input.tensor.dtype)
        node = rearranged(trace, input, lambda code: _in_digits(code, lambda x: F.grid_sample(x, exact, *args, **kwargs), dtype))
        assert isinstance(node, int)
        return node
    return _by_matrix(trace, input, input.tensor.ndim - 2, function)


def _in_digits(code: Tensor, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """A function that moves entries, as torch's kernel for `dtype` does, on codes, whose digits every type holds exactly.

    The kernel computes the places that it reads in its own precision: in float32 they are others than in float64.
    """
    moved = torch.zeros((), dtype=torch.float64, device=code.device)
    digits, factor = code, 1.0
    while bool(digits.any()):
        moved = moved + factor * function((digits % 256).to(dtype)).to(torch.float64)
        digits, factor = (digits / 256).floor(), factor * 256
    return moved


def _space(trace: Trace, x: Value, dims: int) -> tuple[int, ...]:
    if x.tensor.ndim not in (dims + 1, dims + 2):
        trace.refuse(f"is given a value of shape {tuple(x.tensor.shape)}: a batch of {dims}-dimensional images is needed.")
    return tuple(x.tensor.shape[-dims:])


def _windows(
    trace: Trace,
    x: Value,
    space: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    divisor: int,
) -> int:
    """Sums over windows, divided by a number, channel by channel."""
    channels, dims = x.size // math.prod(space), len(space)
    small = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(space, padding, kernel, stride, strict=True))
    if min(small) < 1:
        trace.refuse(f"has windows larger than its value of shape {tuple(x.tensor.shape)}.")
    # A full tensor: what is expanded cannot be written down as weights.
    weights = torch.full((channels, 1, *kernel), 1 / divisor, dtype=torch.float64, device=x.tensor.device)
    # The quotient rounds once, unless it is a power of two.
    rho = 0.0 if powers_of_two(weights) else UNIT
    return trace.affine(x, Conv(weights, space, small, stride, padding, (1,) * dims, channels, rho=rho))


def _by_matrix(trace: Trace, x: Value, dims: int, function: Callable[[Tensor], Tensor], rho: float = 0.0) -> int:
    """A linear function of every channel, as a kernel of the size of the image at its one place; rho as in `Operator`."""
    space = _space(trace, x, dims)
    places = math.prod(space)
    channels = x.size // places
    check_size(trace, places * places)
    eye = torch.eye(places, dtype=torch.float64, device=x.tensor.device).reshape(places, 1, *space)
    matrix = function(eye).reshape(places, -1).T
    check_size(trace, channels * matrix.numel())
    weight = matrix.repeat(channels, 1).reshape(-1, 1, *space)
    one, zero = (1,) * dims, (0,) * dims
    return trace.affine(x, Conv(weight, space, one, one, zero, one, channels, rho=rho))


def _reduced(trace: Trace, x: Value, dim: Any, average: bool) -> int:
    shape = x.tensor.shape
    if dim is None or isinstance(dim, torch.dtype):
        return UNKNOWN
    dims = {int(d) % len(shape) for d in (dim if isinstance(dim, list | tuple) else (dim,))}
    if 0 in dims or not dims:
        return UNKNOWN
    kept = [d for d in range(len(shape)) if d not in dims]
    count = math.prod(shape[d] for d in dims)
    order = (*kept, *sorted(dims))
    node = rearranged(trace, x, lambda code: code.permute(order))
    assert isinstance(node, int)
    moved = trace.value(node, x.tensor.permute(order).flatten(1))
    return _windows(trace, moved, (x.size,), (count,), (count,), (0,), count if average else 1)
