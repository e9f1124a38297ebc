"""The example input a callback captures the network with: from the module or from the first training batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lipguard.errors import InvalidExample

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["described", "first_sample", "inputs_and_labels", "module_example"]


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


def module_example(trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
    """The module's `example_input_array` on the module's device and in the Trainer's precision; None if it has none.

    Raises:
        InvalidExample: the module takes several inputs.
    """
    example = pl_module.example_input_array
    if isinstance(example, Mapping):
        example = tuple(example.values())
    if isinstance(example, Sequence):
        if len(example) != 1:
            raise InvalidExample(
                f"{type(pl_module).__name__}.example_input_array holds {len(example)} inputs, a Lipschitz constant is that of a "
                "function of one. Bound a submodule with submodule=..., and give its example=..."
            )
        example = example[0]
    if example is None:
        return None
    converted = trainer.precision_plugin.convert_input(torch.as_tensor(example).detach())
    return converted.to(pl_module.device)


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
