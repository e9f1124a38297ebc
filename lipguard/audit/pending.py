"""Pending audits: a marker beside the checkpoint with everything needed to do the audit, now or after a crash.

The marker is written before the checkpoint and removed after the record, so that whatever is killed when, a checkpoint
has a record, or a marker from which `finish` makes one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lipguard.audit.record import AuditRecord, read_record, record_path, write_atomically, write_record
from lipguard.audit.run import Options, Subject, make_record
from lipguard.audit.weights import Contents, fingerprint, read_contents, sha256
from lipguard.errors import LipguardError, UnreadableCheckpoint

__all__ = [
    "Attempt",
    "Pending",
    "asked_of",
    "attempt",
    "checkpoint_of",
    "commit",
    "drop",
    "fail",
    "finish",
    "owned_elsewhere",
    "pending_in",
    "pending_path",
    "prepare",
    "up_to_date",
]

PENDING = ".lipguard.pending.json"

_ABANDONED = 3600.0
"""Seconds after which a file that is written in an instant is nobody's any more, whatever machine its writer was on."""

Result = Literal["done", "dropped", "waiting", "superseded"]
"""Of an audit: its record is in place; the checkpoint is gone; its version is not there yet; a later save replaced it."""


@dataclass(frozen=True, eq=False)
class Pending:
    """One version of a checkpoint that is to be audited.

    Attributes:
        expects: {"fingerprint": ...} of the weights, or {"sha256": ...} of the file.
        subject: what to audit.
        options: what is asked.
    """

    expects: dict[str, str]
    subject: Subject
    options: Options

    def matches(self, contents: Contents) -> bool:
        """Whether the file read is the version meant."""
        if "sha256" in self.expects:
            return self.expects["sha256"] == contents.sha256
        return self.expects["fingerprint"] == fingerprint(contents.weights)

    def json(self) -> dict[str, Any]:
        """The JSON value from which `of` restores it."""
        query, options = self.options.json()
        return {"expects": self.expects, "subject": self.subject.__dict__, "query": query, "options": options}

    @staticmethod
    def of(value: dict[str, Any]) -> Pending:
        """Inverse of `json`."""
        return Pending(value["expects"], Subject(**value["subject"]), Options.of(value["query"], value["options"]))


def pending_path(checkpoint: str | os.PathLike[str]) -> Path:
    """Path of the marker: `<checkpoint>.lipguard.pending.json`."""
    return Path(f"{os.fspath(checkpoint)}{PENDING}")


def checkpoint_of(marker: Path) -> Path:
    """Inverse of `pending_path`."""
    return marker.with_name(marker.name.removesuffix(PENDING))


