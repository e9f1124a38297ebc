"""docs/trust.md names every trusted module and no other, and the import contract covers the same packages."""

from __future__ import annotations

import re
import tomllib

from blocks import ROOT

PARTS = ("capture", "domain.py", "evidence.py", "network", "rounding.py", "verify")


def test_every_trusted_module_has_a_line_with_its_reason():
    rows = dict(re.findall(r"^\| `([\w/]+\.py)` \| (.+) \|$", (ROOT / "docs" / "trust.md").read_text(), re.M))
    package = ROOT / "lipguard"
    there = set()
    for part in PARTS:
        path = package / part
        found = [path] if path.suffix else path.rglob("*.py")
        there |= {one.relative_to(package).as_posix() for one in found}
    assert set(rows) == there, f"missing: {sorted(there - set(rows))}; gone: {sorted(set(rows) - there)}"
    assert all(len(reason) >= 16 for reason in rows.values())


def test_the_import_contract_covers_what_is_trusted():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    contract = next(c for c in contracts if c["name"] == "The trusted base does not grow")
    assert {f"lipguard.{part.removesuffix('.py')}" for part in PARTS} <= set(contract["source_modules"])
    assert {f"lipguard.{part}" for part in ("bounds", "exact", "programs", "solvers")} <= set(contract["forbidden_modules"])
