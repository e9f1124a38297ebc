"""The nodes of a network, each of which speaks for itself: what it reads, its size, its value, what defines it.

A network is a graph of these. What an algorithm makes of a kind of node is the algorithm's own matter: it states that as a
`lipguard.network.walk.Walk`, which refuses by name the kinds that it does not know. So a new kind of node takes five files:

    network/nodes.py           the kind: its value, its structure, its entry in `KINDS`
    network/walk.py            its method, which refuses it wherever nothing else is said
    capture/rules/             the rule that emits it
    verify/norms/factors.py    its norm: all product bounds, and the methods that fall back to them
    verify/point/witness.py    its derivative at a point: all lower bounds

Everywhere else it is refused by name until it is taught; a kind that can be written with affine maps and neurons is instead
rewritten (`lipguard.programs.rewriting`, and the checker's own `lipguard.verify.rewriting`), and is then known everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from lipguard.network import implicit
from lipguard.network.activations import Elementwise
from lipguard.network.coupled import Coupling
from lipguard.network.operators import Operator
from lipguard.network.part import Part
from lipguard.network.vertex import Reader, Vertex

if TYPE_CHECKING:
    from lipguard.network.walk import Walk

T = TypeVar("T")
V = TypeVar("V")
W = TypeVar("W")


@dataclass(frozen=True, eq=False)
class Input(Vertex):
    """The network's input, always node 0."""

    size: int
    name: str = "input"

    @property
    def sources(self) -> tuple[int, ...]:
        """None."""
        return ()

    def moved(self, place: Callable[[int], int]) -> Node:
        """Itself."""
        return self

    def length(self, read: Sequence[int]) -> int:
        """Number of inputs."""
        return self.size

    def value(self, *read: Tensor) -> Tensor:
        """The input is given, not computed."""
        raise TypeError("the input's value is given by the caller")

    def meet(self, walk: Walk[T], i: int, *read: T) -> T:
        """`Walk.input`."""
        return walk.input(i, self)

    def structure(self) -> str:
        """Its length."""
        return f"input {self.size}"


@dataclass(frozen=True, eq=False)
class Affine(Reader):
    """operator(value of `source`) + bias.

    Attributes:
        bias_radius: what is meant is some bias within this of `bias`, entry by entry, (out,); None: `bias` itself.
    """

    source: int
    operator: Operator
    bias: Tensor | None = None
    name: str = ""
    bias_radius: Tensor | None = None
    parts: ClassVar[Mapping[str, type[Part]]] = {"operator": Operator}

    def __post_init__(self) -> None:
        """Refuse a radius that is none."""
        radius = self.bias_radius
        if radius is not None and (
            self.bias is None or radius.shape != self.bias.shape or not bool((radius.isfinite() & (radius >= 0)).all())
        ):
            raise ValueError(f"{self.name or 'an affine node'}: the radius of its bias is not one finite number >= 0 an entry.")

    def length(self, read: Sequence[int]) -> int:
        """Rows of the operator."""
        return self.operator.shape[0]

    def value(self, *read: Tensor) -> Tensor:
        """operator(x) + bias."""
        y = self.operator(read[0])
        return y if self.bias is None else y + self.bias

    def linear(
        self, read: Sequence[V], through: Callable[[V, Operator, Tensor | None], W], total: Callable[[Sequence[V]], W]
    ) -> W:
        """Through operator and bias."""
        del total
        return through(read[0], self.operator, self.bias)

    def meet(self, walk: Walk[T], i: int, *read: T) -> T:
        """`Walk.affine`."""
        return walk.affine(i, self, *read)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Affine:
        """Operator and bias changed, and the radius of the bias with it."""
        bias, radius = (None if t is None else change(t) for t in (self.bias, self.bias_radius))
        return replace(self, operator=self.operator.mapped(change), bias=bias, bias_radius=radius)

    @property
    def variable(self) -> bool:
        """No."""
        return False

    @property
    def map(self) -> Operator:
        """The operator."""
        return self.operator

    @property
    def selection(self) -> Tensor | None:
        """The operator's, where no bias is added."""
        return self.operator.selection if self.bias is None else None

    @property
    def in_place(self) -> bool:
        """Where the operator is diagonal."""
        return self.operator.in_place

    @property
    def weightless(self) -> bool:
        """Where the operator is an index, and no bias is added."""
        return self.bias is None and self.operator.weightless

    def structure(self) -> str:
        """Source, operator, and whether there is a bias, and a radius of it."""
        known = f"{self.bias is not None}{'' if self.bias_radius is None else ' enclosed'}"
        return f"affine {self.source} {operator_structure(self.operator)} {known}"

    def tensors(self) -> tuple[Tensor, ...]:
        """The operator's coefficients, then the bias and its radius."""
        return (*self.operator.tensors(), *(t for t in (self.bias, self.bias_radius) if t is not None))


