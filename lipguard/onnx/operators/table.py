"""The closed table: operators of the default domain by name and by the opset from which a function states their meaning.

A function takes a node's inputs by place, None for one that is left out, and its attributes by name; it makes torch calls, which
are then read like those of any module. What it does not know (an attribute, a mode) it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Unread", "known", "operator", "operator_of", "several_of"]

Function = Callable[..., Any]
FunctionT = TypeVar("FunctionT", bound=Function)

_OPERATORS: dict[str, list[tuple[int, Function]]] = {}
_SEVERAL: set[str] = set()


class Unread(Exception):
    """A node means what no function of the table states; the message goes on behind the node's name."""


def operator(*names: str, since: int = 1, several: bool = False) -> Callable[[FunctionT], FunctionT]:
    """State the meaning of operators from an opset on.

    Args:
        several: the function gives a sequence of outputs, and is told by `outputs` how many there are.
    """

    def register(function: FunctionT) -> FunctionT:
        for name in names:
            _OPERATORS.setdefault(name, []).append((since, function))
            _OPERATORS[name].sort(key=lambda entry: entry[0])
            if several:
                _SEVERAL.add(name)
        return function

    return register


def operator_of(name: str, opset: int) -> Function | None:
    """The function for an operator in an opset; None where there is none."""
    return next((function for since, function in reversed(_OPERATORS.get(name, [])) if since <= opset), None)


def several_of(name: str) -> bool:
    """Whether an operator's function gives a sequence of outputs."""
    return name in _SEVERAL


def known() -> list[str]:
    """The names of all operators that are read."""
    return sorted(_OPERATORS)
