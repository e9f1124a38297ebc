"""A selection of entries, or its adjoint."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.network.operators.base import Operator, Shape
from lipguard.network.operators.conv import Conv
from lipguard.network.operators.dense import Dense
from lipguard.network.operators.diagonal import Diagonal
from lipguard.network.operators.moves import moved_alike
from lipguard.rounding import sqrt_up

_SMALL = 2**16
"""Entries up to which a selection and an adjoint are composed to a matrix."""


@dataclass(frozen=True, eq=False)
class Index(Operator):
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

    def tensors(self) -> tuple[Tensor, ...]:
        """The index."""
        return (self.index,)

    def repeats(self) -> int:
        """How often the entry that is read most often is read: the square of the map's norm from 2 to 2."""
        read = self.index[self.index >= 0]
        return int(torch.bincount(read).max()) if read.numel() else 0

    def norm(self, p: float) -> float:
        """A'A is diagonal and counts how often each entry is read: the square for p = 2, the largest column sum for p = 1."""
        count = self.repeats()
        if p == 2:
            return float(count) if count < 2 else sqrt_up(count)
        return float(count if (p == 1) != self.transposed else min(count, 1))

    def after(self, inner: Operator) -> Operator | None:
        """A selection from a selection is one; the identity where every entry ends where it was."""
        first = inner.selection
        if first is None:
            return None
        if self.transposed:
            # Entries read at places and added at others: counts, exact, where the matrix is small.
            small = self.shape[0] * inner.shape[1] <= _SMALL
            return Dense(self(inner.dense().T).T.contiguous()) if small else None
        size = inner.shape[1]
        # x[i][j] = x[i[j]], where the index -1 reads a zero
        index = torch.cat([first, first.new_full((1,), -1)])[self.index]
        if len(index) == size and torch.equal(index, torch.arange(size, device=index.device)):
            return Diagonal(torch.ones((), dtype=torch.float64, device=index.device), size)
        return Index(index, size)

    @property
    def weightless(self) -> bool:
        """Yes."""
        return True

    @property
    def selection(self) -> Tensor | None:
        """The index, unless it is the adjoint."""
        return None if self.transposed else self.index

    def as_convolution(self, before: Shape, after: Shape) -> Conv | None:
        """Where it moves all places alike: whole channels, every second place, a zero border, upsampling, pixel shuffle."""
        if self.transposed:
            conv = self.transpose().as_convolution(after, before)
            return None if conv is None else conv.transpose()
        return moved_alike(self.index, self.size, before, after)
