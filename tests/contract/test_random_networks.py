"""Five hundred networks drawn by Hypothesis, captured from modules: sampled lower <= verified upper, and no exception."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import Residual, Scaled

import lipguard as lg
from lipguard.bounds.sampling import Sampling
from lipguard.bounds.semidefinite import Semidefinite
from lipguard.certificate import Query
from lipguard.solvers.threads import one_thread

EXAMPLES = 520
SOLVED = 1 + 2e-5
"""Both within a gap 1e-7 of their squared optima, and identical slopes widened by 1e-6 in each of up to seven layers."""

ACTIVATIONS = {
    "relu": lambda n: nn.ReLU(),
    "leaky": lambda n: nn.LeakyReLU(0.2),
    "linear": lambda n: nn.LeakyReLU(1.0),
    "prelu": lambda n: nn.PReLU(init=-0.3),
    "prelu by channel": nn.PReLU,
    "steep prelu": lambda n: nn.PReLU(init=1.7),
    "elu": lambda n: nn.ELU(0.7),
    "celu": lambda n: nn.CELU(1.5),
    "tanh": lambda n: nn.Tanh(),
    "sigmoid": lambda n: nn.Sigmoid(),
    "softplus": lambda n: nn.Softplus(2.0),
    "gelu": lambda n: nn.GELU(),
    "gelu tanh": lambda n: nn.GELU("tanh"),
    "silu": lambda n: nn.SiLU(),
    "mish": lambda n: nn.Mish(),
    "hardtanh": lambda n: nn.Hardtanh(-0.5, 2.0),
    "relu6": lambda n: nn.ReLU6(),
    "hardsigmoid": lambda n: nn.Hardsigmoid(),
    "hardswish": lambda n: nn.Hardswish(),
    "softsign": lambda n: nn.Softsign(),
    "logsigmoid": lambda n: nn.LogSigmoid(),
}


def batch_norm(n):
    layer = nn.BatchNorm1d(n)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.3, 3.0)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


@st.composite
def modules(draw):
    """(module, inputs, dtype): random depth, widths 1 to 12, and what is between the layers."""
    width = st.integers(1, 12)
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    inputs = size = draw(width)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(0, 3))):
        after = draw(width)
        layers.append(nn.Linear(size, after, bias=draw(st.booleans())))
        size = after
        activation = ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]
        match draw(st.sampled_from(["plain", "plain", "plain", "norm", "residual", "scaled", "dropout"])):
            case "norm":
                layers.append(batch_norm(size))
            case "residual":
                hidden = draw(width)
                layers.append(Residual(nn.Sequential(nn.Linear(size, hidden), activation(hidden), nn.Linear(hidden, size))))
            case "scaled":
                layers.append(
                    Scaled(nn.Linear(size, size), draw(st.sampled_from([-2.0, 1e-3, 0.5])), draw(st.sampled_from([0.0, 3.0])))
                )
            case "dropout":
                layers.append(nn.Dropout(0.5))
        layers.append(activation(size))
    if draw(st.booleans()) or not layers:
        layers.append(nn.Linear(size, draw(width)))
    gain = draw(st.sampled_from([1.0] * 8 + [1e-4, 30.0, 0.0]))
    module = nn.Sequential(*layers)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= gain
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    return module.to(dtype), inputs, dtype


seen = {"networks": 0}


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(modules())
def check(made):
    module, inputs, dtype = made
    with torch.random.fork_rng():
        network = lg.capture(module, torch.zeros(1, inputs, dtype=dtype))
    query = Query()
    with one_thread():
        lower, _ = Sampling(starts=4, steps=6)(network, query)
        spectral = lg.bound(network, method="spectral")
        neuron, _ = Semidefinite()(network, query)
        layer, _ = Semidefinite(tied=True)(network, query)
    assert lower.side == "lower"
    for upper in (spectral, neuron, layer):
        assert (upper.side, upper.rigor, lower.rigor) == ("upper", "verified", "verified")
        assert math.isfinite(upper.value)
        assert lower.value <= upper.value
    assert neuron.value <= layer.value * SOLVED
    assert layer.value <= spectral.value * SOLVED
    seen["networks"] += 1


def test_lower_stays_below_upper_on_five_hundred_networks():
    check()
    assert seen["networks"] >= 500


@pytest.mark.parametrize("norm", [1, math.inf, (1, 2), (2, math.inf)])
def test_other_norms(norm):
    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(modules())
    def compare(made):
        module, inputs, dtype = made
        with torch.random.fork_rng():
            network = lg.capture(module, torch.zeros(1, inputs, dtype=dtype))
        query = Query(norm if isinstance(norm, tuple) else (norm, norm))
        with one_thread():
            lower, _ = Sampling(starts=4, steps=4)(network, query)
        upper = lg.bound(network, method="spectral", norm=norm)
        assert lower.value <= upper.value

    compare()
