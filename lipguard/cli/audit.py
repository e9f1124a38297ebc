"""The commands `lipguard audit` and `lipguard verify`: make the records of checkpoints, and check them."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipguard.cli.asking import add_query, asked, example_of, module_of
from lipguard.cli.text import Cell, Screen, progress
from lipguard.errors import InvalidModel, LipguardError, NotCertified, UnreadableCheckpoint, UnsupportedQuery
from lipguard.outward import show

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from lipguard.audit.pool import Finished, Pool
    from lipguard.audit.record import AuditRecord
    from lipguard.audit.run import Subject
    from lipguard.network import Network
    from lipguard.query import Query

__all__ = ["add_audit", "audit", "verify"]

DONE, NOT_CERTIFIED, BAD_INPUT = 0, 1, 2

_CHECKPOINTS = (".ckpt", ".pt", ".pth", ".onnx", ".safetensors")
_RECORD, _PENDING = ".lipguard.json", ".lipguard.pending.json"

Answer = tuple[int, dict[str, object]]
"""Exit code, and the JSON document."""


def add_audit(commands: Any) -> None:
    """Add both commands to the parser's subcommands."""
    from jsonargparse import ArgumentParser

    maker = ArgumentParser(
        exit_on_error=False, description="Audit checkpoints: write <checkpoint>.lipguard.json, finish what was pending."
    )
    maker.add_argument("checkpoints", type=str, nargs="+", help="files, folders or globs; a folder stands for all below it")
    maker.add_argument("--model", type=str | None, help="module.Class, or a factory; not needed to finish or repeat an audit")
    add_query(maker, "as before")
    maker.add_argument("--method", type=str | None, help="enumeration, miqcqp, milp, branch-and-bound, bounds or auto")
    maker.add_argument("--solver", type=str | None, help="solver of the method; see lipguard doctor")
    maker.add_argument("--time-limit", type=float | None, help="seconds for one audit; default: 60, or as before")
    maker.add_argument("--jobs", type=int, default=1, help="processes that audit at the same time")
    maker.add_argument("--force", action="store_true", help="audit also where an intact record is there")
    maker.add_argument("--json", action="store_true", help="print one JSON document")
    maker.add_argument("--trust", action="store_true", help="allow the file to run code while its module is built (full pickle)")
    commands.add_subcommand("audit", maker, help="audit checkpoints and finish pending audits")

    checker = ArgumentParser(
        exit_on_error=False, description="Prove the verified bounds of audit records anew; exit 1 if anything was changed."
    )
    checker.add_argument("records", type=str, nargs="+", help="records (or their checkpoints), folders or globs")
    checker.add_argument("--checkpoint", type=str | None, help="the checkpoint of the one record; default: the file beside it")
    checker.add_argument("--model", type=str | None, help="module.Class, or a factory: check the network's structure against it")
    add_query(checker, "as recorded; a record of another is not certified")
    checker.add_argument("--json", action="store_true", help="print one JSON document")
    checker.add_argument(
        "--trust", action="store_true", help="allow the file to run code while its module is built (full pickle)"
    )
    commands.add_subcommand("verify", checker, help="check audit records against their checkpoints")


def audit(options: Namespace) -> Answer:
    """Audit what has no record yet; exit code 0 if every checkpoint then has a verified enclosure."""
    from lipguard.audit.pool import Pool
    from lipguard.audit.run import Options

    if options.jobs < 1:
        raise UnsupportedQuery(f"--jobs {options.jobs}: at least 1.")
    names = ("method", "solver", "time_limit")
    changes: dict[str, Any] = {name: value for name in names if (value := options[name]) is not None}
    changes |= asked(options)
    Options(**changes).check()
    rows: dict[Path, dict[str, object]] = {}
    pool = Pool(options.jobs)
    paths = _expanded(options.checkpoints, _CHECKPOINTS, (_PENDING,))
    with progress("Auditing", len(paths)) as done:
        try:
            for path in paths:
                rows[path] = _started(path, pool, options, changes)
                done(sum(row["state"] != "pending" for row in rows.values()))
            while pool.open:
                pool.wait(0.5)
                for finished in pool.collect():
                    rows[finished.checkpoint] = _ended(finished)
                    done(sum(row["state"] != "pending" for row in rows.values()))
        except KeyboardInterrupt:
            pass  # what is left stays pending, and the summary says so
        finally:
            pool.close()
    ordered = [rows.get(path, _row(path, "pending")) for path in paths]
    codes = [BAD_INPUT if row["state"] == "refused" else NOT_CERTIFIED if row["upper"] is None else DONE for row in ordered]
    if not options.json:
        _show(ordered)
    return max(codes), {"audits": ordered, "exit_code": max(codes)}


