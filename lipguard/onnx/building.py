"""An ONNX graph as a graph of torch.fx: one module for each node, whose function is that of the table."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from lipguard.errors import UnsupportedLayer
from lipguard.onnx.operators import Unread, known, operator_of, several_of
from lipguard.onnx.operators.shapes import TYPES

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, ValueInfoProto

__all__ = ["Builder", "Operator"]


class Operator(nn.Module):
    """One node of an ONNX graph.

    Attributes:
        kind: the operator's name.
        node: the node's name in the file.
    """

    def __init__(self, kind: str, node: str, function: Any, attributes: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.node = kind, node
        self._function, self._attributes = function, attributes

    def forward(self, *inputs: Any) -> Any:
        """What the node makes of its inputs.

        Raises:
            UnsupportedLayer: a mode or a type that has no reading.
        """
        try:
            return self._function(*inputs, **self._attributes)
        except Unread as error:
            raise UnsupportedLayer(f"node {self.node!r} ({self.kind}) {error}") from error

    def extra_repr(self) -> str:
        """The operator and its attributes."""
        given = (f"{name}={'...' if isinstance(value, Tensor) else value!r}" for name, value in self._attributes.items())
        return ", ".join([self.kind, *given])


class Builder:
    """Makes the graph of torch.fx, one node after the other."""

    def __init__(self, graph: GraphProto, opset: int) -> None:
        self._graph, self._opset = graph, opset
        self._root = nn.Module()
        self._made = fx.Graph()
        self._values: dict[str, fx.Node] = {}
        self._taken: set[str] = set()

    def module(self) -> tuple[fx.GraphModule, list[ValueInfoProto]]:
        """The module, and the graph's inputs that are no weights."""
        weights = {one.name: one for one in self._graph.initializer}
        if self._graph.sparse_initializer:
            raise UnsupportedLayer("the graph has sparse weights, which have no reading. Write them as dense tensors.")
        inputs = [one for one in self._graph.input if one.name not in weights]
        for one in inputs:
            self._values[one.name] = self._made.placeholder(self._name(one.name))
        for name, weight in weights.items():
            self._hold(name, _tensor(weight, f"the weight {name!r}"))
        for place, node in enumerate(self._graph.node):
            self._add(node, node.name or f"{node.op_type}_{place}")
        results = {one.name: self._read(one.name, "the graph's output") for one in self._graph.output}
        self._made.output(next(iter(results.values())) if len(results) == 1 else results)
        module = fx.GraphModule(self._root, self._made, "OnnxGraph")
        module.graph.eliminate_dead_code()
        module.recompile()
        module.delete_all_unused_submodules()
        return module.eval(), inputs

    def _add(self, node: NodeProto, name: str) -> None:
        attributes = {one.name: _attribute(one, name, node.op_type) for one in node.attribute}
        own = node.domain in ("", "ai.onnx")
        if own and node.op_type == "Constant":
            self._hold(node.output[0], _constant(attributes, name))
            return
        function = operator_of(node.op_type, self._opset) if own else None
        if function is None:
            domain = "" if own else f" of the domain {node.domain!r}"
            first = next((one for one in node.input if one in self._values), "...")
            raise UnsupportedLayer(
                f"node {name!r} ({node.op_type}{domain}, opset {self._opset}) has no reading. End the graph before it, "
                f"lipguard.from_onnx(file, outputs={first!r}), or write it with what is read: {', '.join(known())}, Constant."
            )
        while node.input and not node.input[-1]:
            node.input.pop()
        if several_of(node.op_type):
            attributes["outputs"] = len(node.output)
        read = tuple(self._read(one, f"node {name!r}") if one else None for one in node.input)
        try:
            inspect.signature(function).bind(*read, **attributes)
        except TypeError as error:
            raise UnsupportedLayer(
                f"node {name!r} ({node.op_type}, opset {self._opset}) has inputs or attributes that have no reading: {error}."
            ) from error
        target = self._name(name)
        self._root.add_module(target, Operator(node.op_type, name, function, attributes))
        made = self._made.call_module(target, read)
        if several_of(node.op_type):
            for i, output in enumerate(node.output):
                self._values[output] = self._made.call_function(operator.getitem, (made, i))
        else:
            # Further outputs (a mask, indices, statistics of training) are refused where they are read: nothing is known of them.
            self._values[node.output[0]] = made

    def _hold(self, name: str, tensor: Tensor) -> None:
        target = self._name(name)
        if tensor.is_floating_point():
            self._root.register_parameter(target, nn.Parameter(tensor, requires_grad=False))
        else:
            self._root.register_buffer(target, tensor)
        self._values[name] = self._made.get_attr(target)

    def _read(self, name: str, reader: str) -> fx.Node:
        if name not in self._values:
            raise UnsupportedLayer(f"{reader} reads {name!r}, which no node gives in inference (a mask, indices, or statistics).")
        return self._values[name]

    def _name(self, name: str) -> str:
        """A Python name like one of the file's, used once."""
        plain = re.sub(r"\W", "_", name).strip("_") or "x"
        plain = f"n{plain}" if plain[0].isdigit() else plain
        found, count = plain, 1
        while found in self._taken or hasattr(self._root, found):
            found, count = f"{plain}_{count}", count + 1
        self._taken.add(found)
        return found


def _tensor(proto: Any, what: str) -> Tensor:
    from onnx import numpy_helper

    if proto.data_type not in TYPES:
        raise UnsupportedLayer(f"{what} is of type {proto.data_type} of TensorProto, which torch does not have.")
    if TYPES[proto.data_type] == torch.bfloat16:
        return torch.from_numpy(numpy_helper.to_array(proto).astype("float32")).to(torch.bfloat16)
    return torch.from_numpy(numpy_helper.to_array(proto).copy())


def _attribute(attribute: Any, name: str, kind: str) -> Any:
    import onnx

    if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
        raise UnsupportedLayer(
            f"node {name!r} ({kind}) runs a graph of its own: its branches and loops are not followed. Export the model for one "
            "branch, or end the graph before it with lipguard.from_onnx(file, outputs=...)."
        )
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return _tensor(value, f"node {name!r}")
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _constant(attributes: Mapping[str, Any], name: str) -> Tensor:
    (kind, value), *_ = attributes.items()
    if isinstance(value, Tensor):
        return value
    if kind in ("value_float", "value_floats"):
        return torch.tensor(value, dtype=torch.float32)
    if kind in ("value_int", "value_ints"):
        return torch.tensor(value, dtype=torch.int64)
    raise UnsupportedLayer(f"node {name!r} (Constant) holds a {kind}, which has no reading.")
