"""The smooth elementwise functions under one name; each has its file in `lipguard.network.activations`."""

from __future__ import annotations

from lipguard.network.activations.exponential import celu, elu, selu
from lipguard.network.activations.gelu import gelu, gelu_tanh
from lipguard.network.activations.hardswish import hardswish
from lipguard.network.activations.hyperbolic import tanh
from lipguard.network.activations.mish import mish
from lipguard.network.activations.sigmoids import logsigmoid, sigmoid
from lipguard.network.activations.silu import silu
from lipguard.network.activations.smooth import ERROR, NEAR, Critical, Smooth
from lipguard.network.activations.softplus import softplus
from lipguard.network.activations.softsign import softsign
from lipguard.network.activations.waves import Wave, cos, sin

__all__ = [
    "ERROR", "NEAR", "Critical", "Smooth", "Wave", "celu", "cos", "elu", "gelu", "gelu_tanh", "hardswish", "logsigmoid", "mish",
    "selu", "sigmoid", "silu", "sin", "softplus", "softsign", "tanh",
]  # fmt: skip
