"""Nodes as data and back: each part states its own fields, and closed tables say which kinds a record may hold.

Tensors are left to the caller, who knows where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lipguard.errors import UnsupportedLayer
from lipguard.network import activations, contraction, coupled, nodes, operators
from lipguard.network.nodes import Node
from lipguard.network.part import Part

Store = Callable[[Tensor], Any]
"""Writes a tensor as JSON."""

Load = Callable[[Any], Tensor]
"""Reads what a `Store` wrote."""

_KINDS: dict[str, type[Part]] = {**nodes.KINDS, **operators.KINDS, **coupled.KINDS, **contraction.KINDS}


def write_part(part: Part, store: Store) -> dict[str, Any]:
    """A node, an operator or a function as a JSON object.

    Raises:
        UnsupportedLayer: it, or a part of it, is of a kind that no record can hold.
    """
    record = part.to_record()
    kind = record["kind"]
    if kind not in activations.KINDS and _KINDS.get(kind) is not type(part):
        raise UnsupportedLayer(
            f"{type(part).__module__}.{type(part).__qualname__} cannot be stored in a record, which knows "
            f"{', '.join(sorted(_KINDS))}. Make the layer of these to audit it."
        )
    return {name: _written(value, store) for name, value in record.items()}


def read_node(record: Mapping[str, Any], load: Load) -> Node:
    """The node that a JSON object holds.

    Raises:
        KeyError, TypeError, ValueError: it holds none.
        LipguardError: a part contradicts itself.
    """
    kind = nodes.KINDS[record["kind"]]
    parts = {name: _read(value, load) for name, value in record.items() if name != "kind"}
    for name, wanted in kind.parts.items():
        if not isinstance(parts[name], wanted):
            raise ValueError(f"the {name} of a node of kind {record['kind']} is no {wanted.__name__.lower()}")
    return kind(**parts)


def _written(value: Any, store: Store) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": store(value.detach())}
    if isinstance(value, (list, tuple)):
        return [_written(item, store) for item in value]
    return write_part(value, store) if isinstance(value, Part) else value


def _read(value: Any, load: Load) -> Any:
    if isinstance(value, list):
        return tuple(_read(item, load) for item in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return load(value["tensor"])
    parts = {name: _read(field, load) for name, field in value.items()}
    kind = parts.pop("kind")
    if kind in activations.KINDS:
        return activations.from_record(kind, parts)
    if kind in nodes.KINDS:
        raise ValueError(f"a node of kind {kind} stands inside another")
    return _KINDS[kind](**parts)
