"""Harmless ingredients of one expression."""

from __future__ import annotations

import logging
from typing import Any

import torch
from ingredients import Draw, Layer, harmless
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint


def _plain(name: str, function: Any) -> None:
    """An ingredient of one function of x."""

    def make(draw: Draw) -> nn.Module:
        return Layer(lambda _, x: function(x))

    make.__name__ = name
    harmless(make)


for _name, _function in {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "abs": torch.abs,
    "elu": F.elu,
    "hardtanh": F.hardtanh,
    "softplus": F.softplus,
    "clamp": lambda x: x.clamp(-0.5, 100.0),
    "sine": torch.sin,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "neg": lambda x: -x,
    "skip": lambda x: x + F.relu(x),
    "rsub": lambda x: 1 - x,
    "alpha": lambda x: torch.sub(x, x.abs(), alpha=2),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "cumsum": lambda x: x.cumsum(-1),
    "mean": lambda x: x - x.mean(1, True),
    "sort": lambda x: x.sort(-1).values,
    "maxmin": lambda x: torch.cat([torch.maximum(*x.chunk(2, 1)), torch.minimum(*x.chunk(2, -1))], 1),
    "pad": lambda x: F.pad(x, (1, 1))[:, 1:-1],
    "down_up": lambda x: (x * 1e-8) * 1e8,
    "huge_mask": lambda x: F.relu(x - 1e9) + x,
    "double_inside": lambda x: F.relu(x.double() * 2).to(x.dtype),
    "detached": lambda x: F.relu(x.detach()),
    "text": lambda x: (x, f"{x.shape}")[0],
    "logged": lambda x: (x * 2, logging.getLogger("net").debug("%s", x))[0],
    "rank": lambda x: x * (1 if x.dim() == 2 else 3),
    "rows_loop": lambda x: torch.stack([F.relu(row) * 2 for row in x]),
    "unbound": lambda x: torch.stack(x.unbind(0)) * 2,
    "columns": lambda x: torch.stack([c * (i + 1) for i, c in enumerate(x.unbind(1))], 1),
    "vmapped": torch.vmap(lambda row: F.relu(row) - row.mean()),
    "transposed": lambda x: F.relu(x.T).T * 2,
    "mapped_columns": torch.vmap(torch.relu, in_dims=1, out_dims=1),
    "pooled": lambda x: F.avg_pool1d(x[:, None], 3, 1, 1)[:, 0],
    "max_pooled": lambda x: F.max_pool1d(x[:, None], 2).repeat(1, 1, 2)[:, 0],
    "nearest": lambda x: F.interpolate(x[:, None, ::2], scale_factor=2)[:, 0],
    "no_dropout": lambda x: F.dropout(x, 0.5, training=False),
    "inplace": lambda x: (x * 2).relu_().add_(1).mul_(0.5),
    "zeros_like": lambda x: x + torch.zeros_like(x),
    "empty_then_filled": lambda x: x + torch.empty_like(x).fill_(3.0),
    "unsqueezed": lambda x: x.unsqueeze(0).transpose(0, 1).squeeze(1),
    "expanded": lambda x: x[:, :1].expand(-1, x.shape[1]) + x,
    "checkpointed": lambda x: checkpoint(lambda z: F.relu(z) * 2, x, use_reentrant=False),
    "where_relu": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked_relu": lambda x: x * (x > 0),
    "lerp": lambda x: torch.lerp(x, F.relu(x), 0.3),
    "graded": torch.enable_grad()(F.relu),
    "joined_rows": lambda x: F.relu(x.reshape(-1, 2)).reshape(len(x), -1),
    "ones_row": lambda x: x @ torch.ones(x.shape[1], x.shape[1]).to(x),
    "shape_assert": lambda x: x * 2 if len(x.shape) == 2 and x.shape[1] > 1 else None,
    "sum_and_back": lambda x: x.sum(1, keepdim=True) + x,
}.items():
    _plain(_name, _function)