@dataclass(frozen=True, eq=False)
class Activation(Reader):
    """A slope-restricted function applied to every entry of the value of `source`."""

    source: int
    function: Elementwise
    name: str = ""
    parts: ClassVar[Mapping[str, type[Part]]] = {"function": Elementwise}

    def value(self, *read: Tensor) -> Tensor:
        """The function, entry by entry."""
        return self.function(read[0])

    def meet(self, walk: Walk[T], i: int, *read: T) -> T:
        """`Walk.activation`."""
        return walk.activation(i, self, *read)

    @property
    def elementwise(self) -> Elementwise:
        """The function."""
        return self.function

    @property
    def in_place(self) -> bool:
        """Yes."""
        return True

    def structure(self) -> str:
        """Source and function."""
        return f"activation {self.source} {self.function.name}"

    def tensors(self) -> tuple[Tensor, ...]:
        """The function's parameters."""
        return self.function.tensors()

    @property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """The function's."""
        return self.function.slopes


@dataclass(frozen=True, eq=False)
class Sum(Vertex):
    """The sum of the values of `sources`, all of one size."""

    sources: tuple[int, ...]
    name: str = ""

    def moved(self, place: Callable[[int], int]) -> Node:
        """The sum of the values at the places."""
        return replace(self, sources=tuple(map(place, self.sources)))

    def length(self, read: Sequence[int]) -> int:
        """That of each term."""
        return read[0]

    def value(self, *read: Tensor) -> Tensor:
        """The sum."""
        return torch.stack(read).sum(0)

    def linear(
        self, read: Sequence[V], through: Callable[[V, Operator, Tensor | None], W], total: Callable[[Sequence[V]], W]
    ) -> W:
        """The sum."""
        del through
        return total(read)

    def meet(self, walk: Walk[T], i: int, *read: T) -> T:
        """`Walk.total`."""
        return walk.total(i, self, *read)

    @property
    def variable(self) -> bool:
        """No."""
        return False

    @property
    def in_place(self) -> bool:
        """Yes."""
        return True

    @property
    def weightless(self) -> bool:
        """Yes."""
        return True

    def structure(self) -> str:
        """The sources."""
        return f"sum {self.sources}"


@dataclass(frozen=True, eq=False)
class Coupled(Reader):
    """A function of groups of entries of the value of `source`: a maximum, a sort, a reflection."""

    source: int
    function: Coupling
    name: str = ""
    parts: ClassVar[Mapping[str, type[Part]]] = {"function": Coupling}

    def length(self, read: Sequence[int]) -> int:
        """Length of the function's result."""
        return self.function.outputs

    def value(self, *read: Tensor) -> Tensor:
        """The function."""
        return self.function(read[0])

    def meet(self, walk: Walk[T], i: int, *read: T) -> T:
        """`Walk.coupled`."""
        return walk.coupled(i, self, *read)

    @property
    def coupling(self) -> Coupling:
        """The function."""
        return self.function

    @property
    def weightless(self) -> bool:
        """Yes."""
        return True

    def structure(self) -> str:
        """Source and function."""
        return f"coupled {self.source} {function_structure(self.function)}"

    def tensors(self) -> tuple[Tensor, ...]:
        """What defines the function."""
        return self.function.tensors()

    @property
    def tied(self) -> Coupling | None:
        """The function, where it is a sort about the groups' means."""
        return self.function if self.function.tied else None


