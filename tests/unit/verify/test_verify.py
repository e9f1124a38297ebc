"""The checker: its positive-definiteness test against rational arithmetic, and what it makes of corrupted evidence."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import ZOO, Residual, chain, linear, matrix

import lipguard as lg
from lipguard.certificate import Certificate, Factors, Multipliers, SolverReport, Witness
from lipguard.errors import NotCertified
from lipguard.network import Affine
from lipguard.programs.feedback import feedback_of
from lipguard.programs.lipsdp import lipsdp
from lipguard.rounding import gamma, proves_positive_definite, sqrt_up, sum_up, up
from lipguard.verify.lmi.form import feedback_form

INF = math.inf
PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)


def fractions(tensor):
    return [[Fraction(float(v)) for v in row] for row in torch.atleast_2d(tensor)]


def semidefinite(rows):
    """Whether a symmetric matrix of fractions is positive semidefinite: exact elimination with diagonal pivots."""
    rows = [list(row) for row in rows]
    alive = list(range(len(rows)))
    while alive:
        if any(rows[i][i] < 0 for i in alive):
            return False
        pivot = next((i for i in alive if rows[i][i] > 0), None)
        if pivot is None:
            return all(rows[i][j] == 0 for i in alive for j in alive)
        alive.remove(pivot)
        for i in alive:
            factor = rows[i][pivot] / rows[pivot][pivot]
            for j in alive:
                rows[i][j] -= factor * rows[pivot][j]
    return True


def test_the_oracle_knows_semidefinite_from_indefinite():
    assert semidefinite([[Fraction(1), Fraction(1)], [Fraction(1), Fraction(1)]])
    assert not semidefinite([[Fraction(1), Fraction(2)], [Fraction(2), Fraction(3)]])
    assert not semidefinite([[Fraction(0), Fraction(1)], [Fraction(1), Fraction(5)]])
    assert semidefinite([[Fraction(0), Fraction(0)], [Fraction(0), Fraction(5)]])


@st.composite
def nearly_singular(draw):
    """G G' of a tall or wide G, with one diagonal entry moved by a relative amount of 1e-17 to 1e-10 up or down, and rescaled."""
    n, k, seed = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(0, 10**6))
    g = torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = g @ g.T
    i = draw(st.integers(0, n - 1))
    a[i, i] += a[i, i] * draw(st.sampled_from([-1, 1])) * 10.0 ** draw(st.floats(-17, -10))
    scale = torch.tensor(draw(st.lists(st.integers(-100, 100), min_size=n, max_size=n)))
    a = torch.ldexp(torch.ldexp(a, scale[:, None]), scale)
    return torch.tril(a) + torch.tril(a, -1).T


@PROPERTY
@given(nearly_singular())
def test_no_indefinite_matrix_is_proved(a):
    if proves_positive_definite(a.clone()):
        assert semidefinite(fractions(a))


@PROPERTY
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_a_clearly_definite_matrix_is_proved(n, seed):
    # lambda_min >= 1e-10 lambda_max: far above the n^2 u that the test gives away.
    g = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = g @ g.T
    a.diagonal().add_(1e-10 * float(a.diagonal().sum()) + 1e-300)
    assert proves_positive_definite((a + a.T) / 2)


@PROPERTY
@given(st.integers(2, 5), st.integers(0, 10**6), st.floats(-3, 0))
def test_a_radius_covers_every_matrix_within_it(n, seed, size):
    # The worst matrix within the radius R takes R_ij sign(x_i x_j) off; it is built exactly, for the weakest direction x.
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, n, generator=generator, dtype=torch.float64)
    a = torch.round((g @ g.T) * 2**20) / 2**20
    radius = torch.round(10**size * torch.rand(n, n, generator=generator, dtype=torch.float64) * 2**20) / 2**20
    radius = torch.tril(radius) + torch.tril(radius, -1).T
    if proves_positive_definite(a.clone(), lambda v: radius @ v * (1 + 2 * gamma(n + 2))):
        x = torch.linalg.eigh(a)[1][:, 0].sign()
        for worst in (a - radius * torch.outer(x, x), a - torch.diag(radius.diagonal()), a + radius * (1 - torch.eye(n))):
            assert semidefinite(fractions(worst))


