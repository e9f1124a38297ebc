"""Linear operators on row vectors: application, transpose, entrywise absolute value, dense form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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

    def tensors(self) -> tuple[Tensor, ...]:
        """The scale."""
        return (self.scale,)
