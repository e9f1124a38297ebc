"""The product of norms where branches meet: concatenations, slices and shared encoders have constants by formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_capture_convolutions import Do
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lipguard as lg
from lipguard.network import Activation, Affine, Network
from lipguard.verify.norms.product import product_bound

# name: function of (batch, 6), its constants in 1, 2 and inf, all attained
KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float, float]]] = {
    "two copies": (lambda x: torch.cat([x, x], 1), (2, math.sqrt(2), 1)),
    "copies of 3 and 4": (lambda x: torch.cat([3 * x, (4 * x).relu()], 1), (7, 5, 4)),
    "three and one": (lambda x: torch.stack([x, 2 * x, 2 * x, -x], 1), (6, math.sqrt(10), 2)),
    "halves exchanged": (lambda x: torch.cat([x[:, 3:], x[:, :3]], 1), (1, 1, 1)),
    "half passes by": (lambda x: torch.cat([x[:, :3], 5 * x[:, 3:].relu()], 1), (5, 5, 5)),
    "half passes by, shuffled, twice": (
        lambda x: (lambda y: torch.cat([y[:, :2] * 3, y[:, 2:].relu()], 1))(
            torch.cat([x[:, :3], 2 * x[:, 3:].relu()], 1)[:, [3, 4, 0, 1, 5, 2]]),
        (6, 6, 6)),
    "slices that overlap": (lambda x: torch.cat([x[:, :4], x[:, 2:]], 1), (2, math.sqrt(2), 1)),
    "slices of a third and 0.7": (lambda x: torch.cat([x[:, :4] / 3, 0.7 * x[:, 2:].relu()], 1),
        (1 / 3 + 0.7, math.hypot(1 / 3, 0.7), 0.7)),
    "difference of halves": (lambda x: x[:, :3] - x[:, 3:], (1, math.sqrt(2), 2)),
    "3 and 4 of halves": (lambda x: 3 * x[:, :3] + 4 * x[:, 3:].relu(), (4, 5, 7)),
    "residual": (lambda x: x + 2 * x.relu(), (3, 3, 3)),
    "padded residual": (lambda x: F.pad(x[:, ::2], (0, 3)) + F.pad(2 * x[:, 1::2], (3, 0)), (2, 2, 2)),
    "constants beside": (lambda x: torch.cat([x, torch.ones(len(x), 2), x.relu()], 1), (2, math.sqrt(2), 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_constants_known_by_formula(name: str) -> None:
    function, constants = KNOWN[name]
    network = lg.capture(Do(function), torch.zeros(1, 6, dtype=torch.float64))
    for norm, constant in zip((1, 2, math.inf), constants, strict=True):
        upper = lg.bound(network, method="spectral", norm=norm)
        # the roots and sums of the expected value are themselves rounded
        assert constant * (1 - 1e-15) <= upper.value <= constant * (1 + 1e-12)
        assert lg.bound(network, method="sampling", norm=norm).value == pytest.approx(constant, rel=1e-9)


def plain(network: Network, factors: dict[int, float]) -> float:
    """Norms multiplied along the graph and added where branches meet, whatever the places."""
    bounds = [1.0]
    for i, node in enumerate(network.nodes[1:], start=1):
        if isinstance(node, Affine | Activation):
            bounds.append(bounds[node.source] * factors[i])
        else:
            bounds.append(sum(bounds[s] for s in node.sources))  # type: ignore[union-attr]
    return bounds[-1]


@st.composite
def branching(draw: st.DrawFn) -> nn.Module:
    """Splits, joins, shuffles, sums and layers in any order on eight entries."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    steps = draw(
        st.lists(st.sampled_from(["split", "cat", "residual", "shuffle", "layer", "halves", "nested"]), min_size=1, max_size=5)
    )
    layers = [nn.ModuleList([nn.Linear(n, n) for n in (8, 4, 4, 2)]) for _ in steps]
    orders = [torch.randperm(8) for _ in steps]
    cut = draw(st.integers(1, 7))

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            for step, own, order in zip(steps, self.layers, orders, strict=True):
                wide, first, second, narrow = own  # type: ignore[misc]
                a, b = x[:, :4], x[:, 4:]
                if step == "split":
                    x = torch.cat([a, first(b).relu()], 1)
                elif step == "cat":
                    x = torch.cat([x[:, :cut], wide(x).relu()[:, cut:]], 1)
                elif step == "residual":
                    x = (x + wide(x)).relu()
                elif step == "shuffle":
                    x = x[:, order]
                elif step == "layer":
                    x = wide(x).tanh()
                elif step == "halves":
                    x = torch.cat([first(a) - second(b), b.relu()], 1)
                else:
                    c, d = a[:, :2], a[:, 2:]
                    x = torch.cat([narrow(c).relu(), d, first(b) + second(b).relu()], 1)
            return x

    return Branching().double()


@given(model=branching())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_never_below_a_jacobian_never_above_the_plain_product(model: nn.Module) -> None:
    network = lg.capture(model, torch.zeros(1, 8, dtype=torch.float64))
    model.requires_grad_(False)
    x = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: model(z[None])[0]))(x)
    for p in (1.0, 2.0, math.inf):
        factors = {
            i: float(torch.linalg.matrix_norm(n.operator.dense(), p)) if isinstance(n, Affine) else 1.0
            for i, n in enumerate(network.nodes)
            if isinstance(n, Affine | Activation)
        }
        bound = product_bound(network, factors, p)
        assert bound <= plain(network, factors) * (1 + 1e-12)
        assert float(torch.linalg.matrix_norm(jacobian, p).max()) <= bound * (1 + 1e-12)
