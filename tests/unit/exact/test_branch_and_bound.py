"""Branch and bound against rational arithmetic, both ends verified; degenerate networks, limits and interruptions."""

from __future__ import annotations

import importlib
import itertools
import math
import time

import numpy as np
import pytest
import torch
from exact_oracle import DOMAINS, Layer, Net, jacobians, norm_of, random_net, trained_net
from test_exact_degenerate import NETS as DEGENERATE
from test_exact_enumeration import LEAKY, OTHERS
from torch import nn

import lipguard as lg
from lipguard.errors import UnsupportedQuery
from lipguard.exact import exact
from lipguard.exact.problem import Problem
from lipguard.verify.phases.phase_form import phase_form

search = importlib.import_module("lipguard.exact.branch_and_bound")

INF = math.inf
BOX = lg.Box(-1.0, 1.0)
NORMS = ((1.0, 1.0), (2.0, 2.0), (INF, INF), (1.0, 2.0), (2.0, INF))

# The search goes on to a gap of 1e-9 where it ends soon; the check of a semidefinite leaf widens it by its rounding.
TOLERANCE = 1.2e-9

NETS = {
    **{f"random-{s}-{k}": (random_net, (list(s), k), {}) for k, s in enumerate(((2, 4, 3, 2), (3, 4, 3, 1), (2, 5, 2)))},
    **{f"trained-{s}-{k}": (trained_net, (list(s), k), {}) for k, s in enumerate(((2, 4, 3, 2), (2, 6, 1)))},
    **{f"skip-{k}": (random_net, ([2, 3, 3, 2], 20 + k), {"skip": True}) for k in range(2)},
    **{f"{name}": (random_net, ([2, 3, 2, 2], 40), kwargs) for name, kwargs in OTHERS.items()},
    "leaky-skip": (random_net, ([2, 3, 3, 2], 70), {"skip": True, **LEAKY}),
}


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    """Small searches go on to the finest gap however slow the machine is: what is compared is mathematics, not time."""
    module = importlib.import_module("lipguard.exact.branch_and_bound")
    monkeypatch.setattr(module, "_SOON", 60.0)
    monkeypatch.setattr(module, "_FINE_SECONDS", 60.0)


def agrees(net, domain, norms, method="branch-and-bound"):
    found = jacobians(net, domain)
    network = net.network()
    for norm in norms:
        expected = max(norm_of(j, norm) for j in found)
        enclosure = exact(network, domain=domain, norm=norm, method=method)
        assert enclosure.status == "closed" and enclosure.rigor == "verified", (norm, domain, enclosure)
        # Both bounds hold, up to the oracle's own rounding.
        assert enclosure.lower <= expected * (1 + 1e-12) + 1e-300 and enclosure.upper >= expected * (1 - 1e-12), (norm, domain)
        assert enclosure.lower == pytest.approx(expected, rel=1e-9, abs=1e-12), (norm, domain)
        assert enclosure.upper == pytest.approx(expected, rel=TOLERANCE, abs=1e-9), (norm, domain)
        assert lg.verify(network, enclosure.upper_certificate).value == enclosure.upper
        assert lg.verify(network, enclosure.lower_certificate).value == enclosure.lower


@pytest.mark.parametrize("name", NETS)
def test_every_norm_and_domain(name):
    make, args, kwargs = NETS[name]
    net = make(*args, **kwargs)
    for place, make_domain in DOMAINS.items():
        if place == "all" and any(layer.breaks != (0.0,) for layer in net.layers):
            continue
        agrees(net, make_domain(net.inputs), NORMS)


@pytest.mark.parametrize("name", DEGENERATE)
def test_regions_without_interior_do_not_count(name):
    net = DEGENERATE[name]
    for domain in (BOX, lg.Ball(0.0, 1.0), lg.Ball(0.0, 1.0, 1.0), None):
        agrees(net, domain, ((1.0, 1.0), (2.0, 2.0), (INF, INF)), "auto")


def test_bias_free_networks_beside_zero():
    # 0 is a corner, on a face, or outside: no search by directions, every region through 0 is degenerate there.
    for seed in range(3):
        net = random_net([2, 4, 3, 2], 60 + seed, bias=0.0)
        for domain in (
            lg.Box(0.0, 1.0),
            lg.Box([-1.0, 0.0], [1.0, 1.0]),
            lg.Box([-1.0, 0.5], 1.0),
            lg.Ball([1.0, 0.0], 1.0, 1.0),
        ):
            agrees(net, domain, ((2.0, 2.0), (1.0, 1.0)))
    assert phase_form(net.network(), BOX).directions and not phase_form(net.network(), lg.Box(0.0, 1.0)).directions
    assert not phase_form(net.network(), lg.Ball([0.6, 0.8], 1.0)).directions


@pytest.mark.parametrize("domain", [BOX, None, lg.Ball(0.0, 0.0)])
def test_networks_without_neurons(domain):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double().requires_grad_(False)
    for norm in (1, 2, INF):
        found = exact(model, torch.zeros(1, 3, dtype=torch.float64), domain=domain, norm=norm)
        expected = float(torch.linalg.matrix_norm(model.weight, norm))
        assert found.status == "closed" and found.rigor == "verified"
        assert found.lower <= expected * (1 + 1e-14) and found.upper >= expected * (1 - 1e-14)
        assert found.upper == pytest.approx(found.lower, rel=1e-11)


