"""A solver's own value is no bound: SCS at its default tolerance, and what the checker makes of its multipliers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from zoo import chain

import lipguard as lg
from lipguard.programs.feedback import feedback_of
from lipguard.programs.lipsdp import lipsdp
from lipguard.solvers.conic import Conic

NETS = [((2, 4, 1), 1), ((3, 6, 2), 0), ((3, 6, 2), 1), ((5, 10, 3), 3), ((6, 10, 10, 3), 2), ((6, 10, 10, 3), 3)]

BELOW = 1 - 1e-6
"""The reference is proved from above and solved to a gap of 1e-9: the optimum is within 1e-9 of it, far inside this margin."""


def network(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(b, a, generator=generator, dtype=torch.float64) for a, b in itertools.pairwise(sizes)]
    return lg.capture(chain(*weights), torch.zeros(1, sizes[0], dtype=torch.float64))


def optimum(net):
    certificate = lg.bound(net, solver="interior-point", tol=1e-9)
    assert certificate.details["gap"] <= 1e-9
    return certificate.value


def test_the_raw_value_falls_below_the_optimum():
    below = []
    for sizes, seed in NETS:
        net = network(sizes, seed)
        proposal = Conic("scs")(lipsdp(feedback_of(net)).program)
        assert proposal.message == "optimal"
        below.append(math.sqrt(proposal.rho) < BELOW * optimum(net))
    assert any(below)


@pytest.mark.parametrize(("sizes", "seed"), NETS)
def test_the_verified_value_never_does(sizes, seed):
    net = network(sizes, seed)
    certificate = lg.bound(net, solver="scs")
    assert certificate.rigor == "verified"
    assert certificate.value >= optimum(net) * (1 - 1e-9)
    # Its multipliers are good, nevertheless: clipped and pulled inside the cone they prove a value near the optimum.
    assert certificate.value <= 1.01 * optimum(net)
