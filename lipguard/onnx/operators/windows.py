"""What convolutions and pooling share: how far a window reaches over each border."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lipguard.onnx.operators.table import Unread

__all__ = ["around", "each", "paddings"]


def each(option: Sequence[int] | None, dims: int) -> list[int]:
    """One number for each dimension, 1 where there are none."""
    return list(option) if option else [1] * dims


def paddings(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int] | None, auto_pad: str
) -> tuple[list[int], list[int]]:
    """The entries added before and behind each dimension of an image (N, C, ...).

    SAME gives ceil(n / stride) results: the surplus entry stands behind for SAME_UPPER, before for SAME_LOWER.
    """
    dims = x.ndim - 2
    if auto_pad in ("NOTSET", ""):
        held = list(pads) if pads else [0] * (2 * dims)
        return held[:dims], held[dims:]
    if auto_pad == "VALID":
        return [0] * dims, [0] * dims
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise Unread(f"has auto_pad={auto_pad!r}. NOTSET, VALID, SAME_UPPER and SAME_LOWER are read.")
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    sums = [max((-(-n // s) - 1) * s + span - n, 0) for n, s, span in zip(x.shape[2:], strides, spans, strict=True)]
    small, large = [n // 2 for n in sums], [n - n // 2 for n in sums]
    return (small, large) if auto_pad == "SAME_UPPER" else (large, small)


def around(before: Sequence[int], behind: Sequence[int]) -> list[int]:
    """The numbers as torch's pad takes them: last dimension first."""
    return [n for pair in reversed(list(zip(before, behind, strict=True))) for n in pair]
