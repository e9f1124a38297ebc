"""Smooth functions of groups that lengthen no difference of two vectors in the 2-norm: softmax, log-sum-exp, length.

Each maps a group of g entries to g entries, so that it is a group of tied neurons: along increments, the sum of squares of a
group does not grow. What is one number, a length, stands in the first place of its group, zeros behind it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lipguard.network.coupled import Coupling, Groups, partition
from lipguard.rounding import TINY, UNIT, gamma, sqrt_up

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Contraction(Coupling):
    """A function of every group whose Jacobians have a 2-norm of at most 1.

    Attributes:
        index: a permutation of all entries, (groups, entries of each).
    """

    index: Tensor

    def __post_init__(self) -> None:
        """Refuse groups that overlap or leave an entry out."""
        partition(self.index)

    @abstractmethod
    def image(self, grouped: Tensor) -> Tensor:
        """The function of every group, (..., groups, g) to the same shape."""

    @abstractmethod
    def tangent(self, grouped: Tensor, t: Tensor) -> Tensor:
        """J(z) t of every group, in floating point, all (..., groups, g)."""

    @abstractmethod
    def cotangent(self, grouped: Tensor, r: Tensor) -> Tensor:
        """J(z)' r of every group, in floating point, all (..., groups, g)."""

    def along(self, z: Tensor, t: Tensor) -> Tensor:
        """J(z) t for rows z and t (..., entries), in floating point."""
        return self._flat(self.tangent(z[..., self.index], t[..., self.index]))

    def back(self, z: Tensor, r: Tensor) -> Tensor:
        """J(z)' r for rows z and r (..., entries), in floating point."""
        return self._flat(self.cotangent(z[..., self.index], r[..., self.index]))

    def _flat(self, grouped: Tensor) -> Tensor:
        return grouped.flatten(-2)[..., self.index.flatten().argsort()]

    @property
    def outputs(self) -> int:
        """As many as it reads."""
        return self.index.numel()

    def __call__(self, z: Tensor) -> Tensor:
        """The function of every group, at the places of the entries."""
        return self._flat(self.image(z[..., self.index]))

    @property
    def tied(self) -> bool:
        """Yes."""
        return True

    @property
    def pieces(self) -> bool:
        """No: it is smooth."""
        return False

    def norm(self, p: float) -> float:
        """1 for p = 1, 2 and inf, unless it says otherwise."""
        del p
        return 1.0


@dataclass(frozen=True, eq=False)
class Softmax(Contraction):
    """2 softmax(z): its Jacobian is 2 J, J = diag(p) - p p', p the probabilities.

    v'J v is the variance of v under p, at most (max v - min v)^2 / 4 (Popoviciu) <= |v|^2 / 2, so that |2 J|_2 <= 1. Rows and
    columns: p_i (1 - p_i) + p_i sum_(j != i) p_j = 2 p_i (1 - p_i) <= 1/2, so that 2 J is at most 1 for p = 1 and inf too.
    """

    def image(self, grouped: Tensor) -> Tensor:
        """Twice the probabilities."""
        return 2 * grouped.softmax(-1)

    def tangent(self, grouped: Tensor, t: Tensor) -> Tensor:
        """2 p (t - p't)."""
        p = grouped.softmax(-1)
        return 2 * p * (t - (p * t).sum(-1, keepdim=True))

    def cotangent(self, grouped: Tensor, r: Tensor) -> Tensor:
        """The same: the Jacobian is symmetric."""
        return self.tangent(grouped, r)

    def magnitude(self, r: Tensor, size: int | None = None) -> Tensor:
        """Every entry of |2 J| is at most 1/2: p_i (1 - p_i) <= 1/4, and p_i p_j <= 1/4. The Jacobian is symmetric."""
        g = self.index.shape[1]
        # A sum of g nonnegative terms.
        total = r[self.index].sum(1, keepdim=True) * (0.5 * (1 + 2 * gamma(g + 2)))
        return self._spread(total.expand_as(self.index))

    def meet(self, groups: Groups[T]) -> T:
        """`Groups.softmax`."""
        return groups.softmax(self)


@dataclass(frozen=True, eq=False)
class LogSumExp(Contraction):
    """log sum_j e^(z_j): its gradient are the probabilities p, with |p|_2 <= |p|_1 = 1."""

    def image(self, grouped: Tensor) -> Tensor:
        """In the first place of each group."""
        return _first(grouped.logsumexp(-1), grouped)

    def tangent(self, grouped: Tensor, t: Tensor) -> Tensor:
        """p't."""
        return _first((grouped.softmax(-1) * t).sum(-1), t)

    def cotangent(self, grouped: Tensor, r: Tensor) -> Tensor:
        """p r_1."""
        return grouped.softmax(-1) * r[..., :1]

    def magnitude(self, r: Tensor, size: int | None = None) -> Tensor:
        """p'r is at most the largest r; back, p_j r_1 at most r_1."""
        own = r[self.index]
        if size is not None:
            return self._spread(own[:, :1].expand_as(self.index))
        return self._spread(_first(own.amax(1), own))

    def meet(self, groups: Groups[T]) -> T:
        """`Groups.log_sum_exp`."""
        return groups.log_sum_exp(self)


@dataclass(frozen=True, eq=False)
class Length(Contraction):
    """|z|_2: its gradient u = z / |z| has the length 1; at z = 0 every vector of length <= 1 is a subgradient."""

    def image(self, grouped: Tensor) -> Tensor:
        """In the first place of each group."""
        return _first(torch.linalg.vector_norm(grouped, dim=-1), grouped)

    def tangent(self, grouped: Tensor, t: Tensor) -> Tensor:
        """u't."""
        return _first((torch.nn.functional.normalize(grouped, dim=-1) * t).sum(-1), t)

    def cotangent(self, grouped: Tensor, r: Tensor) -> Tensor:
        """u r_1."""
        return torch.nn.functional.normalize(grouped, dim=-1) * r[..., :1]

    def norm(self, p: float) -> float:
        """1 for p = 1 (the largest |u_j|) and 2; for inf the sum of |u_j|, at most the root of the group's size."""
        return sqrt_up(self.index.shape[1]) if p == math.inf else 1.0

    def magnitude(self, r: Tensor, size: int | None = None) -> Tensor:
        """|u|'r is at most |r|_2; back, |u_j| r_1 at most r_1."""
        own = r[self.index]
        if size is not None:
            return self._spread(own[:, :1].expand_as(self.index))
        # The root of a sum of g squares, and squares below the normal range.
        g = self.index.shape[1]
        length = torch.linalg.vector_norm(own, dim=1) * (1 + 2 * gamma(g + 4)) + math.sqrt(g * TINY) * (1 + 8 * UNIT)
        return self._spread(_first(length, own))

    def meet(self, groups: Groups[T]) -> T:
        """`Groups.length`."""
        return groups.length(self)


KINDS: dict[str, type[Coupling]] = {"Length": Length, "LogSumExp": LogSumExp, "Softmax": Softmax}
"""The kinds that a record may hold, by the name that stands in it."""


def _first(value: Tensor, grouped: Tensor) -> Tensor:
    """(value, 0, ..., 0) in every group."""
    rest = torch.zeros((), dtype=value.dtype, device=value.device).expand(*value.shape, grouped.shape[-1] - 1)
    return torch.cat([value[..., None], rest], -1)
