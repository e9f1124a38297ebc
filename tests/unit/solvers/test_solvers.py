"""LipSDP's solvers against Clarabel on an independently written program, and the structured program against its definition."""

from __future__ import annotations

import itertools
import math
import time
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import nn
from zoo import Residual, chain

import lipguard as lg
from lipguard.errors import SolverFailed
from lipguard.programs.feedback import feedback_of
from lipguard.programs.lipsdp import lipsdp
from lipguard.programs.slope_program import SlopeProgram
from lipguard.solvers.first_order import FirstOrder, least_rho, smoothed
from lipguard.solvers.interior_point import InteriorPoint, normal_matrix
from lipguard.solvers.threads import one_thread


@pytest.fixture(autouse=True)
def _one_thread():
    """Solvers called directly compete with nobody: on two spinning threads small factorisations take a hundred times longer."""
    with one_thread():
        yield


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "leaky": lambda: nn.LeakyReLU(0.1)}
SMALL = ((2, 10, 10, 1), (10, 30, 30, 30, 5))
METHODS = ("lipsdp-neuron", "lipsdp-layer")


def random_net(sizes, seed=0, activation=nn.ReLU):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(b, a, generator=generator, dtype=torch.float64) / a**0.5 for a, b in itertools.pairwise(sizes)]
    return chain(*weights, activation=activation)


def network(model, inputs):
    return lg.capture(model, torch.zeros(1, inputs, dtype=torch.float64))


def clarabel(net, tied=False, tight=True):
    """sqrt of the optimal rho of Z(rho, t) >= 0 (Fazlyab et al. 2019, Theorem 2), from the dense feedback form.

    With w = phi(p), p = A x + B w and slopes in [alpha, beta], every increment satisfies (w - alpha p)(beta p - w) >= 0:
    rho |x|^2 - |C w + D x|^2 - sum_j 2 t_j (w_j - alpha_j p_j)(beta_j p_j - w_j) must be a sum of squares.
    """
    fb = feedback_of(net)
    a, b, c, d = (m.numpy() for m in fb.dense())
    n, inputs = a.shape
    p, w = np.hstack([a, b]), np.hstack([np.zeros((n, inputs)), np.eye(n)])
    alpha, beta = fb.alpha.numpy()[:, None], fb.beta.numpy()[:, None]
    low, high = w - alpha * p, beta * p - w
    if tied:
        free = cp.Variable(len(fb.sizes))
        t = np.repeat(np.eye(len(fb.sizes)), fb.sizes, axis=0) @ free
    else:
        t = free = cp.Variable(n)
    rho = cp.Variable()
    half = low.T @ cp.diag(t) @ high
    y = np.hstack([d, c])
    lmi = rho * np.diag([1.0] * inputs + [0.0] * n) - half - half.T - y.T @ y
    problem = cp.Problem(cp.Minimize(rho), [lmi >> 0, free >= 0])
    options = {f"tol_{k}": 1e-11 for k in ("gap_abs", "gap_rel", "feas")} if tight else {}
    with warnings.catch_warnings():  # the last digits may not be reached; the comparisons grant what is missing
        warnings.simplefilter("ignore")
        problem.solve(solver="CLARABEL", **options)
    return math.sqrt(rho.value)


def meets(value, optimum):
    # The verified value lies above the true optimum. Clarabel's, asked for 1e-11, stops within some 1e-9 of it on either
    # side (its "reduced accuracy": 2.9e-9 above it on the wide input); 1e-5 is what is promised of ours.
    assert optimum * (1 - 5e-9) <= value <= optimum * (1 + 1e-5), (value, optimum, value / optimum - 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SMALL[:1])
