"""Following a module's own forward: every torch call on values that depend on the input is lowered by its rule.

The forward runs on plain tensors, concretely, under a `TorchFunctionMode`. The tracer keeps a table of the tensors that
depend on the input; a call that touches none of them just runs, so that shapes, parametrized weights and whatever
Python computes from them need no rule, and `isinstance(x, torch.Tensor)` holds. (torch.fx was tried on paper first:
its proxies are not tensors, and it stores free tensors on the user's module.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lipguard.capture.rules.registry import canonical, function_rule, module_rule, torch_activation
from lipguard.errors import InvalidModel, UnsupportedLayer
from lipguard.network import Activation, Affine, Coupled, Coupling, Implicit, Input, Node, Sum
from lipguard.network.activations import Elementwise
from lipguard.network.operators import Operator

# Calls that read only shape, type and place of a tensor.
_METADATA = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_floating_point",
    "is_complex", "is_contiguous", "get_device", "is_same_size", "result_type", "can_cast", "is_tensor", "is_inference",
    "is_signed", "is_conj", "is_neg", "is_storage", "type", "has_names", "__len__", "__repr__", "__format__", "__hash__",
    "retain_grad", "register_hook",
})  # fmt: skip
# Calls that make a constant of the shape and type of a value.
_FACTORIES = frozenset({
    "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_tensor",
})  # fmt: skip
# Calls whose result may steer Python: refused only where that result is used.
_QUESTIONS = frozenset({
    "gt", "lt", "ge", "le", "eq", "ne", "greater", "less", "greater_equal", "less_equal", "not_equal", "__gt__", "__lt__",
    "__ge__", "__le__", "__eq__", "__ne__", "isnan", "isinf", "isfinite", "isclose", "any", "all", "sum", "mean", "max",
    "min", "amax", "amin", "argmax", "argmin", "norm", "std", "var", "median", "count_nonzero", "logical_and", "logical_or",
    "logical_not", "__and__", "__or__", "__invert__",
})  # fmt: skip
# Calls that hand a value to Python.
_READS = frozenset({
    "__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "item", "tolist", "numpy", "__array__",
    "equal", "allclose", "is_nonzero",
})  # fmt: skip
# What is wrong with computing with the result of such a call.
_JUMPS = (
    "chooses by {origin} of a value that depends on the input: the result jumps unless both choices agree where the choice "
    "changes. Write it with relu, clamp or abs, or bound the part before it with submodule=...."
)
_LENGTH = (
    "uses {origin}, a length, which is not a function of single entries. x -> |x| has the constant 1 in its own norm: the "
    "bound of what is before it, submodule=..., bounds its length. x / |x| has the slope 1 / |x|, which has no bound near zero."
)
_SPREAD = (
    "uses {origin} of the sample itself: a division by the spread has no bound that is useful where the spread vanishes. Use "
    "BatchNorm, whose statistics are fixed, or bound the parts before and after it with submodule=...."
)
_WHY = dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne", "argmax", "argmin"), _JUMPS) | {
    "norm": _LENGTH, "std": _SPREAD, "var": _SPREAD,
}  # fmt: skip
UNKNOWN = -1
"""What a rule returns for a result that may be looked at, but not computed with."""


@dataclass(frozen=True)
class Value:
    """A tensor that depends on the input: the node that holds it, and its concrete value on the example.

    Attributes:
        node: index of the node; its entries are the tensor's, read in row-major order behind the batch dimension.
        tensor: (rows, ...) in the module's own dtype.
    """

    node: int
    tensor: Tensor

    @property
    def size(self) -> int:
        """Entries of one sample."""
        return self.tensor.numel() // max(len(self.tensor), 1) if self.tensor.ndim else 0


@dataclass
class _Known:
    node: int
    tensor: Tensor  # held, so that its id stays its own
    version: int
    origin: str = ""


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
        """Raise UnsupportedLayer: the place, and the reason."""
        raise UnsupportedLayer(f"{self.place} {reason}")

    def value(self, node: int, tensor: Tensor) -> Value:
        """A value for a further rule, of the shape of `tensor`."""
        return Value(node, tensor)

    def affine(self, x: Value, operator: Operator, bias: Tensor | None = None) -> int:
        """operator(x) + bias."""
        return self._emit(Affine(x.node, operator, bias, self.path))

    def activation(self, x: Value, function: Elementwise | Callable[..., object]) -> int:
        """The function on every entry of x: an `Elementwise`, or a torch function whose own rule gives one (`torch.tanh`)."""
        if not isinstance(function, Elementwise):
            return torch_activation(self, x, function)
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
        if isinstance(tensor, Value):
            self.refuse(f"has a {label} that depends on the input: the map is not affine.")
        if tensor.is_complex():
            self.refuse(f"has a complex {label}.")
        plain = tensor.detach().to(torch.float64, copy=True)
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
        # max(a, b) and min(a, b), written apart, are two results of one sort: what is selected, joined or sorted twice
        # is one node.
        for i, known in enumerate(self.nodes):
            if _same(known, node):
                return i
        self.sizes.append(node.length([self.sizes[s] for s in node.sources]))
        self.nodes.append(node)
        return len(self.nodes) - 1


class Tracer(TorchFunctionMode):
    """Keeps the table of tensors that depend on the input, and lowers the calls that touch one."""

    def __init__(self, trace: Trace, example: Tensor) -> None:
        super().__init__()
        self.trace = trace
        self._rows = len(example)
        self._known: dict[int, _Known] = {}
        self._asleep = False
        self._learn(example, 0)

    def node(self, tensor: object) -> int | None:
        """The node that holds a tensor's value, None if it does not depend on the input."""
        known = self._known.get(id(tensor))
        if known is None or not isinstance(tensor, Tensor):
            return None
        return self._value(tensor).node

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Lower the call if it touches a known tensor, and run it."""
        kwargs = kwargs or {}
        if self._asleep or not self._touches((args, kwargs)):
            return func(*args, **kwargs)
        key = canonical(func)
        if key in _METADATA or getattr(func, "__name__", "") == "__get__":
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):
                return result
        previous, self.trace.call = self.trace.call, _describe(func, key)
        try:
            return self._lower(func, key, args, kwargs)
        finally:
            self.trace.call = previous

    def module(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module's forward: by the rule for its class, or call by call."""
        rule = None if self._asleep else module_rule(plain_class(module))
        if rule is None or not self._touches((args, kwargs)):
            return forward(*args, **kwargs)
        node = rule(self.trace, module, *self._values(args), **self._values(kwargs))
        self._asleep = True
        try:
            result = forward(*args, **kwargs)
        finally:
            self._asleep = False
        return self._finish(result, node)

    def _lower(self, func: Callable[..., Any], key: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trace = self.trace
        if key in _FACTORIES:
            return func(*args, **kwargs)
        if key in _READS:
            trace.refuse(
                "lets Python read a number that depends on the input (bool, item, float): the branch it takes is known for the "
                "example only, and the function may jump where it changes. Where all inputs of a domain take one branch, bound a "
                "module that has that branch alone; else bound a submodule without it, or add a rule with @lowers."
            )
        rule = function_rule(key)
        if rule is None and key in _QUESTIONS:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                self._learn(result, UNKNOWN, trace.call)
                return result
        if rule is None:
            module = trace.module
            kind = None if module is None else plain_class(module)
            if kind is not None and kind.__module__.startswith("torch.nn.modules"):
                trace.refuse(f"has no rule. Bound a submodule with submodule=..., or add one with @lowers(nn.{kind.__name__}).")
            trace.refuse(f"has no rule. Bound a submodule with submodule=..., or add one with @lowers({trace.call}).")
        try:
            node = rule(trace, *self._values(args), **self._values(kwargs))
        except TypeError as error:
            raise UnsupportedLayer(f"{trace.place} is called with arguments that its rule does not know: {error}") from error
        result = func(*args, **kwargs)
        return self._finish(args[0] if key in ("__setitem__", "setitem") else result, node)

    def _finish(self, result: Any, node: int | tuple[int, ...]) -> Any:
        trace = self.trace
        if isinstance(node, tuple):
            if not isinstance(result, list | tuple) or len(result) != len(node):
                trace.refuse(f"returns {type(result).__name__} where its rule gives {len(node)} values.")
            for part, one in zip(result, node, strict=True):
                self._finish(part, one)
            return result
        if node == UNKNOWN and isinstance(result, Tensor):
            self._learn(result, UNKNOWN, trace.call)
            return result
        if not isinstance(result, Tensor):
            trace.refuse(f"returns {type(result).__name__}, not a tensor.")
        size = trace.sizes[node]
        if result.ndim == 0 or result.shape[0] != self._rows or result.numel() != self._rows * size:
            trace.refuse(
                f"gives shape {tuple(result.shape)} where {self._rows} samples of {size} entries are held: the batch dimension "
                "must stay first, as in x.flatten(1) or x.view(x.shape[0], -1)."
            )
        if not result.is_floating_point():
            trace.refuse(f"casts to {result.dtype}: a step function has no Lipschitz constant.")
        self._learn(result, node)
        return result

    def _learn(self, tensor: Tensor, node: int, origin: str = "") -> None:
        self._known[id(tensor)] = _Known(node, tensor, tensor._version, origin)

    def _value(self, tensor: Tensor) -> Value:
        known = self._known[id(tensor)]
        if known.node == UNKNOWN:
            name = known.origin.rpartition(".")[2].strip("_")
            if name in _WHY:
                self.trace.refuse(_WHY[name].format(origin=known.origin))
            self.trace.refuse(
                f"uses the result of {known.origin}, which has no rule. Bound a submodule with submodule=..., "
                f"or add one with @lowers({known.origin})."
            )
        if known.version != tensor._version:
            self.trace.refuse("reads a tensor that was modified in place through another view of it. Modify a clone.")
        return Value(known.node, tensor)

    def _values(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._value(tree) if id(tree) in self._known else tree
        if isinstance(tree, tuple | list):
            return type(tree)(self._values(t) for t in tree) if type(tree) in (tuple, list) else tree
        return {k: self._values(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    def _touches(self, tree: Any) -> bool:
        if isinstance(tree, Tensor):
            return id(tree) in self._known
        if isinstance(tree, tuple | list):
            return any(self._touches(t) for t in tree)
        return isinstance(tree, dict) and any(self._touches(t) for t in tree.values())


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without the subclass that torch's parametrizations put on top."""
    kind = type(module)
    return kind.__bases__[0] if "parametrizations" in module._modules and kind.__name__.startswith("Parametrized") else kind


def _same(a: Node, b: Node) -> bool:
    """Whether two nodes are the same sum, selection or coupled function of the same values."""
    if not (a.weightless and b.weightless and a.sources == b.sources and a.structure() == b.structure()):
        return False
    return all(torch.equal(s, t) for s, t in zip(a.tensors(), b.tensors(), strict=True))


def _describe(func: Callable[..., Any], key: object) -> str:
    if not isinstance(key, str):
        return f"{getattr(func, '__module__', '')}.{getattr(func, '__name__', func)}"
    home = getattr(func, "__module__", None)
    if home == "torch.nn.functional" or home == "torch._C._nn":
        return f"F.{key}"
    return f"torch.{key}" if hasattr(torch, key) else f"Tensor.{key}"
