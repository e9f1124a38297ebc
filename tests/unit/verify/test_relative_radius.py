"""Every kind of evidence proves its bound for all maps within the radii of a network, not for the numbers it holds alone.

The radii here are far larger than what folding rounds, so that a term that is left out shows. Networks without biases are
homogeneous: of the member with all weights times 1 + rho the constant is (1 + rho)^layers times that of the numbers held.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import lipguard as lg
from lipguard.bounds.spectral import Spectral
from lipguard.certificate import PairBound, Query
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Conv, Dense, Diagonal, Implicit, Index, Input, Network
from lipguard.network.activations import relu
from lipguard.verify.domain.pairs import check_pairs
from lipguard.verify.domain.ranges import Regions, propagate
from lipguard.verify.enclosed import Enclosed, relative_error
from lipguard.verify.lmi.composed import Composed
from lipguard.verify.norms.matrix_norm import enclosing, prove_matrix_norm
from lipguard.verify.phases.flat import is_flat
from lipguard.verify.phases.phase_form import phase_form
from lipguard.verify.torus.transforms import transform

RHO = 1e-5
SOLVED = 1 - 1e-6
"""Programs are solved to a gap of about 1e-7 of the squared optimum."""


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 4, bias=False), torch.rand(4, dtype=torch.float64) + 0.5

    def forward(self, x):
        return torch.relu(self.inner(torch.relu(x * self.scale))) * self.scale


def dense():
    return nn.Sequential(
        nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)
    )


def convolutional():
    first, second = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Conv2d(2, 2, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(18, 2, bias=False))


def sorting():
    return nn.Sequential(nn.Linear(4, 6, bias=False), lg.nn.GroupSort(3), nn.Linear(6, 2, bias=False))


MODULES = {
    "dense": (dense, (4,)),
    "convolutional": (convolutional, (1, 6, 6)),
    "scaled": (Scaled, (4,)),
    "sorting": (sorting, (4,)),
}


def captured(name: str) -> Network:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    return lg.capture(make().double(), torch.zeros(1, *shape, dtype=torch.float64))


def changed(network: Network, change) -> Network:
    """Every operator with weights changed."""
    return Network(
        tuple(
            dataclasses.replace(node, operator=change(node.operator))
            if isinstance(node, Affine) and not node.weightless
            else node
            for node in network.nodes
        )
    )


def widened(network: Network, rho: float = RHO) -> Network:
    return changed(network, lambda operator: dataclasses.replace(operator, rho=rho))


def member(network: Network, factor: float) -> Network:
    return changed(network, lambda operator: operator.mapped(lambda t: t * factor))


BOX = lg.Box([-0.7, -0.6, -0.5, -0.4], [0.1, 0.2, 0.3, 0.4])
QUERIES = {
    "multipliers": {"method": "lipsdp-neuron"},
    "one a layer": {"method": "lipsdp-layer"},
    "split": {"method": "lipsdp-split"},
    "weighted": {"method": "lipsdp-neuron", "norm": (2, 1)},
    "factors 2": {"method": "spectral"},
    "factors 1": {"method": "spectral", "norm": 1},
    "factors inf": {"method": "spectral", "norm": math.inf},
    "toeplitz": {"method": "toeplitz"},
    "magnitudes": {"method": "contraction", "norm": math.inf},
    "witness": {"method": "sampling"},
    "local": {"method": "lipsdp-neuron", "domain": BOX},
    "slopes": {"method": "spectral", "domain": BOX},
    "slopes inf": {"method": "spectral", "domain": BOX, "norm": math.inf},
}
CASES = [(name, query) for name in MODULES for query in QUERIES if not (name == "convolutional" and "domain" in QUERIES[query])]


@pytest.mark.parametrize(("name", "query"), CASES)
def test_a_bound_holds_for_the_steepest_and_the_flattest_member(name, query):
    network = captured(name)
    bound = lg.bound(widened(network), **QUERIES[query])
    if bound.side == "lower":
        assert bound.value <= lg.bound(member(network, 1 - RHO), **QUERIES[query]).value / SOLVED
    else:
        assert bound.value >= lg.bound(member(network, 1 + RHO), **QUERIES[query]).value * SOLVED


@pytest.mark.parametrize("norm", [(2, 2), (1, math.inf)])
@pytest.mark.parametrize("domain", [None, lg.Box(-1.0, 1.0)])
def test_leaves_hold_for_the_steepest_member(domain, norm):
    """Of weights times 1 + rho the constant is 1 + rho times as large; of the first layer's on all of R^d alone."""
    torch.manual_seed(1)
    rho, module = 1e-10, nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    network = lg.capture(module, torch.zeros(1, 3, dtype=torch.float64))
    first, last = network.nodes[1], network.nodes[3]
    around = 1e-13 * torch.ones(5, dtype=torch.float64)
    first = dataclasses.replace(first, operator=Dense(first.operator.dense(), rho), bias_radius=around)
    last = dataclasses.replace(last, operator=Dense(last.operator.dense(), rho))
    wide, layers = Network((network.nodes[0], first, network.nodes[2], last)), 1 if domain else 2
    found, held = (lg.exact(n, domain=domain, norm=norm, method="branch-and-bound", time_limit=20) for n in (wide, network))
    assert found.rigor == "verified" and held.status == "closed"
    assert held.lower * (1 + layers * rho) * (1 - 2e-11) <= found.upper <= held.lower * (1 + 1e-2)
    assert found.lower <= held.upper * (1 - layers * rho) * (1 + 1e-9)


