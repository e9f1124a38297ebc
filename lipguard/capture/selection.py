"""What of a function is bounded: one of several output tensors, a linear map of it, of the inputs, the difference of classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lipguard.errors import UnsupportedLayer, UnsupportedQuery
from lipguard.network import Network
from lipguard.query import Functional, Outputs


def parts(outputs: Outputs | None) -> tuple[str | None, Functional | None]:
    """Which tensor is meant, None for the only one, and the functional of it."""
    if isinstance(outputs, int | str):
        return str(outputs), None
    if isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[1], Tensor | tuple):
        which, functional = outputs
        return str(which), functional  # type: ignore[return-value]
    return None, outputs  # type: ignore[return-value]


def choose(output: Any, which: str | None, place: str) -> Tensor:
    """The tensor meant among what a module returns.

    Raises:
        UnsupportedLayer: several tensors, and none chosen; or nothing that is a tensor.
        UnsupportedQuery: there is no such output.
    """
    if isinstance(output, Tensor):
        if which is not None:
            raise UnsupportedQuery(
                f"{place} returns one tensor, outputs={which!r} chooses among several. For one entry of it give a matrix of one "
                "row, outputs=torch.eye(m)[i:i+1]."
            )
        return output
    known = _tensors(output)
    if not known:
        raise UnsupportedLayer(
            f"{place} returns {type(output).__name__}; one tensor is needed. Wrap it in a module that returns the tensor to "
            "bound, or bound a submodule with submodule=...."
        )
    names = ", ".join(repr(int(name) if name.isdigit() else name) for name in known)
    if which is None:
        if len(known) == 1 and "." not in next(iter(known)):
            return next(iter(known.values()))
        raise UnsupportedLayer(
            f"{place} returns {type(output).__name__} with several tensors; one tensor is needed. Choose one with outputs=..., "
            f"of {names}."
        )
    if which not in known:
        raise UnsupportedQuery(f"{place} has no output {which!r}; it has {names}.")
    return known[which]


def selected(output: Any, outputs: Outputs | None, place: str) -> Tensor:
    """What `outputs` means of a module's own result: a batch (B, ...).

    Raises:
        LipguardError: it does not fit the result.
    """
    which, functional = parts(outputs)
    tensor = choose(output, which, place)
    if functional is None:
        return tensor
    rows = tensor.flatten(1)
    if isinstance(functional, Tensor):
        return rows @ functional.to(rows).T
    return rows[:, functional[0] : functional[0] + 1] - rows[:, functional[1] : functional[1] + 1]


def select(network: Network, functional: Functional) -> Network:
    """The network followed by the functional.

    Raises:
        UnsupportedQuery: it does not fit the network.
    """
    m = network.outputs
    if isinstance(functional, Tensor):
        if functional.ndim != 2 or functional.shape[1] != m:
            raise UnsupportedQuery(f"outputs has shape {tuple(functional.shape)}; a matrix (k, {m}) is needed for {m} outputs.")
        return network.with_outputs(functional)
    i, j = functional
    if not (0 <= i < m and 0 <= j < m and i != j):
        raise UnsupportedQuery(f"outputs = ({i}, {j}); two different classes from 0 to {m - 1} are needed.")
    row = torch.zeros(1, m, dtype=torch.float64, device=network.device)
    row[0, i], row[0, j] = 1.0, -1.0
    return network.with_outputs(row)


def embed(network: Network, matrix: Tensor) -> Network:
    """The network behind the linear map z -> matrix z.

    Raises:
        UnsupportedQuery: it does not fit the network.
    """
    d = network.inputs
    if matrix.ndim != 2 or matrix.shape[0] != d or not matrix.shape[1] or not bool(matrix.isfinite().all()):
        raise UnsupportedQuery(
            f"inputs has shape {tuple(matrix.shape)}; a finite matrix ({d}, k) is needed for {d} inputs, such as torch.eye({d})."
        )
    return network.with_inputs(matrix)


def _tensors(tree: Any) -> dict[str, Tensor]:
    """Every tensor in a nesting of mappings, sequences and dataclasses, by its dotted path."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, Mapping | type):
        tree = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    names = getattr(tree, "_fields", None)  # of a named tuple
    if isinstance(names, tuple):
        tree = {name: getattr(tree, name) for name in names}
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return {}
    found: dict[str, Tensor] = {}
    for name, part in tree.items():
        inner = {"": part} if isinstance(part, Tensor) else _tensors(part)
        found |= {f"{name}.{path}" if path else str(name): tensor for path, tensor in inner.items()}
    return found
