"""Deep networks: fronts against exact arithmetic and the dense proof, relative coordinates, splitting, the chordal form."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solvers import ROUNDED, dense, program, symmetric
from test_verify import PROPERTY, fractions, semidefinite, structures
from torch import nn
from zoo import Residual

import lipguard as lg
from lipguard.audit.encoding import certificate_from_json, certificate_json
from lipguard.bounds.cost import footprint
from lipguard.certificate import Multipliers, Product, SolverReport
from lipguard.errors import NotCertified, UnsupportedQuery
from lipguard.network.pieces import pieces, separators
from lipguard.programs.feedback import feedback_of
from lipguard.programs.lipsdp import lipsdp
from lipguard.programs.rewriting import slope_restricted
from lipguard.solvers.first_order import FirstOrder
from lipguard.solvers.interior_point import InteriorPoint, normal_matrix
from lipguard.solvers.relative import relative, to_relative
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.elimination import by_layers
from lipguard.verify.lmi.form import feedback_form
from lipguard.verify.lmi.fronts import front, largest_eigenvalue, real
from lipguard.verify.lmi.multipliers import prover

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "leaky": lambda: nn.LeakyReLU(0.1)}


def deep(sizes, activation=nn.ReLU, gain=2**0.5, seed=0, bias=True):
    """Gaussian weights of variance gain^2 / fan-in: gain sqrt 2 is He's."""
    g = torch.Generator().manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layer = nn.Linear(a, b, bias=bias, dtype=torch.float64)
        layer.weight.data = gain * torch.randn(b, a, generator=g, dtype=torch.float64) / a**0.5
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def network(model, inputs):
    return lg.capture(model, torch.zeros(1, inputs, dtype=torch.float64))


# --- one front ---


@st.composite
def one_front(draw):
    """A well or badly conditioned pivot, a cross block, entrywise radii, all rescaled by powers of two."""
    n, m, seed = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 10**6))
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=g, dtype=torch.float64)
    p = root @ root.T + 10.0 ** draw(st.integers(-6, 0)) * torch.eye(n, dtype=torch.float64)
    x = torch.randn(n, m, generator=g, dtype=torch.float64) * draw(st.sampled_from([0.0, 1e-9, 1.0, 1e6]))
    size = draw(st.sampled_from([0.0, 1e-15, 1e-12]))
    scale = torch.tensor(draw(st.lists(st.integers(-60, 60), min_size=n, max_size=n)))
    p, x = torch.ldexp(torch.ldexp((p + p.T) / 2, scale[:, None]), scale), torch.ldexp(x, scale[:, None])
    return p, x, size * p.abs(), size * x.abs(), seed


@PROPERTY
@given(one_front())
def test_a_front_is_semidefinite_throughout_its_radius(case):
    p, x, rp, rx, seed = case
    u = front(Enclosed(p[None], rp[None]), Enclosed(x[None], rx[None]))[0]
    assert torch.equal(u, u.T)
    g = torch.Generator().manual_seed(seed)
    for _ in range(3):
        signs = torch.randint(-1, 2, p.shape, generator=g).double()
        signs = torch.tril(signs) + torch.tril(signs, -1).T
        cross = fractions(x)
        shifts = torch.randint(-1, 2, x.shape, generator=g).double()
        cross = [[a + b for a, b in zip(r, s, strict=True)] for r, s in zip(cross, fractions(shifts * rx), strict=True)]
        pivot = [[a + b for a, b in zip(r, s, strict=True)] for r, s in zip(fractions(p), fractions(signs * rp), strict=True)]
        corner = fractions(u)
        rows = [a + b for a, b in zip(pivot, cross, strict=True)]
        rows += [[row[j] for row in cross] + corner[j] for j in range(len(corner))]
        assert semidefinite(rows)


def test_what_a_front_adds_is_rounding():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(4, 20, 20, generator=g, dtype=torch.float64)
    p, x = root @ root.mT + torch.eye(20, dtype=torch.float64), torch.randn(4, 20, 15, generator=g, dtype=torch.float64)
    p = (p + p.mT) / 2
    least = x.mT @ torch.linalg.solve(p, x)
    # The shift of Rump's test is about 4 (35)^2 u on matrices of condition 1e2 at most.
    assert float((front(Enclosed(p), Enclosed(x)) - least).abs().max()) <= 1e-10 * float(least.abs().max())


