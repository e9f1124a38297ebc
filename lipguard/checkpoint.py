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
from lipguard.layouts import KEYS, renamings, states_of, tensors_of

__all__ = ["example_input", "load_module"]

_REFUSED = re.compile(r"WeightsUnpickler error:.*?(?:GLOBAL|class) (\S+)")
"""What PyTorch's restricted unpickler says of the class or function it declines to import."""


def load_module(path: str | os.PathLike[str], *, model: str | None = None, trust: bool = False, example: Any = None) -> nn.Module:
    """The module saved at `path`, on the CPU and in evaluation mode.

    Args:
        path: a Lightning checkpoint, a state_dict (by itself, or in a checkpoint under one of `lipguard.layouts.KEYS`; with or
            without what DataParallel, DDP, torch.compile and a wrapping module put before its names), a file of safetensors, or
            (with `trust`) a whole module saved by `torch.save(module)`; or an ONNX model, a file named *.onnx.
        model: dotted name of the class, or of a factory, that builds the module; called with those of the checkpoint's
            hyperparameters that it accepts. Not needed for a whole module or an ONNX model.
        trust: read the file with full pickle, which runs code that the file names.
        example: an input, for an ONNX model that leaves its shape open.

    Raises:
        UnreadableCheckpoint: the file is missing, damaged, or needs `trust`.
        InvalidModel: `model` cannot be imported or built, or does not fit the weights.
    """
    file = Path(path)
    if file.suffix == ".onnx":
        from lipguard.onnx import from_onnx

        return from_onnx(file, example=example)
    payload = _read(file, trust)
    if isinstance(payload, Mapping):
        whole = next((payload[key] for key in KEYS if isinstance(payload.get(key), nn.Module)), None)
        payload = payload if whole is None else whole
    if isinstance(payload, nn.Module):
        return payload.eval()
    if not isinstance(payload, Mapping):
        raise UnreadableCheckpoint(f"{file} holds a {type(payload).__name__}, neither a checkpoint nor a module.")
    if model is None:
        raise InvalidModel(f"{file} holds weights without their module. Name its class or a factory with --model module.Class.")
    states = states_of(payload)
    if not states:
        raise UnreadableCheckpoint(
            f"{file} has no state_dict, neither by itself nor under {', '.join(KEYS)}: {_listed(payload)} found. Write one with "
            "torch.save(module.state_dict(), file)."
        )
    module = _build(model, payload)
    fits = [(key, weights) for key, state in states.items() if (weights := _fitting(module, state)) is not None]
    if not fits:
        raise InvalidModel(f"{model} does not fit the weights in {file}: {_unfit(module, states)}")
    (key, weights), *others = fits
    for other, more in others:
        if any(not torch.equal(value, more[name]) for name, value in weights.items()):
            raise InvalidModel(
                f"{file} holds weights that fit {model} twice, under {key!r} and under {other!r}. Write those that are meant "
                f"into a file of their own: torch.save(torch.load(file, weights_only=True)[{key!r}], file)."
            )
    module.load_state_dict(weights)
    return module.eval()


def example_input(module: nn.Module | None, shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None) -> Any:
    """An input to capture `module` with: zeros of `shape`, its `example_input_array`, or zeros for its first Linear layer.

    Args:
        module: what is captured; None where only its shape is known.
        shape: with its batch dimension; of a module of several inputs one for each by its name.

    Raises:
        InvalidExample: nothing tells the shape.
    """
    parameters = () if module is None else module.parameters()
    like = next((p for p in parameters if p.is_floating_point()), torch.zeros(0))
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
    layers = () if module is None else module.modules()
    first = next((layer for layer in layers if next(layer.parameters(recurse=False), None) is not None), None)
    if isinstance(first, nn.Linear):
        return torch.zeros(1, first.in_features, dtype=like.dtype)
    raise InvalidExample(
        f"{type(module).__name__} does not tell the shape of its input. Give it with --input-shape, such as 1,784."
    )


def _fitting(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights under the names that the module knows them by, all of them and no others; None where no names fit."""
    for weights in renamings(state):
        try:
            missing, unexpected = module.load_state_dict(weights, strict=False)
        except RuntimeError:  # other shapes
            continue
        if not missing and not unexpected:
            return weights
    return None


def _unfit(module: nn.Module, states: Mapping[str, Mapping[str, Tensor]]) -> str:
    """What is missing and what is too much in the state_dict that comes nearest, and what to type."""
    wanted = set(module.state_dict())
    nearest = min((weights for state in states.values() for weights in renamings(state)), key=lambda w: len(wanted ^ set(w)))
    missing = [name for name in module.state_dict() if name not in nearest]
    unexpected = [name for name in nearest if name not in wanted]
    if not missing and not unexpected:
        try:
            module.load_state_dict(nearest)
        except RuntimeError as error:
            return f"{' '.join(str(error).split())} Name the class, or a factory, with the sizes that were trained."
    told = f"missing {_listed(missing)}; not expected {_listed(unexpected)}. "
    for key, state in states.items():
        for prefix in {name[: i + 1] for name in state for i, letter in enumerate(name) if letter == "."}:
            if {name.removeprefix(prefix) for name in state if name.startswith(prefix)} == wanted:
                held = f"torch.load(file, weights_only=True){f'[{key!r}]' if key else ''}.items()"
                part = f"{{name.removeprefix({prefix!r}): w for name, w in {held} if name.startswith({prefix!r})}}"
                return (
                    f"{told}The names under {prefix!r} fit it. Write them into a file of their own, torch.save({part}, 'part.pt')"
                )
    return f"{told}Name the class that was trained, the LightningModule itself for a Lightning checkpoint."


def _read(file: Path, trust: bool) -> object:
    if not file.is_file():
        raise UnreadableCheckpoint(f"{file} is not a file.")
    if file.suffix == ".safetensors":
        return tensors_of(file, file.read_bytes())
    try:
        return torch.load(file, map_location="cpu", weights_only=not trust)
    except Exception as error:  # damaged bytes can make the unpickler raise anything; the message names the file
        if "TorchScript" in str(error):
            raise UnreadableCheckpoint(
                f"{file} is a TorchScript archive, whose calls are hidden. Take its weights, "
                "torch.save(torch.jit.load(file).state_dict(), 'weights.pt'), and name the class it was made from with --model."
            ) from error
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
