"""The command line: answers, exit codes, JSON, and one clear line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import lipguard
from lipguard import registry
from lipguard.checkpoint import example_input, load_module
from lipguard.cli.main import main
from lipguard.errors import InvalidExample

MODULE = """
import lightning.pytorch as pl
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self, width=7):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))
    def forward(self, x):
        return self.net(x)

class Lit(pl.LightningModule):
    def __init__(self, width, slope=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(5, width), nn.LeakyReLU(slope), nn.Linear(width, 3))
    def forward(self, x):
        return self.net(x)

class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
    def forward(self, x):
        return self.conv(x)

def factory(width=7):
    return Plain(width)

def broken():
    raise ValueError("no weather today")

def number():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a module of its own, as a user's project."""
    (tmp_path / "project_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("project_nets", None)
    yield tmp_path
    sys.modules.pop("project_nets", None)


def nets():
    import project_nets

    return project_nets


def lightning_checkpoint(path, width=9, slope=0.2):
    from lightning.pytorch import Trainer

    torch.manual_seed(0)
    module = nets().Lit(width, slope=slope)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    return module


def run(capsys, *arguments):
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_lightning_checkpoint_with_its_hyperparameters(folder, capsys):
    module = lightning_checkpoint(folder / "a.ckpt")
    code, out, _ = run(capsys, "bound", "a.ckpt", "--model", "project_nets.Lit", "--json")
    document = json.loads(out)
    expected = lipguard.bound(module.net, torch.zeros(1, 5))
    assert code == 0
    assert (document["side"], document["rigor"], document["method"]) == ("upper", "verified", "lipsdp-neuron")
    assert document["value"] == pytest.approx(expected.value, rel=1e-4)
    assert document["norm"] == ["2.0", "2.0"]


@pytest.mark.parametrize("model", ["project_nets.Plain", "project_nets:factory"])
def test_state_dict_with_a_class_or_factory(folder, capsys, model):
    torch.save(nets().Plain().state_dict(), "weights.pt")
    code, out, err = run(capsys, "bound", "weights.pt", "--model", model, "--method", "spectral")
    assert (code, err) == (0, "")
    assert "verified" in out
    assert "spectral" in out


def test_compiled_names_are_unwrapped(folder):
    plain = nets().Plain()
    torch.save({name.replace("net.", "net._orig_mod."): value for name, value in plain.state_dict().items()}, "weights.pt")
    loaded = load_module("weights.pt", model="project_nets.Plain")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))
    assert not loaded.training


def test_whole_module_needs_trust(folder, capsys):
    torch.save(nets().Plain(), "whole.pt")
    code, out, err = run(capsys, "bound", "whole.pt")
    assert (code, out) == (2, "")
    assert "--trust" in err
    assert "project_nets.Plain" in err
    assert len(err.splitlines()) == 1
    assert run(capsys, "bound", "whole.pt", "--trust")[0] == 0


def test_domain_norm_and_submodule_reach_the_bound(folder, capsys):
    torch.save(nets().Plain(), "whole.pt")
    options = ("--trust", "--norm", "inf", "--method", "spectral", "--submodule", "net.0", "--json")
    code, out, _ = run(capsys, "bound", "whole.pt", *options)
    weight = load_module("whole.pt", trust=True).net[0].weight.detach().double()
    assert code == 0
    # The operator norm from l-infinity to l-infinity is the largest absolute row sum.
    assert json.loads(out)["value"] == pytest.approx(float(weight.abs().sum(1).max()), rel=1e-12)


