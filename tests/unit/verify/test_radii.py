"""The checker of radii: honest statements pass whatever proves them, forged ones are refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import lipguard as lg
from lipguard.certificate import Ball, Factors, LocalMultipliers, Multipliers, PairBound, Radius, RadiusCertificate
from lipguard.errors import NotCertified
from lipguard.verify import verify_radii, verify_radius
from lipguard.verify.domain.pairs import check_pairs

F64 = torch.float64
UNIT_BOX = lg.Box(0.0, 1.0)


@pytest.fixture(scope="module")
def trained():
    """A classifier of three blobs in [0, 1]^4, with samples and labels."""
    torch.manual_seed(0)
    centers, y = 0.2 + 0.6 * torch.rand(3, 4), torch.arange(90) % 3
    x = (centers[y] + 0.09 * torch.randn(90, 4)).clamp(0, 1)
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(120):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.double(), x[:12].double(), y[:12]


@pytest.fixture(scope="module", params=["local", "local-eps", "global", "spectral"])
def certified(request, trained):
    model, x, y = trained
    method, _, rest = request.param.partition("-")
    box = UNIT_BOX if method == "local" else None
    return lg.capture(model, x), lg.certify(model, x, y, 0.08, method=method, box=box, radii=not rest)


def stated(result):
    return [c for c in result.certificates if c is not None]


def refused(network, certificate, **changes):
    with pytest.raises(NotCertified):
        verify_radius(network, dataclasses.replace(certificate, **changes))


def test_every_radius_is_proved_from_its_evidence_alone(certified):
    network, result = certified
    expected = (result.correct & (result.margin > 0)).tolist()
    assert [c is not None for c in result.certificates] == expected and sum(expected) > 6
    for certificate, radius, label in zip(result.certificates, result.radius.tolist(), result.predicted.tolist(), strict=True):
        if certificate is None:
            continue
        assert certificate.radius == radius and certificate.label == label and certificate.digest == network.digest
        bare = dataclasses.replace(certificate, rigor="approximate")
        assert verify_radius(network, bare).rigor == "verified"
    # Many at once prove the same.
    assert all(c is not None for c in verify_radii(network, stated(result)))


def test_statements_survive_a_record(certified):
    network, result = certified
    for certificate in stated(result)[:4]:
        text = json.dumps(certificate.to_dict(), allow_nan=False)
        restored = RadiusCertificate.from_dict(json.loads(text))
        assert json.dumps(restored.to_dict()) == text
        assert verify_radius(network, restored).radius == certificate.radius
    damaged = json.loads(text) | {"ball": lg.Box(0.0, 1.0).json()}
    with pytest.raises(NotCertified, match="a radius is stated of a ball"):
        RadiusCertificate.from_dict(damaged)


def test_each_kind_of_evidence_is_used(trained):
    model, x, y = trained
    kinds: set[str] = set()
    for method in ("local", "global", "spectral"):
        for certificate in stated(lg.certify(model, x, y, 0.08, method=method)):
            kinds |= {type(bound.evidence).__name__ for bound in certificate.evidence.constants.values()}
            kinds |= {"ball"} if certificate.evidence.multipliers else set()
    assert kinds == {"LocalMultipliers", "Factors", "ball"}


def test_forged_statements_are_refused(certified):
    network, result = certified
    for certificate in [c for c in stated(result) if c.radius > 0][:4]:
        ball, label = certificate.ball, certificate.label
        for radius in (50.0 * certificate.radius, math.inf, math.nan, -1.0):
            refused(network, certificate, ball=dataclasses.replace(ball, radius=radius))
        for other in ((label + 1) % 3, (label + 2) % 3, 3, -1):
            refused(network, certificate, label=other)
        refused(network, certificate, digest="0" * 64)
        refused(network, certificate, ball=dataclasses.replace(ball, norm=math.inf))
        refused(network, certificate, ball=dataclasses.replace(ball, center=torch.zeros(3)))
        refused(network, certificate, ball=dataclasses.replace(ball, box=lg.Box(2.0, 3.0)))
        refused(network, certificate, ball=dataclasses.replace(ball, center=ball.center * math.nan))


def test_the_evidence_of_another_network_proves_nothing(certified):
    _, result = certified
    torch.manual_seed(3)
    other = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    for parameter in other.parameters():
        parameter.data *= 4
    strange = lg.capture(other, torch.zeros(1, 4, dtype=F64))
    for certificate in [c for c in stated(result) if c.radius > 0]:
        refused(strange, certificate)
    found = verify_radii(strange, [dataclasses.replace(c, digest=strange.digest) for c in stated(result) if c.radius > 0.02])
    assert found
    for certificate in found:
        if certificate is not None:  # then it is true of that network as well
            points = certificate.ball.sample(300, 4, torch.Generator().manual_seed(0))
            assert bool((strange(points).argmax(1) == certificate.label).all())
    assert any(certificate is None for certificate in found)


def test_a_smaller_box_is_another_statement():
    # In the box the radius is larger than without: taking the box away must not keep it.
    model = nn.Linear(2, 2, dtype=F64)
    model.weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64)
    model.bias.data = torch.tensor([-0.3, 0.3], dtype=F64)
    network = lg.capture(model, torch.zeros(1, 2, dtype=F64))
    box = lg.Box([0.4, 0.0], 1.0)
    boxed = lg.certify(model, torch.tensor([[0.5, 0.5]], dtype=F64), torch.tensor([0]), 0.5, box=box, largest=0.9)
    certificate = boxed.certificates[0]
    assert certificate is not None and certificate.radius > 0.4
    verify_radius(network, certificate)
    for other in (None, UNIT_BOX):
        refused(network, certificate, ball=dataclasses.replace(certificate.ball, box=other))


def test_forged_multipliers_and_constants_are_refused(trained):
    model, x, y = trained
    network = lg.capture(model, x)
    result = lg.certify(model, x, y, 0.08, method="local")
    with_multipliers = [c for c in stated(result) if c.evidence.multipliers]
    assert with_multipliers
    for certificate in with_multipliers:
        evidence = certificate.evidence
        for change in (
            lambda t: t.flip(0),
            lambda t: t * 0,
            lambda t: -t,
            lambda t: t * math.nan,
            lambda t: t / 50,
            lambda t: t[:-1],
        ):
            refused(
                network, certificate, evidence=Radius(evidence.constants, {j: change(t) for j, t in evidence.multipliers.items()})
            )
        refused(network, certificate, evidence=Radius({}, {}))
        refused(
            network,
            certificate,
            evidence=Radius(evidence.constants, {certificate.label: next(iter(evidence.multipliers.values()))}),
        )
        refused(network, certificate, evidence=Radius(evidence.constants, {7: next(iter(evidence.multipliers.values()))}))
    overall = [c for c in stated(lg.certify(model, x, y, 0.08, method="global")) if c.radius > 0.02]
    for certificate in overall:
        constants = certificate.evidence.constants
        # The constants of other pairs of classes, in the place of those that were asked for.
        swapped = dict(zip(constants, reversed(constants.values()), strict=True))
        refused(network, certificate, evidence=Radius(swapped, {}))
        for t_of in (lambda t: t.flip(0) * 0.1, lambda t: -t, lambda t: t[:-1], lambda t: t * math.nan):
            forged = {
                j: PairBound(bound.pair, LocalMultipliers(t_of(bound.evidence.t), bound.evidence.rho * 1e-4))
                for j, bound in constants.items()
                if isinstance(bound.evidence, LocalMultipliers)
            }
            large = dataclasses.replace(certificate.ball, radius=certificate.radius * 20)
            refused(network, certificate, evidence=Radius(forged, {}), ball=large)


def test_constants_of_pairs_hold_for_every_kind_of_evidence(trained):
    model, x, _ = trained
    network = lg.capture(model, x)
    points = torch.rand(500, 4, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_(True)
    row = torch.tensor([[1.0, 0.0, -1.0]], dtype=F64)
    gradient = torch.autograd.grad((network(points) @ row.T).sum(), points)[0]
    steepest = float(torch.linalg.vector_norm(gradient, dim=1).max())
    own = lg.bound(network.with_outputs(row), method="lipsdp-neuron")
    whole = lg.bound(network, method="lipsdp-neuron")
    norms = lg.bound(network, method="spectral").evidence
    assert isinstance(own.evidence, Multipliers) and isinstance(whole.evidence, Multipliers) and isinstance(norms, Factors)
    found = check_pairs(network, [PairBound((0, 2), own.evidence), PairBound(None, whole.evidence), PairBound((2, 0), norms)])
    assert all(value >= steepest for value in found)
    assert found[0] == pytest.approx(own.value, rel=1e-6)
    assert found[1] == pytest.approx(math.sqrt(2) * whole.value, rel=1e-6)
    refused_ones = [
        PairBound((0, 1), dataclasses.replace(own.evidence, t=own.evidence.t[:-1])),
        PairBound((0, 0), own.evidence),
        PairBound((0, 3), own.evidence),
        PairBound(None, norms),
        PairBound((0, 1), Factors({k: 0.5 * v for k, v in norms.norms.items()})),
    ]
    assert all(math.isnan(value) for value in check_pairs(network, refused_ones))


def test_a_wrong_class_is_never_proved_even_with_huge_multipliers(trained):
    # A margin below zero has a square as well: it must not become a bound that multipliers could prove.
    model, x, y = trained
    network = lg.capture(model, x)
    wrong = (y + 1) % 3
    t = torch.ones(network.neurons, dtype=F64)
    for i in range(4):
        label = int(wrong[i])
        evidence = Radius({}, {j: t for j in range(3) if j != label})
        for radius in (0.0, 1e-9, 1e-3):
            statement = RadiusCertificate(Ball(x[i], radius), label, network.digest, evidence)
            refused(network, statement)


def test_coupled_nodes_are_taken_apart_by_the_checker_too():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (1, 8)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 3)).double()
    x = torch.rand(6, 4, dtype=F64)
    network = lg.capture(model, x)
    for method in ("local", "global", "spectral"):
        result = lg.certify(model, x, model(x).argmax(1), 0.05, method=method)
        assert bool((result.radius > 0).any())
        assert all(found is not None for found in verify_radii(network, stated(result)))
