"""Softmax, log-sum-exp and lengths: norms of sampled Jacobians, magnitudes, witnesses, and what they are refused for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lipguard as lg
from lipguard import errors
from lipguard.audit.recipe import captured, rebuild
from lipguard.certificate import Certificate, Witness
from lipguard.network import Coupled, Input, Network
from lipguard.network.contraction import Contraction, Length, LogSumExp, Softmax

INDEX = torch.tensor([[4, 0, 2], [1, 5, 3]])
KINDS: dict[str, type[Contraction]] = {"softmax": Softmax, "log-sum-exp": LogSumExp, "length": Length}


class Of(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def network_of(name: str) -> Network:
    return Network((Input(6), Coupled(0, KINDS[name](INDEX))))


def points() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-2, 1, 30, dtype=torch.float64)[:, None]
    return torch.randn(30, 6, generator=generator, dtype=torch.float64) * scales


@pytest.mark.parametrize("name", KINDS)
def test_values_are_torchs(name: str) -> None:
    z = points()
    grouped = z[:, INDEX]
    value = KINDS[name](INDEX)(z)[:, INDEX]
    if name == "softmax":
        torch.testing.assert_close(value, 2 * grouped.softmax(-1))
        return
    expected = grouped.logsumexp(-1) if name == "log-sum-exp" else torch.linalg.vector_norm(grouped, dim=-1)
    torch.testing.assert_close(value[..., 0], expected)
    assert not bool(value[..., 1:].any())


@pytest.mark.parametrize("name", KINDS)
def test_norms_and_magnitudes_hold_for_sampled_jacobians(name: str) -> None:
    function = KINDS[name](INDEX)
    r = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reached = dict.fromkeys((1, 2, math.inf), 0.0)
    for z in points():
        jacobian = torch.autograd.functional.jacobian(function, z)
        for p in reached:
            reached[p] = max(reached[p], float(torch.linalg.matrix_norm(jacobian, p)))
        assert bool((jacobian.abs() @ r <= function.magnitude(r) * (1 + 1e-12)).all())
        assert bool((jacobian.abs().T @ r <= function.magnitude(r, 6) * (1 + 1e-12)).all())
        t = torch.linspace(-1, 1, 6, dtype=torch.float64)
        torch.testing.assert_close(function.along(z, t), jacobian @ t, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(function.back(z, t), jacobian.T @ t, rtol=1e-9, atol=1e-12)
    assert all(found <= function.norm(p) * (1 + 1e-12) for p, found in reached.items())
    assert reached[2] > 0.9


def test_softmax_reaches_its_constant() -> None:
    # Two probabilities of 1/2: J = (1, -1; -1, 1) / 4, of norm 1/2.
    jacobian = torch.autograd.functional.jacobian(lambda z: z.softmax(0), torch.tensor([0.0, 0.0, -60.0]).double())
    assert float(torch.linalg.matrix_norm(jacobian, 2)) == pytest.approx(0.5)
    assert lg.bound(nn.Softmax(1), torch.zeros(1, 3)).value == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.lists(st.floats(-5, 5), min_size=12, max_size=12))
def test_a_witness_is_below_the_norm_of_the_jacobian(name: str, data: list[float]) -> None:
    network = network_of(name)
    point, direction = torch.tensor(data[:6], dtype=torch.float64), torch.tensor(data[6:], dtype=torch.float64)
    if not bool(direction.any()) or float(direction.norm()) < 1e-6:
        return
    proposed = Certificate(math.nan, "lower", (2.0, 2.0), None, network.digest, "sampling", Witness(point, direction))
    value = lg.verify(network, proposed).value
    if name == "length" and bool((point[INDEX] == 0).all(1).any()):
        assert value <= 1  # beside 0 every direction may be that of a gradient
        return
    jacobian = torch.autograd.functional.jacobian(network.nodes[1].function, point)  # type: ignore[union-attr]
    expected = float((jacobian @ direction).norm() / direction.norm())
    assert value <= expected * (1 + 1e-12) + 1e-15
    assert value >= expected * (1 - 1e-6) - 1e-9


@pytest.mark.parametrize(
    "options", [{}, {"method": "spectral"}, {"domain": lg.Box(-1, 1)}, {"norm": 1}, {"norm": math.inf}], ids=str
)
def test_bounds_hold(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Softmax(1)).double()
    certificate = lg.bound(model, torch.zeros(1, 4).double(), **options)  # type: ignore[arg-type]
    p = options.get("norm", 2)
    x = torch.rand(100, 4, dtype=torch.float64) * 2 - 1
    reached = max(
        float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(lambda v: model(v[None])[0], row), p)) for row in x
    )
    assert certificate.rigor == "verified" and certificate.value >= reached
    assert lg.bound(model, torch.zeros(1, 4).double(), method="sampling").value >= 0.5 * reached or options


def test_what_needs_pieces_refuses_them_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)).double()
    with pytest.raises(errors.UnsupportedQuery, match=r"Softmax.*not piecewise linear"):
        lg.exact(model, torch.zeros(1, 4).double(), domain=lg.Box(-1, 1))
    convolution = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Softmax(1)).double()
    with pytest.raises(errors.UnsupportedQuery, match=r"smooth function of groups \(Softmax\)"):
        lg.bound(convolution, torch.zeros(1, 1, 4).double(), method="lipsdp-channel")
    assert lg.bound(convolution, torch.zeros(1, 1, 4).double()).rigor == "verified"


@pytest.mark.parametrize("f", [lambda x: x.softmax(1), lambda x: x.norm(dim=1), lambda x: x.logsumexp(1)])
def test_they_are_rebuilt_from_their_record(f: Callable[[Tensor], Tensor]) -> None:
    network, recipe = captured(Of(f), torch.zeros(1, 4))
    assert rebuild(recipe, {}).digest == network.digest


@pytest.mark.parametrize(
    ("f", "example", "low", "high"),
    [
        (lambda x: x.norm(dim=1, keepdim=True), (4,), 1, 1),
        (lambda x: torch.linalg.vector_norm(x.view(-1, 2, 2), dim=2), (4,), 1, 1),
        (lambda x: torch.linalg.vector_norm(x, 1, dim=1), (4,), 2, 2),
        (lambda x: torch.linalg.vector_norm(x, math.inf, dim=1), (4,), 1, 1),
        (lambda x: torch.linalg.matrix_norm(x.view(-1, 2, 2)), (4,), 1, 1),
        (lambda x: x[:, :1].norm(dim=1), (4,), 1, 1),
        (lambda x: torch.cdist(x, torch.ones(3, 4).to(x)), (4,), math.sqrt(3), math.sqrt(3)),
        (lambda x: nn.functional.pairwise_distance(x, torch.ones(4).to(x)), (4,), 1, 1),
        (lambda x: torch.hypot(x[:, :2], x[:, 2:]), (4,), 1, 1),
        (lambda x: torch.logsumexp(x.view(-1, 2, 2), (1, 2)), (4,), 1, 1),
        (lambda x: torch.logaddexp(x[:, :2], x[:, 2:]), (4,), 1, 1),
        (lambda x: x.log_softmax(1), (4,), 2, 3),  # sqrt(m), and 1 + sqrt(m) as a sum
        (lambda x: nn.functional.softmin(x, 1), (4,), 0.5, 0.5),
        (lambda x: x[:, :1].softmax(1), (4,), 0, 0),
        (lambda x: nn.functional.lp_pool2d(x, 2, 2), (1, 4, 4), 1, 1),
        (lambda x: nn.functional.lp_pool2d(x, 2, 2, 1), (1, 4, 4), 1.9, 2),
        (lambda x: nn.functional.lp_pool1d(x[:, 0], 2, 2), (1, 4, 4), 1, 1),
        (lambda x: x.median(1, keepdim=True).values, (4,), 1, 1),
        (lambda x: x.median(1).values, (5,), 1, 1),
        (lambda x: x.kthvalue(2, 1).values, (5,), 1, 1),
        (lambda x: x.quantile(0.3, dim=1), (6,), math.sqrt(0.5), math.sqrt(0.5)),
        (lambda x: x.cummax(1).values, (4,), 2, 2),
        (lambda x: x.cummin(1).values, (4,), 2, 2),
        (lambda x: torch.stack(torch.aminmax(x, dim=1), 1), (5,), 1, 1.4143),
    ],
)  # fmt: skip
def test_calls_have_their_constants(f: Callable[[Tensor], Tensor], example: tuple[int, ...], low: float, high: float) -> None:
    network = lg.capture(Of(f), torch.zeros(1, *example).double())
    x = torch.randn(5, *example, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(network(x.flatten(1)), f(x).reshape(5, -1), rtol=1e-9, atol=1e-12)
    assert low * (1 - 1e-9) <= lg.bound(network).value <= high * (1 + 1e-6) + 1e-12
