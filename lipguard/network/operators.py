"""Linear operators on row vectors: application, transpose, entrywise absolute value, dense form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.rounding import sqrt_up


class Operator(Protocol):
    """A linear map from R^in to R^out; called on rows (..., in), it returns rows (..., out)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the coefficients."""
        ...

    @property
    def terms(self) -> int:
        """Products that are added in one entry of the result, at most; 0 where entries are only moved."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to every row."""
        ...

    def transpose(self) -> Operator:
        """The adjoint map."""
        ...

    def abs(self) -> Operator:
        """The map with every coefficient replaced by its absolute value."""
        ...

    def dense(self) -> Tensor:
        """The (out, in) matrix, float64."""
        ...

    def scalar(self) -> float | None:
        """c if the map is c times the identity, else None."""
        ...

    def norm(self, p: float) -> float | None:
        """Upper bound of the norm from p to p, p = 1, 2 or inf, where it has a closed form; else None."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """The coefficients, for the digest."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """x -> weight x, weight of shape (out, in)."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.weight.device

    @property
    def terms(self) -> int:
        """One for each entry it reads."""
        return self.weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (..., in) to rows (..., out)."""
        return x @ self.weight.T

    def transpose(self) -> Dense:
        """The adjoint map."""
        return Dense(self.weight.T)

    def abs(self) -> Dense:
        """The map of the absolute values."""
        return Dense(self.weight.abs())

    def dense(self) -> Tensor:
        """The weight itself."""
        return self.weight

    def scalar(self) -> float | None:
        """None: a matrix is not looked into."""
        return None

    def norm(self, p: float) -> float | None:
        """None: a matrix has no closed form that the checker takes for proved."""
        del p
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        """The weight."""
        return (self.weight,)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """x -> scale * x, entry by entry; `scale` is a vector, or a number for a multiple of the identity of that size."""

    scale: Tensor
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(size, size)."""
        return self.size, self.size

    @property
    def device(self) -> torch.device:
        """Device of the scale."""
        return self.scale.device

    @property
    def terms(self) -> int:
        """One."""
        return 1

    def __call__(self, x: Tensor) -> Tensor:
        """Scale every row."""
        return x * self.scale

    def transpose(self) -> Diagonal:
        """The map itself: it is symmetric."""
        return self

    def abs(self) -> Diagonal:
        """The map of the absolute values."""
        return Diagonal(self.scale.abs(), self.size)

    def dense(self) -> Tensor:
        """The diagonal matrix."""
        return torch.diag(self.scale.expand(self.size))

    def scalar(self) -> float | None:
        """The number, if there is one."""
        return float(self.scale) if self.scale.ndim == 0 and not self.scale.requires_grad else None

    def norm(self, p: float) -> float | None:
        """The largest absolute value, for every p."""
        del p
        return float(self.scale.detach().abs().max())

    def tensors(self) -> tuple[Tensor, ...]:
        """The scale."""
        return (self.scale,)


@dataclass(frozen=True, eq=False)
class Conv:
    """A zero-padded convolution in 1, 2 or 3 dimensions, (channels, *large) to (channels, *small), flattened; or its adjoint.

    Attributes:
        weight: (channels of the small side, channels of the large side / groups, *kernel), as torch holds it.
        large: spatial shape on the side where the kernel slides.
        small: spatial shape on the other side; at most what the arithmetic of strides gives, from the first position on.
        stride, padding, dilation: one number for each dimension.
        groups: blocks of channels that do not meet.
        transposed: the adjoint, from small to large: what torch calls conv_transpose.
    """

    weight: Tensor
    large: tuple[int, ...]
    small: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

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
        """The map of the absolute values: every coefficient of the matrix is one entry of the weight."""
        return replace(self, weight=self.weight.abs())

    def dense(self) -> Tensor:
        """The unrolled matrix; exact, as each of its entries is one entry of the weight."""
        out, inputs = self.shape
        eye = torch.eye(min(out, inputs), dtype=torch.float64, device=self.device)
        return self.transpose()(eye) if out < inputs else self(eye).T

    def scalar(self) -> float | None:
        """None: a kernel is not looked into."""
        return None

    def norm(self, p: float) -> float | None:
        """None: a convolution has no closed form that the checker takes for proved."""
        del p
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        """The weight."""
        return (self.weight,)

    def scaled(self, scale: Tensor) -> Conv | None:
        """The map followed by a diagonal one, (out,) or 0-d, if that is a convolution: one factor for each output channel."""
        if scale.ndim == 0:
            return replace(self, weight=self.weight * scale)
        table = scale.reshape(self.channels[1 if self.transposed else 0], -1)
        factors = table[:, 0]
        if not bool((table == table[:, :1]).all()):
            return None
        ones = [1] * len(self.large)
        if not self.transposed:
            return replace(self, weight=self.weight * factors.reshape(-1, 1, *ones))
        parts = self.weight.reshape(self.groups, -1, *self.weight.shape[1:]) * factors.reshape(self.groups, 1, -1, *ones)
        return replace(self, weight=parts.reshape(self.weight.shape))


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


@dataclass(frozen=True, eq=False)
class Index:
    """x -> x[index], a zero where the index is -1; or its adjoint, which adds every entry to the place it was read from.

    Attributes:
        index: int64, entries from -1 to size - 1.
        size: number of entries read from.
        transposed: the adjoint.
    """

    index: Tensor
    size: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        count = self.index.numel()
        return (self.size, count) if self.transposed else (count, self.size)

    @property
    def device(self) -> torch.device:
        """Device of the index."""
        return self.index.device

    @property
    def terms(self) -> int:
        """None are added, but by the adjoint: as often as an entry is read."""
        return self.repeats() if self.transposed else 0

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (..., in) to rows (..., out)."""
        if self.transposed:
            place = torch.where(self.index < 0, self.size, self.index)
            return x.new_zeros(*x.shape[:-1], self.size + 1).index_add(-1, place, x)[..., :-1]
        # The index -1 reads the appended zero.
        return F.pad(x, (0, 1))[..., self.index]

    def transpose(self) -> Index:
        """The adjoint map."""
        return replace(self, transposed=not self.transposed)

    def abs(self) -> Index:
        """The map itself: its coefficients are 0 and 1."""
        return self

    def dense(self) -> Tensor:
        """The matrix of zeros and ones."""
        matrix = F.one_hot(self.index + 1, self.size + 1)[:, 1:].to(torch.float64)
        return matrix.T if self.transposed else matrix

    def scalar(self) -> float | None:
        """None: an index is not looked into."""
        return None

    def norm(self, p: float) -> float | None:
        """A'A is diagonal and counts how often each entry is read: the square for p = 2, the largest column sum for p = 1."""
        count = self.repeats()
        if p == 2:
            return float(count) if count < 2 else sqrt_up(count)
        return float(count if (p == 1) != self.transposed else min(count, 1))

    def tensors(self) -> tuple[Tensor, ...]:
        """The index."""
        return (self.index,)

    def repeats(self) -> int:
        """How often the entry that is read most often is read: the square of the map's norm from 2 to 2."""
        read = self.index[self.index >= 0]
        return int(torch.bincount(read).max()) if read.numel() else 0