def verify(options: Namespace) -> Answer:
    """Check every record; exit code 0 if all of them hold."""
    paths = _expanded(options.records, (_RECORD,), ())
    if options.checkpoint is not None and len(paths) != 1:
        raise UnsupportedQuery(f"--checkpoint belongs to one record, {len(paths)} are given.")
    rows: list[dict[str, object]] = []
    codes: list[int] = []
    with progress("Verifying", len(paths)) as done:
        for path in paths:
            code, row = _verified(path, options)
            codes.append(code)
            rows.append(row)
            done(len(rows))
    if not options.json:
        _show(rows)
    return max(codes), {"records": rows, "exit_code": max(codes)}


def _started(path: Path, pool: Pool, options: Namespace, changes: dict[str, Any]) -> dict[str, object]:
    """Hand the checkpoint to the pool, or say why not."""
    from lipguard.audit.pending import Pending, asked_of, owned_elsewhere, pending_path, prepare, up_to_date
    from lipguard.audit.run import Options, Subject
    from lipguard.audit.weights import sha256

    marker, record = pending_path(path), up_to_date(path)
    if marker.exists() and owned_elsewhere(marker):
        return _row(path, "pending", "the training that saved it is still at work on it")
    try:
        if marker.exists() and options.model is None:
            pending = asked_of(marker)
            if dataclasses.replace(pending, **changes).json() != pending.json():
                raise UnsupportedQuery(
                    f"{path} has a pending audit, which is finished as it was asked. Leave the options out, or give --model."
                )
            pool.submit(marker, pending.time_limit, final=True)
            return _row(path, "pending")
        before = Options() if record is None else Options.of(record.query, record.options)
        wanted = dataclasses.replace(before, **changes)
        wanted.check()
        unchanged = record is not None and wanted.json() == before.json()
        if record is not None and record.enclosure is not None and unchanged and not options.force and options.model is None:
            return _found(path, record, "up to date")
        if options.model is not None or options.trust or path.suffix == ".onnx":
            subject = _captured(path, options, wanted.query)
        elif record is not None and record.network is not None and _another(before.query, wanted.query):
            raise InvalidModel(
                f"{path}: the record's network is of other outputs, inputs or submodule. Name the model's class with --model."
            )
        elif record is not None and record.network is not None:
            subject = Subject(record.model, record.network)
        else:
            raise InvalidModel(f"{path} has no audit to finish or repeat. Name the model's class or a factory with --model.")
        pool.submit(prepare(path, Pending({"sha256": sha256(path)}, subject, wanted)), wanted.time_limit, final=True)
    except (LipguardError, OSError) as error:
        return _row(path, "refused", f"{type(error).__name__}: {error}")
    return _row(path, "pending")


def _another(before: Query, after: Query) -> bool:
    """Whether two queries are of different networks."""
    one, other = before.json(), after.json()
    return any(one[name] != other[name] for name in ("outputs", "inputs", "submodule"))


def _captured(path: Path, options: Namespace, query: Query) -> Subject:
    from lipguard.audit.run import subject_of
    from lipguard.audit.weights import read_contents

    module = module_of(options, path)
    return subject_of(module, dataclasses.replace(query, example=example_of(options, module)), read_contents(path))


def _ended(finished: Finished) -> dict[str, object]:
    from lipguard.audit.pending import fail, pending_path, up_to_date

    path = finished.checkpoint
    try:
        if finished.result == "failed":
            fail(pending_path(path), finished.error or "the audit failed.")
        record = up_to_date(path)
    except (LipguardError, OSError) as error:
        return _row(path, "refused", f"{finished.error or error}")
    if record is None:
        return _row(path, "dropped" if not path.exists() else "pending", "it was removed or replaced while it was audited")
    return _found(path, record, "audited" if record.enclosure is not None else "failed")


