"""The weights in a checkpoint file, read without running any code that the file names."""

from __future__ import annotations

import hashlib
import os
import pickle
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipguard.errors import LipguardError, UnreadableCheckpoint
from lipguard.layouts import KEYS, tensors_of

__all__ = ["Contents", "fingerprint", "read_contents", "sha256"]


@dataclass(frozen=True, eq=False)
class Contents:
    """What an audit needs of a checkpoint file.

    Attributes:
        sha256: of the file's bytes.
        size: the file's length in bytes.
        weights: its state_dict, empty where it has none.
        step, epoch: as a Lightning checkpoint states them, else None.
    """

    sha256: str
    size: int
    weights: dict[str, Tensor]
    step: int | None
    epoch: int | None


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """Read hash and weights of one version of the file, also while another version is put in its place.

    Objects of other classes than tensors and plain values (hyperparameters, optimizer states of one's own making) are
    passed over, so that a checkpoint need not be trusted to be audited.

    Raises:
        UnreadableCheckpoint: there is no such file, or it is no checkpoint.
    """
    try:
        with Path(path).open("rb") as file:
            digest = _hash(file)
            size = file.tell()
            file.seek(0)
            payload = _READERS.get(Path(path).suffix, _load)(file)
    except LipguardError:
        raise
    except OSError as error:
        raise UnreadableCheckpoint(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # damaged bytes can make an unpickler raise anything; the message names the file
        told = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UnreadableCheckpoint(f"{path} is truncated, damaged or no checkpoint ({told}).") from error
    tensors = next(filter(None, map(_tensors, _parts(payload))), {})
    step, epoch = (payload.get(key) if isinstance(payload, Mapping) else None for key in ("global_step", "epoch"))
    return Contents(digest, size, tensors, step if isinstance(step, int) else None, epoch if isinstance(epoch, int) else None)


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return _hash(file)


def fingerprint(weights: Mapping[str, object]) -> str:
    """SHA-256 over the names, dtypes, shapes and bits of a state_dict's tensors: tells two versions of a checkpoint apart."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        if isinstance(tensor, Tensor):
            plain = tensor.detach().to("cpu").contiguous()
            sha.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
            sha.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _hash(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _load_safetensors(file: BufferedReader) -> Any:
    return tensors_of(Path(file.name), file.read())


def _load_onnx(file: BufferedReader) -> Any:
    from lipguard.onnx import weights_of

    return weights_of(file.read())


def _parts(payload: Any) -> list[Any]:
    """Where the state_dict may stand: under one of the common keys, or by itself."""
    return [*(payload[key] for key in KEYS if key in payload), payload] if isinstance(payload, Mapping) else []


def _tensors(part: Any) -> dict[str, Tensor]:
    entries = part.items() if isinstance(part, Mapping) else ()
    return {str(name): value for name, value in entries if isinstance(value, Tensor)}


def _load(file: BufferedReader) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_INERT)


_READERS: dict[str, Callable[[BufferedReader], Any]] = {".safetensors": _load_safetensors, ".onnx": _load_onnx}
"""By the end of the file's name; every other is a file of torch.save."""


class _Passed(dict[Any, Any]):
    """Stands for an object of a class that is not imported: takes whatever the file says about it, and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Passed:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Takes an item of a list."""

    def extend(self, items: object) -> None:
        """Takes items of a list."""

    def add(self, item: object) -> None:
        """Takes an item of a set."""


_TENSORS = {
    "torch._utils": ("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter", "_rebuild_parameter_with_state"),
    "torch.serialization": ("_get_layout",),
    "torch.storage": ("UntypedStorage", "TypedStorage"),
    "collections": ("OrderedDict",),
}


class _Unpickler(pickle.Unpickler):
    """Knows tensors, storages, dtypes and ordered dictionaries; everything else comes back inert."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function, if it is one of PyTorch's that only make tensors."""
        if name in _TENSORS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch":
            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype) or found in (torch.Size, torch.device) or name.endswith("Storage"):
                return found
        return _Passed


_INERT = types.ModuleType("lipguard.audit.weights.inert")
_INERT.Unpickler = _Unpickler  # type: ignore[attr-defined]
_INERT.load = lambda file, **options: _Unpickler(file, **options).load()  # type: ignore[attr-defined]
