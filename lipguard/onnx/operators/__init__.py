"""The table of ONNX operators that are read: one function of torch calls each, one file for each family."""

from __future__ import annotations

from lipguard.onnx.operators import arithmetic, convolution, elementwise, pooling, resampling, shapes
from lipguard.onnx.operators.table import Unread, known, operator_of, several_of

__all__ = [
    "Unread", "arithmetic", "convolution", "elementwise", "known", "operator_of", "pooling", "resampling", "several_of", "shapes",
]  # fmt: skip
