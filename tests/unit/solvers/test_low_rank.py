"""The low-rank dual: its points against the dense dual, its passes against differences, its gap against the optimum."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_deep import ACTIVATIONS, deep, network
from test_solvers import program
from test_verify import PROPERTY
from torch import nn
from zoo import Residual

import lipguard as lg
from lipguard.bounds import solving
from lipguard.bounds.channel import _Problem
from lipguard.errors import SolverFailed
from lipguard.programs.feedback import feedback_of
from lipguard.programs.lipsdp import lipsdp
from lipguard.programs.torus import Torus
from lipguard.solvers.first_order import least_rho
from lipguard.solvers.frequency_spheres import FrequencySpheres
from lipguard.solvers.interior_point import InteriorPoint
from lipguard.solvers.low_rank import LowRank
from lipguard.solvers.spheres import Spheres


def residual():
    torch.manual_seed(3)
    branch = [Residual(nn.Sequential(nn.Linear(6, 4), nn.LeakyReLU(0.2), nn.Linear(4, 6)), nn.Linear(6, 6)) for _ in range(2)]
    return nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.3), *branch, nn.GELU(), nn.Linear(6, 3)).double()


MODELS = {
    "chain": (deep([5, 4, 6, 3, 5, 4]), 5),
    "leaky": (deep([5, 4, 6, 3, 5, 4, 4], ACTIVATIONS["leaky"]), 5),
    "wide input": (deep([7, 4, 6, 3, 2]), 7),
    "wide output": (deep([2, 6, 5, 9]), 2),
    "residual": (residual(), 5),
    "one output": (deep([4, 8, 8, 1]), 4),
}


def problem(name, tied):
    model, inputs = MODELS[name]
    return lipsdp(feedback_of(network(model, inputs)), tied).program


def point(spheres, x):
    """The feasible point X, (N, p), and its value."""
    return spheres._forward(x)[2], math.exp(-spheres.passes(x).value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_points_are_feasible_and_their_value_is_the_duals(name, tied):
    p = problem(name, tied)
    spheres = Spheres(p)
    x, value = point(spheres, spheres.random(3))
    y = x @ x.T
    s, e = p.adjoint(y)
    size, _ = p.adjoint(y.abs())
    assert bool((p.gather(s).abs() <= 1e-12 * p.gather(s.abs() + size.abs()).clamp_min(1)).all())
    assert float(e) == pytest.approx(1, rel=1e-12)
    assert value == pytest.approx(float((p.constant * y).sum()), rel=1e-10)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_passes_give_the_slope_of_the_value(name, tied):
    spheres = Spheres(problem(name, tied))
    x = spheres.random(2)
    found = spheres.passes(x)
    h = 1e-6
    for j, e in enumerate(torch.eye(len(x), dtype=torch.float64)):
        slope = (spheres.passes(x + h * e).value - spheres.passes(x - h * e).value) / (2 * h)
        # Central differences: rounding 1e-16 times the value over h, and the third derivative times h^2.
        assert slope == pytest.approx(float(found.gradient[j]), abs=1e-7)
    # Along a sphere's own scale nothing changes.
    assert spheres.passes(3 * x).value == pytest.approx(found.value, abs=1e-12)
    assert bool((found.curvature >= 0).all())


@PROPERTY
@given(st.sampled_from(list(MODELS)), st.booleans(), st.integers(0, 10**6), st.integers(1, 4))
def test_no_multipliers_undercut_a_point(name, tied, seed, rank):
    p = problem(name, tied)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(p.order * rank, generator=g, dtype=torch.float64)
    _, value = point(Spheres(p), x)
    t, _ = p.interior()
    for _ in range(3):
        assert value <= least_rho(p, t) * (1 + 1e-12)
        t = t * (1 + torch.rand(1, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_optimum_is_the_interior_points(name, tied):
    p = problem(name, tied)
    optimum, found = InteriorPoint(1e-10)(p), LowRank()(p)
    assert found.gap <= 5e-6
    assert optimum.rho * (1 - 1e-9) <= found.rho <= optimum.rho * (1 + 5e-6)
    assert least_rho(p, found.t) == pytest.approx(found.rho, rel=1e-10)
    # The dual value that the gap tells of is below the optimum.
    assert found.rho * (1 - found.gap) <= optimum.rho * (1 + 1e-9)


@PROPERTY
@given(
    st.lists(st.sampled_from([1, 2, 3, 5, 8, 16]), min_size=3, max_size=8),
    st.sampled_from(list(ACTIVATIONS)),
    st.sampled_from([0.2, 0.6, 1.0, 1.4, 3.0]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_the_optimum_of_any_chain(sizes, activation, gain, tied, seed):
    p = lipsdp(feedback_of(network(deep(sizes, ACTIVATIONS[activation], gain, seed, bias=False), sizes[0])), tied).program
    optimum, found = InteriorPoint(1e-8)(p), LowRank()(p)
    assert found.rho * (1 - found.gap) <= optimum.rho * (1 + 1e-7)
    assert found.rho <= optimum.rho * (1 + 1e-5)


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 4.0, 0.25, 1.0, 9.0, 1.0, 0.5], dtype=torch.float64)])
def test_groups_of_other_weights(weights):
    p = program((4, 3), 2, groups=torch.tensor([0, 0, 1, 1, 2, 2, 3]), weights=weights)
    optimum, found = InteriorPoint(1e-10)(p), LowRank()(p)
    assert optimum.rho * (1 - 1e-9) <= found.rho <= optimum.rho * (1 + 5e-6)


@pytest.mark.parametrize("depth", [10, 20, 40])
@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_deep_chains_end_within_their_gap(depth, activation):
    p = lipsdp(feedback_of(network(deep([12] * (depth + 2), ACTIVATIONS[activation]), 12))).program
    found = LowRank()(p)
    assert found.gap <= LowRank.enough
    if depth <= 20:
        optimum = InteriorPoint(1e-5)(p)
        assert optimum.rho * (1 - 1e-4) <= found.rho <= optimum.rho * (1 + LowRank.enough)
        assert found.rho * (1 - found.gap) <= optimum.rho


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_weights_of_free_channels(name, tied):
    model, inputs = MODELS[name]
    p = lipsdp(feedback_of(network(model, inputs)), tied, "inputs").program
    assert p.free
    optimum, found = InteriorPoint(1e-10)(p), LowRank()(p)
    assert optimum.rho * (1 - 1e-9) <= found.rho <= optimum.rho * (1 + 5e-6)
    assert found.rho * (1 - found.gap) <= optimum.rho * (1 + 1e-9)
    # The weights are meant up to a factor: with the least that the multipliers allow they sum to rho.
    s = p.eliminate(lambda k, _: found.t[p.slices[k]]).schur
    root = found.weights.clamp_min(1e-9 * float(found.weights.mean())).rsqrt()
    factor = float(torch.linalg.eigvalsh(root[:, None] * s * root)[-1])
    assert factor * float((1 / root**2).sum()) == pytest.approx(found.rho, rel=1e-9)


def test_too_small_a_rank_is_raised():
    p = lipsdp(feedback_of(network(deep([64, 64, 64, 64]), 64))).program
    optimum = InteriorPoint(1e-9)(p).rho
    # A single vector ends in a local optimum; it is given company until the gap closes.
    assert LowRank(rank=1, max_steps=1000)(p).rho <= optimum * (1 + LowRank.enough)


@pytest.mark.parametrize("seed", [0, 1])
def test_one_output_needs_spare_rank(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)).double()
    found = LowRank()(lipsdp(feedback_of(network(model, 64))).program)
    # With six spare entries it ended 2 % above.
    assert found.gap <= 1e-5


def test_neurons_that_feel_or_are_felt_by_nothing():
    model = deep([5, 8, 8, 3])
    model[0].weight.data[2] = 0.0  # feels nothing
    model[2].weight.data[:, 4] = 0.0  # is felt by nothing
    p = lipsdp(feedback_of(network(model, 5))).program
    optimum, found = InteriorPoint(1e-10)(p), LowRank()(p)
    assert optimum.rho * (1 - 1e-9) <= found.rho <= optimum.rho * (1 + LowRank.enough)
    cut = deep([5, 8, 8, 3])
    cut[2].weight.data[:] = 0.0
    bound = lg.bound(network(cut, 5), method="lipsdp-neuron", solver="low-rank")
    assert bound.value == 0 or bound.value <= 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_weights_is_of_no_account(scale):
    model = deep([5, 8, 8, 3], bias=False)
    one = LowRank()(lipsdp(feedback_of(network(model, 5))).program)
    model[2].weight.data *= scale
    other = LowRank()(lipsdp(feedback_of(network(model, 5))).program)
    assert max(one.gap, other.gap) <= 1e-5
    assert other.rho == pytest.approx(scale**2 * one.rho, rel=one.gap + other.gap + 1e-12)


def test_the_random_state_is_left_alone_and_the_result_is_the_same():
    p = problem("chain", False)
    state = torch.get_rng_state()
    first = LowRank()(p)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.t, LowRank()(p).t)


def test_no_tensor_is_made_on_the_default_device():
    p, q = problem("chain", False), convolutional("image to vector")
    with torch.device("meta"):
        assert LowRank()(p).gap <= 1e-5
        assert LowRank().climb(FrequencySpheres(q), *q.interior()).gap <= 1e-5


def test_values_beyond_single_precision():
    deep_one = network(deep([32] * 62, gain=3.0), 32)
    tracker = lg.Tracker(deep([32] * 62, gain=3.0), torch.zeros(1, 32, dtype=torch.float64))
    upper, lower = tracker.update(0.2, floor=20.0)
    assert 0 <= lower <= upper
    # A square of 1e50 and more.
    assert 1e25 < upper <= 1.02 * lg.bound(deep_one).value
    p = lipsdp(feedback_of(deep_one)).program.to(torch.float32)
    found = LowRank(max_steps=20).climb(Spheres(p), torch.ones(p.neurons), math.inf)
    assert found.rho == math.inf and math.isfinite(found.dual)


def test_a_deadline_and_a_start():
    net = network(deep([10] * 14), 10)
    p = lipsdp(feedback_of(net)).program
    best = LowRank()(p)
    again = LowRank(min_steps=10, max_steps=20)(p, start=best.t)
    assert again.rho <= least_rho(p, p.interior(best.t, margin=0.05)[0]) * (1 + 1e-12)
    limited = lg.bound(net, solver="low-rank", time_limit=0.0)
    assert limited.rigor == "verified"
    assert limited.value <= lg.bound(net, method="spectral").value * (1 + 1e-9)


def test_what_it_cannot_solve_is_refused():
    p = program()
    with pytest.raises(SolverFailed, match="interior-point"):
        LowRank()(dataclasses.replace(p, scaling={0: torch.ones(p.sizes[0], dtype=torch.float64)}))


def test_the_choice_and_what_follows_an_open_gap(monkeypatch):
    medium = lipsdp(feedback_of(network(deep([64, 128, 128, 10]), 64))).program
    chain = lipsdp(feedback_of(network(deep([16] * 42), 16))).program
    assert solving.solved("auto", problem("chain", False), None, 1e-7, None)[0] == "interior-point"
    name, found = solving.solved("auto", chain, None, 1e-7, None)
    assert (name, found.gap <= LowRank.enough) == ("low-rank", True)
    monkeypatch.setattr(solving, "_SMALL", 100)
    name, found = solving.solved("auto", medium, None, 1e-7, None)
    assert (name, found.gap <= 1e-5) == ("low-rank", True)
    monkeypatch.setattr(solving, "_CLOSED", 0.0)
    name, exact = solving.solved("auto", medium, None, 1e-12, None)
    assert (name, exact.rho <= found.rho) == ("interior-point", True)
    name, _ = solving.solved("auto", medium, None, 1e-12, 0.0)
    assert name == "low-rank"


# --- over frequencies ---


def convolutional(name):
    torch.manual_seed(2)
    model, shape = {
        "image to vector": (nn.Sequential(*stack(), nn.Flatten(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2)), (1, 1, 7)),
        "image to image": (nn.Sequential(nn.Conv2d(1, 2, 3, 1, 1), nn.ReLU(), nn.Conv2d(2, 1, 3, 1, 1)), (1, 1, 4, 5)),
        "finer": (nn.Sequential(nn.Conv1d(1, 2, 3, 2, 1), nn.ReLU(), nn.ConvTranspose1d(2, 1, 4, 2, 1), nn.ReLU()), (1, 1, 6)),
    }[name]
    problem = _Problem(Torus(lg.capture(model.double(), torch.zeros(shape, dtype=torch.float64))), False)
    return problem.program


def stack():
    return nn.Conv1d(1, 3, 3, 1, 1), nn.ReLU(), nn.Conv1d(3, 2, 3, 2, 1), nn.ReLU()


CONVOLUTIONAL = ("image to vector", "image to image", "finer")


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_the_passes_over_frequencies_give_the_slope_of_the_value(name):
    dual = FrequencySpheres(convolutional(name))
    x = dual.random(2)
    found = dual.passes(x)
    h = 1e-6
    # Imaginary parts where f = -f, zero at the start, are moved by the rounding of the blocks alone.
    for j in x.nonzero()[:, 0].tolist():
        e = torch.zeros_like(x)
        e[j] = h
        slope = (dual.passes(x + e).value - dual.passes(x - e).value) / (2 * h)
        assert slope == pytest.approx(float(found.gradient[j]), abs=1e-7)
    assert bool((found.gradient[x == 0].abs() <= 1e-14).all())
    assert dual.passes(3 * x).value == pytest.approx(found.value, abs=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_points_over_frequencies_are_feasible(name):
    p = convolutional(name)
    dual = FrequencySpheres(p)
    _, unit, points, pre, _ = dual._forward(dual.random(2))
    assert float(dual._sum(-1, unit[-1], unit[-1]).mean()) == pytest.approx(1, rel=1e-12)
    for k in dual.layers:
        # v.(v - z) = 0, summed over a multiplier's components at all frequencies.
        away = points[k] - pre[k]
        size = dual._length(k, points[k]) * dual._length(k, away)
        assert bool((dual._sum(k, points[k], away).abs() <= 1e-13 * size).all())


@PROPERTY
@given(st.sampled_from(CONVOLUTIONAL), st.integers(1, 3), st.integers(0, 10**6))
def test_no_multipliers_undercut_a_point_over_frequencies(name, rank, seed):
    p = convolutional(name)
    dual = FrequencySpheres(p)
    x = dual.random(rank) * torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * (1 + torch.rand(len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    t, rho = p.interior()
    found = LowRank().climb(dual, t, rho)
    assert math.exp(-dual.passes(x).value) <= found.rho * (1 + 1e-12)
    assert found.gap <= 1e-6
    assert p.rho(lambda k, _: found.t[p.groups[k]]) == pytest.approx(found.rho, rel=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_single_precision_climbs_as_high(name):
    p = convolutional(name)
    start = p.interior()
    double, single = (LowRank(tol=1e-4).climb(FrequencySpheres(p, s), *start) for s in (False, True))
    assert single.rho == pytest.approx(double.rho, rel=1e-4)
    assert single.dual == pytest.approx(double.dual, rel=1e-4)


def test_an_ascent_goes_on_from_its_neighbours_end():
    p = lipsdp(feedback_of(network(deep([64, 128, 128, 10]), 64))).program
    start = p.interior()
    first = LowRank().climb(Spheres(p), *start)
    again = LowRank(max_steps=1).climb(Spheres(p), *start, start=first.end)
    cold = LowRank(max_steps=1).climb(Spheres(p), *start)
    # What is added to the end, so that no direction is lost, costs a little at first.
    assert again.rho <= first.rho * 1.01 < cold.rho
