"""Local bounds: the constant on a ball or a box, one domain or many."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proofs import SOLVED, encloses, reproved
from torch import Tensor, nn

import lipguard as lg
from lipguard import errors
from lipguard.audit.encoding import certificate_from_json, certificate_json
from lipguard.certificate import Certificate, LocalMultipliers, Slopes
from lipguard.network.activations import leaky_relu, relu, softshrink
from lipguard.network.smooth import elu, gelu, hardswish, sigmoid, silu, softplus, tanh
from lipguard.verify import verify_local
from lipguard.verify.domain.ranges import Regions, propagate
from lipguard.verify.domain.relaxation import Intervals

INF = math.inf
F64 = torch.float64


class Residual(nn.Module):
    """x -> W2 (h + phi(V h)), h = phi(W1 x)."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.phi = activation()

    def forward(self, x: Tensor) -> Tensor:
        h = self.phi(self.first(x))
        return self.last(h + self.phi(self.inner(h)))


def mlp(activation, sizes=(5, 9, 8, 3)):
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def cnn(activation=nn.ReLU):
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 2, 3, padding=1),
        activation(),
        nn.AvgPool2d(2),
        nn.Conv2d(2, 3, 3, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


MODELS = {
    "relu": (lambda: mlp(nn.ReLU), 5),
    "leaky": (lambda: mlp(lambda: nn.LeakyReLU(0.1)), 5),
    "hardtanh": (lambda: mlp(nn.Hardtanh), 5),
    "tanh": (lambda: mlp(nn.Tanh), 5),
    "gelu": (lambda: mlp(nn.GELU), 5),
    "silu": (lambda: mlp(nn.SiLU), 5),
    "elu": (lambda: mlp(nn.ELU), 5),
    "softplus": (lambda: mlp(nn.Softplus), 5),
    "skip": (Residual, 5),
    "skip-tanh": (lambda: Residual(nn.Tanh), 5),
    "cnn": (cnn, 16),
    "cnn-gelu": (lambda: cnn(nn.GELU), 16),
}


def network(name: str, seed: int = 0, scale: float = 2.0) -> lg.Network:
    make, inputs = MODELS[name]
    torch.manual_seed(seed)
    model = make().double()
    for parameter in model.parameters():
        parameter.data *= scale
    return lg.capture(model, torch.zeros(1, inputs, dtype=F64))


def jacobians(net: lg.Network, x: Tensor) -> Tensor:
    """(B, m, d) by automatic differentiation."""
    x = x.clone().requires_grad_(True)
    y = net(x)
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(y.shape[1])]
    return torch.stack(rows, 1).detach()


def sampled(net: lg.Network, domain, count: int = 200, seed: int = 0) -> Tensor:
    return jacobians(net, domain.sample(count, net.inputs, torch.Generator().manual_seed(seed)))