MAKERS = {
    "dense": Dense,
    "convolution": lambda w, rho: Conv(w[:, :, None], (4,), (4,), (1,), (0,), (1,), rho=rho),
    "diagonal": lambda w, rho: Diagonal(w[0], 5, rho),
}


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize("sign", [-1, 1])
def test_enclosures_hold_every_member(make, sign, powers):
    torch.manual_seed(1)
    w, rho = torch.randn(3, 5, dtype=torch.float64), 1e-3
    w = torch.ldexp(w.sign(), w.frexp().exponent) if powers else w
    operator, other = make(w, rho), make(w * (1 + sign * rho * torch.rand_like(w)), 0.0)
    x = torch.randn(2, operator.shape[1], dtype=torch.float64)
    inward = Enclosed(x, 1e-3 * torch.rand_like(x))
    true = other(x + sign * inward.spread)
    plain, precise = inward.through(operator), Composed(x, torch.zeros_like(x), inward.spread).through(operator)
    for center, radius in ((plain.center, plain.spread), (precise.high + precise.low, precise.radius)):
        assert bool(((true - center).abs() <= radius * (1 + 1e-12)).all())
        # and not much more than the two radii make together
        assert bool((radius <= 1.01 * operator.abs()(rho * x.abs() + inward.spread)).all())
    norm = float(torch.linalg.matrix_norm(operator.dense(), 2))
    assert enclosing(operator, prove_matrix_norm(operator.dense(), norm, "")) >= float(torch.linalg.matrix_norm(other.dense(), 2))
    assert relative_error(operator, 4) > rho


def test_blocks_on_a_torus_hold_every_member():
    torch.manual_seed(2)
    w, rho = torch.randn(2, 3, 3, dtype=torch.float64), 1e-3
    torus = (8,), (8,)
    conv, other = (Conv(weight, (8,), (8,), (1,), (1,), (1,), rho=r) for weight, r in ((w, rho), (w * (1 + rho), 0.0)))
    block, true = transform(conv, torus, torus), transform(other, torus, torus)
    assert bool(((block.center - true.center).abs() <= block.spread + true.spread).all())


LONE = {
    "multipliers": {"method": "lipsdp-neuron"},
    "channels": {"method": "lipsdp-channel"},
    "slopes": {"method": "spectral", "domain": lg.Box(0.0, 1.0)},
}


@pytest.mark.parametrize("query", LONE)
def test_the_same_evidence_proves_no_less_than_for_a_member(query):
    """One layer at a time: what is proved for a radius is proved for the steepest member by the same evidence."""
    torch.manual_seed(0)
    if query == "channels":
        module: nn.Module = nn.Sequential(
            nn.Linear(2, 16, bias=False), nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 2, 3, padding=1, bias=False), nn.ReLU(),
            nn.Conv1d(2, 1, 3, padding=1, bias=False), nn.ReLU(), nn.Conv1d(1, 1, 3, padding=1, bias=False),
        )  # fmt: skip
    else:
        module = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    network = lg.capture(module.double(), torch.zeros(1, 2, dtype=torch.float64))
    certificate = lg.bound(network, **LONE[query])
    rho, seen = 1e-7, 0
    for i, node in enumerate(network.nodes):
        if isinstance(node, Affine) and not node.weightless:
            values = []
            for operator in (dataclasses.replace(node.operator, rho=rho), node.operator.mapped(lambda t: t * (1 + rho))):
                one = Network((*network.nodes[:i], dataclasses.replace(node, operator=operator), *network.nodes[i + 1 :]))
                values.append(lg.verify(one, dataclasses.replace(certificate, digest=one.digest)).value)
            assert values[0] >= values[1] * (1 - 1e-12) and values[1] >= certificate.value * (1 + rho / 100)
            seen += 1
    assert seen >= 2


