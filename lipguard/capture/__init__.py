"""The reader: nn.Module -> Network, by running the module's forward once and lowering every call."""

from __future__ import annotations

from lipguard.capture.capture import capture, lowers, network_of
from lipguard.capture.trace import Trace, Value

__all__ = ["Trace", "Value", "capture", "lowers", "network_of"]
