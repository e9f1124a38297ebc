"""The reader: nn.Module -> Network, by running the module's forward once and lowering every call."""

from __future__ import annotations

from lipguard.capture.capture import capture, lowers, network_of
from lipguard.capture.trace import Trace, Value
from lipguard.capture.ways import Model

__all__ = ["Model", "Trace", "Value", "capture", "lowers", "network_of"]
