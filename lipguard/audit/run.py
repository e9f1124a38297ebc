"""An audit: bounds and exact methods on one network within a time, kept as certificates."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lipguard import __version__
from lipguard.audit.encoding import certificate_json
from lipguard.audit.options import Options
from lipguard.audit.recipe import captured, rebuild, recipe_of
from lipguard.audit.record import AuditRecord, record_path, write_record
from lipguard.audit.weights import Contents, read_contents
from lipguard.bounds import bound
from lipguard.certificate import Certificate, Domain, Enclosure, Norm
from lipguard.errors import Contradiction, InvalidModel, LipguardError, NotCertified
from lipguard.exact import exact
from lipguard.network import Network
from lipguard.query import Inputs, Outputs, Query
from lipguard.solvers.threads import limited_threads, one_thread
from lipguard.verify import verify

__all__ = [
    "Options",
    "Outcome",
    "Subject",
    "audit_checkpoint",
    "audit_network",
    "enclosed",
    "make_record",
    "subject_of",
    "versions",
]

_SHARE = 0.25
"""Of the time limit, for the bounds that stand if the exact method does not finish."""

_PACKAGES = ("torch", "numpy", "scipy", "gurobipy", "pyscipopt", "highspy", "scs", "clarabel")


@dataclass(frozen=True, eq=False)
class Subject:
    """What is audited: a model's description and the recipe of its network, or why there is none."""

    model: dict[str, Any]
    recipe: dict[str, Any] | None
    failure: str | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an audit found: see the fields of the same names in `AuditRecord`."""

    certificates: list[Certificate]
    enclosure: dict[str, Any] | None
    status: str
    notes: str
    failure: str | None


def audit_network(network: Network, options: Options) -> Outcome:
    """The best enclosure of the network's constant that the time allows; a failing method is noted, never raised.

    Every verified certificate has passed the checker twice: where it was found, and once more in one thread, which is how
    `lipguard verify` repeats it.
    """
    started = time.monotonic()
    found: list[Certificate] = []
    notes: list[str] = []
    status, failure = "bounds only", None
    query: dict[str, Any] = {"norm": options.norm, "domain": options.domain}
    with limited_threads(1), one_thread():
        for method in (None, "sampling"):
            try:
                limit = max(_SHARE * options.time_limit / (1 if method is None else 4), 0.1)
                found.append(bound(network, method=method, time_limit=limit, **query))
            except Exception as error:  # whatever a solver or LAPACK raises, the other bounds stand
                failure = _told(error)
                notes.append(f"{method or 'upper bound'} failed: {failure}")
        if options.method != "bounds":
            status, failure = _search(network, options, started, found, notes)
        certificates = _proved(network, found, notes)
    try:
        enclosure = enclosed(certificates)
    except Contradiction as error:
        return Outcome(certificates, None, "failed", " ".join(notes), _told(error))
    if enclosure is None:
        return Outcome(certificates, None, "failed", " ".join(filter(None, notes)), failure or "no bound could be verified.")
    return Outcome(certificates, enclosure, status, " ".join(filter(None, notes)), failure)


def _search(
    network: Network, options: Options, started: float, found: list[Certificate], notes: list[str]
) -> tuple[str, str | None]:
    """The exact method's certificates, added to those found; its status, and what failed or None."""
    asked: dict[str, Any] = {"norm": options.norm, "domain": options.domain, "gap": options.gap}

    def run(method: str) -> Enclosure:
        remaining = max(options.time_limit - (time.monotonic() - started), 0.1)
        result = exact(network, method=method, solver=options.solver, time_limit=remaining, **asked)
        found.extend((result.lower_certificate, result.upper_certificate))
        notes.append(result.choice)
        if result.closed_region is not None:
            notes.append(f"The maximum over closed regions is {result.closed_region!r}, above the true constant.")
        return result

    try:
        result = run(options.method)
    except Exception as error:  # an unsupported activation, a licence, a crash: the bounds stand
        notes.append(f"{options.method} failed: {_told(error)}")
        return "bounds only", _told(error)
    if options.method == "auto" and result.upper_certificate.rigor != "verified":
        # A record is for others to check: an upper end that the checker can prove is worth a second search.
        try:
            return run("branch-and-bound").status, None
        except Exception as error:  # the first search stands
            notes.append(f"branch-and-bound failed: {_told(error)}")
    return result.status, None


def _proved(network: Network, found: list[Certificate], notes: list[str]) -> list[Certificate]:
    kept: list[Certificate] = []
    for certificate in found:
        try:
            kept.append(verify(network, certificate) if certificate.rigor == "verified" else certificate)
        except NotCertified as error:
            notes.append(f"{certificate.method}: {error}")
    return kept


def enclosed(certificates: Sequence[Certificate]) -> dict[str, Any] | None:
    """The best verified ends among the certificates, and a solver's claim where it is below the verified upper end.

    Raises:
        Contradiction: a verified lower bound exceeds a verified upper bound.
    """
    ends = [(c.value, i) for i, c in enumerate(certificates) if c.rigor == "verified" and c.side == "upper"]
    starts = [(c.value, -i) for i, c in enumerate(certificates) if c.rigor == "verified" and c.side == "lower"]
    if not ends or not starts:
        return None
    (upper, upper_index), (lower, lower_index) = min(ends), max(starts)
    if lower > upper:
        raise Contradiction(f"verified lower bound {lower!r} > verified upper bound {upper!r}. Please report this model.")
    claims = [(c.value, i) for i, c in enumerate(certificates) if c.rigor != "verified" and lower <= c.value < upper]
    claim, claim_index = min(claims, default=(None, None))
    return {
        "lower": lower,
        "upper": upper,
        "gap": 0.0 if upper == lower else (upper - lower) / upper,
        "lower_index": -lower_index,
        "upper_index": upper_index,
        "claimed_upper": claim,
        "claimed_index": claim_index,
    }


