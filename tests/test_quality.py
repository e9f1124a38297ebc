"""Lint, format, types and import layers hold: one command, `pytest`, covers them all."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache", "."],
        ["ruff", "format", "--check", "--no-cache", "."],
        ["pyright", "--pythonpath", sys.executable],
        ["lint-imports", "--no-cache"],
    ],
    ids=["lint", "format", "types", "layers"],
)
def test_the_tree_holds(command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "NO_COLOR": "1"}
    program = SCRIPTS / command[0]
    done = subprocess.run(
        [program, *command[1:]], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_files_stay_readable():
    long = {path.name: n for path in (ROOT / "lipguard").rglob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long, f"split these files at their wall: {long}"
