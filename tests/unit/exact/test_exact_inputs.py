"""Bad input, solvers that are missing, refuse or crash, silence, limits, and the choice of `auto`."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from exact_oracle import Layer, Net, constant, random_net

import lipguard as lg
from lipguard.errors import InvalidDomain, SolverFailed, SolverUnavailable, UnknownName, UnsupportedQuery
from lipguard.exact import choose, exact
from lipguard.exact.enumeration import _Enumeration
from lipguard.exact.mixed_integer import mixed_integer
from lipguard.exact.preactivation import bounds
from lipguard.exact.problem import problem
from lipguard.network import Activation, Affine, Dense, Elementwise, Input, Network
from lipguard.programs.mixed_integer import MixedIntegerProgram, MixedIntegerResult
from lipguard.solvers import gurobi, highs, scip

INF = math.inf
BOX = lg.Box(-1.0, 1.0)
SMALL = random_net([2, 4, 3, 2], 0)
LARGE = random_net([3, 40, 40, 1], 0)


class Tanh(Elementwise):
    name = "Tanh"

    def __call__(self, z):
        return z.tanh()

    @property
    def slopes(self):
        return torch.tensor(0.0), torch.tensor(1.0)

    def slope_range(self, lower, upper):
        return torch.zeros_like(lower), torch.ones_like(upper)


@pytest.mark.parametrize("method", ["auto", "enumeration", "miqcqp", "milp"])
@pytest.mark.parametrize(
    ("domain", "match"),
    [
        (lg.Box(1.0, -1.0), "Box is empty"),
        (lg.Box([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]), "3 entries"),
        (lg.Box(0.0, INF), "unbounded"),
        (lg.Ball([0.0] * 5, 1.0), "5 entries"),
        (lg.Ball(0.0, -1.0), "radius"),
        (lg.Ball(0.0, math.nan), "radius"),
        (lg.Ball(0.0, 1.0, 3.0), "norm is 1, 2 or inf"),
    ],
)
def test_bad_domains(domain, match, method):
    with pytest.raises(InvalidDomain, match=match):
        exact(SMALL.network(), domain=domain, method=method)


def test_an_activation_that_is_not_piecewise_linear():
    weight = Dense(torch.eye(2, dtype=torch.float64))
    network = Network((Input(2), Affine(0, weight, None), Activation(1, Tanh(), "net.1"), Affine(2, weight, None)))
    with pytest.raises(UnsupportedQuery, match=r"net\.1 \(Tanh\) is not piecewise linear.*lipguard\.bound.*lipsdp"):
        exact(network, domain=BOX)


def test_names_and_norms():
    network = SMALL.network()
    with pytest.raises(UnknownName, match=r"no exact method is called 'simplex'.*miqcqp"):
        exact(network, method="simplex")
    with pytest.raises(UnknownName, match=r"no solver is called 'cplex'.*gurobi"):
        exact(network, method="miqcqp", solver="cplex")
    with pytest.raises(UnknownName, match=r"region='open'"):
        exact(network, method="miqcqp", region="open")
    with pytest.raises(UnknownName, match=r"formulation='tight'.*published"):
        exact(network, method="miqcqp", formulation="tight")
    with pytest.raises(UnsupportedQuery, match="a norm is 1, 2 or inf"):
        exact(network, norm=3)
    with pytest.raises(UnsupportedQuery, match="quadratic"):
        exact(network, norm=2, method="milp")
    with pytest.raises(UnsupportedQuery, match="quadratic"):
        exact(network, norm=1, domain=lg.Ball(0.0, 1.0), method="milp")
    with pytest.raises(UnsupportedQuery, match="sign vectors"):
        exact(random_net([2, 3, 20], 0).network(), norm=(2, 1))


def test_the_licence_limit_is_checked_before_the_solve(monkeypatch):
    monkeypatch.setattr(gurobi, "size_limited", lambda: True)
    monkeypatch.setattr(gurobi, "solve", lambda *args, **kwargs: pytest.fail("Gurobi was called"))
    enclosure = mixed_integer(LARGE.network(), lg.Query((2.0, 2.0), BOX), solver="gurobi", time_limit=2)
    assert enclosure.solver in ("scip", "")
    assert "size-limited licence refuses this model" in enclosure.choice and "> 200 variables" in enclosure.choice
    assert "Using scip." in enclosure.choice
    assert enclosure.lower <= enclosure.upper


def test_the_size_limit_of_the_licence_is_what_we_say():
    # With a full licence nothing is refused and everything is solved.
    def program(count, rows, quadratic):
        ones = np.ones(count)
        squares = np.arange(2 if quadratic else 0)
        matrix = np.zeros((rows, count))
        matrix[:, 0] = 1.0
        none = np.zeros(count, dtype=bool)
        return MixedIntegerProgram(-ones, ones, none, matrix, np.full(rows, -INF), np.ones(rows), ones, squares=squares)

    for args in ((2000, 0, False), (2001, 0, False), (10, 2000, False), (10, 2001, False), (200, 0, True), (201, 0, True)):
        reason = gurobi.refusal(program(*args))
        if reason is None:
            assert gurobi.solve(program(*args)).status == "optimal"
        else:
            with pytest.raises(SolverFailed, match="too large"):
                gurobi.solve(program(*args))


def test_an_absent_or_expired_licence(monkeypatch):
    import gurobipy

    def start(self):
        raise gurobipy.GurobiError(10009, "License expired 2020-01-01")

    monkeypatch.setattr(gurobipy.Env, "start", start)
    gurobi._environment.cache_clear()
    gurobi.size_limited.cache_clear()
    try:
        enclosure = exact(SMALL.network(), domain=BOX, method="miqcqp", solver="gurobi", time_limit=30)
    finally:
        gurobi._environment.cache_clear()
        gurobi.size_limited.cache_clear()
    assert enclosure.solver == "scip" and enclosure.status == "closed"
    assert "no valid licence" in enclosure.choice and "expired" in enclosure.choice


def test_no_solver_at_all(monkeypatch):
    for module in (gurobi, scip, highs):
        monkeypatch.setattr(module, "refusal", lambda program: "It is not installed.")
    with pytest.raises(SolverUnavailable, match=r"no solver can take this MIQCQP.*not installed"):
        exact(SMALL.network(), domain=BOX, method="miqcqp")


def test_a_crash_falls_back_and_says_so(monkeypatch):
    def crash(program, **options):
        raise SolverFailed("Gurobi stopped: segmentation of the tree.")

    monkeypatch.setattr(gurobi, "solve", crash)
    enclosure = exact(SMALL.network(), domain=BOX, method="miqcqp", time_limit=30)
    assert enclosure.solver == "scip" and enclosure.status == "closed"
    assert "SolverFailed: Gurobi stopped" in enclosure.choice
    monkeypatch.setattr(scip, "solve", crash)
    enclosure = exact(SMALL.network(), domain=BOX, method="miqcqp", time_limit=30)
    assert enclosure.status == "solver failed" and enclosure.solver == ""
    assert 0 < enclosure.lower <= constant(SMALL, BOX, (2.0, 2.0)) * (1 + 1e-12) <= enclosure.upper


def test_a_lying_solver_is_not_believed(monkeypatch):
    monkeypatch.setattr(gurobi, "solve", lambda program, **options: MixedIntegerResult("optimal", 1e-3, None, "liar"))
    enclosure = exact(SMALL.network(), domain=BOX, method="miqcqp", solver="gurobi", time_limit=30)
    assert enclosure.status == "solver failed" and "below the lower bound" in enclosure.choice
    assert enclosure.upper >= constant(SMALL, BOX, (2.0, 2.0)) * (1 - 1e-12)


@pytest.mark.parametrize("method", ["enumeration", "miqcqp", "milp"])
def test_time_limit(method):
    norm = INF if method == "milp" else 2
    enclosure = exact(LARGE.network(), domain=BOX, norm=norm, method=method, time_limit=1.0)
    assert enclosure.status == "time limit"
    assert enclosure.seconds < 6
    assert 0 < enclosure.lower <= enclosure.upper
    assert enclosure.lower_certificate.rigor == "verified"


@pytest.mark.parametrize("method", ["enumeration", "miqcqp"])
def test_interrupt(method, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if method == "enumeration":
        monkeypatch.setattr(_Enumeration, "_leaf", interrupt)
    else:
        monkeypatch.setattr(gurobi, "solve", interrupt)
    enclosure = exact(SMALL.network(), domain=BOX, method=method)
    assert enclosure.status == "interrupted"
    assert 0 < enclosure.lower <= enclosure.upper


def test_auto_says_what_it_chose():
    small = exact(SMALL.network(), domain=BOX)
    assert small.method == "branch-and-bound" and small.rigor == "verified"
    assert small.choice.startswith("Branch and bound: 2 inputs, 7 neurons")
    for norm in ((2.0, 2.0), (1.0, 2.0), (INF, INF)):
        method, why = choose(LARGE.network(), lg.Query(norm, BOX))
        assert method == "branch-and-bound" and "verified" in why
    # (inf, 1) has no bound to prune with; few regions are enumerated, and so it is far from every kink.
    method, why = choose(SMALL.network(), lg.Query((INF, 1.0), BOX))
    assert method == "enumeration" and "no bound for norm (inf, 1)" in why
    assert choose(LARGE.network(), lg.Query((INF, 1.0), lg.Ball(0.4, 1e-3)))[0] == "enumeration"
    method, why = choose(LARGE.network(), lg.Query((INF, 1.0), BOX))
    assert method == "milp" and "installed" in why


def test_auto_repairs_what_branch_and_bound_counts_on_closed_regions():
    # 0.3 and 0.1 are no multiples of one another in float64: the middle region is a sliver no program can see.
    net = Net([Layer(np.array([[0.1], [-0.3]]), np.array([0.01, -0.03]))], np.array([[30.0, -10.0]]))
    found = exact(net.network(), domain=BOX)
    assert found.lower == pytest.approx(3.0, rel=1e-9) and found.upper == pytest.approx(3.0, rel=1e-9)
    if found.method != "branch-and-bound":
        assert found.rigor == "approximate" and found.closed_region == pytest.approx(6.0, rel=1e-6)
        assert found.details["verified_upper"] == pytest.approx(6.0, rel=1e-6) and "says that the true" in found.choice


_SCRIPT = """
import logging, sys, torch
sys.path.insert(0, {tests!r})
from exact_oracle import random_net
import lipguard as lg
from lipguard.exact import exact
records = []
class Keep(logging.Handler):
    def emit(self, record): records.append(record.name)
