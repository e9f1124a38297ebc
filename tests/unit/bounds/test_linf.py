"""Semidefinite bounds in the maximum and the sum norm: against GeoLIP's program, exact constants, formulas, and tampering."""

from __future__ import annotations

import dataclasses
import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_random_networks import modules
from torch import nn
from zoo import Residual

import lipguard as lg
from lipguard.audit.encoding import certificate_from_json, certificate_json
from lipguard.bounds.sampling import Sampling
from lipguard.certificate import Multipliers, Query, WeightedMultipliers
from lipguard.errors import NotCertified, UnsupportedQuery
from lipguard.programs.feedback import feedback_of
from lipguard.solvers.threads import one_thread

INF = math.inf
F64 = torch.float64
PAIRS = ((INF, INF), (1.0, 1.0), (2.0, INF), (1.0, 2.0), (INF, 2.0), (2.0, 1.0))


def net(*sizes, seed=0, activation=nn.ReLU):
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return lg.capture(nn.Sequential(*layers[:-1]).double(), torch.zeros(1, sizes[0], dtype=F64))


def natural(a, c):
    """GeoLIP's natural program for max over v in {0, 1}^n of ||c diag(v) a||_1 (arXiv:2203.01212, section 4).

    With v = (1 + y) / 2, y and x in {-1, 1}: max (1/2) sum_jk c_j a_jk (1 + y_j) x_k, relaxed to the Gram matrix of (x, 1, y).
    """
    n, d = a.shape
    gram = cp.Variable((d + 1 + n, d + 1 + n), PSD=True)
    coupling = c[:, None] * a
    objective = cp.sum(cp.multiply(coupling, gram[d + 1 :, :d])) + coupling.sum(0) @ gram[d, :d]
    problem = cp.Problem(cp.Maximize(objective / 2), [cp.diag(gram) == 1])
    problem.solve(solver="CLARABEL")
    return problem.value


def layers(network):
    nodes = [node.operator.dense().numpy() for node in network.nodes if hasattr(node, "operator")]
    return nodes[0], nodes[1]


@pytest.mark.parametrize("sizes", [(3, 5, 2), (6, 10, 3), (2, 9, 1), (12, 4, 2), (1, 6, 4)])
def test_one_hidden_layer_is_the_natural_program(sizes):
    network = net(*sizes, seed=sum(sizes))
    a, c = layers(network)
    for norm, references in (
        (INF, [natural(a, row) for row in c]),
        (1, [natural(c.T, column) for column in a.T]),
    ):
        bound = lg.bound(network, norm=norm, method="lipsdp-neuron")
        assert bound.rigor == "verified"
        assert bound.value == pytest.approx(max(references), rel=1e-5)
        exact = lg.exact(network, norm=norm, method="enumeration")
        assert exact.status == "closed" and exact.upper <= bound.value * (1 + 1e-9)
        # One of the outputs (inputs) alone.
        if norm == INF:
            alone = lg.bound(network, norm=norm, method="lipsdp-neuron", outputs=torch.tensor(np.eye(len(c))[:1]))
            assert alone.value == pytest.approx(references[0], rel=1e-5)
    if len(c) > 1:
        difference = lg.bound(network, norm=INF, method="lipsdp-neuron", outputs=(0, 1))
        assert difference.value == pytest.approx(natural(a, c[0] - c[1]), rel=1e-5)


