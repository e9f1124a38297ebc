"""Any single change to a record or a checkpoint is found by `lipguard verify`; what matters is found by mathematics too."""

from __future__ import annotations

import base64
import copy
import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from lipguard import Box
from lipguard.audit import Options, audit_checkpoint, read_record, record_path, verify_record
from lipguard.audit.record import _render
from lipguard.cli.main import main
from lipguard.errors import LipguardError, NotCertified


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """An audited checkpoint with every kind of content: BatchNorm folded, stored and named tensors, four certificates."""
    torch.manual_seed(0)
    # Wide enough that LipSDP on the box leaves a gap: the solver's value is then recorded beside it, as approximate.
    module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2), nn.LeakyReLU(0.1)).eval()
    for tensor in (module[1].weight.data, module[1].bias.data, module[1].running_mean, module[1].running_var):
        tensor.uniform_(0.5, 2.0)
    path = tmp_path_factory.mktemp("audited") / "a.ckpt"
    payload = {"state_dict": module.state_dict(), "global_step": 7, "epoch": 1, "hyper_parameters": {"width": 5, "name": "a"}}
    torch.save(payload, path)
    options = Options(domain=Box([-1.0, -0.5, 0.25], 1.0), method="miqcqp", time_limit=20)
    audit_checkpoint(path, module, torch.zeros(1, 3), options)
    verify_record(read_record(record_path(path)), path)
    return path


def leaves(value: object, path: tuple = ()) -> list[tuple]:
    """Paths of all leaves of a JSON value, empty containers included."""
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    if isinstance(value, list) and value:
        return [leaf for i, item in enumerate(value) for leaf in leaves(item, (*path, i))]
    return [path]


def at(document: object, path: tuple):
    for key in path:
        document = document[key]
    return document


def put(document: object, path: tuple, value: object) -> None:
    at(document, path[:-1])[path[-1]] = value


def changed(value: object, chance: random.Random) -> object:
    """Another value of the same kind, as near as it gets."""
    match value:
        case bool():
            return not value
        case int():
            return value + chance.choice((-1, 1))
        case float():
            return value * (1 + 2**-52) if value else 5e-324
        case str() if value:
            place = chance.randrange(len(value))
            return value[:place] + chance.choice([c for c in "ABCDab012" if c != value[place]]) + value[place + 1 :]
        case None:
            return 0
    return "x"


def caught(record: Path, checkpoint: Path) -> bool:
    try:
        verify_record(read_record(record), checkpoint)
    except LipguardError:
        return True
    return False


def test_one_hundred_single_changes_are_caught(audited, tmp_path):
    chance = random.Random(0)
    original = record_path(audited).read_bytes()
    document = json.loads(original)
    record = tmp_path / "a.ckpt.lipguard.json"
    found = 0
    places = leaves(document)
    for path in chance.sample(places, 40):
        forged = copy.deepcopy(document)
        put(forged, path, changed(at(forged, path), chance))
        assert forged != document or path[-1:] == ()
        record.write_text(json.dumps(forged, indent=1) + "\n")
        found += caught(record, audited)
    for _ in range(30):  # any byte of the record, digits and base64 among them
        place = chance.randrange(len(original))
        forged_bytes = bytearray(original)
        forged_bytes[place] ^= 1 << chance.randrange(7)
        record.write_bytes(forged_bytes)
        found += caught(record, audited)
    weights = audited.read_bytes()
    for _ in range(30):  # any byte of the checkpoint: weights, names, step, padding
        place = chance.randrange(len(weights))
        forged_bytes = bytearray(weights)
        forged_bytes[place] ^= 1 << chance.randrange(8)
        (tmp_path / "b.ckpt").write_bytes(forged_bytes)
        found += caught(record_path(audited), tmp_path / "b.ckpt")
    assert found == 100


def test_every_leaf_of_the_record_is_covered(audited, tmp_path):
    chance = random.Random(1)
    document = json.loads(record_path(audited).read_bytes())
    record = tmp_path / "a.ckpt.lipguard.json"
    for path in leaves(document):
        forged = copy.deepcopy(document)
        put(forged, path, changed(at(forged, path), chance))
        record.write_text(json.dumps(forged, indent=1) + "\n")
        assert caught(record, audited), path


