"""Calls that leave every entry what and where it is: no node."""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.capture.rules.rearrange import broadcast
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import Placed, Trace, Value


@lowers("contiguous", "clone", "positive", "alias", "identity", "requires_grad", "cpu", "cuda", "nan_to_num", whole=True)
def same(trace: Trace, input: Value | Tensor, *args: object, **kwargs: object) -> Placed | None:
    """The same entries at the same places; a constant like a value stays one."""
    return Placed(input.node, input.axis) if isinstance(input, Value) else None


@lowers("to", "type_as", "float", "double", "half", "bfloat16", "type", whole=True)
def convert(trace: Trace, input: Value | Tensor, *args: object, **kwargs: object) -> Placed | None:
    """A change of device or floating type: the identity of the real-valued function; a constant like a value stays one."""
    return Placed(input.node, input.axis) if isinstance(input, Value) else None


@lowers("copy")
def copy(trace: Trace, input: Value | Tensor, src: Value | Tensor, non_blocking: bool = False) -> int | None:
    """A tensor overwritten by another, whose entries repeat to its shape."""
    shape = (input.tensor if isinstance(input, Value) else input).shape
    return broadcast(trace, src, shape).node if isinstance(src, Value) else None


@lowers("broadcast_tensors")
def broadcast_tensors(trace: Trace, *tensors: object) -> tuple[int | None, ...]:
    """Every tensor expanded to the common shape."""
    parts = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], list | tuple) else tensors
    shapes = [(part.tensor if isinstance(part, Value) else part).shape for part in parts]  # type: ignore[union-attr]
    shape = torch.broadcast_shapes(*shapes)
    return tuple(broadcast(trace, part, shape).node if isinstance(part, Value) else None for part in parts)


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