def test_products_of_norms_on_a_domain_hold_the_steepest_member():
    """Both neurons are active: the norm of a matrix of both signs, which is below that of its magnitudes."""
    w = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for behind in ((), (Activation(1, relu()),)):
        first = Affine(0, Dense(w, 1e-3), torch.full((2,), 9.0, dtype=torch.float64))
        value = lg.bound(Network((Input(2), first, *behind)), method="spectral", domain=lg.Box(0.0, 1.0)).value
        assert math.sqrt(2) * (1 + 1e-3) <= value < 1.6


def test_constants_of_pairs_hold_the_steepest_member():
    network = captured("dense")
    factors = Spectral()(network, Query((2.0, 2.0)))[0].evidence
    bound = [PairBound((0, 1), factors)]
    wide = changed(network, lambda o: dataclasses.replace(o, rho=RHO if o.shape[0] == 3 else 0.0))
    steep = changed(network, lambda o: o.mapped(lambda t: t * (1 + RHO)) if o.shape[0] == 3 else o)
    assert check_pairs(wide, bound)[0] >= check_pairs(steep, bound)[0] * (1 - 1e-12)


@pytest.mark.parametrize("domain", [lg.Box(1.0, 2.0), lg.Ball(torch.full((2,), 1.5), 0.5)])
def test_ranges_hold_every_member(domain):
    weight, rho = torch.tensor([[1.0, 2.0]], dtype=torch.float64), 1e-3
    identity = Affine(0, Dense(torch.eye(2, dtype=torch.float64)))
    found = propagate(Network((Input(2), identity, Affine(1, Dense(weight, rho)))), Regions.of([domain], 2, torch.device("cpu")))
    half = 1.5 if isinstance(domain, lg.Box) else math.sqrt(5) / 2
    assert float(found.upper[2]) >= (1 + rho) * (4.5 + half) and float(found.lower[2]) <= (1 - rho) * (4.5 - half)
    assert float(found.largest(2, torch.ones(1, 1, 1, dtype=torch.float64))) >= (1 + rho) * (4.5 + half)


def test_ranges_hold_the_radius_of_a_bias():
    radius = torch.tensor([0.25, 0.0], dtype=torch.float64)
    bias = torch.tensor([1.0, -1.0], dtype=torch.float64)
    hidden = Affine(0, Dense(torch.eye(2, dtype=torch.float64)), bias, "first", radius)
    nodes = (Input(2), hidden, Activation(1, relu()), Affine(2, Dense(torch.ones(1, 2, dtype=torch.float64))))
    found = propagate(Network(nodes), Regions.of([lg.Box(-1.0, 1.0)], 2, torch.device("cpu")))
    assert float(found.lower[1][0, 0]) <= -0.25 and float(found.upper[1][0, 0]) >= 2.25
    assert float(found.upper[3][0, 0]) >= 2.25
    # Linear propagation feels it too: the first neuron's row alone.
    assert float(found.largest(1, torch.tensor([[[1.0, 0.0]]], dtype=torch.float64))) >= 2.25


def hat(radius: float | None) -> Network:
    """max(b - |x|, 0) with b = 0, or b within a radius of 0: then the slope 1 may appear."""
    one = torch.ones(1, 1, dtype=torch.float64)
    around = None if radius is None else torch.tensor([radius], dtype=torch.float64)
    return Network(
        (
            Input(1),
            Affine(0, Dense(torch.tensor([[1.0], [-1.0]], dtype=torch.float64))),
            Activation(1, relu()),
            Affine(2, Dense(-torch.ones(1, 2, dtype=torch.float64)), torch.zeros(1, dtype=torch.float64), "sum", around),
            Activation(3, relu()),
            Affine(4, Dense(one)),
        )
    )


@pytest.mark.parametrize("domain", [None, lg.Box(-1.0, 1.0)])
def test_the_exact_search_knows_the_radius_of_a_bias(domain):
    exact = lg.exact(hat(None), domain=domain, method="branch-and-bound", time_limit=10)
    assert exact.upper < 1e-90
    enclosed = lg.exact(hat(1e-9), domain=domain, method="branch-and-bound", time_limit=10)
    assert enclosed.upper >= 1 and enclosed.lower == 0


def test_a_witness_knows_the_radius_of_a_bias():
    """At x = 0, b + x with b within 1e-3 of 0: both slopes of relu are possible, and the smaller one counts."""
    values = []
    for radius in (None, torch.tensor([2e-3], dtype=torch.float64)):
        first = Affine(0, Dense(torch.ones(1, 1, dtype=torch.float64)), torch.full((1,), 1e-3, dtype=torch.float64), "", radius)
        network = Network((Input(1), first, Activation(1, relu())))
        witness = lg.bound(Network((Input(1), *network.nodes[1:])), method="sampling")
        point = dataclasses.replace(witness.evidence, point=torch.zeros(1, dtype=torch.float64))
        values.append(lg.verify(network, dataclasses.replace(witness, evidence=point)).value)
    assert values == [pytest.approx(1.0, abs=1e-12), 0.0]