logger = logging.getLogger("lipguard.solvers")
logger.addHandler(Keep()); logger.setLevel(logging.DEBUG); logger.propagate = False
network = random_net([2, 4, 2], 0).network()
for solver in ("gurobi", "scip", "highs"):
    assert exact(network, domain=lg.Box(-1.0, 1.0), norm=1, method="milp", solver=solver).solver == solver
network = random_net([4, 16, 16, 3], 0).network()
for solver in ("gurobi", "scip"):
    exact(network, domain=lg.Box(-1.0, 1.0), method="miqcqp", solver=solver, time_limit=3)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
for solver in ("scs", "clarabel"):
    lg.bound(net, torch.zeros(1, 3), method="lipsdp-neuron", solver=solver)
assert {{"lipguard.solvers.gurobi", "lipguard.solvers.scip"}} <= set(records), set(records)
"""


def test_solvers_are_silent_and_log():
    script = _SCRIPT.format(tests=str(__import__("pathlib").Path(__file__).parents[2]))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


@pytest.mark.parametrize("domain", [BOX, lg.Ball(0.5, 1.0), lg.Ball(0.5, 1.0, 1.0), lg.Ball(0.5, 1.0, INF), None])
@pytest.mark.parametrize("tighten", [False, True])
def test_bounds_hold_on_samples(domain, tighten):
    for seed in range(4):
        net = random_net(
            [3, 6, 6, 2],
            seed,
            skip=seed % 2 == 1,
            **({"breaks": (-1.0, 1.0), "slopes": (0.0, 1.0, 0.0), "value": -1.0} if seed > 1 else {}),
        )
        task = problem(net.network(), lg.Query((2.0, 2.0), domain))
        known = bounds(task.form, task.domain, (2.0, 2.0), tighten=tighten)
        loose = bounds(task.form, task.domain, (2.0, 2.0), tighten=False)
        assert (known.lower >= loose.lower).all() and (known.upper <= loose.upper).all()
        generator = torch.Generator().manual_seed(seed)
        points = (
            5 * torch.randn(500, 3, generator=generator, dtype=torch.float64)
            if domain is None
            else domain.sample(500, 3, generator)
        )
        values = task.network.values(points)
        z = torch.cat([values[i - 1] for i in task.network.activations], 1).numpy()
        # On R^d the bounds are of the homogenised network: x and one scaled to max(|x|, one) = 1.
        scale = np.maximum(1.0, np.abs(points.numpy()).max(1, keepdims=True)) if domain is None else 1.0
        assert (z / scale >= known.lower).all() and (z / scale <= known.upper).all()
        for pattern in (task.form.pattern_at(x) for x in points.numpy()[:50]):
            g, _ = task.form.preactivations(pattern)
            assert (np.linalg.norm(g, axis=1) <= known.tangent).all()
            assert task.norm(pattern)[0] <= known.norm


def test_linear_programs_without_highspy(monkeypatch):
    program = (
        np.array([1.0, 2.0]),
        np.array([[1.0, 1.0], [1.0, -1.0]]),
        np.array([1.0, 0.5]),
        np.full(2, -INF),
        np.array([INF, 0.75]),
    )
    direct = highs.maximise(*program)
    monkeypatch.setitem(sys.modules, "highspy", None)
    scipy = highs.maximise(*program)
    assert direct.optimal and scipy.optimal
    assert direct.value == pytest.approx(1.75, abs=1e-9) and scipy.value == pytest.approx(1.75, abs=1e-9)
    assert np.allclose(direct.duals, scipy.duals, atol=1e-9)


def test_the_climb_never_leaves_the_regions_that_exist():
    for seed in range(4):
        net = random_net([3, 5, 4, 2], seed)
        task = problem(net.network(), lg.Query((2.0, 2.0), BOX))
        task.sample(4)
        before = task.lower
        task.improve()
        assert before <= task.lower <= constant(net, BOX, (2.0, 2.0)) * (1 + 1e-12)
        assert lg.verify(task.network, task.lower_certificate("test")).value == pytest.approx(task.lower, rel=1e-11)