def _verified(path: Path, options: Namespace) -> tuple[int, dict[str, object]]:
    from lipguard.audit.check import verify_record
    from lipguard.audit.record import read_record

    checkpoint = Path(options.checkpoint or str(path).removesuffix(_RECORD))
    try:
        record = read_record(path)
        _expected(record, options)
        network = None if options.model is None and not options.trust else _recaptured(checkpoint, record, options)
        found = verify_record(record, checkpoint, network)
    except LipguardError as error:
        code = NOT_CERTIFIED if isinstance(error, NotCertified) else BAD_INPUT
        return code, _row(path, "not certified" if code == NOT_CERTIFIED else "refused", f"{type(error).__name__}: {error}")
    notes = [*_statement(_query(record)), f"{found.tied} tensors by name from the checkpoint, {found.stored} from the record"]
    notes += [f"{c.method}: {c.side} bound {c.value!r} rests on a solver's word and was not checked" for c in found.claimed]
    if not found.exact:
        notes.append("values agree to 1e-8, as they do between machines")
    row = _row(path, "verified", "; ".join(notes)) | {"lower": found.lower, "upper": found.upper, "status": record.status}
    row |= {"gap": 0.0 if found.upper == found.lower else (found.upper - found.lower) / found.upper}
    row |= {"claimed_upper": min((c.value for c in found.claimed if c.value < found.upper), default=None)}
    certificates = [
        {"value": c.value, "side": c.side, "method": c.method, "evidence": type(c.evidence).__name__} for c in found.proved
    ]
    return DONE, row | {"certificates": certificates} | _query(record).json()


def _query(record: AuditRecord) -> Query:
    """What the record is of; the submodule of records before version 0.2 is in what they say of the model."""
    from lipguard.audit.run import Options

    query = Options.of(record.query, record.options).query
    return query if "submodule" in record.query else dataclasses.replace(query, submodule=record.model["submodule"])


def _statement(query: Query) -> list[str]:
    """What of the network is bounded, where it is not the whole."""
    plain = query.json()
    return [f"{name} {plain[name]}" for name in ("submodule", "outputs", "inputs") if plain[name] is not None]


def _expected(record: AuditRecord, options: Namespace) -> None:
    """Refuse a record of another norm, domain or part than the one named on the command line.

    Raises:
        NotCertified: it is of another.
    """
    recorded = _query(record)
    given = asked(options)
    wanted = dataclasses.replace(recorded, **given).json()
    for name, value in given.items():
        if wanted[name] != recorded.json()[name]:
            raise NotCertified(f"the record has {name} {recorded.json()[name]!r}, and --{name} {value} is asked for.")


def _recaptured(checkpoint: Path, record: AuditRecord, options: Namespace) -> Network:
    from lipguard.capture.capture import network_of
    from lipguard.checkpoint import example_input

    module = module_of(options, checkpoint)
    if options.example is not None or options.input_shape is not None:
        example = example_of(options, module)
    else:
        shape = record.model["input_shape"]
        example = example_input(module, None if shape is None else tuple(shape))
    return network_of(module, dataclasses.replace(_query(record), example=example))


def _row(path: Path, state: str, remark: str = "") -> dict[str, object]:
    return {"path": str(path), "state": state, "lower": None, "upper": None, "gap": None, "status": None, "remark": remark}


def _found(path: Path, record: AuditRecord, state: str) -> dict[str, object]:
    ends: dict[str, object] = {} if record.enclosure is None else record.enclosure
    return _row(path, state, record.failure or record.notes) | ends | {"status": record.status, "seconds": record.seconds}


def _expanded(patterns: Sequence[str], endings: tuple[str, ...], markers: tuple[str, ...]) -> list[Path]:
    """The files that files, folders and globs mean, without the sidecars, each once and in order."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        for name in names:
            path = Path(name)
            below = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            for file in below:
                marker = next((end for end in markers if file.name.endswith(end)), None)
                if marker is not None:
                    found[Path(str(file).removesuffix(marker))] = None
                elif endings == (_RECORD,) and not path.is_dir() and not file.name.endswith(_RECORD):
                    found[Path(f"{file}{_RECORD}")] = None
                elif file.name.endswith(endings) or (not path.is_dir() and not file.name.endswith((_RECORD, _PENDING))):
                    found[file] = None
    if not found:
        raise UnreadableCheckpoint(f"nothing to work on in {', '.join(patterns)}: no file ends in {', '.join(endings)}.")
    return [Path(os.path.abspath(path)) for path in found]


def _show(rows: list[dict[str, object]]) -> None:
    screen = Screen()
    lines: list[list[Cell]] = []
    for row in rows:
        good = row["upper"] is not None
        path = os.path.relpath(str(row["path"]))
        numbers = [_end(row, "lower"), *(_end(row, name) for name in ("upper", "claimed_upper", "gap"))]
        lines.append([(str(row["state"]), "green" if good else "red"), path, *numbers, str(row["status"] or "")])
        if not good:
            screen.line(f"{path}: {row['remark']}")
    screen.table(lines, ("", "", "lower", "upper", "claimed upper", "gap", "status"))


def _end(row: dict[str, object], name: str) -> str:
    """A bound rounded outward; a gap rounds up, as it says how far the ends are apart at most."""
    value = row.get(name)
    return show(value, "lower" if name == "lower" else "upper") if isinstance(value, float) else ""
