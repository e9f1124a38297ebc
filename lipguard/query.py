"""`Query`: what is asked of a model, the one object behind every entry point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lipguard.domain import NORMS, Ball, Box, Domain
from lipguard.errors import InvalidDomain, UnsupportedQuery
from lipguard.rendering import clipped, line, norm_text

__all__ = ["Inputs", "Norm", "Outputs", "Query", "norm_pair"]

Norm = float | str | tuple[float | str, float | str]
"""1, 2 or inf (or "inf"), or a pair (input norm, output norm) of them."""

Functional = Tensor | tuple[int, int]
"""A matrix (k, m) applied to the m outputs, or a pair (i, j) of classes: output i minus output j."""

Outputs = Functional | int | str | tuple[int | str, Functional]
"""A functional; or which of several tensors: its place in a tuple, its key or its name (dotted where nested); or both."""

Inputs = Tensor | int | str
"""With respect to what: a matrix E (d, k), for the function z -> f(E z); or which of several input tensors, by its place or the
name of the argument, the others being held at the example's values."""


def norm_pair(norm: Norm | Sequence[float | str]) -> tuple[float, float]:
    """The (input, output) norms meant by `norm`, each 1, 2 or inf; text such as "inf" or "1,inf" is read as well.

    Raises:
        UnsupportedQuery: a norm other than 1, 2 or inf.
    """
    given = norm.split(",") if isinstance(norm, str) else norm
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    try:
        values = tuple(float(p) for p in pair)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        values = ()
    values = values * 2 if len(values) == 1 else values
    if len(values) != 2 or any(p not in NORMS for p in values):
        raise UnsupportedQuery(f"norm={norm!r}: a norm is 1, 2 or inf, or a pair (input, output) of them.")
    return values[0], values[1]


@dataclass(frozen=True, eq=False, repr=False)
class Query:
    """The constant that is asked for: sup over the domain of the Jacobian's norm from `norm[0]` to `norm[1]`.

    Attributes:
        norm: 1, 2 or inf, or a pair (input, output); a pair of floats once constructed.
        domain: a `Box`, a `Ball`, or None for all inputs.
        outputs: what of the outputs; None for all.
        inputs: with respect to what; None for the only input.
        submodule: dotted name of a part of the model; None for the whole.
        example: an input that the model accepts, (B, ...); not needed for a `Network`.
    Raises:
        UnsupportedQuery: a norm other than 1, 2 or inf, or a submodule that is no name.
        InvalidDomain: the domain is neither a Box nor a Ball.
    """

    norm: Any = (2.0, 2.0)
    domain: Domain | None = None
    outputs: Outputs | None = None
    inputs: Inputs | None = None
    submodule: str | None = None
    example: Any = None

    def __post_init__(self) -> None:
        """Bring the norm to its one form and refuse what has no meaning for any model."""
        object.__setattr__(self, "norm", norm_pair(self.norm))
        if self.domain is not None and not isinstance(self.domain, Box | Ball):
            raise InvalidDomain(
                f"domain is {type(self.domain).__name__}; give lipguard.Box(0, 1) or lipguard.Ball(centre, radius)."
            )
        if self.submodule is not None and not isinstance(self.submodule, str):
            raise UnsupportedQuery(f"submodule={self.submodule!r}: give the dotted name of a part, such as 'encoder.0'.")

    def __repr__(self) -> str:
        stated = [(name, getattr(self, name)) for name in ("domain", "outputs", "inputs", "submodule", "example")]
        given = [f"{name}={_short(value)}" for name, value in stated if value is not None]
        return line("Query", [f"norm={norm_text(self.norm)}", *given])

    def of_network(self) -> Query:
        """What is left to ask once the network has been read: norm and domain."""
        return replace(self, outputs=None, inputs=None, submodule=None, example=None)


def _short(value: object) -> str:
    """One part of a query, without the numbers of a tensor."""
    if isinstance(value, Tensor):
        return f"<tensor {tuple(value.shape)}>"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_short, value[:4]))}{', ...' if len(value) > 4 else ''})"
    return clipped(repr(value), 60) if isinstance(value, Box | Ball | int | float | str) else f"<{type(value).__name__}>"
