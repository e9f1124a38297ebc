"""New kinds, defined here as a user or a later change would: they work where they are known and are refused by name elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lipguard as lg
from lipguard.audit.recipe import captured, rebuild
from lipguard.errors import UnsupportedLayer, UnsupportedQuery
from lipguard.network import Affine, Dense, Input, Linear, Network, Operator
from lipguard.network.activations import Elementwise, register
from lipguard.network.nodes import Reader
from lipguard.network.record import write_part
from lipguard.penalties.spectral import spectral


class Bent(Elementwise):
    """z / (1 + |z|) + z / 2: slopes in (1/2, 3/2]."""

    name = "test-bent"

    def __call__(self, z: Tensor) -> Tensor:
        return z / (1 + z.abs()) + z * 0.5

    @property
    def slopes(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(0.5, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)

    def slope_range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(lower, 0.5), torch.full_like(lower, 1.5)


class Unnamed(Bent):
    name = "test-unnamed"


register(Bent.name, Bent)


class BentLayer(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z / (1 + z.abs()) + z * 0.5


class UnnamedLayer(BentLayer):
    pass


@lg.lowers(BentLayer)
def bent(trace: lg.Trace, module: BentLayer, v: lg.Value) -> int:
    return trace.activation(v, Bent())


@lg.lowers(UnnamedLayer)
def unnamed(trace: lg.Trace, module: UnnamedLayer, v: lg.Value) -> int:
    return trace.activation(v, Unnamed())


def model(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), layer, nn.Linear(5, 2))


def test_a_registered_activation_is_rebuilt_from_its_record() -> None:
    module = model(BentLayer())
    network, recipe = captured(module, torch.zeros(1, 3))
    again = rebuild(recipe, module.state_dict())
    x = torch.randn(4, 3, dtype=torch.float64)
    assert again.digest == network.digest and torch.equal(again(x), network(x))


def test_an_activation_without_a_registered_name_is_refused_with_the_line_to_type() -> None:
    with pytest.raises(UnsupportedLayer, match=r"activations\.register\('test-unnamed', Unnamed\)"):
        captured(model(UnnamedLayer()), torch.zeros(1, 3))


def test_a_name_determines_its_function() -> None:
    register(Bent.name, Bent)
    with pytest.raises(UnsupportedLayer, match="stands for"):
        register(Bent.name, Unnamed)

    class Impostor(Bent):
        name = "tanh"

    lg.capture(nn.Tanh(), torch.zeros(1, 2))
    with pytest.raises(UnsupportedLayer, match="another activation is registered"):
        Impostor().to_record()


@dataclasses.dataclass(frozen=True, eq=False)
class Doubled(Operator):
    """x -> (weight x, weight x): an operator of another package, with what every operator answers and no more."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return 2 * self.weight.shape[0], self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def terms(self) -> int:
        return self.weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.dense().T

    def transpose(self) -> Dense:
        return Dense(self.dense().T)

    def abs(self) -> Doubled:
        return Doubled(self.weight.abs())

    def dense(self) -> Tensor:
        return torch.cat([self.weight, self.weight])

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)


def test_a_new_operator_is_bounded_and_kept_out_of_records() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    network = Network((Input(2), Affine(0, Doubled(weight))))
    for method in ("spectral", "lipsdp-neuron", "sampling"):
        assert lg.bound(network, method=method).value == pytest.approx(18**0.5, rel=1e-6)
    assert float(spectral(network)[0].exp()) == pytest.approx(18**0.5, rel=1e-5)
    with pytest.raises(UnsupportedLayer, match="Doubled cannot be stored in a record"):
        write_part(network.nodes[1], lambda tensor: None)


@dataclasses.dataclass(frozen=True, eq=False)
class Halved(Reader):
    """x / 2 as a kind of node of its own, which no walk has a method for."""

    source: int
    name: str = "half"

    def value(self, *read: Tensor) -> Tensor:
        return read[0] / 2

    def structure(self) -> str:
        return f"halved {self.source}"


def test_a_new_kind_of_node_evaluates_and_is_refused_by_name_where_it_is_not_known() -> None:
    network = Network((Input(2), Halved(0)))  # pyright: ignore[reportArgumentType] - a kind that is not in `Node` yet
    assert torch.equal(network(torch.ones(1, 2)), torch.full((1, 2), 0.5, dtype=torch.float64)) and network.outputs == 2
    with pytest.raises(UnsupportedQuery, match="half: no differentiable norm is known of a halved layer"):
        spectral(network)


def test_a_walk_may_say_what_it_makes_of_kinds_that_it_does_not_know() -> None:
    class Forgiving(Linear):
        def input(self, i: int, node: Input) -> Tensor:
            return torch.ones(1, node.size, dtype=torch.float64)

        def other(self, i: int, node: object, *read: Tensor) -> Tensor:
            return read[0] * 7

    make: Callable[..., Network] = Network
    assert float(make((Input(1), Halved(0))).fold(Forgiving())[-1]) == 7.0
