"""Degenerate networks: the true constant by the exact repair, and the closed maximum where it differs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from exact_oracle import Layer, Net, constant, random_net

import lipguard as lg
from lipguard.exact import exact
from lipguard.exact.degenerate import degenerate_subset
from lipguard.exact.piecewise import piecewise_form
from lipguard.exact.problem import problem

INF = math.inf
BOX = lg.Box(-1.0, 1.0)


def one_layer(weight, bias, out):
    return Net([Layer(np.array(weight, dtype=float), np.array(bias, dtype=float))], np.array(out, dtype=float))


def two_layers(first, b1, second, b2, out):
    layers = [Layer(np.array(w, dtype=float), np.array(b, dtype=float)) for w, b in ((first, b1), (second, b2))]
    return Net(layers, np.array(out, dtype=float))


NETS = {
    # relu(x) + relu(-x) = |x|: constant 1, closed 2 with opposite output signs.
    "opposite": one_layer([[1.0], [-1.0]], [0, 0], [[1, -1]]),
    "opposite-absolute": one_layer([[1.0], [-1.0]], [0, 0], [[1, 1]]),
    "tied": one_layer([[1, 2], [1, 2]], [0.5, 0.5], [[1, -1], [2, 1]]),
    "proportional": one_layer([[1, 2], [3, 6], [-2, -4]], [0.5, 1.5, -1], [[1, -1, 0.5]]),
    "bias-free": random_net([2, 4, 3, 2], 3, bias=0.0),
    "bias-free-3": random_net([3, 5, 1], 4, bias=0.0),
    "zero-initialised": random_net([2, 3, 3, 1], 7, bias=0.0),
    "face": one_layer([[1, 0], [0, 1]], [-1, 0.25], [[5, 1]]),
    "corner": one_layer([[1, 1], [1, -1]], [-2, 0.25], [[5, 1]]),
    "dead": one_layer([[1, 0], [0.25, 1]], [-3, 0.25], [[5, 1]]),
    "identically-zero": one_layer([[0, 0], [0.25, 1]], [0, 0.25], [[5, 1]]),
    "zero-weights": one_layer([[0, 0], [0, 0]], [0, 0], [[5, 1]]),
    # On x < 0 the second layer is constantly 0, on its own break point.
    "zero-upstream": two_layers([[1, 0]], [0], [[1], [-1]], [0, 0], [[2, 3]]),
    "cancels": two_layers([[1, 0], [1, 0]], [0, 0], [[0.3, -0.3], [1, 1]], [0, 0], [[4, 1]]),
    "three-lines": one_layer([[1, 0], [0, 1], [1, 1]], [0, 0, 0], [[1, 1, -2]]),
}


@pytest.mark.parametrize("name", NETS)
def test_the_true_constant(name):
    net = NETS[name]
    network = net.network()
    for domain in (BOX, lg.Ball(0.0, 1.0), lg.Ball(0.0, 1.0, 1.0), None):
        for norm in (1.0, 2.0, INF):
            expected = constant(net, domain, (norm, norm))
            found = exact(network, domain=domain, norm=norm, method="enumeration")
            assert found.lower == pytest.approx(expected, rel=1e-11, abs=1e-12), (domain, norm)


@pytest.mark.parametrize("name", NETS)
def test_the_exact_repair(name):
    net = NETS[name]
    for norm, method in ((2.0, "miqcqp"), (INF, "milp"), (1.0, "milp")):
        expected, closed = (constant(net, BOX, (norm, norm), strict) for strict in (True, False))
        found = exact(net.network(), domain=BOX, norm=norm, method=method, time_limit=60)
        assert found.status == "closed"
        assert found.lower == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert found.upper == pytest.approx(expected, rel=2e-6, abs=1e-9)
        if closed > expected * (1 + 1e-5):
            assert found.closed_region == pytest.approx(closed, rel=1e-6)
            assert "no open region" in found.choice
        else:
            assert found.closed_region is None


def test_repair_on_all_of_space():
    # Homogenised: closed regions meet at rays and on the hyperplane at infinity.
    for name in ("opposite", "tied", "proportional", "three-lines", "zero-upstream"):
        net = NETS[name]
        expected = constant(net, None, (2.0, 2.0))
        found = exact(net.network(), norm=2, method="miqcqp", time_limit=60)
        assert found.status == "closed", name
        assert found.upper == pytest.approx(expected, rel=2e-6, abs=1e-9), name


def test_the_subset_is_small_and_stands_alone():
    net = one_layer([[1, 2], [0.3, -1], [1, 2], [0.7, 0.1]], [0.5, 0, 0.5, 0.1], [[1, 1, -1, 1]]).network()
    task = problem(net, lg.Query((2.0, 2.0), BOX))
    assert degenerate_subset(task, np.array([1, 1, 0, 1])) == [0, 2]
    assert degenerate_subset(task, np.array([1, 1, 1, 1])) is None


def test_a_slope_of_one_is_no_kink():
    net = Net([Layer(np.eye(2), np.zeros(2), slopes=(1.0, 1.0))], np.eye(2)).network()
    assert all(neuron.breaks == () for neuron in piecewise_form(net).neurons)
    assert exact(net, domain=BOX).lower == pytest.approx(1.0, rel=1e-12)
