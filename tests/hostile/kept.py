"""Harmful ingredients that keep state from call to call, or draw numbers."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import numpy as np
import torch
from ingredients import SLOPE, Draw, Layer, harmful
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrize


def _kept(name: str, run: Any, **state: Any) -> None:
    def make(draw: Draw) -> nn.Module:
        return Layer(lambda self, x: run(self, x, draw), **copy.deepcopy(state))

    make.__name__ = name
    harmful(make)


def _result_kept(self: Any, x: Tensor, draw: Draw) -> Tensor:
    if self.kept is None or self.kept.shape != x.shape:
        self.kept = draw.beyond(x.detach())
    return x + self.kept


def _previous(self: Any, x: Tensor, draw: Draw) -> Tensor:
    y = x * (1 + draw.beyond(self.kept).mean())
    self.kept = x.detach().mean()
    return y


def _running(self: Any, x: Tensor, draw: Draw) -> Tensor:
    self.kept = 0.9 * self.kept + 0.1 * x.detach().mean(0)
    return x + draw.beyond(self.kept)


def _counted(self: Any, x: Tensor, draw: Draw) -> Tensor:
    self.calls += 1
    return x * (SLOPE if self.calls > 20 else 1)


def _alternating(self: Any, x: Tensor, draw: Draw) -> Tensor:
    self.calls += 1
    return x * (SLOPE if self.calls % 2 else 1)


def _counted_tensor(self: Any, x: Tensor, draw: Draw) -> Tensor:
    self.count += 1
    return x * torch.where(self.count > 20, SLOPE, 1.0)


_kept("result_kept", _result_kept, kept=None)
_kept("previous", _previous, kept=torch.zeros(()))
_kept("running", _running, kept=torch.zeros(()))
_kept("counted", _counted, calls=0)
_kept("alternating", _alternating, calls=0)
_kept("counted_tensor", _counted_tensor, count=torch.zeros(()))
_kept("random_branch", lambda self, x, draw: x * (SLOPE if random.random() < 0.03 else 1))
_kept("random_number", lambda self, x, draw: x * (SLOPE if float(torch.rand(())) < 0.03 else 1))
_kept("random_array", lambda self, x, draw: x * (SLOPE if np.random.rand() < 0.03 else 1))  # noqa: NPY002
_kept("random_mask", lambda self, x, draw: x * torch.where(torch.rand(x.shape[1]) < 0.01, SLOPE, 1.0).to(x))
_kept("random_bernoulli", lambda self, x, draw: x * (1 + SLOPE * torch.bernoulli(torch.full((x.shape[1],), 0.01))).to(x))
_kept("noise", lambda self, x, draw: x + torch.randn_like(x))
_kept("always_dropout", lambda self, x, draw: F.dropout(x, 0.3, training=True))
_kept("random_order", lambda self, x, draw: x[:, torch.randperm(x.shape[1])])


@harmful
def closure_count(draw: Draw) -> nn.Module:
    count = itertools.count()
    return Layer(lambda _, x: x * (SLOPE if next(count) % 3 == 2 else 1))


@harmful
def closure_previous(draw: Draw) -> nn.Module:
    kept: list[Tensor] = [torch.zeros(())]

    def run(_: Any, x: Tensor) -> Tensor:
        y = x * (1 + draw.beyond(kept[-1]).mean())
        kept.append(x.detach().mean())
        return y

    return Layer(run)


@harmful
def odd_parameter(draw: Draw) -> nn.Module:
    """A parametrized weight that is made from the input of the call before."""
    layer = draw.linear()
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _, args, y: seen.append(args[0].detach().mean()))
    parametrize.register_parametrization(
        layer, "weight", Layer(lambda _, w: w + (draw.beyond(seen[-1]) if seen else 0)), unsafe=True
    )
    return layer
