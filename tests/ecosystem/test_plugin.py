"""A package installed beside lipguard: its methods, solvers, layers and activations work everywhere, in audits as well."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parent / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The plug-in as an installer leaves it: its package and its metadata, in a folder on the path."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PLUGIN / "lipguard_plugin", folder / "lipguard_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(site: Path, *command: str) -> str:
    path = os.pathsep.join([str(site), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def test_what_a_plugin_adds_works_in_every_entry_point(site, tmp_path):
    code = f"""
    import math, warnings
    warnings.simplefilter("error")
    import torch, lipguard as lg
    from lipguard import registry
    from torch import nn

    torch.manual_seed(0)
    relu = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    example, box = torch.zeros(1, 3), lg.Box(0, 1)
    assert not any("plugin" in name for name in (*registry.METHODS, *registry.SOLVERS))

    found = lg.bound(relu, example, method="plugin-norms", strength=2.0)
    assert found.method == "plugin-norms" and found.details["strength"] == 2.0 and found.rigor == "verified"
    tracker = lg.Tracker(relu, example, method="plugin-norms")
    tracker.update(); tracker.update()
    assert tracker.last.upper.details["calls"] == 1.0

    sdp = lg.bound(relu, example, method="lipsdp-neuron", solver="plugin-sdp", tol=1e-3)
    assert sdp.rigor == "verified" and sdp.value >= lg.bound(relu, example).value * (1 - 1e-9)
    mip = lg.exact(relu, example, domain=box, norm=math.inf, method="milp", solver="plugin-mip")
    assert mip.solver == "plugin-mip" and mip.lower <= mip.upper
    assert abs(mip.upper / lg.exact(relu, example, domain=box, norm=math.inf).upper - 1) < 1e-5

    from lipguard_plugin.layers import Net  # its rules were loaded by their entry point, or are now
    net = Net().eval()
    assert lg.bound(net, example).rigor == "verified" and lg.bound(net, example, domain=box).rigor == "verified"
    torch.save(net.state_dict(), {str(tmp_path / "net.pt")!r})
    print("done")
    """
    assert run(site, "-c", textwrap.dedent(code)).strip() == "done"
    audited = run(
        site, "-m", "lipguard.cli", "audit", str(tmp_path / "net.pt"), "--model", "lipguard_plugin.layers.Net", "--input-shape",
        "1,3", "--time-limit", "5",
    )  # fmt: skip
    assert "net.pt" in audited
    assert "verified" in run(site, "-m", "lipguard.cli", "verify", str(tmp_path / "net.pt"))


def test_the_callbacks_take_what_a_plugin_adds(site, tmp_path):
    code = f"""
    import warnings
    warnings.simplefilter("ignore")
    import torch, lightning as L, lipguard as lg
    from lipguard_plugin.layers import Net

    class Module(L.LightningModule):
        example_input_array = torch.zeros(1, 3)
        def __init__(self):
            super().__init__()
            self.inner = Net()
        def forward(self, x):
            return self.inner(x)
        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    if __name__ == "__main__":
        monitor = lg.LipschitzMonitor(method="plugin-norms", on_failure="raise")
        auditor = lg.CheckpointAuditor(method="bounds", time_limit=20)
        trainer = L.Trainer(max_epochs=2, callbacks=[monitor, auditor], logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, default_root_dir={str(tmp_path)!r})
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.rand(8, 3)))
        assert monitor.last.upper.method == "plugin-norms"
        print([record.failure for record in auditor.records.values()])
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    assert run(site, str(script)).strip().splitlines()[-1] == "[None]"
