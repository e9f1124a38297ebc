"""What a training batch holds: its first sample, its inputs and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["described", "first_sample", "inputs_and_labels"]


def first_sample(batch: object) -> Tensor | None:
    """The first sample, shape (1, ...), of the first floating-point tensor found in a batch; None if there is none.

    Args:
        batch: a tensor, or any nesting of sequences and mappings, searched in its own order.
    """
    if isinstance(batch, Tensor):
        return batch[:1].detach().clone() if batch.ndim and len(batch) and batch.is_floating_point() else None
    if isinstance(batch, Mapping):
        parts: Sequence[object] = list(batch.values())
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        parts = batch
    else:
        return None
    return next((found for part in parts if (found := first_sample(part)) is not None), None)


def inputs_and_labels(batch: object) -> tuple[Tensor | None, Tensor | None]:
    """The first floating-point tensor of a batch, and the first vector of integers of the same length; None where missing."""
    tensors = _tensors(batch)
    inputs = next((t for t in tensors if t.is_floating_point() and t.ndim > 0), None)
    whole = (t for t in tensors if t.dtype in (torch.int64, torch.int32) and t.ndim == 1)
    labels = next((t for t in whole if inputs is None or len(t) == len(inputs)), None)
    return inputs, None if labels is None else labels.long()


def described(batch: object) -> str:
    """The tensors of a batch, for messages."""
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{tuple(t.shape)}" for t in _tensors(batch)) or type(batch).__name__


def _tensors(batch: object) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else []
    return [tensor for part in parts for tensor in _tensors(part)]
