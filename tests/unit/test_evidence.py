"""The record form of evidence: every kind comes back bit for bit, and nothing else is read as evidence."""

import copy
import json
from dataclasses import fields
from typing import get_args

import pytest
import torch

from lipguard.errors import NotCertified
from lipguard.evidence import (
    KINDS,
    ChannelMultipliers,
    Evidence,
    Factors,
    Leaf,
    LocalMultipliers,
    Magnitudes,
    Multipliers,
    Part,
    Partition,
    Product,
    Slopes,
    SolverReport,
    WeightedMultipliers,
    Witness,
    evidence_from_record,
)

DOUBLE = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=DOUBLE)


SAMPLES = {
    "factors": Factors({1: 0.1, 12: 2.0}, "toeplitz"),
    "multipliers": Multipliers(vector(0.1, 5e-324, 1.7976931348623157e308), 1 / 3),
    "local-multipliers": LocalMultipliers(vector(0.1, 0.2), 4.0),
    "slopes": Slopes(),
    "magnitudes": Magnitudes({2: vector(1.0, 2.0)}),
    "weighted-multipliers": WeightedMultipliers((Part(vector(1.0), 2.0), Part(vector(), 3.0, vector(1.0, 4.0)))),
    "channel-multipliers": ChannelMultipliers({2: vector(1.0)}, 2.0, {0: (4, 5), 2: ()}),
    "witness": Witness(vector(1.0, -0.0), vector(0.0, 1.0)),
    "partition": Partition(
        (Leaf(torch.tensor([0, 1, -1], dtype=torch.int8), vector(1.0)), Leaf(torch.tensor([1]), None, True, vector(2.0), 3)), 2.5
    ),
    "product": Product((2, 4), (Multipliers(vector(1.0), 2.0), Factors({1: 2.0}))),
    "solver-report": SolverReport("scip", "optimal"),
}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "to_record"):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b


def test_every_kind_is_in_the_table_and_states_every_field():
    assert set(KINDS.values()) == set(get_args(Evidence))
    assert set(SAMPLES) == set(KINDS)
    for name, kind in KINDS.items():
        assert kind.kind == name
        assert list(kind.forms) == [f.name for f in fields(kind)]
    for part in (Part, Leaf):
        assert list(part.forms) == [f.name for f in fields(part)]
    assert {name for name, kind in KINDS.items() if kind.side == "lower"} == {"witness"}


@pytest.mark.parametrize("kind", SAMPLES)
def test_evidence_comes_back_bit_for_bit(kind):
    written = json.dumps(SAMPLES[kind].to_record(), allow_nan=False)
    back = evidence_from_record(json.loads(written))
    assert same(SAMPLES[kind], back)
    assert json.dumps(back.to_record()) == written


def test_records_of_format_1_are_read():
    """As lipguard 0.1 wrote them, with fields that have a default left out."""
    t = {"dtype": "float64", "shape": [1], "base64": "AAAAAAAA+D8="}
    assert same(evidence_from_record({"kind": "factors", "norms": {"1": 2.0}}), Factors({1: 2.0}))
    assert same(evidence_from_record({"kind": "multipliers", "t": t, "rho": 2}), Multipliers(vector(1.5), 2.0))
    phases = {"dtype": "int64", "shape": [1], "base64": "AQAAAAAAAAA="}
    leaf = {"phases": phases, "t": t, "empty": False, "farkas": None, "part": 0}
    assert same(
        evidence_from_record({"kind": "partition", "value": 2.5, "leaves": [leaf]}),
        Partition((Leaf(torch.tensor([1]), vector(1.5)),), 2.5),
    )


def places(value, path=()):
    """Every place of a JSON value, the whole one included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def put(value, path, new):
    changed = copy.deepcopy(value)
    if not path:
        return new
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return changed


STRANGE = [None, True, -1, 1.5, float("nan"), float("inf"), 10**400, "", "x", "inf", [], [[]], {}, {"kind": "slopes"}, {"a": 1}]


@pytest.mark.parametrize("kind", SAMPLES)
def test_whatever_stands_in_a_place_it_is_read_as_evidence_or_refused(kind):
    record = json.loads(json.dumps(SAMPLES[kind].to_record()))
    refused = 0
    for path in places(record):
        for new in STRANGE:
            try:
                found = evidence_from_record(put(record, path, new))
            except NotCertified:
                refused += 1
                continue
            assert isinstance(found, get_args(Evidence))
            json.dumps(found.to_record(), allow_nan=False)
    assert refused > len(STRANGE)


@pytest.mark.parametrize("kind", SAMPLES)
def test_unknown_and_missing_fields_are_refused(kind):
    record = SAMPLES[kind].to_record()
    with pytest.raises(NotCertified, match="no field called 'more'"):
        evidence_from_record({**record, "more": 1})
    optional = {"derivation"}
    for name in set(record) - optional:
        with pytest.raises(NotCertified, match="missing" if name != "kind" else "no evidence is called None"):
            evidence_from_record({key: value for key, value in record.items() if key != name})


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"kind": "multipliers", "t": Multipliers(vector(float("nan")), 1.0).to_record()["t"], "rho": 1.0}, "nan"),
        ({"kind": "multipliers", "t": Leaf(torch.tensor([1])).to_record()["phases"], "rho": 1.0}, "int64"),
        ({"kind": "multipliers", "t": Multipliers(torch.ones(1, 1), 1.0).to_record()["t"], "rho": 1.0}, "2 axes"),
        ({"kind": "factors", "norms": {"01": 1.0}}, "no node"),
        ({"kind": "factors", "norms": {"-1": 1.0}}, "no node"),
        ({"kind": "factors", "norms": {"²": 1.0}}, "no node"),
        ({"kind": "product", "cuts": [], "factors": [{"kind": "slopes"}]}, "not evidence of a piece"),
        ({"kind": "__class__"}, "no evidence is called"),
        ({"kind": ["factors"]}, "no evidence is called"),
        (7, "no evidence is called"),
    ],
)
def test_what_has_no_meaning_is_refused(record, match):
    with pytest.raises(NotCertified, match=match):
        evidence_from_record(record)


def test_a_nested_product_ends_in_a_refusal():
    record = {"kind": "product", "cuts": [], "factors": []}
    for _ in range(100_000):
        record = {"kind": "product", "cuts": [], "factors": [record]}
    with pytest.raises(NotCertified):
        evidence_from_record(record)


@pytest.mark.parametrize("shape", [[2**62], [-1], [0, 2**61, 2**61], [1] * 9, [True], ["1"], "1", {}, [2**61, 8], [1.0]], ids=str)
def test_shapes_that_do_not_fit_are_refused(shape):
    record = Multipliers(vector(1.0), 1.0).to_record()
    empty = Multipliers(vector(), 1.0).to_record()
    for one in (record, empty):
        with pytest.raises(NotCertified):
            evidence_from_record({**one, "t": {**one["t"], "shape": shape}})


def test_the_repr_of_evidence_is_its_kind_and_size():
    assert [repr(SAMPLES[kind]) for kind in ("multipliers", "partition", "factors", "slopes")] == [
        "Multipliers(4 numbers)",
        "Partition(2 leaves)",
        "Factors(2 layers)",
        "Slopes()",
    ]
    assert all(len(repr(sample)) < 80 for sample in SAMPLES.values())
