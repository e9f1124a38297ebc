"""The contract of every bound, on networks with known constants and on random ones."""

from __future__ import annotations

import itertools
import math

import proofs
import pytest
import torch
from torch import nn
from zoo import ORTHOGONAL_ROWS, ZOO, chain, linear, matrix

import lipguard as lg
from lipguard.errors import InvalidDomain, UnknownName, UnsupportedQuery

INF = math.inf
UPPER = ("spectral", "lipsdp-neuron", "lipsdp-layer")
SOLVERS = ("interior-point", "first-order", "scs", "clarabel")
NORMS = [(name, norm) for name, known in ZOO.items() for norm in known.constants]


def relus(sizes, seed, activation=nn.ReLU):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(b, a, generator=generator, dtype=torch.float64) / a**0.5 for a, b in itertools.pairwise(sizes)]
    biases = [torch.randn(b, generator=generator, dtype=torch.float64) for b in sizes[1:]]
    return chain(*weights, activation=activation, biases=biases)


@pytest.mark.parametrize(("name", "norm"), NORMS, ids=[f"{name}-{norm}" for name, norm in NORMS])
def test_spectral_and_sampling_enclose_the_constant(name, norm):
    known = ZOO[name]
    model, network = known.make(), lg.capture(known.make(), known.example)
    upper = lg.bound(model, known.example, method="spectral", norm=norm)
    lower = lg.bound(model, known.example, method="sampling", norm=norm)
    proofs.encloses(upper, known.constants[norm])
    proofs.encloses(lower, known.constants[norm])
    assert (upper.side, lower.side) == ("upper", "lower")
    proofs.reproved(network, upper)
    proofs.reproved(network, lower)


@pytest.mark.parametrize("name", ZOO)
def test_sampling_finds_the_constant(name):
    # Each network attains its constant on an open set that the starts reach, or, smooth, near a point: 1 % for those.
    known = ZOO[name]
    lower = lg.bound(known.make(), known.example, method="sampling")
    assert lower.value >= 0.99 * known.constant


@pytest.mark.parametrize("method", ["lipsdp-neuron", "lipsdp-layer"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ZOO)
def test_lipsdp_encloses_the_constant(name, solver, method):
    known = ZOO[name]
    model, network = known.make(), lg.capture(known.make(), known.example)
    upper = lg.bound(model, known.example, method=method, solver=solver)
    proofs.encloses(upper, known.constant)
    proofs.reproved(network, upper)


# A gap 1e-7 of the squared optimum, on programs whose optimum lies on the boundary of the cone (Z = 0 for maxmin), where
# Cholesky proves rho only at some distance of the order of the root of the roundoff; identical slopes are widened by 1e-6.
CLOSED_FORM = 1 + 1e-5


@pytest.mark.parametrize("name", [name for name, known in ZOO.items() if known.lipsdp is not None])
def test_lipsdp_reaches_the_closed_form(name):
    known = ZOO[name]
    upper = lg.bound(known.make(), known.example, method="lipsdp-neuron")
    assert known.lipsdp <= upper.value * proofs.ULPS
    assert upper.value <= known.lipsdp * CLOSED_FORM, upper.note


@pytest.mark.parametrize("name", ["prelu-linear", "leaky-linear"])
def test_identical_slopes_are_linear(name):
    # The optimum for one slope is the norm of W_2 W_1 = I. Slopes 1 +- 5e-7 move it by about 5e-7 * 16 at most.
    known = ZOO[name]
    assert lg.bound(known.make(), known.example).value <= 1 + 16e-6


@pytest.mark.parametrize("name", ZOO)
def test_more_multipliers_prove_no_more(name):
    known = ZOO[name]
    neuron, layer, spectral = (
        lg.bound(known.make(), known.example, method=m).value for m in ("lipsdp-neuron", "lipsdp-layer", "spectral")
    )
    proofs.ordered(neuron, layer, spectral)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, lambda: nn.LeakyReLU(0.2), nn.GELU])
@pytest.mark.parametrize("sizes", [(3, 8, 2), (2, 6, 7, 3), (4, 5, 6, 5, 2)])
def test_random_networks_are_ordered(sizes, activation):
    model, example = relus(sizes, 0, activation), torch.zeros(1, sizes[0], dtype=torch.float64)
    neuron, layer, spectral, lower = (
        lg.bound(model, example, method=m).value for m in ("lipsdp-neuron", "lipsdp-layer", "spectral", "sampling")
    )
    proofs.ordered(neuron, layer, spectral)
    assert lower <= neuron


@pytest.mark.parametrize("factor", [3.0, -0.25, 1e-6, 1e9])
@pytest.mark.parametrize("method", UPPER)
def test_scaling_of_input_and_output(method, factor):
    network = lg.capture(relus((3, 6, 5, 2), 1), torch.zeros(1, 3, dtype=torch.float64))
    proofs.scales(lambda n: lg.bound(n, method=method).value, network, factor)


@pytest.mark.parametrize("method", UPPER)
def test_order_of_the_neurons(method):
    model, example = relus((3, 8, 5, 2), 2), torch.zeros(1, 3, dtype=torch.float64)
    permuted = relus((3, 8, 5, 2), 2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    permuted[0].weight.data, permuted[0].bias.data = permuted[0].weight.data[order], permuted[0].bias.data[order]
    permuted[2].weight.data = permuted[2].weight.data[:, order]
    proofs.ignores_order(lambda m: lg.bound(m, example, method=method).value, model, permuted)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**10, 2.0**20])
