"""Lightning callbacks."""

from lipguard.callbacks.auditor import CheckpointAuditor
from lipguard.callbacks.certified import CertifiedAccuracy
from lipguard.callbacks.early_stopping import LipschitzEarlyStopping
from lipguard.callbacks.monitor import LipschitzMonitor
from lipguard.callbacks.projection import LipschitzProjection
from lipguard.callbacks.regularizer import LipschitzRegularizer

__all__ = [
    "CertifiedAccuracy",
    "CheckpointAuditor",
    "LipschitzEarlyStopping",
    "LipschitzMonitor",
    "LipschitzProjection",
    "LipschitzRegularizer",
]