@pytest.mark.parametrize("entry", [0.0, -1.0, math.nan, math.inf])
def test_a_front_without_a_positive_pivot_is_refused(entry):
    p = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    p[1, 2, 2] = entry
    with pytest.raises(NotCertified):
        front(Enclosed(p), Enclosed(torch.ones(2, 3, 2, dtype=torch.float64)))
    with pytest.raises(NotCertified):
        front(Enclosed(p), Enclosed(torch.ones(2, 3, 0, dtype=torch.float64)))


def test_hermitian_matrices_and_their_real_images():
    g = torch.Generator().manual_seed(1)
    z = torch.randn(5, 4, 4, generator=g, dtype=torch.complex128)
    values = torch.linalg.eigvalsh(z + z.mH)
    assert torch.allclose(torch.linalg.eigvalsh(real(z + z.mH)), values.repeat_interleave(2, -1), **ROUNDED)


@pytest.mark.parametrize("n", [1, 7, 40])
def test_the_largest_eigenvalue_is_enclosed(n):
    s = symmetric(n, n, definite=True)
    exact = float(torch.linalg.eigvalsh(s)[-1])
    radius = torch.full_like(s, 1e-9)
    assert exact < largest_eigenvalue(Enclosed(s[None])) <= exact * (1 + 1e-9)
    # The matrix of ones times the radius is within the radius; Weyl's inequality bounds what it adds.
    assert float(torch.linalg.eigvalsh(s + radius)[-1]) <= largest_eigenvalue(Enclosed(s[None], radius[None])) <= exact + 3e-9 * n


# --- all fronts against the dense proof ---


def either_end(net, t, rho):
    form = feedback_form(net)
    return form, [(form, t), (form.transposed(), rho / (t * (form.beta - form.alpha) ** 2))]


@settings(PROPERTY, max_examples=60)
@given(structures(), st.floats(0.01, 1.0))
def test_fronts_prove_what_the_dense_matrix_proves(net, margin):
    problem = lipsdp(feedback_of(net))
    if not problem.program.sizes:
        return
    t, rho = problem.program.interior(margin=margin)
    rho *= 1.5
    t = problem.to_network(t, rho)
    form, ways = either_end(net, t, rho)
    prove = prover(form, t)
    found = []
    for b, multipliers in ways:
        try:
            found.append(by_layers(b, multipliers).least_rho())
        except NotCertified:
            continue
    # Multipliers of slopes widened to 1e-6 are too large for the one order or the other.
    assert found or bool((form.beta - form.alpha < 1e-5).any())
    if found and prove(rho * (1 + 1e-9)):
        assert min(found) <= rho * (1 + 1e-6)
    backwards = by_layers(*ways[0]).least_rho() if len(found) == 2 else None
    if backwards is not None and backwards < 1e12:
        # The first way is about the same multipliers: least rho to least rho.
        assert prove(backwards * (1 + 1e-6))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [[16] * 30, [3, *[8] * 40, 20], [60, *[12] * 25, 3]])
def test_deep_chains_are_proved_where_the_dense_matrix_is_not(sizes, activation):
    net = network(deep(sizes, ACTIVATIONS[activation]), sizes[0])
    problem = lipsdp(feedback_of(net))
    t, rho = problem.program.interior()
    certificate = dataclasses.replace(
        lg.bound(net, method="spectral"), evidence=Multipliers(problem.to_network(t, rho), rho), method="lipsdp-neuron"
    )
    # Rounding through forty layers, each of which adds its shift.
    assert math.sqrt(rho) <= lg.verify(net, certificate).value <= math.sqrt(rho) * (1 + 1e-6)


