"""Where a checkpoint keeps its state_dict, and the names that wrappers put before those of the module's own parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lipguard.errors import UnreadableCheckpoint

__all__ = ["KEYS", "renamings", "states_of", "tensors_of"]

KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights")
"""Where training scripts and libraries put a state_dict: Lightning, PyTorch's tutorials, timm, and their like."""

_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Put before every name by DataParallel and DDP, by torch.compile, and by a module that holds the network as `self.model`."""


def states_of(payload: object) -> dict[str, dict[str, Tensor]]:
    """The state_dicts of a checkpoint, by where they stand; "" for the checkpoint itself, which is then nothing else."""
    if not isinstance(payload, Mapping):
        return {}
    parts = {"": payload} | {key: payload[key] for key in KEYS if key in payload}
    return {key: dict(part) for key, part in parts.items() if _is_state(part)}


def renamings(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The weights under their own names, then without the prefixes that all of them have, one after the other.

    torch.compile marks a submodule in the middle of a name; that mark is left out from the second on.
    """
    names = dict(weights)
    yield names
    if any("_orig_mod." in name for name in names):
        names = {name.replace("_orig_mod.", ""): value for name, value in names.items()}
        yield names
    while prefix := next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), None):
        names = {name.removeprefix(prefix): value for name, value in names.items()}
        yield names


def tensors_of(file: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors of a file of safetensors.

    Args:
        file: for messages.
        data: what it holds.

    Raises:
        UnreadableCheckpoint: the package is not installed, or the file is damaged.
    """
    try:
        from safetensors.torch import load  # pyright: ignore[reportMissingImports] - optional
    except ModuleNotFoundError as error:
        raise UnreadableCheckpoint(f"{file} needs safetensors, which is not installed. Run pip install safetensors.") from error
    try:
        return load(data)
    except Exception as error:  # damaged bytes make its reader raise its own errors; the message names the file
        told = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UnreadableCheckpoint(f"{file} is truncated, damaged or no file of safetensors ({told}).") from error


def _is_state(part: Any) -> bool:
    if not isinstance(part, Mapping) or not part:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in part.items())
