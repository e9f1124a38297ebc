"""Checkpoints as people write them: where the state_dict stands, and what wrappers put before its names."""

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lipguard as lg
from lipguard.audit import audit_checkpoint
from lipguard.checkpoint import load_module
from lipguard.cli.main import main
from lipguard.errors import InvalidModel, UnreadableCheckpoint
from lipguard.layouts import renamings

SOURCE = """
from torch import nn
class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))
    def forward(self, x):
        return self.net(x)
class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Net()
    def forward(self, x):
        return self.model(x)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """A user's network, its class in a file of the working folder."""
    (tmp_path / "user_nets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("user_nets", None)
    import user_nets

    torch.manual_seed(0)
    yield user_nets.Net().eval()
    sys.modules.pop("user_nets", None)


def under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def in_the_middle(state: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("net.", "net._orig_mod."): value for name, value in state.items()}


ADAM = {"state": {}, "param_groups": [{"lr": 0.1}]}
LAYOUTS: dict[str, Any] = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"epoch": 1, "state_dict": s, "best": 0.5},
    "model_state_dict": lambda s: {"epoch": 3, "model_state_dict": s, "optimizer_state_dict": ADAM, "loss": 0.3},
    "model": lambda s: {"model": s, "optimizer": ADAM},
    "net": lambda s: {"net": s, "acc": 93.1, "epoch": 7},
    "lightning": lambda s: {
        "state_dict": under("model.", s),
        "hyper_parameters": {"width": 8, "lr": 0.1},
        "pytorch-lightning_version": "2",
    },
    "data parallel": lambda s: under("module.", s),
    "data parallel, in a checkpoint": lambda s: {"arch": "net", "state_dict": under("module.", s)},
    "compiled": lambda s: under("_orig_mod.", s),
    "compiled inside": in_the_middle,
    "compiled, then parallel": lambda s: {"model": under("module._orig_mod.", s)},
    "parallel, held, compiled": lambda s: {"state_dict": under("model._orig_mod.module.", s)},
    "beside another network": lambda s: {"model": {"other.weight": torch.zeros(2)}, "net": s},
    "twice the same": lambda s: {"model": s, "state_dict": copy.deepcopy(s)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(module: nn.Module, layout: str) -> None:
    torch.save(LAYOUTS[layout](module.state_dict()), "w.pt")
    loaded = load_module("w.pt", model="user_nets.Net")
    state = module.state_dict()
    assert not loaded.training and loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("layout", ["model_state_dict", "parallel, held, compiled", "net", "compiled inside"])
def test_audits_of_every_layout_are_tied_to_the_file(module: nn.Module, layout: str) -> None:
    torch.save(LAYOUTS[layout](module.state_dict()), "w.pt")
    record = audit_checkpoint(
        "w.pt", load_module("w.pt", model="user_nets.Net"), torch.zeros(1, 4), lg.audit.Options(method="bounds")
    )
    assert record.failure is None
    assert record.network is not None and {"entry": "net.0.weight"} in record.network["tensors"]
    assert main(["verify", "w.pt"]) == 0
    changed = LAYOUTS[layout]({name: value + 0.5 for name, value in module.state_dict().items()})
    torch.save(changed, "w.pt")
    assert main(["verify", "w.pt"]) == 1


def test_names_that_the_class_has_itself_stay(module: nn.Module) -> None:
    import user_nets

    holds = user_nets.Holds()
    torch.save(under("module.", holds.state_dict()), "w.pt")
    loaded = load_module("w.pt", model="user_nets.Holds")
    assert torch.equal(loaded.state_dict()["model.net.0.weight"], holds.state_dict()["model.net.0.weight"])


def test_a_prefix_is_left_out_only_where_all_names_have_it() -> None:
    one = torch.zeros(1)
    assert [set(names) for names in renamings({"module.a": one, "b": one})] == [{"module.a", "b"}]
    assert [set(names) for names in renamings({"module.model.a": one})] == [{"module.model.a"}, {"model.a"}, {"a"}]


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no state_dict": (
        {"epoch": 1, "optimizer": ADAM},
        UnreadableCheckpoint,
        r"no state_dict.*model_state_dict.*epoch, optimizer",
    ),
    "empty": ({}, UnreadableCheckpoint, r"torch\.save\(module\.state_dict\(\), file\)"),
    "another": ({"state_dict": {"fc.weight": torch.zeros(2)}}, InvalidModel, r"missing net\.0\.weight.*not expected fc\.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(module: nn.Module, name: str) -> None:
    content, kind, words = REFUSED[name]
    torch.save(content, "w.pt")
    with pytest.raises(kind, match=words):
        load_module("w.pt", model="user_nets.Net")


def test_the_nearest_state_tells_what_is_missing(module: nn.Module) -> None:
    state = under("module.", module.state_dict())
    del state["module.net.0.bias"]
    torch.save({"model": {"far.away": torch.zeros(1)}, "state_dict": state | {"module.extra": torch.zeros(1)}}, "w.pt")
    with pytest.raises(InvalidModel, match=r"missing net\.0\.bias; not expected extra\."):
        load_module("w.pt", model="user_nets.Net")


def test_another_width_is_told_by_the_shapes(module: nn.Module) -> None:
    import user_nets

    torch.save(under("module.", user_nets.Net(9).state_dict()), "w.pt")
    with pytest.raises(InvalidModel, match=r"size mismatch for net\.0\.weight.*with the sizes that were trained"):
        load_module("w.pt", model="user_nets.Net")


def test_a_part_that_fits_is_named_and_what_is_advised_works(module: nn.Module) -> None:
    torch.save({"state_dict": under("backbone.", module.state_dict()) | {"loss.weight": torch.zeros(2)}}, "w.pt")
    with pytest.raises(InvalidModel, match=r"The names under 'backbone\.' fit it") as found:
        load_module("w.pt", model="user_nets.Net")
    advice = str(found.value).partition("a file of their own, ")[2]
    exec(advice, {"torch": torch, "file": "w.pt"})  # noqa: S102 - what the message says is typed
    assert torch.equal(
        load_module("part.pt", model="user_nets.Net").state_dict()["net.0.weight"], module.state_dict()["net.0.weight"]
    )


def test_two_states_that_fit_and_differ_are_refused(module: nn.Module) -> None:
    other = {name: value + 1 for name, value in module.state_dict().items()}
    torch.save({"model": module.state_dict(), "net": other}, "w.pt")
    with pytest.raises(InvalidModel, match=r"twice, under 'model' and under 'net'.*\['model'\], file\)"):
        load_module("w.pt", model="user_nets.Net")


def test_reading_stays_weights_only(module: nn.Module) -> None:
    torch.save({"model": module, "epoch": 1}, "w.pt")
    with pytest.raises(UnreadableCheckpoint, match="--trust"):
        load_module("w.pt", model="user_nets.Net")
    assert torch.equal(load_module("w.pt", trust=True).state_dict()["net.0.weight"], module.state_dict()["net.0.weight"])


def test_torchscript_says_how_to_get_at_the_weights(module: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    torch.jit.script(module).save("w.pt")
    assert main(["bound", "w.pt", "--model", "user_nets.Net"]) == 2
    advice = capsys.readouterr().err.partition("Take its weights, ")[2].partition(", and name")[0]
    exec(advice, {"torch": torch, "file": "w.pt"})  # noqa: S102 - what the message says is typed
    assert main(["bound", "weights.pt", "--model", "user_nets.Net", "--input-shape", "4"]) == 0


@pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed")
def test_safetensors(module: nn.Module) -> None:
    from safetensors.torch import save_file

    save_file(under("module.", module.state_dict()), "w.safetensors")
    loaded = load_module("w.safetensors", model="user_nets.Net")
    assert torch.equal(loaded.state_dict()["net.0.weight"], module.state_dict()["net.0.weight"])
    record = audit_checkpoint("w.safetensors", loaded, torch.zeros(1, 4), lg.audit.Options(method="bounds"))
    assert record.failure is None and main(["verify", "w.safetensors"]) == 0
    Path("w.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UnreadableCheckpoint, match="truncated, damaged"):
        load_module("w.safetensors", model="user_nets.Net")


def test_without_safetensors_the_message_says_what_to_install(module: nn.Module) -> None:
    Path("w.safetensors").write_bytes(b"")
    code = (
        "import sys; sys.modules['safetensors'] = sys.modules['safetensors.torch'] = None\n"
        "from lipguard.cli import main; sys.exit(main(['bound', 'w.safetensors', '--model', 'user_nets.Net']))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, "pip install safetensors" in process.stderr) == (2, True)
