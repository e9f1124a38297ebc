"""No tensor is made on the default device: with "meta" as the default, anything made there has no values and is found out.

A GPU is not needed: what is created without a device here would be created on the CPU beside a model on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import architectures as made
import pytest
import torch
from test_capture_convolutions import randomised
from torch import nn

import lipguard as lg
from lipguard.bounds.sampling import Sampling
from lipguard.certificate import Query
from lipguard.programs.rewriting import slope_restricted

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "piecewise linear": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.Hardsigmoid(), nn.PReLU(4), nn.Softshrink(), nn.ReLU6(), nn.Hardtanh(), nn.LeakyReLU(), nn.ReLU()
        ), (1, 3)),
    "smooth": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.SELU(), nn.GELU(), nn.Hardswish(), nn.CELU(), nn.ELU(), nn.Linear(4, 2)),
        (1, 3)),
    "densenet": (lambda: made.DenseNet(1, (1, 1), 2), (1, 1, 4, 4)),
    "unet": (made.UNet, (1, 1, 4, 4)),
    "mlp-mixer": (made.MLPMixer, (1, 1, 8, 8)),
    "siren": (made.Siren, (1, 2)),
    "unrolled rnn": (made.UnrolledRNN, (1, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_made_on_the_default_device(name: str) -> None:
    build, shape = MODELS[name]
    model, example = randomised(build()), torch.zeros(shape, dtype=torch.float64)
    expected = lg.capture(model, example)
    with torch.device("meta"):
        network = lg.capture(model, example)
        assert network.digest == expected.digest
        for method in (
            "spectral",
            "toeplitz",
            *(("lipsdp-neuron", "lipsdp-layer") if slope_restricted(network).neurons <= 40 else ()),
        ):
            assert lg.bound(network, method=method).rigor == "verified"
        sampling = Sampling(starts=3, steps=3)
        for norm in (1.0, 2.0, math.inf):
            for domain in (None, lg.Box(-1.0, 1.0), lg.Ball(0.0, 1.0)):
                assert sampling(network, Query((norm, norm), domain))[0].rigor == "verified"
            assert lg.bound(network, method="spectral", norm=norm).rigor == "verified"
        if slope_restricted(network).neurons <= 40:
            upper, lower = lg.Tracker(model, example).update(0.2)
            assert 0 <= lower <= upper