def dual(network, i):
    """The least sum of mu with diag(mu) >= ..., row i of the outputs, straight from the dense feedback form."""
    fb = feedback_of(network)
    a, b, c, d = (m.numpy() for m in fb.dense())
    n, size = a.shape[0], a.shape[1]
    q = np.hstack([b, a])
    e = np.hstack([np.eye(n), np.zeros((n, size))])
    y = np.hstack([c, d])[i : i + 1]
    t, mu = cp.Variable(n, nonneg=True), cp.Variable(size)
    low, high = e - fb.alpha.numpy()[:, None] * q, e - fb.beta.numpy()[:, None] * q
    half = low.T @ cp.diag(t) @ high
    z = cp.diag(cp.hstack([np.zeros(n), mu])) + half + half.T - y.T @ y
    problem = cp.Problem(cp.Minimize(cp.sum(mu)), [z >> 0])
    problem.solve(solver="CLARABEL")
    return math.sqrt(problem.value)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), 4),
        (lambda: nn.Sequential(Residual(nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(0.2), nn.Linear(5, 3)))), 3),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 4), nn.ReLU()), 3),
    ],
)
def test_deeper_networks_solve_their_program(make, inputs):
    torch.manual_seed(1)
    network = lg.capture(make().double(), torch.zeros(1, inputs, dtype=F64))
    expected = max(dual(network, i) for i in range(network.outputs))
    for solver in ("interior-point", "clarabel"):
        found = lg.bound(network, norm=INF, method="lipsdp-neuron", solver=solver)
        assert (found.method, found.note) == ("lipsdp-neuron", "")
        assert found.value == pytest.approx(expected, rel=1e-5)
    assert lg.bound(network, norm=INF, method="lipsdp-layer").value >= found.value * (1 - 1e-6)


def test_default_and_rough_solver():
    network = net(5, 8, 8, 3)
    default = lg.bound(network, norm=INF)
    assert default.method == "lipsdp-neuron" and default.details["programs"] == 3
    # SCS stops outside of the cone; what is proved lies above the optimum all the same.
    rough = lg.bound(network, norm=INF, solver="scs")
    assert default.value * (1 - 1e-6) <= rough.value <= 1.01 * default.value
    # Wide networks keep the product, which costs nothing.
    assert lg.bound(net(800, 600, 400, 10), norm=INF).method == "spectral"
    tracker = lg.Tracker(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 5), "lipsdp-neuron", norm=INF)
    upper, lower = tracker.update()
    assert 0 < lower <= upper < tracker.last.spectral.value


@pytest.mark.parametrize("norm", PAIRS)
def test_linear_maps_and_single_neurons(norm):
    # y = w phi(v'x) with phi' in {0, 1}: the norm of the rank-one map w v', ||v||_{p*} ||w||_q.
    v, w = torch.tensor([[1.0, -2.0, 2.0]], dtype=F64), torch.tensor([[3.0], [-4.0]], dtype=F64)
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False)).double()
    model[0].weight.data, model[2].weight.data = v, w
    p, q = norm
    star = {1.0: INF, 2.0: 2.0, INF: 1.0}[p]
    expected = float(torch.linalg.vector_norm(v, star) * torch.linalg.vector_norm(w, q))
    found = lg.bound(model, torch.zeros(1, 3, dtype=F64), norm=norm, method="lipsdp-neuron")
    assert found.value == pytest.approx(expected, rel=2e-6) and found.value >= expected * (1 - 1e-15)


def test_outputs_and_inputs_that_do_nothing():
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight[:, 1] = 0
        model[2].weight[2] = 0
    x = torch.zeros(1, 3, dtype=F64)
    for norm in PAIRS:
        full = lg.bound(model, x, norm=norm, method="lipsdp-neuron")
        assert full.method == "lipsdp-neuron" and full.note == ""
        rows = torch.eye(3, dtype=F64)[:2]
        assert lg.bound(model, x, norm=norm, method="lipsdp-neuron", outputs=rows).value == pytest.approx(full.value, rel=1e-5)
    assert lg.bound(model, x, norm=INF, method="lipsdp-neuron", outputs=torch.zeros(2, 3)).value == 0


