"""What every bound must satisfy, whatever the method that proposed it."""

from __future__ import annotations

import math

import torch

import lipguard as lg
from lipguard.network import Activation, Affine, Dense, Input, Network, Sum

ULPS = 1 + 8 * 2.0**-52
"""Expected values are formulas evaluated in float64: a few roundings."""

SOLVED = 1 + 1e-6
"""Two solves of equivalent programs: each within its relative gap 1e-7 of the squared optimum, and the checker's margin."""


def encloses(certificate, constant):
    """lower <= constant, or constant <= upper, and the value is proved."""
    assert certificate.rigor == "verified"
    assert math.isfinite(certificate.value)
    if certificate.side == "upper":
        assert constant <= certificate.value * ULPS, (certificate.method, certificate.value, certificate.note)
    else:
        assert certificate.value <= constant * ULPS, (certificate.method, certificate.value, certificate.note)


def reproved(network, certificate):
    """The checker proves the certificate again, with the same value."""
    assert lg.verify(network, certificate).value == certificate.value


def scales(bound, network, factor):
    """bound(c f) = |c| bound(f), and bound(x -> f(c x)) = |c| bound(f)."""
    expected = abs(factor) * bound(network)
    after = network.with_outputs(factor * torch.eye(network.outputs, dtype=torch.float64))
    assert near(bound(after), expected)
    before = factor * torch.eye(network.inputs, dtype=torch.float64)
    moved = [_behind(node, 1) for node in network.nodes[1:]]
    assert near(bound(Network((Input(network.inputs), Affine(0, Dense(before)), *moved))), expected)


def ignores_order(bound, model, permuted):
    """Two orders of the same neurons have the same bound."""
    assert near(bound(model), bound(permuted))


def ordered(neuron, layer, spectral):
    """More multipliers prove no more, fewer no less: lipsdp-neuron <= lipsdp-layer <= product of the norms."""
    assert neuron <= layer * SOLVED
    assert layer <= spectral * SOLVED


def near(a, b, factor=SOLVED):
    """Whether a and b differ by at most the given factor."""
    return a <= b * factor and b <= a * factor


def _behind(node, steps):
    if isinstance(node, Sum):
        return Sum(tuple(s + steps for s in node.sources), node.name)
    assert isinstance(node, Affine | Activation)
    source = node.source + steps
    if isinstance(node, Affine):
        return Affine(source, node.operator, node.bias, node.name)
    return Activation(source, node.function, node.name)
