"""Every Python block of README and docs/extending.md runs as printed."""

from __future__ import annotations

import re
import sys

import pytest
from blocks import ROOT, blocks, run

from lipguard import registry
from lipguard.capture.rules import registry as rules
from lipguard.evidence import KINDS
from lipguard.network.activations.named import NAMED
from lipguard.verify import EVERYWHERE

README = blocks("README.md")


@pytest.fixture
def restored():
    """The tables that an extension writes to, as they were."""
    rules.load()
    tables = (registry.METHODS, registry.SOLVERS, KINDS, NAMED, EVERYWHERE, rules._MODULES, rules._FUNCTIONS)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)
    sys.modules.pop("guide", None)


@pytest.mark.usefixtures("restored")
def test_the_guide_runs_as_printed():
    found = blocks("docs/extending.md")
    module = run("docs/extending.md", "guide", found)
    assert len(found) == 6
    assert module.own is not None and module.enclosure.solver == "scipy" and module.loose.method == "frobenius"


@pytest.mark.parametrize(("line", "code"), README, ids=[f"line {line}" for line, _ in README])
def test_a_block_of_the_readme_runs_by_itself(line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("README.md", f"readme_{line}", [(line, code)])


def test_the_readme_names_modules_and_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for page in re.findall(r"\]\((?!http)([\w/.]+)\)", text):
        assert (ROOT / page).exists(), page
    for name in re.findall(r"`(recipes/\w+\.py)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(lipguard(?:\.\w+)+)`", text):
        parts = name.split(".")
        __import__("importlib").import_module(parts[0])
        found = sys.modules[parts[0]]
        for part in parts[1:]:
            found = getattr(found, part)
