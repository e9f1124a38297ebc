"""The Callback base class: one class for both families, `lightning` and `pytorch_lightning`.

The two packages carry separate copies of the same classes, and importing either has effects on the other: it redirects log
messages. The base class therefore loads neither when it is imported. It derives from the `Callback` of every family that is
loaded when a callback is constructed, or looked up in `lipguard` or `lipguard.callbacks` (as LightningCLI does), and where
none is, constructing one loads `lightning`, or `pytorch_lightning` if that alone is installed.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, Self

__all__ = ["Callback", "adopt_loaded_families"]

_FAMILIES = ("lightning.pytorch", "pytorch_lightning")


class _NoFamily:
    """Stands in for a family's Callback until one is loaded: `__bases__` of a direct subclass of `object` cannot be changed."""


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:

    class Callback(_NoFamily):
        """Base class of lipguard's callbacks."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Self:
            """An instance of the Callback of every family in use."""
            adopt_loaded_families()
            if Callback.__bases__ == (_NoFamily,):
                _load_one()
                adopt_loaded_families()
            return super().__new__(cls)


def adopt_loaded_families() -> None:
    """Make `Callback` a subclass of the `Callback` of every family loaded so far."""
    bases = tuple(base for name in _FAMILIES if (base := getattr(sys.modules.get(name), "Callback", None)) is not None)
    if bases and Callback.__bases__ != bases:
        Callback.__bases__ = bases


def _load_one() -> None:
    """Load the first family that is installed.

    Raises:
        ModuleNotFoundError: none is, or one of its own requirements is missing.
    """
    for name in _FAMILIES:
        try:
            importlib.import_module(name)
            return
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise  # the family is there but one of its own requirements is not: its message says which
    raise ModuleNotFoundError(
        "lipguard.callbacks needs Lightning, and neither `lightning` nor `pytorch_lightning` is installed. "
        "Run `pip install lightning`, or use lipguard.Tracker in a plain PyTorch loop.",
        name="lightning",
    )
