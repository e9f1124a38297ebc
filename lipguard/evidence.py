"""Evidence: what each method hands the checker, from which the checker proves the bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """Proposed norm of every affine node, by its index in the network; the checker re-proves each.

    `derivation` says how convolutions are to be proved: "norm", as tightly as can be, or "toeplitz", by the Toeplitz bound.
    """

    norms: dict[int, float]
    derivation: Literal["norm", "toeplitz"] = "norm"


@dataclass(frozen=True, eq=False)
class Multipliers:
    """Multipliers t >= 0, one per neuron in the order of the activation nodes, and the squared bound they should prove."""

    t: Tensor
    rho: float


@dataclass(frozen=True, eq=False)
class LocalMultipliers:
    """Multipliers t >= 0 for the slopes that the neurons have on the domain, (n,), and the squared bound they should prove.

    The checker finds the slopes itself. With alpha, beta a neuron's slopes there, w = alpha p + (beta - alpha) u, and t
    belongs to u (p - u) >= 0; where alpha = beta the neuron is no variable, and its entry is not read.
    """

    t: Tensor
    rho: float


@dataclass(frozen=True, eq=False)
class Slopes:
    """Nothing but the domain: the checker encloses the slopes of the neurons there, and all Jacobians by them."""


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """For every implicit layer, by its index, a positive vector (n,) above its response to what reaches it, entry by entry.

    Where the norm is from inf the response is of increments carried forwards, else of functionals carried backwards.
    """

    vectors: dict[int, Tensor]


@dataclass(frozen=True, eq=False)
class Part:
    """Multipliers (n,) of one output (input norm 2 or inf) or one input (output norm 2 or 1), and weights of the other side.

    `weights`, one per input (from inf) or output (to 1), are mu > 0 with |y_i|^2 <= sum_k mu_k x_k^2, or with
    sum_i y_i^2 / mu_i <= x_k^2; None where that side has the 2-norm, whose square is `rho` times the other's.
    """

    t: Tensor
    rho: float
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class WeightedMultipliers:
    """Weighted matrix inequalities: one for each output where the output norm is inf, for each input where the input's is 1."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class ChannelMultipliers:
    """Multipliers t >= 0 of a convolutional network on a torus, and the squared bound they should prove.

    Attributes:
        t: by activation node, one for each channel of an image, or for each neuron of a vector; by affine node or sum, one
            for each channel of a mask that sets its value to zero outside the window.
        rho: the squared bound.
        sides: by node that is an image on the torus, the length of its grid along each axis.
    """

    t: dict[int, Tensor]
    rho: float
    sides: dict[int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Witness:
    """A point and a direction: ||J(point) direction|| / ||direction|| bounds the constant from below."""

    point: Tensor
    direction: Tensor


@dataclass(frozen=True, eq=False)
class SolverReport:
    """The word of a solver that nothing can check: stays approximate."""

    solver: str
    message: str


@dataclass(frozen=True, eq=False)
class Leaf:
    """One part of the input domain: neurons whose phase is fixed, and the multipliers of the free ones.

    `phases` has one entry per neuron in the order of the activation nodes: the index of the linear piece the neuron
    stays in (ReLU: 0 off, 1 on), or -1 where it is free. `empty` claims that no input of the domain has these phases,
    proved by `farkas`, weights of the phases' demands in the order of the neurons. `flat` are such weights as well:
    they prove that the inputs with these phases have no interior. `part` is the piece of the domain the leaf lies in:
    0, or on all of R^d the facet of the box of directions.
    """

    phases: Tensor
    t: Tensor | None = None
    empty: bool = False
    farkas: Tensor | None = None
    part: int = 0
    flat: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Partition:
    """Leaves of a branching on activation phases that cover the domain, each with evidence of `value`."""

    leaves: tuple[Leaf, ...]
    value: float


@dataclass(frozen=True, eq=False)
class Product:
    """Evidence of every piece of a network that is cut behind the nodes `cuts`; the bounds of the pieces multiply."""

    cuts: tuple[int, ...]
    factors: tuple[Multipliers | Factors, ...]


Evidence = (
    Factors
    | Multipliers
    | LocalMultipliers
    | Slopes
    | Magnitudes
    | WeightedMultipliers
    | ChannelMultipliers
    | Witness
    | Partition
    | Product
    | SolverReport
)