def prepare(checkpoint: str | os.PathLike[str], pending: Pending) -> Path:
    """Write the marker, before the checkpoint itself is written; returns its path.

    The version whose audit it replaces stays in it as the second candidate: until the new checkpoint is in place, the old
    one is what a crash leaves.
    """
    marker = pending_path(checkpoint)
    candidates = [pending.json()]
    if marker.exists() and not up_to_date(checkpoint):
        with contextlib.suppress(UnreadableCheckpoint):  # nothing of it can be resumed
            candidates += _read(marker)["candidates"][:1]
    document = {"format": 1, "id": secrets.token_hex(8), "owner": _owner(), "candidates": candidates}
    write_atomically(marker, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return marker


@dataclass(frozen=True)
class Attempt:
    """An audit that is done and not yet in place.

    Attributes:
        result: "done", or what it came to without an audit.
        identity: of the marker that was read.
        current: the version audited is the marker's own, not the one before it.
        written: the record, complete, under a temporary name beside its place.
    """

    result: Result
    identity: str = ""
    current: bool = False
    written: Path | None = None


def attempt(marker: Path, *, final: bool = True, twin: Path | None = None) -> Attempt:
    """Do the audit that a marker asks for, and leave it to `commit` to put the record in place.

    Args:
        final: no save is under way. Else a marker whose version is not in place yet is kept for the moment when it is.
        twin: a record that may be of the same network, to take over its certificates.
    Raises:
        UnreadableCheckpoint: the marker or the checkpoint is damaged.
    """
    checkpoint = checkpoint_of(marker)
    if not marker.exists():
        return Attempt("done")
    document = _read(marker)
    identity = str(document["id"])
    candidates = [Pending.of(value) for value in document["candidates"]]
    if not checkpoint.exists():
        return Attempt("dropped" if final else "waiting", identity)
    contents = read_contents(checkpoint)
    found = next((candidate for candidate in candidates if candidate.matches(contents)), None)
    if found is None and not final:
        return Attempt("waiting", identity)
    current = final or found is candidates[0]
    if found is None and _recorded(checkpoint) == contents.sha256:
        return Attempt("done", identity, current)
    if found is None:
        # Tensors that the recipe stores are those of another version: nothing may be certified with them.
        reason = "the file is not the checkpoint that was saved. Audit it with lipguard audit --model module.Class --force."
        found = Pending({}, Subject(candidates[0].subject.model, None, reason), candidates[0].options)
    record = make_record(checkpoint.name, contents, found.subject, found.options, _read_twin(twin))
    target = record_path(checkpoint)
    written = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    write_record(record, written)
    return Attempt("done", identity, current, written)


def commit(marker: Path, tried: Attempt) -> tuple[Result, AuditRecord | None]:
    """Put an attempt's record in place and remove the marker, unless a later save has replaced the marker.

    Only the process that writes the markers may do this: no save comes between the look at the marker and its removal.

    Returns:
        What it came to, "superseded" if a later save came first, and the record even then.
    """
    checkpoint = checkpoint_of(marker)
    record = None if tried.written is None or not tried.written.exists() else read_record(tried.written)
    if not checkpoint.exists():
        drop(checkpoint)
        return "dropped", None
    if not marker.exists() or _read(marker)["id"] != tried.identity:
        if tried.written is not None:
            tried.written.unlink(missing_ok=True)
        return ("done" if tried.written is None else "superseded"), record
    if tried.written is not None and record is not None:
        tried.written.replace(record_path(checkpoint))
    if not tried.current:
        return "waiting", record
    marker.unlink(missing_ok=True)
    sweep(checkpoint)
    return tried.result, record or _intact(checkpoint)


def finish(marker: Path, *, final: bool = True, twin: Path | None = None) -> Result:
    """`attempt` and `commit` at once, where no other process is at work."""
    return commit(marker, attempt(marker, final=final, twin=twin))[0]


def fail(marker: Path, reason: str) -> None:
    """Write a record that says why there is no audit, and remove the marker.

    Raises:
        UnreadableCheckpoint: the marker or the checkpoint is damaged.
    """
    checkpoint = checkpoint_of(marker)
    candidate = Pending.of(_read(marker)["candidates"][0])
    subject = Subject(candidate.subject.model, candidate.subject.recipe, reason)
    write_record(make_record(checkpoint.name, read_contents(checkpoint), subject, candidate.options), record_path(checkpoint))
    marker.unlink(missing_ok=True)


def asked_of(marker: Path) -> Options:
    """The options of the audit that a marker asks for.

    Raises:
        UnreadableCheckpoint: the marker is damaged.
    """
    return Pending.of(_read(marker)["candidates"][0]).options


def drop(checkpoint: str | os.PathLike[str]) -> None:
    """Remove everything an audit put beside a checkpoint that is gone."""
    for path in (pending_path(checkpoint), record_path(checkpoint)):
        path.unlink(missing_ok=True)
    sweep(Path(checkpoint))


def sweep(checkpoint: Path) -> None:
    """Remove files that a killed write left half-finished."""
    for kind in (record_path(checkpoint).name, pending_path(checkpoint).name):
        for leftover in checkpoint.parent.glob(f".{_literal(kind)}.*.tmp"):
            leftover.unlink(missing_ok=True)


def up_to_date(checkpoint: str | os.PathLike[str]) -> AuditRecord | None:
    """The intact record of the checkpoint as it is now, or None."""
    try:
        record = read_record(record_path(checkpoint))
        return record if record.checkpoint["sha256"] == sha256(checkpoint) else None
    except (LipguardError, OSError):
        return None


def pending_in(folders: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Markers in the folders, oldest first, without those whose process is still at work.

    Removes what a process killed before its marker was in place left long ago: it belongs to no checkpoint.
    """
    folders = [Path(folder) for folder in folders]
    for leftover in (path for folder in folders for path in folder.glob(f".*{PENDING}.*.tmp")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _ABANDONED:
                leftover.unlink()
    found = {marker for folder in folders for marker in folder.glob(f"*{PENDING}")}
    return sorted((m for m in found if not owned_elsewhere(m)), key=lambda m: (m.stat().st_mtime, m))


def owned_elsewhere(marker: Path) -> bool:
    """Whether another process that still runs on this machine wrote the marker, and so will finish it."""
    try:
        owner = _read(marker)["owner"]
    except UnreadableCheckpoint:
        return False
    mine = _owner()
    return (
        owner["host"] == mine["host"] and owner["pid"] != mine["pid"] and _started(owner["pid"]) == owner["started"] is not None
    )


def _recorded(checkpoint: Path) -> str | None:
    record = _intact(checkpoint)
    return None if record is None else record.checkpoint["sha256"]


def _intact(checkpoint: Path) -> AuditRecord | None:
    return _read_twin(record_path(checkpoint))


def _read_twin(path: Path | None) -> AuditRecord | None:
    try:
        return None if path is None else read_record(path)
    except LipguardError:
        return None


def _read(marker: Path) -> dict[str, Any]:
    try:
        document = json.loads(marker.read_text(encoding="ascii"))
        if document["format"] != 1 or not document["candidates"]:
            raise ValueError("another format")
        return document
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnreadableCheckpoint(f"{marker} is damaged ({error}). Remove it and audit the checkpoint with --model.") from error


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process started, which tells it from a later one of the same number; None if there is none (or no /proc)."""
    try:
        # The name in parentheses may hold spaces; the start time is the 22nd field, the 20th behind the name.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
