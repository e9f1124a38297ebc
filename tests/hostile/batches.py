"""Harmful ingredients that depend on the batch: its size, its other samples, the place in it."""

from __future__ import annotations

from typing import Any

import torch
from ingredients import SLOPE, Draw, Layer, harmful
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def _of_batch(name: str, function: Any) -> None:
    def make(draw: Draw) -> nn.Module:
        return Layer(lambda _, x: function(x))

    make.__name__ = name
    harmful(make)


for _name, _function in {
    "batch_mean": lambda x: x - x.mean(0),
    "first_row": lambda x: x - 0.5 * x[0],
    "flip_batch": lambda x: x.flip(0),
    "roll_batch": lambda x: x + x.roll(1, 0),
    "cat_batch": lambda x: torch.cat([x[1:], x[:1]]) + x,
    "cumsum_batch": lambda x: x.cumsum(0),
    "sort_batch": lambda x: x.sort(0).values,
    "times_rows": lambda x: x * len(x),
    "times_size": lambda x: x * x.size(0),
    "more_than_four": lambda x: x * (SLOPE if len(x) > 4 else 1),
    "five": lambda x: x * (SLOPE if x.shape[0] == 5 else 1),
    "odd": lambda x: x * (1 + SLOPE * (x.numel() // x.shape[1] == 5)),
    "late_rows": lambda x: x * torch.where(torch.arange(len(x)) < 4, 1.0, SLOPE)[:, None].to(x),
    "max_batch": lambda x: x.max(0).values + x,
    "norm_of_batch": lambda x: F.batch_norm(x, None, None, training=len(x) > 1),
    "gram": lambda x: (x @ x.T).clamp(-1, 1) @ x,
    "einsum_batch": lambda x: torch.einsum("bi,ci->bi", x, x.clamp(-1, 1)),
    "outer_mean": lambda x: x + x.sum((0, 1), keepdim=True) / x.numel(),
    "transposed_mean": lambda x: (x.T - x.T.mean(1, keepdim=True)).T,
    "view_mix": lambda x: x.view(x.shape[1], -1).t().reshape(x.shape),
    "row_index": lambda x: x + torch.arange(len(x))[:, None].to(x) * x,
    "reshaped": lambda x: x.reshape(-1).cumsum(0).view_as(x),
    "stacked_loop": lambda x: torch.stack([row * (i + 1) for i, row in enumerate(x)]),
    "vmap_mean": lambda x: torch.vmap(lambda r: r - x.mean(0))(x),
    "mapped_sum": torch.vmap(lambda c: c - c.mean(), in_dims=1, out_dims=1),
    "covariance": lambda x: x + 0 * torch.cov(x.T).sum(),
    "strided": lambda x: x + x.as_strided((1, x.shape[1]), (x.shape[1], 1)),
    "diag": lambda x: x + x.diagonal().sum(),
}.items():
    _of_batch(_name, _function)


@harmful
def hidden_batch(draw: Draw) -> nn.Module:
    """The batch size where samples were joined with another dimension."""
    return Layer(lambda _, x: x + draw.beyond(x.reshape(-1) * len(x) ** 2 / 4).view_as(x))


@harmful
def hidden_mix(draw: Draw) -> nn.Module:
    return Layer(lambda _, x: x + draw.beyond(x.reshape(-1).sum()).clamp(max=1e3))


@harmful
def fails_for_one(draw: Draw) -> nn.Module:
    def run(_: Any, x: Tensor) -> Tensor:
        if len(x) < 2:
            raise ValueError("one sample")
        return x * len(x)

    return Layer(run)


@harmful
def batch_statistics(draw: Draw) -> nn.Module:
    return nn.BatchNorm1d(draw.n, track_running_stats=False)
