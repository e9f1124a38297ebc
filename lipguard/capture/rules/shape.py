"""Calls that leave every sample's entries, read in row-major order, as they are: no node.

`Trace` checks of every result that the batch dimension stays first and that no entry is lost.
"""

from __future__ import annotations

import torch

from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import Trace, Value


@lowers("flatten", "reshape", "view_as", "reshape_as", "unflatten", "ravel", "squeeze", "unsqueeze", "contiguous", "clone",
        "positive", "alias", "identity", "expand_as", "requires_grad", "cpu", "cuda")  # fmt: skip
def same(trace: Trace, input: Value, *args: object, **kwargs: object) -> int:
    """The same entries in the same order."""
    return input.node


@lowers("to", "type_as", "float", "double", "half", "bfloat16", "type")
def convert(trace: Trace, input: Value, *args: object, **kwargs: object) -> int:
    """A change of device or floating type: the identity of the real-valued function."""
    return input.node


@lowers("detach")
def detach(trace: Trace, input: Value) -> int:
    """The value itself; only its gradient differs."""
    return input.node


@lowers("view")
def view(trace: Trace, input: Value, *shape: object, **kwargs: object) -> int:
    """view with a shape; view with a dtype reads the bits anew."""
    if isinstance((*shape, *kwargs.values())[0], torch.dtype):
        trace.refuse("reads the bits of its input as another type: it is not a function of real numbers.")
    return input.node


@lowers("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout")
def dropout(trace: Trace, input: Value, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True) -> int:
    """Nothing, in evaluation."""
    if training and train and p > 0:
        trace.refuse("drops entries at random even in evaluation: it is not a function. Pass training=self.training.")
    return input.node
