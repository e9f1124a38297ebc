"""Records of audits: what they hold, that they follow from the checkpoint alone, and the commands that make and check them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from test_cli import folder, nets, run  # noqa: F401 - a fixture
from torch import nn

from lipguard import Ball, Box, Certificate, exact, verify
from lipguard.audit import (
    AuditRecord,
    Options,
    audit_checkpoint,
    audit_network,
    read_record,
    record_path,
    verify_record,
    write_record,
)
from lipguard.audit.encoding import certificate_from_json, certificate_json, from_plain, to_plain
from lipguard.audit.pending import Pending, _started, finish, pending_in, pending_path, prepare
from lipguard.audit.pool import Pool
from lipguard.audit.recipe import captured, rebuild
from lipguard.audit.run import Subject, describe
from lipguard.audit.weights import fingerprint, read_contents
from lipguard.certificate import Leaf, Partition
from lipguard.errors import InvalidDomain, InvalidModel, NotCertified, UnknownName, UnreadableCheckpoint, UnsupportedQuery

BOX = Box(-1.0, 1.0)


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


class Folded(nn.Module):
    """BatchNorm, a residual sum, a parameter as a factor, PReLU, tanh, hardsigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.slope = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.PReLU(6)
        self.inner, self.last, self.factor = nn.Linear(6, 6), nn.Linear(6, 2), nn.Parameter(torch.tensor(0.3))
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        h = self.slope(self.norm(self.first(x)))
        return self.last(nn.functional.hardsigmoid(h + self.factor * torch.tanh(self.inner(h))))


def saved(path: Path, module: nn.Module, **extra) -> Path:
    torch.save({"state_dict": module.state_dict(), "global_step": 7, "epoch": 1, **extra}, path)
    return path


def pending(module: nn.Module, options: Options | None = None) -> Pending:
    example = torch.zeros(1, 3)
    subject = Subject(describe(module, example, None), captured(module, example)[1])
    return Pending({"fingerprint": fingerprint(module.state_dict())}, subject, options or Options(domain=BOX, time_limit=10))


# Networks that follow from the checkpoint.


@pytest.mark.parametrize(
    "module",
    [
        small(),
        Folded().eval(),
        nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2), nn.Softplus(2.0)).half(),
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.LeakyReLU(0.2), nn.Flatten()),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Hardtanh(-2.0, 2.0), nn.Dropout()),
        torch.compile(small()),
    ],
    ids=["plain", "folded", "half-smooth", "spectral-norm", "weight-norm", "compiled"],
)
def test_a_recipe_rebuilds_the_network_bit_for_bit(module):
    module.eval()
    network, recipe = captured(module, torch.zeros(1, 3))
    recipe = json.loads(json.dumps(recipe, allow_nan=False))
    assert rebuild(recipe, module.state_dict()).digest == network.digest


def test_a_folded_batch_norm_is_tied_to_the_checkpoint():
    module = Folded().eval()
    _, recipe = captured(module, torch.zeros(1, 3))
    entries = {step["entry"] for step in recipe["tensors"] if "entry" in step}
    assert entries == set(module.state_dict()) - {"norm.num_batches_tracked"}
    changed = {name: value.clone() for name, value in module.state_dict().items()}
    changed["norm.running_var"][2] *= 1.001
    assert rebuild(recipe, changed).digest != recipe["digest"]


def test_a_recipe_runs_no_other_operation():
    _, recipe = captured(small(), torch.zeros(1, 3))
    recipe["tensors"][1]["op"] = "from_file.default"
    with pytest.raises(NotCertified, match="none that a record may hold"):
        rebuild(recipe, small().state_dict())


def test_weights_are_read_without_running_the_files_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    module = small()
    path = saved(tmp_path / "a.ckpt", module, hyper_parameters={"odd": Evil(), "set": {1, 2}, "path": Path("x")})
    contents = read_contents(path)
    assert not (tmp_path / "ran").exists()
    assert contents.step == 7
    assert fingerprint(contents.weights) == fingerprint(module.state_dict())


def test_damaged_checkpoints_are_refused(tmp_path):
    path = saved(tmp_path / "a.ckpt", small())
    (tmp_path / "half.ckpt").write_bytes(path.read_bytes()[:700])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name in ("half.ckpt", "empty.ckpt", "absent.ckpt"):
        with pytest.raises(UnreadableCheckpoint, match=name):
            read_contents(tmp_path / name)


# Tensors, certificates, records.


