"""Calls that leave every entry what and where it is: no node."""

from __future__ import annotations

from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import Placed, Trace, Value


@lowers("contiguous", "clone", "positive", "alias", "identity", "requires_grad", "cpu", "cuda", whole=True)
def same(trace: Trace, input: Value, *args: object, **kwargs: object) -> Placed:
    """The same entries at the same places."""
    return Placed(input.node, input.axis)


@lowers("to", "type_as", "float", "double", "half", "bfloat16", "type", whole=True)
def convert(trace: Trace, input: Value, *args: object, **kwargs: object) -> Placed:
    """A change of device or floating type: the identity of the real-valued function."""
    return Placed(input.node, input.axis)


@lowers("detach", whole=True)
def detach(trace: Trace, input: Value) -> Placed:
    """The value itself; only its gradient differs."""
    return Placed(input.node, input.axis)


@lowers("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout", whole=True)
def dropout(
    trace: Trace, input: Value, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True
) -> Placed:
    """Nothing, in evaluation."""
    if training and train and p > 0:
        trace.refuse("drops entries at random even in evaluation: it is not a function. Pass training=self.training.")
    return Placed(input.node, input.axis)