@pytest.mark.parametrize(
    "a",
    [
        [[0.0]],
        [[-1.0]],
        [[math.nan]],
        [[INF]],
        [[1.0, 0.0], [INF, 1.0]],
        [[1.0, 0.0], [math.nan, 1.0]],
        [[1.0, 1.0], [1.0, 1.0]],
        [[1.0, 0.0], [1.0 + 2**-52, 1.0]],
        [[5e-324, 0.0], [5e-324, 5e-324]],
    ],
)
def test_what_is_not_definite_or_not_finite_is_not_proved(a):
    assert not proves_positive_definite(matrix(a))


@pytest.mark.parametrize("radius", [math.nan, INF, 1e308])
def test_a_radius_without_meaning_proves_nothing(radius):
    assert not proves_positive_definite(torch.eye(3, dtype=torch.float64), lambda v: torch.full_like(v, radius))


@PROPERTY
@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=40))
def test_sums_and_roots_round_up(values):
    exact = sum((Fraction(v) for v in values), Fraction(0))
    total = float(sum_up(matrix(values)))
    assert math.isinf(total) or Fraction(total) >= exact
    root = sqrt_up(values[0])
    assert Fraction(root) ** 2 >= Fraction(values[0])
    assert up(values[0]) > values[0]


# --- the matrices of the checker and of the provers ---


@st.composite
def structures(draw):
    """Chains and residual networks, with scalings, of random sizes and activations."""
    seed = draw(st.integers(0, 10**6))
    torch.manual_seed(seed)
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers.append(nn.Linear(a, b))
        layers.append(
            draw(st.sampled_from([nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.3), nn.PReLU(b), nn.GELU(), nn.PReLU(init=-0.7)]))
        )
        if draw(st.booleans()):
            layers.append(Residual(nn.Sequential(nn.Linear(b, 3), nn.ReLU(), nn.Linear(3, b))))
    if draw(st.booleans()):
        layers.append(nn.Linear(sizes[-1], 2))
    with torch.random.fork_rng():
        return lg.capture(nn.Sequential(*layers), torch.zeros(1, sizes[0]))


@PROPERTY
@given(structures())
def test_checker_and_provers_build_the_same_matrices(network):
    form, fb = feedback_form(network), feedback_of(network)
    a, b, c, d = fb.dense()
    for enclosed, expected in ((form.q, torch.cat([b, a], 1)), (form.y, torch.cat([c, d], 1))):
        # Two evaluations of one product: each within the checker's own radius of the exact matrix.
        radius = torch.zeros_like(expected) if enclosed.radius is None else enclosed.radius
        assert bool(((enclosed.center - expected).abs() <= 2 * radius).all())
    assert torch.equal(form.alpha, fb.alpha) and torch.equal(form.beta, fb.beta)


@PROPERTY
@given(structures(), st.sampled_from([0.01, 0.3, 2.0, 50.0]))
def test_the_provers_matrix_is_positive_where_the_checkers_is(network, rho):
    problem = lipsdp(feedback_of(network))
    program, form = problem.program, feedback_form(network)
    n = form.neurons
    t = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    e = torch.eye(n, n + network.inputs, dtype=torch.float64)
    low, high = e - form.alpha[:, None] * form.q.center, e - form.beta[:, None] * form.q.center
    half = low.T @ (t[:, None] * high)
    z = half + half.T - form.y.center.T @ form.y.center
    z.diagonal()[n:] += rho
    own = program.z(rho, problem.to_program(t, rho))
    # The program is another matrix (unit slopes, fewer channels, perhaps transposed), positive definite for the same t and
    # rho. Least eigenvalues between -1e-9 and 1e-6 are left to roundoff and to slopes widened by 1e-6.
    for matrix_, other in ((z, own), (own, z)):
        least = float(torch.linalg.eigvalsh(matrix_)[0])
        if least > 1e-6:
            assert float(torch.linalg.eigvalsh(other)[0]) > -1e-9


# --- corrupted evidence ---


def relus(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(b, a, generator=generator, dtype=torch.float64) / a**0.5 for a, b in itertools.pairwise((3, 6, 5, 2))]
    return chain(*weights, biases=[torch.randn(b, generator=generator, dtype=torch.float64) for b in (6, 5, 2)])


@pytest.fixture
def network():
    return lg.capture(relus(), torch.zeros(1, 3, dtype=torch.float64))


