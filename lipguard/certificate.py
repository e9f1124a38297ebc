"""What is asked (Domain, Query), what is offered as proof (Evidence) and what was proved (Certificate)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lipguard.errors import InvalidDomain, UnsupportedQuery

Side = Literal["upper", "lower"]
Rigor = Literal["approximate", "verified"]
Norm = float | tuple[float, float]

_NORMS = (1.0, 2.0, math.inf)


def norm_pair(norm: Norm | str) -> tuple[float, float]:
    """The (input, output) norms meant by `norm`, each 1, 2 or inf.

    Raises:
        UnsupportedQuery: a norm other than 1, 2 or inf.
    """
    pair = tuple(norm) if isinstance(norm, (tuple, list)) else (norm, norm)
    try:
        values = tuple(float(p) for p in pair)
    except (TypeError, ValueError):
        values = ()
    if len(values) != 2 or any(p not in _NORMS for p in values):
        raise UnsupportedQuery(f"norm={norm!r}: a norm is 1, 2 or inf, or a pair (input, output) of them.")
    return values[0], values[1]


def _on_cpu(value: float | Sequence[float] | Tensor) -> Tensor:
    """The numbers on the CPU in float64; those of Python and NumPy as they are, never by way of torch's default float32."""
    given = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")
    return given.detach().to("cpu", torch.float64)


def _vector(value: float | Sequence[float] | Tensor, size: int, what: str) -> Tensor:
    tensor = _on_cpu(value).flatten()
    if tensor.numel() not in (1, size):
        raise InvalidDomain(
            f"{what} has {tensor.numel()} entries, the network has {size} inputs. Give one per input, or a number."
        )
    if tensor.isnan().any():
        raise InvalidDomain(f"{what} contains nan.")
    return tensor.expand(size).clone() if tensor.numel() == 1 else tensor