def test_sampling_prints_a_lower_bound(folder, capsys):
    torch.save(nets().Plain(), "whole.pt")
    code, out, _ = run(capsys, "bound", "whole.pt", "--trust", "--method", "sampling", "--domain", "box:0,1", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["side"] == "lower"
    assert document["domain"]["kind"] == "box"


def test_damaged_files(folder, capsys):
    torch.save(nets().Plain().state_dict(), "good.pt")
    data = (folder / "good.pt").read_bytes()
    (folder / "half.pt").write_bytes(data[: len(data) // 2])
    (folder / "text.pt").write_text("this is no checkpoint at all")
    (folder / "empty.pt").write_bytes(b"")
    torch.save([1, 2], "list.pt")
    for name in ("half.pt", "text.pt", "empty.pt", "list.pt", "absent.pt", "."):
        code, out, err = run(capsys, "bound", name, "--model", "project_nets.Plain")
        assert (code, out) == (2, ""), name
        assert err.startswith("UnreadableCheckpoint: ")
        assert name in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--model"),
        (("--model", "project_nets.Nowhere"), "project_nets has no Nowhere"),
        (("--model", "no_such_project.Net"), "no module 'no_such_project'"),
        (("--model", "project_nets.broken"), "no weather today"),
        (("--model", "project_nets.number"), "built a int"),
        (("--model", "project_nets.Conv"), "missing conv.weight"),
        (("--model", "project_nets.Plain", "--norm", "3"), "norm"),
        (("--model", "project_nets.Plain", "--norm", "two"), "--norm two"),
        (("--model", "project_nets.Plain", "--domain", "box:1,0"), "reversed|empty|Box"),
        (("--model", "project_nets.Plain", "--domain", "cube:1"), "box:LOWER,UPPER"),
        (("--model", "project_nets.Plain", "--input-shape", "1,x"), "--input-shape"),
        (("--model", "project_nets.Plain", "--input-shape", "1,0"), "whole numbers"),
        (("--model", "project_nets.Plain", "--input-shape", "6"), "InvalidExample"),
        (("--model", "project_nets.Plain", "--method", "magic"), "magic"),
        (("--model", "project_nets.Plain", "--solver", "magic"), "magic"),
        (("--model", "project_nets.Plain", "--submodule", "net.9"), "net.9"),
    ],
)
def test_bad_input(folder, capsys, options, message):
    torch.save(nets().Plain().state_dict(), "weights.pt")
    code, out, err = run(capsys, "bound", "weights.pt", *options)
    assert (code, out) == (2, "")
    assert any(part in err for part in message.split("|")), err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


def test_nan_weights(folder, capsys):
    plain = nets().Plain()
    plain.net[0].weight.data[0, 0] = float("nan")
    torch.save(plain.state_dict(), "weights.pt")
    code, out, err = run(capsys, "bound", "weights.pt", "--model", "project_nets.Plain", "--json")
    assert code == 2
    assert "nan" in err
    assert json.loads(out)["error"]["kind"] == "InvalidModel"


def test_not_certified_exits_with_1(folder, capsys, monkeypatch):
    from lipguard.errors import NotCertified

    def refuse(*args, **kwargs):
        raise NotCertified("the LMI is not provably positive definite.")

    monkeypatch.setattr("lipguard.bounds.bound", refuse)
    torch.save(nets().Plain().state_dict(), "weights.pt")
    code, out, err = run(capsys, "bound", "weights.pt", "--model", "project_nets.Plain", "--json")
    assert code == 1
    assert "NotCertified" in err
    assert json.loads(out)["exit_code"] == 1


def test_the_input_is_inferred_only_where_it_is_certain():
    assert example_input(nn.Sequential(nn.Flatten(), nn.Linear(6, 2))).shape == (1, 6)
    assert example_input(nn.Linear(6, 2).half()).dtype == torch.float16
    assert example_input(nn.Conv2d(1, 1, 3), (1, 1, 8, 8)).shape == (1, 1, 8, 8)
    with pytest.raises(InvalidExample, match="--input-shape"):
        example_input(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(36, 2)))


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    found = {solver["name"]: solver for solver in report["solvers"]}
    assert code == 0
    assert found["interior-point"]["usable"]
    assert found["scs"]["usable"]
    assert found["gurobi"]["licence"] in ("size-limited", "full", "none valid")
    assert all(solver["remark"] for solver in found.values())
    assert report["versions"]["lipguard"] == lipguard.__version__
    methods = {method["name"]: method for method in report["methods"]}
    assert set(methods) >= set(registry.METHODS) and methods["sampling"]["side"] == "lower"
    assert methods["spectral"]["norms"] == "all" and "chordal" in methods["lipsdp-neuron"]["options"]
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "interior-point" in out
    assert "Restricted license" not in out


def test_doctor_says_what_a_missing_solver_needs(capsys, monkeypatch):
    from lipguard import registry

    available = registry.available
    monkeypatch.setattr(registry, "available", lambda name: name != "scs" and available(name))
    report = json.loads(run(capsys, "doctor", "--json")[1])
    missing = next(solver for solver in report["solvers"] if solver["name"] == "scs")
    assert not missing["usable"]
    assert "pip install" in missing["remark"]


def test_help_is_fast_and_usage_errors_exit_with_2():
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "lipguard.cli", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "doctor" in done.stdout
    assert time.perf_counter() - started < 2  # torch alone takes about that long to import
    done = subprocess.run([sys.executable, "-m", "lipguard.cli", "bound"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
