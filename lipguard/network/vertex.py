"""`Vertex`: what every node answers, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

from torch import Tensor

from lipguard.network.activations import Elementwise
from lipguard.network.coupled import Coupling
from lipguard.network.operators import Operator
from lipguard.network.part import Part

if TYPE_CHECKING:
    from lipguard.network.nodes import Node
    from lipguard.network.walk import Walk

T = TypeVar("T")
V = TypeVar("V")
W = TypeVar("W")
"""Values in another arithmetic: an enclosure, a row of coefficients, a bound."""


class Vertex(Part, ABC):
    """What every node answers, whatever its kind; besides, `sources`, the nodes that it reads, a field of sums.

    `meet` brings it before an algorithm. The properties below state what it has of what algorithms look for.
    """

    name: str

    bias: Tensor | None = None
    """What it adds to a linear map of what it reads, (size,)."""

    bias_radius: Tensor | None = None
    """How far what is meant may be from the bias, entry by entry, (size,); None: not at all."""

    parts: ClassVar[Mapping[str, type[Part]]] = {}
    """The fields that are parts themselves, and what they are."""

    def meet(self, walk: Walk[T], i: int, *read: T) -> T:
        """What a walk makes of it: it calls the walk's method for its kind; a kind without one is the walk's `other`."""
        return walk.other(i, self, *read)

    @abstractmethod
    def moved(self, place: Callable[[int], int]) -> Node:
        """The node with every source i replaced by place(i)."""

    @abstractmethod
    def length(self, read: Sequence[int]) -> int:
        """Length of its value, from the lengths of the values it reads."""

    @abstractmethod
    def value(self, *read: Tensor) -> Tensor:
        """Its value (batch, size), from the values (batch, ...) it reads."""

    def linear(
        self, read: Sequence[V], through: Callable[[V, Operator, Tensor | None], W], total: Callable[[Sequence[V]], W]
    ) -> W:
        """Its value in another arithmetic, of one that maps by operators and adds: `through(v, operator, bias)`, `total(vs)`.

        Raises:
            TypeError: it is more than that: the input, or neurons.
        """
        del read, through, total
        raise TypeError(f"{self.name or 'a node'} is no affine map and no sum.")

    @abstractmethod
    def structure(self) -> str:
        """All that defines it but the numbers in its tensors, as one line of the digest."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The numbers that define it, in a fixed order."""
        return ()

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Node:
        """The node with `change` of the coefficients and the bias of its linear map; itself where it has none."""
        del change
        return self  # type: ignore[return-value]

    @property
    def slopes(self) -> tuple[Tensor, Tensor] | None:
        """Slope interval (alpha, beta) on all of R of what it applies entry by entry, 0-d or (size,); None where it has none."""
        return None

    @property
    def tied(self) -> Coupling | None:
        """The function of groups whose increments are known to grow in no group's 2-norm, a group at a time; else None."""
        return None

    @property
    def variable(self) -> bool:
        """Whether it is no linear function of what it reads, so that linear combinations of values end at it."""
        return True

    @property
    def map(self) -> Operator | None:
        """The operator that it applies to what it reads, and adds at most a constant to; None where it does not."""
        return None

    @property
    def elementwise(self) -> Elementwise | None:
        """The function that makes its entries from as many pre-activations; None where there is none."""
        return None

    @property
    def loop(self) -> Operator | None:
        """The operator through which its value feeds back into its own pre-activations; None where it is explicit."""
        return None

    @property
    def posed(self) -> Tensor | None:
        """Multipliers T > 0, (n,), under which a node with a loop is well posed on its own; None for explicit nodes."""
        return None

    @property
    def coupling(self) -> Coupling | None:
        """The function of groups of entries that it applies; None where there is none."""
        return None

    @property
    def selection(self) -> Tensor | None:
        """The int64 index of a node that only chooses entries of what it reads, a zero where it is -1; else None."""
        return None

    @property
    def weightless(self) -> bool:
        """Whether it only chooses, adds or compares entries, so that a reader may make one node of two that are alike."""
        return False

    @property
    def in_place(self) -> bool:
        """Whether entry i of its value depends on entries i of what it reads alone, so that images stay images."""
        return False


class Reader(Vertex):
    """A node that reads one other."""

    source: int

    @property
    def sources(self) -> tuple[int, ...]:
        """The one node that it reads."""
        return (self.source,)

    def moved(self, place: Callable[[int], int]) -> Node:
        """The node that reads place(source)."""
        target = place(self.source)
        return self if target == self.source else replace(self, source=target)  # type: ignore[type-var, return-value]

    def length(self, read: Sequence[int]) -> int:
        """As long as what it reads."""
        return read[0]
