"""ONNX graphs as modules: `from_onnx`. The package `onnx` is an extra, `pip install lipguard[onnx]`."""

from __future__ import annotations

from lipguard.onnx.reading import from_onnx, weights_of

__all__ = ["from_onnx", "weights_of"]
