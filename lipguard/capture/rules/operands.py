"""Calls made of other calls: each step by its own rule, whichever of the operands depends on the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipguard.capture.rules.registry import canonical, function_rule
from lipguard.capture.trace import BatchMoved, Placed, Trace, Value
from lipguard.network.operators import Dense

Operand = Value | Tensor | float | int

_LIMIT = 2**26
"""Largest number of entries of a matrix that is made by running a linear call on a basis: 512 MiB."""


def applied(trace: Trace, function: Callable[..., Tensor], *operands: Operand, **options: Any) -> Any:
    """What a torch function makes of values and constants: a value by the function's rule, or a constant in float64."""
    exact = [trace.constant(o, "constant") if isinstance(o, Tensor) and o.is_floating_point() else o for o in operands]
    plain = [o.tensor.detach().to(torch.float64) if isinstance(o, Value) else o for o in exact]
    tensor = function(*plain, **options)
    if not any(isinstance(o, Value) for o in operands):
        return tensor
    rule = function_rule(canonical(function))
    assert rule is not None
    node = rule(trace, *exact, **options)
    if isinstance(node, Placed):  # of one sample a dimension in front of it is no other dimension of samples
        if node.axis != 0 and any(o.rows > 1 for o in operands if isinstance(o, Value)):
            raise BatchMoved(f"{trace.place} moves the samples of a batch to dimension {node.axis}. Keep them the first.")
        node = node.node
    assert isinstance(node, int)
    return trace.value(node, tensor)


def node_of(trace: Trace, operand: Operand) -> int:
    """The node of a result that is known to depend on the input."""
    if not isinstance(operand, Value):
        trace.refuse("does not depend on the input through the operand that holds it.")
    return operand.node


def by_basis(trace: Trace, x: Value, function: Callable[[Tensor], Tensor]) -> int:
    """A linear function of every sample, given by what it makes of the samples of a basis, (size, ...), in float64.

    Its matrix has a column for every entry of a sample: for calls without a structure that a bound could use.
    """
    check_size(trace, x.size * x.size)
    eye = torch.eye(x.size, dtype=torch.float64, device=x.tensor.device).reshape(x.size, *x.tensor.shape[1:])
    rows = function(eye)
    # Whether every sample is treated alike is seen from the basis in another order.
    if rows.ndim == 0 or len(rows) != x.size or not torch.allclose(function(eye.flip(0)), rows.flip(0), 1e-12, 1e-12):
        trace.refuse("mixes the samples of a batch, or treats them differently.")
    check_size(trace, rows.numel())
    return trace.affine(x, Dense(rows.reshape(x.size, -1).T.contiguous()))


def check_size(trace: Trace, entries: int) -> None:
    """Refuse a matrix of more entries than memory should hold."""
    if entries > _LIMIT:
        trace.refuse(f"repeats its weight over so many positions that the matrix would have {entries} entries (limit {_LIMIT}).")
