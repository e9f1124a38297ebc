"""What `import lipguard` costs and loads, and that its public names are there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lipguard

ROOT = Path(__file__).parents[2]
HEAVY = (
    "lightning",
    "pytorch_lightning",
    "cvxpy",
    "scs",
    "clarabel",
    "gurobipy",
    "pyscipopt",
    "highspy",
    "mosek",
    "cvxopt",
    "rich",
)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_less_than_50_ms_beyond_torch():
    code = "import torch, time; t = time.perf_counter(); import lipguard; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.05


def test_using_a_bound_loads_neither_lightning_nor_a_foreign_solver():
    code = f"""
import json, sys, torch, lipguard
lipguard.Box, lipguard.Network, lipguard.capture, lipguard.verify, lipguard.bound, lipguard.Tracker
lipguard.bound(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)), torch.zeros(1, 3))
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    assert json.loads(python(code)) == []


def test_public_names_resolve_and_are_complete():
    assert set(lipguard.__all__) == set(lipguard._HOMES)
    for name in lipguard.__all__:
        assert getattr(lipguard, name).__name__ == name
    assert set(lipguard.__all__) <= set(dir(lipguard))


def test_a_submodule_never_hides_a_function_of_its_name():
    python("import lipguard.verify, lipguard.exact, lipguard; assert callable(lipguard.verify) and callable(lipguard.exact)")
    python("from lipguard import verify; import lipguard.verify; import lipguard; assert lipguard.verify is verify")


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"no attribute 'no_such_name'; it has .*LipschitzMonitor"):
        lipguard.no_such_name  # noqa: B018


def test_the_package_is_typed_and_versioned():
    assert (Path(lipguard.__file__).parent / "py.typed").is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+", lipguard.__version__)


def test_readme_commands_and_ci_agree():
    readme, run = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert 'pip install ".[demo]" && lipguard demo' in readme
    assert 'pip install ".[test]" && pytest' in readme
    assert '".[test]" && pytest' in run
