"""Matrices known up to an entrywise radius."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Enclosed:
    """A matrix known up to an entrywise radius (None: exactly); or a batch of them, (..., n, m)."""

    center: Tensor
    radius: Tensor | None = None

    def magnitude(self) -> Tensor:
        """Upper bound of the absolute values."""
        return self.center.abs() if self.radius is None else (self.center.abs() + self.radius) * (1 + 2.0**-52)

    @property
    def mT(self) -> Enclosed:  # noqa: N802 - torch's name
        """The transposed matrices."""
        return Enclosed(self.center.mT, None if self.radius is None else self.radius.mT)

    def __getitem__(self, index: object) -> Enclosed:
        """Center and radius at an index."""
        return Enclosed(self.center[index], None if self.radius is None else self.radius[index])  # type: ignore[index]
