"""Deep and wide networks: time against depth and size, the gap, and the bound against ECLipsE-Fast's closed form.

Run with `pytest tests/benchmarks/bench_deep.py --benchmark-only -s`. CPU seconds are printed beside the wall's: on a machine
that others use only they repeat.
"""

from __future__ import annotations

import math
import time

import pytest
from test_deep import ACTIVATIONS, deep, eclipse_fast, network
from torch import nn

import lipguard as lg

DEPTHS = (10, 20, 40, 80)


def measured(model, inputs):
    net = network(model, inputs)
    wall, cpu = time.perf_counter(), time.process_time()
    certificate = lg.bound(net)
    assert certificate.rigor == "verified"
    closed = eclipse_fast([layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)])
    gap = certificate.details["gap"]
    return certificate.value, gap, closed, time.perf_counter() - wall, time.process_time() - cpu


def test_time_against_depth(benchmark):
    def run():
        rows = []
        for depth in DEPTHS:
            value, gap, closed, wall, cpu = measured(deep([64] * (depth + 2)), 64)
            rows.append((math.log(depth), math.log(cpu)))
            print(
                f"\ndepth {depth}: {value:.6g}, gap of its square {gap:.2g}, ECLipsE-Fast / bound {closed / value:.4g}, "
                f"{wall:.2f} s, {cpu:.2f} s CPU",
                end="",
            )
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        slope = sum((x - mean[0]) * (y - mean[1]) for x, y in rows) / sum((x - mean[0]) ** 2 for x, _ in rows)
        print(f"\nexponent {slope:.3f}")

    benchmark.pedantic(run, rounds=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", [2**0.5, 1.0, 3**-0.5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fifty_layers_of_a_hundred(benchmark, activation, gain, bias):
    model = deep([784, *[100] * 50, 10], ACTIVATIONS[activation], gain, bias=bias)
    value, gap, closed, wall, cpu = benchmark.pedantic(measured, args=(model, 784), rounds=1)
    print(
        f"\n{activation}, gain {gain:.3f}: {value:.5g}, gap of its square {gap:.2g}, ECLipsE-Fast / bound {closed / value:.4g}, "
        f"{wall:.1f} s, {cpu:.1f} s CPU"
    )


@pytest.mark.parametrize("sizes", [(784, 256, 256, 10), (64, 400, 400, 400, 10), (784, 1000, 1000, 10)])
def test_wide(benchmark, sizes):
    """Both of the package's solvers where the interior point method takes half a minute at most."""
    net = network(deep(sizes), sizes[0])

    def run():
        for solver in ("low-rank", "interior-point") if sum(sizes) < 1500 else ("low-rank",):
            cpu = time.process_time()
            found = lg.bound(net, solver=solver)
            print(
                f"\n{sizes}, {solver}: {found.value:.9g}, gap {found.details['gap']:.1e}, {time.process_time() - cpu:.2f} s CPU",
                end="",
            )

    benchmark.pedantic(run, rounds=1)