def changed(certificate, **evidence):
    return dataclasses.replace(certificate, evidence=dataclasses.replace(certificate.evidence, **evidence))


def rejected_or_harmless(network, certificate, constant):
    """What is proved from bad evidence is still a bound."""
    try:
        proved = lg.verify(network, certificate)
    except NotCertified:
        return
    if certificate.side == "upper":
        assert proved.value >= constant
    else:
        assert proved.value <= constant


@pytest.mark.parametrize("factor", [0.0, 1e-9, 0.5, 0.99, 1.01, 2.0, 1e9, -1.0, math.nan, INF])
@pytest.mark.parametrize("which", ["all", "one"])
def test_scaled_multipliers(network, factor, which):
    certificate = lg.bound(network, method="lipsdp-neuron")
    t = certificate.evidence.t.clone()
    if which == "all":
        t *= factor
    else:
        t[3] *= factor
    # The optimum of the semidefinite program: no multipliers prove less.
    rejected_or_harmless(network, changed(certificate, t=t), certificate.value * (1 - 1e-7))


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.999, 1.5, 1e9, -1.0, math.nan, INF])
def test_a_changed_rho(network, factor):
    certificate = lg.bound(network, method="lipsdp-neuron")
    rejected_or_harmless(network, changed(certificate, rho=certificate.evidence.rho * factor), certificate.value * (1 - 1e-7))


def test_a_rho_too_low_is_refused_with_its_value(network):
    certificate = lg.bound(network, method="lipsdp-neuron")
    with pytest.raises(NotCertified, match="not provably positive semidefinite at rho"):
        lg.verify(network, changed(certificate, rho=0.5 * certificate.evidence.rho))


@pytest.mark.parametrize("size", [0, 10, 12])
def test_multipliers_of_the_wrong_number(network, size):
    certificate = lg.bound(network, method="lipsdp-neuron")
    with pytest.raises(NotCertified, match=f"{size} multipliers are given for 11 neurons"):
        lg.verify(network, changed(certificate, t=torch.ones(size, dtype=torch.float64)))


@PROPERTY
@given(st.lists(st.floats(allow_nan=True, width=64), min_size=2, max_size=2), st.floats(allow_nan=True, width=64))
def test_no_multipliers_prove_less_than_the_constant(t, rho):
    known = ZOO["absolute"]
    net = lg.capture(known.make(), known.example)
    evidence = Multipliers(matrix(t), rho)
    rejected_or_harmless(net, Certificate(1.0, "upper", (2.0, 2.0), None, net.digest, "any", evidence), known.constant)


@PROPERTY
@given(
    st.lists(st.floats(allow_nan=True, width=64), min_size=2, max_size=2), st.sampled_from([(1.0, 1.0), (2.0, 2.0), (INF, INF)])
)
def test_no_factors_prove_less_than_the_constant(norms, norm):
    known = ZOO["single-relu"]
    net = lg.capture(known.make(), known.example)
    factors = Factors(dict(zip((1, 3), norms, strict=True)))
    constant = known.constants[norm[0]]
    rejected_or_harmless(net, Certificate(0.0, "upper", norm, None, net.digest, "any", factors), constant * (1 - 2**-50))


@pytest.mark.parametrize("claim", [1e-161, 1e-160])
def test_what_underflows_is_not_taken_for_zero(claim):
    # Every square is below the smallest number; the norm is 1.5e-162 * 1000.
    net = lg.capture(linear([[1.5e-162] * 10**6]), torch.zeros(1, 10**6, dtype=torch.float64))
    with pytest.raises(NotCertified):
        lg.verify(net, Certificate(0.0, "upper", (2.0, 2.0), None, net.digest, "any", Factors({1: claim})))
    net = lg.capture(chain(torch.eye(1000), [[1.5e-162] * 1000]), torch.zeros(1, 1000, dtype=torch.float64))
    evidence = Multipliers(torch.full((1000,), 1e-322, dtype=torch.float64), 1e-322)
    with pytest.raises(NotCertified):
        lg.verify(net, Certificate(0.0, "upper", (2.0, 2.0), None, net.digest, "any", evidence))


