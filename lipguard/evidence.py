"""Evidence: what each method hands the checker, from which the checker proves the bound.

A kind of evidence is a class here that states the side it proves and the form of its fields in a record, a name in `KINDS`,
and a check in `lipguard.verify`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from lipguard.errors import NotCertified
from lipguard.plain import (
    BY_NODE,
    COUNT,
    FLAG,
    INDICES,
    NUMBER,
    TEXT,
    VECTOR,
    Form,
    Recorded,
    by_node,
    one_of,
    optional,
    several,
    shown,
)

Side = Literal["upper", "lower"]


class Kind(Recorded):
    """A kind of evidence, or a part of one."""

    side: ClassVar[Side] = "upper"

    def size(self) -> str:
        """How much evidence there is, in words."""
        return f"{_entries(self):,} numbers"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size()})"


def _entries(value: object) -> int:
    """Numbers that a field holds."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, Kind):
        return sum(map(_entries, vars(value).values()))
    if isinstance(value, dict):
        return sum(map(_entries, value.values()))
    if isinstance(value, tuple):
        return sum(map(_entries, value))
    return int(isinstance(value, int | float))


@dataclass(frozen=True, eq=False, repr=False)
class Factors(Kind):
    """Proposed norm of every affine node, by its index in the network; the checker re-proves each.

    `derivation` says how convolutions are to be proved: "norm", as tightly as can be, or "toeplitz", by the Toeplitz bound.
    """

    kind = "factors"
    forms: ClassVar[Mapping[str, Form]] = {"norms": by_node(NUMBER), "derivation": one_of("norm", "toeplitz")}

    norms: dict[int, float]
    derivation: Literal["norm", "toeplitz"] = "norm"

    def size(self) -> str:
        """How many layers there are."""
        return f"{len(self.norms):,} layers"


@dataclass(frozen=True, eq=False, repr=False)
class Multipliers(Kind):
    """Multipliers t >= 0, one per neuron in the order of the activation nodes, and the squared bound they should prove."""

    kind = "multipliers"
    forms: ClassVar[Mapping[str, Form]] = {"t": VECTOR, "rho": NUMBER}

    t: Tensor
    rho: float


@dataclass(frozen=True, eq=False, repr=False)
class LocalMultipliers(Kind):
    """Multipliers t >= 0 for the slopes that the neurons have on the domain, (n,), and the squared bound they should prove.

    The checker finds the slopes itself. With alpha, beta a neuron's slopes there, w = alpha p + (beta - alpha) u, and t
    belongs to u (p - u) >= 0; where alpha = beta the neuron is no variable, and its entry is not read.
    """

    kind = "local-multipliers"
    forms: ClassVar[Mapping[str, Form]] = {"t": VECTOR, "rho": NUMBER}

    t: Tensor
    rho: float


@dataclass(frozen=True, eq=False, repr=False)
class Slopes(Kind):
    """Nothing but the domain: the checker encloses the slopes of the neurons there, and all Jacobians by them."""

    kind = "slopes"

    def size(self) -> str:
        """There is nothing to count."""
        return ""


@dataclass(frozen=True, eq=False, repr=False)
class Magnitudes(Kind):
    """For every implicit layer, by its index, a positive vector (n,) above its response to what reaches it, entry by entry.

    Where the norm is from inf the response is of increments carried forwards, else of functionals carried backwards.
    """

    kind = "magnitudes"
    forms: ClassVar[Mapping[str, Form]] = {"vectors": BY_NODE}

    vectors: dict[int, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Part(Kind):
    """Multipliers (n,) of one output (input norm 2 or inf) or one input (output norm 2 or 1), and weights of the other side.

    `weights`, one per input (from inf) or output (to 1), are mu > 0 with |y_i|^2 <= sum_k mu_k x_k^2, or with
    sum_i y_i^2 / mu_i <= x_k^2; None where that side has the 2-norm, whose square is `rho` times the other's.
    """

    forms: ClassVar[Mapping[str, Form]] = {"t": VECTOR, "rho": NUMBER, "weights": optional(VECTOR)}

    t: Tensor
    rho: float
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class WeightedMultipliers(Kind):
    """Weighted matrix inequalities: one for each output where the output norm is inf, for each input where the input's is 1."""

    kind = "weighted-multipliers"
    forms: ClassVar[Mapping[str, Form]] = {"parts": several(Form(Part.to_record, Part.from_record))}

    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False, repr=False)