def test_fronts_of_other_multipliers_are_refused_or_larger():
    net = network(deep([8] * 14), 8)
    best = lg.bound(net, solver="first-order")
    t, rho = best.evidence.t, best.evidence.rho
    for k, factor in ((0, 0.3), (5, 0.0), (11, math.nan), (3, math.inf), (7, -1.0)):
        wrong = t.clone()
        wrong[8 * k : 8 * k + 8] *= factor
        with pytest.raises(NotCertified):
            lg.verify(net, dataclasses.replace(best, evidence=Multipliers(wrong, rho)))
    with pytest.raises(NotCertified):
        lg.verify(net, dataclasses.replace(best, evidence=Multipliers(t, 0.8 * rho)))
    with pytest.raises(NotCertified):
        lg.verify(net, dataclasses.replace(best, evidence=Multipliers(t[:-1], rho)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(2))
def test_a_deep_bound_lies_above_every_sample(activation, seed):
    net = network(deep([5, *[8] * 10, 4], ACTIVATIONS[activation], seed=seed), 5)
    upper = lg.bound(net, solver="first-order")
    assert upper.rigor == "verified"
    assert lg.bound(net, method="sampling").value <= upper.value


# --- the first-order method ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["chain", "leaky", "wide input", "residual"])
def test_the_gradient_in_relative_coordinates(name, tied):
    torch.manual_seed(3)
    branch = [Residual(nn.Sequential(nn.Linear(6, 4), nn.LeakyReLU(0.2), nn.Linear(4, 6)), nn.Linear(6, 6)) for _ in range(2)]
    model, inputs = {
        "chain": (deep([5, 4, 6, 3, 5, 4]), 5),
        "leaky": (deep([5, 4, 6, 3, 5, 4, 4], lambda: nn.LeakyReLU(0.2)), 5),
        "wide input": (deep([7, 4, 6, 3, 2]), 7),
        "residual": (nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.3), *branch, nn.GELU(), nn.Linear(6, 3)).double(), 5),
    }[name]
    p = lipsdp(feedback_of(network(model, inputs)), tied).program
    t = p.spread(p.group(1.1 * p.interior()[0]))
    y = to_relative(p, t)
    found = relative(p, y, 4.0)
    assert torch.allclose(found.t, t, rtol=1e-12)
    h = 1e-6
    for j, e in enumerate(torch.eye(len(y), dtype=torch.float64)):
        slope = (relative(p, y + h * e, 4.0).value - relative(p, y - h * e, 4.0).value) / (2 * h)
        # Central differences: rounding 1e-16 times the value over h, and the third derivative times h^2.
        assert slope == pytest.approx(float(found.gradient[j]), abs=1e-6)


@pytest.mark.parametrize("depth", [10, 20])
@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_the_first_order_method_comes_near_the_optimum(depth, activation):
    p = lipsdp(feedback_of(network(deep([12] * (depth + 2), ACTIVATIONS[activation]), 12))).program
    optimum = InteriorPoint(1e-5)(p)
    assert optimum.gap <= 1e-4
    assert optimum.rho * (1 - 1e-4) <= FirstOrder()(p).rho <= optimum.rho * 1.01


def test_deep_programs_keep_their_chain():
    leaky = lipsdp(feedback_of(network(deep([16] * 42, ACTIVATIONS["leaky"]), 16))).program
    assert leaky.slopes is not None
    assert max(len(row) for row in leaky.rows) == 1


# --- programs with slopes ---