def balls(net: lg.Network, radius: float, count: int = 6, norm: float = 2.0, box=None, seed: int = 0) -> list[lg.Ball]:
    generator = torch.Generator().manual_seed(seed)
    return [lg.Ball(torch.rand(net.inputs, generator=generator, dtype=F64), radius, norm, box) for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("radius", [0.02, 0.4])
def test_never_below_a_jacobian_and_never_above_the_global_bound(name, radius):
    net = network(name)
    overall = lg.bound(net)
    assert isinstance(overall, Certificate)
    box = lg.Box(0.0, 1.0)
    domains = balls(net, radius, 4) + balls(net, radius / 3, 2, INF) + balls(net, radius, 2, 1.0, box) + [box]
    for certificate, domain in zip(lg.bound(net, domain=domains), domains, strict=True):
        encloses(certificate, float(torch.linalg.matrix_norm(sampled(net, domain), 2).max()))
        assert certificate.value <= overall.value * SOLVED
        assert certificate.domain is domain


@pytest.mark.parametrize("name", ["relu", "tanh", "skip", "cnn"])
@pytest.mark.parametrize("norm", [1, INF, (1, 2), (2, INF), (INF, 1), (2, 1), (1, INF), (INF, 2), 2])
def test_other_norms_by_slopes(name, norm):
    net = network(name)
    p, q = norm if isinstance(norm, tuple) else (norm, norm)
    directions = torch.randn(net.inputs, 300, generator=torch.Generator().manual_seed(1), dtype=F64)
    directions = torch.cat([directions, directions.sign(), torch.eye(net.inputs, dtype=F64)], 1)
    for domain in balls(net, 0.1, 3, INF):
        certificate = lg.bound(net, norm=norm, domain=domain, method="spectral")
        J = sampled(net, domain, 50) @ (directions / torch.linalg.vector_norm(directions, p, dim=0))
        encloses(certificate, float(torch.linalg.vector_norm(J, q, dim=1).max()))
        assert certificate.value <= lg.bound(net, norm=norm, method="spectral").value * SOLVED


def test_norms_of_intervals_are_exact_where_a_formula_is_known():
    # On a ball in which |x_i| has no kink the Jacobian is diag(sign) W, the same everywhere.
    W = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=F64)
    model = nn.Sequential(nn.Linear(2, 2, dtype=F64), nn.ReLU(), nn.Linear(2, 2, bias=False, dtype=F64))
    model[0].weight.data, model[0].bias.data = torch.eye(2, dtype=F64), torch.full((2,), 5.0, dtype=F64)
    model[2].weight.data = W
    net = lg.capture(model, torch.zeros(1, 2, dtype=F64))
    ball = lg.Ball(torch.zeros(2), 1.0)
    for norm, expected in ((1, 6.0), (INF, 7.0), ((1, INF), 4.0), ((2, INF), 5.0), ((1, 2), math.sqrt(20.0))):
        assert lg.bound(net, norm=norm, domain=ball).value == pytest.approx(expected, rel=1e-12)
    # sigma_max^2 = (30 + sqrt(30^2 - 4 det^2)) / 2 with det W = 10; the proof needs a margin of its own rounding, some 1e-11.
    assert lg.bound(net, domain=ball).value == pytest.approx(math.sqrt(15 + math.sqrt(125.0)), rel=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_a_smaller_ball_has_no_larger_bound(name):
    net = network(name, seed=3)
    for center in torch.rand(3, net.inputs, generator=torch.Generator().manual_seed(5), dtype=F64)[:2]:
        radii = [0.8, 0.31, 0.3, 0.1, 0.01]
        values = [c.value for c in lg.bound(net, domain=[lg.Ball(center, r) for r in radii])]
        for larger, smaller in itertools.pairwise(values):
            assert smaller <= larger * SOLVED


@pytest.mark.parametrize("name", MODELS)
def test_the_limit_of_small_balls_is_the_jacobian(name):
    net = network(name, seed=1)
    center = torch.rand(net.inputs, generator=torch.Generator().manual_seed(2), dtype=F64)
    exact = float(torch.linalg.matrix_norm(jacobians(net, center[None]), 2)[0])
    certificate = lg.bound(net, domain=lg.Ball(center, 1e-9))
    assert exact * (1 - 1e-12) <= certificate.value <= exact * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_above_the_exact_local_constant(seed):
    torch.manual_seed(seed)
    net = lg.capture(mlp(nn.ReLU, (3, 6, 2)).double(), torch.zeros(1, 3, dtype=F64))
    for ball in balls(net, 0.3, 2, INF, seed=seed):
        exact = lg.exact(net, domain=ball, method="enumeration")
        bound = lg.bound(net, domain=ball)
        assert exact.status == "closed"
        assert exact.lower <= bound.value * (1 + 1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(MODELS)), st.floats(1e-3, 1.0), st.sampled_from([1.0, 2.0, INF]))
def test_random_networks(seed, name, radius, norm):
    net = network(name, seed, scale=0.5 + 3 * (seed % 7) / 7)
    (ball,) = balls(net, radius, 1, norm, seed=seed)
    certificate = lg.bound(net, domain=ball)
    encloses(certificate, float(torch.linalg.matrix_norm(sampled(net, ball, 60, seed), 2).max()))


def test_a_batch_is_the_same_as_one_at_a_time():
    net = network("relu", scale=3.0)
    domains = balls(net, 0.2, 5)
    together = lg.bound(net, domain=domains)
    for certificate, domain in zip(together, domains, strict=True):
        assert lg.bound(net, domain=domain).value == pytest.approx(certificate.value, rel=1e-7)
        reproved(net, lg.bound(net, domain=domain))
    stacked = lg.bound(net, domain=lg.Ball(torch.stack([d.center for d in domains]).reshape(5, 1, 5), 0.2))
    assert [c.value for c in stacked] == [c.value for c in together]
    boxes = lg.bound(net, domain=lg.Box(torch.zeros(3, 5), 0.5))
    assert len(boxes) == 3 and boxes[0].value == pytest.approx(lg.bound(net, domain=lg.Box(0.0, 0.5)).value, rel=1e-9)


