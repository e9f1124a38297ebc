"""Witnesses of deep networks: the errors' lengths grow like norms, where entrywise radii grow like sums of |W|."""

from __future__ import annotations

import architectures as made
import pytest
import torch
from test_capture_convolutions import randomised
from torch import nn
from zoo import ZOO

import lipguard as lg
from lipguard.bounds.sampling import Sampling
from lipguard.certificate import Query, Witness
from lipguard.verify.point import witness
from lipguard.verify.point.witness import check_witness


def hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def test_sixty_orthogonal_layers() -> None:
    # Entries +-1/4: orthogonal, exact in floating point, and sums of |W| are 4. The constant is 1 where |x| is an isometry of R.
    layers: list[nn.Module] = []
    for _ in range(60):
        layer = nn.Linear(16, 16, bias=False, dtype=torch.float64)
        layer.weight.data = hadamard(16) / 4
        layers += [layer, nn.LeakyReLU(1.0)]
    network = lg.capture(nn.Sequential(*layers), torch.zeros(1, 16, dtype=torch.float64))
    lower, _ = Sampling(starts=4, steps=2)(network, Query())
    assert 1 - 1e-9 <= lower.value <= 1
    # every product and sum above is exact
    entrywise = witness._tangent(network, torch.ones(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64), None)
    assert float(torch.linalg.vector_norm(entrywise.value.center)) == pytest.approx(4, rel=1e-9)


def test_a_resnet_20_has_a_witness() -> None:
    torch.manual_seed(0)
    network = lg.capture(made.ResNet(3, "A", 8).eval(), torch.zeros(1, 3, 16, 16))
    lower, _ = Sampling(starts=2, steps=2)(network, Query())
    assert isinstance(lower.evidence, Witness)
    x, v = lower.evidence.point, lower.evidence.direction
    _, attained = torch.func.jvp(lambda z: network(z[None])[0], (x,), (v,))
    value = float(torch.linalg.vector_norm(attained) / torch.linalg.vector_norm(v))
    assert 0.99 * value <= lower.value <= value * (1 + 1e-9)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_followed_lengths_never_exceed_the_constant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "_KEPT", float("inf"))
    known = ZOO[name]
    network = lg.capture(known.make(), known.example)
    lower, _ = Sampling(starts=16, steps=10)(network, Query())
    assert lower.value <= known.constant * (1 + 1e-15)


@pytest.mark.parametrize("seed", range(12))
def test_lengths_enclose_a_tangent_in_higher_precision(seed: int) -> None:
    torch.manual_seed(seed)
    model = randomised(made.ResNet(1, "B", 2) if seed % 2 else made.UNet(), seed)
    network = lg.capture(model, torch.zeros((1, 3, 4, 4) if seed % 2 else (1, 1, 4, 4), dtype=torch.float64))
    x, v = torch.randn(2, network.inputs, dtype=torch.float64)
    norms = {i: witness._norm_bound(n.operator) for i, n in enumerate(network.nodes) if hasattr(n, "operator")}
    followed = witness._tangent(network, x, v, norms)
    center, radius, length = followed.value.center, followed.value.spread, followed.length
    _, exact = torch.func.jvp(lambda z: network(z[None])[0], (x,), (v,))
    error = (center - exact).abs()
    # Both are rounded: the true tangent is within the bounds of each, so that their difference is within twice them.
    assert bool((error <= 2 * radius).all()) and float(torch.linalg.vector_norm(error)) <= 2 * length
    attained = float(torch.linalg.vector_norm(exact) / torch.linalg.vector_norm(v))
    assert 0 <= check_witness(network, Witness(x, v), (2.0, 2.0), None) <= attained * (1 + 1e-9)
