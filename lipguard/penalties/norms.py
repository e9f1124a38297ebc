"""Differentiable norms of linear operators from 2 to 2, by power iteration that is carried on from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.network import Operator

_COLD = 300
"""Iterations at most from a random start, until two in a row differ by less than `_SETTLED`."""

_SETTLED = 1e-7


def operator_norm(operator: Operator, vector: Tensor | None, iterations: int) -> tuple[Tensor, Tensor | None]:
    """||operator||_{2 -> 2}, 0-d and attached to its weight, and the right singular vector found.

    Power iteration approaches the norm from below: a penalty, never a bound. A convolution is applied as it is, with
    its padding and strides, so that the norm is the convolution's own and not that of its flattened kernel.

    Args:
        operator: a linear map, (out, in).
        vector: right singular vector of a neighbouring operator, (in,); None for a start at random, iterated until settled.
        iterations: applications of W'W from `vector`.
    """
    known = operator.attached_norm(2)
    if known is not None:
        return known, None
    weight = operator.tensors()[0]
    with torch.no_grad():
        v = random_unit(operator.shape[1], weight) if vector is None else vector.to(weight)
        adjoint = operator.transpose()
        previous = 0.0
        for _ in range(_COLD if vector is None else iterations):
            step = adjoint(operator(v))
            length = torch.linalg.vector_norm(step)
            if not bool(length > 0):
                v = random_unit(operator.shape[1], weight)  # the start, or the operator, is 0
                break
            v = step / length
            if vector is None:
                value = float(length)
                if abs(value - previous) <= _SETTLED * value:
                    break
                previous = value
    # d||W|| = u' dW v with u = W v / ||W v||: the derivative of ||W v|| at fixed v.
    return torch.linalg.vector_norm(operator(v)), v


def random_unit(size: int, like: Tensor) -> Tensor:
    """A unit vector, the same for every call of one size, with the dtype and device of `like`."""
    v = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return (v / torch.linalg.vector_norm(v)).to(like)
