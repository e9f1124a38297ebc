"""Elementwise functions; in-place flags change where torch writes the result, not the result."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lipguard.capture.rules.arithmetic import scaled
from lipguard.capture.rules.rearrange import widened
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import Trace, Value
from lipguard.network import activations, smooth
from lipguard.network.activations import Elementwise

Number = float | Tensor


@lowers("relu")
def relu(trace: Trace, input: Value, inplace: bool = False) -> int:
    """max(z, 0)."""
    return clipped(trace, input, 0.0, None, "relu")


@lowers("relu6")
def relu6(trace: Trace, input: Value, inplace: bool = False) -> int:
    """min(max(z, 0), 6)."""
    return clipped(trace, input, 0.0, 6.0, "relu6")


@lowers("hardtanh")
def hardtanh(trace: Trace, input: Value, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> int:
    """min(max(z, min_val), max_val)."""
    return clipped(trace, input, min_val, max_val, "hardtanh")


@lowers("clamp")
def clamp(trace: Trace, input: Value, min: Number | None = None, max: Number | None = None) -> int:
    """clamp and clip with constant ends."""
    return clipped(trace, input, min, max, "clip")


@lowers("clamp_min")
def clamp_min(trace: Trace, input: Value, min: Number) -> int:
    """max(z, min)."""
    return clipped(trace, input, min, None, "clip")


@lowers("clamp_max")
def clamp_max(trace: Trace, input: Value, max: Number) -> int:
    """min(z, max)."""
    return clipped(trace, input, None, max, "clip")


@lowers("leaky_relu")
def leaky_relu(trace: Trace, input: Value, negative_slope: float = 0.01, inplace: bool = False) -> int:
    """z, or negative_slope z below 0."""
    slope = trace.per_feature(negative_slope, input)
    return trace.activation(input, activations.leaky_relu(slope))


@lowers("prelu")
def prelu(trace: Trace, input: Value, weight: Tensor) -> int:
    """z, or weight z below 0, with one weight or one for each channel (axis 1)."""
    if isinstance(weight, Value):
        trace.refuse("has a slope that depends on the input.")
    if weight.numel() > 1 and input.tensor.ndim > 2:
        weight = weight.reshape(-1, *[1] * (input.tensor.ndim - 2))
    return trace.activation(input, activations.leaky_relu(trace.per_feature(weight, input), "prelu"))


@lowers("rrelu")
def rrelu(
    trace: Trace, input: Value, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> int:
    """In evaluation, LeakyReLU with the middle slope."""
    if training:
        trace.refuse("draws random slopes: it is not a function. Pass training=self.training.")
    return leaky_relu(trace, input, (lower + upper) / 2)


@lowers("softshrink")
def softshrink(trace: Trace, input: Value, lambd: float = 0.5) -> int:
    """z moved towards 0 by lambd."""
    return trace.activation(input, activations.softshrink(float(lambd)).to(input.tensor.device))


@lowers("elu")
def elu(
    trace: Trace, input: Value, alpha: float = 1.0, inplace: bool = False, *, scale: float = 1.0, input_scale: float = 1.0
) -> int:
    """z, or alpha (e^(input_scale z) - 1) below 0, times scale: what elu, celu and selu are in a decomposed program."""
    if input_scale != 1 and alpha * input_scale != 1:
        trace.refuse(f"has input_scale = {input_scale}, for which there is no rule. Use elu, celu or selu.")
    function = smooth.elu(float(alpha)) if input_scale == 1 else smooth.celu(float(alpha))
    return scaled(trace, trace.value(trace.activation(input, function), input.tensor), scale)


@lowers("celu")
def celu(trace: Trace, input: Value, alpha: float = 1.0, inplace: bool = False) -> int:
    """z, or alpha (e^(z / alpha) - 1) below 0."""
    if alpha <= 0:
        trace.refuse(f"has alpha = {alpha}: its slope e^(z / alpha) has no bound. Use alpha > 0.")
    return trace.activation(input, smooth.celu(float(alpha)))


@lowers("softplus")
def softplus(trace: Trace, input: Value, beta: float = 1.0, threshold: float = 20.0) -> int:
    """log(1 + e^(beta z)) / beta; the switch to z above a threshold of 20 or more is taken as rounding."""
    if beta <= 0:
        trace.refuse(f"has beta = {beta}; only beta > 0 is a softplus.")
    if threshold < 20:
        trace.refuse(
            f"jumps where beta z passes its threshold {threshold}: it has no Lipschitz constant. Use the default threshold of 20."
        )
    return trace.activation(input, smooth.softplus(float(beta)))


@lowers("gelu")
def gelu(trace: Trace, input: Value, approximate: str = "none") -> int:
    """z Phi(z), or its tanh approximation."""
    return trace.activation(input, smooth.gelu_tanh() if approximate == "tanh" else smooth.gelu())


def _plain(name: str, make: Callable[[], Elementwise]) -> None:
    """Register a function without parameters."""

    def rule(trace: Trace, input: Value, inplace: bool = False) -> int:
        return trace.activation(input, make().to(input.tensor.device))

    lowers(name)(rule)


_plain("abs", activations.absolute)
_plain("hardsigmoid", activations.hardsigmoid)
_plain("tanh", smooth.tanh)
_plain("sigmoid", smooth.sigmoid)
_plain("logsigmoid", smooth.logsigmoid)
_plain("softsign", smooth.softsign)
_plain("selu", smooth.selu)
_plain("silu", smooth.silu)
_plain("mish", smooth.mish)
_plain("hardswish", smooth.hardswish)
_plain("sin", smooth.sin)
_plain("cos", smooth.cos)


def clipped(trace: Trace, x: Value, low: Number | None, high: Number | None, name: str) -> int:
    """min(max(x, low), high) with constant ends."""
    x = widened(trace, x, low, high)
    ends = [None if end is None else trace.per_feature(end, x) for end in (low, high)]
    return trace.activation(x, activations.clip(*ends, name=name))
