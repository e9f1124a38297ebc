"""Domains: the sets of inputs that a bound is asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipguard.errors import InvalidDomain
from lipguard.plain import NUMBER, Form, one_of, read_fields

NORMS = (1.0, 2.0, math.inf)
"""Norms that are measured in."""


def _on_cpu(value: float | Sequence[float] | Tensor) -> Tensor:
    """The numbers on the CPU in float64; those of Python and NumPy as they are, never by way of torch's default float32."""
    try:
        given = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidDomain(
            f"a domain's {type(value).__name__} holds no numbers: give a number, or one for each input."
        ) from error
    if given.is_complex() or given.layout != torch.strided or given.is_meta:
        raise InvalidDomain(f"a domain's tensor is {given.dtype}, {given.layout} on {given.device}: give a real, dense one.")
    return given.detach().to("cpu", torch.float64)


def _number(value: object, what: str) -> float:
    """A number of Python, NumPy or a tensor of one entry, as a float; text is read too where it means inf."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidDomain(f"{what}={value!r} must be a number.") from error


def _vector(value: float | Sequence[float] | Tensor, size: int, what: str) -> Tensor:
    tensor = _on_cpu(value).flatten()
    if tensor.numel() not in (1, size):
        raise InvalidDomain(
            f"{what} has {tensor.numel()} entries, the network has {size} inputs. Give one per input, or a number."
        )
    if tensor.isnan().any():
        raise InvalidDomain(f"{what} contains nan.")
    return tensor.expand(size).clone() if tensor.numel() == 1 else tensor


@dataclass(frozen=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        return f"Box({_short(self.lower)}, {_short(self.upper)})"

    def json(self) -> dict[str, object]:
        """A JSON value from which `domain_from_json` restores the box."""
        return {"kind": "box", "lower": _plain(self.lower), "upper": _plain(self.upper)}


@dataclass(frozen=True, eq=False, repr=False)
class Ball:
    """Inputs with ||x - center||_norm <= radius, of which only those in `box` count, where one is given.

    The box holds every input that can occur, [0, 1] for images, and so the centre. For `lipguard.bound` a centre of shape
    (B, ...), B > 1, stands for B balls.
    """

    center: float | Sequence[float] | Tensor
    radius: float
    norm: float = 2.0
    box: Box | None = None

    def __post_init__(self) -> None:
        """Refuse fields that are not numbers, and a box of another type."""
        object.__setattr__(self, "radius", _number(self.radius, "Ball.radius"))
        object.__setattr__(self, "norm", _number(self.norm, "Ball.norm"))
        if self.box is not None and not isinstance(self.box, Box):
            raise InvalidDomain(f"Ball.box is {type(self.box).__name__}; give lipguard.Box(lower, upper).")

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
        if float(self.norm) not in NORMS:
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

    def __repr__(self) -> str:
        box = "" if self.box is None else f", box={self.box!r}"
        return f"Ball({_short(self.center)}, radius={float(self.radius)!r}, norm={float(self.norm):g}{box})"

    def json(self) -> dict[str, object]:
        """A JSON value from which `domain_from_json` restores the ball."""
        plain: dict[str, object] = {"kind": "ball", "center": _plain(self.center), "radius": float(self.radius)}
        return plain | {"norm": str(float(self.norm))} | ({} if self.box is None else {"box": self.box.json()})


Domain = Box | Ball


def _rows(value: float | Sequence[float] | Tensor, size: int) -> list[Tensor] | None:
    """The vectors of a batch (B, ...), B > 1; None if the value is not a batch of vectors of that size."""
    tensor = _on_cpu(value)
    if tensor.ndim < 2 or len(tensor) < 2 or tensor.numel() != len(tensor) * size:
        return None
    return list(tensor.reshape(len(tensor), size))


def _short(value: float | Sequence[float] | Tensor) -> str:
    """A number to its last bit, or how many there are."""
    try:
        tensor = _on_cpu(value)
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ):  # what is not a number is refused where the domain is used, not where it is shown
        return f"<{type(value).__name__}>"
    return repr(tensor.item()) if tensor.numel() == 1 else f"<{tensor.numel()} numbers>"


def _plain(value: float | Sequence[float] | Tensor) -> object:
    tensor = _on_cpu(value)
    return tensor.flatten().tolist() if tensor.ndim else tensor.item()


def _read_ends(value: object) -> float | list[float]:
    return [NUMBER.read(one) for one in value] if isinstance(value, list) else NUMBER.read(value)


def _read_norm(value: object) -> float:
    norm = one_of(*(str(p) for p in NORMS)).read(value)
    return float(norm)


def _read_box(value: object) -> Box | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or value.get("kind") != "box":
        raise ValueError("a box is expected")
    found = domain_from_json(value)
    assert isinstance(found, Box)
    return found


_ENDS = Form(_plain, _read_ends)
_BOX = {"kind": one_of("box"), "lower": _ENDS, "upper": _ENDS}
_BALL = {
    "kind": one_of("ball"),
    "center": _ENDS,
    "radius": NUMBER,
    "norm": Form(str, _read_norm),
    "box": Form(Box.json, _read_box),
}


def domain_from_json(value: Mapping[str, Any] | None) -> Domain | None:
    """Inverse of `Box.json` and `Ball.json`; None stays None.

    Raises:
        InvalidDomain: there is no such kind of domain.
        NotCertified: a field is missing or unknown, or no number.
    """
    if value is None:
        return None
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind == "box":
        found = read_fields(value, _BOX, set(_BOX), "the box of the record")
        return Box(found["lower"], found["upper"])
    if kind == "ball":
        found = read_fields(value, _BALL, {*_BALL} - {"box"}, "the ball of the record")
        return Ball(found["center"], found["radius"], found["norm"], found.get("box"))
    raise InvalidDomain(f"Unknown kind of domain {kind!r}.")


def domain_from(value: object, norm: float = 2.0) -> Domain | None:
    """The domain that a value means, as people write it: in Python, on a command line, in a YAML file.

    Args:
        value: a `Box`, a `Ball` or None, which is returned as it is; text, "box:LOWER,UPPER", "ball:RADIUS" (around 0),
            "ball:CENTRE,RADIUS" or "ball:CENTRE,RADIUS,NORM", where ends and centres are numbers or lists of one number for
            each input, as in "box:[0,0.1],[1,2]"; or a mapping of the same fields, as {"kind": "box", "lower": 0, "upper": 1}.
        norm: of a ball that does not say.
    Raises:
        InvalidDomain: it is none of these.
    """
    if value is None or isinstance(value, Box | Ball):
        return value
    if isinstance(value, Mapping):
        return _of_mapping(dict(value), norm)
    if not isinstance(value, str):
        raise InvalidDomain(
            f"domain is {type(value).__name__}; give lipguard.Box(0, 1) or lipguard.Ball(centre, radius), or text such as "
            "'box:0,1'."
        )
    kind, _, rest = value.strip().partition(":")
    parts = [_numbers(part) for part in _PARTS.findall(rest)]
    spelled = all(part is not None for part in parts) and not _PARTS.sub("", rest).strip(" ,")
    if spelled and kind == "box" and len(parts) == 2:
        return Box(*parts)  # type: ignore[arg-type]
    if spelled and kind == "ball" and 1 <= len(parts) <= 3:
        centre, radius, own = (0.0, *parts, norm) if len(parts) == 1 else (*parts, norm)[:3]
        if isinstance(radius, float) and isinstance(own, float):
            return Ball(centre, radius, own)  # type: ignore[arg-type]
    raise InvalidDomain(
        f"domain={value!r} is neither box:LOWER,UPPER nor ball:RADIUS nor ball:CENTRE,RADIUS. Write for example 'box:0,1', "
        "'box:[0,0.1],[1,2]' with one number for each input, or 'ball:0.1'."
    )


_PARTS = re.compile(r"\[[^\[\]]*\]|[^,\[\]]+")
_FIELDS = {"box": ("lower", "upper"), "ball": ("center", "radius", "norm", "box")}


def _numbers(text: str) -> float | list[float] | None:
    """A number, or a list of them in brackets; None for any other text."""
    text = text.strip()
    try:
        if text.startswith("["):
            return [float(entry) for entry in text[1:-1].split(",")]
        return float(text)
    except ValueError:
        return None


def _of_mapping(fields: dict[str, object], norm: float) -> Domain:
    kind = fields.pop("kind", "box" if "lower" in fields else "ball")
    known = _FIELDS.get(str(kind), ())
    unknown = [name for name in fields if name not in known]
    missing = [name for name in known[:2] if name not in fields and name != "center"]
    if not known or unknown or missing:
        raise InvalidDomain(
            f"domain has kind={kind!r} with {', '.join(fields) or 'no fields'}; give {{kind: box, lower: 0, upper: 1}} or "
            "{kind: ball, center: 0, radius: 0.1}."
        )
    try:
        if kind == "box":
            return Box(_entries(fields["lower"]), _entries(fields["upper"]))
        box = domain_from(fields.get("box"))
        if isinstance(box, Ball):
            raise InvalidDomain("domain: the box of a ball is a ball. Give {kind: box, lower: 0, upper: 1}.")
        radius, own = float(fields["radius"]), float(fields.get("norm", norm))  # type: ignore[arg-type]
        return Ball(_entries(fields.get("center", 0.0)), radius, own, box)
    except (TypeError, ValueError) as error:
        raise InvalidDomain(
            f"domain={fields!r}: {error}. Its fields are numbers, or lists of one number for each input."
        ) from error


def _entries(value: object) -> float | list[float] | Tensor:
    if isinstance(value, Tensor):
        return value
    return [float(entry) for entry in value] if isinstance(value, list | tuple) else float(value)  # type: ignore[arg-type]
