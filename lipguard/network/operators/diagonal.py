"""A diagonal map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.network.operators.base import Operator, Shape, magnitude, product
from lipguard.network.operators.conv import Conv


@dataclass(frozen=True, eq=False)
class Diagonal(Operator):
    """x -> scale * x, entry by entry; `scale` is a vector, or a number for a multiple of the identity of that size."""

    scale: Tensor
    size: int
    rho: float = 0.0

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
        """The map of the magnitudes."""
        return Diagonal(magnitude(self.scale, self.rho), self.size)

    def dense(self) -> Tensor:
        """The diagonal matrix."""
        return torch.diag(self.scale.expand(self.size))

    def scalar(self) -> float | None:
        """The number, if there is one."""
        return float(self.scale) if self.scale.ndim == 0 and not self.scale.requires_grad else None

    def tensors(self) -> tuple[Tensor, ...]:
        """The scale."""
        return (self.scale,)

    def norm(self, p: float) -> float:
        """The largest |scale| (1 + rho), for every p: exact where rho is 0."""
        del p
        return float(magnitude(self.scale.detach(), self.rho).max())

    def attached_norm(self, p: float) -> Tensor:
        """The largest |scale|."""
        del p
        return self.scale.abs().amax()

    def scaled(self, scale: Tensor, rho: float = 0.0) -> Diagonal | None:
        """The product of the two scales."""
        found = product(self.scale, scale, self.rho, rho)
        return None if found is None else Diagonal(found[0], self.size, found[1])

    def after(self, inner: Operator) -> Operator | None:
        """What it makes of the other's coefficients; the other itself where it is the identity."""
        return inner if self.scalar() == 1.0 and not self.rho else inner.scaled(self.scale, self.rho)

    @property
    def in_place(self) -> bool:
        """Yes."""
        return True

    def as_convolution(self, before: Shape, after: Shape) -> Conv | None:
        """A kernel of one tap, where there is one factor a channel."""
        table = self.scale.expand(self.size).reshape(before[0], -1)
        if before != after or not bool((table == table[:, :1]).all()):
            return None
        one = (1,) * (len(before) - 1)
        kernel = table[:, :1].reshape(-1, 1, *one)
        return Conv(kernel, before[1:], before[1:], one, (0,) * len(one), one, before[0], rho=self.rho)