@pytest.mark.parametrize("skip", [False, True])
def test_programs_with_slopes_are_what_they_say(skip):
    g = torch.Generator().manual_seed(2)
    p = program((3, 2, 4), 2, skip=skip)
    alpha = torch.rand(9, generator=g, dtype=torch.float64) - 0.5
    p = dataclasses.replace(p, slopes=(alpha, alpha + 0.5 + torch.rand(9, generator=g, dtype=torch.float64)))
    q, _, e, c0 = dense(p)
    alpha, beta = p.slopes
    eye = torch.eye(p.order, dtype=torch.float64)[: p.neurons]
    low, high = eye - alpha[:, None] * q, eye - beta[:, None] * q
    s = torch.einsum("ja,jb->jab", low, high)
    s = s + s.mT
    t = torch.rand(p.neurons, dtype=torch.float64, generator=g) + 0.1
    assert torch.allclose(p.z(3.0, t), 3.0 * e + torch.einsum("j,jab->ab", t, s) - c0, **ROUNDED)
    y = symmetric(p.order, 4, definite=True)
    assert torch.allclose(p.adjoint(y)[0], torch.einsum("jab,ab->j", s, y), **ROUNDED)
    m, matrices = symmetric(p.order, 5, definite=True), torch.cat([s, e[None]])
    expected = torch.einsum("iab,bc,jcd,da->ij", matrices, m, matrices, y)
    assert torch.allclose(normal_matrix(p, m, y), (expected + expected.T) / 2, rtol=1e-10, atol=1e-9)
    t, rho = p.interior()
    assert float(torch.linalg.eigvalsh(p.z(rho * (1 + 1e-6), t))[0]) > 0
    assert float(torch.linalg.eigvalsh(p.z(rho * (1 - 1e-6), t))[0]) < 0


@pytest.mark.parametrize("sizes", [(6, 5, 5, 5, 5, 3), (3, 5, 4, 5, 3), (3, 4, 4, 4, 7)])
@pytest.mark.parametrize("tied", [False, True])
def test_slopes_kept_or_not_give_one_optimum(sizes, tied, monkeypatch):
    home = importlib.import_module("lipguard.programs.lipsdp")
    net = network(deep(sizes, lambda: nn.PReLU(init=-0.5, dtype=torch.float64)), sizes[0])
    values = []
    for kept in (False, True):
        monkeypatch.setattr(home, "_keeps_slopes", lambda *_, kept=kept: kept)
        problem = lipsdp(feedback_of(net), tied)
        assert (problem.program.slopes is not None) == kept
        solved = InteriorPoint(1e-9)(problem.program)
        values.append(solved.rho)
        # The multipliers mean the same to the checker.
        assert prover(feedback_form(net), problem.to_network(solved.t, solved.rho * (1 + 1e-8)))(solved.rho * (1 + 1e-6))
    assert values[0] == pytest.approx(values[1], rel=1e-8)


# --- the chordal form ---


@pytest.mark.parametrize("method", ["lipsdp-neuron", "lipsdp-layer"])
@pytest.mark.parametrize("name", ["chain", "leaky", "residual"])
def test_the_chordal_form_has_the_same_optimum(name, method):
    torch.manual_seed(4)
    model, inputs = {
        "chain": (deep([5, 6, 5, 6, 4]), 5),
        "leaky": (deep([4] * 7, lambda: nn.LeakyReLU(0.2)), 4),
        "residual": (
            nn.Sequential(nn.Linear(4, 5), nn.ReLU(), Residual(nn.Linear(5, 5), nn.ReLU()), nn.Linear(5, 2)).double(),
            4,
        ),
    }[name]
    net = network(model, inputs)
    chordal = lg.bound(net, method=method, solver="clarabel", chordal=True).value
    optimum = lg.bound(net, method=method, solver="interior-point", tol=1e-9).value
    # Clarabel stops at 1e-8 absolute and relative, of values near 1.
    assert optimum * (1 - 1e-8) <= chordal <= optimum * (1 + 1e-6)


def test_only_conic_solvers_have_a_chordal_form():
    with pytest.raises(UnsupportedQuery, match="chordal"):
        lg.bound(network(deep([3, 4, 3]), 3), solver="interior-point", chordal=True)


# --- pieces ---


def test_a_split_bound_is_the_product_of_its_pieces():
    net = network(deep([6] * 10), 6)
    split = lg.bound(net, method="lipsdp-split", pieces=3)
    assert isinstance(split.evidence, Product)
    parts = pieces(net, split.evidence.cuts)
    x = torch.randn(5, 6, dtype=torch.float64)
    y = x
    for part in parts:
        y = part(y)
    assert torch.equal(y, net(x))
    product = math.prod(lg.bound(part).value for part in parts)
    assert split.value == pytest.approx(product, rel=1e-9)
    whole, spectral = lg.bound(net).value, lg.bound(net, method="spectral").value
    assert whole * (1 - 1e-9) <= split.value <= spectral
    assert lg.bound(net, method="lipsdp-split", pieces=1).value == pytest.approx(whole, rel=1e-9)
    again = certificate_from_json(certificate_json(split))
    assert lg.verify(net, again).value == split.value