def test_a_box_of_all_inputs_narrows_a_ball():
    net = network("relu", scale=3.0)
    center = torch.zeros(5, dtype=F64)
    free, cut = lg.bound(net, domain=[lg.Ball(center, 0.5), lg.Ball(center, 0.5, box=lg.Box(0.0, 1.0))])
    assert cut.value < free.value
    domain = cut.domain
    assert isinstance(domain, lg.Ball)
    points = domain.sample(500, 5, torch.Generator().manual_seed(0))
    assert bool((points >= 0).all()) and all(domain.contains(x) for x in points)
    assert not domain.contains(torch.tensor([-0.1, 0, 0, 0, 0], dtype=F64))
    # The branch and bound and the checker of its leaves keep both as well.
    found = lg.exact(network("relu"), domain=domain, time_limit=2)
    assert found.upper <= lg.bound(network("relu"), domain=lg.Ball(center, 0.5)).value * SOLVED
    witness = found.lower_certificate.evidence
    assert domain.contains(witness.point)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["lipsdp-neuron", "lipsdp-layer", "spectral"])
def test_methods_are_ordered(method):
    net = network("tanh")
    domains = balls(net, 0.3, 3)
    reference = lg.bound(net, domain=domains)
    found = lg.bound(net, domain=domains, method=method)
    for least, certificate in zip(reference, found, strict=True):
        assert least.value <= certificate.value * SOLVED
        assert certificate.value <= lg.bound(net, method=method).value * SOLVED
        assert certificate.method == method


def test_solvers_agree():
    net = network("relu")
    ball = balls(net, 0.4, 1)[0]
    reference = lg.bound(net, domain=ball).value
    for solver in ("interior-point", "clarabel"):
        # Clarabel's own gap is 1e-8 of the squared bound, and its multipliers are proved as they are.
        assert lg.bound(net, domain=ball, solver=solver).value == pytest.approx(reference, rel=1e-5)


def test_class_pairs():
    net = network("relu")
    ball = balls(net, 0.2, 1)[0]
    certificate = lg.bound(net, domain=ball, outputs=(0, 2))
    J = sampled(net, ball)
    encloses(certificate, float(torch.linalg.vector_norm(J[:, 0] - J[:, 2], dim=1).max()))
    assert certificate.value <= math.sqrt(2) * lg.bound(net, domain=ball).value * SOLVED


def test_corrupted_evidence_is_refused():
    net = network("relu", scale=3.0)
    certificate = lg.bound(net, domain=balls(net, 0.3, 1)[0])
    evidence, ball = certificate.evidence, certificate.domain
    assert isinstance(evidence, LocalMultipliers) and isinstance(ball, lg.Ball)
    reproved(net, certificate)

    def refused(**changes):
        with pytest.raises(errors.NotCertified):
            lg.verify(net, dataclasses.replace(certificate, **changes))

    refused(domain=lg.Ball(ball.center, 1.5))
    refused(domain=None)
    refused(side="lower")
    refused(norm=(1.0, 1.0))
    refused(digest="0" * 64)
    for t in (evidence.t * 3, evidence.t / 3, torch.zeros_like(evidence.t), -evidence.t, evidence.t[:-1], evidence.t * math.nan):
        refused(evidence=LocalMultipliers(t, evidence.rho))
    for rho in (evidence.rho * 0.9, 0.0, -1.0, math.nan):
        refused(evidence=LocalMultipliers(evidence.t, rho))
    # The value itself is never trusted.
    assert lg.verify(net, dataclasses.replace(certificate, value=0.0)).value == certificate.value
    other = verify_local(net, [certificate, dataclasses.replace(certificate, evidence=LocalMultipliers(evidence.t, 0.0))])
    assert other[1] is None and other[0] is not None and other[0].value == certificate.value


def test_slopes_depend_on_the_domain():
    net = network("relu", scale=3.0)
    small = lg.bound(net, domain=balls(net, 0.05, 1)[0], method="spectral")
    assert isinstance(small.evidence, Slopes)
    large = lg.verify(net, dataclasses.replace(small, domain=lg.Box(-5.0, 5.0)))
    assert large.value > 1.1 * small.value


@pytest.mark.parametrize("method", ["lipsdp-neuron", "spectral"])
def test_certificates_survive_a_record(method):
    net = network("gelu")
    certificate = lg.bound(net, domain=balls(net, 0.1, 1, box=lg.Box(0.0, 1.0))[0], method=method)
    restored = certificate_from_json(certificate_json(certificate))
    assert lg.verify(net, restored).value == certificate.value
    assert isinstance(restored.domain, lg.Ball) and restored.domain.box is not None


