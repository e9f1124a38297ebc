"""Functions of single entries, and the two probabilities, whose reading tells why they have no such bound."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.onnx.operators.table import Unread, operator

_PLAIN = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}
"""Functions without attributes, the same in every opset; `consumed_inputs` of the first opsets says where to write."""

for _name, _function in _PLAIN.items():
    operator(_name)(lambda x, *, consumed_inputs=None, _function=_function: _function(x))


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01, consumed_inputs: object = None) -> Tensor:
    """x, or alpha x below 0."""
    return F.leaky_relu(x, alpha)


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0, consumed_inputs: object = None) -> Tensor:
    """x, or alpha (e^x - 1) below 0."""
    return F.elu(x, alpha)


@operator("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x, or alpha (e^(x / alpha) - 1) below 0."""
    return F.celu(x, alpha)


@operator("Selu", since=6)
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """gamma elu(x; alpha)."""
    return gamma * F.elu(x, alpha)


@operator("Selu")
def selu_1(x: Tensor, *, alpha: float = 1.6732, gamma: float = 1.0507, consumed_inputs: object = None) -> Tensor:
    """The same with the defaults of the first opsets."""
    return gamma * F.elu(x, alpha)


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5, consumed_inputs: object = None) -> Tensor:
    """max(0, min(1, alpha x + beta))."""
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operator("Gelu", since=20)
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x Phi(x), or its tanh approximation."""
    return F.gelu(x, approximate=approximate)


@operator("PRelu", since=7)
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """x, or slope x below 0; the slope's shape meets that of x from behind."""
    shape = (1,) * (x.ndim - slope.ndim) + tuple(slope.shape)
    if slope.numel() == 1 or (x.ndim > 1 and slope.numel() == shape[1] == x.shape[1]):
        return F.prelu(x, slope.reshape(-1))
    return F.relu(x) - slope * F.relu(-x)


@operator("PRelu")
def prelu_1(x: Tensor, slope: Tensor, *, consumed_inputs: object = None) -> Tensor:
    """One slope, or one for each channel (axis 1)."""
    return F.prelu(x, slope.reshape(-1))


@operator("Clip", since=11)
def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """min(max(x, low), high); an end that is left out is none."""
    return _clipped(x, low, high)


@operator("Clip")
def clip_6(
    x: Tensor,
    *,
    min: float = torch.finfo(torch.float32).min,
    max: float = torch.finfo(torch.float32).max,
    consumed_inputs: object = None,
) -> Tensor:
    """The ends as attributes, by default those of float32: none."""
    ends = torch.finfo(torch.float32)
    return _clipped(x, None if min <= ends.min else min, None if max >= ends.max else max)


def _clipped(x: Tensor, low: Tensor | float | None, high: Tensor | float | None) -> Tensor:
    if low is None and high is None:
        return x
    return torch.clamp(x, low, high)  # pyright: ignore[reportCallIssue, reportArgumentType] - both ends of one kind


@operator("Dropout", since=12)
def dropout(x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None, *, seed: int = 0) -> Tensor:
    """Nothing, in inference."""
    if training is not None and bool(training.any()):
        raise Unread("drops entries at random (training_mode is true): it is no function. Export the model in evaluation mode.")
    return x


@operator("Dropout", since=7)
def dropout_7(x: Tensor, *, ratio: float = 0.5) -> Tensor:
    """Nothing."""
    return x


@operator("Dropout")
def dropout_1(x: Tensor, *, ratio: float = 0.5, is_test: int = 0, consumed_inputs: object = None) -> Tensor:
    """Nothing where is_test says so."""
    if not is_test:
        raise Unread("drops entries at random (is_test is 0): it is no function. Export the model in evaluation mode.")
    return x


@operator("Softmax", since=13)
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Probabilities along an axis."""
    return torch.softmax(x, axis)


@operator("LogSoftmax", since=13)
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Their logarithms."""
    return torch.log_softmax(x, axis)


@operator("Softmax")
def softmax_1(x: Tensor, *, axis: int = 1) -> Tensor:
    """Probabilities over all dimensions from an axis on."""
    return torch.softmax(x.flatten(axis), -1).reshape(x.shape)


@operator("LogSoftmax")
def log_softmax_1(x: Tensor, *, axis: int = 1) -> Tensor:
    """Their logarithms."""
    return torch.log_softmax(x.flatten(axis), -1).reshape(x.shape)
