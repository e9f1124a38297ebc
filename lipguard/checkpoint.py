"""Reading a checkpoint back into a module: weights only, unless the caller grants more trust."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipguard.errors import InvalidExample, InvalidModel, UnreadableCheckpoint

__all__ = ["example_input", "load_module"]

_REFUSED = re.compile(r"WeightsUnpickler error:.*?(?:GLOBAL|class) (\S+)")
"""What PyTorch's restricted unpickler says of the class or function it declines to import."""


def load_module(path: str | os.PathLike[str], *, model: str | None = None, trust: bool = False) -> nn.Module:
    """The module saved at `path`, on the CPU and in evaluation mode.

    Args:
        path: a Lightning checkpoint, a state_dict, or (with `trust`) a whole module saved by `torch.save(module)`.
        model: dotted name of the class, or of a factory, that builds the module; called with those of the checkpoint's
            hyperparameters that it accepts. Not needed for a whole module.
        trust: read the file with full pickle, which runs code that the file names.

    Raises:
        UnreadableCheckpoint: the file is missing, damaged, or needs `trust`.
        InvalidModel: `model` cannot be imported or built, or does not fit the weights.
    """
    file = Path(path)
    payload = _read(file, trust)
    if isinstance(payload, nn.Module):
        return payload.eval()
    if not isinstance(payload, Mapping):
        raise UnreadableCheckpoint(f"{file} holds a {type(payload).__name__}, neither a checkpoint nor a module.")
    if model is None:
        raise InvalidModel(f"{file} holds weights without their module. Name its class or a factory with --model module.Class.")
    weights = payload.get("state_dict", payload)
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UnreadableCheckpoint(f"{file} has no state_dict: {_listed(payload)} found.")
    module = _build(model, payload)
    # torch.compile wraps a submodule under this name; the plain module has the same weights without it.
    plain = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    try:
        missing, unexpected = module.load_state_dict(plain, strict=False)
    except RuntimeError as error:
        raise InvalidModel(f"{model} does not fit the weights in {file}: {' '.join(str(error).split())}") from error
    if missing or unexpected:
        raise InvalidModel(
            f"{model} does not fit the weights in {file}: missing {_listed(missing)}; not expected {_listed(unexpected)}. "
            "Name the class that was trained, the LightningModule itself for a Lightning checkpoint."
        )
    return module.eval()


def example_input(module: nn.Module, shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None) -> Any:
    """An input to capture `module` with: zeros of `shape`, its `example_input_array`, or zeros for its first Linear layer.

    Args:
        module: what is captured.
        shape: with its batch dimension; of a module of several inputs one for each by its name.

    Raises:
        InvalidExample: nothing tells the shape.
    """
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(0))
    if isinstance(shape, Mapping):
        return {name: torch.zeros(sizes, dtype=like.dtype) for name, sizes in shape.items()}
    if shape is not None:
        return torch.zeros(shape, dtype=like.dtype)
    example = getattr(module, "example_input_array", None)
    if isinstance(example, (tuple, list)) and len(example) == 1:
        example = example[0]
    if isinstance(example, tuple | list | Mapping) and example:
        return example
    if isinstance(example, Tensor):
        return example.to(like.dtype) if example.is_floating_point() else example
    # Only where the first layer with weights is a Linear does its in_features tell the input's shape.
    first = next((layer for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None), None)
    if isinstance(first, nn.Linear):
        return torch.zeros(1, first.in_features, dtype=like.dtype)
    raise InvalidExample(
        f"{type(module).__name__} does not tell the shape of its input. Give it with --input-shape, such as 1,784."
    )


def _read(file: Path, trust: bool) -> object:
    if not file.is_file():
        raise UnreadableCheckpoint(f"{file} is not a file.")
    try:
        return torch.load(file, map_location="cpu", weights_only=not trust)
    except Exception as error:  # damaged bytes can make the unpickler raise anything; the message names the file
        refused = _REFUSED.search(str(error)) if isinstance(error, pickle.UnpicklingError) and not trust else None
        if refused is None:
            cause = f"{type(error).__name__}: {_first_line(error)}"
            raise UnreadableCheckpoint(f"{file} is truncated, damaged or no checkpoint ({cause[:160]}).") from error
        raise UnreadableCheckpoint(
            f"{file} is not weights only: reading it runs code for {refused[1]}. "
            "If you trust the file's origin, allow that with --trust."
        ) from error


def _build(name: str, payload: Mapping[str, Any]) -> nn.Module:
    factory = _imported(name)
    options = payload.get("hyper_parameters", {})
    single = payload.get("hparams_name")
    if single not in (None, "kwargs"):
        options = {single: options}  # Lightning: the hyperparameters were one argument of this name
    parameters = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        options = {key: value for key, value in options.items() if key in parameters}
    try:
        module = factory(**options)
        if isinstance(module, nn.Module) and callable(getattr(module, "configure_model", None)):
            module.configure_model()  # type: ignore[operator]
    except Exception as error:  # the user's own constructor may raise anything; the message names it
        raise InvalidModel(f"{name}({', '.join(options)}) failed: {type(error).__name__}: {_first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise InvalidModel(f"{name} built a {type(module).__name__}, not a torch.nn.Module.")
    return module


def _imported(name: str) -> Callable[..., object]:
    # A console script does not see the working folder, where the class usually is.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    parts = name.replace(":", ".").split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
                continue
            raise InvalidModel(f"--model {name}: importing {module} failed: {error}.") from error
        except Exception as error:  # the user's module may raise anything on import; the message names it
            raise InvalidModel(f"--model {name}: importing {module} failed: {_first_line(error)}") from error
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise InvalidModel(f"--model {name}: {module} has no {'.'.join(parts[cut:])}.")
            found = getattr(found, part)
        if not callable(found):
            raise InvalidModel(f"--model {name} is a {type(found).__name__}, neither a class nor a factory.")
        return found
    raise InvalidModel(f"--model {name}: no module {parts[0]!r} in {os.getcwd()} or among the installed packages.")


def _listed(names: object) -> str:
    texts = [str(name) for name in names]  # type: ignore[attr-defined]
    return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "") or "none"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