def test_the_text_is_covered_where_no_value_changes(audited, tmp_path):
    text = record_path(audited).read_text()
    record = tmp_path / "a.ckpt.lipguard.json"
    value = json.loads(text)["enclosure"]["upper"]
    forgeries = (
        text[:-1],
        text + " ",
        text.replace("\n", "\r\n"),
        text.replace(f'"upper": {value!r}', f'"upper": {value!r}0'),
        text.replace('"format": 1', '"format": 1, "format": 1'),
        text[: len(text) // 2],
        "",
        "[]",
    )
    for forgery in forgeries:
        assert forgery != text
        record.write_bytes(forgery.encode())
        assert caught(record, audited), forgery[-40:]


# Somebody who can compute the record's own SHA-256 anew still has to get past the checker.


def resealed(document: dict, record: Path) -> None:
    document.pop("sha256")
    record.write_text(_render(document))


def certificate(document: dict, kind: str) -> dict:
    return next(c for c in document["certificates"] if c["evidence"]["kind"] == kind and c["rigor"] == "verified")


def lower_value(document):
    certificate(document, "local-multipliers")["value"] *= 0.999


def raise_value(document):
    certificate(document, "witness")["value"] *= 1.001


def nudge_value(document):
    certificate(document, "local-multipliers")["value"] *= 1 + 2**-52


def both_values(document):
    chosen = certificate(document, "local-multipliers")
    chosen["value"] *= 0.99
    document["enclosure"]["upper"] = chosen["value"]


def enclosure(document):
    document["enclosure"]["upper"] *= 0.9


def rho(document):
    certificate(document, "local-multipliers")["evidence"]["rho"] *= 0.9


def multiplier(document):
    encoded = certificate(document, "local-multipliers")["evidence"]["t"]
    values = torch.frombuffer(bytearray(base64.b64decode(encoded["base64"])), dtype=torch.float64)
    values *= 0.5  # a neuron that is linear on the domain has no multiplier that is read
    encoded["base64"] = base64.b64encode(values.numpy().tobytes()).decode()


def witness(document):
    encoded = certificate(document, "witness")["evidence"]["point"]
    values = torch.frombuffer(bytearray(base64.b64decode(encoded["base64"])), dtype=torch.float64)
    values[0] = 7.0
    encoded["base64"] = base64.b64encode(values.numpy().tobytes()).decode()


def side(document):
    certificate(document, "witness")["side"] = "upper"


def norm(document):
    certificate(document, "local-multipliers")["norm"] = ["1.0", "1.0"]


def every_norm(document):
    document["query"]["norm"] = ["1.0", "1.0"]
    for item in document["certificates"]:
        item["norm"] = ["1.0", "1.0"]


def domain(document):
    certificate(document, "witness")["domain"]["upper"] = 0.25


def smaller_domain(document):
    for item in (document["query"], *document["certificates"]):
        item["domain"] |= {"lower": [0.9, 0.9, 0.9]}


def digest(document):
    certificate(document, "local-multipliers")["digest"] = "0" * 64


def rigor(document):
    next(c for c in document["certificates"] if c["rigor"] != "verified")["rigor"] = "verified"


def slope(document):
    step = next(s for s in document["network"]["tensors"] if s.get("value", {}).get("dtype") == "float64")
    step["value"]["base64"] = base64.b64encode(
        torch.full(step["value"]["shape"] or (1,), 0.2).double().numpy().tobytes()
    ).decode()


def structure(document):
    nodes = document["network"]["nodes"]
    del nodes[-1]


def entry(document):
    steps = [s for s in document["network"]["tensors"] if s.get("entry", "").startswith("1.")]
    steps[0]["entry"], steps[1]["entry"] = steps[1]["entry"], steps[0]["entry"]


def step(document):
    document["step"] += 1


def status(document):
    document["status"] = "proved by intimidation"


@pytest.mark.parametrize(
    "forge",
    [
        lower_value, raise_value, nudge_value, both_values, enclosure, rho, multiplier, witness, side, norm, every_norm, domain,
        smaller_domain, digest, rigor, slope, structure, entry, step, status,
    ],
)  # fmt: skip
def test_the_checker_finds_what_a_new_hash_hides(audited, tmp_path, forge):
    document = json.loads(record_path(audited).read_bytes())
    record = tmp_path / "a.ckpt.lipguard.json"
    resealed(copy.deepcopy(document), record)
    verify_record(read_record(record), audited)
    forge(document)
    resealed(document, record)
    forged = read_record(record)
    with pytest.raises(NotCertified):
        verify_record(forged, audited)


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory):
    """A checkpoint whose upper bound is proved by leaves of a branching."""
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    path = tmp_path_factory.mktemp("partitioned") / "a.ckpt"
    torch.save(module.state_dict(), path)
    options = Options(domain=Box(-1.0, 1.0), method="branch-and-bound", time_limit=20)
    audit_checkpoint(path, module, torch.zeros(1, 2), options)
    verify_record(read_record(record_path(path)), path)
    return path


