"""Enumeration against rational arithmetic: random, trained, other activations, skip connections, every norm and domain."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from exact_oracle import DOMAINS, Layer, Net, jacobians, norm_of, random_net, trained_net

import lipguard as lg
from lipguard.exact import exact
from lipguard.exact.enumeration import enumeration

INF = math.inf
NORMS = tuple(itertools.product((1.0, 2.0, INF), repeat=2))

# Two correct float64 evaluations of one Jacobian of these sizes differ by less than 1e-12 relatively.
TOLERANCE = 1e-11

HARDTANH = {"breaks": (-1.0, 1.0), "slopes": (0.0, 1.0, 0.0), "value": -1.0}
LEAKY = {"breaks": (0.0,), "slopes": (0.125, 1.0)}
ABS = {"breaks": (0.0,), "slopes": (-1.0, 1.0)}
RELU6 = {"breaks": (0.0, 1.5), "slopes": (0.0, 1.0, 0.0)}
PRELU = {"breaks": (0.0,), "slopes": (1.5, 1.0)}
FOUR = {"breaks": (-0.5, 0.25, 1.0), "slopes": (0.0, 2.0, -1.0, 0.5), "value": 0.25}

OTHERS = {"hardtanh": HARDTANH, "leaky": LEAKY, "abs": ABS, "relu6": RELU6, "prelu": PRELU, "four": FOUR}

RANDOM = ((2, 4, 3, 2), (3, 4, 3, 1), (2, 5, 2), (1, 6, 4, 2))
TRAINED = ((2, 4, 3, 2), (3, 4, 3, 1), (2, 6, 1), (1, 5, 4, 1))

NETS = {
    **{f"random-{s}-{k}": (random_net, (list(s), k), {}) for k in range(4) for s in RANDOM},
    **{f"trained-{s}-{k}": (trained_net, (list(s), k), {}) for k in range(4) for s in TRAINED},
    **{f"skip-{k}": (random_net, ([2, 3, 3, 2], 20 + k), {"skip": True}) for k in range(6)},
    **{f"{name}-{k}": (random_net, ([2, 3, 2, 2], 40 + k), kwargs) for k in range(3) for name, kwargs in OTHERS.items()},
    **{f"bias-free-{k}": (random_net, ([2, 4, 3, 2], 60 + k), {"bias": 0.0}) for k in range(6)},
}


@pytest.mark.parametrize("name", NETS)
def test_every_norm_and_domain(name):
    make, args, kwargs = NETS[name]
    net = make(*args, **kwargs)
    network = net.network()
    for domain in (make_domain(net.inputs) for make_domain in DOMAINS.values()):
        found = jacobians(net, domain)
        # All nine pairs on one domain, the three main norms on the others.
        norms = NORMS if domain is None else ((1.0, 1.0), (2.0, 2.0), (INF, INF))
        for norm in norms:
            expected = max(norm_of(j, norm) for j in found)
            enclosure = enumeration(network, lg.Query(norm, domain))
            assert enclosure.lower == pytest.approx(expected, rel=TOLERANCE, abs=1e-300), (norm, domain)
            assert enclosure.lower <= expected * (1 + TOLERANCE)
            assert enclosure.upper >= expected * (1 - TOLERANCE)
            assert enclosure.lower_certificate.rigor == "verified"
            assert enclosure.status == "closed" and enclosure.details["undecided"] == 0


def test_the_witness_proves_the_lower_bound():
    network = random_net([2, 4, 3, 2], 5).network()
    box = lg.Box(-1.0, 1.0)
    enclosure = exact(network, domain=box, method="enumeration")
    assert box.contains(enclosure.witness)
    assert lg.verify(network, enclosure.lower_certificate).value == enclosure.lower


def test_a_domain_without_interior_uses_its_differentiable_points():
    # f(x, y) = |x| + 3 |y| on the segment y = 1/2: slopes +-1 and 3.
    net = Net([Layer(np.eye(2), np.zeros(2), **ABS)], np.array([[1.0, 3.0]])).network()
    assert exact(net, domain=lg.Box([-1.0, 0.5], [1.0, 0.5]), norm=1, method="enumeration").lower == pytest.approx(3.0, rel=1e-12)
    assert exact(net, domain=lg.Ball([0.5, 0.5], 0.0), norm=INF, method="enumeration").lower == pytest.approx(4.0, rel=1e-12)
    with pytest.raises(lg.errors.InvalidDomain, match="lies on a kink"):
        exact(net, domain=lg.Ball(0.0, 0.0), method="enumeration")


@pytest.mark.slow
def test_many_regions_agree_across_methods():
    network = random_net([2, 20, 20, 2], 0, grid=1024).network()
    whole = exact(network, domain=lg.Box(-1.0, 1.0), method="enumeration")
    wider = exact(network, domain=lg.Box(-2.0, 2.0), method="enumeration")
    assert whole.lower <= wider.lower
    assert whole.details["regions"] < wider.details["regions"]
