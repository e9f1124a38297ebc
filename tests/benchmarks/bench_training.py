"""Training control against the clock and its rivals: pytest tests/benchmarks/bench_training.py --benchmark-only -s.

Every comparison runs in one process, on one BLAS thread. Figures are printed; the rows worth keeping are in LEDGER.md.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from torch import nn

import lipguard as lg
from lipguard.penalties import LipSDP, Spectral
from lipguard.penalties.control import Target
from lipguard.penalties.gauge import Gauge


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


def digits():
    """Pixels from 0 to 1: x and y for training (1200), x and y for testing (597)."""
    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def dense(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*[m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())][:-1])


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


NETWORKS = {"MLP": lambda: dense(64, 64, 64, 10), "CNN": convolutional}


def train(
    make: Callable[[], nn.Module],
    seed: int,
    epochs: int,
    decay: float = 0.0,
    penalty: type | None = None,
    weight: float = 0.0,
    warmup: int = 0,
    target: float | None = None,
) -> tuple[float, float]:
    """Adam (lr 2e-3, batches of 64): accuracy on the test set and verified bound."""
    x, y, test_x, test_y = digits()
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=decay)
    own = None if penalty is None else penalty(model, x[:1])
    controller = None if target is None else Target(target)
    gauge = None if target is None else Gauge(own, model, x[:1])
    step = 0
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(model(x[i]), y[i])
            if own is not None:
                value = own()
                if controller is not None and gauge is not None:
                    controller.update(gauge.corrected(float(value.detach())))
                    weight = controller.weight
                loss = loss + (weight if step >= warmup else 0.0) * value
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        if gauge is not None:
            gauge.due = True
    with torch.no_grad():
        accuracy = float((model(test_x).argmax(1) == test_y).double().mean())
    return accuracy, lg.bound(model, x[:1], tol=1e-6).value


def test_overhead_of_the_lipsdp_penalty(benchmark):
    """784-256-256-10, batch 128, Adam: blocks of ten steps with and without, in turns; refinements included."""

    def measure():
        torch.manual_seed(0)
        x, y = torch.rand(128, 784), torch.randint(0, 10, (128,))
        models = [dense(784, 256, 256, 10) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        optimizers = [torch.optim.Adam(m.parameters()) for m in models]
        penalty = LipSDP(models[1], x[:1])

        def block(k: int) -> float:
            began = time.perf_counter()
            for _ in range(10):
                loss = nn.functional.cross_entropy(models[k](x), y)
                if k:
                    loss = loss + 0.01 * penalty()
                optimizers[k].zero_grad()
                loss.backward()
                optimizers[k].step()
            return time.perf_counter() - began

        began = time.perf_counter()
        penalty()
        first = time.perf_counter() - began
        pairs = [(block(0), block(1)) for _ in range(60)]
        return (
            first,
            [p / 10 for p, _ in pairs],
            [(b - a) / a for a, b in pairs],
            (sum(b for _, b in pairs) / sum(a for a, _ in pairs)) - 1,
        )

    first, plain, added, whole = benchmark.pedantic(measure, rounds=1)
    print(
        f"\nplain step {1e3 * statistics.median(plain):.2f} ms; added: median {statistics.median(added):.2f}x, "
        f"all blocks together {whole:.2f}x; first call {1e3 * first:.0f} ms"
    )


def test_lipsdp_against_spectral(benchmark):
    """The same weight 0.3 after 100 steps without, five seeds: accuracy and verified bound."""

    def measure():
        make = NETWORKS["MLP"]
        return [[train(make, seed, 25, penalty=kind, weight=0.3, warmup=100) for kind in (Spectral, LipSDP)] for seed in range(5)]

    rows = benchmark.pedantic(measure, rounds=1)
    for seed, ((a, b), (c, d)) in enumerate(rows):
        print(
            f"\nseed {seed}: spectral {100 * a:.1f} % {b:.3f}; lipsdp {100 * c:.1f} % {d:.3f}; bound {100 * (d / b - 1):+.1f} %",
            end="",
        )
    accuracies = [statistics.mean(100 * row[k][0] for row in rows) for k in range(2)]
    print(f"\nmean accuracy {accuracies[0]:.2f} and {accuracies[1]:.2f}", end="")
    print(f"; median change of the bound {100 * statistics.median(d / b - 1 for (_, b), (_, d) in rows):+.1f} %")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("target", [5.0, 10.0, 20.0])
def test_target_against_weight_decay(benchmark, name, target):
    """Ten seeds: how far the verified bound ends from its target, and the accuracy of the weight decay that ends there."""
    make, epochs = NETWORKS[name], 45

    def measure():
        led = [train(make, seed, epochs, penalty=LipSDP, target=target) for seed in range(10)]
        # Decoupled decay whose bound is the target's, by bisection on its logarithm at seed 0; then the other seeds.
        low, high = math.log(1e-3), math.log(30.0)
        for _ in range(7):
            middle = (low + high) / 2
            low, high = (middle, high) if train(make, 0, epochs, decay=math.exp(middle))[1] > target else (low, middle)
        decay = math.exp((low + high) / 2)
        return led, decay, [train(make, seed, epochs, decay=decay) for seed in range(10)]

    led, decay, decayed = benchmark.pedantic(measure, rounds=1)
    within = sum(abs(bound / target - 1) <= 0.05 for _, bound in led)
    print(f"\n{name} target {target:g}: {within} of 10 within 5 %: {', '.join(f'{bound:.3f}' for _, bound in led)}")
    mean = 100 * statistics.mean(a for a, _ in led)
    print(f"accuracy {mean:.2f} %")
    print(
        f"weight decay {decay:.3g}: accuracy {100 * statistics.mean(a for a, _ in decayed):.2f} %, "
        f"bounds {', '.join(f'{bound:.2f}' for _, bound in decayed)}"
    )
