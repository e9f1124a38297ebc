"""AuditRecord: everything somebody else needs to check an audit, in one JSON document beside the checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lipguard.errors import NotCertified, UnreadableCheckpoint
from lipguard.files import refuse_constant, write_atomically

__all__ = ["FORMAT", "STATUS_CODES", "AuditRecord", "read_record", "record_path", "write_atomically", "write_record"]

FORMAT = 1
"""Version of the record's format; a reader refuses others."""

SUFFIX = ".lipguard.json"

STATUS_CODES = {
    "closed": 0,
    "gap reached": 1,
    "time limit": 2,
    "memory limit": 3,
    "interrupted": 4,
    "solver failed": 5,
    "bounds only": 6,
    "failed": 7,
}
"""Numbers logged for `AuditRecord.status`. "bounds only": no exact method applies and the enclosure is that of the bounds;
"failed": there is no enclosure."""


@dataclass(frozen=True, eq=False)
class AuditRecord:
    """One audit of one checkpoint.

    Attributes:
        checkpoint: name, sha256 and size of the file audited.
        step, epoch: of the training at the save, where the checkpoint says so.
        model: class, initial arguments as text, submodule, input shape.
        network: how the network follows from the checkpoint's weights, and its digest.
        query: norm (input, output) and domain.
        options: method, solver, time limit and gap asked for.
        certificates: every bound with its evidence, verified ones and those that rest on a solver's word.
        enclosure: lower and upper, the best verified ends; claimed_upper, a solver's upper end if below; gap; and the
            indices of the certificates they come from. None where there is none.
        status: how the search ended, a key of `STATUS_CODES`.
        notes: what was chosen by "auto" or fallen back to, and why.
        failure: what failed, or None.
        versions, hardware: of the machine that audited.
        seconds: duration of the audit.
        written: UTC time of writing.
    """

    checkpoint: dict[str, Any]
    step: int | None
    epoch: int | None
    model: dict[str, Any]
    network: dict[str, Any] | None
    query: dict[str, Any]
    options: dict[str, Any]
    certificates: list[dict[str, Any]]
    enclosure: dict[str, Any] | None
    status: str
    notes: str
    failure: str | None
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: float
    written: str
    format: int = field(default=FORMAT)

    @property
    def upper(self) -> float | None:
        """The best verified upper bound, None where there is none."""
        return None if self.enclosure is None else self.enclosure["upper"]

    @property
    def lower(self) -> float | None:
        """The best verified lower bound, None where there is none."""
        return None if self.enclosure is None else self.enclosure["lower"]

    @property
    def gap(self) -> float | None:
        """Relative gap (upper - lower) / upper of the verified ends; None where one is missing."""
        return None if self.enclosure is None else self.enclosure["gap"]

    @property
    def code(self) -> int:
        """The number logged for `status`."""
        return STATUS_CODES[self.status]


def record_path(checkpoint: str | os.PathLike[str]) -> Path:
    """Path of the record beside a checkpoint: `<checkpoint>.lipguard.json`."""
    return Path(f"{os.fspath(checkpoint)}{SUFFIX}")


def write_record(record: AuditRecord, path: str | os.PathLike[str]) -> None:
    """Write the record so that at any moment `path` holds no record or a whole one."""
    write_atomically(Path(path), _render(asdict(record)))


def read_record(path: str | os.PathLike[str]) -> AuditRecord:
    """Read a record and check that nothing in it was changed since it was written.

    Raises:
        UnreadableCheckpoint: there is no such file.
        NotCertified: it is truncated, of another format, or any of its bytes differs from what its SHA-256 covers.
    """
    file = Path(path)
    try:
        text = file.read_bytes().decode("ascii")
        document = json.loads(text, parse_constant=refuse_constant)
    except OSError as error:
        raise UnreadableCheckpoint(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise NotCertified(f"{file} is truncated or was changed: it is no JSON document ({error}).") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        raise NotCertified(f"{file} is no audit record of format {FORMAT} (its format is {found!r}).")
    stated = document.pop("sha256", None)
    if stated != _digest(document):
        raise NotCertified(f"{file} was changed after it was written: its SHA-256 is not the one it states.")
    # The hash covers the values; the spelling of a number, a repeated key or a space changes no value, only the text.
    if text != _render(document):
        raise NotCertified(f"{file} was changed after it was written: its text is not how its values are written.")
    names = {f.name for f in fields(AuditRecord)}
    if set(document) != names:
        raise NotCertified(f"{file} does not have the fields of a record: {', '.join(sorted(set(document) ^ names))}.")
    return AuditRecord(**document)


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _render(document: Mapping[str, Any]) -> str:
    return json.dumps({**document, "sha256": _digest(document)}, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
