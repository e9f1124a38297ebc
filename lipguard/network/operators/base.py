"""`Operator`: what every linear map answers, whatever its kind; what few can answer has a default."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lipguard.network.part import Part
from lipguard.rounding import TINY, UNIT, compounded, powers_of_two

if TYPE_CHECKING:
    from lipguard.network.operators.conv import Conv

Shape = tuple[int, ...]
"""(channels, *window): the entries of a value in row-major order."""

LARGEST_RADIUS = 2.0
"""Relative radii above say nothing about a coefficient. Folded constants have some units of roundoff."""


class Operator(Part, ABC):
    """A linear map from R^in to R^out; called on rows (..., in), it returns rows (..., out).

    A kind of operator is a frozen dataclass, whose fields define it: tensors hold the coefficients, the rest is its structure.
    """

    rho: float = 0.0
    """Relative radius. What is meant is some W~ with |W~ - W| <= rho |W| entry by entry, W the coefficients held; 0: W itself."""

    def __post_init__(self) -> None:
        """Refuse a radius that is none."""
        if not isinstance(self.rho, float) or not 0 <= self.rho <= LARGEST_RADIUS:
            raise ValueError(f"an operator has rho={self.rho!r}; a relative radius is a float from 0 to {LARGEST_RADIUS:g}.")

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the coefficients."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """Products that are added in one entry of the result, at most; 0 where entries are only moved."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Apply to every row."""

    @abstractmethod
    def transpose(self) -> Operator:
        """The adjoint map."""

    @abstractmethod
    def abs(self) -> Operator:
        """The map of upper bounds of the coefficients' absolute values, |W~| and |W|: of |W| itself where rho is 0."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The (out, in) matrix, float64."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The coefficients, for the digest."""

    def scalar(self) -> float | None:
        """c if the map is known to be c times the identity, else None: coefficients are not looked into."""
        return None

    def norm(self, p: float) -> float | None:
        """Upper bound of the norm from p to p, p = 1, 2 or inf, where it has a closed form that the checker takes for proved.

        None where there is none: then a solver proposes the norm.
        """
        del p
        return None

    def attached_norm(self, p: float) -> Tensor | None:
        """The same as a number in the autograd graph of the coefficients, 0-d."""
        norm = self.norm(p)
        return None if norm is None else torch.tensor(norm, dtype=torch.float64, device=self.device)

    @property
    def multiplications(self) -> int:
        """Multiplications of one application to a row."""
        return sum(tensor.numel() for tensor in self.tensors())

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Operator:
        """The map of the same structure whose coefficients are `change` of these; itself where none is a floating number.

        Every nonzero entry of the matrix is one coefficient, so that an entrywise change with f(0) = 0 is that of the matrix.
        """
        assert is_dataclass(self)
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(t) for name, t in parts.items() if isinstance(t, Tensor) and t.is_floating_point()}
        return replace(self, **changed) if changed else self

    def scaled(self, scale: Tensor, rho: float = 0.0) -> Operator | None:
        """The map followed by a diagonal one, (out,) or 0-d, of relative radius rho, where that is one operator; else None.

        Also None where a coefficient would leave the normal range of float64, in which alone roundings are relative.
        """
        del scale, rho
        return None

    def after(self, inner: Operator) -> Operator | None:
        """x -> self(inner(x)) where that is one operator no larger than the two; else None."""
        del inner
        return None

    @property
    def selection(self) -> Tensor | None:
        """The int64 index (out,) of a map x -> x[index], with a zero where it is -1; None for any other."""
        return None

    @property
    def stored(self) -> Tensor | None:
        """The matrix (out, in) where it is held as it is, in its own precision; None where `dense` has to make it."""
        return None

    @property
    def convolution(self) -> Conv | None:
        """Itself, where it is a convolution: kernels have norms and frequencies of their own."""
        return None

    @property
    def weightless(self) -> bool:
        """Whether all its coefficients are 0 and 1 by its kind."""
        return False

    @property
    def in_place(self) -> bool:
        """Whether entry i of the result depends on entry i of what is read alone."""
        return False

    def as_convolution(self, before: Shape, after: Shape) -> Conv | None:
        """The map as a convolution of images of these shapes, exactly; None where it is none."""
        del before, after
        return None


def magnitude(coefficients: Tensor, rho: float) -> Tensor:
    """Upper bounds of |c| (1 + rho) for all coefficients c; exact where rho is 0, and 0 where c is."""
    size = coefficients.abs()
    if not rho:
        return size
    # 1 + rho, its product with 1 + 4 u and the product with |c| round by u of themselves each, in all by less than 4 u; below
    # the normal range the last one rounds by less than 2^-1074.
    return size * ((1 + rho) * (1 + 4 * UNIT)) + (size != 0).to(size) * 2.0**-1074


def product(a: Tensor, b: Tensor, *radii: float) -> tuple[Tensor, float] | None:
    """Coefficients a b, and their relative radius where those of the factors are given; None where the range is left.

    With a~ = a (1 + d1), b~ = b (1 + d2) and p = fl(a b) in the normal range, a b = p (1 + d3) with |d3| <= u, and d3 = 0 where a
    factor is 0 or a power of two (Higham 2002, section 2.2): a~ b~ = p (1 + d1) (1 + d2) (1 + d3).
    """
    made, left, right = a * b, a.detach(), b.detach()
    size = made.detach().abs()
    normal = (size >= TINY) & size.isfinite()
    if not bool((normal | (left == 0) | (right == 0)).all()):
        return None
    exact = powers_of_two(left) or powers_of_two(right)
    return made, compounded(*radii, 0.0 if exact else UNIT)
