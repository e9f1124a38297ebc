"""The nodes emitted so far, and what a rule needs to emit more; `lipguard.capture.tracer` calls the rules."""

from __future__ import annotations

import ast
import linecache
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import torch
from torch import Tensor, nn

import lipguard
from lipguard.capture.expressions import Expression
from lipguard.capture.rules.registry import torch_activation
from lipguard.capture.symbolic import extend, settle
from lipguard.errors import InvalidModel, UnsupportedLayer
from lipguard.network import Activation, Affine, Coupled, Coupling, Implicit, Input, Node, Sum
from lipguard.network.activations import Elementwise
from lipguard.network.operators import Operator

UNKNOWN = -1
"""What a rule returns for one of its results that no node holds, such as indices: it is refused where it is used."""


class BatchMoved(UnsupportedLayer):
    """A value whose samples no longer lie along one dimension, or along one that a rule cannot follow; none is mixed."""


@dataclass(frozen=True)
class Value:
    """A tensor that depends on the input: the node that holds it, and its concrete value on the example.

    Attributes:
        node: index of the node; its entries are those of one sample, read in row-major order.
        tensor: the value of all samples, in the module's own dtype.
        axis: dimension along which the samples lie, None where the tensor is one sample. Rules get 0, but for those that are
            registered with `whole=True`.
    """

    node: int
    tensor: Tensor
    axis: int | None = 0

    @property
    def rows(self) -> int:
        """Samples."""
        return 1 if self.axis is None or not self.tensor.ndim else self.tensor.shape[self.axis]

    @property
    def size(self) -> int:
        """Entries of one sample: two for a complex number."""
        return self.tensor.numel() // max(self.rows, 1) * parts(self.tensor)

    def batched(self) -> Value:
        """The same value with the samples along the first dimension."""
        if self.axis == 0:
            return self
        return Value(self.node, self.tensor[None] if self.axis is None else self.tensor.movedim(self.axis, 0))


@dataclass(frozen=True)
class Placed:
    """What a rule registered with `whole=True` returns: a node, and the dimension along which the samples lie."""

    node: int
    axis: int | None


