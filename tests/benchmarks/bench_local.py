"""Local bounds of digits classifiers on 100 balls: pytest tests/benchmarks/bench_local.py --benchmark-only -s.

One BLAS thread. Beside the ratio to the global bound stands the ratio to the Jacobian at the centre: no local bound of any
method can lie below that, so that global / Jacobian is the largest ratio there can be.
"""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lipguard as lg

EPS = 0.05


def trained(*sizes: int, activation=nn.ReLU, steps: int = 900, weight_decay: float = 0.0):
    """A classifier of 1400 digits scaled to [0, 1], and the 397 others with their labels."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16), torch.tensor(y)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, dtype=torch.float64), activation()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=weight_decay)
    for step in range(steps):
        some = torch.randint(1400, (64,)) if step else torch.arange(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
    return model, x[1400:], y[1400:]


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(torch.func.vmap(torch.func.jacrev(model))(x), 2)


CASES = {
    "64-64-64-10": ((64, 64, 64, 10), {}),
    "64-128-128-10": ((64, 128, 128, 10), {}),
    "64-64-64-10, untrained": ((64, 64, 64, 10), {"steps": 0}),
    "64-64-64-64-64-64-10": ((64, 64, 64, 64, 64, 64, 10), {}),
    "64-64-64-10, tanh": ((64, 64, 64, 10), {"activation": nn.Tanh}),
}


@pytest.mark.benchmark(group="local")
@pytest.mark.parametrize("name", CASES)
def test_hundred_balls(benchmark, name):
    sizes, options = CASES[name]
    model, x, y = trained(*sizes, **options)
    x, y = x[:100], y[:100]
    accuracy = float((model(x).argmax(1) == y).double().mean())
    overall, product = lg.bound(model, x[:1]).value, lg.bound(model, x[:1], method="spectral").value
    started = time.perf_counter()
    found = benchmark.pedantic(lambda: lg.bound(model, x[:1], domain=lg.Ball(x, EPS)), rounds=1)
    spent = time.perf_counter() - started
    local = torch.tensor([certificate.value for certificate in found], dtype=torch.float64)
    here = jacobians(model, x)
    generator = torch.Generator().manual_seed(0)
    points = torch.stack([lg.Ball(center, EPS).sample(100, 64, generator) for center in x])
    largest = torch.maximum(here, jacobians(model, points.reshape(-1, 64)).reshape(100, 100).amax(1))
    print(f"\n  {name}, accuracy {accuracy:.2f}: global {overall:.2f} (product {product:.2f}), local median {local.median():.2f}")
    print(
        f"  global / local {float((overall / local).median()):.2f}, product / local {float((product / local).median()):.2f}, "
        f"global / Jacobian {float((overall / here).median()):.2f}, local / largest sampled "
        f"{float((local / largest).median()):.3f}, {spent:.2f} s",
        end="",
    )
    assert bool((local >= largest).all())
    assert spent < 30