def make_record(
    name: str, contents: Contents, subject: Subject, options: Options, twin: AuditRecord | None = None
) -> AuditRecord:
    """Audit the network that the subject's recipe makes of a checkpoint's weights.

    Args:
        twin: a record of the same network and query, whose certificates are then taken over.
    """
    started = time.monotonic()
    query, asked = options.json()
    failed = Outcome([], None, "failed", "", subject.failure)
    outcome = failed
    if subject.failure is None and subject.recipe is not None:
        if twin is not None and _same(twin, subject, query, asked):
            return _record(name, contents, subject, twin.__dict__, query, asked, started)
        try:
            network = rebuild(subject.recipe, contents.weights)
            if network.digest != subject.recipe["digest"]:
                raise NotCertified("the network rebuilt from the checkpoint is not the one that was saved.")
            outcome = audit_network(network, options)
        except LipguardError as error:
            outcome = Outcome([], None, "failed", "", _told(error))
    found = {**outcome.__dict__, "certificates": [certificate_json(c) for c in outcome.certificates]}
    return _record(name, contents, subject, found, query, asked, started)


def _same(twin: AuditRecord, subject: Subject, query: dict[str, Any], asked: dict[str, Any]) -> bool:
    digest = None if twin.network is None else twin.network["digest"]
    assert subject.recipe is not None
    return twin.failure is None and (digest, twin.query, twin.options) == (subject.recipe["digest"], query, asked)


def _record(
    name: str,
    contents: Contents,
    subject: Subject,
    found: Mapping[str, Any],
    query: dict[str, Any],
    asked: dict[str, Any],
    started: float,
) -> AuditRecord:
    return AuditRecord(
        checkpoint={"name": name, "sha256": contents.sha256, "size": contents.size},
        step=contents.step,
        epoch=contents.epoch,
        model=subject.model,
        network=subject.recipe,
        query=query,
        options=asked,
        certificates=found["certificates"],
        enclosure=found["enclosure"],
        status=found["status"],
        notes=found["notes"],
        failure=found["failure"],
        versions=versions(),
        hardware=hardware(),
        seconds=time.monotonic() - started,
        written=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def audit_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    example: Any,
    options: Options | None = None,
    *,
    norm: Norm | None = None,
    domain: Domain | str | Mapping[str, Any] | None = None,
    submodule: str | None = None,
    outputs: Outputs | None = None,
    inputs: Inputs | None = None,
    write: bool = True,
) -> AuditRecord:
    """Audit a checkpoint file and write the record beside it.

    Args:
        path: the checkpoint.
        model: the module with the checkpoint's weights loaded, such as `lipguard.checkpoint.load_module` gives.
        example: an input, shape (1, ...); a tuple or a mapping of tensors, where the module takes several.
        options: norm, domain, method, solver and time limit.
        norm, domain, submodule, outputs, inputs: as for `lipguard.bound`, where the options do not hold them.
        write: write `<path>.lipguard.json`.
    Raises:
        LipguardError: the module cannot be captured, the file cannot be read, or the options have no meaning. A method
            that fails is recorded, not raised.
    """
    options = options or Options()
    options = options.asking(domain=domain, submodule=submodule, outputs=outputs, inputs=inputs)
    if norm is not None:
        options = replace(options, norm=norm)
    options.check()
    contents = read_contents(path)
    subject = subject_of(model, replace(options.query, example=example), contents)
    record = make_record(Path(path).name, contents, subject, options)
    if write:
        write_record(record, record_path(path))
    return record


def subject_of(model: nn.Module, query: Query, contents: Contents) -> Subject:
    """What to audit of a module that was loaded from a file with these contents.

    A file that holds a whole module and no state_dict is tied to its record by its SHA-256 alone.

    Raises:
        LipguardError: the module cannot be captured, or does not hold the file's weights.
    """
    network, recipe = captured(model, query.example, submodule=query.submodule, outputs=query.outputs, inputs=query.inputs)
    if not contents.weights:
        recipe = recipe_of(network)
    elif rebuild(recipe, contents.weights).digest != network.digest:
        raise InvalidModel("the module does not hold the checkpoint's weights: load its state_dict first.")
    return Subject(describe(model, query.example, query.submodule), recipe)


def describe(model: nn.Module, example: Any, submodule: str | None = None) -> dict[str, Any]:
    """What a record says of the model: its class, initial arguments as text, submodule, and the input's shape if it has one."""
    kind = type(model)
    arguments = getattr(model, "hparams", {})
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "arguments": {str(name): str(value)[:200] for name, value in dict(arguments).items()},
        "input_shape": [1, *example.shape[1:]] if isinstance(example, Tensor) else None,
        "submodule": submodule,
    }


@cache
def versions() -> dict[str, str]:
    """Versions of lipguard, Python, torch and every solver installed."""
    known = {"lipguard": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return known


@cache
def hardware() -> dict[str, Any]:
    """Processor and number of cores."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor that does not say
    return {"system": platform.system(), "machine": platform.machine(), "processor": processor, "cores": os.cpu_count() or 1}


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:2000]
