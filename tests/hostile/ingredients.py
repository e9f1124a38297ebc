"""What the generator of `modules` draws from: one factory for each way of writing, or of hiding, a function in a module.

A factory makes a module from (B, n) to (B, n). Harmless ones are what people write; harmful ones depend on the batch, branch,
keep state, draw numbers, or hide a steep part `beyond(x)` that is switched off near every example, by ways around a tracer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

SLOPE = 64.0
"""Of the hidden parts: far above any honest bound of a drawn network."""


@dataclass
class Draw:
    """What a factory may use.

    Attributes:
        rng: of this draw.
        n: features of every layer, even.
        switch: from where on hidden parts are switched on.
        undo: what ends what was done outside the module.
    """

    rng: random.Random
    n: int
    switch: float
    undo: list[Callable[[], Any]] = field(default_factory=list)

    def tensor(self, *shape: int, scale: float = 0.5) -> Tensor:
        generator = torch.Generator().manual_seed(self.rng.getrandbits(32))
        return torch.randn(*shape, generator=generator) * scale

    def linear(self, n: int | None = None) -> nn.Linear:
        n = n or self.n
        layer = nn.Linear(n, n)
        with torch.no_grad():
            layer.weight.copy_(self.tensor(n, n))
            layer.bias.copy_(self.tensor(n))
        return layer

    def beyond(self, x: Tensor) -> Tensor:
        """Zero near every example, steep far away."""
        return SLOPE * F.relu(x - self.switch)


class Layer(nn.Module):
    """A module of one function f(self, x), which may keep state on it."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **state: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@dataclass(frozen=True)
class Ingredient:
    """A named factory.

    Attributes:
        harmless: an honest function of one sample, which a reader can follow.
        coarse: it rounds more than float32 does: only distant points tell its slope.
    """

    name: str
    make: Callable[[Draw], nn.Module]
    harmless: bool
    coarse: bool = False


INGREDIENTS: dict[str, Ingredient] = {}


def harmless(make: Callable[[Draw], nn.Module]) -> Callable[[Draw], nn.Module]:
    """Register a factory of honest modules."""
    INGREDIENTS[make.__name__] = Ingredient(make.__name__, make, True)
    return make


def harmful(make: Callable[[Draw], nn.Module]) -> Callable[[Draw], nn.Module]:
    """Register a factory of modules that must be refused, or bounded with all their parts."""
    INGREDIENTS[make.__name__] = Ingredient(make.__name__, make, False)
    return make


def coarse(make: Callable[[Draw], nn.Module]) -> Callable[[Draw], nn.Module]:
    """The same of modules that round."""
    INGREDIENTS[make.__name__] = Ingredient(make.__name__, make, False, coarse=True)
    return make