def test_tensors_survive_exactly():
    values = torch.tensor([[0.1, -0.0, math.inf], [5e-324, 1.7976931348623157e308, 1 / 3]], dtype=torch.float64)
    back = from_plain(json.loads(json.dumps(to_plain(values))))
    assert torch.equal(back, values)
    assert math.copysign(1.0, float(back[0, 1])) == -1.0
    for tensor in (torch.zeros(0, 4, dtype=torch.float64), torch.tensor(3), torch.tensor([-1, 1], dtype=torch.int8)):
        back = from_plain(to_plain(tensor))
        assert back.shape == tensor.shape
        assert torch.equal(back, tensor)
    with pytest.raises(NotCertified, match="damaged"):
        from_plain({**to_plain(values), "shape": [2, 4]})


def test_partitions_survive():
    leaf = Leaf(torch.tensor([0, 1, -1]), torch.rand(3, dtype=torch.float64), farkas=torch.ones(2, dtype=torch.float64))
    evidence = Partition((leaf, Leaf(torch.tensor([1, 1, 1]), empty=True)), 2.5)
    certificate = Certificate(2.5, "upper", (2.0, 2.0), Ball(0.0, 1.0), "d", "branch-and-bound", evidence)
    back = certificate_from_json(json.loads(json.dumps(certificate_json(certificate)))).evidence
    assert isinstance(back, Partition)
    assert torch.equal(back.leaves[0].phases, leaf.phases)
    assert torch.equal(back.leaves[0].t, leaf.t)
    assert back.leaves[1].empty
    assert back.leaves[1].t is None


@pytest.mark.parametrize("method", ["enumeration", "miqcqp", "bounds"])
def test_an_audit_is_verified_from_its_files(tmp_path, method):
    module = small()
    path = saved(tmp_path / "a.ckpt", module)
    record = audit_checkpoint(path, module, torch.zeros(1, 3), Options(domain=BOX, method=method, time_limit=20))
    loaded = read_record(record_path(path))
    assert dataclasses.asdict(loaded) == json.loads(json.dumps(dataclasses.asdict(record)))
    assert loaded.status == ("bounds only" if method == "bounds" else "closed")
    assert (loaded.step, loaded.epoch, loaded.model["input_shape"]) == (7, 1, [1, 3])
    found = verify_record(loaded, path)
    assert found.exact
    assert found.lower == loaded.lower <= loaded.upper == found.upper
    true = exact(module, torch.zeros(1, 3), domain=BOX, method="enumeration").lower
    assert found.lower <= true * (1 + 1e-9)
    assert found.upper >= true
    if method != "bounds":
        assert found.lower == pytest.approx(true, rel=1e-9)
        assert loaded.enclosure["claimed_upper"] is None or loaded.enclosure["claimed_upper"] == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("norm", [1, 2, math.inf, (2, math.inf)])
def test_every_norm_and_the_whole_space(tmp_path, norm):
    module = small(1)
    path = saved(tmp_path / "a.ckpt", module)
    record = audit_checkpoint(path, module, torch.zeros(1, 3), Options(norm=norm, time_limit=10))
    assert verify_record(read_record(record_path(path)), path).lower == record.lower > 0


def test_a_smooth_network_gets_bounds_and_says_why(tmp_path):
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    path = saved(tmp_path / "a.ckpt", module)
    record = audit_checkpoint(path, module, torch.zeros(1, 3), Options(domain=BOX, time_limit=10))
    assert record.status == "bounds only"
    assert record.failure.startswith("UnsupportedQuery")
    assert verify_record(record, path).upper == record.upper


def test_a_crashing_solver_leaves_the_bounds(monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("segmentation of everything")

    monkeypatch.setattr("lipguard.audit.run.exact", crash)
    network, _ = captured(small(), torch.zeros(1, 3))
    outcome = audit_network(network, Options(domain=BOX, time_limit=5))
    assert outcome.status == "bounds only"
    assert "segmentation of everything" in outcome.failure
    assert all(verify(network, c).value == c.value for c in outcome.certificates)


def test_a_wrong_dimension_is_recorded_and_the_reason_read(tmp_path):
    module = small()
    path = saved(tmp_path / "a.ckpt", module)
    record = audit_checkpoint(path, module, torch.zeros(1, 3), Options(domain=Box([0.0, 0.0], 1.0)))
    assert record.status == "failed"
    assert "2 entries, the network has 3 inputs" in record.failure
    with pytest.raises(NotCertified, match="certifies nothing: InvalidDomain"):
        verify_record(read_record(record_path(path)), path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"domain": Box(1.0, 0.0)}, InvalidDomain, "empty"),
        ({"domain": Box([0.0, 1.0], [1.0, 0.0])}, InvalidDomain, "empty"),
        ({"domain": Ball(0.0, -1.0)}, InvalidDomain, "radius"),
        ({"norm": 3}, UnsupportedQuery, "norm"),
        ({"method": "magic"}, UnknownName, "branch-and-bound"),
        ({"solver": "magic"}, UnknownName, "gurobi"),
        ({"time_limit": 0.0}, UnsupportedQuery, "time_limit"),
        ({"gap": -1.0}, UnsupportedQuery, "gap"),
    ],
)
def test_options_without_meaning_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Options(**options).check()


