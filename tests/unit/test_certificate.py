"""Certificates and enclosures as plain values, in files, and as people read them."""

import copy
import dataclasses
import json
import math
import pickle
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import lipguard as lg
from lipguard.certificate import Certificate, Enclosure, Leaf, Multipliers, Partition, SolverReport, Witness
from lipguard.errors import NotCertified, UnreadableCheckpoint
from lipguard.outward import show_lower

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


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return lg.capture(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), torch.zeros(1, 3))


@pytest.fixture(scope="module")
def found(network):
    box = lg.Box(-1.0, 1.0)
    return {
        "upper": lg.bound(network, domain=box),
        "lower": lg.bound(network, domain=box, method="sampling"),
        "exact": lg.exact(network, domain=box, method="branch-and-bound", time_limit=20),
    }


@pytest.mark.parametrize("name", ["upper", "lower", "exact"])
def test_a_saved_result_is_approximate_until_it_is_proved_again(tmp_path, network, found, name):
    path = tmp_path / "result.json"
    found[name].save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    document = json.loads(path.read_text())
    assert document["lipguard"] == lg.__version__
    assert "proved" in document["statement"] and "Box(-1.0, 1.0)" in document["statement"]
    loaded = lg.load(path)
    assert type(loaded) is type(found[name])
    assert loaded.rigor == "approximate"
    ends = [loaded] if isinstance(loaded, Certificate) else [loaded.lower_certificate, loaded.upper_certificate]
    assert all("read from result.json" in end.note and "lipguard.verify" in end.note for end in ends)
    proved = lg.verify(network, loaded)
    assert proved.rigor == "verified"
    if name == "exact":
        assert (proved.lower, proved.upper) == (found[name].lower, found[name].upper)
    else:
        assert proved.value == found[name].value


def test_what_a_file_states_counts_for_nothing(tmp_path, network, found):
    path = tmp_path / "result.json"
    found["upper"].save(path)
    document = json.loads(path.read_text())
    document["result"]["value"] /= 2
    path.write_text(json.dumps(document))
    assert lg.verify(network, lg.load(path)).value == found["upper"].value
    other = lg.capture(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(NotCertified, match="is of network"):
        lg.verify(other, lg.load(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda text: "",
        lambda text: "[]",
        lambda text: "NaN",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"format": 1', '"format": 1, "format": 1'),
        lambda text: text.replace('"format": 1', '"format": 1, "more": 1'),
        lambda text: text.replace('"kind": "certificate"', '"kind": "enclosure"'),
        lambda text: text.replace('"kind": "certificate"', '"kind": "__class__"'),
        lambda text: text.replace('"lipguard result"', '"something"'),
        lambda text: text.replace('"side"', '"sid\u00e9"'),
        lambda text: text.replace('"seconds": ', '"seconds": NaN, "x": '),
        lambda text: '{"certificates": []}',
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change):
    path = tmp_path / "result.json"
    certificate().save(path)
    path.write_text(change(path.read_text()), encoding="utf-8")
    with pytest.raises(NotCertified):
        lg.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UnreadableCheckpoint, match="regular file"):
            lg.load(path)


def test_the_ends_of_an_enclosure_are_of_one_constant(network, found):
    whole = found["exact"]
    with pytest.raises(NotCertified, match="not a lower and an upper bound"):
        lg.verify(network, dataclasses.replace(whole, lower_certificate=whole.upper_certificate))
    for other in (lg.bound(network, domain=lg.Box(-1.0, 1.0), norm=math.inf), lg.bound(network, domain=lg.Box(-0.1, 0.1))):
        with pytest.raises(NotCertified, match="not a lower and an upper bound"):
            lg.verify(network, dataclasses.replace(whole, upper_certificate=other))
    everywhere = lg.bound(network)
    assert lg.verify(network, dataclasses.replace(whole, upper_certificate=everywhere)).upper == everywhere.value


def test_a_repr_is_one_short_line_with_outward_values(found):
    huge = lg.Ball(torch.zeros(784), 1.7976931348623157e308, math.inf, lg.Box(-1.7976931348623157e308, 1.7976931348623157e308))
    shapes = [
        *found.values(),
        certificate(domain=huge, method="m" * 300, evidence=SolverReport("s" * 300, "x"), note="n" * 1000),
        enclosure(method="m\n" * 300),
        lg.Query(norm=(1, "inf"), domain=huge, outputs=torch.zeros(50, 50), submodule="a.b", example=torch.zeros(9, 9)),
        lg.Query(outputs=(0, (1, 2)), example={"x": torch.zeros(3)}),
        huge,
    ]
    for result in shapes:
        text = repr(result)
        assert len(text) <= 200, text
        assert "\n" not in text
        assert "tensor(" not in text
    bound = certificate(value=2 / 3)
    assert repr(bound).startswith("Certificate(upper 0.666667, verified, norm 2 -> inf, Ball(<2 numbers>")
    assert repr(dataclasses.replace(bound, side="lower")).startswith("Certificate(lower 0.666666, ")
    assert "Multipliers(3 numbers)" in repr(bound)
    assert repr(enclosure()).startswith("Enclosure([1, 2.5], gap 0.6, time limit, verified, ")


def test_the_table_of_a_notebook_is_escaped():
    wild = "<script>alert('1')</script>&\""
    for result in (
        certificate(note=wild, method=wild),
        enclosure(method=wild, choice=wild, solver=wild, upper_certificate=certificate(evidence=SolverReport(wild, wild))),
    ):
        text = result._repr_html_()
        assert text.startswith("<table") and text.endswith("</table>")
        assert "<script>" not in text
        assert "&lt;script&gt;" in text
        assert len(text) < 5000
        ElementTree.fromstring(text)


def test_results_survive_pickle_and_copy(found):
    for result in found.values():
        for back in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
            assert json.dumps(back.to_dict()) == json.dumps(result.to_dict())


def test_a_saved_radius_is_approximate_until_it_is_proved_again(tmp_path, network):
    x = torch.tensor([[0.5, -0.5, 0.25]])
    label = network(x).argmax(1)
    proved = [one for one in lg.certify(network, x, label, 1e-3).certificates if one is not None]
    assert len(proved) == 1
    proved[0].save(tmp_path / "radius.json")
    loaded = lg.load(tmp_path / "radius.json")
    assert loaded.rigor == "approximate"
    again = lg.verify(network, loaded)
    assert again.rigor == "verified"
    assert again.radius == proved[0].radius
    assert len(repr(again)) <= 200
    assert f"has class {int(label)}" in again.statement()


def test_measurements_robustness_and_networks_are_one_line(network):
    tracker = lg.Tracker(network, None)
    tracker.update()
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    robustness = lg.certify(network, x, network(x).argmax(1), 1e-3)
    for result in (tracker.last, robustness, network):
        assert len(repr(result)) <= 200
        assert "\n" not in repr(result) and "tensor(" not in repr(result)
    assert repr(network) == "Network(3 inputs, 2 outputs, 4 nodes, 6 neurons)"
    assert repr(robustness).startswith("Robustness(9 samples, 9 correct, 9 certified, eps 0.001, median radius ")
    assert repr(tracker.last).startswith(f"Measurement([{show_lower(tracker.last.lower.value)}, ")
    for result in (tracker.last, robustness):
        ElementTree.fromstring(result._repr_html_())