FUNCTIONS = [relu(), leaky_relu(0.2), softshrink(0.5), tanh(), sigmoid(), gelu(), silu(), elu(1.5), softplus(2.0), hardswish()]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)
def test_lines_enclose_the_function(function):
    generator = torch.Generator().manual_seed(0)
    center = 6 * torch.randn(1, 400, generator=generator, dtype=F64)
    reach = 10 ** (3 * torch.rand(2, 400, generator=generator, dtype=F64) - 2)
    lower, upper = center - reach[:1], center + reach[1:]
    on = Intervals(function, lower, upper)
    lines = on.lines(center)
    p = lower + (upper - lower) * torch.linspace(0, 1, 301, dtype=F64)[:, None]
    p = torch.minimum(p, upper)
    value = function(p)
    assert bool((lines.low_slope * p + lines.low_height <= value + 1e-12).all())
    assert bool((value <= lines.high_slope * p + lines.high_height + 1e-12).all())
    low, high = on.deviation(torch.zeros_like(lower))
    assert bool((low <= value.amin(0)).all()) and bool((value.amax(0) <= high).all())
    # And no further away than the curvature between 16 points allows.
    gap = torch.maximum(high - value.amax(0), value.amin(0) - low)
    assert bool((gap <= 0.1 * (upper - lower) + 1e-9).all())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_ranges_hold_every_value(name, norm):
    net = network(name)
    domains = balls(net, 0.3, 3, norm, lg.Box(0.0, 1.0))
    found = propagate(net, Regions.of(domains, net.inputs, net.device))
    for k, domain in enumerate(domains):
        for low, high, values in zip(
            found.lower, found.upper, net.values(domain.sample(300, net.inputs, torch.Generator().manual_seed(k))), strict=True
        ):
            assert bool((values >= low[k]).all()) and bool((values <= high[k]).all())


def test_balls_as_tensors_are_the_balls():
    generator = torch.Generator().manual_seed(0)
    centers, radii = torch.rand(6, 5, generator=generator, dtype=F64), torch.tensor([0.0, 1e-9, 0.1, 0.3, 1.0, 7.0], dtype=F64)
    for box in (None, lg.Box(0.0, 1.0)):
        tensors = Regions.around(centers, radii, box)
        domains = [lg.Ball(c, r, 2.0, box) for c, r in zip(centers, radii.tolist(), strict=True)]
        objects = Regions.of(domains, 5, torch.device("cpu"))
        for name in ("lower", "upper", "center", "radius", "norms"):
            assert torch.equal(getattr(tensors, name), getattr(objects, name)), name


def test_a_neuron_without_slope_proves_zero():
    model = nn.Sequential(nn.Linear(2, 3, dtype=F64), nn.ReLU(), nn.Linear(3, 2, dtype=F64))
    model[0].bias.data.fill_(-100.0)
    net = lg.capture(model, torch.zeros(1, 2, dtype=F64))
    assert lg.bound(net, domain=lg.Ball(torch.zeros(2), 1.0)).value == 0.0


@pytest.mark.parametrize(
    ("domain", "match"),
    [
        (lg.Box(1.0, 0.0), "empty: lower 1 > upper 0"),
        (lg.Ball(torch.zeros(4), 0.1), "4 entries, the network has 5 inputs"),
        (lg.Ball(torch.zeros(2, 4), 0.1), "8 entries, the network has 5 inputs"),
        (lg.Ball(torch.zeros(5), -1.0), "radius >= 0"),
        (lg.Ball(torch.full((5,), math.nan), 0.1), "nan"),
        (lg.Ball(torch.full((5,), 2.0), 0.1, box=lg.Box(0.0, 1.0)), "outside the box at input 0"),
        (lg.Ball(torch.zeros(5), 0.1, box=lg.Box(1.0, 0.0)), "empty"),
        ([], "empty"),
        ([lg.Box(0.0, 1.0), lg.Box(1.0, 0.0)], "domain 1: Box is empty"),
        ([0.3], "domain 0 is float"),
        (lg.Box(torch.zeros(2, 5), torch.ones(3, 5)), "batch of 2"),
    ],
)
def test_bad_domains(domain, match):
    with pytest.raises(errors.InvalidDomain, match=match):
        lg.bound(network("relu"), domain=domain)


def test_other_norms_take_the_better_of_slopes_and_global_program():
    net, box = network("relu"), lg.Box(0.0, 1.0)
    overall = lg.bound(net, norm=1, method="lipsdp-neuron").value
    slopes = lg.bound(net, domain=box, norm=1, method="spectral").value
    assert lg.bound(net, domain=box, norm=1, method="lipsdp-neuron").value == overall
    assert lg.bound(net, domain=box, norm=1).value == min(overall, slopes)
    with pytest.raises(errors.UnsupportedQuery, match="spectral"):
        lg.bound(net, domain=box, norm=(1, math.inf), method="lipsdp-neuron")