@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(modules(), st.sampled_from(PAIRS))
def test_lower_stays_below_upper(made, norm):
    module, inputs, dtype = made
    with torch.random.fork_rng():
        network = lg.capture(module, torch.zeros(1, inputs, dtype=dtype))
    upper = lg.bound(network, norm=norm, method="lipsdp-neuron")
    assert upper.rigor == "verified" and "NotCertified" not in upper.note
    assert upper.value <= lg.bound(network, norm=norm, method="spectral").value * (1 + 1e-12)
    assert lg.verify(network, certificate_from_json(certificate_json(upper))).value == upper.value
    p, q = norm
    if p == 1 or q == INF:
        with one_thread():
            lower, _ = Sampling(starts=4, steps=4)(network, Query(norm))
        assert lower.value <= upper.value
        return
    generator = torch.Generator().manual_seed(0)
    x, h = (torch.randn(30, inputs, dtype=F64, generator=generator) for _ in range(2))
    rise = torch.linalg.vector_norm(network(x + h) - network(x), q, dim=1) / torch.linalg.vector_norm(h, p, dim=1)
    assert float(rise.max()) <= upper.value * (1 + 1e-9)


def test_corrupted_evidence_is_refused():
    network = net(4, 6, 3, seed=2)
    for norm in PAIRS:
        certificate = lg.bound(network, norm=norm, method="lipsdp-neuron")
        parts = certificate.evidence.parts

        def refused(*parts, certificate=certificate, match=""):
            with pytest.raises(NotCertified, match=match):
                lg.verify(network, dataclasses.replace(certificate, evidence=WeightedMultipliers(parts)))

        refused(*parts[1:], match="parts are given")
        refused(*parts, parts[0], match="parts are given")
        first, rest = parts[0], parts[1:]
        refused(dataclasses.replace(first, t=0.3 * first.t), *rest, match="not provably")
        refused(dataclasses.replace(first, t=4 * first.t), *rest, match="not provably")
        refused(dataclasses.replace(first, t=-first.t), *rest, match="not provably")
        refused(dataclasses.replace(first, rho=0.5 * first.rho), *rest, match="not provably")
        if first.weights is None:
            refused(dataclasses.replace(first, weights=torch.ones(4)), *rest, match="need no weights")
            continue
        refused(dataclasses.replace(first, weights=0.5 * first.weights), *rest, match="not provably")
        refused(dataclasses.replace(first, weights=None), *rest, match="need weights")
        refused(dataclasses.replace(first, weights=first.weights[1:]), *rest, match="weights are given")
        for bad in (-1.0, 0.0, math.nan, math.inf):
            weights = first.weights.clone()
            weights[1] = bad
            refused(dataclasses.replace(first, weights=weights), *rest, match="not positive and finite")
    with pytest.raises(NotCertified, match="no bound for the norms"):
        lg.verify(network, dataclasses.replace(certificate, norm=(INF, 1.0)))
    two = dataclasses.replace(certificate, norm=(INF, INF), evidence=Multipliers(parts[0].t, 1.0))
    with pytest.raises(NotCertified, match="2-norm to 2-norm"):
        lg.verify(network, two)


def test_a_claim_below_the_truth_is_not_believed():
    # The value is computed from the evidence; scaling the weights down together with the claim proves nothing.
    network = net(3, 5, 2, seed=3)
    certificate = lg.bound(network, norm=INF, method="lipsdp-neuron")
    assert lg.verify(network, dataclasses.replace(certificate, value=1e-3)).value == certificate.value
    larger = tuple(dataclasses.replace(part, weights=1.5 * part.weights) for part in certificate.evidence.parts)
    looser = lg.verify(network, dataclasses.replace(certificate, evidence=WeightedMultipliers(larger)))
    assert looser.value == pytest.approx(math.sqrt(1.5) * certificate.value, rel=1e-6)


def test_norms_without_a_constraint_are_refused():
    network = net(3, 5, 2)
    for norm in ((INF, 1), (1, INF)):
        with pytest.raises(UnsupportedQuery, match=r"no quadratic constraint is known.*Use method='spectral'"):
            lg.bound(network, norm=norm, method="lipsdp-neuron")
        assert lg.bound(network, norm=norm).method == "spectral"
    with pytest.raises(UnsupportedQuery, match="'first-order' bounds the constant in the 2-norm only"):
        lg.bound(network, norm=INF, method="lipsdp-neuron", solver="first-order")
    with pytest.raises(UnsupportedQuery, match="matrix of order 3300 for each of 10 programs is too large"):
        lg.bound(net(3000, 300, 10), norm=INF, method="lipsdp-neuron")
