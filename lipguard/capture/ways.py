"""What is taken for a module: `nn.Module`, exported programs; what else is given is refused with the way to a module."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import fx, nn

from lipguard.errors import InvalidModel, UnsupportedLayer
from lipguard.network import Network

__all__ = ["Model", "example_of", "rows_of", "subject_of"]

Model = nn.Module | Network | torch.export.ExportedProgram
"""What can be read."""

_SCRIPTED = (
    "is a TorchScript module, which hides its calls. Give the nn.Module it was made from, with these weights: "
    "module.load_state_dict(scripted.state_dict()). Where its class is lost, write the file as ONNX and read that with "
    "lipguard.from_onnx(file)."
)
_FILE = (
    "a file is read first: lipguard.from_onnx(file) for ONNX, torch.export.load(file) for an exported program, "
    "lipguard.checkpoint.load_module(file, model='module.Class') for a checkpoint."
)
_OTHER = "an nn.Module, a torch.export.ExportedProgram or a lipguard.Network is needed."
_CALLABLE = "a function is given as a module: class F(torch.nn.Module) with forward(self, x), its weights as parameters."


def subject_of(model: object) -> nn.Module | Network:
    """The module, or the network, that a model stands for.

    An exported program stands for the module it runs, with the weights that the program holds.

    Raises:
        InvalidModel: it is neither; the message says how to get at a module.
        UnsupportedLayer: it is, or holds, a TorchScript module.
    """
    if isinstance(model, Network):
        return model
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if isinstance(model, torch.jit.ScriptFunction):
        raise UnsupportedLayer(f"model {_SCRIPTED}")
    if not isinstance(model, nn.Module):
        raise InvalidModel(f"model is {type(model).__name__}; {_remedy(model)}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedLayer(f"{f'model.{name}' if name else 'model'} {_SCRIPTED}")
    return model


def _remedy(model: object) -> str:
    if isinstance(model, str | os.PathLike):
        return _FILE
    home = type(model).__module__.partition(".")[0]
    if home == "onnx":
        return "read it with lipguard.from_onnx(model)."
    if home in ("keras", "tensorflow", "tf_keras", "jax", "flax", "sklearn", "onnxruntime"):
        return f"{_OTHER} Write the {home} model as ONNX and read that with lipguard.from_onnx(file)."
    if isinstance(model, type):
        return f"{_OTHER} This is the class itself: make an instance, {model.__name__}(...)."
    return f"{_OTHER} {_CALLABLE[0].upper()}{_CALLABLE[1:]}" if callable(model) else _OTHER


def example_of(model: object) -> Any:
    """The example that a model brings with it: an exported program's, a module's `example_input_array`; None without one."""
    if isinstance(model, torch.export.ExportedProgram) and model.example_inputs is not None:
        args, kwargs = model.example_inputs
        return dict(kwargs) if kwargs and not args else args[0] if len(args) == 1 and not kwargs else tuple(args)
    return getattr(model, "example_input_array", None)


def rows_of(module: nn.Module) -> int | None:
    """The number of samples that a graph was exported for, the least where that may vary between bounds; None for any number.

    A program for one sample is a function of that sample, whatever it does. One for more is read with exactly so many.
    """
    if not isinstance(module, fx.GraphModule):
        return None
    values = (node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder")
    first = next((v for v in values if isinstance(v, torch.Tensor) and v.ndim and v.is_floating_point()), None)
    if first is None:
        return None
    rows = first.shape[0]
    if isinstance(rows, torch.SymInt):
        return max(2, int(rows.node.shape_env.bound_sympy(rows.node.expr).lower))
    return rows
