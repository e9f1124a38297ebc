"""A network as mathematics: nodes in topological order, affine maps, activations, sums, coupled and implicit ones.

Values are vectors, one row per sample; everything is float64. A `Network` evaluates itself and carries a digest of its
structure and exact weight bits. How it is read from a module stands in `lipguard.capture`, what provers make of it in
`lipguard.programs`.
"""

from __future__ import annotations

from lipguard.network.activations import Elementwise
from lipguard.network.coupled import Coupling
from lipguard.network.network import Network
from lipguard.network.nodes import Activation, Affine, Coupled, Implicit, Input, Node, Sum
from lipguard.network.operators import Conv, Dense, Diagonal, Index, Operator
from lipguard.network.walk import Adjoint, Linear, Walk

__all__ = [
    "Activation", "Adjoint", "Affine", "Conv", "Coupled", "Coupling", "Dense", "Diagonal", "Elementwise", "Implicit", "Index",
    "Input", "Linear", "Network", "Node", "Operator", "Sum", "Walk",
]  # fmt: skip
