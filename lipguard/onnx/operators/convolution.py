"""Convolutions and their transposes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.onnx.operators.table import Unread, operator
from lipguard.onnx.operators.windows import around, each, paddings

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSES = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """A convolution of one to three dimensions; paddings that differ between the sides are entries of their own."""
    dims = _dims(x)
    steps, spread, kernel = each(strides, dims), each(dilations, dims), list(weight.shape[2:])
    before, behind = paddings(x, kernel, steps, spread, pads, auto_pad)
    if before != behind:
        x, before = F.pad(x, around(before, behind)), [0] * dims
    return _CONVOLUTIONS[dims](x, weight, bias, steps, before, spread, group)


@operator("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """The transpose of a convolution; paddings cut its result, which is s (n - 1) + output_padding + d (k - 1) + 1 long.

    Where `output_shape` is given, or auto_pad is SAME (n s long), what is beyond it is cut: for SAME_UPPER the larger part
    behind, else before.
    """
    dims = _dims(x)
    steps, spread = each(strides, dims), each(dilations, dims)
    extra = list(output_padding) if output_padding else [0] * dims
    if output_shape is None and auto_pad in ("NOTSET", "", "VALID"):
        before, behind = paddings(x, (), (), (), pads, auto_pad)
    else:
        wanted = list(output_shape)[-dims:] if output_shape else [n * s for n, s in zip(x.shape[2:], steps, strict=True)]
        sizes = zip(x.shape[2:], steps, spread, weight.shape[2:], extra, wanted, strict=True)
        cut = [(n - 1) * s + d * (k - 1) + 1 + e - m for n, s, d, k, e, m in sizes]
        if min(cut) < 0:
            raise Unread("has an output_shape beyond what its kernel reaches, which has no reading.")
        small, large = [n // 2 for n in cut], [n - n // 2 for n in cut]
        before, behind = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    if before == behind:
        return _TRANSPOSES[dims](x, weight, bias, steps, before, extra, group, spread)
    whole = _TRANSPOSES[dims](x, weight, bias, steps, [0] * dims, extra, group, spread)
    return F.pad(whole, [-n for n in around(before, behind)])


def _dims(x: Tensor) -> int:
    if x.ndim - 2 not in _CONVOLUTIONS:
        raise Unread(f"is of a value of {x.ndim} dimensions; images (N, C, ...) of one to three dimensions are read.")
    return x.ndim - 2
