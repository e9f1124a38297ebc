"""lipguard: verified Lipschitz bounds while a network trains.

The public names are resolved on first use, so that `import lipguard` loads neither Lightning nor a solver.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.2.0"

__all__ = [
    "Ball",
    "Box",
    "Certificate",
    "CertifiedAccuracy",
    "CheckpointAuditor",
    "Enclosure",
    "LipschitzEarlyStopping",
    "LipschitzMonitor",
    "LipschitzProjection",
    "LipschitzRegularizer",
    "Network",
    "Query",
    "Robustness",
    "Trace",
    "Tracker",
    "Value",
    "bound",
    "capture",
    "certify",
    "exact",
    "explain",
    "from_onnx",
    "load",
    "lowers",
    "verify",
]

_HOMES = {
    "Ball": "certificate",
    "Box": "certificate",
    "Certificate": "certificate",
    "CertifiedAccuracy": "callbacks",
    "CheckpointAuditor": "callbacks",
    "Enclosure": "certificate",
    "LipschitzEarlyStopping": "callbacks",
    "LipschitzMonitor": "callbacks",
    "LipschitzProjection": "callbacks",
    "LipschitzRegularizer": "callbacks",
    "Network": "network",
    "Query": "query",
    "Robustness": "bounds.robustness",
    "Trace": "capture.trace",
    "Tracker": "bounds.tracker",
    "Value": "capture.trace",
    "bound": "bounds",
    "capture": "capture",
    "certify": "bounds.robustness",
    "exact": "exact",
    "explain": "bounds.explain",
    "from_onnx": "onnx",
    "load": "certificate",
    "lowers": "capture",
    "verify": "verify",
}

if TYPE_CHECKING:
    from lipguard.bounds import bound
    from lipguard.bounds.explain import explain
    from lipguard.bounds.robustness import Robustness, certify
    from lipguard.bounds.tracker import Tracker
    from lipguard.callbacks import (
        CertifiedAccuracy,
        CheckpointAuditor,
        LipschitzEarlyStopping,
        LipschitzMonitor,
        LipschitzProjection,
        LipschitzRegularizer,
    )
    from lipguard.capture.capture import capture, lowers
    from lipguard.capture.trace import Trace, Value
    from lipguard.certificate import Ball, Box, Certificate, Enclosure, load
    from lipguard.exact import exact
    from lipguard.network import Network
    from lipguard.onnx import from_onnx
    from lipguard.query import Query
    from lipguard.verify import verify


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds each submodule in its package; a function of the same name (exact, verify) keeps its place.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


_SUBMODULES = ("audit", "callbacks", "errors", "nn", "penalties", "registry")


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"lipguard.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'lipguard' has no attribute {name!r}; it has {', '.join([*__all__, *_SUBMODULES])}.")
    value = getattr(importlib.import_module(f"lipguard.{_HOMES[name]}"), name)
    if _HOMES[name] != "callbacks":  # those are looked up anew each time: see lipguard.callbacks
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
