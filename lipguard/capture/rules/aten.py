"""Operations that only exported programs call: what torch's own functions become when a program is decomposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.capture.rules.normalization import batch_norm
from lipguard.capture.rules.pooling import interpolate
from lipguard.capture.rules.rearrange import rearranged
from lipguard.capture.rules.registry import function_rule, lowers
from lipguard.capture.trace import UNKNOWN, Trace, Value


@lowers("convolution", "_convolution")
def convolution(
    trace: Trace,
    input: Value,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    **backend: bool,
) -> int:
    """A convolution of any dimension, or its transpose; `backend` are choices of a kernel."""
    kind = f"conv_transpose{len(stride)}d" if transposed else f"conv{len(stride)}d"
    rule = function_rule(kind)
    if rule is None:
        trace.refuse(f"is a {kind}, which has no rule. Use one to three dimensions.")
    extra = {"output_padding": output_padding} if transposed else {}
    node = rule(trace, input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, **extra)
    assert isinstance(node, int)
    return node


@lowers("_native_batch_norm_legit_no_training")
def batch_norm_of_statistics(
    trace: Trace,
    input: Value,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[int, int, int]:
    """Its second and third results are empty in evaluation."""
    return batch_norm(trace, input, running_mean, running_var, weight, bias, eps=eps), UNKNOWN, UNKNOWN


@lowers("slice")
def slice_tensor(
    trace: Trace, input: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> int | tuple[int, ...]:
    """x[..., start:end:step, ...] along one dimension."""
    place = (*(slice(None) for _ in range(dim % input.tensor.ndim)), slice(start, end, step))
    return rearranged(trace, input, lambda code: code[place])


@lowers("index")
def index(trace: Trace, input: Value, indices: list[Tensor | Value | None]) -> int | tuple[int, ...]:
    """Entries at places that lists of integers name, along several dimensions together."""
    chosen: tuple[Any, ...] = tuple(slice(None) if one is None else one for one in indices)
    if any(isinstance(one, Value) for one in chosen):
        trace.refuse("reads entries at places that depend on the input.")
    return rearranged(trace, input, lambda code: code[chosen])


def _register_pad(name: str, mode: str) -> None:
    @lowers(name)
    def pad(trace: Trace, input: Value, padding: list[int]) -> int | tuple[int, ...]:
        return rearranged(trace, input, lambda code: F.pad(code, padding, mode=mode))


def _register_resampling(name: str, mode: str, corners: bool) -> None:
    """Both overloads: sizes with a scale for each dimension (scales_h, ...), or with scale_factors (vec)."""

    @lowers(name)
    def resample(
        trace: Trace,
        input: Value,
        output_size: list[int] | None = None,
        align_corners: bool | None = None,
        scale_factors: list[float] | None = None,
        **scales: float | None,
    ) -> int:
        given = [scale for scale in scales.values() if scale is not None]
        if output_size is not None and given:
            # torch then computes places by the scales, not by the sizes' quotient: the two differ where it was rounded.
            space = input.tensor.shape[2:]
            if any(int(n * s) != m or n * s != m for n, s, m in zip(space, given, output_size, strict=False)):
                trace.refuse("resamples by a scale that its sizes round. Export with size=..., or recompute_scale_factor=True.")
        options: dict[str, Any] = {"align_corners": align_corners} if corners else {}
        return interpolate(trace, input, output_size, None if output_size else scale_factors, mode, **options)


for _dims, _linear in ((1, "linear"), (2, "bilinear"), (3, "trilinear")):
    _register_pad(f"reflection_pad{_dims}d", "reflect")
    _register_pad(f"replication_pad{_dims}d", "replicate")
    _register_resampling(f"upsample_nearest{_dims}d", "nearest", False)
    _register_resampling(f"_upsample_nearest_exact{_dims}d", "nearest-exact", False)
    _register_resampling(f"upsample_{_linear}{_dims}d", _linear, True)
_register_resampling("upsample_bicubic2d", "bicubic", True)