def test_rescaled_twins_have_the_same_bound(factor):
    # relu(c z) = c relu(z) for c > 0: W_1 c, W_2 / c is the same function, and t / c^2 the same proof.
    example = torch.zeros(1, 3, dtype=torch.float64)
    model, twin = relus((3, 8, 2), 3), relus((3, 8, 2), 3)
    twin[0].weight.data *= factor
    twin[0].bias.data *= factor
    twin[2].weight.data /= factor
    for method in UPPER:
        assert proofs.near(lg.bound(model, example, method=method).value, lg.bound(twin, example, method=method).value)


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e-160, 1e150, 1e200, 1e300])
def test_layers_whose_squares_leave_the_range(size):
    model, example = linear(size * matrix(ORTHOGONAL_ROWS)), torch.zeros(1, 3, dtype=torch.float64)
    for method in ("spectral", "lipsdp-neuron"):
        # 3 size, and 1e-12 for entries that are rounded products.
        assert 3 * size * (1 - 1e-12) <= lg.bound(model, example, method=method).value <= 3 * size * (1 + 1e-12)


@pytest.mark.parametrize("norm", [1, 2, INF, (1, 2), (2, INF), (1, INF), (2, 1), (INF, 2), (INF, 1)])
def test_the_product_of_norms_holds_between_any_two_norms(norm):
    # For a linear map with enumerable norms: |A|_{p -> q} over the extreme points of the unit ball (2-norm: over a grid).
    a = matrix([[1.0, -2.0], [3.0, 0.5]])
    p, q = norm if isinstance(norm, tuple) else (norm, norm)
    angles = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    points = {
        1: torch.eye(2, dtype=torch.float64),
        2: torch.stack([angles.cos(), angles.sin()], 1),
        INF: matrix([[1.0, 1.0], [1.0, -1.0]]),
    }[p]
    attained = float(torch.linalg.vector_norm(points @ a.T, q, dim=1).max())
    assert (
        attained <= lg.bound(linear(a), torch.zeros(1, 2, dtype=torch.float64), method="spectral", norm=norm).value * proofs.ULPS
    )


@pytest.mark.parametrize("norm", [1, 2, INF, (1, 2), (2, INF), (1, INF)])
@pytest.mark.parametrize("domain", [lg.Box(-0.5, [0.25, 1.0, 0.5]), lg.Ball([1.0, 0.0, -1.0], 0.5), lg.Ball(0.0, 2.0, norm=1)])
def test_a_witness_lies_in_the_domain(domain, norm):
    model, example = relus((3, 7, 6, 2), 4), torch.zeros(1, 3, dtype=torch.float64)
    lower = lg.bound(model, example, method="sampling", norm=norm, domain=domain)
    assert domain.contains(lower.evidence.point.cpu())
    proofs.reproved(lg.capture(model, example), lower)
    assert lower.value <= lg.bound(model, example, method="spectral", norm=norm, domain=domain).value


def test_a_domain_of_small_slopes_has_small_lower_bounds():
    # relu(x_1) + 9 relu(x_1 - 5) has slope 1 on [-1, 1] and 10 beyond 5.
    model = chain([[1.0], [1.0]], [[1.0, 9.0]], biases=[[0.0, -5.0], [0.0]])
    example = torch.zeros(1, 1, dtype=torch.float64)
    assert lg.bound(model, example, method="sampling", domain=lg.Box(-1.0, 1.0)).value <= 1
    # The checker's enclosures lose some ten units of roundoff a layer.
    assert lg.bound(model, example, method="sampling", domain=lg.Box(4.0, 9.0)).value >= 10 * (1 - 1e-13)


def test_a_pair_of_classes_and_a_matrix_of_outputs():
    # Output i minus output j of the linear map is the difference of its rows: |(1, 2, 2) - (2, -2, 1)| = sqrt 18.
    known = ZOO["linear"]
    for method in (*UPPER, "sampling"):
        pair = lg.bound(known.make(), known.example, method=method, outputs=(0, 1))
        proofs.encloses(pair, math.sqrt(18))
        as_matrix = lg.bound(known.make(), known.example, method=method, outputs=matrix([[1.0, -1.0]]))
        assert as_matrix.value == pair.value
    upper = lg.bound(known.make(), known.example, outputs=matrix([[1.0, 1.0], [2.0, 2.0]]))
    # Both rows are multiples of the sum of rows (3, 0, 3): sqrt(1 + 4) sqrt 18.
    assert proofs.near(upper.value, math.sqrt(90))


def test_a_submodule_is_bounded_by_itself():
    model = nn.Sequential(linear([[100.0]]), ZOO["absolute"].make())
    assert proofs.near(lg.bound(model, torch.zeros(1, 1, dtype=torch.float64), submodule="1").value, 1.0, 1 + 1e-5)


def test_names_and_queries_that_do_not_exist():
    known = ZOO["absolute"]
    with pytest.raises(UnknownName, match=r"no method is called 'lipsdp'.*lipsdp-neuron"):
        lg.bound(known.make(), known.example, method="lipsdp")
    with pytest.raises(UnknownName, match=r"no solver is called 'sdpt3'.*interior-point"):
        lg.bound(known.make(), known.example, solver="sdpt3")
    with pytest.raises(UnsupportedQuery, match="a norm is 1, 2 or inf"):
        lg.bound(known.make(), known.example, norm=3)
    with pytest.raises(UnsupportedQuery, match="Use method='spectral'"):
        lg.bound(known.make(), known.example, method="lipsdp-neuron", norm=(INF, 1))
    with pytest.raises(InvalidDomain, match="2 entries, the network has 1 inputs"):
        lg.bound(known.make(), known.example, domain=lg.Box([0.0, 0.0], 1.0))
    with pytest.raises(UnsupportedQuery, match=r"solves MILP and MIQCQP, not SDP\. Use 'interior-point'"):
        lg.bound(known.make(), known.example, solver="scip")
