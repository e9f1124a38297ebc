"""`from_onnx`: an ONNX graph as a graph of torch.fx whose nodes are the operators of the table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from lipguard.errors import InvalidExample, InvalidModel, UnknownName, UnsupportedLayer
from lipguard.onnx.building import Builder
from lipguard.onnx.comparison import compare
from lipguard.onnx.operators.shapes import TYPES

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, ValueInfoProto

__all__ = ["from_onnx", "weights_of"]


def from_onnx(
    model: str | os.PathLike[str] | ModelProto, *, example: Any = None, outputs: str | Sequence[str] | None = None
) -> fx.GraphModule:
    """The module that an ONNX graph computes, made of torch calls.

    It is compared with onnxruntime on random inputs where that is installed; a difference beyond rounding is refused. A graph
    for one sample (a first dimension of 1, or an open one with a constant reshape to one row) is a function of that sample. The
    module's `example_input_array` is an input of the shape that the graph states, its weights are parameters that need no
    gradient, and its submodules are the graph's nodes under their names.

    Args:
        model: a file, or a model of the package onnx. Operators of the default domain are read, all opsets.
        example: an input, or a tuple of several, where the graph leaves more open than the number of samples.
        outputs: the tensor, or those, to end at: any of the graph's, also inner ones; None for its outputs.
    Returns:
        A module in evaluation mode; it returns one tensor, or a dictionary by name of several.
    Raises:
        ModuleNotFoundError: the package onnx is not installed.
        InvalidModel: the file is no ONNX model, or the module differs from onnxruntime.
        UnsupportedLayer: an operator that is not in the table, or a mode of one; the message names the node.
        UnknownName: there is no such tensor.
        InvalidExample: the graph leaves an input's shape open, and no example is given.
    """
    proto = _loaded(model)
    graph, opset = proto.graph, _opset(proto)
    if outputs is not None:
        _end_at(graph, [outputs] if isinstance(outputs, str) else list(outputs))
    module, inputs = Builder(graph, opset).module()
    examples = _examples(inputs, example)
    rows = _rows(module, inputs, examples)
    for placeholder, one in zip(module.graph.find_nodes(op="placeholder"), examples, strict=True):
        if rows is not None:
            placeholder.meta["val"] = torch.empty(one.shape, dtype=one.dtype, device="meta")
    compare(proto, module, [one.name for one in inputs], examples, free=rows is None)
    module.example_input_array = examples[0] if len(examples) == 1 else tuple(examples)  # pyright: ignore[reportArgumentType]
    return module


def weights_of(data: bytes) -> dict[str, Tensor]:
    """The state_dict that `from_onnx` gives the module of a file with these bytes; nothing is compared.

    Raises:
        LipguardError: the file is no ONNX model that can be read, or keeps weights in another file.
    """
    proto = _loaded(data)
    elsewhere = [one.name for one in proto.graph.initializer if one.external_data]
    if elsewhere:
        raise InvalidModel(
            f"the ONNX file keeps its weights ({elsewhere[0]!r}, ...) in another file. Write one file: "
            "onnx.save(onnx.load('net.onnx'), 'whole.onnx')."
        )
    return dict(Builder(proto.graph, _opset(proto)).module()[0].state_dict())


def _loaded(model: str | os.PathLike[str] | bytes | ModelProto) -> ModelProto:
    try:
        import onnx
        import onnx.inliner
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading ONNX needs the package onnx, which is not installed. Run pip install 'lipguard[onnx]'.", name="onnx"
        ) from error
    if isinstance(model, str | os.PathLike | bytes):
        path = "the file" if isinstance(model, bytes) else Path(model)
        if isinstance(path, Path) and not path.is_file():
            raise InvalidModel(f"{path} is not a file.")
        try:
            proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(Path(model))
        except Exception as error:  # damaged bytes can make the parser raise anything; the message names the file
            told = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise InvalidModel(f"{path} is truncated, damaged or no ONNX model ({told}).") from error
    elif isinstance(model, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
    else:
        raise InvalidModel(
            f"model is {type(model).__name__}; from_onnx takes a file, or an onnx.ModelProto as onnx.load gives it."
        )
    if not proto.graph.node or not proto.graph.output:
        raise InvalidModel("the ONNX model holds no graph with nodes and outputs.")
    return onnx.inliner.inline_local_functions(proto) if proto.functions else proto


def _opset(proto: ModelProto) -> int:
    return next((one.version for one in proto.opset_import if one.domain in ("", "ai.onnx")), 1)


def _end_at(graph: GraphProto, names: list[str]) -> None:
    """Cut the graph behind the tensors named, and drop the nodes that they do not need."""
    import onnx

    made = {name for node in graph.node for name in node.output if name}
    for name in names:
        if name not in made:
            raise UnknownName(f"the graph has no tensor {name!r}; it has {', '.join(sorted(made)[:40])}.")
    needed, kept = set(names), []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:], graph.output[:]
    graph.node.extend(reversed(kept))
    graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)


def _examples(inputs: Sequence[ValueInfoProto], example: Any) -> list[Tensor]:
    """One tensor for each input: those given, or zeros of the shape that the graph states, an open first dimension being 1."""
    if example is not None:
        given = (
            list(example.values())
            if isinstance(example, Mapping)
            else [example]
            if isinstance(example, Tensor)
            else list(example)
        )
        if len(given) != len(inputs):
            names = ", ".join(one.name for one in inputs)
            raise InvalidExample(f"the graph has {len(inputs)} inputs ({names}), the example has {len(given)}.")
        return [one.to(TYPES[info.type.tensor_type.elem_type]) for one, info in zip(given, inputs, strict=True)]
    return [_zeros(info) for info in inputs]


def _zeros(info: ValueInfoProto) -> Tensor:
    """Zeros of the shape of an input, an open first dimension being 1."""
    kind = info.type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else 0 for d in kind.shape.dim]
    shown = ", ".join(str(n or "?") for n in sizes)
    if not kind.HasField("shape") or 0 in sizes[1:]:
        raise InvalidExample(
            f"the graph leaves the shape of its input {info.name!r} open ({shown}). Give example=torch.zeros(...), one sample; "
            "--input-shape on the command line."
        )
    if len(sizes) < 2:
        raise InvalidExample(
            f"the graph's input {info.name!r} has the shape ({shown}), without a dimension of samples. Give it one, as in (1, 5)."
        )
    if kind.elem_type not in TYPES:
        raise UnsupportedLayer(f"the graph's input {info.name!r} is of type {kind.elem_type} of TensorProto.")
    return torch.zeros([sizes[0] or 1, *sizes[1:]], dtype=TYPES[kind.elem_type])


def _rows(module: fx.GraphModule, inputs: Sequence[ValueInfoProto], examples: Sequence[Tensor]) -> int | None:
    """The number of samples the graph is for; None where it is for any number."""
    first = inputs[0].type.tensor_type.shape.dim
    if not first or (first[0].HasField("dim_value") and first[0].dim_value > 0):
        return len(examples[0])
    two = [one[:1].repeat(2, *(1 for _ in one.shape[1:])) for one in examples]
    try:
        with torch.no_grad():
            result = module(*two)
        parts = result.values() if isinstance(result, Mapping) else [result]
        return None if all(part.ndim and len(part) == 2 for part in parts) else 1
    except UnsupportedLayer:
        raise
    except Exception:  # a constant shape for one sample inside: the graph is a function of one
        return 1
