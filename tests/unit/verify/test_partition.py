"""The checker of partitions: gaps, corrupted leaves, rigorous ranges, refutations and flat regions that are none."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from exact_oracle import Layer, Net, constant, norm_of, random_net
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact_enumeration import HARDTANH, LEAKY, PRELU, RELU6

import lipguard as lg
from lipguard.certificate import Leaf, Partition
from lipguard.errors import NotCertified
from lipguard.exact import exact
from lipguard.exact.feasibility import pattern_at
from lipguard.verify.phases.flat import is_flat
from lipguard.verify.phases.partition import covers, interval_norms
from lipguard.verify.phases.phase_form import phase_form
from lipguard.verify.phases.phases import imply, reduce, refutes

INF = math.inf
BOX = lg.Box(-1.0, 1.0)
SHAPES = {"relu": {}, "leaky": LEAKY, "prelu": PRELU, "hardtanh": HARDTANH, "relu6": RELU6, "skip": {"skip": True}}
PLACES = (BOX, lg.Ball(0.25, 0.75), lg.Ball(0.25, 0.75, 1.0), lg.Ball(-0.5, 0.5, INF))


def table(*rows):
    return torch.tensor(rows)


def test_covers():
    assert covers(table([-1, -1]), 2)
    assert covers(table([0, -1], [1, 0], [1, 1]), 2)
    assert not covers(table([0, -1], [1, 0]), 2)
    assert not covers(table([0, 0], [1, 1]), 2)
    # Each covers one half by another neuron: nothing is fixed in both.
    assert not covers(table([0, -1], [-1, 1]), 2)
    assert covers(table([0, -1], [1, -1], [1, 0]), 2)
    assert not covers(table([0, -1], [1, -1]), 3)
    assert covers(table([0, -1], [2, -1], [1, 0], [1, 1], [1, 2]), 3)
    assert not covers(torch.zeros(0, 2, dtype=torch.long), 2)


@given(st.integers(0, 2**32 - 1), st.integers(2, 3), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_covers_never_says_yes_to_a_gap(seed, pieces, n):
    rng = np.random.default_rng(seed)
    leaves = rng.integers(-1, pieces, size=(rng.integers(1, 12), n))
    complete = all(
        any(all(p in (-1, v) for p, v in zip(leaf, point, strict=True)) for leaf in leaves)
        for point in itertools.product(range(pieces), repeat=n)
    )
    assert complete or not covers(torch.from_numpy(leaves), pieces)


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(SHAPES)), st.integers(0, len(PLACES) - 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_phases_imply_holds_at_every_point_with_them(seed, shape, place, everywhere):
    rng = np.random.default_rng(seed)
    net = random_net([2, 4, 3, 2], int(rng.integers(1000)), **SHAPES[shape])
    domain = None if everywhere and shape not in ("hardtanh", "relu6") else PLACES[place]
    network = net.network()
    form = phase_form(network, domain)
    part = int(rng.integers(len(form.lower)))
    if form.directions:
        x = rng.uniform(form.lower[part].numpy(), form.upper[part].numpy())
    else:
        x = domain.sample(1, net.inputs, torch.Generator().manual_seed(seed % 2**31))[0].numpy()
    pattern = torch.from_numpy(pattern_at(form, x)).long()
    phases = torch.where(torch.from_numpy(rng.random(form.neurons) < rng.random()), pattern, -1)
    ranges = imply(form, phases[None], torch.tensor([part]))
    assert not ranges.empty[0]
    # Pre-activations in float64: their own rounding is far below 1e-12 here.
    value = preactivations(form, x)
    assert bool((ranges.lower[0] <= value + 1e-12).all() and (value - 1e-12 <= ranges.upper[0]).all())
    assert bool(
        (torch.from_numpy(x) >= ranges.x_lower[0] - 1e-12).all() and (torch.from_numpy(x) <= ranges.x_upper[0] + 1e-12).all()
    )
    implied = ranges.phases[0]
    clear = ((value[None] - form.breaks).abs() > 1e-9).all(0) & (implied >= 0)
    assert bool((implied == pattern)[clear].all())
    # No multipliers, however chosen, refute a region with a point, or flatten one with an interior.
    for scale in (0.0, 1e-3, 1.0, 1e3):
        farkas = torch.from_numpy(rng.normal(size=form.neurons) * scale)
        assert not refutes(form, ranges, farkas[None])[0]
        if bool(((value[None] - form.breaks).abs() > 1e-6).all()) and len(form.lower) == 1:
            assert not is_flat(form, implied, torch.where(implied >= 0, farkas, 0.0), part)
    reduced = reduce(form, ranges)
    jacobian = jacobian_of(form, pattern)
    for norm in ((1.0, 1.0), (1.0, 2.0), (1.0, INF), (2.0, INF), (INF, INF)):
        assert float(interval_norms(form, reduced, norm)[0]) >= norm_of(jacobian, norm) * (1 - 1e-12)


def preactivations(form, x):
    pattern = pattern_at(form, x)
    w, p = torch.zeros(form.neurons, dtype=torch.float64), torch.zeros(form.neurons, dtype=torch.float64)
    for here in form.layers:
        p[here] = form.q[here] @ torch.cat([w, torch.from_numpy(x)]) + form.bias[here]
        for j in range(here.start, here.stop):
            w[j] = form.pieces[pattern[j], j] * p[j] + form.heights[pattern[j], j]
    return p


def jacobian_of(form, pattern):
    n = form.neurons
    slopes = torch.stack([form.pieces[k, j] for j, k in enumerate(pattern.tolist())])
    b, a = form.q[:, :n], form.q[:, n:]
    inner = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - b * slopes, a)
    return (form.y[:, n:] + form.y[:, :n] @ (slopes[:, None] * inner))[:, form.tangent > 0].numpy()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_flat_is_never_said_of_a_region_with_an_interior(seed):
    # Small integers, so that exact cancellation is common, and weights as a prover would choose them or at random.
    rng = np.random.default_rng(seed)
    d, n = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    layer = Layer(rng.integers(-2, 3, size=(n, d)).astype(float), rng.integers(-2, 3, size=n).astype(float))
    net = Net([layer], np.ones((1, n)))
    box = lg.Box(-2.0, [1.0, 2.0, 3.0][:d])
    form = phase_form(net.network(), box)
    x = rng.uniform(-2, np.array([1.0, 2.0, 3.0])[:d])
    p = layer.weight @ x + layer.bias
    if np.abs(p).min() < 1e-6 or form.directions:
        return
    phases = torch.from_numpy((p > 0).astype(np.int64))
    sign = torch.where(phases > 0, 1.0, -1.0).double()
    for weights in (torch.from_numpy(rng.integers(0, 3, size=n).astype(float)) * sign, torch.from_numpy(rng.normal(size=n))):
        assert not is_flat(form, phases, weights, 0)


def test_flat_regions():
    # x + y >= 0 with -x - y >= 0, tied; x <= 1 with x >= 1 touched on a face; a corner; three lines through a point.
    def form(weight, bias, domain=BOX):
        return phase_form(
            Net([Layer(np.array(weight, float), np.array(bias, float))], np.ones((1, len(weight)))).network(), domain
        )

    def flat(f, phases, weights):
        return is_flat(f, torch.tensor(phases), torch.tensor(weights, dtype=torch.float64), 0)

    tied = form([[1, 1], [-3, -3]], [0.5, -1.5])
    assert flat(tied, [1, 1], [3.0, 1.0]) and flat(tied, [0, 0], [-3.0, -1.0])
    assert not flat(tied, [1, 0], [3.0, -1.0]) and not flat(tied, [1, 1], [0.0, 0.0])
    # The guess need not be exact: the rest is computed. A wrong sign or a free neuron proves nothing.
    assert flat(tied, [1, 1], [3.0, 1.01])
    assert not flat(tied, [1, 1], [3.0, -1.0]) and not flat(tied, [1, -1], [3.0, 1.0])
    assert not flat(tied, [1, 1], [math.nan, 1.0]) and not flat(tied, [1, 1], [1e308, 1e308 * 10])
    touched = form([[1, 0]], [-1.0])
    assert flat(touched, [1], [1.0]) and not flat(touched, [0], [-1.0])
    assert not flat(form([[1, 0]], [-1.0 + 1e-15]), [1], [1.0])
    assert flat(form([[1, 1]], [-2.0]), [1], [1.0])
    assert flat(form([[1, 0]], [-1.0], lg.Ball(0.0, 1.0)), [1], [1.0])
    assert not flat(form([[1, 1]], [-1.4142], lg.Ball(0.0, 1.0)), [1], [1.0])
    assert flat(form([[1, 1]], [-1.0], lg.Ball(0.0, 1.0, 1.0)), [1], [1.0])
    three = form([[1, 0], [0, 1], [-1, -1]], [0.5, 0.25, -0.75])
    assert flat(three, [1, 1, 1], [1.0, 1.0, 1.0]) and not flat(three, [1, 1, 0], [1.0, 1.0, -1.0])
    # A neuron that vanishes on the region is on its break point without being flat.
    assert not flat(form([[0, 0]], [0.0], lg.Box(0.5, 1.0)), [1], [1.0])


NETS = {
    "plain": (random_net([2, 4, 3, 2], 2), BOX, (2.0, 2.0)),
    "rows": (random_net([2, 4, 3, 2], 2), BOX, (INF, INF)),
    "three-pieces": (random_net([2, 3, 2, 2], 41, **HARDTANH), lg.Ball(0.25, 0.75, 1.0), (2.0, 2.0)),
    "space": (random_net([2, 4, 3, 2], 2), None, (2.0, 2.0)),
    "flat": (random_net([2, 4, 3, 2], 61, bias=0.0), lg.Ball(-0.5, 0.5, INF), (2.0, 2.0)),
}


def corruptions(leaves):
    """Single changes of the leaves."""
    for i, leaf in enumerate(leaves):
        yield "removed", leaves[:i] + leaves[i + 1 :]

        def put(new, i=i):
            return (*leaves[:i], new, *leaves[i + 1 :])

        for j in range(len(leaf.phases)):
            for value in (-1, 0, 1, 2, 5):
                if int(leaf.phases[j]) != value:
                    phases = leaf.phases.clone()
                    phases[j] = value
                    yield f"phase {j} {value}", put(dataclasses.replace(leaf, phases=phases))
        yield "part", put(dataclasses.replace(leaf, part=leaf.part + 1))
        yield "part -1", put(dataclasses.replace(leaf, part=-1))
        yield "empty", put(dataclasses.replace(leaf, empty=not leaf.empty))
        yield "flat", put(dataclasses.replace(leaf, flat=torch.ones(len(leaf.phases), dtype=torch.float64)))
        for name in ("t", "farkas", "flat"):
            value = getattr(leaf, name)
            if value is not None:
                for new in (value * 1e3, -value, value * 0, value * math.nan, value[:-1], torch.full_like(value, INF)):
                    yield name, put(dataclasses.replace(leaf, **{name: new}))


@pytest.mark.parametrize("name", NETS)
def test_a_corrupted_partition_never_proves_too_little(name):
    net, domain, norm = NETS[name]
    network, true = net.network(), constant(net, domain, norm)
    certificate = exact(network, domain=domain, norm=norm, method="branch-and-bound", gap=1e-3).upper_certificate
    leaves = certificate.evidence.leaves
    assert len(leaves) > 1
    if name == "flat":
        assert any(leaf.flat is not None for leaf in leaves)
    refused = 0
    chosen = list(corruptions(leaves))
    step = max(1, len(chosen) // 250)
    for what, changed in chosen[::step]:
        try:
            value = lg.verify(
                network, dataclasses.replace(certificate, evidence=Partition(changed, certificate.evidence.value))
            ).value
        except NotCertified:
            refused += 1
            continue
        assert value >= true * (1 - 1e-12), what
    assert refused > 0


@pytest.mark.parametrize("factor", [0.999, 0.5, 0.0, -1.0, math.nan])
def test_a_lowered_value_is_refused_or_proved_anew(factor):
    for name in ("plain", "rows"):
        net, domain, norm = NETS[name]
        certificate = exact(net.network(), domain=domain, norm=norm, method="branch-and-bound").upper_certificate
        evidence = certificate.evidence
        changed = dataclasses.replace(certificate, evidence=Partition(evidence.leaves, evidence.value * factor))
        try:
            value = lg.verify(net.network(), changed).value
        except NotCertified:
            continue
        assert value >= constant(net, domain, norm) * (1 - 1e-12)


def test_leaves_that_do_not_fit():
    network = NETS["plain"][0].network()
    certificate = exact(network, domain=BOX, method="branch-and-bound").upper_certificate

    def refused(leaves, match):
        with pytest.raises(NotCertified, match=match):
            lg.verify(network, dataclasses.replace(certificate, evidence=Partition(tuple(leaves), 100.0)))

    whole = torch.full((7,), -1)
    refused([], "no leaves")
    refused([Leaf(whole[:3])], "another number")
    refused([Leaf(whole, t=torch.ones(3))], "another number")
    refused([Leaf(whole, part=3)], "no part")
    refused([Leaf(whole, empty=True)], "not refuted")
    refused([Leaf(whole, flat=torch.ones(7))], "no interior")