def test_only_rows_that_are_exact_prove_a_region_flat():
    network = captured("dense")
    form = phase_form(widened(network), None)
    assert not bool(form.exact.any()) and bool(form.conic[:5].all()) and not bool(form.conic[5:].any())
    assert bool(phase_form(network, None).exact.all())


@pytest.mark.parametrize("domain", [None, lg.Box(-1.0, 1.0)])
def test_a_fresh_batch_norm_behind_a_layer_without_bias_is_enclosed_to_the_end(domain):
    """Its neurons all change their phase at 0: regions that hold at 0 alone are proved flat in spite of the radius."""
    torch.manual_seed(0)
    layers = nn.Linear(2, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)
    found = lg.exact(nn.Sequential(*layers).eval(), torch.zeros(1, 2), domain=domain, method="branch-and-bound", time_limit=30)
    assert found.status == "closed" and found.upper <= found.lower * (1 + 1e-6)


def form_of(weight: list, rho: float):
    matrix = torch.tensor(weight, dtype=torch.float64)
    last = Dense(torch.ones(1, len(weight), dtype=torch.float64))
    return phase_form(
        Network((Input(2), Affine(0, Dense(matrix, rho)), Activation(1, relu()), Affine(2, last))), lg.Box(-1.0, 1.0)
    )


@pytest.mark.parametrize(
    ("weight", "rho", "flat"),
    [
        ([[1.0, 1.0], [-1.0, -1.0]], 0.0, True),  # x + y >= 0 >= x + y: a line
        ([[1.0, 1.0], [-1.0, -1.0]], 1e-15, False),  # two lines, between which there may be room
        ([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], 0.0, True),  # 0 alone
        ([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], 1e-15, True),  # 0 alone, however the lines turn a little
        ([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], 1.0, False),  # 0 may be one whole row
        ([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], 1e-15, False),  # a quadrant
        ([[0.0, 0.0], [0.0, 0.0]], 1e-15, False),  # no demand at all
    ],
)
def test_a_region_is_flat_for_all_rows_within_their_radii(weight, rho, flat):
    form, count = form_of(weight, rho), len(weight)
    ones = torch.ones(count)
    assert is_flat(form, ones.long(), ones.double(), 0) is flat


def test_an_implicit_layer_takes_exact_weights_only():
    with pytest.raises(ValueError, match="rho"):
        Implicit(0, Dense(torch.zeros(1, 1, dtype=torch.float64), 1e-16), relu())


@pytest.mark.parametrize("rho", [-1e-16, math.nan, math.inf, 3.0, 1, "0", None])
def test_radii_that_are_none_are_refused(rho):
    w = torch.ones(1, 1, dtype=torch.float64)
    for make in (lambda: Dense(w, rho), lambda: Diagonal(w[0], 1, rho)):
        with pytest.raises(ValueError, match="relative radius"):
            make()


@pytest.mark.parametrize("radius", [[-1.0], [math.nan], [math.inf], [0.0, 0.0]])
def test_radii_of_biases_that_are_none_are_refused(radius):
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="radius of its bias"):
        Affine(0, Dense(one[None]), one, "", torch.tensor(radius, dtype=torch.float64))
    with pytest.raises(ValueError, match="radius of its bias"):
        Affine(0, Dense(one[None]), None, "", one)


def test_the_digest_tells_radii_apart_and_leaves_exact_networks_as_they_were():
    network = captured("dense")
    digests = {network.digest, widened(network, 1e-16).digest, widened(network, 2e-16).digest}
    assert len(digests) == 3 and widened(network, 0.0).digest == network.digest
    bias = torch.ones(1, dtype=torch.float64)
    nodes = [Affine(0, Dense(bias[None]), bias, "", radius) for radius in (None, 0 * bias, bias)]
    assert len({Network((Input(1), node)).digest for node in nodes}) == 3


def test_a_certificate_of_the_numbers_held_is_none_of_their_radii():
    network = captured("dense")
    certificate = Spectral()(network, Query((2.0, 2.0)))[0]
    lg.verify(network, certificate)
    with pytest.raises(NotCertified, match="is of network"):
        lg.verify(widened(network, 1e-16), certificate)


def test_magnitudes_are_above_both_the_coefficients_and_what_is_meant():
    w = torch.tensor([[1.0, -(2.0**-1074), 0.0, 1e308]], dtype=torch.float64)
    for rho in (2.0**-53, 1e-3):
        size = Dense(w, rho).abs().weight
        assert size[0, 0] > 1 + rho / 2 and size[0, 1] > 2.0**-1074 and size[0, 2] == 0 and size[0, 3] > 1e308
    assert torch.equal(Dense(w).abs().weight, w.abs()) and Index(torch.tensor([0]), 1).rho == 0