class Trace:
    """The nodes emitted so far, and what a rule needs to emit more."""

    def __init__(self, size: int, names: Mapping[int, str], live: bool, root: str) -> None:
        self.nodes: list[Node] = [Input(size)]
        self.sizes = [size]
        self.live = live
        self._names = names
        self._stack: list[tuple[str, nn.Module]] = []
        self._root = root
        self.call = ""
        self.pending: dict[int, Expression] = {}
        self.rectified: dict[object, int] = {}
        self.made: dict[int, tuple[Expression, int]] = {}
        self.device, self.unit = torch.device("cpu"), torch.finfo(torch.float64).eps
        self.origin: Callable[[Tensor], str | None] = lambda _: None
        """What a tensor's dependence on the input came from; None for a constant."""

    @property
    def path(self) -> str:
        """Path of the module whose forward runs."""
        path = self._stack[-1][0] if self._stack else ""
        return f"{self._root}.{path}" if path else self._root

    @property
    def place(self) -> str:
        """Path and class of the module whose forward runs, and the call inside it unless that is plain from the class."""
        if not self._stack:
            return self._root
        kind = plain_class(self._stack[-1][1])
        place = f"{self.path} ({kind.__name__})"
        return place if kind.__module__.startswith("torch.nn.modules") or not self.call else f"{place}: {self.call}"

    @property
    def module(self) -> nn.Module | None:
        """The module whose forward runs."""
        return self._stack[-1][1] if self._stack else None

    @contextmanager
    def inside(self, path: str, module: nn.Module) -> Iterator[None]:
        """While the forward of `module` runs."""
        self._stack.append((path, module))
        try:
            yield
        finally:
            self._stack.pop()

    def refuse(self, reason: str) -> NoReturn:
        """Raise UnsupportedLayer: the place, the reason, and the line of the user's code that runs."""
        line = user_line()
        raise UnsupportedLayer(f"{self.place} {reason}{f' (At {line}.)' if line else ''}")

    def value(self, node: int, tensor: Tensor) -> Value:
        """A value for a further rule, of the shape of `tensor`."""
        return Value(node, tensor)

    def at(self, node: int) -> Value:
        """A node's value for a further rule that does not look at its shape."""
        return Value(node, torch.empty(0))

    def put(self, expression: Expression, size: int) -> int:
        """A place for an elementwise expression that is not settled yet; see `lipguard.capture.symbolic`."""
        self.pending[len(self.nodes)] = expression
        self.nodes.append(Input(size, "not settled"))
        self.sizes.append(size)
        return len(self.nodes) - 1

    def settled(self, node: int) -> int:
        """The node itself, or what its expression is settled to.

        Raises:
            UnsupportedLayer: the expression has no bound that is known, for the reason it gives.
        """
        return settle(self, self.pending[node]) if node in self.pending else node

    def affine(self, x: Value, operator: Operator, bias: Tensor | None = None, bias_radius: Tensor | None = None) -> int:
        """operator(x) + bias; a rule that rounds a coefficient says so in operator.rho, one that rounds a bias in its radius."""
        return self._emit(Affine(x.node, operator, bias, self.path, bias_radius))

    def activation(self, x: Value, function: Elementwise | Callable[..., object]) -> int:
        """The function on every entry of x: an `Elementwise`, or a torch function whose own rule gives one (`torch.tanh`)."""
        if not isinstance(function, Elementwise):
            return torch_activation(self, x, function)
        if x.node in self.pending and (extended := extend(self.pending[x.node], function)) is not None:
            return self.put(extended, self.sizes[x.node])
        return self._emit(Activation(x.node, function, self.path))

    def coupled(self, x: Value, function: Coupling) -> int:
        """A function of groups of the entries of x."""
        return self._emit(Coupled(x.node, function, self.path))

    def implicit(self, v: Value, operator: Operator, function: Elementwise) -> int:
        """The solution z of z = function(operator(z) + v).

        Raises:
            InvalidModel: the layer is not known to be well posed; the message says why.
        """
        node = Implicit(v.node, operator, function, self.path)
        _ = node.scaling
        return self._emit(node)

    def sum(self, *values: Value) -> int:
        """The sum of values of one shape."""
        return self._emit(Sum(tuple(v.node for v in values), self.path))

    def constant(self, tensor: Tensor, label: str) -> Tensor:
        """The tensor's exact value in float64: a detached copy, or on request part of the autograd graph.

        Raises:
            InvalidModel: it holds nan or inf.
            UnsupportedLayer: it depends on the input.
        """
        if isinstance(tensor, Value) or self.origin(tensor) is not None:
            self.refuse(f"has a {label} that depends on the input: the map is not affine.")
        if tensor.is_complex():
            self.refuse(f"has a complex {label}.")
        plain = tensor.detach().to(torch.float64, copy=True)
        if not tensor.is_floating_point() and bool((plain.abs() > 2.0**53).any()):
            self.refuse(f"has a {label} of integers above 2^53, which float64 does not hold.")
        # A finite sum proves every entry finite; an infinite one may also be an overflow.
        if not bool(plain.sum().isfinite()) and not bool(plain.isfinite().all()):
            name = self._names.get(id(tensor), f"{self.path}: {label}")
            raise InvalidModel(f"{name} has {int((~plain.isfinite()).sum())} nan or infinite entries: it is not a function.")
        return tensor.to(torch.float64) if self.live and tensor.requires_grad else plain

    def per_feature(self, constant: Tensor | float, x: Value) -> Tensor:
        """A constant that meets x entry by entry: 0-d, or one number for each of the node's entries."""
        if not isinstance(constant, Tensor):
            constant = torch.tensor(constant, dtype=torch.float64, device=x.tensor.device)
        value = self.constant(constant, "constant").to(x.tensor.device)
        if value.numel() == 1 and value.ndim <= x.tensor.ndim:
            return value.reshape(())
        shape = x.tensor.shape
        try:
            fits = torch.broadcast_shapes(value.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            self.refuse(f"meets a constant of shape {tuple(value.shape)} with a value of shape {tuple(shape)}.")
        rows = value.expand(shape)
        if value.ndim == len(shape) and not bool((rows == rows[:1]).all()):
            self.refuse("treats the samples of a batch differently.")
        return rows[0].reshape(-1)

    def _emit(self, node: Node) -> int:
        node = node.moved(self.settled)
        # max(a, b) and min(a, b), written apart, are two results of one sort: what is selected, joined or sorted twice
        # is one node.
        for i, known in enumerate(self.nodes):
            if _same(known, node):
                return i
        self.sizes.append(node.length([self.sizes[s] for s in node.sources]))
        self.nodes.append(node)
        return len(self.nodes) - 1


def parts(tensor: Tensor) -> int:
    """Entries of a number: its real and imaginary parts."""
    return 2 if tensor.is_complex() else 1


def user_line() -> str | None:
    """File and line of the user's code that runs now: the innermost frame that is neither torch's nor ours."""
    frame = _user_frame()
    if frame is None:
        return None
    name = frame.f_code.co_filename
    return f"{os.path.relpath(name) if name.startswith(os.getcwd()) else name}:{frame.f_lineno}"


def for_people() -> bool:
    """Whether the text that is made now goes to `print` or to `logging`, where no branch reads it."""
    frame = _user_frame()
    if frame is None:
        return False
    if frame.f_code.co_filename == logging.__file__:
        return True
    if frame.f_globals.get("print", print) is not print or "print" in frame.f_locals:
        return False
    line, _, column, _ = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    except SyntaxError:
        return False
    here = (line or 0, column or 0)
    calls = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    return any(
        isinstance(call.func, ast.Name)
        and call.func.id == "print"
        and not call.keywords
        and (call.lineno, call.col_offset) <= here < (call.end_lineno or 0, call.end_col_offset or 0)
        for call in calls
    )


def _user_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "run_module":
        if not frame.f_code.co_filename.startswith((*_HOUSES, "<")):
            return frame
        frame = frame.f_back
    return None


_HOUSES = tuple(os.path.dirname(os.path.abspath(str(home.__file__))) + os.sep for home in (torch, lipguard))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without the subclass that torch's parametrizations put on top."""
    kind = type(module)
    return kind.__bases__[0] if "parametrizations" in module._modules and kind.__name__.startswith("Parametrized") else kind


def _same(a: Node, b: Node) -> bool:
    """Whether two nodes are the same sum, selection or coupled function of the same values."""
    if not (a.weightless and b.weightless and a.sources == b.sources and a.structure() == b.structure()):
        return False
    return all(torch.equal(s, t) for s, t in zip(a.tensors(), b.tensors(), strict=True))
