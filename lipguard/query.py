"""`Query`: what is asked of a model, the one object behind every entry point."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from lipguard.domain import NORMS, Ball, Box, Domain, domain_from
from lipguard.errors import UnsupportedQuery
from lipguard.rendering import clipped, line, norm_text

__all__ = ["Inputs", "Norm", "Outputs", "Query", "inputs_from", "norm_pair", "outputs_from"]

Norm = float | str | tuple[float | str, float | str]
"""1, 2 or inf (or "inf"), or a pair (input norm, output norm) of them."""

Functional = Tensor | tuple[int, int]
"""A matrix (k, m) applied to the m outputs, or a pair (i, j) of classes: output i minus output j."""

Outputs = Functional | int | str | tuple[int | str, Functional]
"""A functional; or which of several tensors: its place in a tuple, its key or its name (dotted where nested); or both."""

Inputs = Tensor | int | str | tuple[int | str, ...]
"""With respect to what: a matrix E (d, k), for the function z -> f(E z); or which of several input tensors, by its place or the
name of the argument, or several of them jointly, their entries one behind the other in the order named. The others are held at
the example's values."""


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


def outputs_from(value: Any) -> Outputs | None:
    """What of the outputs a value means, as people write it: in Python, on a command line, in a YAML file.

    Args:
        value: an `Outputs` or None; text: "policy.logits" or "0" (one of several tensors), "3,5" (a pair of classes),
            "[[1,0],[0,1]]" (a matrix), or "policy.logits:3,5" (both); or the same as lists.
    Raises:
        UnsupportedQuery: it is none of these.
    """
    if value is None or isinstance(value, Tensor) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str):
        name, colon, rest = value.rpartition(":")
        functional = _functional(_parsed(rest))
        if functional is not None and (name or not colon):
            return (name, functional) if name else functional
        return value
    functional = _functional(value)
    if functional is not None:
        return functional
    if isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], int | str):
        functional = _functional(_parsed(value[1]) if isinstance(value[1], str) else value[1])
        if functional is not None:
            return value[0], functional
    raise UnsupportedQuery(
        f"outputs={value!r}: give a pair of classes, outputs=(3, 5), a matrix (k, m), the place or name of one of several "
        "tensors, outputs='policy', or both, outputs=('policy', (3, 5))."
    )


def inputs_from(value: Any) -> Inputs | None:
    """With respect to what, as people write it: an `Inputs` or None, places or names as text ("x", "x,context"), or lists.

    Raises:
        UnsupportedQuery: it is none of these.
    """
    if value is None or isinstance(value, Tensor) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    read = _parsed(value) if isinstance(value, str) else value
    matrix = _functional(read)
    if isinstance(matrix, Tensor):
        return matrix
    if isinstance(value, str) and read is None:
        # A key may hold a comma only where it is named in a list of its own: ["a,b"].
        read = [part.strip() for part in value.split(",")]
        if len(read) == 1 and read[0]:
            return value
    if isinstance(read, tuple | list) and read and all(_is_name(one) for one in read):
        return tuple(int(one) if isinstance(one, int) else one for one in read)
    raise UnsupportedQuery(
        f"inputs={value!r}: give the place or the name of one of several tensors, inputs='x', of several, inputs=('x', 'y'), or "
        "a matrix (d, k)."
    )


def _is_name(value: object) -> bool:
    return bool(value) if isinstance(value, str) else isinstance(value, int) and not isinstance(value, bool)


def _apart(outputs: Any) -> tuple[int | str | None, Any]:
    """Which tensor, None where the outputs do not say, and the rest."""
    return outputs if isinstance(outputs, tuple) and isinstance(outputs[1], Tensor | tuple) else (None, outputs)


def _parsed(text: str) -> Any:
    """A pair of numbers or lists that text holds; else None."""
    try:
        return json.loads(text if text.lstrip().startswith("[") else f"[{text}]")
    except json.JSONDecodeError:
        return None


