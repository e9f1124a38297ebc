"""`Part`: what nodes, operators and functions have in common: a record form."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any


class Part:
    """A part of a network that states its own record form; dataclasses have their fields for it."""

    def to_record(self) -> dict[str, Any]:
        """{"kind": ..., and what its kind is made from: numbers, text, tensors, parts, and tuples of them}.

        Raises:
            UnsupportedLayer: no record can hold it.
        """
        assert is_dataclass(self), f"{type(self).__name__} needs a to_record of its own"
        return {"kind": type(self).__name__} | {field.name: getattr(self, field.name) for field in fields(self)}
