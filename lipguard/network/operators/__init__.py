"""Linear operators on row vectors, a kind to a file: application, transpose, norms, dense form, record form."""

from __future__ import annotations

from lipguard.network.operators.base import Operator, Shape
from lipguard.network.operators.conv import Conv
from lipguard.network.operators.dense import Dense
from lipguard.network.operators.diagonal import Diagonal
from lipguard.network.operators.index import Index

__all__ = ["KINDS", "Conv", "Dense", "Diagonal", "Index", "Operator", "Shape"]

KINDS: dict[str, type[Operator]] = {"Conv": Conv, "Dense": Dense, "Diagonal": Diagonal, "Index": Index}
"""The kinds that a record may hold, by the name that stands in it."""
