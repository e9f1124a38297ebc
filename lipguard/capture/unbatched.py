"""Calls on values of one sample, without a batch dimension, as the calls on a batch of one that rules know.

Rules get such a value as a batch of one. What names a dimension is counted one further; products that read a vector by its
rank are written as those of its one row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from lipguard.capture.rules.registry import COLUMNS, Rule, function_rule, takes_whole

_SPARE = "zyxwvutsrqponmlkjihgfedcba"


def translated(
    key: object, args: tuple[Any, ...], kwargs: dict[str, Any], unbatched: Callable[[object], bool], axis: int | None
) -> tuple[object, tuple[Any, ...], dict[str, Any]]:
    """The call whose rule is asked: key, arguments.

    Args:
        unbatched: whether a tensor is the value of one sample.
        axis: dimension of the samples of the values in the call.
    """
    if key in ("matmul", "mm") and axis == 1 and len(args) == 2 and args[0].ndim == args[1].ndim == 2:
        return COLUMNS, args[::-1], {}  # W X, one sample in each column of X
    if key in ("matmul", "mv") and len(args) == 2 and unbatched(args[1]) and args[1].ndim == 1 and args[0].ndim == 2:
        return "linear", (args[1], args[0]), {}  # W v is the row v' W'
    if key == "dot" and len(args) == 2:
        value, other = args if unbatched(args[0]) else args[::-1]
        return "matmul", (value, other), {}
    if key == "einsum" and isinstance(args[0], str):
        return key, (_with_batch(args[0], args[1:], unbatched), *args[1:]), kwargs
    rule = function_rule(key)
    if rule is None or takes_whole(rule) or not args or not unbatched(args[0]):
        return key, args, kwargs
    return key, *_shifted(rule, args, kwargs)


def _shifted(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Dimensions counted one further; all of them where none is named."""
    place = _dim(rule)
    if place is None:
        return args, kwargs
    given = args[place] if place < len(args) else kwargs.get("dim")
    if given is None:
        dim: Any = tuple(range(1, args[0].ndim + 1))
    elif isinstance(given, int) and not isinstance(given, bool):
        dim = given + 1 if given >= 0 else given
    elif isinstance(given, list | tuple):
        dim = tuple(d + 1 if d >= 0 else d for d in given)
    else:
        return args, kwargs
    if place < len(args):
        return (*args[:place], dim, *args[place + 1 :]), kwargs
    return args, {**kwargs, "dim": dim}


@cache
def _dim(rule: Rule) -> int | None:
    """Place of the argument `dim`, counted from the first tensor."""
    names = [name for name in inspect.signature(rule).parameters if name != "trace"]
    return names.index("dim") if "dim" in names else None


def _with_batch(equation: str, operands: tuple[Any, ...], unbatched: Callable[[object], bool]) -> str:
    """The equation with an index for the batch of one in front of the value's term and of the result."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    places = [i for i, operand in enumerate(operands) if unbatched(operand)]
    terms, arrow, out = equation.replace(" ", "").partition("->")
    if not places or not arrow or "." in equation:
        return equation
    fresh = next(c for c in _SPARE if c not in equation)
    parts = terms.split(",")
    return ",".join(fresh + t if i in places else t for i, t in enumerate(parts)) + f"->{fresh}{out}"