def test_skips_are_not_cut_through():
    net = network(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Residual(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)).double(), 3)
    for i in separators(net):
        parts = pieces(net, (i,))
        x = torch.randn(4, 3, dtype=torch.float64)
        assert torch.equal(parts[1](parts[0](x)), net(x))
    inside = set(range(1, len(net.nodes) - 1)) - set(separators(net))
    assert inside
    for i in inside:
        with pytest.raises(ValueError, match="do not cut"):
            pieces(net, (i,))


def test_corrupted_pieces_are_refused():
    net = network(deep([5, 6, 4, 6, 5, 3]), 5)
    good = lg.bound(net, method="lipsdp-split", pieces=3)
    cuts, factors = good.evidence.cuts, good.evidence.factors
    assert len(factors) == 3
    small = Multipliers(factors[1].t, 0.5 * factors[1].rho)
    wrong = [
        Product(cuts[:1], factors),
        Product(cuts, factors[:2]),
        Product(cuts, (*factors, factors[0])),
        Product(cuts, (factors[1], factors[0], factors[2])),
        Product(cuts, (factors[0], small, factors[2])),
        Product((cuts[1], cuts[0]), factors),
        Product((cuts[0], cuts[0]), factors),
        Product((0, cuts[1]), factors),
        Product((cuts[0], 10**6), factors),
        Product(cuts, (factors[0], SolverReport("x", ""), factors[2])),
    ]
    for evidence in wrong:
        with pytest.raises(NotCertified):
            lg.verify(net, dataclasses.replace(good, evidence=evidence))
    with pytest.raises(UnsupportedQuery):
        lg.bound(net, method="lipsdp-split", pieces=0)


def test_without_joblib_the_pieces_are_solved_one_by_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib", None)
    net = network(deep([4] * 6), 4)
    alone = lg.bound(net, method="lipsdp-split", pieces=2)
    together = lg.bound(net, method="lipsdp-split", pieces=2, jobs=2)
    assert together.value == alone.value
    assert "one by one" in together.note


@pytest.mark.slow
def test_processes_give_what_one_gives():
    net = network(deep([8] * 9), 8)
    assert lg.bound(net, method="lipsdp-split", jobs=2).value == lg.bound(net, method="lipsdp-split").value


# --- size ---


def test_a_network_too_large_is_refused_before_anything_is_allocated():
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    with pytest.raises(UnsupportedQuery, match=r"GB for 524288 neurons.*method="):
        lg.bound(model, torch.zeros(1, 3, 64, 64), method="lipsdp-neuron")


def test_depth_alone_is_no_reason_to_refuse():
    net = network(deep([784, *[100] * 310, 10], gain=1.0), 784)
    assert slope_restricted(net).neurons > 30_000
    needed, widest, _ = footprint(net)
    # A layer and the one before it; or the first and the input, of which it and the outputs see 110 dimensions.
    assert widest == 210
    assert needed < 2e8


@pytest.mark.slow
@pytest.mark.parametrize("gain", [2**0.5, 3**-0.5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fifty_layers_of_a_hundred(activation, gain):
    model = deep([784, *[100] * 50, 10], ACTIVATIONS[activation], gain)
    certificate = lg.bound(network(model, 784))
    assert certificate.rigor == "verified"
    assert 20 * certificate.value <= eclipse_fast([layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)])


def eclipse_fast(weights):
    """Closed form of Xu and Sivaranjani, arXiv:2404.04375, with T_i = I / lambda_max(S_i)."""
    s = weights[0] @ weights[0].T
    for w in weights[1:]:
        t = 1 / float(torch.linalg.eigvalsh(s)[-1])
        m = 2 * t * torch.eye(len(s), dtype=s.dtype) - t * t * s
        s = w @ torch.linalg.solve(m, w.T)
    return math.sqrt(float(torch.linalg.eigvalsh(s)[-1]))
