"""Lightning callbacks, loaded on first use.

They are looked up anew each time, so that a callback that is imported before the Lightning of its Trainer is a subclass of
that family's `Callback` when LightningCLI asks for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__all__ = [
    "CertifiedAccuracy",
    "CheckpointAuditor",
    "LipschitzEarlyStopping",
    "LipschitzMonitor",
    "LipschitzProjection",
    "LipschitzRegularizer",
]

_HOMES = {
    "CertifiedAccuracy": "certified",
    "CheckpointAuditor": "auditor",
    "LipschitzEarlyStopping": "early_stopping",
    "LipschitzMonitor": "monitor",
    "LipschitzProjection": "projection",
    "LipschitzRegularizer": "regularizer",
}

if TYPE_CHECKING:
    from lipguard.callbacks.auditor import CheckpointAuditor
    from lipguard.callbacks.certified import CertifiedAccuracy
    from lipguard.callbacks.early_stopping import LipschitzEarlyStopping
    from lipguard.callbacks.monitor import LipschitzMonitor
    from lipguard.callbacks.projection import LipschitzProjection
    from lipguard.callbacks.regularizer import LipschitzRegularizer


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'lipguard.callbacks' has no attribute {name!r}; it has {', '.join(__all__)}.")
    from lipguard.callbacks.base import adopt_loaded_families

    adopt_loaded_families()
    return getattr(importlib.import_module(f"lipguard.callbacks.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