def test_where_it_does_not_answer():
    net = random_net([2, 3, 2, 2], 40, **OTHERS["hardtanh"]).network()
    with pytest.raises(UnsupportedQuery, match="break points at 0"):
        exact(net, method="branch-and-bound")
    auto = exact(net)
    assert auto.method != "branch-and-bound" and "break points at 0" in auto.choice
    with pytest.raises(lg.errors.LipguardError, match=r"\(inf, 1\.0\)|\(inf, 1\)"):
        exact(net, domain=BOX, norm=(INF, 1.0), method="branch-and-bound")


def test_a_domain_without_interior_keeps_its_differentiable_points():
    # 5 relu(x) - 5 relu(-x) = 5 x is differentiable on x = 0, where every region is flat: the bound must hold there.
    net = Net([Layer(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.zeros(2))], np.array([[5.0, -5.0]]))
    line = lg.Box([0.0, -1.0], [0.0, 1.0])
    form = phase_form(net.network(), line)
    phases = torch.tensor([[1, 1]])
    from lipguard.verify.phases.flat import is_flat

    assert not is_flat(form, phases[0], torch.tensor([1.0, 1.0], dtype=torch.float64), 0)
    wide = phase_form(net.network(), BOX)
    assert not wide.directions or is_flat(phase_form(net.network(), lg.Box([-1.0, 1.0], [1.0, 2.0])), phases[0], torch.ones(2), 0)


def wide_net(seed=0, sizes=(6, 20, 20, 2)):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double(), torch.zeros(1, sizes[0], dtype=torch.float64)


@pytest.mark.parametrize("norm", [2, INF])
def test_any_time_limit_gives_a_verified_enclosure(norm):
    model, example = wide_net()
    before = INF
    for limit in (0.0, 0.5, 2.0):
        start = time.monotonic()
        found = exact(model, example, domain=BOX, norm=norm, method="branch-and-bound", time_limit=limit)
        # One batch, the roots and the check come on top; the machine may be busy.
        assert time.monotonic() - start < limit + 10
        assert found.status == "time limit" and found.rigor == "verified"
        assert 0 < found.lower < found.upper <= before * (1 + 1e-3)
        assert BOX.contains(found.witness)
        before = found.upper


@pytest.mark.parametrize("place", ["sample", "node_bounds", "feasibility", "imply", "_try_point", "decide", "Node"])
@pytest.mark.parametrize("calls", [0, 3])
def test_an_interruption_returns_what_is_known(monkeypatch, place, calls):
    model, example = wide_net(1)
    whole = exact(model, example, domain=BOX, method="branch-and-bound", time_limit=0.5)
    target = Problem if place == "sample" else search
    original = getattr(target, place)
    count = itertools.count()

    def interrupt(*args, **kwargs):
        if next(count) == (0 if place == "sample" else calls):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(target, place, interrupt)
    found = exact(model, example, domain=BOX, method="branch-and-bound", time_limit=20)
    assert found.status == "interrupted" and found.rigor == "verified"
    assert 0 < found.lower <= whole.upper and found.upper >= whole.lower


def test_the_gap_is_respected():
    model, example = wide_net(0, (3, 8, 8, 2))
    loose = exact(model, example, domain=BOX, method="branch-and-bound", gap=0.2)
    tight = exact(model, example, domain=BOX, method="branch-and-bound", gap=1e-8)
    assert loose.gap <= 0.2 and tight.gap <= 1e-8 and loose.status == tight.status == "closed"
    assert loose.lower <= tight.upper and tight.lower <= loose.upper


def test_leaves_that_the_checker_refuses_leave_a_bound(monkeypatch):
    model, example = wide_net(0, (3, 8, 8, 2))
    refuse = search.NotCertified("refused for the test")

    def verify(*_):
        raise refuse

    monkeypatch.setattr(search, "verify", verify)
    found = exact(model, example, domain=BOX, method="branch-and-bound")
    assert found.status == "solver failed" and found.rigor == "verified" and "refused for the test" in found.choice
    assert found.upper_certificate.method.startswith("lipsdp") and found.lower <= found.upper


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_a_ball_in_many_dimensions_closes(radius):
    # Regions that meet the box around the ball but not the ball are refuted by their nearest point.
    model, example = wide_net(3, (20, 8, 8, 3))
    found = exact(model, example, domain=lg.Ball(0.25, radius), method="branch-and-bound")
    assert found.status == "closed" and found.rigor == "verified" and found.closed_region is None
    listed = exact(model, example, domain=lg.Ball(0.25, radius), method="enumeration", time_limit=20)
    assert listed.lower <= found.upper and found.lower <= listed.upper
    if listed.status == "closed":
        assert found.lower == pytest.approx(listed.lower, rel=1e-6)


def test_outputs_and_margins():
    model, example = wide_net(2, (3, 6, 6, 3))
    margin = exact(model, example, domain=BOX, outputs=(0, 2), method="branch-and-bound")
    listed = exact(model, example, domain=BOX, outputs=(0, 2), method="enumeration")
    assert margin.lower == pytest.approx(listed.lower, rel=1e-9) and margin.upper == pytest.approx(listed.lower, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_larger_networks_against_enumeration(seed):
    model, example = wide_net(seed, ((2, 10, 10, 2), (3, 7, 7, 1), (4, 8, 3))[seed % 3])
    for norm, domain in itertools.product((1, 2, INF), (BOX, lg.Ball(0.25, 0.5), lg.Ball(0.0, 1.0, 1.0), None)):
        found = exact(model, example, domain=domain, norm=norm, method="branch-and-bound")
        listed = exact(model, example, domain=domain, norm=norm, method="enumeration")
        assert found.status == "closed" and found.rigor == "verified"
        assert found.lower == pytest.approx(listed.lower, rel=1e-6) and found.upper == pytest.approx(listed.lower, rel=1e-6)
        assert found.upper >= listed.lower