def test_interior_point_meets_clarabel(sizes, activation, method):
    net = network(random_net(sizes, activation=ACTIVATIONS[activation]), sizes[0])
    meets(lg.bound(net, method=method, solver="interior-point").value, clarabel(net, method == "lipsdp-layer"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [SMALL[1], (20, 50, 50, 10)])
def test_interior_point_meets_clarabel_on_larger_networks(sizes, activation, method):
    net = network(random_net(sizes, activation=ACTIVATIONS[activation]), sizes[0])
    meets(lg.bound(net, method=method, solver="interior-point").value, clarabel(net, method == "lipsdp-layer"))


def residual(activation):
    generator = torch.Generator().manual_seed(5)

    def weights(a, b):
        return torch.randn(b, a, generator=generator, dtype=torch.float64) / a**0.5

    branches = [chain(weights(3, 5), weights(5, 3), activation=activation) for _ in range(2)]
    return nn.Sequential(Residual(*branches), activation())


SHAPES = {
    "residual relu": (lambda: residual(nn.ReLU), 3),
    "residual leaky": (lambda: residual(lambda: nn.LeakyReLU(0.3)), 3),
    "residual gelu": (lambda: residual(nn.GELU), 3),
    "steep negative slope": (lambda: random_net((3, 6, 5, 2), 1, lambda: nn.PReLU(init=-1.5)), 3),
    "wide input": (lambda: random_net((40, 6, 5, 3), 2), 40),
    "wide output": (lambda: random_net((3, 6, 5, 40), 3), 3),
    "one output": (lambda: random_net((6, 7, 7, 1), 4), 6),
    "one input": (lambda: random_net((1, 7, 7, 6), 5), 1),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_meet_clarabel(name, method):
    make, inputs = SHAPES[name]
    net = network(make().double(), inputs)
    meets(lg.bound(net, method=method, solver="interior-point").value, clarabel(net, method == "lipsdp-layer"))


def test_layers_tied_across_channels_of_different_slopes():
    # One multiplier t for all neurons of a PReLU with a slope per channel, in the network's own terms.
    model = random_net((3, 4, 2), 6, lambda: nn.PReLU(4))
    model[1].weight.data = torch.tensor([0.0, 0.25, -0.5, 1.5], dtype=torch.float64)
    net = network(model, 3)
    layer = lg.bound(net, method="lipsdp-layer", solver="interior-point")
    meets(layer.value, clarabel(net, tied=True))
    t = layer.evidence.t
    assert torch.allclose(t, t.mean().expand(4), rtol=1e-9)


@pytest.mark.parametrize("sizes", [(3, 8, 5, 2), (6, 7, 1)])
def test_the_transposed_network_has_the_same_optimum(sizes):
    weights = [
        torch.randn(b, a, generator=torch.Generator().manual_seed(a), dtype=torch.float64) for a, b in itertools.pairwise(sizes)
    ]
    there = lg.bound(network(chain(*weights), sizes[0]), solver="interior-point", tol=1e-9).value
    back = lg.bound(network(chain(*(w.T for w in reversed(weights))), sizes[-1]), solver="interior-point", tol=1e-9).value
    # Each within half its gap of the one optimum, and the checker's margin.
    assert there == pytest.approx(back, rel=1e-8)


@pytest.mark.parametrize("name", [*SHAPES, "20-50-50-10"])
def test_first_order_comes_within_a_percent(name):
    make, inputs = {**SHAPES, "20-50-50-10": (lambda: random_net((20, 50, 50, 10)), 20)}[name]
    net = network(make().double(), inputs)
    optimum = lg.bound(net, solver="interior-point").value
    found = lg.bound(net, solver="first-order").value
    # Both are verified; the interior point's is within 1e-7 of the optimum.
    assert optimum * (1 - 1e-6) <= found <= 1.01 * optimum


def test_first_order_on_a_deep_network_improves_the_closed_form():
    net = network(random_net((20, *[20] * 24, 5)), 20)
    program = lipsdp(feedback_of(net)).program
    t, rho = program.interior()
    assert least_rho(program, t) == pytest.approx(rho, rel=1e-9)  # two evaluations of one Schur complement
    # The optimum is not known; forty steps halve the bound at least.
    assert FirstOrder(max_iterations=40)(program).rho <= 0.25 * rho
    limited = lg.bound(net, solver="first-order", time_limit=1.0)
    assert limited.value <= 0.3 * lg.bound(net, method="spectral").value


def test_a_warm_start_reaches_the_same_optimum():
    net = network(random_net((6, 12, 12, 4)), 6)
    problem = lipsdp(feedback_of(net))
    cold = InteriorPoint(1e-8)(problem.program)
    warm = InteriorPoint(1e-8)(problem.program, start=cold.t)
    assert warm.rho == pytest.approx(cold.rho, rel=2e-8)
    far = InteriorPoint(1e-8)(problem.program, start=torch.full_like(cold.t, 1e6))
    assert far.rho == pytest.approx(cold.rho, rel=2e-8)


@pytest.mark.parametrize("solver", ["interior-point", "first-order", "scs", "clarabel"])
def test_a_deadline_leaves_a_verified_value(solver):
    net = network(random_net((10, 20, 20, 4)), 10)
    started = time.perf_counter()
    certificate = lg.bound(net, solver=solver, time_limit=0.0)
    seconds = time.perf_counter() - started
    assert certificate.rigor == "verified"
    assert certificate.value <= lg.bound(net, method="spectral").value * (1 + 1e-9)
    # Unlimited, Clarabel takes seconds here; compiling the problem is all that is left.
    assert seconds < 5


@pytest.mark.parametrize("solver", [InteriorPoint(1e-12, 1), InteriorPoint(1e-12, 2), FirstOrder(max_iterations=1)])
def test_multipliers_of_an_unfinished_solve_prove_their_rho(solver):
    program = lipsdp(feedback_of(network(random_net((6, 12, 12, 4)), 6))).program
    proposal = solver(program)
    least = float(torch.linalg.eigvalsh(program.z(proposal.rho * (1 + 1e-9), proposal.t))[0])
    assert least > 0


# --- the structured program against its definition ---


def program(sizes=(4, 3), channels=2, groups=None, weights=None, seed=0, skip=False):
    """Random blocks; with `skip` every layer sees the channels and the output sees every layer."""
    g = torch.Generator().manual_seed(seed)

    def block(a, b):
        return torch.randn(a, b, generator=g, dtype=torch.float64)

    rows = []
    for k, size in enumerate(sizes):
        row = {k - 1: block(size, channels if k == 0 else sizes[k - 1])}
        if skip:
            row |= {s: block(size, channels if s < 0 else sizes[s]) for s in range(-1, k - 1)}
        rows.append(row)
    out = {len(sizes) - 1: block(2, sizes[-1])}
    if skip:
        out |= {s: block(2, channels if s < 0 else sizes[s]) for s in range(-1, len(sizes) - 1)}
    return SlopeProgram(tuple(sizes), channels, tuple(rows), out, groups, weights)


def tied(sizes=(4, 3), **kwargs):
    groups = torch.tensor([k for k, size in enumerate(sizes) for _ in range(size)])
    weights = torch.linspace(0.5, 2.0, sum(sizes), dtype=torch.float64)
    return program(sizes, groups=groups, weights=weights, **kwargs)


PROGRAMS = {
    "chain": program(),
    "deep": program((3, 2, 4, 2), 3),
    "skips": program((3, 2, 4), 2, skip=True),
    "tied": tied(),
    "one layer": program((5,), 1),
}


def dense(p):
    """Q (n, N) and the matrices S_j (n, N, N), E, C0 of Z = rho E + sum_j t_j S_j - C0, from the blocks."""
    q = torch.zeros(p.neurons, p.order, dtype=torch.float64)
    y = torch.zeros(2, p.order, dtype=torch.float64)
    for k, row in enumerate(p.rows):
        for source, block in row.items():
            q[p.slices[k], p.slices[source]] = block
    for source, block in p.out.items():
        y[:, p.slices[source]] = block
    eye = torch.eye(p.order, dtype=torch.float64)
    s = torch.stack([torch.outer(e, e - r) + torch.outer(e - r, e) for e, r in zip(eye, q, strict=False)])
    return q, s, torch.diag((torch.arange(p.order) >= p.neurons).double()), y.T @ y


def symmetric(n, seed, definite=False):
    m = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return m @ m.T + torch.eye(n, dtype=torch.float64) if definite else m + m.T


# Two evaluations of sums of at most some hundred products of numbers of size 1 to 100.
ROUNDED = {"rtol": 1e-11, "atol": 1e-11}


@pytest.mark.parametrize("p", PROGRAMS.values(), ids=PROGRAMS)
def test_z_is_what_it_says(p):
    q, s, e, c0 = dense(p)
    t = torch.rand(p.neurons, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.allclose(p.z(3.0, t), 3.0 * e + torch.einsum("j,jab->ab", t, s) - c0, **ROUNDED)
    x = torch.randn(p.order, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(p.q(x), q @ x, **ROUNDED)


@pytest.mark.parametrize("p", PROGRAMS.values(), ids=PROGRAMS)
def test_adjoints(p):
    g = torch.Generator().manual_seed(3)
    t, rho, y = torch.randn(p.neurons, dtype=torch.float64, generator=g), 0.7, symmetric(p.order, 4)
    inner, corner = p.adjoint(y)
    assert float((p.linear(rho, t) * y).sum()) == pytest.approx(float(inner @ t + corner * rho), rel=1e-11)
    tau = torch.randn(p.gather(t).numel(), dtype=torch.float64, generator=g)
    assert float(p.spread(tau) @ t) == pytest.approx(float(tau @ p.gather(t)), rel=1e-11)
    assert torch.allclose(p.group(p.spread(tau)), tau, **ROUNDED)


@pytest.mark.parametrize("p", PROGRAMS.values(), ids=PROGRAMS)
def test_the_normal_matrix_is_its_definition(p):
    _, s, e, _ = dense(p)
    m, y = symmetric(p.order, 5, definite=True), symmetric(p.order, 6, definite=True)
    if p.groups is not None:
        spread = torch.stack([p.spread(c) for c in torch.eye(int(p.groups.max()) + 1, dtype=torch.float64)])
        s = torch.einsum("gj,jab->gab", spread, s)
    matrices = torch.cat([s, e[None]])
    # K_ij = <A_i, M A_j Y>, symmetrised by the symmetric part of M A_j Y.
    expected = torch.einsum("iab,bc,jcd,da->ij", matrices, m, matrices, y)
    expected = (expected + expected.T) / 2
    assert torch.allclose(normal_matrix(p, m, y), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("p", PROGRAMS.values(), ids=PROGRAMS)
def test_elimination_is_the_schur_complement(p):
    t, _ = p.interior()
    eliminated = p.eliminate(lambda k, _: t[p.slices[k]])
    n, z = p.neurons, p.z(0.0, t)
    expected = -(z[n:, n:] - z[n:, :n] @ torch.linalg.solve(z[:n, :n], z[:n, n:]))
    assert torch.allclose(eliminated.schur, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    x = torch.randn(p.channels, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    xw = eliminated.responses(x)
    assert torch.equal(xw[n:], x)
    # w maximises the form: the neurons' rows of Z (x, w) vanish.
    assert float((z @ xw)[:n].abs().max()) <= 1e-9 * float(z.abs().max() * xw.abs().max())
    assert torch.allclose(torch.diag(-xw.T @ z @ xw), torch.diag(x.T @ expected @ x), rtol=1e-8)


@pytest.mark.parametrize("p", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("margin", [0.05, 0.5, 1.0])
def test_interior_is_inside(p, margin):
    for guess in (None, torch.full((p.neurons,), 1e-3, dtype=torch.float64), torch.full((p.neurons,), 1e3, dtype=torch.float64)):
        t, rho = p.interior(guess, margin)
        assert float(torch.linalg.eigvalsh(p.z(rho * (1 + 1e-6), t))[0]) > 0
        assert float(torch.linalg.eigvalsh(p.z(rho * (1 - 1e-6), t))[0]) < 0
        if guess is not None:
            assert bool((t >= guess * (1 - 1e-12)).all())


@pytest.mark.parametrize("p", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("power", [4.0, 64.0])
def test_the_smoothed_gradient_is_the_slope_of_the_value(p, power):
    t, _ = p.interior()
    x = p.group(1.5 * t).log()
    found = smoothed(p, x, power)
    h = 1e-6
    for j, e in enumerate(torch.eye(len(x), dtype=torch.float64)):
        slope = (smoothed(p, x + h * e, power).value - smoothed(p, x - h * e, power).value) / (2 * h)
        # Central differences: h^2 times a third derivative of size 1 to 100, and u / h from rounding.
        assert float(found.gradient[j]) == pytest.approx(slope, abs=2e-8)
    assert found.largest == pytest.approx(least_rho(p, p.spread(x.exp())), rel=1e-12)
    assert math.exp(found.value) >= found.largest * (1 - 1e-13)  # the exponential of the logarithm rounds
    assert bool((found.curvature >= 0).all())


def test_outside_the_cone_there_is_no_value():
    p = PROGRAMS["chain"]
    t = torch.full((p.neurons,), 1e-9, dtype=torch.float64)
    assert smoothed(p, t.log(), 16.0) is None
    assert least_rho(p, t) == math.inf
    with pytest.raises(SolverFailed, match="not positive definite"):
        p.eliminate(lambda k, _: t[p.slices[k]])
