"""Mixed-integer programs against rational arithmetic: Gurobi, SCIP and HiGHS, closed and strict."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact_oracle import DOMAINS, Layer, Net, constant, random_net, trained_net
from test_exact_enumeration import ABS, FOUR, HARDTANH, LEAKY

import lipguard as lg
from lipguard.exact import exact
from lipguard.exact.preactivation import bounds
from lipguard.exact.problem import problem

INF = math.inf
BOX = lg.Box(-1.0, 1.0)

# The tolerance; the solvers run at feasibility 1e-9 and gap 1e-6 / 8.
SOLVER = 1e-6

NETS = {
    **{f"random-{k}": random_net([2, 4, 3, 2], 100 + k) for k in range(4)},
    **{f"trained-{k}": trained_net([2, 4, 3, 1], 100 + k) for k in range(3)},
    "skip": random_net([2, 3, 3, 2], 110, skip=True),
    "hardtanh": random_net([2, 3, 2], 111, **HARDTANH),
    "leaky": random_net([2, 4, 2], 112, **LEAKY),
    "abs": random_net([2, 3, 2, 2], 113, **ABS),
    "four-pieces": random_net([2, 2, 2], 114, **FOUR),
}


@pytest.mark.parametrize("solver", ["gurobi", "scip"])
@pytest.mark.parametrize("name", NETS)
def test_closed_and_strict_miqcqp(name, solver):
    net = NETS[name]
    network = net.network()
    for domain in (BOX, lg.Ball(0.25, 0.75)):
        true, closed = (constant(net, domain, (2.0, 2.0), strict) for strict in (True, False))
        options = {"domain": domain, "method": "miqcqp", "solver": solver, "time_limit": 60}
        above = exact(network, region="closed", **options)
        below = exact(network, region="strict", **options)
        assert above.solver == below.solver == solver
        assert above.upper == pytest.approx(closed, rel=SOLVER)
        assert below.lower == pytest.approx(true, rel=1e-9)
        assert below.lower_certificate.rigor == "verified"
        assert above.upper_certificate.rigor == "approximate" or above.upper_certificate.value <= closed * (1 + SOLVER)


@pytest.mark.parametrize(("solver", "method", "norm"), [("gurobi", "miqcqp", 2), ("scip", "miqcqp", 2), ("highs", "milp", INF)])
def test_the_published_formulation_has_the_same_maximum(solver, method, norm):
    for name in ("random-0", "trained-0", "hardtanh"):
        net = NETS[name]
        expected = constant(net, BOX, (float(norm), float(norm)))
        options = {"domain": BOX, "norm": norm, "method": method, "solver": solver, "time_limit": 60}
        found = exact(net.network(), formulation="published", **options)
        assert found.upper == pytest.approx(expected, rel=SOLVER) and found.lower == pytest.approx(expected, rel=1e-9)
        # Nothing of ours bounds it from above.
        assert found.upper_certificate.rigor == "approximate" and found.upper_certificate.evidence.solver == solver


def test_the_published_formulation_knows_intervals_alone():
    task = problem(NETS["random-1"].network(), lg.Query((2.0, 2.0), BOX))
    loose, tight = (bounds(task.form, task.domain, (2.0, 2.0), tighten=tighten) for tighten in (False, True))
    rows = np.abs(task.form.a[task.form.layers[0]]).sum(1)
    assert loose.tangent[task.form.layers[0]] == pytest.approx(rows, rel=1e-9)
    assert (loose.tangent >= tight.tangent).all() and (loose.tangent > tight.tangent * 1.01).any()
    assert (loose.lower <= tight.lower).all() and (loose.upper >= tight.upper).all()


@pytest.mark.parametrize("solver", ["gurobi", "scip", "highs"])
@pytest.mark.parametrize("norm", [1, INF, (1, INF), (INF, 1)])
def test_milp(norm, solver):
    for name in ("random-0", "trained-0", "skip", "hardtanh", "four-pieces"):
        net = NETS[name]
        for domain in (BOX, lg.Ball(0.25, 0.75, 1.0)):
            pair = norm if isinstance(norm, tuple) else (norm, norm)
            expected = constant(net, domain, pair)
            found = exact(net.network(), domain=domain, norm=norm, method="milp", solver=solver, time_limit=60)
            assert found.solver == solver
            assert found.status == "closed"
            assert found.lower == pytest.approx(expected, rel=1e-9)
            assert found.upper == pytest.approx(expected, rel=2 * SOLVER)


@pytest.mark.parametrize("norm", [1, 2, INF, (1, 2), (2, INF), (2, 1), (INF, 2)])
def test_all_of_space(norm):
    pair = norm if isinstance(norm, tuple) else (norm, norm)
    for name in ("random-1", "trained-1", "skip", "hardtanh"):
        net = NETS[name]
        method = "miqcqp" if 2 in pair else "milp"
        expected = constant(net, None, (float(pair[0]), float(pair[1])))
        found = exact(net.network(), norm=norm, method=method, time_limit=60)
        assert found.status == "closed"
        assert found.lower == pytest.approx(expected, rel=1e-9), name
        assert found.upper == pytest.approx(expected, rel=2 * SOLVER), name


@pytest.mark.parametrize("domain", DOMAINS)
def test_class_pairs_and_functionals(domain):
    net = NETS["random-2"]
    network, where = net.network(), DOMAINS[domain](2)
    matrix = np.array([[1.0, -1.0]])
    net.weight, kept = matrix @ net.weight, net.weight
    expected = constant(net, where, (2.0, 2.0))
    net.weight = kept
    for outputs in ((0, 1), torch.from_numpy(matrix)):
        found = exact(network, domain=where, method="miqcqp", outputs=outputs, time_limit=60)
        assert found.lower == pytest.approx(expected, rel=1e-9)
        assert found.upper == pytest.approx(expected, rel=2 * SOLVER)


def test_one_region_alone_is_half_an_enclosure():
    network = NETS["random-0"].network()
    true = constant(NETS["random-0"], BOX, (2.0, 2.0))
    above = exact(network, domain=BOX, method="miqcqp", region="closed")
    below = exact(network, domain=BOX, method="miqcqp", region="strict")
    assert below.lower == pytest.approx(true, rel=1e-9) and below.upper_certificate.rigor == "verified"
    assert above.status == "closed"  # the pattern of the closed maximum happens to have an interior
    assert below.status in ("closed", "gap reached")


def test_domains_without_interior():
    # f(x, y) = |x| + 3 |y| where y = 1/2, and where only the kink is left.
    net = Net([Layer(np.eye(2), np.zeros(2), **ABS)], np.array([[1.0, 3.0]])).network()
    found = exact(net, domain=lg.Box([-1.0, 0.5], [1.0, 0.5]), norm=1, method="milp")
    assert found.lower == pytest.approx(3.0, rel=1e-12) and found.upper == pytest.approx(3.0, rel=SOLVER)
    with pytest.raises(lg.errors.InvalidDomain, match="lies on a kink"):
        exact(net, domain=lg.Box([-1.0, 0.0], [1.0, 0.0]), norm=1, method="milp")


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["gurobi", "scip"])
def test_a_network_beyond_enumeration(solver):
    network = random_net([4, 8, 8, 3], 0, grid=1024).network()
    found = exact(network, domain=BOX, method="miqcqp", solver=solver, time_limit=120)
    other = exact(network, domain=BOX, method="enumeration")
    assert found.lower == pytest.approx(other.lower, rel=1e-9)
