"""Convolutions and their transposes, as torch calls them after the module's own padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.capture.rules.rearrange import rearranged
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import Trace, Value
from lipguard.errors import InvalidExample
from lipguard.network.operators import Conv


def _register(dims: int) -> None:
    @lowers(f"conv{dims}d")
    def conv(
        trace: Trace,
        input: Value,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> int:
        kernel, shift = _constants(trace, input, weight, bias, dims)
        space = tuple(input.tensor.shape[2:])
        stride, dilation = per_dimension(stride, dims), per_dimension(dilation, dims)
        if padding == "valid":
            padding = 0
        if padding == "same":
            spans = [d * (k - 1) for d, k in zip(dilation, kernel.shape[2:], strict=True)]
            sides = [side for span in reversed(spans) for side in (span // 2, span - span // 2)]
            padding = tuple(span // 2 for span in spans)
            if any(span % 2 for span in spans):  # one more zero behind than before
                node = rearranged(trace, input, lambda code: F.pad(code, sides))
                assert isinstance(node, int)
                input = trace.value(node, F.pad(input.tensor, sides))
                space, padding = tuple(input.tensor.shape[2:]), 0
        padding = per_dimension(padding, dims)
        small = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(space, padding, dilation, kernel.shape[2:], stride, strict=True)
        )
        _check(trace, input, kernel.shape[1] * groups, small)
        operator = Conv(kernel, space, small, stride, padding, dilation, groups)
        return trace.affine(input, operator, _spread(shift, operator))

    @lowers(f"conv_transpose{dims}d")
    def conv_transpose(
        trace: Trace,
        input: Value,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> int:
        kernel, shift = _constants(trace, input, weight, bias, dims)
        small = tuple(input.tensor.shape[2:])
        stride, padding, dilation = (per_dimension(option, dims) for option in (stride, padding, dilation))
        large = tuple(
            (m - 1) * s - 2 * p + d * (k - 1) + 1 + extra
            for m, s, p, d, k, extra in zip(
                small, stride, padding, dilation, kernel.shape[2:], per_dimension(output_padding, dims), strict=True
            )
        )
        _check(trace, input, kernel.shape[0], large)
        operator = Conv(kernel, large, small, stride, padding, dilation, groups, transposed=True)
        return trace.affine(input, operator, _spread(shift, operator))


def per_dimension(option: Any, dims: int) -> tuple[int, ...]:
    """One number for each dimension, as torch reads an int or a tuple."""
    numbers = tuple(int(n) for n in option) if isinstance(option, list | tuple) else (int(option),)
    return numbers * dims if len(numbers) == 1 else numbers


def _constants(trace: Trace, input: Value, weight: Tensor, bias: Tensor | None, dims: int) -> tuple[Tensor, Tensor | None]:
    if not isinstance(input, Value) or isinstance(weight, Value) or isinstance(bias, Value):
        trace.refuse("has a kernel that depends on the input: a quadratic map has no global Lipschitz constant.")
    if input.tensor.ndim != dims + 2:
        trace.refuse(
            f"is given a value of shape {tuple(input.tensor.shape)}: without a dimension of channels, the samples of a batch "
            "are taken for channels and mixed."
        )
    return trace.constant(weight, "weight"), None if bias is None else trace.constant(bias, "bias")


def _check(trace: Trace, input: Value, channels: int, result: tuple[int, ...]) -> None:
    shape = tuple(input.tensor.shape)
    if shape[1] != channels:
        raise InvalidExample(f"{trace.place} expects {channels} channels, a batch of shape {shape} arrives there.")
    if min(result) < 1:
        raise InvalidExample(f"{trace.place}: its kernel does not fit a batch of shape {shape}.")


def _spread(bias: Tensor | None, operator: Conv) -> Tensor | None:
    if bias is None:
        return None
    return bias.repeat_interleave(operator.shape[0] // bias.numel())


for _dims in (1, 2, 3):
    _register(_dims)
