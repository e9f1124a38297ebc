"""`torch.vmap` inside a forward, followed: the function runs on one element after the other.

Inside `vmap` tensors are wrapped, so that the function's own calls would be seen on tensors that no table holds. While a module
is read, the implementation that every spelling of `vmap` calls is therefore replaced. Where the mapped dimension is the batch,
the function is by definition the same for every sample: it is followed on the first, and its result is the batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._functorch import apis
from torch._functorch.vmap import _process_batched_inputs
from torch.utils._pytree import TreeSpec, _broadcast_to_and_flatten, tree_flatten, tree_unflatten

from lipguard.capture.taint import tensors_of
from lipguard.errors import UnsupportedLayer

if TYPE_CHECKING:
    from lipguard.capture.tracer import Tracer

_UNEQUAL = "maps over the samples of a batch together with a tensor that differs from one to the next."


@contextmanager
def followed(tracer: Tracer) -> Iterator[None]:
    """While a module is read by the tracer."""
    original: Callable[..., Any] = vars(apis)["vmap_impl"]

    def vmap_impl(
        func: Callable[..., Any], in_dims: Any, out_dims: Any, randomness: str, chunk_size: Any, *args: Any, **kwargs: Any
    ) -> Any:
        def whole() -> Any:
            return original(func, in_dims, out_dims, randomness, chunk_size, *args, **kwargs)

        if tracer.taint.asleep or not tracer.taint.touches((args, kwargs)):
            return whole()
        count, dims, leaves, spec = _process_batched_inputs(in_dims, args, func)
        try:
            first = _first_sample(tracer, dims, leaves)
        except UnsupportedLayer as error:
            with tracer.asleep():
                result = whole()
            for part in tensors_of(result):
                tracer.learn(part, error)
            return result
        if first is not None:
            one = func(*tree_unflatten(first, spec), **kwargs)
            with tracer.asleep():
                result = whole()
            seen, shape = tree_flatten(one)
            for part, sample, end in zip(tree_flatten(result)[0], seen, _ends(out_dims, shape), strict=True):
                tracer.learn_batch(part, sample, end % part.ndim)
            return result
        rows = [
            func(*tree_unflatten([t if d is None else t.select(d, i) for t, d in zip(leaves, dims, strict=True)], spec), **kwargs)
            for i in range(count)
        ]
        shape = tree_flatten(rows[0])[1]
        columns = zip(*(tree_flatten(row)[0] for row in rows), strict=True)
        ends = _ends(out_dims, shape)
        return tree_unflatten([torch.stack(list(c), end) for c, end in zip(columns, ends, strict=True)], shape)

    with patch.object(apis, "vmap_impl", vmap_impl):
        yield


def _first_sample(tracer: Tracer, dims: list[int | None], leaves: list[Any]) -> list[Any] | None:
    """The arguments of the first sample, entered as values of one sample; None where another dimension is mapped.

    Raises:
        UnsupportedLayer: a mapped tensor is held by no node, or is no batch beside one that is.
    """
    values = [tracer.value(t) if isinstance(t, Tensor) else None for t in leaves]
    mapped = [v for v, d in zip(values, dims, strict=True) if d is not None]
    on_batch = [v is not None and v.axis == d for v, d in zip(values, dims, strict=True) if d is not None]
    if tracer.rows == 1 or not any(on_batch):
        return None
    if not all(on_batch) or len(mapped) == 0:
        tracer.trace.refuse(_UNEQUAL)
    first: list[Any] = []
    for tensor, d, value in zip(leaves, dims, values, strict=True):
        if d is None or value is None:
            first.append(tensor)
            continue
        with tracer.asleep():
            sample = tensor.select(d, 0).clone()
        tracer.learn(sample, value.node, None)
        first.append(sample)
    return first


def _ends(out_dims: Any, shape: TreeSpec) -> list[int]:
    """The dimension at which each result of the function is stacked."""
    ends = _broadcast_to_and_flatten(out_dims, shape)
    return [out_dims] * shape.num_leaves if ends is None else [int(end) for end in ends if end is not None]
