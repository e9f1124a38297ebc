"""Lightning callbacks."""

from lipguard.callbacks.monitor import LipschitzMonitor

__all__ = ["LipschitzMonitor"]
