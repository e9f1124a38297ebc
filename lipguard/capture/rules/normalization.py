"""Normalisation by fixed statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import Trace, Value
from lipguard.errors import InvalidExample, InvalidModel
from lipguard.network.operators import Diagonal
from lipguard.network.operators.base import product
from lipguard.rounding import gamma


@lowers("batch_norm")
def batch_norm(
    trace: Trace,
    input: Value,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> int:
    """The affine map of the running statistics, channel by channel (axis 1)."""
    if training or running_mean is None or running_var is None:
        trace.refuse(
            "normalises by the statistics of the batch, so that a sample's output depends on the other samples. "
            "Use track_running_stats=True, whose running statistics are what is deployed."
        )
    mean, variance = trace.constant(running_mean, "running_mean"), trace.constant(running_var, "running_var")
    if bool((variance + eps <= 0).any()):
        raise InvalidModel(f"{trace.place}: running_var + eps is not positive.")
    channels, shape = mean.shape[0], input.tensor.shape
    if len(shape) < 2 or shape[1] != channels:
        raise InvalidExample(f"{trace.place} expects {channels} channels, the example gives shape {tuple(shape)}.")
    # gamma (x - mean) / sqrt(var + eps) + beta: the sum rounds, the root, which halves that error, the quotient and the product.
    scale, rho = 1 / torch.sqrt(variance + eps), gamma(4)
    if weight is not None:
        made = product(trace.constant(weight, "weight"), scale)
        if made is None:
            raise InvalidModel(
                f"{trace.place}: weight / sqrt(running_var + eps) leaves the range of float64. Rescale its weight."
            )
        scale = made[0]
    positions, size = input.size // channels, input.size
    one = torch.ones((), dtype=torch.float64, device=scale.device)
    centred = trace.value(trace.affine(input, Diagonal(one, size), -mean.repeat_interleave(positions)), input.tensor)
    shift = None if bias is None else trace.constant(bias, "bias").repeat_interleave(positions)
    return trace.affine(centred, Diagonal(scale.repeat_interleave(positions), size, rho), shift)


@lowers("instance_norm")
def instance_norm(
    trace: Trace,
    input: Value,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> int:
    """With running statistics the same as batch_norm; with the sample's own, refused."""
    if use_input_stats:
        trace.refuse(
            "divides by the standard deviation of each channel of the sample itself: its only global bound, "
            f"max |weight| / sqrt(eps) with eps = {eps:g}, is reached near constant channels, and useless elsewhere. Use "
            "track_running_stats=True, whose running statistics are fixed, or bound the parts before and after it with "
            "submodule=...."
        )
    return batch_norm(trace, input, running_mean, running_var, weight, bias, False, momentum, eps)