class ChannelMultipliers(Kind):
    """Multipliers t >= 0 of a convolutional network on a torus, and the squared bound they should prove.

    Attributes:
        t: by activation node, one for each channel of an image, or for each neuron of a vector; by affine node or sum, one
            for each channel of a mask that sets its value to zero outside the window.
        rho: the squared bound.
        sides: by node that is an image on the torus, the length of its grid along each axis.
    """

    kind = "channel-multipliers"
    forms: ClassVar[Mapping[str, Form]] = {"t": BY_NODE, "rho": NUMBER, "sides": by_node(several(COUNT))}

    t: dict[int, Tensor]
    rho: float
    sides: dict[int, tuple[int, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class Witness(Kind):
    """A point and a direction: ||J(point) direction|| / ||direction|| bounds the constant from below."""

    kind = "witness"
    forms: ClassVar[Mapping[str, Form]] = {"point": VECTOR, "direction": VECTOR}
    side: ClassVar[Side] = "lower"

    point: Tensor
    direction: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class SolverReport(Kind):
    """The word of a solver that nothing can check: stays approximate."""

    kind = "solver-report"
    forms: ClassVar[Mapping[str, Form]] = {"solver": TEXT, "message": TEXT}

    solver: str
    message: str

    def size(self) -> str:
        """Whose word it is."""
        return self.solver


@dataclass(frozen=True, eq=False, repr=False)
class Leaf(Kind):
    """One part of the input domain: neurons whose phase is fixed, and the multipliers of the free ones.

    `phases` has one entry per neuron in the order of the activation nodes: the index of the linear piece the neuron
    stays in (ReLU: 0 off, 1 on), or -1 where it is free. `empty` claims that no input of the domain has these phases,
    proved by `farkas`, weights of the phases' demands in the order of the neurons. `flat` are such weights as well:
    they prove that the inputs with these phases have no interior. `part` is the piece of the domain the leaf lies in:
    0, or on all of R^d the facet of the box of directions.
    """

    forms: ClassVar[Mapping[str, Form]] = {
        "phases": INDICES,
        "t": optional(VECTOR),
        "empty": FLAG,
        "farkas": optional(VECTOR),
        "part": COUNT,
        "flat": optional(VECTOR),
    }

    phases: Tensor
    t: Tensor | None = None
    empty: bool = False
    farkas: Tensor | None = None
    part: int = 0
    flat: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Partition(Kind):
    """Leaves of a branching on activation phases that cover the domain, each with evidence of `value`."""

    kind = "partition"
    forms: ClassVar[Mapping[str, Form]] = {"leaves": several(Form(Leaf.to_record, Leaf.from_record)), "value": NUMBER}

    leaves: tuple[Leaf, ...]
    value: float

    def size(self) -> str:
        """How many leaves there are."""
        return f"{len(self.leaves):,} leaves"


def _of_a_piece(record: Any) -> Multipliers | Factors:
    found = evidence_from_record(record)
    if not isinstance(found, Multipliers | Factors):
        raise NotCertified(f"{type(found).__name__} is not evidence of a piece.")
    return found


_OF_A_PIECE = Form(lambda factor: factor.to_record(), _of_a_piece)


@dataclass(frozen=True, eq=False, repr=False)
class Product(Kind):
    """Evidence of every piece of a network that is cut behind the nodes `cuts`; the bounds of the pieces multiply."""

    kind = "product"
    forms: ClassVar[Mapping[str, Form]] = {"cuts": several(COUNT), "factors": several(_OF_A_PIECE)}

    cuts: tuple[int, ...]
    factors: tuple[Multipliers | Factors, ...]

    def size(self) -> str:
        """How many pieces there are."""
        return f"{len(self.factors):,} pieces"


def _of_a_pair(record: Any) -> Multipliers | LocalMultipliers | Factors:
    found = evidence_from_record(record)
    if not isinstance(found, Multipliers | LocalMultipliers | Factors):
        raise NotCertified(f"{type(found).__name__} is not evidence of a pair of outputs.")
    return found


_OF_A_PAIR = Form(lambda evidence: evidence.to_record(), _of_a_pair)


@dataclass(frozen=True, eq=False, repr=False)
class PairBound(Kind):
    """Why the difference of two outputs has a 2-norm constant on all of R^d.

    The statement is about the network of neurons, coupled nodes taken apart (`lipguard.verify.rewriting.neurons_only`).

    Attributes:
        pair: (i, j) for f_i - f_j; None: multipliers of all outputs, sqrt 2 times whose constant bounds each difference.
        evidence: multipliers of the network with the difference for its only output, by slopes on R^d; or norms of the
            affine nodes of the network as it was read, but for the last, in whose place its rows' difference is taken.
    """

    forms: ClassVar[Mapping[str, Form]] = {"pair": optional(several(COUNT)), "evidence": _OF_A_PAIR}

    pair: tuple[int, int] | None
    evidence: Multipliers | LocalMultipliers | Factors


@dataclass(frozen=True, eq=False, repr=False)
class Radius(Kind):
    """Why all inputs of a ball have one class, difference by difference of the class's output and another's.

    A class that is in neither table is excluded by the ball alone: by linear propagation, or by slopes.

    Attributes:
        constants: by the other class, a constant on R^d that the margin at the centre exceeds radius times.
        multipliers: by the other class, multipliers (n,) for the slopes on the ball, as in `LocalMultipliers`.
    """

    forms: ClassVar[Mapping[str, Form]] = {
        "constants": by_node(Form(PairBound.to_record, PairBound.from_record)),
        "multipliers": BY_NODE,
    }

    constants: dict[int, PairBound]
    multipliers: dict[int, Tensor]


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

KINDS: dict[str, type[Evidence]] = {
    "channel-multipliers": ChannelMultipliers,
    "factors": Factors,
    "local-multipliers": LocalMultipliers,
    "magnitudes": Magnitudes,
    "multipliers": Multipliers,
    "partition": Partition,
    "product": Product,
    "slopes": Slopes,
    "solver-report": SolverReport,
    "weighted-multipliers": WeightedMultipliers,
    "witness": Witness,
}
"""Every kind of evidence by its name in records: a closed table, since a record may come from anyone."""


def evidence_from_record(record: Mapping[str, Any]) -> Evidence:
    """The evidence that a record states.

    Raises:
        NotCertified: there is no such kind, or a field is missing, unknown or without meaning.
    """
    name = record.get("kind") if isinstance(record, Mapping) else None
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise NotCertified(f"no evidence is called {shown(name)}; there are {', '.join(KINDS)}.")
    return kind.from_record(record)