def _functional(value: Any) -> Functional | None:
    """A pair of classes, or a matrix, from a sequence of numbers or an array; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list):
        if len(value) == 2 and all(isinstance(one, SupportsIndex) and not isinstance(one, bool | Tensor) for one in value):
            return int(value[0]), int(value[1])
        if not value or not all(isinstance(row, tuple | list) for row in value):
            return None
    elif not hasattr(value, "__array__"):
        return None
    try:
        matrix = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return None
    return matrix if matrix.ndim == 2 else None


@dataclass(frozen=True, eq=False, repr=False)
class Query:
    """The constant that is asked for: sup over the domain of the Jacobian's norm from `norm[0]` to `norm[1]`.

    Attributes:
        norm: 1, 2 or inf, or a pair (input, output); a pair of floats once constructed.
        domain: a `Box`, a `Ball`, None for all inputs, or what `domain_from` reads, with the input norm for a ball's own.
        outputs: what of the outputs, None for all; or what `outputs_from` reads.
        inputs: with respect to what, None for all inputs of floating point jointly; or what `inputs_from` reads.
        submodule: dotted name of a part of the model; None for the whole.
        example: an input that the model accepts, (B, ...); not needed for a `Network`.
    Raises:
        UnsupportedQuery: a norm other than 1, 2 or inf, a submodule that is no name, or outputs or inputs of no known form.
        InvalidDomain: the domain is none.
    """

    norm: Any = (2.0, 2.0)
    domain: Domain | None = None
    outputs: Outputs | None = None
    inputs: Inputs | None = None
    submodule: str | None = None
    example: Any = None

    def __post_init__(self) -> None:
        """Bring each field to its one form and refuse what has no meaning for any model."""
        object.__setattr__(self, "norm", norm_pair(self.norm))
        object.__setattr__(self, "domain", domain_from(self.domain, self.norm[0]))
        object.__setattr__(self, "outputs", outputs_from(self.outputs))
        object.__setattr__(self, "inputs", inputs_from(self.inputs))
        if self.submodule is not None and not isinstance(self.submodule, str):
            raise UnsupportedQuery(f"submodule={self.submodule!r}: give the dotted name of a part, such as 'encoder.0'.")

    def __repr__(self) -> str:
        stated = [(name, getattr(self, name)) for name in ("domain", "outputs", "inputs", "submodule", "example")]
        given = [f"{name}={_short(value)}" for name, value in stated if value is not None]
        return line("Query", [f"norm={norm_text(self.norm)}", *given])

    def json(self) -> dict[str, Any]:
        """The query as JSON values, all but the example, from which `of_json` restores it."""
        which, functional = _apart(self.outputs)
        plain = functional.tolist() if isinstance(functional, Tensor) else _plain(functional)
        return {
            "norm": [str(p) for p in self.norm],
            "domain": None if self.domain is None else self.domain.json(),
            "outputs": plain if which is None else [which, plain],
            "inputs": self.inputs.tolist() if isinstance(self.inputs, Tensor) else _plain(self.inputs),
            "submodule": self.submodule,
        }

    @staticmethod
    def of_json(value: Mapping[str, Any], domain: Domain | None) -> Query:
        """Inverse of `json`; what a record does not name is the whole."""
        chosen = {name: value.get(name) for name in ("outputs", "inputs", "submodule")}
        return Query(tuple(value["norm"]), domain, **chosen)  # type: ignore[arg-type]

    def of_network(self) -> Query:
        """What is left to ask once the network has been read: norm and domain."""
        return replace(self, outputs=None, inputs=None, submodule=None, example=None)


def _plain(value: Any) -> Any:
    """A tuple as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _short(value: object) -> str:
    """One part of a query, without the numbers of a tensor."""
    if isinstance(value, Tensor):
        return f"<tensor {tuple(value.shape)}>"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_short, value[:4]))}{', ...' if len(value) > 4 else ''})"
    return clipped(repr(value), 60) if isinstance(value, Box | Ball | int | float | str) else f"<{type(value).__name__}>"
