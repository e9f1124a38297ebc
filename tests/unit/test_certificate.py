"""Certificates and enclosures as plain values, in files, and as people read them."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import lipguard as lg
from lipguard.certificate import Certificate, Enclosure, Leaf, Multipliers, Partition, SolverReport, Witness
from lipguard.errors import NotCertified

DOUBLE = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=DOUBLE)


def certificate(**changes) -> Certificate:
    plain = Certificate(
        2.5, "upper", (2.0, math.inf), lg.Ball(vector(0.0, 1.0), 0.5, math.inf, lg.Box(-1.0, [1.0, 2.0])), "ab" * 32,
        "lipsdp-neuron", Multipliers(vector(1.0, 2.0), 6.25), "verified", 0.25, "a note", {"steps": 3, "pull": 0.5, "by": "x"},
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def enclosure(**changes) -> Enclosure:
    below = certificate(value=1.0, side="lower", evidence=Witness(vector(0.0, 1.0), vector(1.0, 0.0)))
    above = certificate(value=2.5, evidence=Partition((Leaf(torch.tensor([1])),), 2.5))
    plain = Enclosure(
        below, above, "time limit", "branch-and-bound", 1.5, "highs", vector(0.0, 1.0), 3.0, "chosen", {"leaves": 1}
    )
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    "result",
    [
        certificate(),
        certificate(domain=None, note="", details={}),
        certificate(domain=lg.Box(-1, 1)),
        certificate(value=math.inf, rigor="approximate", evidence=SolverReport("scip", "no bound")),
        enclosure(),
        enclosure(witness=None, closed_region=None),
    ],
)
def test_a_result_comes_back_from_plain_values(result):
    written = json.dumps(result.to_dict(), allow_nan=False)
    back = type(result).from_dict(json.loads(written))
    assert json.dumps(back.to_dict()) == written
    if isinstance(result, Certificate):
        assert (back.value, back.side, back.norm, back.rigor, back.note) == (
            result.value, result.side, result.norm, result.rigor, result.note,
        )  # fmt: skip
    else:
        assert (back.lower, back.upper, back.gap, back.rigor) == (result.lower, result.upper, result.gap, result.rigor)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("value", "2.5"), ("value", True), ("value", math.nan), ("value", "inf"), ("value", None), ("side", "left"), ("side", []),
        ("norm", ["2.0"]), ("norm", ["3.0", "2.0"]), ("norm", "22"), ("norm", [2.0, 2.0]), ("rigor", "sworn"), ("digest", 3),
        ("seconds", "fast"), ("note", None), ("details", []), ("details", {"a": []}), ("evidence", None), ("domain", 3),
        ("domain", {"kind": "sphere"}), ("domain", {"kind": "box", "lower": 0.0}),
        ("domain", {"kind": "box", "lower": "0", "upper": 1.0}), ("domain", {"kind": "box", "lower": 0.0, "upper": 1.0, "x": 1}),
        ("domain", {"kind": "ball", "center": [[0.0]], "radius": 1.0, "norm": "2.0"}),
        ("domain", {"kind": "ball", "center": 0.0, "radius": 1.0, "norm": "3.0"}),
        ("domain", {"kind": "ball", "center": 0.0, "radius": 1.0, "norm": "2.0", "box": {"kind": "ball"}}),
        ("more", 1),
    ],
)  # fmt: skip
def test_a_field_without_meaning_is_refused(field, value):
    plain = certificate().to_dict()
    with pytest.raises(NotCertified, match="damaged"):
        Certificate.from_dict({**plain, field: value})
    outer = enclosure().to_dict()
    with pytest.raises(NotCertified, match="damaged"):
        Enclosure.from_dict({**outer, "upper_certificate": {**plain, field: value}})


@pytest.mark.parametrize("name", ["value", "side", "norm", "domain", "digest", "method", "evidence"])
def test_a_missing_field_is_refused(name):
    plain = certificate().to_dict()
    del plain[name]
    with pytest.raises(NotCertified, match=f"'{name}' is missing"):
        Certificate.from_dict(plain)


def test_what_is_no_object_is_refused():
    for value in (None, 3, "text", [], [("value", 1.0)]):
        with pytest.raises(NotCertified):
            Certificate.from_dict(value)


def test_a_certificate_from_plain_values_is_proved_again():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    network = lg.capture(net, torch.zeros(1, 3))
    for domain in (None, lg.Box(-1, 1)):
        found = lg.bound(network, domain=domain)
        back = Certificate.from_dict(json.loads(json.dumps(found.to_dict())))
        assert lg.verify(network, back).value == found.value