@dataclass(frozen=True, eq=False)
class Implicit(Reader):
    """The solution z of z = function(operator(z) + value of `source`), entry by entry; see `lipguard.network.implicit`."""

    source: int
    operator: Operator
    function: Elementwise
    name: str = ""
    parts: ClassVar[Mapping[str, type[Part]]] = {"operator": Operator, "function": Elementwise}

    def __post_init__(self) -> None:
        """Refuse an operator that is only enclosed: that an equation has one solution is proved for the numbers it holds."""
        if self.operator.rho:
            raise ValueError(f"{self.name or 'an implicit layer'}: its operator has rho={self.operator.rho:g}, only 0 is known.")

    @property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """The function's, as for an activation."""
        return self.function.slopes

    @cached_property
    def widened(self) -> tuple[Tensor, Tensor]:
        """Slope interval of every neuron, (n,) each, thin ones widened."""
        return implicit.widened(self.function, self.operator.shape[0], self.operator.device)

    @cached_property
    def scaling(self) -> Tensor:
        """T > 0, (n,), that makes the layer well posed in floating point: a proposal, which the checker proves.

        Raises:
            InvalidModel: none is found.
        """
        return implicit.diagonal_scaling(self.operator.dense().detach(), *self.widened, self.name or "an implicit layer")

    def value(self, *read: Tensor) -> Tensor:
        """z for inputs (..., n), in float64.

        Raises:
            InvalidModel: the layer is not known to be well posed.
        """
        _ = self.scaling
        return implicit.equilibrium(self.operator.dense(), read[0], self.function, *self.widened, self.name)

    def meet(self, walk: Walk[T], i: int, *read: T) -> T:
        """`Walk.implicit`."""
        return walk.implicit(i, self, *read)

    @property
    def elementwise(self) -> Elementwise:
        """The function."""
        return self.function

    @property
    def posed(self) -> Tensor:
        """`scaling`."""
        return self.scaling

    @property
    def loop(self) -> Operator:
        """The operator."""
        return self.operator

    def structure(self) -> str:
        """Source, operator and function."""
        return f"implicit {self.source} {operator_structure(self.operator)} {self.function.name}"

    def tensors(self) -> tuple[Tensor, ...]:
        """The operator's coefficients, then the function's parameters."""
        return (*self.operator.tensors(), *self.function.tensors())


Node = Input | Affine | Activation | Implicit | Sum | Coupled

KINDS: dict[str, type[Node]] = {
    "Activation": Activation, "Affine": Affine, "Coupled": Coupled, "Implicit": Implicit, "Input": Input, "Sum": Sum,
}  # fmt: skip
"""The kinds that a record may hold, by the name that stands in it."""


def operator_structure(operator: Operator) -> str:
    """Everything about an operator but its coefficients: strides and paddings make another map of the same weight."""
    return " ".join((type(operator).__name__, str(operator.shape), *_plain(operator)))


def function_structure(function: Coupling) -> str:
    """Everything about a function of groups but its tensors."""
    return " ".join((type(function).__name__, "", *_plain(function)))


def _plain(part: object) -> list[str]:
    named = ((f.name, getattr(part, f.name)) for f in fields(part)) if is_dataclass(part) else ()
    # A map that is meant exactly says nothing of its radius: another one always does.
    return [f"{name}={value!r}" for name, value in named if not isinstance(value, Tensor) and (name != "rho" or value)]
