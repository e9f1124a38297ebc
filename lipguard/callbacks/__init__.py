"""Lightning callbacks."""

from lipguard.callbacks.auditor import CheckpointAuditor
from lipguard.callbacks.certified import CertifiedAccuracy
from lipguard.callbacks.monitor import LipschitzMonitor

__all__ = ["CertifiedAccuracy", "CheckpointAuditor", "LipschitzMonitor"]