def lose_a_leaf(partition):
    del partition["leaves"][-1]


def lower_claim(partition):
    partition["value"] *= 0.99


def another_phase(partition):
    for leaf in partition["leaves"]:
        encoded = leaf["phases"]
        data = bytearray(base64.b64decode(encoded["base64"]))
        data[0] ^= 1
        encoded["base64"] = base64.b64encode(data).decode()


def claim_empty(partition):
    for leaf in partition["leaves"]:
        leaf["empty"] = True


@pytest.mark.parametrize("forge", [lose_a_leaf, lower_claim, another_phase, claim_empty])
def test_a_forged_partition_proves_nothing(partitioned, tmp_path, forge):
    document = json.loads(record_path(partitioned).read_bytes())
    forge(certificate(document, "partition")["evidence"])
    resealed(document, tmp_path / "a.ckpt.lipguard.json")
    with pytest.raises(NotCertified):
        verify_record(read_record(tmp_path / "a.ckpt.lipguard.json"), partitioned)


def test_a_weight_is_found_though_every_hash_was_computed_anew(audited, tmp_path):
    payload = torch.load(audited, weights_only=True)
    payload["state_dict"]["1.running_var"][0] *= 1.01
    path = tmp_path / "a.ckpt"
    torch.save(payload, path)
    from lipguard.audit.weights import sha256

    document = json.loads(record_path(audited).read_bytes())
    document["checkpoint"] |= {"sha256": sha256(path), "size": path.stat().st_size}
    resealed(document, record_path(path))
    with pytest.raises(NotCertified, match="a weight or the structure differs"):
        verify_record(read_record(record_path(path)), path)


def test_the_command_says_why_and_exits_with_1(audited, tmp_path, capsys):
    document = json.loads(record_path(audited).read_bytes())
    lower_value(document)
    resealed(document, tmp_path / "a.ckpt.lipguard.json")
    (tmp_path / "a.ckpt").write_bytes(audited.read_bytes())
    assert main(["verify", str(tmp_path), "--json"]) == 1
    row = json.loads(capsys.readouterr().out)["records"][0]
    assert row["state"] == "not certified"
    assert "the value, a multiplier or the domain was changed" in row["remark"]


def radii(document: dict) -> list[tuple]:
    return [path for path in leaves(document) if path[-1:] == ("rho",)]


@pytest.mark.parametrize("rho", [-1e-16, 1e300, 3.0, True, "0.0", None])
def test_a_radius_that_is_none_is_refused(audited, tmp_path, rho):
    record = tmp_path / "a.ckpt.lipguard.json"
    for path in radii(json.loads(record_path(audited).read_bytes())):
        document = json.loads(record_path(audited).read_bytes())
        put(document, path, rho)
        resealed(document, record)
        assert caught(record, audited), path


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_know_are_refused(audited, tmp_path, token):
    document = json.loads(record_path(audited).read_bytes())
    put(document, radii(document)[0], float(token.lower().replace("infinity", "inf")))
    record = tmp_path / "a.ckpt.lipguard.json"
    record.write_text(json.dumps(document, indent=1) + "\n")
    assert token in record.read_text() and caught(record, audited)


def test_a_smaller_radius_is_another_network(audited, tmp_path):
    """BatchNorm is folded with a radius; who claims a smaller one claims a bound of another network."""
    original = json.loads(record_path(audited).read_bytes())
    paths = [path for path in radii(original) if at(original, path) > 0]
    assert paths and any("bias_radius" in path for path in leaves(original))
    for path in paths:
        for smaller in (0.0, at(original, path) / 2):
            document = copy.deepcopy(original)
            put(document, path, smaller)
            resealed(document, tmp_path / "a.ckpt.lipguard.json")
            with pytest.raises(NotCertified):
                verify_record(read_record(tmp_path / "a.ckpt.lipguard.json"), audited)
