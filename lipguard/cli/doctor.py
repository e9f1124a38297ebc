"""What this installation can do: versions, solvers, their licences and limits, and what each missing one would need."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass

from lipguard import __version__, registry
from lipguard.bounds.method import PAIRS
from lipguard.cli.text import Cell, Screen

__all__ = ["Finding", "examine", "show"]

_log = logging.getLogger(__name__)

_LICENCES = {
    "interior-point": "lipguard's own",
    "low-rank": "lipguard's own",
    "first-order": "lipguard's own",
    "scs": "MIT",
    "clarabel": "Apache-2.0",
    "cvxopt": "GPL-3.0",
    "scip": "Apache-2.0",
    "highs": "MIT",
}
"""Solvers that need no licence file, by the licence of their code."""

_PACKAGES = ("torch", "lightning", "pytorch-lightning", "numpy", "scipy", "cvxpy")


@dataclass(frozen=True)
class Finding:
    """One solver: what it solves, whether it can be used here, under which licence, up to which size, or what it needs."""

    name: str
    solves: str
    usable: bool
    version: str
    licence: str
    remark: str


def examine() -> dict[str, object]:
    """Versions, hardware, bound methods and solvers, as one JSON-ready value."""
    import torch
    from threadpoolctl import threadpool_info

    versions = {"lipguard": __version__, "python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    blas = sorted({f"{pool.get('internal_api')} {pool.get('num_threads')} threads" for pool in threadpool_info()})
    hardware = {"cores": os.cpu_count() or 1, "accelerator": accelerator, "blas": ", ".join(blas)}
    found = {"methods": _methods(), "solvers": [asdict(finding) for finding in _solvers()]}
    return {"versions": versions, "hardware": hardware} | found


def show(report: dict[str, object], screen: Screen) -> None:
    """Prints what `examine` found."""
    versions, hardware, methods, solvers = (report[part] for part in ("versions", "hardware", "methods", "solvers"))
    assert isinstance(versions, dict) and isinstance(hardware, dict) and isinstance(methods, list) and isinstance(solvers, list)
    screen.table([((name, "dim"), str(value)) for name, value in {**versions, **hardware}.items()])
    screen.line()
    titles = ("method", "side", "norms", "options")
    screen.table([[method[title if title != "method" else "name"] for title in titles] for method in methods], titles)
    screen.line()
    rows: list[list[Cell]] = []
    for solver in solvers:
        mark = ("✓", "green") if solver["usable"] else ("✗", "red")
        rows.append([mark, *(str(solver[name]) for name in ("name", "solves", "version", "licence", "remark"))])
    screen.table(rows, ("", "solver", "for", "version", "licence", "limits, or what it needs"))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _methods() -> list[dict[str, str]]:
    """What every registered bound method states of itself."""
    rows = []
    for name, entry in registry.methods().items():
        made = entry.load()
        norms = getattr(made, "norms", None)
        answered = "not stated" if norms is None else "all" if len(norms) == len(PAIRS) else " ".join(map(_pair, norms))
        side, options = str(getattr(made, "side", "upper")), ", ".join(entry.takes()) or "none"
        rows.append({"name": name, "side": side, "norms": answered, "options": options})
    return rows


def _pair(norm: tuple[float, float]) -> str:
    p, q = norm
    return f"{p:g}" if p == q else f"({p:g},{q:g})"


def _solvers() -> list[Finding]:
    findings = []
    for name, entry in registry.solvers().items():
        solves = ", ".join(entry.solves).upper()
        if not registry.available(name):
            findings.append(Finding(name, solves, usable=False, version="not installed", licence="", remark=entry.hint))
            continue
        usable, licence, remark = (
            _PROBES[name]() if name in _PROBES else (True, _LICENCES.get(name, "see its package"), "no limit")
        )
        findings.append(
            Finding(name, solves, usable, _version(entry.requires[-1]) if entry.requires else __version__, licence, remark)
        )
    return findings


def _gurobi() -> tuple[bool, str, str]:
    """A model one variable above the size limit tells the free licence from a full one."""
    gurobipy = importlib.import_module("gurobipy")
    try:
        with gurobipy.Env(empty=True) as env:
            env.setParam("LogToConsole", 0)  # the licence banner belongs in a log, not in the terminal
            env.start()
            with gurobipy.Model(env=env) as model:
                model.addVars(2001)
                model.optimize()
    except gurobipy.GurobiError as error:
        _log.info("Gurobi: %s", error)
        if error.errno == gurobipy.GRB.Error.SIZE_LIMIT_EXCEEDED:
            limits = "2000 variables, 200 with quadratic terms; a larger model needs a licence (academic: free)"
            return True, "size-limited", limits
        return False, "none valid", f"{str(error).rstrip('.')}; needs a licence (academic: free)"
    return True, "full", "no limit"


def _mosek() -> tuple[bool, str, str]:
    mosek = importlib.import_module("mosek")
    try:
        with mosek.Env() as env:
            env.checkoutlicense(mosek.feature.pton)
    except mosek.MosekException as error:
        _log.info("MOSEK: %s", error)
        return False, "none found", "needs a licence file (academic: free), named by MOSEKLM_LICENSE_FILE"
    return True, "full", "no limit"


_PROBES: dict[str, Callable[[], tuple[bool, str, str]]] = {"gurobi": _gurobi, "mosek": _mosek}
"""Usable or not, licence, remark: of the solvers whose licence only trying can tell."""
