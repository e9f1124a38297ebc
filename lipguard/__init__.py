"""lipguard: verified Lipschitz bounds while a network trains.

The public names are resolved on first use, so that `import lipguard` loads neither Lightning nor a solver.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_NAMES = {
    "Ball": "certificate",
    "Box": "certificate",
    "Certificate": "certificate",
    "Query": "certificate",
    "Network": "network",
    "capture": "network.capture",
    "lowers": "network.capture",
    "bound": "bounds",
    "Tracker": "bounds.tracker",
    "verify": "verify",
    "LipschitzMonitor": "callbacks",
}

__all__ = list(_NAMES)  # noqa: PLE0605 - the table above is the list

if TYPE_CHECKING:
    from lipguard.bounds import bound
    from lipguard.bounds.tracker import Tracker
    from lipguard.callbacks import LipschitzMonitor
    from lipguard.certificate import Ball, Box, Certificate, Query
    from lipguard.network import Network
    from lipguard.network.capture import capture, lowers
    from lipguard.verify import verify


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module 'lipguard' has no attribute {name!r}; it has {', '.join(sorted(_NAMES))}.")
    value = getattr(importlib.import_module(f"lipguard.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
