"""A zero-padded convolution or its adjoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.network.operators.base import Operator, Shape, magnitude, product


@dataclass(frozen=True, eq=False)
class Conv(Operator):
    """A zero-padded convolution in 1, 2 or 3 dimensions, (channels, *large) to (channels, *small), flattened; or its adjoint.

    Attributes:
        weight: (channels of the small side, channels of the large side / groups, *kernel), as torch holds it.
        large: spatial shape on the side where the kernel slides.
        small: spatial shape on the other side; at most what the arithmetic of strides gives, from the first position on.
        stride, padding, dilation: one number for each dimension.
        groups: blocks of channels that do not meet.
        transposed: the adjoint, from small to large: what torch calls conv_transpose.
        rho: relative radius of the weight.
    """

    weight: Tensor
    large: tuple[int, ...]
    small: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    rho: float = 0.0

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of the small and of the large side."""
        return self.weight.shape[0], self.weight.shape[1] * self.groups

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        few, many = self.channels[0] * math.prod(self.small), self.channels[1] * math.prod(self.large)
        return (many, few) if self.transposed else (few, many)

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.weight.device

    @property
    def terms(self) -> int:
        """One for each tap and each channel of its group on the side that is read."""
        few = self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]
        return self.weight.numel() // few

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (..., in) to rows (..., out)."""
        dims = len(self.large)
        channels, space = (self.channels[0], self.small) if self.transposed else (self.channels[1], self.large)
        images = x.reshape(-1, channels, *space)
        with _direct_sums(x):
            if self.transposed:
                grown = (
                    n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
                    for n, m, s, p, d, k in zip(
                        self.large, self.small, self.stride, self.padding, self.dilation, self.weight.shape[2:], strict=True
                    )
                )
                y = _ADJOINT[dims - 1](
                    images, self.weight, None, self.stride, self.padding, tuple(grown), self.groups, self.dilation
                )
            else:
                y = _DIRECT[dims - 1](images, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
                y = y[(slice(None), slice(None), *(slice(m) for m in self.small))]
        return y.reshape(*x.shape[:-1], self.shape[0])

    def transpose(self) -> Conv:
        """The adjoint map."""
        return replace(self, transposed=not self.transposed)

    def abs(self) -> Conv:
        """The map of the magnitudes: every coefficient of the matrix is one entry of the weight."""
        return replace(self, weight=magnitude(self.weight, self.rho), rho=0.0)

    def dense(self) -> Tensor:
        """The unrolled matrix; exact, as each of its entries is one entry of the weight."""
        out, inputs = self.shape
        eye = torch.eye(min(out, inputs), dtype=torch.float64, device=self.device)
        return self.transpose()(eye) if out < inputs else self(eye).T

    def tensors(self) -> tuple[Tensor, ...]:
        """The weight."""
        return (self.weight,)

    def scaled(self, scale: Tensor, rho: float = 0.0) -> Conv | None:
        """The map followed by a diagonal one, (out,) or 0-d, if that is a convolution: one factor for each output channel."""
        # By group, channel of the small side, channel of the large side, and tap.
        parts, factors, ones = self.weight.reshape(self.groups, -1, *self.weight.shape[1:]), scale, [1] * len(self.large)
        if scale.ndim:
            table = scale.reshape(self.channels[1 if self.transposed else 0], -1)
            if not bool((table == table[:, :1]).all()):
                return None
            factors = table[:, 0].reshape(self.groups, *((1, -1) if self.transposed else (-1, 1)), *ones)
        found = product(parts, factors, self.rho, rho)
        return None if found is None else replace(self, weight=found[0].reshape(self.weight.shape), rho=found[1])

    @property
    def multiplications(self) -> int:
        """Each coefficient at every place of the small side."""
        return self.weight.numel() * math.prod(self.small)

    @property
    def sides(self) -> tuple[Shape, Shape]:
        """Shapes of what it reads and of what it gives."""
        few, many = self.channels
        small, large = (few, *self.small), (many, *self.large)
        return (small, large) if self.transposed else (large, small)

    @property
    def convolution(self) -> Conv:
        """Itself."""
        return self

    def as_convolution(self, before: Shape, after: Shape) -> Conv | None:
        """Itself, between its own sides."""
        return self if self.sides == (before, after) else None


_DIRECT = (F.conv1d, F.conv2d, F.conv3d)
_ADJOINT = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@contextmanager
def _direct_sums(x: Tensor) -> Iterator[None]:
    # The rounding bounds hold for sums of products in any order, not for the Fourier and Winograd transforms that cuDNN
    # may choose. torch's own kernels, on CPU in float64 and on GPU without cuDNN, are matrix products.
    if not x.is_cuda:
        yield
        return
    with torch.backends.cudnn.flags(enabled=False):
        yield
