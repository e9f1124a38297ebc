"""Files that are whole or not there, and JSON documents read without surprises."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lipguard.errors import NotCertified, UnreadableCheckpoint

__all__ = ["read_document", "refuse_constant", "write_atomically"]


def write_atomically(path: Path, text: str) -> None:
    """Put `text` at `path` by way of a file beside it that is flushed to the disk first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UnreadableCheckpoint: there is no such regular file, or it cannot be read.
        NotCertified: it is no JSON object in ASCII, a key stands twice, or a number is none that JSON knows.
    """
    if not path.is_file():
        raise UnreadableCheckpoint(f"{path} is no regular file that is there. Give the path of a saved result.")
    try:
        document = json.loads(path.read_bytes().decode("ascii"), object_pairs_hook=_once, parse_constant=refuse_constant)
    except OSError as error:
        raise UnreadableCheckpoint(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise NotCertified(f"{path} is truncated or was changed: it is no JSON document ({error}).") from error
    if not isinstance(document, dict):
        raise NotCertified(f"{path} holds a {type(document).__name__}, where an object with fields is expected.")
    return document


def _once(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def refuse_constant(token: str) -> object:
    """For `json.loads(parse_constant=...)`: NaN and Infinity are Python's, not JSON's.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{token} is not a JSON number")
