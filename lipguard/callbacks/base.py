"""The Callback base class: one class for both families, `lightning` and `pytorch_lightning`.

The two packages carry separate copies of the same classes. The base class derives from the copy of every family that is
loaded, or of every one installed where none is loaded yet: the Trainer and the LightningCLI of either then accept it,
whichever import comes first. A family that is installed but not in use is left alone, as importing it would redirect
the other's log messages.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

__all__ = ["Callback"]


def _families() -> tuple[type, ...]:
    names = ("lightning.pytorch", "pytorch_lightning")
    bases: list[type] = []
    for name in [name for name in names if name in sys.modules] or names:
        try:
            bases.append(importlib.import_module(name).Callback)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise  # the family is there but one of its own requirements is not: its message says which
    if not bases:
        raise ModuleNotFoundError(
            "lipguard.callbacks needs Lightning, and neither `lightning` nor `pytorch_lightning` is installed. "
            "Run `pip install lightning`, or use lipguard.Tracker in a plain PyTorch loop.",
            name="lightning",
        )
    return tuple(bases)


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = type("Callback", _families(), {"__doc__": "Base class of lipguard's callbacks."})
