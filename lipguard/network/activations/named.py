"""The names of elementwise functions that a record may hold: a name determines its function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from lipguard.errors import UnsupportedLayer

if TYPE_CHECKING:
    from lipguard.network.activations.base import Elementwise

Make = Callable[..., "Elementwise"]
MakeT = TypeVar("MakeT", bound=Make)

NAMED: dict[str, Make] = {}
"""Constructors by name: each is called with the parameters that the function's record holds."""


def register(name: str, make: Make) -> None:
    """Let records hold an elementwise function, so that networks with it can be audited.

    Args:
        name: the function's `name`; it stands in records and digests, so that one name must mean one function for good.
        make: called with the function's parameters (`Elementwise.parameters_of_record`, its tensors by default), it returns the
            function: most often the class itself.

    Raises:
        UnsupportedLayer: the name stands for another function.

    Example:
        class Cubic(Elementwise):
            name = "my-package-cubic"
            ...

        register(Cubic.name, Cubic)
    """
    known = NAMED.setdefault(name, make)
    if known is not make and (known.__module__, known.__qualname__) != (make.__module__, make.__qualname__):
        raise UnsupportedLayer(
            f"the activation name {name!r} stands for {known.__module__}.{known.__qualname__} already, and a name determines its "
            f"function. Give yours a name of its own, such as 'my-package-{name}'."
        )
    NAMED[name] = make


def named(name: str) -> Callable[[MakeT], MakeT]:
    """`register` as a decorator of the constructor."""

    def decorate(make: MakeT) -> MakeT:
        register(name, make)
        return make

    return decorate
