"""Lightning callbacks."""

from lipguard.callbacks.auditor import CheckpointAuditor
from lipguard.callbacks.monitor import LipschitzMonitor

__all__ = ["CheckpointAuditor", "LipschitzMonitor"]
