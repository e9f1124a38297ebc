"""Lowering rules by the name of the torch function they lower; one small file per family.

A rule is `rule(trace, *args, **kwargs) -> int`, called with the call's own arguments, every tensor that depends on the
input replaced by a `Value`; it emits nodes through the `Trace` and returns the index of the node that holds the result,
or a tuple of them for a call that returns several tensors; None stands for a result that does not depend on the input, as of
`constant.to(value)`.
A rule for a class of modules also gets the module: `rule(trace, module, *args, **kwargs)`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from lipguard.capture.rules.overloads import Overload, by_name

if TYPE_CHECKING:
    from lipguard.capture.trace import Placed, Trace, Value

Rule = Callable[..., "int | Placed | tuple[int | Placed | None, ...] | None"]
RuleT = TypeVar("RuleT", bound=Rule)

COLUMNS = "linear of columns"
"""The product W X with a matrix of one sample in each column: `linear`, with the samples along the last dimension."""

_FAMILIES = (
    "activation", "arithmetic", "aten", "convolution", "coupled", "refused", "linear", "normalization", "pooling",
    "products", "rearrange", "shape", "writes", "lengths", "order", "recurrent", "fourier", "elementwise",
)  # fmt: skip

_FUNCTIONS: dict[object, Rule] = {}
_COMPLEX: dict[object, Rule] = {}
_MODULES: dict[type[nn.Module], tuple[Rule, object]] = {}
_WHOLE: set[Rule] = set()

# Names under which Python's operators arrive; an in-place variant has the same rule as the plain one.
_OPERATORS = {
    "__add__": "add", "__radd__": "add", "__iadd__": "add", "__sub__": "sub", "__isub__": "sub", "__rsub__": "rsub",
    "__mul__": "mul", "__rmul__": "mul", "__imul__": "mul", "__truediv__": "div", "__itruediv__": "div", "__div__": "div",
    "__idiv__": "div", "__rdiv__": "rdiv", "__rtruediv__": "rdiv", "__matmul__": "matmul", "__rmatmul__": "rmatmul",
    "__neg__": "neg", "__pos__": "positive", "__abs__": "abs", "__pow__": "pow", "__ipow__": "pow", "__rpow__": "rpow",
    "true_divide": "div", "divide": "div", "subtract": "sub", "multiply": "mul", "negative": "neg", "absolute": "abs",
    "clip": "clamp", "log_sigmoid": "logsigmoid",
}  # fmt: skip


def lowers(*keys: type[nn.Module] | Callable[..., object] | str, whole: bool = False) -> Callable[[RuleT], RuleT]:
    """Register a lowering rule for modules, torch functions or Tensor methods.

    Args:
        keys: subclasses of nn.Module, torch functions (`torch.tanh` stands for `x.tanh()` and `x.tanh_()` too), or names
            of torch functions.
        whole: the rule takes values with the samples along any dimension, and returns `Placed`. Else it gets and returns
            values whose first dimension is the batch, of one sample where the forward computes without one.
    Returns:
        A decorator that returns the rule unchanged. A later rule for the same key replaces the earlier one.

    Example::

        import torch
        import lipguard as lg

        class Rational(torch.nn.Module):
            def forward(self, x):
                return x / (1 + x.abs())

        @lg.lowers(Rational)
        def rational(trace: lg.Trace, module: Rational, x: lg.Value) -> int:
            return trace.activation(x, torch.nn.functional.softsign)  # the same function, whose slopes are known

        lg.bound(torch.nn.Sequential(torch.nn.Linear(4, 8), Rational()), torch.zeros(1, 4))
    """

    def register(rule: RuleT) -> RuleT:
        if whole:
            _WHOLE.add(rule)
        for key in keys:
            if isinstance(key, type) and issubclass(key, nn.Module):
                _MODULES[key] = rule, key.forward
            else:
                _FUNCTIONS[key if isinstance(key, str) else canonical(key)] = rule
        return rule

    return register


def lowers_complex(*names: str, whole: bool = False) -> Callable[[RuleT], RuleT]:
    """Register a rule for calls in which a complex tensor takes part; a complex value has two entries for each number."""

    def register(rule: RuleT) -> RuleT:
        _COMPLEX.update(dict.fromkeys(names, rule))
        if whole:
            _WHOLE.add(rule)
        return rule

    return register


def complex_rule(key: object) -> Rule | None:
    """The rule for a canonical key, where a complex tensor takes part."""
    return _COMPLEX.get(key)


def function_rule(key: object) -> Rule | None:
    """The rule for a canonical key."""
    return _FUNCTIONS.get(key)


def spoken(key: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, tuple[Any, ...], dict[str, Any]]:
    """A call of an ATen overload as one of the torch function of its name; any other call as it is."""
    if not isinstance(key, Overload):
        return key, args, kwargs
    rule = _FUNCTIONS.get(key)
    return str(key), *((args, kwargs) if rule is None else by_name(rule, key, args, kwargs))


def takes_whole(rule: Rule) -> bool:
    """Whether the rule takes values with the samples along any dimension."""
    return rule in _WHOLE


def module_rule(kind: type[nn.Module]) -> Rule | None:
    """The rule for exactly this class, with the forward that it had: a subclass, or another forward, may compute otherwise."""
    rule, forward = _MODULES.get(kind, (None, None))
    return rule if rule is not None and kind.forward is forward else None


def torch_activation(trace: Trace, x: Value, function: Callable[..., object]) -> int:
    """A torch function on every entry of x, by its own rule.

    Raises:
        UnsupportedLayer: it has no rule, needs more arguments, or is not elementwise.
    """
    name = getattr(function, "__name__", None) or repr(function)
    remedy = "Give trace.activation a lipguard.network.Elementwise, which states the function's slopes."
    rule = function_rule(canonical(function)) if callable(function) else None
    if rule is None:
        trace.refuse(f"names {name} as its activation, for which there is no rule. {remedy}")
    try:
        node = rule(trace, x)
    except TypeError:
        trace.refuse(f"names {name} as its activation, which needs more arguments. {remedy}")
    node = trace.settled(node) if isinstance(node, int) and node >= 0 else node
    made = trace.nodes[node] if isinstance(node, int) and node >= 0 else None
    if made is None or made.elementwise is None or not isinstance(node, int) or made.sources != (x.node,):
        trace.refuse(f"names {name} as its activation, which is not an elementwise function. {remedy}")
    return node


def canonical(function: Callable[..., object]) -> object:
    """The key of a torch function: its plain name, shared by torch.f, Tensor.f, Tensor.f_, F.f and aten.f; else the function."""
    overload = Overload.of(function)
    if overload is not None:
        return overload
    name = getattr(function, "__name__", None)
    if name is None:
        return function
    if name == "__get__":  # a property of Tensor
        return getattr(getattr(function, "__self__", None), "__name__", name)
    home = getattr(function, "__module__", None)
    if home is not None and home.split(".")[0] != "torch":
        return function
    if home == "torch.nn.functional" and name == "unfold":  # another function than Tensor.unfold
        return "im2col"
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _OPERATORS.get(name, name)


@cache
def load() -> None:
    """Import the rule files, and the entry points of the group `lipguard.rules`, once."""
    for family in _FAMILIES:
        importlib.import_module(f"lipguard.capture.rules.{family}")
    for entry in importlib.metadata.entry_points(group="lipguard.rules"):
        entry.load()


def called_as(func: Callable[..., object], key: object) -> str:
    """A torch function as people write it, for messages."""
    if not isinstance(key, str):
        return f"{getattr(func, '__module__', '')}.{getattr(func, '__name__', func)}"
    home = getattr(func, "__module__", None)
    if home == "torch.nn.functional" or home == "torch._C._nn":
        return f"F.{key}"
    return f"torch.{key}" if hasattr(torch, key) else f"Tensor.{key}"