@dataclass(frozen=True, eq=False)
class Box:
    """Inputs with lower <= x <= upper, entry by entry; numbers are spread over all inputs.

    For `lipguard.bound` ends of shape (B, ...), B > 1, stand for B boxes.
    """

    lower: float | Sequence[float] | Tensor
    upper: float | Sequence[float] | Tensor

    def bounds(self, size: int) -> tuple[Tensor, Tensor]:
        """Lower and upper ends as float64 vectors of the given size.

        Raises:
            InvalidDomain: wrong size, nan, infinite, or lower > upper.
        """
        lower, upper = _vector(self.lower, size, "Box.lower"), _vector(self.upper, size, "Box.upper")
        if not (lower.isfinite().all() and upper.isfinite().all()):
            raise InvalidDomain("Box is unbounded. Use domain=None for all of R^d.")
        if (lower > upper).any():
            j = int((lower > upper).nonzero()[0])
            raise InvalidDomain(f"Box is empty: lower {lower[j]:g} > upper {upper[j]:g} at input {j}. Exchange them.")
        return lower, upper

    def each(self, size: int) -> tuple[Box, ...] | None:
        """The boxes of a batch, where an end has shape (B, ...) with B * size entries, B > 1; None for a single box.

        Raises:
            InvalidDomain: the two ends are batches of different lengths.
        """
        lower, upper = _rows(self.lower, size), _rows(self.upper, size)
        if lower is None and upper is None:
            return None
        count = len(lower) if lower is not None else len(upper) if upper is not None else 0
        if lower is not None and upper is not None and len(upper) != count:
            raise InvalidDomain(f"Box.lower is a batch of {count}, Box.upper one of {len(upper)}. Give one of each for a box.")
        lows, highs = (ends if ends is not None else [end] * count for ends, end in ((lower, self.lower), (upper, self.upper)))
        return tuple(Box(low, high) for low, high in zip(lows, highs, strict=True))

    def contains(self, x: Tensor) -> bool:
        """Whether the float64 vector x lies in the box, exactly."""
        lower, upper = self.bounds(x.numel())
        return bool(((x >= lower) & (x <= upper)).all())

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the box, row by row of x."""
        lower, upper = (v.to(x) for v in self.bounds(x.shape[-1]))
        return torch.minimum(torch.maximum(x, lower), upper)

    def sample(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """`count` uniform points, shape (count, size), float64."""
        lower, upper = self.bounds(size)
        return lower + (upper - lower) * torch.rand(count, size, generator=generator, dtype=torch.float64, device="cpu")

    def json(self) -> dict[str, object]:
        """A JSON value from which `domain_from_json` restores the box."""
        return {"kind": "box", "lower": _plain(self.lower), "upper": _plain(self.upper)}


@dataclass(frozen=True, eq=False)
class Ball:
    """Inputs with ||x - center||_norm <= radius, of which only those in `box` count, where one is given.

    The box is that of all inputs there are, [0, 1] for images: it holds the centre. For `lipguard.bound` a centre of shape
    (B, ...), B > 1, stands for B balls.
    """

    center: float | Sequence[float] | Tensor
    radius: float
    norm: float = 2.0
    box: Box | None = None

    def each(self, size: int) -> tuple[Ball, ...] | None:
        """The balls of a batch, where the centre has shape (B, ...) with B * size entries, B > 1; None for a single ball."""
        centers = _rows(self.center, size)
        return None if centers is None else tuple(Ball(center, self.radius, self.norm, self.box) for center in centers)

    def checked_center(self, size: int) -> Tensor:
        """The centre as a float64 vector.

        Raises:
            InvalidDomain: wrong size, nan, negative or infinite radius, a norm other than 1, 2, inf, or a box without the centre.
        """
        center = _vector(self.center, size, "Ball.center")
        if not center.isfinite().all() or not (0.0 <= float(self.radius) < math.inf):
            raise InvalidDomain(f"Ball needs a finite centre and a finite radius >= 0, not radius={self.radius!r}.")
        if float(self.norm) not in _NORMS:
            raise InvalidDomain(f"Ball.norm={self.norm!r}: a norm is 1, 2 or inf.")
        if self.box is not None:
            lower, upper = self.box.bounds(size)
            outside = (center < lower) | (center > upper)
            if bool(outside.any()):
                j = int(outside.nonzero()[0])
                raise InvalidDomain(
                    f"Ball: the centre is outside the box at input {j}: {center[j]:g} is not in [{lower[j]:g}, {upper[j]:g}]. "
                    "Clamp the centre, or give the box in the units of the network's input."
                )
        return center

    def bounds(self, size: int) -> tuple[Tensor, Tensor]:
        """Ends of the smallest box that contains the domain (rounded outward), as for `Box.bounds`."""
        center = self.checked_center(size)
        if self.radius == 0:
            return center, center.clone()
        inf = torch.tensor(math.inf, dtype=torch.float64, device="cpu")
        lower, upper = torch.nextafter(center - self.radius, -inf), torch.nextafter(center + self.radius, inf)
        if self.box is None:
            return lower, upper
        low, high = self.box.bounds(size)
        return torch.maximum(lower, low), torch.minimum(upper, high)

    def contains(self, x: Tensor) -> bool:
        """Whether the float64 vector x provably lies in the ball (rounding counted against it), and in the box."""
        center = self.checked_center(x.numel())
        if self.box is not None and not self.box.contains(x):
            return False
        distance = float(torch.linalg.vector_norm(x - center, float(self.norm)))
        slack = 4 * (x.numel() + 2) * 2.0**-53
        # x - center is exact only up to u |x - center|, which the relative slack covers as well.
        return bool((x == center).all()) or distance * (1 + slack) <= self.radius

    def project(self, x: Tensor) -> Tensor:
        """A point of the domain near each row of x, safely inside the ball.

        The nearest for norms 2 and inf, radial for norm 1; with a box, the nearest point of the box is then drawn to the
        centre, which the box holds.
        """
        center = self.checked_center(x.shape[-1]).to(x)
        step = (x if self.box is None else self.box.project(x)) - center
        inner = self.radius * (1 - 1e-9)
        if float(self.norm) == math.inf:
            inside = center + step.clamp(-inner, inner)
        else:
            length = torch.linalg.vector_norm(step, float(self.norm), dim=-1, keepdim=True)
            inside = center + step * (inner / length.clamp_min(1e-300)).clamp_max(1.0)
        return inside if self.box is None else self.box.project(inside)

    def sample(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """`count` points of the ball, shape (count, size), float64: random directions, radii uniform in volume."""
        center = self.checked_center(size)
        step = torch.randn(count, size, generator=generator, dtype=torch.float64, device="cpu")
        if float(self.norm) == math.inf:
            step = 2 * torch.rand(count, size, generator=generator, dtype=torch.float64, device="cpu") - 1
        else:
            step = step / torch.linalg.vector_norm(step, float(self.norm), dim=-1, keepdim=True)
            step = step * torch.rand(count, 1, generator=generator, dtype=torch.float64, device="cpu") ** (1.0 / size)
        return self.project(center + self.radius * step)

    def json(self) -> dict[str, object]:
        """A JSON value from which `domain_from_json` restores the ball."""
        plain: dict[str, object] = {"kind": "ball", "center": _plain(self.center), "radius": float(self.radius)}
        return plain | {"norm": str(float(self.norm))} | ({} if self.box is None else {"box": self.box.json()})


Domain = Box | Ball


def _rows(value: float | Sequence[float] | Tensor, size: int) -> list[Tensor] | None:
    """The vectors of a batch (B, ...), B > 1; None if the value is no batch of vectors of that size."""
    tensor = _on_cpu(value)
    if tensor.ndim < 2 or len(tensor) < 2 or tensor.numel() != len(tensor) * size:
        return None
    return list(tensor.reshape(len(tensor), size))


def _plain(value: float | Sequence[float] | Tensor) -> object:
    tensor = _on_cpu(value)
    return tensor.flatten().tolist() if tensor.ndim else tensor.item()


def domain_from_json(value: dict[str, object] | None) -> Domain | None:
    """Inverse of `Box.json` and `Ball.json`; None stays None."""
    if value is None:
        return None
    if value.get("kind") == "box":
        return Box(value["lower"], value["upper"])  # type: ignore[arg-type]
    if value.get("kind") == "ball":
        box = domain_from_json(value.get("box"))  # type: ignore[arg-type]
        assert not isinstance(box, Ball)
        return Ball(value["center"], float(value["radius"]), float(value["norm"]), box)  # type: ignore[arg-type]
    raise InvalidDomain(f"Unknown kind of domain {value.get('kind')!r}.")


@dataclass(frozen=True, eq=False)
class Query:
    """The constant that is asked for: sup over the domain of the Jacobian's norm from `norm[0]` to `norm[1]`."""

    norm: tuple[float, float] = (2.0, 2.0)
    domain: Domain | None = None


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


