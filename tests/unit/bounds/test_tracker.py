"""`Tracker`: measurement after measurement of a changing model, each verified, within a time, and the model left alone."""

from __future__ import annotations

import copy
import itertools
import math
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from zoo import ZOO

import lipguard as lg
from lipguard.errors import InvalidDomain, InvalidModel, LipguardError, UnknownName, UnsupportedQuery

EXAMPLE = torch.zeros(1, 4)


def model(seed=0, sizes=(4, 16, 12, 3)):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(net, steps=30):
    """A few Adam steps on a fixed regression."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    y = torch.stack([x.sum(1), x[:, 0] * x[:, 1], x[:, 2].abs()], 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        ((net(x) - y) ** 2).mean().backward()
        optimizer.step()


def proved(tracker):
    """Both values of the last measurement are proved anew from their evidence."""
    last = tracker.last
    for certificate in (last.upper, last.lower):
        assert certificate.rigor == "verified"
        assert lg.verify(last.network, certificate).value == certificate.value


@pytest.mark.parametrize("name", ZOO)
def test_known_constants_are_enclosed_twice(name):
    known = ZOO[name]
    tracker = lg.Tracker(known.make(), known.example)
    for budget in (None, 0.01):
        upper, lower = tracker.update(budget)
        # The formulas are evaluated in float64: a few roundings.
        assert lower <= known.constant * (1 + 1e-15)
        assert known.constant <= upper * (1 + 1e-15)
        proved(tracker)


@pytest.mark.parametrize("method", ["lipsdp-neuron", "lipsdp-layer", "spectral"])
def test_values_while_training(method):
    net = model()
    tracker = lg.Tracker(net, EXAMPLE, method=method)
    for _ in range(3):
        train(net)
        upper, lower = tracker.update()
        alone = lg.bound(net, EXAMPLE, method=method).value
        # The tracker solves to a gap 1e-4 of the squared bound.
        assert alone * (1 - 1e-6) <= upper <= alone * (1 + 1e-4)
        assert 0 < lower <= upper
        proved(tracker)


@pytest.mark.parametrize("solver", ["interior-point", "first-order", "scs"])
def test_every_solver(solver):
    tracker = lg.Tracker(model(), EXAMPLE, solver=solver)
    upper, lower = tracker.update(0.2)
    assert lower <= upper <= lg.bound(model(), EXAMPLE, method="spectral").value * (1 + 1e-6)
    proved(tracker)


def test_no_time_at_all_still_gives_a_verified_value():
    net = model(sizes=(4, 200, 180, 3))  # too large to be solved in full at once
    tracker = lg.Tracker(net, EXAMPLE)
    for _ in range(3):
        train(net, 5)
        upper, lower = tracker.update(0.0, floor=0.0)
        assert 0 <= lower <= upper
        proved(tracker)
    assert upper >= lg.bound(net, EXAMPLE, method="lipsdp-neuron").value * (1 - 1e-6)


def test_a_time_is_kept():
    net = model(sizes=(4, 200, 180, 3))
    tracker = lg.Tracker(net, EXAMPLE)
    tracker.update(0.0, floor=0.0)  # imports, and the first lower bound's larger search
    train(net, 5)
    started = time.perf_counter()
    tracker.update(0.05, floor=0.0)
    # Capture and verification come on top, some tens of milliseconds; the rest is room for a busy machine.
    assert time.perf_counter() - started < 1.0


def test_a_warm_start_is_better_than_a_cold_one():
    net = model(sizes=(4, 200, 180, 3))
    train(net, 50)
    warm = lg.Tracker(net, EXAMPLE)
    warm.update(1.0)
    train(net, 2)
    cold = lg.Tracker(net, EXAMPLE)
    assert warm.update(0.0, floor=0.0)[0] < cold.update(0.0, floor=0.0)[0]


def test_the_state_restores_the_start():
    net = model(sizes=(4, 200, 180, 3))
    train(net, 50)
    first = lg.Tracker(net, EXAMPLE)
    first.update(1.0)
    state = copy.deepcopy(first.state_dict())
    plain = torch.load(_saved(state), weights_only=True)
    train(net, 2)
    resumed, fresh = lg.Tracker(net, EXAMPLE), lg.Tracker(net, EXAMPLE)
    resumed.load_state_dict(plain)
    # A resumed start is as good as the one in memory: both begin from the same multipliers and points, and take the same steps
    # up to when their clocks end them.
    here, there = first.update(0.0, floor=0.0), resumed.update(0.0, floor=0.0)
    assert there[0] == pytest.approx(here[0], rel=0.02)
    assert there[0] < fresh.update(0.0, floor=0.0)[0]
    proved(resumed)


def _saved(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_a_state_of_another_network_or_method_is_harmless():
    tracker = lg.Tracker(model(sizes=(4, 9, 3)), EXAMPLE)
    tracker.update()
    for other in (lg.Tracker(model(), EXAMPLE), lg.Tracker(model(), EXAMPLE, method="spectral"), lg.Tracker(model(1), EXAMPLE)):
        other.load_state_dict(tracker.state_dict())
        upper, lower = other.update()
        assert lower <= upper
        proved(other)
    wider = lg.Tracker(model(sizes=(6, 9, 3)), torch.zeros(1, 6))
    wider.load_state_dict(tracker.state_dict())
    wider.update()
    proved(wider)


def test_nothing_is_disturbed():
    net = model()
    net.train()
    train(net, 3)
    weights, grads = copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 - the generator to be kept
    threads = torch.get_num_threads()
    tracker = lg.Tracker(net, EXAMPLE)
    tracker.update()
    tracker.update(0.01)
    assert all(torch.equal(weights[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, net.parameters(), strict=True))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
    assert threads == torch.get_num_threads()
    assert net.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused_and_healed(value):
    net = model()
    tracker = lg.Tracker(net, EXAMPLE)
    before = tracker.update()
    kept = float(net[2].weight.data[0, 0])
    net[2].weight.data[0, 0] = value
    with pytest.raises(InvalidModel, match=r"2\.weight"):
        tracker.update()
    net[2].weight.data[0, 0] = kept
    assert tracker.update()[0] == pytest.approx(before[0], rel=1e-4)  # two solves to a gap of 1e-4


def test_mistakes_are_told_at_once():
    with pytest.raises(UnknownName, match="no method is called 'lipsdb'"):
        lg.Tracker(model(), EXAMPLE, method="lipsdb")
    with pytest.raises(UnknownName, match="no solver is called 'best'"):
        lg.Tracker(model(), EXAMPLE, solver="best")
    with pytest.raises(UnsupportedQuery, match="a norm is 1, 2 or inf"):
        lg.Tracker(model(), EXAMPLE, norm=3)
    with pytest.raises(InvalidDomain, match="2 entries, the network has 4 inputs"):
        lg.Tracker(model(), EXAMPLE, domain=lg.Box([0.0, 0.0], 1.0)).update()
    with pytest.raises(LipguardError, match="no lower bound is known from norm 2"):
        lg.Tracker(model(), EXAMPLE, norm=(2, 1)).update()


def test_layers_and_product():
    tracker = lg.Tracker(model(), EXAMPLE)
    tracker.update()
    last = tracker.last
    product = 1.0
    for norm in last.layers.values():
        product *= norm
    # The product of the layers' verified norms, rounded upward at every factor.
    assert last.spectral.value == pytest.approx(product, rel=1e-14)
    assert list(last.layers) == ["model.0", "model.2", "model.4"]
    assert last.gap == last.upper.value / last.lower.value - 1


def test_a_large_network_is_measured_by_what_it_can_afford() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 3))
    tracker = lg.Tracker(wide, torch.zeros(1, 1, 12, 12))
    upper, lower = tracker.update(0.1)
    assert tracker.last is not None and 0 < lower <= upper
    assert (
        tracker.last.upper.method == "lipsdp-channel"
        and "lipsdp-channel was chosen" in tracker.last.note
        and "1152 neurons" in tracker.last.note
    )
    # a resumed training keeps the method; a method asked for is taken at its word
    resumed = lg.Tracker(wide, torch.zeros(1, 1, 12, 12))
    resumed.load_state_dict(tracker.state_dict())
    assert resumed.update(0.1)[0] <= upper * (1 + 1e-6)
    assert resumed.last is not None and resumed.last.upper.method == "lipsdp-channel"
    asked = lg.Tracker(wide, torch.zeros(1, 1, 12, 12), method="toeplitz")
    assert asked.update(0.1)[0] >= upper and asked.last is not None and asked.last.note == ""
    small = lg.Tracker(nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)), torch.zeros(1, 1, 8))
    small.update(0.1)
    assert small.last is not None and small.last.upper.method == "lipsdp-neuron" and small.last.note == ""


def test_pieces_are_measured_as_pieces() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    tracker = lg.Tracker(model, torch.zeros(1, 4), method="lipsdp-split")
    upper, _ = tracker.update(0.5)
    assert tracker.last is not None and type(tracker.last.upper.evidence).__name__ == "Product"
    assert upper >= lg.bound(model, torch.zeros(1, 4)).value * (1 - 1e-9)


def test_a_domain_narrows_what_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for norm in (2, math.inf):
        everywhere, _ = lg.Tracker(model, torch.zeros(1, 4), norm=norm).update()
        upper, lower = lg.Tracker(model, torch.zeros(1, 4), norm=norm, domain=lg.Ball(torch.zeros(4), 0.01)).update()
        assert lower <= upper < everywhere


def test_the_toeplitz_bound_stands_in_where_norms_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from lipguard.bounds import choice

    monkeypatch.setattr(choice, "_LARGEST_CONVOLUTIONAL", 0)
    monkeypatch.setattr(choice, "_LARGEST_ELIMINATION", 0)
    network = lg.capture(nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU()), torch.zeros(1, 1, 8))
    assert choice.affordable(network) == "spectral"
    monkeypatch.setattr(choice, "_NORM_WORK", 0)
    assert choice.affordable(network) == "toeplitz"


def test_lower_bounds_of_many_outputs_need_no_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    from lipguard.bounds import sampling

    torch.manual_seed(0)
    network = lg.capture(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)), torch.zeros(1, 6))
    formed = lg.bound(network, method="sampling").value
    monkeypatch.setattr(sampling, "_LARGEST", 0)
    along = lg.bound(network, method="sampling").value
    # ten power iterations come near the largest singular value of a Jacobian of 5 rows
    assert 0.98 * formed <= along <= formed * (1 + 1e-9)
    for norm in (1, math.inf):
        assert 0 < lg.bound(network, method="sampling", norm=norm).value <= lg.bound(network, norm=norm).value


def test_deep_networks_are_climbed_on_from_the_last_point():
    net = model(sizes=(4, *[32] * 12, 3))
    tracker = lg.Tracker(net, EXAMPLE)
    ends = []
    for _ in range(3):
        train(net, 5)
        upper, lower = tracker.update(0.05, floor=5.0)
        assert lower <= upper <= lg.bound(net, EXAMPLE).value * 1.02
        proved(tracker)
        ends.append(tracker._warm.end)
    assert ends[0] is not None and ends[1] is not ends[0]
    # The gap that the ascent knows of is told.
    assert tracker.last.upper.details["gap"] <= 0.04
    other = lg.Tracker(net, EXAMPLE)
    other.load_state_dict(tracker.state_dict())
    upper, _ = other.update(0.05, floor=5.0)
    assert upper <= lg.bound(net, EXAMPLE).value * 1.02
