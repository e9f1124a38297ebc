"""A layer with an activation of its own, and the network of the tests."""

from __future__ import annotations

import torch
from torch import nn

import lipguard as lg
from lipguard.network import Elementwise
from lipguard.network.activations import register


class Ripple(Elementwise):
    """z + sin(z) / 2: its derivative 1 + cos(z) / 2 lies in [1/2, 3/2]."""

    name = "plugin-ripple"

    def __call__(self, z):
        return z + z.sin() / 2

    @property
    def slopes(self):
        return torch.tensor(0.5, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)

    def slope_range(self, lower, upper):
        return torch.full_like(lower, 0.5), torch.full_like(upper, 1.5)


register(Ripple.name, Ripple)


class RippleLayer(nn.Module):
    def forward(self, x):
        return x + x.sin() / 2


@lg.lowers(RippleLayer)
def ripple(trace: lg.Trace, module: RippleLayer, x: lg.Value) -> int:
    return trace.activation(x, Ripple())


class Net(nn.Module):
    """3-6-2 with the layer above."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), RippleLayer(), nn.Linear(6, 2))

    def forward(self, x):
        return self.net(x)
