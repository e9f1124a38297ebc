"""What is required, what is an extra, and that the package works without the extras."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"scikit-learn": "sklearn"}  # where the import's name is another
OPTIONAL = ("rich", "pyscipopt", "highspy", "clarabel", "cvxopt", "mosek", "joblib", "sklearn", "matplotlib", "pytorch_lightning")


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~]", requirement)[0] for requirement in requirements}


REQUIRED = names(PROJECT["dependencies"])
EXTRAS = PROJECT["optional-dependencies"]


def test_rich_is_not_required_and_the_test_extra_has_everything_that_needs_no_licence():
    assert {
        "torch", "numpy", "scipy", "lightning", "cvxpy", "scs", "gurobipy", "jsonargparse", "threadpoolctl",
    } == REQUIRED  # fmt: skip
    given = re.search(r"lipguard\[([\w,]+)\]", EXTRAS["test"][0])
    assert given is not None
    assert set(given[1].split(",")) == {"cli", "demo", "onnx", "parallel", "safetensors", "solvers"}
    assert "lipguard[clarabel,highs,scip]" in EXTRAS["solvers"]


def test_every_requirement_and_extra_has_its_reason_in_the_docs():
    text = (ROOT / "docs" / "installation.md").read_text()
    required, extras = text.split("## Extras")
    assert {name for line in table(required) for name in re.findall(r"`([\w-]+)`", line[0])} == REQUIRED
    rows = {re.findall(r"`([\w-]+)`", line[0])[0]: line for line in table(extras)}
    assert set(rows) == set(EXTRAS)
    for extra, requirements in EXTRAS.items():
        if extra not in ("solvers", "test"):
            assert set(re.findall(r"`([\w-]+)`", rows[extra][1])) == names(requirements)
        assert len(rows[extra][2]) > 10


def table(text: str) -> list[list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if line[0] not in ("package", "extra")]


def test_a_module_imports_at_its_top_only_what_is_required():
    allowed = {MODULES.get(name, name) for name in REQUIRED} | {"lipguard"} | set(sys.stdlib_module_names)
    wrong = []
    for path in (ROOT / "lipguard").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path.name}: {name}" for name in found if name.split(".")[0] not in allowed]
    assert not wrong


def test_the_package_works_without_the_extras(tmp_path):
    code = f"""
    import sys

    class Hidden:  # the machinery of imports and of metadata, without the optional packages
        def __init__(self, finder):
            self.finder = finder
        def find_spec(self, name, path=None, target=None):
            return None if name.split(".")[0] in {OPTIONAL!r} else self.finder.find_spec(name, path, target)
        def find_distributions(self, *context):
            found = getattr(self.finder, "find_distributions", lambda *context: ())(*context)
            return (d for d in found if d.metadata["Name"].lower().replace("-", "_") not in {OPTIONAL!r})

    sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
    import torch, lightning as L, lipguard as lg
    from lipguard.errors import SolverUnavailable

    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    example = torch.zeros(1, 3)
    box = lg.Box(0, 1)
    print(lg.bound(net, example).method, lg.exact(net, example, domain=box, time_limit=20).status)
    lg.exact(net, example, domain=box, method="enumeration")
    lg.bound(net, example, method="lipsdp-split", pieces=1)
    for call in (
        lambda: lg.exact(net, example, domain=box, norm=1, method="milp", solver="scip"),
        lambda: lg.exact(net, example, domain=box, norm=1, method="milp", solver="highs"),
        lambda: lg.bound(net, example, method="lipsdp-neuron", solver="mosek"),
    ):
        try:
            call()
        except SolverUnavailable as error:
            print(error)

    class Net(L.LightningModule):
        example_input_array = torch.zeros(1, 3)
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x):
            return self.net(x)
        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    auditor = lg.CheckpointAuditor(domain=box, method="bounds")
    trainer = L.Trainer(max_epochs=1, callbacks=[lg.LipschitzMonitor(), auditor], logger=False, accelerator="cpu",
        default_root_dir={str(tmp_path)!r}, log_every_n_steps=1)
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.rand(8, 3)))
    print(len(auditor.records), "lipschitz/upper" in trainer.callback_metrics, type(trainer.progress_bar_callback).__name__)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert lines[0] == "lipsdp-neuron closed"
    missing = [line for line in lines if "not installed" in line]
    assert [re.findall(r"lipguard\[(\w+)\]", line) for line in missing] == [["scip"], ["highs"], ["mosek"]]
    assert lines[-1].endswith("1 True TQDMProgressBar")


def test_extras_named_in_messages_exist():
    """Every `lipguard[...]` in the package's texts is an extra that there is."""
    named = {
        extra for path in (ROOT / "lipguard").rglob("*.py") for extra in re.findall(r"lipguard\[([\w-]+)\]", path.read_text())
    }
    assert named and named <= set(EXTRAS)