def test_weights_of_another_checkpoint_are_refused(tmp_path):
    path = saved(tmp_path / "a.ckpt", small(0))
    with pytest.raises(InvalidModel, match="load its state_dict"):
        audit_checkpoint(path, small(1), torch.zeros(1, 3))


def test_a_model_of_another_structure_is_told(tmp_path):
    module = small()
    path = saved(tmp_path / "a.ckpt", module)
    record = audit_checkpoint(path, module, torch.zeros(1, 3), Options(method="bounds"))
    other, _ = captured(nn.Sequential(module[0], nn.ReLU6(), module[2]), torch.zeros(1, 3))
    with pytest.raises(NotCertified, match="model given"):
        verify_record(record, path, other)


def test_a_record_is_replaced_whole(tmp_path):
    module = small()
    path = saved(tmp_path / "a.ckpt", module)
    record = audit_checkpoint(path, module, torch.zeros(1, 3), Options(method="bounds"))
    write_record(dataclasses.replace(record, step=8), record_path(path))
    assert isinstance(read_record(record_path(path)), AuditRecord)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "a.ckpt.lipguard.json"]
    with pytest.raises(ValueError, match="JSON"):
        write_record(dataclasses.replace(record, seconds=math.nan), record_path(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "a.ckpt.lipguard.json"]


# Pending audits.


def test_a_pending_audit_is_finished_for_the_version_that_is_there(tmp_path):
    path, first, second = tmp_path / "last.ckpt", small(1), small(2)
    marker = prepare(path, pending(first))
    saved(path, first)
    prepare(path, pending(second))  # and then the process was killed before the second version was written
    assert finish(marker, final=False) == "waiting"
    assert marker.exists()
    assert read_record(record_path(path)).network["digest"] == captured(first, torch.zeros(1, 3))[0].digest
    saved(path, second)
    assert finish(marker) == "done"
    assert read_record(record_path(path)).network["digest"] == captured(second, torch.zeros(1, 3))[0].digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.lipguard.json"]


def test_a_finished_version_stays_when_the_next_was_never_written(tmp_path):
    path, first = tmp_path / "last.ckpt", small(1)
    marker = prepare(path, pending(first))
    saved(path, first)
    finish(marker)
    before = record_path(path).read_bytes()
    assert finish(prepare(path, pending(small(2)))) == "done"
    assert record_path(path).read_bytes() == before
    assert not marker.exists()


def test_a_deleted_checkpoint_is_dropped_with_its_sidecars(tmp_path):
    path = tmp_path / "a.ckpt"
    marker = prepare(path, pending(small()))
    (tmp_path / ".a.ckpt.lipguard.json.1-ab.tmp").write_text("half")
    assert finish(marker) == "dropped"
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_file_is_never_certified_with_stored_tensors(tmp_path):
    path = saved(tmp_path / "a.ckpt", small(5))
    finish(prepare(path, pending(small(6))))
    record = read_record(record_path(path))
    assert record.status == "failed"
    assert "not the checkpoint that was saved" in record.failure


def test_what_was_left_before_any_marker_goes_after_an_hour(tmp_path):
    names = [f".{name}.ckpt.lipguard.pending.json.1-ab.tmp" for name in ("old", "new")]
    for name in names:
        (tmp_path / name).write_text("half")
    hours_ago = time.time() - 2 * 3600
    os.utime(tmp_path / names[0], (hours_ago, hours_ago))
    assert pending_in([tmp_path]) == []
    assert [p.name for p in tmp_path.iterdir()] == names[1:]


def test_markers_of_a_living_process_are_left_alone(tmp_path):
    marker = prepare(tmp_path / "a.ckpt", pending(small()))
    assert pending_in([tmp_path]) == [marker]
    document = json.loads(marker.read_text())
    document["owner"] |= {"pid": os.getppid(), "started": _started(os.getppid())}
    marker.write_text(json.dumps(document))
    assert pending_in([tmp_path]) == []
    document["owner"]["started"] = "1"  # the number went to another process since
    marker.write_text(json.dumps(document))
    assert pending_in([tmp_path]) == [marker]


def test_a_pool_retries_a_dead_worker_and_ends_with_its_owner(tmp_path):
    pool = Pool(1)
    path, module = tmp_path / "a.ckpt", small()
    marker = prepare(path, pending(module))
    saved(path, module)
    pool.submit(marker, 10, final=False)
    pool._workers[0].process.kill()
    deadline = time.monotonic() + 60
    finished = []
    while not finished and time.monotonic() < deadline:
        pool.wait(1)
        finished = pool.collect()
    assert [f.result for f in finished] == ["done"]
    process = pool._workers[0].process
    pool.close()
    assert process.poll() is not None
    verify_record(read_record(record_path(path)), path)


# The commands.


def document_of(capsys, *arguments):
    code, out, err = run(capsys, *arguments)
    assert "Traceback" not in err
    return code, json.loads(out)


def test_audit_and_verify_from_the_command_line(folder, capsys):  # noqa: F811
    torch.save(nets().Plain().state_dict(), "weights.pt")
    arguments = ("--domain", "box:-1,1", "--time-limit", "10", "--method", "bounds", "--json")
    code, document = document_of(capsys, "audit", "weights.pt", "--model", "project_nets.Plain", *arguments)
    (row,) = document["audits"]
    assert code == 0
    assert row["state"] == "audited"
    assert 0 < row["lower"] <= row["upper"]
    code, document = document_of(capsys, "verify", "weights.pt", "--model", "project_nets.Plain", "--json")
    assert code == 0
    assert document["records"][0]["upper"] == row["upper"]
    assert document_of(capsys, "audit", ".", "--json")[1]["audits"][0]["state"] == "up to date"
    # Another norm is another question; the network is known from the record.
    code, document = document_of(capsys, "audit", "*.pt", "--norm", "inf", "--json")
    assert document["audits"][0]["state"] == "audited"
    assert read_record("weights.pt.lipguard.json").query["domain"]["kind"] == "box"
    code, out, _ = run(capsys, "verify", ".")
    assert code == 0
    assert "verified" in out


def test_a_whole_module_needs_trust_and_is_tied_by_its_hash(folder, capsys):  # noqa: F811
    torch.save(nets().Plain(), "whole.pt")
    assert run(capsys, "audit", "whole.pt", "--method", "bounds")[0] == 2
    code, document = document_of(capsys, "audit", "whole.pt", "--trust", "--method", "bounds", "--json")
    assert code == 0
    assert document["audits"][0]["state"] == "audited"
    code, document = document_of(capsys, "verify", "whole.pt", "--trust", "--json")
    assert code == 0
    assert document["records"][0]["remark"].startswith("0 tensors by name")


def test_audit_finishes_what_is_pending(folder, capsys):  # noqa: F811
    module = small()
    marker = prepare(folder / "a.ckpt", pending(module, Options(domain=BOX, method="bounds")))
    saved(folder / "a.ckpt", module)
    code, document = document_of(capsys, "audit", ".", "--json")
    assert code == 0
    assert document["audits"][0]["state"] == "audited"
    assert not marker.exists()


def test_bad_input_to_the_commands(folder, capsys):  # noqa: F811
    torch.save(nets().Plain().state_dict(), "weights.pt")
    (folder / "text.ckpt").write_text("no checkpoint")
    for arguments, code, text in (
        (("audit", "absent.ckpt"), 2, "nothing to work on"),
        (("audit", "weights.pt"), 2, "--model"),
        (("audit", "text.ckpt", "--model", "project_nets.Plain"), 2, "truncated, damaged or no checkpoint"),
        (("audit", "weights.pt", "--model", "project_nets.Plain", "--domain", "box:1,0"), 2, "empty"),
        (("audit", "weights.pt", "--model", "project_nets.Plain", "--method", "magic"), 2, "magic"),
        (("audit", "weights.pt", "--jobs", "0"), 2, "--jobs"),
        (("verify", "absent.json"), 2, "nothing to work on"),
        (("verify", "weights.pt"), 2, "cannot be read"),
        (("verify", "weights.pt", "text.ckpt", "--checkpoint", "weights.pt"), 2, "one record"),
    ):
        found, out, err = run(capsys, *arguments)
        assert found == code, arguments
        assert text in " ".join((out + err).split()), arguments
    assert not pending_path("weights.pt").exists()
