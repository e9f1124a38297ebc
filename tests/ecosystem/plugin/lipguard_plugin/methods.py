"""A bound method: the product of norms, which counts the calls that went on from an earlier state."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lipguard.bounds import Method
from lipguard.bounds.spectral import Spectral


@dataclass(frozen=True)
class PluginNorms(Method):
    strength: float = 1.0

    name = "plugin-norms"

    def __call__(self, network, query, state=None):
        certificate, _ = Spectral()(network, query)
        count = 0 if state is None else state + 1
        return replace(certificate, method=self.name, details={"calls": float(count), "strength": self.strength}), count