def test_factors_that_are_missing_or_too_small(network):
    certificate = lg.bound(network, method="spectral")
    layers = [i for i, node in enumerate(network.nodes) if isinstance(node, Affine)]
    for i in layers:
        norms = dict(certificate.evidence.norms)
        norms[i] *= 0.999
        with pytest.raises(NotCertified, match="its norm is not provably at most"):
            lg.verify(network, changed(certificate, norms=norms))
        del norms[i]
        with pytest.raises(NotCertified, match="no factor is given"):
            lg.verify(network, changed(certificate, norms=norms))


def test_a_layer_norm_is_proved_against_exact_arithmetic():
    # s proves ||W|| <= s exactly if s^2 I - W W' is semidefinite over the rationals.
    for seed in range(20):
        w = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        value = lg.bound(linear(w), torch.zeros(1, 4, dtype=torch.float64), method="spectral").value
        rows = fractions(w)
        s = Fraction(value) ** 2
        exact = [
            [(s if i == j else 0) - sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) for j in range(3)] for i in range(3)
        ]
        assert semidefinite(exact)
        # and no more than 1e-10 above the norm.
        assert value <= float(torch.linalg.matrix_norm(w, 2)) * (1 + 1e-10)


@pytest.mark.parametrize("method", ["spectral", "lipsdp-neuron", "lipsdp-layer", "sampling"])
@pytest.mark.parametrize("place", ["weight", "bias", "slope"])
def test_a_changed_network_is_another_network(method, place):
    def make(change):
        model = chain([[1.0, 2.0]], [[3.0]], activation=lambda: nn.LeakyReLU(0.25), biases=[[1.0], [2.0]])
        if change and place == "slope":
            model[1].negative_slope = math.nextafter(0.25, 1)
        elif change:
            parameter = getattr(model[0], place).data.view(-1)
            parameter[0] = math.nextafter(float(parameter[0]), INF)
        return lg.capture(model, torch.zeros(1, 2, dtype=torch.float64))

    certificate = lg.bound(make(False), method=method)
    assert lg.verify(make(False), certificate).value == certificate.value
    with pytest.raises(NotCertified, match="a weight or the structure differs"):
        lg.verify(make(True), certificate)


def test_the_claimed_value_is_not_believed(network):
    for method in ("spectral", "lipsdp-neuron", "sampling"):
        certificate = lg.bound(network, method=method)
        lied = dataclasses.replace(certificate, value=1e-3 if certificate.side == "upper" else 1e3)
        assert lg.verify(network, lied).value == certificate.value


def test_the_wrong_side_norm_and_kind(network):
    upper, lower = lg.bound(network, method="lipsdp-neuron"), lg.bound(network, method="sampling")
    with pytest.raises(NotCertified, match="Multipliers proves upper bounds, the certificate claims an lower"):
        lg.verify(network, dataclasses.replace(upper, side="lower"))
    with pytest.raises(NotCertified, match="Witness proves lower bounds"):
        lg.verify(network, dataclasses.replace(lower, side="upper"))
    with pytest.raises(NotCertified, match="from 2-norm to 2-norm"):
        lg.verify(network, dataclasses.replace(upper, norm=(INF, INF)))
    with pytest.raises(NotCertified, match="Gurobi's word alone: it stays approximate"):
        lg.verify(network, dataclasses.replace(upper, evidence=SolverReport("Gurobi", "optimal")))


# --- witnesses ---


def exact_slope(network, point, direction):
    """J(point) direction of a ReLU network over the rationals; None where a neuron sits on its kink."""
    values, tangents = [Fraction(float(v)) for v in point], [Fraction(float(v)) for v in direction]
    for node in network.nodes[1:]:
        if isinstance(node, Affine):
            rows = fractions(node.operator.dense())
            bias = [Fraction(0)] * len(rows) if node.bias is None else [Fraction(float(b)) for b in node.bias]
            tangents = [sum((a * b for a, b in zip(row, tangents, strict=True)), Fraction(0)) for row in rows]
            values = [sum((a * b for a, b in zip(row, values, strict=True)), c) for row, c in zip(rows, bias, strict=True)]
        else:
            if any(v == 0 for v in values):
                return None
            tangents = [v if z > 0 else Fraction(0) for v, z in zip(tangents, values, strict=True)]
            values = [max(z, Fraction(0)) for z in values]
    return tangents


