"""What a training batch holds: its tensors by their keys, its first sample, its inputs and labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["at", "described", "first_row", "inputs_and_labels", "leaves"]

Path = tuple[Any, ...]
"""Keys and places that lead to a tensor in a batch."""


def leaves(batch: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in a nesting of mappings and sequences, in its order, and where it stands."""
    if isinstance(batch, Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, part in batch.items():
            yield from leaves(part, (*path, key))
    elif isinstance(batch, list | tuple):
        for place, part in enumerate(batch):
            yield from leaves(part, (*path, place))


def at(batch: Any, path: Path) -> Any:
    """What stands at a path."""
    for step in path:
        batch = batch[step]
    return batch


def first_row(batch: Any) -> Any:
    """The batch with every tensor of its rows cut to the first one, detached copies; other values as they are."""
    tensors = [tensor for _, tensor in leaves(batch) if tensor.ndim]
    rows = len(next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0])) if tensors else 0

    def cut(part: Any) -> Any:
        if isinstance(part, Tensor):
            return (part[:1] if part.ndim and len(part) == rows else part).detach().clone()
        if isinstance(part, Mapping):
            return {key: cut(one) for key, one in part.items()}
        if isinstance(part, list | tuple):
            parts = [cut(one) for one in part]
            return type(part)(*parts) if hasattr(part, "_fields") else type(part)(parts)
        return part

    return cut(batch)


def inputs_and_labels(batch: Any, path: Path | None = None) -> tuple[Tensor | None, Tensor | None]:
    """The input of a batch, and the first vector of integers of the same length; None where missing.

    Args:
        path: where the input stands; None for the first tensor of floating point.
    """
    tensors = [tensor for _, tensor in leaves(batch)]
    inputs = next((t for t in tensors if t.is_floating_point() and t.ndim > 0), None) if path is None else at(batch, path)
    whole = (t for t in tensors if t.dtype in (torch.int64, torch.int32) and t.ndim == 1)
    labels = next((t for t in whole if inputs is None or len(t) == len(inputs)), None)
    return inputs, None if labels is None else labels.long()


def described(batch: Any) -> str:
    """The tensors of a batch with their keys, for messages."""
    told = (
        f"{'.'.join(map(repr, path))}{': ' if path else ''}{str(t.dtype).removeprefix('torch.')}{tuple(t.shape)}"
        for path, t in leaves(batch)
    )
    return ", ".join(told) or type(batch).__name__