@dataclass(frozen=True, eq=False)
class Certificate:
    """One bound of one network's Lipschitz constant, with what proves it.

    `value` is rounded outward when `rigor` is "verified". `note` says what went wrong on the way, if anything.
    """

    value: float
    side: Side
    norm: tuple[float, float]
    domain: Domain | None
    digest: str
    method: str
    evidence: Evidence
    rigor: Rigor = "approximate"
    seconds: float = 0.0
    note: str = ""
    details: dict[str, float | int | str] = field(default_factory=dict)

    def __float__(self) -> float:
        return self.value


Status = Literal["closed", "gap reached", "time limit", "memory limit", "interrupted", "solver failed"]


@dataclass(frozen=True, eq=False)
class Enclosure:
    """lower <= constant <= upper, as narrow as the time allowed.

    Attributes:
        lower, upper: the two bounds, certificates of their own.
        status: "closed" when the gap asked for was reached, else what ended the search.
        witness: an input near which the Jacobian attains `lower`, shape (d,), or None.
        closed_region: the maximum over closed regions, where it is known to exceed the true constant; else None.
        choice: what was chosen by "auto" or fallen back to, and why.
    """

    lower_certificate: Certificate
    upper_certificate: Certificate
    status: Status
    method: str
    seconds: float
    solver: str = ""
    witness: Tensor | None = None
    closed_region: float | None = None
    choice: str = ""
    details: dict[str, float | int | str] = field(default_factory=dict)

    @property
    def lower(self) -> float:
        """The lower bound."""
        return self.lower_certificate.value

    @property
    def upper(self) -> float:
        """The upper bound."""
        return self.upper_certificate.value

    @property
    def gap(self) -> float:
        """Relative gap (upper - lower) / upper; 0 where both are 0."""
        return 0.0 if self.upper == self.lower else (self.upper - self.lower) / self.upper

    @property
    def rigor(self) -> Rigor:
        """Whether both bounds are "verified"."""
        both = {self.lower_certificate.rigor, self.upper_certificate.rigor}
        return "verified" if both == {"verified"} else "approximate"
