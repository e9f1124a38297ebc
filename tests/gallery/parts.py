"""What the gallery's architectures are put together from: blocks that several of them share, in plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Specimen:
    """An architecture at a small size.

    Attributes:
        make: builds it, with weights as torch initialises them.
        shape: of one input.
        outputs: which result is bounded where it returns several.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    outputs: Any = None


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Residual(nn.Module):
    """shortcut(x) + scale * branch(x)."""

    def __init__(self, *branch: nn.Module, shortcut: nn.Module | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.branch, self.shortcut, self.scale = nn.Sequential(*branch), shortcut or nn.Identity(), scale

    def forward(self, x):
        return self.shortcut(x) + self.scale * self.branch(x)


class Concat(nn.Module):
    """Branches of one value, joined along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Several(nn.Module):
    """A trunk with named heads, returned as a dict."""

    def __init__(self, trunk: nn.Module, **heads: nn.Module) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleDict(heads)

    def forward(self, x):
        hidden = self.trunk(x)
        return {name: head(hidden) for name, head in self.heads.items()}


def cbr(c_in, c_out, kernel=3, stride=1, groups=1, act: Callable[[], nn.Module] | None = nn.ReLU, dims=2, dilation=1):
    """Convolution, BatchNorm, activation."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    padding = tuple(k // 2 * dilation for k in kernel) if isinstance(kernel, tuple) else kernel // 2 * dilation
    layers = [conv(c_in, c_out, kernel, stride, padding, dilation, groups, bias=False), norm(c_out)]
    return nn.Sequential(*layers, *([act()] if act else []))


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.ReLU, last: bool = False):
    """Linear layers with activations between them, and behind the last one on request."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b), *([act()] if last or i < len(sizes) - 2 else [])]
    return nn.Sequential(*layers)


def head(channels: int, classes: int = 4):
    """Global average pool and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