@PROPERTY
@given(st.integers(0, 40), st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 1e6]))
def test_a_witness_proves_no_more_than_the_exact_slope(seed, point_seed, scale):
    net = lg.capture(relus(seed), torch.zeros(1, 3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(point_seed)
    x, v = (scale * torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(2))
    proved = lg.verify(net, Certificate(0.0, "lower", (2.0, 2.0), None, net.digest, "any", Witness(x, v))).value
    slope = exact_slope(net, x, v)
    length = sum(Fraction(float(a)) ** 2 for a in v)
    exact = sum(s * s for s in slope)
    assert Fraction(proved) ** 2 * length <= exact
    # and it is tight: enclosures of these sizes lose less than 1e-12 of the largest value.
    assert proved**2 >= float(exact / length) * (1 - 1e-9) - 1e-18


def test_beside_a_kink_both_slopes_count():
    # At the kink of relu every slope in [0, 1] may be meant: nothing above 0 is proved, and |x|, by two neurons, likewise.
    net = lg.capture(chain([[1.0]], [[1.0]]), torch.zeros(1, 1, dtype=torch.float64))
    for x in (0.0, 1e-320):
        witness = Certificate(0.0, "lower", (2.0, 2.0), None, net.digest, "any", Witness(matrix([x]), matrix([1.0])))
        assert lg.verify(net, witness).value <= (1.0 if x else 0.0)


@pytest.mark.parametrize("low", [-1e4, -1e8, -1e15])
def test_a_distant_break_point_leaves_the_near_ones_sharp(low):
    # clamp(z, low, inf) = z near 0, then relu(. - z0): f is constant left of z0 and has slope 1 right of it. A checker that
    # rounds clamp(z) to the size of `low` without saying so would take the wrong side.
    for z0 in (0.3, 0.1, 1 / 3):
        model = nn.Sequential(linear([[1.0]]), nn.Hardtanh(low, -low), linear([[1.0]], [-z0]), nn.ReLU(), linear([[1.0]]))
        net = lg.capture(model, torch.zeros(1, 1, dtype=torch.float64))
        for ulps in (1, 10, 1000, 10**6):
            x = z0 * (1 - ulps * 2.0**-52)
            claim = Certificate(0.0, "lower", (2.0, 2.0), None, net.digest, "any", Witness(matrix([x]), matrix([1.0])))
            # Just left of z0 the slope is exactly 0.
            assert lg.verify(net, claim).value == 0.0


@pytest.mark.parametrize("domain", [lg.Box(-1.0, 1.0), lg.Ball(0.0, 1.0), lg.Ball(0.0, 1.0, norm=1)])
def test_a_witness_outside_the_domain_is_refused(network, domain):
    inside = lg.bound(network, method="sampling", domain=domain)
    assert lg.verify(network, inside).value == inside.value
    outside = changed(inside, point=matrix([1.0 + 2**-40, 0.0, 0.0]))
    with pytest.raises(NotCertified, match="outside the domain"):
        lg.verify(network, outside)


@pytest.mark.parametrize(
    ("evidence", "message"),
    [
        ({"point": matrix([0.0, 0.0])}, "2 entries, the network has 3 inputs"),
        ({"point": matrix([0.0, math.nan, 0.0])}, "not finite"),
        ({"direction": matrix([0.0, 0.0, 0.0])}, "direction is zero"),
        ({"direction": matrix([INF, 0.0, 0.0])}, "not finite"),
    ],
)
def test_witnesses_without_meaning(network, evidence, message):
    with pytest.raises(NotCertified, match=message):
        lg.verify(network, changed(lg.bound(network, method="sampling"), **evidence))


def test_multipliers_of_a_network_without_neurons() -> None:
    network = lg.capture(nn.Sequential(nn.Linear(3, 2)).double(), torch.zeros(1, 3, dtype=torch.float64))
    norm = float(torch.linalg.matrix_norm(network.nodes[1].operator.dense(), 2))
    none = Multipliers(torch.zeros(0, dtype=torch.float64), norm**2)
    proposed = Certificate(norm, "upper", (2.0, 2.0), None, network.digest, "lipsdp-neuron", none)
    assert norm <= lg.verify(network, proposed).value <= norm * (1 + 1e-9)
    with pytest.raises(NotCertified):
        lg.verify(network, dataclasses.replace(proposed, evidence=Multipliers(none.t, 0.9 * norm**2 / 1.1)))
