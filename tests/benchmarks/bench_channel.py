"""Benchmarks of `lipsdp-channel`: verified bounds of convolutional and residual networks at CIFAR size.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_channel.py [cifar cifar-hidden cifar-strided resnet-a resnet-b small]

Prints seconds from network to certificate, CPU seconds, and the ratio to the product of the layers' norms.
"""

from __future__ import annotations

import math
import pathlib
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from lipguard.programs.rewriting import slope_restricted

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "unit/capture"), str(TESTS / "unit/bounds")]
from test_capture_convolutions import randomised  # noqa: E402 - runs without pytest, which has the folders on its path
from test_channel import Residual, cifar  # noqa: E402

import lipguard as lg  # noqa: E402


def strided() -> nn.Module:
    """All three convolutions with stride 2, and a hidden layer."""
    stack = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*stack, nn.Flatten(), nn.Linear(2048, 128), nn.ReLU(), nn.Linear(128, 10))


def initial(module: nn.Module) -> nn.Module:
    """Weights as initialised by torch, random running statistics."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return module.eval()


def small() -> nn.Module:
    """Two convolutions on 8 x 8, where every neuron's own multiplier is affordable."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small": (small, (1, 1, 8, 8)),
    "cifar": (cifar, (1, 3, 32, 32)),
    "cifar-hidden": (lambda: cifar(256), (1, 3, 32, 32)),
    "cifar-strided": (strided, (1, 3, 32, 32)),
    "resnet-a": (lambda: initial(Residual(3, (16, 32, 64), "A")), (1, 3, 32, 32)),
    "resnet-b": (lambda: initial(Residual(3, (16, 32, 64), "B")), (1, 3, 32, 32)),
    "resnet-b-normal": (lambda: randomised(Residual(3, (16, 32, 64), "B")), (1, 3, 32, 32)),
}


def main(names: list[str]) -> None:
    """One row for each network."""
    for name in names or list(MODELS):
        make, shape = MODELS[name]
        torch.manual_seed(0)
        module = make()
        network = lg.capture(module, torch.zeros(shape, dtype=next(module.parameters()).dtype))
        began, cpu = time.perf_counter(), time.process_time()
        found = lg.bound(network, method="lipsdp-channel")
        seconds, work = time.perf_counter() - began, time.process_time() - cpu
        product = lg.bound(network, method="spectral").value
        neuron = f", one a neuron {lg.bound(network).value:.5g}" if slope_restricted(network).neurons < 600 else ""
        lower = lg.bound(network, method="sampling", time_limit=2).value
        print(
            f"{name}: {found.value:.5g} ({found.rigor}, {found.method}, {found.details.get('iterations')} steps, "
            f"gap of its square {found.details.get('gap', math.nan):.1e}) "
            f"in {seconds:.1f} s, {work:.1f} s of CPU; product {product:.5g}, ratio {found.value / product:.3g}{neuron}; "
            f"sampled {lower:.4g} {found.note}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
