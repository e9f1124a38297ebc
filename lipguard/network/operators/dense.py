"""A matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.network.operators.base import Operator, magnitude, product


@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """x -> weight x, weight of shape (out, in); rho is its relative radius."""

    weight: Tensor
    rho: float = 0.0

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
        return Dense(self.weight.T, self.rho)

    def abs(self) -> Dense:
        """The map of the magnitudes."""
        return Dense(magnitude(self.weight, self.rho))

    def dense(self) -> Tensor:
        """The weight itself."""
        return self.weight

    def tensors(self) -> tuple[Tensor, ...]:
        """The weight."""
        return (self.weight,)

    def scaled(self, scale: Tensor, rho: float = 0.0) -> Dense | None:
        """diag(scale) weight."""
        found = product(self.weight, scale if scale.ndim == 0 else scale[:, None], self.rho, rho)
        return None if found is None else Dense(*found)

    @property
    def stored(self) -> Tensor:
        """The weight itself."""
        return self.weight
