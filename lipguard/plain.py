"""Plain JSON values and back, bit for bit and strictly: tensors, and the forms that the fields of a record may have.

A `Form` says how one field is written and how it is read; `Recorded` is a class that states a form for each of its fields.
What is read may come from anywhere: a wrong type, a length that does not fit, a number that is not finite, a field that is
missing or unknown is refused with NotCertified.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lipguard.errors import NotCertified

__all__ = [
    "BY_NODE", "COUNT", "FLAG", "INDICES", "NUMBER", "TEXT", "VECTOR", "Form", "Recorded", "by_node", "finite", "from_plain",
    "one_of", "optional", "read_fields", "several", "shown", "tensor", "to_plain",
]  # fmt: skip

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.int64, torch.int32, torch.int8, torch.bool)
}

_AXES = 8
"""Axes that a stored tensor may have."""


def to_plain(tensor: Tensor) -> dict[str, Any]:
    """Shape, dtype and the little-endian bytes in base64. Floating-point values are stored as float64."""
    plain = tensor.detach().to("cpu")
    plain = (plain.double() if plain.is_floating_point() else plain).contiguous()
    array = plain.numpy()
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return {
        "dtype": str(plain.dtype).removeprefix("torch."),
        "shape": list(plain.shape),
        "base64": base64.b64encode(data).decode("ascii"),
    }


def from_plain(value: Mapping[str, Any]) -> Tensor:
    """Inverse of `to_plain`.

    Raises:
        NotCertified: a field is missing or unknown, or the bytes do not fit the shape.
    """
    try:
        if set(value) != {"dtype", "shape", "base64"}:
            raise ValueError(f"it has the fields {', '.join(sorted(map(str, value)))}")
        dtype, shape = _DTYPES[value["dtype"]], [COUNT.read(n) for n in _listed(value["shape"])]
        data = base64.b64decode(value["base64"], validate=True)
        size = torch.empty(0, dtype=dtype).element_size()
        if len(shape) > _AXES or len(data) != size * math.prod(shape):
            raise ValueError(f"{len(data)} bytes for shape {shape} of {value['dtype']}")
        if dtype is torch.bool and data.strip(b"\0\1"):
            raise ValueError("a truth value is neither 0 nor 1")
        if not data:
            return torch.zeros(shape, dtype=dtype)
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError, binascii.Error) as error:
        raise NotCertified(f"a tensor of the record is damaged: {type(error).__name__}: {error}.") from error
    # Every processor that PyTorch supports with these wheels is little-endian, so the bytes are the numbers.
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def finite(value: object) -> Any:
    """A JSON value in which inf and nan, for which JSON has no token, are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


@dataclass(frozen=True)
class Form:
    """How a field is written as a JSON value, and read; `read` raises ValueError or NotCertified where it has no meaning."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def shown(value: object) -> str:
    """The value for a message, cut short where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{shown(value)} is not a finite number")
    return float(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError(f"{shown(value)} is not a whole number of at least 0")
    return value


def _of_type(kind: type, name: str) -> Callable[[object], Any]:
    def read(value: object) -> object:
        if type(value) is not kind:
            raise ValueError(f"{shown(value)} is no {name}")
        return value

    return read


def _listed(value: object) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{type(value).__name__} instead of a list")
    return value


NUMBER = Form(float, _number)
COUNT = Form(int, _count)
TEXT = Form(str, _of_type(str, "text"))
FLAG = Form(bool, _of_type(bool, "truth value"))


def tensor(*dtypes: torch.dtype, axes: int = 1) -> Form:
    """Tensors of one of these dtypes and this number of axes; floating-point entries are finite."""

    def read(value: Any) -> Tensor:
        found = from_plain(value)
        if found.dtype not in dtypes or found.ndim != axes:
            raise ValueError(f"a tensor of {found.dtype} with {found.ndim} axes; {dtypes[0]} with {axes} is expected")
        if found.is_floating_point() and not bool(found.isfinite().all()):
            raise ValueError("a tensor holds nan or infinity")
        return found

    return Form(to_plain, read)


VECTOR = tensor(torch.float64)
INDICES = tensor(torch.int8, torch.int64, torch.int32)


def one_of(*texts: str) -> Form:
    """One of these texts."""

    def read(value: object) -> object:
        if not isinstance(value, str) or value not in texts:
            raise ValueError(f"{shown(value)} is none of {', '.join(texts)}")
        return value

    return Form(str, read)


def optional(form: Form) -> Form:
    """The form, or None."""
    return Form(
        lambda value: None if value is None else form.write(value), lambda value: None if value is None else form.read(value)
    )


def several(form: Form) -> Form:
    """A tuple of values of the form, written as a list."""
    return Form(lambda values: [form.write(one) for one in values], lambda value: tuple(map(form.read, _listed(value))))


def by_node(form: Form) -> Form:
    """A dict of values of the form by a node's index, which JSON has as text."""

    def read(value: object) -> dict[int, Any]:
        if not isinstance(value, Mapping):
            raise ValueError(f"{type(value).__name__} instead of values by node")
        for key in value:
            # One spelling for one node: "07" or " 7" would let two entries stand for the same.
            if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key):
                raise ValueError(f"{shown(key)} is no node")
        return {int(key): form.read(item) for key, item in value.items()}

    return Form(lambda values: {str(int(key)): form.write(item) for key, item in values.items()}, read)


BY_NODE = by_node(VECTOR)


def read_fields(record: object, forms: Mapping[str, Form], needed: set[str], what: str) -> dict[str, Any]:
    """The fields of a record, each read by its form.

    Raises:
        NotCertified: the record is no JSON object, a field that is needed is missing, one is unknown, or one has no meaning.
    """
    if not isinstance(record, Mapping):
        raise NotCertified(f"{what} is damaged: {type(record).__name__} instead of an object with fields.")
    if unknown := sorted(str(name) for name in record if name not in forms):
        raise NotCertified(f"{what} is damaged: it has no field called {shown(unknown[0])}.")
    if missing := sorted(needed - set(record)):
        raise NotCertified(f"{what} is damaged: its field {missing[0]!r} is missing.")
    found: dict[str, Any] = {}
    for name, value in record.items():
        try:
            found[name] = forms[name].read(value)
        except (ValueError, OverflowError, RecursionError, NotCertified) as error:
            raise NotCertified(f"{what} is damaged: {name}: {error}") from error
    return found


class Recorded:
    """A dataclass that states the form of each of its fields.

    Attributes:
        kind: its name in records; "" for what is always a part of another.
        forms: the form of every field.
    """

    kind: ClassVar[str] = ""
    forms: ClassVar[Mapping[str, Form]] = {}

    def to_record(self) -> dict[str, Any]:
        """The fields as JSON values, after the kind."""
        head = {"kind": self.kind} if self.kind else {}
        return head | {name: form.write(getattr(self, name)) for name, form in self.forms.items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_record`; a field that has a default may be missing.

        Raises:
            NotCertified: a field is missing or unknown, or has no meaning.
        """
        stated = fields(cls)  # type: ignore[arg-type] - every subclass is a dataclass
        needed = {f.name for f in stated if f.default is MISSING} | ({"kind"} if cls.kind else set())
        found = read_fields(record, {"kind": one_of(cls.kind), **cls.forms} if cls.kind else cls.forms, needed, cls.__name__)
        found.pop("kind", None)
        return cls(**found)
