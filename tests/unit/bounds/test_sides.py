"""Which sides of their breaks neurons can be on: batched linear programs against HiGHS, decisions against sampled inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_oracle import random_net
from test_exact_enumeration import HARDTANH, LEAKY

import lipguard as lg
from lipguard.exact.feasibility import pattern_at
from lipguard.exact.linear import signs
from lipguard.exact.sides import decide
from lipguard.solvers import highs
from lipguard.verify.phases.phase_form import phase_form
from lipguard.verify.phases.phases import imply, reduce, refutes

BOX = lg.Box(-1.0, 1.0)


def polytopes(count, rows, d, seed, empty=False):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(count, rows, d, generator=generator, dtype=torch.float64)
    a /= torch.linalg.vector_norm(a, dim=2, keepdim=True)
    inside = 1.6 * torch.rand(count, 1, d, generator=generator, dtype=torch.float64) - 0.8
    # Corners as small as those deep in a search.
    room = 10.0 ** (-4 * torch.rand(count, 1, generator=generator, dtype=torch.float64)) * 0.3
    b = (a * inside).sum(2) + room * torch.rand(count, rows, generator=generator, dtype=torch.float64)
    if empty:
        a[:, 1], b[:, 1] = -a[:, 0], -b[:, 0] - 0.1
    return a, b


@pytest.mark.parametrize("d", [1, 3, 6])
def test_signs_of_maxima_agree_with_highs(d):
    a, b = polytopes(8, 2 * d + 3, d, d)
    generator = torch.Generator().manual_seed(d)
    owner = torch.arange(160) % 8
    g = torch.randn(160, d, generator=generator, dtype=torch.float64)
    box = np.ones(d)
    best = torch.tensor([
        highs.maximise(g[i].numpy(), a[k].numpy(), b[k].numpy(), -box, box).value for i, k in enumerate(owner.tolist())
    ])  # fmt: skip
    gap = 10.0 ** (-4 * torch.rand(160, generator=generator, dtype=torch.float64))
    c = -best + gap * torch.where(torch.arange(160) % 2 == 0, 1.0, -1.0)
    found = signs(a, b, g, c, owner)
    assert torch.equal(found.positive, best + c > 0) and torch.equal(found.negative, best + c < 0)
    points, up = found.point[found.positive], found.positive
    assert ((a[owner[up]] @ points[:, :, None])[:, :, 0] < b[owner[up]]).all() and (points.abs() < 1).all()
    assert ((g[up] * points).sum(1) + c[up] > 0).all()
    z, down = found.multipliers[found.negative], found.negative
    rest = g[down] - (z[:, None] @ a[owner[down]])[:, 0]
    assert (z >= 0).all() and ((z * b[owner[down]]).sum(1) + rest.abs().sum(1) + c[down] < 0).all()


def test_an_empty_polytope_affirms_nothing():
    a, b = polytopes(3, 5, 3, 0, empty=True)
    found = signs(a, b, torch.ones(6, 3, dtype=torch.float64), torch.ones(6, dtype=torch.float64), torch.arange(6) % 3)
    assert not found.positive.any()


@pytest.mark.parametrize("kwargs", [{}, LEAKY, HARDTANH, {"skip": True}], ids=["relu", "leaky", "hardtanh", "skip"])
@pytest.mark.parametrize("domain", [BOX, lg.Ball(0.25, 0.75)], ids=["box", "ball"])
def test_decided_phases_hold_at_sampled_inputs(kwargs, domain):
    sizes = [3, 8, 7, 2] if kwargs != {"skip": True} else [3, 7, 7, 2]
    decided = proved = 0
    for seed in range(2):
        form = phase_form(random_net(sizes, 300 + seed, **kwargs).network(), domain)
        generator = torch.Generator().manual_seed(seed)
        inputs = domain.sample(800, 3, generator).numpy()
        patterns = torch.from_numpy(np.array([pattern_at(form, x) for x in inputs]))
        some = patterns[torch.randint(len(patterns), (24,), generator=generator)]
        fixed = torch.rand(some.shape, generator=generator) < 0.5
        decisions, parts = torch.where(fixed, some, -1), torch.zeros(len(some), dtype=torch.long)
        ranges = imply(form, decisions, parts)
        found = decide(form, decisions, parts, ranges, reduce(form, ranges), some)
        for before, after, beyond, own in zip(decisions, found.decisions, found.beyond, some, strict=True):
            there = ((patterns == before) | (before < 0)).all(1)
            assert ((patterns[there] == after) | (after < 0)).all()
            decided += int((after != before).sum())
            for neuron in range(form.layers[0].stop):
                # The first layer is affine in the input: the region has points on both sides, or the neuron is decided.
                if neuron in beyond and domain.contains(torch.from_numpy(beyond[neuron])):
                    assert pattern_at(form, beyond[neuron])[neuron] != own[neuron]
        if not found.leaves:
            continue
        phases = torch.stack([leaf.phases.long() for leaf in found.leaves])
        implied = imply(form, phases, torch.zeros(len(phases), dtype=torch.long))
        farkas = torch.stack([leaf.farkas for leaf in found.leaves if leaf.farkas is not None])
        sure = refutes(form, implied, farkas) | implied.empty
        assert sure.all()
        assert not any(((patterns == leaf) | (leaf < 0)).all(1).any() for leaf in phases)
        # Refuting an inhabited assignment with the same multipliers must fail.
        inhabited = imply(form, some[:1].expand(len(farkas), -1), torch.zeros(len(farkas), dtype=torch.long))
        assert not refutes(form, inhabited, farkas).any() and not refutes(form, inhabited, -farkas).any()
        proved += len(found.leaves)
    assert decided > 2 and proved >= decided
